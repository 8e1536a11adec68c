"""Takes recurrent layers apart, into products and the steps of :mod:`fxcompress.channels.rules.recurrent`.

torch would unroll them, with a few ops for each time step. Here one pass stands for all of them, so what is found holds
for sequences of any length.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_packed_sequence

from fxcompress.channels.rules.recurrent import (
    GRU,
    LAST,
    LSTM,
    NONE_GIVEN,
    RNN,
    STATE,
    UPDATE,
    Kind,
    Weights,
    tie_units,
)
from fxcompress.channels.values import Dispatcher, LabelTensor, Value, replace

_FUNCTIONS = frozenset(
    getattr(torch, name)
    for name in ("lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")
) | {pad_packed_sequence}


def is_recurrent(callee: object) -> bool:
    """Whether a leaf module or a function is a recurrent layer, or one step of it."""
    return isinstance(callee, nn.RNNBase | nn.RNNCellBase) or callee in _FUNCTIONS


def whole(callee: object) -> AbstractContextManager[object]:
    """While a recurrent layer runs: below autograd, where its op arrives whole, and not unrolled over time."""
    guard: Any = torch._C._AutoDispatchBelowAutograd
    found: AbstractContextManager[object] = guard() if is_recurrent(callee) else nullcontext()
    return found


class _Stack:
    """The layers and directions of one call.

    Args:
        run: where the steps go.
        kind: of layer.
        weights: the parameters in the order of torch.nn.
        per: how many of them each layer and direction has.
        biases: how many of these are biases, 0 or 2.
    """

    def __init__(self, run: Dispatcher, kind: Kind, weights: Sequence[Tensor], per: int, biases: int) -> None:
        self.run, self.kind, self.biases = run, kind, biases
        self.parts = [weights[i : i + per] for i in range(0, len(weights), per)]
        self.hidden: list[Tensor] = []
        self.cells: list[Tensor] = []

    def __call__(self, source: Tensor, states: tuple[Tensor, ...], directions: int) -> Tensor:
        """Run all layers on (steps, I); the result (steps, directions * P).

        Args:
            source: all time steps of all sequences.
            states: initial hidden and cell state, each (layers * directions, N, ...).
            directions: 1 or 2.
        """
        for first in range(0, len(self.parts), directions):
            here = range(first, first + directions)
            made = [self._direction(source, [_initial(s, i) for s in states], self.parts[i]) for i in here]
            source = torch.cat(made, 1) if directions > 1 else made[0]
        return source

    def _direction(self, source: Tensor, initial: list[Tensor | None], weights: Sequence[Tensor]) -> Tensor:
        run, kind, steps = self.run, self.kind, source.shape[0]
        ih, hh, *rest = weights
        biases, projection = rest[: self.biases], next(iter(rest[self.biases :]), None)
        if projection is not None and projection.shape[0] == projection.shape[1]:
            raise ValueError("an LSTM whose projection is as wide as its cells, which torch takes for one without")
        hidden, cell = map(_optional, [*initial, None][:2])
        held = Weights(_value(ih), _value(hh), tuple(map(_value, biases)), _optional(projection))
        state = run.emit(STATE, kind.module, (kind, _value(source), hidden, cell, held), (steps, hh.shape[1]), hh)
        first, second = biases or (None, None)
        left, right = F.linear(source, ih, first), F.linear(state, hh, second)
        update = (kind, _value(left), _value(right), None if projection is not None else _value(state), cell)
        result: Tensor = run.emit(UPDATE, kind.module, update, (steps, hh.shape[0] // kind.gates), hh)
        self.cells.append(result)
        self.hidden.append(result if projection is None else F.linear(result, projection))
        return self.hidden[-1]

    def lasts(self, batch: int) -> list[Tensor]:
        """The hidden states of all layers and directions after the last time step, and the cell states if there are."""
        found: list[Tensor] = []
        for made in (self.hidden, self.cells) if self.kind.cell else (self.hidden,):
            shape = (len(made), batch, made[0].shape[1])
            found.append(self.run.emit(LAST, self.kind.module, ([_value(t) for t in made],), shape, made[0]))
        return found


def _value(tensor: Tensor) -> Value:
    return tensor.fxc_value if isinstance(tensor, LabelTensor) else Value(tensor.to("meta"))


def _optional(tensor: Tensor | None) -> Value | None:
    return None if tensor is None else _value(tensor)


def _initial(states: Tensor, i: int) -> Tensor | None:
    """The initial state of one layer; None for the zeros that a module makes where it is given none.

    What comes from the graph is a LabelTensor, see :func:`as_given`.
    """
    return states.select(0, i) if isinstance(states, LabelTensor) else None


def as_given(run: Callable[[Tensor], LabelTensor], tree: Any) -> Any:  # noqa: ANN401 - arguments of a call
    """Make LabelTensors of all floating tensors: an initial state of a size that the graph fixes."""
    return replace(lambda t: run(t) if t.is_floating_point() and not isinstance(t, LabelTensor) else t, Tensor, tree)


def _layers(kind: Kind) -> Callable[..., tuple[Tensor, ...]]:
    def run(to: Dispatcher, source: Tensor, states: Any, weights: Sequence[Tensor], *rest: Any) -> tuple[Tensor, ...]:  # noqa: ANN401 - the signature of ATen
        """What ``aten.lstm.input`` and its like return: all hidden states, the last ones, perhaps the last cells."""
        biased, layers, _dropout, _train, bidirectional, batch_first = rest
        directions = 1 + bidirectional
        stack = _Stack(to, kind, weights, len(weights) // (layers * directions), 2 * biased)
        flat = stack(source.reshape(-1, source.shape[2]), tuple(states) if kind.cell else (states,), directions)
        batch = source.shape[0 if batch_first else 1]
        return (flat.view(*source.shape[:2], flat.shape[1]), *stack.lasts(batch))

    return run


def _products(
    run: Dispatcher, kind: Kind, source: Tensor, hidden: Tensor, weights: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """Both products of a cell, and its hidden state."""
    ih, hh, *biases = weights
    tie_units(_value(hh), kind, run.space)
    hidden = _given_or_zero(run, kind, hidden, hh)
    first, second = biases or (None, None)
    return F.linear(source, ih, first), F.linear(hidden, hh, second), hidden


def _given_or_zero(run: Dispatcher, kind: Kind, state: Tensor, recurrent: Tensor) -> Tensor:
    if isinstance(state, LabelTensor):
        return state
    return run.emit(NONE_GIVEN, kind.module, (_value(recurrent),), tuple(state.shape), recurrent)


def _lstm_cell(run: Dispatcher, source: Tensor, states: Sequence[Tensor], *weights: Tensor) -> tuple[Tensor, Tensor]:
    cell = _given_or_zero(run, LSTM, states[1], weights[1])
    left, right, _ = _products(run, LSTM, source, states[0], weights)
    i, f, g, o = (left + right).chunk(4, 1)
    cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
    return o.sigmoid() * cell.tanh(), cell


def _gru_cell(run: Dispatcher, source: Tensor, hidden: Tensor, *weights: Tensor) -> Tensor:
    left, right, hidden = _products(run, GRU, source, hidden, weights)
    (a, b, c), (d, e, f) = left.chunk(3, 1), right.chunk(3, 1)
    new, keep = (c + (a + d).sigmoid() * f).tanh(), (b + e).sigmoid()
    return keep * hidden + (1 - keep) * new


def _rnn_cell(activation: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    def run(to: Dispatcher, source: Tensor, hidden: Tensor, *weights: Tensor) -> Tensor:
        left, right, _ = _products(to, RNN, source, hidden, weights)
        return activation(left + right)

    return run


def _packed(kind: Kind) -> Callable[..., tuple[Tensor, ...]]:
    def run(
        to: Dispatcher,
        source: Tensor,
        sizes: Tensor,
        states: Any,  # noqa: ANN401 - a tensor, or hidden and cell state
        weights: Sequence[Tensor],
        *rest: Any,  # noqa: ANN401
    ) -> tuple[Tensor, ...]:
        """The same on packed sequences: ``source`` is (steps, I), ``sizes`` are those of the batch at each step."""
        biased, layers, _dropout, _train, bidirectional = rest
        directions = 1 + bidirectional
        stack = _Stack(to, kind, weights, len(weights) // (layers * directions), 2 * biased)
        flat = stack(source, tuple(states) if kind.cell else (states,), directions)
        return (flat, *stack.lasts(int(sizes[0])))

    return run


_aten = torch.ops.aten
_KINDS = {_aten.lstm: LSTM, _aten.gru: GRU, _aten.rnn_tanh: RNN, _aten.rnn_relu: RNN}
RECURRENT: dict[Any, Callable[..., Any]] = {
    **{op.input: _layers(kind) for op, kind in _KINDS.items()},
    **{op.data: _packed(kind) for op, kind in _KINDS.items()},
    _aten.lstm_cell.default: _lstm_cell,
    _aten.gru_cell.default: _gru_cell,
    _aten.rnn_tanh_cell.default: _rnn_cell(torch.tanh),
    _aten.rnn_relu_cell.default: _rnn_cell(torch.relu),
}
"""How each op is taken apart: a function of the emitter and the op's arguments."""
