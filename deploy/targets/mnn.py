"""MNN: its own file, by its own converter, with a card beside it.

Its converter accepts quantized files of ours and says that it succeeded, but the network then answers with nothing
(seen with 3.6.1). So they are refused here.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from deploy.core.card import Form, ModelCard, need_plain, network_precision, scanned_card, write_card_beside
from deploy.core.errors import UserError
from deploy.runtimes.mnn import load_mnn
from deploy.targets.converter import convert


def make(source: Path, place: Path) -> str:
    """See `deploy.targets.table.Target`."""
    load_mnn()
    card = scanned_card(source)
    need_plain(card, source, "files of MNN are made")
    _refuse_int8(card, source)
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-m", "MNN.tools.mnnconvert", "-f", "ONNX", "--modelFile", str(source.absolute()),
                 "--MNNModel", str(place.absolute()), "--bizCode", "compress",
                 *(["--fp16"] if "fp16" in network_precision(card.precision) else [])]  # fmt: skip
        convert(source, words, "MNN's converter", Path(folder), place)
    write_card_beside(card.model_copy(update={"form": Form(labels="int32")}), place)
    return f"{place.stat().st_size / 1e6:.1f} MB, with its card {place.name}.json"


def _refuse_int8(card: ModelCard, source: Path) -> None:
    if card.quantization is not None:
        raise UserError(
            f"{source}: MNN's converter takes its QuantizeLinear nodes and makes a network that gives nothing (seen "
            "with 3.6.1): give the fp32 file, and quantize that with MNN's own tools"
        )
