"""The modules of a model, as nn.Module tells them; without a generator in a generator for each level of the tree."""

from torch import nn


def modules_in(root: nn.Module) -> list[nn.Module]:
    """What ``root.modules()`` returns: each module once, parents first, in order."""
    found: dict[int, nn.Module] = {}
    open_ = [root]
    while open_:
        module = open_.pop()
        if id(module) not in found:
            found[id(module)] = module
            if module._modules:
                open_ += [child for child in reversed(module._modules.values()) if child is not None]
    return list(found.values())


def elements_in(root: nn.Module) -> int:
    """How many entries the parameters of a model have, those that have several names once."""
    return sum(parameter.numel() for parameter in root.parameters())


def named_modules_in(root: nn.Module) -> dict[str, nn.Module]:
    """What ``dict(root.named_modules(remove_duplicate=False))`` is: each module under all of its names."""
    found: dict[str, nn.Module] = {}
    open_ = [("", root)]
    while open_:
        path, module = open_.pop()
        found[path] = module
        if module._modules:
            prefix = f"{path}." if path else ""
            children = reversed(module._modules.items())
            open_ += [(f"{prefix}{name}", child) for name, child in children if child is not None]
    return found
