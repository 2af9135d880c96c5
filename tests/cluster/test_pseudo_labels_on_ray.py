"""Pseudo labels on Ray clusters: the bytes of the local engine, whatever happens on the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from compress.pseudo.parts import Shard, part_file
from tests.helpers.random_teacher import make, teacher

pytest.importorskip("ray")
IMAGES, BROKEN = 240, ("007.png", "100.png", "101.png")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, three of which are no pictures, two teachers, and the file that this process makes of them."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    for index in range(IMAGES):
        width, height = rng.integers(40, 97, 2)
        pixels = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
        picture = Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR)
        picture.save(folder / "images" / f"{index:03}.png")
    for name in BROKEN:
        (folder / "images" / name).write_bytes((folder / "images" / name).read_bytes()[:50])
    teacher(folder / "a.safetensors", ("cat", "dog"), 1)
    teacher(folder / "b.safetensors", ("person", "kitten"), 2)
    make(folder, folder / "local.json", skip_unreadable=True)
    return folder


def drive(world: Path, out: Path, options: dict[str, Any]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.cluster.driver", "label", str(world), str(out), json.dumps(options)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def wait_for_chunks(out: Path, count: int, driver: subprocess.Popen[str]) -> None:
    """Until so many chunks are in the part file."""
    part = part_file(out, Shard(0, 1))
    while driver.poll() is None and not (part.is_file() and part.read_bytes().count(b"\n") > count):
        time.sleep(0.01)
    assert driver.poll() is None, f"it ended before {count} chunks: {driver.communicate()[0]}"


def actors(driver: subprocess.Popen[str]) -> list[psutil.Process]:
    """Processes of the workers, of a Ray that the driver has started."""
    return [
        process
        for process in psutil.Process(driver.pid).children(recursive=True)
        if "_Actor" in "".join(process.cmdline())
    ]


def nothing(out: Path, driver: subprocess.Popen[str]) -> None:
    """Leave it alone."""


def kill_an_actor(out: Path, driver: subprocess.Popen[str]) -> None:
    wait_for_chunks(out, 10, driver)
    running = actors(driver)
    assert running, "no process of a worker was found"
    running[0].kill()


def kill_the_driver(out: Path, driver: subprocess.Popen[str]) -> None:
    wait_for_chunks(out, 10, driver)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()


@contextmanager
def two_nodes() -> Iterator[tuple[str, Callable[[Path, subprocess.Popen[str]], None]]]:
    """Address of a cluster, and what kills the node that is not its head."""
    made = subprocess.Popen(
        [sys.executable, "-m", "tests.cluster.driver", "cluster"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert made.stdin is not None and made.stdout is not None
    address = made.stdout.readline().strip()

    def kill(out: Path, driver: subprocess.Popen[str]) -> None:
        wait_for_chunks(out, 10, driver)
        print(file=made.stdin, flush=True)
        assert made.stdout is not None and made.stdout.readline().strip() == "gone"

    try:
        yield address, kill
    finally:
        made.communicate("\n")


CASES: dict[str, tuple[dict[str, Any], Callable[[Path, subprocess.Popen[str]], None]]] = {
    "one actor": ({"actors": 1}, nothing),
    "two actors": ({"actors": 2}, nothing),
    "five actors": ({"actors": 5, "num_cpus": 0.4}, nothing),
    "small pieces": ({"actors": 2, "images": 3}, nothing),
    "one piece": ({"actors": 2, "images": 1000}, nothing),
    "an actor is killed": ({"actors": 2, "images": 4}, kill_an_actor),
    "a node is killed": ({"actors": 2, "images": 4}, nothing),
    "the driver is killed": ({"actors": 2, "images": 4}, kill_the_driver),
}
IN_EVERY_TEST = {"two actors"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in IN_EVERY_TEST else pytest.mark.exhaustive) for name in CASES]
)
def test_the_bytes_of_the_local_engine(name: str, world: Path, tmp_path: Path) -> None:
    options, disturb = CASES[name]
    out = tmp_path / "ray.json"
    if name == "a node is killed":
        with two_nodes() as (address, kill):
            driver = drive(world, out, {**options, "address": address})
            kill(out, driver)
            said, _ = driver.communicate()
    else:
        driver = drive(world, out, dict(options))
        disturb(out, driver)
        said, _ = driver.communicate()
    if disturb is kill_the_driver:
        assert driver.returncode == -signal.SIGKILL and not out.exists()
        before = part_file(out, Shard(0, 1)).read_bytes()
        driver = drive(world, out, dict(options))
        wait_for_chunks(out, before.count(b"\n"), driver)
        assert part_file(out, Shard(0, 1)).read_bytes().startswith(before[: before.rindex(b"\n") + 1])
        said, _ = driver.communicate()
    assert driver.returncode == 0, said
    assert out.read_bytes() == (world / "local.json").read_bytes()
    assert json.loads(out.read_text())["skipped"] == list(BROKEN)
    assert not out.with_name("ray.json.parts").exists()
