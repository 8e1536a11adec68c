"""What code leaves on its modules from one run to the next.

A graph runs none of it. A result that is kept for others to look at, or a table that is made once, does no harm: each
run of the graph computes it anew. A count of runs that something is computed from does, as the graph has it for good.
"""

from collections.abc import Iterable, Iterator
from typing import Any, NoReturn

import torch
from torch import fx, nn

from fxcompress.errors import TraceError
from fxcompress.trace.effects.contents import Content, is_same

_OWN = frozenset(vars(nn.Module()))
_OF_TRACER = "_tensor_constant"  # under names that begin so, torch.fx keeps tensors that code makes of nothing


class PlainAttributes:
    """The attributes of the modules of ``root`` before a run, but for buffers, and what was in containers and objects.

    Which modules and parameters there are is part of that.
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


class AllAttributes:
    """The attributes of a model before a run: tensors as well, and not what is in containers."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._held = [table[key] for _, table, key in _attributes(model)]  # or another object may get the same id
        self._before = self._read()

    def _read(self) -> dict[str, object]:
        return {name: _stamp(table[key]) for name, table, key in _attributes(self._model)}

    def changed(self) -> frozenset[str]:
        """Names of the attributes that are others now."""
        after = self._read()
        found = {
            name
            for name in {**self._before, **after}
            if name not in after or name not in self._before or self._before[name] != after[name]
        }
        inside = tuple(f"{name}." for name in found)  # of another module in the place of one, all is different
        return frozenset(name for name in found if not name.startswith(inside))


class _Unset:
    """Stands for an attribute that must not be read before it is set; any use of it fails."""

    def __bool__(self) -> bool:
        raise TraceError("an attribute is read before it is set")

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        raise TraceError("an attribute is read before it is set")


def unset(model: nn.Module, names: frozenset[str]) -> None:
    """Make every use of the named attributes fail, until something is assigned to them."""
    for name in names:
        path, _, key = name.rpartition(".")
        module = model.get_submodule(path)
        tables = (module._parameters, module._buffers, module.__dict__)
        table: dict[str, Any] = next((t for t in tables if key in t), module.__dict__)
        number = isinstance(table.get(key), int | float) and not isinstance(table[key], bool)
        table[key] = Unread(name) if number else _Unset()


def _attributes(model: nn.Module) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Name, table and key in the table of each attribute of each module, a module among them."""
    for path, module in model.named_modules():
        for table in (module._parameters, module._buffers, module._modules, module.__dict__):
            for key in table.keys() - _TABLES:
                yield f"{path}.{key}" if path else key, table, key


_TABLES = {"_parameters", "_buffers", "_modules"}


def _stamp(value: object) -> object:
    """What stands for a value of an attribute: it differs when the value does."""
    if isinstance(value, bool | int | float | str | None):
        return type(value), value
    if isinstance(value, list | tuple | dict | set):
        return id(value), len(value)
    if isinstance(value, torch.Tensor) and value.layout == torch.strided:
        # ``self.count += 1`` writes to the tensor, and then puts it in its own place under another name for the memory.
        memory = value.untyped_storage()._cdata  # noqa: SLF001 - the only name of memory that holds no data
        return memory, value.dtype, value.shape, value.stride(), value.storage_offset(), value.requires_grad
    return id(value)
