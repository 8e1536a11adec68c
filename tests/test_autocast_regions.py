"""Regions of ``forward`` in which autocast is on or off: a graph has them where the model has them."""

import contextlib
import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.errors import PathError, TraceError
from fxcompress.trace.graph.autocast import enter_autocast

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
HALF = torch.bfloat16


class Net(nn.Module):
    """Three layers; the one in the middle is called in a region."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 5)

    def middle(self, h: Tensor) -> Tensor:
        """What lies in the region."""
        return torch.matmul(self.second(h), h.mT).exp() @ h

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(3 * x).relu()
        return self.third(self.middle(h).to(x.dtype))  # type: ignore[no-any-return]


class Off(Net):
    def middle(self, h: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return super().middle(h.float())


class OffLikeInput(Net):
    """By the device of a tensor, as most code does."""

    def middle(self, h: Tensor) -> Tensor:
        with torch.autocast(device_type=h.device.type, enabled=False):
            return super().middle(h.float())


class Decorated(Net):
    @torch.autocast("cpu", enabled=False)  # type: ignore[untyped-decorator]
    def middle(self, h: Tensor) -> Tensor:
        return super().middle(h.float())


class OffWhereNeeded(Net):
    """Enters a region only where there is something to switch off."""

    def middle(self, h: Tensor) -> Tensor:
        on = torch.is_autocast_enabled("cpu")
        with torch.autocast("cpu", enabled=False) if on else contextlib.nullcontext():
            return super().middle(h.float())


class On(Net):
    def middle(self, h: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=HALF):
            return super().middle(h)


class Nested(Net):
    def middle(self, h: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=HALF):
            a = self.second(h)
            with torch.autocast("cpu", enabled=False):
                b = torch.matmul(a.float(), h.float().mT)
            return b.exp() @ h.float()


class InTraining(Net):
    def middle(self, h: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=HALF, enabled=self.training):
            return super().middle(h.float())


REGIONS_COMPILE = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 9)
"""Whether torch.compile keeps in one graph what begins a region; releases before break there."""

NETS: dict[str, Callable[[], Net]] = {
    kind.__name__: kind for kind in (Off, OffLikeInput, Decorated, OffWhereNeeded, On, Nested, InTraining)
}


def made(name: str, *, dead: bool = False) -> Net:
    """A network, with three dead units in each hidden layer."""
    torch.manual_seed(1)
    net = NETS[name]().eval()
    if dead:
        with torch.no_grad():
            for layer in (net.first, net.second):
                layer.weight[2:5] = 0
                layer.bias[2:5] = 0
    return net


def surroundings() -> list[contextlib.AbstractContextManager[object]]:
    """Without autocast, and with it."""
    return [contextlib.nullcontext(), torch.autocast("cpu", dtype=HALF)]


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("training", [False, True])
def test_a_graph_computes_what_the_model_does_to_the_last_bit(name: str, training: bool) -> None:  # noqa: FBT001
    model = made(name).train(training)
    graphs = [fxc.prune(model, X).module, fxc.prune(model, X, keep_code=True).module]
    graphs += [pickle.loads(pickle.dumps(graphs[0])), copy.deepcopy(graphs[0])]
    for around in surroundings():
        with around, torch.no_grad():
            expected = model(X)
            for graph in graphs:
                assert graph.training == training
                assert torch.equal(graph(X), expected)
        assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("name", NETS)
def test_regions_change_results_under_autocast(name: str) -> None:
    """Or the test above would say nothing."""
    model = made(name).train()
    plain = Net()
    plain.load_state_dict(model.state_dict())
    differs = [not torch.equal(model(X), plain(X))]
    with torch.autocast("cpu", dtype=HALF):
        differs.append(not torch.equal(model(X), plain(X)))
    assert any(differs)


@pytest.mark.parametrize("name", NETS)
def test_dead_units_go(name: str) -> None:
    model = made(name, dead=True)
    result = fxc.prune(model, X).module
    assert result.get_parameter("first.weight").shape == (5, 6)
    for training in (False, True):
        model.train(training)
        result.train(training)
        for around in surroundings():
            with around, torch.no_grad():
                exact = not torch.is_autocast_enabled("cpu") and name.startswith("Off")
                tolerance = 1e-6 if exact else 2e-2  # sums of bfloat16 are rounded in another order
                expected = model(X).float()
                assert (result(X).float() - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("name", NETS)
def test_training_saving_and_finalizing(name: str, tmp_path: Path) -> None:
    model = made(name)
    net = fxc.compress(model, X)
    optimizer = torch.optim.Adam(net.param_groups(lr=1e-2))
    for _ in range(3):
        with torch.autocast("cpu", dtype=HALF):
            loss = net(X).square().mean()
        (loss + 0.1 * net.size()).backward()
        optimizer.step()
        net.step()
        optimizer.zero_grad()
    final = net.eval().finalize()
    fxc.save(final, tmp_path / "net.safetensors")
    again = fxc.load(tmp_path / "net.safetensors", model=made(name), example_inputs=X)
    for around in surroundings():
        with around, torch.no_grad():
            assert torch.equal(again(X), final(X))
            assert torch.allclose(final(X), net(X), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("name", ["OffLikeInput", "OffWhereNeeded", "On"])
def test_compiled(name: str) -> None:
    graph = fxc.prune(made(name), X).module
    compiled = torch.compile(graph, backend="aot_eager", fullgraph=REGIONS_COMPILE)
    for around in surroundings():
        with around, torch.no_grad():
            assert torch.allclose(compiled(X), graph(X), rtol=1e-2, atol=1e-3)


class Branch(Net):
    """A branch that lies in a region, and is zero."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(3 * x).relu()
        with torch.autocast("cpu", enabled=False):
            more = self.second(h.float())
        return self.third(h + more)  # type: ignore[no-any-return]


def test_a_branch_goes_from_its_region() -> None:
    torch.manual_seed(0)
    model = Branch().eval()
    nn.init.zeros_(model.second.weight)
    nn.init.zeros_(model.second.bias)
    result = fxc.prune(model, X).module
    assert "second.weight" not in dict(result.named_parameters()) or not result.get_parameter("second.weight").numel()
    for around in surroundings():
        with around, torch.no_grad():
            assert torch.equal(result(X), model(X))


def nesting() -> int:
    """How many regions have begun."""
    torch.autocast_increment_nesting()
    return torch.autocast_decrement_nesting()


class Fails(Net):
    def middle(self, h: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=HALF):
            return self.second(h).reshape(2, -1).float() if h.shape[0] == 4 else h

    def forward(self, x: Tensor) -> Tensor:
        return self.middle(self.first(x).relu())


def test_an_error_in_a_region_leaves_autocast_as_it_was() -> None:
    graph = fxc.prune(Fails().eval(), X).module
    depth = nesting()
    for around in surroundings():
        with around:
            before = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
            with pytest.raises(PathError):
                graph(X[:3])
            assert (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")) == before
    assert nesting() == depth  # and so the cache of weights has been cleared


class Asks(Net):
    """Does something else under autocast than to switch it off."""

    def middle(self, h: Tensor) -> Tensor:
        if torch.is_autocast_enabled("cpu"):
            h = h.to(torch.get_autocast_dtype("cpu"))
        return super().middle(h + 1)


def test_another_path_under_autocast_is_refused() -> None:
    model = Asks().eval()
    outside = fxc.prune(model, X).module
    assert torch.equal(outside(X), model(X))
    with torch.autocast("cpu", dtype=HALF):
        with pytest.raises(
            PathError, match=r"(?s)autocast is on, and was off .*test_autocast_regions.*under torch.autocast"
        ):
            outside(X)
        inside = fxc.prune(model, X).module
        assert torch.equal(inside(X), model(X))
    with pytest.raises(PathError, match="autocast is off, and was on"):
        inside(X)


class Infers(Net):
    def middle(self, h: Tensor) -> Tensor:
        return super().middle(h + 1 if torch.is_inference_mode_enabled() else h)


def test_another_path_in_inference_mode_is_refused() -> None:
    model = Infers().eval()
    pruned = fxc.prune(model, X).module
    assert torch.equal(pruned(X), model(X))
    with torch.inference_mode():
        again = fxc.prune(model, X).module
        for each in (pruned, again):
            with pytest.raises(PathError, match=r"(?s)inference mode is on: .*test_autocast_regions.*torch\.no_grad"):
                each(X)
    assert torch.equal(again(X), model(X))


class Switches(Net):
    def middle(self, h: Tensor) -> Tensor:
        torch.set_autocast_enabled("cpu", True)
        try:
            return super().middle(h)
        finally:
            torch.set_autocast_enabled("cpu", False)


def test_autocast_that_is_switched_by_hand_is_refused() -> None:
    with pytest.raises(TraceError, match=r"it switches autocast at .*use torch.autocast"):
        fxc.prune(Switches(), X)


def test_a_region_belongs_to_the_device_that_its_code_asked_for() -> None:
    found = []
    for name in ("Off", "OffLikeInput"):
        module = fxc.prune(made(name), X).module
        assert isinstance(module, torch.fx.GraphModule)
        found += [node.args[0] for node in module.graph.find_nodes(op="call_function", target=enter_autocast)]
    fixed, asked = found
    assert fixed == "cpu"
    assert isinstance(asked, torch.fx.Node)
    assert asked.args[1] == "device"
