"""Training on two hosts, which are network namespaces of this machine, over gloo."""

from __future__ import annotations

import csv
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from compress.detectors.backbones import build_backbone
from tests.cluster.two_hosts import TwoHosts, missing, torchrun
from tests.helpers import tiny_recipe
from tests.helpers.training_runs import assert_same

pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.skipif(missing() is not None, reason=f"no two hosts here: {missing()}"),
]
DRIVER = "tests.cluster.driver"
STEPS = 30


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights to start from, so that BatchNorm runs on statistics."""
    file = tmp_path_factory.mktemp("weights") / "nano.pth"
    torch.manual_seed(0)
    torch.save(build_backbone("nano", weights="none").state_dict(), file)
    return file


def arguments(folder: Path, backbone: Path, *settings: str, devices: int, slower: float = 0) -> list[str]:
    """Of the driver: a training of the student alone, with a checkpoint every five steps."""
    wanted = [
        f"train.steps={STEPS}", "train.checkpoint_every=5", "train.optimizer.lr=1e-3", "train.ema=null",
        f"student.weights={backbone}", "student.frozen_stages=-1", "student.norm_eval=true", *settings,
    ]  # fmt: skip
    sets = [word for setting in wanted for word in ("--set", setting)]
    recipe = str(tiny_recipe.recipe_file(folder))
    return [DRIVER, "compress", str(slower), "train", recipe, "--devices", str(devices), *sets]


def on_two_hosts(hosts: TwoHosts, words: list[str], restarts: int = 0) -> list[subprocess.Popen[str]]:
    return [hosts.start(name, torchrun(name, *words, restarts=restarts)) for name in "ab"]


def ended(processes: list[subprocess.Popen[str]]) -> str:
    """What the processes said, all of which did well."""
    said = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(said), "\n".join(said)
    return "".join(said)


def losses(folder: Path) -> list[float]:
    with open(folder / "runs" / "tiny" / "student" / "metrics.csv", newline="") as file:
        return [float(row["loss"]) for row in csv.DictReader(file) if row["loss"]]


def checkpoint(folder: Path) -> object:
    return torch.load(folder / "runs" / "tiny" / "student" / "checkpoints" / "last.ckpt", weights_only=True)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, backbone: Path) -> Path:
    """Folder of a training on two hosts."""
    folder = tmp_path_factory.mktemp("two")
    with TwoHosts() as hosts:
        ended(on_two_hosts(hosts, arguments(folder, backbone, devices=2)))
    return folder


def test_the_losses_of_one_process(undisturbed: Path, tmp_path: Path, backbone: Path) -> None:
    words = arguments(tmp_path, backbone, devices=1)
    done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    one, two = losses(tmp_path), losses(undisturbed)
    assert len(one) == len(two) == STEPS and one[0] != one[-1]
    assert max(abs(a - b) for a, b in zip(one, two, strict=True)) < 1e-6


@pytest.mark.parametrize("host", ["a", "b"])
def test_a_killed_host_comes_back(host: str, undisturbed: Path, tmp_path: Path, backbone: Path) -> None:
    """Torchrun's agent and its training die on one host, and start there again: the end is the same to the bit. Where
    that is the host of the rendezvous, the other one's agent ends as well, and both start again."""
    after = random.Random(host).randrange(6, 25)
    words = arguments(tmp_path, backbone, "data.cache=false", devices=2, slower=0.1)
    last = tmp_path / "runs" / "tiny" / "student" / "checkpoints" / "last.ckpt"
    with TwoHosts() as hosts:
        processes = dict(zip("ab", on_two_hosts(hosts, words, restarts=3), strict=True))
        while all(process.poll() is None for process in processes.values()) and not (
            last.is_file() and torch.load(last, weights_only=True, mmap=True)["state"]["step"] >= after // 5 * 5
        ):
            time.sleep(0.02)
        assert processes[host].poll() is None, processes[host].communicate()[0]
        hosts.kill(host)
        processes[host].communicate()
        if host == "a":
            processes["b"].communicate()
            processes["b"] = hosts.start("b", torchrun("b", *words, restarts=3))
        processes[host] = hosts.start(host, torchrun(host, *words, restarts=3))
        said = ended(list(processes.values()))
    assert "resumed at step" in said
    assert_same(checkpoint(undisturbed), checkpoint(tmp_path))
    mine, theirs = (load_file(folder / "runs" / "tiny" / "student.safetensors") for folder in (undisturbed, tmp_path))
    assert all(torch.equal(value, theirs[key]) for key, value in mine.items())


def test_a_slow_host_is_named(tmp_path: Path, backbone: Path) -> None:
    words = arguments(tmp_path, backbone, "data.cache=false", "data.workers=0", devices=2, slower=0.5)
    with TwoHosts() as hosts:
        said = ended(on_two_hosts(hosts, words))
    lines = [line for line in said.splitlines() if "slow: " in line]
    assert len(lines) == 1 and "host-b (process" in lines[0] and "waiting for its images" in lines[0], said


def test_a_folder_that_one_host_does_not_see(tmp_path: Path, backbone: Path) -> None:
    """The second host has nothing where the first one keeps its runs."""
    words = arguments(tmp_path, backbone, devices=2)
    (tmp_path / "runs").mkdir()
    hide = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none "$0"; exec "$@"', str(tmp_path / "runs")]
    with TwoHosts() as hosts:
        first = hosts.start("a", torchrun("a", *words))
        second = hosts.start("b", [*hide, *torchrun("b", *words)])
        said = [process.communicate()[0] for process in (first, second)]
    assert first.returncode != 0 and second.returncode != 0
    assert "runs/tiny: host-b cannot see this folder of host-a; put runs on a file system" in "".join(said)
