"""The pieces of a model that can be traced, where the model as a whole cannot: it reads the values of tensors.

Code that decides by values has no graph, but it calls modules that have one. A piece is such a module, as far up as
possible. What it takes and returns stays as it is, so the code around it need not be understood, with one exception:
it must reach the tensors of the piece through its ``forward`` alone.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxcompress.errors import FxCompressError
from fxcompress.trace.basics.trees import replace
from fxcompress.trace.code.bytecode import names_beyond_self, names_in, opened_in
from fxcompress.trace.code.functions import code_around, methods, with_called
from fxcompress.trace.effects.randomness import same_randomness
from fxcompress.trace.effects.undo import unchanged_buffers
from fxcompress.trace.forward_hooks import hooks_of
from fxcompress.trace.inputs import ExampleInputs
from fxcompress.trace.model.skeleton import own_buffers
from fxcompress.trace.model.uncompiled import ORIGINAL, Uncompiled
from fxcompress.trace.pieces.calls import check_call, refuse_nested, without_empty
from fxcompress.trace.pieces.graph_forward import GraphForward, own_class, traced_of
from fxcompress.trace.pieces.observed import Observed, observe, tensor_names
from fxcompress.trace.traced import TracedModule
from fxcompress.trace.tracer import trace
from fxcompress.trace.weights.computed import sources
from fxcompress.trace.weights.norm import with_plain_weights

_NO_WORK = "nothing lies between two of its layers"
_NO_LAYER = "it holds no layer with a weight"
_CALLS_ON = "it does no more than to call the module that was compiled"


@dataclass(frozen=True, slots=True)
class Piece:
    """A module of a model that can be traced on its own.

    Attributes:
        path: its first name in the model.
        traced: its graphs; the parameters are those of the model.
        inputs: that it was called with. The values of floating ones are lost.
    """

    path: str
    traced: TracedModule
    inputs: ExampleInputs


@dataclass(frozen=True, slots=True)
class Pieces:
    """A model in pieces.

    Attributes:
        model: the model; a copy with plain weights where it has weight norm.
        pieces: disjoint ones.
        outside: why a module is no piece and lies in none, by its name; ``""`` is the model.
    """

    model: nn.Module
    pieces: tuple[Piece, ...]
    outside: dict[str, str]

    def parameters_outside(self) -> dict[str, str]:
        """The parameters that lie in no piece, each with the reason."""
        inside = {id(p) for piece in self.pieces for p in piece.traced.parameters()}
        computed = {f"{piece.path}.{name}" for piece in self.pieces for name in sources(piece.traced)}
        found = {n: p for n, p in self.model.named_parameters() if n not in computed}
        return {n: self._reason(n) for n, p in found.items() if id(p) not in inside}

    def _reason(self, name: str) -> str:
        """Why the module of a parameter is no piece; of the last ones that hold two layers, if any does."""
        owner = name.rpartition(".")[0]
        while owner and self.outside.get(owner, _NO_WORK) in {_NO_WORK, _NO_LAYER}:
            owner = owner.rpartition(".")[0]
        return self.outside[owner] if owner or "." not in name else _NO_WORK


Accept = Callable[[str, TracedModule, ExampleInputs], None]
"""Raises an FxCompressError where a module that was traced is no good as a piece; told its name and a call as well."""


def find_pieces(
    model: nn.Module,
    inputs: ExampleInputs,
    why: FxCompressError,
    accept: Accept,
    *,
    layers: int = 2,
    plain: bool = True,
) -> Pieces:
    """Find the outermost modules of ``model`` that can be traced; the model is left as it is.

    Args:
        model: cannot be traced.
        inputs: the model runs on them once or twice, with values. Some module must be called.
        why: it cannot be traced.
        accept: see :data:`Accept`.
        layers: that a piece must hold at least.
        plain: as for :func:`fxcompress.trace.tracer.trace`.

    Raises:
        ExampleInputError: the model does not run on the inputs.
        TraceError: it has no piece with so many layers in it; of the class of ``why``.
    """
    model = with_plain_weights(model)
    seen = observe(model, inputs)
    search = _Search(own_buffers(model), seen, _short(why), accept, layers, plain=plain)
    search.go()
    if not search.pieces:
        reasons = [
            f"  {path}: {reason}" for path, reason in search.outside.items() if path and reason != search.no_work
        ]
        more = (
            "\n".join(reasons[:6])
            or f"  no module of it holds {'two layers with weights' if layers > 1 else 'a layer'}"
        )
        raise type(why)(f"{why}\nNor can any module of it be traced on its own:\n{more}") from why
    return Pieces(model, tuple(search.pieces.values()), search.outside)


_WITHOUT_CHANNELS = ("activation", "dropout", "padding", "pooling", "upsampling")


class _Search:
    """Looks for pieces, from the top down."""

    def __init__(self, model: nn.Module, seen: Observed, why: str, accept: Accept, layers: int, *, plain: bool) -> None:
        self.model = model
        self.plain = plain
        self.layers = layers
        self.no_work = _NO_WORK if layers > 1 else _NO_LAYER
        self.seen = seen
        self.accept = accept
        self.names = tensor_names(model)
        self.pieces: dict[str, Piece] = {}
        self.outside = {"": why}
        self._visited: set[int] = {id(model)}

    def go(self) -> None:
        """Find all pieces; those that the code around them reaches into are split."""
        self._children("")
        while True:
            glue = [m for m in self.model.modules() if id(m) not in self._in_pieces()]
            around = code_around(glue)
            names, opened = names_beyond_self(around), opened_in(around)
            reached = {path: why for path in self.pieces if (why := self._reached(path, names, opened))}
            if not reached:
                return
            for path, why in reached.items():
                del self.pieces[path]
                self.outside[path] = f"code outside of it {why}"
                self._children(path)

    def _children(self, path: str) -> None:
        for name, child in self.model.get_submodule(path).named_children():
            if id(child) not in self._visited:
                self._visited.add(id(child))
                self._visit(f"{path}.{name}" if path else name, child)

    def _visit(self, path: str, module: nn.Module) -> None:
        if sum(p.ndim > 1 for p in module.parameters()) < self.layers:
            self.outside[path] = self.no_work
            return
        reason = _CALLS_ON if isinstance(module, Uncompiled) else self._refusal(path, module)
        if reason is None:
            try:
                self.pieces[path] = self._traced(path, module)
            except FxCompressError as error:
                reason = _short(error)
        if reason is not None:
            self.outside[path] = reason
            self._children(path)

    def _refusal(self, path: str, module: nn.Module) -> str | None:
        """Why a module is no piece, whether it can be traced or not."""
        if path not in self.seen.calls:
            return "it is not called on the example inputs"
        hooked = [inner for inner in sorted(self.seen.hooked) if inner.startswith(f"{path}.")]
        if hooked or hooks_of(module):
            return f"there are hooks on {hooked[0] if hooked else path}"
        own = {id(m) for m in module.modules()}
        tensors = {id(t): self.names[id(t)] for t in (*module.parameters(), *module.buffers())}
        for held, holder in self._held_outside(own):
            if id(held) in tensors:
                return f"its {tensors[id(held)].removeprefix(f'{path}.')} is also held by {holder}"
            if id(held) in own and held is not module and not _has_nothing_to_cut(held):
                return f"one of its modules is also held by {holder}"
        for name in tensors.values():
            if path not in self.seen.inside.get(name, {path}):
                return f"its {name.removeprefix(f'{path}.')} is read by code outside of it"
        return None

    def _held_outside(self, own: set[int]) -> Iterator[tuple[object, str]]:
        """All tensors and modules that modules other than ``own`` hold, each with its holder."""
        for path, module in self.model.named_modules():
            if id(module) not in own:
                for value in module.__dict__.values():
                    yield from ((held, path or "the model itself") for held in _contents(value))

    def _traced(self, path: str, module: nn.Module) -> Piece:
        """The module as a piece.

        Raises:
            FxCompressError: it cannot be traced, its graph does not hold for all calls, or it is not accepted.
        """
        calls = self.seen.inputs(path)
        replace(refuse_nested, [(call.args, call.kwargs) for call in calls])
        module.eval()
        with torch.no_grad(), same_randomness(allowed=True), unchanged_buffers(module):
            first = without_empty(module, calls[0])
            traced = traced_of(module) if isinstance(module, GraphForward) else trace(module, first, plain=self.plain)
            traced.eval()
            for call in (first, *calls):
                check_call(module, traced, call)
        self.accept(path, traced, first)
        return Piece(path, traced, first)

    def _in_pieces(self) -> set[int]:
        return {id(m) for path in self.pieces for m in self.model.get_submodule(path).modules()}

    def _reached(self, path: str, names: frozenset[str], opened: frozenset[str]) -> str | None:
        """How the code outside of a piece may see what is in it."""
        module = self.model.get_submodule(path)
        name = path.removesuffix(f".{ORIGINAL}").rpartition(".")[2]
        if name in opened:
            return f"may take {name} apart"
        called = [f for n, f in methods(own_class(module)) if n != "forward" and n in names]
        names |= names_in(with_called(called))
        inner = [n for n, child in module.named_children() if any(True for _ in child.parameters())]
        inner += [name for name, _ in module.named_parameters(recurse=False)]
        found = next((name for name in inner if name in names), None)
        return None if found is None else f"names {found}, perhaps that of this module"


def _contents(value: Any) -> Iterator[Any]:  # noqa: ANN401 - an attribute of a module
    """The tensors and modules in nested containers."""
    if isinstance(value, Tensor | nn.Module):
        yield value
    elif isinstance(value, dict):
        yield from _contents(list(value.values()))
    elif isinstance(value, tuple | list | set):
        for item in value:
            yield from _contents(item)


def _has_nothing_to_cut(module: object) -> bool:
    """Whether a layer is the same for any number of channels, as the one activation that all of a network shares."""
    if isinstance(module, nn.Module) and not any(True for _ in (*module.parameters(), *module.buffers())):
        home = type(module).__module__
        return isinstance(module, nn.Identity) or home in {f"torch.nn.modules.{each}" for each in _WITHOUT_CHANNELS}
    return False


def _short(error: Exception) -> str:
    """The last reason of an error, on one line."""
    text = str(error).rpartition("Nor can it be traced by running it on the example inputs: ")[2]
    return text.split("\n")[0]
