"""Calibration: which images, and the range of every activation on them.

Images for calibration are training or unlabelled ones. They must not be among the images that the result is judged
on: `check_apart` compares the files by content.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from onnx import shape_inference

from deploy.core.canvas import fit_canvas
from deploy.core.card import ModelCard
from deploy.core.errors import UserError
from deploy.core.files import sha256_of
from deploy.core.image import load_image
from deploy.core.image_folder import image_files, spread
from deploy.core.storage import is_file, is_folder
from deploy.graph.structure import needed_for, structure_of

Method = Literal["minmax", "percentile", "entropy"]

PERCENTILE = 99.99
CALIBRATION_KEY = "deploy.int8.calibration (--calibration)"
"""Where the images are named: in a recipe, and on the command line."""
_AT_ONCE = 4  # images whose activations are in memory together


@dataclass(frozen=True)
class CalibrationImages:
    """Images and the SHA-256 of each file."""

    files: tuple[Path, ...]
    hashes: tuple[str, ...]

    @property
    def sha256(self) -> str:
        """Hash of the set, whatever its order."""
        return hashlib.sha256("".join(sorted(self.hashes)).encode()).hexdigest()


def choose_images(files: Sequence[Path], count: int, digest: Callable[[Path], str] = sha256_of) -> CalibrationImages:
    """`count` files spread evenly over `files`, the same ones every time; all of them when there are fewer.

    digest: gives the SHA-256 of a file; one with a memory need not read it.

    Of files with equal content one is taken. Raises UserError when there is none.
    """
    if not files:
        raise UserError("no images to calibrate on")
    by_content = {digest(file): file for file in reversed(spread(files, count))}
    pairs = sorted(by_content.items(), key=lambda pair: str(pair[1]))
    return CalibrationImages(tuple(file for _, file in pairs), tuple(digest for digest, _ in pairs))


def list_images(source: Path, option: str = "--calibration") -> list[Path]:
    """The image files of a folder, or of a COCO JSON whose images lie beside it or in a folder `images` beside it.

    Raises UserError when there are none, naming `option`.
    """
    if source.suffix != ".json" and is_folder(source):
        return image_files(source, f"{option}: ")
    if not is_file(source):
        raise UserError(f"{option}: {source}: no such file or folder")
    try:
        names = [row["file_name"] for row in json.loads(source.read_text(encoding="utf-8"))["images"]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{option}: {source}: neither a folder of images nor a COCO JSON") from error
    for index, name in enumerate(names):
        if not isinstance(name, str) or not name:
            raise UserError(
                f"{option}: {source}: images[{index}].file_name is {json.dumps(name)[:60]}, which names no file"
            )
    for folder in (source.parent, source.parent / "images"):
        if names and is_file(folder / names[0], ask=False):
            return [folder / name for name in names]
    raise UserError(
        f"{option}: {source}: its images are neither beside it nor in a folder images beside it; name their folder"
    )


def check_apart(
    calibration: CalibrationImages,
    judged_on: Iterable[Path],
    what: str = "the validation images",
    digest: Callable[[Path], str] = sha256_of,
) -> None:
    """Raise UserError when a calibration image is among `judged_on` (compared by content, as `digest` gives it)."""
    own = dict(zip(calibration.hashes, calibration.files, strict=True))
    common = [(own[found], file) for file in judged_on if (found := digest(file)) in own]
    if common:
        raise UserError(
            f"{CALIBRATION_KEY}: {len(common)} of {len(own)} calibration images are among {what}, the first is "
            f"{common[0][0]} (= {common[0][1]}): calibrate on training or unlabelled images"
        )


def canvases(files: Iterable[Path], card: ModelCard) -> np.ndarray:
    """The images as uint8 [N, 3, H, W] canvases of `card`."""
    return np.stack([fit_canvas(load_image(file), card)[0] for file in files])


def activation_ranges(model: onnx.ModelProto, images: np.ndarray, method: Method = "minmax") -> dict[str, Any]:
    """The range of every float activation before the output layers' results: tensor → (low, high).

    images: uint8 [N, 3, H, W]. `minmax` takes the extremes; `percentile` leaves out the largest 0.01 % of |x|;
    `entropy` chooses the cut that loses least information (KL divergence, 128 bins). Ranges of the last two are
    symmetric, cut at the true minimum.
    """
    from onnxruntime.quantization import calibrate

    kinds = {
        "minmax": calibrate.CalibrationMethod.MinMax,
        "percentile": calibrate.CalibrationMethod.Percentile,
        "entropy": calibrate.CalibrationMethod.Entropy,
    }
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):  # they print progress
        path = Path(folder) / "body.onnx"
        onnx.save(_body(model), str(path))
        calibrator = calibrate.create_calibrator(
            path,
            None,
            augmented_model_path=str(Path(folder) / "augmented.onnx"),
            calibrate_method=kinds[method],
            extra_options={"percentile": PERCENTILE} if method == "percentile" else {},
        )
        for start in range(0, len(images), _AT_ONCE):  # a histogram needs the activations themselves
            calibrator.collect_data(_Reader(images[start : start + _AT_ONCE]))
        found = calibrator.compute_data()
    return {
        name: (np.asarray(data.range_value[0]).item(), np.asarray(data.range_value[1]).item())
        for name, data in found.items()
    }


# ----------------------------------------------------------------------------------------------------


class _Reader:
    """One image at a time, as onnxruntime's calibrators ask for them."""

    def __init__(self, images: np.ndarray) -> None:
        self._images = iter(images)

    def get_next(self) -> dict[str, np.ndarray] | None:
        image = next(self._images, None)
        return None if image is None else {"images": image[None]}

    __next__ = get_next


def _body(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph up to the output layers, with their results as its outputs."""
    inferred = shape_inference.infer_shapes(model)
    ends = structure_of(inferred.graph).ends
    known = {value.name: value for value in inferred.graph.value_info}
    body = onnx.ModelProto()
    body.CopyFrom(inferred)
    nodes = needed_for(body.graph, ends)
    used = {name for node in nodes for name in node.input}
    initializers = [item for item in body.graph.initializer if item.name in used]
    del body.graph.node[:], body.graph.output[:], body.graph.initializer[:]
    body.graph.node.extend(nodes)
    body.graph.initializer.extend(initializers)
    body.graph.output.extend(known[name] for name in ends)
    return body
