"""Timing of detectors' files, on a clock that only goes when told; one file is really exported and timed."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

from compress.config.deploy import Deploy
from compress.config.model import Model
from compress.config.prune import Cut
from compress.detectors.base import Detector
from compress.detectors.build import build_detector, model_size
from compress.detectors.checkpoints import ModelRecord
from compress.run import latency_search as searching
from compress.run.latency_search import FileStopwatch, LatencyPlan, latency_search, timed_settings
from compress.run.prune import PruningPlan, prune_detector
from deploy.core.errors import UserError
from tests.helpers.fake_runners import FakeClock, FakeRunner, small_images

SIZE = (64, 64)


@pytest.fixture(autouse=True)
def frozen(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Garbage is looked for before every slice of time, here without the objects of all tests so far."""
    monkeypatch.setattr(searching, "quiet_collector", nullcontext)
    gc.freeze()
    yield
    gc.unfreeze()


def tiny(family: str = "gfl") -> Detector:
    return build_detector(Model(detector=family, backbone="nano", neck_channels=32, head_depth=1), 2, 0).eval()


def record(detector: Detector) -> ModelRecord:
    assert detector.model is not None
    return ModelRecord(model=detector.model, num_classes=detector.num_classes)


def narrow(width: int) -> Detector:
    """A detector that only says what it is."""
    detector = Detector.__new__(Detector)
    object.__setattr__(detector, "model", Model(backbone="nano", widths={"layer": (width,)}))
    return detector


class Machine:
    """Milliseconds of a file by what is written in it; all of them times `speed(second)`, and of a share of noise."""

    def __init__(self, speed: Callable[[float], float] = lambda second: 1.0, noise: float = 0.0) -> None:
        self.clock, self.speed, self.noise = FakeClock(), speed, noise
        self.written: list[str] = []
        self._rng = np.random.default_rng(0)

    def write(self, detector: Detector, path: Path) -> None:
        assert detector.model is not None and detector.model.widths is not None
        path.write_text(str(detector.model.widths["layer"][0]))
        self.written.append(path.read_text())

    def open(self, path: Path) -> FakeRunner:
        ms = float(path.read_text())

        def delay(_images: int) -> float:
            return ms * self.speed(self.clock.second) * float(np.exp(self.noise * self._rng.normal()))

        return FakeRunner(self.clock, delay)

    def stopwatch(self, folder: Path) -> FileStopwatch:
        return FileStopwatch(self.write, self.open, small_images(folder), folder, seed=0, clock=self.clock)


def test_a_ratio_outlives_a_machine_that_slows_down(tmp_path: Path) -> None:
    machine = Machine(speed=lambda second: 1 + second / 10)  # after a second of timing a tenth slower
    watch = machine.stopwatch(tmp_path)
    assert watch.timing(narrow(100)).ratio.value == 1
    first = watch.whole_ms
    timing = watch.timing(narrow(50))
    assert timing.ratio.value == pytest.approx(0.5, rel=0.02)
    assert watch.whole_ms > 1.2 * first  # what the ratio is of was measured again
    assert timing.again.low is not None and timing.again.high is not None
    assert timing.again.low <= 1 <= timing.again.high


def test_noise_is_stated_and_timed_away(tmp_path: Path) -> None:
    quiet, loud = Machine(noise=0.001), Machine(noise=0.5)
    seconds, reach = [], []
    for machine in (quiet, loud):
        folder = tmp_path / str(machine.noise)
        folder.mkdir()
        watch = machine.stopwatch(folder)
        watch.timing(narrow(100))
        begun = machine.clock.second
        timing = watch.timing(narrow(50))
        seconds.append(machine.clock.second - begun)
        assert timing.ratio.low is not None and timing.ratio.high is not None
        assert timing.ratio.low <= 0.5 <= timing.ratio.high
        assert timing.again.low is not None and timing.again.high is not None
        reach.append(timing.again.high / timing.again.low - 1)
    assert seconds[1] > 2 * seconds[0]  # it goes on where it is not certain
    assert reach[1] > 5 * reach[0]


def test_a_file_is_timed_once_for_its_widths(tmp_path: Path) -> None:
    machine = Machine()
    watch = machine.stopwatch(tmp_path)
    for width in (100, 50, 50, 100):
        watch.timing(narrow(width))
    assert machine.written == ["100", "50"]


def test_prune_meets_a_latency(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From plan to figures, with files that hold milliseconds: by operations, which is what the runner needs."""
    detector, machine = tiny(), Machine()

    def write(detector: Detector, path: Path, **_: object) -> None:
        machine.written.append(path.name)
        path.write_text(str(10 + 4000 * model_size(detector, SIZE)["gflops"]))

    monkeypatch.setattr(searching, "_write", write)
    monkeypatch.setattr(searching, "open_runner", lambda path, providers: machine.open(path))
    monkeypatch.setattr(searching, "HOST_CLOCK", machine.clock)
    whole = 10 + 4000 * model_size(detector, SIZE)["gflops"]
    asked = round(0.7 * whole, 2)
    said: list[str] = []
    plan = PruningPlan(Cut(latency_ms=asked), SIZE, SIZE, None, Deploy(), tmp_path / "none.json")
    smaller, found = prune_detector(detector, record(detector), plan, said.append)
    true = 10 + 4000 * model_size(smaller, SIZE)["gflops"]
    assert 0.97 * asked <= true <= 1.01 * asked
    assert found["budget"] == "latency_ms" and found["asked"] == asked
    assert found["whole"] == pytest.approx(whole, rel=1e-3) and found["found"] == pytest.approx(true, rel=1e-2)
    figures = found["latency"]
    assert figures["median_ms"] == pytest.approx(true, rel=1e-2)
    assert figures["interval_ms"][0] <= figures["median_ms"] <= figures["interval_ms"][1]
    assert figures["aa_ratio"][0] <= 1 <= figures["aa_ratio"][1]
    assert [figures[key] for key in ("precision", "providers", "multiple", "note")] == ["fp32", ["cpu"], 8, None]
    assert len(figures["trials"]) == len(machine.written) <= 10
    assert all(gflops == pytest.approx((ms - 10) / 4000, rel=0.03) for gflops, ms in figures["trials"])
    assert any(line.startswith("latency: the file of the whole detector takes") for line in said)


def test_one_real_file(few_rounds: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without training images: it is timed on noise, here not for long."""
    monkeypatch.setattr(searching, "_SECONDS", 0.1)
    monkeypatch.setattr(searching, "_MOST", 2)
    monkeypatch.setattr(searching, "_WARM_UP", 0.1)
    detector = tiny()
    plan = LatencyPlan(SIZE, SIZE, [], Deploy(candidates=100))
    with latency_search(detector, record(detector), plan, lambda line: None) as search:
        assert search.ms(detector) > 0
        again = search.stopwatch.timing(detector).again
    assert again.low is not None and again.high is not None and again.low <= again.value <= again.high


def test_a_cut_depends_on_the_settings_of_the_timed_file() -> None:
    """Others do not make it again."""
    plain = timed_settings(Deploy(), "fp32")
    assert timed_settings(Deploy(candidates=300), "fp32") != plain
    assert timed_settings(Deploy(max_map_drop=2, max_batch=4, precisions=("fp32", "int8")), "fp32") == plain
    percentile = Deploy.model_validate({"int8": {"method": "percentile"}})
    assert timed_settings(percentile, "fp32") == plain
    assert timed_settings(percentile, "int8") != timed_settings(Deploy(), "int8")


@pytest.mark.exhaustive
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("family", ["gfl", "fcos", "retinanet"])
def test_every_family_and_precision_is_timed(family: str, precision: str, tmp_path: Path, few_rounds: None) -> None:
    detector = tiny(family)
    plan = LatencyPlan(SIZE, SIZE, small_images(tmp_path), Deploy(candidates=100), precision)
    with latency_search(detector, record(detector), plan, lambda line: None) as search:
        assert search.ms(detector) > 0


def test_what_has_no_file_is_one_line(tmp_path: Path) -> None:
    plan = LatencyPlan(SIZE, SIZE, [], Deploy())
    two_stages = tiny("faster_rcnn")
    with (
        pytest.raises(
            UserError, match=r"^prune\.latency_ms: faster_rcnn cannot be exported: .*; take gflops or params"
        ),
        latency_search(two_stages, record(two_stages), plan, print),
    ):
        pass
    detector, int8 = tiny(), LatencyPlan(SIZE, SIZE, [], Deploy(), "int8")
    with (
        pytest.raises(UserError, match=r"^prune\.precision: int8 is calibrated on training images, and there are none"),
        latency_search(detector, record(detector), int8, print),
    ):
        pass
