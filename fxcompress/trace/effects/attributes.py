"""What code leaves on its modules from one run to the next, past parameters and buffers: plain attributes.

A graph runs none of it. A result that is kept for others to look at, or a table that is made once, does no harm: each
run of the graph computes it anew. A count of runs that something is computed from does, as the graph has it for good.
"""

from collections.abc import Iterable
from typing import Any, NoReturn

from torch import fx, nn

from fxcompress.errors import TraceError
from fxcompress.trace.effects.contents import Content, is_same

_OWN = frozenset(vars(nn.Module()))
_OF_TRACER = "_tensor_constant"  # under names that begin so, torch.fx keeps tensors that code makes of nothing


class Memory:
    """The attributes of the modules of ``root`` before a run, and what was in containers and objects there.

    That is plain attributes, and which modules and parameters there are; buffers are another matter.
    """

    def __init__(self, root: nn.Module) -> None:
        self._before: list[tuple[str, dict[str, Any], dict[str, Any]]] = []
        self._held: dict[int, Content] = {}
        tables = [
            (path, table)
            for path, module in root.named_modules()
            for table in (vars(module), module._modules, module._parameters)
        ]
        for path, table in tables:
            attributes = {key: table[key] for key in _plain(table)}
            self._before.append((path, table, attributes))
            self._enter([value for value in attributes.values() if not isinstance(value, nn.Module | nn.Parameter)])

    def _enter(self, values: list[Any]) -> None:
        """Note what values hold, and what is in them."""
        while values:
            value = values.pop()
            if isinstance(value, tuple):
                values += value
            content = None if id(value) in self._held else Content.of(value)
            if content is not None:
                self._held[id(value)] = content
                values += content.inside()

    def changed(self) -> dict[str, object]:
        """What was in the attributes that are others now, by their names; None where there was none."""
        others = {key for key, content in self._held.items() if not content.is_there()}
        found: dict[str, object] = {}
        for path, table, before in self._before:
            for key in _plain({**before, **table}):
                value, now = before.get(key), table.get(key)
                if key not in before or not is_same(now, value) or (others and self._leads_to(value, others)):
                    found[f"{path}.{key}".lstrip(".")] = value
        return found

    def _leads_to(self, value: object, others: set[int]) -> bool:
        """Whether a value is one of others, or held one of them, however deep."""
        seen, left = set[int](), [value]
        while left:
            item = left.pop()
            if id(item) in others:
                return True
            if isinstance(item, tuple):
                left += item
            if id(item) in self._held and id(item) not in seen:
                seen.add(id(item))
                left += self._held[id(item)].inside()
        return False

    def restore(self) -> None:
        """Put back what was there."""
        for content in self._held.values():
            if not content.is_there():
                content.put_back()
        for _, table, before in self._before:
            for key in [key for key in _plain(table) if key not in before]:
                del table[key]
            table.update(before)


def _plain(table: dict[str, Any]) -> list[str]:
    return [key for key in table if key not in _OWN and not key.startswith(_OF_TRACER)]


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


def refuse_layers_set(names: Iterable[str], graph: fx.Graph) -> None:
    """Refuse a graph that calls a layer of which the code sets a number first: it would call the layer as it is.

    Args:
        names: of the attributes that the code has set.
        graph: that was made of it.

    Raises:
        TraceError: it calls such a layer.
    """
    layers = {str(node.target) for node in graph.nodes if node.op == "call_module"}
    found = [
        name for name in names if name.rpartition(".")[0] in layers and not name.rpartition(".")[2].startswith("_")
    ]
    if found:
        layer, _, number = min(found).rpartition(".")
        raise TraceError(
            f"it sets {number} of its layer {layer} while it runs; a graph calls the layer as it is\n"
            "  call the function of the layer (torch.nn.functional) with that value, or set it outside of forward"
        )


def carried_over(name: str) -> TraceError:
    """The error for an attribute that takes something from one run to the next."""
    return TraceError(
        f"it sets its attribute {name} while it runs, and the next run may read it; a graph cannot do that\n"
        "  write into a buffer in place (copy_), or compute the value anew in each run"
    )
