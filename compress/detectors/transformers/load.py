"""Models of the library transformers: fresh ones from a configuration, and those of a folder or of the Hub."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from deploy.core.errors import UserError

HEAD_PARTS = ("class_embed", "enc_score_head", "denoising_class_embed")
"""Parts whose shapes say how many classes there are."""
NOT_OPTIONS = ("num_labels", "id2label", "label2id", "architectures", "transformers_version", "dtype")
"""Keys of a configuration that the detector says itself, or that do not change what is computed."""


def fresh(library: str, num_classes: int, options: Mapping[str, Any]) -> Any:
    """The network of the library's class `library` with random weights, of the configuration that `options` change.

    BatchNorm of a backbone that begins at random learns, unless an option says otherwise. Raises UserError for options
    that the library does not know or cannot build.
    """
    kind = getattr(imported("detectors"), library)
    _check_known(kind, options)
    try:
        learns = (
            {"freeze_backbone_batch_norms": False} if hasattr(kind.config_class, "freeze_backbone_batch_norms") else {}
        )
        config = kind.config_class(**{**learns, **options}, num_labels=num_classes)
        return untied(kind(config))
    except Exception as error:  # whatever the library makes of numbers that do not go together
        raise UserError(f"options: transformers cannot build a {library}: {line_of(error)}") from error


def loaded(library: str, name: str, num_classes: int, options: Mapping[str, Any]) -> Any:
    """The network in a folder of `save_pretrained`, or of the Hub, in float32 with its weights.

    Class layers of another number of classes begin at random: `renewed` of the network names them. Raises UserError
    where it is another detector, where weights are missing or have other shapes, where an option leaves some of them
    out, and where it cannot be had.
    """
    transformers = imported("detectors")
    kind = getattr(transformers, library)
    _check_known(kind, options)
    source, where = located("init", name)
    config = configuration(source, where)
    with quiet():
        if not isinstance(config, kind.config_class):
            raise UserError(f"{where}: is a {config.model_type}, not a {kind.config_class.model_type}")
        try:
            for key, value in {**options, "num_labels": num_classes}.items():
                setattr(config, key, value)
            model, found = kind.from_pretrained(
                source, config=config, ignore_mismatched_sizes=True, output_loading_info=True, dtype=torch.float32
            )
        except Exception as error:
            raise UserError(f"{where}: transformers cannot load it: {line_of(error)}") from error
    renewed = sorted({str(item[0] if isinstance(item, tuple) else item) for item in found["mismatched_keys"]})
    lost = [key for key in (*renewed, *found["missing_keys"]) if not any(part in key for part in HEAD_PARTS)]
    if lost:
        raise UserError(f"{where}: its weights do not fit its configuration: the first is {lost[0]}")
    unread = sorted(found["unexpected_keys"])
    if options and unread:
        said = ", ".join(sorted(options))
        raise UserError(f"options: with {said}, weights of {where} would be left out: the first is {unread[0]}")
    network = untied(model)
    network.renewed = tuple(renewed)
    return network


def imported(what: str) -> Any:
    """The library. what: models of it, for the error where it is not installed."""
    try:
        import scipy  # noqa: F401  # matching in the losses of its detectors
        import transformers
    except ImportError as error:
        raise UserError(
            f"{what} of transformers need that package ({error}); pip install 'compress-detectors[transformers]'"
        ) from None
    return transformers


def located(key: str, name: str) -> tuple[str, str]:
    """What the library is to read for `name`, a folder or a name of the Hub, and how errors call it.

    Raises UserError, naming the setting `key`, for what can be neither.
    """
    folder = Path(name).expanduser()
    if folder.is_file():
        raise UserError(f"{key}: {name}: is a file; give the folder that save_pretrained wrote")
    if folder.is_dir():
        return str(folder), f"{key}: {name}"
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise UserError(f"{key}: {name}: no such folder, and no name of the Hub (owner/name)")
    return name, f"{key}: {name}, on the Hub"


def downloaded(key: str, name: str) -> Path:
    """The folder of a model of transformers; of one on the Hub, fetched where it is not there yet.

    Raises UserError, naming the setting `key`, for what can be neither or cannot be had.
    """
    source, where = located(key, name)
    if Path(source).is_dir():
        return Path(source)
    imported("models")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:  # network, names, rights
        raise UserError(f"{where}: cannot be had: {line_of(error)}") from error


def configuration(source: str, where: str) -> Any:
    """The configuration of a model that was `located`. Raises UserError where it cannot be had."""
    transformers = imported("models")
    with quiet():
        try:
            return transformers.AutoConfig.from_pretrained(source)
        except Exception as error:  # network, files, versions
            raise UserError(f"{where}: transformers cannot read it: {line_of(error)}") from error


def line_of(error: BaseException) -> str:
    """All that the error says, in a line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text[:300]


def options_of(config: Any) -> dict[str, Any]:
    """What makes this configuration from the library's default one, as JSON."""
    found = _cleaned(json.loads(json.dumps(config.to_diff_dict(), default=str)))
    found.pop("model_type", None)  # the family says it; that of a backbone stays
    return found


def untied(model: Any) -> Any:
    """The network without the class around it, where this has nothing but the same heads under a second name."""
    inner = {id(parameter) for parameter in model.model.parameters()}
    return model.model if all(id(parameter) in inner for parameter in model.parameters()) else model


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the library's notes and progress bars."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()


# --- details --------------------------------------------------------------------------------------------


COUNTS = ("num_queries", "decoder_layers", "d_model", "decoder_attention_heads", "encoder_hidden_dim")


def _check_known(kind: Any, options: Mapping[str, Any]) -> None:
    for name in COUNTS:
        if (value := options.get(name, 1)) is not None and (not isinstance(value, int) or value < 1):
            raise UserError(f"options.{name}: a whole number from 1 on, got {value!r}")
    if (value := options.get("num_denoising", 0)) is not None and (not isinstance(value, int) or value < 0):
        raise UserError(f"options.num_denoising: a whole number from 0 on, got {value!r}")
    known = set(kind.config_class().to_dict()) - set(NOT_OPTIONS) - {"model_type"}
    unknown = sorted(set(options) - known)
    if unknown:
        problem = "is what the detector says itself" if unknown[0] in NOT_OPTIONS else "is no key"
        raise UserError(f"options.{unknown[0]}: {problem} of transformers' {kind.config_class.__name__}")


def _cleaned(section: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _cleaned(value) if isinstance(value, dict) else value
        for key, value in section.items()
        if key not in NOT_OPTIONS and not key.startswith("_")
    }
