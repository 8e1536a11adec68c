"""Entries that are read at places which depend on the size of the inputs: others are read in the next run."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcompress as fxc
from tests.exactness import TOLERANCE, compared_on, difference, outputs, runs_on
from tests.networks import randomise

C, ROWS, STEPS = 5, 12, 4
EXAMPLES = ((2, STEPS), (1, STEPS), (2, 1))
OTHERS = ((2, STEPS), (1, STEPS), (2, 1), (2, 3), (3, 5), (1, 7), (7, 6), (2, 8))


class Net(nn.Module):
    """A table of 12 rows, of which the first 4 are zero in the channels that are dead, and one whose last 4 are."""

    table: Tensor
    tail: Tensor
    gate: Tensor
    flags: Tensor
    places: Tensor

    def __init__(self, op: "Op", *, by_running: bool) -> None:
        super().__init__()
        self.op, self.by_running = op, by_running
        self.first, self.last = nn.Linear(3, C), nn.Linear(C, 2)
        table = torch.randn(ROWS, C)
        table[:4, 1:3] = 0
        self.weight, self.two = nn.Parameter(table.clone()), nn.Parameter(torch.randn(1, 2, C))
        self.register_buffer("table", table)
        self.register_buffer("tail", table.flip(0))
        self.register_buffer("gate", (torch.arange(ROWS) >= 4).float())
        self.register_buffer("flags", torch.arange(ROWS) >= 4)
        self.register_buffer("places", torch.arange(ROWS))

    def tokens(self, h: Tensor) -> Tensor:
        return self.two.expand(h.shape[0], -1, -1)

    def forward(self, x: Tensor) -> Tensor:
        if self.by_running and x.shape[0] > 0:
            x = x * 1
        y: Tensor = self.last(self.op(self, self.first(x)))
        return y


Op = Callable[[Net, Tensor], Tensor]


def written(h: Tensor) -> Tensor:
    y = h.new_zeros(h.shape[0], 8, C)
    y[:, h.shape[1] : h.shape[1] + 4] = 1
    return y[:, :4]


OPS: dict[str, Op] = {
    "slice of a parameter": lambda m, h: h + m.weight[: h.shape[1]],
    "slice": lambda m, h: h + m.table[: h.shape[1]],
    "slice from the end": lambda m, h: h + m.tail[-h.shape[1] :],
    "slice from a number": lambda m, h: h + m.tail[ROWS - h.shape[1] :],
    "step": lambda m, h: h + m.table[:: 5 - min(h.shape[1], 4)][-1],
    "narrow": lambda m, h: h + m.table.narrow(0, 0, h.shape[1]),
    "item": lambda m, h: h + m.table[h.shape[1] - 1],
    "select": lambda m, h: h + m.table.select(0, h.shape[1] - 1),
    "split": lambda m, h: h + m.table.split(h.shape[1])[0][-1],
    "chunk": lambda m, h: h + m.table.chunk(max(ROWS // h.shape[1], 1), 0)[0][-1],
    "unfold": lambda m, h: h + m.table.unfold(0, h.shape[1], 1)[0].t(),
    "roll": lambda m, h: h + m.table.roll(h.shape[1] - 4, 0)[3],
    "repeat": lambda m, h: h + m.table[:8].repeat(h.shape[1], 1)[:: h.shape[1]][1],
    "repeat_interleave": lambda m, h: h + m.table.repeat_interleave(h.shape[1], 0)[15:16],
    "border": lambda m, h: h + F.pad(m.table, (0, 0, h.shape[1], 0), value=1.0)[:8].sum(0),
    "border of some": lambda m, h: h + F.pad(m.table[:4], (0, 0, max(h.shape[1] - 4, 0), 0), value=1.0)[0],
    "circular": lambda m, h: h + F.pad(m.table.t()[None], (h.shape[1], 0), mode="circular")[0, :, :1].t(),
    "gate": lambda m, h: h.exp() * m.gate[: h.shape[1], None],
    "flags": lambda m, h: h.exp() * m.flags[: h.shape[1], None],
    "one gate": lambda m, h: torch.lerp(h, h.exp(), m.gate[h.shape[1] - 1]),
    "index": lambda m, h: h + m.table[m.places[: h.shape[1]]],
    "index of one": lambda m, h: h + m.table.index_select(0, m.places[h.shape[1] - 1 : h.shape[1]]),
    "arange": lambda m, h: h + m.table.index_select(0, torch.arange(h.shape[1])),
    "mean": lambda m, h: h + m.table[: h.shape[1]].mean(0),
    "product": lambda m, h: h + h.new_ones(h.shape[1], h.shape[1]) @ m.table[: h.shape[1]],
    "batch": lambda m, h: h + m.table[: h.shape[0] + 2].mean(0),
    "shift of a norm": lambda m, h: F.batch_norm(h.transpose(1, 2), m.table[h.shape[1] - 1], m.gate[-C:] + 1).transpose(
        1, 2
    ),
    "cat": lambda m, h: torch.cat([h, m.tokens(h)], 1)[:, :4],
    "cat, the end": lambda m, h: torch.cat([m.tokens(h), h], 1)[:, -4:],
    "cat, one": lambda m, h: torch.cat([h, m.tokens(h)], 1)[:, min(h.shape[1], 3)],
    "cat, turned": lambda m, h: torch.cat([m.tokens(h), h], 1).flip(1)[:, :4],
    "cat, split": lambda m, h: torch.cat([h, m.tokens(h)], 1).split(4, 1)[0],
    "cat, made of nothing": lambda m, h: torch.cat([h.exp(), h.new_zeros(h.shape[0], 2, C)], 1)[:, -4:-2],
    "cat, none of it": lambda m, h: torch.cat([h.new_ones(h.shape[0], max(h.shape[1] - 4, 0), C), h], 1)[:, :4],
    "cat, of both": lambda m, h: torch.cat([h.exp() * 0, h.exp()], 1)[:, :4],
    "cat, batch": lambda m, h: torch.cat([h.exp(), h], 0)[-2:],
    "stack": lambda m, h: torch.stack([h, h.exp()], 1).flatten(1, 2)[:, :4],
    "added at": lambda m, h: h.new_zeros(h.shape[0], ROWS, C).index_add(
        1, torch.arange(4) + h.shape[1], h.exp()[:, :1].expand(-1, 4, -1)
    )[:, :4],
    "written to": lambda m, h: written(h),
    "channels": lambda m, h: h + h[..., : h.shape[1]].sum(-1, keepdim=True),
    "a channel": lambda m, h: h + h[..., min(h.shape[1] - 1, 4)][..., None],
    "channels that roll": lambda m, h: h + h.roll(h.shape[1] - 4, -1),
    "left out as the default": lambda m, h: torch.add(h.exp(), -h.exp(), alpha=h.shape[1] - 3),
    "a flag": lambda m, h: h.exp() * (h.shape[1] != STEPS),
}


def dead(op: Op, *, by_running: bool) -> Net:
    net = randomise(Net(op, by_running=by_running).double())
    with torch.no_grad():
        for parameter in net.get_submodule("first").parameters():
            parameter[1:3] = 0
        net.get_parameter("weight")[:4, 1:3] = 0
    return net.eval()  # type: ignore[return-value]


def sample(shape: tuple[int, int]) -> Tensor:
    return torch.randn(*shape, 3, dtype=torch.float64)


@pytest.mark.sampled(5)
@pytest.mark.parametrize("by_running", [False, True])
@pytest.mark.parametrize("example", EXAMPLES)
@pytest.mark.parametrize("name", OPS)
def test_other_sizes_read_other_entries(name: str, example: tuple[int, int], *, by_running: bool) -> None:
    torch.manual_seed(0)
    net, x = dead(OPS[name], by_running=by_running), sample(example)
    assert runs_on(net, (x,))
    for more in (False, True):
        pruned = fxc.prune(net, x, fold=more, narrow=more).module
        assert compared_on(net, pruned, map(sample, OTHERS))


STAY_DEAD: dict[str, Op] = {
    "a token in front": lambda m, h: torch.cat([m.tokens(h) * 0, h], 1)[:, -1],
    "positions that are dead": lambda m, h: h + m.table[:4][: h.shape[1]],
    "a token for each row": lambda m, h: h + m.two[:, :1].repeat(h.shape[0], 1, 1) * 0,
    "halves": lambda m, h: torch.cat(torch.cat([h, h], -1)[:, : h.shape[1]].split(C, -1), 1),
    "beside channels of the input": lambda m, h: torch.cat([h.detach()[..., :0], h], -1),
}


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("name", STAY_DEAD)
def test_dead_channels_go_at_places_that_move(name: str, rows: int) -> None:
    net, x = dead(STAY_DEAD[name], by_running=False), sample((rows, STEPS))
    pruned = fxc.prune(net, x).module
    assert pruned.get_parameter("first.weight").shape[0] == C - 2
    for other in (y for y in map(sample, OTHERS) if runs_on(net, (y,))):
        assert difference(outputs(net, (other,)), outputs(pruned, (other,))) <= TOLERANCE


class Turned(nn.Module):
    """Channels in an order of the network's own."""

    order: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, C), nn.Linear(C, 2)
        self.register_buffer("order", torch.arange(C).flip(0))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.first(x)[:, self.order])
        return y


def test_the_reason_names_an_index_that_is_not_renumbered() -> None:
    net = Turned()
    with torch.no_grad():
        for parameter in net.first.parameters():
            parameter[1:3] = 0
    report = str(fxc.prune(net, torch.randn(2, 3)).report)
    assert "its index order holds numbers of channels, and is not renumbered" in report
    assert "IndexError" not in report
