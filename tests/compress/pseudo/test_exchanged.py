"""Labelling that is continued on other pictures, and two processes that label the same."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from compress.pseudo import find
from compress.pseudo.images import images_in, read_chunks
from compress.pseudo.parts import Shard, parts_folder
from deploy.core.errors import LocalUserError, UserError
from deploy.core.lock import locked
from tests.helpers.random_teacher import interrupt_after, make, teacher


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven noisy images, two teachers, and the file that one process makes in one go."""
    folder = tmp_path_factory.mktemp("pseudo")
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    for index in range(11):
        Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(folder / "images" / f"{index:02}.png")
    teacher(folder / "a.safetensors", ("cat", "dog"), 1)
    teacher(folder / "b.safetensors", ("person", "kitten"), 2)
    make(folder, folder / "whole.json")
    return folder


def test_pictures_exchanged_before_it_is_continued_are_labelled_anew(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many bytes as before, so that only the content tells; what comes before the first exchanged one is kept."""
    folder = tmp_path / "world"
    shutil.copytree(world, folder)
    out, images = tmp_path / "out.json", images_in(folder / "images")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(patch, 4)
        make(folder, out)
    file = images.files[3]  # of chunk 1
    before = file.read_bytes()
    Image.new("RGB", Image.open(file).size, (200, 30, 90)).save(file)
    with open(file, "ab") as end:
        end.write(bytes(len(before) - file.stat().st_size))
    seen: list[int] = []

    def counting(images: Any, numbers: Any, **options: Any) -> Any:
        seen.extend(numbers)
        return read_chunks(images, numbers, **options)

    with monkeypatch.context() as patch:
        patch.setattr(find, "read_chunks", counting)
        make(folder, out, resume=True)
    assert seen == [1, 2, 3, 4, 5]
    make(folder, tmp_path / "whole.json")
    assert out.read_bytes() == (tmp_path / "whole.json").read_bytes() != (world / "whole.json").read_bytes()
    file.write_bytes(before)
    with pytest.raises(UserError, match="made with other settings or of other pictures"):
        make(folder, out, resume=True)


def test_two_that_label_the_same_are_told_apart(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    with locked(parts_folder(out) / "1-of-2.lock", "another"):
        with pytest.raises(LocalUserError, match=r"out\.json: is in use by this process"):
            make(world, out, shard=Shard(0, 2))
        make(world, out, shard=Shard(1, 2))
    make(world, out, shard=Shard(0, 2))
    assert out.read_bytes() == (world / "whole.json").read_bytes() and not parts_folder(out).exists()
