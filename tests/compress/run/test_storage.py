"""Runs from an S3 server to an S3 server: what another machine continues, and what bad answers change (nothing)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from compress.cli.app import main
from compress.data.synthetic import generate
from compress.run import pipeline
from compress.training.checkpoint import Checkpoints, State
from deploy.core import remote, storage
from tests.helpers.storage_server import S3Server, s3_server
from tests.helpers.tiny_recipe import recipe

RECIPE = """
name: tiny
runs: s3://lab/runs
data:
  train: {{annotations: s3://lab/shapes/train.json, images: s3://lab/shapes/images}}
  val: {{annotations: s3://lab/shapes/val.json, images: s3://lab/shapes/images}}
  short: 64
  long: 64
  workers: {workers}
{teacher}
student: {{backbone: nano, weights: none, neck_channels: 32, head_depth: 0}}
train:
  steps: 6
  batch_size: 4
  checkpoint_every: 2
  accelerator: cpu
  optimizer: {{name: sgd, lr: 0.01}}
  schedule: {{name: cosine, warmup_steps: 2, warmup_factor: 0.1}}
deploy: {{score_threshold: 0.0, candidates: 100, benchmark: {{batch_sizes: [1], seconds: 0.02}}}}
"""
TEACHER = "teacher: {checkpoint: s3://lab/teacher.safetensors}\nmethods: {bckd: {}}"
STUDENT = "lab/runs/tiny/student.safetensors"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    monkeypatch.setattr(remote, "FIRST_PAUSE_S", 0.01)
    generate(tmp_path / "shapes", train=24, val=8, size=64, classes=3, seed=0)
    with s3_server(monkeypatch, tmp_path / "cache") as running:
        running.make_bucket("lab")
        running.put_folder(tmp_path / "shapes", "lab/shapes")
        yield running


def on_another_machine(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(storage.CACHE, str(folder / name))
    monkeypatch.setattr(remote, "_asked", set())


def compress(*words: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(words))
    return int(ended.value.code or 0)


def test_another_machine_continues_a_training(
    server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server.put("lab/tiny.yaml", RECIPE.format(workers=0, teacher="").encode())
    on_another_machine("whole", tmp_path, monkeypatch)
    assert compress("train", "s3://lab/tiny.yaml") == 0
    assert "next: compress export s3://lab/runs/tiny/student.safetensors\n" in capsys.readouterr().out
    weights = server.get(STUDENT)
    server.remove("lab/runs")

    save = Checkpoints.save

    def pulled_out(self: Checkpoints, state: State) -> None:
        save(self, state)
        if state.step == 4:
            raise KeyboardInterrupt

    on_another_machine("first", tmp_path, monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", pulled_out)
        assert compress("train", "s3://lab/tiny.yaml") == 130
    assert STUDENT not in server.names("lab/runs")
    on_another_machine("second", tmp_path, monkeypatch)
    assert compress("train", "s3://lab/tiny.yaml") == 2  # it is unfinished, and nobody said --resume
    assert compress("train", "s3://lab/tiny.yaml", "--resume") == 0
    assert server.get(STUDENT) == weights
    assert "student: step 2/" not in capsys.readouterr().out

    on_another_machine("third", tmp_path, monkeypatch)
    assert compress("train", "s3://lab/tiny.yaml") == 0
    assert "everything was done already" in capsys.readouterr().out


@pytest.mark.exhaustive
def test_bad_answers_change_nothing(server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole path, from address to address, with loader processes; 5 % of 503, and a body that is cut."""
    teacher = pipeline.distill(recipe(tmp_path / "teacher", "teacher=null", "methods={}"), distillation=False)
    server.put("lab/teacher.safetensors", teacher / "student.safetensors")
    server.put("lab/tiny.yaml", RECIPE.format(workers=2, teacher=TEACHER).encode())
    shapes = ["--images", "s3://lab/shapes/images"]
    weights = []
    for share in (0.0, 0.05):
        on_another_machine(f"with-{share}", tmp_path, monkeypatch)
        server.remove("lab/runs")
        server.faults.begin(share)
        server.faults.cut = {"train_000003.png"} if share else set()
        assert compress("data", "check", "s3://lab/shapes/train.json", *shapes) == 0
        assert compress("distill", "s3://lab/tiny.yaml") == 0
        assert compress("export", f"s3://{STUDENT}", "--out", "s3://lab/files/student.onnx") == 0
        data = ["--data", "s3://lab/shapes/val.json", *shapes, "--json", "s3://lab/files/val.json"]
        assert compress("validate", "s3://lab/files/student.onnx", *data) == 0
        assert compress("run", "s3://lab/tiny.yaml") == 0
        assert compress("report", "s3://lab/runs/tiny") == 0
        weights.append(server.get(STUDENT))
    assert server.faults.injected > 5 and len(server.faults.were_cut) == 1
    assert weights[0] == weights[1]
    assert {"lab/files/student.onnx", "lab/files/val.json"} == set(server.names("lab/files"))
    written = server.names("lab/runs")
    assert "lab/runs/tiny/report.html" in written
    places = [name for name in written if str(tmp_path).encode() in server.get(name)]
    assert places == []  # what is uploaded says addresses, not where this machine had its copies
