"""OpenVINO's own files: the network as .xml, its weights as .bin beside it.

They hold the numbers of the exported file and compute the same. The batch is fixed to 1, which is faster than a dynamic
one by a third; the card says in which precision a device must compute, since OpenVINO's default is bfloat16 where the
processor can.
"""

from __future__ import annotations

from pathlib import Path

from deploy.core.card import METADATA_KEY, Form, need_plain, scanned_card
from deploy.core.import_path import import_extra
from deploy.runtimes.openvino import read_model


def make(source: Path, place: Path) -> str:
    """See `deploy.targets.table.Target`."""
    card = scanned_card(source)
    need_plain(card, source, "files of OpenVINO are made")
    weights = place.with_suffix(".bin")
    model = read_model(source)
    model.reshape({"images": [1, 3, *card.input_size]})
    model.set_rt_info(card.model_copy(update={"form": Form(batch=1)}).model_dump_json(), METADATA_KEY)
    import_extra("openvino", "openvino").save_model(model, str(place), compress_to_fp16=False)
    return f"{weights.stat().st_size / 1e6:.1f} MB in {weights.name} beside it; one image at a time"
