"""int8 files of runtimes that quantize themselves: their converters start from the float file that ours was made of."""

from __future__ import annotations

from pathlib import Path

import onnx

from deploy.core.card import PROCESSING, ModelCard, Quantization, network_precision, scanned_card
from deploy.core.errors import UserError
from deploy.core.files import ONNX_SUFFIX
from deploy.core.precisions import PRECISIONS
from deploy.graph.structure import structure_of


def float_beside(source: Path, card: ModelCard, runtime: str) -> Path:
    """The fp32 file of the checkpoint that the int8 file at `source` was made of: `student.onnx` beside
    `student.int8.onnx`. card: of `source`. runtime: for people.

    Raises UserError, one line: `source` is called or made otherwise, there is none, or it is of another checkpoint.
    """
    ending = PRECISIONS["int8"].suffix + ONNX_SUFFIX
    place = source.with_name(source.name.removesuffix(ending) + ONNX_SUFFIX)
    what = f"{source}: {runtime} quantizes the fp32 file itself, and"
    if not source.name.endswith(ending):
        raise UserError(
            f"{what} this one is not called x{ending}, to find x{ONNX_SUFFIX} beside it; give the fp32 file"
        )
    if not place.is_file():
        raise UserError(f"{what} {place} is not there; export both: --precision fp32,int8")
    other = scanned_card(place)
    plain = other.quantization is None and "16" not in network_precision(other.precision)
    if not plain or other.checkpoint_sha256 != card.checkpoint_sha256:
        raise UserError(f"{what} {place} is not that of its checkpoint, in fp32; export both: --precision fp32,int8")
    return place


def quantized_card(source: Path, target: str, method: str) -> ModelCard:
    """The card of an int8 file whose layers are all quantized. source: the fp32 file. target, method: as in
    `Quantization`."""
    card = scanned_card(source)
    precision = {part: kind if part == PROCESSING else "int8" for part, kind in card.precision.items()}
    layers = len(structure_of(onnx.load(str(source)).graph, str(source)).layers)
    made = Quantization.model_validate({"target": target, "layers": layers, "method": method})
    return card.model_copy(update={"precision": precision, "quantization": made})
