"""What the modules of this folder say where the packages are missing that the extra brings."""

NEEDED = 'an export needs ONNX and ONNX Runtime: pip install "fxcompress[onnx]"'
