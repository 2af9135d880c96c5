"""Tables and pictures from the results, in all documents: `python -m benchmarks tables`.

A document has a place for each table, between comments: `<!-- vs_mmdet --> ... <!-- /vs_mmdet -->`. What stands there
is written by this module alone and checked by tests/benchmarks/test_tables.py.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from benchmarks.lib import age, results, tables
from benchmarks.lib.gains import ArmResult, arm_results
from benchmarks.lib.results import RESULTS, ROOT, Row
from benchmarks.suites import SUITES
from deploy.core.errors import UserError
from deploy.core.files import write_text

README = ROOT / "benchmarks" / "README.md"
METHODS = ROOT / "docs" / "methods"
INDEX = METHODS / "README.md"
PRUNING = ROOT / "docs" / "pruning.md"
NOT_MEASURED = "Not measured yet: `python -m benchmarks {suite}`."


@dataclass(frozen=True)
class Block:
    """A place in benchmarks/README.md: the rows of a suite that are wanted there, and how they are shown."""

    suite: str
    show: Callable[[Sequence[Row]], str]
    wanted: Callable[[Row], bool] = lambda row: True

    def rows(self, rows: Sequence[Row]) -> list[Row]:
        return [row for row in results.of(rows, self.suite) if self.wanted(row)]


def by_case(rows: Sequence[Row]) -> str:
    return tables.pivot(rows, lambda row: row.case)


def by_metric(rows: Sequence[Row]) -> str:
    return tables.pivot(rows, lambda row: row.metric)


def named(*metrics: str, case: str = "") -> Callable[[Row], bool]:
    """Rows of these metrics (of any, where none is named) in cases that begin so."""
    return lambda row: (not metrics or row.metric in metrics) and row.case.startswith(case)


BLOCKS = {
    "startup": Block("startup", tables.listing),
    "vs_mmdet": Block("vs_mmdet", by_case, named("times as fast")),
    "data_path": Block("data_path", by_case, named("throughput")),
    "data_path-ratio": Block("data_path", by_case, named("times as fast")),
    "label_index": Block("label_index", tables.listing),
    "ray_engine": Block("ray_engine", tables.listing),
    "pictures": Block("pictures", by_case, named("mAP lost")),
    "pictures-pixels": Block("pictures", by_case, named("difference")),
    "latency": Block("latency", tables.listing, named("p50", "ratio of p50")),
    "evaluation": Block("evaluation", tables.listing),
    "kernels": Block("kernels", by_case, named("times as fast", case="cpu")),
    "quantized-accuracy": Block("quantized", by_case, named("mAP drop", case="accuracy")),
    "int8_head": Block("int8_head", by_case, named("share of the time")),
    "quantized-speed": Block("quantized", by_case, named("times as fast", "share of end to end", case="speed")),
    "openvino-accuracy": Block(
        "openvino", by_case, named("mAP", "mAP drop", "mAP below ONNX Runtime's", case="accuracy")
    ),
    "openvino-speed": Block("openvino", by_case, lambda row: bool(row.bar) and row.case.startswith("speed")),
    "qad": Block("qad", tables.by_seed),
    "pseudo": Block("pseudo_gain", tables.student_table, lambda row: row.case == "cpu"),
    "pseudo-cells": Block("pseudo_gain", tables.student_table, lambda row: row.case == "bccd"),
    "pseudo_memory": Block(
        "pseudo_memory", by_metric, named("peak", "peak before the first image", "seconds", "growth")
    ),
    "method_cost": Block("method_cost", by_metric),
    "teacher_cache": Block("teacher_cache", tables.listing),
    "detr_step": Block("detr_step", tables.listing),
    "view_gain": Block("view_gain", tables.listing, named("against free augmentation")),
    "curves": Block("distill_gain", tables.curve_table, lambda row: row.case == "cpu-detr"),
    "serve": Block("serve", tables.listing, lambda row: bool(row.bar) or row.case == "slow"),
    "serve-throughput": Block("serve", by_case, named("throughput", case="saturation")),
    "serve-curve": Block("serve", by_metric, lambda row: row.case == "curve" and row.metric != "capacity"),
    "overhead": Block("overhead", tables.listing),
    "recipe": Block("recipe", by_metric, named("mAP", "parameters", "GFLOPs", "size", "p50", "p99")),
}

GAINS = {  # block of a page of docs/methods: case of distill_gain
    INDEX: {
        "figures": "cpu-methods",
        "photographs": "bccd-methods",
        "families": "cpu-families",
        "detr": "cpu-detr",
        "head_norm": "cpu-head_norm",
        "head_norm-photographs": "bccd-head_norm",
    },
    METHODS / "uet.md": {"ablation": "cpu-uet"},
}

OF_DETR = ("kd_detr", "ddf", "vfm")
"""Methods whose arms are in the table `detr`, not in the first one."""

PRUNED = {"figures": "cpu", "photographs": "bccd"}  # block of docs/pruning.md: case of prune_gain
AXES = {"gflops": ("GFLOPs", "GFLOPs"), "latency": ("int8 p50", "milliseconds of the int8 file, p50")}


def main(arguments: Sequence[str]) -> int:
    """Write every document and picture anew; say which figures are old."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks tables", description=__doc__)
    parser.parse_args(arguments)
    rows = results.read()
    for path, text in documents(rows).items():
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            write_text(path, text)
            print(f"written: {path.relative_to(ROOT)}")
    for suite in SUITES:
        of_suite = results.of(rows, suite)
        ages = {case: age.age(results.of(rows, suite, case), code_of(suite)) for case in {row.case for row in of_suite}}
        current = sum(value == age.OF_THIS_CODE for value in ages.values())
        print(f"{suite}: {current} of {len(ages)} cases {age.OF_THIS_CODE}")
    return 0


def documents(rows: Sequence[Row]) -> dict[Path, str]:
    """Path -> text of everything that is made from the results."""
    made = {README: readme(rows)}
    made |= {page: method_page(page, rows) for page in sorted(METHODS.glob("*.md"))}
    made[PRUNING] = pruning_page(rows)
    made |= pictures(rows)
    return made


def readme(rows: Sequence[Row]) -> str:
    text = filled(README.read_text(encoding="utf-8"), "suites", suite_list())
    for name, block in BLOCKS.items():
        shown = block.rows(rows)
        table = NOT_MEASURED.format(suite=block.suite)
        if shown:
            table = f"{block.show(shown)}\n\n{tables.origin(shown, code_of(block.suite))}"
        text = filled(text, name, table)
    return text


def suite_list() -> str:
    lines = [["`python -m benchmarks …`", "question", "takes"]]
    lines += [[f"`{name}`", suite.question, suite.takes] for name, suite in SUITES.items()]
    return tables.markdown(lines)


def method_page(page: Path, rows: Sequence[Row]) -> str:
    """A page of docs/methods: the arms with its method, or whole cases; and the index's column "our gain"."""
    text = page.read_text(encoding="utf-8")
    blocks = GAINS.get(page, {})
    if page != INDEX:
        case = case_of(page.stem)
        text = filled(text, "figures", arms(results.of(rows, "distill_gain", case), page.stem, case))
    for name, case in blocks.items():
        text = filled(text, name, arms(results.of(rows, "distill_gain", case), None, case))
    if page == INDEX:
        text = with_gains(text, rows)
    return text


def case_of(method: str) -> str:
    """The case of `distill_gain` that has the arms of a method."""
    return "cpu-detr" if method in OF_DETR else "cpu-methods"


def pruning_page(rows: Sequence[Row]) -> str:
    """docs/pruning.md with the table and the pictures of each case of `prune_gain`."""
    text = PRUNING.read_text(encoding="utf-8")
    for name, case in PRUNED.items():
        shown = results.of(rows, "prune_gain", case)
        text = filled(text, name, pruned(shown, case) if shown else NOT_MEASURED.format(suite=f"prune_gain {case}"))
    return text


def pruned(rows: Sequence[Row], case: str) -> str:
    seeds = ", ".join(map(str, arm_results(rows)[0].maps))
    head = (
        f"{tables.origin(rows, code_of('prune_gain'))} Seeds {seeds}: mean and standard deviation; gains are paired "
        "with training from the labels alone, with the 95 % interval of their mean."
    )
    shown = [f"![mAP against {AXES[axis][1]}](../benchmarks/results/prune_gain-{case}-{axis}.svg)" for axis in AXES]
    return "\n\n".join([head, tables.pruned_table(rows), *shown])


def arms(rows: Sequence[Row], method: str | None, case: str = "cpu-methods") -> str:
    """The table of a case of `distill_gain`: all arms and the picture, or those with the method beside the baseline."""
    if not rows:
        preset, _, table = case.partition("-")
        return NOT_MEASURED.format(suite=f"distill_gain {preset}" + (f" --table {table}" if table != "methods" else ""))
    found = arm_results(rows)
    if method is not None and not any(method in words(arm.name) for arm in found):
        return f"Not among the arms of `{rows[0].command}` of {rows[0].date}."

    def is_shown(arm: ArmResult) -> bool:  # a head start is no gain of a method, so it is shown beside it
        return method is None or arm.is_baseline or arm.name == "inherit only" or method in words(arm.name)

    seeds = ", ".join(map(str, found[0].maps))
    head = (
        f"{tables.origin(rows, code_of('distill_gain'))} Seeds {seeds}: mean and standard deviation; gains are paired "
        "with the baseline, with the 95 % interval of their mean."
    )
    text = f"{head}\n\n{tables.arm_table(rows, is_shown)}"
    if method is None:
        text += f"\n\n![gain of every arm](../../{gain_picture(rows[0].case).relative_to(ROOT).as_posix()})"
    return text


def with_gains(text: str, rows: Sequence[Row]) -> str:
    """The index with the gain of each method in the last column of its table."""
    table = re.search(r"<!-- which -->\n(.*?)<!-- /which -->", text, re.DOTALL)
    if table is None:
        raise UserError(f"{INDEX}: no block <!-- which -->")
    line = re.compile(r"^(\| \[[^]]+\]\((\w+)\.md\).*\|)[^|]*\|$", re.MULTILINE)

    def gain(method: str) -> str:
        return gain_of(results.of(rows, "distill_gain", case_of(method)), method)

    return filled(text, "which", line.sub(lambda match: f"{match[1]} {gain(match[2])} |", table[1]).rstrip())


def gain_of(rows: Sequence[Row], method: str) -> str:
    """The gain of the arm of that method alone, else of the first one with it, in a few words."""
    found = [arm for arm in arm_results(rows) if method.lower() in words(arm.name)]
    if not found:
        return "not measured"
    arm = next((arm for arm in found if arm.name.lower() == method.lower()), found[0])
    where = "" if arm.name.lower() == method.lower() else f" ({arm.name})"
    return f"{arm.gain.mean:+.2f}{where}"


def words(name: str) -> set[str]:
    """Names in the name of an arm: `UET+KD-DETR, sum` -> uet, kd_detr, sum."""
    return set(re.findall(r"[a-z_]+", name.lower().replace("-", "_")))


def pictures(rows: Sequence[Row]) -> dict[Path, str]:
    made = {}
    for case in {case for cases in GAINS.values() for case in cases.values()}:
        if shown := results.of(rows, "distill_gain", case):
            made[gain_picture(case)] = tables.arm_picture(shown, case)
    for case in ("cpu", "bccd"):
        if shown := results.of(rows, "pseudo_gain", case):
            made[RESULTS / f"pseudo_gain-{case}.svg"] = tables.student_picture(shown, f"pseudo labels, {case}")
    for case in PRUNED.values():
        if shown := results.of(rows, "prune_gain", case):
            for axis, (metric, label) in AXES.items():
                picture = tables.pruned_picture(shown, f"pruned students, {case}", metric, label)
                made[RESULTS / f"prune_gain-{case}-{axis}.svg"] = picture
    if shown := results.of(rows, "kernels", "cuda"):
        made[RESULTS / "kernels-cuda.svg"] = tables.share_picture(shown, "fused operators on a GPU")
    return made


def gain_picture(case: str) -> Path:
    return RESULTS / f"distill_gain-{case}.svg"


def filled(text: str, name: str, block: str) -> str:
    """`text` with `block` between the comments of that name. Raises UserError unless there is one such place."""
    pattern = rf"(<!-- {re.escape(name)} -->\n).*?(<!-- /{re.escape(name)} -->\n)"
    text, count = re.subn(pattern, lambda match: f"{match[1]}{block}\n{match[2]}", text, flags=re.DOTALL)
    if count != 1:
        raise UserError(f"there are {count} blocks <!-- {name} -->; there must be one")
    return text


@cache
def code_of(suite: str) -> str:
    """The fingerprint of what a suite measures, as it is now."""
    return age.fingerprint(SUITES[suite].measures)
