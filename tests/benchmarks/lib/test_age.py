"""A figure ages with the code that it measures, and with nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.lib.age import OF_THIS_CODE, OLDER, UNKNOWN, age, fingerprint
from benchmarks.lib.results import Row
from benchmarks.suites import SUITES
from deploy.core.errors import UserError

CODE = '''"""A module."""

import os
from a import b


def f(x: int, y: str = "a b") -> int:
    """Doubles."""
    return 2 * x  # a comment


class C:
    def g(self) -> str:
        from c import d

        return f"{d} {self}"
'''


def of(tmp_path: Path, **files: str) -> str:
    for path in tmp_path.rglob("*.*"):
        path.unlink()
    for name, text in files.items():
        path = tmp_path / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".py").write_text(text)
    return fingerprint(["**/*.py"], tmp_path)


def test_what_does_not_age(tmp_path: Path) -> None:
    first = of(tmp_path, one=CODE)
    f, c = CODE.index("def f"), CODE.index("class C")
    same = [
        {"other__name": CODE},  # moved
        {"one": CODE.replace("# a comment", "# another").replace('"""Doubles."""', "'''Twice.'''")},
        {"one": CODE.replace("import os", "import os.path").replace("from c import d", "from e.c import d")},
        {"one": CODE.replace("2 * x", "(2\n        * x)").replace('"a b"', "'a b'")},  # formatted
        {"one": CODE[:f] + CODE[c:], "two": CODE[f:c]},  # split
        {"one": CODE[:f] + CODE[c:] + "\n\n" + CODE[f:c]},  # in another order
    ]
    assert [of(tmp_path, **files) for files in same] == [first] * len(same)


@pytest.mark.parametrize(
    ("old", "new"),
    [("2 * x", "3 * x"), ('"a b"', '"a  b"'), ("self}", "self!r}"), ("def f", "def h"), ("return f", "yield f")],
)
def test_what_ages(tmp_path: Path, old: str, new: str) -> None:
    assert CODE.count(old) == 1
    assert of(tmp_path, one=CODE) != of(tmp_path, one=CODE.replace(old, new))


def test_other_files_age_by_their_words(tmp_path: Path) -> None:
    path = tmp_path / "kernel.cu"
    found = []
    for text in ("int f() { return 1; }", "int f()\n{\n  return 1;\n}\n", "int f() { return 2; }"):
        path.write_text(text)
        found.append(fingerprint(["*.cu"], tmp_path))
    assert found[0] == found[1] != found[2]


def test_a_pattern_without_a_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone/\*\.py: no file has this name"):
        fingerprint(["gone/*.py"], tmp_path)


@pytest.mark.parametrize("suite", SUITES)
def test_every_suite_measures_files_that_are_there(suite: str) -> None:
    assert len(fingerprint(SUITES[suite].measures)) == 16


def test_the_worst_of_rows_that_are_shown_together() -> None:
    new, old, unknown = (Row("v", "m", 1, code=code) for code in ("now", "then", ""))
    assert age([new, new], "now") == OF_THIS_CODE
    assert age([new, old], "now") == OLDER
    assert age([new, old, unknown], "now") == UNKNOWN
