"""Moving averages of a network in training, which lose what it loses.

An average is a copy of the network, perhaps held in another module, as ``torch.optim.swa_utils.AveragedModel`` does.
Its entries are averaged one by one, so those of the channels that stay do not depend on whether others are there.
"""

from collections.abc import Iterable
from typing import TypeVar, cast

from torch import nn

from fxcompress.errors import AverageError
from fxcompress.provenance import Provenance, provenance_of
from fxcompress.training.network import SizedNetwork

_N = TypeVar("_N", bound=SizedNetwork)


def copies_of(net: _N, averages: Iterable[nn.Module]) -> list[_N]:
    """The copy of ``net`` that each average is, or holds.

    Raises:
        AverageError: one holds none or several, holds ``net`` itself, or has other shapes or another graph.
    """
    copies = [_copy_in(average) for average in averages]
    for number, copy in enumerate(copies):
        if copy is net:
            raise AverageError(
                f"averages[{number}] holds the network itself, and no copy of it; make it by "
                "torch.optim.swa_utils.AveragedModel(net)"
            )
        if any(copy is other for other in copies[:number]):
            raise AverageError(f"averages[{number}] is given twice; give it once")
        difference = _difference(net, copy)
        if difference:
            raise AverageError(
                f"averages[{number}] cannot follow the network: {difference}; make it of the network after compress(), "
                "and pass it to each prune(optimizer, averages=[...]) from then on"
            )
    return cast("list[_N]", copies)  # of the same graphs


def _copy_in(average: object) -> SizedNetwork:
    found = _networks_in(average) if isinstance(average, nn.Module) else []
    if len(found) != 1:
        what = f"holds {len(found)} compressed networks" if found else "holds no compressed network"
        raise AverageError(
            f"an average is a copy of the network, or a module that holds one; this {type(average).__name__} {what}; "
            "pass AveragedModel(net), or the copy itself"
        )
    return found[0]


def _networks_in(module: nn.Module) -> list[SizedNetwork]:
    """Those that lie in no other one; the pieces of a network lie in it."""
    found = {id(m): m for m in module.modules() if isinstance(m, SizedNetwork)}
    inner = {id(part) for net in found.values() for part in net.modules() if part is not net}
    return [net for key, net in found.items() if key not in inner]


def _difference(net: SizedNetwork, copy: SizedNetwork) -> str:
    if _lost(net) != _lost(copy):
        return "it has not lost what the network has lost"
    for kind, own, other in (
        ("parameter", net.named_parameters(), copy.named_parameters()),
        ("buffer", net.named_buffers(), copy.named_buffers()),
    ):
        pairs = [[(name, tuple(value.shape)) for name, value in named] for named in (own, other)]
        if pairs[0] != pairs[1]:
            wrong = sorted(set(pairs[0]) ^ set(pairs[1]))
            name = wrong[0][0] if wrong else pairs[0][0][0]
            return f"the {kind} {name} is not the same, or not in the same place"
    return "" if _nodes(net) == _nodes(copy) else "it has another graph"


def _lost(net: SizedNetwork) -> object:
    provenance = provenance_of(net) or Provenance({})
    return (
        provenance.kept,
        provenance.cuts,
        {path: piece.cuts for path, piece in provenance.pieces.items() if piece.cuts},
    )


def _nodes(net: SizedNetwork) -> list[tuple[str, str, str, str, str]]:
    graphs = [(path, mode, graph) for path, part in net.fxc_parts().items() for mode, graph in part.graphs.items()]
    return [(path, mode, n.op, n.name, str(n.target)) for path, mode, graph in graphs for n in graph.nodes]
