"""What README and docs/extending.md show works as it stands there, on fewer images and steps."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers import snippets, tiny_recipe

pytestmark = pytest.mark.usefixtures("few_rounds")

ROOT = Path(__file__).parents[1]
DOCUMENTS = [path for path in (ROOT / "README.md", ROOT / "docs" / "extending.md") if path.is_file()]

QUICKER = {
    r"--train 96 --val 32 --size 96": "--train 16 --val 4 --size 64",
    r"(short|long): 96": r"\1: 64",
    r"steps: 60": "steps: 2",
    r"batch_size: 8": "batch_size: 4",
    r"warmup_steps: 10": "warmup_steps: 1",
    r"batch_sizes: \[1, 8\], seconds: 1\b": "batch_sizes: [1], seconds: 0.02",
    r"--seconds 1\b": "--seconds 0.1 --rounds 2 --warm-up 0.1",
}
NOT_HERE = ("git clone", "make ", "python3 -m venv", "pip install")
"""They install what the tests run in; `make quickstart` is the path below on more data."""


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
def test_every_snippet_runs(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipes").mkdir()
    tiny_recipe.recipe_file(tmp_path / "tiny").rename(
        tmp_path / "recipes" / "quickstart.yaml"
    )  # minutes become seconds
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    shown = [snippet for snippet in snippets.snippets(document) if "compress init" not in snippet.text]
    assert len(shown) >= 3  # the other is test_newcomer.py's
    for snippet in shown:
        snippets.run(snippet, tmp_path, quicker=QUICKER, left_out=NOT_HERE)


def test_every_substitution_is_needed() -> None:
    import re

    text = "\n".join(snippet.text for document in DOCUMENTS for snippet in snippets.snippets(document))
    assert [pattern for pattern in QUICKER if not re.search(pattern, text)] == []
