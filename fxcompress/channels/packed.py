"""Packed sequences of torch.nn: all time steps of all sequences in one dim, (steps, ...).

Their lengths are values, which an analysis has only where the network holds them. Where they are an input, each
sequence is taken to be as long as the longest one: labels do not change with time, so any length will do.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

from fxcompress.channels.layers import Layers, support
from fxcompress.channels.rules.registry import Known, OpClass, nothing_known
from fxcompress.channels.space import Space
from fxcompress.channels.values import Call, Dispatcher, LabelTensor, Step

_aten = torch.ops.aten


def with_lengths(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of ``pack_padded_sequence``, with full lengths where they are an input of the network."""
    named = dict(zip(("input", "lengths", "batch_first"), args, strict=False)) | kwargs
    if not isinstance(named.get("lengths"), LabelTensor):
        return args, kwargs
    batch, steps = named["input"].shape[:2] if named.get("batch_first", False) else named["input"].shape[1::-1]
    lengths = torch.full((batch,), steps, device="cpu")
    return ((args[0], lengths, *args[2:]), kwargs) if len(args) > 1 else (args, kwargs | {"lengths": lengths})


def _pack(run: Dispatcher, source: Tensor, lengths: Tensor, batch_first: bool) -> tuple[Tensor, Tensor]:  # noqa: FBT001 - the signature of ATen
    steps, sizes = _aten._pack_padded_sequence(torch.zeros(*source.shape[:2], 1, device="cpu"), lengths, batch_first)
    return _moved(run, source, (steps.shape[0], *source.shape[2:]), 0.0), sizes


def _unpack(run: Dispatcher, source: Tensor, sizes: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401
    _, padding, _ = rest
    padded, lengths = _aten._pad_packed_sequence(torch.zeros(source.shape[0], 1, device="cpu"), sizes, *rest)
    return _moved(run, source, (*padded.shape[:2], *source.shape[1:]), padding), lengths


def _moved(run: Dispatcher, source: Tensor, shape: tuple[int, ...], padding: float) -> Tensor:
    if not isinstance(source, LabelTensor):
        return source.new_zeros(shape)
    return run.emit(REPACK, pack_padded_sequence, (source.fxc_value, padding), shape, source)


def _labels(call: Call, space: Space) -> tuple[Layers, ...]:
    """Time steps and sequences move; the dims behind them stay what they are."""
    source, out = call.args[0], call.metas[0]
    moving = source.rank - _kept(call)
    kept = []
    for layer in source.layers:
        if min(support(layer)) < moving:
            space.pin(layer, "recurrent", "a packed sequence is made of all entries of this dim")
        else:
            kept.append(layer.reshape((1,) * (out.ndim - _kept(call)) + tuple(layer.shape[moving:])))
    return (tuple(kept),)


def _kept(call: Call) -> int:
    """How many dims, the last ones, do not move."""
    rank: int = call.args[0].rank
    return min(rank, call.metas[0].ndim) - 1


def _constants(step: Step, known: Known) -> list[Tensor]:
    """What is the same at every time step still is, where padding does not come between."""
    source, padding = step.call.args
    found, rank, kept = known.of(source), step.outputs[0].rank, _kept(step.call)
    if any(n > 1 for n in found.shape[: source.rank - kept]):
        return nothing_known(step, known)
    moved = found.reshape((1,) * (rank - kept) + tuple(found.shape[source.rank - kept :]))
    return [moved if rank < source.rank else torch.where(moved == padding, moved, torch.nan)]


REPACK = OpClass("packed sequence", _labels, _constants)
PACKED: dict[Any, Callable[..., Any]] = {
    _aten._pack_padded_sequence.default: _pack,
    _aten._pad_packed_sequence.default: _unpack,
}
"""How each op on packed sequences is taken apart."""
