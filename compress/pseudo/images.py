"""The images to label: a folder, or the list in a COCO file; read in chunks that do not depend on who reads them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from compress.data.batch import ImageSize
from compress.data.coco import load_tensor
from compress.data.transforms import resize_exactly
from compress.teachers.base import Sample, View
from deploy.core.canvas import fit_size
from deploy.core.errors import LocalUserError, UserError
from deploy.core.image_folder import image_files
from deploy.core.same_files import FileContents
from deploy.core.storage import fetch, is_folder, is_remote, refresh


@dataclass(frozen=True)
class ImageList:
    """Images by id. names: relative to `folder`. sizes: (height, width) where a COCO file says it, else None.
    listed: a COCO file lists them, so that the ids mean something beyond this list."""

    folder: Path
    ids: list[int]
    names: list[str]
    sizes: list[tuple[int, int] | None]
    listed: bool = True

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def files(self) -> list[Path]:
        """The image files, in order."""
        return [self.folder / name for name in self.names]

    def part(self, first: int, count: int) -> ImageList:
        """Up to `count` images from the place `first` on."""
        cut = slice(first, first + count)
        return replace(self, ids=self.ids[cut], names=self.names[cut], sizes=self.sizes[cut])

    def sha256(self) -> str:
        """Hash of ids, names, sizes and lengths of the files (bytes; null if absent), in order. What is in the files is
        not in it: each part of a labelling records that of the pictures that it has labelled.
        """
        digest = hashlib.sha256()
        at_addresses = iter(refresh([file for file in self.files if is_remote(file)]))
        for entry in zip(self.ids, self.names, self.sizes, strict=True):
            file = self.folder / entry[1]
            version = next(at_addresses) if is_remote(file) else None
            length = version if is_remote(file) else file.stat().st_size if file.is_file() else None
            digest.update(json.dumps([*entry, length]).encode() + b"\n")
        return digest.hexdigest()


def images_in(source: Path, root: Path | None = None) -> ImageList:
    """The images of a folder and the folders below it, numbered from 1 by name; or those of a COCO file.

    Of a COCO file only `images` is read: labels that it may have are not used.

    Args:
        source: a folder, or a `.json` file.
        root: the folder that the file's `file_name`s are relative to; default: the file's own.

    Raises:
        UserError: nothing there, no images, `root` with a folder, or a file that is not COCO JSON.
    """
    if source.suffix != ".json" and is_folder(source):
        if root is not None:
            raise UserError(f"{source}: is a folder of images; a second folder belongs to a JSON file only")
        names = [path.relative_to(source).as_posix() for path in image_files(source)]
        return ImageList(source, list(range(1, len(names) + 1)), names, [None] * len(names), listed=False)
    if source.suffix != ".json":
        raise UserError(f"{source}: neither a folder of images nor a COCO .json file")
    folder = source.parent if root is None else root
    if not is_folder(folder):
        raise UserError(f"{folder}: no such folder")
    return _listed(source, folder)


@dataclass(frozen=True)
class Unreadable:
    """An image that cannot be decoded, and what is wrong with it (with its path)."""

    name: str
    reason: str


Chunk = list[Sample | Unreadable]
"""Consecutive images."""


def read_chunks(
    images: ImageList,
    numbers: Sequence[int],
    *,
    size: int,
    short: int,
    long: int,
    workers: int,
    views: Collection[View] = (View.RESIZED,),
) -> Iterator[Chunk]:
    """The chunks with these numbers, in this order; chunk i holds the images from i * size on.

    Args:
        size: images in a chunk; the last one may have fewer.
        short, long: limits of the keep-ratio resize, pixels.
        workers: processes that decode ahead, two chunks each.
        views: which pictures of an image to bring.
    """
    loader: DataLoader[Chunk] = DataLoader(
        _Chunks(images, size, short, long, frozenset(views)),
        batch_size=None,
        sampler=numbers,
        num_workers=workers,
        collate_fn=_as_it_is,
        generator=torch.Generator().manual_seed(0),  # starting an iteration draws from it, not from the global one
    )
    for item in loader:
        if isinstance(item, UserError):
            raise LocalUserError(str(item))  # raised in a worker it would arrive as a long traceback
        yield item


def chunk_count(images: ImageList, size: int) -> int:
    """Count the chunks of `size` images."""
    return -(-len(images) // size)


def without(images: ImageList, known: FileContents) -> ImageList:
    """The images whose bytes are not among the known ones; each keeps its id."""
    kept = [index for index, name in enumerate(images.names) if images.folder / name not in known]
    return replace(
        images,
        ids=[images.ids[index] for index in kept],
        names=[images.names[index] for index in kept],
        sizes=[images.sizes[index] for index in kept],
    )


# --- details --------------------------------------------------------------------------------------------


class _Chunks(Dataset[Any]):
    def __init__(self, images: ImageList, size: int, short: int, long: int, views: frozenset[View]) -> None:
        self._images, self._size, self._views, self._limits = images, size, views, (short, long)

    def __getitem__(self, number: int) -> Chunk | UserError:
        first = number * self._size
        try:
            return [self._sample(index) for index in range(first, min(first + self._size, len(self._images)))]
        except UserError as error:
            return error

    def _sample(self, index: int) -> Sample | Unreadable:
        images = self._images
        name = images.names[index]
        path = images.folder / name
        try:
            image = load_tensor(path)
        except UserError as error:
            return Unreadable(name, str(error))
        original = (int(image.shape[1]), int(image.shape[2]))
        listed = images.sizes[index]
        if listed is not None and listed != original:
            raise UserError(
                f"{path}: the file is {original[1]}x{original[0]} pixels, the list says {listed[1]}x{listed[0]}"
            )
        size = fit_size(*original, short=self._limits[0], long=self._limits[1])
        small = resize_exactly(image, size) if View.RESIZED in self._views else None
        return Sample(
            small, images.ids[index], ImageSize(size, original), name, image if View.ORIGINAL in self._views else None
        )


def _as_it_is(chunk: Any) -> Any:
    return chunk


def _listed(source: Path, folder: Path) -> ImageList:
    try:
        content = json.loads(fetch(source).read_text(encoding="utf-8"))
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{source}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise UserError(f"{source}: not JSON in UTF-8") from None
    entries = content.get("images") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{source}: images: must be a list with at least one image")
    for index, entry in enumerate(entries):
        if not (isinstance(entry, dict) and type(entry.get("id")) is int and isinstance(entry.get("file_name"), str)):
            raise UserError(f"{source}: images[{index}]: needs id, an integer, and file_name, text")
    ids = [entry["id"] for entry in entries]
    if len(set(ids)) < len(ids):
        raise UserError(f"{source}: images: two images have the same id")
    known = [e.get("height") is not None and e.get("width") is not None for e in entries]
    sizes = [(e["height"], e["width"]) if both else None for e, both in zip(entries, known, strict=True)]
    return ImageList(folder, ids, [entry["file_name"] for entry in entries], sizes)
