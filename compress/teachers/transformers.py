"""Object detectors of Hugging Face transformers as teachers: DETR, RT-DETR, D-FINE and every other one with an image
processor with `post_process_object_detection`.

Model and processor are read from a local folder (`save_pretrained`); nothing is downloaded, and no code in the folder
runs. The processor prepares the original image and turns the output into boxes, so this module knows nothing of a
model's conventions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from compress.config.teacher import is_class
from compress.detectors.base import Capability, Detector, ImageDetections
from compress.detectors.build import wrapped
from compress.detectors.transformers.load import downloaded, quiet
from compress.teachers.base import Preprocessing, Sample, View, final, original
from deploy.core.errors import UserError
from deploy.core.files import sha256_of


class TransformersTeacher:
    """Teacher in a folder of transformers.

    Args:
        folder: with config.json, preprocessor_config.json and weights; or the model's name on the Hub.

    Raises:
        UserError: transformers is not installed, or the folder holds no such detector.
    """

    view = View.ORIGINAL

    def __init__(self, folder: Path, device: torch.device) -> None:
        folder = downloaded("teacher.transformers.model", str(folder))
        for name, writer in (("config.json", "a detector"), ("preprocessor_config.json", "its image processor")):
            if not (folder / name).is_file():
                raise UserError(f"{folder}: no {name} in it; save_pretrained of {writer} writes it there")
        try:
            from transformers import AutoImageProcessor, AutoModelForObjectDetection
        except ImportError as error:
            raise UserError(
                f"{folder}: teachers of transformers need that package ({error}); "
                "pip install 'compress-detectors[transformers]'"
            ) from None
        try:
            with quiet():  # parts of a model that are not in the file would be random, in silence
                self._processor = AutoImageProcessor.from_pretrained(str(folder), local_files_only=True)
                model, loading = AutoModelForObjectDetection.from_pretrained(
                    str(folder), local_files_only=True, output_loading_info=True
                )
        except Exception as error:  # whatever a foreign library makes of foreign files
            raise UserError(f"{folder}: transformers cannot load it as a detector: {_line(error)}") from error
        lost = [*sorted(loading["missing_keys"]), *sorted(map(str, loading.get("mismatched_keys", ())))]
        if lost:
            raise UserError(
                f"{folder}: its weights do not fit its config: missing {len(lost)} key(s), the first is {lost[0]}"
            )
        if not hasattr(self._processor, "post_process_object_detection"):
            raise UserError(f"{folder}: {type(self._processor).__name__} cannot make boxes of a model's output")
        self._model, self._device = model.requires_grad_(False).eval().to(device), device
        self.file, self.sha256 = folder.resolve().name, _folder_sha256(folder)
        self.settings: Mapping[str, Any] = {}
        names = {int(label): str(name) for label, name in model.config.id2label.items()}
        labels = [label for label in sorted(names) if is_class(names[label])]
        self.class_names: tuple[str, ...] | None = tuple(names[label] for label in labels)
        if not labels or len(set(self.class_names)) < len(labels):
            raise UserError(f"{folder}: config.json: id2label: classes without a name of their own")
        self._ours = torch.full((max(names) + 1,), -1, dtype=torch.int64, device=device)
        self._ours[labels] = torch.arange(len(labels), device=device)
        self.preprocessing: Preprocessing | None = _described(self._processor)
        self.detector: Detector | None = wrapped(model)
        self.capabilities = frozenset({Capability.BOXES})
        if self.detector is not None:
            self.detector.set_normalisation(*_normalisation(self._processor))
            self.detector.requires_grad_(False).eval().to(device)
            if len(labels) < len(names):  # some are no classes, so its logits are not those of class_names
                self.detector.capabilities &= {Capability.FEATURES, Capability.BOXES}
            self.capabilities = self.detector.capabilities

    def covers(self, ids: Sequence[int] | None, names: Sequence[str], folder: Path) -> str | None:
        return None

    @torch.inference_mode()
    def detect(self, samples: Sequence[Sample], *, score_threshold: float) -> list[ImageDetections]:
        """Images of one size share a batch: some processors would pad others, and models notice that."""
        groups: dict[tuple[int, int], list[int]] = {}
        for index, sample in enumerate(samples):
            groups.setdefault(sample.size.original, []).append(index)
        found: dict[int, ImageDetections] = {}
        for size, group in groups.items():
            pictures = [original(samples[index]) for index in group]
            inputs = self._processor(images=pictures, input_data_format="channels_first", return_tensors="pt")
            outputs = self._model(**inputs.to(self._device))
            sizes = torch.tensor([size] * len(group), device=self._device)
            results = self._processor.post_process_object_detection(  # keeps scores above the threshold
                outputs, threshold=score_threshold * (1 - 1e-6), target_sizes=sizes
            )
            for index, result in zip(group, results, strict=True):
                labels = self._label(result["labels"])
                known = labels >= 0
                found[index] = final(
                    result["boxes"][known], result["scores"][known], labels[known],
                    size=size, score_threshold=score_threshold,
                )  # fmt: skip
        return [found[index] for index in range(len(samples))]

    def _label(self, labels: torch.Tensor) -> torch.Tensor:
        """Labels of ours for those of the model, -1 where it has no class."""
        inside = labels < len(self._ours)
        return torch.where(inside, self._ours[labels.clamp(max=len(self._ours) - 1)], -1)


# --- details --------------------------------------------------------------------------------------------


def _folder_sha256(folder: Path) -> str:
    """Hash the names and contents of the files that decide what the model finds."""
    digest = hashlib.sha256()
    kinds = (".json", ".safetensors", ".bin")
    for path in sorted(path for path in folder.iterdir() if path.suffix in kinds and path.is_file()):
        digest.update(f"{path.name} {sha256_of(path)}\n".encode())
    return digest.hexdigest()


def _described(processor: Any) -> Preprocessing:
    size = processor.size if isinstance(processor.size, Mapping) else vars(processor.size)  # a class of its own since 5
    wanted = {key: value for key, value in size.items() if value is not None}
    if not getattr(processor, "do_resize", True):
        words = "as in the file"
    elif {*wanted} == {"height", "width"}:
        words = f"stretched to {wanted['width']} x {wanted['height']}"
    elif {*wanted} == {"shortest_edge", "longest_edge"}:
        words = f"short side {wanted['shortest_edge']}, long side {wanted['longest_edge']}"
    else:
        words = ", ".join(f"{key} {value}" for key, value in wanted.items())
    return Preprocessing(words, "RGB", *_normalisation(processor))


def _normalisation(processor: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation that the processor normalises with, of RGB pixels 0..255."""
    unit = 1 / processor.rescale_factor if getattr(processor, "do_rescale", False) else 1.0
    if not getattr(processor, "do_normalize", False):
        return (0.0, 0.0, 0.0), (unit, unit, unit)
    mean, std = (tuple(value * unit for value in getattr(processor, f"image_{name}")) for name in ("mean", "std"))
    return mean, std


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
