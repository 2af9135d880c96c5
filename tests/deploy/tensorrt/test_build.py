"""Engines are really parsed and built. Without a GPU tests/trt_rig does it; what it cannot do is skipped with a reason.

On a machine with TensorRT and a GPU the same tests run without a skip.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

from compress import cli
from deploy.core import cuda_driver
from deploy.core.card import Quantization, card_from_file
from deploy.core.errors import UserError
from deploy.core.files import sha256_of
from deploy.core.onnx_scan import scan_onnx
from deploy.graph.precision import set_card
from deploy.runtimes.onnx import OnnxRunner
from deploy.tensorrt.build import build_engine, layer_formats, refit_engine, timing_cache_key
from deploy.tensorrt.card import (
    EngineCard,
    EngineOptions,
    Machine,
    card_path,
    open_engine,
    read_engine_card,
    this_machine,
    write_engine_card,
)
from tests.helpers import tensorrt_rig
from tests.helpers.tensorrt_build import refusal
from tests.helpers.tiny_onnx import CARD, SIZE, export_tiny, pictures

tensorrt_rig.need_tensorrt()

from deploy.tensorrt.network import compute_layers, library, load_tensorrt, parse_network  # noqa: E402


@pytest.fixture(scope="session")
def other_onnx(tiny_onnx: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Student after more training: other weights, the same structure."""
    model = onnx.load(str(tiny_onnx))
    rng = np.random.default_rng(0)
    for item in model.graph.initializer:
        if item.name.startswith("module.detector"):
            value = numpy_helper.to_array(item)
            item.CopyFrom(
                numpy_helper.from_array((value + rng.normal(0, 0.02, value.shape)).astype(np.float32), item.name)
            )
    path = tmp_path_factory.mktemp("other") / "other.onnx"
    onnx.save(model, str(path))
    return path


@pytest.fixture
def build(tiny_onnx: Path, tmp_path: Path) -> Callable[..., EngineCard]:
    """Build the tiny file, or another, into tmp_path/tiny.engine."""

    def build(onnx_file: Path = tiny_onnx, name: str = "tiny.engine", **options: Any) -> EngineCard:
        chosen = EngineOptions(**{"batches": (1, 4, 8), **options})
        return tensorrt_rig.if_possible(
            lambda: build_engine(onnx_file, tmp_path / name, chosen, timing_caches=tmp_path / "timing"), options
        )

    return build


@pytest.fixture(scope="session")
def built(tiny_onnx: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine with its card, which tests copy."""
    folder = tmp_path_factory.mktemp("built")
    build_engine(tiny_onnx, folder / "tiny.engine", EngineOptions(batches=(1, 4, 8)), timing_caches=folder)
    return folder / "tiny.engine"


@pytest.fixture
def engine(built: Path, tmp_path: Path) -> Path:
    """A copy of an engine with its card."""
    for path in (built, card_path(built)):
        shutil.copy(path, tmp_path)
    return tmp_path / "tiny.engine"


def here() -> Machine:
    return this_machine(*library(load_tensorrt()))


# ----------------------------------------------------------------------------------------------------- building


def test_an_engine_and_its_card(engine: Path, tiny_onnx: Path) -> None:
    content, card = open_engine(engine, here())
    assert len(content) == card.engine_bytes > 10_000
    assert (card.engine_sha256, card.onnx_sha256) == (sha256_of(engine), sha256_of(tiny_onnx))
    assert card.machine == here() and card.model.class_names == CARD.class_names
    assert [(i.name, i.dtype, i.shape) for i in card.inputs] == [("images", "uint8", [-1, 3, *SIZE])]
    assert [(o.name, o.dtype, o.shape) for o in card.outputs] == [
        ("boxes", "fp32", [-1, 20, 4]),
        ("scores", "fp32", [-1, 20]),
        ("labels", "int64", [-1, 20]),
        ("count", "int32", [-1]),
    ]
    profile = card.profiles[0]
    assert (profile.min, profile.opt, profile.max) == ([1, 3, *SIZE], [4, 3, *SIZE], [8, 3, *SIZE])
    assert card.network.count == 6 and card.network.share == {"fp32": 1.0}  # the six convolutions of the tiny detector
    assert (card.layers is None) == bool(card.layers_missing)
    assert json.loads(card_path(engine).read_text())["schema_version"] == 1


@tensorrt_rig.needs_gpu
def test_the_inspector_lists_layers(engine: Path) -> None:
    card = read_engine_card(engine)
    assert card.layers is not None, card.layers_missing
    assert card.layers.count > 0 and sum(card.layers.share.values()) == pytest.approx(1, abs=1e-3)
    assert "fp32" in card.layers.share


@pytest.mark.parametrize(
    "options",
    [
        {"workspace_gb": 1.0, "optimization_level": 0},
        {"optimization_level": 5, "hardware_compatible": "same"},
        {"version_compatible": True},
        {"refit": "all"},
        {"refit": "individual"},
        {"refit": "all", "strip": True},
        {"batches": (2, 2, 2)},
    ],
    ids=lambda options: "-".join(options),
)
def test_options_are_built_and_written_down(
    build: Callable[..., EngineCard], tmp_path: Path, options: dict[str, Any]
) -> None:
    card = build(**options)
    assert card.options == EngineOptions(**{"batches": (1, 4, 8), **options})
    _, read = open_engine(tmp_path / "tiny.engine", here())
    assert read.options == card.options
    if options.get("refit") == "individual":
        assert {name for name in card.refittable_weights or [] if name.startswith("module.detector")} == {
            f"module.detector.{layer}.{kind}" for layer in ("stem", "down", "cls", "reg") for kind in ("weight", "bias")
        }


@pytest.mark.parametrize(
    ("options", "reason", "skipped"),
    [
        ({}, "needs a GPU and its driver", False),
        ({"workspace_gb": 1.0, "optimization_level": 0}, "needs a GPU and its driver", False),
        ({"batches": (2, 2, 2), "hardware_compatible": "same"}, "needs TensorRT's lean runtime", False),
        ({"version_compatible": True}, "needs a GPU and its driver", False),
        ({"version_compatible": True}, "needs TensorRT's lean runtime", True),
        ({"refit": "individual"}, "needs a GPU and its driver", True),
        ({"refit": "all", "strip": True}, "needs a GPU and its driver", True),
        ({"refit": "all"}, "Out of memory", False),
    ],
)
def test_only_what_the_rig_cannot_do_is_skipped(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], reason: str, skipped: bool
) -> None:
    def fail() -> None:
        raise UserError(f"m.onnx: TensorRT does not build it: this {reason}")

    monkeypatch.setattr(cuda_driver, "gpu", lambda: None)
    with pytest.raises(pytest.skip.Exception if skipped else UserError, match=reason):
        tensorrt_rig.if_possible(fail, options)
    monkeypatch.setattr(cuda_driver, "gpu", lambda: "a GPU")
    with pytest.raises(UserError, match=reason):
        tensorrt_rig.if_possible(fail, options)


def test_weights_are_marked_one_by_one(tiny_onnx: Path) -> None:
    """The network knows the ONNX names of its weights, and no others."""
    network = parse_network(tiny_onnx).network
    name = "module.detector.stem.weight"
    assert not network.are_weights_marked_refittable(name)
    assert network.mark_weights_refittable(name) and network.are_weights_marked_refittable(name)
    assert not network.are_weights_marked_refittable("module.detector.stem.bias")
    assert not network.mark_weights_refittable("no such weight")
    assert network.unmark_weights_refittable(name) and not network.are_weights_marked_refittable(name)


def test_the_flag_of_individual_refit_builds(tiny_onnx: Path) -> None:
    """REFIT_INDIVIDUAL itself: an engine in which no weight is marked is all that can be had without a GPU."""
    parsed = parse_network(tiny_onnx)
    config = parsed.builder.create_builder_config()
    config.set_flag(parsed.trt.BuilderFlag.REFIT_INDIVIDUAL)
    profile = parsed.builder.create_optimization_profile()
    profile.set_shape("images", (1, 3, *SIZE), (1, 3, *SIZE), (2, 3, *SIZE))
    config.add_optimization_profile(profile)
    assert parsed.builder.build_serialized_network(parsed.network, config).nbytes > 10_000


def test_progress_goes_forward_and_ends(tiny_onnx: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    build_engine(
        tiny_onnx,
        tmp_path / "t.engine",
        EngineOptions(batches=(1, 1, 1)),
        timing_caches=tmp_path,
        progress=lambda done, total: seen.append((done, total)),
    )
    done = [step for step, _ in seen]
    assert len(seen) > 10 and done == sorted(done) and seen[-1] == (1000, 1000)


def test_an_interrupt_stops_the_build_and_leaves_nothing(tiny_onnx: Path, tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_engine(tiny_onnx, tmp_path / "t.engine", timing_caches=tmp_path / "timing", progress=interrupt)
    assert list(tmp_path.glob("*.engine*")) == []


# ------------------------------------------------------------------------------------------------ timing cache


def test_the_timing_cache_is_kept_and_offered_again(build: Callable[..., EngineCard], tmp_path: Path) -> None:
    first = build().timing_cache
    assert first is not None and first.state == "new"
    files = list((tmp_path / "timing").iterdir())
    assert [file.name for file in files] == [f"{first.key}.cache"] and files[0].stat().st_size > 0
    second = build().timing_cache
    assert second is not None and second.key == first.key
    if second.state != "reused":
        assert second.state.startswith("not accepted: ")
        if tensorrt_rig.not_runnable():
            pytest.skip(f"the cache was found and offered; {second.state}")
    assert second.state == "reused"


def test_its_key_holds_all_that_timings_depend_on() -> None:
    machine = Machine(library="TensorRT", version="10.13", gpu="Tesla T4")
    keys = {
        timing_cache_key("a" * 64, machine, "fp16"),
        timing_cache_key("b" * 64, machine, "fp16"),
        timing_cache_key("a" * 64, machine, "int8"),
        timing_cache_key("a" * 64, machine, None),
        timing_cache_key("a" * 64, machine.model_copy(update={"version": "10.14"}), "fp16"),
        timing_cache_key("a" * 64, machine.model_copy(update={"gpu": "NVIDIA L4"}), "fp16"),
        timing_cache_key("a" * 64, machine.model_copy(update={"gpu": None}), "fp16"),
        timing_cache_key("a" * 64, machine.model_copy(update={"library": "TensorRT-RTX"}), "fp16"),
    }
    assert len(keys) == 8 and all("/" not in key and " " not in key for key in keys)


def test_a_spoilt_timing_cache_only_costs_time(build: Callable[..., EngineCard], tmp_path: Path) -> None:
    key = build().timing_cache
    assert key is not None
    (tmp_path / "timing" / f"{key.key}.cache").write_bytes(b"rubbish")
    again = build().timing_cache
    assert again is not None and again.state.startswith("not accepted: ")


# -------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("name", ["tiny.fp16.engine", "tiny.int8.engine", "tiny.mixed.engine"])
def test_a_graph_that_is_not_what_it_is_called_is_not_built(
    build: Callable[..., EngineCard], tmp_path: Path, name: str
) -> None:
    with pytest.raises(UserError, match="are 100% fp32: export it again with --precision"):
        build(name=name)
    assert list(tmp_path.iterdir()) == []


def test_an_int8_file_that_the_search_kept_in_float_is_not_sent_back_to_the_search(
    tiny_onnx: Path, tmp_path: Path
) -> None:
    """Exporting it again with --precision int8 would give the same file."""
    quantization = Quantization(
        target="tensorrt", layers=1, float_layers=["down", "cls", "reg"], method="minmax", images_sha256="0",
        image_hashes=["0"], guided_map_drop=0.4,
    )  # fmt: skip
    path, model = tmp_path / "tiny.int8.onnx", onnx.load(str(tiny_onnx))
    set_card(model, card_from_file(tiny_onnx).model_copy(update={"quantization": quantization}))
    onnx.save(model, str(path))
    with pytest.raises(UserError, match=r"kept 3 of 4 layers in float: raise --max-map-drop, or use") as error:
        build_engine(path, timing_caches=tmp_path / "timing")
    assert "--precision int8" not in str(error.value) and list(tmp_path.iterdir()) == [path]


def test_nor_is_a_file_with_the_wrong_name(build: Callable[..., EngineCard], tiny_onnx: Path, tmp_path: Path) -> None:
    renamed = tmp_path / "student.int8.onnx"
    shutil.copy(tiny_onnx, renamed)
    with pytest.raises(UserError, match=r"student.int8.onnx: called int8, but"):
        build(renamed)


def test_an_engine_of_another_machine_is_refused(engine: Path) -> None:
    card = read_engine_card(engine)
    changed = card.machine.model_copy(update={"gpu": "Tesla T4", "compute_capability": "7.5"})
    write_engine_card(engine, card.model_copy(update={"machine": changed}))
    with pytest.raises(UserError, match="built on Tesla T4"):
        open_engine(engine, here())


def test_refit_needs_a_refittable_engine(engine: Path, other_onnx: Path) -> None:
    with pytest.raises(UserError, match="built without --refit or --strip, its weights are fixed: rebuild it with"):
        refit_engine(engine, other_onnx)


def test_refit_needs_the_same_structure(engine: Path, tiny_onnx: Path, tmp_path: Path) -> None:
    card = read_engine_card(engine)
    refittable = card.model_copy(update={"options": card.options.model_copy(update={"refit": "all"})})
    write_engine_card(engine, refittable)
    changed = onnx.load(str(tiny_onnx))
    next(node for node in changed.graph.node if node.op_type == "Relu").op_type = "Sigmoid"
    onnx.save(changed, str(tmp_path / "changed.onnx"))
    with pytest.raises(UserError, match="not the structure"):
        refit_engine(engine, tmp_path / "changed.onnx")


@tensorrt_rig.needs_gpu
@pytest.mark.parametrize("options", [{"refit": "all"}, {"refit": "individual"}, {"refit": "all", "strip": True}])
def test_a_refitted_engine_computes_as_its_new_file(
    build: Callable[..., EngineCard], other_onnx: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    from deploy.runtimes.tensorrt import TensorRTRunner

    old = build(**options)
    card = refit_engine(tmp_path / "tiny.engine", other_onnx)
    assert card.refitted_from == old.engine_sha256 and card.onnx == "other.onnx" and not card.options.strip
    images = pictures(3)
    found, wanted = TensorRTRunner(tmp_path / "tiny.engine")(images), OnnxRunner(other_onnx, threads=1)(images)
    np.testing.assert_array_equal(found.count, wanted.count)
    np.testing.assert_allclose(found.scores, wanted.scores, atol=2e-3)


# ------------------------------------------------------------------------------------------------ what is measured


def test_layers_of_the_inspector_in_both_spellings() -> None:
    """TensorRT 10 writes `Format/Datatype`, TensorRT 11 `DataType`; the narrowest format is the layer's."""
    ten = {
        "Layers": [
            {"Inputs": [{"Format/Datatype": "Row major linear FP32"}], "Outputs": [{"Format/Datatype": "Half"}]},
            {
                "Inputs": [{"Format/Datatype": "Thirty-two wide channel vectorized row major Int8 format"}],
                "Outputs": [],
            },
            {"Inputs": [{"Format/Datatype": "Int32"}], "Outputs": [{"Format/Datatype": "Row major linear FP32"}]},
            {"Inputs": [{"Format/Datatype": "Int64"}], "Outputs": [{"Format/Datatype": "Bool"}]},
        ]
    }
    layers, missing = layer_formats(ten)
    assert missing == "" and layers is not None and layers.count == 4
    assert layers.share == {"fp16": 0.25, "int8": 0.25, "fp32": 0.25, "int64": 0.25}
    eleven = {"Layers": [{"Inputs": [{"DataType": "Float"}], "Outputs": [{"DataType": "BFloat16"}]}]}
    layers, _ = layer_formats(eleven)
    assert layers is not None and layers.share == {"bf16": 1.0}
    for empty in ({"Layers": []}, {"Layers": ["conv1", "conv2"]}, {}):
        layers, missing = layer_formats(empty)
        assert layers is None and "profiling verbosity" in missing


def quantized(model: onnx.ModelProto, path: Path, unsigned: bool) -> Path:
    """Static quantization by ONNX Runtime's own tool, calibrated on noise: formats matter here, not values."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Noise(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter([{"images": pictures(2)}])

        def get_next(self) -> Any:
            return next(self.batches, None)

    extra = {} if unsigned else {"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False}
    onnx.save(model, str(path.with_suffix(".float.onnx")))
    quantize_static(
        str(path.with_suffix(".float.onnx")),
        str(path),
        Noise(),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=["Conv"],
        per_channel=True,
        activation_type=QuantType.QUInt8 if unsigned else QuantType.QInt8,
        weight_type=QuantType.QInt8,
        extra_options=extra,
    )
    return path


def test_int8_layers_are_seen(model: onnx.ModelProto, build: Callable[..., EngineCard], tmp_path: Path) -> None:
    path = quantized(model, tmp_path / "tiny.int8.onnx", unsigned=False)
    parsed = parse_network(path)
    assert compute_layers(parsed.trt, parsed.network).share == {"int8": 1.0}
    assert build(path, "tiny.int8.engine").precision == "int8"
    with pytest.raises(UserError, match="called fp16, but its convolutions and matrix products are 100% int8"):
        build(path, "tiny.fp16.engine")


def test_int8_for_the_cpu_is_refused_with_the_target(model: onnx.ModelProto, tmp_path: Path) -> None:
    path = quantized(model, tmp_path / "tiny.int8.onnx", unsigned=True)
    line = refusal(path)
    assert "--target tensorrt" in line and "TensorRT cannot read it: node '" in line


# --------------------------------------------------------------------------------------------------- command line


def run(*words: object) -> int:
    with pytest.raises(SystemExit) as stop:
        cli.main([str(word) for word in words])
    return int(stop.value.code or 0)


@pytest.mark.parametrize("command", ["build MODEL", "export MODEL --trt"])
def test_an_engine_of_an_onnx_file(
    tiny_onnx: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    """`export --trt` is the short way: the same options, the same engine."""
    name, *more = command.split()
    engine = tmp_path / "t.engine"
    words = ["--batch", "1,2,4", "--workspace-gb", "0.5", "--builder-optimization-level", "1"]
    assert run(name, tiny_onnx, *more[1:], "--out", engine, *words, "--timing-cache", tmp_path / "timing") == 0
    output = capsys.readouterr().out
    assert f"{engine}: " in output and "100% fp32" in output and output.endswith(f"next: compress benchmark {engine}\n")
    card = read_engine_card(engine)
    assert card.options == EngineOptions(batches=(1, 2, 4), workspace_gb=0.5, optimization_level=1)
    assert card.weights_sha256 == {} and scan_onnx(tiny_onnx).weights


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "is an ONNX file already; give --for"),
        ("--trt --batch 8,1", "--batch: '8,1': an engine has a smallest, a best and a largest batch"),
        ("--trt --batch 1,2,3,4", "--batch: '1,2,3,4'"),
        ("--trt --workspace-gb 0", "--workspace-gb: "),
        ("--trt --workspace-gb inf", "--workspace-gb: Input should be a finite number"),
        ("--trt --workspace-gb nan", "--workspace-gb: "),
        ("--trt --workspace-gb 1e30", "--workspace-gb: Input should be less than or equal to 10000"),
        ("--trt --out t.onnx", "t.onnx: an engine's name ends in .engine"),
    ],
)
def test_mistakes_are_refusal(tiny_onnx: Path, words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("export", tiny_onnx, *words.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error


def test_broken_files_are_one_line_and_exit_code_2(
    tiny_onnx: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cut.onnx").write_bytes(tiny_onnx.read_bytes()[:-100])
    assert run("export", tmp_path / "cut.onnx", "--trt") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "truncated" in error


def test_an_engine_is_not_run_by_something_else(engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if tensorrt_rig.not_runnable() is None:
        pytest.skip("engines run here")
    assert run("benchmark", engine) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and ("pycuda" in error or "no CUDA GPU" in error or "tensorrt" in error)


def test_onnxruntime_and_tensorrt_live_in_one_process(tiny_onnx: Path) -> None:
    session = onnxruntime.InferenceSession(str(tiny_onnx), providers=["CPUExecutionProvider"])
    parse_network(tiny_onnx)
    assert session.run(None, {"images": pictures(1)})[3].shape == (1,)


def test_two_trainings_of_one_architecture_have_one_structure(tiny_onnx: Path, tmp_path: Path) -> None:
    """Or no re-distilled student could be refitted into an existing engine."""
    export_tiny(tmp_path / "again.onnx", seed=1)
    one, two = scan_onnx(tiny_onnx), scan_onnx(tmp_path / "again.onnx")
    assert one.structure_sha256 == two.structure_sha256 and one.weights != two.weights
