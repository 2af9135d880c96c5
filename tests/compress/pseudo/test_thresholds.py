"""Thresholds of best F1 against counting by hand and against trying every threshold."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.pseudo.merge import Boxes
from compress.pseudo.thresholds import F1Thresholds, share_inside


def boxes(rows: list[tuple[list[float], float, int]]) -> Boxes:
    rows = sorted(rows, key=lambda row: -row[1])
    return Boxes(
        np.array([box for box, _, _ in rows], np.float64).reshape(-1, 4),
        np.array([score for _, score, _ in rows], np.float64),
        np.array([label for _, _, label in rows], np.int64),
    )


def at(x: float) -> list[float]:
    return [x, 0, x + 10, 10]


def test_by_hand() -> None:
    collected = F1Thresholds(3)
    found = boxes([(at(0), 0.9, 0), (at(1), 0.8, 0), (at(50), 0.7, 0), (at(90), 0.3, 0), (at(0), 0.6, 1)])
    truth = boxes([(at(0), 1, 0), (at(50), 1, 0), (at(20), 1, 2)])
    collected.add(found, truth, np.zeros(3, np.bool_))
    tau, f1 = collected.best()
    # Class 0, two objects: hit, second box on the same object misses, hit, miss: F1 2/3, 2/4, 4/5, 4/6.
    # Class 1 has no object, class 2 was never found.
    np.testing.assert_allclose(tau, [0.7, np.nan, np.nan])
    np.testing.assert_allclose(f1, [0.8, np.nan, np.nan])


def test_crowd_regions_count_neither_way() -> None:
    truth = boxes([(at(0), 1, 0), ([40, 0, 100, 10], 1, 0)])
    found = boxes([(at(50), 0.9, 0), (at(0), 0.8, 0), (at(34), 0.7, 0), (at(36), 0.95, 0)])
    collected = F1Thresholds(1)
    collected.add(found, truth, truth.boxes[:, 0] == 40)
    tau, f1 = collected.best()
    # at(36) lies in the crowd by 6/10, at(34) by 4/10 only: one hit at .8, one miss at .7
    assert (tau[0], f1[0]) == (0.8, 1.0)
    np.testing.assert_allclose(share_inside(found.boxes, truth.boxes[1:])[:, 0], [0.6, 1, 0, 0.4])


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(
            st.lists(st.tuples(st.integers(0, 9), st.integers(1, 8)), max_size=6, unique_by=lambda row: row[0]),
            st.sets(st.integers(0, 9), max_size=5),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_no_threshold_is_better(images: list[tuple[list[tuple[int, int]], set[int]]]) -> None:
    """Objects in a row, far apart: a detection hits when its place is taken."""
    collected = F1Thresholds(1)
    rows, objects = [], 0
    for found, places in images:
        rows += [(score / 8, place in places) for place, score in found]
        objects += len(places)
        collected.add(
            boxes([(at(20 * place), score / 8, 0) for place, score in found]),
            boxes([(at(20 * place + 1), 1, 0) for place in places]),
            np.zeros(len(places), np.bool_),
        )
    tau, f1 = collected.best()

    def score_at(threshold: float) -> float:
        hits = sum(hit for score, hit in rows if score >= threshold)
        return 2 * hits / (sum(score >= threshold for score, _ in rows) + objects)

    if not any(hit for _, hit in rows):
        assert np.isnan(tau[0])
        return
    every = {
        threshold / 8: score_at(threshold / 8) for threshold in range(1, 9) if any(s == threshold / 8 for s, _ in rows)
    }
    assert np.isclose(f1[0], max(every.values())) and np.isclose(every[tau[0]], f1[0])
    assert all(value < f1[0] - 1e-12 for threshold, value in every.items() if threshold > tau[0])
