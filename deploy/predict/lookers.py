"""Who looks at pictures: a runner in this process, or a model of a server."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from deploy.core.card import ModelCard
from deploy.core.detections import Detections
from deploy.core.errors import UserError
from deploy.predict.sources import Frame
from deploy.runtimes.base import Runner
from deploy.runtimes.pictures import detect_fitted, fit_picture
from deploy.serve.client import Client


class Looker(Protocol):
    """`prepare` runs in threads that load ahead, `finish` on a batch of what it gave."""

    @property
    def card(self) -> ModelCard: ...
    def prepare(self, frame: Frame, pixels: np.ndarray) -> Any: ...
    def finish(self, prepared: Sequence[Any]) -> list[Detections]: ...


class RunnerLooker:
    """A runner; `name` is what errors call it."""

    def __init__(self, runner: Runner, name: str) -> None:
        self._runner, self._name = runner, name

    @property
    def card(self) -> ModelCard:
        return self._runner.card

    def prepare(self, frame: Frame, pixels: np.ndarray) -> Any:
        return fit_picture(pixels, self.card)

    def finish(self, prepared: Sequence[Any]) -> list[Detections]:
        return detect_fitted(self._name, self._runner, prepared)


class ServerLooker:
    """A model of `compress serve`. Each thread has a connection of its own, so that the server can make batches.

    model: its name on the server; None: the only one. Raises UserError when the server has none of that name, or
    several and none was named, and ServerError when it cannot be reached.
    """

    def __init__(self, url: str, model: str | None = None, token: str | None = None) -> None:
        self._url, self._token, self._threads = url, token, threading.local()
        with Client(url, token=token) as client:
            models = {row["name"]: row["card"] for row in client.models()}
        if model is None and len(models) > 1:
            raise UserError(f"{url}: serves {', '.join(models)}: name one with --served")
        self._model = next(iter(models)) if model is None and models else model
        if self._model not in models:
            raise UserError(f"{url}: serves {', '.join(models) or 'nothing'}, and no {self._model}")
        if models[self._model] is None:
            raise UserError(f"{url}: {self._model} is not ready yet")
        self.card = ModelCard.model_validate(models[self._model])

    def prepare(self, frame: Frame, pixels: np.ndarray) -> Any:
        if not hasattr(self._threads, "client"):
            self._threads.client = Client(self._url, token=self._token)
        found: Detections = self._threads.client.detect(pixels if frame.path is None else frame.path, model=self._model)
        return found

    def finish(self, prepared: Sequence[Any]) -> list[Detections]:
        return list(prepared)
