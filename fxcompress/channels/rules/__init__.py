"""Rules for classes of ATen ops; importing this package fills the table."""

from fxcompress.channels.rules import (
    contraction,
    indexing,
    movement,
    norms,
    pointwise,
    products,
    puts,
    reductions,
    regions,
    scatter,
    spectra,
    sums,
    windows,
)
from fxcompress.channels.rules.registry import OpClass, register, registered, rule_of

__all__ = [
    "OpClass",
    "contraction",
    "indexing",
    "movement",
    "norms",
    "pointwise",
    "products",
    "puts",
    "reductions",
    "regions",
    "register",
    "registered",
    "rule_of",
    "scatter",
    "spectra",
    "sums",
    "windows",
]
