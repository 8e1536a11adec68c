"""What users throw at it: it works exactly, or says what is wrong; and nothing of theirs has changed either way."""

import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fxcompress as fxc
from fxcompress.errors import ExampleInputError, FxCompressError, OptimizerError, TraceError, UnsupportedModelError
from fxcompress.pruning import PruneResult
from tests.exactness import Fingerprint, difference, outputs

LIBRARY = torch.library.Library("fxc_test", "FRAGMENT")
LIBRARY.define("twice(Tensor x) -> Tensor")
LIBRARY.define("bare(Tensor x) -> Tensor")
LIBRARY.define("overwrite(Tensor x, Tensor(a!) y) -> ()")
LIBRARY.impl("twice", lambda x: x * 2, "CompositeExplicitAutograd")
LIBRARY.impl("bare", lambda x: x * 2, "CPU")


def _overwrite(x: Tensor, y: Tensor) -> None:
    y.copy_(x.flip(1))


LIBRARY.impl("overwrite", _overwrite, "CPU")
torch.library.register_fake("fxc_test::twice", torch.empty_like, lib=LIBRARY)
torch.library.register_fake("fxc_test::overwrite", lambda x, y: None, lib=LIBRARY)
twice, bare, overwrite = (getattr(torch.ops.fxc_test, name) for name in ("twice", "bare", "overwrite"))


class Net(nn.Module):
    """conv (3 -> 8, channel 1 dead), something, conv (8 -> 2)."""

    def __init__(self, between: Callable[[Tensor], Tensor] = F.relu) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 1)
        self.between = between
        with torch.no_grad():
            self.conv1.weight[1] = 0
            self.conv1.bias[1] = 0  # type: ignore[index]

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.between(self.conv1(x)))  # type: ignore[no-any-return]


def image(dtype: torch.dtype = torch.float64, channels: int = 3) -> Tensor:
    return torch.randn(2, channels, 8, 8, dtype=torch.float64).to(dtype)


def prune(net: nn.Module, inputs: object, optimizer: torch.optim.Optimizer | None = None) -> PruneResult:
    """Prune a network of the caller's, of which nothing may change."""
    net.eval()
    visit = Fingerprint(net)
    result = fxc.prune(net, inputs, optimizer)
    visit.check()
    if isinstance(inputs, Tensor):
        assert difference(outputs(net, (inputs,)), outputs(result.module, (inputs,))) <= 1e-9
    return result


def refusal(
    error: type[FxCompressError], net: nn.Module, inputs: object, optimizer: torch.optim.Optimizer | None = None
) -> str:
    """The text of the error; neither the network nor the optimizer may have changed."""
    visit = Fingerprint(net, optimizer)
    with pytest.raises(error) as caught:
        fxc.prune(net, inputs, optimizer)
    visit.check()
    return str(caught.value)


def check_removed(net: nn.Module, inputs: Tensor, optimizer: torch.optim.Optimizer | None = None) -> PruneResult:
    result = prune(net, inputs, optimizer)
    assert result.module.get_parameter("conv1.weight").shape[0] == 7
    assert result.module.get_parameter("conv2.weight").shape[1] == 7
    return result


def check_kept(net: nn.Module, inputs: Tensor, op: str) -> None:
    result = prune(net, inputs)
    assert not result.report.modified
    assert op in result.report.unknown_ops
    assert f"no rule for {op}" in str(result.report)


def write_into(h: Tensor) -> Tensor:
    """A custom op that writes to its second argument."""
    y = h * 0
    overwrite(h, y)
    return y


UNKNOWN: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "masked_scatter": (lambda h: h.masked_scatter(h > 0, h), "aten.masked_scatter.default"),
    "histc": (lambda h: h + torch.histc(h, 4).sum(), "aten.histc.default"),
    "put": (lambda h: h.put(torch.tensor([0]), h.new_ones(1)), "aten.put.default"),
    "nonzero": (lambda h: h * (h.nonzero().shape[0] > 0), "aten.nonzero.default"),
    "unique": (lambda h: h + torch.unique(h).sum(), "aten._unique2.default"),
    "a custom op with a fake": (twice, "fxc_test.twice.default"),
    "a custom op that writes": (write_into, "fxc_test.overwrite.default"),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_ops_without_a_rule_keep_what_they_touch(name: str) -> None:
    between, op = UNKNOWN[name]
    check_kept(Net(between).double(), image(), op)


def test_a_custom_op_without_a_fake() -> None:
    """It runs on zeros then, for the shape."""
    check_kept(Net(bare).double(), image(), "fxc_test.bare.default")


@pytest.mark.parametrize(
    "between",
    [
        lambda h: h.cumsum(1),
        lambda h: h.softmax(1),
        lambda h: h - h.mean(1, keepdim=True),
        lambda h: h.topk(8, 1)[0],
        lambda h: h.gather(1, h.argsort(1)),
        lambda h: h[:, h.mean((0, 2, 3)).argsort()],
        lambda h: h.index_put((torch.tensor([0, 0]), torch.tensor([1, 2])), h[0, :2] + 1),
        lambda h: F.group_norm(h, 2),
        lambda h: F.normalize(h + 1, dim=1),
        lambda h: h[:, torch.arange(8).flip(0)],
        lambda h: h + h[h > 0].sum(),
    ],
)
def test_ops_that_mix_channels_keep_them(between: Callable[[Tensor], Tensor]) -> None:
    result = prune(Net(between).double(), image())
    assert not result.report.modified
    assert [kept.channel for kept in result.report.kept if kept.tensor == "conv1.weight"] == [1]


def test_a_number_out_of_a_tensor() -> None:
    text = refusal(UnsupportedModelError, Net(lambda h: h * h.sum().item()).double(), image())
    assert "item at tests/test_bad_input.py:" in text
    assert " reads a number out of a tensor" in text


def test_untraceable() -> None:
    def branch(h: Tensor) -> Tensor:
        return h if h.sum() > 0 else -h

    text = refusal(TraceError, Net(branch).double(), image())
    assert "torch.fx cannot trace Net" in text
    assert "return h if h.sum() > 0 else -h" in text


@pytest.mark.parametrize(
    ("inputs", "text"),
    [
        (
            image(channels=5),
            "Conv2d conv1 at tests/test_bad_input.py:51 failed on tensors of shape (2, 5, 8, 8); it is Conv2d",
        ),
        (image(torch.float32), "Conv2d conv1 at tests/test_bad_input.py:51 failed on tensors of shape (2, 3, 8, 8)"),
        (torch.zeros(2, 3, dtype=torch.float64), "failed on tensors of shape (2, 3)"),
        ((), "example_inputs leaves out x"),
        ((image(), image()), "2 given: leave out what the model is not called with, such as the targets"),
        ((2, 3, 8, 8), "4 given: these are numbers; if they are a shape, pass torch.zeros(2, 3, 8, 8)"),
        (
            (np.zeros((2, 3, 8, 8)),),
            "the example inputs hold numpy arrays, which Conv2d conv1 at tests/test_bad_input.py:51",
        ),
        ({"y": image()}, "forward has no argument y; it takes x"),
        ("image", "example_inputs is a str"),
        (np.zeros((2, 3, 8, 8)), "example_inputs is a ndarray; .* of keyword arguments: torch.from_numpy"),
        (DataLoader(TensorDataset(image())), "example_inputs is a DataLoader; .*: of one batch, .* without targets"),
        (torch.Size([2, 3]), r"example_inputs is a Size; .*: torch.zeros\(shape\)"),
        (nn.Linear(1, 1), "example_inputs is a Linear; .*: the model is the first argument"),
    ],
)
def test_inputs_that_do_not_fit(inputs: object, text: str) -> None:
    found = refusal(ExampleInputError, Net().double(), inputs)
    assert re.search(text, found) or text in found
    assert "test_bad_input.py" in found or "forward" in found or "example_inputs is" in found


def test_inputs_that_cannot_be_inferred() -> None:
    text = refusal(ExampleInputError, nn.Bilinear(2, 2, 2), None)
    assert "takes 2 arguments without a default" in text


@pytest.mark.parametrize("inputs", [(image(),), [image()], {"x": image()}])
def test_all_forms_of_inputs(inputs: object) -> None:
    result = prune(Net().double(), inputs)
    assert result.report.modified


def nan(net: Net) -> None:
    net.conv1.weight.data[0, 0, 0, 0] = torch.nan


def infinite(net: Net) -> None:
    net.conv2.bias.data[0] = torch.inf  # type: ignore[union-attr]


def hook(net: Net) -> None:
    net.conv1.register_forward_hook(lambda module, args, output: output * 2)


def pre_hook(net: Net) -> None:
    net.register_forward_pre_hook(lambda module, args: None)


def backward_hook(net: Net) -> None:
    net.conv1.register_full_backward_hook(lambda module, before, after: None)


def patched(net: Net) -> None:
    net.__dict__["forward"] = net.conv1.forward


def lock(net: Net) -> None:
    net.__dict__["lock"] = threading.Lock()


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (nan, "parameter 'conv1.weight' holds NaN or infinite values"),
        (infinite, "parameter 'conv2.bias' holds NaN or infinite values"),
        (hook, "module 'conv1' (Conv2d): it has a forward hook"),
        (pre_hook, "module '<root>' (Net): it has a forward pre-hook"),
        (backward_hook, "module 'conv1' (Conv2d): it has a backward hook"),
        (patched, "module '<root>' (Net): its forward was replaced on the instance"),
        (lock, "Net cannot be copied"),
    ],
)
def test_models_that_are_refused(damage: Callable[[Net], None], text: str) -> None:
    net = Net().double()
    damage(net)
    assert text in refusal(UnsupportedModelError, net, image())


def test_meta_lazy_scripted_and_parallel() -> None:
    assert "is on the meta device" in refusal(UnsupportedModelError, Net().to("meta"), image())
    lazy = nn.Sequential(nn.LazyConv2d(4, 3))
    with pytest.raises(UnsupportedModelError, match="it is lazy and has no shape yet; run the model once"):
        fxc.prune(lazy, image(torch.float32))
    lazy(image(torch.float32))
    prune(lazy, image(torch.float32))
    with pytest.raises(UnsupportedModelError, match=r"pass the wrapped model \(model.module\)"):
        fxc.prune(nn.DataParallel(Net().double()), image())
    with pytest.raises(TypeError, match=r"expected a torch.nn.Module, got int; the model is the first argument"):
        fxc.prune(3, image())  # type: ignore[arg-type]


@pytest.mark.cpu
@pytest.mark.filterwarnings("ignore")
def test_scripted_and_quantized() -> None:
    scripted = torch.jit.script(nn.Sequential(nn.Conv2d(3, 4, 1)))
    with pytest.raises(UnsupportedModelError, match="a ScriptModule has no Python code to trace"):
        fxc.prune(scripted, image(torch.float32))
    quantized = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(UnsupportedModelError, match="it is quantized already; pass the float model"):
        fxc.prune(quantized, torch.zeros(1, 4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_precisions(dtype: torch.dtype) -> None:
    net, x = Net().to(dtype), image(dtype)
    result = fxc.prune(net, x)
    assert result.module.get_parameter("conv1.weight").shape[0] == 7
    assert result.module.get_parameter("conv1.weight").dtype == dtype
    assert difference(net(x).float(), result.module(x).float()) < 5 * torch.finfo(dtype).eps


def test_frozen_parameters_stay_frozen() -> None:
    net = Net().double()
    net.conv1.requires_grad_(False)
    module = check_removed(net, image()).module
    assert [p.requires_grad for p in module.parameters()] == [False, False, True, True]


def test_shared_weights_stay_shared() -> None:
    class Shared(Net):
        def __init__(self) -> None:
            super().__init__()
            self.twin = nn.Conv2d(3, 8, 3)
            self.twin.weight = self.conv1.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.conv2(self.conv1(x) + self.twin(x))  # type: ignore[no-any-return]

    net = Shared().double()
    nn.init.zeros_(net.twin.bias)  # type: ignore[arg-type]
    module = check_removed(net, image()).module
    assert module.get_parameter("twin.weight") is module.get_parameter("conv1.weight")
    assert [name for name, _ in module.named_parameters()] == [name for name, _ in net.named_parameters()]


def test_gradients_are_cut_with_their_weights() -> None:
    net = Net().double()
    net(image()).sum().backward()
    module = check_removed(net, image()).module
    grad, expected = module.get_parameter("conv1.weight").grad, net.conv1.weight.grad
    assert grad is not None
    assert expected is not None
    assert torch.equal(grad, expected[[0, 2, 3, 4, 5, 6, 7]])


def test_hooks_on_tensors_are_the_callers() -> None:
    net = Net().double()
    seen: list[Tensor] = []
    net.conv1.weight.register_hook(seen.append)
    module = check_removed(net, image()).module
    module(image()).sum().backward()
    assert seen == []


def trained(net: Net) -> torch.optim.Optimizer:
    """An optimizer with state, for a network whose channel 1 is dead all the same."""
    optimizer = torch.optim.Adam(net.parameters())
    net(image()).sum().backward()
    optimizer.step()
    with torch.no_grad():
        net.conv1.weight[1] = 0
        net.conv1.bias[1] = 0  # type: ignore[index]
    return optimizer


def test_the_optimizer_follows() -> None:
    net = Net().double()
    optimizer = trained(net)
    average = optimizer.state[net.conv1.weight]["exp_avg"].clone()
    module = check_removed(net, image(), optimizer).module
    weight = module.get_parameter("conv1.weight")
    assert optimizer.param_groups[0]["params"] == list(module.parameters())
    assert torch.equal(optimizer.state[weight]["exp_avg"], average[[0, 2, 3, 4, 5, 6, 7]])


def test_an_optimizer_of_another_network() -> None:
    other = Net().double()
    text = refusal(OptimizerError, Net().double(), image(), trained(other))
    assert "the optimizer holds 4 parameters that are not the network's" in text


def test_an_optimizer_is_left_alone_when_something_fails() -> None:
    net = Net().double()
    refusal(ExampleInputError, net, image(channels=5), trained(net))


def test_a_network_without_parameters() -> None:
    assert not fxc.prune(nn.Sequential(nn.ReLU()), image()).report.modified


def test_extra_state_is_no_tensor() -> None:
    class Extra(Net):
        def get_extra_state(self) -> str:
            return "mine"

        def set_extra_state(self, state: object) -> None:
            assert state == "mine"

    net, x = Extra().double(), image()
    assert difference(net(x), fxc.prune(net, x).module(x)) <= 1e-9


def test_a_path_and_a_network_in_the_wrong_order_are_told_apart(tmp_path: Path) -> None:
    path = str(tmp_path / "net.fxc")
    net = fxc.compress(nn.Linear(4, 2), torch.zeros(1, 4))
    calls: dict[str, Callable[..., object]] = {
        "load(path, model)": lambda: fxc.load(net, path),  # type: ignore[arg-type]
        "save(module, path)": lambda: fxc.save(path, net),  # type: ignore[arg-type]
        "save_checkpoint(path, net, optimizer)": lambda: fxc.save_checkpoint(net, path),  # type: ignore[arg-type]
        "load_checkpoint(path, net, optimizer)": lambda: fxc.load_checkpoint(net, path),  # type: ignore[arg-type]
    }
    for usage, call in calls.items():
        with pytest.raises(TypeError, match=rf"they are swapped: call it as {re.escape(usage)}"):
            call()
    with pytest.raises(TypeError, match=r"the path is a str and the network a OrderedDict: call it as load"):
        fxc.load(path, net.state_dict())  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


SMALL = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
BATCH = (torch.zeros(3, 4), torch.zeros(3, dtype=torch.long))
NOT_NUMBERS: list[object] = ["8", None, [1], torch.ones(3), object()]


@pytest.mark.parametrize("value", NOT_NUMBERS)
@pytest.mark.parametrize("name", ["bits", "bias_shrink", "death_limit"])
def test_numbers_of_compress(name: str, value: object) -> None:
    with pytest.raises(TypeError, match=rf"^{name}=.* is a {type(value).__name__}; it must be a number"):
        fxc.compress(SMALL, BATCH[0], **{name: value})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"^{name}=nan"):
        fxc.compress(SMALL, BATCH[0], **{name: torch.nan})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["lr", "weight_decay", "bits_lr", "bits_eps", "exponents_lr"])
def test_numbers_of_parameter_groups(name: str) -> None:
    net = fxc.compress(SMALL, BATCH[0])
    for value in NOT_NUMBERS:
        if value is None and name not in {"lr", "weight_decay"}:  # these have defaults that depend on others
            continue
        with pytest.raises(TypeError, match=rf"^{name}=.* must be a number"):
            net.param_groups(**{name: value})  # type: ignore[arg-type]
    for number in (-1.0, torch.nan, torch.inf):
        with pytest.raises(ValueError, match=rf"^{name}={number} is out of range"):
            net.param_groups(**{name: number})
    assert net.param_groups(**{name: torch.tensor(0.5)})  # type: ignore[arg-type]


Kind = type[Exception]


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"model": None}, TypeError, "expected a torch.nn.Module, got NoneType; the model is the first argument"),
        ({"model": nn.Linear}, TypeError, "expected a torch.nn.Module, got the class Linear; pass an object of it"),
        ({"epochs": None}, TypeError, "epochs=None is a NoneType; it must be a whole number"),
        ({"epochs": 1.5}, TypeError, "epochs=1.5 is a float"),
        ({"gamma": "x"}, TypeError, "gamma='x' is a str"),
        (
            {"gamma": lambda progress: 0.1},
            TypeError,
            r"gamma is called as gamma\(progress, size\), which its signature",
        ),
        ({"gamma": torch.nan}, ValueError, "gamma=nan must be finite"),
        ({"gamma": torch.inf}, ValueError, "gamma=inf must be finite"),
        ({"gamma": None, "target_size": "x"}, TypeError, "target_size='x' is a str"),
        ({"lr": -1.0}, ValueError, "lr=-1.0 is out of range"),
        ({"weight_decay": "a"}, TypeError, "weight_decay='a' is a str"),
        ({"prune": None}, TypeError, "prune=None is none of True, False, a whole number of steps and a PrunePolicy"),
        ({"prune": 1.5}, TypeError, "prune=1.5 is none of"),
        ({"prune": 0}, ValueError, "at least one step"),
        ({"max_loss_increase": "x"}, TypeError, "max_loss_increase='x' is a str"),
        ({"max_loss_increase": torch.nan}, ValueError, "max_loss_increase=nan must be positive"),
        ({"min_accuracy": "x", "validate": lambda net: 1.0}, TypeError, "min_accuracy='x' is a str"),
        ({"min_accuracy": float("nan"), "validate": lambda net: 1.0}, ValueError, "min_accuracy=nan is reached by no"),
        ({"validate": 3}, TypeError, r"validate is a int; it must be a function of \(net\)"),
        ({"validate": lambda: 1.0}, TypeError, r"validate is called as validate\(net\), which its signature"),
        ({"on_epoch": 3}, TypeError, r"on_epoch is a int; it must be a function of \(record\)"),
        ({"scheduler": 3}, TypeError, "scheduler.step is a int"),
        ({"scheduler": nn.Linear(1, 1)}, TypeError, "scheduler.step is called as"),
        ({"average": 3}, TypeError, "average= is a int; pass AveragedModel"),
        ({"loss_fn": nn.CrossEntropyLoss}, TypeError, r"is the class CrossEntropyLoss; pass an object of it"),
        (
            {"loss_fn": lambda output, target: output.detach().sum()},
            ValueError,
            "loss_fn returned .* without a gradient",
        ),
        ({"loss_fn": lambda output, target: torch.tensor(1.0)}, ValueError, "loss_fn returned 1 without a gradient"),
        ({"loss_fn": lambda output, target: output.sum().long()}, ValueError, "without a gradient"),
    ],
)
def test_arguments_of_fit(arguments: dict[str, object], error: Kind, text: str) -> None:
    """Each is refused before the first step."""
    given = {"model": SMALL, "loader": [BATCH], "loss_fn": F.cross_entropy, "epochs": 1, "gamma": 0.1} | arguments
    visit = Fingerprint(SMALL)
    with pytest.raises(error, match=text):
        fxc.fit(**given, progress=False)  # type: ignore[arg-type]
    visit.check()


@pytest.mark.parametrize("path", ["", ".", Path()])
def test_a_path_that_names_no_file(path: str | Path) -> None:
    net = fxc.compress(SMALL, BATCH[0])
    calls: list[Callable[[], object]] = [
        lambda: fxc.save(net.finalize(), path),
        lambda: fxc.load(path, SMALL),
        lambda: fxc.save_checkpoint(path, net),
        lambda: fxc.load_checkpoint(path, net),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"the path .* names no file: call it as \w+\("):
            call()


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((10, None), TypeError, r"expected a torch.optim.Optimizer, got int: call it as cosine\(optimizer, steps\)"),
        ((None, "10"), TypeError, "steps='10' is a str; it must be a number"),
        ((None, 0), ValueError, "steps=0 must be at least 1"),
        ((None, 10, -1), ValueError, "warmup=-1 at least 0"),
    ],
)
def test_arguments_of_cosine(arguments: tuple[Any, ...], error: Kind, text: str) -> None:
    adam = torch.optim.Adam(nn.Linear(1, 1).parameters())
    with pytest.raises(error, match=text):
        fxc.cosine(arguments[0] or adam, *arguments[1:])


def test_what_is_no_optimizer() -> None:
    net = fxc.compress(SMALL, BATCH[0])
    adam = torch.optim.Adam(net.param_groups())
    strangers: list[object] = [3, "adam", {}, torch.optim.Adam, [adam, 3], torch.optim.lr_scheduler.StepLR(adam, 1)]
    for stranger in strangers:
        wrong = stranger[1] if isinstance(stranger, list) else stranger
        for call in (net.prune, lambda o: fxc.prune(SMALL, BATCH[0], o[1] if isinstance(o, list) else o)):
            with pytest.raises(TypeError, match=f"expected a torch.optim.Optimizer, got {type(wrong).__name__}"):
                call(stranger)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"got StepLR; pass the one that it holds as .optimizer"):
        net.prune(strangers[-1])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"pass a list: averages=\[average\]"):
        net.prune(adam, averages=torch.optim.swa_utils.AveragedModel(net))  # type: ignore[arg-type]


@pytest.mark.parametrize("state", [None, "net.pt", 3, [("a", 1)]])
def test_what_is_no_state_dict(state: object) -> None:
    with pytest.raises(TypeError, match=f"expected a state_dict, got {type(state).__name__}"):
        fxc.compress(SMALL, BATCH[0]).load_state_dict(state)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [None, 3.0, torch.ones(3)])
def test_objectives_that_return_no_scalar(value: object) -> None:
    net = fxc.compress(SMALL, BATCH[0], objective=lambda terms, bits: value)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"returned .*; it must return a scalar"):
        net.size()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["0.weight", "2.bias", "0.weight_quantizer.bits"])
def test_a_network_whose_training_has_diverged_is_not_finalized(name: str, value: float) -> None:
    net = fxc.compress(SMALL, BATCH[0])
    with torch.no_grad():
        net.get_parameter(name)[0] = value
    with pytest.raises(UnsupportedModelError, match=f"parameter '{name}' holds NaN or infinite values"):
        net.finalize()


def test_a_file_is_not_loaded_into_a_compressed_network(tmp_path: Path) -> None:
    net = fxc.compress(SMALL, BATCH[0])
    fxc.save(net.finalize(), tmp_path / "net.fxc")
    with pytest.raises(FxCompressError, match="load it into the original model, not into a compressed one"):
        fxc.load(tmp_path / "net.fxc", net)


class Spectral(nn.Module):
    """Some weights are complex, as in networks that learn filters in the frequency domain, and some are empty."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(8, 6), nn.Linear(6, 3)
        self.filter = nn.Linear(4, 4, dtype=torch.complex64)
        self.mix = nn.Parameter(torch.randn(4, 4, dtype=torch.complex64))
        self.nothing = nn.Linear(0, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.before(x))
        spectrum = self.filter(torch.fft.rfft(h)) @ self.mix
        return self.after(torch.fft.irfft(spectrum, n=6)) + self.nothing(x[:, :0])  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_complex_and_empty_weights_get_no_quantizer() -> None:
    model, x = Spectral(), torch.randn(4, 8)
    net = fxc.compress(model, x)
    assert net.weights == 8 * 6 + 6 * 3
    assert all("it is complex; hold its parts as real numbers" in item.reason for item in net.unquantized())
    assert difference(model(x), net(x)) < 0.05
    optimizer = torch.optim.Adam(net.param_groups(lr=1e-2))
    for _ in range(3):
        optimizer.zero_grad()
        (net(x).square().mean() + 0.1 * net.size()).backward()
        optimizer.step()
        net.step()
        net.prune(optimizer)
    assert difference(net.eval()(x), net.finalize().eval()(x)) < 1e-5
