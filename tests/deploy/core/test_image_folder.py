from __future__ import annotations

import os
from pathlib import Path

import pytest

from deploy.core.errors import UserError
from deploy.core.image_folder import find_files, image_files
from deploy.core.same_files import FileContents, shared


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())


def found(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in image_files(folder)]


def test_images_by_name_with_those_of_folders_below(tmp_path: Path) -> None:
    touch(tmp_path, "b.PNG", "a/c.jpg", "a.jpg", "notes.txt", "._b.png", ".cache/x.png", "a/d.jpeg.txt", "z/y/x.webp")
    assert found(tmp_path) == ["a.jpg", "a/c.jpg", "b.PNG", "z/y/x.webp"]
    assert [path.name for path in find_files(tmp_path, (".txt",))] == ["d.jpeg.txt", "notes.txt"]


def test_links_are_followed_and_each_folder_is_entered_once(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "set", tmp_path / "elsewhere"
    touch(folder, "train/1.png", "train/2.png")
    touch(elsewhere, "3.png", "deep/4.png")
    (folder / "aaa").symlink_to(folder / "train")  # another name of a folder that is here
    (folder / "val").symlink_to(elsewhere)
    (folder / "val again").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(folder)
    (folder / "5.png").symlink_to(elsewhere / "3.png")
    (folder / "link of the set").symlink_to(".")
    assert found(folder) == ["5.png", "train/1.png", "train/2.png", "val/3.png", "val/deep/4.png"]
    (tmp_path / "alias").symlink_to(folder)
    assert found(tmp_path / "alias") == found(folder)


@pytest.mark.parametrize("name", ["a.jpg", "more", "loop"])
def test_links_to_nothing_are_named(tmp_path: Path, name: str) -> None:
    touch(tmp_path, "x.png")
    (tmp_path / name).symlink_to("loop" if name == "loop" else "gone")
    with pytest.raises(UserError, match=rf"--images: .*/{name}: a link to (gone|loop), where nothing is"):
        image_files(tmp_path, "--images: ")
    if name == "a.jpg":
        assert [file.name for file in find_files(tmp_path, (".jpg", ".png"), dead_links=True)] == ["a.jpg", "x.png"]
    (tmp_path / name).rename(tmp_path / "note.md")
    assert found(tmp_path) == ["x.png"]


def test_what_cannot_be_searched(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^--images: .*none: no such folder$"):
        image_files(tmp_path / "none", "--images: ")
    with pytest.raises(UserError, match=r"no images in it \(\.jpg, "):
        image_files(tmp_path)


def test_the_same_bytes(tmp_path: Path) -> None:
    long = os.urandom(20_000)
    for name, content in {
        "a": long,
        "b": long,
        "c": long[:-1] + b"x",  # the same length and the same middle
        "d": b"x" + long[1:10_000] + b"x" + long[10_001:],
        "e": long[:-1],
        "f": b"",
    }.items():
        (tmp_path / name).write_bytes(content)
    a, b, c, d, e, f, none = (tmp_path / name for name in "abcdefn")
    assert shared([b, c, d, e, f, none], [a, none]) == [(b, a)]
    assert a in FileContents([a]) and FileContents([c, d, a]).same(b) == a
    assert shared([c], [a, c]) == [(c, c)]
