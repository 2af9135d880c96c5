"""The training loop: exact resume, exact weight 0, guards, schedules."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from compress.config.recipe import Recipe
from compress.config.train import Schedule
from compress.detectors.build import build_detector
from compress.distill.weighting import TrainingPosition
from compress.manifest import fingerprint
from compress.run import pipeline, plans, trainings
from compress.run.data import open_data
from compress.training.learner import Learner
from compress.training.optimizer import learning_rate, moving_average, ramped
from deploy.core.errors import UserError
from tests.helpers import tiny_recipe
from tests.helpers.training_runs import assert_same, fabric, last_checkpoint, train


@pytest.mark.parametrize(
    "extra",
    [
        (),
        ("train.accumulate=2", "train.optimizer.name=adamw", "train.views=2"),
        ("train.eval_every=1", "train.steps=18", "student.head_norm=batch", "student.head_depth=1"),
    ],
    ids=["plain", "accumulate and views", "best, BatchNorm in the head"],
)
def test_resume_is_exact(tmp_path: Path, extra: tuple[str, ...]) -> None:
    whole, parts = tiny_recipe.recipe(tmp_path / "a", *extra), tiny_recipe.recipe(tmp_path / "b", *extra)
    train(whole)
    train(parts, max_steps=10 if "train.steps=18" in extra else 4)
    torch.manual_seed(123)  # whatever state the process is in does not matter
    train(parts, resume=True)
    assert_same(last_checkpoint(whole), last_checkpoint(parts))
    assert_same(*(load_file(r.run_dir / "student.safetensors") for r in (whole, parts)))
    rows = [(r.run_dir / "student" / "metrics.csv").read_text().splitlines() for r in (whole, parts)]
    assert len(rows[0]) >= 3 and {row.split(",")[0] for row in rows[0]} <= {row.split(",")[0] for row in rows[1]}


LONGER = ("train.steps=12", "train.checkpoint_every=2")
KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from tests.helpers import tiny_recipe
from tests.helpers.training_runs import train

def killed_at(count, function):
    calls = []
    def call(*args, **kwargs):
        if getattr(args[-1], "name", "last.ckpt") == "last.ckpt":
            calls.append(1)
            if len(calls) == count:
                os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return call

if sys.argv[2] == "step":
    kind = torch.optim.AdamW if any("adamw" in word for word in sys.argv) else torch.optim.SGD
    kind.step = killed_at(6, kind.step)
else:
    os.replace = killed_at(3, os.replace)
train(tiny_recipe.recipe(Path(sys.argv[1]), *sys.argv[3:]))
"""


def queries(family: str) -> tuple[str, ...]:
    """Settings of a student with queries, which draws noisy copies of the labels at random."""
    from compress.detectors.build import FAMILIES
    from tests.helpers import tiny_detr

    student = {"detector": family, "options": tiny_detr.OPTIONS[FAMILIES[family].load()]}
    return (f"student={json.dumps(student)}", "methods={}", "teacher=null", "train.optimizer.name=adamw")


@pytest.mark.parametrize(
    ("moment", "family"),
    [
        ("step", None),
        *(
            pytest.param("step", name, marks=pytest.mark.exhaustive)
            for name in ("d_fine", "rt_detr_v2", "rf_detr", "lw_detr")
        ),
        pytest.param("write", None, marks=pytest.mark.exhaustive),
    ],
)
def test_kill_and_resume_is_exact(tmp_path: Path, moment: str, family: str | None) -> None:
    """kill -9 in the middle of a step, or of writing a checkpoint, against a run that was left alone."""
    if family is not None:
        pytest.importorskip("transformers")
        pytest.importorskip("scipy")
    settings = LONGER if family is None else (*LONGER, *queries(family))
    whole, killed = (tiny_recipe.recipe(tmp_path / name, *settings) for name in ("whole", "killed"))
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-c", KILLED, str(tmp_path / "killed"), moment, *settings]
    assert subprocess.run(command, env=environment, timeout=1800).returncode == -signal.SIGKILL
    assert last_checkpoint(killed)["state"]["step"] == 4
    train(killed, resume=True)
    train(whole)
    assert_same(last_checkpoint(whole), last_checkpoint(killed))
    assert_same(*(load_file(recipe.run_dir / "student.safetensors") for recipe in (whole, killed)))
    steps = [[row.split(",")[0] for row in rows_of(recipe)] for recipe in (whole, killed)]
    assert steps[0] == steps[1] == ["step", "1", "10", "12", "12"]


def rows_of(recipe: Recipe) -> list[str]:
    return (recipe.run_dir / "student" / "metrics.csv").read_text().splitlines()


def test_an_unfinished_checkpoint_of_other_settings_is_refused_and_a_finished_one_replaced(tmp_path: Path) -> None:
    recipe = tiny_recipe.recipe(tmp_path)
    train(recipe, max_steps=2)
    with pytest.raises(UserError, match="unfinished run with other settings"):
        train(recipe, resume=True, identity="b")
    train(recipe, resume=True)
    train(recipe, resume=True, identity="b")
    assert last_checkpoint(recipe)["identity"] != fingerprint({"of": "a"})


def test_a_damaged_checkpoint_says_so(tmp_path: Path) -> None:
    recipe = tiny_recipe.recipe(tmp_path)
    train(recipe, max_steps=2)
    (recipe.run_dir / "student" / "checkpoints" / "last.ckpt").write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(UserError, match=r"last.ckpt: damaged .*remove it to start again"):
        train(recipe, resume=True)


def test_bfloat16_gradients_are_those_of_float32(tmp_path: Path) -> None:
    """Direction of the whole gradient; 64 px makes P6 and P7 maps of one pixel."""
    recipe = tiny_recipe.recipe(tmp_path)
    data = open_data(plans.data_plan(recipe), fabric())
    batch = next(iter(trainings.train_loader(data.train, batch_size=4, seed=0, workers=0))).to("cpu")

    def gradient(half: bool) -> torch.Tensor:
        learner = Learner(build_detector(recipe.student, 3, 0), {}, None, None)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            losses = learner(batch, TrainingPosition(0, 1, 1))
        assert all(value.dtype == torch.float32 for value in losses.values())
        sum(losses.values()).backward()
        return torch.cat([p.grad.flatten().float() for p in learner.parameters() if p.grad is not None])

    exact, rounded = gradient(False), gradient(True)
    assert torch.cosine_similarity(exact, rounded, dim=0) > 0.98
    assert float(rounded.norm()) == pytest.approx(float(exact.norm()), rel=0.1)


def test_a_warm_up_longer_than_the_run_is_refused(tmp_path: Path) -> None:
    recipe = tiny_recipe.recipe(tmp_path, "train.steps=null", "train.epochs=1", "train.schedule.warmup_steps=6")
    with pytest.raises(UserError, match="leaves nothing of the run's 6 steps"):
        train(recipe)


def test_images_without_boxes_are_refused_before_training(tmp_path: Path) -> None:
    recipe = tiny_recipe.recipe(tmp_path)
    drawn = open_data(plans.data_plan(recipe), fabric()).val_split
    empty = drawn.model_copy(update={"annotations": tmp_path / "empty.json"})
    empty.annotations.write_text(json.dumps({**json.loads(drawn.annotations.read_text()), "annotations": []}))
    for arm, purpose in (("val", "evaluate on"), ("train", "train on")):
        splits = {"train": drawn, "val": drawn, arm: empty, "synthetic": None}
        data = recipe.data.model_copy(update=splits)
        with pytest.raises(UserError, match=rf"empty.json: it has no box to {purpose}"):
            open_data(plans.data_plan(recipe.model_copy(update={"data": data})), fabric())


def test_weight_zero_is_plain_training(tmp_path: Path) -> None:
    """Bit for bit: the teacher runs along, its loss is logged and multiplied by zero."""
    taught = tiny_recipe.recipe(tmp_path / "taught", "methods.bckd.weight=0")
    plain = tiny_recipe.recipe(tmp_path / "plain")
    pipeline.distill(taught)
    pipeline.distill(plain, distillation=False)
    assert_same(*(load_file(r.run_dir / "student.safetensors") for r in (taught, plain)))
    header = (taught.run_dir / "student" / "metrics.csv").read_text().splitlines()[0]
    assert "bckd_cls" in header


def test_distillation_changes_the_student_and_the_baseline_is_the_plain_one(tmp_path: Path) -> None:
    recipe = tiny_recipe.recipe(tmp_path / "a", "baseline=true")
    plain = tiny_recipe.recipe(tmp_path / "b")
    pipeline.distill(recipe)
    pipeline.distill(plain, distillation=False)
    baseline, student = (load_file(recipe.run_dir / f"{name}.safetensors") for name in ("baseline", "student"))
    assert_same(baseline, load_file(plain.run_dir / "student.safetensors"))
    assert any(not torch.equal(baseline[key], student[key]) for key in baseline)
    assert all(not key.startswith(("teacher", "methods")) for key in student)


def test_a_loss_that_is_not_finite_stops_and_leaves_the_batch(tmp_path: Path) -> None:
    recipe = tiny_recipe.recipe(
        tmp_path, "train.optimizer.lr=1e30", "train.clip_norm=null", "train.schedule.warmup_steps=0"
    )
    with pytest.raises(UserError, match=r"not finite at step \d+ .*nonfinite.pt"):
        train(recipe)
    saved = torch.load(recipe.run_dir / "student" / "nonfinite.pt", weights_only=False)
    learner = Learner(build_detector(recipe.student, 3, 0), {}, None, None)
    learner.load_state_dict(saved["learner"])
    assert all(torch.isfinite(p).all() for p in learner.parameters()), "saved after the damage"
    (batch,) = saved["batches"]
    assert batch.images.shape == (4, 3, 64, 64) and len(batch.targets) == 4
    loss = sum(learner(batch, TrainingPosition(0, 1, 1)).values())
    loss.backward()
    gradients = [p.grad for p in learner.parameters() if p.grad is not None]
    assert not (torch.isfinite(loss) and all(torch.isfinite(g).all() for g in gradients)), "does not show the event"
    assert not (recipe.run_dir / "student.safetensors").exists()


def test_learning_rate() -> None:
    steps = learning_rate(Schedule(milestones=(8, 11), warmup_steps=500, warmup_factor=0.001), 12 * 100, 100)
    assert steps(0) == pytest.approx(0.001)
    assert steps(250) == pytest.approx(0.001 + 0.999 / 2)
    assert steps(500) == steps(799) == 1
    assert steps(800) == pytest.approx(0.1) and steps(1100) == pytest.approx(0.01)
    cosine = learning_rate(Schedule(name="cosine", warmup_steps=10), 110, 10)
    assert cosine(10) == 1 and cosine(60) == pytest.approx(0.5) and cosine(110) == pytest.approx(0)


def test_a_weak_teacher_stops_the_run_before_the_student_trains(tmp_path: Path) -> None:
    recipe = tiny_recipe.recipe(tmp_path, "teacher.min_map=90")
    with pytest.raises(UserError, match=r"teacher.min_map is 90 and the teacher reaches \d+\.\d+ mAP"):
        pipeline.distill(recipe)
    assert not (recipe.run_dir / "student").exists()


def test_an_interrupted_run_is_only_continued_on_request(tmp_path: Path) -> None:
    recipe = tiny_recipe.recipe(tmp_path)
    train(recipe, max_steps=2)
    with pytest.raises(UserError, match="add --resume"):
        pipeline.distill(recipe, distillation=False)


def test_finished_stages_are_skipped(tmp_path: Path) -> None:
    recipe = tiny_recipe.recipe(tmp_path)
    pipeline.distill(recipe)
    student = recipe.run_dir / "student.safetensors"
    before = student.stat().st_mtime_ns
    pipeline.distill(recipe)
    assert student.stat().st_mtime_ns == before
    student.write_bytes(b"damaged")
    pipeline.distill(recipe, resume=True)
    load_file(student)


def test_a_moving_average_of_a_short_training_is_not_its_first_step() -> None:
    """The decay of timm's ModelEmaV3 (gamma 1, power 2/3), which a plain loop computes here; at a constant 0.9998 the
    first value would count for 0.9998^59 = 98.8 %."""
    module = torch.nn.Linear(1, 1, bias=False)
    average = moving_average(module, 0.9998)
    assert average is not None
    wanted, share = 0.0, 1.0  # share: of the first value
    for step in range(60):
        with torch.no_grad():
            module.weight.fill_(float(step))
        average.update_parameters(module)
        decay = min(0.9998, 1 - (1 + step) ** (-2 / 3)) if step else 0.0
        wanted, share = decay * wanted + (1 - decay) * step, share * (decay if step else 1)
    assert share < 1e-4
    assert float(average.module.weight) == pytest.approx(wanted, rel=1e-5)  # type: ignore[union-attr]
    assert 40 < wanted < 59
    assert [round(ramped(0.9998, steps), 4) for steps in (60, 999, 31_621)] == [0.9355, 0.99, 0.999]
    assert ramped(0.9, 10**6) == 0.9
