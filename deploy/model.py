"""A detector that is ready to look at pictures: `deploy.open("student.onnx").detect("street.jpg")`."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from PIL import Image

from deploy.core.card import ModelCard
from deploy.core.detections import Detections
from deploy.core.errors import UserError
from deploy.core.image import Picture, read_picture
from deploy.core.image_folder import image_files
from deploy.core.storage import is_folder, place
from deploy.runtimes.base import Runner
from deploy.runtimes.open import OwnRunner, open_runner
from deploy.runtimes.pictures import Fitted, detect_fitted, fit_picture, load_batches

if TYPE_CHECKING:
    from deploy.latency import BenchmarkReport
    from deploy.predict import Seen
    from deploy.validate import ArtifactResult


class Model:
    """A runner with everything that stands around it: pictures of any size in, detections in their pixels out.

    runner: what runs the network; any object with the `deploy.runtimes.base.Runner` protocol. name: what results call
    it; default: the name on its card.
    """

    def __init__(self, runner: Runner, name: str | None = None) -> None:
        self.runner = runner
        self.name = runner.card.name if name is None else name

    def __repr__(self) -> str:
        height, width = self.card.input_size
        return f"<{self.name}: {len(self.card.class_names)} classes, input {height}x{width}, {self.runner.backend}>"

    @property
    def card(self) -> ModelCard:
        """Card of the file: class names, input size, thresholds, precision."""
        return self.runner.card

    @overload
    def detect(self, pictures: bytes | Image.Image, *, min_score: float = 0.0) -> Detections: ...
    @overload
    def detect(
        self, pictures: Sequence[Picture], *, min_score: float = 0.0, batch_size: int = 8
    ) -> list[Detections]: ...
    @overload
    def detect(self, pictures: str | Path | np.ndarray, *, min_score: float = 0.0, batch_size: int = 8) -> Any: ...
    def detect(self, pictures: Any, *, min_score: float = 0.0, batch_size: int = 8) -> Any:
        """Detections of one picture; a list of them for several, in their order.

        Args:
            pictures: an image file, its bytes, a PIL image, pixels uint8 [h, w, 3] RGB; or several: a list of these, a
                folder (its image files by name), pixels uint8 [n, h, w, 3].
            min_score: detections below it are left out, beside those that the file leaves out itself.
            batch_size: pictures in one call of the runtime.

        Raises UserError for a picture that cannot be read.
        """
        if _is_one(pictures):
            return next(self.detect_each([pictures], min_score=min_score))
        return list(self.detect_each(pictures, min_score=min_score, batch_size=batch_size))

    def detect_each(
        self, pictures: Iterable[Picture] | str | Path, *, min_score: float = 0.0, batch_size: int = 8
    ) -> Iterator[Detections]:
        """`detect` of several pictures one after the other, for more than fit into memory."""
        if batch_size < 1:
            raise UserError(f"batch_size must be at least 1, got {batch_size}")
        if isinstance(pictures, str | Path):
            pictures = image_files(place(pictures))

        def load(picture: Picture) -> tuple[Fitted, Path | None]:
            path = place(picture) if isinstance(picture, str | Path) else None
            return fit_picture(read_picture(picture if path is None else path), self.card), path

        for batch in load_batches(pictures, load, batch_size):
            found = detect_fitted(self.name, self.runner, [fitted for fitted, _ in batch])
            for detections, (_, path) in zip(found, batch, strict=True):
                yield replace(detections[detections.scores >= min_score], path=path)

    def predict(
        self,
        *sources: str | Path | Sequence[str | Path],
        min_score: float | None = None,
        classes: Collection[str] | None = None,
        batch_size: int = 8,
    ) -> Iterator[Seen]:
        """What `compress predict` looks at, frame by frame: pixels and detections, of pictures and videos.

            for seen in model.predict("clip.mp4"):
                print(seen.frame.index, seen.detections)

        Args:
            sources: files, folders, patterns, addresses, videos (by the extra `video`), `camera:0`.
            min_score, classes, batch_size: see `deploy.predict.look`.

        Raises UserError for a source that is not there. One that cannot be read is seen with its `problem`.
        """
        from deploy.predict import RunnerLooker, look, open_sources

        looker = RunnerLooker(self.runner, self.name)
        words = [word for given in sources for word in ([given] if isinstance(given, str | Path) else given)]
        found = open_sources(words)
        return look(looker, found, min_score=min_score, classes=classes, batch_size=batch_size)

    def validate(
        self, annotations: Path | str, images: Path | str, *, reference: Model | None = None, **options: Any
    ) -> ArtifactResult:
        """COCO mAP on labelled images, and against `reference` the loss, the agreement and whether the gate passes.

        annotations: a COCO file, whose images lie in the folder `images`. options: `max_map_drop`, `batch_size`,
        `limit`, `progress` of `deploy.validate.validate`.
        """
        from deploy.validate import validate

        runners = {self.name: self.runner}
        compared = None
        if reference is not None:
            if not isinstance(reference, Model):
                raise UserError(f"reference: needs a model, as open() gives it, got {type(reference).__name__}")
            compared = reference.name if reference.name != self.name else f"{reference.name} (reference)"
            runners[compared] = reference.runner
        return validate(runners, place(annotations), place(images), reference=compared, **options)[0]

    def benchmark(self, images: Path | str | Sequence[Path | str], **options: Any) -> BenchmarkReport:
        """Latency with confidence intervals. images: a folder, or image files. options: `batch_sizes`, `scopes`,
        `seconds`, `rounds` and the others of `deploy.latency.benchmark`."""
        from deploy.latency import benchmark

        files = image_files(place(images)) if isinstance(images, str | Path) else [place(image) for image in images]
        return benchmark({self.name: self.runner}, files, **options)


def open_model(
    path: Path | str,
    providers: str | Sequence[str] = "cpu",
    *,
    runner: OwnRunner | None = None,
    **options: Any,
) -> Model:
    """An exported `.onnx` file, or a TensorRT `.engine` with its card, ready to look at pictures. Needs no torch.

    Args:
        providers: where ONNX Runtime runs it, in order of preference: `cpu`, `cuda`, `tensorrt`; or `openvino` (or
            `openvino-gpu`, `openvino-npu`), which is a runtime of its own.
        runner: a user's own runner, as a class or an import path `package.module:MyRunner`.
        options: `threads`, `allow_fallback`, `tensorrt`, `openvino`, `cuda_graph` of
            `deploy.runtimes.open.open_runner`.

    Raises UserError for everything that keeps the file from running.
    """
    where = (providers,) if isinstance(providers, str) else tuple(providers)
    return Model(open_runner(place(path), where, runner=runner, **options), name=str(path))


def _is_one(pictures: Any) -> bool:
    if isinstance(pictures, str | Path):
        return not is_folder(place(pictures))
    if isinstance(pictures, np.ndarray):
        return pictures.ndim != 4
    several = isinstance(pictures, Iterable) and not isinstance(pictures, bytes | Image.Image)
    return not several  # `read_picture` tells what is no picture at all
