"""Divide one labelled set into training, validation and test images.

    made = split(Path("all.json"), Path("data"), {"val": 0.2}, seed=0, images=Path("images"))

Images that belong together stay on one side: those with the same bytes, where the images are given, and those whose
names agree in what a pattern matches. Groups stand in the order of the SHA-256 of `seed:name`, the name of their first
image, and validation takes from the front: that does not change with the machine, the ids or the order of the file.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.core.errors import UserError
from deploy.core.files import atomic_path, write_json
from deploy.core.same_files import FileContents
from deploy.core.storage import is_file
from deploy.validate.coco import NO_NUMBERS, load_annotations


@dataclass(frozen=True)
class Part:
    """One of the files. boxes: by name of their class, crowds left out; classes without one have 0."""

    out: Path
    images: int
    boxes: Mapping[str, int]


@dataclass(frozen=True)
class Divided:
    """What was written. together: images that share a group with another one."""

    parts: Sequence[Part]
    together: int


def split(
    annotations: Path,
    out: Path,
    shares: Mapping[str, float],
    seed: int,
    *,
    images: Path | None = None,
    stratify: bool = False,
    group_by: str | None = None,
    force: bool = False,
) -> Divided:
    """Write `out`/train.json and a file for each of `shares`, all of them or none.

    shares: of the images that each other set gets, as `{"val": 0.2}`; training gets the rest.
    images: the folder of the images; copies of one picture then stay together.
    stratify: give every set its share of the boxes of each class, as far as possible, instead of images alone.
    group_by: a regular expression; images in whose names it matches the same (its first group, if it has one) stay
        together.
    force: files that are there are replaced.

    Raises UserError: shares that leave nothing, fewer groups than sets, a bad pattern, one that a name does not match,
    a file that is there already, an annotation of an image that is not.
    """
    wanted = _shares(shares)
    content = load_annotations(annotations)
    _check_references(annotations, content)
    files = {name: Path(out) / f"{name}.json" for name in wanted}
    for file in files.values():
        if file.exists() and file.samefile(annotations):
            raise UserError(f"{file}: is the file to divide; name another folder with --out")
        if file.exists() and not force:
            raise UserError(f"{file}: is there already; --force replaces it")
    groups = _groups(content, None if images is None else Path(images), group_by)
    if len(groups) < len(wanted):
        raise UserError(
            f"{annotations}: {len(content['images'])} images in {len(groups)} groups cannot be divided into "
            f"{len(wanted)} sets"
        )
    order = sorted(groups, key=lambda group: _draw(seed, group))
    chosen = _by_class(order, wanted, content) if stratify else _by_count(order, wanted)
    documents = {name: _document(content, chosen[name]) for name in wanted}
    with ExitStack() as stack:  # all are written before the first gets its name
        places = {name: stack.enter_context(atomic_path(files[name])) for name in wanted}
        for name, place in places.items():
            _write(place, documents[name], annotations)
    parts = [_part(files[name], documents[name]) for name in wanted]
    return Divided(parts, sum(len(group) for group in groups if len(group) > 1))


# --- details --------------------------------------------------------------------------------------------

_Group = tuple[str, ...]
"""File names, sorted."""


def _shares(shares: Mapping[str, float]) -> dict[str, float]:
    """Shares of all sets, train first."""
    for name, share in shares.items():
        if not (math.isfinite(share) and 0 < share < 1):
            raise UserError(f"--{name}: needs a share above 0 and below 1, got {share:g}")
    rest = 1 - sum(shares.values())
    if rest < 1e-9:
        names = " and ".join(f"--{name}" for name in shares)
        raise UserError(f"{names}: leave nothing to train on, together they are {sum(shares.values()):g}")
    return {"train": rest, **shares}


def _check_references(file: Path, content: Mapping[str, Any]) -> None:
    known = {row["id"] for row in content["images"]}
    for index, row in enumerate(content["annotations"]):
        if row["image_id"] not in known:
            raise UserError(
                f"{file}: annotations[{index}]: image_id {row['image_id']} is not in images; it would be lost "
                "(compress data check finds all of them)"
            )


def _groups(content: Mapping[str, Any], images: Path | None, pattern: str | None) -> list[_Group]:
    """Images that stay together, by file name; a name that is listed twice is one of its own."""
    names = sorted({row["file_name"] for row in content["images"]})
    links: dict[str, str] = {name: name for name in names}

    def root(name: str) -> str:
        while links[name] != name:
            links[name] = links[links[name]]
            name = links[name]
        return name

    first: dict[str, str] = {}
    for name, key in zip(names, _keys(names, pattern), strict=True):
        if key is not None:
            links[root(name)] = root(first.setdefault(key, name))
    if images is not None:
        paths = {images / name: name for name in names}
        absent = next((path for path in paths if not is_file(path, ask=False)), None)
        if absent is not None:
            raise UserError(f"--images: {absent}: the file is missing")
        contents = FileContents(paths)
        for path, name in paths.items():
            other = contents.same(path)
            if other is not None and other != path:
                links[root(name)] = root(paths[other])
    found: dict[str, list[str]] = defaultdict(list)
    for name in names:
        found[root(name)].append(name)
    return [tuple(group) for group in found.values()]


def _keys(names: Sequence[str], pattern: str | None) -> list[str | None]:
    if pattern is None:
        return [None] * len(names)
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise UserError(f"--group-by: '{pattern[:60]}' is no regular expression: {error}") from None
    keys: list[str | None] = []
    for name in names:
        match = expression.search(name)
        if match is None or (expression.groups and match[1] is None):
            raise UserError(f"--group-by: '{pattern[:60]}' does not match {name}; every image needs a group")
        keys.append(match[1] if expression.groups else match[0])
    return keys


def _draw(seed: int, group: _Group) -> bytes:
    return hashlib.sha256(f"{seed}:{group[0]}".encode("utf-8", "surrogatepass")).digest()


def _by_count(order: Sequence[_Group], shares: Mapping[str, float]) -> dict[str, set[str]]:
    """Fill the sets but train one after the other, as near to their numbers of images as groups allow."""
    total = sum(map(len, order))
    chosen: dict[str, set[str]] = {}
    left = list(order)
    others = [name for name in shares if name != "train"]
    for place, name in enumerate(others, start=1):
        want, have = max(1, round(shares[name] * total)), 0
        most = len(left) - (len(others) - place) - 1  # a group is left for each set to come, and for train
        taken: list[_Group] = []
        for group in left:
            if len(taken) < most and have + len(group) - want <= want - have:
                taken.append(group)
                have += len(group)
        taken = taken or [min(left, key=len)]
        chosen[name] = {image for group in taken for image in group}
        left = [group for group in left if group[0] not in chosen[name]]
    return {"train": {image for group in left for image in group}, **chosen}


def _by_class(order: Sequence[_Group], shares: Mapping[str, float], content: Mapping[str, Any]) -> dict[str, set[str]]:
    """Give groups away class by class, the one with fewest boxes first, each to the set that lacks most of it.

    This is the iterative stratification of Sechidis et al. 2011, with groups in the place of examples and boxes in the
    place of labels; images without boxes come last and even out the numbers of images.
    """
    names = {row["id"]: row["file_name"] for row in content["images"]}
    in_image: dict[str, Counter[int]] = defaultdict(Counter)
    for row in content["annotations"]:
        if not row.get("iscrowd", 0):
            in_image[names[row["image_id"]]][row["category_id"]] += 1
    counts = {group: sum((in_image[name] for name in group), Counter()) for group in order}
    total: Counter[int] = sum(counts.values(), Counter())
    lacks = {name: {key: share * count for key, count in total.items()} for name, share in shares.items()}
    room = {name: share * sum(map(len, order)) for name, share in shares.items()}
    chosen: dict[str, set[str]] = {name: set() for name in shares}
    left = dict.fromkeys(order)

    def give(group: _Group, name: str) -> None:
        del left[group]
        chosen[name].update(group)
        room[name] -= len(group)
        for key, count in counts[group].items():
            lacks[name][key] -= count

    showing: dict[int, list[_Group]] = defaultdict(list)
    for group in order:
        for key in counts[group]:
            showing[key].append(group)
    for key in sorted(total, key=lambda key: (total[key], key)):
        for group in [group for group in showing[key] if group in left]:
            best = max(shares, key=lambda name: (lacks[name][key], room[name]))
            give(group, best)
    for group in list(left):
        give(group, max(shares, key=lambda name: room[name]))
    for name in shares:  # a set must not be empty: it takes the smallest group of the largest one
        if not chosen[name]:
            largest = max(chosen, key=lambda other: len(chosen[other]))
            group = min((group for group in order if group[0] in chosen[largest]), key=len)
            chosen[largest].difference_update(group)
            chosen[name].update(group)
    return chosen


def _document(content: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    images = [row for row in content["images"] if row["file_name"] in names]
    there = {row["id"] for row in images}
    annotations = [row for row in content["annotations"] if row["image_id"] in there]
    return {**content, "images": images, "annotations": annotations}


def _write(place: Path, document: Mapping[str, Any], source: Path) -> None:
    try:
        write_json(place, document)
    except ValueError:
        raise UserError(f"{source}: {NO_NUMBERS}") from None


def _part(file: Path, document: Mapping[str, Any]) -> Part:
    count = Counter(row["category_id"] for row in document["annotations"] if not row.get("iscrowd", 0))
    return Part(file, len(document["images"]), {row["name"]: count[row["id"]] for row in document["categories"]})
