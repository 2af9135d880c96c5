"""Files that a converter makes nothing good of are refused in the versions in which that was seen, and in no others."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from deploy.core.card import Quantization
from deploy.core.errors import UserError
from deploy.graph.precision import compute_in
from deploy.targets.make import make_for
from deploy.targets.refusal import Refusal, network_of, of_command, of_package
from deploy.targets.table import TARGETS, Target
from tests.helpers.tiny_onnx import CARD

ROOT = Path(__file__).parents[3]
HALF = CARD.model_copy(update={"precision": {"head": "fp16"}})
INT8 = CARD.model_copy(update={"quantization": Quantization(target="cpu", layers=1, method="weights")})


def refusal(version: str | None, precision: str = "fp16") -> Refusal:
    return Refusal(precision, "spoils it", "give another", "maker", "2.6.9", lambda: version)


@pytest.mark.parametrize("version", ["1.29.24", "2.6", "2.6.9"])
@pytest.mark.parametrize("network", ["fp16", "fp16+fp32"])
def test_versions_in_which_it_was_seen(version: str, network: str) -> None:
    with pytest.raises(UserError) as refused:
        refusal(version).check(Path("a.onnx"), network)
    assert str(refused.value) == f"a.onnx: is {network}, and maker {version} spoils it: give another"


@pytest.mark.parametrize("version", ["2.6.10", "2.7.0", "10.0", None])
def test_newer_versions_are_tried(version: str | None) -> None:
    refusal(version).check(Path("a.onnx"), "fp16")


def test_no_version_makes_some_better() -> None:
    always = Refusal("bf16", "nothing computes in it", "give another")
    with pytest.raises(UserError, match=r"^a.onnx: is bf16, and nothing computes in it: give another$"):
        always.check(Path("a.onnx"), "bf16")
    always.check(Path("a.onnx"), "fp16")


def test_the_precision_of_a_card() -> None:
    """Not in the way of others: a quantized file is int8, whatever its other layers are."""
    assert [network_of(card) for card in (HALF, INT8)] == ["fp16", "int8"]
    assert network_of(INT8.model_copy(update={"precision": {"head": "fp16"}})) == "int8"
    refusal("1.0", "int8").check(Path("a.onnx"), network_of(HALF))


def test_versions_of_packages_and_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert of_package("pytest")() == pytest.__version__
    assert of_package("no-such-package")() is None
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    command = of_command("converter")
    assert command() is None
    (tmp_path / "converter").write_text("#!/bin/sh\necho 1.2.3\n")
    (tmp_path / "converter").chmod(0o755)
    assert command() == "1.2.3"
    for says in ("exit 1", "echo converter dev"):
        (tmp_path / "converter").write_text(f"#!/bin/sh\n{says}\n")
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


def test_bf16_is_openvinos(tiny_onnx: Path, tmp_path: Path) -> None:
    """Others would compute in float32 and say that they did not."""
    compute_in("bf16", tiny_onnx, tmp_path / "tiny.bf16.onnx")
    for name in TARGETS.keys() - {"openvino"}:
        with pytest.raises(UserError, match=r"is bf16, and only OpenVINO computes in it: give the fp32 file"):
            make_for(name, tmp_path / "tiny.bf16.onnx", tmp_path / "made")


def test_the_documents_name_each() -> None:
    text = (ROOT / "docs/runtimes.md").read_text()
    assert "| bf16, but for `openvino` |" in text
    for name, target in TARGETS.items():
        for one in target.refusals:
            if one.precision == "bf16":
                continue
            seen = "" if one.converter is None else rf"{one.converter} up to {re.escape(one.seen)} "
            assert re.search(rf"^\| {one.precision} for `{name}` \| {seen}", text, re.MULTILINE), (name, one.precision)
