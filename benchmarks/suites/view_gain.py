"""What a fixed number of augmentations costs against drawing them anew, at equal steps, over seeds.

    python -m benchmarks view_gain                     # 1, 2, 4, 8 and 16 views on the preset `cpu`, 3 seeds
    python -m benchmarks view_gain --views 4 --seeds 0

All arms are the student of the preset with the same teacher, BCKD and FGD, with flips, zoom and colour, on so few
pictures that training goes through them about 25 times. The baseline draws a new augmentation at every visit; the other
arms have `train.views`, and their teacher's outputs come from `teacher.cache`. Differences are paired by seed. The row
`against free augmentation` has the mean difference in mAP with its 95 % interval; its bar is the standard deviation of
the baseline over its seeds. Resumable: finished arms are kept below the recipe's `runs`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.lib import options
from benchmarks.lib.gains import BASELINE, arm_results
from benchmarks.lib.results import Case, Row
from benchmarks.lib.tables import arm_table
from benchmarks.lib.trainings import Arm, Group, preset_arms, preset_table, rows_of_training, run_all, told
from compress.config.recipe import load_recipe
from deploy.core.errors import UserError

PRESET, HOST = "cpu", "BCKD+FGD"
FEW = ("data.synthetic.train=250", "data.scale_jitter=[0.8, 1.25]", "data.photometric=true")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--views", type=_counts, default=[1, 2, 4, 8, 16], metavar="K,K,…", help="numbers of views")
    options.seeds(parser)
    options.settings(parser)
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="trainings at a time; threads are shared out")


def run(args: argparse.Namespace) -> Iterator[Case]:
    if args.set and args.label is None:
        raise UserError("--set makes another table; name it with --label")
    (host,) = [arm for group in preset_table(PRESET, "methods") for arm in group.arms if arm.name == HOST]
    path, (_, taught), common = preset_arms(PRESET, [Group("", (), (), (host,))], args.set)
    common = (*FEW, *common)  # the teacher learned from its own images
    cache = f"teacher.cache={load_recipe(path, common).runs / 'teachers'}"
    arms = [Arm(f"free {BASELINE}", taught.settings)]
    arms += [Arm(f"{k} views", (*taught.settings, f"train.views={k}", cache)) for k in args.views]
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for done in run_all([(path, arm, seed, common) for seed in args.seeds for arm in arms], args.jobs):
        found[done[:2]] = done[2]
        print(told(done), flush=True)
    rows = [
        row for arm in arms for seed in sorted(args.seeds)
        for row in rows_of_training(arm.name, seed, found[arm.name, seed], arm.settings)
    ]  # fmt: skip
    rows += differences(rows)
    print(arm_table(rows))
    yield Case(f"{PRESET}, {HOST}", rows)


def differences(rows: Sequence[Row]) -> list[Row]:
    """mAP of each number of views less that of free augmentation; the bar is what seeds alone make of the latter."""
    free, *others = arm_results(rows)
    bar = "" if free.map.stdev is None else f">= -{free.map.stdev:.3f}"
    made = []
    for arm in others:
        low, high = arm.gain.interval or (None, None)
        spread = "" if low is None else "95 %"
        made.append(
            Row(arm.name, "against free augmentation", arm.gain.mean, "mAP", low, high, spread, len(arm.maps), bar=bar)
        )
    return made


def _counts(text: str) -> list[int]:
    values = [int(x) if x.isdigit() else 0 for x in text.split(",")]
    if min(values) < 1:
        raise argparse.ArgumentTypeError("give whole numbers from 1 on, such as 2,4,8")
    return values
