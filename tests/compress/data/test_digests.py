"""Contents of pictures: right whatever the record says, and read once."""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path

import pytest

from compress.data import digests
from compress.data.digests import PictureDigests, together

LATER_NS = 60_000_000_000


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """The files of the test are a minute old."""
    now = time.time_ns
    monkeypatch.setattr(digests.time, "time_ns", lambda: now() + LATER_NS)


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that were read, in order of their names."""
    read: list[str] = []
    original = digests._look

    def look(name: str) -> object:
        read.append(Path(name).name)
        return original(name)

    monkeypatch.setattr(digests, "_look", look)
    return read


def files(folder: Path, count: int = 3) -> list[Path]:
    paths = [folder / f"{index}.png" for index in range(count)]
    for path in paths:
        path.write_bytes(f"picture {path.name}".encode())
    return paths


def right(paths: list[Path]) -> list[str]:
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]


def test_a_file_is_read_once(tmp_path: Path, later: None, looks: list[str]) -> None:
    paths, record = files(tmp_path), tmp_path / "record.json"
    assert PictureDigests(record).of([*paths, paths[0]]) == [*right(paths), right(paths)[0]]
    assert sorted(looks) == ["0.png", "1.png", "2.png"]
    assert PictureDigests(record).of(paths) == right(paths) and len(looks) == 3
    paths[1].write_bytes(b"another")
    assert PictureDigests(record).of(paths) == right(paths) and looks[3:] == ["1.png"]


def test_the_same_length_and_times_deceive_nobody(tmp_path: Path, later: None) -> None:
    """Another picture of as many bytes, the times of the old one set back by hand; and one renamed in its place."""
    paths, record = files(tmp_path), tmp_path / "record.json"
    before = PictureDigests(record).of(paths)
    for path, replaced in ((paths[0], False), (paths[1], True)):
        times = path.stat()
        target = path.with_suffix(".new") if replaced else path
        target.write_bytes(path.read_bytes()[::-1])
        os.utime(target, ns=(times.st_atime_ns, times.st_mtime_ns))
        if replaced:
            os.replace(target, path)
        assert (path.stat().st_size, path.stat().st_mtime_ns) == (times.st_size, times.st_mtime_ns)
    after = PictureDigests(record).of(paths)
    assert after == right(paths) and [a == b for a, b in zip(after, before, strict=True)] == [False, False, True]


def test_what_was_just_written_is_not_remembered(tmp_path: Path, looks: list[str]) -> None:
    """Another write within the same tick of the clock would leave the same times."""
    (path,), record = files(tmp_path, 1), tmp_path / "record.json"
    assert PictureDigests(record).of([path]) == right([path])
    assert PictureDigests(record).of([path]) == right([path]) and len(looks) == 2


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "\xff", '{"version": 1}', '{"version": 2, "pictures": {}}', '{"version": 1, "pictures": [1]}',
        '{"version": 1, "pictures": {"PATH": 3}}', '{"version": 1, "pictures": {"PATH": [1, 2]}}',
        '{"version": 1, "pictures": {"PATH": [1, 2, 3, 4, "short"]}}',
    ],
)  # fmt: skip
def test_a_damaged_record_counts_as_empty(tmp_path: Path, later: None, text: str) -> None:
    (path,), record = files(tmp_path, 1), tmp_path / "record.json"
    record.write_bytes(text.replace("PATH", str(path)).encode("latin-1"))
    assert PictureDigests(record).of([path]) == right([path])
    assert list(json.loads(record.read_text())["pictures"]) == [str(path)]


def test_two_that_write_at_once_keep_what_both_have_read(tmp_path: Path, later: None, looks: list[str]) -> None:
    paths, record = files(tmp_path, 2), tmp_path / "record.json"
    one, other = PictureDigests(record), PictureDigests(record)
    one.of([]), other.of([])  # both have read the empty record
    one.of(paths[:1]), other.of(paths[1:])
    assert PictureDigests(record).of(paths) == right(paths) and len(looks) == 2


def test_a_record_that_cannot_be_written_costs_time_alone(tmp_path: Path, later: None) -> None:
    (path,) = files(tmp_path, 1)
    (tmp_path / "file").touch()
    assert PictureDigests(tmp_path / "file" / "record.json").of([path]) == right([path])


def test_missing_files_and_folders_are_none(tmp_path: Path) -> None:
    assert PictureDigests().of([tmp_path / "no.png", tmp_path]) == [None, None]
    with pytest.raises(FileNotFoundError, match=r"no\.png"):
        PictureDigests()(tmp_path / "no.png")


def test_the_order_counts(tmp_path: Path) -> None:
    one, two = PictureDigests().of(files(tmp_path, 2))
    assert len({together(pair) for pair in ([one, two], [two, one], [one, None], [None, one], [one])}) == 5
