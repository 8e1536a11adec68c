"""What a removal in training does to the paths through the model's own code that were not traced.

What is removed cannot come back, and ``finalize`` is to return the model's own code on what is left. So what such a
path needs stays from the start.
"""

from collections.abc import Callable

from fxcompress.passes.code_changes import attributes_changed
from fxcompress.passes.held import NOTHING, Held, all_of, joined
from fxcompress.passes.other_paths import Untraced
from fxcompress.passes.own_code import OTHER_WAY, on_tensors_of, untraced
from fxcompress.passes.prune_channels import Pruned
from fxcompress.passes.prune_report import SizesDecide
from fxcompress.trace.retrace.other_sizes import sizes_decide, without_graphs
from fxcompress.trace.retrace.size_attributes import hold_numbers
from fxcompress.training.plain_copy import plain_copy
from fxcompress.training.sized import SizedModule

_FOUND = "_fxc_untraced"


def for_all_paths(
    net: SizedModule, pruned: Pruned, prune: Callable[[Held], Pruned]
) -> tuple[Pruned, SizesDecide | None]:
    """A removal without what other paths through the model's code need, and what is known of these.

    Args:
        net: the network; it stays as it is.
        pruned: what would be removed.
        prune: works out what is removed where some of it is held.
    """
    shell = net.settings.shell
    if shell is None or not pruned.modified or not sizes_decide(net):
        return pruned, None
    paths = untraced(shell, plain_copy(net)[0], net.settings.inputs, net.__dict__.get(_FOUND))
    net.__dict__[_FOUND] = without_graphs(paths.found)
    held, pruned = _held(paths, NOTHING, pruned, prune)
    if _is_broken(net, paths, pruned) and attributes_changed(pruned.analysis.module, pruned.module):
        hold_numbers(net)
        paths.hold_numbers()
        held, pruned = _held(paths, held, prune(held), prune)
    if _is_broken(net, paths, pruned):
        pruned = prune(joined(held, all_of(pruned.cuts, OTHER_WAY)))
    return pruned, paths.told(changed=pruned.modified)


def _held(paths: Untraced, held: Held, pruned: Pruned, prune: Callable[[Held], Pruned]) -> tuple[Held, Pruned]:
    while more := paths.holds(pruned.cuts):
        held = joined(held, more)
        pruned = prune(held)
    return held, pruned


def _is_broken(net: SizedModule, paths: Untraced, pruned: Pruned) -> bool:
    shell = net.settings.shell
    if shell is None or not paths or not pruned.modified:
        return False
    return bool(paths.broken(on_tensors_of(plain_copy(pruned.module)[0], shell), folded=False))
