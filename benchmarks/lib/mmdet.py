"""The environment of mmdet, which some suites compare with."""

from __future__ import annotations

from pathlib import Path

from deploy.core.errors import UserError

HOW_TO_BUILD = """\
no --mmdet-python: only our side is measured. An environment with mmdet 3.3 (any torch that we support will do):
    python3.11 -m venv mmdet-env
    mmdet-env/bin/pip install torch  # its build for the CPU is enough
    mmdet-env/bin/pip install 'setuptools<81' wheel openmim && mmdet-env/bin/pip install mmengine 'mmdet==3.3.0'
    MMCV_WITH_OPS=0 mmdet-env/bin/pip install --no-build-isolation 'mmcv==2.1.0'
then: --mmdet-python mmdet-env/bin/python"""


def check_python(python: Path | None) -> None:
    """Say how to make the environment where there is none. Raises UserError when the interpreter does not exist."""
    if python is None:
        print(HOW_TO_BUILD)
    elif not python.exists():
        raise UserError(f"--mmdet-python: {python} does not exist")
