"""Rewrites of GraphModules. Always import this package as ``fxcompress.passes``."""

if __name__ != "fxcompress.passes":
    raise ImportError(
        f"import this package as fxcompress.passes, not as {__name__!r}: a second copy would split its state"
    )

from fxcompress.passes.base import Pass, PassResult
from fxcompress.passes.finalize import Finalize
from fxcompress.passes.fold_constants import FoldConstants
from fxcompress.passes.inject_quantizers import InjectQuantizers
from fxcompress.passes.narrow_branches import NarrowBranches
from fxcompress.passes.prune_channels import PruneChannels

__all__ = ["Finalize", "FoldConstants", "InjectQuantizers", "NarrowBranches", "Pass", "PassResult", "PruneChannels"]
