"""Peak memory of labelling images: it must not grow with their number, but for their names.

    python -m benchmarks pseudo_memory                       # 5,000 and 50,000 images of 64 x 64 pixels
    python -m benchmarks pseudo_memory --images 100,200

Each number is labelled by a process of its own (`compress.pseudo.label`, a nano teacher with random weights) in a
temporary folder; its peak is the largest resident set that the kernel saw. Every image is a file of its own, drawn by
arithmetic from its number. Writes benchmarks/results/pseudo_memory.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.lib.measure import RESULTS
from compress.config.model import Model
from compress.console import open_console
from compress.detectors.checkpoints import ModelRecord, save_detector
from compress.pseudo.images import images_in
from compress.pseudo.label import Settings, pseudo_label
from compress.versions import versions
from deploy.core.environment import environment
from deploy.core.files import write_json

RESULT = RESULTS / "pseudo_memory.json"
SIDE = 64


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", default="5000,50000", metavar="N,N", help="how many, from the fewest on")
    parser.add_argument("--folder", type=Path, help="where to draw; default: a temporary folder")
    parser.add_argument("--out", type=Path, default=RESULT, metavar="FILE")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)  # the process that labels
    arguments = parser.parse_args()
    if arguments.measure is not None:
        print(json.dumps(measure(arguments.measure)))
        return 0
    console = open_console()
    rows = []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        folder = Path(scratch)
        teacher(folder / "teacher.safetensors")
        for count in sorted(int(text) for text in arguments.images.split(",")):
            draw(folder / "images", count)
            command = [sys.executable, "-m", "benchmarks", "pseudo_memory", "--measure", str(folder)]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            rows.append({"images": count, **json.loads(output.splitlines()[-1])})
            console.print(
                f"{count} images: peak {rows[-1]['peak_mb']:.0f} MB, {rows[-1]['before_mb']:.0f} MB before the first, "
                f"{rows[-1]['seconds']:.0f} s"
            )
    growth = (rows[-1]["peak_mb"] - rows[0]["peak_mb"]) * 2**20 / max(1, rows[-1]["images"] - rows[0]["images"])
    console.print(f"growth: {growth:.0f} bytes an image")
    machine = environment()
    write_json(
        arguments.out,
        {
            "date": datetime.date.today().isoformat(),
            "command": " ".join(["python", "-m", "benchmarks", "pseudo_memory", "--images", arguments.images]),
            "versions": versions(),
            "machine": {"cpu": machine["cpu"]["model"], "system": platform.system()},
            "image": [SIDE, SIDE],
            "rows": rows,
            "bytes_an_image": round(growth),
        },
    )
    return 0


def teacher(path: Path) -> None:
    """Random, with scores high enough that there is something to write for every image."""
    record = ModelRecord(
        model=Model(backbone="nano", neck_channels=32, head_depth=0),
        num_classes=2,
        class_names=("cat", "dog"),
        category_ids=(1, 2),
    )
    torch.manual_seed(0)
    detector = record.build()
    with torch.no_grad():
        detector.head.gfl_cls.weight.normal_(std=0.2)
        detector.head.gfl_cls.bias.zero_()
    save_detector(path, detector, metadata=record)


def draw(folder: Path, count: int) -> None:
    """Images 0 to `count`; those that are there stay."""
    for index in range(count):
        path = folder / f"{index // 1000:03}" / f"{index:06}.png"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            cells = np.random.default_rng(index).integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(cells.repeat(SIDE // 8, 0).repeat(SIDE // 8, 1)).save(path, compress_level=1)


def measure(folder: Path) -> dict[str, float]:
    """Label all images of `folder`/images in this process."""
    out = folder / "pseudo.json"
    out.unlink(missing_ok=True)
    settings = Settings(tau=0.6, tau_ignore=0.5, short=SIDE, long=SIDE, batch_size=16)
    before = _peak_mb()
    started = time.perf_counter()
    summary = pseudo_label(
        [str(folder / "teacher.safetensors")], images_in(folder / "images"), out, settings, quiet=True
    )
    assert summary is not None, "there is one shard"
    return {
        "peak_mb": round(_peak_mb(), 1),
        "before_mb": round(before, 1),
        "seconds": round(time.perf_counter() - started, 1),
        "labels": summary.labels,
        "regions": summary.regions,
        "file_mb": round(out.stat().st_size / 2**20, 1),
    }


def _peak_mb() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if platform.system() == "Darwin" else 2**10)


if __name__ == "__main__":
    sys.exit(main())
