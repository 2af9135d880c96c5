"""The work of one measured call, for each scope.

- `preprocess`: encoded image bytes → uint8 canvas (decode, resize, pad), on one thread;
- `compute`: the network with its suppression, input and output on the device;
- `h2d+compute+d2h`: canvas in host memory → padded detections in host memory;
- `end_to_end`: encoded image bytes → detections in pixels of the original image.

Each means the same on every backend. Where the network runs on the CPU nothing is copied, so `compute` is
`h2d+compute+d2h`: it is measured once, and the report says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import get_args

import numpy as np

from deploy.core.canvas import to_original
from deploy.core.card import ModelCard
from deploy.core.errors import UserError
from deploy.core.image import decode_image, read_image_bytes
from deploy.latency.clock import Clock
from deploy.latency.results import Scope
from deploy.runtimes.base import Runner, StagedRunner
from deploy.runtimes.pictures import Canvases, fit_pictures

SCOPES: tuple[Scope, ...] = get_args(Scope)
USUAL_SCOPES: tuple[Scope, ...] = ("compute", "h2d+compute+d2h", "end_to_end")
HOST = "host"
_POOL = 32  # encoded images kept in memory and used in turn

Task = Callable[[int], float | None]
"""Handles that many images, the next ones. Milliseconds where not all of the call counts, else None."""

Encoded = list[tuple[Path, bytes]]


def read_pool(images: Sequence[Path]) -> Encoded:
    """The bytes of the first 32 images. Raises UserError for none and for unreadable ones."""
    if not images:
        raise UserError("nothing to benchmark on: no images given")
    return [(path, read_image_bytes(path)) for path in images[:_POOL]]


def scopes_of(runner: Runner, name: str, wanted: Sequence[Scope]) -> tuple[list[Scope], str | None]:
    """The scopes to measure for this runner, and what to tell the reader about one that is not.

    Raises UserError when nothing is left.
    """
    if "compute" not in wanted or (not runner.on_cpu and isinstance(runner, StagedRunner)):
        return list(wanted), None
    if runner.on_cpu:
        replaced = [SCOPES[2] if scope == "compute" else scope for scope in wanted]
        note = f"{name}: compute is h2d+compute+d2h: {runner.backend} works in host memory, so nothing is copied"
        return list(dict.fromkeys(replaced)), note
    rest: list[Scope] = [scope for scope in wanted if scope != "compute"]
    why = f"a call of {runner.backend} cannot be taken apart"
    if not rest:
        raise UserError(f"{name}: scope compute cannot be measured: {why}; choose h2d+compute+d2h")
    return rest, f"{name}: compute was not measured: {why}"


def clock_of(runner: Runner, scope: Scope, encoded: Encoded) -> str:
    """Clock of that scope: the host's clock, or CUDA events where the backend has them."""
    if scope != "compute" or not isinstance(runner, StagedRunner):
        return HOST
    runner.upload(_canvases(encoded[:1], runner.card).images)
    return HOST if runner.compute_ms() is None else "CUDA events"


def make_task(runner: Runner, scope: Scope, encoded: Encoded, most_images: int, clock: Clock, start: int = 0) -> Task:
    """A task that starts with image `start` of the pool. `most_images`: the largest call that will come."""
    card = runner.card
    position = start % len(encoded)

    def next_files(count: int) -> Encoded:
        nonlocal position
        chosen = [encoded[(position + i) % len(encoded)] for i in range(count)]
        position = (position + count) % len(encoded)
        return chosen

    def preprocess(count: int) -> None:
        _canvases(next_files(count), card)

    def end_to_end(count: int) -> None:
        canvases = _canvases(next_files(count), card)
        out = runner(canvases.images)
        for i, (scale, size) in enumerate(zip(canvases.scales, canvases.sizes, strict=True)):
            to_original(out.boxes[i, : out.count[i]], scale, size)

    if scope == "preprocess":
        return preprocess
    if scope == "end_to_end":
        return end_to_end

    one_each = _canvases(encoded, card).images
    ring = np.concatenate([one_each] * (1 + -(-most_images // len(encoded))))  # any call is one slice of it

    def next_batch(count: int) -> np.ndarray:
        nonlocal position
        batch = ring[position : position + count]
        position = (position + count) % len(encoded)
        return batch

    def inference(count: int) -> None:
        runner(next_batch(count))

    if scope != "compute":
        return inference
    assert isinstance(runner, StagedRunner), "scopes_of leaves no other"
    staged = runner
    by_device = clock_of(runner, scope, encoded) != HOST

    def compute(count: int) -> float | None:
        staged.upload(next_batch(count))
        if by_device:
            return staged.compute_ms()
        before = clock.now()
        staged.compute()
        return (clock.now() - before) * 1e3

    return compute


# ----------------------------------------------------------------------------------------------------


def _canvases(files: Encoded, card: ModelCard) -> Canvases:
    return fit_pictures([decode_image(data, str(path)) for path, data in files], card)
