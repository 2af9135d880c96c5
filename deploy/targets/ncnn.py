"""ncnn: phones and small Arm boards. The network alone, by ncnn's converter pnnx, with a card beside it.

pnnx leaves out operations that it does not know, with a note, and ends well; ncnn then cannot load the file, or ends
the process (seen with 1.0.20261020). What comes behind the output layers is full of them, so it is decoded outside:
`deploy.core.heads`. A new file is tried in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from deploy.core.card import ModelCard, write_card_beside
from deploy.core.errors import UserError
from deploy.core.files import work_folder
from deploy.runtimes.ncnn import load_ncnn, weights_beside
from deploy.targets.converter import convert
from deploy.targets.table import DECODERS

_TRY = """
import sys
from pathlib import Path
import numpy as np
from deploy.core.errors import UserError
from deploy.runtimes.ncnn import NCNNRunner
try:
    runner = NCNNRunner(Path(sys.argv[1]))
    runner(np.zeros((1, 3, *runner.card.input_size), np.uint8))
except UserError as error:
    sys.exit(str(error))
"""


def make(source: Path, place: Path) -> str:
    """See `deploy.targets.table.Target`."""
    load_ncnn()
    program = _pnnx()
    from deploy.graph.heads import cut_heads

    with work_folder(place) as folder:
        card = cut_heads(source, folder / "model.onnx")
        height, width = card.input_size
        words = [str(program), "model.onnx", f"inputshape=[1,3,{height},{width}]f32", "fp16=0"]
        made = folder / "model.ncnn.param"
        convert(source, words, "pnnx", folder, made)
        made.write_text(_named(made.read_text(encoding="utf-8"), card), encoding="utf-8")
        write_card_beside(card, made, weights_beside(made))
        _try(source, made)  # here, since pnnx does not tell of a disk that is full
        weights = weights_beside(place)
        os.replace(made, place)
        os.replace(weights_beside(made), weights)
    write_card_beside(card, place, weights)
    return (
        f"{weights.stat().st_size / 1e6:.1f} MB in {weights.name} beside it, with its card {place.name}.json; decode "
        f"what it gives as in {DECODERS}"
    )


# --- details --------------------------------------------------------------------------------------------


def _pnnx() -> Path:
    """The converter, which lies inside its package. Raises UserError when that is missing."""
    spec = find_spec("pnnx")  # importing it would import torch
    if spec is None or spec.origin is None:
        raise UserError("pnnx is not installed: pip install 'compress-detectors[ncnn]'")
    folder = Path(spec.origin).parent
    program = next((folder / name for name in ("pnnx", "pnnx.exe") if (folder / name).is_file()), None)
    if program is None:
        raise UserError(f"pnnx: there is no program in its package, {folder}")
    return program


def _named(text: str, card: ModelCard) -> str:
    """The network with the names of our inputs and outputs, which pnnx numbers: `in0`, `out0`, `out1`, …"""
    assert card.form.heads is not None
    names = {"in0": "images"} | {f"out{index}": name for index, name in enumerate(card.form.heads.names)}
    lines = [[names.get(word, word) for word in line.split(" ")] for line in text.splitlines()]
    return "\n".join(" ".join(words) for words in lines) + "\n"


def _try(source: Path, place: Path) -> None:
    """Raise UserError unless ncnn loads the file and computes it, in a process that it may end."""
    words = [sys.executable, "-c", _TRY, str(place)]
    paths = os.pathsep.join(sys.path)
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths}, check=False)
    if done.returncode:
        last = "".join(done.stderr.strip().splitlines()[-1:]).removeprefix(f"{place}: ")[:300]
        said = last if done.returncode > 0 else "it ends the process"
        raise UserError(f"{source}: ncnn cannot run what pnnx makes of it: {said}")
