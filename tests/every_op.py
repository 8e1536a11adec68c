"""Each operation that torch describes for its own tests, between layers that make channels and some that read them."""

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

OPERATIONS = {f"{op.name} {op.variant_test_name}".strip(): op for op in op_db if torch.float64 in op.dtypes}
RANDOM = frozenset(
    {
        "bernoulli", "cauchy", "empty", "empty_like", "empty_permuted", "empty_strided", "exponential", "geometric",
        "log_normal", "multinomial", "new_empty", "new_empty_strided", "nn.functional.multi_head_attention_forward",
        "normal", "pca_lowrank", "rand_like", "randint", "randint_like", "randn", "randn_like", "resize_", "resize_as_",
        "svd_lowrank", "uniform",
    }
)  # fmt: skip
"""What is drawn at random, from a seed that torch's own tests set between the layers, or is what was in memory."""
ON_GPUS = "jiterator"
"""Begins the names of operations that there are on GPUs alone."""
_SAMPLES = 8


class Making(nn.Module):
    """A linear map along one dim of a tensor: the identity, as long as nobody changes its weight."""

    def __init__(self, dim: int, like: Tensor) -> None:
        super().__init__()
        self.dim, channels = dim, like.shape[dim]
        self.layer = nn.Linear(channels, channels, dtype=like.dtype)
        with torch.no_grad():
            self.layer.weight.copy_(torch.eye(channels))
            self.layer.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """A tensor like ``x``."""
        result: Tensor = self.layer(x.transpose(self.dim, -1)).transpose(self.dim, -1)
        return result.contiguous()


class Reading(nn.Module):
    """A linear map along one dim of a tensor, to three entries."""

    def __init__(self, dim: int, like: Tensor) -> None:
        super().__init__()
        self.dim = dim
        self.layer = nn.Linear(like.shape[dim], 3, dtype=like.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """A tensor like ``x`` but for that dim."""
        result: Tensor = self.layer(x.transpose(self.dim, -1)).transpose(self.dim, -1)
        return result


class Between(nn.Module):
    """An operation between layers.

    Args:
        call: the operation.
        leaves: its arguments, as a flat list.
        tree: how they are nested.
        places: those of the arguments that layers make, and along which dim. They are the inputs of the network; other
            tensors are buffers of it.
        read: the dim along which layers read the results, the last one where there are not so many. They read what is
            dense and of floats; what else there is comes out as it is.
        filled: the code fills tensors with numbers, in the place of buffers.
    """

    def __init__(
        self,
        call: Callable[..., Any],
        leaves: Sequence[Any],
        tree: TreeSpec,
        places: dict[int, int],
        read: int,
        *,
        filled: bool = False,
    ) -> None:
        super().__init__()
        self.call, self.tree, self.filled = call, tree, filled
        self.leaves = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.made, self.read = nn.ModuleDict(), nn.ModuleDict()
        for place, leaf in enumerate(leaves):
            if place in places:
                self.made[str(place)] = Making(places[place], leaf)
            elif isinstance(leaf, Tensor):
                self.register_buffer(f"operand{place}", leaf)
        with torch.no_grad():
            for number, result in enumerate(self.results(*[leaves[place] for place in places])):
                if isinstance(result, Tensor) and _can_be_read(result):
                    self.read[str(number)] = Reading(min(read, result.ndim - 1), result)

    def results(self, *inputs: Tensor) -> list[Any]:
        """What the operation returns, as a flat list."""
        leaves = list(self.leaves)
        for (place, layer), x in zip(self.made.items(), inputs, strict=True):
            leaves[int(place)] = layer(x)
        for name, buffer in self.named_buffers(recurse=False):
            leaves[int(name.removeprefix("operand"))] = filled_like(buffer) if self.filled else buffer
        args, kwargs = tree_unflatten(leaves, self.tree)
        return tree_flatten(self.call(*args, **kwargs))[0]

    def forward(self, *inputs: Tensor) -> list[Any]:
        """What the layers behind make of it."""
        results = self.results(*inputs)
        for number, layer in self.read.items():
            results[int(number)] = layer(results[int(number)])
        return results


def filled_like(tensor: Tensor) -> Tensor:
    """A tensor that the code makes of nothing: three quarters, or integers that are zero."""
    return torch.full(tuple(tensor.shape), 0.75 if tensor.is_floating_point() else 0, dtype=tensor.dtype)


def _can_be_read(result: Tensor) -> bool:
    dense = result.layout is torch.strided and result.is_floating_point()
    return dense and result.ndim > 0 and result.numel() > 0


@dataclass(frozen=True)
class Case:
    """A network around an operation, and what it is called with."""

    net: Between
    inputs: tuple[Tensor, ...]


def cases(name: str, count: int, seed: int, *, filled: bool = False) -> Iterator[Case]:
    """Networks around an operation on some of the arguments that torch tries it with.

    Args:
        name: one of :data:`OPERATIONS`.
        count: how many at most.
        seed: which arguments, which of them layers make, along which dims these work.
        filled: see :class:`Between`.
    """
    generator = random.Random(f"{name} {seed}")
    operation = OPERATIONS[name]
    samples = list(itertools.islice(operation.sample_inputs("cpu", torch.float64, requires_grad=False), _SAMPLES))
    generator.shuffle(samples)
    made = 0
    for sample in samples:
        leaves, tree = tree_flatten(((sample.input, *sample.args), sample.kwargs))
        found = [(place, dim) for place, leaf in enumerate(leaves) for dim in _dims(leaf)]
        if not found:
            continue
        place, dim = generator.choice(found)
        others = {p: d for p, d in found if d == dim and p != place and generator.random() < 0.3}
        places = dict(sorted({place: dim, **others}.items()))
        try:
            net = Between(operation.op, leaves, tree, places, generator.choice([dim, dim, 0, 1]), filled=filled)
        except RuntimeError:  # it wants a constant there, or what a transposed tensor is not
            continue
        yield Case(net.eval(), tuple(leaves[place].detach().clone() for place in places))
        made += 1
        if made == count:
            return


def _dims(leaf: object) -> list[int]:
    """The dims of an argument that can be channels."""
    if (
        not isinstance(leaf, Tensor)
        or leaf.dtype != torch.float64
        or leaf.layout is not torch.strided
        or not leaf.numel()
    ):
        return []
    return [dim for dim, size in enumerate(leaf.shape) if size > 1]
