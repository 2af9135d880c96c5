"""`compress quantize`: int8 and mixed files, of a checkpoint or of its float ONNX file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compress.cli.exits import next_command
from compress.cli.groups import with_groups
from compress.cli.options import QuantizeFlags, ThresholdFlags, need_file, need_finite, refuse, values_of
from compress.cli.student import Student, make_files, read_student
from deploy.core.errors import UserError
from deploy.core.files import ONNX_SUFFIX, need_other, need_place
from deploy.core.precisions import PRECISIONS, TENSORRT, file_for
from deploy.core.storage import is_file

if TYPE_CHECKING:
    from compress.run.quantize import Quantizing
    from deploy.quantize.grids import Grids

commands = typer.Typer()
QUANTIZED = [name for name, kind in PRECISIONS.items() if kind.quantized]


@commands.command()
@with_groups
def quantize(
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="A student.safetensors, or the float .onnx file of one.")
    ],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Default: SOURCE's name with .int8.onnx.")
    ] = None,
    precision: Annotated[
        str, typer.Option("--precision", metavar="P", help=f"One of {', '.join(QUANTIZED)}.")
    ] = "int8",
    images: Annotated[
        Path | None,
        typer.Option("--images", metavar="DIR", help="Images to check on, and those of --data. Default: the run's."),
    ] = None,
    input_size: Annotated[
        str | None, typer.Option("--input-size", metavar="HxW", help="Of a checkpoint: pixels, multiples of 32.")
    ] = None,
    flags: QuantizeFlags = QuantizeFlags(),
) -> None:
    """Write the int8 or mixed file of a student: int8 layers, the rest in float32 or float16.

    The scales come from calibration images; of a student that was trained on the grids of its int8 file, from that
    training. With --max-map-drop the fewest layers stay in float that hold the loss within it. Settings that are not
    given come from the recipe.yaml beside SOURCE, or are the defaults.
    """
    need_file(source)
    if precision not in QUANTIZED:
        raise UserError(f"--precision: '{precision[:20]}' is none of {', '.join(QUANTIZED)}")
    student = read_student(source, images, input_size, ThresholdFlags())
    check_flags([precision], flags, images)
    exported = source.suffix == ONNX_SUFFIX
    if exported:
        refuse({"--input-size": input_size}, f"{source} has one; leave it out, or give its checkpoint")
        refuse({"--images": None if flags.data is not None else images}, "is only looked at with --data; leave it out")
    name = source.with_suffix(ONNX_SUFFIX)
    out = out or file_for(_without(name, PRECISIONS[PRECISIONS[precision].source].suffix), precision)
    if out.suffix != ONNX_SUFFIX:
        raise UserError(f"--out: {out} does not end in {ONNX_SUFFIX}")
    grids = None if exported else trained_grids(source, [precision], flags)
    student = with_flags(student, flags, grids)
    if not exported:
        student.need_images_and_size()
    need_place(out)
    need_other(out, source)
    from compress.run.artifacts import ArtifactPlan, OnnxFile

    how = quantizing(student, flags, out)
    given = {PRECISIONS[precision].source: _float_file(source, precision)} if exported else {}
    target = student.settings.int8.target
    kind = PRECISIONS[precision]
    file = OnnxFile(out, precision, target if target in kind.targets else kind.targets[0])
    checks, split = (None, None) if exported else student.checks()
    make_files(ArtifactPlan(source, [file], student.settings, checks, how, on_grids=grids is not None, given=given))
    if exported and how.val is not None:
        split = how.val
    if split is None:
        next_command("benchmark", *([source] if exported else []), out, *(["--images", images] if images else []))
        return
    reference = ["--reference", source] if exported else []
    next_command("validate", out, "--data", split.annotations, "--images", split.images, *reference)


def check_flags(precisions: Sequence[str], flags: QuantizeFlags, images: Path | None) -> None:
    """Options that would do nothing are mistakes."""
    quantized = [name for name in precisions if PRECISIONS[name].quantized]
    if not quantized:
        given = values_of(flags)
        data = given.pop("--data")
        refuse(given, "is about int8 files; add --precision fp32,int8")
        given["--data"] = data
    for name in quantized:
        if flags.target is not None and flags.target not in PRECISIONS[name].targets:
            raise UserError(
                f"--target: {name} files are for TensorRT only; leave out {name} or --target {flags.target}"
            )
    if flags.data is not None and (flags.max_map_drop is None or images is None):
        raise UserError("--data: only --max-map-drop uses it; give that too, and its images as --images")
    if flags.data is not None and not is_file(flags.data):
        raise UserError(f"--data: {flags.data}: no such file")
    if flags.max_map_drop is not None:
        need_finite(flags.max_map_drop, "--max-map-drop")


def trained_grids(checkpoint: Path, precisions: Sequence[str], flags: QuantizeFlags) -> Grids | None:
    """Read the grids that quantization-aware distillation left beside the checkpoint; None where there are none."""
    file = checkpoint.with_suffix(".json")
    if not any(PRECISIONS[name].quantized for name in precisions) or not file.is_file():
        return None
    from compress.training.qad.export import load_grids

    grids = load_grids(file)
    settled = f"scales and float layers are those that were trained, in {file}"
    values = values_of(flags)
    fixed = ("--calibration-method", "--reduce-range", "--max-map-drop", "--data")
    refuse({name: values[name] for name in fixed}, settled)
    if "mixed" in precisions:
        raise UserError(f"--precision: {file} was trained for an int8 file; a mixed one is made of student.safetensors")
    return grids


def with_flags(student: Student, flags: QuantizeFlags, grids: Grids | None, *, trt: bool = False) -> Student:
    """The student with the options in its settings. trt: the file is for an engine, if nothing else says more."""
    int8: dict[str, Any] = {
        "target": flags.target,
        "calibration": flags.calibration,
        "images": flags.calibration_images,
        "method": flags.calibration_method,
        "reduce_range": flags.reduce_range,
    }
    int8 = {key: value for key, value in int8.items() if value is not None}
    if grids is not None:
        if (flags.target or (TENSORRT if trt else grids.target)) != grids.target:
            option = "--target" if flags.target is not None else "--trt"
            raise UserError(
                f"{option}: {student.path} was trained for an int8 file in the format of {grids.target}; for another "
                "one train it again with deploy.int8.target"
            )
        int8["target"] = grids.target
    elif trt and flags.target is None:
        int8["target"] = TENSORRT
    settings = student.settings
    settings = settings.model_copy(update={"int8": settings.int8.model_copy(update=int8)})
    return Student(student.path, student.recipe, settings, student.images)


def quantizing(student: Student, flags: QuantizeFlags, out: Path) -> Quantizing:
    """Collect what int8 files are made with, checked before the long work: calibration images, apart from the
    validation images, and what a search is scored on."""
    from compress.config.data import Split
    from compress.run.quantize import Quantizing, Search

    recipe, int8 = student.recipe, student.settings.int8
    if recipe is None and int8.calibration is None:
        raise UserError("--calibration: there is no recipe.yaml to take training images from; give a folder or a JSON")
    if recipe is None and flags.max_map_drop is not None and flags.data is None:
        raise UserError("--max-map-drop: needs labels to measure mAP on; give --data and --images")
    train = val = search = None
    if recipe is not None:
        from compress.run.data import labelled_split, splits
        from compress.run.plans import data_plan

        train, val = splits(recipe.data, recipe.runs)
    if flags.max_map_drop is not None and flags.data is not None and student.images is not None:
        search = Search(Split(annotations=flags.data, images=student.images), flags.max_map_drop)
    elif flags.max_map_drop is not None:
        assert recipe is not None, "checked above"
        labels, part = labelled_split(data_plan(recipe)), out.with_suffix(".deciding.json")
        search = Search(labels, flags.max_map_drop, count=int8.deciding_images, part=part)
    how = Quantizing(int8, train, val, search)
    how.check()
    return how


def keep_trained(checkpoint: Path, out: Path) -> None:
    """`student.qad.onnx` of a run is an int8 file, which a float file of that name must not replace."""
    if not is_file(checkpoint.with_suffix(".json")) or not out.is_file():
        return
    from deploy.core.card import card_from_file

    if card_from_file(out).quantization is not None:
        raise UserError(f"--out: {out} is the int8 file of {checkpoint}; give the float file another name")


def _float_file(source: Path, precision: str) -> Path:
    """`source`, if it is what files of this precision are made from. Raises UserError."""
    from deploy.core.card import card_from_file, network_precision

    wanted, found = PRECISIONS[precision].source, network_precision(card_from_file(source).precision)
    if found not in (wanted, f"{wanted}+fp32"):
        raise UserError(
            f"{source}: is {found}, and {precision} files are made from {wanted} ones; give that, or its checkpoint"
        )
    return source


def _without(file: Path, suffix: str) -> Path:
    """`student.fp16.onnx` → `student.onnx`."""
    return file.with_name(f"{file.stem.removesuffix(suffix)}{ONNX_SUFFIX}")
