"""fxcompress: networks that compress themselves while they train."""

from fxcompress.channels.graph import ChannelGraph
from fxcompress.compress import compress
from fxcompress.errors import FxCompressError
from fxcompress.fitting import fit
from fxcompress.loading import load
from fxcompress.objectives import LatencyTable
from fxcompress.pruning import PruneResult, prune
from fxcompress.storage.file import save
from fxcompress.training.compressed import CompressedModule

__all__ = [
    "ChannelGraph",
    "CompressedModule",
    "FxCompressError",
    "LatencyTable",
    "PruneResult",
    "compress",
    "fit",
    "load",
    "prune",
    "save",
]
