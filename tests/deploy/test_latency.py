"""The benchmark: what it calls, in which order, and what it makes of the times."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from deploy.environment import environment
from deploy.errors import UserError
from deploy.latency import PERCENTILES, _resampled_percentiles, benchmark, report_table, write_report
from deploy.runtimes.base import Detections
from deploy.runtimes.onnx import OnnxRunner
from tests.deploy.tiny import CARD

LOG: list[tuple[str, int]] = []


class Sleeper:
    """Takes `ms` milliseconds an image, and `first_ms` more for each of the first ten calls."""

    card = CARD
    backend = "sleep"

    def __init__(self, name: str, ms: float, first_ms: float = 0.0, jitter_ms: float = 0.0) -> None:
        self.name, self.ms, self.first_ms, self.jitter_ms, self.calls = name, ms, first_ms, jitter_ms, 0
        self.rng = np.random.default_rng(0)

    def __call__(self, images: np.ndarray) -> Detections:
        LOG.append((self.name, len(images)))
        self.calls += 1
        extra = self.first_ms if self.calls <= 10 else 0.0
        time.sleep((self.ms * len(images) + extra + self.jitter_ms * self.rng.random()) / 1000)
        n = len(images)
        return Detections(
            np.zeros((n, 4, 4), np.float32),
            np.zeros((n, 4), np.float32),
            np.zeros((n, 4), np.int64),
            np.full(n, 2, np.int32),
        )


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    paths = [folder / f"{i}.jpg" for i in range(5)]
    for i, path in enumerate(paths):
        Image.fromarray(rng.integers(0, 255, (60 + 10 * i, 80, 3), np.uint8)).save(path)
    return paths


def test_figures_are_those_of_the_samples_and_the_speedup_is_real(images: list[Path], tmp_path: Path) -> None:
    runners = {"slow": Sleeper("slow", 6.0), "fast": Sleeper("fast", 2.0)}
    LOG.clear()
    report = benchmark(runners, images, batch_sizes=[1, 3], scopes=["inference"], seconds=0.4, rounds=5)
    assert len(report.cells) == 4
    for cell in report.cells:
        samples = np.concatenate([np.asarray(part) for part in cell.samples_ms])
        assert len(cell.samples_ms) == 5 and cell.calls == len(samples)
        for percent in (50, 90, 95, 99):
            estimate = cell.latency_ms[f"p{percent}"]
            assert estimate.value == pytest.approx(np.percentile(samples, percent))
            assert estimate.low <= estimate.value <= estimate.high or percent != 50
        assert samples.min() >= runners[cell.runner].ms * cell.batch_size
        spent = samples.sum() / 1000
        assert cell.throughput_ips.value == pytest.approx(len(samples) * cell.batch_size / spent)
        assert cell.warm_up.calls >= 15 and cell.mean_ms == pytest.approx(samples.mean())
    assert report.cell("slow", 1, "inference").speedup is None
    speedup = report.cell("fast", 1, "inference").speedup
    assert speedup is not None and speedup.low <= speedup.value <= speedup.high
    assert 1.8 < speedup.value < 3.2
    assert {size for _, size in LOG} == {1, 3}

    write_report(tmp_path / "latency.json", report)
    written = json.loads((tmp_path / "latency.json").read_text())
    assert written["cells"][0]["samples_ms"] == report.cells[0].samples_ms
    assert written["environment"]["cpu"]["logical_cores"] >= 1 and written["settings"]["rounds"] == 5
    console = Console(width=160, record=True, file=(tmp_path / "table.txt").open("w"))
    console.print(report_table(report))
    text = console.export_text()
    assert "slow" in text and "×" in text and "[" in text.split("inference")[1]
    with pytest.raises(KeyError):
        report.cell("slow", 2, "inference")


def test_the_bootstrap_equals_percentiles_of_repeated_samples() -> None:
    rng = np.random.default_rng(0)
    rounds = [rng.lognormal(0, 1, n).tolist() for n in (1, 7, 30, 12)]
    times = rng.multinomial(4, [0.25] * 4, 50)
    for weights, found in zip(times, _resampled_percentiles(rounds, times), strict=True):
        repeated = np.concatenate([np.tile(part, k) for part, k in zip(rounds, weights, strict=True)])
        np.testing.assert_allclose(found, np.percentile(repeated, PERCENTILES))


def test_a_steady_runner_has_a_narrower_interval_than_one_that_drifts(images: list[Path]) -> None:
    class Drifting(Sleeper):
        def __call__(self, images: np.ndarray) -> Detections:
            self.ms = 1.0 + 3.0 * ((time.perf_counter() * 2) % 1)  # faster and slower twice a second
            return super().__call__(images)

    runners = {"steady": Sleeper("steady", 2.5), "drifting": Drifting("drifting", 1.0)}
    report = benchmark(runners, images, scopes=["inference"], seconds=0.8, rounds=8, warm_up_seconds=0.3)
    width = {cell.runner: cell.latency_ms["p50"].high - cell.latency_ms["p50"].low for cell in report.cells}
    assert width["drifting"] > width["steady"]


def test_runners_take_turns(images: list[Path]) -> None:
    LOG.clear()
    runners = {name: Sleeper(name, 1.0) for name in ("a", "b")}
    benchmark(runners, images, scopes=["inference"], seconds=0.08, rounds=8, warm_up_seconds=0.05)
    turns = [name for i, (name, _) in enumerate(LOG) if i == 0 or LOG[i - 1][0] != name]
    assert len(turns) >= 8  # A warm-up, B warm-up, then at least one change a round on average
    assert turns.count("a") >= 4 and turns.count("b") >= 4


def test_end_to_end_holds_preprocess_and_inference(images: list[Path], tiny_onnx: Path) -> None:
    runner = OnnxRunner(tiny_onnx, threads=1)
    report = benchmark({"tiny": runner}, images, seconds=0.4, rounds=4, warm_up_seconds=1.0)
    p50 = {cell.scope: cell.latency_ms["p50"].value for cell in report.cells}
    assert list(p50) == ["preprocess", "inference", "end_to_end"]
    assert p50["end_to_end"] > max(p50["preprocess"], p50["inference"])
    assert p50["end_to_end"] < 3 * (p50["preprocess"] + p50["inference"])
    assert report.settings["threads"] == {"tiny": 1}


def test_warm_up_waits_for_a_slow_start_and_tells_when_it_never_settles(images: list[Path]) -> None:
    slow_start = Sleeper("s", 2.0, first_ms=20.0)
    cell = benchmark({"s": slow_start}, images, scopes=["inference"], seconds=0.1, rounds=2).cells[0]
    assert cell.warm_up.stable and max(max(part) for part in cell.samples_ms) < 20

    growing = Sleeper("g", 1.0)

    def slower(images: np.ndarray) -> Detections:
        growing.ms *= 1.05
        return Sleeper.__call__(growing, images)

    class Growing(Sleeper):
        __call__ = staticmethod(slower)  # type: ignore[assignment]

    report = benchmark(
        {"g": Growing("g", 1.0)}, images, scopes=["inference"], seconds=0.1, rounds=2, warm_up_seconds=0.3
    )
    assert not report.cells[0].warm_up.stable
    assert any("not stable after" in line for line in report.warnings)
    assert any("p99 is close to the largest" in line for line in report.warnings)


def test_outliers_stay(images: list[Path]) -> None:
    class Hiccup(Sleeper):
        def __call__(self, images: np.ndarray) -> Detections:
            out = super().__call__(images)
            if self.calls % 40 == 0:
                time.sleep(0.05)
            return out

    report = benchmark({"h": Hiccup("h", 1.0)}, images, scopes=["inference"], seconds=0.6, rounds=3)
    samples = np.concatenate([np.asarray(part) for part in report.cells[0].samples_ms])
    assert (samples > 50).sum() >= 3
    assert report.cells[0].latency_ms["p99"].value > 20 > report.cells[0].latency_ms["p50"].value


def test_environment_is_json_and_names_the_machine() -> None:
    facts = json.loads(json.dumps(environment(), allow_nan=False))
    assert facts["cpu"]["logical_cores"] >= 1 and facts["packages"]["numpy"] == np.__version__
    assert facts["gpus"] is None or isinstance(facts["gpus"], list)


def test_wrong_arguments_are_one_line_errors(images: list[Path], tmp_path: Path) -> None:
    runners = {"a": Sleeper("a", 0.1)}
    for change, message in [
        ({"runners": {}}, "no artifact given"),
        ({"images": []}, "no images given"),
        ({"images": [tmp_path / "none.jpg"]}, "no such image"),
        ({"batch_sizes": [0]}, "batch sizes must be at least 1"),
        ({"scopes": ["gpu"]}, "unknown scope 'gpu'"),
        ({"seconds": 0}, "seconds must be positive"),
        ({"rounds": 1}, "rounds at least 2"),
    ]:
        arguments = {"runners": runners, "images": images, **change}
        with pytest.raises(UserError, match=message):
            benchmark(arguments.pop("runners"), arguments.pop("images"), **arguments)  # type: ignore[arg-type]
