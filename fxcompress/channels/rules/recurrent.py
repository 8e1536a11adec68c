"""Recurrent layers: the state that goes around, and what is known of it at every time step.

A recurrent layer is taken apart (:mod:`fxcompress.channels.recurrent`) into products, for which there are rules, and
the steps below. One step stands for all time steps: labels do not change with time, and what is said to be constant is
constant at every one.

    state -> products with the weights -> gates -> update -> (projection) -> the state of the next time step

A unit stays zero when its initial state is zero and its **candidate** (g of an LSTM, n of a GRU, all of a plain RNN) is
made of zeros: tanh(0) = 0, and the gates only ever multiply zeros. That needs an induction over time, since candidates
read other units: assume that all units stay zero, and drop what contradicts it, until nothing does.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from fxcompress.channels.layers import Layers, vector
from fxcompress.channels.rules.contraction import meet, take
from fxcompress.channels.rules.patterns import nonzero_anywhere
from fxcompress.channels.rules.registry import Known, OpClass
from fxcompress.channels.space import Space
from fxcompress.channels.values import Call, Step, Value


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of recurrent layer.

    Attributes:
        gates: blocks of H rows in its weights.
        candidate: which block makes the candidate.
        keeps: whether the update multiplies the old state by a gate and adds to it (it keeps a zero), or replaces it.
        cell: whether what is kept is a cell state beside the hidden state.
        module: for tables of ops.
    """

    gates: int
    candidate: int
    keeps: bool
    cell: bool
    module: type[nn.Module]

    def of(self, rows: Tensor) -> Tensor:
        """The candidate's rows of a weight or a vector."""
        return rows.chunk(self.gates)[self.candidate]

    def is_candidate(self, rows: int) -> np.ndarray:
        """Which of so many rows are the candidate's, bool (rows,)."""
        found: np.ndarray = np.arange(rows) * self.gates // rows == self.candidate
        return found


LSTM = Kind(4, 2, keeps=True, cell=True, module=nn.LSTM)
GRU = Kind(3, 2, keeps=True, cell=False, module=nn.GRU)
RNN = Kind(1, 0, keeps=False, cell=False, module=nn.RNN)


def kind_of_cell(cell: nn.RNNCellBase) -> Kind:
    """The kind of layer that a cell is one step of: it has as many gates."""
    return next(kind for kind in (LSTM, GRU, RNN) if kind.gates * cell.hidden_size == cell.weight_ih.shape[0])


@dataclass(frozen=True, slots=True)
class Weights:
    """The parameters of one layer in one direction, as they stand in torch.nn.

    Attributes:
        ih: (gates * H, I).
        hh: (gates * H, P), where P = H without a projection.
        biases: two of (gates * H,), or none.
        hr: the projection (P, H), or None.
    """

    ih: Value
    hh: Value
    biases: tuple[Value, ...]
    hr: Value | None


def _state_labels(call: Call, space: Space) -> tuple[Layers, ...]:
    """The hidden state before each time step: labelled by the columns of the weight that reads it."""
    source, hidden, _, weights = call.args[1:]
    units = take(weights.hh, 1, space)
    for layer in source.layers:
        if layer.shape[0] > 1:
            space.pin(layer, "recurrent", "a recurrent layer runs along this dim")
    if weights.hr is not None:
        meet(units, take(weights.hr, 0, space), space)
    if hidden is not None:
        meet(units, take(hidden, 1, space), space)
    return (() if units is None else (vector(units, 2, 1),),)


def _state_constants(step: Step, known: Known) -> list[Tensor]:
    """Which hidden states are zero at every time step: the induction over time."""
    kind, source, hidden, cell, weights = step.call.args
    read = ~_is_zero(source, known)
    quiet = ~(_nonzero(weights.ih, kind, known) & read).any(1)
    for bias in weights.biases:
        quiet &= ~kind.of(_nonzero(bias, None, known))
    quiet &= True if cell is None else _is_zero(cell, known)
    recurrent = _nonzero(weights.hh, kind, known)
    zero = (
        torch.ones(step.outputs[0].shape[1], dtype=torch.bool, device="cpu")
        if hidden is None
        else _is_zero(hidden, known)
    )
    while True:
        made = quiet & ~(recurrent & ~zero).any(1)
        if kind.keeps and not kind.cell:
            made &= zero
        if weights.hr is not None:
            made = ~(_nonzero(weights.hr, None, known) & ~made).any(1)
        if bool((zero <= made).all()):
            return [_zeros(zero)]
        zero = zero & made


def _update_labels(call: Call, space: Space) -> tuple[Layers, ...]:
    """The new state of each unit: all of its gates go together, and with it."""
    kind, left, right, hidden, cell = call.args
    size = call.metas[0].shape[1]
    gates = take(left, 1, space)
    meet(gates, take(right, 1, space), space)
    if gates is None:  # a plain RNN of one unit
        return ((),)
    blocks = gates.reshape(kind.gates, size)
    space.couple(blocks, blocks[:1])
    for state in (hidden, cell):
        if state is not None:
            meet(blocks[0], take(state, 1, space), space)
    return ((vector(blocks[0], 2, 1),) if size > 1 else (),)


def _update_constants(step: Step, known: Known) -> list[Tensor]:
    """A unit whose candidate is made of zeros, and which was zero, is zero."""
    kind, left, right, hidden, cell = step.call.args
    zero = kind.of(_is_zero(left, known)) & kind.of(_is_zero(right, known))
    if kind.keeps and not kind.cell:
        zero &= _is_zero(hidden, known)
    elif cell is not None:
        zero &= _is_zero(cell, known)
    return [_zeros(zero)]


def tie_units(recurrent: Value, kind: Kind, space: Space) -> None:
    """Tie the columns of a cell's recurrent weight to its rows: a module has one hidden size, read or not."""
    rows = take(recurrent, 0, space)
    if rows is not None:
        blocks = rows.reshape(kind.gates, -1)
        space.couple(blocks, blocks[:1])
        meet(blocks[0] if blocks.shape[1] > 1 else None, take(recurrent, 1, space), space)


def _last_labels(call: Call, space: Space) -> tuple[Layers, ...]:
    """The states of all layers and directions after the last time step, (L, N, H): as many units in each."""
    found = [take(value, 1, space) for value in call.args[0]]
    atoms = [units for units in found if units is not None]
    if not atoms:
        return ((),)
    return ((torch.stack(atoms)[:, None],) if len(atoms) > 1 else (vector(atoms[0], 3, 2),),)


def _last_constants(step: Step, known: Known) -> list[Tensor]:
    return [torch.stack([_zeros(_is_zero(value, known)) for value in step.call.args[0]])]


def _none_labels(call: Call, space: Space) -> tuple[Layers, ...]:
    """An initial state that is left out."""
    units = take(call.args[0], 1, space)
    return (() if units is None else (vector(units, 2, 1),),)


def _none_constants(step: Step, known: Known) -> list[Tensor]:
    return [torch.zeros(1, 1, dtype=torch.float64, device="cpu")]


def _is_zero(value: Value, known: Known) -> Tensor:
    """Which entries along the last dim are zero everywhere: bool (size,)."""
    zero = known.of(value) == 0
    return zero.reshape(-1, zero.shape[-1]).all(0).expand(value.shape[-1])


def _nonzero(weight: Value, kind: Kind | None, known: Known) -> Tensor:
    """Which entries of a parameter may be other than zero, bool; with a kind, of the rows for the candidate alone."""
    may = nonzero_anywhere(known.held(weight), ()).expand(weight.shape)
    return may if kind is None else kind.of(may)


def _zeros(zero: Tensor) -> Tensor:
    return torch.where(zero, 0.0, torch.nan).to(torch.float64)[None]


STATE = OpClass("recurrent state", _state_labels, _state_constants)
UPDATE = OpClass("recurrent update", _update_labels, _update_constants)
LAST = OpClass("last recurrent state", _last_labels, _last_constants)
NONE_GIVEN = OpClass("initial state of zeros", _none_labels, _none_constants)
RECURRENT_STEPS = frozenset({STATE, UPDATE, LAST, NONE_GIVEN})
