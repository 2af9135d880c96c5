"""What a teacher says of each view of each picture, on disk: after its first visit to a view the teacher never runs.

    <folder>/<teacher>/maps/<ab>/<key>.safetensors           pyramid maps, float16
    <folder>/<teacher>/predictions/<ab>/<key>.safetensors    predictions of the head, float16
    <folder>/<teacher>/top<k>/<ab>/<key>.safetensors         the same, of the classes the k largest logits of each place

`<teacher>` are digits of everything that its outputs depend on, `<key>` those of the pixels that the network sees
(`compress.data.views.picture_key`). So nothing has to be invalidated: another teacher, picture, augmentation or seed
has other names, and whatever runs use one folder share what they have in common, also at the same time.

An entry is a function of these alone: each picture goes through the teacher by itself, whoever shares its batch, and
what was just made is used as it will be read, rounded to float16. So hits and misses give the same bits, and a resumed
or repeated training those of an uninterrupted first one.

Where k classes are kept, the logits of the others are one number a place, that of their mean probability: the sparse
labels of TinyViT's fast distillation (Wu et al., ECCV 2022), carried over from a softmax, whose rest they share there.

A file is whole or absent, and has a checksum. A damaged one is named and made again. A disk that takes nothing more
costs the teacher's time, not the training: that is said once.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import shutil
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from compress.data.batch import Batch
from compress.detectors.base import REG_MAX, Capability, DensePrediction, Detector, Reduce
from compress.distill.method import Outputs
from compress.distill.teacher_outputs import Parts, run_teacher, unasked_features, unasked_prediction
from deploy.core.errors import UserError
from deploy.core.files import atomic_path, need_place

VERSION = 1
RESERVE = 2**30  # bytes of the disk that stay free
FILE_BYTES = 4096  # of an entry's header and of what its last block leaves empty
LEAST = 1e-12  # mean probability of the classes that are not kept, at the least: its logit is finite

KINDS = ("logits", "distribution", "box_deltas", "centerness")
"""Lists of a `DensePrediction`, a tensor a level."""


@dataclass(frozen=True)
class Entry:
    """Tensors of one picture, on the CPU, one behind the other: a file of few tensors is read fastest.

    values: float16 [n]. classes: uint8 or int16 [m]; None: of all classes. layout: JSON, name → shape in their order;
    names of indices begin with `classes`.
    """

    values: Tensor
    classes: Tensor | None
    layout: str

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Entry:
        """An entry of named tensors, which are float16, but for the indices of classes."""
        apart: dict[bool, list[Tensor]] = {False: [], True: []}
        for name, x in tensors.items():
            apart[_is_index(name)].append(x.flatten())
        classes = torch.cat(apart[True]) if apart[True] else None
        return cls(torch.cat(apart[False]), classes, json.dumps({name: list(x.shape) for name, x in tensors.items()}))


class TeacherCache:
    """The outputs of one teacher, from disk where they are there.

    Args:
        folder: of the cache, which many teachers and runs may share.
        teacher: frozen, on its device.
        identity: JSON-able, everything that the teacher's outputs depend on besides the pixels.
        classes: logits kept of each place, the largest so many; None: all.
        report: takes lines for the user.
    """

    def __init__(
        self,
        folder: Path,
        teacher: Detector,
        identity: Mapping[str, Any],
        *,
        classes: int | None = None,
        report: Callable[[str], None] = print,
    ) -> None:
        digest = hashlib.sha256(json.dumps({"version": VERSION, **identity}, sort_keys=True).encode()).hexdigest()
        self.folder = Path(folder) / digest[:16]
        self.teacher = teacher
        self.classes = None if classes is None or classes >= teacher.num_classes else classes
        self.read = self.made = 0  # entries of this process
        self._report = report
        self._full = False
        self._kinds = {
            Capability.FEATURES: "maps",
            Capability.DENSE: "predictions" if self.classes is None else f"top{self.classes}",
        }

    def __call__(self, batch: Batch, parts: Parts) -> Outputs:
        """`run_teacher` on the batch, rounded; its targets have keys.

        Raises UserError for outputs that float16 does not hold, or that are no `DensePrediction`.
        """
        entries = [self._entry(batch, index, parts) for index in range(len(batch.targets))]
        device = batch.images.device
        features, prediction = unasked_features(), unasked_prediction(self.teacher)
        if Capability.FEATURES in parts:
            maps = joined([entry[Capability.FEATURES] for entry in entries], device)
            features = [x.float() for x in maps.values()]
        if Capability.DENSE in parts:
            prediction = unpacked(joined([entry[Capability.DENSE] for entry in entries], device), self.teacher)
        return Outputs(features, prediction, self.teacher)

    def summary(self, reduce: Reduce | None) -> str:
        """A line about what was read and made by all processes. reduce: sums over them."""
        counts = torch.tensor([self.read, self.made], device=next(self.teacher.parameters()).device)
        read, made = (counts if reduce is None else reduce(counts)).tolist()
        return f"teacher.cache: {self.folder}: {read} read, {made} made by the teacher"

    def need_room(self, canvases: Mapping[tuple[int, int], int], views: float, visits: int, parts: Parts) -> None:
        """Refuse a training whose entries would fill the disk.

        Args:
            canvases: how many pictures lie on a canvas of (height, width), pixels.
            views: different ones of each picture, on average. visits: to pictures in the whole training.

        Raises UserError, as for a folder that cannot be written.
        """
        need_place(self.folder / "entry")
        pictures, free = sum(canvases.values()), _free(self.folder)
        entries = min(pictures * views, visits)

        def bytes_of(part: Capability) -> float:
            """Mean of one entry."""
            sizes = (entry_bytes(self.teacher, size, Parts({part}), self.classes) * n for size, n in canvases.items())
            return sum(sizes) / pictures

        needed = sum(entries * bytes_of(part) for part in parts)
        if needed > free - RESERVE:  # only then is it worth counting what is there
            there = {part: _count_in(self.folder / self._kinds[part]) for part in parts}
            needed = sum(max(0.0, entries - there[part]) * bytes_of(part) for part in parts)
        if needed > free - RESERVE:
            raise UserError(
                f"teacher.cache: {self.folder.parent}: the teacher's outputs for {entries:.0f} views of {pictures} "
                f"pictures need {_gib(needed)} there, and {_gib(max(0, free - RESERVE))} are free (1 GiB is left "
                "alone); lower train.views or teacher.cache_classes, or name a folder on a larger disk"
            )

    # --- one picture ------------------------------------------------------------------------------------

    def _entry(self, batch: Batch, index: int, parts: Parts) -> dict[Capability, Entry]:
        key = batch.targets[index].key
        assert key is not None, "a loader with keys makes the batches"
        found = {part: self._load(self._path(part, key)) for part in parts}
        missing = frozenset(part for part, entry in found.items() if entry is None)
        self.read += not missing
        if missing:
            self.made += 1
            outputs = run_teacher(self.teacher, batch.images[index : index + 1], missing)
            made = {part: self._packed(outputs, part) for part in missing}
            for part, entry in made.items():
                self._save(self._path(part, key), entry)
            found |= made
        return found  # type: ignore[return-value]  # all are there now

    def _path(self, part: Capability, key: str) -> Path:
        return self.folder / self._kinds[part] / key[:2] / f"{key}.safetensors"

    def _packed(self, outputs: Outputs, part: Capability) -> Entry:
        if part is Capability.FEATURES:
            return Entry.of({f"maps.{level}": self._half(x) for level, x in enumerate(outputs.features)})
        if not isinstance(outputs.prediction, DensePrediction):
            raise UserError(
                f"teacher.cache: keeps maps and dense predictions, and {self.teacher.family} gives "
                f"{type(outputs.prediction).__name__}; leave teacher.cache out"
            )
        return Entry.of(packed(outputs.prediction, self.classes, self._half))

    def _half(self, x: Tensor) -> Tensor:
        """A map [1, C, h, w] as float16 [C, h, w] on the CPU."""
        half = x[0].to(torch.float16)
        if not bool(half.isfinite().all()):
            raise UserError(
                "teacher.cache: the teacher gives values that float16 does not hold (above 65504, or not finite); "
                "leave teacher.cache out"
            )
        return half.contiguous().cpu()

    def _load(self, path: Path) -> Entry | None:
        """An entry; None where there is none, or a damaged one."""
        try:
            with safe_open(path, "pt") as file:
                classes = file.get_tensor("classes") if "classes" in file.keys() else None  # noqa: SIM118  # no dict
                written, layout = file.metadata()["crc32 layout"].split(" ", 1)
                entry = Entry(file.get_tensor("values"), classes, layout)
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            self._report(f"teacher.cache: {path}: damaged ({type(error).__name__}); it is made again")
            return None
        if written != _checksum(entry):
            self._report(f"teacher.cache: {path}: damaged (its checksum differs); it is made again")
            return None
        return entry

    def _save(self, path: Path, entry: Entry) -> None:
        if self._full:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if _free(path.parent) < RESERVE:
                raise OSError(errno.ENOSPC, "less than 1 GiB is free")
            with atomic_path(path) as temporary:
                tensors = {"values": entry.values} | ({} if entry.classes is None else {"classes": entry.classes})
                # One key, because several come in a random order: equal entries are equal files.
                save_file(tensors, temporary, metadata={"crc32 layout": f"{_checksum(entry)} {entry.layout}"})
        except OSError as error:
            self._full = True
            self._report(
                f"teacher.cache: {self.folder}: nothing more is kept ({error.strerror or error}); the teacher runs for "
                "what is not there"
            )


def joined(entries: Sequence[Entry], device: torch.device) -> dict[str, Tensor]:
    """The tensors of entries of one layout, with the axis of the batch in front."""
    layout: dict[str, list[int]] = json.loads(entries[0].layout)
    assert all(entry.layout == entries[0].layout for entry in entries), "pictures of a batch have one canvas"
    values = torch.stack([entry.values for entry in entries]).to(device, non_blocking=True)
    indices = [entry.classes for entry in entries if entry.classes is not None]
    classes = torch.stack(indices).to(device, non_blocking=True) if indices else None
    taken = {False: 0, True: 0}
    found = {}
    for name, shape in layout.items():
        source = classes if _is_index(name) else values
        assert source is not None, "an entry has what its layout says"
        start, count = taken[_is_index(name)], math.prod(shape)
        found[name] = source[:, start : start + count].unflatten(1, shape)
        taken[_is_index(name)] += count
    return found


def packed(prediction: DensePrediction, classes: int | None, half: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """What is kept of the predictions of one picture.

    classes: class logits of each place, the largest so many; None: all. half: see `TeacherCache`.
    """
    entry: dict[str, Tensor] = {}
    for kind in KINDS if classes is None else KINDS[1:]:
        entry |= {f"{kind}.{level}": half(x) for level, x in enumerate(getattr(prediction, kind))}
    if classes is not None:
        for level, logits in enumerate(prediction.logits):
            places = logits[0].float().unflatten(0, (prediction.anchors, -1))  # [N, K, h, w]
            values, indices = places.topk(classes, 1)
            others = places.scatter(1, indices, -torch.inf).sigmoid().sum(1, keepdim=True) / (places.shape[1] - classes)
            entry[f"values.{level}"] = half(values[None])
            entry[f"classes.{level}"] = indices.to(torch.uint8 if places.shape[1] <= 256 else torch.int16).cpu()
            entry[f"others.{level}"] = half(others.clamp(min=LEAST).logit()[None])
    return entry


def unpacked(entry: Mapping[str, Tensor], teacher: Detector) -> DensePrediction:
    """The predictions that were kept, float32; tensors with the axis of the batch in front."""

    def levels(kind: str) -> list[Tensor]:
        found: list[Tensor] = []
        while f"{kind}.{len(found)}" in entry:
            found.append(entry[f"{kind}.{len(found)}"])
        return found

    anchors = 1 if teacher.anchor_sizes is None else len(teacher.anchor_sizes[0])
    logits, distribution, box_deltas, centerness = ([x.float() for x in levels(kind)] for kind in KINDS)
    for values, classes, others in zip(levels("values"), levels("classes"), levels("others"), strict=True):
        dense = others.float().repeat(1, 1, teacher.num_classes, 1, 1)  # [B, N, K, h, w]
        logits.append(dense.scatter_(2, classes.long(), values.float()).flatten(1, 2))
    return DensePrediction(logits, distribution, teacher.strides, box_deltas, centerness, anchors)


def entry_bytes(teacher: Detector, canvas: tuple[int, int], parts: Parts, classes: int | None) -> int:
    """About how large the entries of one view are; canvas: (height, width) in pixels."""
    anchors = 1 if teacher.anchor_sizes is None else len(teacher.anchor_sizes[0])
    numbers = 0.0  # of two bytes, a location
    if Capability.FEATURES in parts:
        numbers += teacher.feature_channels
    if Capability.DENSE in parts:
        index_bytes = 1 if teacher.num_classes <= 256 else 2
        kept = teacher.num_classes if classes is None else classes * (1 + index_bytes / 2) + 1
        box = 4 * (REG_MAX + 1) if Capability.DISTRIBUTIONS in teacher.capabilities else 4 * anchors
        numbers += anchors * kept + box
    locations = sum(-(-canvas[0] // stride) * -(-canvas[1] // stride) for stride in teacher.strides)
    return int(2 * numbers * locations) + FILE_BYTES * len(parts)


# --- details --------------------------------------------------------------------------------------------


def _is_index(name: str) -> bool:
    return name.startswith("classes")


def _checksum(entry: Entry) -> str:
    value = zlib.crc32(entry.values.numpy().data, zlib.crc32(entry.layout.encode()))
    if entry.classes is not None:
        value = zlib.crc32(entry.classes.numpy().data, value)
    return f"{value:08x}"


def _free(folder: Path) -> int:
    """Bytes that are free where a folder is, or will be."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _count_in(folder: Path) -> int:
    return sum(1 for path in folder.glob("*/*.safetensors") if not path.name.startswith("."))  # nothing half-written


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"
