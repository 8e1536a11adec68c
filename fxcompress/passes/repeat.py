"""Does to a copy of a network what was done to the network itself.

The copy has the same graph and the same shapes, and other values: a moving average, say. What was proved of the
network holds for it alone; the copy merely loses the same entries, and so keeps its shape.

network   conv.weight (8, 3, 3, 3)  ->  (7, 3, 3, 3), without channel 3, which is dead
average   conv.weight (8, 3, 3, 3)  ->  (7, 3, 3, 3), without channel 3, whatever it is
"""

from dataclasses import replace

from fxcompress.passes.branches import remove_branches
from fxcompress.passes.cutting import cut_module
from fxcompress.passes.prune_channels import Pruned
from fxcompress.trace.model.skeleton import skeleton
from fxcompress.trace.traced import TracedModule, copy_graph


def repeat_removal(module: TracedModule, pruned: Pruned) -> Pruned:
    """Carry out a removal once more; ``module`` stays as it is.

    Args:
        module: with the graph, the names and the shapes that the network had before the removal.
        pruned: what was done to that.
    """
    before = skeleton(module)
    if pruned.branches:
        remove_branches(before, list(pruned.branches))
    cut = cut_module(replace(pruned.analysis, module=before), pruned.plan)
    train = pruned.module.train_graph
    # The graph is that of the network, whose sizes are right already.
    cut.module.set_graphs(copy_graph(pruned.module.graph), None if train is None else copy_graph(train))
    return replace(pruned, module=cut.module, cuts=cut.cuts)
