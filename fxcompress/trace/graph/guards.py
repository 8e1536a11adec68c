"""What a concrete trace leaves in the graph, besides ops: checks that an input takes the path that was traced.

A graph that was recorded on one input knows one side of each branch and one length of each loop. Each decision that the
model's code took on a size is therefore a node of the graph, which takes the decision again and raises when it comes
out in another way. Such nodes have no users; they are marked as impure, so that no pass removes them.
"""

from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import has_side_effect

from fxcompress.errors import PathError
from fxcompress.trace.graph.autocast import INFERRING, autocast_is_on, inference_mode
from fxcompress.trace.graph.plain_values import PLAIN

ONLY_STOPS = "fxc_only_stops"
"""In the meta of a check: where the decision comes out in another way, the model raises an error."""


@fx.wrap
@has_side_effect
def check(decision: object, outcome: object, sizes: tuple[object, ...], where: str) -> None:
    """Raise unless a decision comes out as it did when the network was traced.

    Args:
        decision: as it comes out now.
        outcome: as it came out then.
        sizes: what it was computed from. No part of the check; a pass that changes one of them finds it here, and asks
            for these very sizes instead.
        where: the line of the model that takes it.
    """
    if isinstance(decision, Tensor):  # as sizes are while torch.jit.trace or the old exporter of torch.onnx look on
        decision = decision.item()
    if decision != outcome:
        if decision == INFERRING:
            raise PathError(
                f"inference mode is on: the code of the network asks for that{where}, and was traced outside of it\n"
                "  run it under torch.no_grad() instead"
            )
        if not sizes:
            raise PathError(
                f"autocast is {'on' if decision else 'off'}, and was {'on' if outcome else 'off'} when the network was "
                f"traced: its code asks for that{where}, and goes another way\n"
                f"  call compress or prune {'under' if decision else 'outside of'} torch.autocast"
            )
        only_sizes = all(type(size) is int for size in sizes)
        raise PathError(
            f"this input takes another path through the network than the one that was traced{where}: a decision on "
            f"{'sizes' if only_sizes else 'what it reads off tensors,'} {sizes} came out as {decision}, and was "
            f"{outcome} in the trace\n  trace the network again with example inputs "
            + ("of this size, or keep to sizes that take the same path" if only_sizes else "like this one")
        )


@fx.wrap
@has_side_effect
def shape_of(tensor: Tensor, rank: int, where: str) -> torch.Size:
    """The shape of a tensor that must have as many dims as it had when the network was traced."""
    check(tensor.dim(), rank, tuple(tensor.shape), where)
    return tensor.shape


@fx.wrap
@has_side_effect
def check_dtypes(
    found: tuple[torch.dtype, ...], seen: tuple[tuple[torch.dtype, ...], ...], places: tuple[str, ...]
) -> None:
    """Raise unless the dtypes that a network reads are together as in one of the precisions that it was traced in.

    Args:
        found: the dtypes as they are now.
        seen: as they were, for each precision.
        places: the line of the model that reads each of them.
    """
    if found in seen:
        return
    known = max(seen, key=lambda dtypes: sum(a == b for a, b in zip(found, dtypes, strict=True)))
    at = next(i for i, (a, b) in enumerate(zip(found, known, strict=True)) if a != b)
    others = " or ".join(sorted({str(dtypes[at]) for dtypes in seen}))
    raise PathError(
        f"the dtype of a tensor that is read{places[at]} is {found[at]}, and was {others} when the network was traced"
        "\n  trace the network again in this precision: what it does may depend on that"
    )


@fx.wrap
def limit_of(dtype: torch.dtype, name: str) -> float:
    """A number of ``torch.finfo``.

    >>> limit_of(torch.float16, "max")
    65504.0
    """
    limit: float = getattr(torch.finfo(dtype), name)
    return limit


@fx.wrap
@has_side_effect
def check_argument(value: object, form: object, name: str, *, exact: bool = False) -> None:
    """Raise unless an argument of forward is of the form (see :func:`form_of`) that it was traced with."""
    found = form_of(value, exact=exact)
    if found != form:
        raise PathError(
            f"argument {name} is {_in_words(found)}; the network was traced with {_in_words(form)}\n"
            "  what is no tensor, and the rank of what is one, is part of the traced graph: trace the network again "
            "with example inputs like this one"
        )


@fx.wrap
@has_side_effect
def check_given(value: Tensor | None, name: str) -> None:  # anything else as well; scripts need to know one
    """Raise where an argument that may be None is None, and was given when torch.fx traced the network.

    ``mask is None`` comes out as False then, unseen, and what the code makes of that is in the graph.
    """
    if not torch.jit.is_scripting() and value is None:  # type: ignore[attr-defined]
        raise PathError(
            f"argument {name} is None; the network was traced with a tensor\n"
            "  what the model's code does without it is not in the graph: trace the network again with example inputs "
            "that leave it out, or pass a tensor that does as much as None"
        )


@fx.wrap
@has_side_effect
def check_left_out(value: Tensor | None, name: str) -> None:  # anything else as well; scripts need to know one
    """Raise where an argument is given that was left out, and so None, when torch.fx traced the network."""
    if not torch.jit.is_scripting() and value is not None:  # type: ignore[attr-defined]
        raise PathError(
            f"argument {name} is given; the network was traced with {name}=None, its default, as the example inputs "
            "leave it out\n  what the model's code does with it is not in the graph: trace the network again with "
            "example inputs that hold it"
        )


def form_of(value: object, *, exact: bool = False) -> tuple[Any, ...]:
    """What of an argument is fixed by a trace: the rank of tensors, the keys and lengths of containers, other values.

    The values of numbers count where they are ``exact``; others are checked where the model reads them.
    """
    if isinstance(value, Tensor):
        return ("tensor of rank", value.dim())
    if isinstance(value, dict):
        return ("dict", tuple((key, form_of(item, exact=exact)) for key, item in value.items()))
    if isinstance(value, tuple | list):
        return (type(value).__name__, tuple(form_of(item, exact=exact) for item in value))
    kind = type(value)
    if kind in {int, float} and not exact:
        return (kind.__name__,)
    return (kind.__name__, value) if kind in PLAIN else ("object", f"{kind.__module__}.{kind.__qualname__}")


def _in_words(form: Any) -> str:  # noqa: ANN401 - as form_of returns it
    """What :func:`form_of` has found, for people.

    >>> _in_words(("tuple", (("tensor of rank", 2), ("NoneType", None), ("int",))))
    'a tuple of a tensor of rank 2, None, an int'
    """
    kind, *rest = form
    if kind == "tensor of rank":
        return f"a tensor of rank {rest[0]}"
    if kind == "object":
        return f"an object of {rest[0]}"
    if kind == "dict":
        return f"a dict of {', '.join(f'{key!r}: {_in_words(item)}' for key, item in rest[0]) or 'nothing'}"
    if kind in {"tuple", "list"}:
        return f"a {kind} of {', '.join(map(_in_words, rest[0])) or 'nothing'}"
    return repr(rest[0]) if rest else f"{'an' if kind == 'int' else 'a'} {kind}"


_ALL = frozenset({check, check_dtypes, shape_of, check_argument, check_given, check_left_out})


def is_check(node: fx.Node) -> bool:
    """Whether a node is a check; it stays whatever becomes of its operands."""
    return node.op == "call_function" and node.target in _ALL


def asks_for_gradients(node: fx.Node) -> bool:
    """Whether a node checks whether a tensor requires gradients, which is so or not for the same input."""
    decision = node.args[0] if node.target is check else None
    return isinstance(decision, fx.Node) and decision.target is getattr and str(decision.args[1]) == "requires_grad"


def asks_for_autocast(node: fx.Node) -> bool:
    """Whether a node checks whether autocast is on, which is so or not for the same input."""
    decision = node.args[0] if node.target is check else None
    return isinstance(decision, fx.Node) and decision.target is autocast_is_on


def asks_for_mode(node: fx.Node) -> bool:
    """Whether a node checks what does not depend on the input: are there gradients, is there autocast, and the like."""
    decision = node.args[0] if node.target is check else None
    inferring = isinstance(decision, fx.Node) and decision.target is inference_mode
    return inferring or asks_for_gradients(node) or asks_for_autocast(node)


def asserts_values(node: fx.Node, args: tuple[Any, ...]) -> bool:
    """Whether a node, given such arguments, checks values of a tensor that must be true, and returns nothing."""
    return node.target is torch._assert and isinstance(args[0], Tensor)  # noqa: SLF001 - as torch.fx writes it
