"""What a network in training would be without its quantizers."""

import copy

from fxcompress.passes.code_changes import attributes_changed
from fxcompress.passes.finalize import finalize_quantizers
from fxcompress.passes.own_code import runs_its_code
from fxcompress.passes.prune_channels import Pruned
from fxcompress.provenance import Grid
from fxcompress.trace.traced import TracedModule
from fxcompress.training.sized import LIVENESS, SizedModule


def plain_copy(net: TracedModule) -> tuple[TracedModule, dict[str, Grid]]:
    """A copy whose weights lie on their grids, without quantizers, and the number format of each weight."""
    own = copy.deepcopy(net)
    delattr(own, LIVENESS)
    plain = TracedModule(own, own.graph, own.train_graph, type(net).__name__)
    plain.__dict__.pop("settings", None)
    return plain, finalize_quantizers(plain)


def code_breaks(net: SizedModule, pruned: Pruned) -> bool:
    """Whether the model's code, where that is to stay, would compute something else on what is left of a network.

    Asked where an attribute has become another number: what Python does with one (the index of a list) is not all seen.
    """
    shell = net.settings.shell
    if shell is None or not attributes_changed(pruned.analysis.module, pruned.module):
        return False
    return not runs_its_code(shell, plain_copy(pruned.module)[0], net.settings.inputs)
