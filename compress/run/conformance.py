"""Conformance kit for a user's own detector: does it do what `compress` will ask of it?

    for check in check_model("mypkg.models:MyDetector"):
        print(check.name, check.problem or "ok")

Every check asks what some part of the product relies on: shapes and strides (methods), loss and gradient (the
trainer), one image without objects, export at batch 1, 2 and the largest against torch, saving, loading, resuming.
The checks go through the code that real runs go through. What can be seen in seconds on generated images is seen here,
before hours of training depend on it.
"""

from __future__ import annotations

import copy
import io
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from pydantic import ValidationError
from torch import Tensor
from torchvision.ops import box_iou

from compress.config.deploy import Deploy
from compress.config.messages import problems
from compress.config.model import Model
from compress.config.train import Optimizer, Schedule, Train
from compress.config.yaml_document import Document
from compress.data.batch import Batch, Target
from compress.data.coco import CocoDetection
from compress.data.loader import train_loader
from compress.data.synthetic import generate
from compress.data.transforms import eval_transform
from compress.detectors.base import Capability, Detector, ImageSize
from compress.detectors.build import build_detector
from compress.detectors.checkpoints import ModelRecord, load_detector, save_detector
from compress.export.onnx import export_checkpoint, torch_runner
from compress.manifest import TrainingFolder
from compress.training.loop import Training, fit
from deploy.core.errors import UserError
from deploy.core.import_path import is_import_path
from deploy.core.shown import some
from deploy.runtimes.onnx import OnnxRunner
from deploy.validate.coco import CocoMetrics

CLASSES = 3
SIZE = (96, 128)  # height, width: not square, so that exchanged sides show
OTHER_SIZE = (64, 160)
SEED = 0
LEARNING_STEPS = 150
LARGEST_BATCH = 4


@dataclass(frozen=True)
class Check:
    """One line of the report: problem is None where all is well. skipped: it could not be asked, and why."""

    name: str
    problem: str | None = None
    skipped: str | None = None


def check_model(
    detector: str,
    *,
    options: Mapping[str, Any] | None = None,
    backbone: str | None = None,
    backbone_options: Mapping[str, Any] | None = None,
) -> Iterator[Check]:
    """Check a detector by its import path, as a recipe would name it. Takes some seconds for a small one.

    Raises UserError when the import path leads to no detector or its constructor refuses; everything after that is a
    `Check`.
    """
    given = {"options": options, "backbone": backbone, "backbone_options": backbone_options}
    if not is_import_path(detector):
        raise UserError(f"'{detector}' is no import path; write package.module:Name")
    content = {"detector": detector, **{key: value for key, value in given.items() if value is not None}}
    try:
        model = Model.model_validate(content)
    except ValidationError as error:
        raise UserError("\n".join(problems(error, content, Document(None), Model))) from None
    with tempfile.TemporaryDirectory() as folder:
        subject = _Subject(model, build_detector(model, CLASSES, SEED), Path(folder))
        failed: set[str] = set()
        for name, (needed, look) in CHECKS.items():
            missing = sorted(failed & set(needed))
            if missing:
                failed.add(name)
                yield Check(name, skipped=f"needs {', '.join(missing)}")
                continue
            if name in ("export", "formats") and subject.detector.exportable is not None:
                yield Check(name, skipped=f"the class says why not: {subject.detector.exportable}")
                continue
            try:
                problem = look(subject)
            except Exception as error:  # whatever the code under test raises is what is to be reported
                problem = _where(error)
            if problem is not None:
                failed.add(name)
            yield Check(name, problem)


@dataclass
class _Subject:
    """The detector under test and what the checks share. trained: it after a short training."""

    model: Model
    detector: Detector
    folder: Path
    trained: Detector | None = None
    _saved: Path | None = field(default=None, repr=False)

    def fresh(self) -> Detector:
        return build_detector(self.model, CLASSES, SEED)

    def saved(self) -> Path:
        """A checkpoint of the trained detector."""
        if self._saved is None:
            detector = self.trained or self.detector
            classes = {"num_classes": CLASSES, "class_names": ("a", "b", "c"), "category_ids": (1, 2, 3)}
            record = ModelRecord.model_validate({"model": self.model, **classes})
            self._saved = self.folder / "detector.safetensors"
            save_detector(self._saved, detector, metadata=record)
        return self._saved


# --- the checks, in the order in which they are made ------------------------------------------------------------


def _shapes(subject: _Subject) -> str | None:
    detector = subject.detector.eval()
    for height, width in (SIZE, OTHER_SIZE):
        maps = detector.features(_images(2, (height, width)))
        if len(maps) != len(detector.strides):
            return f"features gives {len(maps)} maps for {len(detector.strides)} strides"
        for x, stride in zip(maps, detector.strides, strict=True):
            expected = [2, detector.feature_channels, -(-height // stride), -(-width // stride)]
            if list(x.shape) != expected:
                return f"a map of stride {stride} is {list(x.shape)} for images of {height} x {width}, not {expected}"
    return None


def _prediction(subject: _Subject) -> str | None:
    detector = subject.detector.eval()
    if Capability.DENSE not in detector.capabilities:
        return None
    maps = detector.features(_images(2))
    prediction = detector.predict(maps)
    if prediction.strides != detector.strides:
        return f"the prediction's strides are {prediction.strides}, the detector's {detector.strides}"
    for x, logits in zip(maps, prediction.logits, strict=True):
        expected = [2, prediction.anchors * detector.num_classes, *x.shape[2:]]
        if list(logits.shape) != expected:
            return f"logits are {list(logits.shape)}, not {expected} = [B, anchors * classes, h, w]"
    scores = prediction.float().scores()
    if not (scores >= 0).all() or not (scores <= 1).all():
        return f"scores lie in {float(scores.min()):g}..{float(scores.max()):g}, not in 0..1"
    return None


def _boxes(subject: _Subject) -> str | None:
    detector = subject.detector.eval()
    if Capability.DENSE not in detector.capabilities:
        return None
    prediction = detector(_images(2)).float()
    boxes = detector.decode_boxes(prediction).detach()
    total = sum(prediction.counts)
    if list(boxes.shape) != [2, total, 4]:
        return f"decode_boxes gives {list(boxes.shape)}, not {[2, total, 4]} = [B, predictions, 4]"
    if not boxes.isfinite().all():
        return "decode_boxes gives boxes that are not finite"
    if (boxes[..., 2:] < boxes[..., :2]).any():
        return "decode_boxes gives boxes whose second corner is left of or above the first: are they xyxy?"
    centres = (boxes[..., :2] + boxes[..., 2:]) / 2
    expected = _locations(prediction.level_sizes, prediction.strides, prediction.anchors)
    reach = torch.cat([torch.full((n,), float(s)) for n, s in zip(prediction.counts, prediction.strides, strict=True)])
    away = float(((centres - expected).abs().amax(-1) / reach).median())
    if away > 3:
        return (
            f"boxes lie {away:.0f} strides away from their locations: are they x before y, and in "
            "pixels of the network image?"
        )
    return None


def _independence(subject: _Subject) -> str | None:
    detector = subject.detector.eval()
    images = _images(2)
    if not _same(_flat(detector(images)), _flat(detector(images))):
        return "the same images twice give two results in eval mode"
    together = [x[:1] for x in _flat(detector(images))]
    alone = _flat(detector(images[:1]))
    if not _close(together, alone):
        return "an image gives another result beside another image in eval mode: images of a batch must not mix"
    return None


def _loss(subject: _Subject) -> str | None:
    detector = subject.fresh().train()
    losses = _losses(detector, _batch())
    problem = _broken_losses(losses)
    if problem is not None:
        return problem
    torch.stack(list(losses.values())).sum().backward()
    trained = [(name, p) for name, p in detector.named_parameters() if p.requires_grad]
    idle = [name for name, p in trained if p.grad is None or not bool(p.grad.any())]
    if idle:
        return f"no gradient reaches {some(idle)}; freeze what does not train with requires_grad_(False)"
    wild = [name for name, p in trained if p.grad is not None and not p.grad.isfinite().all()]
    return f"the gradient of {some(wild)} is not finite" if wild else None


def _empty(subject: _Subject) -> str | None:
    detector = subject.fresh().train()
    for what, batch in (("without objects", _batch(objects=0)), ("of crowds alone", _batch(crowd=True))):
        losses = _losses(detector, batch)
        problem = _broken_losses(losses)
        if problem is not None:
            return f"with images {what}: {problem}"
        torch.stack(list(losses.values())).sum().backward()
        if not all(p.grad is None or p.grad.isfinite().all() for p in detector.parameters()):
            return f"with images {what}: a gradient is not finite"
    return None


def _learning(subject: _Subject) -> str | None:
    detector, batch = subject.fresh().train(), _batch()
    optimizer = torch.optim.AdamW([p for p in detector.parameters() if p.requires_grad], lr=2e-3)
    values = []
    for _ in range(LEARNING_STEPS):
        total = torch.stack(list(_losses(detector, batch).values())).sum()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        values.append(float(total.detach()))
    first, last = values[0], sum(values[-5:]) / 5
    subject.trained = detector.eval()
    if not last < 0.7 * first:
        return f"the loss on one batch falls from {first:.3g} to {last:.3g} only in {LEARNING_STEPS} steps of AdamW"
    found = detector.decode(detector(batch.images), [ImageSize(SIZE, SIZE)] * len(batch.targets))
    for target, image in zip(batch.targets, found, strict=True):
        for box, label in zip(target.boxes, target.labels, strict=True):
            overlaps = box_iou(image.boxes.view(-1, 4), box[None])[:, 0]
            if not len(overlaps) or float(overlaps.max()) < 0.4:
                return "objects that it learned by heart are not found: do loss and decode_boxes mean the same boxes?"
            if int(image.labels[int(overlaps.argmax())]) != int(label):
                return "objects that it learned by heart get the label of another class"
    return None


def _decoding(subject: _Subject) -> str | None:
    detector = (subject.trained or subject.detector).eval()
    images, (height, width) = _batch().images, SIZE
    small = detector.decode(detector(images), [ImageSize(SIZE, SIZE)] * 2, score_threshold=0.01)
    large = detector.decode(detector(images), [ImageSize(SIZE, (2 * height, 3 * width))] * 2, score_threshold=0.01)
    for a, b in zip(small, large, strict=True):
        if len(a.boxes) != len(b.boxes) or len(a.boxes) != len(a.scores) or len(a.boxes) != len(a.labels):
            return "decode gives another number of boxes, scores or labels for a larger original of the same picture"
        if (a.boxes[:, 2:] > torch.tensor([width, height]) + 0.5).any() or (a.boxes < -0.5).any():
            return "decode gives boxes outside of the original image"
        if not torch.allclose(a.boxes * torch.tensor([3.0, 2, 3, 2]), b.boxes, rtol=1e-3, atol=0.1):
            return "decode does not scale boxes to pixels of the original image"
        if len(a.scores) > 1 and (a.scores[1:] > a.scores[:-1]).any():
            return "decode gives detections that are not sorted, best first"
    return None


def _copies(subject: _Subject) -> str | None:
    detector = (subject.trained or subject.detector).eval()
    twin = copy.deepcopy(detector).eval()
    if not _close(_flat(twin(_images(1))), _flat(detector(_images(1)))):
        return "a deep copy gives other results; moving averages and float16 files are made of copies"
    return None


def _loading(subject: _Subject) -> str | None:
    detector = (subject.trained or subject.detector).eval()
    loaded, _ = load_detector(subject.saved())
    if not _close(_flat(loaded.eval()(_images(2))), _flat(detector(_images(2)))):
        return (
            "saved and loaded it gives other results: is there state that is neither parameter nor buffer, or an "
            "option that changes?"
        )
    return None


def _resuming(subject: _Subject) -> str | None:
    data = subject.folder / "data"
    generate(data, train=8, val=4, size=64, classes=CLASSES, seed=0)
    whole, parts = (subject.folder / name for name in ("whole", "parts"))
    once = _trained(subject, data, whole, [None])
    twice = _trained(subject, data, parts, [2, None])
    different = [key for key, value in once.items() if not torch.equal(value, twice[key])]
    if different:
        return f"stopped and resumed it ends with other values of {some(different)} than trained in one go"
    return None


def _export(subject: _Subject) -> str | None:
    """`export_checkpoint` compares with torch itself; here the batch sizes that it must not freeze."""
    settings = Deploy(max_batch=LARGEST_BATCH, score_threshold=0.01)
    images = _pictures(subject.folder)
    file = subject.folder / "detector.onnx"
    try:
        export_checkpoint(subject.saved(), file, settings, input_size=SIZE, images=images)
    except Exception as error:
        if "invalid dimensions" not in str(error):  # what ONNX Runtime says of a batch that the graph does not take
            raise
        return "the exported graph takes one batch size only: something in forward counts the images (len, unbind, int)"
    exported = OnnxRunner(file, ("cpu",))
    torch_side = torch_runner(str(subject.saved()), settings, SIZE)
    for batch in (1, 2, LARGEST_BATCH):
        pixels = _images(batch).numpy()
        exported_batch, torch_batch = exported(pixels), torch_side(pixels)
        in_file, in_torch = exported_batch.count, torch_batch.count
        if abs(in_file - in_torch).max() > 1:
            return f"at batch {batch} the file finds {in_file.tolist()} boxes, torch {in_torch.tolist()}"
    return None


def _formats(subject: _Subject) -> str | None:
    file = subject.folder / "detector.fp16.onnx"
    settings = Deploy(max_batch=2)
    images = _pictures(subject.folder)
    export_checkpoint(subject.saved(), file, settings, input_size=SIZE, images=images, precision="fp16")
    return None


CHECKS: dict[str, tuple[tuple[str, ...], Callable[[_Subject], str | None]]] = {
    "shapes": ((), _shapes),
    "prediction": (("shapes",), _prediction),
    "boxes": (("prediction",), _boxes),
    "independence": (("shapes",), _independence),
    "loss": (("prediction",), _loss),
    "empty images": (("loss",), _empty),
    "learning": (("loss", "boxes"), _learning),
    "decoding": (("boxes",), _decoding),
    "copies": (("shapes",), _copies),
    "saving": (("copies",), _loading),
    "resuming": (("loss", "saving"), _resuming),
    "export": (("boxes", "saving"), _export),
    "formats": (("export",), _formats),
}
"""Name → the checks that it builds on, and the function: what is wrong, or None."""


# --- details ----------------------------------------------------------------------------------------------------


def _images(count: int, size: tuple[int, int] = SIZE) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, 3, *size), dtype=torch.uint8, generator=generator)


def _batch(*, objects: int = 2, crowd: bool = False) -> Batch:
    """Two images with rectangles of one colour a class on grey noise."""
    boxes = torch.tensor([[8.0, 16, 56, 72], [72, 24, 120, 64]])[:objects]
    images = _images(2) // 8 + 96
    targets = []
    for index in range(2):
        labels = torch.tensor([index, 2])[:objects]
        for (x1, y1, x2, y2), label in zip(boxes.int().tolist(), labels.tolist(), strict=True):
            images[index, :, y1:y2, x1:x2] = 20
            images[index, label, y1:y2, x1:x2] = 235
        ignored = torch.full((len(boxes),), crowd)
        targets.append(Target(boxes.clone(), labels, ignored, None, index, SIZE, SIZE))
    return Batch(images, targets)


def _losses(detector: Detector, batch: Batch) -> dict[str, Tensor]:
    prediction = detector.predict_in_training(detector.features(batch.images), batch.targets)
    if Capability.DENSE in detector.capabilities:
        prediction = prediction.float()
    return detector.loss(prediction, detector.assign(prediction, batch.targets))


def _broken_losses(losses: Any) -> str | None:
    if not isinstance(losses, dict) or not losses:
        return f"loss gives a {type(losses).__name__}, not a dict of named scalars"
    for name, value in losses.items():
        if not isinstance(value, Tensor) or value.dim() or value.dtype != torch.float32:
            what = f"{list(value.shape)} of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
            return f"the loss {name} is {what}, not a float32 scalar"
        if not value.isfinite():
            return f"the loss {name} is {float(value)}"
    if not any(value.requires_grad for value in losses.values()):
        return "no loss has a gradient"
    return None


def _trained(subject: _Subject, data: Path, folder: Path, stops: list[int | None]) -> dict[str, Tensor]:
    """Weights after 4 steps of the real trainer, stopped and resumed at `stops`."""
    settings = Train(
        steps=4, batch_size=4, ema=0.9, optimizer=Optimizer(lr=1e-3), schedule=Schedule(name="cosine", warmup_steps=1)
    )
    fabric = Fabric(accelerator="cpu", devices=1)
    weights: dict[str, Tensor] = {}
    for index, stop in enumerate(stops):
        fabric.seed_everything(SEED, verbose=False)
        detector = subject.fresh()
        images = CocoDetection(data / "train.json", data / "images", eval_transform(64, 64))
        training = Training(
            name="check-model", folder=TrainingFolder(folder), settings=settings, identity="check-model",
            loader=train_loader(images, batch_size=4, seed=SEED, workers=0), evaluate=lambda _: _no_metrics(),
        )  # fmt: skip
        with redirect_stdout(io.StringIO()):  # its progress does not belong in the checks' output
            fit(fabric, detector, training, resume=index > 0, max_steps=stop)
        weights = {key: value.clone() for key, value in detector.state_dict().items()}
    return weights


def _no_metrics() -> CocoMetrics:
    """The resumed weights are looked at, not their accuracy."""
    return CocoMetrics(0, 0, 0, 0, 0, 0, 0)


def _pictures(folder: Path) -> list[Path]:
    data = folder / "pictures"
    generate(data, train=1, val=4, size=128, classes=CLASSES, seed=0)
    return sorted((data / "images").iterdir())


def _locations(sizes: list[tuple[int, int]], strides: tuple[int, ...], anchors: int) -> Tensor:
    """Centre of every prediction's cell, [A, 2] x and y in pixels."""
    levels = []
    for (h, w), stride in zip(sizes, strides, strict=True):
        y, x = torch.meshgrid(torch.arange(h) + 0.5, torch.arange(w) + 0.5, indexing="ij")
        levels.append((torch.stack((x, y), -1).view(-1, 2) * stride).repeat_interleave(anchors, 0))
    return torch.cat(levels)


def _flat(prediction: Any) -> list[Tensor]:
    """The tensors of a prediction."""
    if isinstance(prediction, Tensor):
        return [prediction.detach()]
    values = prediction.values() if isinstance(prediction, Mapping) else prediction
    if hasattr(prediction, "__dict__") and not isinstance(prediction, (list, tuple, Mapping)):
        values = vars(prediction).values()
    elif not isinstance(prediction, (list, tuple, Mapping)):
        return []
    return [x for value in values for x in _flat(value)]


def _same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def _close(a: list[Tensor], b: list[Tensor]) -> bool:
    """Equal but for the order of sums, which depends on sizes and memory formats."""
    return len(a) == len(b) and all(torch.allclose(x, y, rtol=1e-3, atol=1e-4) for x, y in zip(a, b, strict=True))


def _where(error: Exception) -> str:
    """The error and the line of the detector's own code that raised it, or the last line of all."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [Path(__file__).parents[2] / package for package in ("compress", "deploy", "kernels")]
    own = [f for f in frames if not set(ours) & set(Path(f.filename).parents) and "site-packages" not in f.filename]
    frame = own[-1] if own else frames[-1]
    text = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {text} ({Path(frame.filename).name}:{frame.lineno})"
