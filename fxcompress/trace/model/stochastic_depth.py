"""Stochastic depth: layers of libraries that leave out whole branches at random in training, as dropout does entries.

Like dropout they read their mode when they run. So they are leaves of the graph, which is the same one in both modes.
"""

from torch import nn

_NAMES = frozenset({("torchvision.ops.stochastic_depth", "StochasticDepth"), ("timm.layers.drop", "DropPath")})


def is_stochastic_depth(module: nn.Module) -> bool:
    """Whether a module returns its input in evaluation, and in training its input times a number for each sample."""
    return (type(module).__module__, type(module).__qualname__) in _NAMES
