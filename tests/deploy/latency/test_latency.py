"""The benchmark: what it calls, in which order, what it times, and what it writes. A fake clock: nothing sleeps."""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from rich.console import Console

from deploy.core.environment import environment
from deploy.core.errors import UserError
from deploy.latency import (
    BenchmarkReport,
    benchmark,
    compare_reports,
    comparison_table,
    doubts,
    offline_lines,
    read_report,
    report_table,
    slower,
    write_markdown,
    write_report,
)
from deploy.latency.results import Reading
from deploy.latency.telemetry import Telemetry, troubles
from deploy.runtimes.onnx import OnnxRunner
from tests.helpers.fake_runners import FakeClock, FakeRunner, StagedFake, correlated, small_images

ROOT = Path(__file__).parents[3]
H2D: Any = "h2d+compute+d2h"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return small_images(tmp_path_factory.mktemp("images"))


def measure(images: list[Path], seed: int, *, factor: float = 1.0, drift: float = 0.0, **options: Any) -> Any:
    """Two runners of 4 ms with noise that is correlated and drifts with the clock; the second takes `factor` times."""
    clock, rng = FakeClock(), np.random.default_rng(seed)
    noise = iter(np.exp(0.04 * correlated(rng, 20_000, 0.6)))

    def delay(count: int) -> float:
        return 4.0 * count * next(noise) * (1 + drift * clock.second / 8)

    runners = {"a": FakeRunner(clock, delay), "b": FakeRunner(clock, lambda count: factor * delay(count))}
    arguments = {"scopes": [H2D], "seconds": 2.4, "clock": clock, "seed": seed, "warm_up_seconds": 0.2, **options}
    return benchmark(runners, images, **arguments)


# ----------------------------------------------------------------------------------------------- what is measured


def test_figures_are_those_of_the_samples(images: list[Path]) -> None:
    report = measure(images, 0, factor=0.5, batch_sizes=[1, 3])
    assert [(cell.runner, cell.batch_size) for cell in report.cells] == [("a", 1), ("b", 1), ("a", 3), ("b", 3)]
    for cell in report.cells:
        samples = np.concatenate([np.asarray(part) for part in cell.samples_ms])
        assert len(cell.samples_ms) == 20 and cell.calls == len(samples) and cell.clock == "host"
        for percent in (50, 90, 95, 99, 99.9):
            assert cell.latency_ms[f"p{percent:g}"].value == pytest.approx(np.percentile(samples, percent))
        assert cell.mean_ms.value == pytest.approx(samples.mean())
        assert cell.throughput_ips.value == pytest.approx(1000 * cell.batch_size / samples.mean())
        assert sum(cell.images) == cell.calls * cell.batch_size
        assert samples.sum() == pytest.approx(2400, rel=0.15)
    assert report.speedup(report.cell("a", 1, H2D)) is None
    speedup = report.speedup(report.cell("b", 3, H2D))
    assert speedup.low <= speedup.value <= speedup.high and speedup.value == pytest.approx(2, rel=0.05)
    assert {found.verdict for found in report.comparisons} == {"faster"}
    with pytest.raises(KeyError):
        report.cell("a", 2, H2D)


def test_equals_are_not_told_apart_and_three_percent_is(images: list[Path]) -> None:
    """Whole benchmarks, with correlated noise and a drift of 10 %; the statistics alone are tested more often."""
    false = sum(
        any(found.verdict != "no difference seen" for found in measure(images, seed, drift=0.1).comparisons)
        for seed in range(4)
    )
    found = sum(measure(images, seed, factor=1.03, drift=0.1).comparisons[0].verdict == "slower" for seed in range(5))
    assert false <= 1 and found >= 4, (false, found)


def test_runners_take_turns_in_random_order(images: list[Path]) -> None:
    clock, log = FakeClock(), []

    def delay(name: str) -> Any:
        return lambda count: log.append(name) or 1.0

    runners = {name: FakeRunner(clock, delay(name)) for name in "abc"}
    benchmark(runners, images, scopes=[H2D], seconds=0.06, rounds=20, warm_up_seconds=0, clock=clock)
    turns = "".join(log)[3:]  # after the warm-up
    orders = {turns[i : i + 9 : 3] for i in range(0, len(turns), 9)}
    assert all(sorted(order) == list("abc") for order in orders) and len(orders) > 2


def test_compute_is_timed_by_the_device_where_it_can(images: list[Path]) -> None:
    """2 ms there, 5 ms of work, 1 ms back; a device clock that sees 0.5 ms less."""
    for device_clock, clock_name, compute_ms in ((True, "CUDA events", 4.5), (False, "host", 5.0)):
        clock = FakeClock()
        runner = StagedFake(clock, lambda count: 5.0 * count, device_clock=device_clock)
        report = benchmark({"d": runner}, images, batch_sizes=[1, 2], seconds=0.2, rounds=2, clock=clock)
        p50 = {(c.scope, c.batch_size): c.latency_ms["p50"].value for c in report.cells}
        assert p50 == pytest.approx({
            ("compute", 1): compute_ms, (H2D, 1): 8.0, ("end_to_end", 1): 8.0,
            ("compute", 2): compute_ms + 5, (H2D, 2): 13.0, ("end_to_end", 2): 13.0,
        })  # fmt: skip
        assert report.cell("d", 1, "compute").clock == clock_name and report.cell("d", 1, H2D).clock == "host"
        assert report.notes == []


def test_compute_is_not_made_up(images: list[Path]) -> None:
    """Compute is the whole call on a CPU; where a call cannot be taken apart it is not measured."""
    clock = FakeClock()
    on_cpu = FakeRunner(clock, lambda count: 1.0)
    report = benchmark({"c": on_cpu}, images, seconds=0.05, rounds=2, clock=clock)
    assert [cell.scope for cell in report.cells] == [H2D, "end_to_end"]
    assert report.notes == ["c: compute is h2d+compute+d2h: fake cpu works in host memory, so nothing is copied"]
    closed = FakeRunner(clock, lambda count: 1.0)
    closed.on_cpu, closed.backend = False, "fake device"
    report = benchmark({"x": closed}, images, seconds=0.05, rounds=2, clock=clock)
    assert report.notes == ["x: compute was not measured: a call of fake device cannot be taken apart"]
    with pytest.raises(UserError, match="x: scope compute cannot be measured"):
        benchmark({"x": closed}, images, scopes=["compute"], seconds=0.05, rounds=2, clock=clock)


def test_end_to_end_holds_preprocess_and_inference(images: list[Path], tiny_onnx: Path) -> None:
    """The real clock and a real file."""
    runner = OnnxRunner(tiny_onnx, threads=1)
    scopes: Any = ["preprocess", H2D, "end_to_end"]
    report = benchmark({"tiny": runner}, images, scopes=scopes, seconds=0.3, rounds=4, warm_up_seconds=1.0)
    least = {cell.scope: min(min(part) for part in cell.samples_ms) for cell in report.cells}
    assert list(least) == scopes
    assert least["end_to_end"] > max(least["preprocess"], least[H2D])
    assert report.settings["threads"] == {"tiny": 1} and report.settings["images"] == 5


def test_several_streams_work_at_the_same_time(images: list[Path]) -> None:
    """The real clock: both sessions are in a call together, and do twice what one does."""
    inside, most, lock = 0, 0, threading.Lock()

    class Sleeps(FakeRunner):
        def __call__(self, images: np.ndarray) -> Any:
            nonlocal inside, most
            with lock:
                inside += 1
                most = max(most, inside)
            time.sleep(0.02)
            with lock:
                inside -= 1
            return super().__call__(images)

    def rate(streams: int) -> Any:
        runners = [Sleeps(FakeClock(), lambda count: 0.0) for _ in range(streams)]
        report = benchmark({"m": runners}, images, scopes=[H2D], seconds=0.2, rounds=4, warm_up_seconds=0)
        assert all(runner.batches for runner in runners) and report.settings["streams"] == {"m": streams}
        return report.cells[0]

    one = rate(1)
    assert (one.scenario, one.streams, most) == ("single-stream", 1, 1)
    two = rate(2)
    assert (two.scenario, two.streams, most) == ("multi-stream", 2, 2)
    assert two.throughput_ips.value > 1.4 * one.throughput_ips.value


def test_offline_names_the_best_batch(images: list[Path]) -> None:
    clock, rng = FakeClock(), np.random.default_rng(0)
    runner = FakeRunner(clock, lambda count: (4.0 + count + 0.2 * max(count - 8, 0) ** 2) * (1 + 0.01 * rng.random()))
    report = benchmark(
        {"o": runner}, images, batch_sizes=[1, 4, 8, 16], scopes=[H2D], scenario="offline", seconds=1, clock=clock
    )
    (line,) = offline_lines(report.cells)
    assert line.startswith("o, h2d+compute+d2h: most images a second at batch 8: 66")


def test_warm_up_waits_for_a_slow_start_and_tells_when_it_never_settles(images: list[Path]) -> None:
    clock = FakeClock()
    starting = FakeRunner(clock, lambda count: 20.0 if len(starting.batches) <= 12 else 2.0)
    cell = benchmark({"s": starting}, images, scopes=[H2D], seconds=0.1, rounds=2, clock=clock).cells[0]
    assert cell.warm_up.stable and cell.warm_up.calls >= 15 and max(map(max, cell.samples_ms)) < 3

    growing = FakeRunner(clock, lambda count: 1.02 ** len(growing.batches))
    report = benchmark({"g": growing}, images, scopes=[H2D], seconds=0.1, rounds=2, warm_up_seconds=0.3, clock=clock)
    assert not report.cells[0].warm_up.stable
    assert any("g, single-stream, h2d+compute+d2h, batch 1: not stable after" in line for line in report.warnings)
    calm = report.model_copy(update={"readings": []})
    (why,) = doubts(calm, report.cells[:1])
    assert why.startswith("not stable after") and doubts(calm, []) == []
    busy = Reading(second=1, cpu_mhz=None, load=None, foreign_cpu=0.6, gpus=None)
    assert doubts(report.model_copy(update={"readings": [busy]}), report.cells[:1]) == [
        why, "other processes used 60% of the CPU during the measurement",
    ]  # fmt: skip
    assert any(line.startswith("too few calls") and "p99 1000, p99.9 10000" in line for line in report.warnings)


def test_outliers_stay(images: list[Path]) -> None:
    clock = FakeClock()
    hiccup = FakeRunner(clock, lambda count: 50.0 if len(hiccup.batches) % 40 == 0 else 1.0)
    cell = benchmark({"h": hiccup}, images, scopes=[H2D], seconds=4, rounds=4, clock=clock).cells[0]
    samples = np.concatenate([np.asarray(part) for part in cell.samples_ms])
    assert (samples > 49).mean() == pytest.approx(1 / 40, rel=0.1)
    assert cell.latency_ms["p99"].value > 49 and cell.latency_ms["p50"].value == pytest.approx(1)


# ---------------------------------------------------------------------------------------------- what is written


def test_the_file_is_what_its_schema_says(images: list[Path], tmp_path: Path) -> None:
    report = measure(images, 1)
    write_report(tmp_path / "latency.json", report)
    assert read_report(tmp_path / "latency.json") == report
    committed = json.loads((ROOT / "docs" / "benchmark.schema.json").read_text())
    assert committed == BenchmarkReport.model_json_schema(), "write docs/benchmark.schema.json again"


def test_what_people_see(images: list[Path], tmp_path: Path) -> None:
    report = measure(images, 2, factor=1.2, seconds=6.0)
    console = Console(width=160, record=True, file=(tmp_path / "table.txt").open("w"))
    console.print(report_table(report))
    console.print(comparison_table(report.comparisons, tolerance=0.02))
    text = console.export_text()
    assert "0.8" in text and "×" in text and "[95 % confidence]" in text and "tolerance 2.0%" in text
    assert "too few calls for that percentile" in text, "p99.9 of 1500 calls"
    assert "slower" in text and "P(slower)" in text

    write_markdown(tmp_path / "latency.md", report)
    document = (tmp_path / "latency.md").read_text()
    assert "![Latency by percentile](latency.svg)" in document and "block bootstrap" in document
    rows = [line for line in document.splitlines() if line.startswith("| ")]
    assert len({line.count("|") for line in rows}) == 2, "every table row has all its columns"
    svg = ElementTree.parse(tmp_path / "latency.svg").getroot()
    lines = svg.findall(".//{*}polyline")
    assert len(lines) == 2
    heights = [[float(pair.split(",")[1]) for pair in line.attrib["points"].split()] for line in lines]
    assert all(a > b for a, b in zip(*heights, strict=True)), "the slower one lies above (smaller y)"
    assert heights[0] == sorted(heights[0], reverse=True), "a quantile never falls"


def test_names_cannot_break_the_documents(images: list[Path], tmp_path: Path) -> None:
    clock, name = FakeClock(), "a|b<script>[red]x&.onnx"
    report = benchmark({name: FakeRunner(clock, lambda c: 1.0)}, images, seconds=0.1, rounds=2, clock=clock)
    write_markdown(tmp_path / "x.md", report)
    ElementTree.parse(tmp_path / "x.svg")
    assert "a\\|b" in (tmp_path / "x.md").read_text()
    console = Console(width=200, record=True, file=(tmp_path / "table.txt").open("w"))
    console.print(report_table(report))
    assert "[red]x&" in console.export_text()


# ------------------------------------------------------------------------------------------ old against new


def test_two_results_are_compared(images: list[Path]) -> None:
    old, again, late = measure(images, 3), measure(images, 4), measure(images, 5, factor=1.10)
    same, _ = compare_reports(old, again, tolerance=0.02)
    assert {found.verdict for found in same} == {"no difference seen"} and slower(same) == []
    found, _ = compare_reports(old, late, tolerance=0.02)
    verdicts = {(c.other, c.figure): c.verdict for c in found}
    assert verdicts["a", "p50"] == "no difference seen" and verdicts["b", "p50"] == "slower"
    assert {c.other for c in slower(found)} == {"b"}
    p50 = next(c for c in found if (c.other, c.figure) == ("b", "p50"))
    assert (p50.ratio.low or 0) < 1.10 < (p50.ratio.high or 0) and p50.probability_slower > 0.8
    lenient, _ = compare_reports(old, late, tolerance=0.25)
    assert {c.verdict for c in lenient if c.other == "b"} == {"slower, within tolerance"}


def test_what_differs_besides_the_artifact_is_said(images: list[Path]) -> None:
    old = measure(images, 3)
    changed = {**old.environment, "packages": {"onnxruntime": "0.0"}}
    other = old.model_copy(update={"environment": changed, "cells": old.cells[:1]})
    _, differences = compare_reports(old, other)
    assert any(line.startswith("the packages differs") for line in differences)
    assert "1 measurement stands in one of the two results only" in differences
    renamed = [cell.model_copy(update={"runner": "c"}) for cell in old.cells[:1]]
    one, two = other, other.model_copy(update={"cells": renamed})
    assert {(c.base, c.other) for c in compare_reports(one, two)[0]} == {("a", "c")}
    elsewhere = [cell.model_copy(update={"scope": "end_to_end"}) for cell in renamed]
    with pytest.raises(UserError, match=r"nothing in common: a .*h2d.* and c .*end_to_end"):
        compare_reports(one, other.model_copy(update={"cells": elsewhere}))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        ("{", "not a JSON file"),
        ("[]", "no benchmark result"),
        ('{"schema_version": 1}', "a benchmark result of schema 1; this program reads schema 2"),
        ('{"schema_version": 2, "cells": 3, "environment": {}, "settings": {}}', "bad benchmark result: cells"),
    ],
)
def test_files_that_are_no_results(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "x.json").write_text(content)
    with pytest.raises(UserError, match=message):
        read_report(tmp_path / "x.json")


# -------------------------------------------------------------------------------------------------- the machine


def test_environment_is_json_and_names_the_machine() -> None:
    facts = json.loads(json.dumps(environment(), allow_nan=False))
    assert facts["cpu"]["logical_cores"] >= 1 and facts["packages"]["numpy"] == np.__version__
    assert facts["gpus"] is None or isinstance(facts["gpus"], list)


def test_gpus_are_watched_through_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    """A made-up NVML with one board that answers all but its power, is hot in the end, and slows down."""

    class NVMLError(Exception):
        pass

    def refuse(*_: object) -> None:
        raise NVMLError

    clocks, reasons = iter([1800, 1980, 1200]), iter([1, 0, 0x40 | 1])
    closed: list[bool] = []
    nvml = SimpleNamespace(
        NVMLError=NVMLError,
        NVML_CLOCK_SM=1,
        NVML_CLOCK_MEM=2,
        NVML_TEMPERATURE_GPU=0,
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: closed.append(True),
        nvmlDeviceGetCount=lambda: 1,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetMemoryInfo=lambda _: SimpleNamespace(used=3 * 2**20, total=2**30),
        nvmlDeviceGetPowerUsage=refuse,
        nvmlDeviceGetClockInfo=lambda _, which: next(clocks) if which == 1 else 2600,
        nvmlDeviceGetTemperature=lambda *_: 88,
        nvmlDeviceGetCurrentClocksThrottleReasons=lambda _: next(reasons),
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    with Telemetry() as telemetry:
        for _ in range(3):
            telemetry.read()
    gpus = [reading.gpus[0] for reading in telemetry.readings if reading.gpus]
    assert gpus[0] == {
        "sm_clock_mhz": 1800, "memory_clock_mhz": 2600, "power_w": None, "temperature_c": 88, "memory_used_mib": 3,
        "throttle_reasons": [],
    }  # fmt: skip
    assert gpus[2]["throttle_reasons"] == ["heat (hardware)"] and closed == [True]
    found = troubles([r.model_copy(update={"foreign_cpu": 0.5}) for r in telemetry.readings])
    assert found == [
        "other processes used 50% of the CPU during the measurement",
        "GPU 0 was throttled: heat (hardware)",
        "the SM clock of GPU 0 moved between 1200 and 1980 MHz",
    ]


def test_without_nvml_nothing_is_claimed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with Telemetry() as telemetry:
        telemetry.read()
    assert telemetry.readings[0].gpus is None


def test_wrong_arguments_are_one_line_errors(images: list[Path], tmp_path: Path) -> None:
    clock = FakeClock()
    runners = {"a": FakeRunner(clock, lambda count: 1.0)}
    for change, message in [
        ({"runners": {}}, "no artifact given"),
        ({"runners": {"a": []}}, "no artifact given"),
        ({"images": []}, "no images given"),
        ({"images": [tmp_path / "none.jpg"]}, "the file is missing"),
        ({"batch_sizes": [0]}, "batch sizes must be at least 1"),
        ({"scopes": ["gpu"]}, "unknown scope 'gpu'"),
        ({"seconds": 0}, "seconds must be positive"),
        ({"rounds": 1}, "rounds at least 2"),
    ]:
        arguments: dict[str, Any] = {"runners": runners, "images": images, "clock": clock, **change}
        with pytest.raises(UserError, match=message):
            benchmark(arguments.pop("runners"), arguments.pop("images"), **arguments)
