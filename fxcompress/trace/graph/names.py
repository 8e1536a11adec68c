"""Names of modules and tensors that a graph's code cannot read as ``self.name``.

Keys of a ModuleDict such as "for", "a b" or 'say "a"' are no words of Python. torch.fx writes Python code, in which it
quotes what is no identifier; keywords, quotes and backslashes it forgets. And a model may call a layer ``graph``, a
buffer ``step`` or a parameter ``weights``, where the class of the traced model has an attribute of that name, which
Python finds first. What a module holds under such a name stays in its tables, and in its state_dict.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from keyword import iskeyword
from typing import Any
from unittest.mock import patch

import torch.fx.graph
from torch import fx, nn

from fxcompress.trace.graph.lookups import quick_code, twofold

_TABLES = ("_modules", "_parameters", "_buffers")


def fetch_attr(module: nn.Module, target: str) -> Any:  # noqa: ANN401 - a module, a tensor, and so on
    """What a path of names leads to; what a module holds under a name comes before an attribute of its class.

    >>> fetch_attr(nn.Sequential(nn.ReLU()), "0")
    ReLU()
    """
    found: Any = module
    for name in target.split(".") if target else ():
        tables = (found._modules, found._parameters, found._buffers) if isinstance(found, nn.Module) else ()
        table = next((table for table in tables if name in table), None)
        found = getattr(found, name) if table is None else table[name]
    return found


def hides(module: nn.Module, name: str) -> bool:
    """Whether ``module.name`` is another thing than what the module holds under that name."""
    own = any(name in module.__dict__.get(table, ()) for table in _TABLES)
    return own and (name in module.__dict__ or hasattr(type(module), name))


def _hidden_in(module: nn.Module) -> frozenset[str]:
    names = (*module._modules, *module._parameters, *module._buffers)
    return frozenset(name for name in names if hides(module, name))


def past_class(module: nn.Module) -> nn.Module:
    """``module`` itself or, where its class hides something that it holds, a plain module that holds the same."""
    if not _hidden_in(module):
        return module
    view, plain = nn.Module(), nn.Module().__dict__.keys() - {*_TABLES, "training"}
    view.__dict__.update({name: value for name, value in module.__dict__.items() if name not in plain})
    for name in _hidden_in(module):
        view.__dict__.pop(name, None)
    return view


def attribute(base: str, target: str, hidden: frozenset[str] = frozenset()) -> str:
    """The expression that reads an attribute, whatever its name.

    >>> attribute("self", "layers.for.weight")
    "getattr(self.layers, 'for').weight"
    >>> attribute("self", "graph.weight", frozenset({"graph"}))
    "self.__getattr__('graph').weight"
    """
    first = base
    for name in target.split("."):
        plain = name.isidentifier() and not iskeyword(name)
        if base is first and name in hidden:
            base = f"{base}.__getattr__({name!r})"
        else:
            base = f"{base}.{name}" if plain else f"getattr({base}, {name!r})"
    return base


@contextmanager
def any_names(module: nn.Module) -> Iterator[None]:
    """Within it, torch.fx writes code that is right for any name that ``module`` holds something under.

    And quick: :func:`fxcompress.trace.graph.lookups.readable` is what of it may be shown.
    """
    hidden = _hidden_in(module)

    def expression(base: str, target: str) -> str:
        read = attribute(base, target, hidden)
        return read if base != "self" or target.partition(".")[0] in hidden else twofold(module, target, read)

    with patch.object(torch.fx.graph, "_format_target", expression), quick_code():
        yield


def compiled(module: nn.Module, graph: fx.Graph) -> Any:  # noqa: ANN401 - a function
    """The ``forward`` that a graph is in code, for an object that holds what ``module`` does."""
    plain = fx.GraphModule(nn.Module(), fx.Graph())
    with any_names(module):
        plain.graph = graph
    return type(plain).forward
