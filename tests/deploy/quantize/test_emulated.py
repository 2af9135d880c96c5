"""int8 files on a processor without integer dot products, which QEMU plays: what is lost there, and that it is told.

Debian's package qemu-user-static brings the emulator, of version 7.2 or later. Without it this is skipped.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deploy.core.environment import integer_dot_product
from deploy.quantize.calibrate import choose_images, list_images
from deploy.quantize.file import Quantizer
from tests.helpers.tiny_onnx import pictures

QEMU = next((path for name in ("qemu-x86_64-static", "qemu-x86_64") if (path := shutil.which(name))), None)
HASWELL = "fma ssse3 sse4_1 sse4_2 avx f16c bmi1 bmi2 avx2"
PROGRAM = """
import sys
from pathlib import Path
import numpy as np
from deploy.runtimes.onnx import OnnxRunner
for file in map(Path, sys.argv[2:]):
    np.save(file.with_suffix(".npy"), OnnxRunner(file, threads=1)(np.load(sys.argv[1])).scores)
"""
pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.skipif(QEMU is None, reason="qemu-x86_64 is not installed: no other processor is tried"),
    pytest.mark.skipif(not integer_dot_product(), reason="this processor has no integer dot product itself"),
]


def _scores(files: list[Path], images: Path, *before: str | Path) -> tuple[list[np.ndarray], str]:
    """What the files answer in a process of its own, and what it says. before: words that start it."""
    words = [*before, sys.executable, "-c", PROGRAM, images, *files]
    paths = os.pathsep.join(sys.path)
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths}, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return [np.load(file.with_suffix(".npy")) for file in files], done.stderr


def test_eight_bits_lose_and_seven_do_not(tiny_onnx: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for index, picture in enumerate(pictures(8, seed=5)):
        Image.fromarray(picture.transpose(1, 2, 0)).save(tmp_path / "images" / f"{index}.png")
    np.save(tmp_path / "pictures.npy", pictures(4, seed=6))
    chosen = choose_images(list_images(tmp_path / "images"), 8)
    files = [tmp_path / f"{bits}.onnx" for bits in (8, 7)]
    for file in files:
        Quantizer(tiny_onnx, chosen, "cpu", reduce_range=file.stem == "7").save(file)
    (tmp_path / "root" / "proc").mkdir(parents=True)  # the emulator shows this in place of the machine's own
    (tmp_path / "root" / "proc" / "cpuinfo").write_text(f"flags\t\t: {HASWELL}\n")
    assert QEMU is not None
    here, nothing = _scores(files, tmp_path / "pictures.npy")
    there, said = _scores(files, tmp_path / "pictures.npy", QEMU, "-cpu", "Haswell", "-L", tmp_path / "root")
    eight, seven = (float(np.abs(a - b).max()) for a, b in zip(here, there, strict=True))
    assert seven < 1e-5 and eight > 1e-3, (seven, eight)
    assert "8.onnx: this processor adds products of 8-bit weights in 16 bits" in said and "7.onnx" not in said
    assert "16 bits" not in nothing
