"""Networks as graphs: ONNX and .pt2 files, CUDA graphs."""
