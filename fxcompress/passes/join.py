"""A sum one path of which is narrower than the other: it stands in a graph in the place of the addition."""

from collections.abc import Iterator

import torch
from torch import Tensor, fx, nn

from fxcompress.trace.traced import TracedModule


class Join(nn.Module):
    """``full + alpha * part``, where ``part`` has some channels of ``full`` only, and is zero in all others.

    Neither buffer is in the state_dict: which channels a path has lost is a matter of the network, as its graph is.

    Args:
        dim: of the channels, from the left.
        rank: how many dims the sum had then: in front of the channels there may be more, or fewer, in another call.
        index: the channels of ``full`` that ``part`` is added to, int64 (K,).
        alpha: what ``part`` is multiplied by.
        taken: the channels of ``part`` that are added, int64 (K,); None for all K that it has.

    >>> Join(1, 2, torch.tensor([0, 2]))(torch.zeros(1, 3), torch.tensor([[5.0, 7.0]]))
    tensor([[5., 0., 7.]])
    """

    index: Tensor
    taken: Tensor | None

    def __init__(self, dim: int, rank: int, index: Tensor, alpha: float = 1, taken: Tensor | None = None) -> None:
        super().__init__()
        self.dim, self.rank, self.alpha = dim, rank, alpha
        self.register_buffer("index", index, persistent=False)
        self.register_buffer("taken", taken, persistent=False)

    def forward(self, full: Tensor, part: Tensor) -> Tensor:
        """The sum, in memory of its own.

        Args:
            full: (..., C, ...) with C channels along ``dim``.
            part: (..., K, ...); the other dims are broadcast against those of ``full``.
        """
        dim = full.ndim - self.rank + self.dim
        if self.taken is not None:
            part = part.index_select(dim, self.taken)
        if full.dtype != part.dtype:  # under autocast
            dtype = torch.promote_types(full.dtype, part.dtype)
            full, part = full.to(dtype), part.to(dtype)
        if _across(full, dim) != _across(part, dim):
            sizes = torch.broadcast_shapes(_across(full, dim), _across(part, dim))
            full, part = (x.expand(*sizes[:dim], -1, *sizes[dim + 1 :]) for x in (full, part))
        return full.index_add(dim, self.index, part, alpha=self.alpha)

    def extra_repr(self) -> str:
        """For print."""
        return f"dim={self.dim}, channels={len(self.index)}"

    def of(self, channels: int) -> Tensor:
        """The channels that are added, by their place in a path that has as many; int64 (K,)."""
        return torch.arange(channels, device=self.index.device) if self.taken is None else self.taken


def _across(x: Tensor, dim: int) -> tuple[int, ...]:
    """The shape, with 1 along ``dim``."""
    return (*x.shape[:dim], 1, *x.shape[dim + 1 :])


def join_at(module: nn.Module, node: fx.Node) -> Join | None:
    """The join that a node calls, or None."""
    if node.op != "call_module":
        return None
    found = module.get_submodule(str(node.target))
    return found if isinstance(found, Join) else None


def joins_of(module: TracedModule) -> Iterator[tuple[str, fx.Node, Join]]:
    """Every call of a join: the mode of the graph, the node, the join."""
    joins = {path: m for path, m in module.named_modules(remove_duplicate=False) if isinstance(m, Join)}
    for mode, graph in module.graphs.items() if joins else ():
        for node in graph.nodes:
            join = joins.get(str(node.target)) if node.op == "call_module" else None
            if join is not None:
                yield mode, node, join
