"""Files that a converter makes nothing good of are refused in the versions in which that was seen, and in no others."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from deploy.core.card import Quantization
from deploy.core.errors import UserError
from deploy.targets.make import make_for
from deploy.targets.refusal import Refusal, of_command, of_package
from deploy.targets.table import TARGETS, Target
from tests.helpers.tiny_onnx import CARD

ROOT = Path(__file__).parents[3]
HALF = CARD.model_copy(update={"precision": {"head": "fp16"}})
INT8 = CARD.model_copy(update={"quantization": Quantization(target="cpu", layers=1, method="weights")})


def refusal(version: str | None, precision: str = "half") -> Refusal:
    return Refusal(precision, "maker", "2.6.9", "spoils it", "give another", lambda: version)


@pytest.mark.parametrize("version", ["1.29.24", "2.6", "2.6.9"])
def test_versions_in_which_it_was_seen(version: str) -> None:
    with pytest.raises(UserError, match=rf"^a.onnx: is fp16, and maker {version} spoils it: give another$"):
        refusal(version).check(Path("a.onnx"), HALF)
    with pytest.raises(UserError, match=rf"^a.onnx: is int8, and maker {version} spoils it: give another$"):
        refusal(version, "int8").check(Path("a.onnx"), INT8)


@pytest.mark.parametrize("version", ["2.6.10", "2.7.0", "10.0", None])
def test_newer_versions_are_tried(version: str | None) -> None:
    refusal(version).check(Path("a.onnx"), HALF)


def test_other_precisions_are_none_of_its_business() -> None:
    refusal("1.0").check(Path("a.onnx"), CARD)
    refusal("1.0").check(Path("a.onnx"), INT8)
    refusal("1.0", "int8").check(Path("a.onnx"), HALF)


def test_versions_of_packages_and_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert of_package("pytest")() == pytest.__version__
    assert of_package("no-such-package")() is None
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    command = of_command("converter")
    assert command() is None
    (tmp_path / "converter").write_text("#!/bin/sh\necho 1.2.3\n")
    (tmp_path / "converter").chmod(0o755)
    assert command() == "1.2.3"
    (tmp_path / "converter").write_text("#!/bin/sh\nexit 1\n")
    assert command() is None


def test_nothing_is_made_of_a_refused_file(tiny_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def make(source: Path, place: Path) -> str:
        place.write_text("made")
        return "made"

    target = Target(make, ".own", runs=False, refusals=(refusal("1.0", "fp32"),))
    monkeypatch.setitem(TARGETS, "own", target)
    with pytest.raises(UserError, match=r"maker 1\.0 spoils it"):
        make_for("own", tiny_onnx, tmp_path / "a.own")
    assert not (tmp_path / "a.own").exists()
    monkeypatch.setitem(TARGETS, "own", replace(target, refusals=(refusal("3.0", "fp32"),)))
    assert make_for("own", tiny_onnx, tmp_path / "a.own") == "made"


def test_the_documents_name_each() -> None:
    rows = [line for line in (ROOT / "docs/runtimes.md").read_text().splitlines() if line.startswith("|")]
    for name, target in TARGETS.items():
        for one in target.refusals:
            precision = "fp16" if one.precision == "half" else one.precision
            wanted = rf"^\| {precision} for `{name}` \| {one.converter} up to {re.escape(one.seen)} "
            assert any(re.match(wanted, row) for row in rows), wanted
