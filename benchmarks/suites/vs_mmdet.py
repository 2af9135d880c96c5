"""Assignment, losses and backward of GFL against mmdet's, in one process and in turn.

    python -m benchmarks vs_mmdet --mmdet-python PATH/TO/python

mmdet lives in an environment of its own. Our assignment and losses need only torch, so both sides run in that
interpreter: the same torch, the same tensors, the same threads. Without `--mmdet-python` only our side is
measured, and the output says so. Inputs: random head outputs at 800 x 1333, batch 2, 80 classes, with 20 and 100
boxes an image. Losses must agree to 1e-4; then come the times.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any

from benchmarks.lib import child, options
from benchmarks.lib.measure import Call, Timing, environment_of_child, interleave
from benchmarks.lib.mmdet import check_python
from benchmarks.lib.provenance import versions
from benchmarks.lib.results import Case, Row

IMAGE, BATCH, CLASSES = (800, 1333), 2, 80
LEVELS = ((100, 168), (50, 84), (25, 42), (13, 21), (7, 11))  # of 800 x 1344, padded to a multiple of 32
STRIDES = (8, 16, 32, 64, 128)
SIDES = 4 * 17
BOXES = (20, 100)  # an image
TOLERANCE = 1e-4  # relative, of every loss
BARS = {"ours assignment": ">= 4", "ours": ">= 1.5", "ours compiled": ">= 3"}  # times as fast as mmdet


def add_options(parser: argparse.ArgumentParser) -> None:
    options.mmdet(parser)
    options.threads(parser, 2)
    options.repeats(parser, 11)
    options.allocators(parser)
    parser.add_argument("--boxes", type=int, nargs="+", default=BOXES, help="boxes an image")


def run(args: argparse.Namespace) -> Iterator[Case]:
    check_python(args.mmdet_python)
    for allocator in args.allocators:
        for boxes in args.boxes:
            environment = environment_of_child(allocator, args.threads)
            with tempfile.TemporaryDirectory() as folder:
                environment["TORCHINDUCTOR_CACHE_DIR"] = folder  # empty, so that the first call includes compiling
                found = child.call(
                    "benchmarks.suites.vs_mmdet:measure",
                    boxes,
                    args.threads,
                    args.repeats,
                    args.mmdet_python is not None,
                    python=args.mmdet_python,
                    environment=environment,
                )
            timings = {name: Timing(**timing) for name, timing in found["timings"].items()}
            yield Case(f"{boxes} boxes, allocator {allocator}", rows(timings, boxes), found["versions"])


def rows(timings: dict[str, Timing], boxes: int) -> list[Row]:
    """Times, their parts and first calls; and how many times as fast as mmdet's each of ours is."""
    made = []
    for name, timing in timings.items():
        made += [timing.row(name), *timing.part_rows(name), Row(name, "first call", timing.first_call_s, "s")]
        peer = timings.get("mmdet assignment" if "assignment" in name else "mmdet")
        if peer is not None and name.startswith("ours"):
            bar = BARS.get(name, "") if boxes >= 100 or "assignment" not in name else ""
            made.append(Row(name, "times as fast", peer.ms / timing.ms, "×", n=timing.repeats, bar=bar))
    return made


# --- the measured process: it has torch, and mmdet where one was given ------------------------------------


def measure(boxes: int, threads: int, repeats: int, compared: bool) -> dict[str, Any]:
    """`timings` by case and `versions`, after the losses and gradients of all were equal."""
    import torch

    torch.set_num_threads(threads)
    inputs = _inputs(boxes)
    cases, values = _our_cases(inputs)
    if compared:
        theirs, values["mmdet"] = _their_cases(inputs)
        cases = {**theirs, **cases}
        _compare(values, boxes)
    timings = {name: asdict(timing) for name, timing in interleave(cases, repeats=repeats).items()}
    for name, value in values.items():
        timings[name]["first_call_s"] = value["first_call_s"]
    return {"timings": timings, "versions": versions()}


def _inputs(boxes: int) -> dict[str, Any]:
    """Head outputs of an untrained detector and random boxes with sides of 3 % to 50 % of the image's."""
    import torch

    random = torch.Generator().manual_seed(1)
    logits = [torch.randn(BATCH, CLASSES, *size, generator=random) - 4.6 for size in LEVELS]
    distribution = [torch.randn(BATCH, SIDES, *size, generator=random) for size in LEVELS]
    height, width = IMAGE
    extent = torch.tensor([width, height], dtype=torch.float32)
    truth = []
    for _ in range(BATCH):
        draw = torch.rand(boxes, 4, generator=random)
        side = torch.exp(draw[:, 2:] * math.log(0.5 / 0.03)) * 0.03 * extent
        corner = draw[:, :2] * (extent - side)
        labels = torch.randint(CLASSES, (boxes,), generator=random)
        truth.append((torch.cat((corner, corner + side), 1), labels))
    return {"logits": logits, "distribution": distribution, "truth": truth}


def _leaves(inputs: dict[str, Any], memory_format: Any) -> tuple[list[Any], list[Any]]:
    logits, distribution = (
        [x.clone(memory_format=memory_format).requires_grad_() for x in inputs[name]]
        for name in ("logits", "distribution")
    )
    return logits, distribution


def _our_cases(inputs: dict[str, Any]) -> tuple[dict[str, Call], dict[str, Any]]:
    """`ours …` with contiguous maps (what mmdet's get), `… channels last` with what our head really gives."""
    import torch
    from torch import nn

    from compress.data.batch import Target
    from compress.detectors.base import DensePrediction
    from compress.detectors.gfl import GFL

    class NoBackbone(nn.Module):
        out_channels = (8, 8, 8)

    targets = [
        Target(boxes, labels, torch.zeros(len(labels), dtype=torch.bool), None, i, IMAGE, IMAGE)
        for i, (boxes, labels) in enumerate(inputs["truth"])
    ]
    cases: dict[str, Call] = {}
    values = {}
    for compiled in (False, True):
        for memory_format in (torch.contiguous_format, torch.channels_last):
            name = "ours compiled" if compiled else "ours"
            name += " channels last" if memory_format is torch.channels_last else ""
            detector = GFL(CLASSES, NoBackbone(), neck_channels=8, head_depth=1, compiled=compiled)  # type: ignore[arg-type]
            prediction = DensePrediction(*_leaves(inputs, memory_format), STRIDES)

            def step(detector: GFL = detector, prediction: DensePrediction = prediction) -> dict[str, float]:
                for x in (*prediction.logits, *prediction.distribution):
                    x.grad = None
                start = perf_counter()
                assigned = detector.assign(prediction, targets)
                after_assignment = perf_counter()
                losses = detector.loss(prediction, assigned)
                total = torch.stack(list(losses.values())).sum()
                after_losses = perf_counter()
                total.backward()
                return {
                    "assignment": after_assignment - start,
                    "losses": after_losses - after_assignment,
                    "backward": perf_counter() - after_losses,
                }

            start = perf_counter()
            step()  # compiles
            first_call_s = perf_counter() - start
            losses = detector.loss_by_level(prediction, detector.assign(prediction, targets))
            values[name] = {
                "losses": {key: value.tolist() for key, value in losses.items()},
                "gradients": [x.grad for x in (*prediction.logits, *prediction.distribution)],
                "first_call_s": first_call_s,
            }
            cases[name] = step
            if name == "ours":
                cases["ours assignment"] = lambda d=detector, p=prediction: _discard(d.assign(p, targets))
    return cases, values


def _their_cases(inputs: dict[str, Any]) -> tuple[dict[str, Call], dict[str, Any]]:
    import torch

    head, metas, instances = _mmdet_head(inputs)
    logits, distribution = _leaves(inputs, torch.contiguous_format)

    def step() -> None:
        for x in (*logits, *distribution):
            x.grad = None
        losses = head.loss_by_feat(logits, distribution, instances, metas)
        sum(value for levels in losses.values() for value in levels).backward()

    start = perf_counter()
    step()
    first_call_s = perf_counter() - start
    losses = head.loss_by_feat(logits, distribution, instances, metas)
    values = {
        "losses": {key: [float(value) for value in levels] for key, levels in losses.items()},
        "gradients": [x.grad for x in (*logits, *distribution)],
        "first_call_s": first_call_s,
    }
    anchors, valid = head.get_anchors(LEVELS, metas, device="cpu")

    def assignment() -> None:
        # It replaces the entries of its lists: they are copied, as `get_anchors` makes new ones for every step.
        head.get_targets([*map(list, anchors)], [*map(list, valid)], instances, metas)

    return {"mmdet": step, "mmdet assignment": assignment}, values


def _mmdet_head(inputs: dict[str, Any]) -> tuple[Any, list[dict[str, Any]], list[Any]]:
    """mmdet's GFL head as configured for COCO, the images' facts and their ground truth."""
    import mmdet
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules
    from mmengine.config import Config
    from mmengine.structures import InstanceData

    register_all_modules(init_default_scope=True)
    model = Config.fromfile(Path(mmdet.__file__).parent / ".mim/configs/gfl/gfl_r50_fpn_1x_coco.py").model
    head = MODELS.build({**model.bbox_head, "train_cfg": model.train_cfg, "test_cfg": model.test_cfg})
    padded = tuple(-(-side // 32) * 32 for side in IMAGE)
    meta = {
        "img_shape": IMAGE,
        "ori_shape": IMAGE,
        "pad_shape": padded,
        "batch_input_shape": padded,
        "scale_factor": (1.0, 1.0),
    }
    instances = [InstanceData(bboxes=boxes, labels=labels) for boxes, labels in inputs["truth"]]
    return head, [meta] * BATCH, instances


def _compare(values: dict[str, Any], boxes: int) -> None:
    """Every loss of every level, and every gradient, against mmdet's."""
    import torch

    wanted = values["mmdet"]
    for name, value in values.items():
        for key, levels in wanted["losses"].items():
            torch.testing.assert_close(
                torch.tensor(value["losses"][key]),
                torch.tensor(levels),
                rtol=TOLERANCE,
                atol=1e-7,
                msg=lambda text, name=name, key=key: f"{boxes} boxes, {name}, {key}: {text}",
            )
        for ours, theirs in zip(value["gradients"], wanted["gradients"], strict=True):
            difference = float((ours - theirs).norm() / theirs.norm().clamp(min=1e-12))
            if difference > TOLERANCE:
                raise AssertionError(f"{boxes} boxes, {name}: gradients differ by {difference:.2e}")


def _discard(_: object) -> None:
    return None
