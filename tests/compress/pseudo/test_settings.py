"""What labelling uses where nothing is given: what the teachers' files say."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from compress.pseudo.settings import Settings, unlike
from compress.teachers.base import Preprocessing, View
from deploy.core.card import OperatingPoint
from deploy.core.errors import UserError

POINT = OperatingPoint(score=0.3, f1=0.8, precision=0.8, recall=0.8, class_scores=[0.3], images=40)


def teacher(**said: Any) -> Any:
    return SimpleNamespace(file="a.onnx", view=View.RESIZED, preprocessing=None, **said)


def test_thresholds() -> None:
    """Given; of the teacher's best F1, regions in their ratio; or the default, to the bit."""
    assert Settings(tau=0.6).thresholds([teacher(operating_point=POINT)]) == (0.6, 0.2, "as given")
    tau, region, why = Settings(tau_ignore=0.1).thresholds([teacher(operating_point=POINT)])
    assert (tau, region) == pytest.approx((0.3, 0.075))
    assert why == "where a.onnx says its F1 is best, 0.800 on 40 images"
    zero = POINT.model_copy(update={"score": 0.0})
    for teachers in ([teacher()], [teacher(operating_point=zero)], [teacher(operating_point=POINT)] * 2):
        tau, region, why = Settings().thresholds(teachers)
        assert (tau, region) == (0.4, 0.2) and why.startswith("the default") and "--thresholds-from" in why


def test_sizes() -> None:
    """One that looks at no resized image costs no second size."""
    known, unknown, own_eyes = teacher(resize_short_long=(96, 160)), teacher(), teacher()
    own_eyes.view = View.ORIGINAL
    assert Settings().sizes([own_eyes, known, unknown]) == [(96, 160), (96, 160), (800, 1333)]
    assert Settings(short=64, long=64).sizes([known, unknown]) == [(64, 64)] * 2
    assert Settings().sizes([own_eyes]) == [(800, 1333)]
    for wrong in ({"short": 64}, {"long": 64}):
        with pytest.raises(UserError, match="is missing; both or none are given"):
            Settings(**wrong)


def test_the_size_is_told_with_its_reason() -> None:
    known, unknown, own_eyes = teacher(resize_short_long=(96, 160)), teacher(), teacher()
    own_eyes.view = View.ORIGINAL
    start = "teacher a.onnx sees images: short side"
    assert Settings().size_lines(known) == [f"{start} 96, long side 160, as in its training"]
    assert "long side 1333, the default, since its file does not say; --short" in Settings().size_lines(unknown)[0]
    (warning,) = Settings(short=800, long=1333).size_lines(known)
    assert warning.startswith(f"warning: {start} 800, long side 1333, as given; it was trained with short side 96, lon")
    assert Settings().size_lines(own_eyes) == []
    own_eyes.preprocessing = Preprocessing("letterbox to 64 x 64")
    assert Settings().size_lines(own_eyes) == ["teacher a.onnx sees images: letterbox to 64 x 64, RGB"]


@pytest.mark.parametrize(("found", "labelled", "said"), [(3, 1, False), (3.01, 1, True), (1, 3, False), (0, 3, True)])
def test_three_times_is_too_many(found: float, labelled: float, said: bool) -> None:
    assert (unlike(found, labelled, "val.json") is not None) == said
    assert unlike(5, 0, "val.json") is None, "nobody drew a box of these classes"
