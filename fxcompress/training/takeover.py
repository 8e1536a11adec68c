"""A network becomes what was cut out of it, in place: whoever holds it, or a module of it, holds the smaller one."""

from torch import fx, nn

from fxcompress.passes.prune_channels import Pruned
from fxcompress.provenance import Provenance, attach
from fxcompress.training.sized import LIVENESS, SizedModule


def take_over(net: SizedModule, pruned: Pruned, provenance: Provenance) -> None:
    """Become the pruned network; modules that stay keep their identity, and what was in shared memory is there again.

    Args:
        net: the network as it was.
        pruned: what is made of it.
        provenance: of that.
    """
    attach(net, provenance)
    shared = any(p.is_shared() for p in net.parameters() if p.is_cpu)  # on a GPU all are
    for name, cut in pruned.cuts.items():
        net.fxc_flags.keep(name, next(iter(cut.indices.values()), None))  # what has flags is cut along one dim
    for name in pruned.gone:
        net.fxc_flags.keep(name, None)
    new = dict(pruned.module.named_modules(remove_duplicate=False))  # a module may have two names
    del new[LIVENESS]
    _transplant(net, new)
    net.set_graphs(pruned.module.graph, pruned.module.train_graph)
    net.fxc_forget()
    if shared:
        net.share_memory()


def _transplant(old: nn.Module, new: dict[str, nn.Module], prefix: str = "") -> None:
    """Give the modules of a tree the tensors and attributes of their counterparts; drop those without one."""
    source = new[prefix.removesuffix(".")]
    old._parameters, old._buffers = source._parameters, source._buffers
    for key, value in source.__dict__.items():
        if not key.startswith("_") and not isinstance(old, fx.GraphModule):
            old.__dict__[key] = value
    for name, child in list(old._modules.items()):
        if prefix + name in new and child is not None:
            _transplant(child, new, f"{prefix}{name}.")
        elif name != LIVENESS:
            del old._modules[name]
