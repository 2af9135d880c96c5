"""The command that writes a first recipe."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from compress.cli.exits import next_command
from compress.cli.options import need_folder
from deploy.core.errors import UserError
from deploy.core.storage import is_file, is_remote, shown

if TYPE_CHECKING:
    from compress.config.data import Split
    from compress.config.teacher import Source

commands = typer.Typer()

UNITS = {"s": 1, "min": 60, "h": 3600, "d": 86400}
LOOKED = 3  # files of a set that must be in its folder of images


@commands.command()
def init(
    data: Annotated[
        list[Path],
        typer.Argument(metavar="TRAIN.json VAL.json", help="COCO files, or the folder that holds both by these names."),
    ],
    images: Annotated[
        list[Path] | None,
        typer.Option("--images", metavar="DIR", help="Folder of the images; twice: of each set. Default: found."),
    ] = None,
    budget: Annotated[str, typer.Option("--budget", metavar="TIME", help="For the whole run: 90s, 10min, 8h, 2d.")] = (
        "30min"
    ),
    device: Annotated[
        Literal["cpu", "cuda"] | None, typer.Option("--device", help="Where to train. Default: a GPU if there is one.")
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="TEACHER",
            help="Learn from this one: a checkpoint, zoo:NAME, one of transformers (folder, or owner/name on the Hub), "
            "a .onnx file of this program, a model of torchvision. Default: train one first.",
        ),
    ] = None,
    unlabeled: Annotated[
        Path | None, typer.Option("--unlabeled", metavar="DIR", help="More pictures, which the teacher labels.")
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="Of the run. Default: the data's folder.")] = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Default: NAME.yaml.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
) -> None:
    """Write a recipe that fits the data, this machine and a time, and rehearse it."""
    train, val = _sets(data, images or [])
    name = _name(name, train.annotations)
    out = Path(f"{name}.yaml") if out is None else out
    if out.exists() and not force:
        raise UserError(f"{out}: is there already; --force replaces it, --out writes elsewhere")
    if unlabeled is not None:
        need_folder(unlabeled, "--unlabeled")
    seconds = _seconds(budget)
    from deploy.core.files import need_place, write_text

    need_place(out)
    from compress.config.recipe import load_recipe
    from compress.run import pipeline
    from compress.run.starter import starter_recipe
    from compress.run.starter_text import Wishes

    source = None if teacher is None else _source(teacher)
    text = starter_recipe(Wishes(name, train, val, seconds, device, source, unlabeled), print)
    write_text(out, text)
    print(f"recipe: {out}")
    pipeline.run(load_recipe(out), dry_run=True)
    next_command("run", out)


# --- details --------------------------------------------------------------------------------------------


def _sets(data: list[Path], images: list[Path]) -> tuple[Split, Split]:
    """Training and validation images."""
    if len(images) > 2:
        raise UserError("--images: at most twice, for training and for validation")
    for folder in images:
        need_folder(folder, "--images")
    for place in data:
        if not (is_file(place) or place.exists()):
            raise UserError(f"{place}: no such file")
    if len(data) == 1 and data[0].is_dir():
        others = sorted(file for file in data[0].glob("*.json") if file.stem not in ("train", "val"))
        if len(others) == 1 and not (data[0] / "train.json").exists():
            raise UserError(f"{others[0]}: one file is not enough; divide it with: compress data split {others[0]}")
        data = [data[0] / "train.json", data[0] / "val.json"]
        for file in data:
            if not file.is_file():
                raise UserError(
                    f"{file}: no such file; write it from labels with compress data convert, or divide one file with "
                    "compress data split"
                )
    if len(data) == 1:
        raise UserError(f"{data[0]}: needs validation images beside it; divide it with: compress data split {data[0]}")
    if len(data) > 2:
        raise UserError(f"{data[2]}: takes two files, for training and validation; compress data merge joins files")
    from compress.config.data import Split

    folders = [images[min(index, len(images) - 1)] if images else _folder_of(file) for index, file in enumerate(data)]
    train, val = (Split(annotations=file, images=folder) for file, folder in zip(data, folders, strict=True))
    return train, val


def _folder_of(annotations: Path) -> Path:
    """Where the images of a COCO file lie: beside it, or in a folder there."""
    from deploy.validate.coco import read_annotations

    names = [row["file_name"] for row in read_annotations(annotations)["images"][:LOOKED]]
    beside = annotations.parent
    below = [] if is_remote(beside) else sorted(path for path in beside.iterdir() if path.is_dir())
    for folder in (beside, beside / "images", *below, beside.parent / "images", beside.parent):
        if names and all(is_file(folder / name) for name in names):
            return folder
    first = f", where {names[0]} is" if names else ""
    raise UserError(f"{annotations}: its images are not beside it; name their folder{first}, with --images")


def _name(given: str | None, annotations: Path) -> str:
    """Name of the run."""
    if given is not None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", given):
            raise UserError(f"--name: '{given}' must be letters, digits, '.', '_' and '-', a letter or digit first")
        return given
    folder = re.sub(r"[^A-Za-z0-9._-]+", "-", annotations.resolve().parent.name).strip("-._")
    return folder or "first"


def _seconds(budget: str) -> float:
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(s|min|h|d)\s*", budget)
    if found is None or float(found[1]) == 0:
        raise UserError(f"--budget: '{budget}' is no length of time, for example 90s, 10min, 8h or 2d")
    return float(found[1]) * UNITS[found[2]]


def _source(teacher: str) -> Source:
    """What `--from` names."""
    from typing import get_args

    from compress.config.base import is_published
    from compress.config.teacher import Source, Torchvision

    def exists(path: Path) -> str:
        if not (is_file(path) or path.exists()):
            raise UserError(f"--from: {path}: no such file")
        return shown(path)

    path, models = Path(teacher), get_args(Torchvision.model_fields["model"].annotation)
    content: dict[str, Any]
    if is_published(teacher):
        content = {"checkpoint": teacher}
    elif teacher in models:
        content = {"torchvision": {"model": teacher, "weights": "coco"}}
    elif path.suffix in (".safetensors", ".pth"):
        content = {"checkpoint": exists(path)}
    elif path.suffix == ".onnx":
        content = {"onnx": {"file": exists(path)}}
    elif (path / "config.json").is_file() or (re.fullmatch(r"[\w.-]+/[\w.-]+", teacher) and not path.exists()):
        content = {"transformers": {"model": teacher}}
    else:
        raise UserError(
            f"--from: {teacher}: is no checkpoint (.safetensors, .pth), zoo:NAME, .onnx file, folder of transformers "
            "with a config.json or its name on the Hub (owner/name), or model of torchvision "
            f"({', '.join(models)}); docs/teachers.md describes others"
        )
    return Source.model_validate_json(json.dumps(content))
