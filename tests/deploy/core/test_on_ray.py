"""Work on a Ray of this machine: order, mistakes, workers that die; and validation on it."""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from compress.cli.addresses import addresses_as_paths
from compress.cli.options import ActorFlags
from deploy.core import on_ray
from deploy.core.errors import UserError
from deploy.core.on_ray import TRIES, Cluster, map_in_order
from deploy.runtimes.onnx import OnnxRunner
from deploy.runtimes.open import open_runners
from deploy.validate.detect import detect_all, detect_on
from tests.helpers.red_rectangle_model import picture, write_red_model

ray = pytest.importorskip("ray")


@pytest.fixture(scope="module", autouse=True)
def machine() -> Iterator[None]:
    """One Ray for all of them, with two processors whatever there are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", "local")
        ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
        yield
        ray.shutdown()


def worker(kind: str, notes: Path) -> Callable[[int], int]:
    """Squares numbers, in its own way."""
    if kind == "cannot begin":
        raise UserError("no such teacher")

    def square(number: int) -> int:
        if kind == "the first is slow" and number == 0:
            time.sleep(1)
        if kind == "one is wrong" and number >= 3:
            raise UserError(f"{number} is too much")
        if kind == "one kills" and number == 3:
            with open(notes, "a") as file:
                file.write("x")
            os._exit(1)
        if kind == "once" and number == 3 and not notes.exists():
            notes.touch()
            os._exit(1)
        return number**2

    return square


def work(kind: str, notes: Path, **cluster: Any) -> list[int]:
    return list(map_in_order(Cluster(**cluster), partial(worker, kind, notes), range(8)))


@pytest.mark.parametrize("kind", ["once", pytest.param("the first is slow", marks=pytest.mark.exhaustive)])
def test_results_come_in_order(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a directory in which the cluster was not started."""
    monkeypatch.chdir(tmp_path)
    assert work(kind, Path("notes"), actors=2) == [number**2 for number in range(8)]
    assert kind != "once" or (tmp_path / "notes").exists()


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("one is wrong", "3 is too much"),
        pytest.param("cannot begin", "no such teacher", marks=pytest.mark.exhaustive),
        pytest.param(
            "one kills",
            f"ray: {TRIES} workers died at piece 4 of the work; memory is the usual reason",
            marks=pytest.mark.exhaustive,
        ),
    ],
)
def test_a_mistake_is_one_line(kind: str, line: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"^{line}"):
        work(kind, tmp_path / "notes", actors=2)
    assert kind != "one kills" or (tmp_path / "notes").read_text() == "x" * TRIES


@pytest.mark.parametrize(
    ("cluster", "line"),
    [
        (
            {"num_gpus": 0.5},
            "ray: room for 0 of 1 processes: each is to have 1 CPU and 0.5 GPU, the cluster has 2 CPU, 0 GPU",
        ),
        (
            {"num_cpus": 4},
            "ray: room for 0 of 1 processes: each is to have 4 CPU and 0 GPU, the cluster has 2 CPU, 0 GPU",
        ),
    ],
)
def test_more_than_there_is(cluster: dict[str, float], line: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"^{line}"):
        work("", tmp_path, **cluster)


def test_more_at_once_than_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"^ray: room for 2 of 3 processes: .*, the cluster has 2 CPU, 0 GPU; change"):
        on_ray.room(ray, Cluster(), 3, all_at_once=True)
    assert on_ray.room(ray, Cluster(actors=3), 3) == (0, 2)
    assert on_ray.room(ray, Cluster(address="auto"), 3) == (0, 2)
    assert capsys.readouterr().out.endswith("the cluster has 2 CPU, 0 GPU; the others wait until it grows\n")


def test_another_version_on_a_node(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(on_ray, "_version", lambda: "0.0.9")
    with pytest.raises(UserError, match=r"^ray: node \S+ has version \S+ of compress-detectors, this command 0\.0\.9"):
        work("", tmp_path)


@pytest.mark.parametrize(
    ("address", "line"),
    [
        ("ray://head:10001", "ray: ray://head:10001: give auto, or host:port of the cluster's head; Ray Client is not"),
        ("head", "ray: 'head' is not the address of a cluster; give auto, or host:port"),
        ("127.0.0.1:1", r"ray: 127\.0\.0\.1:1: nothing answers there \(.*refused\); give host:port"),
    ],
)
def test_an_address_without_a_cluster(address: str, line: str) -> None:
    with addresses_as_paths(["run", "--address", address]) as words:
        assert words[-1] == address
    with pytest.raises(UserError, match=f"^{line}"):
        ActorFlags(engine="ray", address=address).cluster()


def test_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"ray is not installed: pip install 'compress-detectors\[ray\]'"):
        ActorFlags(engine="ray").cluster()


def test_options_that_would_do_nothing() -> None:
    with pytest.raises(UserError, match=r"^--actors: is about a Ray cluster; add --engine ray"):
        ActorFlags(actors=2).cluster()
    with pytest.raises(UserError, match=r"^--num-cpus: a process needs a share"):
        ActorFlags(engine="ray", num_cpus=0).cluster()
    assert ActorFlags(engine="ray", num_gpus=0.5, actors=3).cluster() == Cluster(num_gpus=0.5, actors=3)


def test_validation_finds_the_same(tmp_path: Path) -> None:
    """Of two files; the pieces are smaller than the images."""
    write_red_model(tmp_path / "one.onnx")
    write_red_model(tmp_path / "other.onnx")
    rng = np.random.default_rng(0)
    files, sizes = {}, {}
    for number in range(7):
        x, y = (int(value) for value in rng.integers(0, 40, 2))
        pixels = picture((80, 150), (x, y, x + 20 + 10 * number, y + 30))
        files[5 * number], sizes[5 * number] = tmp_path / f"{number}.png", pixels.shape[:2]
        Image.fromarray(pixels).save(files[5 * number])
    paths = [tmp_path / "one.onnx", tmp_path / "other.onnx"]
    runners = {path.name: OnnxRunner(path) for path in paths}
    seen: list[tuple[int, int]] = []
    detect = detect_on(Cluster(actors=2, images=4), partial(_opened, paths))
    found = detect(runners, files, 2, lambda done, total: seen.append((done, total)), sizes=sizes)
    wanted = detect_all(runners, files, 2)
    assert seen == [(4, 7), (7, 7)] and list(found) == list(wanted)
    for name, outcome in found.items():
        assert list(outcome.detections) == list(wanted[name].detections)
        for image, detections in outcome.detections.items():
            other = wanted[name].detections[image]
            assert len(detections) == 1
            assert np.array_equal(detections.boxes, other.boxes) and np.array_equal(detections.scores, other.scores)
    with pytest.raises(UserError, match=r"0\.png: the file is .* pixels, the annotations say 1x1"):
        detect(runners, files, 2, sizes={0: (1, 1)})


def _opened(paths: list[Path]) -> dict[str, Any]:
    return {Path(name).name: runner for name, runner in open_runners(paths).items()}
