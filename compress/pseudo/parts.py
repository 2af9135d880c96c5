"""The part files of a labelling run: what each shard has done so far, and how they become one COCO file.

A part is a file of lines: first a header, the same in all parts, then one line a chunk of images. A shard takes every
n-th chunk. A line is either whole or, after a kill, the last one and cut off: resuming drops it and goes on there. So
neither writing nor joining holds more than a chunk in memory, and the result does not depend on the number of shards.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from compress.data.digests import together
from deploy.core.errors import UserError
from deploy.core.files import atomic_path, naming, remove_temporaries
from deploy.core.lock import InUse, locked

PICTURES = "pictures_sha256"
"""Key in `info.pseudo_labels` of a finished file: what its pictures were."""


@dataclass(frozen=True)
class Shard:
    """The share `index` (0-based) of `count`."""

    index: int
    count: int

    def __str__(self) -> str:
        return f"{self.index + 1}/{self.count}"

    def chunks(self, total: int) -> range:
        """The numbers of its chunks, of `total`."""
        return range(self.index, total, self.count)


@dataclass(frozen=True)
class Summary:
    """Contents of a finished file. skipped: images that could not be read; empty: those with no label and no region."""

    images: int
    labels: int
    regions: int
    skipped: int
    empty: int


def parts_folder(out: Path) -> Path:
    """Return the folder of the parts of `out` until they are joined."""
    return out.with_name(f"{out.name}.parts")


def part_file(out: Path, shard: Shard) -> Path:
    return parts_folder(out) / f"{shard.index + 1}-of-{shard.count}.jsonl"


def need_fresh(out: Path, shard: Shard, *, resume: bool) -> None:
    """Find out before long work that `begin` will not meet another run. A part without a chunk is none: there is
    nothing in it to lose, and its run may have failed at the first image.

    Raises:
        UserError: a part is there and `resume` is not given, or parts are from another number of shards.
    """
    begun = [path for path in sorted(parts_folder(out).glob("[0-9]*.jsonl")) if _has_chunk(path)]
    others = [path.name for path in begun if not _of_division(path, shard.count)]
    if others:
        raise UserError(
            f"{parts_folder(out)}: {others[0]} is from another number of shards than {shard.count}; "
            "finish with that number, or delete the folder"
        )
    path = part_file(out, shard)
    if path in begun and not resume:
        raise UserError(f"{path}: an unfinished run; --resume continues it, or delete {parts_folder(out)}")


def begin(
    out: Path, shard: Shard, header: dict[str, Any], pictures: Callable[[int], list[str | None]] = lambda number: []
) -> int:
    """Make the shard's part, or take up the one that is there: an unfinished line is cut off it, and everything from
    the first chunk on of which a picture was changed since. Returns how many chunks are left.

    pictures: the digests of the pictures of a chunk, as they are now, by its number.

    Raises:
        UserError: the part has chunks and another header.
    """
    path = part_file(out, shard)
    remove_temporaries(path.parent, path.stem)
    if not _has_chunk(path):
        with atomic_path(path) as temporary:
            temporary.write_text(_line(header), encoding="utf-8")
        return 0
    with open(path, "r+b") as file:
        if file.readline() != _line(header).encode():
            raise UserError(
                f"{path}: was begun with other images, teachers, thresholds or settings; "
                f"give the same, or delete {parts_folder(out)}"
            )
        lines, end = 0, file.tell()
        for line in file:
            if not line.endswith(b"\n") or not _is_of(line, pictures):
                break
            lines, end = lines + 1, end + len(line)
        file.truncate(end)
    return lines


def append(file: IO[str], chunk: dict[str, Any]) -> None:
    """Write one chunk: `number`, `pictures` (their digests), `images` and `annotations` (COCO rows, the latter without
    id), `skipped` names."""
    file.write(_line(chunk))
    file.flush()


def join(out: Path, count: int, total: int) -> Summary | None:
    """Write `out` from the parts of `count` shards with `total` chunks in all, and delete the parts. Its `info` says
    what the pictures were (`pictures_sha256`).

    Returns None, and leaves everything as it is, while a part is absent or unfinished, or another process joins them.

    Raises:
        UserError: parts with different headers, or a damaged one.
    """
    try:
        with locked(parts_folder(out) / "join.lock", str(out)):
            summary = _joined(out, count, total)
    except InUse:
        return None
    remove_empty(out)
    return summary


def remove(out: Path) -> None:
    """Remove the parts of a finished file, which a kill may leave; not while another process does."""
    if not parts_folder(out).is_dir():
        return
    with suppress(InUse), locked(parts_folder(out) / "join.lock", str(out)):
        for path in parts_folder(out).glob("[0-9]*.jsonl"):
            path.unlink(missing_ok=True)
    remove_empty(out)


def remove_empty(out: Path) -> None:
    """Remove the folder of the parts if nothing is left in it."""
    with suppress(OSError):  # not empty, or another process was faster
        parts_folder(out).rmdir()


def header_of(out: Path) -> Any:
    """`info` of a finished file, from its first line alone; None when it is not one of ours."""
    with open(out, encoding="utf-8", errors="replace") as file:
        line = file.readline(1 << 24)
    if not (line.startswith(_INFO) and line.endswith(",\n")):
        return None
    try:
        return json.loads(line[len(_INFO) : -2])
    except ValueError:
        return None


# --- details --------------------------------------------------------------------------------------------


def _joined(out: Path, count: int, total: int) -> Summary | None:
    paths = [part_file(out, Shard(index, count)) for index in range(count)]
    with ExitStack() as stack:
        try:
            files = [stack.enter_context(open(path, encoding="utf-8")) for path in paths]
        except FileNotFoundError:
            return None
        headers = [file.readline() for file in files]
        for path, text in zip(paths, headers, strict=True):
            if text != headers[0]:
                raise UserError(f"{path}: was made with other images, teachers, thresholds or settings than {paths[0]}")
        for index, file in enumerate(files):
            if sum(line.endswith("\n") for line in file) < len(Shard(index, count).chunks(total)):
                return None
        joined = parts_folder(out) / out.name  # a kill leaves nothing beside `out`
        remove_temporaries(joined.parent, joined.stem)
        with naming(out), atomic_path(joined) as temporary, open(temporary, "w", encoding="utf-8") as written:
            summary = _write(written, json.loads(headers[0])["document"], files, paths, total)
    os.replace(joined, out)
    left = [path for path in parts_folder(out).glob("[0-9]*.jsonl") if not _has_chunk(path)]
    for path in (*paths, *left):
        path.unlink(missing_ok=True)
    return summary


_INFO = '{"info": '


def _is_of(line: bytes, pictures: Callable[[int], list[str | None]]) -> bool:
    """Whether a chunk was labelled on the pictures that are there now; not provable for one of version 0.1."""
    try:
        chunk = json.loads(line)
        return bool(chunk["pictures"] == pictures(chunk["number"]))
    except (ValueError, KeyError, TypeError):
        return False


def _line(value: dict[str, Any]) -> str:
    return json.dumps(value, allow_nan=False) + "\n"


def _has_chunk(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            file.readline()
            return file.readline().endswith(b"\n")
    except FileNotFoundError:
        return False


def _of_division(path: Path, count: int) -> bool:
    return path.stem.endswith(f"-of-{count}")


def _write(
    file: IO[str], document: dict[str, Any], parts: Sequence[IO[str]], paths: Sequence[Path], total: int
) -> Summary:
    """COCO JSON, one row a line; the parts are read three times, because what the pictures are stands first, and images
    stand before annotations."""
    info = document["info"]
    digests = (digest for chunk in _chunks(parts, paths, total) for digest in chunk.get("pictures", []))
    info = info | {"pseudo_labels": info.get("pseudo_labels", {}) | {PICTURES: together(digests)}}
    file.write(f'{_INFO}{json.dumps(info)},\n"categories": {json.dumps(document["categories"])},\n')
    skipped: list[str] = []
    images = labels = regions = empty = 0
    file.write('"images": [')
    for chunk in _chunks(parts, paths, total):
        skipped += chunk["skipped"]
        with_something = {row["image_id"] for row in chunk["annotations"]}
        for row in chunk["images"]:
            file.write(f"{',' if images else ''}\n{json.dumps(row)}")
            images += 1
            empty += row["id"] not in with_something
    file.write('\n],\n"annotations": [')
    for chunk in _chunks(parts, paths, total):
        for row in chunk["annotations"]:
            file.write(f"{',' if labels + regions else ''}\n{json.dumps({'id': labels + regions + 1} | row)}")
            regions += row["iscrowd"]
            labels += not row["iscrowd"]
    file.write(f'\n],\n"skipped": {json.dumps(skipped)}}}\n')
    return Summary(images, labels, regions, len(skipped), empty)


def _chunks(parts: Sequence[IO[str]], paths: Sequence[Path], total: int) -> Iterator[dict[str, Any]]:
    """All chunks in order, from the beginning."""
    for file in parts:
        file.seek(0)
        file.readline()
    for number in range(total):
        path = paths[number % len(parts)]
        try:
            chunk = json.loads(parts[number % len(parts)].readline())
        except ValueError:
            chunk = {}
        if not isinstance(chunk, dict) or chunk.get("number") != number:
            raise UserError(f"{path}: is damaged at chunk {number}; delete it, then --resume makes it again")
        yield chunk
