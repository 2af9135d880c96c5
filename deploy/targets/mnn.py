"""MNN: its own file, by its own converter, with a card beside it.

The converter's Python wrapper installs a package with pip when it starts, and reports to a server what was converted
(seen in 3.6.1, `MNN.tools.utils.log`), so its compiled part is called without it.

It accepts quantized files of ours and says that it succeeded, but the network then answers with nothing (the same
version). An int8 file is therefore made of the float one, with weights in int8 that are computed with in float.
"""

from __future__ import annotations

import sys
from pathlib import Path

from deploy.core.card import need_plain, network_precision, scanned_card, write_card_beside
from deploy.core.files import work_folder
from deploy.runtimes.mnn import FORM, load_mnn
from deploy.targets.converter import convert

_CONVERT = "import sys, MNN, _tools; _tools.mnnconvert(sys.argv)"


def make(source: Path, place: Path) -> str:
    """See `deploy.targets.table.Target`."""
    load_mnn()
    card = scanned_card(source)
    need_plain(card, source, "files of MNN are made")
    options = ["--fp16"] if "fp16" in network_precision(card.precision) else []
    if card.quantization is not None:
        from deploy.targets.own_int8 import float_beside, quantized_card

        source = float_beside(source, card, "MNN")
        card, options = quantized_card(source, "mnn", "weights"), ["--weightQuantBits", "8"]
    with work_folder(place) as folder:
        words = [sys.executable, "-c", _CONVERT, "-f", "ONNX", "--modelFile", str(source.absolute()),
                 "--MNNModel", str(place.absolute()), "--bizCode", "compress", *options]  # fmt: skip
        convert(source, words, "MNN's converter", folder, place)
    write_card_beside(card.model_copy(update={"form": FORM}), place)
    return f"{place.stat().st_size / 1e6:.1f} MB, with its card {place.name}.json"
