"""INT8 files by explicit quantization: `quantize_file` is one calibration and one file, `deploy.quantize.guided` finds
the layers that have to stay in float.

Reads and writes ONNX; needs the `onnx` package but not torch.
"""
