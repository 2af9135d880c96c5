"""Widths of a pruned detector in its checkpoint: there and back, and damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from compress.detectors.build import build_detector, model_of
from compress.detectors.checkpoints import HEADER_KEY, ModelRecord, load_detector, save_detector
from compress.detectors.widths import resize, select, widths_of
from deploy.core.errors import UserError
from tests.helpers.pruned import CLASSES, detector, model, pruned


def record(**changes: object) -> ModelRecord:
    return ModelRecord(model=model().model_copy(update=changes), num_classes=CLASSES)


def test_widths_come_back_from_the_record() -> None:
    widths = model_of(pruned(detector())).widths
    assert widths is not None and widths["backbone.stem.0"][1] == 3 and len(widths["backbone.stem.1"]) == 1
    text = record(widths=widths).to_json()
    again = ModelRecord.model_validate_json(text)
    assert again.model.widths == widths and again.to_json() == text
    built = again.build()
    assert {name: widths_of(built.get_submodule(name)) for name in widths} == widths


def test_a_pruned_detector_has_version_3_and_others_are_written_as_before() -> None:
    """Byte for byte: 0.1 reads a model without own parts and widths."""
    assert record().to_json() == (
        '{"schema_version":1,"detector":"gfl","backbone":"nano","num_classes":3,"neck_channels":32,"head_depth":1,'
        '"anchor_scale":null,"roi_samples":null,"class_names":null,"category_ids":null,"val_map":null,'
        '"recipe_sha256":null,"source":null}'
    )
    header = json.loads(record(widths={"backbone.stem.0": (8, 3)}).to_json())
    assert next(iter(header.items())) == ("schema_version", 3)
    assert header["widths"] == {"backbone.stem.0": [8, 3]}
    with pytest.raises(ValueError, match="a newer version wrote this file"):
        ModelRecord.model_validate_json(json.dumps(header | {"schema_version": 7}))


@pytest.mark.parametrize(
    ("name", "wanted", "message"),
    [
        ("backbone.stem.9", [8], "the detector has no layer 'backbone.stem.9' that can lose channels"),
        ("backbone.stem", [8], "the detector has no layer 'backbone.stem' that can lose channels"),
        ("head.scales.0", [1], "the detector has no layer 'head.scales.0' that can lose channels"),
        ("", [1], "the detector has no layer '' that can lose channels"),
        ("backbone.stem.0", [17, 3], r"backbone\.stem\.0 has \[16, 3\] channels and cannot be cut to \[17, 3\]"),
        ("backbone.stem.0", [16], r"backbone\.stem\.0 has \[16, 3\] channels and cannot be cut to \[16\]"),
        ("backbone.stem.1", [8, 8], r"backbone\.stem\.1 has \[16\] channels and cannot be cut to \[8, 8\]"),
        ("head.cls_convs.0.gn", [12], r"head\.cls_convs\.0\.gn: normalises 8 channels together, which leave together"),
        ("backbone.stem.1", [], r"backbone\.stem\.1 has \[16\] channels and cannot be cut to \[\]"),
        (
            "backbone.stem.0",
            [0, 3],
            r"metadata_json: widths\.backbone\.stem\.0\.0: Input should be greater than or equal to 1$",
        ),
        (
            "backbone.stem.0",
            [-8, 3],
            r"metadata_json: widths\.backbone\.stem\.0\.0: Input should be greater than or equal to 1$",
        ),
        ("backbone.stem.0", ["8", 3], r"metadata_json: widths\.backbone\.stem\.0\.0: Input should be a valid integer"),
        ("backbone.stem.0", 8, r"metadata_json: widths\.backbone\.stem\.0: Input should be a valid array$"),
    ],
)
def test_damaged_widths_are_one_line(name: str, wanted: object, message: str, tmp_path: Path) -> None:
    file = tmp_path / "pruned.safetensors"
    save_detector(file, build_detector(model(), CLASSES, seed=0), metadata=record())
    header = json.loads(record(widths={"backbone.stem.0": (8, 3)}).to_json()) | {"widths": {name: wanted}}
    save_file(load_file(file), file, metadata={HEADER_KEY: json.dumps(header)})
    with pytest.raises(UserError, match=message) as error:
        load_detector(file)
    assert str(error.value).startswith(f"{file}: ") and "\n" not in str(error.value)


@pytest.mark.parametrize("widths", [{"backbone.stem.0": [8, 3]}, {"head.cls_convs.0.conv": [16, 32]}])
def test_widths_that_do_not_fit_together_are_one_line(widths: dict[str, list[int]], tmp_path: Path) -> None:
    """Each layer can be cut so; what it makes then does not fit the next one."""
    file = tmp_path / "pruned.safetensors"
    save_detector(file, build_detector(model(), CLASSES, seed=0), metadata=record())
    header = json.loads(record(widths={"backbone.stem.0": (8, 3)}).to_json()) | {"widths": widths}
    save_file(load_file(file), file, metadata={HEADER_KEY: json.dumps(header)})
    with pytest.raises(UserError, match=r"model\.widths: the layers do not fit together \(.* (8|16)\b") as error:
        load_detector(file)
    assert str(error.value).startswith(f"{file}: ") and "\n" not in str(error.value)


def test_weights_of_other_widths_are_one_line(tmp_path: Path) -> None:
    file = tmp_path / "pruned.safetensors"
    smaller = pruned(detector())
    save_detector(file, smaller, metadata=record(widths=model_of(smaller).widths))
    save_file(load_file(file), file, metadata={HEADER_KEY: record().to_json()})
    with pytest.raises(UserError, match=r"backbone\.stem\.0\.weight \(8, 3, 3, 3\) instead of \(16, 3, 3, 3\)"):
        load_detector(file)


def test_a_depthwise_convolution_has_one_width() -> None:
    small = detector(backbone="mobilenet_v3_small")
    name = "backbone.features.2.block.1.0"
    assert widths_of(small.get_submodule(name)) == (72, 72)
    resize(small, {name: (40, 40)})
    conv = small.get_submodule(name)
    assert isinstance(conv, nn.Conv2d) and (conv.groups, tuple(conv.weight.shape)) == (40, (40, 1, 3, 3))
    with pytest.raises(UserError, match=r"has \[40, 40\] channels and cannot be cut to \[32, 40\]"):
        resize(small, {name: (32, 40)})


@pytest.mark.parametrize(
    ("layer", "outputs", "inputs"),
    [
        (nn.Conv2d(6, 8, 3), [1, 4], [0, 5]),
        (nn.Conv2d(6, 8, 3, bias=False), None, [2]),
        (nn.Conv2d(8, 8, 3, groups=8), [3, 7], None),
        (nn.Linear(6, 8), [0], [1, 2, 3]),
        (nn.BatchNorm2d(8), [1, 6], None),
        (nn.BatchNorm2d(8, affine=False, track_running_stats=False), [1, 6], None),
        (nn.GroupNorm(4, 8), [2, 3, 6, 7], None),
        (nn.InstanceNorm2d(8, affine=True, track_running_stats=True), [5], None),
    ],
)
def test_a_layer_of_selected_channels_gives_those_channels(
    layer: nn.Module, outputs: list[int] | None, inputs: list[int] | None
) -> None:
    """The same numbers as the whole layer, where it sees zeros at inputs that are gone."""
    for value in (*layer.parameters(), *layer.buffers()):
        if value.is_floating_point():
            torch.nn.init.uniform_(value, 0.5, 1.5)
    layer.eval()
    one_sided = not isinstance(layer, nn.Linear) and widths_of(layer)[0] == widths_of(layer)[-1]
    x = torch.randn(2, widths_of(layer)[-1], 8, 8) if not isinstance(layer, nn.Linear) else torch.randn(2, 6)
    seen = x if inputs is None else torch.zeros_like(x).index_copy(1, torch.tensor(inputs), x[:, inputs])
    whole = layer(seen)
    select(layer, *(None if side is None else torch.tensor(side) for side in (outputs, inputs)))
    part = layer(x[:, outputs] if one_sided else x if inputs is None else x[:, inputs])
    torch.testing.assert_close(part, whole if outputs is None else whole[:, outputs])


def test_parts_of_norm_groups_and_of_grouped_convolutions_cannot_leave() -> None:
    with pytest.raises(ValueError, match="normalises 4 channels together"):
        select(nn.GroupNorm(2, 8), torch.tensor([0, 1, 4, 5]))
    with pytest.raises(ValueError, match="is a convolution of 2 groups, which cannot lose channels"):
        select(nn.Conv2d(8, 8, 3, groups=2), torch.arange(4))
