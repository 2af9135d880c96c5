"""Files of detectors with queries: what is compared, how places are sampled, and what int8 leaves alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

pytest.importorskip("transformers")
pytest.importorskip("scipy")

from compress.detectors.transformers.lw_detr import LwDetr, RfDetr
from compress.detectors.transformers.query_detector import QueryDetector
from compress.detectors.transformers.real_time_detr import DFine, RTDetrV2
from compress.export.deployable import Deployable
from compress.export.folded import folded
from deploy.core.card import ModelCard
from deploy.core.errors import UserError
from deploy.graph import export
from deploy.graph.export import export_onnx
from deploy.graph.heads import cut_heads
from deploy.quantize.calibrate import choose_images
from deploy.quantize.file import Quantizer, output_error
from deploy.quantize.qdq import Target
from deploy.runtimes.onnx import OnnxRunner
from tests.helpers import tiny_detr

KINDS = [DFine, *(pytest.param(kind, marks=pytest.mark.exhaustive) for kind in (RfDetr, RTDetrV2, LwDetr))]


@pytest.fixture(scope="module", params=KINDS)
def file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported detector."""
    kind: type[QueryDetector] = request.param
    detector = tiny_detr.with_statistics(kind, tiny_detr.pictures(), decoder_layers=2)
    card = ModelCard(name="tiny", class_names=list("abcde"), category_ids=[1, 2, 3, 4, 5], input_size=tiny_detr.SIZE)
    out = tmp_path_factory.mktemp(kind.family) / "student.onnx"
    module = Deployable.from_card(detector, card)
    export_onnx(folded(module), card, out, samples=tiny_detr.pictures(), reference=module, max_batch=3)
    return out


def in_groups(file: Path) -> bool:
    """RF-DETR's or LW-DETR's."""
    return file.parent.name.startswith((RfDetr.family, LwDetr.family))


@pytest.mark.parametrize("kind", [DFine, RTDetrV2])
def test_the_branches_of_a_block_become_one_convolution(kind: type[QueryDetector]) -> None:
    """Of statistics and factors as after a training; the detector itself is left alone."""
    whole = tiny_detr.tiny(kind).eval()
    generator = torch.Generator().manual_seed(0)
    for module in whole.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for values in (module.weight.data, module.bias.data, module.running_mean, module.running_var):
                values.copy_(torch.rand(values.shape, generator=generator) + 0.5)
    small = folded(whole)
    blocks = [[type(m).__name__ for m in model.modules()] for model in (whole, small)]
    assert [any(name.endswith("RepVggBlock") for name in names) for names in blocks] == [True, False]
    maps = [
        [x.double() for x in model.double().features(torch.from_numpy(tiny_detr.pictures()))]
        for model in (whole, small)
    ]
    for a, b in zip(*maps, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        assert a.std() > 1e-3


def test_the_file_takes_any_batch_and_samples_by_rows(file: Path) -> None:
    """`export_onnx` has compared it with torch at batch 1, 2 and 3."""
    operators = {node.op_type for node in onnx.load(str(file)).graph.node}
    assert not operators & {"GridSample", "NonMaxSuppression"}
    assert "Resize" not in operators or not in_groups(file), "positions are computed beforehand"
    runner = OnnxRunner(file, ("cpu",))
    together = runner(tiny_detr.pictures())
    assert together.count.sum() > 0
    for index in range(4):
        alone = runner(tiny_detr.pictures()[index : index + 1])
        np.testing.assert_allclose(alone.scores[0], together.scores[index], atol=1e-4)


@pytest.mark.parametrize("target", ["cpu", "tensorrt"])
def test_int8_leaves_what_decides_in_float(file: Path, target: Target, tmp_path: Path) -> None:
    for index, picture in enumerate(tiny_detr.pictures()):
        Image.fromarray(picture.transpose(1, 2, 0)).save(tmp_path / f"{index}.png")
    quantizer = Quantizer(file, choose_images(sorted(tmp_path.glob("*.png")), 4), target)
    report = quantizer.save(tmp_path / "int8.onnx", max_batch=2)
    named = [layer for layer in quantizer.structure.layers if "." in layer.weight]
    assert len(named) > 0.9 * len(quantizer.structure.layers), (
        "the rest: constants, and equal weights of a fresh network"
    )
    deciding = ("decoder.", "enc_score_head", "enc_bbox_head", "enc_output")
    expected = {"backbone", "encoder_input_proj", "encoder", "enc_output", "enc_score_head", "decoder"}
    if in_groups(file):
        deciding = ("decoder.", "enc_output", "enc_out_", "class_embed", "bbox_embed")
        expected = {"backbone", "enc_output", "enc_out_class_embed", "decoder", "class_embed"}
    for layer in named:
        assert layer.output == layer.name.removeprefix("model.").startswith(deciding), layer.name
    assert {layer.name.removeprefix("model.").partition(".")[0] for layer in named} >= expected
    OnnxRunner(report.path, ("cpu",))(tiny_detr.pictures())


def test_it_is_not_cut_at_its_output_layers(file: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="cannot be cut at its output layers: its network chooses among its own queries"
    ):
        cut_heads(file, tmp_path / "heads.onnx")


def test_rows_that_were_chosen_are_compared_with_the_nearest() -> None:
    """Exchanged rows are the same; a few poor ones may be others; good ones, and places, may never."""
    rng = np.random.default_rng(0)
    expected = [rng.random((1, 100, 3)) * 0.5, rng.random((1, 100, 4)) * 90]
    expected[0][0, 50:] += 0.5
    order = rng.permutation(100)
    chooses, places = torch.nn.Module(), torch.nn.Module()
    chooses.chooses_rows = True  # type: ignore[assignment]

    def ordered(module: torch.nn.Module, *others: int, moved: float = 50, stirred: float = 0) -> list[np.ndarray]:
        found = [value.copy() for value in expected]
        found[1][0, 20:] += stirred
        found[1][0, others] += moved
        return export._in_order(module, [value[:, order] for value in found], expected, (1e-3, 0.25), "here")

    for others in ((), (0,), (0, 1, 2)):
        assert all(np.abs(a - b).max() < 0.1 for a, b in zip(ordered(chooses, *others), expected, strict=True))
    for others in ((0, 1, 2, 3), (60,)):
        with pytest.raises(export.ExportMismatchError, match="rows that the ONNX graph chose are not torch's"):
            ordered(chooses, *others)
    same = ordered(chooses, 0, stirred=1.5)  # tolerance 0.25: an exchanged row excuses eight of them
    assert all(np.array_equal(a[0, 20:], b[0, 20:]) for a, b in zip(same, expected, strict=True))
    for others, stirred in (((), 1.5), ((0,), 2.5)):
        with pytest.raises(export.ExportMismatchError, match="rows that the ONNX graph chose are not torch's"):
            ordered(chooses, *others, stirred=stirred)
    with pytest.raises(export.ExportMismatchError, match="not finite"):
        ordered(chooses, 0, moved=np.inf)
    assert np.abs(ordered(places)[0] - expected[0]).max() > 0.1


def test_int8_errors_do_not_depend_on_the_order_of_chosen_rows() -> None:
    rng = np.random.default_rng(0)
    corners = rng.random((2, 40, 2)) * 90
    rows = rng.random((2, 40, 3)), np.concatenate([corners, corners + 10], -1)
    order = rng.permutation(40)
    exchanged = rows[0][:, order], rows[1][:, order]
    assert output_error(rows, exchanged, chosen=True) == (0.0, 0.0)
    assert min(output_error(rows, exchanged)) > 0.3
