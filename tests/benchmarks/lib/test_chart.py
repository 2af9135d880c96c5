"""Pictures are well-formed and show every value at its place."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest

from benchmarks.lib.chart import Curve, Line, curves, dots

SVG = "{http://www.w3.org/2000/svg}"


def test_dots_diamonds_and_intervals() -> None:
    lines = [Line("A & B", [1.0, 3.0], 2.0, (0.5, 3.5)), Line("<c>", [-1.0])]
    drawn = ElementTree.fromstring(dots("a < b", "legend", lines, signed=True, unit=" %"))
    circles = drawn.findall(f"{SVG}circle")
    assert len(circles) == 3 and len(drawn.findall(f"{SVG}path")) == 1
    x = [float(circle.attrib["cx"]) for circle in circles]
    assert x[2] < x[0] < x[1] and (x[1] - x[0]) == pytest.approx(x[0] - x[2], abs=0.2)
    texts = [text.text for text in drawn.iter(f"{SVG}text")]
    assert {"a < b", "legend", "A & B", "<c>", "0 %", "+1 %", "-1 %"} <= set(texts)


def test_zero_is_always_there_and_nothing_is_no_picture() -> None:
    drawn = dots("t", "l", [Line("far away", [700.0, 701.0])])
    assert ">0</text>" in drawn and "+" not in drawn.partition("legend")[2]
    ElementTree.fromstring(dots("t", "l", [Line("all zero", [0.0])]))
    with pytest.raises(ValueError, match="t: nothing to draw"):
        dots("t", "l", [])


def test_curves_and_points_lie_where_their_figures_say() -> None:
    found = [Curve("A & B", [(2.0, 30.0, None), (1.0, 10.0, 2.0)]), Curve("<c>", [(1.0, 20.0, None)], joined=False)]
    drawn = ElementTree.fromstring(curves("a < b", "legend", "GFLOPs", found))
    (line,) = drawn.findall(f"{SVG}polyline")
    (x1, y1), (x2, y2) = (tuple(map(float, point.split(","))) for point in line.attrib["points"].split())
    assert x1 < x2 and y2 < y1, "to the right by x, whatever the order, and up by y"
    circles = [(float(c.attrib["cx"]), float(c.attrib["cy"])) for c in drawn.findall(f"{SVG}circle")]
    assert (x1, y1) in circles and len(circles) == 2 + 1, "two values, and one beside the name"
    (bar,) = (part for part in drawn.findall(f"{SVG}line") if part.attrib.get("opacity"))
    assert float(bar.attrib["y2"]) - y1 == pytest.approx((y1 - y2) / 10, abs=0.2)
    diamonds = drawn.findall(f"{SVG}path")
    assert len(diamonds) == 2 and diamonds[0].attrib["d"].startswith(f"M{x1:.1f} ")
    texts = [text.text for text in drawn.iter(f"{SVG}text")]
    assert {"a < b", "legend", "A & B", "<c>", "GFLOPs", "20"} <= set(texts)
    with pytest.raises(ValueError, match="t: nothing to draw"):
        curves("t", "l", "x", [Curve("none", [])])
