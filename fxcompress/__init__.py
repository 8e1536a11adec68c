"""fxcompress: networks that compress themselves while they train."""

from fxcompress.channels.graph import ChannelGraph
from fxcompress.errors import FxCompressError
from fxcompress.pruning import PruneResult, prune

__all__ = ["ChannelGraph", "FxCompressError", "PruneResult", "prune"]
