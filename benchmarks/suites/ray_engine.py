"""Labelling by actors of a Ray cluster against shards of the local engine, and memory of the process that drives them.

    python -m benchmarks ray_engine
    python -m benchmarks ray_engine --images 300,3000

The ResNet-18 student of `compress init`, with random weights, labels photographs of 640 x 480, seen at 320 x 240, with
two local processes (`--shard`) and with two actors of a Ray that is started for it. Time runs from the first chunk that
is written to the last one, of both processes together, so that what comes before, imports, Ray, opening the teacher,
stands apart. The memory is that of the driver (`compress pseudo-label --engine ray`), with a nano teacher on pictures
of 64 x 64, which are hard links. Ray is local: nothing crosses a network.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.lib import child
from benchmarks.lib.labelling import SIDE, draw, peak_mb, teacher
from benchmarks.lib.photographs import write_photographs
from benchmarks.lib.results import Case, Row
from compress.config.model import Model
from compress.detectors.checkpoints import ModelRecord, save_detector
from compress.pseudo import parts
from compress.pseudo.images import images_in
from compress.pseudo.label import pseudo_label
from compress.pseudo.parts import Shard
from compress.pseudo.settings import Settings
from deploy.core.on_ray import Cluster

ACTORS, BATCH = 2, 8
STUDENT = Model(backbone="resnet18", weights="none", neck_channels=128, head_depth=2)
"""That which `compress init` takes where there is time."""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pictures", type=int, default=3000, metavar="N", help="that the ResNet-18 labels")
    parser.add_argument("--images", default="3000,30000", metavar="N,N", help="of the memory, from the fewest on")


def run(args: argparse.Namespace) -> Iterator[Case]:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        yield _time(folder / "time", args.pictures)
        yield _memory(folder / "memory", sorted(int(text) for text in args.images.split(",")))


def label(folder: str, images: str, name: str, short: int, shard: list[int] | None) -> dict[str, float]:
    """Label `folder`/`images` in this process, as a shard or by a cluster. Returns the times (s since the epoch) of the
    first and the last chunk, and the peak of the memory."""
    at: list[float] = []
    write = parts.append

    def append(*arguments: Any) -> None:
        at.append(time.time())
        write(*arguments)

    parts.append = append  # the only place that knows when a chunk is done
    settings = Settings(tau=0.9, tau_ignore=0.8, short=short, long=short * 4 // 3, batch_size=BATCH)
    pseudo_label(
        [f"{folder}/teacher.safetensors"],
        images_in(Path(folder) / images),
        Path(folder) / f"{name}.json",
        settings,
        shard=Shard(*shard) if shard else Shard(0, 1),
        cluster=None if shard else Cluster(actors=ACTORS),
        quiet=True,
    )
    return {"first": at[0], "last": at[-1], "peak": peak_mb()}


# --- details --------------------------------------------------------------------------------------------


def _time(folder: Path, count: int) -> Case:
    for name in ("images", "originals"):
        (folder / name).mkdir(parents=True)
    write_photographs(folder / "originals", 24)
    originals = sorted((folder / "originals").glob("*.jpg"))
    for index in range(count):
        os.link(originals[index % len(originals)], folder / "images" / f"{index:06}{originals[0].suffix}")
    record = ModelRecord(model=STUDENT, num_classes=3, class_names=("a", "b", "c"))
    save_detector(folder / "teacher.safetensors", record.build(), metadata=record)
    started = time.time()
    with ThreadPoolExecutor(ACTORS) as pool:
        local = list(pool.map(lambda index: _label(folder, "images", "local", 240, [index, ACTORS]), range(ACTORS)))
    begun = time.time()
    ray = _label(folder, "images", "ray", 240, None)
    same = (folder / "local.json").read_bytes() == (folder / "ray.json").read_bytes()
    seconds = max(found["last"] for found in local) - min(found["first"] for found in local)
    # What both had done when the first chunk was written is not in the time: a chunk each, and a piece each.
    seconds /= count - ACTORS * BATCH
    on_ray = (ray["last"] - ray["first"]) / max(1, count - ACTORS * Cluster.images)
    return Case(
        f"{count} photographs of 640 x 480",
        [
            Row(f"{ACTORS} processes", "start-up", min(found["first"] for found in local) - started, "s"),
            Row(f"{ACTORS} processes", "labelling", 1e3 * seconds, "ms/image"),
            Row(f"Ray, {ACTORS} actors", "start-up", ray["first"] - begun, "s"),
            Row(f"Ray, {ACTORS} actors", "labelling", 1e3 * on_ray, "ms/image"),
            Row(f"Ray, {ACTORS} actors", "the same bytes", float(same), bar=">= 1"),
            Row(f"Ray, {ACTORS} actors", "labelling against processes", on_ray / seconds, "×", bar="<= 1.15"),
        ],
    )


def _label(folder: Path, *arguments: Any) -> dict[str, float]:
    """`label` in a process of its own, with one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    found: dict[str, float] = child.call(f"{__name__}:label", str(folder), *arguments, environment=environment)
    return found


def _memory(folder: Path, counts: list[int]) -> Case:
    draw(folder / "originals", 100)
    teacher(folder / "teacher.safetensors")
    originals = sorted((folder / "originals").rglob("*.png"))
    rows, peaks = [], {}
    for count in counts:
        (folder / str(count)).mkdir()
        for index in range(count):
            os.link(originals[index % len(originals)], folder / str(count) / f"{index:06}.png")
        found = _label(folder, str(count), f"of {count}", SIDE, None)
        peaks[count] = found["peak"]
        rows.append(Row(f"{count} images", "peak of the driver", found["peak"], "MB"))
    grown = (peaks[counts[-1]] - peaks[counts[0]]) * 2**20 / max(1, counts[-1] - counts[0])
    growth = Row(f"{counts[0]} to {counts[-1]} images", "growth", grown, "bytes/image")
    return Case(f"images of {SIDE} x {SIDE}, Ray", [*rows, growth])
