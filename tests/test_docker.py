"""The Dockerfiles without Docker: pinned bases, files and extras that exist, no root, no PyTorch where none belongs."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "docker").glob("*.Dockerfile"))


def instructions(path: Path) -> list[tuple[str, str]]:
    """(instruction, its text) in order; continued lines are one, comments are gone."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in joined.splitlines() if line.strip()]


def test_both_are_there() -> None:
    assert [path.name for path in FILES] == ["serve.Dockerfile", "train.Dockerfile"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_instructions(path: Path) -> None:
    found = instructions(path)
    known = {"FROM", "ARG", "ENV", "RUN", "WORKDIR", "COPY", "USER", "EXPOSE", "HEALTHCHECK", "ENTRYPOINT", "CMD"}
    assert {name for name, _ in found} <= known
    defaults = dict(text.split("=", 1) for name, text in found if name == "ARG" and "=" in text)
    bases = [text.split()[0] for name, text in found if name == "FROM"]
    bases = [defaults[base[2:-1]] if base.startswith("${") else base for base in bases]
    bases += re.findall(r"BUILDER=(\S+:\S+)", path.read_text(encoding="utf-8"))  # those that a comment names
    assert all(re.fullmatch(r"[\w./-]+:\d+\.\d+\.\d+-[\w.-]+", base) for base in bases), bases
    assert [text for name, text in found if name == "USER"] == ["compress"]
    assert ("ENTRYPOINT", '["compress"]') in found

    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    for name, text in found:
        if name == "COPY" and not text.startswith("--from="):
            for source in text.split()[:-1]:
                assert (ROOT / source).exists() and f"!{source}" in ignored, source


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_extras_exist_and_serving_has_no_torch(path: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    text = path.read_text(encoding="utf-8")
    named = {extra for group in re.findall(r"(?:EXTRAS=|\.\[)([a-z,]+)", text) for extra in group.split(",")}
    assert named and named <= set(extras)
    if path.name.startswith("serve"):
        packages = [*project["dependencies"], *(package for extra in named for package in extras[extra])]
        assert not [package for package in packages if re.match(r"(torch|lightning|onnxscript)\b", package)]
        assert "find_spec('torch')" in text
    else:
        assert "train" in named
