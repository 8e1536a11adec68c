"""Files for other runtimes: ONNX, with the integers of the weights in it."""

from fxcompress.export.onnx_export import OnnxExport, export_onnx

__all__ = ["OnnxExport", "export_onnx"]
