"""What code leaves on its modules from one run to the next, past parameters and buffers: plain attributes.

A graph runs none of it. A result that is kept for others to look at, or a table that is made once, does no harm: each
run of the graph computes it anew. A count of runs that something is computed from does, as the graph has it for good.
"""

import copy
from typing import Any, NoReturn

from torch import nn

from fxcompress.errors import TraceError

_OWN = frozenset(vars(nn.Module()))
_OF_TRACER = "_tensor_constant"  # under names that begin so, torch.fx keeps tensors that code makes of nothing


class Memory:
    """The plain attributes of the modules of ``root`` before a run, and what lists, dicts and sets on them held."""

    def __init__(self, root: nn.Module) -> None:
        self._before: list[tuple[str, dict[str, Any], dict[str, tuple[Any, Any]]]] = []
        for path, module in root.named_modules():
            table = vars(module)
            self._before.append((path, table, {key: (table[key], _content(table[key])) for key in _plain(table)}))

    def changed(self) -> dict[str, object]:
        """What was in the attributes that are others now, by their names; None where there was none."""
        found: dict[str, object] = {}
        for path, table, before in self._before:
            for key in _plain({**before, **table}):
                value, content = before.get(key, (None, None))
                now = table.get(key)
                if now is value and content is None and key in before:  # nothing that something could be put into
                    continue
                same = now == value if _is_simple(now) and type(now) is type(value) else now is value
                if not same or not _alike(content, _content(now)):
                    found[f"{path}.{key}".lstrip(".")] = value
        return found

    def restore(self) -> None:
        """Put back what was there."""
        for _, table, before in self._before:
            for key in [key for key in _plain(table) if key not in before]:
                del table[key]
            for key, (value, content) in before.items():
                if content is not None and not _alike(content, _content(value)):
                    value.clear()
                    value.extend(content) if isinstance(value, list) else value.update(content)
                table[key] = value


def _plain(table: dict[str, Any]) -> list[str]:
    return [key for key in table if key not in _OWN and not key.startswith(_OF_TRACER)]


def _is_simple(value: object) -> bool:
    return isinstance(value, bool | int | float | str)


def _content(value: Any) -> Any:  # noqa: ANN401 - an attribute of a module
    """A copy of a list, dict or set; None of anything else."""
    return copy.copy(value) if type(value) in {list, dict, set} else None


def _alike(a: Any, b: Any) -> bool:  # noqa: ANN401 - two of those copies
    """Whether two lists, dicts or sets hold the very same objects."""
    if type(a) is not type(b) or a is None:
        return a is b
    if isinstance(a, set):
        return bool(a == b)
    pairs = [*zip(a, b, strict=False), *(zip(a.values(), b.values(), strict=False) if isinstance(a, dict) else ())]
    return len(a) == len(b) and all(x is y or (_is_simple(x) and x == y) for x, y in pairs)


class Unread:
    """Stands for a number that a run may count on, and must not use otherwise.

    Args:
        name: of the attribute.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def _counted(self, other: object) -> "Unread":
        return self if isinstance(other, bool | int | float | Unread) else self._used()

    def _used(self, *_: object) -> NoReturn:
        raise carried_over(self._name)

    @property
    def refusal(self) -> TraceError:
        """The error for one that something is computed from."""
        return carried_over(self._name)

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __mod__ = __floordiv__ = __truediv__ = _counted
    __bool__ = __int__ = __float__ = __index__ = __len__ = __iter__ = __str__ = __hash__ = _used
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _used


def carried_over(name: str) -> TraceError:
    """The error for an attribute that takes something from one run to the next."""
    return TraceError(
        f"it sets its attribute {name} while it runs, and the next run may read it; a graph cannot do that\n"
        "  write into a buffer in place (copy_), or compute the value anew in each run"
    )
