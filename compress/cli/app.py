"""The command line. Every function here is one command; its signature is what `--help` shows.

Exit codes: 0 done, 1 a gate failed, 2 bad input, 130 interrupted. A user's mistake is one `error: …` line on
stderr (one a problem for a recipe with several), never a traceback; a traceback is our mistake.

Imports of the packages that do the work stand inside the functions: `--help` answers at once, and commands on
exported files run where torch is not installed.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

from compress import __version__
from deploy.core.errors import LocalUserError, UserError

if TYPE_CHECKING:
    from compress.config.data import Split
    from compress.config.deploy import Deploy
    from compress.config.recipe import Recipe
    from compress.pseudo.parts import Shard
    from compress.run.export import Quantizing
    from deploy.quantize.file import QuantizeReport
    from deploy.quantize.grids import Grids
    from deploy.runtimes.base import Runner
    from deploy.tensorrt.card import EngineCard, EngineOptions

PROVIDERS = ("cpu", "cuda", "tensorrt")
Scenario = Literal["single-stream", "multi-stream", "offline", "server"]

app = typer.Typer(
    name="compress",
    help="Distill a large object detector into a small one that ships, and prove that it survived.",
    epilog="Start with: compress quickstart",
    rich_markup_mode=None,  # plain help: loading rich takes as long as everything else together
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
data_app = typer.Typer(help="Convert, check and generate data.", rich_markup_mode=None, add_completion=False)
app.add_typer(data_app, name="data")

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML file; recipes/ has examples.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one setting, e.g. train.epochs=3. Repeatable."),
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue an interrupted run, bit for bit.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Build everything and take one step on made-up data; keep nothing.")
]
Devices = Annotated[int | None, typer.Option("--devices", min=1, metavar="N", help="Training processes, one a device.")]
Artifacts = Annotated[list[Path], typer.Argument(metavar="ARTIFACT...", help="Exported .onnx files, or .engine files.")]
Providers = Annotated[
    str,
    typer.Option(
        "--provider",
        metavar="NAME,NAME",
        help="Where ONNX Runtime runs: cpu, cuda, tensorrt. Several: on each of them.",
    ),
]
Fallback = Annotated[
    bool, typer.Option("--allow-fallback", help="Let another provider run when the one asked for cannot.")
]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="Threads of ONNX Runtime on the CPU.")]
TrtCache = Annotated[
    Path | None,
    typer.Option(
        "--trt-cache",
        metavar="DIR",
        help="TensorRT provider: folder of its engines. Default: ~/.cache/compress/onnxruntime.",
    ),
]
EpContext = Annotated[
    bool, typer.Option("--ep-context", help="TensorRT provider: keep the compiled model, and open it when it is there.")
]
CudaGraph = Annotated[bool, typer.Option("--cuda-graph", help="Engines: launch all work of a batch with one call.")]
JsonOut = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write the results there.")]


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())


# ------------------------------------------------------------------------------------------------- recipes


@app.command()
def quickstart(settings: Set = None) -> None:
    """The whole path on generated data, in minutes; continues what was interrupted."""
    from importlib import resources

    packaged = resources.files("compress") / "assets" / "quickstart.yaml"
    with resources.as_file(packaged) as path:
        recipe = _recipe(path, settings)
    _run(recipe, resume=True)


@app.command()
def run(
    recipe: RecipeFile,
    settings: Set = None,
    resume: Resume = False,
    dry_run: DryRun = False,
    devices: Devices = None,
) -> None:
    """The whole path of a recipe, from data to report."""
    _run(_recipe(recipe, settings, devices), resume=resume, dry_run=dry_run, again=("run", str(recipe)))


@app.command()
def distill(
    recipe: RecipeFile,
    settings: Set = None,
    resume: Resume = False,
    dry_run: DryRun = False,
    devices: Devices = None,
) -> None:
    """Train a recipe's student with its teacher."""
    loaded = _recipe(recipe, settings, devices)
    if not loaded.methods.enabled() and loaded.pseudo_labels is None:
        raise UserError(
            f"{recipe}: nothing to distill with; add a method under methods, or pseudo_labels, or use compress train"
        )
    _train(loaded, recipe, resume=resume, dry_run=dry_run, distillation=True)


@app.command()
def train(
    recipe: RecipeFile,
    settings: Set = None,
    resume: Resume = False,
    dry_run: DryRun = False,
    devices: Devices = None,
) -> None:
    """Train a recipe's student alone."""
    loaded = _recipe(recipe, settings, devices)
    if loaded.pseudo_labels is not None and _is_first_process():
        print(f"{recipe}: pseudo_labels is not used here, no teacher labels; compress distill and compress run use it")
    _train(loaded, recipe, resume=resume, dry_run=dry_run, distillation=False)


def _recipe(path: Path, settings: Sequence[str] | None, devices: int | None = None) -> Recipe:
    from compress.config.recipe import load_recipe

    recipe = load_recipe(path, settings or ())
    if devices is None:
        return recipe
    more = [f"train.devices={devices}"]
    if recipe.teacher is not None and recipe.teacher.train is not None:
        more.append(f"teacher.train.devices={devices}")
    return load_recipe(path, [*(settings or ()), *more])


def _run(recipe: Recipe, *, resume: bool, dry_run: bool = False, again: tuple[str, ...] = ()) -> None:
    from compress.run import pipeline

    run_dir = pipeline.run(recipe, resume=resume, dry_run=dry_run)
    if not _is_first_process():
        return
    if dry_run:
        _next(*again)
        return
    if recipe.student.detector == "faster_rcnn":  # never exported, as the pipeline has said: no report, no gate
        return
    report = json.loads((run_dir / "report.json").read_text(encoding="utf-8"))
    failed = [artifact["file"] for artifact in report["artifacts"] if artifact["gate"] == "fail"]
    print(f"report: {run_dir / 'report.html'}")
    if failed:
        _gate_failed(f"{', '.join(failed)} lost more than {recipe.deploy.max_map_drop:g} mAP")
    _next("benchmark", run_dir / "student.onnx", "--batch", "1,8")


def _train(recipe: Recipe, path: Path, *, resume: bool, dry_run: bool, distillation: bool) -> None:
    from compress.run import pipeline

    run_dir = pipeline.distill(recipe, resume=resume, dry_run=dry_run, distillation=distillation)
    if dry_run:
        _next("distill" if distillation else "train", path)
    elif recipe.student.detector == "faster_rcnn":
        if _is_first_process():
            print(f"weights: {run_dir / 'student.safetensors'}; a faster_rcnn cannot be exported")
    elif distillation and recipe.deploy.int8.qad is not None:
        _next("export", run_dir / "student.qad.safetensors", "--precision", "int8")
    else:
        _next("export", run_dir / "student.safetensors")


# ---------------------------------------------------------------------------------------------------- data


@data_app.callback(invoke_without_command=True)
def _data(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


@data_app.command("convert")
def convert(
    layout: Annotated[Literal["yolo", "voc"], typer.Argument(metavar="yolo|voc", help="What SOURCE holds.")],
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="Folder of images and label files.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="COCO JSON to write.")],
    names: Annotated[
        str | None,
        typer.Option("--names", metavar="NAMES", help="yolo: class names a,b,c or the dataset's data.yaml."),
    ] = None,
) -> None:
    """Write YOLO or Pascal VOC labels as COCO JSON."""
    if out.suffix != ".json":
        raise UserError(f"{out}: OUT is a JSON file, for example {out.with_suffix('.json')}")
    if layout == "yolo" and names is None:
        raise UserError("--names: yolo files only have class numbers; give the names, or the data.yaml")
    if layout == "voc" and names is not None:
        raise UserError("--names: voc files hold the class names themselves; leave it out")
    from compress.data.convert import from_voc, from_yolo
    from deploy.core.files import need_place

    need_place(out)
    converted = from_voc(source, out) if names is None else from_yolo(source, _class_names(names), out)
    print(f"{out}: {converted.images} images, {converted.annotations} boxes")
    _next("data", "check", out, "--images", converted.image_folder)


def _class_names(text: str) -> list[str]:
    """Names from `a,b,c`, or from `names` of a YOLO data.yaml: a list, or a mapping from number to name."""
    path = Path(text)
    if path.suffix not in (".yaml", ".yml"):
        names = [name.strip() for name in text.split(",")]
    else:
        import yaml

        try:  # all scalars as text: a class may be called `no` or 2020-01-01
            found = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)["names"]
        except OSError as error:
            raise UserError(f"--names: {path}: {error.strerror}") from None
        except (KeyError, TypeError):
            raise UserError(f"--names: {path}: no key 'names' in it") from None
        except (yaml.YAMLError, ValueError, OverflowError, RecursionError):
            raise UserError(f"--names: {path}: not a YAML file in UTF-8") from None
        if isinstance(found, dict) and set(found) == {str(number) for number in range(len(found))}:
            found = [found[str(number)] for number in range(len(found))]
        names = found if isinstance(found, list) else []
    if not names or not all(isinstance(name, str) and name for name in names):
        raise UserError(f"--names: {text}: needs names numbered from 0 without a gap, and none empty")
    return names


@data_app.command("check")
def check(
    annotations: Annotated[Path, typer.Argument(metavar="ANNOTATIONS", help="COCO instances JSON.")],
    images: Annotated[Path, typer.Option("--images", metavar="DIR", help="Folder of the images.")],
) -> None:
    """Find what breaks training.

    One line for each problem; exit code 1 if there is one."""
    _need_folder(images, "--images")
    from compress.data.check import check as find_problems

    problems = find_problems(annotations, images)
    for problem in problems:
        print(problem)
    errors = sum(problem.level == "error" for problem in problems)
    if errors:
        _gate_failed(f"{annotations}: {errors} problem{'s' * (errors > 1)}")
    print(f"{annotations}: fit for training; in a recipe, data.train.annotations, with data.train.images: {images}")
    _next("run", "--help")


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
    _next("data", "check", out / "train.json", "--images", out / "images")


@app.command("pseudo-label")
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
    tau: Annotated[float, typer.Option("--tau", help="Lowest score of a label.")] = 0.4,
    tau_ignore: Annotated[
        float, typer.Option("--tau-ignore", help="From here up to tau a box is a region to ignore.")
    ] = 0.2,
    thresholds_from: Annotated[
        Path | None,
        typer.Option("--thresholds-from", metavar="JSON", help="Labelled split: per class the tau with the best F1."),
    ] = None,
    thresholds_root: Annotated[
        Path | None, typer.Option("--thresholds-root", metavar="DIR", help="Image folder of that split.")
    ] = None,
    merge: Annotated[
        Literal["nms", "wbf"], typer.Option("--merge", help="Teachers that agree: the best box, or their mean.")
    ] = "nms",
    iou: Annotated[float, typer.Option("--iou", help="Boxes agree above this IoU.")] = 0.6,
    categories: Annotated[
        Path | None,
        typer.Option(
            "--categories", metavar="JSON", help="COCO JSON with the classes. Default: the teachers' together."
        ),
    ] = None,
    class_map: Annotated[
        Path | None,
        typer.Option("--class-map", metavar="JSON", help='{"name at a teacher": "name here", "other": null to drop}'),
    ] = None,
    short: Annotated[
        int, typer.Option("--short", help="Shorter side after the resize, as the teachers learned.")
    ] = 800,
    long: Annotated[int, typer.Option("--long", help="Limit of the longer side.")] = 1333,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Images at once.")] = 8,
    workers: Annotated[int, typer.Option("--workers", min=0, help="Processes that decode.")] = 2,
    shard: Annotated[
        str | None, typer.Option("--shard", metavar="I/N", help="Do share I (from 1) of N. Default: torchrun's rank.")
    ] = None,
    skip_unreadable: Annotated[
        bool, typer.Option("--skip-unreadable", help="Leave broken images out, listed in `skipped`.")
    ] = False,
    resume: Resume = False,
) -> None:
    """Let teachers label images: COCO JSON with scores, regions to ignore and the classes looked for."""
    from compress.pseudo.images import images_in
    from compress.pseudo.label import Labelled, Settings
    from compress.pseudo.label import pseudo_label as label

    settings = Settings(tau, tau_ignore, merge, iou, short, long, batch)
    if thresholds_root is not None and thresholds_from is None:
        raise UserError("--thresholds-root: belongs to --thresholds-from, which is not given")
    summary = label(
        teachers,
        images_in(images, root),
        out,
        settings,
        categories=categories,
        table=None if class_map is None else _class_table(class_map),
        thresholds_from=None if thresholds_from is None else Labelled(thresholds_from, thresholds_root),
        shard=_shard(shard),
        workers=workers,
        skip_unreadable=skip_unreadable,
        resume=resume,
        quiet=not _is_first_process(),
    )
    if summary is not None:
        print(
            f"{out}: {summary.labels} labels and {summary.regions} regions to ignore in {summary.images} images, "
            f"{summary.empty} of them without any; {summary.skipped} images left out"
        )
    elif _is_first_process():
        print(f"{out}: complete" if out.exists() else f"{out}: this shard is done; the last one writes the file")
    if out.exists():
        _next("data", "check", out, "--images", images if images.is_dir() else root or images.parent)


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
        table = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--class-map: {file}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise UserError(f"--class-map: {file}: not JSON in UTF-8") from None
    if not isinstance(table, dict) or not all(name is None or isinstance(name, str) for name in table.values()):
        raise UserError(f'--class-map: {file}: must be an object like {{"kitten": "cat", "bus": null}}')
    return table


# --------------------------------------------------------------------------------------------------- files


@app.command()
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
        _refuse({"--batch": batch, **engine, "--timing-cache": timing_cache}, "is about engines; add --trt")
    if strip and refit == "individual":
        raise UserError("--refit: an engine without weights gets all of them back; leave out individual or --strip")
    if strip and triton_repo is not None:
        raise UserError("--strip: Triton cannot serve an engine without weights; leave out --strip or --triton-repo")
    ship = _engine_options(batch or "1,8,32", {**engine, "--refit": "all" if strip else refit}) if trt else None
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
        _refuse(making, f"is about making an ONNX file, and {checkpoint} is one already; give its checkpoint")
        if not trt:
            _refuse({"--out": out}, "names the engine here; add --trt")
        _next(*_deliver(checkpoint, out, ship, timing_cache, triton_repo))
        return
    named, out = out is not None, out or checkpoint.with_suffix(".onnx")
    if out.suffix != ".onnx":
        raise UserError(f"--out: {out} does not end in .onnx")
    from deploy.core.files import need_place

    need_place(out)
    if images is not None:
        _need_folder(images, "--images")
    given = {
        "input_size": _height_width(input_size),
        "score_threshold": score_threshold,
        "nms_threshold": nms_threshold,
        "max_detections": max_detections,
        "candidates": candidates,
        "max_batch": max_batch,
    }
    beside = checkpoint.parent / "recipe.yaml"
    recipe = _recipe(beside, None) if beside.is_file() else None
    settings = _deploy_settings(recipe, {key: value for key, value in given.items() if value is not None})
    wanted = _precisions(precision)
    quantized = [name for name in wanted if name in ("int8", "mixed")]
    int8 = {"target": target, "calibration": calibration, "images": calibration_images, "method": calibration_method}
    int8 = {key: value for key, value in int8.items() if value is not None}
    _check_int8_options(quantized, int8, max_map_drop, data, images)
    grids = _trained_grids(checkpoint, quantized, calibration_method, max_map_drop, data)
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
        _keep_trained(checkpoint, out)
    if trt:
        from deploy.tensorrt.network import load_tensorrt

        load_tensorrt()  # before the export, which takes long
    how = _quantizing(recipe, settings, max_map_drop, data, images, out) if quantized else None
    size, files = settings.input_size, [] if images is None else _images_in(images)
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
                        _quantize_trained(checkpoint, made[SOURCES[name]], file_for(out, name), settings, how)
                        continue
                    _quantize(made[SOURCES[name]], file_for(out, name), how, settings.max_batch)
    except ExportMismatchError as error:
        _gate_failed(f"{checkpoint}: {' '.join(str(error).split())}")
    if trt or triton_repo is not None:
        for name in wanted:
            _deliver(file_for(out, name), None, ship, timing_cache, triton_repo)
    _next(*following)


def _refuse(options: dict[str, Any], why: str) -> None:
    """Options that would do nothing are mistakes. options: name → value, None or False where it was not given."""
    for option, value in options.items():
        if value is not None and value is not False:
            raise UserError(f"{option}: {why}")


def _engine_options(batch: str, given: dict[str, Any]) -> EngineOptions:
    """given: option → value, None where the default holds."""
    from pydantic import ValidationError

    from deploy.tensorrt.card import EngineOptions

    sizes = _batch_sizes(batch)
    if len(sizes) > 3 or sizes != sorted(sizes):
        raise UserError(f"--batch: '{batch}': an engine has a smallest, a best and a largest batch, for example 1,8,32")
    smallest, largest = sizes[0], sizes[-1]
    fields = {
        option.removeprefix("--").removeprefix("builder-").replace("-", "_"): value
        for option, value in given.items()
        if value is not None
    }
    try:
        return EngineOptions(batches=(smallest, sizes[1] if len(sizes) == 3 else largest, largest), **fields)
    except ValidationError as error:
        problem = error.errors()[0]
        option = f"--{str(problem['loc'][0]).replace('_', '-')}: " if problem["loc"] else ""
        raise UserError(f"{option}{problem['msg'].removeprefix('Value error, ')}") from None


def _deliver(
    onnx: Path, out: Path | None, options: EngineOptions | None, timing_cache: Path | None, triton_repo: Path | None
) -> tuple[Any, ...]:
    """Build the engine of an ONNX file and put it, or the file, into a model repository. The next command."""
    artifact = onnx
    if options is not None:
        from compress.console import progress as progress_of
        from deploy.tensorrt.build import TIMING_CACHES, build_engine

        artifact = onnx.with_suffix(".engine") if out is None else out
        with progress_of(f"building {artifact.name}") as progress:
            card = build_engine(onnx, artifact, options, timing_caches=timing_cache or TIMING_CACHES, progress=progress)
        print(f"{artifact}: {_engine_in_words(card)}")
    if triton_repo is not None:
        from deploy.serve.triton_repo import write_triton_model

        added = write_triton_model(triton_repo, artifact)
        print(f"{added.folder}: version {added.version}, backend {added.backend}, batches up to {added.max_batch}")
    return ("benchmark", artifact)


def _engine_in_words(card: EngineCard) -> str:
    share = ", ".join(f"{part:.0%} {name}" for name, part in card.network.share.items())
    layers = f"{card.layers.count} layers" if card.layers is not None else f"layers not known ({card.layers_missing})"
    smallest, best, largest = card.options.batches
    return (
        f"{card.engine_bytes / 1e6:.1f} MB in {card.build_seconds:.0f} s with {card.machine.library} "
        f"{card.machine.version} for {card.machine.gpu or 'no GPU'}; batch {smallest} to {largest}, best at {best}; "
        f"convolutions and matrix products {share}; {layers}"
    )


@app.command()
def refit(
    engine: Annotated[Path, typer.Argument(metavar="ENGINE", help="Built with --refit or --strip.")],
    onnx: Annotated[Path, typer.Argument(metavar="MODEL.onnx", help="The same student with other weights.")],
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Default: over ENGINE.")] = None,
) -> None:
    """Put the weights of an ONNX file into an engine, without building it again."""
    from deploy.tensorrt.build import refit_engine

    card = refit_engine(engine, onnx, out)
    print(f"{out or engine}: {card.engine_bytes / 1e6:.1f} MB with the weights of {onnx}")
    _next("benchmark", out or engine)


def _precisions(text: str | None) -> list[str]:
    names = [name.strip() for name in (text or "fp32").split(",")]
    for name in names:
        if name not in ("fp32", "fp16", "int8", "mixed"):
            raise UserError(f"--precision: '{name[:20]}' is none of fp32, fp16, int8, mixed")
    return list(dict.fromkeys(names))


def _check_int8_options(
    quantized: Sequence[str], int8: dict[str, Any], max_map_drop: float | None, data: Path | None, images: Path | None
) -> None:
    """Options that would do nothing are mistakes."""
    options = {"target": "--target", "calibration": "--calibration"}
    options |= {"images": "--calibration-images", "method": "--calibration-method"}
    given = {options[key]: value for key, value in int8.items()} | {"--max-map-drop": max_map_drop}
    if not quantized:
        _refuse(given, "is about int8 files; add --precision fp32,int8")
    if int8.get("target") == "cpu" and "mixed" in quantized:
        raise UserError("--target: mixed files are for TensorRT only; leave out mixed or --target cpu")
    if data is not None and (max_map_drop is None or images is None):
        raise UserError("--data: is what --max-map-drop decides on; give --max-map-drop, and --images, its folder")
    if data is not None and not data.is_file():
        raise UserError(f"--data: {data}: no such file")
    if max_map_drop is not None:
        _need_finite(max_map_drop, "--max-map-drop")


def _trained_grids(
    checkpoint: Path, quantized: Sequence[str], method: str | None, max_map_drop: float | None, data: Path | None
) -> Grids | None:
    """What quantization-aware distillation left beside the checkpoint, for its int8 file; None: there is nothing."""
    file = checkpoint.with_suffix(".json")
    if not quantized or not file.is_file():
        return None
    from compress.run.qad import load_grids

    grids = load_grids(file)
    settled = f"scales and float layers are those that were trained, in {file}"
    _refuse({"--calibration-method": method, "--max-map-drop": max_map_drop, "--data": data}, settled)
    if "mixed" in quantized:
        raise UserError(f"--precision: {file} was trained for an int8 file; a mixed one is made of student.safetensors")
    return grids


def _keep_trained(checkpoint: Path, out: Path) -> None:
    """`student.qad.onnx` of a run is an int8 file, which a float file of that name must not replace."""
    if not checkpoint.with_suffix(".json").is_file() or not out.is_file():
        return
    from deploy.core.card import card_from_file

    if card_from_file(out).quantization is not None:
        raise UserError(f"--out: {out} is the int8 file of {checkpoint}; give the float file another name")


def _quantizing(
    recipe: Recipe | None,
    settings: Deploy,
    max_map_drop: float | None,
    data: Path | None,
    images: Path | None,
    out: Path,
) -> Quantizing:
    """What int8 files are made with: calibration images, apart from the validation images, and what decides."""
    from compress.run.export import Quantizing, calibration_of, check_deciding, deciding_split

    if recipe is None and settings.int8.calibration is None:
        raise UserError("--calibration: there is no recipe.yaml to take training images from; give a folder or a JSON")
    if recipe is None and max_map_drop is not None and data is None:
        raise UserError("--max-map-drop: needs labels to decide on; give --data and --images")
    chosen = calibration_of(recipe, settings.int8)
    if max_map_drop is None:
        return Quantizing(settings.int8, chosen)
    if data is not None and images is not None:
        split = (data, images)
        check_deciding(*split, chosen)
    else:
        assert recipe is not None, "checked above"
        from compress.run.data import labelled_split

        count = settings.int8.deciding_images
        split = deciding_split(labelled_split(recipe), chosen, count, out.with_suffix(".deciding.json"))
    return Quantizing(settings.int8, chosen, split, max_map_drop)


def _quantize(source: Path, out: Path, how: Quantizing, max_batch: int) -> None:
    from compress.console import open_console
    from compress.console import progress as progress_of
    from compress.run.export import BudgetError, quantize_export
    from deploy.quantize.picture import sensitivity_table, trials_table

    try:
        with progress_of("quantizing") as progress:
            report, found = quantize_export(source, out, how, max_batch=max_batch, progress=progress)
    except BudgetError as error:
        if out.is_file():  # of an earlier export, which may have had another budget
            out.unlink()
            print(f"{out}: removed; it was made by an earlier export")
        open_console().print(sensitivity_table(error.result))
        open_console().print(trials_table(error.result))
        _gate_failed(str(error))
    if found is not None:
        if found.sensitivities:
            open_console().print(sensitivity_table(found))
        open_console().print(trials_table(found))
        print(f"the search: {out.with_suffix('.guided.json')}, {out.with_suffix('.guided.svg')}")
    _say_quantized(out, report)


def _quantize_trained(checkpoint: Path, source: Path, out: Path, settings: Deploy, how: Quantizing) -> None:
    from compress.run.qad import grids_file, quantize_trained

    report = quantize_trained(checkpoint, source, out, settings, how.images)
    _say_quantized(out, report, f" on the trained scales of {grids_file(checkpoint)}")


def _say_quantized(out: Path, report: QuantizeReport, scales: str = "") -> None:
    print(
        f"{out}: {report.size_bytes / 1e6:.1f} MB, for {report.target}; {report.layers} layers in int8{scales}, "
        f"{len(report.float_layers)} in float; output error on {report.images} calibration images: scores "
        f"{report.score_error:.1%}, boxes {report.box_error:.1%}"
    )


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


@app.command()
def validate(
    artifacts: Artifacts,
    data: Annotated[Path, typer.Option("--data", metavar="JSON", help="COCO instances JSON.")],
    images: Annotated[Path, typer.Option("--images", metavar="DIR", help="Folder of the images.")],
    reference: Annotated[
        Path | None,
        typer.Option(
            "--reference",
            metavar="FILE",
            help="Compare with this file and gate on the difference. Default with several providers: the first file.",
        ),
    ] = None,
    max_map_drop: Annotated[
        float | None,
        typer.Option("--max-map-drop", min=0, help="The gate: mAP points below the reference. Default: 0.5."),
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1)] = 8,
    provider: Providers = "cpu",
    allow_fallback: Fallback = False,
    threads: Threads = None,
    trt_cache: TrtCache = None,
    ep_context: EpContext = False,
    cuda_graph: CudaGraph = False,
    json_out: JsonOut = None,
) -> None:
    """Measure the mAP of exported files, with a gate.

    With --provider cpu,cuda,tensorrt each .onnx file runs on each of them; the reference is that file on the first one.
    Exit code 1 if a file loses too much against the reference."""
    _need_folder(images, "--images")
    if not data.is_file():
        raise UserError(f"--data: {data}: no such file")
    providers = _provider_names(provider)
    if reference is None and len(providers) > 1:
        reference = artifacts[0]
    if reference is None and max_map_drop is not None:
        raise UserError("--max-map-drop: needs --reference, the file to compare with")
    max_map_drop = 0.5 if max_map_drop is None else max_map_drop
    _need_finite(max_map_drop, "--max-map-drop")
    _need_place(json_out)
    files = [*artifacts, *([reference] if reference is not None and reference not in artifacts else [])]
    on_gpu = _gpu_options(files, providers, trt_cache, ep_context, cuda_graph, max_batch=batch_size)
    runners = _open(files, providers, allow_fallback, threads, on_gpu)
    from compress.console import open_console
    from compress.console import progress as progress_of
    from deploy import validate as validation

    with progress_of("validating") as progress:
        results = validation.validate(
            runners,
            data,
            images,
            reference=None if reference is None else _runner_name(reference, providers[0], providers),
            max_map_drop=max_map_drop,
            batch_size=batch_size,
            progress=progress,
        )
    open_console().print(validation.results_table(results))
    if json_out is not None:
        validation.write_results(json_out, results)
    failed = [result.name for result in results if result.gate == "fail"]
    for result in results:
        if result.diagnosis is not None:
            print(f"{result.name}: {result.diagnosis}")
    if failed:
        _gate_failed(f"gate of {max_map_drop:g} mAP points: {', '.join(failed)}")
    _next("benchmark", *files, "--images", images)


def _provider_names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in PROVIDERS:
            raise UserError(f"--provider: unknown provider '{name[:60]}': choose from {', '.join(PROVIDERS)}")
        if names.count(name) > 1:
            raise UserError(f"--provider: {name} is given twice")
    return names


def _runner_name(file: Path, provider: str, providers: Sequence[str]) -> str:
    """The path as it was given; with the provider behind it when there are several to tell apart."""
    return str(file) if len(providers) == 1 or file.suffix == ".engine" else f"{file} ({provider})"


def _gpu_options(
    files: Sequence[Path],
    providers: Sequence[str],
    trt_cache: Path | None,
    ep_context: bool,
    cuda_graph: bool,
    *,
    max_batch: int,
) -> dict[str, Any]:
    """Arguments of `open_runner`. Options that would do nothing are mistakes."""
    for option, given in (("--trt-cache", trt_cache is not None), ("--ep-context", ep_context)):
        if given and ("tensorrt" not in providers or all(file.suffix == ".engine" for file in files)):
            raise UserError(
                f"{option}: is about .onnx files on the TensorRT provider; give one and --provider tensorrt"
            )
    if cuda_graph and all(file.suffix != ".engine" for file in files):
        raise UserError("--cuda-graph: is about engines, and none is given; make one with compress export --trt")
    options: dict[str, Any] = {"cuda_graph": True} if cuda_graph else {}
    if trt_cache is not None or ep_context:
        from deploy.runtimes.onnx import TensorRTProvider

        cache = trt_cache or TensorRTProvider.cache
        options["tensorrt"] = TensorRTProvider(cache, ep_context=ep_context, max_batch=max_batch)
    return options


def _open(
    files: Sequence[Path],
    providers: Sequence[str],
    allow_fallback: bool,
    threads: int | None,
    on_gpu: dict[str, Any],
) -> dict[str, Runner]:
    """A runner for each ONNX file on each provider, and for each engine, which TensorRT alone can run, by name."""
    for file in files:
        if not file.is_file():
            raise UserError(f"{file}: no such file")
        if file.suffix not in (".onnx", ".engine"):
            raise UserError(f"{file}: neither .onnx nor .engine; make one with compress export")
        if files.count(file) > 1:
            raise UserError(f"{file}: given twice")
    from deploy.runtimes.open import open_runner

    return {
        _runner_name(file, provider, providers): open_runner(
            file, (provider,), allow_fallback=allow_fallback, threads=threads, **on_gpu
        )
        for file in files
        for provider in (providers[:1] if file.suffix == ".engine" else providers)
    }


def _images_in(folder: Path) -> list[Path]:
    from deploy.core.image import IMAGE_SUFFIXES

    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise UserError(f"--images: {folder}: no images in it ({', '.join(IMAGE_SUFFIXES)})")
    return files


def _need_folder(folder: Path, option: str) -> None:
    if not folder.is_dir():
        raise UserError(f"{option}: {folder}: no such folder")


def _need_place(file: Path | None, option: str = "--json") -> None:
    """Find out before the long work that the results can be written."""
    if file is None:
        return
    from deploy.core.files import need_place

    if not file.absolute().parent.exists():
        raise UserError(f"{option}: {file}: its folder does not exist")
    need_place(file)


def _need_finite(number: float, option: str) -> None:
    if not math.isfinite(number):  # infinity and NaN pass typer's bounds
        raise UserError(f"{option}: needs a finite number, got {number}")


@app.command()
def benchmark(
    artifacts: Annotated[
        list[Path] | None, typer.Argument(metavar="ARTIFACT...", help="Exported files; measured in turn.")
    ] = None,
    images: Annotated[
        Path | None, typer.Option("--images", metavar="DIR", help="Images. Default: eight drawn ones.")
    ] = None,
    batch: Annotated[
        str | None, typer.Option("--batch", metavar="N,N", help="Batch sizes. Default: 1; offline: 1,2,4,8,16,32.")
    ] = None,
    scope: Annotated[
        str | None,
        typer.Option(
            "--scope",
            metavar="NAME,NAME",
            help="compute, h2d+compute+d2h, end_to_end, preprocess. Default: the first three; server: end_to_end.",
        ),
    ] = None,
    scenario: Annotated[Scenario, typer.Option("--scenario", help="How calls follow each other.")] = "single-stream",
    streams: Annotated[
        int | None, typer.Option("--streams", min=1, metavar="N", help="Sessions that work at the same time.")
    ] = None,
    rate: Annotated[
        str | None, typer.Option("--rate", metavar="R,R", help="Server: mean requests a second, at random times.")
    ] = None,
    latency_bound: Annotated[
        float | None,
        typer.Option("--latency-bound", metavar="MS", help="Server: find the highest rate with p99 within this."),
    ] = None,
    seconds: Annotated[float, typer.Option("--seconds", min=0.1, help="For each measurement.")] = 5.0,
    rounds: Annotated[int, typer.Option("--rounds", min=2, help="Turns of each file in a measurement.")] = 20,
    warm_up: Annotated[float, typer.Option("--warm-up", min=0, help="Most seconds before each.")] = 10.0,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option("--compare", metavar="OLD.json NEW.json", help="Measure nothing; compare two results."),
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            "--tolerance",
            min=0,
            metavar="PERCENT",
            help="Exit with 1 when significantly slower by more: NEW than OLD (default 2), files than the first.",
        ),
    ] = None,
    provider: Providers = "cpu",
    allow_fallback: Fallback = False,
    threads: Threads = None,
    trt_cache: TrtCache = None,
    ep_context: EpContext = False,
    cuda_graph: CudaGraph = False,
    json_out: JsonOut = None,
    markdown: Annotated[
        Path | None, typer.Option("--markdown", metavar="FILE", help="Also write a document there, and its picture.")
    ] = None,
) -> None:
    """Measure the latency of exported files, or compare two results.

    Rounds of all files are interleaved, so that they meet the same machine. Exit code 1 if a file is significantly
    slower than --tolerance allows.
    """
    if tolerance is not None:
        _need_finite(tolerance, "--tolerance")
    if compare is not None:
        if artifacts or json_out is not None or markdown is not None:
            raise UserError("--compare: takes two results and nothing else: no ARTIFACT, --json or --markdown")
        _compare_results(*compare, tolerance=(2.0 if tolerance is None else tolerance) / 100)
        return
    if not artifacts:
        raise UserError("ARTIFACT: name exported files to measure, or two results with --compare OLD.json NEW.json")
    providers = _provider_names(provider)
    if tolerance is not None and (len(artifacts) * len(providers) < 2 or scenario == "server"):
        raise UserError("--tolerance: needs --compare, or several files that are measured in turn")
    sessions = _streams(scenario, streams)
    rates = _rates(scenario, rate, latency_bound)
    batch_sizes = _batch_sizes(batch or ("1,2,4,8,16,32" if scenario == "offline" else "1"))
    if scenario == "server" and len(batch_sizes) > 1:
        raise UserError("--batch: the server scenario takes one number, the most requests handled together")
    _need_finite(seconds, "--seconds")
    _need_finite(warm_up, "--warm-up")
    if images is not None:
        _need_folder(images, "--images")
    _need_place(json_out)
    _need_place(markdown, "--markdown")
    if markdown is not None and markdown.suffix != ".md":
        raise UserError(f"--markdown: {markdown} does not end in .md")
    from deploy import latency

    scopes = _scopes(scope, scenario)
    if sessions > 1 and threads is None and "cpu" in providers:
        threads = max(1, _usable_cores() // sessions)
        print(f"--threads: {threads} for each of {sessions} sessions")
    on_gpu = _gpu_options(artifacts, providers, trt_cache, ep_context, cuda_graph, max_batch=max(batch_sizes))
    opened = [_open(artifacts, providers, allow_fallback, threads, on_gpu) for _ in range(sessions)]
    runners = {name: [session[name] for session in opened] for name in opened[0]}
    from compress.console import open_console
    from compress.console import progress as progress_of

    with _image_files(images, opened[0]) as files, progress_of("measuring") as progress:
        if scenario == "server":
            measured = latency.benchmark_server(
                runners, files, rates_ips=rates, bound_ms=latency_bound, batch_size=batch_sizes[0], scope=scopes[0],
                seconds=seconds, warm_up_seconds=warm_up, progress=progress,
            )  # fmt: skip
        else:
            measured = latency.benchmark(
                runners, files, batch_sizes=batch_sizes, scopes=scopes, scenario=scenario, seconds=seconds,
                rounds=rounds, warm_up_seconds=warm_up, tolerance=(tolerance or 0.0) / 100, progress=progress,
            )  # fmt: skip
    console = open_console()
    if measured.cells:
        console.print(latency.report_table(measured))
    if measured.comparisons:
        console.print(latency.comparison_table(measured.comparisons, tolerance=(tolerance or 0.0) / 100))
    for line in [*latency.offline_lines(measured.cells), *latency.bounded_lines(measured.bounded)]:
        print(line)
    for note in measured.notes:
        print(f"note: {note}")
    for warning in measured.warnings:
        print(f"warning: {warning}")
    if json_out is not None:
        latency.write_report(json_out, measured)
    if markdown is not None:
        latency.write_markdown(markdown, measured)
    if tolerance is not None:
        _need_fast_enough(latency.slower(measured.comparisons), tolerance)
    _next("doctor")


def _compare_results(old: Path, new: Path, *, tolerance: float) -> None:
    from compress.console import open_console
    from deploy import latency

    comparisons, differences = latency.compare_reports(
        latency.read_report(old), latency.read_report(new), tolerance=tolerance
    )
    open_console().print(latency.comparison_table(comparisons, tolerance=tolerance))
    for line in differences:
        print(f"warning: {line}")
    print(
        "note: measured at different times: what changed on the machine in between is in the difference and not in its "
        "interval; files measured together, compress benchmark OLD.onnx NEW.onnx, are compared more reliably"
    )
    _need_fast_enough(latency.slower(comparisons), tolerance * 100)
    _next("benchmark", "--help")


def _need_fast_enough(slower: Sequence[Any], tolerance: float) -> None:
    if slower:
        worst = max(slower, key=lambda found: found.ratio.value)
        _gate_failed(
            f"{worst.other} is more than {tolerance:g} % slower than {worst.base}: {worst.figure} "
            f"{worst.ratio.value - 1:+.1%} ({worst.where}); {len(slower)} figure{'s' * (len(slower) > 1)} in all"
        )


def _streams(scenario: Scenario, streams: int | None) -> int:
    if scenario == "single-stream" and (streams or 1) > 1:
        raise UserError(f"--streams: single-stream has one; for {streams} give --scenario multi-stream")
    if scenario == "multi-stream" and (streams or 1) < 2:
        raise UserError("--streams: multi-stream needs at least 2, for example --streams 2")
    return streams or 1


def _rates(scenario: Scenario, rate: str | None, latency_bound: float | None) -> list[float]:
    """Requests a second for the server scenario; none when only a bound is given."""
    if scenario != "server":
        if rate is not None or latency_bound is not None:
            option = "--rate" if rate is not None else "--latency-bound"
            raise UserError(f"{option}: only --scenario server has arrivals")
        return []
    if rate is None and latency_bound is None:
        raise UserError("--scenario server: needs --rate (requests a second) or --latency-bound (milliseconds)")
    if latency_bound is not None and not 0 < latency_bound < math.inf:
        raise UserError(f"--latency-bound: needs a number of milliseconds above 0, got {latency_bound}")
    try:
        rates = [float(part) for part in rate.split(",")] if rate is not None else []
    except ValueError:
        rates = [0.0]
    if not all(0 < value < 1e6 for value in rates):
        raise UserError(f"--rate: '{(rate or '')[:60]}' is not a list of requests a second, for example 10,20")
    return rates


def _scopes(text: str | None, scenario: Scenario) -> list[Any]:
    from deploy.latency import SCOPES, USUAL_SCOPES

    if text is None:
        return ["end_to_end"] if scenario == "server" else list(USUAL_SCOPES)
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in SCOPES:
            raise UserError(f"--scope: unknown scope '{name[:60]}': choose from {', '.join(SCOPES)}")
    if scenario == "server" and (len(names) > 1 or names[0] not in ("h2d+compute+d2h", "end_to_end")):
        raise UserError("--scope: the server scenario takes one, h2d+compute+d2h or end_to_end")
    return list(dict.fromkeys(names))


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _batch_sizes(text: str) -> list[int]:
    sizes = text.split(",")
    if not all(size.strip().isdecimal() and len(size) < 5 and int(size) >= 1 for size in sizes):
        raise UserError(f"--batch: '{text[:60]}' is not a list of batch sizes, for example 1,8")
    return [int(size) for size in sizes]


@contextmanager
def _image_files(folder: Path | None, runners: dict[str, Runner]) -> Iterator[list[Path]]:
    """The image files of `folder`, or drawn ones as large as the largest input, for as long as it is open."""
    if folder is not None:
        yield _images_in(folder)
        return
    import tempfile

    from compress.data.synthetic import generate

    side = max(max(runner.card.input_size) for runner in runners.values())
    print(f"no --images: measuring on eight drawn images of {side}x{side} pixels")
    with tempfile.TemporaryDirectory() as drawn:
        generate(Path(drawn) / "drawn", train=8, val=1, size=side, classes=10, seed=0)
        yield sorted((Path(drawn) / "drawn" / "images").glob("train_*.png"))


@app.command()
def serve(
    models: Annotated[
        list[str], typer.Argument(metavar="[NAME=]ARTIFACT...", help="Exported .onnx files; default name: the file's.")
    ],
    host: Annotated[str, typer.Option("--host", help="0.0.0.0 for every interface.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0: any free one.")] = 8000,
    provider: Annotated[
        str, typer.Option("--provider", metavar="NAME,NAME", help="cpu, cuda, tensorrt, in order of preference.")
    ] = "cpu",
    allow_fallback: Fallback = False,
    threads: Threads = None,
    trt_cache: TrtCache = None,
    ep_context: EpContext = False,
    cuda_graph: CudaGraph = False,
    max_batch: Annotated[int, typer.Option("--max-batch", min=1, max=1024, help="Images in one call.")] = 16,
    max_delay_ms: Annotated[
        float, typer.Option("--max-delay-ms", min=0, help="Longest wait for images that are still being decoded.")
    ] = 3.0,
    max_queue: Annotated[int, typer.Option("--max-queue", min=1, help="Images inside the server, a model.")] = 256,
    deadline_ms: Annotated[
        float, typer.Option("--deadline-ms", min=1, help="Who would wait longer is answered 429.")
    ] = 2000.0,
    max_megabytes: Annotated[float, typer.Option("--max-megabytes", min=0.001, help="Largest request.")] = 20.0,
    max_megapixels: Annotated[float, typer.Option("--max-megapixels", min=0.001, help="Largest picture.")] = 32.0,
    decode_workers: Annotated[
        int | None, typer.Option("--decode-workers", min=1, help="Threads that decode. Default: one a core, at most 8.")
    ] = None,
    token_file: Annotated[
        Path | None,
        typer.Option("--token-file", metavar="FILE", help="Ask for the token in it. Also: COMPRESS_SERVE_TOKEN."),
    ] = None,
    allow_reload: Annotated[
        bool, typer.Option("--allow-reload", help="Clients may have a model's file loaded again.")
    ] = False,
    drain_seconds: Annotated[
        float, typer.Option("--drain-seconds", min=0, help="After SIGTERM: not ready, but accepting.")
    ] = 1.0,
    log_level: Annotated[Literal["debug", "info", "warning", "error"], typer.Option("--log-level")] = "info",
) -> None:
    """Serve exported files over HTTP: pictures, the Open Inference Protocol, metrics, a web page.

    Ends with SIGTERM or SIGINT, after answering what it accepted; SIGHUP loads the files again."""
    for number, option in (
        (max_delay_ms, "--max-delay-ms"),
        (deadline_ms, "--deadline-ms"),
        (max_megabytes, "--max-megabytes"),
        (max_megapixels, "--max-megapixels"),
        (drain_seconds, "--drain-seconds"),
    ):
        _need_finite(number, option)
    files = _named_files(models)
    providers = [name.strip() for name in provider.split(",")]
    on_gpu = _gpu_options(list(files.values()), providers, trt_cache, ep_context, cuda_graph, max_batch=max_batch)
    token = _token(token_file)
    from deploy.runtimes.open import open_runner
    from deploy.serve.server import serve as serve_files
    from deploy.serve.settings import Settings

    settings = Settings(
        max_batch=max_batch,
        max_delay_ms=max_delay_ms,
        max_queue=max_queue,
        deadline_ms=deadline_ms,
        max_bytes=int(max_megabytes * 1e6),
        max_pixels=int(max_megapixels * 1e6),
        drain_s=drain_seconds,
        allow_reload=allow_reload,
        token=token,
        **({} if decode_workers is None else {"decode_workers": decode_workers}),
    )
    serve_files(
        files,
        lambda path: open_runner(path, providers, allow_fallback=allow_fallback, threads=threads, **on_gpu),
        settings,
        host=host,
        port=port,
        log_level=log_level,
        say=partial(print, flush=True),
    )


def _named_files(models: Sequence[str]) -> dict[str, Path]:
    """Name → file, from `NAME=FILE` or `FILE`, which is called what the file is called."""
    files: dict[str, Path] = {}
    for text in models:
        name, given, file = text.partition("=")
        if not given or "/" in name:  # a path may hold an equals sign
            name, file = Path(text).stem, text
        path = Path(file)
        if not path.is_file():
            raise UserError(f"{path}: no such file")
        if path.suffix not in (".onnx", ".engine"):
            raise UserError(f"{path}: neither .onnx nor .engine; make one with compress export")
        if name in files:
            raise UserError(f"{path}: a second model named '{name}': give NAME={path}")
        files[name] = path
    return files


def _token(file: Path | None) -> str | None:
    """From the file, or from COMPRESS_SERVE_TOKEN: on a command line every user of the machine could read it."""
    if file is None:
        return os.environ.get("COMPRESS_SERVE_TOKEN") or None
    try:
        return file.read_text(encoding="ascii").strip()
    except OSError as error:
        raise UserError(f"--token-file: {file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"--token-file: {file}: the token must be ASCII") from None


@app.command()
def report(run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="A folder below runs/.")]) -> None:
    """Write a run's report.html again."""
    from compress.report import build_report

    print(f"report: {build_report(run_dir)}")
    if (run_dir / "student.onnx").is_file():
        _next("benchmark", run_dir / "student.onnx")
    elif (run_dir / "student.safetensors").is_file():
        _next("export", run_dir / "student.safetensors")


@app.command()
def doctor() -> None:
    """Show what is installed and what works.

    Exit code 1 if something is broken."""
    from compress.doctor import examine, show

    if not show(examine()):
        _gate_failed("something is broken; the remedies stand above")
    _next("quickstart")


# ------------------------------------------------------------------------------------------------ the edges


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Entry point of the `compress` command: runs it and exits the process."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    sys.exit(_exit_code(arguments))


def _exit_code(arguments: list[str]) -> int:
    try:
        command = typer.main.get_command(app)
        with command.make_context("compress", list(arguments)) as context:
            command.invoke(context)
        sys.stdout.flush()
    except typer.Exit as stop:
        return int(stop.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        _to_stderr(f"interrupted{_how_to_resume(arguments)}")
        return 130
    except UserError as error:
        for line in str(error).splitlines():
            _to_stderr(f"error: {line}", everywhere=isinstance(error, LocalUserError))
        return 2
    except ImportError as error:
        explanation = _missing_package(error)
        if explanation is None:
            raise
        _to_stderr(f"error: {explanation}")
        return 2
    except _UsageProblem as error:
        message: str = error.format_message()  # type: ignore[attr-defined]
        _to_stderr(f"error: {' '.join(message.replace('Value error, ', '').split())}")
        return 2
    except BrokenPipeError:  # `compress … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains again at exit
        return 141
    except OSError as error:  # a full disk, a folder that may not be written, a file where a folder should be
        place = error.filename2 or error.filename
        reason = " ".join((error.strerror or str(error) or type(error).__name__).split())
        _to_stderr(f"error: {place}: {reason}" if place else f"error: {reason}", everywhere=True)
        return 2
    return 0


# typer's own copy of click is private; its exceptions are the base classes of a public one.
_UsageProblem: type[Exception] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


def _missing_package(error: ImportError) -> str | None:
    """What to tell a user about a package that is not there, or None when the mistake is ours."""
    from compress import foreign_kernels
    from compress.doctor import TRAIN

    package = (error.name or "").partition(".")[0]
    if package == "kernels":
        return foreign_kernels()
    serving = ("fastapi", "starlette", "uvicorn", "prometheus_client", "python_multipart")
    extras = {**dict.fromkeys(TRAIN, "train"), **dict.fromkeys(serving, "serve"), "tensorrt": "trt", "pycuda": "trt"}
    extra = extras.get(package)
    if isinstance(error, ModuleNotFoundError) and extra is not None:
        return f"{package} is not installed; this command needs: pip install 'compress-detectors[{extra}]'"
    return None


def _how_to_resume(arguments: list[str]) -> str:
    if not arguments or arguments[0] not in ("quickstart", "run", "distill", "train", "pseudo-label"):
        return ""
    continues = "--resume" in arguments or arguments[0] == "quickstart"
    again = [*arguments, *([] if continues else ["--resume"])]
    return f"; continue with: compress {shlex.join(again)}"


def _gate_failed(what: str) -> NoReturn:
    _to_stderr(f"failed: {what}")
    raise typer.Exit(1)


def _next(*command: Any) -> None:
    if _is_first_process():
        print(f"next: {shlex.join(['compress', *map(str, command)])}")


def _is_first_process() -> bool:
    """Training with several devices starts this program once for each; one of them speaks."""
    return os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) == "0"


def _to_stderr(line: str, *, everywhere: bool = False) -> None:
    """`everywhere`: a line that this process alone can say, so it speaks even when it is not the first."""
    if everywhere or _is_first_process():
        print(line, file=sys.stderr)
