"""Published checkpoints by name: where they are, downloads that fail, files that are damaged."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from compress.detectors.checkpoints import ZOO, Published, fetch, load_teacher_checkpoint
from deploy.core.errors import UserError
from tests.helpers.official_checkpoints import SMALL, blank, write_official


def test_zoo_addresses() -> None:
    assert [(name, entry.sha256_prefix) for name, entry in ZOO.items()] == [
        ("gfl_r50_fpn_1x_coco", "25944287"),
        ("gfl_r50_fpn_mstrain_2x_coco", "37bb1edc"),
        ("gfl_r101_fpn_mstrain_2x_coco", "dd12f847"),
    ]
    for name, entry in ZOO.items():
        folder = f"https://download.openmmlab.com/mmdetection/v2.0/gfl/{name}/"
        assert entry.url == folder + entry.filename and entry.filename.startswith(f"{name}_2020")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def publish(folder: Path, monkeypatch: pytest.MonkeyPatch, *, prefix: str | None = None) -> Published:
    """An official-looking checkpoint behind a file:// address, under the name `tiny` in the zoo."""
    folder.mkdir()
    path = write_official(folder / "tiny.pth", blank(SMALL))
    prefix = prefix or hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    path = path.rename(folder / f"tiny_2020-{prefix}.pth")
    entry = Published(path.as_uri(), 33.3)
    monkeypatch.setitem(ZOO, "tiny", entry)
    return entry


def test_zoo_downloads_once_and_says_where_from(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = publish(tmp_path / "server", monkeypatch)
    _, record = load_teacher_checkpoint("zoo:tiny")
    assert (record.source, record.val_map) == (entry.url, 33.3)
    cached = home / ".cache" / "compress" / entry.filename
    assert list(cached.parent.iterdir()) == [cached]
    (tmp_path / "server" / entry.filename).unlink()
    assert fetch("tiny") == cached


def test_zoo_refuses_a_download_with_another_hash(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = publish(tmp_path / "server", monkeypatch, prefix="00c0ffee")
    with pytest.raises(UserError, match="instead of 00c0ffee") as error:
        fetch("tiny")
    assert entry.url in str(error.value)
    assert not list((home / ".cache" / "compress").iterdir())


def test_zoo_refuses_a_damaged_cached_file(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = publish(tmp_path / "server", monkeypatch)
    cached = fetch("tiny")
    cached.write_bytes(cached.read_bytes()[:-1])
    with pytest.raises(UserError, match="delete the file"):
        load_teacher_checkpoint("zoo:tiny")
    cached.unlink()
    assert fetch("tiny").name == entry.filename


def test_zoo_offline_says_what_to_put_where(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = Published("http://127.0.0.1:9/tiny_2020-00c0ffee.pth", 1.0)  # port 9: no server listens
    monkeypatch.setitem(ZOO, "tiny", entry)
    monkeypatch.setenv("no_proxy", "*")
    with pytest.raises(UserError) as error:
        load_teacher_checkpoint("zoo:tiny")
    message = str(error.value)
    assert entry.url in message and f"put that file at {home}/.cache/compress/{entry.filename}" in message
    assert "\n" not in message
    assert not list((home / ".cache" / "compress").iterdir())
