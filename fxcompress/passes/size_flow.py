"""Follows the sizes that a cut changes, through the numbers and tensors that are computed from them.

``q * q.shape[-1] ** -0.5`` multiplies by another number once ``q`` has fewer channels. A changed size may say how large
something is, where labels prove that it is right; it may not flow into a value, and not choose entries of another dim.
Where it would, the node gets what it was given before the cut:

    size = q.shape[3]                       12      8
    scale = size ** -0.5                 0.288  0.353
    y = scores * scale          ->      y = scores * 0.288

A number may also depend on the size of the input, as ``x.shape[1] * x.shape[2]`` does. Then what computes it is written
again, with numbers in the place of those sizes alone that are a matter of the network.
"""

import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxcompress.channels.factories import FILL, SIZES, SPREAD, kind_of
from fxcompress.channels.rules.indexing import INDEX, picked_dims
from fxcompress.channels.rules.movement import CAT, DIAGONAL, MOVEMENT, PERMUTE, RESHAPE, RESTRIDE
from fxcompress.channels.rules.places import ANYWHERE
from fxcompress.channels.rules.pointwise import SAME
from fxcompress.channels.size_reads import counted_by, read_of
from fxcompress.channels.survivors import has_own_labels
from fxcompress.channels.values import LabelTensor, Step, Value, find, leaves
from fxcompress.trace.basics.equality import same_values
from fxcompress.trace.graph.calls import function_name, writes_in_place
from fxcompress.trace.graph.checkpoints import MARK
from fxcompress.trace.graph.guards import is_check

FLOWS = "a size flows into its value"
STRUCTURAL = frozenset({ANYWHERE, CAT, DIAGONAL, INDEX, MOVEMENT, PERMUTE, RESHAPE, RESTRIDE, SAME, SPREAD})
"""Classes whose numbers are sizes and places, which the check of labels and positions covers."""

_CONVOLUTIONS = tuple(f"conv{kind}{n}d" for kind in ("", "_transpose") for n in (1, 2, 3))
_SIZE_ARGUMENTS: dict[str, tuple[int, str]] = {
    **dict.fromkeys(_CONVOLUTIONS, (6, "groups")),
    "group_norm": (1, "num_groups"),
    "layer_norm": (1, "normalized_shape"),
    "rms_norm": (1, "normalized_shape"),
    "pad": (1, "pad"),
    **{f"max_unpool{n}d": (5, "output_size") for n in (1, 2, 3)},
}
"""Functions of several ops with an argument that is a size or a place: its position and name."""
_RANDOM = ("rand", "normal", "bernoulli", "multinomial", "dropout", "uniform", "poisson", "exponential")

_PLACE = ("stack_trace", "nn_module_stack", MARK)
"""In a node's meta: where it was called. The rest says what it is, such as the layer that finalize makes of it.

What is written again for another node stands where that one does, and is what it was.
"""


class UnfreezableError(Exception):
    """What a node is given cannot be written as it was before the cut."""


class SizeFlow:
    """The nodes of one graph whose result has changed with a size.

    Args:
        before: the results of the nodes of the original graph, a Value in place of each labelled tensor.
        now: the same of the cut graph, as far as it has run.
        env: the same by node, as tensors.
    """

    def __init__(self, before: Mapping[str, Any], now: dict[str, Any], env: dict[fx.Node, Any]) -> None:
        self.before, self.now, self.env = before, now, env
        self._moved: dict[fx.Node, None] = {}
        self._frozen: dict[fx.Node, Any] = {}
        self._made: list[fx.Node] = []

    def moved(self, node: fx.Node) -> list[fx.Node]:
        """The inputs of a node that have changed with a size."""
        return [used for used in node.all_input_nodes if used in self._moved]

    def note(self, node: fx.Node, result: object) -> None:
        """Remember whether what a node returned has changed with a size, or may on other inputs."""
        if find(LabelTensor, result) or find(Value, self.before[node.name]):
            return  # the check of labels sees its size
        reads = self._reads_size(node) or any(map(self._labelled, node.all_input_nodes))
        if reads and not find(Tensor, result):
            depends = not same(self.before[node.name], result)
        else:
            depends = bool(self.moved(node))
        if depends:
            self._moved[node] = None

    def misuse(self, node: fx.Node, result: object, steps: Sequence[Step]) -> str:
        """Why a changed size must not be used as ``node`` uses it; "" if it may."""
        moved = set(self.moved(node))
        moved -= set(_size_arguments(node)) if moved else set()
        if not moved or is_check(node):
            return ""
        labelled = find(LabelTensor, result) or any(self._labelled(used) for used in node.all_input_nodes)
        ops = {step.op for step in steps}
        structural = bool(ops) and ops <= (STRUCTURAL | {FILL} if SPREAD in ops else STRUCTURAL)
        if any(isinstance(self.now[used.name], Tensor) for used in moved) and any(map(picked_dims, steps)):
            return FLOWS  # which entries it says is compared where it is the same for all inputs
        return FLOWS if labelled and not structural else ""

    def freeze(self, node: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of ``node`` with everything that has changed as it was before the cut.

        Raises:
            UnfreezableError: there is no way to write them.
        """
        return fx.node.map_arg((node.args, node.kwargs), lambda used: self._freeze(used, node))

    def spelled(self, node: fx.Node) -> tuple[Any, ...] | None:
        """The arguments of a node that is given all sizes as one tuple, which is computed, with each size for itself.

        ``x.view(x.size()[:-1] + (4, 6))`` has numbers that could be others; None for another node.
        """
        sizes = node.args[1] if len(node.args) == 2 else None
        if not isinstance(sizes, fx.Node) or not isinstance(self.now[sizes.name], tuple):
            return None
        return node.args[0], tuple(self._items(sizes, node))

    def _items(self, sizes: Any, user: fx.Node) -> list[Any]:  # noqa: ANN401 - an argument of a node
        """The entries of a tuple, or of the node that computes it."""
        if not isinstance(sizes, fx.Node):
            return list(sizes)
        if sizes.target is operator.add and all(isinstance(self._value(part), tuple) for part in sizes.args):
            self._made.append(sizes)  # perhaps nothing uses it any more
            return [item for part in sizes.args for item in self._items(part, user)]
        numbers = self.now[sizes.name]
        return [self._node(user, "call_function", operator.getitem, (sizes, i), {}, n) for i, n in enumerate(numbers)]

    def _value(self, argument: Any) -> Any:  # noqa: ANN401 - an argument of a node
        return self.now[argument.name] if isinstance(argument, fx.Node) else argument

    def sources(self, node: fx.Node) -> list[fx.Node]:
        """The nodes whose size has changed what ``node`` is given."""
        found, open_ = dict[fx.Node, None](), self.moved(node)
        for used in open_:
            open_ += [other for other in self.moved(used) if other not in open_]
            found.update(dict.fromkeys(other for other in used.all_input_nodes if self._labelled(other)))
        return list(found)

    def tidy(self) -> None:
        """Take out the nodes that nothing uses, of those that depend on changed sizes and those that were made."""
        for node in dict.fromkeys((*reversed(self._made), *reversed(self._moved))):
            if not node.users and not node.is_impure():
                node.graph.erase_node(node)

    def _labelled(self, node: fx.Node) -> bool:
        return bool(find(Value, self.now[node.name]))

    def _reads_size(self, node: fx.Node) -> bool:
        """Whether a node picks sizes out of a shape: of these, only some have changed."""
        source = node.args[0] if node.args else None
        return (
            node.target is operator.getitem
            and isinstance(source, fx.Node)
            and isinstance(self.now[source.name], torch.Size)
            and not any(isinstance(item, fx.Node) for item in node.args[1:])
        )

    def _freeze(self, node: fx.Node, user: fx.Node) -> Any:  # noqa: ANN401 - an argument of a node
        if node not in self._moved:
            return node
        if node not in self._frozen:
            sizes = self._count(node, user)
            sizes = self._sizes(node, user) if sizes is None else sizes
            self._frozen[node] = self._again(node, user) if sizes is None else sizes
        return self._frozen[node]

    def _count(self, node: fx.Node, user: fx.Node) -> Any:  # noqa: ANN401 - an argument of a node
        """The number of entries that a tensor had, or a part of its shape; None for a node that does not count any."""
        source = counted_by(node)
        if source is None:
            return None
        value, now = self.before[source.name], self.now[source.name]
        if not isinstance(value, Value):
            return self._product(self._freeze(source, user), user)
        cut = [d for d in range(value.rank) if value.shape[d] != now.shape[d]]
        before, left = math.prod(self._own_size(value, d) for d in cut), math.prod(now.shape[d] for d in cut)
        others = self._node(user, "call_function", operator.floordiv, (node, left), {}, self.now[node.name] // left)
        return self._node(user, "call_function", operator.mul, (others, before), {}, self.before[node.name])

    def _product(self, sizes: Any, user: fx.Node) -> Any:  # noqa: ANN401 - an argument of a node
        """The product of some sizes."""
        found: Any = 1
        for size in sizes:
            expected = self._value(found) * self._value(size)
            found = self._node(user, "call_function", operator.mul, (found, size), {}, expected)
        return found

    def _sizes(self, node: fx.Node, user: fx.Node) -> Any:  # noqa: ANN401 - an argument of a node
        """Sizes as they were, for a node that reads sizes of a tensor; None for another node."""
        read = read_of(node)
        if read is None:
            return None
        tensor, shape, item = read
        value = self.before[tensor.name]
        if not isinstance(value, Value):
            raise UnfreezableError
        now = self.now[shape.name] if shape is not None else None
        dims = range(value.rank)[item]
        if isinstance(dims, int):
            return self._own_size(value, dims)
        if now is None:
            raise UnfreezableError
        sizes = [value.shape[d] if value.shape[d] == now[d] else self._own_size(value, d) for d in dims]
        return tuple(
            self._node(user, "call_function", operator.getitem, (shape, d), {}, n) if n == now[d] else n
            for d, n in zip(dims, sizes, strict=True)
        )

    def _own_size(self, value: Value, dim: int) -> int:
        if not has_own_labels(value, dim):
            raise UnfreezableError
        return value.shape[dim]

    def _again(self, node: fx.Node, user: fx.Node) -> Any:  # noqa: ANN401 - an argument of a node
        """A node once more, with arguments as they were; a number where these are numbers."""
        name = function_name(node)
        written = writes_in_place(node) or "out" in node.kwargs
        plain = node.op in {"call_function", "call_method"} and not node.is_impure()
        if (
            written
            or not plain
            or any(word in name for word in _RANDOM)
            or any(map(self._labelled, node.all_input_nodes))
        ):
            raise UnfreezableError
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda used: self._freeze(used, user))
        before = self.before[node.name]
        if isinstance(before, int | float) and not _nodes((args, kwargs)):
            return before
        again = self._node(user, node.op, node.target, args, kwargs, before)
        again.meta |= {key: value for key, value in node.meta.items() if key not in _PLACE}
        return again

    def _node(self, user: fx.Node, op: str, target: Any, args: Any, kwargs: Any, expected: object) -> fx.Node:  # noqa: ANN401 - those of a node
        given, named = fx.node.map_arg((args, kwargs), lambda used: self.now[used.name])
        value = getattr(given[0], target)(*given[1:], **named) if op == "call_method" else target(*given, **named)
        if not same(expected, value):
            raise UnfreezableError
        with user.graph.inserting_before(user):
            node = user.graph.create_node(op, target, args, kwargs)
        node.meta = {key: user.meta[key] for key in _PLACE if key in user.meta}
        self.now[node.name] = self.env[node] = value
        self._made.append(node)
        return node


def _nodes(tree: object) -> list[fx.Node]:
    return find(fx.Node, tree)


def numbers(step: Step) -> list[Any]:
    """The numbers and the tensors without labels that a step computes with, those left out that are sizes."""
    args, kwargs, name = step.call.args, step.call.kwargs, step.op.name
    if step.op in STRUCTURAL or name in _SIZES_ONLY:
        return []
    if name in _SIZES_AT:
        args = tuple(arg for i, arg in enumerate(args) if i not in _SIZES_AT[name])
    return [
        leaf for leaf in leaves((args, kwargs, step.call.plain)) if isinstance(leaf, Tensor | int | float | complex)
    ]


def same_call(before: Step, now: Step) -> bool:
    """Whether two steps have the same numbers and no tensors beside Values. Most have, and this is quick to see."""
    a, b = before.call, now.call
    if len(a.args) != len(b.args) or a.plain or b.plain or a.kwargs or b.kwargs:
        return False
    return all(map(_same_argument, a.args, b.args))


def _same_argument(a: object, b: object) -> bool:
    if type(a) is Value:
        return type(b) is Value
    if type(a) is list:
        return type(b) is list and len(a) == len(b) and all(map(_same_argument, a, b))
    return type(a) is type(b) and type(a) in _PLAIN and a == b


_PLAIN = frozenset({bool, int, float, type(None)})


_SIZES_ONLY = {
    "overwritten",
    "quantize",
    "packed sequence",
    "recurrent state",
    "recurrent update",
    "last recurrent state",
    "noise",
    "fill",
}
_SIZES_AT = {
    "convolution": (8,),
    "group norm": (3, 4, 5, 6),
    "layer norm": (1,),
    "index add": (2,),
    "index put": (1,),
    "group norm by sums": (3, 6),
    "extreme": (1, 2, 3),
    "pad": (1,),
}


def _size_arguments(node: fx.Node) -> list[fx.Node]:
    """The nodes among the arguments of ``node`` that are there as sizes or places."""
    name, kind = function_name(node), kind_of(node)
    if kind:
        start = SIZES[kind]
        stop = start + 1 if "full" in kind else len(node.args)
        return _nodes([node.args[start:stop], node.kwargs.get("size")])
    if node.op == "call_module":  # of the layers of torch, those that undo a pooling or a convolution take one
        return _nodes(node.kwargs.get("output_size"))
    if node.op != "call_function" or name not in _SIZE_ARGUMENTS:
        return []
    position, key = _SIZE_ARGUMENTS[name]
    return _nodes([node.args[position : position + 1], node.kwargs.get(key)])


def same(a: object, b: object) -> bool:
    """Whether two results without labels are equal; NaN is equal to itself."""
    if a is b:
        return True
    left, right = leaves(a), leaves(b)
    return len(left) == len(right) and all(map(_same_leaf, left, right))


def _stored(sparse: Tensor) -> list[Tensor]:
    """Where the entries of a sparse tensor are, and what they are."""
    entries = sparse.to_sparse_coo().coalesce()
    return [entries.indices(), entries.values()]


def _same_leaf(a: object, b: object) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.shape != b.shape or a.dtype != b.dtype or a.layout != b.layout:
            return False
        if a.layout != torch.strided:
            return a is b or same(_stored(a), _stored(b))
        return a is b or a.is_meta or b.is_meta or same_values(a, b)
    if isinstance(a, Value | Tensor) or isinstance(b, Value | Tensor):
        return False
    if not isinstance(a, int | float | complex | str):
        return type(a) is type(b)  # an object, such as a device or what a model makes of sizes
    return a == b or (a != a and b != b)  # noqa: PLR0124
