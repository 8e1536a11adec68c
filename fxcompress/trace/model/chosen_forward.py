"""A ``forward`` that a module has chosen among its methods: ``self.forward = self.forward_fused``."""

from types import MethodType

from torch import nn


def chosen_forward(module: nn.Module) -> str | None:
    """The name of the method that runs as ``forward``; None where what was set is no method of the module's own."""
    chosen = module.__dict__.get("forward")
    if chosen is None:
        return "forward"
    if not isinstance(chosen, MethodType) or chosen.__self__ is not module:
        return None
    name: str = chosen.__name__
    known = getattr(type(module), name, None) is chosen.__func__
    torchs = type(module).__module__.split(".")[0] == "torch"  # whose layers are left whole, for what they are
    return name if known and (name == "forward" or not torchs) else None


def rebound(value: object, old: nn.Module, new: nn.Module) -> object:
    """An attribute that moves from one module to another; a method of the one becomes that of the other."""
    return MethodType(value.__func__, new) if isinstance(value, MethodType) and value.__self__ is old else value
