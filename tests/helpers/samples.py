"""Files that an older version wrote (tests/samples), unpacked into a folder."""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

SAMPLES = Path(__file__).parents[1] / "samples"


def unpack(version: str, folder: Path) -> Path:
    """Copy the sample of a version, its archive of large files extracted in place, into the empty `folder`."""
    shutil.copytree(SAMPLES / version, folder, dirs_exist_ok=True)
    (folder / "runs").mkdir()
    (folder / "run").rename(folder / "runs" / "sample")
    archive = folder / "large.tar.xz"
    with tarfile.open(archive) as files:
        files.extractall(folder, filter="data")
    archive.unlink()
    return folder


def recorded(folder: Path) -> dict[str, dict[str, Any]]:
    """What each file found in picture.png when it was made: boxes, scores and labels of the best ten."""
    return json.loads((folder / "detections.json").read_text(encoding="utf-8"))
