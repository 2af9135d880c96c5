"""Query distillation and DDF on two gloo processes, with the halves of a batch: their mean is the term of all of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

pytest.importorskip("transformers")
pytest.importorskip("scipy")

from compress.data.batch import Batch
from compress.detectors.transformers.real_time_detr import DFine, RealTimeDetr
from compress.distill.ddf import DDF
from compress.distill.kd_detr import KDDETR
from tests.helpers import tiny_detr
from tests.helpers.methods import build

IMAGES = ((0, 1), (2, 3))
"""Of the two processes: with three objects, one, none and three."""


def batch(images: tuple[int, ...]) -> Batch:
    three = tiny_detr.batch()
    order = torch.tensor([(0, 1, 2, 0)[image] for image in images])
    pixels = three.images[order].clone()
    pixels[torch.tensor(images) == 3] ^= 255
    return Batch(pixels, [three.targets[int(image)] for image in order])


def settled(detector: RealTimeDetr) -> RealTimeDetr:
    """With the statistics of all four images: those of a share would be another computation, and those of a fresh
    network hide what is in an image."""
    for norm in (m for m in detector.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        norm.momentum = None  # the plain mean
    with torch.no_grad():
        detector.train().features(batch(IMAGES[0] + IMAGES[1]).images)
    return detector.eval()


def terms(images: tuple[int, ...]) -> dict[str, float]:
    pictures = batch(images)
    student, teacher = settled(tiny_detr.tiny(DFine)), settled(tiny_detr.other(DFine))
    student.network.decoder.train()
    ours, theirs = tiny_detr.outputs(student, teacher, pictures)
    found: dict[str, float] = {}
    for method in (build(KDDETR, random_queries=5), build(DDF)):
        found |= {name: float(value.detach()) for name, value in method(ours, theirs, pictures).items()}
    return found


def share(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=2)
    torch.save(terms(IMAGES[rank]), folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.exhaustive
def test_two_processes_equal_one(tmp_path: Path) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    mp.spawn(share, (tmp_path,), nprocs=2)
    halves = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for name, wanted in terms(IMAGES[0] + IMAGES[1]).items():
        assert wanted > 1e-4
        assert (halves[0][name] + halves[1][name]) / 2 == pytest.approx(wanted, rel=1e-5), name
        assert halves[0][name] != pytest.approx(wanted, rel=1e-3), "the shares differ"
