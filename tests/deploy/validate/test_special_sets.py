"""All twelve figures have pycocotools' bits, on sets where evaluators differ and on drawn ones."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy.validate.coco import evaluate_coco
from tests.helpers.coco_sets import SETS, Rows, figures, pycocotools_figures, truth


def bits(values: list[float]) -> bytes:
    return struct.pack(f"{len(values)}d", *values)


@pytest.mark.parametrize("name", SETS)
def test_special_sets_have_the_bits_of_pycocotools(name: str) -> None:
    document, rows = SETS[name]
    wanted = pycocotools_figures(document, rows)
    for backend in ("faster", "pycocotools"):
        found = figures(evaluate_coco(document, rows, backend=backend))  # type: ignore[arg-type]
        assert bits(found) == bits(wanted), f"{backend}: {found}, pycocotools: {wanted}"


def test_the_sets_differ_from_each_other() -> None:
    """Figures of 0, 100 and none at all alone would not tell evaluators apart."""
    assert len(SETS) >= 60
    assert len({bits(figures(evaluate_coco(*case))) for case in SETS.values()}) >= 45


IDS = (0, 1, 7, 2**31, 2**40)
SIDES = st.sampled_from([0.0, 0.5, 8.0, 31.5, 32.0, 40.0, 96.0, 100.25])
BOXES = st.tuples(st.integers(0, 12).map(lambda n: n * 8.0), st.sampled_from([0.0, 4.0, 33.3]), SIDES, SIDES).map(list)
SCORES = st.sampled_from([0.1, 0.3, 0.3 + 1e-9, 0.5, 0.9])
OBJECTS = st.lists(
    st.fixed_dictionaries(
        {
            "image_id": st.sampled_from(IDS),
            "category_id": st.sampled_from(IDS[:3]),
            "bbox": BOXES,
            "iscrowd": st.sampled_from([0, 0, 0, 1]),
        },
        optional={"area": st.sampled_from([-1.0, 0.0, 32.0**2, 96.0**2, 5e4])},
    ),
    max_size=12,
)
FOUND = st.lists(
    st.fixed_dictionaries(
        {
            "image_id": st.sampled_from(IDS),
            "category_id": st.sampled_from(IDS[:3]),
            "bbox": BOXES,
            "score": SCORES,
        }
    ),
    max_size=25,
)


@settings(max_examples=60)
@given(OBJECTS, FOUND)
def test_drawn_sets_have_the_bits_of_pycocotools(objects: list[dict[str, Any]], rows: Rows) -> None:
    document = truth(*objects, images=IDS, categories=IDS[:3])
    assert bits(figures(evaluate_coco(document, rows))) == bits(pycocotools_figures(document, rows))
