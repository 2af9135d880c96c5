from __future__ import annotations

from pathlib import Path

import pytest

from compress.config.recipe import Recipe, load_recipe
from tests.helpers.recipes import TEXT, Load


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    monkeypatch.chdir(tmp_path)

    def load(text: str = TEXT, *overrides: str) -> Recipe:
        Path("r.yaml").write_text(text, encoding="utf-8")
        return load_recipe(Path("r.yaml"), overrides)

    return load
