"""Detectors on disk: our own safetensors files, and mmdet's official GFL checkpoints read without mmdet.

`save_detector` and `load_detector` are the native format: weights, and in the file's header what is needed
to rebuild the model (`ModelRecord`). `load_mmdet_gfl` maps an official `.pth` onto our modules; `fetch` gets
one of the published ones (`ZOO`). `load_teacher_checkpoint` takes either, or `zoo:NAME`.

Keys that are missing from a file, left over in it or of another shape are an error that names them.
"""

from __future__ import annotations

import json
import re
import shutil
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Annotated, Any, Self

import rich.progress
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from rich.console import Console
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

from compress.config.families import BACKBONES
from compress.config.model import Model
from compress.detectors.base import Detector
from compress.detectors.build import FAMILIES, assemble
from compress.detectors.weights import load_exactly, read_tensors
from deploy.core import storage
from deploy.core.card import OperatingPoint
from deploy.core.errors import UserError
from deploy.core.files import atomic_path, sha256_of
from deploy.core.import_path import is_import_path
from deploy.core.shown import some

HEADER_KEY = "metadata_json"
NATIVE_SUFFIX = ".safetensors"
TORCH_SUFFIXES = (".pth", ".pt")
ARCHITECTURE = tuple(
    key for key in Model.model_fields if key not in ("weights", "frozen_stages", "norm_eval", "size", "init")
)
"""Keys of a model that say what it is, not how it was trained."""


_SINCE_6 = ("resize_short_long", "operating_point")
"""Fields of a record that version 6 has for the first time; None of them is not written."""


class ModelRecord(BaseModel):
    """Description of the model in a checkpoint.

    model: what to build; weights, frozen_stages and norm_eval of a training are not kept.
    class_names, category_ids: of the training data, in the order of the labels; None where nothing says.
    val_map: COCO mAP on the validation set, percent.
    resize_short_long: (short, long), limits in pixels of the images that it was trained and evaluated on; None: nothing
        says.
    operating_point: measured there; None: it was not.
    recipe_sha256: of the recipe that trained it.
    source: where the weights came from, for a converted checkpoint.

    In the file the settings of the model stand beside the others. Version 2 knows users' own parts, by import path
    with their options, version 3 the widths of a pruned one, version 4 BatchNorm in the head, version 5 detectors of
    transformers, version 6 what training measured besides: `resize_short_long` and the operating point. A file without
    such is written as version 1 was: byte for byte, and readable by 0.1.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: Model
    num_classes: Annotated[int, Field(ge=1)]
    class_names: tuple[str, ...] | None = None
    category_ids: tuple[int, ...] | None = None
    val_map: float | None = None
    resize_short_long: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] | None = None
    operating_point: OperatingPoint | None = None
    recipe_sha256: str | None = None
    source: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_file(cls, fields: Any) -> Any:
        if not isinstance(fields, dict) or "model" in fields:
            return fields
        fields = dict(fields)
        if fields.pop("schema_version", 1) not in (1, 2, 3, 4, 5, 6):
            raise ValueError("schema_version: Input should be 1 to 6; a newer version wrote this file")
        model = {key: fields.pop(key) for key in ARCHITECTURE if key in fields}
        for key, known in (("detector", FAMILIES), ("backbone", BACKBONES)):
            value = model.get(key)
            if isinstance(value, str) and value not in known and not is_import_path(value):
                raise ValueError(f"{key} {value!r} is unknown; known are {', '.join(known)}")
        return {"model": model, **fields}

    @field_validator("model")
    @classmethod
    def _bare(cls, model: Model) -> Model:
        return model.bare()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.resize_short_long is not None and self.resize_short_long[0] > self.resize_short_long[1]:
            raise ValueError(f"resize_short_long: {self.resize_short_long[0]} is more than {self.resize_short_long[1]}")
        for name in ("class_names", "category_ids"):
            values = getattr(self, name)
            if values is not None and len(values) != self.num_classes:
                raise ValueError(f"{name} has {len(values)} entries for {self.num_classes} classes")
        return self

    @property
    def has_own_parts(self) -> bool:
        """Whether loading runs code that the file names."""
        return self.model.is_own or is_import_path(self.model.backbone or "")

    def to_json(self) -> str:
        """The text in the file's header."""
        model = self.model.model_dump(mode="json", include=set(ARCHITECTURE))
        absent = {key for key in _SINCE_6 if getattr(self, key) is None}
        others = self.model_dump(mode="json", exclude={"model", *absent})
        first = {"schema_version": self._schema_version()}
        first |= {key: model.pop(key) for key in ("detector", "backbone")} | {"num_classes": others.pop("num_classes")}
        return json.dumps(first | model | others, ensure_ascii=False, separators=(",", ":"))

    def _schema_version(self) -> int:
        if any(getattr(self, key) is not None for key in _SINCE_6):
            return 6
        if self.model.is_whole:
            return 5
        if self.model.head_norm != "group":
            return 4
        return 3 if self.model.widths else 2 if self.has_own_parts else 1

    def build(self) -> Detector:
        """The model with random weights, nothing frozen, in training mode.

        Random numbers come from a fork of torch's generator, so that loading a teacher does not change what a run draws
        afterwards. Users' own parts are imported and called.
        """
        with torch.random.fork_rng(devices=[]):
            return assemble(self.model, self.num_classes)


def save_detector(path: Path, detector: Detector, *, metadata: ModelRecord) -> None:
    """Write weights and `metadata` to a `.safetensors` file, whole or not at all.

    Raises ValueError if `metadata` does not describe `detector`: such a file could not be loaded again. Raises
    UserError where that is so because a user's own class does not build the same model again.
    """
    if path.suffix != NATIVE_SUFFIX:
        raise UserError(f"{path}: a detector is saved as {NATIVE_SUFFIX}; give the file that ending")
    check_described(path, detector, metadata)
    state = {key: tensor.detach().cpu().contiguous() for key, tensor in detector.state_dict().items()}
    with atomic_path(path) as temporary:
        save_file(state, temporary, metadata={HEADER_KEY: metadata.to_json()})


def check_described(path: Path, detector: Detector, metadata: ModelRecord) -> None:
    """Raise what `save_detector` would, for the file at `path`: before a training, whose result could not be saved."""
    # Shapes alone: no memory, no random numbers. The constructors of users and of transformers may want real tensors.
    with nullcontext() if metadata.has_own_parts or metadata.model.is_whole else torch.device("meta"):
        described = {key: tensor.shape for key, tensor in metadata.build().state_dict().items()}
    if {key: tensor.shape for key, tensor in detector.state_dict().items()} == described:
        return
    if not metadata.has_own_parts:
        raise ValueError(f"metadata does not describe the detector: {metadata!r}")
    arguments = metadata.model.options or "none"
    raise UserError(
        f"{path}: {metadata.model.detector} built again from its options ({arguments}) has other weights than the "
        "model to save, so it could not be loaded; its constructor must make the same model of the same arguments, and "
        "an object has them in its attribute `options`"
    )


def load_detector(path: Path) -> tuple[Detector, ModelRecord]:
    """The detector in a native file, float32 on the CPU in eval mode, and what the file says about it.

    A file of a user's own detector names a class; that module is imported and the class is called, so open only those
    whose author you trust. It must be installed, or lie in the working directory: nothing of it is in the file.

    Raises UserError for a file that is absent, damaged, from a newer version or not from `save_detector`, and for an
    own part that cannot be imported.
    """
    state = read_tensors(path)  # first: it says clearly when the file is absent or damaged
    record = _read_record(path)
    try:
        detector = record.build()
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    load_exactly(detector, state, source=str(path))
    return detector.eval(), record


def load_mmdet_gfl(
    path: Path,
    *,
    class_names: Sequence[str] | None = None,
    category_ids: Sequence[int] | None = None,
    val_map: float | None = None,
    source: str | None = None,
) -> tuple[Detector, ModelRecord]:
    """The detector in an mmdet GFL checkpoint (ResNet-18/34/50/101), on the CPU in eval mode.

    Depth, number of classes and widths come from the keys and shapes. mmdet's `integral.project`, which is
    0..16 in every file, and BatchNorm's batch counters may be absent. Without `class_names`, 80 classes are
    taken for COCO's unless the file's own list of names says otherwise.

    Raises UserError for an unreadable file, another kind of model, and missing or unexpected keys.
    """
    state = read_tensors(path)
    record = _record_of_mmdet(path, state)
    if class_names is None:
        class_names = _names_in(path, record.num_classes)
    if class_names is None and record.num_classes == len(COCO_CATEGORIES):
        class_names = tuple(COCO_CATEGORIES.values())
    if category_ids is None and class_names is not None and list(class_names) == list(COCO_CATEGORIES.values()):
        category_ids = tuple(COCO_CATEGORIES)
    record = _validated(
        path,
        dict(record)
        | {
            "class_names": class_names,
            "category_ids": category_ids,
            "val_map": val_map,
            "source": source or path.name,
        },
    )
    detector = record.build()
    state.pop("bbox_head.integral.project", None)
    load_exactly(detector, state, source=str(path), file_key=mmdet_key)
    return detector.eval(), record


@dataclass(frozen=True)
class Published:
    """An official checkpoint trained on COCO train2017.

    url: its last eight hexadecimal digits before `.pth` begin the file's SHA-256 (torch.hub's convention).
    val_map: published box AP on val2017, percent.
    """

    url: str
    val_map: float

    @property
    def filename(self) -> str:
        return self.url.rpartition("/")[2]

    @property
    def sha256_prefix(self) -> str:
        return self.filename.removesuffix(".pth").rpartition("-")[2]


_OPENMMLAB = "https://download.openmmlab.com/mmdetection/v2.0/gfl"
ZOO = {
    "gfl_r50_fpn_1x_coco": Published(
        f"{_OPENMMLAB}/gfl_r50_fpn_1x_coco/gfl_r50_fpn_1x_coco_20200629_121244-25944287.pth", 40.2
    ),
    "gfl_r50_fpn_mstrain_2x_coco": Published(
        f"{_OPENMMLAB}/gfl_r50_fpn_mstrain_2x_coco/gfl_r50_fpn_mstrain_2x_coco_20200629_213802-37bb1edc.pth",
        42.9,
    ),
    "gfl_r101_fpn_mstrain_2x_coco": Published(
        f"{_OPENMMLAB}/gfl_r101_fpn_mstrain_2x_coco/gfl_r101_fpn_mstrain_2x_coco_20200629_200126-dd12f847.pth",
        44.7,
    ),
}


def zoo_model(name: str) -> Model:
    """The architecture of `ZOO[name]`, without its file."""
    return Model(backbone="resnet101" if "_r101_" in name else "resnet50")


PACKAGED = {"quickstart": "quickstart_teacher.safetensors"}
"""Teachers that come with the package, `zoo:<name>`: file names in compress/assets."""


def fetch(name: str) -> Path:
    """The file of `ZOO[name]`, downloaded to ~/.cache/compress unless it is there; its SHA-256 is checked.

    Raises UserError for an unknown name, a failed download and a file with another hash.
    """
    if name not in ZOO:
        raise UserError(f"zoo:{name} is unknown; use one of {', '.join('zoo:' + known for known in (*PACKAGED, *ZOO))}")
    published = ZOO[name]
    path = Path.home() / ".cache" / "compress" / published.filename
    if path.is_file():
        found = sha256_of(path)
        if not found.startswith(published.sha256_prefix):
            raise UserError(
                f"{path}: SHA-256 begins {found[:8]} instead of {published.sha256_prefix}; "
                f"delete the file, it will be downloaded again from {published.url}"
            )
        return path
    try:
        with atomic_path(path) as temporary:
            _download(published.url, temporary)
            found = sha256_of(temporary)
            if not found.startswith(published.sha256_prefix):
                raise UserError(
                    f"{published.url}: SHA-256 of the download begins {found[:8]} instead of "
                    f"{published.sha256_prefix}; try again, or put the right file at {path}"
                )
    except (OSError, HTTPException) as error:
        raise UserError(
            f"zoo:{name} could not be downloaded from {published.url} ({error}); put that file at {path}"
        ) from error
    return path


def load_teacher_checkpoint(spec: str) -> tuple[Detector, ModelRecord]:
    """The detector that `spec` names, on the CPU in eval mode.

    `spec` is a native `.safetensors` file, an mmdet GFL `.pth` file, or `zoo:NAME` with a name in `ZOO`.
    Raises UserError as `load_detector`, `load_mmdet_gfl` and `fetch` do.
    """
    name = spec.removeprefix("zoo:")
    path = checkpoint_file(spec)
    if spec.startswith("zoo:") and name in ZOO:
        return load_mmdet_gfl(path, val_map=ZOO[name].val_map, source=ZOO[name].url)
    if path.suffix == NATIVE_SUFFIX:
        return load_detector(path)
    if path.suffix in TORCH_SUFFIXES:
        return load_mmdet_gfl(path)
    raise UserError(f"{spec}: not a checkpoint name; use FILE.safetensors, FILE.pth or zoo:NAME")


def checkpoint_file(spec: str) -> Path:
    """The file behind `spec` (see `load_teacher_checkpoint`); one of the zoo is downloaded if need be."""
    if not spec.startswith("zoo:"):
        return storage.fetch(storage.place(spec).expanduser())
    name = spec.removeprefix("zoo:")
    if name in PACKAGED:
        return Path(__file__).parents[1] / "assets" / PACKAGED[name]
    return fetch(name)


def mmdet_key(key: str) -> str:
    """mmdet's name of our parameter or buffer `key`.

    `head.` is `bbox_head.` there, and `neck.fpn_convs.0.weight` is `neck.fpn_convs.0.conv.weight`.
    """
    if key.startswith("head."):
        return f"bbox_{key}"
    return re.sub(r"^(neck\.\w+\.\d+)\.", r"\1.conv.", key)


def _coco_categories() -> dict[int, str]:
    """COCO's 80 detection classes by ascending category id. torchvision lists them by id, gaps named N/A."""
    names = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    return {number: name for number, name in enumerate(names) if name not in ("__background__", "N/A")}


COCO_CATEGORIES = _coco_categories()


def _read_record(path: Path) -> ModelRecord:
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error}); copy it again") from error
    if HEADER_KEY not in header:
        raise UserError(
            f"{path}: no {HEADER_KEY} in its header, so it is not a detector saved by compress; "
            "give a student.safetensors, or an mmdet .pth"
        )
    try:
        return ModelRecord.model_validate_json(header[HEADER_KEY])
    except ValidationError as error:
        raise UserError(f"{path}: {HEADER_KEY}: {_one_line(error)}") from error


_RESNETS: dict[tuple[str, tuple[int, ...]], str] = {
    ("basic", (2, 2, 2, 2)): "resnet18",
    ("basic", (3, 4, 6, 3)): "resnet34",
    ("bottleneck", (3, 4, 6, 3)): "resnet50",
    ("bottleneck", (3, 4, 23, 3)): "resnet101",
}


def _names_in(path: Path, num_classes: int) -> tuple[str, ...] | None:
    """The class names that mmdet wrote into the file's `meta` (CLASSES, or dataset_meta since 3.0), if any."""
    content = torch.load(path, map_location="cpu", weights_only=True) if path.suffix in TORCH_SUFFIXES else {}
    meta = content.get("meta") if isinstance(content, Mapping) else None
    if not isinstance(meta, Mapping):
        return None
    dataset = meta.get("dataset_meta")
    found = meta.get("CLASSES") or (
        (dataset.get("CLASSES") or dataset.get("classes")) if isinstance(dataset, Mapping) else None
    )
    if not isinstance(found, (list, tuple)) or len(found) != num_classes:
        return None
    return tuple(str(name) for name in found)


def _record_of_mmdet(path: Path, state: Mapping[str, Tensor]) -> ModelRecord:
    needed = ("neck.lateral_convs.0.conv.weight", "bbox_head.gfl_cls.weight", "bbox_head.gfl_reg.weight")
    absent = [key for key in needed if key not in state]
    if absent:
        raise UserError(f"{path}: not an mmdet GFL checkpoint; missing {len(absent)} key(s): {some(absent)}")
    blocks = tuple(_count(state, rf"backbone\.layer{stage}\.(\d+)\.") for stage in (1, 2, 3, 4))
    kind = "bottleneck" if any(re.match(r"backbone\.layer\d\.\d+\.conv3\.", key) for key in state) else "basic"
    if (kind, blocks) not in _RESNETS:
        raise UserError(
            f"{path}: its backbone of {kind} blocks {list(blocks)} is none of ResNet-18, 34, 50, 101, "
            "the only mmdet backbones that can be loaded"
        )
    channels = state["neck.lateral_convs.0.conv.weight"].shape[0]
    if channels != 256:
        raise UserError(
            f"{path}: its neck has {channels} channels; mmdet's GroupNorm then has groups of another size than ours, "
            "so only the usual 256 can be loaded"
        )
    return _validated(
        path,
        {
            "model": Model(
                backbone=_RESNETS[kind, blocks],
                neck_channels=channels,
                head_depth=_count(state, r"bbox_head\.cls_convs\.(\d+)\."),
            ),
            "num_classes": state["bbox_head.gfl_cls.weight"].shape[0],
        },
    )


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    """Count the different numbers that the pattern's group takes among the keys."""
    return len({match[1] for key in state if (match := re.match(pattern, key))})


def _validated(path: Path, fields: Mapping[str, object]) -> ModelRecord:
    try:
        return ModelRecord.model_validate(fields)
    except ValidationError as error:
        raise UserError(f"{path}: {_one_line(error)}") from error


def _one_line(error: ValidationError) -> str:
    """List all problems in one line; keys as they stand in the file."""
    lines = []
    for problem in error.errors(include_url=False):
        if problem["type"] == "default_factory_not_called":  # follows from another key's problem
            continue
        keys = [str(key) for key in problem["loc"] if key != "model"]
        if problem["type"] == "rule":  # of a model's settings, which says its key
            keys += problem["ctx"]["key"]
        lines.append(": ".join(filter(None, (".".join(keys), problem["msg"].removeprefix("Value error, ")))))
    return "; ".join(lines)


def _download(url: str, path: Path) -> None:
    """Copy `url` to `path`, with progress on stderr. A stalled connection is an OSError after 30 seconds."""
    with urllib.request.urlopen(url, timeout=30) as response, open(path, "wb") as file:
        size = response.headers.get("Content-Length")
        with rich.progress.wrap_file(
            response,
            total=int(size) if size else 0,
            description=f"downloading {url.rpartition('/')[2]}",
            console=Console(stderr=True),
        ) as body:
            shutil.copyfileobj(body, file, length=1 << 20)
