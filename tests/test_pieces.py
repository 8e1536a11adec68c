"""Models that read the values of tensors: they have no graph, and the modules of theirs that have one are pruned."""

import copy
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxcompress as fxc
from fxcompress.cli import main
from fxcompress.errors import PathError, StorageError, TraceError, UnsupportedModelError
from fxcompress.passes.rewrite import carry_out
from fxcompress.trace.code.bytecode import opened_in
from fxcompress.trace.model.skeleton import skeleton
from fxcompress.trace.pieces.graph_forward import install
from fxcompress.trace.traced import TracedModule
from tests.exactness import Fingerprint, atoms_of, difference, forced, kill, removable_units
from tests.networks import randomise


def block(inputs: int = 3, outputs: int = 4) -> nn.Sequential:
    """Two convolutions with 10 channels between them."""
    return nn.Sequential(nn.Conv2d(inputs, 10, 3, padding=1), nn.BatchNorm2d(10), nn.ReLU(), nn.Conv2d(10, outputs, 1))


class Head(nn.Module):
    """Two layers, and a method besides ``forward``."""

    def __init__(self, inputs: int = 4) -> None:
        super().__init__()
        self.first = nn.Linear(inputs, 12)
        self.second = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu(self.first(x)))  # type: ignore[no-any-return]

    def loss(self, y: Tensor) -> Tensor:
        return y.square().mean()


class Reading(nn.Module):
    """Two pieces, and code between them that reads values.

    Args:
        between: that code; it takes the features (N, 4, H, W).
    """

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.body = block()
        self.head: Head | nn.Sequential = Head()
        self.scale = nn.Parameter(torch.ones(4, 1, 1))
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        rows = self.between(self.body(x) * self.scale)
        y = self.head(rows.mean((2, 3)))
        return self.head.loss(y) if self.training and isinstance(self.head, Head) else y


def branch(y: Tensor) -> Tensor:
    return y if y.mean() > 0 else 2 * y.flip(3)


def nonzero(y: Tensor) -> Tensor:
    return torch.stack([y[i] for i in (y.mean((1, 2, 3)) > -9).nonzero()[:, 0]])


def loop(y: Tensor) -> Tensor:
    for shift in (y[:, 0, 0, 0] > 0).tolist():
        y = y.roll(1, 2) if shift else -y
    return y


def item(y: Tensor) -> Tensor:
    return y * y.std().item()


BETWEEN = {f.__name__: f for f in (branch, nonzero, loop, item)}


def reading(between: Callable[[Tensor], Tensor] = branch) -> nn.Module:
    """A model in evaluation, in float64, with random statistics."""
    torch.manual_seed(0)
    return randomise(Reading(between).double()).eval()


def image(seed: int = 0, size: int = 8, batch: int = 3) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def result_of(net: nn.Module, *arguments: Any, training: bool = False) -> Any:  # noqa: ANN401
    """What a copy of a network returns, without gradients, for copies of the arguments."""
    torch.manual_seed(1)
    with torch.no_grad():
        return copy.deepcopy(net).train(training)(*copy.deepcopy(arguments))


def chosen(net: nn.Module, *arguments: Any) -> dict[str, Any]:  # noqa: ANN401
    """The analysis of each piece, with a third of the units that may go."""
    found = {}
    for path, graph in fxc.ChannelGraph.of_pieces(net, arguments).items():
        units = removable_units(graph.analysis)
        picked = np.random.default_rng(0).choice(units, len(units) // 3, replace=False)
        found[path] = graph.analysis, picked
    return found


def make_dead(net: nn.Module, *arguments: Any) -> None:  # noqa: ANN401
    for analysis, units in chosen(net, *arguments).values():
        kill(analysis, atoms_of(analysis, units))


def kept_of(model: nn.Module, inputs: object) -> dict[str, str]:
    """The parameters outside of all pieces; the model must be as it was."""
    visit = Fingerprint(model)
    outside = fxc.prune(model, inputs).report.outside
    visit.check()
    return outside


@pytest.mark.parametrize("name", BETWEEN)
def test_dead_channels_of_the_pieces_go(name: str) -> None:
    net = reading(BETWEEN[name])
    make_dead(net, image())
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-2, momentum=0.9)
    visit = Fingerprint(net)
    result = fxc.prune(net, image(), optimizer)
    visit.check()
    pruned = result.module
    assert type(pruned) is Reading
    assert list(pruned.state_dict()) == list(net.state_dict())
    assert pruned.get_parameter("body.0.weight").shape == (7, 3, 3, 3)
    assert pruned.get_parameter("head.second.weight").shape == (5, 8)
    for x in (image(), image(1, 12, 1), -image(2)):
        assert difference(result_of(net, x), result_of(pruned, x)) <= 1e-9
    assert difference(result_of(net, image(), training=True), result_of(pruned, image(), training=True)) <= 1e-9
    before = {key: p.detach().clone() for key, p in pruned.named_parameters()}
    pruned.train()(image()).backward()
    optimizer.step()
    same = {key for key, p in pruned.named_parameters() if torch.equal(p, before[key])}
    assert same <= {"body.0.bias"}  # in front of batch norm
    assert not fxc.prune(pruned.eval(), image()).report.modified


def test_live_channels_are_missed() -> None:
    """The negative control: the same rewrite on channels that are alive changes the output."""
    net = reading()
    rewritten = skeleton(net)
    for path, (analysis, units) in chosen(net, image()).items():
        module = carry_out(analysis, forced(analysis, units)).module
        assert isinstance(module, TracedModule)
        install(rewritten.get_submodule(path), module)
    assert difference(result_of(net, image()), result_of(rewritten, image())) > 1e-2


def test_the_report_says_that_there_are_pieces_and_why() -> None:
    report = fxc.prune(reading(), image()).report
    assert report.pieces == ("body", "head")
    assert list(report.outside) == ["scale"]
    assert "in 2 pieces, what each takes and returns stays: body, head" in str(report)
    assert "has no graph: it reads values out of a tensor at " in str(report)


def test_constants_are_folded_within_pieces() -> None:
    net = reading()
    with torch.no_grad():
        net.get_parameter("head.first.weight")[3] = 0
        net.get_parameter("head.first.bias")[3] = 0.7
    result = fxc.prune(net, image(), fold=True)
    assert result.report.folded == {"head.second.weight": 1}
    assert difference(result_of(net, image()), result_of(result.module, image())) <= 1e-12


def test_a_tensor_of_two_pieces_keeps_both() -> None:
    net = reading()
    assert isinstance(net, Reading)
    net.tail = block()
    net.tail[0].weight = net.body[0].weight
    outside = kept_of(net, image())
    assert outside["body.0.bias"] == "its 0.weight is also held by tail.0"


def test_an_activation_of_the_whole_network_is_no_obstacle() -> None:
    net = reading()
    assert isinstance(net, Reading)
    net.act = net.body[2]
    net.head = nn.Sequential(nn.Linear(4, 6), net.act, nn.Linear(6, 3)).double()
    with torch.no_grad():
        for layer in (net.body[0], net.body[1], net.head[0]):
            for tensor in layer.parameters():
                tensor[:2] = 0
    result = fxc.prune(net, image())
    assert result.report.pieces == ("body", "head")
    assert [len(result.module.get_parameter(name)) for name in ("body.0.weight", "head.0.weight")] == [8, 4]
    assert difference(result_of(net, image()), result_of(result.module, image())) <= 1e-12
    trained = fxc.compress(net, image())
    trained(image()).sum().backward()
    assert difference(result_of(trained, image()), result_of(trained.finalize(), image())) <= 1e-12


@pytest.mark.parametrize("call", [fxc.prune, fxc.compress])
def test_what_is_called_inside_of_vmap_is_no_piece(call: Callable[..., object]) -> None:
    class Mapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = torch.vmap(self.body)(x)
            return result

    with pytest.raises(TraceError, match="vmap"):
        call(Mapped(), torch.randn(3, 6))


def test_a_piece_that_is_called_on_empty_tensors() -> None:
    """No image is picked from the example, as a detector finds no object on some images."""
    net = reading(few)
    assert isinstance(net, Reading)
    net.head = nn.Sequential(nn.Linear(4, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 2)).double().eval()
    randomise(net)
    make_dead(net, image())
    pruned = fxc.prune(net, image()).module
    assert pruned.get_parameter("head.0.weight").shape == (6, 4)
    for x in (image(), 99 * image()):
        assert difference(result_of(net, x), result_of(pruned, x)) <= 1e-9


def few(y: Tensor) -> Tensor:
    """The images with a large entry."""
    return y[[i for i, entry in enumerate(y.abs().amax((1, 2, 3)).tolist()) if entry > 20]]


class ReadsOutside(Reading):
    """Code outside of the body reads a tensor of it."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x)
        for layer in self.body:
            y = y + layer.weight.norm() if isinstance(layer, nn.Conv2d) else y
        return y


class ReachesIn(Reading):
    """Code outside of the head may call a layer of it, and does not on the example inputs."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x)
        return self.head.first(x[:, :4, 0, 0]) if x.mean() > 99 and isinstance(self.head, Head) else y


class TakesApart(Reading):
    """Code outside of the body may call a layer of it by its number, and does not on the example inputs."""

    def forward(self, x: Tensor) -> Tensor:
        return first_layer(self, x) if x.mean() > 99 else super().forward(x)


def first_layer(net: Any, x: Tensor) -> Tensor:  # noqa: ANN401 - a Reading
    y: Tensor = net.body[0](x)
    return y


@pytest.mark.parametrize(
    ("kind", "name", "reason"),
    [
        (ReadsOutside, "body.0.weight", "its 0.weight is read by code outside of it"),
        (TakesApart, "body.0.weight", "code outside of it may take body apart"),
        (ReachesIn, "head.first.weight", "code outside of it names first, perhaps that of this module"),
    ],
)
def test_a_module_that_is_reached_into_is_no_piece(kind: type[Reading], name: str, reason: str) -> None:
    assert kept_of(kind(branch).double(), image())[name] == reason


class Levels(nn.Module):
    """A head that is called at several levels, and one that takes the levels as a list."""

    def __init__(self, lists: int = 1) -> None:
        super().__init__()
        self.each = block()
        self.all = AllLevels()
        self.lists = lists

    def forward(self, levels: list[Tensor]) -> list[Tensor]:
        found = [self.each(x) for x in levels if x.std() > 0]
        return [y for n in range(self.lists) for y in self.all(found[n:])]


class AllLevels(nn.Module):
    """A head that takes a list."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = block(4, 2)

    def forward(self, levels: list[Tensor]) -> list[Tensor]:
        return [self.layers(x).view(x.shape[0], 2, -1) for x in levels]


def test_one_graph_for_all_levels() -> None:
    net = randomise(Levels().double()).eval()
    levels = [image(size=n) for n in (8, 6, 4)]
    make_dead(net, levels)
    result = fxc.prune(net, (levels,))
    assert result.report.pieces == ("each", "all")
    other = [image(3, size=n, batch=1) for n in (10, 4, 6)]
    for given in (levels, other):
        assert difference(result_of(net, given), result_of(result.module, given)) <= 1e-9
    with pytest.raises(PathError):
        result.module(levels[:2])


def test_calls_that_take_different_paths_are_no_piece() -> None:
    net = randomise(Levels(lists=2).double()).eval()
    report = fxc.prune(net, ([image(size=n) for n in (8, 6, 4)],)).report
    assert report.pieces == ("each", "all.layers")


@pytest.mark.parametrize(
    ("net", "error"), [(nn.Sequential(nn.Conv2d(3, 4, 3)), TraceError), (nn.Identity(), UnsupportedModelError)]
)
def test_a_model_without_a_piece(net: nn.Module, error: type[Exception]) -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = net

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.layer(x)
            return y * y.mean().item() if error is UnsupportedModelError else y if y.mean() > 0 else -y

    model = Wrapper()
    visit = Fingerprint(model)
    with pytest.raises(error, match="no module of it holds two layers with weights"):
        fxc.prune(model, image().float())
    visit.check()


def test_what_needs_the_whole_graph_says_so() -> None:
    with pytest.raises(TraceError, match=r"ChannelGraph\.of_pieces"):
        fxc.ChannelGraph.of(reading(), image())


@pytest.mark.parametrize("fold", [False, True])
def test_a_file_gives_the_pieces_back(tmp_path: Path, fold: bool) -> None:  # noqa: FBT001
    net = reading()
    make_dead(net, image())
    pruned = fxc.prune(net, image(), fold=fold).module.eval()
    fxc.save(pruned, tmp_path / "net.fxc")
    loaded = fxc.load(tmp_path / "net.fxc", reading(), image())
    assert isinstance(loaded, Reading)
    assert difference(result_of(pruned, image(4)), result_of(loaded, image(4))) == 0
    assert fxc.save(loaded, tmp_path / "again.fxc") == (tmp_path / "net.fxc").stat().st_size
    with pytest.raises(StorageError, match=r"in pieces \(body, head\), .* pass example_inputs"):
        fxc.load(tmp_path / "net.fxc", reading())
    with pytest.raises(StorageError, match="head is a piece there, and none on these example inputs"):
        fxc.load(tmp_path / "net.fxc", Bodies().double(), image())


class Bodies(Reading):
    """The same tensors, and a head that is not called."""

    def __init__(self) -> None:
        super().__init__(branch)

    def forward(self, x: Tensor) -> Tensor:
        return branch(self.body(x))


def test_inspect_shows_each_piece(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["inspect", "tests.test_pieces:Levels", "--input", "3,2,3,8,8"]
    assert main(words) == 0
    text = capsys.readouterr().out
    assert text.startswith("all: ")  # the example is zeros, which each is not called on
    assert main([*words, "--explain", "all.layers.0", "2"]) == 0
    assert "layers.0[2] belongs to group" in capsys.readouterr().out


@pytest.mark.cpu
def test_a_detector_of_torchvision() -> None:
    """Two stages: raw outputs, losses and boxes stay."""
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.anchor_utils import AnchorGenerator

    torch.manual_seed(0)
    backbone = nn.Sequential(*block(3, 8), nn.ReLU(), *block(8, 8))
    backbone.out_channels = 8  # type: ignore[assignment]
    options = {"min_size": 32, "max_size": 48, "rpn_post_nms_top_n_test": 8, "rpn_post_nms_top_n_train": 8}
    anchors = AnchorGenerator(((8, 16),), ((1.0,),))
    net = randomise(FasterRCNN(backbone, 3, rpn_anchor_generator=anchors, **options).double()).eval()
    images = list(image(size=32, batch=2))
    make_dead(net, images)
    result = fxc.prune(net, (images,))
    assert {"backbone", "roi_heads.box_head"} <= set(result.report.pieces)
    assert result.report.parameters[1] < 0.8 * result.report.parameters[0]
    for path in ("backbone", "rpn.head", "roi_heads.box_predictor"):
        expected, found = (raw_outputs(n, path, images) for n in (net, result.module))
        assert difference(expected, found) <= 1e-9
    boxes = torch.tensor([[4.0, 4.0, 20.0, 24.0]], dtype=torch.float64)
    targets = [{"boxes": boxes, "labels": torch.ones(1, dtype=torch.int64)}] * 2
    expected, found = (result_of(n, images, targets, training=True) for n in (net, result.module))
    assert set(expected) == {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"}
    assert difference(expected, found) <= 1e-9


def raw_outputs(net: nn.Module, path: str, images: list[Tensor]) -> list[Any]:
    found: list[Any] = []
    handle = net.get_submodule(path).register_forward_hook(lambda _m, _args, out: found.append(out))
    with torch.no_grad():
        net(copy.deepcopy(images))
    handle.remove()
    return found


class OfALibrary(nn.Module):
    """What the base classes of a library hold: code that names attributes of anything, and does not reach a piece."""

    @classmethod
    def from_checkpoint(cls, state: dict[str, Tensor]) -> "OfALibrary":
        """Makes one."""
        made: Any = cls()
        made.head.first.weight.data = state["head.first.weight"]
        return made  # type: ignore[no-any-return]

    def named(self, name: str) -> object:
        """The layer of that name, such as ``head.first.weight``."""
        return getattr(self, name)


class WithOptions(OfALibrary):
    """Decides by values, and hands options on, as the models of Hugging Face do."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = block(), Head()
        self.first = nn.Linear(3, 4)  # of the same name as a layer of the head

    def forward(self, x: Tensor, **options: Any) -> Tensor:  # noqa: ANN401
        rows = branch(self.body(*(x,), **options)).mean((2, 3))
        y: Tensor = self.head(
            rows + self.first(x.mean((2, 3))), **{key: value for key, value in options.items() if value}
        )
        return y


class HandsOver(WithOptions):
    """The same, with a head that is handed over with the options."""

    def forward(self, x: Tensor, **options: Any) -> Tensor:  # noqa: ANN401
        y: Tensor = apply(*(self.head, branch(self.body(x)).mean((2, 3))), **options)
        return y


def apply(layer: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = layer(x)
    return y


def test_names_on_self_and_options_reach_no_piece() -> None:
    net = WithOptions().double().eval()
    make_dead(net, image())
    result = fxc.prune(net, image())
    assert result.report.pieces == ("body", "head")
    assert result.module.get_parameter("head.second.weight").shape == (5, 8)
    for x in (image(), -image(2)):
        assert difference(result_of(net, x), result_of(result.module, x)) <= 1e-9
    assert kept_of(HandsOver().double(), image())["head.first.weight"] == "code outside of it may take head apart"


class Renames(Reading):
    """A method that goes on with another object under the name of its own."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x)
        if x.mean() > 99:
            self = getattr(self, "head", None)  # type: ignore[assignment]  # noqa: PLW0642
            return self.first(x[:, :4, 0, 0])  # type: ignore[operator,no-any-return]
        return y


def test_self_may_be_another_object() -> None:
    assert kept_of(Renames(branch).double(), image())["head.first.weight"].startswith("code outside of it names first")


CALLS: dict[str, tuple[Callable[..., Any], bool]] = {
    "called": (lambda self, x, **more: self.part(x, **more), False),
    "called with all": (lambda self, x, **more: self.part(*x, a=[x, 1], b={"c": -x[1:2]}, **more), False),
    "called for parts": (lambda self, x, **more: self.part(x.y(1), **more)[0], False),
    "called for a method": (lambda self, x, **more: self.part.forward(x, **more), False),
    "an item of it called": (lambda self, x, **more: self.part[0](x, **more), True),
    "given": (lambda self, x, **more: x(self.part, **more), True),
    "given with others": (lambda self, x, **more: x(*self.part, **more), True),
    "given in a list": (lambda self, x, **more: x(1, [self.part], **more), True),
    "given by name": (lambda self, x, **more: x(1, a=self.part, **more), True),
    "called, by what is decided there": (lambda self, x, **more: self.part(1 if x else 2, **more), True),
}


@pytest.mark.parametrize("case", CALLS)
def test_calls_with_options_take_nothing_apart(case: str) -> None:
    function, opened = CALLS[case]
    assert isinstance(function, FunctionType)
    assert ("part" in opened_in([function])) is opened


@torch.library.custom_op("fxcompress_test::strict", mutates_args=())
def strict(x: Tensor) -> Tensor:
    """Takes any numbers."""
    return x.clone()


@strict.register_fake
def _(x: Tensor) -> Tensor:
    if x.dtype != torch.bfloat16:
        raise RuntimeError("expected x to be bfloat16")
    return torch.empty_like(x)


def strictly(y: Tensor) -> Tensor:
    found: Tensor = strict(y)
    return found


class Nested(nn.Module):
    """Sequences of their own lengths, which go through a module side by side, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4)), Head()

    def forward(self, sequences: list[Tensor]) -> Tensor:
        nested = torch.nested.nested_tensor(sequences, layout=torch.jagged)
        return self.head(torch.stack([part.mean(0) for part in self.body(nested).unbind()]))  # type: ignore[no-any-return]


def test_a_module_that_is_given_nested_tensors_is_no_piece() -> None:
    net, sequences = randomise(Nested()).double().eval(), [torch.randn(n, 3, dtype=torch.float64) for n in (2, 5)]
    with torch.no_grad():
        net.get_parameter("head.first.weight")[:3] = 0
        net.get_parameter("head.first.bias")[:3] = 0
    with pytest.raises(
        TraceError, match="it computes with a nested tensor, the lengths of which a graph does not know"
    ):
        fxc.ChannelGraph.of(net, (sequences,))
    result = fxc.prune(net, (sequences,))
    assert result.module.get_parameter("head.first.weight").shape == (9, 4)
    other = [torch.randn(n, 3, dtype=torch.float64) for n in (4, 1, 3)]
    assert difference(net(other), result.module(other)) <= 1e-12


def test_an_op_that_takes_less_on_fake_tensors(capfd: pytest.CaptureFixture[str]) -> None:
    net = reading(strictly)
    result = fxc.prune(net, image())
    assert result.report.pieces == ("body", "head")
    assert "expected x to be bfloat16" in result.report.why_pieces
    assert difference(result_of(net, image()), result_of(result.module, image())) <= 1e-9
    assert not capfd.readouterr().err
