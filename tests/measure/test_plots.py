"""Plots: round axes, everything inside the drawing, and wrong calls refused."""

from __future__ import annotations

import doctest
import math
import re
import xml.etree.ElementTree as ET
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recare_patch.measure import plots
from recare_patch.measure.plots import WIDTH, Series, bar_chart, line_chart, nice_ticks, radar_chart, thinned

NUMBERS = st.floats(-1e9, 1e9, allow_nan=False)


def test_the_examples_hold() -> None:
    assert doctest.testmod(plots).failed == 0


@given(NUMBERS, NUMBERS, st.integers(2, 9))
def test_ticks_are_round_and_cover_the_range(a: float, b: float, wanted: int) -> None:
    ticks = nice_ticks(a, b, wanted)
    assert 2 <= len(ticks) <= 3 * wanted + 2
    steps = [y - x for x, y in pairwise(ticks)]
    slack = 1e-6 * max(1e-3, abs(a), abs(b))
    assert ticks[0] <= min(a, b) + slack and ticks[-1] >= max(a, b) - slack
    assert max(steps) - min(steps) <= slack


def test_ticks_need_finite_ends() -> None:
    with pytest.raises(ValueError, match="finite"):
        nice_ticks(0, math.inf)


def inside(svg: str) -> ET.Element:
    """The drawing, after a look at where its parts lie."""
    root = ET.fromstring(svg)
    _, _, width, height = map(float, str(root.get("viewBox")).split())
    for part in root.iter():
        for name, most in (("x", width), ("y", height)):
            if part.get(name) is not None:
                assert -1 <= float(str(part.get(name))) <= most + 1, ET.tostring(part)
        if part.tag.endswith("rect"):
            assert float(str(part.get("x"))) + float(str(part.get("width"))) <= width + 1
    return root


@given(
    st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=12),
    st.integers(1, 9),
    st.sampled_from(["", "rate"]),
)
def test_curves_and_bars_stay_inside(points: list[tuple[float, float]], count: int, unit: str) -> None:
    places = [x for x, _ in points]
    values = [y / 1e9 if unit else y for _, y in points]
    bands = [(value - 0.1, value + 0.1) for value in values]
    series = [Series(f"series {k} with a name", values, bands, reference=k == 1) for k in range(count)]
    inside(line_chart("t", places, series, x_label="x", y_label="y", unit=unit))
    inside(bar_chart("t", [f"{x}" * 9 for x in places], series, x_label="x", unit=unit))


@pytest.mark.parametrize("count", [3, 4, 5, 8, 13])
def test_a_radar_has_a_spoke_for_each_name(count: int) -> None:
    names = [f"companion number {k} with a very long name indeed" for k in range(count)]
    root = inside(radar_chart("t", names, [Series("patched", [0.5] * count), Series("base", [1.0] * count)]))
    marks = [part for part in root.iter() if str(part.get("transform")).startswith("translate(")]
    told = [part for part in marks if list(part)]
    assert len(told) == 2 * count
    for part in told:
        x, _ = map(float, re.findall(r"[-\d.]+", str(part.get("transform"))))
        assert 0 < x < WIDTH


def test_gaps_cut_a_curve() -> None:
    svg = line_chart("t", [3, 1, 2, 0], [Series("a", [1, 2, None, 4]), Series("b", [None] * 4)])
    lines = [p.get("d") for p in ET.fromstring(svg).iter() if p.get("stroke-linejoin")]
    assert len(lines) == 2
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
    places, series = thinned([3.0, math.nan, 1.0])
    assert places == [1.0, 3.0] and series.interval(0) is None
