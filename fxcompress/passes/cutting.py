"""Cuts every parameter and buffer of a module by its own atoms."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fxcompress.channels.analysis import Analysis
from fxcompress.channels.plan import Plan
from fxcompress.passes.attributes import update_attributes
from fxcompress.trace.basics.modules import named_modules_in
from fxcompress.trace.graph.names import fetch_attr
from fxcompress.trace.model.skeleton import skeleton
from fxcompress.trace.traced import TracedModule

_BLOCK = 1 << 16  # entries that are looked at together: they stay in the cache


@dataclass(frozen=True, slots=True)
class Cut:
    """What was taken out of one tensor.

    Attributes:
        old: the tensor as it was.
        new: what is left.
        indices: for each cut dim, the indices that stay, int64.
    """

    old: Tensor
    new: Tensor
    indices: dict[int, Tensor]


@dataclass(frozen=True, slots=True)
class CutModule:
    """A cut copy of a module, and what was cut, by the tensor's name."""

    module: TracedModule
    cuts: dict[str, Cut] = field(default_factory=dict)


def cut_module(analysis: Analysis, plan: Plan) -> CutModule:
    """A copy of the module whose tensors lack what the plan removes; tensors that lose nothing are shared.

    The graph is not touched: sizes written into it are the business of :mod:`fxcompress.passes.literals`. Nor is it
    compiled.
    """
    result = CutModule(skeleton(analysis.module, compiled=False))
    made: dict[int, Cut] = {}
    before, after = map(named_modules_in, (analysis.module, result.module))
    indices: dict[int, dict[int, Tensor]] = {}  # by the labels, which all names of one tensor share
    for (name, dim), index in plan.indices(analysis.space).items():
        indices.setdefault(id(analysis.atoms[name]), {})[dim] = index
    for name, dims in analysis.atoms.items():
        if id(dims) not in indices:
            continue
        owner_path, _, leaf = name.rpartition(".")
        if id(dims) not in made:
            # Of the original: a module that has two names is cut already when its second one comes.
            old = fetch_attr(before[owner_path], leaf)
            made[id(dims)] = Cut(old, _sliced(old, indices[id(dims)]), indices[id(dims)])
        _put(after[owner_path], leaf, made[id(dims)].new)
        result.cuts[name] = made[id(dims)]
    paths = dict.fromkeys(name.rpartition(".")[0] for name in result.cuts)
    for path in {id(after[path]): path for path in paths}.values():
        update_attributes(after[path], before[path])
    return result


def _sliced(tensor: Tensor, indices: dict[int, Tensor]) -> Tensor:
    data = tensor.detach()
    if not data.is_cpu:
        indices = {dim: index.to(data.device) for dim, index in indices.items()}
    data = _picked(data, indices)
    if data.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        data = data.contiguous(memory_format=torch.channels_last)
    if not isinstance(tensor, nn.Parameter):
        return data
    new = nn.Parameter(data, requires_grad=tensor.requires_grad)
    if tensor.grad is not None:
        new.grad = _sliced(tensor.grad, indices)
    return new


def _picked(data: Tensor, indices: dict[int, Tensor]) -> Tensor:
    """What stays along each of some dims."""
    if len(indices) > 1 and 0 in indices and data.numel() > _BLOCK and _is_array(data):
        return _picked_in_blocks(data, indices)
    for dim, index in indices.items():
        data = data.index_select(dim, index)
    return data


def _is_array(data: Tensor) -> bool:
    return data.device.type == "cpu" and data.is_contiguous() and data.dtype in _OF_NUMPY


_OF_NUMPY = frozenset({torch.float16, torch.float32, torch.float64})


def _picked_in_blocks(data: Tensor, indices: dict[int, Tensor]) -> Tensor:
    """The same of a large tensor, a few rows at a time, which stay in the cache.

    No copy is made that lacks the rows alone: memory that is new to a process is what takes longest, more than to read
    and write it. By numpy, which takes half the time of torch where single entries are picked out of a row.
    """
    result = data.new_empty([len(indices[d]) if d in indices else n for d, n in enumerate(data.shape)])
    source, target = data.numpy(), result.numpy()
    rows, *others = (indices[d].numpy() for d in sorted(indices))
    *middle, last = zip(sorted(indices)[1:], others, strict=True)
    step = max(1, _BLOCK * len(data) // data.numel())
    for start in range(0, len(rows), step):
        block = source.take(rows[start : start + step], axis=0)
        for dim, index in middle:
            block = block.take(index, axis=dim)
        # Clip: numpy would copy its result once more, to be able to raise an error for an index that is too large.
        block.take(last[1], axis=last[0], out=target[start : start + step], mode="clip")
    return result


def _put(owner: nn.Module, name: str, tensor: Tensor) -> None:
    for table in (owner._parameters, owner._buffers):
        if name in table:
            table[name] = tensor  # type: ignore[assignment]
            return
    setattr(owner, name, tensor)
