"""The precisions of exported files: one table for the recipe, the exporter, engines and the command line.

PRECISIONS["int8"].source      # "fp32": the file that it is quantized from
file_for(Path("student.onnx"), "int8", "tensorrt")
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from deploy.core.files import ONNX_SUFFIX

PrecisionName = Literal["fp32", "fp16", "bf16", "int8", "mixed"]
"""The keys of `PRECISIONS`, where a type is asked for."""
Target = Literal["cpu", "tensorrt"]
"""Whose format a quantized file is in."""
TENSORRT: Target = "tensorrt"
"""The format of quantized files that engines are built from."""


@dataclass(frozen=True)
class Precision:
    """A kind of exported file.

    what: in words, for help and documents.
    source: the precision of the float file that it is made from; a float file's own name.
    suffix: between the student's name and `.onnx`.
    targets: the formats that it can be quantized in, the usual one first; none: it is a float file.
    half: the network computes in float16.
    computed: the format that the runtime is told to compute in, where the graph is that of `source`; None: the graph's.
    providers: where such a file runs (`deploy.runtimes.providers`); none named: everywhere.
    several_formats: its convolutions and matrix products are of several formats, and no one of them has to prevail.
    score_tolerance: largest difference from torch that the export check allows.
    box_tolerance_px: the same for boxes, in pixels; None: `box_tolerance` holds.
    box_tolerance: the same as a share of the canvas' longer side.
    """

    what: str
    source: str
    suffix: str
    targets: tuple[Target, ...] = ()
    half: bool = False
    computed: str | None = None
    providers: tuple[str, ...] = ()
    several_formats: bool = False
    score_tolerance: float = 1e-3
    box_tolerance_px: float | None = 0.25
    box_tolerance: float = 0.0

    @property
    def quantized(self) -> bool:
        return bool(self.targets)

    def box_tolerance_on(self, canvas: tuple[int, int]) -> float:
        """Pixels, on a canvas of (height, width)."""
        return self.box_tolerance * max(canvas) if self.box_tolerance_px is None else self.box_tolerance_px


PRECISIONS: dict[str, Precision] = {
    "fp32": Precision("as it was trained", source="fp32", suffix=""),
    "fp16": Precision(
        "the network in float16",
        source="fp16",
        suffix=".fp16",
        half=True,
        # Wider everywhere, also where the distances of an empty place are a coin toss.
        score_tolerance=0.01,
        box_tolerance_px=None,
        box_tolerance=0.005,
    ),
    "bf16": Precision(
        "the fp32 file, computed in bfloat16 by OpenVINO",
        source="fp32",
        suffix=".bf16",
        computed="bf16",
        providers=("openvino", "openvino-gpu", "openvino-npu"),
    ),
    "int8": Precision("int8 layers, the rest in float32", source="fp32", suffix=".int8", targets=("cpu", TENSORRT)),
    "mixed": Precision(
        "int8 layers, the rest in float16", source="fp16", suffix=".mixed", targets=(TENSORRT,), several_formats=True
    ),
}
"""Name → what it is. A quantized one is checked by its own comparison (`deploy.quantize`), not by these tolerances."""


def file_for(out: Path, precision: str, target: Target | None = None) -> Path:
    """Return the file of a precision: `student.onnx`, `student.int8.onnx`.

    target: named in the file when it is not the format that the run writes under the plain name:
    `student.int8.tensorrt.onnx`.
    """
    words = PRECISIONS[precision].suffix + (f".{target}" if target is not None else "")
    return out.with_suffix(f"{words}{ONNX_SUFFIX}") if words else out


def sources(precisions: Iterable[str]) -> list[str]:
    """The float files that these precisions need, fp32 first."""
    needed = {PRECISIONS[name].source for name in precisions}
    return [name for name in PRECISIONS if name in needed]
