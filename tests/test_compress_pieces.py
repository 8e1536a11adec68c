"""Networks that read the values of tensors compress themselves in pieces, by the same loop as all others."""

import copy
import functools
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.errors import CheckpointError, OptimizerError, TraceError, UnsupportedModelError
from fxcompress.objectives import latency
from fxcompress.quantizer import Quantizer
from fxcompress.report.layers import layer_widths
from fxcompress.report.measure import sizes
from fxcompress.training.in_pieces import CompressedPieces
from tests.exactness import Fingerprint, difference
from tests.nets import Pick
from tests.test_latency import counted
from tests.test_pieces import BETWEEN, Head, Reading, block, branch, image, loop, raw_outputs, reading, result_of


def compressed(model: nn.Module | None = None, *inputs: Any, **options: Any) -> CompressedPieces:  # noqa: ANN401
    """A network in pieces; the model must be as it was."""
    model = reading() if model is None else model
    visit = Fingerprint(model)
    net = cast("object", fxc.compress(model, inputs or image(), **options))
    visit.check()
    assert isinstance(net, CompressedPieces)
    return net


@functools.cache
def _plain() -> CompressedPieces:
    return compressed()


@functools.cache
def _dying() -> CompressedPieces:
    return compressed(reading(loop), bits=2.0, bias_shrink=1.0)


def plain() -> CompressedPieces:
    """One that is made once: a copy of it is quicker."""
    return copy.deepcopy(_plain())


def dying() -> CompressedPieces:
    """One that loses channels in a few steps."""
    return copy.deepcopy(_dying())


def deaden(net: nn.Module, every: int = 3) -> None:
    """Take all bits from each third channel; their biases are zero."""
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, Quantizer):
                module.bits[::every] = 0
        for name, parameter in net.named_parameters():
            if name.endswith("bias"):
                parameter[::every] = 0


def adam(net: CompressedPieces) -> torch.optim.Optimizer:
    return torch.optim.Adam(net.param_groups(lr=1e-2))


def train(net: CompressedPieces, optimizer: torch.optim.Optimizer, steps: int = 12, *, prune: bool = False) -> None:
    """On a loss that the net returns in training, with a pressure under which channels die."""
    net.train()
    for step in range(steps):
        loss = net(image(step % 3)) + 10 * net.size()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        net.step()
        if prune and step % 4 == 3:
            net.prune(optimizer)


@pytest.mark.parametrize("name", ["branch", "nonzero"])  # pruning alone is tried with all
def test_removal_changes_nothing(name: str) -> None:
    net = compressed(reading(BETWEEN[name]))
    assert type(net).__name__ == "Reading"
    assert isinstance(net, Reading)
    deaden(net)
    net.step()
    before = [result_of(net, image(i)) for i in range(3)]
    assert net.removable() > 0.2
    optimizer = adam(net)
    report = net.prune(optimizer)
    assert report.removed["body.0.weight"] == ((10, 3, 3, 3), (6, 3, 3, 3))
    assert report.removed["head.first.weight"] == ((12, 4), (8, 4))
    assert list(report.outside) == list(net.outside.parameters) == ["scale"]
    assert report.parameters[1] == sum(p.numel() for p in net.parameters())
    assert max(difference(a, result_of(net, image(i))) for i, a in enumerate(before)) <= 1e-12
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in net.parameters()}
    assert net.removable() <= 1e-12
    assert not net.prune(optimizer).modified


def test_training_with_removal_is_training_without() -> None:
    often, never = dying(), dying()
    optimizers = adam(often), adam(never)
    train(often, optimizers[0], prune=True)
    train(never, optimizers[1])
    assert sum(p.numel() for p in often.parameters()) < 0.9 * sum(p.numel() for p in never.parameters())
    assert not torch.equal(cast("Tensor", often.scale), torch.ones(4, 1, 1))  # what lies in no piece trains along
    assert difference(result_of(often, image()), result_of(never, image())) <= 1e-9
    assert float(often.size().detach()) == pytest.approx(float(never.size().detach()))
    assert often.weights_left() == pytest.approx(never.weights_left())
    assert often.channels_left() == never.channels_left()


@pytest.mark.parametrize("objective", ["eq4", "eq5"])
def test_sizes_are_over_the_weights_of_all_pieces(objective: str) -> None:
    net = plain()
    deaden(net, 4)
    net.step()
    pieces = net.pieces
    assert net.weights == 10 * 3 * 9 + 4 * 10 + 12 * 4 + 5 * 12
    weighted = sum(float(piece.size(objective).detach()) * piece.weights for piece in pieces.values())
    assert float(net.size(objective).detach()) == pytest.approx(weighted / net.weights)
    for measure in ("fractional_size", "stored_size", "weights_left"):
        parts = sum(getattr(piece, measure)() * piece.weights for piece in pieces.values())
        assert getattr(net, measure)() == pytest.approx(parts / net.weights)
    net.size(objective).backward()
    assert all(bits.grad is not None and bits.grad.any() for bits in net.fxc_bits)


@pytest.mark.parametrize("objective", ["macs", "activations"])
def test_other_objectives_are_over_what_all_pieces_cost(objective: str) -> None:
    net = plain()
    costs = {path: getattr(piece.settings.start_costs, objective) for path, piece in net.pieces.items()}
    weighted = sum(float(piece.size(objective).detach()) * costs[path] for path, piece in net.pieces.items())
    assert float(net.size(objective).detach()) == pytest.approx(weighted / sum(costs.values()))


def test_a_latency_table_knows_the_layers_of_all_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "measure", counted)  # which is smaller for fewer channels on a busy machine as well
    table = fxc.LatencyTable.measure(reading(), image(), widths=(0.5,), repeats=1, progress=False)
    assert list(table.layers) == ["body.0.weight", "body.3.weight", "head.first.weight", "head.second.weight"]
    net = compressed(objective=table)
    size = float(net.size().detach())
    deaden(net)
    net.step()
    assert 0 < float(net.size().detach()) < size


def test_a_piece_stays_what_it_is_for_the_code_around_it() -> None:
    model = reading()
    net = compressed(model)
    assert isinstance(net.head, Head)
    assert isinstance(net.body, nn.Sequential)
    assert net.head.loss(torch.full((2,), 3.0)) == 9
    kept = set(net.state_dict()) & set(model.state_dict())
    assert kept == set(model.state_dict())
    twin = copy.deepcopy(net)
    deaden(twin)
    twin.step()
    twin.prune()
    assert twin.weights_left() < 0.8
    assert net.weights_left() == 1


def test_a_state_dict_cuts_a_fresh_network() -> None:
    net = dying()
    optimizer = adam(net)
    train(net, optimizer, prune=True)
    fresh = dying()
    assert net.weights_left() < 0.9
    fresh.load_state_dict(net.state_dict())
    assert difference(result_of(net, image()), result_of(fresh, image())) == 0
    assert float(fresh.size().detach()) == float(net.size().detach())
    state, visit = dying().state_dict(), Fingerprint(net)
    with pytest.raises(CheckpointError, match=r"^body: "):
        net.load_state_dict(state)
    del state["scale"]
    with pytest.raises(CheckpointError, match="lacks scale"):
        dying().load_state_dict(state)
    visit.check()


def test_a_checkpoint_goes_on_with_the_same_numbers(tmp_path: Path) -> None:
    net = dying()
    optimizer = adam(net)
    train(net, optimizer, 12, prune=True)
    fxc.save_checkpoint(tmp_path / "run.pt", cast("Any", net), optimizer, epoch=3)
    other = dying()
    held = adam(other)
    assert fxc.load_checkpoint(tmp_path / "run.pt", cast("Any", other), held) == {"epoch": 3}
    for one, its in ((net, optimizer), (other, held)):
        train(one, its, 8, prune=True)
    assert difference(result_of(net, image()), result_of(other, image())) == 0


def test_the_final_network_and_its_file(tmp_path: Path) -> None:
    model, net = reading(loop), dying()
    train(net, adam(net), prune=True)
    final = net.finalize().eval()
    assert isinstance(final, Reading)
    assert not isinstance(final, CompressedPieces)
    assert set(final.state_dict()) == set(model.state_dict())
    assert difference(result_of(net.eval(), image(5)), result_of(final, image(5))) <= 1e-9
    assert isinstance(net.pieces["head"], fxc.CompressedModule)  # which is still there
    written = fxc.save(final, tmp_path / "net.fxc")
    loaded = fxc.load(tmp_path / "net.fxc", reading(loop), image())
    assert difference(result_of(final, image(5)), result_of(loaded, image(5))) == 0
    assert 0 < sizes(final, written).fractional <= net.fractional_size()
    assert [layer.before for layer in layer_widths(loaded)] == [(10, 3), (4, 10), (12, 4), (5, 12)]
    again = fxc.compress(final, image())
    assert isinstance(cast("object", again), CompressedPieces)


def test_fit_trains_pieces() -> None:
    batches = [(image(i), torch.zeros(())) for i in range(4)]
    result = fxc.fit(reading(loop), batches, lambda y, _: y.square().mean(), epochs=2, gamma=2.0, progress=False)
    assert isinstance(result.module, Reading)
    assert result.history[-1].size < 0.25


def test_each_piece_has_a_graph_and_the_whole_says_that_it_has_none() -> None:
    net = plain()
    assert set(fxc.ChannelGraph.of_pieces(net, image())) == {"body", "head"}
    assert {node.op for node in net.pieces["head"].graph.nodes} >= {"placeholder", "output"}
    with pytest.raises(UnsupportedModelError, match=r"reads values .*\n.*net\.pieces\[name\]\.graph.* body, head"):
        _ = net.graph
    assert fxc.prune(net, image()).report.pieces == ("body", "head")


class Stepping(Reading):
    """Has the name of a method of a network in training."""

    def step(self) -> int:
        return 1


class SizedHead(Head):
    """The same for a piece."""

    def size(self) -> int:
        return 12


def test_names_that_mean_something_else_are_not_taken() -> None:
    with pytest.raises(UnsupportedModelError, match="has a step of its own"):
        fxc.compress(Stepping(branch).double(), image())
    model = reading()
    model.head = SizedHead().double()
    net = compressed(model)
    assert set(net.pieces) == {"body", "head.first", "head.second"}
    net.get_submodule("head").train()(torch.zeros(2, 4, dtype=torch.float64))


def test_what_cannot_be_done_is_refused() -> None:
    with pytest.raises(TraceError, match="pass example_inputs"):
        fxc.compress(Reading(branch))
    net = plain()
    with pytest.raises(OptimizerError, match="not the network's"):
        net.prune(torch.optim.SGD(reading().parameters(), lr=0.1))
    with pytest.raises(UnsupportedModelError, match="compressed already"):
        fxc.compress(net, image())
    frozen = reading().requires_grad_(False)
    with pytest.raises(TraceError, match="none of its weights can be quantized"):
        fxc.compress(frozen, image())


@pytest.mark.cpu
def test_a_detector_of_torchvision() -> None:
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.anchor_utils import AnchorGenerator

    torch.manual_seed(0)
    backbone = nn.Sequential(*block(3, 8), nn.ReLU(), *block(8, 8))
    backbone.out_channels = 8  # type: ignore[assignment]
    options = {"min_size": 32, "max_size": 48, "rpn_post_nms_top_n_test": 8, "rpn_post_nms_top_n_train": 8}
    anchors = AnchorGenerator(((8, 16),), ((1.0,),))
    model = FasterRCNN(backbone, 3, rpn_anchor_generator=anchors, **options).double().eval()
    boxes = torch.tensor([[4.0, 4.0, 20.0, 24.0]], dtype=torch.float64)
    targets = [{"boxes": boxes, "labels": torch.ones(1, dtype=torch.int64)}] * 2
    images = list(image(size=32, batch=2))
    net = compressed(model, images, targets)
    assert set(net.pieces) == {"backbone", "rpn.head", "roi_heads.box_head", "roi_heads.box_predictor"}
    assert not net.outside.parameters
    optimizer = adam(net)
    net.train()
    for _ in range(2):
        losses = net(copy.deepcopy(images), copy.deepcopy(targets))
        optimizer.zero_grad()
        (sum(losses.values()) + 0.1 * net.size()).backward()
        optimizer.step()
        deaden(net)
        net.step()
        before = [raw_outputs(net.eval(), path, images) for path in net.pieces]
        assert net.prune(optimizer).modified
        after = [raw_outputs(net.eval(), path, images) for path in net.pieces]
        assert difference(before, after) <= 1e-9
        net.train()
    assert net.weights_left() < 0.6
    final = net.finalize().eval()
    assert difference(raw_outputs(net.eval(), "backbone", images), raw_outputs(final, "backbone", images)) <= 1e-9


@pytest.mark.parametrize("training", [True, False])
def test_a_network_in_pieces_is_in_the_mode_of_its_model(training: bool) -> None:  # noqa: FBT001
    model = Pick().train(training)
    model.head.train(not training)
    net = fxc.compress(model, torch.zeros(2, 3, 8, 8))
    names = [name for name, _ in model.named_modules()]
    assert [net.get_submodule(name).training for name in names] == [
        model.get_submodule(name).training for name in names
    ]


@pytest.mark.parametrize("call", [fxc.compress, fxc.prune])
def test_without_inputs_the_error_says_that_there_are_pieces(call: Any) -> None:  # noqa: ANN401
    with pytest.raises(TraceError, match="with example_inputs, on which it runs, those modules of it"):
        call(reading())
