"""Which entries of which tensors are known to be constant: the second domain, run over the tape of the first.

Labels prove that shapes agree after a removal; constants prove that the output does.
"""

import torch
from torch import Tensor, nn

from fxcompress.channels.interpret import Trail
from fxcompress.channels.rules.registry import Known
from fxcompress.trace.heap import without_collections


def parameter_maps(trail: Trail, module: nn.Module) -> dict[int, Tensor]:
    """Seeds for a network as it stands: the values of all parameters and buffers are known."""
    tensors = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    tensors |= {name: getattr(module, name) for name in trail.parameters if name not in tensors}
    return {value.key: tensors[name].detach() for name, value in trail.parameters.items()}


@without_collections
def propagate(
    trail: Trail, maps: dict[int, Tensor], *, training: bool, nonzero: dict[int, Tensor] | None = None
) -> Known:
    """Run the constant rules over a tape.

    Args:
        trail: the interpretation of one graph.
        maps: what is known at the start, by the key of each value; see :class:`Known`.
        training: batch norm takes the statistics of the batch.
        nonzero: shared between runs with the same weights; see :class:`Known`.
    """
    known = Known(maps, nonzero, training=training)
    with torch.no_grad():
        for step in trail.tape:
            for value, found in zip(step.outputs, step.op.constants(step, known), strict=True):
                if found.numel() != 1 or not bool(found.isnan()):
                    known.maps[value.key] = found
    return known
