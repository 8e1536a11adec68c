"""fxcompress: networks that compress themselves while they train."""

from fxcompress.channels.graph import ChannelGraph
from fxcompress.checkpoint import load_checkpoint, save_checkpoint
from fxcompress.compress import compress
from fxcompress.errors import FxCompressError
from fxcompress.export import OnnxExport, export_onnx
from fxcompress.fitting import fit
from fxcompress.loading import load
from fxcompress.objectives import LatencyTable
from fxcompress.pruning import PruneResult, prune
from fxcompress.report.summary import Summary, summary
from fxcompress.searching import fit_to_accuracy
from fxcompress.selecting import select_channels
from fxcompress.storage.file import save
from fxcompress.training.compressed import CompressedModule
from fxcompress.training.in_pieces import CompressedPieces
from fxcompress.training.policy import PrunePolicy
from fxcompress.training.schedule import cosine

__all__ = [
    "ChannelGraph",
    "CompressedModule",
    "CompressedPieces",
    "FxCompressError",
    "LatencyTable",
    "OnnxExport",
    "PrunePolicy",
    "PruneResult",
    "Summary",
    "compress",
    "cosine",
    "export_onnx",
    "fit",
    "fit_to_accuracy",
    "load",
    "load_checkpoint",
    "prune",
    "save",
    "save_checkpoint",
    "select_channels",
    "summary",
]
