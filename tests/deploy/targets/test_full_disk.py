"""Of a disk that takes nothing more `make_for` says so, whatever became of it in a converter or a runtime."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from deploy.runtimes import web_runtime
from deploy.targets.make import make_for
from deploy.targets.table import place_for
from tests.helpers.full_disk import no_room
from tests.helpers.web_package import fake_package

NEEDS = {"openvino": "openvino", "tract": "tract", "mnn": "MNN", "ncnn": "ncnn", "tvm": "tvm"}


@pytest.mark.parametrize("target", [*NEEDS, "web"])
def test_a_full_disk_is_named(target: str, tiny_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if target == "web":
        web_runtime.keep_runtime(fake_package(tmp_path, monkeypatch))
    else:
        pytest.importorskip(NEEDS[target], reason=f"{NEEDS[target]} is not installed: the extra {target} has it")
    place = place_for(tmp_path / "made" / "tiny.onnx", target)
    temporary = tmp_path / "temporary"
    for folder in (place.parent, temporary):
        folder.mkdir()
    place.with_name("beside").write_text("as it was")
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    with no_room(), pytest.raises(OSError) as failed:
        make_for(target, tiny_onnx, place)
    assert (failed.value.filename, failed.value.strerror) in [(str(at), "File too large") for at in (place, temporary)]
    assert [path.name for path in place.parent.iterdir()] == ["beside"] and not list(temporary.iterdir())
