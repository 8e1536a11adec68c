"""Random networks for the tests of exactness: small programs that hypothesis draws, and can shrink."""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.errors import UnsupportedModelError
from fxcompress.trace.inputs import ExampleInputs
from fxcompress.trace.tracer import trace
from tests.attention import Attention, Form

Draw = Callable[..., Any]
Values = list[Tensor]
Op = Callable[["RandomNet", Values], Tensor]

# Activations that keep zero, and such that do not; modules, functions and methods, in place too.
KEEPING: tuple[Callable[[Tensor], Tensor], ...] = (
    F.relu,
    F.relu6,
    F.silu,
    F.hardswish,
    F.gelu,
    F.leaky_relu,
    F.mish,
    F.elu,
    F.hardtanh,
    torch.tanh,
    torch.neg,
    torch.abs,
    torch.square,
    lambda x: x.relu(),
    lambda x: x * 0.5,
    lambda x: x / 2,
    lambda x: x.clamp(-1.0, 2.0),
    lambda x: torch.where(x > 0, x, x * 0.1),
    lambda x: torch.where(x > 0, x, 0.0),
    lambda x: torch.where(x > 0.5, torch.ones_like(x), 0) * x,
    lambda x: x.masked_fill(x < 0, 0.0),
)
CHANGING: tuple[Callable[[Tensor], Tensor], ...] = (
    torch.sigmoid,
    F.hardsigmoid,
    F.softplus,
    torch.cos,
    lambda x: x + 1,
    lambda x: 1 - x,
    lambda x: torch.exp(-x.abs()),
)
IN_PLACE: tuple[Callable[[Tensor], Tensor], ...] = (
    F.relu_,
    F.leaky_relu_,
    lambda x: F.relu6(x, inplace=True),
    lambda x: F.hardswish(x, inplace=True),
    lambda x: x.mul_(0.5),
    lambda x: x.clamp_(-1.0, 2.0),
)
MODULES: tuple[Callable[[], nn.Module], ...] = (
    nn.ReLU,
    lambda: nn.ReLU(inplace=True),
    nn.ReLU6,
    lambda: nn.SiLU(inplace=True),
    nn.Hardswish,
    nn.GELU,
    nn.PReLU,
    nn.Tanh,
    nn.Identity,
)
SUMS: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    operator.add,
    torch.add,
    operator.iadd,
    lambda a, b: a.add_(b),
    operator.sub,
    operator.isub,
    torch.maximum,
    lambda a, b: torch.add(a, b, alpha=0.5),
)

IN_PLACE_SUMS = SUMS[2:4] + SUMS[5:6]


@dataclass
class Shape:
    """Channels, and height (equal to the width), of a value of a program; height 0 for the result of a head."""

    channels: int
    size: int


class RandomNet(nn.Module):
    """Runs a program: a list of ops, each of which appends one value.

    Attributes:
        ops: the program.
        outputs: which values it returns: one, several, or a dict of them.
        inputs: number of arguments.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict()
        self.ops: list[Op] = []
        self.outputs: list[int] = []
        self.inputs = 1

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:  # noqa: ANN401 - one, several, or a dict of them
        values: Values = [x] if y is None else [x, y]
        for op in self.ops:
            values.append(op(self, values))
        found = [values[i] for i in self.outputs]
        return found[0] if len(found) == 1 else tuple(found) if len(found) == 2 else dict(enumerate(found))


class Weights(nn.Module):
    """A bare weight and bias, for the functional forms."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(*shape) / 2)
        self.bias = nn.Parameter(torch.randn(shape[0]))


class Scale(nn.Module):
    """A scale for each channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class Table(nn.Module):
    """Adds a parameter to each channel, to each pixel, or to both, as position embeddings do; or multiplies with it."""

    def __init__(self, shape: Sequence[int], *, multiply: bool) -> None:
        super().__init__()
        self.table, self.multiply = nn.Parameter(torch.randn(tuple(shape))), multiply

    def forward(self, x: Tensor) -> Tensor:
        return x * self.table if self.multiply else x + self.table


class Experts(nn.Module):
    """A sum over experts, which multiply in one product; channels last."""

    def __init__(self, shape: Sequence[int], kind: str) -> None:
        super().__init__()
        count, inputs, outputs = shape
        self.kind = kind
        self.weight = nn.Parameter(torch.randn(count, outputs, inputs) if kind == "turned" else torch.randn(*shape))

    def forward(self, x: Tensor) -> Tensor:
        h = x.flatten(2).transpose(1, 2).unsqueeze(1)  # (N, 1, pixels, C)
        if self.kind == "einsum":
            made = torch.einsum("npc,eco->nepo", h[:, 0], self.weight)
        else:
            made = h @ (self.weight.mT if self.kind == "turned" else self.weight)
        return made.tanh().sum(1).transpose(1, 2).unflatten(2, x.shape[2:])  # type: ignore[no-any-return]


class NormByHand(nn.Module):
    """A layer norm over the channels, as ConvNeXt writes it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(channels, 1, 1) + 0.5)
        self.bias = nn.Parameter(torch.randn(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        variance = (x - mean).pow(2).mean(1, keepdim=True)
        return self.weight * ((x - mean) / torch.sqrt(variance + 0.1)) + self.bias


SPREADS: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda x: x / (1 + x.std(1, correction=0, keepdim=True)),
    lambda x: x / (1 + x.var((1, 2), correction=0, keepdim=True)),
    lambda x: x * torch.var_mean(x, 1, correction=0)[0].unsqueeze(1),
    lambda x: x * x.amax(1, keepdim=True),
    lambda x: x / (1 + torch.min(x, 1)[0].unsqueeze(1).abs()),
    lambda x: x * torch.cat([x.max(1, keepdim=True).values, x.mean(1, keepdim=True)], 1).sum(1, keepdim=True),
)


class Memory(nn.Module):
    """Adds to each channel what it remembers of it, and goes on remembering."""

    state: Tensor
    calls: Tensor

    def __init__(self, channels: int, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.register_buffer("state", torch.zeros(channels))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        y = x + self.state[:, None, None]
        mean = x.detach().mean((0, 2, 3))
        if self.kind == "average":
            self.state.mul_(0.5).add_(mean, alpha=0.5)
        elif self.kind == "last":
            self.state.copy_(mean)
        else:
            y = y + x * self.calls
            self.calls.add_(1)
        return y


@dataclass
class Builder:
    """Draws a program.

    Attributes:
        draw: hypothesis' draw.
        net: what is built.
        shapes: of the values so far.
        keeps_zero: whether a zero channel stays zero through all of the program, and no op writes in place: of other
            tensors in the same memory nothing is known after that.
        noisy: whether it calls F.dropout, of which the graph of training keeps the rate.
        fixed: whether the program runs on one size of image only.
        tidy: each step goes on from the last one; otherwise much of what is computed is never used.
        remembers: whether what it returns depends on earlier calls.
    """

    draw: Draw
    net: RandomNet = field(default_factory=RandomNet)
    shapes: list[Shape] = field(default_factory=list)
    keeps_zero: bool = True
    noisy: bool = False
    fixed: bool = False
    tidy: bool = False
    remembers: bool = False

    # --- helpers ---------------------------------------------------------------------------------------------------

    def integer(self, low: int, high: int) -> int:
        return int(self.draw(st.integers(low, high)))

    def choose(self, items: Sequence[Any]) -> Any:  # noqa: ANN401 - one of the items
        return items[self.integer(0, len(items) - 1)]

    def flag(self) -> bool:
        return bool(self.integer(0, 1))

    def value(self) -> int:
        """The last of the values, or any, a recent one more often."""
        last = max(i for i, shape in enumerate(self.shapes) if shape.size)
        if self.tidy:
            return last
        i = last - min(self.integer(0, last), self.integer(0, last))
        return i if self.shapes[i].size else 0

    def emit(self, op: Op, channels: int, size: int) -> int:
        self.net.ops.append(op)
        self.shapes.append(Shape(channels, size))
        return len(self.shapes) - 1

    def layer(self, module: nn.Module) -> str:
        name = f"m{len(self.net.layers)}"
        self.net.layers[name] = module
        return name

    def call(self, module: nn.Module, i: int, channels: int, size: int) -> int:
        name = self.layer(module)
        return self.emit(lambda net, v: net.layers[name](v[i]), channels, size)

    def apply(self, function: Callable[[Tensor], Tensor], i: int, channels: int, size: int) -> int:
        return self.emit(lambda net, v: function(v[i]), channels, size)

    # --- layers ----------------------------------------------------------------------------------------------------

    def conv(self, i: int | None = None, out: int = 0, *, same: bool = False) -> int:
        i = self.value() if i is None else i
        c, size = self.shapes[i].channels, self.shapes[i].size
        kernel = 1 if size < 3 else self.choose([1, 3])
        padding = 1 if kernel == 3 and (same or self.flag()) else 0
        dilation = 2 if kernel == 3 and not same and padding and size >= 5 and self.flag() else 1
        stride = 2 if not same and size >= 5 and self.flag() else 1
        mode: Any = self.choose(["zeros", "zeros", "reflect", "replicate", "circular"]) if padding else "zeros"
        out = out or self.integer(1, 8)
        module = nn.Conv2d(c, out, kernel, stride, padding, dilation, bias=self.flag(), padding_mode=mode)
        return self.call(module, i, out, (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1)

    def bordered(self) -> int:
        """A convolution whose border is made by hand, and differs from side to side."""
        i = self.value()
        c, size = self.shapes[i].channels, self.shapes[i].size
        mode = self.choose(["constant", "reflect", "replicate"]) if size > 2 else "constant"
        return self.conv(self.apply(lambda x: F.pad(x, (2, 0, 0, 2), mode=mode), i, c, size + 2))

    def grouped(self) -> int:
        i = self.value()
        c, size = self.shapes[i].channels, self.shapes[i].size
        groups = self.choose([g for g in range(1, c + 1) if c % g == 0][1:] or [1])
        out = groups * self.integer(1, 3)
        kernel = 1 if size < 3 else 3
        module = nn.Conv2d(c, out, kernel, padding=kernel // 2, groups=groups, bias=self.flag())
        return self.call(module, i, out, size)

    def transposed(self) -> int:
        i = self.value()
        c, size = self.shapes[i].channels, self.shapes[i].size
        groups = self.choose([g for g in range(1, c + 1) if c % g == 0])
        out = groups * self.integer(1, 3)
        stride = 2 if size <= 6 and self.flag() else 1
        module = nn.ConvTranspose2d(c, out, 2, stride, groups=groups, bias=self.flag())
        return self.call(module, i, out, (size - 1) * stride + 2)

    def functional(self) -> int:
        i = self.value()
        c, size = self.shapes[i].channels, self.shapes[i].size
        groups = self.choose([g for g in range(1, c + 1) if c % g == 0][:2])
        out = groups * self.integer(1, 3)
        name, bias = self.layer(Weights(out, c // groups, 1, 1)), self.flag()

        def op(net: RandomNet, v: Values) -> Tensor:
            own = net.layers[name]
            return F.conv2d(v[i], own.weight, own.bias if bias else None, groups=groups)  # type: ignore[arg-type]

        return self.emit(op, out, size)

    def norm(self, i: int | None = None) -> int:
        i = self.value() if i is None else i
        c, size = self.shapes[i].channels, self.shapes[i].size
        kind = self.integer(0, 7)
        if kind == 7:
            affine, track = self.flag(), self.flag()
            module: nn.Module = nn.InstanceNorm2d(c, affine=affine, track_running_stats=track)
            module = module if size > 1 else nn.Identity()
            self.keeps_zero &= not track
        elif kind == 6:
            module = nn.GroupNorm(self.choose([g for g in range(1, c + 1) if c % g == 0]), c)
        else:
            module = nn.BatchNorm2d(c, affine=kind != 4, track_running_stats=kind != 5)
            self.keeps_zero &= kind != 4  # a running mean moves zero, and there is no bias to move it back
        return self.call(module, i, c, size)

    def spread(self) -> int:
        """A norm over channels by their variance, or a gate by their largest entry."""
        i = self.value()
        c, size = self.shapes[i].channels, self.shapes[i].size
        return self.call(NormByHand(c), i, c, size) if self.flag() else self.apply(self.choose(SPREADS), i, c, size)

    def again(self) -> int:
        """Call a layer a second time, perhaps by a second name."""
        found = [
            (name, i)
            for name, module in self.net.layers.items()
            for i, shape in ([(self.value(), self.shapes[self.value()])] if self.tidy else enumerate(self.shapes))
            if isinstance(module, nn.Conv2d) and module.in_channels == shape.channels and module.kernel_size == (1, 1)
        ]
        if not found:
            return self.conv()
        name, i = self.choose(found)
        module = self.net.layers[name]
        assert isinstance(module, nn.Conv2d)
        size = (self.shapes[i].size - 1) // int(module.stride[0]) + 1
        name = self.layer(module) if self.flag() else name
        return self.emit(lambda net, v: net.layers[name](v[i]), module.out_channels, size)

    def tied(self) -> int:
        """A new layer that shares the weight of an earlier one."""
        i = self.conv()
        new = self.net.layers[f"m{len(self.net.layers) - 1}"]
        others = [m for m in self.net.layers.values() if isinstance(m, nn.Conv2d) and m is not new]
        for other in others:
            if isinstance(new, nn.Conv2d) and other.weight.shape == new.weight.shape:
                new.weight = other.weight
        return i

    def linear(self) -> int:
        """A linear layer over the channels, channels last."""
        i = self.value()
        c, size, out = self.shapes[i].channels, self.shapes[i].size, self.integer(1, 6)
        name = self.layer(nn.Linear(c, out, bias=self.flag()))
        return self.emit(lambda net, v: net.layers[name](v[i].permute(0, 2, 3, 1)).permute(0, 3, 1, 2), out, size)

    def scale(self) -> int:
        i = self.value()
        return self.call(Scale(self.shapes[i].channels), i, self.shapes[i].channels, self.shapes[i].size)

    def table(self) -> int:
        i = self.value()
        c, size = self.shapes[i].channels, self.shapes[i].size
        shape = self.choose([(1, c, 1, 1), (c, 1, 1), (1, c, size, size), (c, size, size), (1, 1, size, size)])
        self.fixed |= size in shape[-1:]
        multiply = self.integer(0, 2) == 0
        self.keeps_zero &= multiply
        return self.call(Table(shape, multiply=multiply), i, c, size)

    def experts(self) -> int:
        i = self.value()
        c, size, out = self.shapes[i].channels, self.shapes[i].size, self.integer(1, 6)
        module = Experts((self.integer(1, 3), c, out), self.choose(["plain", "turned", "einsum"]))
        return self.call(module, i, out, size)

    def memory(self) -> int:
        i = self.value()
        self.remembers = True
        module = Memory(self.shapes[i].channels, self.choose(["average", "last", "count"]))
        return self.call(module, i, self.shapes[i].channels, self.shapes[i].size)

    def attention(self) -> int:
        """Attention among pixels; a residual one, more often than not."""
        i = self.value()
        c, size = self.shapes[i].channels, self.shapes[i].size
        extra = self.choose(["", "", "temperature", "norm", "bias", "mask"])
        shared = self.choose([1, 1, 2])
        head = self.integer(1, 4)
        form = Form(
            heads=shared * self.integer(1, 3) if shared > 1 else self.integer(0, 3),
            head=head,
            value=self.choose([head, self.integer(1, 3)]),
            product=self.choose(["sdpa", "sdpa", "matmul", "einsum", "transposed"]),
            packed=self.flag(),
            shared=shared,
            extra=extra,
            scaled=self.choose(["default", "literal"]),
        )
        self.fixed |= extra == "bias"
        self.keeps_zero &= extra != "norm" and form.product != "transposed"  # softmax and layer norm move zero
        j = self.call(Attention(c, form, size * size), i, c, size)
        return j if self.integer(0, 3) == 0 else self.emit(lambda net, v: v[i] + v[j], c, size)

    # --- elementwise -----------------------------------------------------------------------------------------------

    def activation(self, i: int | None = None) -> int:
        i = self.value() if i is None else i
        kind, shape = self.integer(0, 5), self.shapes[i]
        if kind == 0:
            self.keeps_zero = False
            return self.apply(self.choose(CHANGING), i, shape.channels, shape.size)
        if kind == 1:
            self.keeps_zero = False
            return self.apply(self.choose(IN_PLACE), i, shape.channels, shape.size)
        if kind == 2:
            module = self.choose(MODULES)()
            self.keeps_zero &= not getattr(module, "inplace", False)
            return self.call(module, i, shape.channels, shape.size)
        return self.apply(self.choose(KEEPING), i, shape.channels, shape.size)

    def dropout(self) -> int:
        i = self.value()
        c, size = self.shapes[i].channels, self.shapes[i].size
        if self.flag():
            kind = self.choose([nn.Dropout, nn.Dropout2d, nn.AlphaDropout])
            self.keeps_zero &= kind is not nn.AlphaDropout
            return self.call(kind(self.choose([0.3, 0.5])), i, c, size)
        self.noisy = True
        rate = self.choose([0.3, 0.5])  # 0.5 is the default of an op below, and takes another path
        return self.emit(lambda net, v: F.dropout(v[i], rate, net.training), c, size)

    def pair(self) -> tuple[int, int]:
        """Two values of one shape, the second made to fit if there is none."""
        i = self.value()
        c, size = self.shapes[i].channels, self.shapes[i].size
        same = [j for j, s in enumerate(self.shapes) if (s.channels, s.size) == (c, size) and j != i]
        if same and self.flag():
            return i, int(self.choose(same))
        sources = [j for j, s in enumerate(self.shapes) if s.size == size]
        return i, self.conv(self.choose(sources), c, same=True)

    def add(self) -> int:
        i, j = self.pair()
        function = self.choose(SUMS)
        self.keeps_zero &= function not in IN_PLACE_SUMS
        return self.emit(lambda net, v: function(v[i], v[j]), self.shapes[i].channels, self.shapes[i].size)

    def write(self) -> int:
        """Write some channels of one value, a part of the image perhaps, into another or into zeros."""
        i, j = self.pair()
        c, size = self.shapes[i].channels, self.shapes[i].size
        a = self.integer(0, c - 1)
        b, step, top = self.integer(a + 1, c), self.integer(1, 2), self.choose([None, 1])
        makers: list[Callable[[Tensor], Tensor]] = [
            torch.zeros_like,
            torch.clone,
            lambda x: x.new_zeros(x.shape),
            lambda x: x.new_zeros(x.shape[0], c, *x.shape[2:]),
        ]
        start = self.choose(makers)
        self.keeps_zero &= len(range(a, b, step)) > 1  # of one channel alone nobody can tell which one it is

        def op(net: RandomNet, v: Values) -> Tensor:
            out: Tensor = start(v[i])
            out[:, a:b:step, :top] = v[j][:, a:b:step, :top]
            return out

        return self.emit(op, c, size)

    def multiply(self) -> int:
        i, j = self.pair()
        return self.emit(lambda net, v: v[i] * v[j], self.shapes[i].channels, self.shapes[i].size)

    def residual(self) -> int:
        i = self.value()
        c, size = self.shapes[i].channels, self.shapes[i].size
        j = self.conv(i, same=True)
        j = self.activation(self.norm(j))
        j = self.conv(j, c, same=True)
        j = self.norm(j) if self.flag() else j
        function = self.choose(SUMS[:4])
        self.keeps_zero &= function not in IN_PLACE_SUMS
        return self.emit(lambda net, v: function(v[j], v[i]), c, size)

    def gate(self) -> int:
        """Squeeze and excitation."""
        i = self.value()
        c, size, hidden = self.shapes[i].channels, self.shapes[i].size, self.integer(1, 4)
        down, up = self.layer(nn.Conv2d(c, hidden, 1)), self.layer(nn.Conv2d(hidden, c, 1))
        squash = self.choose([torch.sigmoid, F.hardsigmoid])

        def op(net: RandomNet, v: Values) -> Tensor:
            pooled = F.adaptive_avg_pool2d(v[i], 1)
            return squash(net.layers[up](F.relu(net.layers[down](pooled)))) * v[i]  # type: ignore[no-any-return]

        return self.emit(op, c, size)

    # --- movement --------------------------------------------------------------------------------------------------

    def cat(self) -> int:
        i = self.value()
        size = self.shapes[i].size
        same = [j for j, s in enumerate(self.shapes) if s.size == size]
        parts = [i, *(self.choose(same) for _ in range(self.integer(1, 2)))]
        channels = sum(self.shapes[j].channels for j in parts)
        return self.emit(lambda net, v: torch.cat([v[j] for j in parts], 1), channels, size)

    def split(self) -> int:
        """Split, and put the parts together in another order."""
        i = self.value()
        c, size, kind, many = self.shapes[i].channels, self.shapes[i].size, self.integer(0, 3), self.integer(1, 3)
        sizes = [many, c - many] if many < c else [c]

        def op(net: RandomNet, v: Values) -> Tensor:
            x = v[i]
            parts = (
                x.chunk(2, 1) if kind == 0 else x.split(many, 1) if kind == 1 else torch.split(x, sizes, dim=1)
            ) if kind < 3 else (x[:, :many], x[:, many:] if many < c else x)  # fmt: skip
            return torch.cat([parts[-1], parts[0]], 1)

        step = -(-c // 2) if kind == 0 else many if kind == 1 else sizes[0] if kind == 2 else min(many, c)
        parts = -(-c // step)
        last = c - (parts - 1) * step if kind < 2 else sizes[-1] if kind == 2 else (c - many if many < c else c)
        return self.emit(op, last + min(step, c), size)

    def pick(self) -> int:
        """Slices, single channels and lists of channels."""
        i = self.value()
        c, size, kind = self.shapes[i].channels, self.shapes[i].size, self.integer(0, 6)
        a = self.integer(0, c - 1)
        b = self.integer(a + 1, c)
        chosen = [self.integer(0, c - 1) for _ in range(self.integer(1, 4))]
        functions: list[tuple[Callable[[Tensor], Tensor], int]] = [
            (lambda x: x[:, a:b], b - a),
            (lambda x: x[:, ::2], -(-c // 2)),
            (lambda x: x[:, a : a + 1], 1),
            (lambda x: x[:, a].unsqueeze(1), 1),
            (lambda x: x[:, chosen], len(chosen)),
            (lambda x: x.narrow(1, a, b - a), b - a),
            (lambda x: x[:, a - c :, :, :], c - a),
        ]
        function, channels = functions[kind]
        return self.apply(function, i, channels, size)

    def permute(self) -> int:
        i = self.value()
        c, size = self.shapes[i].channels, self.shapes[i].size
        groups = self.choose([g for g in range(1, c + 1) if c % g == 0])
        shift = self.integer(1, 3)
        functions: list[Callable[[Tensor], Tensor]] = [
            lambda x: x.flip(1),
            lambda x: torch.flip(x, (1, 3)),
            lambda x: x.roll(shift, 1),
            lambda x: torch.cat([x[:, ::2], x[:, 1::2]], 1),
            lambda x: torch.cat(x.tensor_split(2, 1)[::-1], 1),
            lambda x: x.transpose(2, 3),
            lambda x: x.view(x.shape[0], groups, c // groups, x.shape[2], x.shape[3]).transpose(1, 2).reshape(x.shape),
            lambda x: x.reshape(x.size(0), groups, -1, x.size(2), x.size(3)).transpose(1, 2).flatten(1, 2),
            lambda x: x.reshape(x.size(0), groups, c // groups, x.size(2), x.size(3)).flip(1).flatten(1, 2),
            lambda x: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
        ]
        return self.apply(self.choose(functions), i, c, size)

    def space(self) -> int:
        """Pooling, resizing, padding, channels into space and back."""
        i = self.value()
        c, n = self.shapes[i].channels, self.shapes[i].size
        options: list[tuple[Callable[[Tensor], Tensor], int, int]] = [
            (lambda x: F.max_pool2d(x, 3, 1, 1), c, n),
            (lambda x: F.avg_pool2d(x, 3, 1, 1), c, n),
            (lambda x: F.pad(x, (1, 1, 1, 1)), c, n + 2),
            (lambda x: F.pad(x, (0, 0, 0, 0, 1, 2)), c + 3, n),
            (lambda x: x.max(2, keepdim=True)[0] + x, c, n),
            (lambda x: x + x.new_zeros(c, 1, 1), c, n),
            (lambda x: torch.cat([x.new_zeros(x.shape[0], c, n, 1), x], 3)[..., :n], c, n),
            (lambda x: F.adaptive_avg_pool2d(x, 2), c, 2),
            (lambda x: F.fold(F.unfold(x, 3, padding=1), x.shape[2:], 3, padding=1), c, n),
        ]
        if n >= 2:
            options += [
                (lambda x: F.max_pool2d(x, 2), c, n // 2),
                (lambda x: F.avg_pool2d(x, 2, ceil_mode=True), c, -(-n // 2)),
                (lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"), c, n + 2),
            ]
        if n <= 6:
            options += [
                (lambda x: F.interpolate(x, scale_factor=2), c, 2 * n),
                (lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"), c, 2 * n),
            ]
        if c % 4 == 0:
            options.append((lambda x: F.pixel_shuffle(x, 2), c // 4, 2 * n))
        if n % 2 == 0:
            options.append((lambda x: F.pixel_unshuffle(x, 2), 4 * c, n // 2))
        if self.integer(0, 5) == 0:
            self.keeps_zero = False
            options = [(lambda x: F.pad(x, (1, 1, 1, 1), value=1.0), c, n + 2)]
        function, channels, size = self.choose(options)
        return self.apply(function, i, channels, size)

    # --- the whole -------------------------------------------------------------------------------------------------

    def step(self) -> None:
        kinds = [
            self.conv, self.conv, self.norm, self.activation, self.activation, self.add, self.residual, self.cat,
            self.split, self.pick, self.permute, self.permute, self.grouped, self.grouped, self.transposed, self.gate,
            self.space, self.space, self.bordered, self.functional, self.again, self.tied, self.linear, self.scale,
            self.dropout, self.multiply, self.attention, self.attention, self.memory, self.spread,
            self.write, self.table, self.experts,
        ]  # fmt: skip
        self.choose(kinds)()
        if self.shapes[-1].channels > 16:
            self.conv(len(self.shapes) - 1)
        if self.shapes[-1].size > 12:
            last = self.shapes[-1]
            self.apply(lambda x: F.avg_pool2d(x, 2), len(self.shapes) - 1, last.channels, last.size // 2)

    def head(self) -> None:
        i = self.value()
        c, size, kind = self.shapes[i].channels, self.shapes[i].size, self.integer(0, 4)
        if kind == 0:
            self.net.outputs.append(i)
            return
        if kind == 1:
            self.net.outputs.append(self.conv(i, 2))
            return
        name = self.layer(nn.Linear(c * size * size if kind == 2 else c, 3))
        self.fixed |= kind == 2
        pools: list[Callable[[Tensor], Tensor]] = [
            lambda x: x.flatten(1),
            lambda x: x.mean((2, 3)),
            lambda x: F.adaptive_avg_pool2d(x, 1).view(x.size(0), -1),
        ]
        pool = pools[kind - 2]
        self.net.outputs.append(self.emit(lambda net, v: net.layers[name](pool(v[i])), 3, 0))


@dataclass(repr=False)
class Example:
    """A network and what it can be called with.

    Attributes:
        net: in float64, with random statistics.
        inputs: of batch 2.
        keeps_zero: whether a channel that is zero where it is made is zero wherever it is read.
        noisy: whether training is random whatever the rates of its dropout modules.
        fixed: whether it runs on one size of image only.
        remembers: whether what it returns depends on earlier calls.
        seed: for all further random choices.
    """

    net: RandomNet
    inputs: tuple[Tensor, ...]
    keeps_zero: bool
    noisy: bool
    fixed: bool
    remembers: bool
    seed: int

    def __repr__(self) -> str:
        modules = "\n".join(f"    {name} = {module}" for name, module in self.net.layers.items())
        sizes = [tuple(x.shape) for x in self.inputs]
        try:
            code = trace(self.net, ExampleInputs.of(self.inputs)).code
        except Exception as error:  # noqa: BLE001 - a failing example must be shown whatever is wrong with it
            code = repr(error)
        return f"seed {self.seed}, training {self.net.training}, inputs {sizes}, modules\n{modules}\n{code}"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:  # noqa: ANN401, FBT001 - hypothesis' protocol
        printer.text(repr(self))

    def other_inputs(self, batch: int, grow: int) -> tuple[Tensor, ...]:
        """Inputs of another batch size, and images larger by ``grow``."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        sizes = [(batch, x.shape[1], x.shape[2] + grow, x.shape[3] + grow) for x in self.inputs]
        return tuple(torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes)


def randomise(net: nn.Module) -> nn.Module:
    """Random affine parameters and running statistics."""
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.GroupNorm):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_()
            if isinstance(module, nn.modules.batchnorm._NormBase):
                if module.weight is not None:
                    module.weight.uniform_(0.5, 1.5)
                    module.bias.normal_()
                if module.running_mean is not None and module.running_var is not None:
                    module.running_mean.normal_()
                    module.running_var.uniform_(0.5, 1.5)
    return net


@st.composite
def examples(draw: Draw, steps: int = 10) -> Example:
    """Random networks of up to ``steps`` steps."""
    seed = draw(st.integers(0, 2**16))
    torch.manual_seed(seed)
    builder = Builder(draw, tidy=draw(st.integers(0, 2)) > 0)
    inputs = builder.net.inputs = builder.integer(1, 2)
    size = builder.choose([6, 8])
    builder.shapes = [Shape(3, size) for _ in range(inputs)]
    builder.conv(0, builder.integer(4, 8))
    for _ in range(builder.integer(1, steps)):
        builder.step()
    for _ in range(builder.choose([1, 1, 2, 3])):
        builder.head()
    net = builder.net.double()
    randomise(net)
    net.train(builder.flag())
    generator = torch.Generator().manual_seed(seed)
    tensors = tuple(torch.randn(2, 3, size, size, generator=generator, dtype=torch.float64) for _ in range(inputs))
    return Example(net, tensors, builder.keeps_zero, builder.noisy, builder.fixed, builder.remembers, seed)


def compressed(example: Example) -> fxc.CompressedModule:
    """An example with quantizers; another one is asked for where none of its weights can have one."""
    try:
        return fxc.compress(example.net, example.inputs)
    except UnsupportedModelError:
        assume(False)
        raise
