"""How many files an addition to the package touches: the diffs of docs/extending.md apply, and what they add works.

A diff that no longer applies is to be written again; docs/extending.md says how.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "extending.md"
PACKAGES = ("compress", "deploy", "kernels")
MOST = {  # part of the package → files of the library that adding one may touch
    "method": 3, "family": 3, "backbone": 1, "runtime": 2, "precision": 4, "teacher": 4, "command": 1,
}  # fmt: skip


def table() -> dict[str, int]:
    """Name of each diff in the document's table, with the number of files beside it."""
    row = r"^\|[^|]+\| (\d+) \| \[(\w+)\.diff\]\(extending/\2\.diff\) \|"
    return {name: int(most) for most, name in re.findall(row, DOCUMENT.read_text(encoding="utf-8"), re.M)}


def diff(name: str) -> Path:
    return DOCUMENT.with_suffix("") / f"{name}.diff"


def files_of(name: str) -> list[str]:
    return re.findall(r"^diff --git a/(\S+) b/\1$", diff(name).read_text(encoding="utf-8"), re.M)


def git_apply(folder: Path, name: str, *options: str) -> None:
    """Apply a diff to the packages in `folder`, which is no repository and stands in none."""
    outside = {**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.parent)}
    command = ["git", "apply", *options, str(diff(name))]
    done = subprocess.run(command, cwd=folder, env=outside, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{name}.diff is old; docs/extending.md says how to write it again\n{done.stderr}"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A folder with the packages."""
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / "copy" / package, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "copy"


def test_every_part_has_a_row_and_a_diff() -> None:
    assert table() == MOST
    assert {path.stem for path in DOCUMENT.with_suffix("").iterdir()} == {*MOST}


@pytest.mark.parametrize("name", MOST)
def test_an_addition_touches_few_files(name: str) -> None:
    files = files_of(name)
    assert 1 <= len(set(files)) <= table()[name]
    assert {file.partition("/")[0] for file in files} <= {*PACKAGES}
    added = re.findall(r"^[+-](?![+-]{2} ).*\S", diff(name).read_text(encoding="utf-8"), re.M)
    assert len(added) < 120, "short enough to read"


def test_each_diff_applies_alone(copy: Path) -> None:
    for name in MOST:
        git_apply(copy, name, "--check")


def test_what_they_add_works(copy: Path, tmp_path: Path) -> None:
    before = {path.relative_to(copy).as_posix(): path.read_bytes() for path in copy.rglob("*.py")}
    for name in MOST:
        git_apply(copy, name)
    after = {path.relative_to(copy).as_posix(): path.read_bytes() for path in copy.rglob("*.py")}
    assert {file for file in after if after[file] != before.get(file)} == {f for name in MOST for f in files_of(name)}

    program = ROOT / "tests" / "helpers" / "added_parts.py"
    environment = {**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(program), str(copy)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"works: {' '.join(sorted(MOST))}"
