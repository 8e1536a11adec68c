"""Models that call F.multi_head_attention_forward on weights of their own."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import multi_head_attention_forward

import fxcompress as fxc
from tests.exactness import TOLERANCE, difference, outputs

E, HEADS, TOKENS = 16, 4, 5
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "separate": {"separate": True},
    "other widths of keys": {"separate": True, "keys": 6},
    "no weights": {"need_weights": False},
    "weights of each head": {"average_attn_weights": False},
    "no bias": {"bias": False},
    "mask": {"attn_mask": torch.ones(TOKENS, TOKENS).triu(1).bool()},
    "mask of numbers": {"attn_mask": torch.linspace(0, 1, TOKENS * TOKENS).double().view(TOKENS, TOKENS)},
    "padding": {"key_padding_mask": torch.arange(2 * TOKENS).view(2, TOKENS) % 4 == 3},
    "as a name": {"function": multi_head_attention_forward},
    "one sample": {"samples": False},
    "decides": {"decides": True},
    "decides, separate": {"decides": True, "separate": True},
}


class Net(nn.Module):
    """Attention by the function, in a residual stream."""

    def __init__(
        self,
        *,
        separate: bool = False,
        keys: int = E,
        bias: bool = True,
        function: Any = None,  # noqa: ANN401
        samples: bool = True,
        decides: bool = False,
        **options: Any,  # noqa: ANN401
    ) -> None:
        super().__init__()
        self.first, self.narrow, self.last = nn.Linear(6, E), nn.Linear(6, keys), nn.Linear(E, 3)
        self.q, self.k, self.v = (nn.Linear(n, E) for n in (E, keys, keys))
        self.whole, self.out = nn.Linear(E, 3 * E, bias), nn.Linear(E, E, bias)
        self.separate, self.samples, self.decides = separate, samples, decides
        self.options, self.function = options, function

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.decides and x.shape[0] > 100:  # so that it is traced by running
            x = x * 2
        h = self.first(x).transpose(0, 1) if self.samples else self.first(x[0])
        run: Any = self.function or F.multi_head_attention_forward
        others = (None, None, False, 0.0, self.out.weight, self.out.bias, self.training)
        if self.separate:
            narrow = self.narrow(x).transpose(0, 1)
            biases = torch.cat([self.q.bias, self.k.bias, self.v.bias])
            options = self.options | {"use_separate_proj_weight": True, "q_proj_weight": self.q.weight}
            options |= {"k_proj_weight": self.k.weight, "v_proj_weight": self.v.weight}
            y, weights = run(h, narrow, narrow, E, HEADS, None, biases, *others, **options)
        else:
            y, weights = run(h, h, h, E, HEADS, self.whole.weight, self.whole.bias, *others, **self.options)
        return self.last(h + y), None if self.options.get("average_attn_weights", True) else weights


def made(name: str) -> Net:
    """A head of values, a dim of the heads of queries, and three channels of the stream are zero."""
    torch.manual_seed(0)
    net = Net(**OPTIONS[name]).double().eval()
    with torch.no_grad():
        for parameter in net.whole.parameters():
            parameter[3 : E : E // HEADS] = 0
            parameter[2 * E : 2 * E + E // HEADS] = 0
        for parameter in net.q.parameters():
            parameter[3 :: E // HEADS] = 0
        for parameter in net.v.parameters():
            parameter[: E // HEADS] = 0
        for parameter in (*net.first.parameters(), *net.out.parameters()):
            parameter[5:8] = 0
    return net


@pytest.mark.parametrize("name", OPTIONS)
def test_heads_dims_and_the_stream_go(name: str) -> None:
    net, x = made(name), torch.randn(2, TOKENS, 6).double()
    small = fxc.prune(net, (x,)).module
    assert small.get_parameter("first.weight").shape == (E - 3, 6)
    left = E if name == "weights of each head" else E - E // HEADS  # as each head is an output
    assert small.get_parameter("out.weight").shape == (E - 3, left)
    for training in (False, True):
        expected = outputs(net, (x,), training=training)
        assert difference(expected, outputs(small, (x,), training=training)) <= TOLERANCE


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", OPTIONS)
def test_the_models_own_code_tells_torch_the_old_sizes(name: str) -> None:
    net, x = made(name), torch.randn(2, TOKENS, 6).double()
    kept = fxc.prune(net, (x,), keep_code=True).module
    assert difference(outputs(net, (x,)), outputs(kept, (x,))) <= TOLERANCE


class Extra(nn.Module):
    """Attention with keys that are zero."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.whole, self.out = nn.Linear(6, E), nn.Linear(E, 3 * E), nn.Linear(E, E)

    def forward(self, x: Tensor) -> Tensor:
        h, whole = self.first(x), self.whole
        given = (h, h, h, E, HEADS, whole.weight, whole.bias, None, None, True, 0.0, self.out.weight, self.out.bias)
        return F.multi_head_attention_forward(*given)[0]


def test_extra_keys_stay_one_call() -> None:
    net, x = Extra().double().eval(), torch.randn(TOKENS, 2, 6).double()
    with torch.no_grad():
        for parameter in net.first.parameters():
            parameter[5:8] = 0
    small = fxc.prune(net, (x,)).module
    assert small.get_parameter("whole.weight").shape == (3 * E, E)
    assert difference(outputs(net, (x,)), outputs(small, (x,))) <= TOLERANCE


def test_the_hint_needs_its_mask() -> None:
    net, x = Net(is_causal=True).double().eval(), torch.randn(2, TOKENS, 6).double()
    with pytest.raises(fxc.FxCompressError):
        fxc.prune(net, (x,))


class Module(nn.Module):
    """The module of torch, in a network that is traced with symbols, or by running it."""

    def __init__(self, *, decides: bool) -> None:
        super().__init__()
        self.decides, self.attention = decides, nn.MultiheadAttention(E, HEADS, batch_first=True)
        self.first, self.last = nn.Linear(6, E), nn.Linear(E, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.decides and x.shape[0] > 100:
            x = x * 2
        h = self.first(x)
        y: Tensor = self.last(h + self.attention(h, h, h)[0])
        return y


@pytest.mark.parametrize("decides", [False, True])
def test_the_weights_of_the_module_that_nobody_reads_keep_no_head(*, decides: bool) -> None:
    net, x = Module(decides=decides).double().eval(), torch.randn(2, TOKENS, 6).double()
    with torch.no_grad():
        for parameter in (net.attention.in_proj_weight, net.attention.in_proj_bias):
            parameter[2 * E : 2 * E + E // HEADS] = 0
    small = fxc.prune(net, (x,)).module
    assert small.get_parameter("attention.out_proj.weight").shape == (E, E - E // HEADS)
    assert difference(outputs(net, (x,)), outputs(small, (x,))) <= TOLERANCE
