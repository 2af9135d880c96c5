"""A made-up npm package in place of ONNX Runtime Web, for tests of what is made of its files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from deploy.runtimes import web_runtime
from deploy.targets import web


def fake_package(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write it into `folder`; its files are the ones that are expected from now on. There is no npm, and no cache."""
    package, pieces = folder / "package", {}
    for name, piece in web_runtime.PIECES.items():
        content = f"content of {piece.source}".encode()
        (package / piece.source).parent.mkdir(parents=True, exist_ok=True)
        (package / piece.source).write_bytes(content)
        pieces[name] = web_runtime.Piece(piece.source, hashlib.sha256(content).hexdigest(), piece.packed)
    name_package(package, web_runtime.VERSION)
    monkeypatch.setattr(web_runtime, "CACHE", folder / "cache")
    for module in (web, web_runtime):
        monkeypatch.setattr(module, "PIECES", pieces)
    monkeypatch.setenv("PATH", str(folder / "bin"))
    return package


def name_package(package: Path, version: str) -> None:
    (package / "package.json").write_text(json.dumps({"name": web_runtime.NAME, "version": version}))
