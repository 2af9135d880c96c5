"""Find what breaks training or evaluation in a COCO dataset, before they do."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from compress.data.sizes import object_shares, picture_sizes
from deploy.core.errors import UserError
from deploy.core.image import load_image, pixel_doubt
from deploy.core.image_folder import missing
from deploy.core.progress import Progress
from deploy.core.same_files import FileContents, shared
from deploy.core.shown import first_of_each
from deploy.core.storage import is_file, refresh
from deploy.validate.coco import images_without_size, read_annotations
from deploy.validate.labels import KINDS, MOST_OBJECTS, Finding, label_findings


@dataclass(frozen=True)
class Problem(Finding):
    """A finding, and the file that it is in, a JSON or a picture; `str` gives one line with level, file and id."""

    file: Path

    def __str__(self) -> str:
        return f"{self.level}: {self.file}: {self.where}: {self.message}"


@dataclass(frozen=True)
class Checked:
    """The findings, in the order of KINDS, and what was looked at.

    boxes: by name of their class. sizes: (width, height) of the smallest, the middle and the largest picture, by area,
    as the file says; empty where it does not. object_share: side of a box as a share of its picture's long side, of
    which a quarter of the boxes are below; None without any.
    """

    annotations: Path
    images: Path
    problems: Sequence[Problem]
    image_count: int
    boxes: Mapping[str, int]
    sizes: Sequence[tuple[int, int]] = ()
    object_share: float | None = None

    @property
    def errors(self) -> int:
        return sum(problem.level == "error" for problem in self.problems)

    @property
    def notes(self) -> int:
        return len(self.problems) - self.errors

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON types: `fit`, `errors`, `notes`, `images`, `boxes`, `kinds` with counts, `problems`."""
        kinds = Counter(problem.kind for problem in self.problems)
        return {
            "annotations": str(self.annotations),
            "image_folder": str(self.images),
            "fit": not self.errors,
            "errors": self.errors,
            "notes": self.notes,
            "images": self.image_count,
            "boxes": dict(self.boxes),
            "sizes": [list(size) for size in self.sizes],
            "object_share": self.object_share,
            "kinds": {kind: kinds[kind] for kind in KINDS if kinds[kind]},
            "problems": [
                {**asdict(problem), "level": problem.level, "file": str(problem.file)} for problem in self.problems
            ],
        }

    def lines(self) -> list[str]:
        """A line a finding, errors first; of each kind the first few, and then how many more there are."""

        def more(problem: Problem, count: int) -> str:
            return f"{problem.level}: and {count} more: {KINDS[problem.kind][1]}"

        return first_of_each(self.problems, lambda problem: problem.kind, more)


def check(
    annotations: Path,
    images: Path,
    *,
    against: tuple[Path, Path] | None = None,
    max_detections: int = MOST_OBJECTS,
    progress: Progress | None = None,
) -> Checked:
    """Check a COCO file and decode every image it names.

    against: another COCO file and the folder of its images, with which this one must share no picture.
    max_detections: what an exported file will give of an image. progress(done, total): called after every image.

    Raises:
        UserError: a file is no COCO JSON at all (see `deploy.validate.coco.read_annotations`).
    """
    file, images = Path(annotations), Path(images)
    document = read_annotations(file)
    found = list(_pictures(file, images, document, progress))
    found += _same_pictures(images, document)
    if against is not None:
        found += _shared(images, document, *against)
    findings = label_findings(document, max_detections=max_detections)
    found += [Problem(finding.kind, finding.where, finding.message, file) for finding in findings]
    order = {kind: place for place, kind in enumerate(sorted(KINDS, key=lambda kind: KINDS[kind][0] == "note"))}
    names = {row["id"]: row["name"] for row in document["categories"]}
    boxes = Counter(names.get(row["category_id"], "?") for row in document["annotations"])
    problems = sorted(found, key=lambda problem: order[problem.kind])
    counts = {name: boxes[name] for name in names.values()}
    return Checked(file, images, problems, len(document["images"]), counts, *_sizes(document))


# --- details --------------------------------------------------------------------------------------------


def _sizes(document: Mapping[str, Any]) -> tuple[Sequence[tuple[int, int]], float | None]:
    """`sizes` and `object_share` of `Checked`."""
    known = picture_sizes(document)
    ordered = sorted(known.values(), key=math.prod)
    shares = object_shares(document, known)
    sizes = [ordered[0], ordered[len(ordered) // 2], ordered[-1]] if ordered else []
    return sizes, shares[len(shares) // 4] if shares else None


def _pictures(file: Path, folder: Path, document: dict[str, Any], progress: Progress | None) -> Iterator[Problem]:
    """Decode all images. Sizes that the document does not say are filled in."""
    entries = document["images"]
    refresh([folder / entry["file_name"] for entry in entries])
    unsized = {id(entry) for entry in images_without_size(document, str(file))}

    def look(entry: dict[str, Any]) -> list[Problem]:
        path = folder / entry["file_name"]
        where = f"image {entry['id']}"
        if not is_file(path, ask=False):
            return [Problem("no-file", where, missing(path) + _elsewhere(folder, entry["file_name"]), path)]
        try:
            pixels = load_image(path)
        except UserError as error:
            return [Problem("unreadable", where, str(error).removeprefix(f"{path}: "), path)]
        height, width = pixels.shape[:2]
        doubt = pixel_doubt(pixels)
        found = [] if doubt is None else [Problem("odd-pixels", where, doubt, path)]
        if id(entry) in unsized:
            entry["width"], entry["height"] = width, height
            found.append(
                Problem("no-size", where, f"has no width and height; its file is {width}x{height} pixels", file)
            )
        elif (height, width) != (entry["height"], entry["width"]):
            declared = f"{entry['width']}x{entry['height']}"
            text = f"the file is {width}x{height} pixels, {file.name} says {declared}"
            found.append(Problem("other-size", where, text, path))
        return found

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # decoding releases the interpreter lock
        for done, problems in enumerate(pool.map(look, entries), start=1):
            yield from problems
            if progress is not None:
                progress(done, len(entries))


def _elsewhere(folder: Path, name: str) -> str:
    """Where a file lies that is not in `folder`, as the end of a sentence; nothing where it is not found nearby."""
    above = next((base for base in Path(os.path.abspath(folder)).parents[:3] if (base / name).is_file()), None)
    if above is not None:
        return f"; it is there with --images {above}"
    if (folder / Path(name).name).is_file():
        return f"; {folder / Path(name).name} is there, so the file names do not fit (compress data convert coco)"
    return ""


def _same_pictures(folder: Path, document: dict[str, Any]) -> Iterator[Problem]:
    paths = {folder / entry["file_name"]: entry["id"] for entry in document["images"]}
    contents = FileContents(paths)
    for path, identifier in paths.items():
        other = contents.same(path)
        if other is not None and other != path:
            yield Problem("same-file", f"image {identifier}", f"is the same picture as {other}", path)


def _shared(folder: Path, document: dict[str, Any], annotations: Path, images: Path) -> Iterator[Problem]:
    others = [images / entry["file_name"] for entry in read_annotations(annotations)["images"]]
    identifiers = {folder / entry["file_name"]: entry["id"] for entry in document["images"]}
    for path, other in shared(identifiers, others):
        text = f"is {other} of {annotations}" if path != other else f"is also in {annotations}"
        yield Problem(
            "shared", f"image {identifiers[path]}", f"{text}: what is learned from must not be measured on", path
        )
