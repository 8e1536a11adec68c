"""Networks in pieces have averages, several optimizers, narrow paths and weight norm, as any network has."""

import copy
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fxcompress as fxc
from fxcompress.errors import AverageError, OptimizerError
from fxcompress.passes.join import Join
from fxcompress.provenance import provenance_of
from fxcompress.training.in_pieces import CompressedPieces
from tests.exactness import Fingerprint, difference
from tests.test_compress_pieces import adam, compressed, deaden, dying, plain
from tests.test_pieces import Reading, image, loop, reading, result_of


def exponential(net: nn.Module) -> AveragedModel:
    return AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.5))


def train(net: CompressedPieces, average: AveragedModel, *, remove: bool) -> None:
    optimizer = adam(net)
    net.train()
    for step in range(6):
        optimizer.zero_grad()
        net(image(step)).backward()
        optimizer.step()
        if step == 1:
            deaden(net)
        net.step()
        average.update_parameters(net)
        if remove and step in {2, 4}:
            net.prune(optimizer, averages=[average])


def test_an_average_loses_what_the_network_loses() -> None:
    often = plain()
    never = copy.deepcopy(often)
    averages = [exponential(net) for net in (often, never)]
    train(often, averages[0], remove=True)
    train(never, averages[1], remove=False)
    assert len(averages[1].module.get_parameter("body.0.weight")) == 10
    never.prune(averages=averages[1:])
    states = [average.module.state_dict() for average in averages]
    assert len(states[0]["body.0.weight"]) == 6
    assert list(states[0]) == list(states[1])
    assert difference(*[[v for v in state.values() if v.is_floating_point()] for state in states]) <= 1e-9
    final = cast("CompressedPieces", averages[0].module).finalize().eval()
    assert difference(result_of(averages[0].module, image(7)), result_of(final, image(7))) <= 1e-9
    fresh = exponential(plain())
    fresh.load_state_dict(averages[0].state_dict())
    assert difference(result_of(fresh, image(7)), result_of(averages[0], image(7))) == 0


def test_fit_averages_pieces() -> None:
    net = dying()
    average = exponential(net)
    batches = [(image(i), torch.zeros(())) for i in range(4)]
    options: Any = {"epochs": 2, "gamma": 10.0, "progress": False, "average": average, "optimizer": adam(net)}
    fxc.fit(net, batches, lambda y, _: y.square().mean(), **options)
    assert [p.shape for p in average.module.parameters()] == [p.shape for p in net.parameters()]
    assert net.weights_left() < 1


def test_what_is_no_average_changes_nothing() -> None:
    net = plain()
    deaden(net)
    net.step()
    optimizer, visit = adam(net), Fingerprint(net)
    gone = copy.deepcopy(net)
    gone.prune()
    for average, message in (
        (exponential(net.pieces["body"]), "is not the same, or not in the same place"),
        (gone, "has not lost what the network has lost"),
        (net, "holds the network itself"),
        (nn.Sequential(copy.deepcopy(net), copy.deepcopy(net)), "holds 2 compressed networks"),
        (reading(), "holds no compressed network"),
    ):
        with pytest.raises(AverageError, match=message):
            net.prune(optimizer, averages=[average])
    visit.check()


def test_several_optimizers_are_cut() -> None:
    net = plain()
    weights, *rest = net.param_groups()
    optimizers = [torch.optim.SGD(weights["params"], lr=1e-2, momentum=0.9), torch.optim.Adam(rest)]
    net.train()(image()).backward()
    for optimizer in optimizers:
        optimizer.step()
    deaden(net)
    net.step()
    visit = Fingerprint(net)
    stranger = torch.optim.SGD([nn.Parameter(torch.zeros(1))])
    with pytest.raises(OptimizerError, match="not the network's"):
        net.prune([*optimizers, stranger])
    visit.check()
    assert net.prune(optimizers).modified
    held = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in net.parameters()}
    state = optimizers[0].state
    assert [state[p]["momentum_buffer"].shape for p in held[:4]] == [p.shape for p in held[:4]]


class Residual(nn.Module):
    """A path that may have fewer channels than the sum that it leads to."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.wide, self.back = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        result: Tensor = y + self.back(self.wide(y).relu())
        return result


def residual() -> nn.Module:
    torch.manual_seed(0)
    model = Reading(loop)
    model.body = Residual()  # type: ignore[assignment]
    return model.double().eval()


def test_paths_are_narrowed_when_pieces_are_finalized(tmp_path: Path) -> None:
    net = compressed(residual())
    with torch.no_grad():
        net.get_parameter("body.back.weight_quantizer.bits")[[0, 2]] = 0
        net.get_parameter("body.back.bias")[[0, 2]] = 0
    net.step()
    final, wide = net.finalize(narrow=True).eval(), net.finalize().eval()
    assert [tuple(one.get_parameter("body.back.weight").shape) for one in (wide, final)] == [(4, 6, 1, 1), (2, 6, 1, 1)]
    assert sum(isinstance(module, Join) for module in final.modules()) == 1
    assert difference(result_of(final, image()), result_of(wide, image())) <= 1e-12
    fxc.save(final, tmp_path / "net.fxc")
    loaded = fxc.load(tmp_path / "net.fxc", residual(), image())
    assert difference(result_of(loaded, image()), result_of(final, image())) == 0
    assert provenance_of(loaded) == provenance_of(final)
    again = cast("object", fxc.compress(final, image()))
    assert isinstance(again, CompressedPieces)
    deaden(again)
    again.step()
    assert again.prune().modified
    assert difference(result_of(again, image()), result_of(again.finalize(), image())) <= 1e-9
    with pytest.raises(ValueError, match="pass prune=True with it"):
        net.finalize(prune=False, narrow=True)


def normed() -> nn.Module:
    model = reading(loop)
    weight_norm(model.get_submodule("body.0"))
    weight_norm(model.get_submodule("head.second"))
    model.extra = weight_norm(nn.Conv2d(3, 2, 1).double())  # never called, so in no piece
    return model.eval()


def test_weight_norm_in_pieces_and_outside_of_them() -> None:
    model = normed()
    net = compressed(model, bits=24.0)
    assert set(net.pieces) == {"body", "head"}
    assert set(net.outside.parameters) == {"scale", "extra.bias", "extra.weight"}
    assert "body.0.weight" in dict(net.named_parameters())
    assert difference(result_of(net, image()), result_of(model, image())) <= 1e-3
    final = net.finalize().eval()
    state = copy.deepcopy(normed().state_dict())
    final.load_state_dict(state)
    assert difference(result_of(final, image()), result_of(model, image())) <= 1e-12


class OnlyBranch(nn.Module):
    """All of its layers are in a branch."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.back = nn.Linear(4, 8), nn.Linear(8, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.back(torch.relu(self.wide(x)))
        return result


def test_a_piece_may_lose_all_of_its_layers() -> None:
    model = reading(loop)
    model.head = nn.Sequential(OnlyBranch(), nn.ReLU()).double()
    net = compressed(model.eval())
    assert set(net.pieces) == {"body", "head"}
    optimizer, average = adam(net), exponential(net)
    for path in ("body", "head"):
        with torch.no_grad():
            for bits in net.pieces[path].fxc_bits:
                bits.zero_()
            for name, parameter in net.pieces[path].named_parameters():
                if name.endswith("bias") and (path, name) != ("body", "3.bias"):
                    parameter.zero_()
        net.step()
        before = result_of(net, image())
        assert net.prune(optimizer, averages=[average]).modified
        assert difference(before, result_of(net, image())) <= 1e-12
        net.train()(image()).sum().backward()
        optimizer.step()
        net.step()
    assert not list(net.pieces["head"].parameters())
    assert 0 <= net.weights_left() < 1
    assert net.removable() == 0
    assert float(net.size().detach()) >= 0
    assert net.stored_size() >= 0
    final = net.finalize().eval()
    assert difference(result_of(net, image()), result_of(final, image())) <= 1e-9
