"""Two graphs of one model, recorded on two paths through it, one of which computes what both do.

    if position_ids.shape[0] != batch:                   # True for two texts, False for one
        position_ids = position_ids.expand(batch, -1)

The graph of two texts checks that the branch is taken. But where it is not, the sizes are equal, and the ``expand``
returns what it is given: the longer graph computes what the shorter one does, and needs no check. That is proved node
by node, for all inputs that take either path, whatever their sizes are.
"""

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxcompress.trace.concrete.recorded_nodes import is_number, steps_of
from fxcompress.trace.graph.calls import function_name, writes_in_place
from fxcompress.trace.graph.guards import check, check_argument, shape_of
from fxcompress.trace.graph.names import fetch_attr


def joined(long: fx.Graph, short: fx.Graph, root: nn.Module) -> bool:
    """Take out of ``long`` the checks that tell its path from that of ``short``, in place, if it computes both.

    Where several decisions tell them apart, there are checks left that all of them agree.

    Args:
        long: recorded on one path.
        short: recorded on another one.
        root: holds the tensors of both.

    Returns:
        whether it does; if not, nothing has changed.
    """
    match = _Match(long, short, root)
    others = match.decisions()
    if not others:
        return False
    first, *rest = others
    for node in rest:
        decisions, both = (first.args[0], node.args[0]), (first.args[1], node.args[1])
        with long.inserting_before(node):
            agree = long.call_function(operator.eq, decisions)
            node.args = (agree, both[0] == both[1], (*_sizes(first), *_sizes(node)), node.args[3])
    with long.inserting_before(long.output_node()):
        for known in match.added:
            _check_there(long, first, known, match)
    long.erase_node(first)
    _sweep(long)
    return True


def _check_there(long: fx.Graph, first: fx.Node, known: fx.Node, match: "_Match") -> None:
    """Write a check of the shorter graph into the longer one, for those inputs that take its path."""
    made = {there: here for here, there in reversed(match.same.items())}

    def copied(node: fx.Node) -> fx.Node:
        if node not in made:
            made[node] = long.node_copy(node, copied)
        return made[node]

    args: Any = fx.node.map_arg(known.args, copied)
    decision, outcome, sizes, where = args
    taken = long.call_function(operator.eq, (first.args[0], first.args[1]))
    right = long.call_function(operator.eq, (decision, outcome))
    either = long.call_function(operator.or_, (taken, right))
    long.call_function(check, (either, True, (*_sizes(first), *sizes), where))


def _sizes(node: fx.Node) -> tuple[Any, ...]:
    sizes: Any = node.args[2]
    return tuple(sizes)


def _sweep(graph: fx.Graph) -> None:
    """Erase numbers that nothing uses."""
    for node in reversed(graph.nodes):
        if not node.users and node.target is not shape_of and is_number(node):
            graph.erase_node(node)


class _Match:
    """Maps the nodes of the longer graph to those of the shorter one that return the same on the shorter path.

    What is proved: take any input for which the decisions come out as on the shorter path, and run both graphs on it
    without their checks. Each node of ``long`` that is mapped returns what its counterpart does. By induction over
    the checks of ``short`` in the order in which they are met in ``long``: the decision of such a check comes out as
    it must, as its counterpart does, and what that says of sizes may be used from then on.
    """

    def __init__(self, long: fx.Graph, short: fx.Graph, root: nn.Module) -> None:
        self.long, self.short, self.root = long, short, root
        self.same: dict[fx.Node, fx.Node] = {}
        self.equal: dict[Any, Any] = {}  # on the shorter path: a number, and another one that it is equal to
        self.added: list[fx.Node] = []  # checks of ``short`` that ``long`` is to make as well
        self.unmet = dict.fromkeys(short.find_nodes(op="call_function", target=check))
        for node in short.find_nodes(op="get_attr"):
            self._learn_sizes(node)
        self.writes = any(writes_in_place(node) for graph in (long, short) for node in graph.nodes)
        self._list()

    def _list(self) -> None:
        """Look up the numbers and checks of ``short`` by what is known to be equal now."""
        self.numbers: dict[object, fx.Node] = {}
        self.checks: dict[object, list[fx.Node]] = {}
        for node in self.short.nodes:
            if is_number(node):
                self.numbers.setdefault(self._key(node, node.args, node.kwargs), node)
            elif node.target is check:
                self.checks.setdefault(self._plain(node.args[0]), []).append(node)

    def decisions(self) -> list[fx.Node]:
        """The checks of ``long`` that come out in the other way in ``short``; none where it does not stand for both."""
        steps, others = steps_of(self.short), list[fx.Node]()
        following = next(steps, None)
        for node in self.long.nodes:
            if node.target is check:
                outcome = self._meet(node)
                if outcome is not None and outcome != node.args[1]:
                    if not (isinstance(outcome, bool) and isinstance(node.args[1], bool)):
                        return []  # a third answer would take a third path
                    others.append(node)
            elif is_number(node):
                found = self.numbers.get(self._mapped_key(node))
                if found is not None:
                    self.same[node] = found
            elif node.target is check_argument:
                continue
            elif following is not None and self._alike(node, following):
                self.same[node], following = following, next(steps, None)
            elif (given := self._given_back(node, following)) is not None:
                self.same[node] = given
            else:
                return []
        ranks = {node for node in self.short.nodes if node.target is shape_of}
        self._add(*self.unmet)
        return [] if following is not None or self.unmet or ranks - set(self.same.values()) else others

    def _given_back(self, node: fx.Node, following: fx.Node | None) -> fx.Node | None:
        """As :meth:`_returns_what_it_is_given`, also by what only the shorter path asks up to here."""
        given = self._returns_what_it_is_given(node)
        if given is not None or following is None:
            return given
        return self._returns_what_it_is_given(node) if self._add(*(n for n in self.unmet if n < following)) else None

    def _add(self, *checks: fx.Node) -> bool:
        """Let ``long`` make checks of ``short`` as well where it has what they ask for; whether there are any."""
        here = set(self.same.values())
        able = [node for node in checks if all(n in here or _made_of(n, here) for n in node.all_input_nodes)]
        self.added += able
        self._learn_all(able)
        return bool(able)

    def _learn_all(self, checks: list[fx.Node]) -> None:
        for node in checks:
            del self.unmet[node]
        learnt = [self._learn(node.args[0], node.args[1]) for node in checks]
        if any(learnt):
            self._list()

    def _learn_sizes(self, node: fx.Node) -> None:
        """The sizes of a tensor of the root are known."""
        value: Any = _constant(self.root, node)
        for shape in node.users if isinstance(value, Tensor) else ():
            for size in shape.users if shape.target is getattr and shape.args[1] == "shape" else ():
                if size.target is operator.getitem and type(size.args[1]) is int:
                    self.equal[size] = self._one_of(value.shape[size.args[1]])

    def _meet(self, node: fx.Node) -> object:
        """How a check of ``long`` comes out on the shorter path; None where that does not say so."""
        decision: Any = node.args[0]
        found = self.checks.get(self._one_of(self.same.get(decision, decision)), [])
        self._learn_all([known for known in found if known in self.unmet])
        return found[0].args[1] if found else None

    def _learn(self, decision: Any, outcome: object) -> bool:  # noqa: ANN401 - an argument of a check
        """Note what a decision says of numbers; whether it does."""
        pair: tuple[Any, ...] = (decision, outcome) if type(outcome) is int else ()
        if (decision.target, outcome) in {(operator.eq, True), (operator.ne, False)}:
            pair = decision.args
        a, b = map(self._one_of, pair or (0, 0))
        if a == b:
            return False
        self.equal[a if isinstance(a, fx.Node) else b] = b if isinstance(a, fx.Node) else a
        return True

    def _alike(self, a: fx.Node, b: fx.Node) -> bool:
        if a.op == b.op == "get_attr" and a.target != b.target:
            return same_constant(self.root, a, b)
        return bool(self._mapped_key(a) == self._key(b, b.args, b.kwargs))

    def _mapped_key(self, node: fx.Node) -> object:
        """The key of a node of ``long`` in terms of nodes of ``short``; those that it has no counterpart of stay."""
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: self.same.get(n, n))
        return self._key(node, args, kwargs)

    def _key(self, node: fx.Node, args: Any, kwargs: Any) -> object:  # noqa: ANN401 - arguments
        return node.op, node.target, self._plain(args[:2] if node.target is shape_of else args), self._plain(kwargs)

    def _plain(self, value: Any) -> Any:  # noqa: ANN401 - an argument
        if isinstance(value, tuple | list):
            return tuple(map(self._plain, value))
        if isinstance(value, dict):
            return tuple((name, self._plain(item)) for name, item in value.items())
        if isinstance(value, slice):
            return "slice", self._plain(value.start), self._plain(value.stop), self._plain(value.step)
        return self._one_of(value)

    def _one_of(self, value: Any) -> Any:  # noqa: ANN401 - a node or a plain value
        """The one that stands for all that is equal to a node or a value."""
        value = value if isinstance(value, fx.Node) else (type(value), value)
        while value in self.equal:
            value = self.equal[value]
        return value

    def _returns_what_it_is_given(self, node: fx.Node) -> fx.Node | None:
        """The node of ``short`` whose result ``node`` of ``long`` would return as it is, on the path of ``short``."""
        source: Any = node.args[0] if node.args else None
        given = self.same.get(source) if isinstance(source, fx.Node) else None
        if given is None or node.kwargs or (node.op != "call_method" and node.target not in _SHAPING):
            return None
        name, sizes = function_name(node), _flat(node.args[1:])
        if name in {"expand", "broadcast_to", "view", "reshape"}:
            return given if self._is_shape(source, sizes) else None
        whole = len(sizes) in {_rank(given, self.root), _rank(source, self.root)}
        ones = name == "repeat" and whole and all(self._is(size, 1) for size in sizes)
        zeros = name == "pad" and len(node.args) == 2 and all(self._is(size, 0) for size in sizes)
        return given if (ones or zeros) and not self.writes else None  # both return a copy

    def _is_shape(self, source: fx.Node, sizes: tuple[Any, ...]) -> bool:
        """Whether ``sizes``, as they stand in ``long``, are those of ``source``, which ``short`` has as well."""
        given = self.same[source]
        if len(sizes) not in {_rank(given, self.root), _rank(source, self.root)}:
            return False
        shapes = [n for n in (*given.users, *source.users) if n.target is shape_of or n.args[1:] == ("shape",)]
        own = [{self._in_short(n) for s in shapes for n in s.users if n.args == (s, i)} for i in range(len(sizes))]
        return all(size == -1 or self._in_short(size) in own[i] for i, size in enumerate(sizes))

    def _in_short(self, size: Any) -> Any:  # noqa: ANN401 - a node of either graph, or a number
        return self._one_of(self.same.get(size, size))

    def _is(self, size: Any, value: int) -> bool:  # noqa: ANN401 - a node or a number
        return bool(self._in_short(size) == self._one_of(value))


_SHAPING = {torch.broadcast_to, torch.reshape, F.pad}


def _made_of(number: fx.Node, nodes: set[fx.Node]) -> bool:
    """Whether a number is computed from nodes of a set; no shape is read off others."""
    inputs = number.all_input_nodes
    return is_number(number) and bool(inputs) and all(n in nodes or _made_of(n, nodes) for n in inputs)


def _flat(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(args[0]) if len(args) == 1 and isinstance(args[0], tuple | list) else args


def _rank(node: fx.Node, root: nn.Module) -> int | None:
    """How many dims the result of a node has, where checks or the root say so."""
    if node.op == "get_attr":
        value = _constant(root, node)
        return value.dim() if isinstance(value, Tensor) else None
    for user in node.users:
        form: Any = user.args[1] if len(user.args) > 1 else None
        if user.target is shape_of:
            return int(form)
        if user.target is check_argument and form[0] == "tensor of rank":
            return int(form[1])
    return None


def _constant(root: nn.Module, node: fx.Node) -> object:
    value: object = fetch_attr(root, str(node.target))
    return value


def same_constant(root: nn.Module, a: fx.Node, b: fx.Node) -> bool:
    """Whether two tensors that code has made anew in each run are the same."""
    if not all(str(node.target).startswith("_tensor_constant") for node in (a, b)):
        return False
    one, other = _constant(root, a), _constant(root, b)
    assert isinstance(one, Tensor)
    assert isinstance(other, Tensor)
    alike = one.dtype == other.dtype and one.shape == other.shape and one.device == other.device
    return alike and torch.equal(one, other)
