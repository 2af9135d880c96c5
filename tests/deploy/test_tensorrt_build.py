"""The deployable file parses and builds in TensorRT with a dynamic batch. Building needs no GPU with
TensorRT-RTX."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.deploy.tiny import SIZE

trt = pytest.importorskip("tensorrt", reason="tensorrt is not installed (extra `trt`)")


def test_the_file_with_its_suppression_builds_with_a_dynamic_batch(tiny_onnx: Path) -> None:
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    flags = 0
    if hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED"):
        flags |= 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, logger)
    parsed = parser.parse(tiny_onnx.read_bytes())
    assert parsed, [str(parser.get_error(i)) for i in range(parser.num_errors)]
    assert [network.get_output(i).name for i in range(network.num_outputs)] == [
        "boxes",
        "scores",
        "labels",
        "count",
    ]
    assert network.get_input(0).dtype == trt.uint8

    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    profile.set_shape("images", (1, 3, *SIZE), (4, 3, *SIZE), (8, 3, *SIZE))
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    assert engine is not None
    assert engine.nbytes > 10_000
