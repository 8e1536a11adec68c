"""Conditions on values that only stop a run: ``assert not x.isnan().any()``, ``if bad.any(): raise ValueError(...)``.

No graph goes by values. But where one side of a decision does nothing but raise, a run that comes to its end has taken
the other one. So that one is traced, and the graph does not ask; the user is told once for each line.
"""

import dis
import logging
import sys
from collections.abc import Iterable
from functools import cache
from types import CodeType

from torch import fx

from fxcompress.trace.code.frames import users_frames
from fxcompress.trace.code.locations import place
from fxcompress.trace.graph.calls import function_name

_LOGGER = logging.getLogger("fxcompress")
_ENDS = ("RETURN", "YIELD", "SEND", "FOR_ITER", "STORE_ATTR", "STORE_SUBSCR", "STORE_GLOBAL", "STORE_DEREF", "DELETE")

_CALLS = ("PRECALL", "CALL")
_READS = frozenset({"LOAD_ATTR", "LOAD_METHOD"})
_STEPS = ("LOAD_", "PUSH_NULL", "BINARY_", "UNARY_", "COMPARE_OP", "SWAP", "COPY", "DUP_TOP", "ROT_")


def outcome_that_goes_on() -> bool | None:
    """The value of the condition that the user's code has just asked for with which it does not raise; None if none."""
    outcome = _goes_on()
    if outcome is not None:
        tell_of_left_out(place())
    return outcome


def only_stops(outcome: object) -> bool:
    """Whether code that has just asked for a condition does nothing but raise an error if it comes out otherwise."""
    return type(outcome) is bool and _goes_on() is outcome


def _goes_on() -> bool | None:
    frames = list(users_frames())
    outcome = _outcome(frames[0].f_code, frames[0].f_lasti) if frames else None
    caught = outcome is not None and any(_may_be_caught(frame.f_code, frame.f_lasti) for frame in frames)
    return None if caught else outcome


def is_only_compared() -> bool:
    """Whether the number that the user's code has just asked a tensor for goes into such a condition alone.

    ``assert lengths.max().item() <= n`` computes the same with the tensor in place of the number.
    """
    frames = list(users_frames())
    return bool(frames) and _leads_to_a_condition(frames[0].f_code, frames[0].f_lasti)


def drop_conditions(conditions: Iterable[fx.Node]) -> None:
    """Erase nodes, and what they alone were computed from, if nothing else reads them."""
    left, erased = list(conditions), set[fx.Node]()
    while left:
        node = left.pop()
        pure = node.op in {"call_function", "call_method"} and not node.is_impure()
        if pure and not node.users and not function_name(node).endswith("_") and node not in erased:
            left += node.all_input_nodes
            node.graph.erase_node(node)
            erased.add(node)


@cache
def tell_of_left_out(where: str) -> None:
    """Tell that a check on values is not in the graph; once."""
    _LOGGER.warning("the check of values%s is left out: a graph does not go by values", where)


@cache
def _may_be_caught(code: CodeType, here: int) -> bool:
    """Whether code has a handler for errors at an instruction: a run goes on there, perhaps."""
    if sys.version_info < (3, 11):
        return any(step.opname.startswith("SETUP_") for step in dis.get_instructions(code))
    return any(entry.start <= here < entry.end for entry in dis.Bytecode(code).exception_entries)  # type: ignore[attr-defined]


@cache
def _outcome(code: CodeType, asked: int) -> bool | None:
    """See :func:`outcome_that_goes_on`.

    Args:
        code: of the function.
        asked: offset of the instruction that asks whether something is true.
    """
    steps = [step for step in dis.get_instructions(code) if step.opname not in {"CACHE", "EXTENDED_ARG", "NOT_TAKEN"}]
    here = next((i for i, step in enumerate(steps) if step.offset >= asked), len(steps))
    if here + 1 < len(steps) and steps[here].opname == "TO_BOOL":
        here += 1
    if here + 1 >= len(steps) or "JUMP" not in steps[here].opname or "_IF_" not in steps[here].opname:
        return None
    jumps = "IF_TRUE" in steps[here].opname
    if not jumps and "IF_FALSE" not in steps[here].opname:
        return None
    target = next((i for i, step in enumerate(steps) if step.offset >= steps[here].argval), len(steps))
    if _raises(steps, here + 1):
        return jumps
    return not jumps if _raises(steps, target) else None


@cache
def _leads_to_a_condition(code: CodeType, asked: int) -> bool:
    """Whether what a call returns meets operators alone, on the way to a decision that only stops a run."""
    height = 1  # of the stack, from what the call has returned to its top
    for step in dis.get_instructions(code):
        if step.offset <= asked or step.opname in {"CACHE", "EXTENDED_ARG", "NOT_TAKEN", "TO_BOOL"}:
            continue
        if "JUMP" in step.opname:
            return height == 1 and _outcome(code, step.offset) is not None
        taken = (step.arg or 0) + 2 if step.opname.startswith(_CALLS) else step.opname in _READS
        if not step.opname.startswith((*_CALLS, *_STEPS)) or taken >= height:
            return False
        height = max(1, height + dis.stack_effect(step.opcode, step.arg))
    return False


def _raises(steps: list[dis.Instruction], start: int) -> bool:
    """Whether the code from an instruction on does nothing but to raise an error."""
    for i, step in enumerate(steps[start:], start):
        if step.opname == "RAISE_VARARGS":
            return True
        if step.opname == "JUMP_FORWARD":  # as behind the second half of ``if not 0 <= n < 5``
            return _raises(
                steps, next((j for j in range(i + 1, len(steps)) if steps[j].offset >= step.argval), len(steps))
            )
        if "JUMP" in step.opname or step.opname.startswith(_ENDS):
            return False
    return False
