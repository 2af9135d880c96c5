"""Dynamic batching: one bounded queue and one thread for each model.

    with batcher.admit(2, deadline_s=1.0) as ticket:        # OverloadedError when there is no room or no time
        rows = await ticket.detect([canvas, canvas])        # uint8 [3, H, W] each

A ticket is a place for its images, taken before they are decoded. The thread takes what is waiting, up to
`max_batch`; it waits up to `max_delay_s` for more only while admitted images are still on their way, so a lone
request is never delayed. Leaving the `with` block gives back the places and takes its images out of the queue:
a client that went away costs nothing more.

The wait of a newcomer is estimated as (images in front) x (seconds an image, measured at the completion of batches
while the model, or every decoder, is busy). A request that would wait longer than its deadline is refused on arrival.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType

import numpy as np

from deploy.runtimes.base import DetectionBatch, Runner
from deploy.serve.settings import OverloadedError

SMOOTHING = 0.2  # weight of the newest batch in the estimated seconds an image


class InferenceError(Exception):
    """The runtime failed, or gave values that are not finite. Not the client's fault."""


@dataclass(frozen=True)
class Row:
    """Detections of one image: boxes float32 [n, 4] xyxy in canvas pixels, scores [n], labels [n]; and how it went."""

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    queue_s: float
    inference_s: float
    """Time of the whole call that this image was part of."""
    batch: int


@dataclass(frozen=True)
class Call:
    """One call of the runtime, for the metrics. `error` is None when it succeeded."""

    batch: int
    seconds: float
    error: Exception | None


class Batcher:
    """Admission, queue and thread of one model. Made, admitted to and awaited on one event loop."""

    def __init__(
        self,
        runner: Runner,
        *,
        max_batch: int,
        max_delay_s: float,
        max_queue: int,
        seconds_an_image: float,
        decoders: int = 1,
        on_call: Callable[[Call], None] = lambda call: None,
    ) -> None:
        self._runner = runner
        self._max_batch, self._max_delay_s, self._max_queue = max_batch, max_delay_s, max_queue
        self._seconds_an_image = seconds_an_image
        self._decoders = decoders
        self._on_call = on_call
        self._loop = asyncio.get_running_loop()
        self._changed = threading.Condition()
        self._queue: deque[_Item] = deque()
        self._inside = 0  # admitted and not yet given back
        self._on_the_way = 0  # admitted, not yet in the queue
        self._busy_since = 0.0
        self._retired = False
        self._thread = threading.Thread(target=self._work, name="inference", daemon=True)
        self._thread.start()

    @property
    def depth(self) -> int:
        """Images inside: being decoded, waiting, running."""
        return self._inside

    @property
    def seconds_an_image(self) -> float:
        return self._seconds_an_image

    def refusal(self, images: int, deadline_s: float) -> OverloadedError | None:
        """Why `images` would not be admitted now, or None."""
        wait_s = self._inside * self._seconds_an_image
        if self._inside + images > self._max_queue:
            return OverloadedError("the queue is full", wait_s)
        if wait_s > deadline_s:  # never with an empty server, however slow the model is
            return OverloadedError("the wait would exceed the deadline", wait_s - deadline_s)
        return None

    def admit(self, images: int, deadline_s: float) -> Ticket:
        """Places for `images`. Raises OverloadedError."""
        with self._changed:
            refusal = self.refusal(images, deadline_s)
            if refusal is not None:
                raise refusal
            if self._inside == 0:
                self._busy_since = time.monotonic()
            self._inside += images
            self._on_the_way += images
        return Ticket(self, images, time.monotonic() + deadline_s)

    def retire(self) -> None:
        """End the thread when the last ticket is given back. Nothing may be admitted after this."""
        with self._changed:
            self._retired = True
            self._changed.notify()

    def join(self) -> None:
        """Wait for the thread of a retired batcher."""
        self._thread.join()

    # ------------------------------------------------------------------------------ called by tickets

    def _submit(self, items: Sequence[_Item]) -> None:
        with self._changed:
            self._queue.extend(items)
            self._on_the_way -= len(items)
            self._changed.notify()

    def _give_back(self, images: int, items: Sequence[_Item]) -> None:
        with self._changed:
            self._inside -= images
            self._on_the_way -= images - len(items)
            for item in items:
                item.gone = True
            self._changed.notify()

    # ------------------------------------------------------------------------------ the thread

    def _work(self) -> None:
        while (items := self._take()) is not None:
            start = time.monotonic()
            outcomes: Sequence[Row | Exception]
            try:
                out = self._runner(np.stack([item.canvas for item in items]))
            except Exception as error:  # whatever a runtime raises must not end its thread
                call = Call(len(items), time.monotonic() - start, error)
                outcomes = [InferenceError("the runtime failed")] * len(items)
            else:
                call = Call(len(items), time.monotonic() - start, None)
                outcomes = [_row(out, i, item, start, call) for i, item in enumerate(items)]
                self._measure(len(items))
            self._post(items, outcomes, call)

    def _measure(self, images: int) -> None:
        """A batch is done: since the one before it, or since the model was idle, so much time passed."""
        with self._changed:
            now = time.monotonic()
            seconds = (now - self._busy_since) / images
            self._busy_since = now
            self._seconds_an_image += SMOOTHING * (seconds - self._seconds_an_image)

    def _take(self) -> list[_Item] | None:
        """The next batch, or None when the batcher is retired and empty."""
        with self._changed:
            while True:
                waited = False
                while not self._drop_dead():
                    if self._retired and not self._inside:
                        return None
                    self._changed.wait()
                    waited = True
                if waited and self._on_the_way + len(self._queue) <= self._decoders:
                    self._busy_since = time.monotonic()  # it waited for a few slow pictures: no measure of the model
                until = self._queue[0].arrived + self._max_delay_s
                while 0 < len(self._queue) < self._max_batch and self._on_the_way > 0:
                    left = until - time.monotonic()
                    if left <= 0:
                        break
                    self._changed.wait(left)
                    self._drop_dead()
                if self._queue:
                    return [self._queue.popleft() for _ in range(min(self._max_batch, len(self._queue)))]

    def _drop_dead(self) -> int:
        """Remove images whose client went away or whose deadline passed; how many are left."""
        now = time.monotonic()
        late = [item for item in self._queue if not item.gone and item.deadline < now]
        if late or any(item.gone for item in self._queue):
            self._queue = deque(item for item in self._queue if not item.gone and item.deadline >= now)
            wait_s = len(self._queue) * self._seconds_an_image
            self._post(late, [OverloadedError("the deadline passed in the queue", wait_s)] * len(late), None)
        return len(self._queue)

    def _post(self, items: Sequence[_Item], outcomes: Sequence[Row | Exception], call: Call | None) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: no request waits any more
            self._loop.call_soon_threadsafe(self._deliver, items, outcomes, call)

    def _deliver(self, items: Sequence[_Item], outcomes: Sequence[Row | Exception], call: Call | None) -> None:
        """Hand over results; runs on the event loop."""
        if call is not None:
            self._on_call(call)
        for item, outcome in zip(items, outcomes, strict=True):
            if item.answer.done():
                continue
            if isinstance(outcome, Exception):
                item.answer.set_exception(outcome)
            else:
                item.answer.set_result(outcome)


class Ticket:
    """Places for images of one request; see the top of this file."""

    def __init__(self, batcher: Batcher, images: int, deadline: float) -> None:
        self._batcher, self._images, self._deadline = batcher, images, deadline
        self._items: list[_Item] = []

    @property
    def left_s(self) -> float:
        """Seconds to its deadline; negative afterwards."""
        return self._deadline - time.monotonic()

    def late(self) -> OverloadedError:
        """The refusal of a request whose pictures were not decoded by the deadline."""
        return OverloadedError("the deadline passed before it was decoded", 1.0)

    async def detect(self, canvases: Sequence[np.ndarray]) -> list[Row]:
        """Once. Raises OverloadedError when the deadline passes in the queue, and InferenceError."""
        assert not self._items and len(canvases) == self._images
        now = time.monotonic()
        loop = asyncio.get_running_loop()
        self._items = [_Item(canvas, now, self._deadline, loop.create_future()) for canvas in canvases]
        self._batcher._submit(self._items)
        return list(await asyncio.gather(*(item.answer for item in self._items)))

    def __enter__(self) -> Ticket:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for item in self._items:
            if item.answer.done() and not item.answer.cancelled():
                item.answer.exception()  # a sibling's failure was reported already: no warning about this one
            else:
                item.answer.cancel()
        self._batcher._give_back(self._images, self._items)


# ----------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Item:
    canvas: np.ndarray  # uint8 [3, H, W]
    arrived: float
    deadline: float
    answer: asyncio.Future[Row]
    gone: bool = False


def _row(out: DetectionBatch, i: int, item: _Item, start: float, call: Call) -> Row | InferenceError:
    n = int(out.count[i])
    boxes, scores = out.boxes[i, :n], out.scores[i, :n]
    if not (np.isfinite(boxes).all() and np.isfinite(scores).all()):
        return InferenceError("the detections hold values that are not finite")
    return Row(boxes, scores, out.labels[i, :n], start - item.arrived, call.seconds, call.batch)
