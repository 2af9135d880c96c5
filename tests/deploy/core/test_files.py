"""Files are whole or absent, and a place that cannot be written is known beforehand."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy.core.errors import UserError
from deploy.core.files import atomic_path, need_place, write_json, write_text


def test_a_file_is_whole_or_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "new" / "a.txt"
    write_text(file, "first")
    with pytest.raises(RuntimeError), atomic_path(file) as temporary:
        assert temporary.suffix == ".txt" and temporary.parent == file.parent
        temporary.write_text("half")
        raise RuntimeError
    with pytest.raises(ValueError):
        write_json(file, float("nan"))
    assert [path.name for path in file.parent.iterdir()] == ["a.txt"] and file.read_text() == "first"


def test_a_place_that_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("kept")
    for name in ("a.json", "b.json", "new/folders/c.json"):
        need_place(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_text() == "kept"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("folder", "is a folder"),
        ("file/a.json", "cannot be written: Not a directory"),
        ("file/b/a.json", "cannot be written: Not a directory"),
        ("/proc/a.json", "cannot be written: "),
        ("/proc/new/a.json", "cannot be written: "),
        ("a" * 250 + ".json", "cannot be written: File name too long"),
    ],
)
def test_a_place_that_cannot_be_written(tmp_path: Path, name: str, says: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    path = tmp_path / name  # an absolute name stays itself
    with pytest.raises(UserError) as refused:
        need_place(path)
    assert str(refused.value).startswith(f"{path}: {says}")
    with pytest.raises(OSError) as failed:
        write_text(path, "content")
    assert str(path) in (failed.value.filename, failed.value.filename2)
