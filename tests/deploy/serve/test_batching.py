"""The batcher with runtimes that are watched: who rides with whom, who is refused, who is dropped."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable

import numpy as np
import pytest

from deploy.runtimes.base import DetectionBatch
from deploy.serve.batching import Batcher, Call, InferenceError, Row
from deploy.serve.settings import OverloadedError
from tests.helpers.red_rectangle_model import CARD


class Watched:
    """Answers image k (all pixels k) with one box whose score is k / 255; waits for `gate` first, if there is one."""

    backend = "watched"
    on_cpu = True
    card = CARD

    def __init__(self, seconds: float = 0.0, gate: threading.Event | None = None) -> None:
        self.seconds, self.gate = seconds, gate
        self.batches: list[list[int]] = []
        self.fail: Exception | None = None
        self.score_of_7: float | None = None

    def __call__(self, images: np.ndarray) -> DetectionBatch:
        if self.gate is not None:
            assert self.gate.wait(600)
        self.batches.append([int(image.flat[0]) for image in images])
        time.sleep(self.seconds)
        if self.fail is not None:
            raise self.fail
        scores = images[:, 0, 0, :1].astype(np.float32) / 255
        if self.score_of_7 is not None:
            scores[images[:, 0, 0, 0] == 7] = self.score_of_7
        n = len(images)
        return DetectionBatch(np.zeros((n, 1, 4), np.float32), scores, np.zeros((n, 1), np.int64), np.ones(n, np.int32))


def canvas(k: int) -> np.ndarray:
    return np.full((3, 2, 2), k, np.uint8)


def run(work: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(600):
            await work()

    asyncio.run(limited())


def batcher(runner: Watched, **more: object) -> Batcher:
    given = {"max_batch": 4, "max_delay_s": 0.05, "max_queue": 16, "seconds_an_image": 1e-4, **more}
    return Batcher(runner, **given)  # type: ignore[arg-type]


async def ask(batcher: Batcher, *ks: int, deadline_s: float = 600.0, after: float = 0.0) -> list[Row]:
    """Do as a request does: a ticket, some decoding, the answer."""
    with batcher.admit(len(ks), deadline_s) as ticket:
        await asyncio.sleep(after)
        return await ticket.detect([canvas(k) for k in ks])


def scores(rows: list[Row]) -> list[int]:
    return [round(float(row.scores[0]) * 255) for row in rows]


def test_everybody_gets_their_own_answer() -> None:
    runner = Watched()

    async def work() -> None:
        under_test = batcher(runner, max_queue=500)
        requests = [[k, (k + 1) % 200] if k % 3 else [k] for k in range(200)]
        answers = await asyncio.gather(*(ask(under_test, *ks, after=k % 5 * 1e-3) for k, ks in enumerate(requests)))
        assert [scores(rows) for rows in answers] == requests
        assert under_test.depth == 0

    run(work)
    assert max(map(len, runner.batches)) == 4 and sum(map(len, runner.batches)) == 200 + 133


def test_a_lone_request_waits_for_nobody() -> None:
    async def work() -> None:
        (row,) = await ask(batcher(Watched(), max_delay_s=300.0), 3)
        assert row.batch == 1 and row.queue_s < 150

    run(work)


def test_images_that_are_still_decoded_are_waited_for_but_not_long() -> None:
    runner = Watched()

    async def work() -> None:
        under_test = batcher(runner, max_delay_s=300.0)
        await asyncio.gather(ask(under_test, 1), ask(under_test, 2, after=0.05))
        assert runner.batches == [[1, 2]]
        under_test = batcher(runner, max_delay_s=0.05)
        await asyncio.gather(ask(under_test, 3), ask(under_test, 4, after=3.0))
        assert runner.batches[1:] == [[3], [4]]

    run(work)


def test_the_queue_is_bounded() -> None:
    gate = threading.Event()

    async def work() -> None:
        under_test = batcher(Watched(gate=gate), max_queue=5)
        first = asyncio.create_task(ask(under_test, 1, 2, 3))
        await asyncio.sleep(0.01)
        with pytest.raises(OverloadedError) as caught:
            under_test.admit(3, 10.0)
        assert caught.value.reason == "the queue is full" and caught.value.retry_after_s == 1
        second = asyncio.create_task(ask(under_test, 4, 5))
        await asyncio.sleep(0.01)
        assert under_test.depth == 5
        gate.set()
        assert scores(await first) == [1, 2, 3] and scores(await second) == [4, 5]
        assert scores(await ask(under_test, 6, 7, 8)) == [6, 7, 8]

    run(work)


def test_a_wait_beyond_the_deadline_is_refused_at_the_door_but_never_by_an_empty_server() -> None:
    gate = threading.Event()

    async def work() -> None:
        under_test = batcher(Watched(gate=gate), seconds_an_image=130.0)
        first = asyncio.create_task(ask(under_test, 1, deadline_s=100.0))  # slower than its deadline, but it is alone
        await asyncio.sleep(0.01)
        with pytest.raises(OverloadedError) as caught:
            under_test.admit(1, 100.0)
        assert caught.value.reason == "the wait would exceed the deadline" and caught.value.retry_after_s == 30
        with under_test.admit(1, 500.0):
            pass
        gate.set()
        await first

    run(work)


def test_a_deadline_that_passes_in_the_queue_is_an_answer_and_no_work() -> None:
    gate = threading.Event()
    runner = Watched(gate=gate)

    async def work() -> None:
        under_test = batcher(runner, max_batch=1)
        first = asyncio.create_task(ask(under_test, 1))
        await asyncio.sleep(0.02)
        late = asyncio.create_task(ask(under_test, 2, deadline_s=0.05))
        patient = asyncio.create_task(ask(under_test, 3))
        await asyncio.sleep(0.2)
        gate.set()
        with pytest.raises(OverloadedError, match="deadline passed"):
            await late
        await first
        await patient
        assert runner.batches == [[1], [3]]

    run(work)


def test_who_went_away_is_not_worked_for() -> None:
    gate = threading.Event()
    runner = Watched(gate=gate)

    async def work() -> None:
        under_test = batcher(runner, max_batch=1)
        first = asyncio.create_task(ask(under_test, 1))
        await asyncio.sleep(0.02)
        gone = asyncio.create_task(ask(under_test, 2))
        decoding = asyncio.create_task(ask(under_test, 3, after=10))
        last = asyncio.create_task(ask(under_test, 4))
        await asyncio.sleep(0.02)
        assert under_test.depth == 4
        for task in (gone, decoding):
            task.cancel()
        await asyncio.wait([gone, decoding])
        assert under_test.depth == 2
        gate.set()
        await asyncio.gather(first, last)
        assert runner.batches == [[1], [4]] and under_test.depth == 0

    run(work)


def test_a_runtime_that_fails_fails_its_batch_and_goes_on() -> None:
    runner = Watched()
    calls: list[Call] = []

    async def work() -> None:
        under_test = batcher(runner, on_call=calls.append)
        runner.fail = RuntimeError("out of memory")
        with pytest.raises(InferenceError):
            await ask(under_test, 1, 2)
        runner.fail = None
        assert scores(await ask(under_test, 3)) == [3]

    run(work)
    assert [(call.batch, repr(call.error)) for call in calls] == [(2, "RuntimeError('out of memory')"), (1, "None")]


def test_a_value_that_is_not_finite_fails_its_image_alone() -> None:
    runner = Watched()
    runner.score_of_7 = float("nan")

    async def work() -> None:
        under_test = batcher(runner, max_delay_s=300.0)
        answers = await asyncio.gather(
            ask(under_test, 7, after=0.02), ask(under_test, 8, after=0.02), return_exceptions=True
        )
        assert isinstance(answers[0], InferenceError) and "not finite" in str(answers[0])
        assert not isinstance(answers[1], BaseException) and scores(answers[1]) == [8]
        assert runner.batches == [[7, 8]]

    run(work)


def test_a_retired_batcher_answers_what_it_admitted_and_ends() -> None:
    async def work() -> None:
        under_test = batcher(Watched(seconds=0.01))
        tasks = [asyncio.create_task(ask(under_test, k, after=0.05)) for k in range(10)]
        await asyncio.sleep(0.01)
        under_test.retire()
        assert [scores(rows)[0] for rows in await asyncio.gather(*tasks)] == list(range(10))
        await asyncio.to_thread(under_test.join)

    run(work)


def test_the_estimate_follows_the_runtime() -> None:
    async def work() -> None:
        under_test = batcher(Watched(seconds=0.4), max_batch=4, seconds_an_image=1e-4, max_queue=100)
        await asyncio.gather(*(ask(under_test, k, after=0.01) for k in range(60)))  # 15 batches of 400 ms
        assert 0.075 < under_test.seconds_an_image < 0.4

    run(work)


def test_slow_pictures_are_no_measure_of_the_model() -> None:
    """Draining waits for one that is decoded for long, and for one that never comes; others are not refused for
    that."""

    async def work() -> None:
        under_test = batcher(Watched(), decoders=2, max_queue=64)
        await ask(under_test, 1, after=4.0)
        with under_test.admit(1, 10.0):  # a broken one
            await asyncio.sleep(3.0)
            await ask(under_test, 2)
        assert under_test.seconds_an_image < 0.5
        await asyncio.gather(*(ask(under_test, k, deadline_s=100.0) for k in range(40)))

    run(work)


def test_saturated_decoders_are_counted() -> None:
    """Ten pictures, one decoder: what the model could do alone is not what newcomers wait for."""

    async def work() -> None:
        under_test = batcher(Watched(), decoders=1, max_batch=1, max_queue=64)
        await asyncio.gather(*(ask(under_test, k, after=0.05 * (k + 1)) for k in range(10)))
        assert under_test.seconds_an_image > 0.02

    run(work)
