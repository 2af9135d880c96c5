"""Parse and build a deployable file with TensorRT, strongly typed, with a dynamic batch. Needs no GPU with
TensorRT-RTX."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from deploy.core.card import card_from_file
from deploy.core.errors import UserError
from deploy.tensorrt.build import build_engine


@dataclass(frozen=True)
class Built:
    engine_bytes: int
    quantized: int
    """Dequantize layers in the network."""
    half: int
    """Convolutions that compute in float16."""


def build(path: Path) -> Built:
    """Skips the test where TensorRT is not installed; fails it where the file does not parse or build."""
    trt = pytest.importorskip("tensorrt", reason="tensorrt is not installed (extra `trt`)")
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = trt.OnnxParser(network, logger)
    assert parser.parse(path.read_bytes()), [str(parser.get_error(i)) for i in range(parser.num_errors)]
    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    size = card_from_file(path).input_size
    profile.set_shape("images", (1, 3, *size), (4, 3, *size), (8, 3, *size))
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    assert engine is not None
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    return Built(
        engine_bytes=engine.nbytes,
        quantized=sum(layer.type == trt.LayerType.DEQUANTIZE for layer in layers),
        half=sum(
            layer.type == trt.LayerType.CONVOLUTION and layer.get_output(0).dtype == trt.float16 for layer in layers
        ),
    )


def refusal(path: Path) -> str:
    """What `build_engine` says about a file that cannot be built, in one line, with nothing left behind."""
    with pytest.raises(UserError) as error:
        build_engine(path, timing_caches=path.parent / "timing")
    assert "\n" not in str(error.value) and str(error.value).startswith(f"{path}: ")
    assert not list(path.parent.glob("*.engine*"))
    return str(error.value).removeprefix(f"{path}: ")
