"""Random programs that move dims into other orders, at sizes that coincide: samples, words, channels, heads.

A value is a list of dims, each of them a product of a number and sizes of the input, so that a reshape that is drawn
fits inputs of all sizes. Some of the sizes are written as numbers all the same.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Integer = Callable[[int, int], int]
"""Draws a number between two, inclusive."""
_LARGEST, _RANK = 600, 5


class Size(NamedTuple):
    """Of a dim: a number times so many sizes of samples, and of words."""

    number: int = 1
    samples: int = 0
    words: int = 0

    @property
    def fixed(self) -> bool:
        """Whether it is the same for all inputs."""
        return not self.samples and not self.words

    def times(self, other: "Size") -> "Size":
        """The product."""
        return Size(self.number * other.number, self.samples + other.samples, self.words + other.words)


Dims = tuple[Size, ...]


def whole(dims: Sequence[Size]) -> Size:
    """The size of a dim that is made of several."""
    result = Size()
    for size in dims:
        result = result.times(size)
    return result


class Program(nn.Module):
    """Runs lines of Python. Its layers and parameters are named after the values that they make."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def __repr__(self) -> str:
        shapes = {name: tuple(p.shape) for name, p in self.named_parameters()}
        return "\n".join(["", *self.lines, str(shapes)])

    def compiled(self) -> "Program":
        """The same, with the code of its lines as ``forward``."""
        names: dict[str, Any] = {"torch": torch}
        exec("def forward(self, x):\n  " + "\n  ".join(self.lines), names)
        self.__class__ = type("Program", (Program,), {"forward": names["forward"]})
        return self


@dataclass
class Orders:
    """Draws a program.

    Attributes:
        integer: draws a number.
        program: what is drawn.
        dims: of each value.
        now: the last value.
    """

    integer: Integer
    program: Program = field(default_factory=Program)
    dims: dict[str, Dims] = field(default_factory=dict)
    now: str = "x"

    def choose(self, items: Sequence[Any]) -> Any:  # noqa: ANN401 - one of the items
        return items[self.integer(0, len(items) - 1)]

    def shuffled(self, items: Sequence[Any]) -> list[Any]:
        left = list(items)
        return [left.pop(self.integer(0, len(left) - 1)) for _ in items]

    def build(self, steps: int) -> Program:
        base = self.choose([2, 2, 3, 4])
        sizes = [base, base, base * base, 1, 2, 4]
        self.samples, self.words = self.choose(sizes), self.choose(sizes)
        self.widths = [base, base * base, 2 * base, 4, 6, 8]
        self.dims["x"] = (Size(samples=1), Size(words=1), Size(base))
        self.linear()
        for _ in range(steps):
            self.step()
        self.linear()
        self.program.lines.append(f"return {self.now}")
        return self.program.double().compiled()

    def step(self) -> None:
        if math.prod(self.shape(self.own)) > _LARGEST or len(self.own) > _RANK:
            self.put(f"{self.now}.sum(0)", self.own[1:])
        elif self.own:
            kinds = [
                self.linear, self.permute, self.permute, self.reshape, self.like, self.flatten, self.flatten, self.take,
                self.unflatten, self.unflatten, self.unsqueeze, self.bend, self.stack, self.repeat, self.add,
                self.table, self.product,
            ]  # fmt: skip
            self.choose(kinds)()

    @property
    def own(self) -> Dims:
        return self.dims[self.now]

    def shape(self, dims: Dims, samples: int = 0, words: int = 0) -> tuple[int, ...]:
        """The numbers of some dims, on the example or on another input."""
        n, t = samples or self.samples, words or self.words
        return tuple(size.number * n**size.samples * t**size.words for size in dims)

    def put(self, line: str, dims: Sequence[Size]) -> None:
        self.now = f"v{len(self.dims)}"
        self.dims[self.now] = tuple(dims)
        self.program.lines.append(f"{self.now} = {line}")

    def hold(self, tensor: nn.Module | nn.Parameter) -> str:
        name = f"w{len(self.dims)}"
        setattr(self.program, name, tensor)
        return f"self.{name}"

    def written(self, size: Size) -> str:
        """A size as code: a number, or read off some tensor."""
        read = [f"{v}.shape[{d}]" for v, dims in self.dims.items() for d, own in enumerate(dims) if own == size]
        factors = [str(size.number)] * (size.number > 1) + ["x.shape[0]"] * size.samples + ["x.shape[1]"] * size.words
        ways = [str(size.number)] if size.fixed else [" * ".join(self.shuffled(factors))]
        ways += [self.choose(read)] if read else []
        number = str(self.shape((size,))[0])
        return number if self.integer(0, 9) == 0 else str(self.choose(ways))

    def sizes(self, dims: Sequence[Size]) -> str:
        texts = [self.written(size) for size in dims]
        if self.integer(0, 1):
            texts[self.integer(0, len(texts) - 1)] = "-1"
        return ", ".join(texts)

    # --- steps -----------------------------------------------------------------------------------------------------

    def linear(self) -> None:
        fixed = [d for d, size in enumerate(self.own) if size.fixed and 1 < size.number <= 64]
        if fixed:
            d = self.choose(fixed)
            dims = [size for i, size in enumerate(self.own) if i != d]
            layer = self.hold(nn.Linear(self.own[d].number, width := self.choose(self.widths)))
            self.put(f"{layer}({self.now}.movedim({d}, -1))", [*dims, Size(width)])

    def permute(self) -> None:
        order = self.shuffled(range(len(self.own)))
        self.put(f"{self.now}.permute({', '.join(map(str, order))})", [self.own[d] for d in order])

    def reshape(self) -> None:
        total = whole(self.own)
        primes = [p for p in (2, 3, 5, 7) for _ in range(_power(total.number, p))]
        factors = [*map(Size, primes), *[Size(1, 1, 0)] * total.samples, *[Size(1, 0, 1)] * total.words]
        factors = self.shuffled(factors)
        cuts = sorted(self.integer(0, len(factors)) for _ in range(self.integer(0, 3)))
        dims = [whole(factors[a:b]) for a, b in zip([0, *cuts], [*cuts, len(factors)], strict=True)]
        self.put(f"{self.now}.reshape({self.sizes(dims)})", dims)

    def like(self) -> None:
        count = math.prod(self.shape(self.own))
        fitting = [v for v, dims in self.dims.items() if math.prod(self.shape(dims)) == count]
        other = self.choose(fitting)
        self.put(f"{self.now}.reshape({other}.shape)", self.dims[other])

    def flatten(self) -> None:
        a = self.integer(0, len(self.own) - 1)
        b = self.integer(a, len(self.own) - 1)
        dims = [*self.own[:a], whole(self.own[a : b + 1]), *self.own[b + 1 :]]
        self.put(f"{self.now}.flatten({a}, {b})", dims)

    def unflatten(self) -> None:
        d = self.integer(0, len(self.own) - 1)
        size = self.own[d]
        part = Size(
            self.choose([n for n in range(1, size.number + 1) if size.number % n == 0]),
            self.integer(0, size.samples),
            self.integer(0, size.words),
        )
        rest = Size(size.number // part.number, size.samples - part.samples, size.words - part.words)
        dims = [*self.own[:d], part, rest, *self.own[d + 1 :]]
        whole_shape = self.integer(0, 1)
        how = f"reshape({self.sizes(dims)})" if whole_shape else f"unflatten({d}, ({self.sizes([part, rest])}))"
        self.put(f"{self.now}.{how}", dims)

    def unsqueeze(self) -> None:
        d = self.integer(0, len(self.own))
        self.put(f"{self.now}.unsqueeze({d})", [*self.own[:d], Size(), *self.own[d:]])

    def bend(self) -> None:
        how = self.choose(["relu()", "exp()", "flip(0)", "softmax(-1)", "roll(1, -1)", "mul(2)"])
        self.put(f"{self.now}.{how}", self.own)

    def take(self) -> None:
        d = self.integer(0, len(self.own) - 1)
        lead, size = ":, " * d, self.own[d]
        if size.fixed and size.number > 1 and self.integer(0, 1):
            a = self.integer(0, size.number - 1)
            self.put(f"{self.now}[{lead}{a}:]", [*self.own[:d], Size(size.number - a), *self.own[d + 1 :]])
        elif len(self.own) > 1:
            self.put(f"{self.now}[{lead}{self.choose([0, -1])}]", [*self.own[:d], *self.own[d + 1 :]])

    def stack(self) -> None:
        d = self.integer(0, len(self.own) - 1)
        pair = f"[{self.now}, {self.now}.tanh()]"
        if self.integer(0, 1):
            self.put(f"torch.stack({pair}, {d})", [*self.own[:d], Size(2), *self.own[d:]])
        else:
            self.put(f"torch.cat({pair}, {d})", [*self.own[:d], self.own[d].times(Size(2)), *self.own[d + 1 :]])

    def repeat(self) -> None:
        d = self.integer(0, len(self.own))
        size = self.choose([Size(2), Size(3), *self.dims["x"]])
        sizes = ["-1"] * d + [self.written(size)] + ["-1"] * (len(self.own) - d)
        self.put(f"{self.now}.unsqueeze({d}).expand({', '.join(sizes)})", [*self.own[:d], size, *self.own[d:]])

    def add(self) -> None:
        """A value that has this one's shape on the example."""
        fitting = [v for v, dims in self.dims.items() if self.shape(dims) == self.shape(self.own)]
        self.put(f"{self.now} {self.choose('+*')} {self.choose(fitting)}", self.own)

    def table(self) -> None:
        """A parameter, of entries for some dims."""
        sizes = self.shape(self.own[-2:])
        shape = [
            n if n < 9 and (size.fixed or self.integer(0, 5) == 0) else 1
            for n, size in zip(sizes, self.own[-2:], strict=True)
        ]
        self.put(f"{self.now} {self.choose('+*')} {self.hold(nn.Parameter(torch.randn(shape)))}", self.own)

    def product(self) -> None:
        if len(self.own) > 1:
            v, dims = self.now, self.own
            pairs = (f"{v} @ {v}.mT", dims[-2]), (f"{v}.mT @ {v}.tanh()", dims[-1])
            line, size = self.choose(pairs)
            self.put(line, [*dims[:-2], size, size])

    # --- what is dead, and inputs ----------------------------------------------------------------------------------

    def kill(self) -> None:
        """Zeros in some rows of each layer, and some slices of each parameter."""
        with torch.no_grad():
            for module in self.program.children():
                self._kill(module.get_parameter("weight"), module.get_parameter("bias"))
            for parameter in self.program.parameters(recurse=False):
                self._kill(parameter)

    def _kill(self, *tensors: Tensor) -> None:
        count, step = len(tensors[0]), self.integer(1, 3)
        for tensor in tensors:
            tensor[self.integer(0, count) :: step] = 0

    def input(self, samples: int = 0, words: int = 0) -> Tensor:
        return torch.randn(self.shape(self.dims["x"], samples, words), dtype=torch.float64)

    def others(self) -> list[Tensor]:
        """Inputs of other sizes."""
        n, t = self.samples, self.words
        sizes = [(1, t), (n + 1, t), (2 * n, t), (n, 1), (n, t + 1), (n, 2 * t), (t, n), (1, 1), (n * t, t), (5, 3)]
        return [self.input(*size) for size in dict.fromkeys(sizes)]


def _power(n: int, p: int) -> int:
    """How often a number can be divided by another one."""
    return 0 if n % p else 1 + _power(n // p, p)
