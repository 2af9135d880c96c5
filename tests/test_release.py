"""What a release says about itself agrees, and workflows run what is here. `make release-check` tries it out."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml

import compress

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def test_version_licence_and_papers_agree() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    newest = re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest is not None and newest[1] == citation["version"] == compress.__version__
    assert (citation["license"], citation["abstract"]) == (project["license"], project["description"])
    pages = " ".join(" ".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs").rglob("*.md")).split())
    for paper in citation["references"]:
        number = paper["identifiers"][0]["value"].removeprefix("arXiv:")
        assert paper["title"] in pages and number in pages, f"docs/ do not name {number} so"


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_run_what_is_here(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    jobs = yaml.safe_load(text)["jobs"]
    steps = [step for job in jobs.values() for step in job["steps"]]
    assert set(re.findall(r"\bmake (?:[A-Z]+=\S+ )*([a-z-]+)", text)) <= targets
    assert all((ROOT / script).is_file() for script in re.findall(r"(?<!\S)\.ci/[\w-]+", text))
    for step in steps:
        assert re.fullmatch(r"[\w.-]+/[\w.-]+@(v\d+|release/v\d+)", step.get("uses", "a/b@v1")), step
    assert "secrets." not in text
