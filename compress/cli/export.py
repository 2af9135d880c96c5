"""`compress export`: a checkpoint as ONNX files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from compress.cli.build import deliver, engine_options
from compress.cli.exits import gate_failed, next_command
from compress.cli.options import images_in, need_folder, refuse
from compress.cli.quantize import (
    check_int8_options,
    keep_trained,
    quantize_file,
    quantize_trained_file,
    quantizing,
    trained_grids,
)
from deploy.core.errors import UserError

if TYPE_CHECKING:
    from compress.config.data import Split
    from compress.config.deploy import Deploy
    from compress.config.recipe import Recipe

commands = typer.Typer()


@commands.command()
def export(
    checkpoint: Annotated[
        Path,
        typer.Argument(metavar="CHECKPOINT", help="A student.safetensors; for --trt and --triton-repo also .onnx."),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Default: the checkpoint's name with .onnx.")
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option("--images", metavar="DIR", help="Images to check the file on. Default: the run's own."),
    ] = None,
    input_size: Annotated[
        str | None, typer.Option("--input-size", metavar="HxW", help="Pixels, multiples of 32.")
    ] = None,
    score_threshold: Annotated[float | None, typer.Option(min=0, max=1)] = None,
    nms_threshold: Annotated[float | None, typer.Option(min=0, max=1)] = None,
    max_detections: Annotated[int | None, typer.Option(min=1)] = None,
    candidates: Annotated[int | None, typer.Option(min=1)] = None,
    max_batch: Annotated[int | None, typer.Option(min=1, help="Largest batch to check.")] = None,
    precision: Annotated[
        str | None, typer.Option("--precision", metavar="P,P", help="Of fp32, fp16, int8, mixed. Default: fp32.")
    ] = None,
    target: Annotated[
        Literal["cpu", "tensorrt"] | None,
        typer.Option("--target", help="int8: whose format. Default: cpu, and tensorrt with --trt."),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option("--calibration", metavar="DIR|JSON", help="int8: images for its ranges. Default: for training."),
    ] = None,
    calibration_images: Annotated[int | None, typer.Option(min=1, help="int8: how many. Default: 128.")] = None,
    calibration_method: Annotated[
        Literal["minmax", "percentile", "entropy"] | None, typer.Option(help="int8: default minmax.")
    ] = None,
    max_map_drop: Annotated[
        float | None,
        typer.Option("--max-map-drop", min=0, help="int8: keep layers in float until the loss is within these points."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option("--data", metavar="JSON", help="int8: labels of --images to decide on. Default: for training."),
    ] = None,
    trt: Annotated[
        bool, typer.Option("--trt", help="Also build a TensorRT engine, with a card, for this GPU.")
    ] = False,
    batch: Annotated[
        str | None,
        typer.Option("--batch", metavar="N,N,N", help="Engine: smallest, best and largest batch. Default: 1,8,32."),
    ] = None,
    workspace_gb: Annotated[
        float | None, typer.Option("--workspace-gb", help="Engine: most scratch memory. Default: all there is.")
    ] = None,
    optimization_level: Annotated[
        int | None,
        typer.Option("--builder-optimization-level", min=0, max=5, help="Engine: 5 searches longest. Default: 3."),
    ] = None,
    version_compatible: Annotated[
        bool, typer.Option("--version-compatible", help="Engine: also for later TensorRT of the same major version.")
    ] = False,
    hardware_compatible: Annotated[
        Literal["ampere+", "same"] | None,
        typer.Option("--hardware-compatible", help="Engine: also for later GPUs, or all of this compute capability."),
    ] = None,
    refit: Annotated[
        Literal["all", "individual"] | None,
        typer.Option("--refit", help="Engine: weights can be replaced later, all or each that has a name."),
    ] = None,
    strip: Annotated[
        bool, typer.Option("--strip", help="Engine: without weights, which compress refit puts in.")
    ] = False,
    timing_cache: Annotated[
        Path | None,
        typer.Option("--timing-cache", metavar="DIR", help="Engine: default ~/.cache/compress/timing."),
    ] = None,
    triton_repo: Annotated[
        Path | None,
        typer.Option("--triton-repo", metavar="DIR", help="Also add it to a model repository of NVIDIA Triton."),
    ] = None,
) -> None:
    """Write a checkpoint as ONNX files; build engines.

    They take pixels and give final boxes, and are compared with torch on real images before they get their names.
    Settings that are not given come from the recipe.yaml beside the checkpoint, or are the defaults.
    """
    if not checkpoint.is_file():
        raise UserError(f"{checkpoint}: no such file")
    engine = {
        "--workspace-gb": workspace_gb,
        "--builder-optimization-level": optimization_level,
        "--version-compatible": version_compatible,
        "--hardware-compatible": hardware_compatible,
        "--refit": refit,
        "--strip": strip,
    }
    if not trt:
        refuse({"--batch": batch, **engine, "--timing-cache": timing_cache}, "is about engines; add --trt")
    if strip and refit == "individual":
        raise UserError("--refit: an engine without weights gets all of them back; leave out individual or --strip")
    if strip and triton_repo is not None:
        raise UserError("--strip: Triton cannot serve an engine without weights; leave out --strip or --triton-repo")
    ship = engine_options(batch or "1,8,32", {**engine, "--refit": "all" if strip else refit}) if trt else None
    if checkpoint.suffix == ".onnx":
        if not trt and triton_repo is None:
            raise UserError(f"{checkpoint}: is an ONNX file already; give --trt or --triton-repo")
        making = {
            "--images": images,
            "--input-size": input_size,
            "--score-threshold": score_threshold,
            "--nms-threshold": nms_threshold,
            "--max-detections": max_detections,
            "--candidates": candidates,
            "--max-batch": max_batch,
            "--precision": precision,
            "--target": target,
            "--calibration": calibration,
            "--calibration-images": calibration_images,
            "--calibration-method": calibration_method,
            "--max-map-drop": max_map_drop,
            "--data": data,
        }
        refuse(making, f"is about making an ONNX file, and {checkpoint} is one already; give its checkpoint")
        if not trt:
            refuse({"--out": out}, "names the engine here; add --trt")
        next_command(*deliver(checkpoint, out, ship, timing_cache, triton_repo))
        return
    named, out = out is not None, out or checkpoint.with_suffix(".onnx")
    if out.suffix != ".onnx":
        raise UserError(f"--out: {out} does not end in .onnx")
    from deploy.core.files import need_place

    need_place(out)
    if images is not None:
        need_folder(images, "--images")
    given = {
        "input_size": _height_width(input_size),
        "score_threshold": score_threshold,
        "nms_threshold": nms_threshold,
        "max_detections": max_detections,
        "candidates": candidates,
        "max_batch": max_batch,
    }
    from compress.config.recipe import load_recipe

    beside = checkpoint.parent / "recipe.yaml"
    recipe = load_recipe(beside) if beside.is_file() else None
    settings = _deploy_settings(recipe, {key: value for key, value in given.items() if value is not None})
    wanted = _precisions(precision)
    quantized = [name for name in wanted if name in ("int8", "mixed")]
    int8 = {"target": target, "calibration": calibration, "images": calibration_images, "method": calibration_method}
    int8 = {key: value for key, value in int8.items() if value is not None}
    check_int8_options(quantized, int8, max_map_drop, data, images)
    grids = trained_grids(checkpoint, quantized, calibration_method, max_map_drop, data)
    if grids is not None:
        option = "--target" if target is not None else "--trt"
        if (target or ("tensorrt" if trt else grids.target)) != grids.target:
            raise UserError(
                f"{option}: {checkpoint} was trained for an int8 file in the format of {grids.target}; for another one "
                "train it again with deploy.int8.target"
            )
        int8["target"] = grids.target
    elif trt and target is None:
        int8["target"] = "tensorrt"
    settings = settings.model_copy(update={"int8": settings.int8.model_copy(update=int8)})
    if recipe is None and images is None:
        raise UserError(f"--images: there is no {beside} to take images from; give a folder")
    if recipe is None and settings.input_size is None:
        raise UserError(f"--input-size: there is no {beside} to take it from; give it, for example 800x1344")

    import tempfile

    from compress.run.export import SOURCES, export_checkpoint, file_for
    from deploy.graph.export import ExportMismatchError

    for name in wanted:
        need_place(file_for(out, name))
    if "fp32" in wanted and not named:
        keep_trained(checkpoint, out)
    if trt:
        from deploy.tensorrt.network import load_tensorrt

        load_tensorrt()  # before the export, which takes long
    how = quantizing(recipe, settings, max_map_drop, data, images, out) if quantized else None
    size, files = settings.input_size, [] if images is None else images_in(images)
    limits = None if recipe is None else (recipe.data.eval_short, recipe.data.long)
    written = [file_for(out, name) for name in wanted]
    following: tuple[Any, ...] = ("benchmark", *written, "--images", images)
    if recipe is not None and (images is None or size is None):  # these may lie on another machine
        split, of_recipe, canvas_size = _validation_images(recipe)
        files, size = files or of_recipe, size or canvas_size
        following = ("validate", *written, "--data", split.annotations, "--images", split.images)
        if len(written) > 1:
            following = (*following, "--reference", out if out in written else written[0])
    assert size is not None and files, "checked above"
    try:
        with tempfile.TemporaryDirectory() as folder:
            made: dict[str, Path] = {}
            for name in sorted({SOURCES[name] for name in wanted}, reverse=True):
                file = made[name] = file_for(out if name in wanted else Path(folder) / out.name, name)
                done = export_checkpoint(
                    checkpoint, file, settings, input_size=size, images=files, limits=limits, half=name == "fp16"
                )
                if name in wanted:
                    print(
                        f"{file}: {done.size_bytes / 1e6:.1f} MB; largest difference from torch: score "
                        f"{done.max_score_difference:.1e}, box {done.max_box_difference_px:.1e} px"
                    )
            if how is not None:
                for name in quantized:
                    if grids is not None:
                        quantize_trained_file(checkpoint, made[SOURCES[name]], file_for(out, name), settings, how)
                        continue
                    quantize_file(made[SOURCES[name]], file_for(out, name), how, settings.max_batch)
    except ExportMismatchError as error:
        gate_failed(f"{checkpoint}: {' '.join(str(error).split())}")
    if trt or triton_repo is not None:
        for name in wanted:
            deliver(file_for(out, name), None, ship, timing_cache, triton_repo)
    next_command(*following)


def _precisions(text: str | None) -> list[str]:
    names = [name.strip() for name in (text or "fp32").split(",")]
    for name in names:
        if name not in ("fp32", "fp16", "int8", "mixed"):
            raise UserError(f"--precision: '{name[:20]}' is none of fp32, fp16, int8, mixed")
    return list(dict.fromkeys(names))


def _validation_images(recipe: Recipe) -> tuple[Split, list[Path], tuple[int, int]]:
    """The recipe's validation set: where it is, its image files, and the canvas (height, width) that holds them."""
    from compress.data.coco import CocoDetection
    from compress.data.transforms import eval_transform
    from compress.run.data import canvas, splits

    _, split = splits(recipe.data, recipe.runs)
    transform = eval_transform(recipe.data.eval_short, recipe.data.long)
    images = CocoDetection(split.annotations, split.images, transform)
    files = [images.path(index) for index in range(len(images))]
    return split, files, canvas(images, recipe)


def _height_width(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    height, times, width = text.lower().partition("x")
    if not (times and height.isdecimal() and width.isdecimal()):
        raise UserError(f"--input-size: '{text}' is not HEIGHTxWIDTH, for example 800x1344")
    if max(len(height), len(width)) > 9:  # no number to compare with
        raise UserError("--input-size: at most 8192 pixels high and wide")
    if int(height) % 32 or int(width) % 32 or not int(height) or not int(width):
        raise UserError(f"--input-size: '{text}': height and width must be multiples of 32")
    return int(height), int(width)


def _deploy_settings(recipe: Recipe | None, given: dict[str, Any]) -> Deploy:
    """The deploy section of the recipe, or the defaults; with what was given on top."""
    from pydantic import ValidationError

    from compress.config.deploy import Deploy

    base = Deploy() if recipe is None else recipe.deploy
    try:
        return Deploy.model_validate({**base.model_dump(), **given})
    except ValidationError as error:
        raise UserError("; ".join(map(_deploy_problem, error.errors()))) from None


def _deploy_problem(problem: Any) -> str:
    key = problem.get("ctx", {}).get("key") or problem["loc"][0]
    option, message = f"--{str(key).replace('_', '-')}", problem["msg"].removeprefix("Input ")
    return f"{option}: {message}" if problem["type"] == "rule" else f"{option}: {problem['input']} {message}"
