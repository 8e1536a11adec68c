"""Running statistics that are taken anew before a network is measured."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.training.batches import Batch
from fxcompress.training.schedule import formats_move
from fxcompress.training.statistics import LastBatches, refresh_statistics
from tests.test_fit import Digits, digits


class Normed(nn.Module):
    """Norms of three kinds, dropout, and a counter of calls."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.frozen, self.whole = nn.BatchNorm1d(3), nn.BatchNorm1d(3), nn.BatchNorm1d(3, momentum=None)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        self.calls += 1
        return self.drop(self.whole(self.frozen(self.norm(x * scale))))  # type: ignore[no-any-return]


def batch(x: Tensor, **kwargs: Any) -> Batch:  # noqa: ANN401
    return Batch((x,), kwargs, None)


def test_statistics_are_the_mean_over_batches_and_nothing_else_changes() -> None:
    net, xs = Normed().train(), [torch.randn(8, 3) + i for i in range(3)]
    net.frozen.eval()
    net(xs[0])
    before = {name: entry.clone() for name, entry in net.state_dict().items()}
    random = torch.get_rng_state()
    refresh_statistics(net, [batch(x, scale=2.0) for x in xs])
    own = {"norm.running_mean", "norm.running_var"}
    means = torch.stack([(2 * x).mean(0) for x in xs]).mean(0)
    variances = torch.stack([(2 * x).var(0) for x in xs]).mean(0)
    torch.testing.assert_close(net.norm.running_mean, means)
    torch.testing.assert_close(net.norm.running_var, variances)
    assert all(torch.equal(entry, before[name]) for name, entry in net.state_dict().items() if name not in own)
    assert torch.equal(torch.get_rng_state(), random)
    assert (net.norm.momentum, net.whole.momentum) == (0.1, None)
    refresh_statistics(net, [])
    torch.testing.assert_close(net.norm.running_mean, means)


def test_a_batch_that_fails_leaves_momenta_and_buffers_as_they_were() -> None:
    net = Normed().train()
    with pytest.raises(ValueError, match="more than 1 value"):
        refresh_statistics(net, [batch(torch.randn(4, 3)), batch(torch.randn(1, 3))])
    assert net.norm.momentum == 0.1
    assert (float(net.calls), int(net.norm.num_batches_tracked)) == (0, 0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("count", "size", "kept"), [(14, 100, 4), (400, 4, 32), (100, 128, 4), (50, 1024, 1), (2, 8, 2)]
)
def test_as_few_batches_are_kept_as_will_do(count: int, size: int, kept: int) -> None:
    last = LastBatches(count)
    for i in range(count):
        last.see({"ids": torch.full((size, 1), i), "n": 3})
    batches = last.take()
    assert [int(found["ids"][0]) for found in batches] == list(range(count - kept, count))
    assert last.take() == []


def test_the_metric_is_that_of_the_weights_as_they_are() -> None:
    """While bits fall fast, averages over the last steps lag far behind: this run had 15 % after its seventh epoch."""
    torch.manual_seed(0)
    loader, x, y = digits()

    def accuracy(net: nn.Module) -> float:
        return float((net(x).argmax(1) == y).float().mean())

    def gap(net: nn.Module) -> float:
        found = accuracy(net)
        own = {name: entry.clone() for name, entry in net.state_dict().items()}
        with torch.no_grad():
            own_statistics = accuracy(net.train())
        net.load_state_dict(own)
        net.eval()
        return own_statistics - found

    result = fxc.fit(
        Digits(), loader, F.cross_entropy, epochs=20, target_size=0.02, lr=5e-3, validate=gap, progress=False
    )
    gaps = [record.metric for record in result.history]
    assert max(abs(found) for found in gaps if found is not None) < 0.1


def test_formats_that_rest_leave_statistics_to_training() -> None:
    net = fxc.compress(Digits(), torch.zeros(2, 1, 8, 8))
    optimizer = torch.optim.Adam(net.param_groups())
    assert formats_move(optimizer)
    for group in optimizer.param_groups:
        group["lr"] = 0.0 if group["name"] in {"bits", "exponents"} else 1.0
    assert not formats_move(optimizer)
    assert formats_move(torch.optim.Adam(net.parameters()))


def test_hooks_see_each_batch_once() -> None:
    loader, x, _ = digits()
    net = fxc.compress(Digits(), x[:2])
    seen: list[int] = []
    net.get_submodule("stem.1").register_forward_hook(lambda module, given, result: seen.append(len(result)))
    before: list[int] = []
    fxc.fit(
        net, loader, F.cross_entropy, epochs=1, gamma=0.1, prune=False, progress=False,
        validate=lambda found: before.append(len(seen)),
    )  # fmt: skip
    assert before == [len(loader)]
