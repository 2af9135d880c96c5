"""What is kept of predictions: drawn pictures and videos, JSON, COCO, YOLO text files, CSV, crops.

    with Outputs(folder, looker.card, ["pictures", "json"]) as outputs:
        for seen in look(looker, sources):
            outputs.add(seen)

Everything is written as it comes, so that a video of hours takes no memory; files have their names when they are whole.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, Protocol, TextIO

import numpy as np
from PIL import Image

from deploy.core.card import ModelCard
from deploy.core.draw import draw_boxes
from deploy.core.errors import UserError
from deploy.core.files import atomic_path, write_text
from deploy.predict.look import Seen
from deploy.predict.sources import MARK, Source, VideoSource
from deploy.predict.video import VideoWriter


class Outputs:
    """A folder of predictions.

    kinds: names in `KINDS`. image_ids: name of a picture → its id in COCO files; None: counted from 1.
    classes: names of those that were kept; None: all.
    Raises UserError for a file that cannot be written; a picture that `image_ids` does not have is refused by `add`.
    """

    def __init__(
        self,
        folder: Path,
        card: ModelCard,
        kinds: Collection[str],
        image_ids: Mapping[str, int] | None = None,
        classes: Collection[str] | None = None,
    ) -> None:
        self._files = ExitStack()
        self._writers: list[Writer] = []
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / MARK, "compress predict wrote here; as a source, a folder around it leaves it out\n")
        try:
            self._writers = [KINDS[kind](Place(folder, card, self._files, image_ids, classes)) for kind in kinds]
        except BaseException:
            self._files.close()
            raise

    def add(self, seen: Seen) -> None:
        """Keep what was seen. Of what could not be looked at the JSON file alone says so."""
        for writer in self._writers:
            if seen.problem is None or isinstance(writer, Json):
                writer.add(seen)

    def __enter__(self) -> Outputs:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._files:  # left with an error, it removes unfinished files
            if error is not None:
                raise error
            for writer in self._writers:
                writer.close()


@dataclass(frozen=True)
class Place:
    """What writers get. files: where those files are entered that grow; it names them at the end."""

    folder: Path
    card: ModelCard
    files: ExitStack
    image_ids: Mapping[str, int] | None
    classes: Collection[str] | None


class Writer(Protocol):
    """One kind of output."""

    def add(self, seen: Seen) -> None: ...
    def close(self) -> None: ...


class Pictures:
    """Drawn pictures in `pictures/`, JPEG and PNG as what they were, others as JPEG; videos as MP4."""

    def __init__(self, place: Place) -> None:
        self._folder = place.folder / "pictures"
        self._source: Source | None = None
        self._video: VideoWriter | None = None
        self._open = place.files.enter_context(ExitStack())

    def add(self, seen: Seen) -> None:
        drawn = Image.fromarray(seen.pixels)
        draw_boxes(drawn, list(seen.detections))
        source = seen.frame.source
        if source is not self._source:
            self.close()
            self._source = source
        if not isinstance(source, VideoSource):
            path = self._folder / picture_name(source.name)
            with atomic_path(path) as temporary:
                drawn.save(temporary, quality=92)  # of a JPEG
            return
        if self._video is None:
            path = self._folder / PurePosixPath(source.name).with_suffix(".mp4")
            temporary = self._open.enter_context(atomic_path(path))
            self._video = self._open.enter_context(VideoWriter(temporary, source.video.rate))
        self._video.add(np.asarray(drawn), seen.frame.time_s or 0.0)

    def close(self) -> None:
        self._open.close()
        self._video = None


class Json:
    """`predictions.json`: model, and for each frame its name, size, time and detections."""

    def __init__(self, place: Place) -> None:
        head = {"model": place.card.name, "classes": place.card.class_names}
        self._list = _List(place.folder / "predictions.json", place.files, head, "images")

    def add(self, seen: Seen) -> None:
        frame = seen.frame
        row: dict[str, Any] = {"name": frame.source.name, "source": frame.source.where}
        if frame.time_s is not None:
            row |= {"frame": frame.index, "time_s": round(frame.time_s, 6)}
        if seen.problem is not None:
            self._list.add(row | {"problem": seen.problem})
            return
        row |= {"height": seen.pixels.shape[0], "width": seen.pixels.shape[1]}
        row["detections"] = [
            {
                "class_name": found.class_name,
                "category_id": found.category_id,
                "score": found.score,
                "box": list(found.box),
            }
            for found in seen.detections
        ]
        self._list.add(row)

    def close(self) -> None:
        self._list.close()


class Coco:
    """`results.json`: rows of COCO results, for any COCO evaluation; `coco.json`: a data set of them with scores, for
    labelling tools and `compress data check`; `info.coverage` has the classes that were looked for, if not all. A frame
    of a video is the image NAME_NUMBER.jpg, which is not written."""

    def __init__(self, place: Place) -> None:
        self._ids = place.image_ids
        self._results = _List(place.folder / "results.json", place.files)
        classes = zip(place.card.category_ids, place.card.class_names, strict=True)
        head: dict[str, Any] = {"categories": [{"id": number, "name": name} for number, name in classes]}
        if (kept := place.classes) is not None:
            head["info"] = {"coverage": [row["id"] for row in head["categories"] if row["name"] in kept]}
        self._boxes = _List(place.folder / "coco.json", place.files, head, "annotations")
        self._images: list[dict[str, Any]] = []
        self._count = 0

    def add(self, seen: Seen) -> None:
        name, frame = seen.frame.source.name, seen.frame
        if self._ids is not None and name not in self._ids:
            raise UserError(f"--annotations: has no image called {name}")
        number = len(self._images) + 1 if self._ids is None else self._ids[name]
        if frame.time_s is not None:
            path = PurePosixPath(name)
            name = path.with_name(f"{path.stem}_{frame.index:06d}.jpg").as_posix()
        height, width = seen.pixels.shape[:2]
        self._images.append({"id": number, "file_name": name, "height": height, "width": width})
        for row in seen.detections.to_coco(number):
            self._results.add(row)
            self._count += 1
            _, _, w, h = row["bbox"]
            self._boxes.add({"id": self._count, **row, "area": w * h, "iscrowd": 0})

    def close(self) -> None:
        self._results.close()
        self._boxes.close({"images": self._images})


class Yolo:
    """`labels/NAME.txt`: class, centre and size in shares of the picture, score; a line a detection. `classes.txt`: the
    names."""

    def __init__(self, place: Place) -> None:
        self._folder = place.folder / "labels"
        self._taken: dict[PurePosixPath, str] = {}
        write_text(place.folder / "classes.txt", "".join(f"{name}\n" for name in place.card.class_names))

    def add(self, seen: Seen) -> None:
        frame, path = seen.frame, PurePosixPath(seen.frame.source.name)
        if self._taken.setdefault(path.with_suffix(""), path.name) != path.name:  # a.jpg and a.png
            path = path.with_name(f"{path.name}.txt")
        if frame.time_s is not None:
            path = path.with_name(f"{path.stem}_{frame.index:06d}")
        height, width = seen.pixels.shape[:2]
        lines = []
        for found in seen.detections:
            x1, y1, x2, y2 = found.box
            place = ((x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height)
            lines.append(f"{found.label} {' '.join(f'{value:.6f}' for value in place)} {found.score:.6f}\n")
        write_text(self._folder / path.with_suffix(".txt"), "".join(lines))

    def close(self) -> None:
        pass


class Csv:
    """`predictions.csv`: a line a detection."""

    def __init__(self, place: Place) -> None:
        stream = _stream(place.folder / "predictions.csv", place.files)
        self._rows = csv.writer(stream, lineterminator="\n")
        self._rows.writerow(("name", "frame", "time_s", "class_name", "category_id", "score", "x1", "y1", "x2", "y2"))

    def add(self, seen: Seen) -> None:
        frame = seen.frame
        place = ("", "") if frame.time_s is None else (frame.index, round(frame.time_s, 6))
        for found in seen.detections:
            box = (round(side, 2) for side in found.box)
            self._rows.writerow(
                (frame.source.name, *place, found.class_name, found.category_id, round(found.score, 4), *box)
            )

    def close(self) -> None:
        pass


class Crops:
    """`crops/CLASS/NAME_NUMBER.jpg`: what is inside of each box."""

    def __init__(self, place: Place) -> None:
        self._folder = place.folder / "crops"

    def add(self, seen: Seen) -> None:
        frame, path = seen.frame, PurePosixPath(seen.frame.source.name)
        stem = f"{path.name.replace('.', '_')}{'' if frame.time_s is None else f'_{frame.index:06d}'}"
        height, width = seen.pixels.shape[:2]
        for number, found in enumerate(seen.detections):
            x1, y1 = (max(0, int(side)) for side in found.box[:2])
            x2, y2 = min(width, int(np.ceil(found.box[2]))), min(height, int(np.ceil(found.box[3])))
            if x2 > x1 and y2 > y1:
                folder = self._folder / _file_name(found.class_name) / path.parent
                with atomic_path(folder / f"{stem}_{number}.jpg") as temporary:
                    Image.fromarray(seen.pixels[y1:y2, x1:x2]).save(temporary, quality=92)

    def close(self) -> None:
        pass


KINDS: dict[str, Callable[[Place], Writer]] = {
    "pictures": Pictures,
    "json": Json,
    "coco": Coco,
    "yolo": Yolo,
    "csv": Csv,
    "crops": Crops,
}
"""Kinds of output, by the name that `--save` takes."""

JPEG = (".jpg", ".jpeg", ".jpe", ".jfif")


def picture_name(name: str) -> PurePosixPath:
    """Name of a drawn picture: its own where its format can be written back, else with `.jpg` added."""
    path = PurePosixPath(name)
    return path if path.suffix.lower() in (*JPEG, ".png") else path.with_name(f"{path.name}.jpg")


# --- details --------------------------------------------------------------------------------------------


class _List:
    """A JSON file that grows: a list, or an object whose last key but those of `close` holds the list."""

    def __init__(self, path: Path, files: ExitStack, head: Mapping[str, Any] | None = None, key: str = "") -> None:
        self._stream, self._head, self._first = _stream(path, files), head, True
        before = "" if head is None else json.dumps(dict(head))[:-1] + f', "{key}": '
        self._stream.write(before + "[")

    def add(self, row: Mapping[str, Any]) -> None:
        self._stream.write("\n" if self._first else ",\n")
        self._stream.write(json.dumps(row, allow_nan=False))
        self._first = False

    def close(self, tail: Mapping[str, Any] | None = None) -> None:
        self._stream.write("\n]")
        if tail is not None:
            self._stream.write(", " + json.dumps(dict(tail))[1:-1])
        self._stream.write("\n" if self._head is None else "}\n")


def _stream(path: Path, files: ExitStack) -> TextIO:
    """A text file that gets its name when the stack is left without an error."""
    temporary = files.enter_context(atomic_path(path))
    return files.enter_context(open(temporary, "w", encoding="utf-8", newline=""))


def _file_name(class_name: str) -> str:
    """A class name as the name of a folder."""
    made = "".join("_" if sign in '<>:"/\\|?*' or ord(sign) < 32 else sign for sign in class_name).strip(". ")
    return made or "class"
