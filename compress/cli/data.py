"""Commands about images and labels."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from compress.cli.exits import gate_failed, is_rank_zero, next_command
from compress.cli.groups import with_groups
from compress.cli.options import ActorFlags, JsonOut, Resume, need_folder, need_json_place, write_results
from deploy.core.errors import UserError
from deploy.core.shown import counted, some
from deploy.core.storage import fetch, is_folder, url_of

if TYPE_CHECKING:
    from compress.data.check import Checked
    from compress.data.convert.coco_file import Source
    from compress.pseudo.parts import Shard

commands = typer.Typer()
data_app = typer.Typer(
    help="Convert, divide, merge, check and generate data.", rich_markup_mode=None, add_completion=False
)
commands.add_typer(data_app, name="data")


@data_app.callback(invoke_without_command=True)
def _data(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


@dataclass(frozen=True)
class ConvertFlags:
    """Options of a layout, and of what is written."""

    names: Annotated[
        str | None,
        typer.Option(
            "--names",
            metavar="NAMES",
            help="yolo: class names a,b,c or the file that holds them. Default: data.yaml, classes.txt, ... of SOURCE.",
        ),
    ] = None
    first_pixel: Annotated[
        int | None,
        typer.Option(
            "--first-pixel",
            min=0,
            max=1,
            help="voc: coordinates count pixels from 1, or are edges from 0. Default: found out, and said.",
        ),
    ] = None
    images: Annotated[
        Path | None, typer.Option("--images", metavar="DIR", help="coco: folder of the images. Default: SOURCE's.")
    ] = None
    drop_unused: Annotated[bool, typer.Option("--drop-unused", help="coco: leave out categories that no box has.")] = (
        False
    )
    split: Annotated[
        str | None, typer.Option("--split", metavar="NAME", help="Take only this set: train, val, test.")
    ] = None
    allow_empty: Annotated[bool, typer.Option("--allow-empty", help="Also write files without any box.")] = False


@data_app.command("convert")
@with_groups
def convert(
    layout: Annotated[
        Literal["yolo", "voc", "coco"], typer.Argument(metavar="yolo|voc|coco", help="What SOURCE holds.")
    ],
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="Folder of images and labels; also a data.yaml, or a COCO file.")
    ],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="A .json for all images, or a folder for train.json, val.json, ...")
    ],
    flags: ConvertFlags = ConvertFlags(),
) -> None:
    """Write YOLO, Pascal VOC or laid-out COCO labels as COCO JSON."""
    if out.suffix in (".txt", ".yaml", ".yml", ".xml", ".csv", ".data"):
        raise UserError(
            f"{out}: OUT is a JSON file, for example {out.with_suffix('.json')}, or a folder for train.json, val.json"
        )
    for option, belongs_to, given in (
        ("--names", "yolo", flags.names is not None),
        ("--first-pixel", "voc", flags.first_pixel is not None),
        ("--images", "coco", flags.images is not None),
        ("--drop-unused", "coco", flags.drop_unused),
    ):
        if given and layout != belongs_to:
            why = "voc files hold the class names themselves" if (option, layout) == ("--names", "voc") else ""
            raise UserError(f"{option}: {why or f'is for {belongs_to}, not for {layout}'}; leave it out")
    from compress.data.convert.coco_file import documents, write_documents
    from deploy.core.files import need_place

    one_file = out.suffix == ".json"
    need_place(out if one_file else out / "train.json")
    if layout == "coco":
        from compress.data.convert.coco import coco_documents, read_coco

        if flags.images is not None:
            need_folder(flags.images, "--images")
        found = read_coco(source, flags.images, drop_unused=flags.drop_unused)
        sets, files = list(found.splits), coco_documents(found, out, flags.split)
        notes: Sequence[str] = found.notes
    else:
        read = _read_voc(source, flags) if layout == "voc" else _read_yolo(source, flags)
        sets, files, notes = list(read.splits), documents(read, out, flags.split), read.notes
    made = write_documents(files, allow_empty=flags.allow_empty)
    for note in notes:
        print(f"note: {note}")
    for file in made:
        print(f"{file.out}: {file.images} images, {file.annotations} boxes")
    if one_file and flags.split is None and len(sets) > 1:
        print(f"note: the sets {', '.join(sets)} are in it together; a folder as OUT gets a file for each of them")
    against = next(
        (["--against", file.out] for file in made if file.out.name == "val.json" and file is not made[0]), []
    )
    next_command("data", "check", made[0].out, "--images", made[0].image_folder, *against)


def _read_yolo(source: Path, flags: ConvertFlags) -> Source:
    from compress.data.convert.yolo import read_yolo

    return read_yolo(source, flags.names)


def _read_voc(source: Path, flags: ConvertFlags) -> Source:
    from compress.data.convert.voc import read_voc

    return read_voc(source, flags.first_pixel)


@data_app.command("check")
def check(
    annotations: Annotated[Path, typer.Argument(metavar="ANNOTATIONS", help="COCO instances JSON.")],
    images: Annotated[Path, typer.Option("--images", metavar="DIR", help="Folder of the images.")],
    against: Annotated[
        Path | None,
        typer.Option("--against", metavar="JSON", help="Another set, val for train: none of its pictures may be here."),
    ] = None,
    against_images: Annotated[
        Path | None, typer.Option("--against-images", metavar="DIR", help="Folder of its images. Default: --images.")
    ] = None,
    max_detections: Annotated[
        int, typer.Option("--max-detections", min=1, help="The recipe's deploy.max_detections.")
    ] = 100,
    json_out: JsonOut = None,
) -> None:
    """Find what breaks training, or makes it learn or measure something wrong.

    An `error:` line for each such finding, and a `note:` line for what is handled, but worth knowing; ten of a kind are
    shown. Exit code 1 if there is an error, 0 if there are notes alone."""
    need_folder(images, "--images")
    if against_images is not None:
        if against is None:
            raise UserError("--against-images: belongs to --against, which is not given")
        need_folder(against_images, "--against-images")
    need_json_place(json_out)
    from compress.console import progress
    from compress.data.check import check as find_problems

    other = None if against is None else (against, images if against_images is None else against_images)
    with progress("checking", at_least=2000) as advance:
        checked = find_problems(annotations, images, against=other, max_detections=max_detections, progress=advance)
    write_results(json_out, checked.to_dict())
    for line in checked.lines():
        print(line)
    print(f"{annotations}: {_described(checked)}")
    if checked.sizes:
        print(f"{annotations}: {_sizes(checked)}")
    notes = counted(checked.notes, "note")
    if checked.errors:
        gate_failed(f"{annotations}: {counted(checked.errors, 'error')}, {notes}")
    role = "val" if annotations.stem.startswith(("val", "test")) else "train"
    print(
        f"{annotations}: fit for training{f', {notes}' if checked.notes else ''}; "
        f"in a recipe, data.{role}.annotations, with data.{role}.images: {images}"
    )
    next_command(*_after_check(annotations, images, other))


def _after_check(annotations: Path, images: Path, other: tuple[Path, Path] | None) -> list[Any]:
    """What leads on from a file without errors: a look at the other one of the pair, dividing it, or a recipe."""
    if other is not None:
        more = [] if other[1] == images else ["--images", other[1]]
        return ["init", annotations, other[0], "--images", images, *more]
    train, val = annotations.with_name("train.json"), annotations.with_name("val.json")
    if annotations in (train, val) and train.is_file() and val.is_file():
        return ["data", "check", train, "--images", images, "--against", val]
    return ["data", "split", annotations, "--images", images]


def _described(checked: Checked) -> str:
    """Counts of images, boxes and classes; of the classes the ten with most boxes."""
    boxes = sorted(checked.boxes.items(), key=lambda item: -item[1])
    shown = some(f"{name} {count}" for name, count in boxes)
    return (
        f"{counted(checked.image_count, 'image')}, {counted(sum(checked.boxes.values()), 'box')} of "
        f"{counted(len(boxes), 'class')}: {shown}"
    )


def _sizes(checked: Checked) -> str:
    """Sizes of pictures and of objects in them."""
    small, middle, large = ("x".join(map(str, size)) for size in checked.sizes)
    pictures = (
        f"pictures of {small}" if small == large else f"pictures from {small} to {large}, the middle one {middle}"
    )
    if checked.object_share is None:
        return pictures
    return f"{pictures}; a quarter of the objects are smaller than {checked.object_share:.1%} of the long side"


@data_app.command("split")
def split(
    annotations: Annotated[Path, typer.Argument(metavar="ANNOTATIONS", help="COCO instances JSON of all images.")],
    val: Annotated[float, typer.Option("--val", metavar="SHARE", help="Share of the images for validation.")] = 0.2,
    test: Annotated[
        float | None, typer.Option("--test", metavar="SHARE", help="Share of the images for a test. Default: none.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="The same seed divides the same way.")] = 0,
    images: Annotated[
        Path | None,
        typer.Option("--images", metavar="DIR", help="Folder of the images: copies of one picture stay together."),
    ] = None,
    stratify: Annotated[bool, typer.Option("--stratify", help="Give every set its share of each class.")] = False,
    group_by: Annotated[
        str | None,
        typer.Option(
            "--group-by", metavar="REGEX", help="Images whose names match it alike stay together: '^(.*)_frame'."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Folder of train.json, val.json. Default: the file's.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace files that are there.")] = False,
) -> None:
    """Divide one file into train.json and val.json, and test.json."""
    if images is not None:
        need_folder(images, "--images")
    from compress.data.split import split as divide
    from deploy.core.files import need_place

    folder = annotations.parent if out is None else out
    need_place(folder / "train.json")
    shares = {"val": val} if test is None else {"val": val, "test": test}
    made = divide(annotations, folder, shares, seed, images=images, stratify=stratify, group_by=group_by, force=force)
    for part in made.parts:
        print(f"{part.out}: {part.images} images, {sum(part.boxes.values())} boxes")
        absent = [name for name, count in part.boxes.items() if not count]
        if absent:
            print(f"note: {part.out}: no box of {some(absent)}")
    if made.together:
        print(f"note: {made.together} images stay with others, because they are copies or of one group")
    if images is None:
        print("note: without --images, copies of one picture may have come to both sides")
    train, other = made.parts[:2]
    where = images if images is not None else "DIR"
    next_command("data", "check", train.out, "--images", where, "--against", other.out)


@data_app.command("merge")
def merge(
    files: Annotated[list[Path], typer.Argument(metavar="A.json B.json...", help="COCO instances JSON, two or more.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="COCO JSON to write.")],
    images: Annotated[
        list[Path] | None,
        typer.Option(
            "--images",
            metavar="DIR",
            help="Folder of the images of A, again for those of B, ...; once: of all. Default: each file's own folder.",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it is there.")] = False,
) -> None:
    """Join several files into one: train.json and pseudo labels."""
    for folder in images or ():
        need_folder(folder, "--images")
    from compress.data.merge import merge as join
    from deploy.core.files import need_place

    if out.suffix != ".json":
        raise UserError(f"{out}: the last name is that of the file to write, which ends in .json")
    need_place(out)
    made = join(files, out, images or (), force=force)
    for note in made.notes:
        print(f"note: {note}")
    print(f"{out}: {made.images} images, {made.boxes} boxes; file names are relative to {made.folder}")
    next_command("data", "check", out, "--images", made.folder)


@data_app.command("synthetic")
def synthetic(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write: train.json, val.json, images/.")],
    train: Annotated[int, typer.Option(help="Training images.")] = 800,
    val: Annotated[int, typer.Option(help="Validation images.")] = 200,
    size: Annotated[int, typer.Option(help="Height and width in pixels.")] = 160,
    classes: Annotated[int, typer.Option(help="Object classes.")] = 10,
    seed: Annotated[int, typer.Option(help="The same seed draws the same pixels.")] = 0,
) -> None:
    """Draw a dataset: textured shapes on clutter."""
    from compress.data.synthetic import generate
    from deploy.core.files import need_place

    need_place(out / "train.json")
    generate(out, train=train, val=val, size=size, classes=classes, seed=seed)
    print(f"{train} training and {val} validation images in {out}")
    next_command("data", "check", out / "train.json", "--images", out / "images")


@dataclass(frozen=True)
class LabelFlags:
    """Options that decide what becomes a label."""

    tau: Annotated[
        float | None,
        typer.Option("--tau", help="Lowest score of a label. Default: of the teacher's best F1 if it says, else 0.4."),
    ] = None
    tau_ignore: Annotated[
        float | None,
        typer.Option("--tau-ignore", help="From here up to tau a box is a region to ignore. Default: half of tau."),
    ] = None
    thresholds_from: Annotated[
        Path | None,
        typer.Option("--thresholds-from", metavar="JSON", help="Labelled split: per class the tau with the best F1."),
    ] = None
    thresholds_root: Annotated[
        Path | None, typer.Option("--thresholds-root", metavar="DIR", help="Image folder of that split.")
    ] = None
    merge: Annotated[
        Literal["nms", "wbf"], typer.Option("--merge", help="Teachers that agree: the best box, or their mean.")
    ] = "nms"
    iou: Annotated[float, typer.Option("--iou", help="Boxes agree above this IoU.")] = 0.6
    categories: Annotated[
        Path | None,
        typer.Option(
            "--categories", metavar="JSON", help="COCO JSON with the classes. Default: the teachers' together."
        ),
    ] = None
    class_map: Annotated[
        Path | None,
        typer.Option("--class-map", metavar="JSON", help='{"name at a teacher": "name here", "other": null to drop}'),
    ] = None


@dataclass(frozen=True)
class WorkFlags:
    """Options of the work: image size, batch, shards, resuming."""

    short: Annotated[
        int | None,
        typer.Option("--short", help="Shorter side after the resize. Default: each checkpoint's own, else 800."),
    ] = None
    long: Annotated[
        int | None, typer.Option("--long", help="Limit of the longer side. Default: each checkpoint's own, else 1333.")
    ] = None
    batch: Annotated[int, typer.Option("--batch", min=1, help="Images at once.")] = 8
    workers: Annotated[int, typer.Option("--workers", min=0, help="Processes that decode.")] = 2
    shard: Annotated[
        str | None, typer.Option("--shard", metavar="I/N", help="Do share I (from 1) of N. Default: torchrun's rank.")
    ] = None
    skip_unreadable: Annotated[
        bool, typer.Option("--skip-unreadable", help="Leave broken images out, listed in `skipped`.")
    ] = False


@commands.command("pseudo-label")
@with_groups
def pseudo_label(
    teachers: Annotated[
        list[str],
        typer.Argument(
            metavar="TEACHER...", help="Checkpoint (.safetensors, .pth, zoo:NAME), .onnx, results.json, teacher.yaml."
        ),
    ],
    images: Annotated[Path, typer.Option("--images", metavar="DIR|JSON", help="Folder, or COCO JSON: its image list.")],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="COCO JSON to write.")],
    root: Annotated[
        Path | None, typer.Option("--root", metavar="DIR", help="Image folder of a JSON. Default: the JSON's folder.")
    ] = None,
    flags: LabelFlags = LabelFlags(),
    work: WorkFlags = WorkFlags(),
    where: ActorFlags = ActorFlags(),
    resume: Resume = False,
    json_out: JsonOut = None,
) -> None:
    """Let teachers label images: COCO JSON with scores, regions to ignore and the classes looked for."""
    from compress.pseudo.images import images_in
    from compress.pseudo.label import Labelled
    from compress.pseudo.label import pseudo_label as label
    from compress.pseudo.settings import Settings

    need_json_place(json_out)
    cluster = where.cluster()
    settings = Settings(flags.tau, flags.tau_ignore, flags.merge, flags.iou, work.short, work.long, work.batch)
    if flags.thresholds_root is not None and flags.thresholds_from is None:
        raise UserError("--thresholds-root: belongs to --thresholds-from, which is not given")
    thresholds = None
    if flags.thresholds_from is not None:
        from deploy.validate.coco import load_annotations
        from deploy.validate.labels import WHEN_MEASURING, label_notes

        thresholds = Labelled(flags.thresholds_from, flags.thresholds_root)
        for line in label_notes(load_annotations(flags.thresholds_from), kinds=WHEN_MEASURING):
            print(f"note: {flags.thresholds_from}: {line}")
    shard = _shard(work.shard)
    if url_of(out) is not None and shard.count > 1:
        raise UserError("--out: shards meet in a folder that all of them see; write there, and upload the file")
    listed = images_in(images, root)
    if is_rank_zero():
        from deploy.core.odd_pictures import odd_pictures

        files = [listed.folder / name for name in listed.names]
        odd = odd_pictures(files, skip_unreadable=True)  # labelling says what to do about those
        if odd is not None:
            print(f"note: {images}: {odd}")
    summary = label(
        teachers,
        listed,
        out,
        settings,
        categories=flags.categories,
        table=None if flags.class_map is None else _class_table(flags.class_map),
        thresholds_from=thresholds,
        shard=shard,
        workers=work.workers,
        cluster=cluster,
        skip_unreadable=work.skip_unreadable,
        resume=resume,
        quiet=not is_rank_zero(),
    )
    if summary is not None:
        write_results(json_out, {"file": str(out), **asdict(summary)})
        print(
            f"{out}: {summary.labels} labels and {summary.regions} regions to ignore in {summary.images} images, "
            f"{summary.empty} of them without any; {summary.skipped} images left out"
        )
    elif is_rank_zero():
        print(f"{out}: complete" if out.exists() else f"{out}: this shard is done; the last one writes the file")
    if out.exists():
        next_command("data", "check", out, "--images", images if is_folder(images) else root or images.parent)


def _shard(text: str | None) -> Shard:
    """`I/N` counted from 1, or what torchrun says, or everything."""
    from compress.pseudo.parts import Shard

    rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if text is None:
        return Shard(int(rank), int(world))
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
        raise UserError(f"--shard: '{text[:60]}' is not a share I/N counted from 1, for example 1/4 to 4/4")
    if world != "1":
        raise UserError(f"--shard: torchrun divides the work among its {world} processes already; leave it out")
    return Shard(int(index) - 1, int(count))


def _class_table(file: Path) -> dict[str, str | None]:
    try:
        table = json.loads(fetch(file).read_text(encoding="utf-8"))
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"--class-map: {file}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise UserError(f"--class-map: {file}: not JSON in UTF-8") from None
    if not isinstance(table, dict) or not all(name is None or isinstance(name, str) for name in table.values()):
        raise UserError(f'--class-map: {file}: must be an object like {{"kitten": "cat", "bus": null}}')
    return table
