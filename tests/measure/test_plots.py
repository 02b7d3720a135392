"""Plots: everything inside the drawing, the same file for the same numbers, and wrong calls refused."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recare_patch.measure import Series, line_chart
from recare_patch.measure.plots import bar_chart, radar_chart, thinned

NUMBERS = st.floats(-1e9, 1e9, allow_nan=False)
SVG = "{http://www.w3.org/2000/svg}"


def inside(svg: str) -> ET.Element:
    """The drawing, after a look at what its parts are and where they lie."""
    root = ET.fromstring(svg)
    assert root.get("role") == "img" and root.get("aria-label")
    assert not re.search(r"url\(|<style|\bnan\b|\binf\b|<!--", svg)
    _, _, width, height = map(float, str(root.get("viewBox")).split())
    for part in root.iter():
        if part.get("x") is not None:
            assert -1 <= float(str(part.get("x"))) <= width + 1, ET.tostring(part)
            assert -1 <= float(str(part.get("y"))) <= height + 1, ET.tostring(part)
    return root


def tooltips(root: ET.Element) -> list[str]:
    return [str(one.text) for one in root.iter(f"{SVG}title")]


@settings(max_examples=12, deadline=None)
@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=8), st.integers(1, 9), st.sampled_from(["", "rate"]))
def test_curves_and_bars_stay_inside(points: list[tuple[float, float]], count: int, unit: str) -> None:
    places = [x for x, _ in points]
    values = [y / 1e9 if unit else y for _, y in points]
    bands = [(value - 0.1, value + 0.1) for value in values]
    series = [Series(f"series {k} with a name", values, bands, reference=k == 1) for k in range(count)]
    curves = line_chart("t", places, series, x_label="x", y_label="y", unit=unit)
    assert len(tooltips(inside(curves))) == count * len(points)
    inside(bar_chart("t", [f"{x}" * 9 for x in places], series, x_label="x", unit=unit))


@pytest.mark.parametrize("count", [3, 4, 13])
def test_a_radar_has_a_spoke_for_each_name(count: int) -> None:
    names = [f"companion number {k} with a very long name indeed" for k in range(count)]
    series = [Series("patched", [0.5] * count), Series("base", [1.0] * count, reference=True)]
    told = tooltips(inside(radar_chart("t", names, series)))
    assert len(told) == 2 * count
    assert told[0] == f"patched, {names[0]}: 50.0 %"


def test_a_drawing_serves_any_page_and_is_the_same_each_time() -> None:
    series = [Series("$a$ <b>", [0.25, None, 1], [(0.1, 0.3), None, None]), Series("b", [None] * 3)]
    first = line_chart("T <i>", [3, 1, 2], series, x_label="scale", unit="rate", about="more")
    assert first == line_chart("T <i>", [3, 1, 2], series, x_label="scale", unit="rate", about="more")
    root = inside(first)
    assert root.get("aria-label") == "T <i>. more"
    assert tooltips(root) == ["$a$ <b>, scale 2: 100.0 %", "$a$ <b>, scale 3: 25.0 % (10.0 % to 30.0 %)"]
    assert "$a$ <b>" in [one.text for one in root.iter(f"{SVG}text")]
    assert "var(--plot-0, #0f6b5c)" in first and not re.search(r"[^,] #(?!000000)", first)
    # Two on a page share no id.
    other = line_chart("U", [3, 1, 2], series)
    assert not set(re.findall(r' id="(\w+)"', first)) & set(re.findall(r' id="(\w+)"', other))
    assert "not measured" in bar_chart("t", ["x"], [Series("a", [None]), Series("b", [1])])


def test_wrong_calls() -> None:
    one = [Series("a", [1.0])]
    for call in (
        lambda: line_chart("t", [], one),
        lambda: line_chart("t", [1, 2], one),
        lambda: bar_chart("t", ["a"], []),
        lambda: bar_chart("t", ["a", "b"], one),
        lambda: radar_chart("t", ["a", "b"], one),
        lambda: radar_chart("t", ["a", "b", "c"], [Series("a", [1.0, None, 1.0])]),
    ):
        with pytest.raises(ValueError):
            call()


def test_long_series_are_thinned() -> None:
    places, series = thinned([float(k) for k in range(1000)], 10)
    assert len(places) == len(series.values) == 10
    assert series.values[0] == 49.5 and places[0] == 50.5
    assert series.interval(0) == (0.0, 99.0)
    places, series = thinned([3.0, 1.0])
    assert places == [1.0, 2.0] and series.interval(0) is None
