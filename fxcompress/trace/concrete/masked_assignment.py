"""``new[mask] = old[mask]``: a choice for each entry, though values decide how many are picked.

What is picked has no shape on fake tensors. So a run goes on with a tensor that nothing may be asked of, and that
nothing may be done with but to write it, right away, to where the same mask picks entries of another tensor.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class MaskedRead:
    """What ``old[mask]`` has returned.

    Attributes:
        entries: the tensor that stands for it.
        old: of which they are entries.
        mask: where they are.
        written: how many nodes had been written then.
    """

    entries: Tensor
    old: Tensor
    mask: Tensor
    written: int

    def is_put(self, new: object, mask: object, entries: object, written: int) -> bool:
        """Whether ``new[mask] = entries`` is the very next thing that is done, and a choice between two tensors alike.

        Args:
            new: what is written to.
            mask: where.
            entries: what is written.
            written: how many nodes there are.
        """
        same = entries is self.entries and mask is self.mask and written == self.written
        return same and isinstance(new, Tensor) and (new.shape, new.dtype) == (self.old.shape, self.old.dtype)


def masked_read(old: object, mask: object, written: int) -> MaskedRead | None:
    """What stands for ``old[mask]``; None where that is no choice of whole entries by flags.

    Args:
        old: any tensor.
        mask: flags for its entries along its first dims.
        written: how many nodes there are.
    """
    if not isinstance(old, Tensor) or not isinstance(mask, Tensor) or mask.dtype is not torch.bool or not mask.ndim:
        return None
    if old.shape[: mask.ndim] != mask.shape:
        return None
    return MaskedRead(torch.empty_like(old).flatten(0, mask.ndim - 1), old, mask, written)


def choose(new: Tensor, mask: Tensor, old: Tensor) -> None:
    """What ``new[mask] = old[mask]`` does."""
    for _ in range(new.dim() - mask.dim()):
        mask = mask.unsqueeze(-1)
    new.copy_(torch.where(mask, old, new))
