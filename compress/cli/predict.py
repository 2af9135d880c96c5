"""`compress predict`: detections in pictures and videos of your own."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from compress.cli.exits import to_stderr
from compress.cli.groups import with_groups
from compress.cli.options import RunnerFlags, need_finite, provider_names
from deploy.core.errors import UserError
from deploy.core.files import CHECKPOINT_SUFFIXES
from deploy.core.shown import MOST, counted, some
from deploy.core.storage import is_file

if TYPE_CHECKING:
    from deploy.core.card import ModelCard
    from deploy.predict import Looker, Outputs, Seen, Source

commands = typer.Typer()


@dataclass(frozen=True)
class ModelFlags:
    """Options of opening the model."""

    provider: Annotated[
        str,
        typer.Option(
            "--provider", metavar="NAME,NAME", help="Of an .onnx file: cpu, cuda, tensorrt, in order of preference."
        ),
    ] = "cpu"
    input_size: Annotated[
        tuple[int, int] | None, typer.Option("--input-size", metavar="HEIGHT WIDTH", help="Of a checkpoint.")
    ] = None
    device: Annotated[str, typer.Option("--device", help="Of a checkpoint: where torch runs it.")] = "cpu"
    served: Annotated[
        str | None,
        typer.Option(
            "--served", metavar="NAME", help="Of a server: which of its models. Its token: COMPRESS_SERVE_TOKEN."
        ),
    ] = None


@dataclass(frozen=True)
class KeepFlags:
    """Options of what is kept."""

    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Default: predictions, predictions-2, and so on.")
    ] = None
    save: Annotated[
        str,
        typer.Option(
            "--save", metavar="NAME,NAME", help="Of pictures, json, coco, yolo, csv, crops; none: print alone."
        ),
    ] = "pictures,json"
    crop: Annotated[bool, typer.Option("--crop", help="Also save what is inside of each box.")] = False
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write into --out although it is not empty.")] = False
    annotations: Annotated[
        Path | None,
        typer.Option("--annotations", metavar="JSON", help="COCO file whose ids --save coco takes, by file name."),
    ] = None


@commands.command()
@with_groups
def predict(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="An exported file, a checkpoint, or the address of compress serve."),
    ],
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE...",
            help="Pictures, videos, folders, patterns, addresses, a camera (camera:0), or - for a list on stdin.",
        ),
    ],
    keeping: KeepFlags = KeepFlags(),
    score: Annotated[
        float | None, typer.Option("--score", min=0, max=1, help="Default: the operating point of the model.")
    ] = None,
    classes: Annotated[
        str | None, typer.Option("--classes", metavar="NAME,NAME", help="Only these. Default: all.")
    ] = None,
    show: Annotated[bool, typer.Option("--show", help="Also draw into the terminal, in colour.")] = False,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1)] = 8,
    which: ModelFlags = ModelFlags(),
    opening: RunnerFlags = RunnerFlags(),
) -> None:
    """Find objects in pictures and videos; write drawn ones and the detections.

    A picture that cannot be read costs that picture: the others are done, and the exit code is 2 at the end. Ctrl-C
    keeps what was found until then."""
    if score is not None:
        need_finite(score, "--score")
    if show and not sys.stdout.isatty():
        raise UserError("--show: draws into a terminal, and the output goes elsewhere")
    from deploy.predict import Outputs, look, open_sources

    kinds = _kinds(keeping)
    folder = _folder(keeping.out, keeping.overwrite) if kinds else None
    image_ids = None if keeping.annotations is None else _image_ids(keeping.annotations)
    found = open_sources(sources)
    looker = _looker(model, which, opening, batch_size)
    wanted = None if classes is None else [name.strip() for name in classes.split(",") if name.strip()]
    if wanted == []:
        raise UserError("--classes: names none")
    seen = look(looker, found, min_score=score, classes=wanted, batch_size=batch_size)
    if folder is None:
        summary = _take(seen, found, None, show)
    else:
        with Outputs(folder, looker.card, kinds, image_ids, wanted) as outputs:
            summary = _take(seen, found, outputs, show)
    _say(summary, looker.card, score)
    if folder is not None:
        print(f"{folder}: {', '.join(_shown(folder))}")
    if summary.interrupted and not any(source.live for source in found):
        to_stderr("interrupted; what was found until then is kept")
        raise typer.Exit(130)
    if summary.problems:
        to_stderr(f"error: {summary.problems} of {summary.frames + summary.problems} could not be looked at")
        raise typer.Exit(2)


# --- details --------------------------------------------------------------------------------------------


class _Summary:
    """What to say at the end."""

    def __init__(self) -> None:
        self.frames = self.empty = self.problems = 0
        self.classes: Counter[str] = Counter()
        self.interrupted = False


def _take(seen: Iterator[Seen], sources: list[Source], outputs: Outputs | None, show: bool) -> _Summary:
    from compress.console import progress as progress_of
    from deploy.predict.sources import total

    summary, count = _Summary(), total(sources)
    with progress_of("predicting", at_least=100) as progress:
        try:
            for one in seen:
                if outputs is not None:
                    outputs.add(one)
                if one.problem is not None:
                    summary.problems += 1
                    if summary.problems <= MOST:
                        to_stderr(f"error: {one.problem}")
                else:
                    summary.frames += 1
                    summary.empty += not len(one.detections)
                    summary.classes.update(found.class_name for found in one.detections)
                    if show:
                        _draw(one)
                done = summary.frames + summary.problems
                progress(done, max(done, count or 0))
        except KeyboardInterrupt:
            summary.interrupted = True
    return summary


def _say(summary: _Summary, card: ModelCard, score: float | None) -> None:
    names = some(f"{count} {name}" for name, count in summary.classes.most_common())
    source = "the default" if card.operating_point is None else "best F1 on validation"
    print(
        f"{counted(summary.frames, 'frame')}, {summary.frames - summary.empty} with detections: "
        f"{names or 'nothing'}; score from "
        + (f"{card.shown_score:.2f} ({source})" if score is None else f"{score:.2f}")
    )
    if score is not None and score < card.score_threshold:
        print(f"note: the model itself leaves out what scores less than {card.score_threshold:g}")


def _draw(seen: Seen) -> None:
    from PIL import Image

    from compress.console import open_console
    from deploy.core.draw import draw_boxes

    picture = Image.fromarray(seen.pixels)
    draw_boxes(picture, list(seen.detections))
    columns = min(100, open_console().width)
    rows = max(1, round(columns * picture.height / picture.width / 2))
    small = picture.resize((columns, 2 * rows))
    for row in range(rows):
        cells = ((small.getpixel((x, 2 * row)), small.getpixel((x, 2 * row + 1))) for x in range(columns))
        line = "".join(
            f"\x1b[38;2;{a[0]};{a[1]};{a[2]};48;2;{b[0]};{b[1]};{b[2]}m\u2580"  # type: ignore[index]
            for a, b in cells
        )
        print(f"{line}\x1b[0m")
    print(
        f"{seen.frame.source.name}: {', '.join(f'{d.class_name} {d.score:.2f}' for d in seen.detections) or 'nothing'}"
    )


def _shown(folder: Path) -> list[str]:
    found = (entry for entry in folder.iterdir() if not entry.name.startswith("."))
    return sorted(entry.name + "/" * entry.is_dir() for entry in found)


def _kinds(keeping: KeepFlags) -> list[str]:
    from deploy.predict import KINDS

    kinds = [name.strip() for name in keeping.save.split(",") if name.strip() not in ("", "none")]
    for kind in kinds:
        if kind not in KINDS:
            raise UserError(f"--save: '{kind}' is none of {', '.join(KINDS)}, none")
    if keeping.annotations is not None and "coco" not in kinds:
        raise UserError("--annotations: gives the image ids of --save coco")
    return list(dict.fromkeys([*kinds, *(["crops"] if keeping.crop else [])]))


def _folder(out: Path | None, overwrite: bool) -> Path:
    """A new folder, or one that is empty, or one that may be written into."""
    if out is None:
        number = 1
        while (folder := Path("predictions" if number == 1 else f"predictions-{number}")).exists():
            number += 1
        return folder
    if out.exists() and not out.is_dir():
        raise UserError(f"--out: {out}: is a file; name a folder")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise UserError(f"--out: {out}: is not empty; name another folder, or add --overwrite")
    return out


def _image_ids(annotations: Path) -> dict[str, int]:
    from deploy.validate.coco import load_annotations

    if not is_file(annotations):
        raise UserError(f"--annotations: {annotations}: no such file")
    return {row["file_name"]: row["id"] for row in load_annotations(annotations)["images"]}


def _looker(model: str, which: ModelFlags, opening: RunnerFlags, batch_size: int) -> Looker:
    from deploy.predict import RunnerLooker, ServerLooker

    if model.startswith(("http://", "https://")):
        return ServerLooker(model, which.served, os.environ.get("COMPRESS_SERVE_TOKEN") or None)
    if which.served is not None:
        raise UserError(f"--served: of a server, and {model} is none")
    import compress
    from compress.config.base import is_published
    from deploy.runtimes.open import SUFFIXES

    path, options = Path(model), {}
    if path.is_dir():
        raise UserError(f"{model}: is a folder; name the file in it, such as {path / 'student.onnx'}")
    if not is_published(model) and not is_file(path):
        raise UserError(f"{model}: no such file")
    kinds = (*SUFFIXES, *CHECKPOINT_SUFFIXES)
    if not path.name.endswith(kinds) and not is_published(model):
        raise UserError(f"{model}: ends in none of {', '.join(kinds)}")
    providers = provider_names(which.provider)
    if path.name.endswith(SUFFIXES):
        options = opening.arguments([path], providers, max_batch=batch_size)
    opened = compress.open(model, providers, input_size=which.input_size, device=which.device, **options)
    return RunnerLooker(opened.runner, opened.name)
