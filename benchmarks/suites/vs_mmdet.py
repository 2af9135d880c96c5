"""Assignment, losses and backward of GFL against mmdet's, in one process and in turn.

    python -m benchmarks vs_mmdet --mmdet-python PATH/TO/python

mmdet lives in an environment of its own. Our assignment and losses need only torch, so both sides run in that
interpreter: the same torch, the same tensors, the same threads. Without `--mmdet-python` only our side is
measured, and the output says so. Inputs: random head outputs at 800 x 1333, batch 2, 80 classes, with 20 and 100
boxes an image. Losses must agree to 1e-4; then come the times.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

from benchmarks.lib import measure
from deploy.core.files import write_json

HOW_TO_BUILD = """\
no --mmdet-python: only our side is measured. An environment with mmdet 3.3 (any torch that we support will do):
    python3.11 -m venv mmdet-env
    mmdet-env/bin/pip install torch  # its build for the CPU is enough
    mmdet-env/bin/pip install 'setuptools<81' wheel openmim && mmdet-env/bin/pip install mmengine 'mmdet==3.3.0'
    MMCV_WITH_OPS=0 mmdet-env/bin/pip install --no-build-isolation 'mmcv==2.1.0'
then: python -m benchmarks vs_mmdet --mmdet-python mmdet-env/bin/python"""

IMAGE, BATCH, CLASSES = (800, 1333), 2, 80
LEVELS = ((100, 168), (50, 84), (25, 42), (13, 21), (7, 11))  # of 800 x 1344, padded to a multiple of 32
STRIDES = (8, 16, 32, 64, 128)
SIDES = 4 * 17
BOXES = (20, 100)  # an image
TOLERANCE = 1e-4  # relative, of every loss
BARS = {"assignment": 4.0, "eager": 1.5, "compiled": 3.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--mmdet-python",
        type=Path,
        default=os.environ.get("MMDET_PYTHON"),
        help="interpreter of an environment with mmdet 3.3 (default: $MMDET_PYTHON)",
    )
    parser.add_argument("--out", type=Path, default=measure.RESULTS / "vs_mmdet.json")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--boxes", type=int, nargs="+", default=BOXES, help="boxes an image")
    parser.add_argument("--allocators", nargs="+", choices=measure.ALLOCATORS, default=list(measure.ALLOCATORS))
    parser.add_argument("--strict", action="store_true", help="exit 1 when a bar is missed")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        write_json(args.child, _child(args))
        return
    if args.mmdet_python is None:
        print(HOW_TO_BUILD)
    elif not args.mmdet_python.exists():
        parser.error(f"--mmdet-python: {args.mmdet_python} does not exist")
    runs = {allocator: _run_child(args, allocator) for allocator in args.allocators}
    bars = [entry for run in runs.values() for entry in run["bars"]]
    report = measure.record(compared=args.mmdet_python is not None, threads=args.threads, runs=runs, bars=bars)
    write_json(args.out, report)
    _print(report)
    print(f"written: {args.out}")
    if args.strict and not all(entry["met"] for entry in bars):
        sys.exit(1)


def _run_child(args: argparse.Namespace, allocator: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "child.json"
        command = [str(args.mmdet_python or sys.executable), "-m", "benchmarks", "vs_mmdet", "--child", str(out)]
        command += ["--threads", str(args.threads), "--repeats", str(args.repeats)]
        command += ["--boxes", *map(str, args.boxes)]
        command += ["--mmdet-python", str(args.mmdet_python)] if args.mmdet_python else []
        environment = measure.environment_of_child(allocator, args.threads)
        environment["TORCHINDUCTOR_CACHE_DIR"] = folder  # empty, so that the first call includes compiling
        subprocess.run(command, env=environment, cwd=measure.ROOT, check=True)
        return json.loads(out.read_text())


# --- the measured process: it has torch, and mmdet where one was given ------------------------------------


def _child(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    torch.set_num_threads(args.threads)
    groups, bars = {}, []
    for boxes in args.boxes:
        inputs = _inputs(boxes)
        cases, values = _our_cases(inputs)
        if args.mmdet_python:
            theirs, values["mmdet"] = _their_cases(inputs)
            cases = {**theirs, **cases}
            _compare(values, boxes)
        rows = measure.interleave(cases, repeats=args.repeats)
        for name, value in values.items():
            rows[name]["first_call_s"] = value["first_call_s"]
        groups[f"{boxes} boxes"] = {"rows": rows, "losses": {name: v["losses"] for name, v in values.items()}}
        if args.mmdet_python:
            bars += _bars(rows, boxes)
    return {
        "allocator": os.environ.get("BENCH_ALLOCATOR"),
        "versions": measure.versions(),
        "load_average_after": list(os.getloadavg()),
        "groups": groups,
        "bars": [{**entry, "allocator": os.environ.get("BENCH_ALLOCATOR")} for entry in bars],
    }


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


def _our_cases(inputs: dict[str, Any]) -> tuple[dict[str, measure.Case], dict[str, Any]]:
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
    cases: dict[str, measure.Case] = {}
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


def _their_cases(inputs: dict[str, Any]) -> tuple[dict[str, measure.Case], dict[str, Any]]:
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


def _bars(rows: dict[str, Any], boxes: int) -> list[dict[str, Any]]:
    def ratio(theirs: str, ours: str) -> float:
        return rows[theirs]["ms"]["median"] / rows[ours]["ms"]["median"]

    bars = [
        measure.bar(f"step eager, {boxes} boxes", BARS["eager"], ratio("mmdet", "ours")),
        measure.bar(f"step compiled, {boxes} boxes", BARS["compiled"], ratio("mmdet", "ours compiled")),
    ]
    if boxes >= 100:
        seen = ratio("mmdet assignment", "ours assignment")
        bars.insert(0, measure.bar(f"assignment, {boxes} boxes", BARS["assignment"], seen))
    return bars


def _discard(_: object) -> None:
    return None


def _print(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 150)
    for allocator, run in report["runs"].items():
        for group, content in run["groups"].items():
            table = Table(title=f"{group} an image, allocator {allocator}, {report['threads']} threads")
            table.add_column("case")
            for heading in ("ms", "quartiles", "faster than mmdet", "first call s", "others' CPU"):
                table.add_column(heading, justify="right")
            for name, row in content["rows"].items():
                peer = content["rows"].get("mmdet assignment" if "assignment" in name else "mmdet")
                faster = f"{peer['ms']['median'] / row['ms']['median']:.2f}×" if peer else "not compared"
                ms = row["ms"]
                quartiles = f"{ms['q1']:.1f} to {ms['q3']:.1f}"
                busy = f"{row['foreign_cpu']:.0%}" + (" (busy)" if row["disturbed"] else "")
                table.add_row(name, f"{ms['median']:.1f}", quartiles, faster, f"{row['first_call_s']:.1f}", busy)
            console.print(table)
    for entry in report["bars"]:
        verdict = "met" if entry["met"] else "MISSED"
        print(f"{verdict}: {entry['name']} ({entry['allocator']}): {entry['seen']:.2f}× of {entry['wanted']}×")
    if not report["compared"]:
        print("not compared: mmdet was not given (--mmdet-python)")


if __name__ == "__main__":
    main()
