"""One module a question; `benchmarks.__main__` runs them."""

from __future__ import annotations

SUITES: dict[str, tuple[str, str, str]] = {
    name: (f"benchmarks.suites.{module}", question, takes)
    for name, module, question, takes in (
        ("vs_mmdet", "vs_mmdet", "assignment, losses and backward against mmdet's GFL head", "5 min"),
        ("data_path", "data_path", "the training loader against mmdet's pipeline", "5 min"),
        ("latency", "latency", "an ONNX file against PyTorch eager, end to end", "3 min"),
        ("serve", "serve", "`compress serve` under load against the raw runtime", "25 min; --quick: 2 min"),
        ("quantized", "quantized", "what FP16 and INT8 cost in mAP and bring in speed", "10 min a part"),
        ("kernels", "kernels.operators", "fused operators against eager and compiled PyTorch", "15 min on a CPU"),
        ("method_cost", "method_cost", "what each method adds to a training step", "5 min"),
        ("distill_gain", "distill_gain", "what distillation gains over plain training, over seeds", "1 to 2 h"),
        ("pseudo_gain", "pseudo_gain", "what pseudo labels are worth, over seeds", "40 min"),
        ("qad", "qad", "mAP that quantization-aware distillation gives back, over seeds", "20 min"),
        ("pseudo_memory", "pseudo_memory", "memory of pseudo-labelling many images", "5 min"),
    )
}
"""Name -> (module, question, how long it takes)."""
