"""Every rule of the table, next to what shapes do not see through: flip, cat, groups, a sum, a channel shuffle."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fxcompress as fxc
from fxcompress.channels.analysis import Analysis
from fxcompress.channels.packed import PACKED
from fxcompress.channels.prepare import prepare
from fxcompress.channels.recurrent import RECURRENT
from fxcompress.channels.rules import registered, registry
from fxcompress.channels.rules.pointwise import POINTWISE
from fxcompress.channels.rules.registry import OpClass, register
from fxcompress.passes.rewrite import carry_out
from tests.exactness import Fingerprint, atoms_of, difference, forced, kill, outputs, removable_units
from tests.networks import randomise

aten = torch.ops.aten
C, SIZE = 8, 6


@dataclass(frozen=True)
class Case:
    """An op in a network.

    Attributes:
        run: takes (N, 8, 6, 6), whose channels have labels, and the net for its extra weights.
        stays: the code of the reason for which all of the channels stay; "" if they may go.
        zero: whether a zero channel is still zero after it.
        matters: whether the result depends on each channel.
    """

    run: Callable[[Tensor, "Net"], Tensor]
    stays: str = ""
    zero: bool = True
    matters: bool = True


class Net(nn.Module):
    """conv - neighbour - the op - flip - conv."""

    mean: Tensor
    var: Tensor
    index: Tensor

    def __init__(self, case: Case, neighbour: str) -> None:
        super().__init__()
        self.case, self.neighbour = case, neighbour
        self.conv1, self.other = nn.Conv2d(3, C, 3, bias=False), nn.Conv2d(3, C, 3, bias=False)
        self.grouped = nn.Conv2d(C, C, 3, padding=1, groups=4, bias=False)
        self.weight, self.square = nn.Parameter(torch.randn(C, C, 1, 1)), nn.Parameter(torch.randn(C, C))
        self.gain, self.shift = nn.Parameter(torch.rand(C) + 0.5), nn.Parameter(torch.zeros(C))
        self.wide = nn.Parameter(torch.randn(C, C, SIZE))
        self.mixing = nn.Parameter(torch.randn(SIZE, SIZE, 1))
        self.row, self.table = nn.Parameter(torch.randn(SIZE)), nn.Embedding(6, C)
        self.recurrent = nn.ModuleDict({name: new() for name, new in RECURRENT_LAYERS.items()})
        self.register_buffer("mean", torch.zeros(C))
        self.register_buffer("var", torch.rand(C) + 0.5)
        self.register_buffer("index", torch.tensor([3, 1, 4, 1, 5]))
        self.last: nn.Module = nn.Identity()

    def start(self, x: Tensor) -> Tensor:
        h = self.conv1(x)
        neighbours: dict[str, Callable[[], Tensor]] = {
            "flip": lambda: h.flip(1),
            "cat": lambda: torch.cat([h[:, : C // 2], self.other(x)[:, C // 2 :]], 1),
            "grouped": lambda: self.grouped(h),
            "add": lambda: h + self.other(x),
            "shuffle": lambda: h.view(h.shape[0], 2, C // 2, SIZE, SIZE).transpose(1, 2).reshape(h.shape),
        }
        return neighbours[self.neighbour]()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.case.run(self.start(x), self)
        if isinstance(self.last, nn.Identity):
            return y
        return self.last(y.flip(1))  # type: ignore[no-any-return]


READERS: dict[int, Callable[[int], nn.Module]] = {
    2: lambda c: nn.Linear(c, 3),
    3: lambda c: nn.Conv1d(c, 3, 1),
    4: lambda c: nn.Conv2d(c, 3, 1),
    5: lambda c: nn.Conv3d(c, 3, 1),
}


def build(case: Case, neighbour: str) -> tuple[Net, Tensor]:
    torch.manual_seed(0)
    net, x = Net(case, neighbour).double(), torch.randn(2, 3, SIZE + 2, SIZE + 2, dtype=torch.float64)
    randomise(net)
    y = net(x)
    if y.ndim in READERS and y.shape[1] > 1 and y.is_floating_point():
        net.last = READERS[y.ndim](y.shape[1]).double()
    return net.eval(), x


RECURRENT_LAYERS: dict[str, Callable[[], nn.Module]] = {
    "lstm": lambda: nn.LSTM(C, 5, 2, bidirectional=True),
    "gru": lambda: nn.GRU(C, 5),
    "rnn_tanh": lambda: nn.RNN(C, 5),
    "rnn_relu": lambda: nn.RNN(C, 5, nonlinearity="relu"),
    "lstm_cell": lambda: nn.LSTMCell(C, 5),
    "gru_cell": lambda: nn.GRUCell(C, 5),
    "rnn_tanh_cell": lambda: nn.RNNCell(C, 5),
    "rnn_relu_cell": lambda: nn.RNNCell(C, 5, nonlinearity="relu"),
}


def recurrent(name: str) -> Case:
    """Pixels as a sequence, or one by one."""
    if not name.endswith("cell"):
        return Case(lambda h, net: net.recurrent[name](flat(h).mT)[0].mT)
    return Case(lambda h, net: net.recurrent[name](rows(h))[0] if name == "lstm_cell" else net.recurrent[name](rows(h)))


def flat(h: Tensor) -> Tensor:
    """(N, 8, 36)."""
    return h.flatten(2)


def deep(h: Tensor) -> Tensor:
    """(N, 8, 2, 3, 6)."""
    result: Tensor = h.unflatten(2, (2, 3))
    return result


def rows(h: Tensor) -> Tensor:
    """(2 * 36, 8)."""
    return h.permute(0, 2, 3, 1).reshape(-1, h.shape[1])


def bag(net: "Net", *, train: bool) -> Tensor:
    """(2, 8, 1, 1): sums of rows of a table."""
    op = aten._embedding_bag.default if train else aten._embedding_bag_forward_only.default
    table = net.table.weight if train else net.table.weight.detach()
    result: Tensor = op(table, net.index[:4], net.index.new_tensor([0, 2]))[0][..., None, None]
    return result


def boxes(h: Tensor) -> Tensor:
    """Two boxes, (2, 5)."""
    return h.new_tensor([[0.0, 0.0, 0.0, 4.0, 4.0], [1.0, 1.0, 2.0, 5.0, 5.0]])


def places(h: Tensor) -> Tensor:
    """Offsets for a kernel of one pixel, (N, 2, 6, 6)."""
    return h.new_full((h.shape[0], 2, SIZE, SIZE), 0.3)


def points(h: Tensor, dims: int = 2) -> Tensor:
    """Where to look, some of it outside of the image: (N, 3, 2, 2) or (N, 3, 1, 2, 3); no channel counts for itself."""
    moved = h.sum((1, 2, 3)).tanh().view(-1, *[1] * (dims + 1))
    grid = torch.linspace(-1.2, 1.2, 6 * dims, dtype=h.dtype).view(1, 3, *[1] * (dims - 2), 2, dims)
    return grid + 0.1 * moved


def order(h: Tensor) -> Tensor:
    """An index that the network computes: (N, 6), in which no channel counts for itself."""
    return h.sum((1, 2)).argsort(1)


CASES: dict[str, Case] = {
    # multiply, same values, choice, pointwise
    "mul": Case(lambda h, net: h * net.gain.view(C, 1, 1)),
    "multiply": Case(lambda h, net: torch.multiply(h, h.flip(1)), matters=False),
    "clone": Case(lambda h, net: h.clone()),
    "detach": Case(lambda h, net: h.detach()),
    "alias": Case(lambda h, net: aten.alias.default(h)),
    "lift_fresh": Case(lambda h, net: aten.lift_fresh.default(h)),
    "_to_copy": Case(lambda h, net: h.to(torch.float32).to(torch.float64)),
    "where": Case(lambda h, net: torch.where(h > 0, h, h * 0.1)),
    "where_or_a_number": Case(lambda h, net: torch.where(h > 0, 0, h) + torch.where(h > 0, 1.0, h) * h),
    "where_or_zeros": Case(lambda h, net: torch.where(rows(h)[:, :1] > 0, rows(h), torch.zeros_like(rows(h)))),
    "masked_fill": Case(lambda h, net: h.masked_fill(h < 0, 0.0)),
    "hardswish": Case(lambda h, net: F.hardswish(h, inplace=True)),
    "hardsigmoid": Case(lambda h, net: F.hardsigmoid(h), zero=False),
    "fill": Case(lambda h, net: aten.fill.Scalar(h, 0.5), zero=False, matters=False),
    "zero": Case(lambda h, net: aten.zero.default(h) + h),
    "zeros_like": Case(lambda h, net: torch.zeros_like(h) + h),
    "ones_like": Case(lambda h, net: torch.ones_like(h) * h),
    "full_like": Case(lambda h, net: torch.full_like(h, 2.0) * h),
    "copy": Case(lambda h, net: aten.copy.default(h.flip(1), h)),
    # pointwise, of which nothing is known
    "nan_to_num": Case(lambda h, net: torch.nan_to_num(h), zero=False),
    "fmax": Case(lambda h, net: torch.fmax(h, h.flip(1)), zero=False, matters=False),
    "fmin": Case(lambda h, net: torch.fmin(h, h.flip(1)), zero=False, matters=False),
    "bernoulli": Case(lambda h, net: aten.bernoulli.default(torch.zeros_like(h)) + h, zero=False),
    "rand_like": Case(lambda h, net: torch.rand_like(h) * 0 + h, zero=False),
    "randn_like": Case(lambda h, net: torch.randn_like(h) * 0 + h, zero=False),
    "empty_like": Case(lambda h, net: torch.empty_like(h).zero_() + h, zero=False),
    "native_dropout": Case(lambda h, net: aten.native_dropout.default(h, 0.5, net.training)[0]),
    "uniform": Case(lambda h, net: aten.uniform.default(h, 0.0, 0.0) + h, zero=False),
    "exponential": Case(lambda h, net: aten.exponential.default(h) * 0 + h, zero=False),
    "geometric": Case(lambda h, net: aten.geometric.default(h, 0.5) * 0 + h, zero=False),
    "log_normal": Case(lambda h, net: aten.log_normal.default(h) * 0 + h, zero=False),
    "cauchy": Case(lambda h, net: aten.cauchy.default(h) * 0 + h, zero=False),
    "normal_functional": Case(lambda h, net: aten.normal_functional.default(h, 0.0, 0.0) + h, zero=False),
    # contractions
    "convolution": Case(lambda h, net: F.conv2d(h, net.weight)),
    "convolution_of_one": Case(lambda h, net: F.conv1d(h.mean(3).mT, net.mixing).mT, zero=False),
    "mm": Case(lambda h, net: torch.mm(rows(h), net.square)),
    "addmm": Case(lambda h, net: torch.addmm(net.shift, rows(h), net.square.t())),
    "bmm": Case(lambda h, net: torch.bmm(flat(h).mT, torch.stack([net.square, net.square])).mT),
    "baddbmm": Case(
        lambda h, net: torch.baddbmm(torch.zeros(1, dtype=h.dtype), flat(h).mT, net.square.expand(2, C, C)).mT
    ),
    # movement
    "select": Case(lambda h, net: torch.stack([h[:, 5], h.select(1, 2), h[:, 6]], 1), matters=False),
    "slice": Case(lambda h, net: torch.cat([h[:, 5:], h[:, :4]], 1), matters=False),
    "split": Case(lambda h, net: torch.cat([h.split(3, 1)[2], h.split(3, 1)[0]], 1), matters=False),
    "split_with_sizes": Case(lambda h, net: torch.cat([h.split((3, 5), 1)[1], h.split((3, 5), 1)[0]], 1)),
    "chunk": Case(lambda h, net: torch.cat([h.chunk(2, 1)[1], h.chunk(2, 1)[0]], 1)),
    "unbind": Case(lambda h, net: torch.stack([h.unbind(2)[3], h.unbind(2)[0]], 2)),
    "narrow": Case(lambda h, net: torch.cat([h.narrow(1, 2, 4), h.narrow(1, 0, 2)], 1), matters=False),
    "expand": Case(lambda h, net: h.unsqueeze(2).expand(-1, -1, 3, -1, -1)),
    "repeat": Case(lambda h, net: h.repeat(1, 2, 1, 1)),
    "diagonal": Case(lambda h, net: h.diagonal(0, 2, 3)),
    "unfold": Case(lambda h, net: h.unfold(2, 2, 2).flatten(3)),
    "col2im": Case(lambda h, net: F.fold(F.unfold(h, 3, padding=1), (SIZE, SIZE), 3, padding=1)),
    "fold_of_positions": Case(lambda h, net: F.fold(h.flatten(2).repeat_interleave(4, 1), (12, 12), 2, stride=2)),
    "pixel_shuffle": Case(lambda h, net: F.pixel_shuffle(h, 2)),
    "pixel_unshuffle": Case(lambda h, net: F.pixel_unshuffle(h, 2)),
    "channel_shuffle": Case(lambda h, net: F.channel_shuffle(h, 2), stays="rewrite"),
    "tile": Case(lambda h, net: h.tile(1, 2, 1, 1)),
    "repeat_interleave": Case(lambda h, net: h.repeat_interleave(2, 1)),
    # reshape, permute
    "view": Case(lambda h, net: h.view(h.size(0), -1)),
    "_unsafe_view": Case(lambda h, net: aten._unsafe_view.default(h, [2, -1, 36])),
    "reshape": Case(lambda h, net: h.reshape(2, 4, 2, SIZE, SIZE).flip(1).reshape(2, -1, SIZE, SIZE)),
    "squeeze": Case(lambda h, net: h.mean((2, 3), keepdim=True).squeeze(3).squeeze(2)),
    "unsqueeze": Case(lambda h, net: h.unsqueeze(2)),
    "flatten": Case(lambda h, net: h.flatten(1)),
    "unflatten": Case(lambda h, net: h.unflatten(1, (2, 4)).transpose(1, 2).flatten(1, 2)),
    "flatten_of_a_weight": Case(lambda h, net: F.linear(h.mean(3).flatten(1), net.wide.flatten(1))),
    "_reshape_alias": Case(lambda h, net: aten._reshape_alias.default(h, [2, C, 36], [C * 36, 36, 1]), stays="rewrite"),
    "view_as": Case(lambda h, net: h.flatten(2).view_as(h)),
    "permute": Case(lambda h, net: h.permute(0, 1, 3, 2)),
    "transpose": Case(lambda h, net: h.transpose(2, 3)),
    "t": Case(lambda h, net: rows(h).t().t()),
    "flip": Case(lambda h, net: h.flip(1, 2)),
    "roll": Case(lambda h, net: h.roll(1, 2)),
    "movedim": Case(lambda h, net: h.movedim(1, -1).movedim(-1, 1)),
    "numpy_T": Case(lambda h, net: rows(h).T.T),
    "cat": Case(lambda h, net: torch.cat([h, h.flip(1), h[:, 2:5]], 1)),
    "concat": Case(lambda h, net: torch.concat([h, h.flip(1)], 1)),
    "constant_pad_nd": Case(lambda h, net: F.pad(h, (1, 0, 0, 2, 3, 1))),
    "index": Case(lambda h, net: h[:, [3, 1, 4, 1, 5]], matters=False),
    "index_select": Case(lambda h, net: h.index_select(2, net.index)),
    "index_add": Case(lambda h, net: h.index_add(2, net.index, h.index_select(2, net.index))),
    "gather": Case(lambda h, net: h.gather(2, h.mean(3, keepdim=True).argsort(2).expand(-1, -1, -1, SIZE))),
    "scatter": Case(lambda h, net: torch.zeros_like(h).scatter(3, order(h)[:, None, None].expand_as(h), h)),
    "index_reduce": Case(lambda h, net: h.index_reduce(3, order(h)[0], h.square(), "mean", include_self=False)),
    "scatter_add": Case(lambda h, net: h.scatter_add(3, order(h)[:, None, None].expand_as(h), h.square())),
    "scatter_reduce": Case(lambda h, net: h.scatter_reduce(2, h.argsort(2), h, "mean", include_self=False)),
    "index_put": Case(lambda h, net: aten.index_put.default(h, [order(h)[:, 0] % 2], h.flip(0), True)),
    "_unsafe_index_put": Case(lambda h, net: aten._unsafe_index_put.default(h, [net.index % 2], h[:1], True)),
    "topk": Case(lambda h, net: h.topk(3, 2)[0].sum(2)),
    "_unsafe_index": Case(lambda h, net: aten._unsafe_index.Tensor(h, [None, None, net.index])),
    "as_strided": Case(lambda h, net: h.mean(3).as_strided((2, C, SIZE), (C * SIZE, SIZE, 1)), stays="rewrite"),
    # norms, reductions
    "native_batch_norm": Case(lambda h, net: F.batch_norm(h, net.mean, net.var, net.gain, net.shift, False, 0.1, 1e-5)),
    "_native_batch_norm_legit_no_training": Case(
        lambda h, net: aten._native_batch_norm_legit_no_training.default(
            h, net.gain, net.shift, net.mean, net.var, 0.1, 1e-5
        )[0]
    ),
    "mean": Case(lambda h, net: h.mean((2, 3))),
    "amax": Case(lambda h, net: h.amax((2, 3))),
    "amin": Case(lambda h, net: h.amin(3)),
    "sum": Case(lambda h, net: h.sum((2, 3), keepdim=True)),
    "max": Case(lambda h, net: aten.max.dim(h, 3)[0]),
    "min": Case(lambda h, net: aten.min.dim(h, 2, True)[0]),
    "max_and_min_over_channels": Case(lambda h, net: h * (h.max(1, True)[0] - torch.min(h, 1)[0][:, None])),
    "median": Case(lambda h, net: h.flatten(2).median(-1)[0]),
    "nanmedian": Case(lambda h, net: h.nanmedian(2)[0]),
    "mode": Case(lambda h, net: h.mode()[0]),
    "max_of_all": Case(lambda h, net: h / (h.max() - h.min() + 1), stays="reduction"),
    "aminmax": Case(lambda h, net: torch.aminmax(h, dim=3)[1]),
    "kthvalue": Case(lambda h, net: h.kthvalue(2)[0]),
    "sort": Case(lambda h, net: h.sort(2, descending=True)[0]),
    "cummax": Case(lambda h, net: h.cummax(3)[0]),
    "cummin": Case(lambda h, net: h.cummin(1)[0], stays="reduction"),
    "_fft_r2c": Case(lambda h, net: torch.fft.rfft2(h).abs()),
    "_fft_c2c": Case(lambda h, net: torch.fft.fft(torch.fft.rfft(h), dim=2).real),
    "_fft_c2r": Case(lambda h, net: torch.fft.irfft(torch.fft.rfft(h) * 2, n=SIZE)),
    "view_as_real": Case(lambda h, net: torch.view_as_real(torch.fft.rfft(h)).flatten(3)),
    "view_as_complex": Case(lambda h, net: torch.view_as_complex(h.unflatten(3, (3, 2)).contiguous()).imag),
    "complex": Case(lambda h, net: torch.complex(h, h[:, :1].expand_as(h) * h).imag),
    "polar": Case(lambda h, net: torch.polar(h, h[:, :1].expand_as(h)).real),
    "_conj": Case(lambda h, net: (torch.fft.rfft(h) * torch.fft.rfft(h).conj()).real),
    "sum_of_spectra": Case(lambda h, net: (torch.fft.rfft(h) + torch.fft.rfft(h.flip(3)).conj() * 2).real),
    "difference_of_spectra": Case(lambda h, net: torch.fft.irfft(torch.fft.rfft(h) - 2j * torch.fft.rfft(h.sin()))),
    "quotient_of_spectra": Case(lambda h, net: (torch.fft.rfft(h) / (torch.fft.rfft(h).abs() + 1) + 0).imag),
    "padded_spectra": Case(lambda h, net: F.pad(torch.fft.rfft(h), (0, 0, 1, 1), value=1.0).abs(), zero=False),
    "angle": Case(lambda h, net: h.angle() + h, zero=False),
    "div": Case(lambda h, net: h / (h.square().sum(1, keepdim=True) + 1)),
    "prod": Case(lambda h, net: h.prod(3)),
    "var": Case(lambda h, net: h.var((2, 3))),
    "std": Case(lambda h, net: h.std((2, 3))),
    "var_mean": Case(lambda h, net: torch.var_mean(h, (2, 3))[0]),
    "std_mean": Case(lambda h, net: torch.std_mean(h, (2, 3))[0]),
    "logsumexp": Case(lambda h, net: h.logsumexp(3), zero=False),
    "argmax": Case(lambda h, net: h + h.argmax(1, keepdim=True), stays="reduction"),
    "argmin": Case(lambda h, net: h + h.argmin(1, keepdim=True), stays="reduction"),
    "all": Case(lambda h, net: h * (h > 0).all(3, keepdim=True), matters=False),
    "any": Case(lambda h, net: h * (h > 0).any(3, keepdim=True)),
    "linalg_vector_norm": Case(lambda h, net: torch.linalg.vector_norm(h, dim=(2, 3))),
    "_softmax": Case(lambda h, net: h.softmax(3), zero=False),
    "_log_softmax": Case(lambda h, net: h.log_softmax(1), stays="softmax"),
    "cumsum": Case(lambda h, net: h.cumsum(2)),
    "cumprod": Case(lambda h, net: h.cumprod(3)),
    "cumsum_of_channels": Case(lambda h, net: h.cumsum(1), stays="reduction"),
    "logcumsumexp": Case(lambda h, net: h.logcumsumexp(1), stays="softmax"),
    "native_group_norm": Case(lambda h, net: F.group_norm(h, C, net.gain), zero=True),
    "group_norm_of_several": Case(lambda h, net: F.group_norm(h, 4, net.gain), zero=True),
    "embedding": Case(lambda h, net: h * net.table(net.index[:2])[..., None, None]),
    "_embedding_bag": Case(lambda h, net: h * bag(net, train=True)),
    "_embedding_bag_forward_only": Case(lambda h, net: h * bag(net, train=False)),
    "grid_sampler_2d": Case(lambda h, net: F.grid_sample(h, points(h), align_corners=False)),
    "grid_sampler_3d": Case(lambda h, net: F.grid_sample(deep(h), points(h, 3), "nearest", "border", True)),
    "max_unpool2d": Case(lambda h, net: F.max_unpool2d(*F.max_pool2d(h, 2, return_indices=True), (2, 2))),
    "max_unpool3d": Case(
        lambda h, net: F.max_unpool3d(*F.max_pool3d(deep(h), (2, 3, 2), return_indices=True), (2, 3, 2))
    ),
    "roi_align": Case(lambda h, net: torchvision.ops.roi_align(h, boxes(h), 3)),
    "roi_pool": Case(lambda h, net: torchvision.ops.roi_pool(h, boxes(h), 2)),
    "deform_conv2d": Case(lambda h, net: torchvision.ops.deform_conv2d(h, places(h), net.weight, net.shift)),
    "native_layer_norm": Case(lambda h, net: F.layer_norm(h, (SIZE,), net.row), zero=False),
}

for _n, _view in ((1, flat), (2, lambda h: h), (3, deep)):
    _down, _up = [2] * _n, [4] * _n
    CASES |= {
        f"max_pool{_n}d_with_indices": Case(
            lambda h, net, n=_n, v=_view: getattr(F, f"max_pool{n}d")(v(h), 2, ceil_mode=True)  # type: ignore[misc]
        ),
        f"adaptive_max_pool{_n}d": Case(
            lambda h, net, n=_n, v=_view: getattr(F, f"adaptive_max_pool{n}d")(v(h), 1)  # type: ignore[misc]
        ),
        f"avg_pool{_n}d": Case(
            lambda h, net, n=_n, v=_view: getattr(F, f"avg_pool{n}d")(v(h), 2, 1, 1)  # type: ignore[misc]
        ),
        f"_adaptive_avg_pool{_n}d": Case(
            lambda h, net, n=_n, v=_view: getattr(F, f"adaptive_avg_pool{n}d")(v(h), 2)  # type: ignore[misc]
        ),
    }
    for _mode in ("reflect", "replicate"):
        CASES[f"{_mode.replace('reflect', 'reflection').replace('replicate', 'replication')}_pad{_n}d"] = Case(
            lambda h, net, n=_n, v=_view, m=_mode: F.pad(v(h), (1, 1) * n, mode=m)  # type: ignore[misc]
        )
    _linear = {1: "linear", 2: "bilinear", 3: "trilinear"}[_n]
    for _name, _mode in (
        (f"upsample_nearest{_n}d", "nearest"),
        (f"_upsample_nearest_exact{_n}d", "nearest-exact"),
        (f"upsample_{_linear}{_n}d", _linear),
    ):
        CASES[_name] = Case(
            lambda h, net, v=_view, m=_mode: F.interpolate(v(h), scale_factor=2, mode=m)  # type: ignore[misc]
        )
CASES |= {name: recurrent(name) for name in RECURRENT_LAYERS}
CASES |= dict.fromkeys(
    ("_pack_padded_sequence", "_pad_packed_sequence"),
    Case(lambda h, net: pad_packed_sequence(pack_padded_sequence(flat(h).mT, [36, 20], True), True)[0].mT),
)
CASES |= {
    "upsample_bicubic2d": Case(lambda h, net: F.interpolate(h, scale_factor=2, mode="bicubic")),
    "_upsample_bilinear2d_aa": Case(lambda h, net: F.interpolate(h, size=(3, 3), mode="bilinear", antialias=True)),
    "_upsample_bicubic2d_aa": Case(lambda h, net: F.interpolate(h, size=(3, 3), mode="bicubic", antialias=True)),
}

# Ops that no case can call, each with the reason.
OUT_OF_REACH = {
    "cudnn_batch_norm": "needs a GPU",
    "_batch_norm_with_update": "writes to its statistics: kept as an unknown op",
    "rrelu_with_noise": "writes to its noise: kept as an unknown op",
    "rrelu_with_noise_functional": "only torch.compile makes it",
    "max_pool1d": "arrives as max_pool2d_with_indices",
    "max_pool2d": "arrives as max_pool2d_with_indices",
    "max_pool3d": "arrives as max_pool3d_with_indices",
    "adaptive_avg_pool1d": "arrives as _adaptive_avg_pool2d",
    "adaptive_avg_pool2d": "arrives as _adaptive_avg_pool2d",
    "adaptive_avg_pool3d": "arrives as _adaptive_avg_pool3d",
    "_adaptive_avg_pool1d": "there is no such op",
}
# Composite ops are taken apart before they arrive, others go by another name; their cases test what arrives.
COMPOSITE = {
    "sum_of_spectra", "difference_of_spectra", "quotient_of_spectra", "padded_spectra",
    "multiply", "chunk", "narrow", "tile", "repeat_interleave", "reshape", "flatten", "unflatten", "view_as", "movedim",
    "numpy_T", "concat", "max_pool1d_with_indices", "adaptive_max_pool1d", "_adaptive_avg_pool1d", "std", "std_mean",
    "var", "unbind", "avg_pool1d", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "lift_fresh", "detach",
    "_pack_padded_sequence", "_pad_packed_sequence", "max_of_all", "cumsum_of_channels", "convolution_of_one",
    "flatten_of_a_weight", "group_norm_of_several",
    "fold_of_positions", "max_and_min_over_channels", "where_or_a_number", "where_or_zeros",
    *RECURRENT_LAYERS,
}  # fmt: skip


def op_name(key: Any) -> str:  # noqa: ANN401 - whatever a rule can be registered for
    """The name of an op without its library, and without its overload."""
    if isinstance(key, torch._ops.OpOverload):
        return str(key.overloadpacket.__name__)
    return str(key).replace("::", ".").split(".")[-1]


def names() -> set[str]:
    return set(map(op_name, registered()))


def test_every_rule_has_a_case() -> None:
    assert names() - set(CASES) - set(OUT_OF_REACH) == set()
    assert set(CASES) - names() - COMPOSITE == set()
    assert {op.overloadpacket.__name__ for op in RECURRENT | PACKED} - set(CASES) == set()


def test_every_class_of_ops_has_a_case() -> None:
    tested = {op_class.name for key, op_class in registered().items() if op_name(key) in CASES}
    assert {op_class.name for op_class in registered().values()} == tested


def called(analysis: Analysis) -> set[str]:
    found = (step.call.func for trail in analysis.trails.values() for step in trail.tape)
    return {func.overloadpacket.__name__ for func in found if hasattr(func, "overloadpacket")}


@pytest.mark.sampled(3)
@pytest.mark.filterwarnings("ignore:index_reduce:UserWarning")
@pytest.mark.parametrize("neighbour", ["flip", "cat", "grouped", "add", "shuffle"])
@pytest.mark.parametrize("name", CASES)
def test_rule(name: str, neighbour: str) -> None:
    case = CASES[name]
    net, x = build(case, neighbour)
    analysis = prepare(net, x)
    assert name in COMPOSITE or name in called(analysis)
    assert {s for trail in analysis.trails.values() for s in trail.unknown} == set()
    own = np.unique(analysis.units[analysis.atoms["conv1.weight"][0].numpy()])
    units = np.intersect1d(own, removable_units(analysis))
    if case.stays and case.stays != "rewrite":
        assert len(units) == 0 or neighbour == "cat"
        codes = {r.code for atoms, r in analysis.space.pins if np.isin(analysis.units[atoms], own).any()}
        assert case.stays in codes
        return
    assert len(units)
    if not case.stays and neighbour == "add":
        check_live(net, x, analysis, units, case)
    kill(analysis, atoms_of(analysis, units[:1]))
    visit = Fingerprint(net)
    result = fxc.prune(net, x)
    visit.check()
    assert difference(outputs(net, (x,)), outputs(result.module, (x,))) <= 1e-9
    left = result.module.get_parameter("conv1.weight").shape[0]
    if case.stays:
        assert left == (C // 2 if neighbour == "cat" else C)  # what is not read goes all the same
        assert any("cannot be rewritten for fewer channels" in kept.reason for kept in result.report.kept)
    elif case.zero:
        assert left < C


def check_live(net: Net, x: Tensor, analysis: Analysis, units: np.ndarray, case: Case) -> None:
    """The negative control: taking out a channel that is alive goes through, and changes the output."""
    changed = [
        difference(outputs(net, (x,)), outputs(carry_out(analysis, forced(analysis, np.array([u]))).module, (x,)))
        for u in units[:2]
    ]
    assert max(changed) > 1e-6 or not case.matters


def test_a_second_rule_for_an_op_is_refused() -> None:
    with pytest.raises(ValueError, match=r"aten\.flip has the rule 'permute' already"):
        register(OpClass("another", lambda call, space: ()), ["flip"])


def test_a_rule_counts_from_when_it_is_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_RULES", registered())

    @torch.library.custom_op("fxcompress_tests::half", mutates_args=())
    def half(x: Tensor) -> Tensor:
        return x / 2

    @half.register_fake
    def _(x: Tensor) -> Tensor:
        return torch.empty_like(x)

    net, x = build(Case(lambda h, net: half(h)), "add")
    assert list(fxc.ChannelGraph.of(net, x).unknown_ops) == ["fxcompress_tests.half.default"]
    register(POINTWISE, [torch.ops.fxcompress_tests.half])
    assert fxc.ChannelGraph.of(net, x).unknown_ops == {}
    analysis = prepare(net, x)
    kill(analysis, atoms_of(analysis, removable_units(analysis)[:1]))
    result = fxc.prune(net, x)
    assert difference(outputs(net, (x,)), outputs(result.module, (x,))) <= 1e-9
    assert result.report.modified


class Bordered(nn.Module):
    """One tensor has a border of zeros, and is cut to size; the other has channels that are zero everywhere."""

    def __init__(self, pool: nn.Module) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(8, 2, 1)
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        h = torch.cat([h.new_zeros(h.shape[0], 4, h.shape[2], 1), h], 3)[..., :-1]
        return self.last(self.pool(torch.cat([h, self.second(x)], 1)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("pool", [nn.MaxPool2d(3, 1, 1), nn.AvgPool2d(3, 1, 1), nn.Upsample(scale_factor=2)])
def test_windows_know_a_channel_beside_others_that_vary(pool: nn.Module) -> None:
    net, x = Bordered(pool).double(), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        for parameter in net.second.parameters():
            parameter[1:3] = 0
    module = fxc.prune(net, x).module
    assert module.get_parameter("second.weight").shape[0] == 2
    torch.testing.assert_close(module(x), net(x), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("way", ["method", "function", "imaginary part"])
def test_conjugates_that_are_resolved(way: str) -> None:
    class Spectra(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.fft.rfft(self.first(x), dim=1).conj()
            if way == "imaginary part":
                return self.last(h.imag)  # type: ignore[no-any-return]
            resolved = h.resolve_conj() if way == "method" else torch.resolve_conj(h)
            return self.last(torch.view_as_real(resolved)[..., 1])  # type: ignore[no-any-return]

    model, x = Spectra().double().eval(), torch.randn(2, 6, 8, dtype=torch.float64)
    with torch.no_grad():
        for parameter in model.first.parameters():
            parameter[:3] = 0
    small = fxc.prune(model, x).module
    assert small.get_parameter("last.weight").shape == (3, 5)
    assert difference(model(x), small(x)) <= 1e-12
