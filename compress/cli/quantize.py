"""Quantized files of a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.cli.exits import gate_failed
from compress.cli.options import need_finite, refuse
from deploy.core.errors import UserError

if TYPE_CHECKING:
    from compress.config.deploy import Deploy
    from compress.config.recipe import Recipe
    from compress.run.export import Quantizing
    from deploy.quantize.file import QuantizeReport
    from deploy.quantize.grids import Grids


def check_int8_options(
    quantized: Sequence[str], int8: dict[str, Any], max_map_drop: float | None, data: Path | None, images: Path | None
) -> None:
    """Options that would do nothing are mistakes."""
    options = {"target": "--target", "calibration": "--calibration"}
    options |= {"images": "--calibration-images", "method": "--calibration-method"}
    given = {options[key]: value for key, value in int8.items()} | {"--max-map-drop": max_map_drop}
    if not quantized:
        refuse(given, "is about int8 files; add --precision fp32,int8")
    if int8.get("target") == "cpu" and "mixed" in quantized:
        raise UserError("--target: mixed files are for TensorRT only; leave out mixed or --target cpu")
    if data is not None and (max_map_drop is None or images is None):
        raise UserError("--data: is what --max-map-drop decides on; give --max-map-drop, and --images, its folder")
    if data is not None and not data.is_file():
        raise UserError(f"--data: {data}: no such file")
    if max_map_drop is not None:
        need_finite(max_map_drop, "--max-map-drop")


def trained_grids(
    checkpoint: Path, quantized: Sequence[str], method: str | None, max_map_drop: float | None, data: Path | None
) -> Grids | None:
    """What quantization-aware distillation left beside the checkpoint, for its int8 file; None: there is nothing."""
    file = checkpoint.with_suffix(".json")
    if not quantized or not file.is_file():
        return None
    from compress.run.qad import load_grids

    grids = load_grids(file)
    settled = f"scales and float layers are those that were trained, in {file}"
    refuse({"--calibration-method": method, "--max-map-drop": max_map_drop, "--data": data}, settled)
    if "mixed" in quantized:
        raise UserError(f"--precision: {file} was trained for an int8 file; a mixed one is made of student.safetensors")
    return grids


def keep_trained(checkpoint: Path, out: Path) -> None:
    """`student.qad.onnx` of a run is an int8 file, which a float file of that name must not replace."""
    if not checkpoint.with_suffix(".json").is_file() or not out.is_file():
        return
    from deploy.core.card import card_from_file

    if card_from_file(out).quantization is not None:
        raise UserError(f"--out: {out} is the int8 file of {checkpoint}; give the float file another name")


def quantizing(
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


def quantize_file(source: Path, out: Path, how: Quantizing, max_batch: int) -> None:
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
        gate_failed(str(error))
    if found is not None:
        if found.sensitivities:
            open_console().print(sensitivity_table(found))
        open_console().print(trials_table(found))
        print(f"the search: {out.with_suffix('.guided.json')}, {out.with_suffix('.guided.svg')}")
    _say_quantized(out, report)


def quantize_trained_file(checkpoint: Path, source: Path, out: Path, settings: Deploy, how: Quantizing) -> None:
    from compress.run.qad import grids_file, quantize_trained

    report = quantize_trained(checkpoint, source, out, settings, how.images)
    _say_quantized(out, report, f" on the trained scales of {grids_file(checkpoint)}")


def _say_quantized(out: Path, report: QuantizeReport, scales: str = "") -> None:
    print(
        f"{out}: {report.size_bytes / 1e6:.1f} MB, for {report.target}; {report.layers} layers in int8{scales}, "
        f"{len(report.float_layers)} in float; output error on {report.images} calibration images: scores "
        f"{report.score_error:.1%}, boxes {report.box_error:.1%}"
    )
