"""The model repository, read by protobuf's own parser with the part of Triton's schema that we use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

from deploy.core.card import METADATA_KEY
from deploy.core.errors import UserError
from deploy.serve.triton_repo import config_pbtxt, write_triton_model
from deploy.tensorrt.card import EngineOptions, Layers, write_engine_card
from tests.helpers.engine_cards import engine_card
from tests.helpers.tiny_onnx import CARD, SIZE

# Of model_config.proto of Triton Inference Server: message → field → type, `*` for repeated, `{}` for a map by string.
SCHEMA = {
    "ModelConfig": {
        "name": "string",
        "platform": "string",
        "backend": "string",
        "max_batch_size": "int32",
        "input": "*ModelInput",
        "output": "*ModelOutput",
        "dynamic_batching": "ModelDynamicBatching",
        "instance_group": "*ModelInstanceGroup",
        "model_warmup": "*ModelWarmup",
        "parameters": "{}ModelParameter",
    },
    "ModelInput": {"name": "string", "data_type": "DataType", "dims": "*int64", "reshape": "ModelTensorReshape"},
    "ModelOutput": {"name": "string", "data_type": "DataType", "dims": "*int64", "reshape": "ModelTensorReshape"},
    "ModelTensorReshape": {"shape": "*int64"},
    "ModelDynamicBatching": {"preferred_batch_size": "*int32", "max_queue_delay_microseconds": "uint64"},
    "ModelInstanceGroup": {"name": "string", "kind": "Kind", "count": "int32", "gpus": "*int32"},
    "ModelWarmup": {"name": "string", "batch_size": "uint32", "inputs": "{}Input", "count": "uint32"},
    "Input": {"data_type": "DataType", "dims": "*int64", "zero_data": "bool", "random_data": "bool"},
    "ModelParameter": {"string_value": "string"},
}
ENUMS = {
    "DataType": ["TYPE_INVALID", "TYPE_BOOL", "TYPE_UINT8", "TYPE_INT32", "TYPE_INT64", "TYPE_FP16", "TYPE_FP32"],
    "Kind": ["KIND_AUTO", "KIND_GPU", "KIND_CPU", "KIND_MODEL"],
}
SCALARS = {"string": 9, "int32": 5, "int64": 3, "uint32": 13, "uint64": 4, "bool": 8}


def parse(text: str) -> Any:
    """The configuration as a message. Raises text_format.ParseError for anything that is not in the schema."""
    file = descriptor_pb2.FileDescriptorProto(name="triton.proto", package="inference", syntax="proto3")
    for name, values in ENUMS.items():
        file.enum_type.add(name=name).value.extend(
            descriptor_pb2.EnumValueDescriptorProto(name=value, number=number) for number, value in enumerate(values)
        )
    for name, fields in SCHEMA.items():
        message = file.message_type.add(name=name)
        for number, (field_name, kind) in enumerate(fields.items(), 1):
            field = message.field.add(name=field_name, number=number, label=3 if kind[0] in "*{" else 1)
            plain = kind.lstrip("*{}")
            if kind.startswith("{}"):
                entry_name = "".join(part.capitalize() for part in field_name.split("_")) + "Entry"
                entry = message.nested_type.add(name=entry_name)
                entry.options.map_entry = True
                entry.field.add(name="key", number=1, label=1, type=9)
                entry.field.add(name="value", number=2, label=1, type=11, type_name=f".inference.{plain}")
                field.type, field.type_name = 11, f".inference.{name}.{entry_name}"
            elif plain in SCALARS:
                field.type = SCALARS[plain]
            else:
                field.type, field.type_name = (14 if plain in ENUMS else 11), f".inference.{plain}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    kind = message_factory.GetMessageClass(pool.FindMessageTypeByName("inference.ModelConfig"))
    return text_format.Parse(text, kind())


def names(kind: str, numbers: Any) -> list[str]:
    return [ENUMS[kind][number] for number in numbers]


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.fp16.engine"
    path.write_bytes(b"engine")
    half = {"precision": "fp16", "network": Layers(count=6, share={"fp16": 1.0})}
    write_engine_card(path, engine_card(engine=path.name, batches=(1, 8, 32), **half))
    return path


def test_an_onnx_model(tiny_onnx: Path, tmp_path: Path) -> None:
    added = write_triton_model(tmp_path, tiny_onnx, max_batch=16, max_queue_delay_us=500, instances=2)
    assert (added.name, added.version, added.backend, added.max_batch) == ("tiny", 1, "onnxruntime", 16)
    assert (tmp_path / "tiny" / "1" / "model.onnx").read_bytes() == tiny_onnx.read_bytes()
    assert (tmp_path / "tiny" / "labels.txt").read_text() == "a\nb\nc\n"
    config = parse((tmp_path / "tiny" / "config.pbtxt").read_text())
    assert (config.name, config.backend, config.max_batch_size) == ("tiny", "onnxruntime", 16)
    assert config.dynamic_batching.max_queue_delay_microseconds == 500
    assert list(config.dynamic_batching.preferred_batch_size) == [16]
    assert [(group.count, ENUMS["Kind"][group.kind]) for group in config.instance_group] == [(2, "KIND_AUTO")]
    assert json.loads(config.parameters["class_names"].string_value) == ["a", "b", "c"]
    assert json.loads(config.parameters["category_ids"].string_value) == [2, 4, 9]
    card = onnxruntime.InferenceSession(str(tiny_onnx)).get_modelmeta().custom_metadata_map[METADATA_KEY]
    assert json.loads(config.parameters["card"].string_value) == json.loads(card)


def test_the_tensors_are_those_of_the_file(tiny_onnx: Path, tmp_path: Path) -> None:
    """Against ONNX Runtime, which Triton's backend asks too: name, type and shape without the batch."""
    write_triton_model(tmp_path, tiny_onnx)
    config = parse((tmp_path / "tiny" / "config.pbtxt").read_text())
    session = onnxruntime.InferenceSession(str(tiny_onnx))
    types = {
        "tensor(uint8)": "TYPE_UINT8",
        "tensor(float)": "TYPE_FP32",
        "tensor(int64)": "TYPE_INT64",
        "tensor(int32)": "TYPE_INT32",
    }
    for declared, real in ((config.input, session.get_inputs()), (config.output, session.get_outputs())):
        assert [tensor.name for tensor in declared] == [value.name for value in real]
        assert names("DataType", (tensor.data_type for tensor in declared)) == [types[value.type] for value in real]
        for tensor, value in zip(declared, real, strict=True):
            reshaped = list(tensor.reshape.shape) if tensor.HasField("reshape") else list(tensor.dims)
            assert reshaped == value.shape[1:]
    assert [tensor.name for tensor in config.output if tensor.HasField("reshape")] == ["count"]
    assert list(config.output[3].dims) == [1]


def test_warm_up_is_of_the_input(tiny_onnx: Path, tmp_path: Path) -> None:
    write_triton_model(tmp_path, tiny_onnx, max_batch=4)
    config = parse((tmp_path / "tiny" / "config.pbtxt").read_text())
    assert [warm_up.batch_size for warm_up in config.model_warmup] == [1, 4]
    for warm_up in config.model_warmup:
        images = warm_up.inputs["images"]
        assert images.zero_data and list(images.dims) == [3, *SIZE] and images.data_type == config.input[0].data_type


def test_an_engine_brings_its_own_batches(engine: Path, tmp_path: Path) -> None:
    added = write_triton_model(tmp_path / "repository", engine)
    assert (added.name, added.backend, added.max_batch) == ("tiny_fp16_trt", "tensorrt", 32)
    folder = tmp_path / "repository" / "tiny_fp16_trt"
    assert (folder / "1" / "model.plan").read_bytes() == b"engine" and (folder / "1" / "model.plan.json").is_file()
    config = parse((folder / "config.pbtxt").read_text())
    assert config.backend == "tensorrt" and list(config.dynamic_batching.preferred_batch_size) == [8, 32]
    assert names("Kind", (group.kind for group in config.instance_group)) == ["KIND_GPU"]


def test_versions_count_up_and_the_same_file_is_no_new_one(engine: Path, tiny_onnx: Path, tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    assert [write_triton_model(repository, tiny_onnx, name="m").version for _ in range(2)] == [1, 1]
    other = tmp_path / "other.onnx"
    other.write_bytes(tiny_onnx.read_bytes() + b"\x12\x01x")  # a producer name: other bytes
    assert write_triton_model(repository, other, name="m").version == 2
    assert sorted(path.name for path in (repository / "m").iterdir()) == ["1", "2", "config.pbtxt", "labels.txt"]
    with pytest.raises(UserError, match="a model of another backend has this name"):
        write_triton_model(repository, engine, name="m")


def test_a_batch_of_one_is_not_batched() -> None:
    config = parse(config_pbtxt(CARD, "m", "onnxruntime", 1, [], 100, 1, "KIND_CPU"))
    assert not config.HasField("dynamic_batching") and [w.batch_size for w in config.model_warmup] == [1]


def test_names_of_classes_may_hold_anything() -> None:
    card = CARD.model_copy(update={"class_names": ['a "quoted" \\ one', "Größe 鳥", "tab\tand\nline"]})
    config = parse(config_pbtxt(card, "m", "onnxruntime", 4, [4], 100, 1, "KIND_AUTO"))
    assert json.loads(config.parameters["class_names"].string_value) == card.class_names


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batches": (2, 8, 32)}, "takes no batch below 2"),
        ({"options": EngineOptions(refit="all", strip=True)}, "holds no weights"),
        ({"precision": "int8"}, "called int8, but"),
        ({"machine": engine_card().machine.model_copy(update={"library": "TensorRT-RTX"})}, "the server runs TensorRT"),
        ({"engine_sha256": "0" * 64}, "not the engine that its card describes"),
    ],
)
def test_engines_that_no_server_can_run(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = tmp_path / "tiny.engine"
    path.write_bytes(b"engine")
    write_engine_card(path, engine_card(**changes))
    with pytest.raises(UserError, match=message):
        write_triton_model(tmp_path / "repository", path)
    assert not (tmp_path / "repository").exists()


def test_mistakes_are_one_line(engine: Path, tiny_onnx: Path, tmp_path: Path) -> None:
    for artifact, arguments, message in (
        (tmp_path / "m.pt", {}, "neither .onnx nor .engine"),
        (tmp_path / "none.onnx", {}, "no such file"),
        (tmp_path / "none.engine", {}, "no such file"),
        (tiny_onnx, {"name": "a/b"}, "a model's name is made of"),
        (tiny_onnx, {"max_batch": 0}, "max_batch and instances must be at least 1"),
        (engine, {"kind": "KIND_CPU"}, "an engine runs on a GPU"),
    ):
        with pytest.raises(UserError, match=message) as error:
            write_triton_model(tmp_path / "repository", artifact, **arguments)  # type: ignore[arg-type]
        assert "\n" not in str(error.value)
