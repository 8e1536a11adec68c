"""The quantizer: signed fixed point with a trained bit depth and a trained exponent for each output channel.

Source: S. Cséfalvay and J. Imber, "Self-Compressing Neural Networks", arXiv 2301.13142 (the *paper*), equation 1.
"""

from fxcompress.quantizer.arithmetic import RANGE_BITS
from fxcompress.quantizer.codes import code_bounds, code_count, storage_bits
from fxcompress.quantizer.function import quantize, quantize_reference
from fxcompress.quantizer.layout import (
    channel_dims,
    channels_of,
    from_rows,
    is_grouped,
    per_channel,
    rows,
    split_groups,
)
from fxcompress.quantizer.module import Quantizer, compile_quantizers

__all__ = [
    "RANGE_BITS",
    "Quantizer",
    "channel_dims",
    "channels_of",
    "code_bounds",
    "code_count",
    "compile_quantizers",
    "from_rows",
    "is_grouped",
    "per_channel",
    "quantize",
    "quantize_reference",
    "rows",
    "split_groups",
    "storage_bits",
]
