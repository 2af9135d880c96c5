"""Golden curves: every loss term of a tiny training, for every detector family with every distillation method.

A curve is a real run: a recipe file goes through `load_recipe` and `distill`; data are drawn, the teacher is opened and
checked, methods are built, six optimizer steps are taken and the student is evaluated. So another seed, another order
of the images, another random number, or a wire to the wrong place changes digits. Float32, one thread, PyTorch's
kernels.

`<family>.txt` holds one line a term: method, term, its value at each step. Terms are columns of metrics.csv: the
learning rate, the total `loss`, the detector's and the methods' terms. Nine significant digits identify a float32, so
equal text means equal bits. A method that the code refuses for a family is one line: method, `refused`.

    python -m tests.golden.write            write the files anew: after a change that is meant to alter results
    python -m tests.golden.write --exact    compare bit for bit: on the machine that wrote them

Another processor adds up in another order. The recipe keeps what comes of that small: a low learning rate, a teacher
that has hardly trained, a chosen seed. AVX2 instead of AVX-512, with oneDNN or without, moves no term by more than 0.75
of the tolerance. After writing anew, run the test with this in the environment as well:

    ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_CBWR=AVX2
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from deploy.core.errors import UserError

FOLDER = Path(__file__).parent
FAMILIES = ("gfl", "fcos", "retinanet", "faster_rcnn")
METHODS = {
    "plain": "{}",
    "bckd": "{bckd: {}}",
    "fgd": "{fgd: {}}",
    "uet+fgd": "{fgd: {}, uet: {of: fgd}}",
    "tid": "{tid: {}}",
    "ld": "{ld: {}}",
    "crosskd": "{crosskd: {}}",
    "mgd": "{mgd: {}}",
    "pkd": "{pkd: {adapter: always}}",  # teacher and student are equally wide: else there would be none
    "cwd": "{cwd: {adapter: always}}",
    "gi": "{gi: {}}",
    "dkd": "{dkd: {}}",
}
STEPS = 6
REFUSED = "refused"
RTOL = 5e-6  # 1.7e-6 lie between an AMD EPYC and an Intel Xeon, both with AVX512
ATOL = 1e-7
"""A rounding of float32 at 1. Terms near zero are sums and differences of probabilities, their logarithms and overlaps,
which are of that size: their own last digits are roundings of these."""
CONFIDENCE = 4.0
SEED = 7
"""Not 0: a seed that is lost on the way would not show where 0 is the default. And one where no decision is so close
(which proposals survive, which sample is drawn) that another processor's roundings take the other side."""

RECIPE = """
name: {name}
runs: {runs}
seed: {seed}
data:
  synthetic: {{train: 16, val: 2, size: 64, classes: 3, seed: 5}}
  short: [56, 64]
  long: 64
  photometric: true
  scale_jitter: [0.8, 1.25]
  workers: 0
  cache: true
student: {{detector: {family}, backbone: nano, weights: none, {shape}}}
teacher: {teacher}
methods: {methods}
train:
  steps: {steps}
  batch_size: 4
  ema: 0.9
  clip_norm: 1
  optimizer: {{name: sgd, lr: 1e-4, weight_decay: 0.1}}
  schedule: {{name: cosine, warmup_steps: 2, warmup_factor: 0.1}}
  kernels: torch
  accelerator: cpu
  select: last
"""
# Small, so that a case takes less than a second; 16 images are 4 steps, so that the curves go into a second epoch.
SHAPES = {
    "gfl": "neck_channels: 32, head_depth: 1",
    "fcos": "neck_channels: 32, head_depth: 1",
    "retinanet": "neck_channels: 32, head_depth: 1, anchor_scale: 2.0",
    "faster_rcnn": "neck_channels: 32, head_depth: 0, anchor_scale: 4.0, roi_samples: 16",
}

Curve = dict[str, list[float]]
"""Value of each term at each step."""


def curves(family: str, folder: Path) -> dict[str, Curve | None]:
    """The curves of a family by method, None where the code refuses the method. Runs are left in `folder`."""
    with one_thread():
        teacher = train(folder, "teacher", family, seed=SEED + 1) / "student.safetensors"
        make_confident(teacher)
        found: dict[str, Curve | None] = {}
        for name, methods in METHODS.items():
            try:
                run = train(folder, name.replace("+", "-"), family, methods, None if name == "plain" else teacher)
            except UserError as error:
                if f"methods.{name}" not in str(error):  # anything else is no refusal
                    raise
                found[name] = None
            else:
                found[name] = read_metrics(run / "student" / "metrics.csv")
    return found


def train(
    folder: Path,
    name: str,
    family: str,
    methods: str = "{}",
    teacher: Path | None = None,
    *,
    seed: int = SEED,
) -> Path:
    """Run a recipe. Returns the run folder, where student/metrics.csv has a row for every step.

    The one place that knows what the package calls its parts; all else goes by files.
    """
    from compress.config.recipe import load_recipe
    from compress.run.pipeline import distill
    from kernels.common.backend import use

    file = folder / f"{name}.yaml"
    source = "null" if teacher is None else f"{{checkpoint: '{teacher}'}}"
    settings = {"seed": seed, "family": family, "shape": SHAPES[family], "methods": methods, "steps": STEPS}
    file.write_text(RECIPE.format(name=name, runs=folder, teacher=source, **settings))
    with (
        use("torch"),
        mock.patch("compress.training.loop.LOG_EVERY", 1),
    ):  # a row of metrics.csv for every step, not every 10
        return distill(load_recipe(file))


def make_confident(checkpoint: Path) -> None:
    """Scale the convolutions of the head. Those of a fresh one say nearly the same of every place, and what methods on
    logits then have to say drowns in roundings."""
    with safe_open(checkpoint, framework="pt") as file:
        header = file.metadata()
        state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  it is no mapping
    heads = {key: x * CONFIDENCE for key, x in state.items() if key.startswith("head.") and x.dim() == 4}
    save_file(state | heads, checkpoint, metadata=header)


def read_metrics(path: Path) -> Curve:
    """The learning rate and the loss terms of every step. What was only observed (gradient norms, variances) jumps
    where a unit switches on, and is left out: it shows in the losses of the next step."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["loss"]]  # without those of evaluations
    if [int(row["step"]) for row in rows] != list(range(1, STEPS + 1)):
        raise ValueError(f"{path} has not a row for every step: what `train` patches has moved")
    no_terms = ("step", "epoch", "seconds", "map", "grad_", "scale_", "variance_")
    columns = [key for key in rows[0] if not key.startswith(no_terms)]
    return {key: [float(row[key]) for row in rows] for key in columns}


@contextmanager
def one_thread() -> Iterator[None]:
    """Sums in one order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def to_text(found: dict[str, Curve | None]) -> str:
    """Lines of a file, without its heading."""
    lines = []
    for method, curve in found.items():
        if curve is None:
            lines.append(f"{method:<8} {REFUSED}")
        else:
            lines += [f"{method:<8} {term:<16}" + "".join(f" {x:.8e}" for x in xs) for term, xs in curve.items()]
    return "\n".join(lines) + "\n"


def from_text(text: str) -> dict[str, Curve | None]:
    """The inverse of `to_text`; lines that begin with # are skipped."""
    found: dict[str, Curve | None] = {}
    for line in text.splitlines():
        if line.startswith("#"):
            continue
        method, term, *values = line.split()
        if term == REFUSED:
            found[method] = None
            continue
        curve = found.setdefault(method, {})
        assert curve is not None, f"{method} is refused and has terms"
        curve[term] = [float(value) for value in values]
    return found


def differences(family: str, found: dict[str, Curve | None], *, exact: bool = False) -> list[str]:
    """What is not as in the family's file, a line each: methods, terms, or values beyond the tolerances; with `exact`
    any digit, and the order of the lines."""
    text = golden_file(family).read_text(encoding="utf-8")
    expected, found = from_text(text), from_text(to_text(found))  # both rounded alike
    problems = []
    for method in expected | found:
        ours, theirs = found.get(method), expected.get(method)
        if (method in found, ours is None) != (method in expected, theirs is None):
            problems.append(f"{family} {method}: {_state(found, method)}, was {_state(expected, method)}")
            continue
        ours, theirs = ours or {}, theirs or {}
        if list(ours) != list(theirs):
            problems.append(f"{family} {method}: terms {', '.join(ours)}, were {', '.join(theirs)}")
            continue
        for term, values in theirs.items():
            floor = 0.0 if term == "lr" else ATOL  # the rate is plain arithmetic
            for step, (x, y) in enumerate(zip(ours[term], values, strict=True), start=1):
                if not (x == y if exact else abs(x - y) <= RTOL * abs(y) + floor):  # so that a NaN is a difference
                    problems.append(f"{family} {method} {term} step {step}: {x:.8e}, was {y:.8e}")
    if exact and list(found) != list(expected):
        problems.append(f"{family}: methods in the order {', '.join(found)}, were {', '.join(expected)}")
    return problems


def golden_file(family: str) -> Path:
    return FOLDER / f"{family}.txt"


def _state(curves: dict[str, Curve | None], method: str) -> str:
    if method not in curves:
        return "absent"
    return REFUSED if curves[method] is None else "accepted"
