"""`compress export MODEL.onnx --for web` on the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.command_line import Run
from tests.helpers.red_rectangle_model import write_red_model
from tests.helpers.web_package import fake_package


def test_a_page_of_an_exported_file(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_package(tmp_path / "npm", monkeypatch)
    write_red_model(tmp_path / "red.onnx")
    code, _, err = run("export red.onnx --for web")
    assert code == 2 and "give the folder as --web-runtime" in err and not Path("red.web").exists()
    code, _, err = run("export red.onnx --for tract --web-runtime npm")
    assert code == 2 and "--web-runtime: is about a page; add --for web" in err
    code, out, _ = run("export red.onnx --for web --web-runtime npm")
    assert code == 0 and out.startswith("red.web: ") and Path("red.web/index.html").is_file()
    code, out, _ = run("export red.onnx --for web --out site")
    assert code == 0 and "http.server --directory site" in out and Path("site/model.onnx").is_file()
    code, _, err = run("export red.onnx --for web --out images")
    assert code == 2 and "images is there, and is nothing that this command wrote" in err
