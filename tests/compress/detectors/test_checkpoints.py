"""Checkpoints: the official key names and numbers, round trips, and every kind of bad file.

The official key lists are not stored: `official_shapes` derives them by rule, and the text of the result must
have the hash of the lists written by mmdet 3.3.0.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor, nn

from compress.config.model import Model
from compress.detectors import checkpoints
from compress.detectors.checkpoints import (
    COCO_CATEGORIES,
    HEADER_KEY,
    ModelRecord,
    load_detector,
    load_mmdet_gfl,
    load_teacher_checkpoint,
    mmdet_key,
    save_detector,
)
from compress.detectors.gfl import GFL
from deploy.core.errors import UserError
from tests.helpers.official_checkpoints import DEPTHS, SMALL, blank, official_shapes, write_official

ARCHITECTURE = json.loads((Path(__file__).parents[2] / "oracles" / "arch_oracle.json").read_text())
LIST_SHA256 = {
    18: "346468b84f43788d4bf090e35a79cc6df93599a3c10f2c66940ed7fc186d5a21",
    34: "0fac710678897a9cb2d362e88f85a4662008d915afe43f82cea8aac93f0e740a",
    50: "ba801d09e9c2b430b5b83c707e88628cc1e3b172fce2958c6cba840a32951a53",
    101: "6209cafb3dee5b7dbd671794399012d6fa535261e78315631fae576c3e9d13f7",
}
PARAMETERS = {18: 19_420_889, 34: 29_529_049, 50: 32_440_537, 101: 51_432_665}


def hashed(count: int, h: int) -> np.ndarray:
    """H(h): float64 in -1..1 from a hash on integers modulo 2^32."""
    x = np.arange(count, dtype=np.uint32) * np.uint32(2654435761) + np.uint32(h * 7919)
    x ^= x >> np.uint32(16)
    x *= np.uint32(2246822519)
    x ^= x >> np.uint32(13)
    x *= np.uint32(3266489917)
    x ^= x >> np.uint32(16)
    return 2 * x.astype(np.float64) / 2**32 - 1


def hashed_state(depth: int) -> dict[str, Tensor]:
    """The weights of the architecture checksum, float64, under mmdet's names."""
    state = {}
    for name, shape in official_shapes(depth).items():
        h = sum(map(ord, name)) % 997
        if name.endswith("integral.project"):
            state[name] = torch.arange(17.0, dtype=torch.float64)
        elif name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(0)
        elif name.endswith(".scale"):
            state[name] = torch.tensor(1 + 0.1 * int(name.split(".")[2]), dtype=torch.float64)
        elif name.endswith("running_mean"):
            state[name] = torch.zeros(shape, dtype=torch.float64)
        elif name.endswith("running_var") or (name.endswith("weight") and len(shape) == 1):
            state[name] = torch.ones(shape, dtype=torch.float64)
        else:
            scale = 0.1 if name.endswith("bias") else (3 / np.prod(shape[1:])) ** 0.5
            state[name] = torch.from_numpy(scale * hashed(int(np.prod(shape)), h)).reshape(shape)
    return state


# Official names and numbers


@pytest.mark.parametrize("depth", DEPTHS)
def test_names_and_shapes_are_mmdets(depth: int) -> None:
    official = official_shapes(depth)
    text = "".join(
        f"{name} {shape} torch.{'int64' if 'num_batches' in name else 'float32'}\n" for name, shape in official.items()
    )
    assert hashlib.sha256(text.encode()).hexdigest() == LIST_SHA256[depth]
    with torch.device("meta"):
        detector = ModelRecord(model=Model(backbone=f"resnet{depth}"), num_classes=80).build()
    ours = {mmdet_key(key): tuple(tensor.shape) for key, tensor in detector.state_dict().items()}
    del official["bbox_head.integral.project"]
    assert ours == official
    assert sum(p.numel() for p in detector.parameters()) == PARAMETERS[depth]


def test_hash_generator() -> None:
    assert hashed(5, 0) == pytest.approx(ARCHITECTURE["H0_5"], abs=1e-9)
    assert hashed(5, 7) == pytest.approx(ARCHITECTURE["H7_5"], abs=1e-9)


@pytest.mark.parametrize("depth", [18, 50])
def test_architecture_checksum(depth: int) -> None:
    """Mean and standard deviation of every map of the whole model against mmdet's, in float64."""
    official = hashed_state(depth)
    detector = ModelRecord(model=Model(backbone=f"resnet{depth}"), num_classes=80).build().double().eval()
    detector.load_state_dict({key: official[mmdet_key(key)] for key in detector.state_dict()})
    images = torch.from_numpy(2 * hashed(3 * 96 * 128, 5)).reshape(1, 3, 96, 128)
    with torch.no_grad():
        maps = detector.backbone.all_maps(images)
        pyramid = detector.neck(maps[1:])
        prediction = detector.predict(pyramid)
    oracle = ARCHITECTURE[str(depth)]
    for name, ours in (
        ("C", maps), ("P", pyramid), ("cls", prediction.logits), ("reg", prediction.distribution),
    ):  # fmt: skip
        for (shape, mean, std), x in zip(oracle[name], ours, strict=True):
            assert list(x.shape) == shape
            assert x.mean().item() == pytest.approx(mean, abs=1e-6), name
            assert x.std().item() == pytest.approx(std, abs=1e-6), name
    first = prediction.logits[0].flatten()[:3].tolist()
    assert first == pytest.approx(oracle["cls0_first3"], abs=1e-6)
    first = prediction.distribution[4].flatten()[:3].tolist()
    assert first == pytest.approx(oracle["reg4_first3"], abs=1e-6)


def test_coco_categories() -> None:
    assert len(COCO_CATEGORIES) == 80
    assert list(COCO_CATEGORIES) == sorted(COCO_CATEGORIES)
    known = {1: "person", 13: "stop sign", 44: "bottle", 62: "chair", 67: "dining table", 90: "toothbrush"}
    assert known.items() <= COCO_CATEGORIES.items()
    assert not {12, 26, 29, 30, 45, 66, 68, 69, 71, 83} & set(COCO_CATEGORIES)  # COCO never used these ids


# mmdet files


@pytest.mark.parametrize(("depth", "zipped"), [(18, False), (18, True), (34, True), (50, True), (101, True)])
def test_settings_come_from_keys_and_shapes(depth: int, zipped: bool, tmp_path: Path) -> None:
    """Load both of torch's file formats: the official files date from before the present one."""
    shapes = official_shapes(depth, classes=7, width=256, towers=2)
    path = write_official(tmp_path / "gfl.pth", blank(shapes), _use_new_zipfile_serialization=zipped)
    detector, record = load_mmdet_gfl(path)
    assert record == ModelRecord(
        model=Model(backbone=f"resnet{depth}", neck_channels=256, head_depth=2), num_classes=7, source="gfl.pth"
    )
    assert not detector.training
    assert all(not p.any() for p in detector.parameters())


def test_every_tensor_lands_where_it_belongs(tmp_path: Path) -> None:
    """Every entry is filled with its own number; the optional ones are absent."""
    shapes = official_shapes(18)
    state = {
        name: torch.tensor(float(number)).expand(shape)
        for number, (name, shape) in enumerate(shapes.items())
        if "num_batches" not in name and "integral" not in name
    }
    detector, record = load_mmdet_gfl(write_official(tmp_path / "gfl.pth", state))
    for key, tensor in detector.state_dict().items():
        if "num_batches" not in key:
            assert torch.equal(tensor, state[mmdet_key(key)]), key
    assert record.category_ids == tuple(COCO_CATEGORIES)
    assert record.class_names is not None and record.class_names[0] == "person"


def test_given_class_names_are_kept_and_counted(tmp_path: Path) -> None:
    shapes = official_shapes(18, classes=2, width=256, towers=1)
    path = write_official(tmp_path / "gfl.pth", blank(shapes))
    _, record = load_mmdet_gfl(path, class_names=["cat", "dog"], category_ids=[3, 9], val_map=12.5)
    assert (record.class_names, record.category_ids, record.val_map) == (("cat", "dog"), (3, 9), 12.5)
    with pytest.raises(UserError, match="class_names has 1 entries for 2 classes"):
        load_mmdet_gfl(path, class_names=["cat"])


def test_class_names_of_the_file_are_read(tmp_path: Path) -> None:
    """An 80-class file is COCO's only if it does not say otherwise."""
    shapes = official_shapes(18, towers=1)
    names = tuple(f"thing {i}" for i in range(80))
    for meta in ({"CLASSES": names}, {"dataset_meta": {"classes": names}}):
        torch.save({"meta": meta, "state_dict": blank(shapes)}, tmp_path / "gfl.pth")
        _, record = load_mmdet_gfl(tmp_path / "gfl.pth")
        assert (record.class_names, record.category_ids) == (names, None)


def test_a_neck_of_another_width_is_refused(tmp_path: Path) -> None:
    path = write_official(tmp_path / "gfl.pth", blank(official_shapes(18, classes=2, width=64, towers=1)))
    with pytest.raises(UserError, match="its neck has 64 channels"):
        load_mmdet_gfl(path)


@pytest.mark.parametrize(
    ("removed", "added", "message"),
    [
        ("backbone.layer3.0.bn1.running_var", None, "missing 1 key(s): backbone.layer3.0.bn1.running_var"),
        ("neck.fpn_convs.4.conv.bias", None, "missing 1 key(s): neck.fpn_convs.4.conv.bias"),
        ("bbox_head.scales.2.scale", None, "missing 1 key(s): bbox_head.scales.2.scale"),
        (
            "bbox_head.gfl_cls.weight",
            None,
            "not an mmdet GFL checkpoint; missing 1 key(s): bbox_head.gfl_cls",
        ),
        (None, "bbox_head.atss_centerness.weight", "unexpected 1 key(s): bbox_head.atss_centerness.weight"),
        (None, "backbone.layer2.0.conv2_offset.weight", "unexpected 1 key(s): backbone.layer2.0.conv2_off"),
        (None, "head.gfl_cls.weight", "unexpected 1 key(s): head.gfl_cls.weight"),
        (None, "backbone.layer3.2.conv1.weight", "basic blocks [2, 2, 3, 2] is none of ResNet-18"),
    ],
)
def test_missing_and_unexpected_keys(removed: str | None, added: str | None, message: str, tmp_path: Path) -> None:
    shapes = {name: shape for name, shape in SMALL.items() if name != removed}
    if added:
        shapes[added] = (1,)
    path = write_official(tmp_path / "gfl.pth", blank(shapes))
    with pytest.raises(UserError) as error:
        load_mmdet_gfl(path)
    assert message in str(error.value)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("key", "shape", "message"),
    [
        (
            "bbox_head.gfl_reg.weight",
            (32, 32, 3, 3),
            "bbox_head.gfl_reg.weight (32, 32, 3, 3) instead of (68,",
        ),
        (
            "backbone.layer1.0.conv1.weight",
            (64, 2, 3, 3),
            "backbone.layer1.0.conv1.weight (64, 2, 3, 3) inst",
        ),
        ("neck.lateral_convs.0.conv.weight", (48, 128, 1, 1), "its neck has 48 channels"),
        (
            "bbox_head.gfl_cls.weight",
            (0, 32, 3, 3),
            "num_classes: Input should be greater than or equal to 1",
        ),
    ],
)
def test_other_shapes(key: str, shape: tuple[int, ...], message: str, tmp_path: Path) -> None:
    path = write_official(tmp_path / "gfl.pth", blank(SMALL | {key: shape}))
    with pytest.raises(UserError) as error:
        load_mmdet_gfl(path)
    assert message in str(error.value)


# Native files

POINT = {"score": 0.27, "f1": 0.5, "precision": 0.6, "recall": 3 / 7, "class_scores": [0.25, None, 1.0], "images": 9}


def small_record(**fields: object) -> ModelRecord:
    return ModelRecord.model_validate(
        {"backbone": "nano", "num_classes": 3, "neck_channels": 32, "head_depth": 1} | fields
    )


def scramble(detector: nn.Module) -> None:
    """Give norms, biases and running statistics, which start out constant, values of their own."""
    generator = torch.Generator().manual_seed(3)
    for tensor in detector.state_dict().values():
        if tensor.is_floating_point() and tensor.dim() < 4:
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)


@pytest.mark.parametrize("backbone", ["nano", "resnet18", "mobilenet_v3_small"])
def test_native_round_trip(backbone: str, tmp_path: Path) -> None:
    record = small_record(
        backbone=backbone, class_names=("a", "b", "c"), category_ids=(1, 5, 9), val_map=41.5,
        recipe_sha256="0" * 64, operating_point=POINT if backbone == "nano" else None,
    )  # fmt: skip
    assert ('"schema_version":6' in record.to_json()) == ("operating_point" in record.to_json()) == (backbone == "nano")
    detector = record.build()
    scramble(detector)
    path = tmp_path / "folder" / "student.safetensors"
    save_detector(path, detector, metadata=record)
    loaded, loaded_record = load_detector(path)
    assert loaded_record == record
    assert not loaded.training
    ours, theirs = detector.state_dict(), loaded.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        expected, got = detector.eval()(images), loaded(images)
    for a, b in zip(expected.logits + expected.distribution, got.logits + got.distribution, strict=True):
        assert torch.equal(a, b) and a.isfinite().all()
    assert [p.name for p in path.parent.iterdir()] == ["student.safetensors"]


def test_saving_and_loading_draw_no_random_numbers(tmp_path: Path) -> None:
    record = small_record()
    detector = record.build()
    before = torch.get_rng_state()
    save_detector(tmp_path / "a.safetensors", detector, metadata=record)
    load_detector(tmp_path / "a.safetensors")
    assert torch.equal(torch.get_rng_state(), before)


def test_a_record_of_another_model_is_not_written(tmp_path: Path) -> None:
    detector = small_record().build()
    for wrong in ({"num_classes": 4}, {"neck_channels": 64}, {"head_depth": 2}, {"backbone": "resnet18"}):
        with pytest.raises(ValueError, match="metadata does not describe the detector"):
            save_detector(tmp_path / "a.safetensors", detector, metadata=small_record(**wrong))
    with pytest.raises(UserError, match="is saved as"):
        save_detector(tmp_path / "a.pth", detector, metadata=small_record())
    assert not list(tmp_path.iterdir())


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, record = tmp_path / "a.safetensors", small_record()
    save_detector(path, record.build(), metadata=record)
    old = path.read_bytes()

    def full_disk(_state: object, target: Path, **_settings: object) -> None:
        Path(target).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        save_detector(path, record.build(), metadata=record)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


def native_file(path: Path, header: dict[str, str] | None, drop: str = "", add: str = "") -> Path:
    state = {key: value for key, value in small_record().build().state_dict().items() if key != drop}
    if add:
        state[add] = torch.zeros(1)
    save_file(state, path, metadata=header)
    return path


def test_the_size_of_the_images_is_in_the_header(tmp_path: Path) -> None:
    """A file that does not know it is written as before there was such a key (`test_widths`)."""
    record = small_record(resize_short_long=(96, 160))
    save_detector(tmp_path / "a.safetensors", record.build(), metadata=record)
    assert load_detector(tmp_path / "a.safetensors")[1].resize_short_long == (96, 160)
    assert record.to_json().startswith('{"schema_version":6,')
    with pytest.raises(ValidationError, match="161 is more than 160"):
        small_record(resize_short_long=(161, 160))


GOOD_HEADER = small_record().to_json()


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (None, "no metadata_json in its header"),
        ({"format": "pt"}, "no metadata_json in its header"),
        ({HEADER_KEY: "{"}, "Invalid JSON"),
        ({HEADER_KEY: "{}"}, "backbone: missing; num_classes: Field required"),
        (
            {HEADER_KEY: GOOD_HEADER.replace('"schema_version":1', '"schema_version":7')},
            "schema_version: Input",
        ),
        (
            {HEADER_KEY: GOOD_HEADER.replace('"nano"', '"mega"')},
            "backbone 'mega' is unknown; known are resnet18",
        ),
        (
            {HEADER_KEY: GOOD_HEADER.replace('"num_classes":3', '"num_classes":0')},
            "num_classes: Input should be",
        ),
        ({HEADER_KEY: GOOD_HEADER.replace("{", '{"colour":"red",', 1)}, "colour: Extra inputs"),
        (
            {HEADER_KEY: GOOD_HEADER.replace('"num_classes":3', '"num_classes":4')},
            "head.gfl_cls.weight (3, 32,",
        ),
    ],
)
def test_bad_headers(header: dict[str, str] | None, message: str, tmp_path: Path) -> None:
    path = native_file(tmp_path / "a.safetensors", header)
    with pytest.raises(UserError) as error:
        load_detector(path)
    assert message in str(error.value)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


def test_native_keys_must_match(tmp_path: Path) -> None:
    path = native_file(tmp_path / "a.safetensors", {HEADER_KEY: GOOD_HEADER}, "head.gfl_reg.bias", "teacher.x")
    with pytest.raises(UserError, match=r"missing 1 key.*head.gfl_reg.bias; unexpected 1 key.*teacher.x"):
        load_detector(path)


# Teachers by specification


def test_specification_dispatch(tmp_path: Path) -> None:
    record = small_record()
    save_detector(tmp_path / "a.safetensors", record.build(), metadata=record)
    write_official(tmp_path / "b.pth", blank(SMALL))
    assert load_teacher_checkpoint(str(tmp_path / "a.safetensors"))[1] == record
    detector, official = load_teacher_checkpoint(str(tmp_path / "b.pth"))
    assert isinstance(detector, GFL) and official.model.backbone == "resnet18"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("zoo:gfl_r50", "zoo:gfl_r50 is unknown; use one of zoo:quickstart, zoo:gfl_r50_fpn_1x_coco"),
        ("resnet50", "not a checkpoint name; use FILE.safetensors, FILE.pth or zoo:NAME"),
        ("model.onnx", "not a checkpoint name"),
        ("absent.safetensors", "absent.safetensors: no such file"),
        ("absent.pth", "absent.pth: no such file"),
        ("~/absent.pth", "absent.pth: no such file"),
        ("", "not a checkpoint name"),
    ],
)
def test_bad_specifications(spec: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        load_teacher_checkpoint(spec)
    assert message in str(error.value)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("part", [0.0, 0.001, 0.5, 0.999])
def test_truncated_checkpoints(suffix: str, part: float, tmp_path: Path) -> None:
    path, record = tmp_path / f"cut{suffix}", small_record()
    if suffix == ".pth":
        write_official(path, blank(SMALL))
    else:
        save_detector(path, record.build(), metadata=record)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * part)])
    with pytest.raises(UserError, match="not a readable") as error:
        load_teacher_checkpoint(str(path))
    assert "\n" not in str(error.value)
