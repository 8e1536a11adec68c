"""The attention modules of torch.nn: traced as what they compute, with heads that can go."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.errors import TraceError
from fxcompress.trace.inputs import ExampleInputs
from fxcompress.trace.tracer import trace
from tests.exactness import difference, outputs

D, H, T, S = 12, 4, 5, 7


class Attend(nn.Module):
    """One attention, with masks among the inputs."""

    def __init__(self, keep: Callable[[Any], Any] = lambda result: result[0], **options: Any) -> None:  # noqa: ANN401
        super().__init__()
        self.call = {k: options.pop(k) for k in ("need_weights", "average_attn_weights") if k in options}
        self.attention, self.keep = nn.MultiheadAttention(D, H, **options), keep

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, padding: Tensor | None = None
    ) -> Any:  # noqa: ANN401
        return self.keep(self.attention(q, k, v, key_padding_mask=padding, attn_mask=mask, **self.call))


class Self(Attend):
    """Attention of a tensor to itself: one packed projection."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Any:  # type: ignore[override]  # noqa: ANN401
        return self.keep(self.attention(x, x, x, attn_mask=mask, **self.call))


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


NEAR = torch.ones(T, S).triu(2).bool()
CAUSAL = torch.ones(T, T).triu(1).bool()
PADDING = torch.arange(S) >= torch.tensor([[S], [4]])
CASES: dict[str, Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]] = {
    "self": lambda: (Self(batch_first=True, need_weights=False), (rand(2, T, D),)),
    "self, tokens first": lambda: (Self(need_weights=False), (rand(T, 2, D),)),
    "self, without bias": lambda: (Self(batch_first=True, bias=False, need_weights=False), (rand(2, T, D),)),
    "self, not batched": lambda: (Self(need_weights=False), (rand(T, D),)),
    "self, causal": lambda: (Self(batch_first=True, need_weights=False), (rand(2, T, D), CAUSAL)),
    "self, added mask": lambda: (Self(batch_first=True), (rand(2, T, D), rand(T, T))),
    "weights not asked for in the end": lambda: (Self(batch_first=True), (rand(2, T, D),)),
    "cross": lambda: (Attend(batch_first=True, need_weights=False), (rand(2, T, D), rand(2, S, D), rand(2, S, D))),
    "cross, padding": lambda: (Attend(), (rand(T, 2, D), rand(S, 2, D), rand(S, 2, D), NEAR, PADDING)),
    "other sizes of keys and values": lambda: (
        Attend(batch_first=True, kdim=8, vdim=6), (rand(2, T, D), rand(2, S, 8), rand(2, S, 6)),
    ),
}  # fmt: skip
FIXED: dict[str, Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]] = {
    "weights": lambda: (Self(lambda result: result, batch_first=True), (rand(2, T, D),)),
    "weights of each head": lambda: (Self(lambda r: r, average_attn_weights=False), (rand(T, 2, D),)),
    "a mask for each head": lambda: (Self(batch_first=True), (rand(2, T, D), rand(2 * H, T, T))),
    "extra key and value": lambda: (Self(batch_first=True, add_bias_kv=True), (rand(2, T, D),)),
    "extra zeros": lambda: (Self(batch_first=True, add_zero_attn=True), (rand(2, T, D),)),
}


def build(case: Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]) -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    net, inputs = case()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.5)
    return net.double().eval(), inputs


def kill_head(net: nn.Module, head: int) -> None:
    """Zero the values of one head in all attentions."""
    rows = slice(head * D // H, (head + 1) * D // H)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.MultiheadAttention):
                values = module.in_proj_weight[2 * D :] if module._qkv_same_embed_dim else module.v_proj_weight
                values[rows] = 0
                if module.in_proj_bias is not None:
                    module.in_proj_bias[2 * D :][rows] = 0


@pytest.mark.parametrize("name", [*CASES, *FIXED])
def test_a_trace_computes_the_same(name: str) -> None:
    net, inputs = build((CASES | FIXED)[name])
    traced = trace(net, ExampleInputs.of(inputs))
    assert difference(outputs(net, inputs), outputs(traced, inputs)) <= 1e-12
    assert list(traced.state_dict()) == list(net.state_dict())
    assert type(net.attention) is nn.MultiheadAttention


@pytest.mark.parametrize("name", CASES)
def test_a_dead_head_goes(name: str) -> None:
    net, inputs = build(CASES[name])
    kill_head(net, 1)
    result = fxc.prune(net, inputs)
    assert difference(outputs(net, inputs), outputs(result.module, inputs)) <= 1e-9
    left = result.module.get_parameter("attention.out_proj.weight").shape
    assert left == (D, D - D // H)
    assert list(result.module.state_dict()) == list(net.state_dict())


@pytest.mark.parametrize("name", FIXED)
def test_heads_that_are_seen_one_by_one_stay(name: str) -> None:
    net, inputs = build(FIXED[name])
    kill_head(net, 1)
    result = fxc.prune(net, inputs)
    assert difference(outputs(net, inputs), outputs(result.module, inputs)) <= 1e-9
    assert result.module.get_parameter("attention.out_proj.weight").shape == (D, D)


def test_dropout_follows_the_mode() -> None:
    net, inputs = build(lambda: (Self(batch_first=True, need_weights=False, dropout=0.5), (rand(2, T, D),)))
    traced = trace(net, ExampleInputs.of(inputs))
    assert traced.mode_readers == ("attention",)
    assert difference(traced(*inputs), net(*inputs)) <= 1e-12
    assert difference(traced.train()(*inputs), net(*inputs)) > 1e-3


def transformers() -> dict[str, tuple[nn.Module, tuple[Tensor, ...]]]:
    options: Any = {"dim_feedforward": 16, "dropout": 0.0, "batch_first": True}
    encoder = nn.TransformerEncoderLayer(D, H, **options)
    decoder = nn.TransformerDecoderLayer(D, H, **options)
    first = nn.TransformerEncoderLayer(D, H, **options, norm_first=True, activation="gelu")
    whole = nn.Transformer(D, H, 2, 2, 16, 0.0, batch_first=True)
    x, y = rand(2, T, D), rand(2, S, D)
    return {
        "encoder layer": (encoder, (x,)),
        "norm first": (first, (x, CAUSAL)),
        "decoder layer": (decoder, (x, y)),
        "encoder": (nn.TransformerEncoder(encoder, 2, enable_nested_tensor=False), (x, CAUSAL)),
        "decoder": (nn.TransformerDecoder(decoder, 2, nn.LayerNorm(D)), (x, y, CAUSAL)),
        "transformer": (whole, (y, x)),
    }


@pytest.mark.parametrize("name", transformers())
def test_transformers(name: str) -> None:
    torch.manual_seed(0)
    net, inputs = transformers()[name]
    net = copy.deepcopy(net).double().eval()
    kill_head(net, 2)
    result = fxc.prune(net, inputs)
    more = tuple(torch.cat([x, x[:1]]) if x.ndim == 3 else x for x in inputs)
    for given in (inputs, more):
        assert difference(outputs(net, given), outputs(result.module, given)) <= 1e-9
    assert list(result.module.state_dict()) == list(net.state_dict())
    attentions = [n for n, m in net.named_modules() if isinstance(m, nn.MultiheadAttention)]
    for attention in attentions:
        assert result.module.get_parameter(f"{attention}.out_proj.weight").shape == (D, D - D // H)
    result.module.train()(*inputs).sum().backward()


def test_a_transformer_compresses_and_comes_back_from_its_file(tmp_path: Any) -> None:  # noqa: ANN401
    torch.manual_seed(0)
    model = nn.Transformer(D, H, 1, 1, 16, 0.0, batch_first=True)
    inputs = (torch.randn(2, S, D), torch.randn(2, T, D))
    net = fxc.compress(model, inputs)
    quantized = [name for name, _ in net.named_parameters() if name.endswith("in_proj_weight_quantizer.bits")]
    layers = ("encoder.layers.0.self_attn", "decoder.layers.0.self_attn", "decoder.layers.0.multihead_attn")
    assert quantized == [f"{layer}.in_proj_weight_quantizer.bits" for layer in layers]
    assert net.unquantized() == ()
    final = net.finalize()
    fxc.save(final, tmp_path / "net.fxc")
    loaded = fxc.load(tmp_path / "net.fxc", model=nn.Transformer(D, H, 1, 1, 16, 0.0, batch_first=True))
    assert torch.equal(loaded(*inputs), final(*inputs))


def test_a_causal_hint_without_a_mask_is_refused_as_torch_does() -> None:
    class Hinted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(D, H)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.attention(x, x, x, is_causal=True)[0]
            return y

    with pytest.raises(TraceError, match="attn_mask"):
        trace(Hinted())
