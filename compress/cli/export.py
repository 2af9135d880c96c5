"""`compress export`: a checkpoint as ONNX files; and the short way to quantized files and engines."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from compress.cli.build import TritonRepo, add_to_triton, deliver, engine_plan
from compress.cli.exits import next_command
from compress.cli.groups import HIDDEN, with_groups
from compress.cli.options import EngineFlags, QuantizeFlags, ThresholdFlags, need_file, refuse, values_of
from compress.cli.quantize import check_flags, keep_trained, quantizing, trained_grids, with_flags
from compress.cli.student import make_files, read_student
from compress.cli.targets import OtherFlags, check_targets, keep_runtimes, make_others
from deploy.core.errors import UserError
from deploy.core.files import ONNX_SUFFIX, need_place
from deploy.core.precisions import PRECISIONS, file_for
from deploy.core.storage import is_remote, shown
from deploy.targets.table import TARGETS

if TYPE_CHECKING:
    from compress.config.data import Split
    from compress.run.engines import EnginePlan

commands = typer.Typer()
OUT_HELP = "The fp32 file; others lie beside it, as x.int8.onnx. Default: the checkpoint's name with .onnx."


@commands.command()
@with_groups
def export(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            metavar="CHECKPOINT",
            help="A student.safetensors, an mmdet FILE.pth or zoo:NAME; for what is made of .onnx files also one.",
        ),
    ],
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help=OUT_HELP)] = None,
    images: Annotated[
        Path | None,
        typer.Option("--images", metavar="DIR", help="Images to check the file on. Default: the run's own."),
    ] = None,
    input_size: Annotated[
        str | None,
        typer.Option("--input-size", metavar="HxW", help="Multiples of 32, as trained; padding changes mAP."),
    ] = None,
    thresholds: ThresholdFlags = ThresholdFlags(),
    precision: Annotated[
        str | None,
        typer.Option("--precision", metavar="P,P", help=f"Of {', '.join(PRECISIONS)}. Default: fp32."),
    ] = None,
    quantize: Annotated[QuantizeFlags, HIDDEN] = QuantizeFlags(),
    others: OtherFlags = OtherFlags(),
    trt: Annotated[
        bool, typer.Option("--trt", help="Also build a TensorRT engine, with a card, for this GPU.")
    ] = False,
    engine: Annotated[EngineFlags, HIDDEN] = EngineFlags(),
    triton_repo: TritonRepo = None,
) -> None:
    """Write a checkpoint as ONNX files; build engines.

    They take pixels and give final boxes, and are compared with torch on real images before they get their names.
    Settings that are not given come from the recipe.yaml beside the checkpoint, or are the defaults. How int8 files and
    engines are made: compress quantize and compress build, whose options are taken here too.
    """
    _need_checkpoint(checkpoint)
    if not trt:
        refuse(values_of(engine), "is about engines; add --trt")
    plan = engine_plan(engine, triton_repo) if trt else None
    targets = others.targets
    keep_runtimes(others, targets)
    if checkpoint.suffix == ONNX_SUFFIX:
        making = {"--images": images, "--input-size": input_size, "--precision": precision}
        making |= {**values_of(thresholds), **values_of(quantize)}
        refuse(making, f"is about making an ONNX file, and {checkpoint} is one already; give its checkpoint")
        _of_exported(checkpoint, targets, others, out, plan, triton_repo)
        return
    named, out = out is not None, _place(checkpoint, out)
    student = read_student(checkpoint, images, input_size, thresholds)
    wanted = _precisions(precision, targets)
    check_flags(wanted, quantize, images)
    grids = trained_grids(checkpoint, wanted, quantize)
    student = with_flags(student, quantize, grids, trt=trt)
    student.need_images_and_size()
    from compress.run.artifacts import ArtifactPlan, onnx_files

    files = onnx_files(out, wanted, student.settings.int8.target, wanted if trt else ())
    check_targets(wanted, partial(file_for, out), targets)
    for file in files:
        need_place(file.path)
    if "fp32" in wanted and not named:
        keep_trained(checkpoint, out)
    if trt:
        from deploy.tensorrt.network import load_tensorrt

        load_tensorrt()  # before the export, which takes long
    how = quantizing(student, quantize, out) if any(PRECISIONS[name].quantized for name in wanted) else None
    checks, split = student.checks()
    make_files(ArtifactPlan(checkpoint, files, student.settings, checks, how, on_grids=grids is not None, engines=plan))
    written = [file.path for file in files]
    made = make_others(written, targets, others)
    _note(written[0])
    if triton_repo is not None:
        for artifact in [file.engine for file in files] if trt else written:
            if artifact is not None:
                add_to_triton(triton_repo, artifact)
    _next([*written, *filter(_runs_here, made)], out, split, images, _providers(wanted))


def _of_exported(
    file: Path,
    targets: Sequence[str],
    others: OtherFlags,
    out: Path | None,
    plan: EnginePlan | None,
    triton_repo: Path | None,
) -> None:
    """Make what was asked for of an ONNX file. plan: of an engine; None: none is wanted."""
    if plan is None and triton_repo is None and not others.any:
        raise UserError(
            f"{file}: is an ONNX file already; give --for, --static-batch, --labels, --input, --heads-only, --trt or "
            "--triton-repo"
        )
    if plan is None and not others.any:
        refuse({"--out": out}, "names the engine here; add --trt")
    made = make_others([file], targets, others, out if plan is None else None)
    if others.any:
        _note(file)
    if plan is not None or triton_repo is not None:
        made = [deliver(file, out if plan is not None else None, plan, triton_repo)]
    _measure(made)


def _measure(made: Sequence[Path]) -> None:
    """Print the next command for files that can be run here."""
    files = [file for file in made if _runs_here(file)]
    if files:
        next_command("benchmark", *files)


def _need_checkpoint(checkpoint: Path) -> None:
    from compress.config.base import is_published

    if not is_published(checkpoint):
        need_file(checkpoint)


def _place(checkpoint: Path, out: Path | None) -> Path:
    """Where the fp32 file goes. Raises UserError where nothing can be written there, and where nothing says it."""
    from compress.config.base import is_published

    if out is None and (is_published(checkpoint) or is_remote(checkpoint)):
        raise UserError(f"--out: say where the file goes; {shown(checkpoint)} lies in no folder here")
    out = out or checkpoint.with_suffix(ONNX_SUFFIX)
    if out.suffix != ONNX_SUFFIX:
        raise UserError(f"--out: {out} does not end in {ONNX_SUFFIX}")
    need_place(out)
    return out


def _note(file: Path) -> None:
    """Say what a compiler that has no --for will not take, and why: its own error does not."""
    if find_spec("onnx") is None:  # where files are only run and handed on
        return
    from deploy.targets.iree import not_compiled

    said = not_compiled(file)
    if said is not None:
        print(f"note: {said}")


def _next(
    written: Sequence[Path], out: Path, split: Split | None, images: Path | None, providers: Sequence[str]
) -> None:
    """Print the next command: validate the files where labelled images are known. providers: that they need."""
    where = ["--provider", *providers] if providers else []
    if split is None:
        next_command("benchmark", *written, "--images", images, *where)
        return
    reference = ["--reference", out if out in written else written[0]] if len(written) > 1 else []
    next_command("validate", *written, "--data", split.annotations, "--images", split.images, *reference, *where)


def _providers(precisions: Sequence[str]) -> list[str]:
    """The one provider that runs all of them, where the usual one does not."""
    return next(([PRECISIONS[name].providers[0]] for name in precisions if PRECISIONS[name].providers), [])


def _runs_here(file: Path) -> bool:
    from deploy.runtimes.open import SUFFIXES

    return file.name.endswith(SUFFIXES)


def _precisions(text: str | None, targets: Sequence[str]) -> list[str]:
    """Those that were asked for, and fp32 where a target makes its int8 file of that."""
    names = [name.strip() for name in ("fp32" if text is None else text).split(",")]
    for name in names:
        if name not in PRECISIONS:
            raise UserError(f"--precision: '{name[:20]}' is none of {', '.join(PRECISIONS)}")
    own = "int8" in names and any(TARGETS[name].own_int8 for name in targets)
    return list(dict.fromkeys([*(["fp32"] if own else []), *names]))
