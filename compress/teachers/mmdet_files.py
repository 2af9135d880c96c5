"""mmdet's files: a config to a model, a checkpoint into it, and what the two say about its classes and colours.

What a user can get wrong is a UserError of one line: mmdet that is not installed, files that cannot be read, weights of
another model. mmdet is imported inside the functions.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deploy.core.errors import UserError, first_line
from deploy.core.shown import some


def need_mmdet() -> None:
    """Check that mmdet, and mmcv with its compiled operators, can be imported. Raises UserError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations inside mmdet are not the user's business
            import mmcv.ops  # noqa: F401
            import mmdet.apis  # noqa: F401
    except (ImportError, AssertionError) as error:  # mmdet asserts the versions of mmcv and mmengine
        raise UserError(
            f"teacher.mmdet needs mmdet 3 and mmcv 2 with its operators: {what_failed(error)}; see docs/mmdet.md"
        ) from error


def read_config(path: Path) -> Any:
    """mmengine's `Config` with all that the file inherits. Runs the file.

    Raises UserError: absent, failing, or without a model.
    """
    from mmengine.config import Config

    if not path.is_file():
        raise UserError(f"teacher.mmdet.config: {path}: no such file; give a config file of mmdet 3")
    try:
        settings = Config.fromfile(path)
    except Exception as error:  # a config is a program
        raise UserError(f"teacher.mmdet.config: {path}: cannot be read ({what_failed(error)})") from error
    if settings.get("model") is None:
        raise UserError(
            f"teacher.mmdet.config: {path}: has no `model`; give a whole config, as mmdet's train.py takes it"
        )
    return settings


def read_checkpoint(path: Path) -> Mapping[str, Any]:
    """A dict with a `state_dict` and perhaps `meta`. No code in the file is run.

    Raises UserError: absent, damaged, without weights, or with objects that are neither weights nor logs.
    """
    where = f"teacher.mmdet.checkpoint: {path}"
    if not path.is_file():
        raise UserError(f"{where}: no such file")
    try:
        with torch.serialization.safe_globals([(_Skipped, name) for name in _LOGGED]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "Unsupported" in str(error):
            raise UserError(
                f"{where}: holds Python objects that could run code, so it is not loaded; save a dict with its "
                "state_dict and meta.dataset_meta alone and give that file"
            ) from error
        raise UserError(f"{where}: not a readable torch checkpoint ({what_failed(error)})") from error
    except Exception as error:  # whatever a damaged zip or pickle stream makes its readers raise
        raise UserError(f"{where}: not a readable torch checkpoint ({what_failed(error)})") from error
    if isinstance(content, Mapping) and not isinstance(content.get("state_dict"), Mapping):
        content = {"state_dict": content}
    if not isinstance(content, Mapping) or not any(isinstance(x, Tensor) for x in content["state_dict"].values()):
        raise UserError(f"{where}: no state_dict in this file")
    return content


class _Skipped:
    """Stands for whatever of the log of a training run is in a checkpoint; swallows it."""

    def __init__(self, *parts: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...


# mmengine's runner writes these beside the weights: buffers of logged numbers. By default torch refuses such a file.
# Reading them as `_Skipped` runs no code either; every other object is still refused. (numpy 1 had other modules.)
_LOGGED = (
    "mmengine.logging.history_buffer.HistoryBuffer",
    "builtins.getattr",
    "numpy.ndarray",
    "numpy.dtype",
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
)


def build(path: Path, settings: Any) -> nn.Module:
    """The config's model with random weights, drawn from a fork of torch's generator. `path` is for messages.

    Raises UserError: mmdet refuses the config, or the model is no detector of images.
    """
    from mmdet.registry import MODELS
    from mmengine.model import revert_sync_batchnorm
    from mmengine.registry import init_default_scope

    section = settings.copy().model
    if section.get("teacher_config") is not None:  # mmdet's own distillation: what it trained is the rest
        section = {
            key: value
            for key, value in section.items()
            if key not in ("teacher_config", "teacher_ckpt", "eval_teacher")
        }
        section["type"] = "mmdet.SingleStageDetector"
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            init_default_scope(settings.get("default_scope", "mmdet"))
            model: nn.Module = revert_sync_batchnorm(MODELS.build(section))
    except Exception as error:  # of any type: unknown names, wrong arguments, failing custom code
        raise UserError(f"teacher.mmdet.config: {path}: its model cannot be built ({what_failed(error)})") from error
    preprocessor = getattr(model, "data_preprocessor", None)
    if not hasattr(model, "predict") or not hasattr(preprocessor, "pad_size_divisor"):
        raise UserError(
            f"teacher.mmdet.config: {path}: {type(model).__name__} is not a detector of images "
            "(no predict, or no data_preprocessor of images)"
        )
    return model


def load_weights(model: nn.Module, content: Mapping[str, Any], problem: str) -> None:
    """Weights into the model, by mmdet's own rules for old names. Raises UserError, which begins with `problem`, where
    keys are missing, left over or of another shape; mmdet itself would go on with random weights."""
    state = {str(key).removeprefix("module."): value for key, value in content["state_dict"].items()}
    try:
        result = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:]]
        raise UserError(f"{problem}: {some(lines)}") from error
    constant = ("num_batches_tracked", "integral.project")  # absent in old files, and of no influence or always equal
    missing = [key for key in result.missing_keys if not key.endswith(constant)]
    wrong = [("missing", missing), ("unexpected", result.unexpected_keys)]
    problems = [f"{what} {len(keys)} key(s): {some(keys)}" for what, keys in wrong if keys]
    if problems:
        raise UserError(f"{problem}: {'; '.join(problems)}")


def gets_rgb(settings: Any) -> bool:
    """mmdet reads files as BGR, and `bgr_to_rgb` turns them."""
    return bool((settings.model.get("data_preprocessor") or settings.get("data_preprocessor") or {}).get("bgr_to_rgb"))


def number_of_classes(model: Any) -> int | None:
    """Count the classes of the head that names them."""
    head = getattr(model, "bbox_head", None) or getattr(getattr(model, "roi_head", None), "bbox_head", None)
    if isinstance(head, nn.ModuleList):  # a cascade
        head = head[-1]
    found = getattr(head, "num_classes", None)
    return found if isinstance(found, int) else None


def class_names(settings: Any, content: Mapping[str, Any], expected: int | None) -> tuple[str, ...] | None:
    """Names from the checkpoint, else from the config, else of the config's kind of data set; of the right number."""
    meta = content.get("meta")
    meta = meta if isinstance(meta, Mapping) else {}
    candidates = [meta.get("dataset_meta"), meta]
    for key in ("test_dataloader", "val_dataloader", "train_dataloader"):
        dataset = (settings.get(key) or {}).get("dataset")
        while isinstance(dataset, Mapping):
            candidates += [dataset.get("metainfo"), _metainfo_of(dataset.get("type"))]
            inner = dataset.get("dataset") or dataset.get("datasets")
            dataset = inner[0] if isinstance(inner, Sequence) and inner else inner
    candidates.append(settings.get("metainfo"))
    for candidate in candidates:
        if isinstance(candidate, Mapping):
            names = candidate.get("classes", candidate.get("CLASSES"))
            if isinstance(names, (list, tuple)) and names and expected in (None, len(names)):
                return tuple(str(name) for name in names)
    return None


def _metainfo_of(kind: Any) -> Mapping[str, Any] | None:
    from mmdet.registry import DATASETS

    found = DATASETS.get(kind) if isinstance(kind, str) else kind
    return getattr(found, "METAINFO", None)


def what_failed(error: BaseException) -> str:
    """Type and first line of an exception."""
    return f"{type(error).__name__}: {first_line(error)}"
