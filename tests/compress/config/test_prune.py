"""Settings of a cut that belong together."""

from __future__ import annotations

from typing import Any

import pytest

from compress.config.prune import Cut, read_cut
from deploy.core.errors import UserError


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"gflops": 0.5, "rounds": 3}, "prune.rounds: is of schedule iterative; give schedule:"),
        ({"params": 0.5, "precision": "int8"}, "prune.precision: is of the file whose latency counts; give"),
    ],
)
def test_what_belongs_to_another_setting(values: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError) as refused:
        read_cut(values)
    assert str(refused.value).startswith(line) and "\n" not in str(refused.value)
    assert read_cut(values | {"schedule": "iterative", "precision": "fp32"}).budget in values


def test_a_resolved_cut_reads_back() -> None:
    """It names every key, also those that were not given."""
    found = read_cut({"gflops": 0.5})
    assert read_cut(found.model_dump(mode="json")) == found == Cut(gflops=0.5)


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({1: 0.5}, "prune: a key must be a word, got 1"),
        ({"gflops": object()}, "prune.gflops: needs text, a number"),
    ],
)
def test_what_no_recipe_can_hold_names_its_place(values: dict[Any, Any], line: str) -> None:
    with pytest.raises(UserError) as refused:
        read_cut(values)
    assert str(refused.value).startswith(line)
