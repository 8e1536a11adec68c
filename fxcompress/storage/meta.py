"""Models that were built on the meta device, which saves the memory and the time that random values take."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fxcompress.errors import StorageError
from fxcompress.trace.model.flat_weights import renew_weights
from fxcompress.trace.model.skeleton import skeleton


def with_values(model: nn.Module, saved: Mapping[str, Tensor], path: object) -> nn.Module:
    """``model`` itself or, where tensors of it are on the meta device, a copy that has them on the CPU.

    They get the values that are in a file, as far as they are of the same shape there, and ones: a graph may look at a
    table of positions, and never looks at weights, but that weight norm can divide by their lengths.

    Args:
        model: is left as it is.
        saved: the tensors of the file, by name.
        path: of the file.

    Raises:
        StorageError: a tensor is on the meta device that is no part of a state_dict: no file holds its values.
    """
    if not any(tensor.is_meta for module in model.modules() for _, tensor in _tensors(module)):
        return model
    known = model.state_dict(keep_vars=True)
    kept = {id(tensor) for tensor in known.values()}
    result = skeleton(model)
    lost = [
        f"{prefix}.{name}".lstrip(".")
        for prefix, module in result.named_modules()
        for name, tensor in _tensors(module)
        if tensor.is_meta and id(tensor) not in kept
    ]
    if lost:
        raise StorageError(
            f"cannot load {path} into this {type(model).__name__}, which has tensors on the meta device that are in no "
            f"state_dict, and so in no file: {', '.join(lost[:5])}{', ...' if lost[5:] else ''}\n"
            "  they are buffers with persistent=False, or plain attributes: build the model on the CPU, or make these "
            "there, as in with torch.device('cpu'): ... around what makes them"
        )
    made: dict[int, Tensor] = {}
    names = {id(tensor): name for name, tensor in reversed(known.items())}
    for module in result.modules():
        for table in (module._parameters, module._buffers):
            for leaf, tensor in table.items():
                if tensor is not None and tensor.is_meta:
                    made.setdefault(id(tensor), _valued(tensor, saved.get(names[id(tensor)])))
                    table[leaf] = made[id(tensor)]  # type: ignore[assignment]
        renew_weights(module)
    return result


def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    tables: tuple[Mapping[str, Any], ...] = (module._parameters, module._buffers, vars(module))
    return [(name, tensor) for table in tables for name, tensor in table.items() if isinstance(tensor, Tensor)]


def _valued(tensor: Tensor, value: Tensor | None) -> Tensor:
    """A tensor like one on the meta device, with a value if it has the shape."""
    known = value is not None and value.shape == tensor.shape
    data = value.to(tensor.dtype) if value is not None and known else torch.ones_like(tensor, device="cpu")
    return nn.Parameter(data, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else data
