"""Refusals: what an engine is called, what its card says, and where it is to run."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from compress import cli
from compress.cli import build
from deploy.core.card import ModelCard, Quantization
from deploy.core.errors import UserError
from deploy.tensorrt.card import (
    EngineOptions,
    Layers,
    card_path,
    claimed_precision,
    contradiction,
    machine_differences,
    open_engine,
    read_engine_card,
    rebuild,
    write_engine_card,
)
from tests.helpers.engine_cards import T4, engine_card
from tests.helpers.tiny_onnx import CARD

L4 = T4.model_copy(update={"gpu": "NVIDIA L4", "compute_capability": "8.9"})
FP32, FP16, INT8 = ({"fp32": 1.0}, {"fp16": 0.9, "fp32": 0.1}, {"int8": 0.8, "fp32": 0.2})


def write(folder: Path, name: str = "tiny.engine", content: bytes = b"engine", **changes: Any) -> Path:
    path = folder / name
    path.write_bytes(content)
    write_engine_card(path, engine_card(content, engine=name, **changes))
    return path


def test_an_engine_with_its_card_opens_where_it_was_built(tmp_path: Path) -> None:
    content, card = open_engine(write(tmp_path), T4)
    assert content == b"engine" and card == engine_card() and card.model == CARD


# -------------------------------------------------------------------------------------------- what it is called


@pytest.mark.parametrize(
    ("name", "claim"),
    [
        ("student.fp16.engine", "fp16"),
        ("student_INT8.engine", "int8"),
        ("student-fp16.int8.engine", "int8"),
        ("student.mixed.onnx", "mixed"),
        ("student.engine", None),
        ("paint8.engine", None),
        ("fp16", "fp16"),
    ],
)
def test_the_name_is_a_claim(name: str, claim: str | None) -> None:
    assert claimed_precision(name) == claim


def test_without_a_name_the_model_card_is_the_claim() -> None:
    quantized = Quantization(target="tensorrt", layers=5, method="minmax", images_sha256="0", image_hashes=["0"])
    for update, claim in (
        ({}, None),
        ({"precision": {"backbone": "fp32", "head": "fp32"}}, "fp32"),
        ({"precision": {"backbone": "fp16", "head": "fp16+fp32"}}, "fp16"),
        ({"precision": {"backbone": "int8", "head": "fp32+int8"}, "quantization": quantized}, "int8"),
    ):
        model: ModelCard = CARD.model_copy(update=update)
        assert claimed_precision("student.onnx", model) == claim
        assert claimed_precision("student.fp16.onnx", model) == "fp16"


@pytest.mark.parametrize(
    ("claim", "network", "layers", "refused"),
    [
        (None, FP32, None, False),
        ("fp32", FP32, None, False),
        ("fp16", FP16, None, False),
        ("int8", INT8, None, False),
        ("mixed", INT8, None, False),
        ("fp16", FP32, None, True),
        ("int8", FP32, None, True),
        ("int8", FP16, None, True),
        ("fp32", FP16, None, True),
        ("mixed", FP32, None, True),
        ("int8", {"int8": 0.4, "fp32": 0.6}, None, True),
        ("fp16", FP16, {"fp16": 0.6, "fp32": 0.4}, False),
        ("fp16", FP16, {"fp32": 1.0}, True),  # the graph was fp16, the engine is not
        ("int8", INT8, {"fp16": 0.5, "fp32": 0.5}, True),
    ],
)
def test_a_claim_must_be_true(
    claim: Any, network: dict[str, float], layers: dict[str, float] | None, refused: bool
) -> None:
    built = None if layers is None else Layers(count=10, share=layers)
    problem = contradiction(claim, Layers(count=10, share=network), built)
    assert (problem is not None) == refused
    if problem:
        assert problem.startswith(f"called {claim}, but") and "%" in problem


@pytest.mark.parametrize("name", ["tiny.fp16.engine", "tiny.int8.engine"])
def test_a_renamed_engine_is_refused_with_the_command(tmp_path: Path, name: str) -> None:
    path = write(tmp_path)
    path.rename(tmp_path / name)
    card_path(path).rename(card_path(tmp_path / name))
    with pytest.raises(UserError, match=r"are 100% fp32: rebuild it with `compress build tiny.onnx") as error:
        open_engine(tmp_path / name, T4)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------ where it runs


@pytest.mark.parametrize(
    ("built", "options", "here", "differs"),
    [
        ({}, {}, {}, None),
        ({}, {}, {"driver": "590.1", "cuda": "13.1"}, None),
        ({}, {}, {"version": "10.14.1"}, "built with TensorRT 10.13.3, here is 10.14.1"),
        ({}, {"version_compatible": True}, {"version": "10.14.1"}, None),
        ({}, {"version_compatible": True}, {"version": "10.9.0"}, "here is 10.9.0"),
        ({}, {"version_compatible": True}, {"version": "11.1.0"}, "here is 11.1.0"),
        ({}, {}, {"library": "TensorRT-RTX", "version": "1.7.1"}, "built with TensorRT, here is TensorRT-RTX"),
        ({}, {}, {"gpu": "NVIDIA L4", "compute_capability": "8.9"}, "here is NVIDIA L4 (8.9)"),
        ({}, {}, {"gpu": "NVIDIA Other"}, "built on Tesla T4, here is NVIDIA Other"),
        ({}, {"hardware_compatible": "same"}, {"gpu": "NVIDIA Other"}, None),
        ({}, {"hardware_compatible": "same"}, {"compute_capability": "8.9"}, "compute capability 7.5"),
        ({"compute_capability": "8.6"}, {"hardware_compatible": "ampere+"}, {"compute_capability": "9.0"}, None),
        ({"compute_capability": "8.6"}, {"hardware_compatible": "ampere+"}, {}, "has compute capability 7.5"),
        ({}, {}, {"gpu": None, "compute_capability": None}, "no GPU here"),
        ({}, {}, {"cuda": "12.8"}, "driver for CUDA 13.0, this one runs up to 12.8"),
        ({}, {}, {"platform": "Linux aarch64"}, "built on Linux x86_64, this is Linux aarch64"),
        ({"gpu": None, "compute_capability": None}, {}, {}, None),  # compiled when it is loaded
    ],
)
def test_card_and_machine_are_compared(
    tmp_path: Path, built: dict[str, Any], options: dict[str, Any], here: dict[str, Any], differs: str | None
) -> None:
    path = write(tmp_path, machine=T4.model_copy(update=built), options=EngineOptions(**options))
    machine = T4.model_copy(update=here)
    assert bool(machine_differences(read_engine_card(path), machine)) == (differs is not None)
    if differs is None:
        open_engine(path, machine)
        return
    with pytest.raises(UserError, match="built for another machine") as error:
        open_engine(path, machine)
    assert differs in str(error.value) and "rebuild it with `compress build" in str(error.value)


def test_several_differences_are_all_named() -> None:
    found = machine_differences(engine_card(), L4.model_copy(update={"version": "10.9"}))
    assert len(found) == 2 and "10.9" in found[0] and "NVIDIA L4" in found[1]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"batches": (4, 4, 4)},
        {"batches": (1, 8, 8), "workspace_gb": 2.5, "optimization_level": 5},
        {"version_compatible": True, "hardware_compatible": "ampere+"},
        {"refit": "all", "strip": True},
        {"refit": "individual"},
    ],
)
def test_the_rebuild_command_gives_the_same_options(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The words of the command line, understood by the command line, are the options of the card."""
    wanted = EngineOptions(**options)
    words = shlex.split(rebuild(engine_card(engine="my engine.engine", options=wanted)).split("`")[1])
    assert words[:3] == ["compress", "build", "tiny.onnx"] and words[3:5] == ["--out", "my engine.engine"]
    seen: list[Any] = []
    monkeypatch.setattr(build, "deliver", lambda onnx, out, plan, *rest: seen.append((out, plan.options)))
    monkeypatch.setattr(Path, "is_file", lambda self: True)
    with pytest.raises(SystemExit) as stop:
        cli.main(words[1:])
    assert stop.value.code == 0 and seen == [(Path("my engine.engine"), wanted)]


# ------------------------------------------------------------------------------------------------ broken pairs


def test_engine_and_card_must_belong_together(tmp_path: Path) -> None:
    path = write(tmp_path)
    path.write_bytes(b"another")
    with pytest.raises(UserError, match="not the engine that its card describes"):
        open_engine(path, T4)
    card_path(path).unlink()
    with pytest.raises(UserError, match=r"no card tiny.engine.json beside it"):
        open_engine(path, T4)
    with pytest.raises(UserError, match="no such file"):
        open_engine(tmp_path / "none.engine", T4)


def test_bad_cards_are_one_line(tmp_path: Path) -> None:
    path = write(tmp_path)
    good = json.loads(card_path(path).read_text())
    for content, message in (
        ("{", "not JSON"),
        (json.dumps({**good, "schema_version": 2}), "engine card of schema 2, this program reads 1"),
        (json.dumps({**good, "engine_bytes": "many"}), "bad engine card: engine_bytes"),
        (json.dumps({**good, "surprise": 1}), "bad engine card: surprise"),
        (json.dumps({key: value for key, value in good.items() if key != "machine"}), "bad engine card: machine"),
        ("[]", "bad engine card"),
    ):
        card_path(path).write_text(content)
        with pytest.raises(UserError, match=message) as error:
            read_engine_card(path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "options",
    [
        {"batches": (0, 1, 1)},
        {"batches": (8, 1, 32)},
        {"optimization_level": 6},
        {"workspace_gb": 0},
        {"strip": True},
        {"strip": True, "refit": "individual"},
        {"fp16": True},
    ],
)
def test_impossible_options(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        EngineOptions(**options)
