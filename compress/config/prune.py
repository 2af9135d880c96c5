"""Settings of structured pruning: what is cut, by how much, and which channels go."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, create_model, model_validator

from compress.config.base import Positive, Settings, broken_rule
from compress.config.messages import problems
from compress.config.yaml_document import Document
from deploy.core.errors import UserError

Share = Annotated[float, Field(gt=0, lt=1)]
BUDGETS = ("gflops", "params", "latency_ms", "max_map_drop")
Importance = Literal["group_norm", "taylor", "fisher", "random"]
Shares = Literal["uniform", "global", "sensitivity"]


class Cut(Settings):
    """How much leaves a detector, and which channels. Exactly one of gflops, params, latency_ms and max_map_drop."""

    gflops: Share | None = None
    """Share of the operations that stays, between 0 and 1."""
    params: Share | None = None
    """Share of the parameters that stays, between 0 and 1."""
    latency_ms: Annotated[float, Field(gt=0)] | None = None
    """Median milliseconds of the exported file for one image on this machine, measured; the most accurate detector that
    is as fast."""
    max_map_drop: Annotated[float, Field(gt=0, lt=100)] | None = None
    """mAP (percent) that the detector may lose by the cut, before any training, on training images."""
    importance: Importance = "group_norm"
    """group_norm: squared weights of all layers that lose a channel. taylor, fisher: from gradients on training images.
    random: to compare with."""
    shares: Shares = "uniform"
    """uniform: all layers lose the same share. global: the least important channels of all layers go first.
    sensitivity: layers lose more whose loss costs less mAP, which is measured for each alone."""
    round_to: Literal[8, 16, 32] = 8
    """Widths of layers that lose channels are multiples of this; layers of no more stay whole."""
    schedule: Literal["once", "iterative"] = "once"
    """iterative: in several cuts, before each of which importances are asked anew; gflops, params or latency_ms. Shares
    by sensitivity are measured once, before the first."""
    rounds: Annotated[int, Field(ge=2)] = 4
    """Cuts of schedule iterative."""
    keep: tuple[str, ...] = ()
    """Layers, or parts with layers inside, that keep their outputs: `neck`, `backbone.stem`; `maps`: what methods on
    features compare, which then need no adapters."""
    images: Positive = 128
    """Training images that importances, sensitivities and max_map_drop look at."""
    precision: Literal["fp32", "fp16", "int8"] = "fp32"
    """File whose latency counts for latency_ms."""

    @property
    def budget(self) -> str:
        """The one of `BUDGETS` that is given."""
        return next(key for key in BUDGETS if getattr(self, key) is not None)

    @property
    def needs_images(self) -> str | None:
        """The key that cannot do without labelled training images; None: there is no such."""
        needing = {
            "importance": self.importance in ("taylor", "fisher"),
            "shares": self.shares == "sensitivity",
            "max_map_drop": self.max_map_drop is not None,
        }
        return next((key for key, needs in needing.items() if needs), None)

    @property
    def needs_pictures(self) -> str | None:
        """The key that cannot do without training images, with labels or for the calibration of an int8 file."""
        calibrated = self.latency_ms is not None and self.precision == "int8"
        return self.needs_images or ("precision" if calibrated else None)

    @model_validator(mode="after")
    def _rules(self) -> Cut:
        given = [key for key in BUDGETS if getattr(self, key) is not None]
        if len(given) != 1:
            what = "none is given" if not given else f"{' and '.join(given)} are given"
            raise broken_rule("", f"needs exactly one of {', '.join(BUDGETS)}; {what}")
        if self.schedule == "iterative" and self.max_map_drop is not None:
            raise broken_rule("schedule", "iterative is for gflops, params and latency_ms; leave it out")
        # A resolved recipe names every key, so only another value than the default was asked for.
        if self.schedule == "once" and self.rounds != type(self).model_fields["rounds"].default:
            raise broken_rule("rounds", "is of schedule iterative; give schedule: iterative, or leave it out")
        if self.latency_ms is None and self.precision != type(self).model_fields["precision"].default:
            raise broken_rule("precision", "is of the file whose latency counts; give latency_ms, or leave it out")
        return self


class Prune(Cut):
    """The student is another detector with fewer channels, which then learns from the whole one."""

    of: str = "teacher"
    """`teacher`, or a checkpoint: FILE.safetensors, an mmdet FILE.pth or `zoo:NAME`."""


def read_cut(values: Mapping[str, Any]) -> Cut:
    """Check settings that come from a Python program or a command line, by the rules of recipes.

    Raises UserError with a line for each problem, `prune.KEY: problem`.
    """
    document = Document(None)
    data = {"prune": document.take(values)}
    if document.problems:
        of_keys = [f"prune{'.' if re.match(r'[^ :]+: ', line) else ': '}{line}" for line in document.problems]
        raise UserError("\n".join(of_keys))
    section = create_model("Section", __base__=Settings, prune=(Cut, ...))
    try:
        found: Cut = section.model_validate_json(json.dumps(data)).prune  # type: ignore[attr-defined]
    except ValidationError as error:
        raise UserError("\n".join(problems(error, data, document, section))) from None
    return found
