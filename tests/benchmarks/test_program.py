"""The program of the benchmarks: its list, its options, and what becomes of what a suite measures."""

from __future__ import annotations

import argparse
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest

from benchmarks.__main__ import main
from benchmarks.lib import options
from benchmarks.lib.results import ROOT, Case, Row, read
from benchmarks.suites import SUITES, latency
from deploy.core.errors import UserError

SCRIPT = str(ROOT / "benchmarks" / "latency.py")


def test_the_list_has_every_suite_and_loads_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown and suite.question in shown for name, suite in SUITES.items())
    code = "import sys; from benchmarks.__main__ import main; main([]); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def test_the_table_is_that_of_the_folder() -> None:
    folder = ROOT / "benchmarks" / "suites"
    found = {path.stem for path in folder.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert found - {"__init__"} == set(SUITES)


@pytest.mark.parametrize("name", SUITES)
def test_every_suite_parses(name: str) -> None:
    """Importing one runs nothing; its own options do not clash with the common ones."""
    suite = import_module(f"benchmarks.suites.{name}")
    parser = argparse.ArgumentParser()
    suite.add_options(parser)
    options.common(parser)
    needed = {"quantized": ["speed"], "openvino": ["speed"], "recipe": ["recipes/quickstart_nano.yaml"]}.get(name, [])
    assert parser.parse_args([*needed, "--strict", "--label", "x"]).label == "x"
    assert suite.__doc__ and callable(suite.run)


def test_suites_leave_each_other_alone() -> None:
    """No suite reaches into another one: what two need stands in benchmarks/lib."""
    for path in (ROOT / "benchmarks" / "suites").rglob("*.py"):
        own = "kernels" if path.parent.name == "kernels" else path.stem
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith(("from benchmarks.suites", "import benchmarks.suites")):
                assert line.startswith(f"from benchmarks.suites.{own}"), f"{path.name}: {line}"


def measured(args: argparse.Namespace) -> Iterator[Case]:
    yield Case("first", [Row("a", "time", 1.5, "ms", bar="<= 1")])
    yield Case("second", [Row("a", "time", 0.5, "ms", bar="<= 1")])
    if args.seconds == 3:
        raise UserError("the third case has no file")


@pytest.mark.parametrize(("words", "code"), [((), 0), (("--strict",), 1), (("--seconds", "3"), 2)])
def test_every_case_is_kept_as_it_comes(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    code: int,
) -> None:
    monkeypatch.setattr(latency, "run", measured)
    out = tmp_path / "out.csv"
    assert main(["latency", *words, "--out", str(out), "--label", "mine", "--notes", "quiet"]) == code
    rows = read(out)
    assert [(row.suite, row.case, row.value, row.notes) for row in rows] == [
        ("latency", "first, mine", 1.5, "quiet"), ("latency", "second, mine", 0.5, "quiet")
    ]  # fmt: skip
    assert len(rows[0].code) == 16 and rows[0].command.startswith("python -m benchmarks latency")
    assert str(tmp_path) not in rows[0].command and "python 3." in rows[0].versions and "CPUs" in rows[0].machine
    shown = capsys.readouterr()
    assert ("MISSED: first, mine | a | time" in shown.out) == (code != 2)
    assert ("error: the third case has no file" in shown.err) == (code == 2)


def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["nonsense"]) == 2
    assert capsys.readouterr().err == "error: nonsense: no such suite; python -m benchmarks lists them\n"
    for words in (["latency", "--threads", "0"], ["distill_gain", "--seeds", "1,1"], ["latency", "--seconds", "x"]):
        with pytest.raises(SystemExit) as caught:
            main(words)
        assert caught.value.code == 2


@pytest.mark.parametrize("start", [partial(runpy.run_module, "benchmarks.latency"), partial(runpy.run_path, SCRIPT)])
def test_the_old_names_of_the_latency_benchmark_work(
    start: Callable[..., object], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["latency.py", "--help"])
    with pytest.raises(SystemExit) as caught:
        start(run_name="__main__")
    assert caught.value.code == 0 and capsys.readouterr().out.startswith("usage: python -m benchmarks latency")
