"""What training pays for besides its task, as functions of the bit depths.

| file | job |
|---|---|
| `terms.py` | the sums behind all objectives, as flat index arrays |
| `collect.py` | collects them from the analysis of a network |
| `formulas.py` | the objectives with a name: sizes, multiply-adds, activations |
| `latency.py` | an objective that was measured |
| `timing.py` | measures it |
"""

from fxcompress.objectives.collect import size_terms, starting_costs
from fxcompress.objectives.formulas import OBJECTIVES, Objective, objective_of
from fxcompress.objectives.latency import LatencyTable
from fxcompress.objectives.terms import LayerUse, SizeTerms, Start, joined_terms

__all__ = [
    "OBJECTIVES",
    "LatencyTable",
    "LayerUse",
    "Objective",
    "SizeTerms",
    "Start",
    "joined_terms",
    "objective_of",
    "size_terms",
    "starting_costs",
]
