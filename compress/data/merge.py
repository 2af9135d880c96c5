"""Several labelled sets as one COCO file.

    made = merge([Path("train.json"), Path("pseudo.json")], Path("all.json"), [Path("images"), Path("newpics")])

Categories of the same name are one, whatever their ids. Ids stay as they are in the first file that has them, and are
given anew where they clash.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.core.errors import UserError
from deploy.core.files import write_json
from deploy.core.shown import some
from deploy.core.storage import is_file
from deploy.validate.coco import NO_NUMBERS, load_annotations


@dataclass(frozen=True)
class Labelled:
    """A set to merge. folder: that the `file_name`s of the COCO object `content` are relative to."""

    file: Path
    folder: Path
    content: Mapping[str, Any]


@dataclass(frozen=True)
class Merged:
    """What was written. folder: that its file names are relative to. boxes: crowds left out. notes: for people."""

    folder: Path
    images: int
    boxes: int
    notes: Sequence[str]


def merge(files: Sequence[Path], out: Path, images: Sequence[Path] = (), *, force: bool = False) -> Merged:
    """Write one file with the pictures and annotations of all.

    Args:
        images: the folder of each file's images, in their order; one for all of them; none: each file's own folder.
        force: an `out` that is there is replaced, unless it is one of the files.

    Raises UserError: a file that cannot be read, fewer than two, another number of folders, and as `merged`.
    """
    if len(files) < 2:
        raise UserError(f"{out}: merging takes at least two files, and the name of the one to write after them")
    if len(images) not in (0, 1, len(files)):
        raise UserError(f"--images: {len(images)} folders for {len(files)} files; give one for all, or each its own")
    for file in files:
        if out.exists() and file.exists() and out.samefile(file):
            raise UserError(f"{out}: is one of the files to merge; name another file to write")
    if out.exists() and not force:
        raise UserError(f"{out}: is there already; --force replaces it")
    folders = [file.parent for file in files] if not images else list(images) * (len(files) if len(images) == 1 else 1)
    sets = [Labelled(file, folder, load_annotations(file)) for file, folder in zip(files, folders, strict=True)]
    document, folder = merged(sets)
    try:
        write_json(out, document)
    except ValueError:
        raise UserError(f"{', '.join(map(str, files))}: {NO_NUMBERS}") from None
    boxes = sum(not row.get("iscrowd", 0) for row in document["annotations"])
    return Merged(folder, len(document["images"]), boxes, list(_notes(sets, document)))


def merged(sets: Sequence[Labelled]) -> tuple[dict[str, Any], Path]:
    """The COCO object of all sets, and the folder that its file names are relative to: theirs, or the closest one that
    holds all of theirs.

    All fields of images, annotations and categories stay; of a category in several sets, the first one's. `info.merged`
    has the `info` of each file.

    Raises UserError: a picture in two sets, two categories of one name in a set, an annotation of an image or category
    that is not there, and classes that nobody looked for (`info.coverage`) in some of the pictures only.
    """
    common = common_folder([one.folder for one in sets])
    categories, licenses = _Rows(sets, "categories"), _Rows(sets, "licenses")
    image_ids, annotation_ids = _Ids(sets, "images"), _Ids(sets, "annotations")
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    owners: dict[str, Labelled] = {}
    for one in sets:
        category_of, license_of = categories.add(one), licenses.add(one)
        image_of: dict[Any, int] = {}
        for row, picture in [(row, _path(one.folder, row["file_name"])) for row in one.content["images"]]:
            owner = owners.setdefault(picture, one)
            if owner is not one:
                raise UserError(
                    f"{one.file}: images: {row['file_name']!r} is {picture}, which {owner.file} has too; take it out "
                    "of one of them, or give each file its folder with --images"
                )
            image_of[row["id"]] = image_ids.free(row["id"])
            name = row["file_name"] if one.folder == common else _name(picture, row["file_name"], common)
            images.append({**row, "id": image_of[row["id"]], "file_name": name})
            if "license" in row:  # an id that its own file does not have would become one of another file's
                images[-1]["license"] = license_of.get(row["license"]) if isinstance(row["license"], int) else None
        for index, row in enumerate(one.content["annotations"]):
            for key, known in (("image_id", image_of), ("category_id", category_of)):
                if row[key] not in known:
                    raise UserError(f"{one.file}: annotations[{index}]: {key} {row[key]} is not in the file")
            ids = {"image_id": image_of[row["image_id"]], "category_id": category_of[row["category_id"]]}
            annotations.append({**row, "id": annotation_ids.free(row.get("id")), **ids})
    info: dict[str, Any] = {"merged": [{"file": one.file.name, "info": one.content.get("info")} for one in sets]}
    coverage = _coverage(sets, categories.rows)
    if coverage is not None:
        info["coverage"] = coverage
    document = {
        "info": info,
        **({"licenses": licenses.rows} if licenses.rows else {}),
        "images": images,
        "annotations": annotations,
        "categories": categories.rows,
    }
    return document, common


# --- details --------------------------------------------------------------------------------------------


class _Ids:
    """Gives ids away: the wanted one, or where it is taken or none, one above all that the sets have."""

    def __init__(self, sets: Sequence[Labelled], section: str) -> None:
        ids = [row.get("id") for one in sets for row in _rows(one, section)]
        self._next = max([0, *(value for value in ids if isinstance(value, int))]) + 1
        self._taken: set[Any] = set()

    def free(self, wanted: Any) -> Any:
        if wanted is None or wanted in self._taken:
            wanted, self._next = self._next, self._next + 1
        self._taken.add(wanted)
        return wanted


class _Rows:
    """Categories, one a name; or licenses, one where all but the id is the same."""

    def __init__(self, sets: Sequence[Labelled], section: str) -> None:
        self.rows: list[dict[str, Any]] = []
        self._section, self._ids = section, _Ids(sets, section)

    def add(self, one: Labelled) -> dict[Any, Any]:
        """Take in the rows of a set. Returns their id there → here."""
        found: dict[Any, Any] = {}
        for row in _rows(one, self._section):
            same = next((known for known in self.rows if self._what(known) == self._what(row)), None)
            if same is None:
                same = {**row, "id": self._ids.free(row.get("id"))}
                self.rows.append(same)
            elif self._section == "categories" and same["id"] in found.values():
                raise UserError(f"{one.file}: categories: two are called {row['name']!r}; they are matched by name")
            found[row.get("id")] = same["id"]
        return found

    def _what(self, row: Mapping[str, Any]) -> Any:
        return row["name"] if self._section == "categories" else {k: v for k, v in row.items() if k != "id"}


def _rows(one: Labelled, section: str) -> list[Mapping[str, Any]]:
    """The entries of a section; of licenses, which nothing has checked, those that have an id."""
    rows = one.content.get(section)
    if section != "licenses":
        return list(rows or ())
    found = rows if isinstance(rows, list) else []
    return [row for row in found if isinstance(row, Mapping) and isinstance(row.get("id"), int)]


def _path(folder: Path, name: str) -> str:
    """A picture, however its name and folder are written; links are not followed."""
    return os.path.abspath(folder / name)


def _name(picture: str, name: str, common: Path) -> str:
    return name if os.path.isabs(name) else Path(os.path.relpath(picture, common)).as_posix()


def common_folder(folders: Sequence[Path]) -> Path:
    """The folder, if it is the same for all, or the closest that holds them: relative where it lies below here."""
    if len({os.path.abspath(folder) for folder in folders}) == 1:
        return folders[0]
    common = os.path.commonpath([os.path.abspath(folder) for folder in folders])
    below = os.path.relpath(common)
    return Path(common if below.startswith("..") else below)


def _looked_for(one: Labelled) -> set[str] | None:
    """Names of the classes in `info.coverage`; None: the file has none, so its pictures have all their labels."""
    info = one.content.get("info")
    coverage = info.get("coverage") if isinstance(info, Mapping) else None
    if not isinstance(coverage, list):
        return None
    return {row["name"] for row in one.content["categories"] if row["id"] in coverage}


def _coverage(sets: Sequence[Labelled], categories: Sequence[Mapping[str, Any]]) -> list[int] | None:
    """Ids of the categories that were looked for in all pictures; None: that is all of them."""
    names = {row["name"] for row in categories}
    covered = [names if (found := _looked_for(one)) is None else found for one in sets]
    if all(one == names for one in covered):
        return None
    if any(one != covered[0] for one in covered):
        index, missing = next((i, names - one) for i, one in enumerate(covered) if one != names)
        raise UserError(
            f"{sets[index].file}: info.coverage: nobody looked for {', '.join(sorted(missing))} in its pictures, and "
            "one file cannot say that of some of them; label them with a teacher that looks for all classes, or name "
            "teacher and folder in a recipe's pseudo_labels"
        )
    return [row["id"] for row in categories if row["name"] in covered[0]]


def _notes(sets: Sequence[Labelled], document: Mapping[str, Any]) -> Iterator[str]:
    """What may be a mistake: classes that a file does not know, and pictures that are not there."""
    names = [row["name"] for row in document["categories"]]
    for one in sets:
        known = {row["name"] for row in one.content["categories"]}
        lacks = [name for name in names if name not in known]
        if lacks:
            yield f"{one.file}: has no category {some(lacks)}; its pictures count as without any"
        rows = one.content["images"]
        absent = [row["file_name"] for row in rows if not is_file(one.folder / row["file_name"], ask=False)]
        if absent:
            yield (
                f"{one.file}: {len(absent)} of {len(rows)} pictures are not in {one.folder}, {absent[0]} is the first; "
                "--images names the folder"
            )
