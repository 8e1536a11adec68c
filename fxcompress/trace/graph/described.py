"""The nodes of a graph as the user knows them: layers of the model, and ops in lines of its code.

A node's own name (``features_2``, ``add_3``) is made by the tracer. Records keep it, as it is unique; texts for people
are made of a :class:`Place`.
"""

from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from fxcompress.trace.code.locations import line_of, short
from fxcompress.trace.graph.calls import IN_PLACE_OPERATORS

LAYER_KEY = "fxcompress_module"
"""Metadata of a node that calls a function in the place of a layer: the path of the layer."""

OP_KEY = "fxcompress_op"
"""Metadata of a node that stands in the place of another op: the name of that op."""

_STACK = "nn_module_stack"
_ENDS = {"placeholder": "input", "get_attr": "parameter"}
_IN_WORDS = {"getitem": "indexing", "setitem": "assignment", "getattr": "attribute"}
_IN_PLACE = {function.__name__ for function in IN_PLACE_OPERATORS}


@dataclass(frozen=True, slots=True)
class Place:
    """Where in a model a node of its graph is. All fields are plain: ``json.dumps(dataclasses.asdict(place))`` works.

    >>> str(Place("layer1_0_conv1", "layer1.0.conv1", kind="Conv2d", name="layer1.0.conv1"))
    'Conv2d layer1.0.conv1'
    >>> str(Place("add_3", "layer1.0", "resnet.py", 102, kind="add"))
    'add in layer1.0 at resnet.py:102'

    Attributes:
        node: the graph node; "" for none.
        module: path of the layer, or of the module whose code calls an op; "" for the network itself.
        file: of the user's code, "" where it is not known.
        line: in that file, 0 where it is not known.
        kind: the class of a layer, the name of an op, ``input``, ``parameter`` or ``output``.
        name: the path of a layer or a parameter, the name of an input; "" for an op.
    """

    node: str = ""
    module: str = ""
    file: str = ""
    line: int = 0
    kind: str = ""
    name: str = ""

    def __str__(self) -> str:
        return f"{self.kind} {self.name}" if self.name else self.in_full

    @property
    def in_full(self) -> str:
        """The same with the line of code for layers too; they need none to be found."""
        inside = f" in {self.module}" if self.module else ""
        where = f" at {short(self.file)}:{self.line}" if self.file else ""
        if self.name:
            return f"{self.kind} {self.name}{where}"
        if self.kind:
            return f"{self.kind}{inside}{where}" if inside or where else f"{self.kind} (node {self.node})"
        return f"node {self.node}" if self.node else ""

    def within(self, path: str) -> "Place":
        """The same, named from outside of the module at ``path``."""
        module, name = (f"{path}.{inner}" if inner else "" for inner in (self.module, self.name))
        return replace(self, node=f"{path}.{self.node}", module=module or path, name=name)


NOWHERE = Place()


def place_of_node(node: fx.Node) -> Place:
    """Where a node is."""
    file, line = line_of(node.stack_trace or "")
    owner, kind = _owner(node)
    path = str(node.target) if node.op == "call_module" else node.meta.get(LAYER_KEY, "")
    op = node.meta.get(OP_KEY, "")
    if op or not (path or node.op in _ENDS):
        return Place(node.name, owner, file, line, op or _name_of_op(node))
    if path:
        return Place(node.name, path, file, line, (kind if owner == path else "") or _class_of(node, path), path)
    return Place(node.name, owner, file, line, _ENDS[node.op], str(node.target))


def _owner(node: fx.Node) -> tuple[str, str]:
    """The path and the class of the module whose code made a node, as far as torch.fx has kept them."""
    for path, kind in reversed(node.meta.get(_STACK, {}).values()):
        return str(path), kind.__name__ if isinstance(kind, type) else str(kind).rstrip("'>").rpartition(".")[2]
    return "", ""


def _class_of(node: fx.Node, path: str) -> str:
    module: Any = node.graph.owning_module
    try:
        return type(module.get_submodule(path)).__name__
    except AttributeError:  # no module, or none of that name
        return "layer"


def _name_of_op(node: fx.Node) -> str:
    target = node.target
    name = target if isinstance(target, str) else getattr(target, "__name__", type(target).__name__)
    name = name.partition(".")[0]  # without the overload of an op
    return f"{name[1:]}_" if name in _IN_PLACE else _IN_WORDS.get(name, name)
