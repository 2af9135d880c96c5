"""Peak memory of labelling images: it must not grow with their number, but for their names.

    python -m benchmarks pseudo_memory                       # 5,000 and 50,000 images of 64 x 64 pixels
    python -m benchmarks pseudo_memory --images 100,200

Each number is labelled by a process of its own (`compress.pseudo.label`, a nano teacher with random weights) in a
temporary folder; its peak is the largest resident set that the kernel saw. Every image is a file of its own, drawn by
arithmetic from its number.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.lib import child
from benchmarks.lib.labelling import SIDE, draw, peak_mb, teacher
from benchmarks.lib.results import Case, Row
from compress.pseudo.images import images_in
from compress.pseudo.label import pseudo_label
from compress.pseudo.settings import Settings


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", default="5000,50000", metavar="N,N", help="how many, from the fewest on")
    parser.add_argument("--folder", type=Path, help="where to draw; default: a temporary folder")


def run(args: argparse.Namespace) -> Iterator[Case]:
    rows = []
    peaks: dict[int, float] = {}
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        folder = Path(scratch)
        teacher(folder / "teacher.safetensors")
        for count in sorted(int(text) for text in args.images.split(",")):
            draw(folder / "images", count)
            found = child.call("benchmarks.suites.pseudo_memory:measure", str(folder))
            peaks[count] = found["peak"]
            rows += [Row(f"{count} images", name, value, UNITS[name]) for name, value in found.items()]
    fewest, most = min(peaks), max(peaks)
    growth = (peaks[most] - peaks[fewest]) * 2**20 / max(1, most - fewest)
    yield Case(
        f"images of {SIDE} x {SIDE}", [*rows, Row(f"{fewest} to {most} images", "growth", growth, "bytes/image")]
    )


UNITS = {"peak": "MB", "peak before the first image": "MB", "seconds": "s", "labels": "", "regions": "", "file": "MB"}
"""Of what `measure` returns."""


def measure(folder: str) -> dict[str, float]:
    """Label all images of `folder`/images in this process."""
    out = Path(folder) / "pseudo.json"
    out.unlink(missing_ok=True)
    settings = Settings(tau=0.6, tau_ignore=0.5, short=SIDE, long=SIDE, batch_size=16)
    before = peak_mb()
    started = time.perf_counter()
    images = images_in(Path(folder) / "images")
    summary = pseudo_label([f"{folder}/teacher.safetensors"], images, out, settings, quiet=True)
    assert summary is not None, "there is one shard"
    values = (
        peak_mb(), before, time.perf_counter() - started, summary.labels, summary.regions, out.stat().st_size / 2**20
    )  # fmt: skip
    return dict(zip(UNITS, values, strict=True))
