"""Loggers of other tools: what arrives there is what metrics.csv holds, in one run however often it is interrupted."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import socket
import struct
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from compress.config.recipe import Recipe, recipe_sha256
from compress.run import pipeline
from compress.training.loggers import opened
from compress.training.loggers.base import RunFacts, RunLogger, Table
from deploy.core.errors import UserError
from tests.helpers import tiny_recipe

ALONE = ("teacher=null", "methods={bckd: null}", "train.steps=20", "train.checkpoint_every=5")


def interrupt_at(step: int, monkeypatch: pytest.MonkeyPatch, recipe: Recipe) -> None:
    """Train until Ctrl-C comes in the middle of a step."""
    original, count = torch.optim.SGD.step, 0

    def counting(*arguments: Any, **named: Any) -> Any:
        nonlocal count
        count += 1
        if count == step:
            raise KeyboardInterrupt
        return original(*arguments, **named)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch.optim.SGD, "step", counting)
        pipeline.distill(recipe, distillation=False)


def rows_of(recipe: Recipe) -> list[dict[str, str]]:
    with open(recipe.run_dir / "student" / "metrics.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def points(recipe: Recipe, column: str) -> dict[int, float]:
    """Step → value."""
    return {int(row["step"]): float(row[column]) for row in rows_of(recipe) if row[column]}


# --- any logger -----------------------------------------------------------------------------------------


class Memory(RunLogger):
    """Keeps what it is told; fails from a step on."""

    runs: list[Memory] = []  # noqa: RUF012
    fails_at = 10**9

    def __init__(self, settings: Any, facts: RunFacts, identifier: str | None) -> None:
        self.identifier = identifier or f"run {len(Memory.runs)}"
        self.facts, self.rows, self.ended = facts, list[tuple[str, int]](), list[object]()
        self.told = dict[str, float]()
        Memory.runs.append(self)

    def row(self, training: str, step: int, values: Mapping[str, float]) -> None:
        if step >= self.fails_at:
            raise ConnectionError("the server\nis gone")
        self.rows.append((training, step))

    def table(self, table: Table) -> None:
        self.told = table.figures()

    def upload(self, files: Sequence[Path]) -> None:
        self.ended += [file.name for file in files]

    def close(self, *, finished: bool) -> None:
        self.ended.append(finished)


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> type[Memory]:
    monkeypatch.setattr(opened, "LOGGERS", {"mlflow": Memory, "wandb": Memory, "clearml": Memory})
    monkeypatch.setattr(opened, "find_spec", lambda name: name)
    monkeypatch.setattr(Memory, "runs", [])
    return Memory


def test_resuming_goes_on_in_the_same_run_and_other_settings_begin_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: type[Memory]
) -> None:
    recipe = tiny_recipe.recipe(tmp_path, *ALONE, "loggers={mlflow: {upload: true}}")
    interrupt_at(13, monkeypatch, recipe)
    pipeline.distill(recipe, distillation=False, resume=True)
    pipeline.distill(tiny_recipe.recipe(tmp_path, *ALONE, "loggers={mlflow: {}}", "seed=1"), distillation=False)
    assert [run.identifier for run in memory.runs] == ["run 0", "run 0", "run 2"]
    assert [run.rows for run in memory.runs[:2]] == [
        [("student", 1), ("student", 10)],
        [("student", 20), ("student", 20)],
    ]
    assert [run.ended for run in memory.runs] == [[False], ["recipe.yaml", "student.safetensors", True], [True]]
    assert memory.runs[1].told == {"student/map": pytest.approx(points(recipe, "map")[20])}
    assert memory.runs[0].facts.flat()["train.optimizer.lr"] == "0.01"


def test_a_logger_that_fails_costs_a_line_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: type[Memory], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tiny_recipe.recipe(tmp_path / "a", *ALONE, "loggers={wandb: {}, clearml: {}}")
    monkeypatch.setattr(memory, "fails_at", 10)
    pipeline.distill(recipe, distillation=False)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert sorted(said) == [
        f"warning: loggers.{name}: the server is gone; the run goes on without it" for name in ("clearml", "wandb")
    ]
    alone = tiny_recipe.recipe(tmp_path / "b", *ALONE)
    pipeline.distill(alone, distillation=False)
    weights, others = (load_file(one.run_dir / "student.safetensors") for one in (recipe, alone))
    assert all(torch.equal(weights[name], others[name]) for name in weights)


def test_what_cannot_be_opened_is_said_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe.recipe(tmp_path, *ALONE, "loggers={wandb: {}}")
    monkeypatch.setattr(opened, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"^loggers.wandb: wandb is not installed; pip install 'compress-detectors\[wandb"
    ):
        pipeline.distill(recipe, distillation=False, dry_run=True)

    def refuse(*arguments: object) -> RunLogger:
        raise RuntimeError("no key")

    monkeypatch.setattr(opened, "find_spec", lambda name: name)
    monkeypatch.setattr(opened, "LOGGERS", {"wandb": refuse})
    with pytest.raises(UserError, match=r"^loggers.wandb: no key; to go on without it: --set loggers.wandb=null$"):
        pipeline.distill(recipe, distillation=False)
    assert not (recipe.run_dir / "student").exists()


def test_loggers_are_no_part_of_what_a_recipe_makes(tmp_path: Path) -> None:
    plain, told = (tiny_recipe.recipe(tmp_path, *more) for more in ((), ("loggers={mlflow: {}}",)))
    assert recipe_sha256(plain) == recipe_sha256(told)


# --- the real ones --------------------------------------------------------------------------------------


def logged_to_mlflow(recipe: Recipe, uri: str) -> None:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("compress")
    (run,) = client.search_runs([experiment.experiment_id])
    history = client.get_metric_history(run.info.run_id, "student/loss")
    assert {point.step: point.value for point in history} == pytest.approx(points(recipe, "loss"))
    assert sorted(point.step for point in history) == [1, 10, 20]
    assert run.data.metrics["student/map"] == run.data.metrics["result/student/map"]
    assert run.data.metrics["student/map"] == pytest.approx(points(recipe, "map")[20])
    assert run.info.status == "FINISHED" and run.data.tags["run_folder"] == str(recipe.run_dir)
    assert run.data.params["train.optimizer.name"] == "sgd" and run.data.params["teacher"] == "null"
    names = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert names == {"recipe.yaml", "student.safetensors"}


def interrupted_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loggers: Mapping[str, Any]) -> Recipe:
    recipe = tiny_recipe.recipe(tmp_path, *ALONE, f"loggers={json.dumps(loggers)}")
    interrupt_at(13, monkeypatch, recipe)
    pipeline.distill(recipe, distillation=False, resume=True)
    return recipe


def test_mlflow_in_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = (tmp_path / "mlruns").as_uri()
    recipe = interrupted_and_resumed(tmp_path, monkeypatch, {"mlflow": {"tracking_uri": uri, "upload": True}})
    logged_to_mlflow(recipe, uri)


@pytest.mark.exhaustive
def test_mlflow_with_its_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow.server", exc_type=ImportError)
    pytest.importorskip("sqlalchemy")
    with mlflow_server(tmp_path / "server") as uri:
        settings = {"mlflow": {"tracking_uri": uri, "upload": True}}
        recipe = interrupted_and_resumed(tmp_path / "whole", monkeypatch, settings)
        logged_to_mlflow(recipe, uri)
    with pytest.raises(UserError, match=r"^loggers.mlflow: API request to http.* failed"):  # its server is gone
        pipeline.distill(recipe, distillation=False)


@contextlib.contextmanager
def mlflow_server(folder: Path) -> Iterator[str]:
    folder.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/db", "--artifacts-destination", str(folder / "artifacts")]
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while True:
            assert process.poll() is None
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health"):
                break
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, 15)
        process.wait()


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    settings = {"wandb": {"mode": "offline", "upload": True}}
    recipe = interrupted_and_resumed(tmp_path, monkeypatch, settings)
    files = sorted(recipe.run_dir.glob("wandb/offline-run-*/run-*.wandb"))
    identifier = json.loads((recipe.run_dir / "loggers.json").read_text())["runs"]["wandb"]
    assert [file.stem for file in files] == [f"run-{identifier}"] * 2
    records = [record for file in files for record in wandb_records(file)]
    rows = [
        {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.WhichOneof("record_type") == "history"
    ]
    found = {row["student/step"]: row["student/loss"] for row in rows if "student/loss" in row}
    assert found == pytest.approx(points(recipe, "loss")) and len(found) == 3
    assert {"result/student/map"} <= {
        "/".join(item.nested_key) or item.key for record in records for item in record.summary.update
    }
    kept = [entry.path for record in records for entry in record.artifact.manifest.contents]
    assert {"recipe.yaml", "student.safetensors"} <= set(kept)


def wandb_records(file: Path) -> Iterator[Any]:
    """Records of wandb's file: protobuf messages in LevelDB's log format, in blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    data, at, parts = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        size, kind = struct.unpack("<4xHB", data[at : at + 7])
        parts += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield wandb_internal_pb2.Record.FromString(parts)
            parts = b""


CLEARML = """
import sys
from pathlib import Path
from compress.run import pipeline
from tests.helpers import tiny_recipe
import signal
before = signal.getsignal(signal.SIGINT)
pipeline.distill(tiny_recipe.recipe(Path(sys.argv[1]), *sys.argv[2:]), distillation=False)
assert signal.getsignal(signal.SIGINT) is before
"""


@pytest.mark.exhaustive  # it takes a quarter of a minute to begin and end
def test_clearml_offline(tmp_path: Path) -> None:
    pytest.importorskip("clearml")
    overrides = [*ALONE, "loggers={clearml: {mode: offline, upload: true}}"]
    environment = {**os.environ, "CLEARML_CACHE_DIR": str(tmp_path / "cache"), "CLEARML_LOG_LEVEL": "ERROR"}
    environment["PYTHONPATH"] = os.pathsep.join([os.getcwd(), environment.get("PYTHONPATH", "")])
    subprocess.run([sys.executable, "-c", CLEARML, str(tmp_path), *overrides], check=True, env=environment)
    recipe = tiny_recipe.recipe(tmp_path, *overrides)
    identifier = json.loads((recipe.run_dir / "loggers.json").read_text())["runs"]["clearml"]
    session = tmp_path / "cache" / "offline" / identifier
    events = [one for line in (session / "metrics.jsonl").read_text().splitlines() for one in json.loads(line)]
    found = {one["iter"]: one["value"] for one in events if (one["metric"], one["variant"]) == ("loss", "student")}
    assert found == pytest.approx(points(recipe, "loss"))
    task = json.loads((session / "task.json").read_text())
    assert {one["key"] for one in task["execution"]["artifacts"]} == {"recipe.yaml", "student.safetensors"}
    assert task["hyperparams"]["General"]["train.optimizer.name"]["value"] == "sgd"
