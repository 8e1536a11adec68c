"""Dims that are joined with others whose size is the input's, and slices that hold all of the example by chance."""

import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcompress as fxc
from tests.exactness import TOLERANCE, compared_on, difference, outputs, runs_on
from tests.networks import randomise

C = 5
EXAMPLES = ((2, 4, 4), (1, 4, 4), (2, 1, 1), (1, 1, 1), (3, 5, 4), (2, 2, 2))
OTHERS = (*EXAMPLES, (2, 1, 3), (1, 4, 1), (2, 3, 5), (3, 4, 6), (1, 8, 8), (4, 2, 7), (5, 6, 2))


class Net(nn.Module):
    """Channels 1 and 2 are dead at first, and rows 0 to 3 of a table in these channels."""

    def __init__(self, op: "Op") -> None:
        super().__init__()
        self.op, self.first, self.last = op, nn.Conv2d(3, C, 1), nn.Linear(C, 2)
        self.table, self.heads = nn.Parameter(torch.randn(C, 8)), nn.Parameter(torch.randn(2, 3, C))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.op(self, self.first(x)))
        return y


Op = Callable[[Net, Tensor], Tensor]
"""From (N, C, H, W) to (..., C)."""


def channels_last(h: Tensor) -> Tensor:
    return h.flatten(2).mT


def first_rows(h: Tensor) -> Tensor:
    y = h.clone()
    part = y[:, :, :4]
    part.add_(1.0)
    return channels_last(y)


def first_row_by_out(h: Tensor) -> Tensor:
    y = h.exp()
    y[:, :, :4] = 0.0
    return channels_last(y)


def set_at(h: Tensor, *index: slice | list[int]) -> Tensor:
    h = h.clone(memory_format=torch.contiguous_format)
    h[index] = 0.5
    return h


def heads(m: Net, h: Tensor) -> Tensor:
    """An attention with the heads beside the samples, as older code has it."""
    n, x = h.shape[0], h.flatten(2).permute(2, 0, 1)
    q = x.reshape(-1, n * C, 1).transpose(0, 1)
    found = torch.bmm(torch.bmm(q, q.mT).softmax(-1), q)
    return found.transpose(0, 1).reshape(-1, n, C)[0]


def rows(h: Tensor) -> Tensor:
    return h.transpose(1, 2).flatten(2)


def variance(h: Tensor) -> Tensor:
    return (h - h.mean(1, keepdim=True)).pow(2).mean(1, keepdim=True)


def sampled(h: Tensor) -> Tensor:
    """Points of two heads of channels, which lie beside the samples while they are read: (N, C, points)."""
    where = torch.stack([h.mean(1).flatten(1).sin(), h.mean(1).flatten(1).cos()], -1).repeat_interleave(2, 0)
    heads = torch.cat([h, h.tanh()], 1).view(-1, C, *h.shape[2:])
    found = F.grid_sample(heads, where[:, :, None], align_corners=False).squeeze(3)
    return found.view(h.shape[0], 2 * C, -1).unflatten(1, (2, C)).sum(1)  # type: ignore[no-any-return]


def repeated(h: Tensor, times: int) -> Tensor:
    return h[:, :, None].expand(h.shape[0], -1, times, *h.shape[2:]).flatten(1, 2)


OPS: dict[str, Op] = {
    "heads beside samples": heads,
    "entries of pixels and channels": lambda m, h: h.flatten(1)[:, 2 : 2 + C],
    "entries of channels and pixels": lambda m, h: channels_last(h).flatten(1)[:, 2 : 2 + C],
    "entries of samples and channels": lambda m, h: h.mean((2, 3)).flatten()[3 : 3 + C],
    "one entry": lambda m, h: h.flatten(1)[:, 4:5].expand(-1, C),
    "all of the example": lambda m, h: h.flatten(1)[:, : C * 16].sum(1, keepdim=True).expand(-1, C),
    "entries by an index": lambda m, h: h.flatten(1)[:, [4, 0, 3, 2, 1]],
    "halves of pixels and channels": lambda m, h: F.pad(h.flatten(1).chunk(3, 1)[1], (0, C))[:, :C],
    "entries behind an activation": lambda m, h: torch.tanh(h).flatten(1).relu()[:, 2 : 2 + C],
    "entries behind a turn": lambda m, h: h.flatten(1).t()[2 : 2 + C].t(),
    "entries of a sum of two": lambda m, h: (h.flatten(1) + h.exp().flatten(1))[:, 2 : 2 + C],
    "entries of a joined tensor": lambda m, h: torch.cat([h.flatten(1), h.exp().flatten(1)], 1)[:, 2 : 2 + C],
    "turned by the pixels of four by four": lambda m, h: channels_last(h.flatten(1).roll(16, 1).view(h.shape)),
    "turned by the pixels of all": lambda m, h: channels_last(h.flatten(1).roll(-16, (1,)).exp().view(h.shape)),
    "windows turned by nine": lambda m, h: F.unfold(h, 3, padding=1).roll(9, 1).unflatten(1, (C, 9))[:, :, 4].mT,
    "entries that are set": lambda m, h: channels_last(set_at(h.flatten(1), slice(None), [1, 4]).view(h.shape)),
    "entries that are set behind the first": lambda m, h: channels_last(
        set_at(h.exp().flatten(1), slice(None), [-1]).view(h.shape)
    ),
    "a row that is set": lambda m, h: channels_last(set_at(h.permute(2, 0, 1, 3), [0]).permute(1, 2, 0, 3)),
    "one of the points": lambda m, h: sampled(h.exp())[..., -1],
    "entries of points and channels": lambda m, h: sampled(h.exp()).flatten(1)[:, 2 : 2 + C],
    "windows by groups": lambda m, h: (
        F.unfold(h, 3, padding=1).reshape(h.shape[0], 1, -1, 9, h[0, 0].numel())[:, 0, :, 3].mT
    ),
    "windows by other groups": lambda m, h: F.unfold(h, 3, padding=1).reshape(h.shape[0], 3, C, 3, -1)[:, 1, :, 1].mT,
    "scrambled": lambda m, h: h.reshape(h.shape[0], -1, C),
    "columns of a table": lambda m, h: (h[..., :4] + m.table[:, None, 2:6]).flatten(2)[..., 3:5].mT,
    "columns of a table, one": lambda m, h: (h.exp()[..., :4] * m.table[:, None, :4]).flatten(2)[..., 4:6].mT,
    "columns of a table, cut anew": lambda m, h: (
        (h[..., :4] + m.table[:, None, 2:6]).flatten(2).view(h.shape[0], C, 4, -1)[..., 0].mT
    ),
    "rows of two": lambda m, h: channels_last(torch.stack([h.exp(), h], 2).flatten(2, 3)[:, :, 2:6]),
    "rows of a table beside one": lambda m, h: (channels_last(h)[:, :4] + m.table[:, 2:6].t())[:, [-1, 0]],
    "a row of a table beside one": lambda m, h: (channels_last(h)[:, :4] + m.table[:, 2:6].t())[:, 2],
    "a border": lambda m, h: F.pad(h.exp(), (1, 0)).flatten(2)[..., 5:6].mT,
    "a number of them": lambda m, h: channels_last(h.exp() * (h.mean((2, 3)).reshape(-1).shape[0] - C)),
    "rows that are written": lambda m, h: first_rows(h),
    "rows that are set": lambda m, h: first_row_by_out(h),
    "rows that are scattered": lambda m, h: channels_last(torch.slice_scatter(h, h[:, :, :2].exp(), 2, 0, 2)),
    "a row that is scattered": lambda m, h: channels_last(torch.select_scatter(h, h[:, :, 0].exp(), 2, 0)),
    "the rows behind the first": lambda m, h: channels_last(torch.cat([h[:, :, 1:].exp(), h], 2)),
    "columns behind the first": lambda m, h: channels_last(h[..., 1:].exp()).sum(1) + channels_last(h).sum(1),
    "steps": lambda m, h: channels_last(h.diff(dim=2)).sum(1),
    "as often as samples": lambda m, h: channels_last(h.repeat_interleave(h.shape[0], 1)[:, :C]),
    "expanded to samples": lambda m, h: channels_last(repeated(h, h.shape[0])[:, -C:]),
    "expanded as another": lambda m, h: channels_last(
        h[:, :, None].expand_as(h.new_zeros(h.shape[0], C, h.shape[2], *h.shape[2:])).flatten(1, 2)[:, 1 : 1 + C]
    ),
    "copied for samples": lambda m, h: channels_last(
        h.unsqueeze(2).repeat(1, 1, h.shape[0], 1, 1).reshape(h.shape[0], -1, *h.shape[2:])[:, -C:]
    ),
    "a list of as many as samples": lambda m, h: channels_last(torch.cat([h] * h.shape[0], 1)[:, -C:]),
    "a stack of as many as samples": lambda m, h: channels_last(
        torch.stack([h] * h.shape[0], 2).flatten(1, 2)[:, 1 : 1 + C]
    ),
    "a stack of the samples": lambda m, h: torch.stack(h.unbind(0), -1).flatten(2).flatten(1)[:, 2 : 2 + C],
    "other entries of two": lambda m, h: channels_last(torch.stack([h, h.exp()], 2).flatten(1, 2)[:, 1 : 1 + C]),
    "twice": lambda m, h: channels_last(repeated(h, 2)[:, 1 : 1 + C]),
    "a mean of pixels and channels": lambda m, h: h.flatten(1).mean(1, keepdim=True).expand(-1, C),
    "a mean of all": lambda m, h: h.flatten().mean(0).expand(C),
    "a mean of samples and channels": lambda m, h: h.transpose(0, 1).flatten(0, 1).mean((0, 2)).expand(C),
    "a deviation of pixels and channels": lambda m, h: h.flatten(1).std(1, correction=0, keepdim=True).expand(-1, C),
    "an attention between rows": lambda m, h: F.scaled_dot_product_attention(rows(h), rows(h), h.mean(3).mT),
    "a variance by hand": lambda m, h: variance(h.flatten(1)).expand(-1, C),
    "samples by a number": lambda m, h: h.reshape(2, C, h.shape[2], -1).flatten(2).mT,
    "rows by a number": lambda m, h: h.reshape(-1, C, 4, h.shape[3]).flatten(2).mT,
    "samples behind channels": lambda m, h: h.mean(2).permute(2, 1, 0).reshape(h.shape[0], h.shape[3], C),
    "one of a sample by a number": lambda m, h: h.flatten(2).mean(2).flatten().unflatten(0, (-1, h.shape[0])).mT,
    "a variance with more taken off": lambda m, h: h.flatten(2).var(2, correction=2),
}


def dead(op: Op, weight: float) -> Net:
    net = randomise(Net(op).double())
    with torch.no_grad():
        net.get_parameter("first.weight")[1:3] = 0
        net.get_parameter("first.bias")[1:3] = weight
        net.get_parameter("table")[1:3, :4] = 0
    return net.eval()  # type: ignore[return-value]


def sample(shape: tuple[int, int, int]) -> Tensor:
    return torch.randn(shape[0], 3, *shape[1:], dtype=torch.float64)


def cases() -> Iterator[tuple[str, tuple[int, int, int]]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the variance of one entry
        for name, op in OPS.items():
            yield from ((name, e) for e in EXAMPLES if runs_on(Net(op).double(), (sample(e),)))


CASES = list(cases())
"""What runs on which example: small images have not all the entries that some read."""


def test_each_op_has_an_example() -> None:
    assert {name for name, _ in CASES} == set(OPS)


@pytest.mark.sampled(5)
@pytest.mark.filterwarnings("ignore:var")
@pytest.mark.parametrize("weight", [0.0, 1.0])
@pytest.mark.parametrize(("name", "example"), CASES)
def test_other_sizes(name: str, example: tuple[int, int, int], weight: float) -> None:
    torch.manual_seed(0)
    net, x = dead(OPS[name], weight), sample(example)
    for more in (False, True):
        pruned = fxc.prune(net, x, fold=more, narrow=more).module
        assert compared_on(net, pruned, map(sample, OTHERS))


def gridded(h: Tensor) -> Tensor:
    """Grids of four by four of each sample, (N, 4, 4, C); their cells have one pixel in a sample of four by four."""
    n, height, width, _ = (x := h.permute(0, 2, 3, 1)).shape
    return x.view(n, 4, height // 4, 4, width // 4, C).permute(0, 2, 4, 1, 3, 5).reshape(-1, 4, 4, C)


STAY_DEAD: dict[str, Op] = {
    "grids": lambda m, h: gridded(h).sum((1, 2)),
    "pooled": lambda m, h: torch.cat([F.adaptive_avg_pool2d(h, 1).flatten(1)] * 2, 1).chunk(2, 1)[0],
    "pooled by a mean": lambda m, h: h.mean((2, 3), keepdim=True).relu().flatten(1)[:, :C],
    "samples and pixels": lambda m, h: channels_last(h).reshape(-1, C)[:2],
    "there and back": lambda m, h: h.flatten(1).relu().view(h.shape)[..., 0, 0],
    "twice as many": lambda m, h: torch.cat([h, h], 1).unflatten(1, (2, C))[:, 0].mean((2, 3)),
    "windows": lambda m, h: h.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).permute(0, 2, 4, 3, 5, 1).flatten(0, 2)[0],
    "points of heads beside samples": lambda m, h: sampled(h).sum(2),
    "windows of channels": lambda m, h: F.unfold(h, 3, padding=1).view(h.shape[0], C, 9, -1).amax(2).mT,
    "windows of groups of channels": lambda m, h: (
        F.unfold(h.repeat_interleave(2, 1), 3, padding=1)
        .view(h.shape[0], C, 2, 9, h.shape[2], h.shape[3])
        .sum((2, 3))
        .flatten(2)
        .mT
    ),
    "each four times": lambda m, h: F.pixel_shuffle(h.repeat_interleave(4, 1), 2).permute(0, 2, 3, 1),
    "each four times, expanded": lambda m, h: F.pixel_shuffle(repeated(h, 4), 2).permute(0, 2, 3, 1),
    "each four times, copied": lambda m, h: F.pixel_shuffle(
        h.unsqueeze(2).repeat(1, 1, 4, 1, 1).flatten(1, 2), 2
    ).permute(0, 2, 3, 1),
    "four pixels for each": lambda m, h: (
        F.pixel_unshuffle(h, 2).unflatten(1, (C, 4)).mean(2) + F.max_pool2d(h, 2)
    ).permute(0, 2, 3, 1),
    "one of two, in turn": lambda m, h: channels_last(torch.stack([h, h.tanh()], 2).flatten(1, 2)[:, 1::2]),
    "one of three, in turn": lambda m, h: torch.stack([h, h, h.sin()], -1).mean((2, 3)).flatten(1)[:, 2::3],
    "the second of three": lambda m, h: channels_last(torch.stack([h, h.tanh(), h], 1).flatten(1, 2)[:, C:-C]),
    "a token in front": lambda m, h: torch.cat([h.flatten(2).mT[:, :1] * 0, channels_last(h)], 1)[:, 0],
}


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("name", STAY_DEAD)
def test_dead_channels_go(name: str, rows: int) -> None:
    net, x = dead(STAY_DEAD[name], 0.0), sample((rows, 4, 4))
    pruned = fxc.prune(net, x).module
    assert pruned.get_parameter("first.weight").shape[0] == C - 2
    for other in (y for y in map(sample, OTHERS) if runs_on(net, (y,))):
        assert difference(outputs(net, (other,)), outputs(pruned, (other,))) <= TOLERANCE


class Halves(nn.Module):
    """Reads two of each four channels, of which each sample has two rows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 8), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        y: Tensor = self.last(h.view(1, 2 * h.shape[0], -1)[:, :, 1:3])
        return y


def test_a_slice_of_all_samples_stays_one() -> None:
    net = Halves().double()
    pruned = fxc.prune(net, torch.randn(4, 3, dtype=torch.float64)).module
    assert pruned.get_parameter("first.weight").shape[0] == 4
    assert compared_on(net, pruned, [torch.randn(n, 3, dtype=torch.float64) for n in (1, 2, 4, 7)]) == 4
