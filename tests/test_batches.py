"""What ``fit`` takes for a batch, a loss and a metric, and what it says of all else."""

from collections import UserDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fxcompress as fxc
from fxcompress.errors import BatchError, DivergenceError

Loader = list[Any]


class Named(nn.Module):
    """Takes its input by a name, and perhaps its labels, as models of Hugging Face do."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> Any:  # noqa: ANN401
        output = self.body(pixel_values)
        return output if labels is None else (F.cross_entropy(output, labels), output)


class Plain(Named):
    """The same without labels."""

    def forward(self, pixel_values: Tensor) -> Any:  # type: ignore[override]  # noqa: ANN401
        return self.body(pixel_values)


def data(batches: int = 2) -> list[tuple[Tensor, Tensor]]:
    """Batches of four samples."""
    torch.manual_seed(0)
    return [(torch.randn(4, 6), torch.randint(3, (4,))) for _ in range(batches)]


def trained(model: nn.Module, loader: Any, loss: Callable[..., Any] = F.cross_entropy, **options: Any) -> Any:  # noqa: ANN401
    """What ``fit`` makes of it, from the same numbers each time."""
    torch.manual_seed(1)
    return fxc.fit(model, loader, loss, **{"epochs": 2, "gamma": 0.02, "progress": False} | options)


def weighted(output: Tensor, target: dict[str, Tensor]) -> Tensor:
    """A loss that needs two things besides the output."""
    return (F.cross_entropy(output, target["labels"], reduction="none") * target["weight"]).mean()


def forms() -> dict[str, tuple[nn.Module, Loader, Callable[..., Any]]]:
    """The same training in all forms that a batch may have."""
    torch.manual_seed(0)
    plain, named = Plain(), Named()
    named.load_state_dict(plain.state_dict())
    one = torch.ones(4)
    return {
        "tuple": (plain, data(), F.cross_entropy),
        "list": (plain, [list(batch) for batch in data()], F.cross_entropy),
        "module": (plain, data(), nn.CrossEntropyLoss()),
        "pair as target": (plain, [(x, (y, one)) for x, y in data()], lambda out, t: F.cross_entropy(out, t[0])),
        "dict": (plain, [{"pixel_values": x, "labels": y} for x, y in data()], F.cross_entropy),
        "of a kind of its own": (plain, [UserDict(pixel_values=x, labels=y) for x, y in data()], F.cross_entropy),
        "dict with more": (plain, [{"pixel_values": x, "labels": y, "weight": one} for x, y in data()], weighted),
        "all for forward": (named, [{"pixel_values": x, "labels": y} for x, y in data()], lambda out, batch: out[0]),
    }


@pytest.mark.parametrize("form", list(forms()))
def test_batches_of_all_forms_train_the_same(form: str) -> None:
    expected = trained(*forms()["tuple"])
    found = trained(*forms()[form])
    losses = [[record.loss for record in result.history] for result in (found, expected)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for name, value in expected.net.named_parameters():
        torch.testing.assert_close(found.net.get_parameter(name), value)


class Once:
    """Says how long it is, and can be gone through only once."""

    def __init__(self) -> None:
        self.rest = iter(data(3))

    def __len__(self) -> int:
        return 2

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.rest


class Stream(torch.utils.data.IterableDataset[Any]):
    """Without a length."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(data())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_mean_loss_is_that_of_all_batches_in_any_precision(dtype: torch.dtype) -> None:
    """A sum in half precision stops rising at a few hundred times what is added."""
    result = trained(
        Plain().to(dtype), [(torch.randn(4, 6, dtype=dtype), torch.zeros(4))] * 250,
        lambda output, _: 0 * output.sum() + 7.25, epochs=1, lr=0.0, gamma=0.0,
    )  # fmt: skip
    assert result.history[0].loss == pytest.approx(7.25)


@pytest.mark.parametrize(
    ("loader", "kind", "message"),
    [
        ([], ValueError, "the loader is empty"),
        (Once(), ValueError, "can it be gone through only once"),
        (iter(data()), TypeError, "can be gone through only once"),
        (torch.utils.data.TensorDataset(*data()[0]), TypeError, r"a dataset, .* pass DataLoader\(dataset,"),
        (torch.utils.data.DataLoader(Stream()), TypeError, "has no length .*a dataset that has a length"),
        ([torch.zeros(4, 6)], TypeError, r"a batch must be \(input, \.\.\., target\), or a dict .* got a Tensor"),
        ([(torch.zeros(4, 6),)], TypeError, "got a tuple of length 1"),
        ([{"image": torch.zeros(4, 6), "labels": 0}], ValueError, "dict of image, labels, and forward takes pixel_val"),
    ],
)
def test_what_no_loader_gives(loader: Any, kind: type[Exception], message: str) -> None:  # noqa: ANN401
    with pytest.raises(kind, match=message):
        trained(Plain(), loader)


@pytest.mark.parametrize(
    ("loss", "kind", "message"),
    [
        (lambda output, target, weight: output.sum(), TypeError, r"called as loss_fn\(output, target\).*'weight'"),
        (5, TypeError, "loss_fn is a int"),
        (lambda output, target: {"loss": output.sum()}, TypeError, "loss_fn returned a dict"),
        (lambda output, target: output, ValueError, r"shape \(4, 3\); it must return one number"),
    ],
)
def test_what_is_no_loss(loss: Any, kind: type[Exception], message: str) -> None:  # noqa: ANN401
    with pytest.raises(kind, match=message):
        trained(Plain(), data(), loss)


def test_a_metric_is_a_number_or_none() -> None:
    results = [trained(Plain(), data(), epochs=1, validate=lambda net, m=m: m) for m in (None, torch.tensor([0.5]), 1)]
    assert [result.history[0].metric for result in results] == [None, 0.5, 1.0]
    for wrong, message in ((torch.zeros(3), r"shape \(3,\)"), ({"accuracy": 1}, "a dict"), ("high", "a str")):
        with pytest.raises(TypeError, match=f"validate returned {message}; it must return one number"):
            trained(Plain(), data(), validate=lambda net, wrong=wrong: wrong)
    with pytest.raises(TypeError, match="min_accuracy= needs the accuracy"):
        trained(Plain(), data(), validate=lambda net: None, min_accuracy=0.5)


def nan_at(step: int, what: str) -> Callable[[Tensor, Tensor], Tensor]:
    """A loss that is not finite in one step, or whose gradient is not."""
    done = [0]

    def loss(output: Tensor, target: Tensor) -> Tensor:
        done[0] += 1
        value = F.cross_entropy(output, target)
        if done[0] != step:
            return value
        return value * torch.tensor(float(what)) if what != "gradient" else value + (output[0, 0] * 0).sqrt()

    return loss


@pytest.mark.parametrize(
    ("what", "message"),
    [("nan", "the loss is nan"), ("inf", "the loss is inf"), ("gradient", "the gradient of .* is not finite")],
)
def test_a_loss_that_is_not_finite_ends_training_and_leaves_the_network_as_it_was(
    what: str, message: str, tmp_path: Path
) -> None:
    loader = data(3)
    file = tmp_path / "run.pt"
    net = fxc.compress(Plain(), loader[0][0])
    with pytest.raises(DivergenceError, match=rf"epoch 2, batch 2 \(step 5 of 9\): .*{message}") as caught:
        trained(net, loader, nan_at(5, what), epochs=3, checkpoint=file)
    assert "load_checkpoint" in str(caught.value)
    assert caught.value.net is net
    assert len(caught.value.history) == 1
    assert all(value.isfinite().all() for value in net.state_dict().values())
    assert all(p.grad is None for p in net.parameters())
    expected = fxc.compress(Plain(), loader[0][0])
    fxc.load_checkpoint(file, expected)
    torch.manual_seed(0)
    trained(net, loader, epochs=1)
    assert all(value.isfinite().all() for value in net.state_dict().values())


def test_data_that_is_not_finite_is_named_and_leaves_the_statistics_alone() -> None:
    """Batch norm takes the mean of a batch before anybody knows of the loss."""
    loader = data(2)
    loader[1][0][0, 0] = float("nan")
    net = fxc.compress(Plain(), torch.zeros(4, 6))
    with pytest.raises(DivergenceError, match=r"batch 2 .*the inputs of this batch hold nan or inf already") as caught:
        trained(net, loader)
    assert "look at the data" in str(caught.value)
    assert "lower lr" not in str(caught.value)  # which would not help
    mean = net.get_buffer("body.1.running_mean")
    assert mean.isfinite().all()
    assert mean.any()


def test_a_batch_without_samples_is_named() -> None:
    loader = data(2)
    net = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
    loader[1] = (loader[1][0][:0], loader[1][1][:0])
    with pytest.raises(DivergenceError, match=r"batch 2 .*the inputs of this batch have no entries") as caught:
        trained(net, loader)
    assert "leave such batches out" in str(caught.value)
    assert "lower lr" not in str(caught.value)


def test_a_network_that_the_optimizer_has_ruined_is_named() -> None:
    """Adam's eps is 0 in float16, and divides 0 by 0 where there is no gradient."""
    net = fxc.compress(Plain().half(), torch.zeros(4, 6).half())
    adam = torch.optim.Adam(net.param_groups())
    loader = [(torch.zeros(4, 6, dtype=torch.half), torch.zeros(4))]
    with pytest.raises(DivergenceError, match=r"body\.0\.weight holds nan or inf since a step .* eps of Adam"):
        trained(net, loader, lambda output, _: 0 * output.sum(), optimizer=adam)


def test_the_loader_is_checked_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the loader is empty"):
        trained(Plain(), [], checkpoint=tmp_path / "run.pt")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8)), (6,)),
        (lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.LazyBatchNorm1d()), (6,)),
        (lambda: nn.Sequential(nn.Conv1d(2, 8, 3), nn.BatchNorm1d(8), nn.Flatten()), (2, 3)),
        (lambda: nn.Sequential(nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.Flatten()), (2, 3, 3)),
    ],
    ids=["features", "lazy", "one place", "one pixel"],
)
def test_a_last_batch_of_one_sample_for_a_batch_norm_is_named(
    norm: Callable[[], nn.Module], shape: tuple[int, ...], tmp_path: Path
) -> None:
    """With the layer, what to do, and all that was trained by then."""
    torch.manual_seed(0)
    x, y = torch.randn(9, *shape), torch.randint(3, (9,))
    model = nn.Sequential(norm(), nn.ReLU(), nn.LazyLinear(3))
    model(x)
    net = fxc.compress(model, x[:4])
    loader = DataLoader(TensorDataset(x, y), batch_size=4)
    states = []

    def loss(output: Tensor, target: Tensor) -> Tensor:
        states.append({name: value.clone() for name, value in net.state_dict().items()})
        return F.cross_entropy(output, target)

    with pytest.raises(BatchError, match=r"epoch 1, batch 3 \(step 3 of 6\): 0\.\d has one value") as caught:
        trained(net, loader, loss, epochs=2, checkpoint=tmp_path / "run.pt")
    assert "drop_last=True" in str(caught.value)
    assert isinstance(caught.value, ValueError)
    assert caught.value.net is net
    assert caught.value.history == []
    assert all(p.grad is None for p in net.parameters())
    assert any(not torch.equal(value, states[1][name]) for name, value in net.state_dict().items())
    trained(net, DataLoader(TensorDataset(x, y), batch_size=4, drop_last=True), epochs=2)


def test_what_else_a_network_raises_in_training_is_left_as_it_is() -> None:
    net = fxc.compress(Plain(), torch.zeros(4, 6))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        trained(net, [(torch.zeros(4, 5), torch.zeros(4, dtype=torch.long))])


@pytest.mark.parametrize("as_function", [False, True])
def test_a_parameter_of_the_loss_whose_gradient_is_not_finite_is_named_before_it_is_ruined(as_function: bool) -> None:  # noqa: FBT001
    class Warm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.temperature = nn.Parameter(torch.ones(())), nn.Parameter(torch.zeros(1))

        def forward(self, output: Tensor, target: Tensor) -> Tensor:
            return F.cross_entropy(self.scale * output, target) + self.temperature.abs().sqrt().sum()

    loader, loss = data(3), Warm()
    net = fxc.compress(Plain(), loader[0][0])
    optimizer = torch.optim.Adam([*net.param_groups(), {"params": loss.parameters()}])
    name = r"parameter 2 beside the network, of shape \(1,\)," if as_function else "temperature of the loss"
    with pytest.raises(DivergenceError, match=rf"step 1 of 6\): .* the gradient of {name} is not finite"):
        trained(net, loader, loss.forward if as_function else loss, optimizer=optimizer)
    assert loss.temperature.item() == 0
    assert loss.scale.item() == 1
    assert all(p.grad is None for p in (*net.parameters(), *loss.parameters()))
