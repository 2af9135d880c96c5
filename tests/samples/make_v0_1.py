"""Made tests/samples/v0_1 with the code of version 0.1 (see README.md beside this file); does not run with a later one.

The weights repeat one short pattern, so that the files compress to almost nothing, and class biases are 0, so that
scores lie around 0.5.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from compress import arms, cli
from compress.data.batch import Target
from compress.detectors.checkpoints import ModelRecord, load_detector, save_detector

RECIPE = """\
name: sample
data:
  synthetic: {train: 8, val: 4, size: 64, classes: 3, seed: 0}
  short: 64
  long: 64
  workers: 0
teacher:
  model: &model {backbone: nano, weights: none, neck_channels: 32, head_depth: 0}
  train: &train
    steps: 2
    batch_size: 4
    clip_norm: null
    optimizer: {name: sgd, lr: 1e-30, momentum: 0, weight_decay: 0}
    schedule: {name: cosine, warmup_steps: 0}
student: *model
methods: {bckd: {}, fgd: {}}
train: *train
baseline: true
deploy:
  precisions: [fp32, int8]
  score_threshold: 0.5
  candidates: 100
  int8: {images: 4}
  benchmark: {batch_sizes: [1], seconds: 0.2}
"""
FAMILIES = {
    "gfl": {}, "fcos": {}, "retinanet": {"anchor_scale": 4.0}, "faster_rcnn": {"roi_samples": 64},
}  # fmt: skip


def patterned(detector: torch.nn.Module) -> torch.nn.Module:
    pattern = torch.from_numpy(np.random.default_rng(0).normal(size=1021).astype(np.float16).astype(np.float32))
    pattern = pattern - pattern.mean()
    for module in detector.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.momentum = 0.0  # its statistics stay 0 and 1
    with torch.no_grad():
        for parameter in detector.parameters():
            if parameter.dim() > 1:
                index = torch.arange(parameter.numel()) % len(pattern)
                values = pattern[index].view(parameter.shape) * 0.85 * (2 / parameter[0].numel()) ** 0.5
                parameter.copy_(values)
            elif parameter.numel() and parameter.max() < -2:  # the prior of focal losses
                parameter.zero_()
    return detector


def picture() -> np.ndarray:
    """uint8 [64, 64, 3]: smooth, with two rectangles."""
    y, x = np.mgrid[:64, :64]
    image = np.stack([4 * x, 4 * y, 2 * (x + y)], -1).astype(np.uint8)
    image[10:30, 8:28] = (220, 40, 40)
    image[36:60, 30:50] = (30, 60, 230)
    return image


def detections(path: Path) -> dict[str, list[object]]:
    """The ten best of the picture."""
    detector, _ = load_detector(path)
    images = torch.from_numpy(picture()).permute(2, 0, 1)[None]
    nothing = torch.zeros(0)
    target = Target(nothing.view(0, 4), nothing.long(), nothing.bool(), None, 0, (64, 64), (64, 64))
    with torch.no_grad():
        (found,) = detector.decode(detector(images), [target])
    best = slice(10)
    return {
        "boxes": [[round(v, 4) for v in row] for row in found.boxes[best].tolist()],
        "scores": [round(v, 6) for v in found.scores[best].tolist()],
        "labels": found.labels[best].tolist(),
    }


def onnx_detections(path: Path) -> dict[str, list[object]]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    boxes, scores, labels, count = session.run(None, {"images": picture().transpose(2, 0, 1)[None]})
    best = slice(min(10, int(count[0])))
    return {
        "boxes": [[round(v, 4) for v in row] for row in boxes[0, best].tolist()],
        "scores": [round(v, 6) for v in scores[0, best].tolist()],
        "labels": labels[0, best].tolist(),
    }


def run(*words: str) -> None:
    try:
        cli.main(list(words))
    except SystemExit as stop:
        assert stop.code in (0, None), words
        print("exit", stop.code, words)


def main() -> None:
    recorded: dict[str, object] = {}
    Image.fromarray(picture()).save("picture.png")
    build = arms.build_detector
    arms.build_detector = lambda *args, **kwargs: patterned(build(*args, **kwargs))
    Path("sample.yaml").write_text(RECIPE)
    with torch.no_grad():
        model = patterned(ModelRecord(backbone="nano", num_classes=3, neck_channels=32, head_depth=0).build()).eval()
        features = model.features(torch.from_numpy(picture()).permute(2, 0, 1)[None])
        print([round(float(x.std()), 3) for x in features], [float(x.std()) for x in model.predict(features).logits])
    run("run", "sample.yaml")
    for family, options in FAMILIES.items():
        record = ModelRecord(
            detector=family, backbone="nano", num_classes=3, neck_channels=32, head_depth=0,
            class_names=("disc", "square", "triangle"), category_ids=(1, 2, 3), val_map=1.5, **options,
        )  # fmt: skip
        path = Path(f"{family}.safetensors")
        save_detector(path, patterned(record.build()).eval(), metadata=record)
        recorded[path.name] = detections(path)
    for name in ("student.onnx", "student.int8.onnx"):
        recorded[f"runs/sample/{name}"] = onnx_detections(Path("runs/sample") / name)
    recorded["runs/sample/student.safetensors"] = detections(Path("runs/sample/student.safetensors"))
    Path("detections.json").write_text(json.dumps(recorded, indent=1) + "\n")
    from tests.deploy.test_engine_card import write  # the card of an engine that does not exist

    write(Path("."), "student.engine")


if __name__ == "__main__":
    sys.exit(main())
