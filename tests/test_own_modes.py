"""Models with a ``train`` or an ``eval`` of their own: parts of them are in the other mode than the rest."""

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.errors import UnsupportedModelError
from tests.exactness import TOLERANCE, Fingerprint, difference
from tests.networks import randomise

X = torch.randn(4, 3, 7, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.norm2, self.fc = nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(self.conv1(x)).relu()
        return self.fc(self.norm2(self.conv2(h)).relu().mean((2, 3)))  # type: ignore[no-any-return]


class Frozen(Body):
    """The first norm never goes by the batch."""

    def train(self, mode: bool = True) -> "Frozen":  # noqa: FBT001, FBT002 - the signature of nn.Module
        super().train(mode)
        self.norm1.eval()
        return self


class Restless(Body):
    """The second norm always goes by the batch."""

    def eval(self) -> "Restless":
        super().eval()
        self.norm2.train()
        return self


class Inside(nn.Module):
    """Neither is the root."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Frozen()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * 2  # type: ignore[no-any-return]


MODELS: tuple[Callable[[], nn.Module], ...] = (Frozen, Restless, Inside)


def build(model: Callable[[], nn.Module]) -> nn.Module:
    """Channels 1 and 4 of both layers are made of zeros, and some of them are zero after the norm."""
    torch.manual_seed(0)
    net = randomise(model().double())
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "conv" in name:
                parameter[[1, 4]] = 0
            if "norm" in name:
                parameter[1] = 0
    return net.eval()


def runs(net: nn.Module) -> list[Tensor]:
    """What it returns in both modes, set from outside, and in evaluation after a step of training."""
    found = []
    for mode in (False, True, False):
        _ = net.train() if mode else net.eval()
        with torch.no_grad():
            found.append(net(X))
    return found


@pytest.mark.parametrize("options", [{}, {"fold": True}, {"narrow": True}])
@pytest.mark.parametrize("model", MODELS)
def test_what_is_left_goes_by_the_modes_of_the_original(
    model: Callable[[], nn.Module], options: dict[str, bool]
) -> None:
    net = build(model)
    visit = Fingerprint(net)
    result = fxc.prune(net, X, **options).module  # type: ignore[arg-type]
    visit.check()
    assert sum(p.numel() for p in result.parameters()) < sum(p.numel() for p in net.parameters())
    again = fxc.prune(result, X).module
    count = 1 if "fold" in options else 3  # in training a constant may be another one
    for found in (pickle.loads(pickle.dumps(result)), again, result):
        assert difference(runs(net)[:count], runs(found)[:count]) <= TOLERANCE
        net = build(model)


@pytest.mark.parametrize("model", MODELS)
def test_networks_in_training_and_finished_ones_do(model: Callable[[], nn.Module], tmp_path: Path) -> None:
    net = fxc.compress(build(model), X).train()
    original = build(model).train()
    assert [m.training for m in original.modules() if isinstance(m, nn.BatchNorm2d)] == [
        m.training for m in net.modules() if isinstance(m, nn.BatchNorm2d)
    ]
    final = net.finalize().eval()
    assert difference(net.eval()(X), final(X)) <= TOLERANCE
    fxc.save(final, tmp_path / "net.fxc")
    loaded = fxc.load(tmp_path / "net.fxc", build(model))
    assert difference(runs(final), runs(loaded)) <= TOLERANCE


class Merged(nn.Module):
    """An adapter that is added to its weight in evaluation, as loralib does."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.low = nn.Parameter(torch.randn(8, 3)), nn.Parameter(torch.randn(8, 1))
        self.merged = False

    def train(self, mode: bool = True) -> "Merged":  # noqa: FBT001, FBT002 - the signature of nn.Module
        super().train(mode)
        if mode == self.merged:
            self.weight.data += (-1 if mode else 1) * self.low.data
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight if self.merged else self.weight + self.low).T


@pytest.mark.parametrize("mode", [False, True])
@pytest.mark.parametrize("call", [fxc.prune, fxc.compress, fxc.ChannelGraph.of])
def test_a_mode_that_changes_weights_is_refused_and_not_tried(call: Callable[..., object], *, mode: bool) -> None:
    net = nn.Sequential(nn.Linear(3, 3), Merged(), nn.Linear(8, 2)).double().train(mode)
    visit = Fingerprint(net)
    with pytest.raises(UnsupportedModelError, match=r"of Sequential changes 1\.weight.*adapters are merged.*first"):
        call(net, X[0, 0, :, :3])
    visit.check()


class Remembers(nn.Module):
    """In evaluation it keeps what it has made of a parameter, until it is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.table = nn.Linear(3, 4), nn.Parameter(torch.ones(4))
        self.made: dict[str, Tensor] = {}

    def train(self, mode: bool = True) -> "Remembers":  # noqa: FBT001, FBT002 - the signature of nn.Module
        super().train(mode)
        if mode:
            self.made = {}
        return self

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return self.layer(x) * self.table.exp()  # type: ignore[no-any-return]
        if "table" not in self.made:
            self.made["table"] = self.table.exp()
        return self.layer(x) * self.made["table"]  # type: ignore[no-any-return]


@pytest.mark.parametrize("warm", [None, False, True])
def test_what_was_kept_of_an_earlier_run_is_no_constant(*, warm: bool | None) -> None:
    net, x = Remembers().eval(), torch.randn(2, 3)
    if warm is not None:
        with torch.set_grad_enabled(warm):
            net(x)
    made = dict(net.made)
    result = fxc.prune(net, x).module
    assert net.made == made
    with torch.no_grad():
        for each in (net, result):
            each.get_parameter("table").copy_(torch.arange(4.0))
            each.train()
            each.eval()
        assert torch.equal(result(x), net(x))
