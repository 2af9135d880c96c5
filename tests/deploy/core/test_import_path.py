"""Users' own parts by import path: found as with `python -m`, and each mistake is one line."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from deploy.core.errors import UserError
from deploy.core.import_path import import_object, is_import_path


def test_names_are_followed() -> None:
    assert import_object("pathlib:Path.home", "key") == Path.home


def test_modules_in_the_working_directory_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine_for_this_test.py").write_text("THING = 3\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    assert import_object("mine_for_this_test:THING", "key") == 3


@pytest.mark.parametrize("text", ["gfl", "a.b", "a:", ":b", "a b:c", "a/b.py:c", "a:b:c"])
def test_other_texts_are_no_import_paths(text: str) -> None:
    assert not is_import_path(text)


@pytest.mark.parametrize(
    ("source", "path", "message"),
    [
        ("", "no_such_module_here:X", "student.detector: cannot import no_such_module_here: no such module"),
        (
            "import no_such_dependency",
            "broken:X",
            "student.detector: cannot import broken: it needs the module no_such",
        ),
        ("1 / 0", "broken:X", "student.detector: cannot import broken: ZeroDivisionError: division by zero"),
        ("", "broken:Missing", "student.detector: broken has no Missing"),
        ("", "broken", "student.detector: 'broken' is not an import path; write package.module:Name"),
    ],
)
def test_mistakes_are_one_line(
    source: str, path: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "broken", raising=False)
    with pytest.raises(UserError) as error:
        import_object(path, "student.detector")
    assert str(error.value).startswith(message) and "\n" not in str(error.value)
    sys.modules.pop("broken", None)
