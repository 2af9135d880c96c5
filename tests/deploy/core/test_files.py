"""Files are whole or absent, and a place that cannot be written is known beforehand."""

from __future__ import annotations

import errno
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image

from deploy.core.errors import UserError
from deploy.core.files import atomic_path, naming, need_place, remove_temporaries, work_folder, write_json, write_text
from tests.helpers.full_disk import no_room


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


Writer = Callable[[Path], object]


def _torch(path: Path) -> None:
    import torch

    torch.save({"weights": torch.zeros(100_000)}, path)


def _safetensors(path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    save_file({"weights": torch.zeros(100_000)}, path)


def _onnx(path: Path) -> None:
    values = onnx.numpy_helper.from_array(np.zeros(100_000, np.float32), "weights")
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([], "empty", [], [], [values])), str(path))


WRITERS: dict[str, Writer] = {
    "last.ckpt": _torch,
    "student.safetensors": _safetensors,
    "student.onnx": _onnx,
    "report.html": lambda path: path.write_text("a" * 400_000),
    "picture.png": lambda path: Image.effect_noise((700, 700), 60).save(path),
    "numbers.npy": lambda path: path.write_bytes(bytes(400_000)),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_named_with_the_file_whoever_writes(tmp_path: Path, name: str) -> None:
    """torch and safetensors have words of their own for it, and none of the writers says which file it was."""
    file = tmp_path / name
    file.write_text("as it was")
    with no_room(), pytest.raises(OSError) as failed, atomic_path(file) as temporary:
        WRITERS[name](temporary)
    assert (failed.value.filename, failed.value.strerror) == (str(file), "File too large")
    assert [path.name for path in tmp_path.iterdir()] == [name] and file.read_text() == "as it was"


def _half_and(error: Exception) -> Writer:
    """A writer that leaves half a file, and an error that does not say why."""

    def write(path: Path) -> None:
        with suppress(OSError):
            path.write_bytes(bytes(400_000))
        raise error

    return write


def _in_a_folder(path: Path) -> None:
    with work_folder(path) as folder:
        write_text(folder / "text", "a" * 400_000)


WITHOUT_A_REASON: dict[str, Writer] = {
    "a library": _half_and(RuntimeError("iostream error")),
    "a converter": _half_and(UserError("fails")),
    "NumPy": _half_and(OSError("983040 requested and 508896 written")),
    "Python": lambda path: path.write_bytes(bytes(400_000)),
    "ours": _in_a_folder,
    "a copy": lambda path: shutil.copy(onnx.helper.__file__, path),
}


@pytest.mark.parametrize("who", WITHOUT_A_REASON)
@pytest.mark.parametrize("beside", [True, False])
def test_a_full_disk_is_named_whatever_became_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, who: str, beside: bool
) -> None:
    """Of a folder that things are made in."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    place = tmp_path / "student.mnn"
    with no_room(), pytest.raises(OSError) as failed, work_folder(place if beside else None) as folder:
        WITHOUT_A_REASON[who](folder / "student.mnn")
    named = str(place if beside else tmp_path)
    assert (failed.value.filename, failed.value.filename2, failed.value.strerror) == (named, None, "File too large")
    assert not list(tmp_path.iterdir())


def test_an_error_of_another_kind_leaves_a_folder_as_it_is(tmp_path: Path) -> None:
    for error in (UserError("fails"), RuntimeError("a mistake"), OSError("no number"), FileNotFoundError(2, "no", "x")):
        with pytest.raises(type(error)) as failed, work_folder(tmp_path / "a.mnn") as folder:
            (folder / "half").write_text("half")
            raise error
        assert failed.value is error and not list(tmp_path.iterdir())


def test_an_error_of_another_kind_stays_itself(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="a mistake"), atomic_path(tmp_path / "a.ckpt") as temporary:
        temporary.write_text("half")
        raise RuntimeError("a mistake")
    with pytest.raises(OSError) as failed, naming(tmp_path / "a.csv"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert failed.value.filename == str(tmp_path / "a.csv")
    with pytest.raises(FileNotFoundError) as missing, naming(tmp_path / "a.csv"):
        (tmp_path / "b.csv").read_text()
    assert missing.value.filename == str(tmp_path / "b.csv")


def test_what_killed_processes_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / "student").mkdir()
    left = []
    for path in (tmp_path / "report.json", tmp_path / "student" / "last.ckpt"):
        with atomic_path(path) as temporary:
            left.append(Path(f"{temporary.parent}/{temporary.name}"))
            temporary.write_text("whole")
        left[-1].write_text("half")
    kept = [
        tmp_path / name
        for name in (".gitignore", ".my-notes.txt", ".vscode-settings.json", "report.json", "student/last.ckpt")
    ]
    for path in kept:
        path.touch()
    remove_temporaries(tmp_path)
    assert not any(path.exists() for path in left) and all(path.exists() for path in kept)
