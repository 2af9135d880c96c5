"""Quantization-aware distillation (QAD): the trained student goes on learning, with the same teacher and methods, while
its weights and activations are rounded as in its int8 file.

    start = calibrated_grids(...)                # post-training quantization
    train_quantized(fabric, plan, teacher=...)   # student.qad.safetensors and student.qad.json
    quantize_trained(...)                        # student.qad.onnx, compared with the network that was trained

`student.qad.safetensors` is a checkpoint like any other: float weights that are good to round. `student.qad.json` has
the trained grids of the activations, which become the scales and zero points of the ONNX file, bit for bit.

An experiment, and all of it in this folder: it is for detectors that are `quantizable`, and `benchmarks/results/` says
what it gains beside as many more steps in float.
"""
