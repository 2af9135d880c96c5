"""What FP16 and INT8 cost in accuracy and bring in speed, in ONNX Runtime on the CPU.

    python -m benchmarks quantized speed
    python -m benchmarks quantized accuracy --name bccd --checkpoint student.safetensors --train train.json \
        --val val.json --images FOLDER --size 256 320 --limits 240 320

`accuracy`: mAP on the validation images of the float file, of FP16, of INT8 for `cpu` and for `tensorrt` in four
variants: everything in int8, output layers included (*all*); output layers in float (*naive*, the default); and the
guided search with a budget of 0.5 points (*guided*), which decides on training images that are not for calibration.
`speed`: students with random weights, all cases of a size in turn (see `measure`); int8 with its output
layers in float, which is the default, and with them in int8, which the guided search takes where it may. The two
update their part of one results file.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch

from benchmarks.lib import measure
from benchmarks.suites.data_path import write_photographs
from compress.config.data import Split
from compress.config.deploy import Deploy
from compress.detectors.backbones import build_backbone
from compress.detectors.gfl import GFL
from compress.export.deployable import Deployable, TorchRunner
from compress.export.onnx import export_checkpoint
from compress.run.quantize import split_files, write_search_split
from deploy.core.card import ModelCard, network_precision
from deploy.core.files import write_json
from deploy.core.image import decode_image, fit_canvas, read_image_bytes, to_original
from deploy.core.precisions import file_for
from deploy.graph.export import export_onnx
from deploy.quantize.calibrate import check_apart, choose_images
from deploy.quantize.file import BOXES, SCORES, Quantizer
from deploy.quantize.guided import search
from deploy.runtimes.base import Runner
from deploy.runtimes.onnx import OnnxRunner, session_options
from deploy.validate.accuracy import validate

CLASSES, CALIBRATION, BUDGET = 80, 128, 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=measure.RESULTS / "quantized.json")
    parts = parser.add_subparsers(dest="part", required=True)
    speed = parts.add_parser("speed")
    speed.add_argument("--threads", type=int, default=2)
    speed.add_argument("--repeats", type=int, default=9)
    speed.add_argument("--exports", type=Path, help="folder to keep the exported files in, or to take them from")
    accuracy = parts.add_parser("accuracy")
    accuracy.add_argument("--name", required=True)
    accuracy.add_argument("--checkpoint", required=True)
    for option in ("--train", "--val", "--images"):
        accuracy.add_argument(option, type=Path, required=True)
    accuracy.add_argument("--size", type=int, nargs=2, required=True, help="height width")
    accuracy.add_argument("--limits", type=int, nargs=2, help="short long")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-quantized-") as folder:
        if args.part == "speed":
            found = {f"speed, {args.threads} thread(s)": _speed(args, args.exports or Path(folder))}
        else:
            found = {f"accuracy {args.name}": _accuracy(args, Path(folder))}
    done = json.loads(args.out.read_text(encoding="utf-8")) if args.out.is_file() else {}
    write_json(args.out, {**done, **found})
    print(json.dumps(found, indent=2))
    for part in found.values():
        for bar in part["bars"]:
            if "invalid" in bar:
                print(f"invalid: {bar['name']}: {bar['invalid']}")


# ---------------------------------------------------------------------------------------------- accuracy


def _accuracy(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    settings, size = Deploy(), tuple(args.size)
    limits = tuple(args.limits) if args.limits else None
    out = folder / "student.onnx"
    val = split_files(args.val, args.images)
    for precision in ("fp32", "fp16"):
        export_checkpoint(
            Path(args.checkpoint), file_for(out, precision), settings, input_size=size,
            images=val, limits=limits, precision=precision,
        )  # fmt: skip
    calibration = choose_images(split_files(args.train, args.images), CALIBRATION)
    check_apart(calibration, val)
    labels = Split(annotations=args.train, images=args.images)
    split = write_search_split(labels, calibration, 300, folder / "decide.json")
    files = {"fp32": out, "fp16": file_for(out, "fp16")}
    searches = {}
    for target in ("cpu", "tensorrt"):
        quantizer = Quantizer(out, calibration, target)  # type: ignore[arg-type]
        for name, kept in (("all", ()), ("naive", None)):
            files[f"int8 {target} {name}"] = quantizer.save(folder / f"{target}.{name}.onnx", kept).path
        found = search(quantizer, split.annotations, split.images, folder / f"{target}.json", max_map_drop=BUDGET)
        searches[target] = found.to_dict() | {"sensitivities": len(found.sensitivities)}
        if found.chosen is not None:
            chosen = quantizer.save(folder / f"{target}.guided.onnx", found.chosen.float_layers)
            files[f"int8 {target} guided"] = chosen.path
    runners: dict[str, Runner] = {name: OnnxRunner(path) for name, path in files.items()}
    rows = {}
    for row in validate(runners, args.val, args.images, reference="fp32", max_map_drop=BUDGET):
        rows[row.name] = {
            "precision": network_precision(row.precision),
            "map": round(row.metrics.map, 3),
            "map_drop": round(row.map_drop or 0.0, 3),
            "agreement": round(row.agreement.share, 4) if row.agreement else None,
            "d_ece": round(row.d_ece, 4),
            "size_mb": round(files[row.name].stat().st_size / 1e6, 3),
        }
    bars = [measure.bar("fp16 loses at most 0.1 points", -0.1, -abs(rows["fp16"]["map_drop"]))]
    bars += [measure.bar(f"{name} loses at most 0.5 points", -0.5, -rows[name]["map_drop"])
             for name in rows if name.endswith("guided")]  # fmt: skip
    return measure.record(images=len(val), rows=rows, guided=searches, bars=bars)


# ------------------------------------------------------------------------------------------------- speed


def _speed(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    torch.set_num_threads(args.threads)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "photographs").mkdir(exist_ok=True)
    write_photographs(folder / "photographs", 8)
    photographs = [read_image_bytes(path) for path in sorted((folder / "photographs").glob("*.jpg"))]
    rows: dict[str, Any] = {}
    bars = []
    for backbone, size in (("resnet18", 320), ("resnet50", 320), ("resnet18", 512)):
        files, eager = _student(backbone, size, folder, photographs)
        card = eager.card
        canvas = fit_canvas(decode_image(photographs[0]), card)[0][None]
        cases: dict[str, measure.Case] = {}
        models = {"fp32": files["fp32"].read_bytes(), "fp32 without suppression": _until_dense(files["fp32"])}
        models |= {name: path.read_bytes() for name, path in files.items() if name != "fp32"}
        sessions = {name: _session(model, args.threads) for name, model in models.items()}
        for name, session in sessions.items():
            cases[f"model, {name}"] = lambda session=session, canvas=canvas: _ignore(
                session.run(None, {"images": canvas})
            )
        runners: dict[str, Runner] = {name: OnnxRunner(path, threads=args.threads) for name, path in files.items()}
        for name, runner in {**runners, "torch eager": eager}.items():
            cases[f"end to end, {name}"] = lambda runner=runner: _end_to_end(runner, photographs[0])
        found = measure.interleave(cases, repeats=args.repeats)
        rows[f"{backbone} {size}"] = found
        ms = {name: row["ms"]["median"] for name, row in found.items()}
        label = f"{backbone} at {size}"
        if size == 320:
            for name in ("int8 cpu", "int8 cpu, outputs too"):
                ratio = ms["model, fp32"] / ms[f"model, {name}"]
                bars.append(measure.bar(f"{label}: {name} over fp32, both with suppression", 2.5, ratio))
        else:
            dense = ms["model, fp32 without suppression"]
            share = (ms["model, fp32"] - dense) / (ms["end to end, fp32"] - ms["model, fp32"] + dense)
            bars.append(measure.cost_bar(f"{label}: suppression adds at most 10 % end to end", 0.1, share))
        for name, wanted in (("fp32", 1.4), ("int8 cpu", 4.0), ("int8 cpu, outputs too", 4.0)):
            ratio = ms["end to end, torch eager"] / ms[f"end to end, {name}"]
            bars.append(measure.bar(f"{label}: end to end, {name} over torch eager", wanted, ratio))
    return measure.record(threads=args.threads, rows=rows, bars=bars)


def _student(backbone: str, size: int, folder: Path, photographs: list[bytes]) -> tuple[dict[str, Path], TorchRunner]:
    """Exported files by precision, and the torch module with the same weights."""
    torch.manual_seed(0)
    detector = GFL(CLASSES, build_backbone(backbone, weights="none")).eval()
    names = [f"class {i}" for i in range(CLASSES)]
    card = ModelCard(name=backbone, class_names=names, category_ids=list(range(CLASSES)), input_size=(size, size))
    samples = np.stack([fit_canvas(decode_image(data), card)[0] for data in photographs])
    _spread(detector, torch.from_numpy(samples[:1]))
    module = Deployable.from_card(detector, card)
    out = folder / f"{backbone}_{size}.onnx"
    if not out.is_file():
        export_onnx(module, card, out, samples=samples, max_batch=2)
    files = {"fp32": out, "int8 cpu": file_for(out, "int8"), "int8 cpu, outputs too": file_for(out, "all.int8")}
    for name, kept in (("int8 cpu", None), ("int8 cpu, outputs too", ())):
        if not files[name].is_file():
            photos = sorted((folder / "photographs").glob("*.jpg"))
            Quantizer(out, choose_images(photos, len(photos)), "cpu").save(files[name], kept, max_batch=2)
    return files, TorchRunner(module, card)


@torch.no_grad()
def _spread(detector: GFL, image: torch.Tensor) -> None:
    """Make a thousand (location, class) pairs pass the score threshold, so that suppression has work to do."""
    head = detector.head.gfl_cls
    assert head.bias is not None

    def logits() -> torch.Tensor:
        return torch.cat([level.flatten() for level in detector(image).logits])

    head.weight.mul_(1.5 / logits().std())
    head.bias.zero_()
    head.bias.fill_(float(np.log(0.05 / 0.95) - logits().topk(1000).values[-1]))


def _session(model: bytes, threads: int) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(model, session_options(threads), providers=["CPUExecutionProvider"])


def _until_dense(path: Path) -> bytes:
    model = onnx.load(str(path))
    del model.graph.output[:]
    model.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in (SCORES, BOXES)
    )
    content: bytes = model.SerializeToString()
    return content


def _end_to_end(runner: Runner, data: bytes) -> None:
    """Bytes of an image file to boxes in its pixels."""
    pixels = decode_image(data)
    canvas, scale = fit_canvas(pixels, runner.card)
    found = runner(canvas[None])
    to_original(found.boxes[0, : int(found.count[0])], scale, pixels.shape[:2])


def _ignore(_: Any) -> None:
    return None


if __name__ == "__main__":
    main()
