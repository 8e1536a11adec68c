"""Numbers that the network computes from sizes: in the next run each may be another one, so none is a constant.

``h * (n - 1)`` is zero for one row, and ``h`` for two. The interpretation runs on plain numbers; which of those that
meet an op stand in the graph is told by the node that calls it.
"""

from collections.abc import Callable, Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import replace as replace_fields
from typing import Any, TypeGuard

from torch import fx, nn

from fxcompress.channels.size_reads import read_of
from fxcompress.channels.survivors import has_own_labels
from fxcompress.channels.values import Met, Step, Value, leaves

_KNOWN_CODE = ("torch.", "torchvision.", "_operator.", "math.", "builtins.", "fxcompress.")


class Computed:
    """A number of which nothing is known, in the place of one among the arguments of a call."""


class _Int(Computed, int):
    pass


class _Float(Computed, float):
    pass


class _Complex(Computed, complex):
    pass


class Written(float):
    """A number that stands in the graph, whatever is computed and has its value."""


_NUMBERS = {int: _Int, float: _Float, complex: _Complex}


class Numbers:
    """Tells numbers that may be others in the next run from those that may not, as the nodes of a graph are run.

    The number of channels of a tensor is as it is for all inputs. What a cut makes of it is another matter: readers get
    what it was.

    Args:
        constant: the nodes that are made of parameters and numbers alone.
        results: of the nodes, by name; a Value in the place of each tensor.
        decided: the dims of a value whose sizes the inputs decide though their entries have labels.

    Attributes:
        before: the names of the nodes of the graph before a cut, and whether their numbers are as they are for all
            inputs; none where that is to be found.
    """

    def __init__(
        self,
        constant: AbstractSet[fx.Node],
        results: Mapping[str, Any],
        decided: Callable[[Value], AbstractSet[int]],
    ) -> None:
        self._constant = constant
        self._results = results
        self._decided = decided
        self.before: Mapping[str, bool] = {}
        self._fixed: set[fx.Node] = set()

    def follow(self, node: fx.Node) -> None:
        """Note what the numbers that a node has returned come from, once it has been run."""
        if self._is_fixed(node):
            self._fixed.add(node)

    def is_fixed(self, node: fx.Node) -> bool:
        """Whether numbers or a tensor without labels are the same for all inputs."""
        if node.name in self.before:
            return self.before[node.name]
        if self.before:  # written again for the cut
            return all(map(self.is_fixed, node.all_input_nodes))
        return node in self._constant or node in self._fixed

    @property
    def fixed(self) -> frozenset[str]:
        """The names of the nodes that are the same for all inputs, or whose numbers are."""
        return frozenset(node.name for node in (*self._fixed, *self._constant))

    def _is_fixed(self, node: fx.Node) -> bool:
        read = read_of(node)
        if read is None:
            used = set(node.all_input_nodes) - self._constant
            return bool(used) and used <= self._fixed
        source, _, which = read
        value = self._results[source.name]
        if source in self._constant or not isinstance(which, int | slice) or not isinstance(value, Value):
            return source in self._constant
        dims = range(value.rank)[which]
        taken, decided = [dims] if isinstance(dims, int) else dims, self._decided(value)
        return all(has_own_labels(value, dim) and dim not in decided for dim in taken)

    def _given(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> frozenset[complex]:
        return frozenset(_numbers_in(values[used] for used in node.all_input_nodes if not self.is_fixed(used)))

    def met(self, node: fx.Node, values: Mapping[fx.Node, Any], callee: object) -> Met | None:
        """The numbers that a node meets, where it may give others to the ops that it calls in the next run; else None.

        Args:
            node: a call.
            values: the results of the nodes before.
            callee: the function or layer that it calls, or the name of a method.
        """
        given, known = self._given(node, values), is_known(callee)
        if known and not given:
            return None
        widths = (values[used] for used in node.all_input_nodes if used in self._fixed)
        written = frozenset(_numbers_in((node.args, node.kwargs, *widths))) - given if known else frozenset[complex]()
        return Met(given, written)

    def moves(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> bool:
        """Whether a node is a number that comes from a size of the inputs."""
        return not self.is_fixed(node) and bool(_numbers_in((values[node],)))


def is_known(callee: object) -> bool:
    """Whether code makes no numbers of sizes by itself."""
    if isinstance(callee, str):
        return True
    owner = getattr(callee, "__self__", None)  # of the function that an autograd function is called by
    home = type(callee) if isinstance(callee, nn.Module) else owner if isinstance(owner, type) else callee
    return f"{getattr(home, '__module__', None) or 'torch'}.".startswith(_KNOWN_CODE)


def _numbers_in(tree: Iterable[Any]) -> list[complex]:
    return [leaf for leaf in leaves(tuple(tree)) if type(leaf) in _NUMBERS or type(leaf) is bool]


def is_written(arg: object) -> TypeGuard[int | float]:
    """Whether an argument is a number that stands in the graph."""
    return isinstance(arg, int | float) and not isinstance(arg, Computed)


def marked(step: Step) -> Step:
    """A step with :class:`Computed` in the place of numbers that come from sizes."""
    met = step.numbers
    if met is None:
        return step
    args = tuple(_marked(arg, met) for arg in step.call.args)
    kwargs = {name: _marked(arg, met) for name, arg in step.call.kwargs.items()}
    return replace_fields(step, call=replace_fields(step.call, args=args, kwargs=kwargs))


def _marked(arg: Any, met: Met) -> Any:  # noqa: ANN401 - an argument of a call
    kind = int if type(arg) is bool and arg in met.given else type(arg)
    return _NUMBERS[kind](arg) if kind in _NUMBERS and met.may_change(arg) else arg
