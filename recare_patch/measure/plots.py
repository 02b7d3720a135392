"""Small plots as SVG, drawn by matplotlib: curves, level bars and a radar.

A drawing takes its colours from the page around it (``--plot-0``, ``--ink`` …), so that one serves a light
and a dark page; alone it has the light ones. It is as wide as a phone's column.
"""

from __future__ import annotations

import hashlib
import html
import io
import itertools
import math
import re
import textwrap
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

_WIDTH = 380
_PALETTE = ("#0f6b5c", "#b4481e", "#2f5fa8", "#8a3f7d", "#6b6a12", "#6e6a61")
_INK, _MUTED, _LINE, _BASE = "#1d1c1a", "#5f5b53", "#dedad0", "#857e70"
_NAMES = {colour: f"plot-{place}" for place, colour in enumerate(_PALETTE)}
_NAMES |= {_INK: "ink", _MUTED: "muted", _LINE: "line", _BASE: "base"}
# The same input gives the same file. Texts stay texts, and a dollar sign in them is no formula.
_STYLE = {"svg.hashsalt": "recare-patch", "svg.fonttype": "none", "text.parse_math": False}
_STYLE |= {"font.family": ["DejaVu Sans"], "font.size": 12, "text.color": _INK, "axes.labelcolor": _INK}
_STYLE |= {"axes.titlesize": 12, "grid.color": _LINE, "xtick.labelcolor": _MUTED, "ytick.labelcolor": _MUTED}


@dataclass(frozen=True)
class Series:
    """One line of a plot, or one bar in each group.

    Attributes:
        values: one for each place on the x axis; None leaves a gap.
        intervals: low and high of each value, or None where it has none; may be empty.
        reference: what the others are held against: drawn in the colour of the base.
    """

    name: str
    values: Sequence[float | None]
    intervals: Sequence[tuple[float, float] | None] = ()
    reference: bool = False

    def interval(self, place: int) -> tuple[float, float] | None:
        """The interval of one value, if it has one."""
        return self.intervals[place] if place < len(self.intervals) else None


def thinned(values: Sequence[float], most: int = 120) -> tuple[list[float], Series]:
    """A long series as means of equal stretches, with the lowest and highest of each as its interval.

    Returns:
        The middles of the stretches, counted in steps from 1, and the series of means.
    """
    size = max(1, math.ceil(len(values) / most))
    parts = [values[start : start + size] for start in range(0, len(values), size)]
    places = [k * size + (len(part) + 1) / 2 for k, part in enumerate(parts)]
    bands = [(min(part), max(part)) for part in parts] if size > 1 else []
    return places, Series("loss", [fmean(part) for part in parts], bands)


def _text(value: float, unit: str) -> str:
    if unit == "rate":
        return f"{100 * value:.1f} %"
    large = abs(value) >= 1000 and value == round(value)
    return (f"{value:,.0f}" if large else f"{value:.4g}").replace("-", "−")


def _short(text: str, most: int) -> str:
    """Text of so many letters at most, where those of Asian scripts count twice."""
    widths = [2 if ord(letter) > 0x2E80 else 1 for letter in text]
    if sum(widths) <= most:
        return text
    return text[: sum(sum(widths[: k + 1]) < most for k in range(len(text)))].rstrip() + "…"


def _check(title: str, count: int, series: Sequence[Series], least: int = 1) -> None:
    if count < least or not series:
        raise ValueError(f"the plot '{title}' needs {least} places or more, and a series")
    if any(len(one.values) != count for one in series):
        raise ValueError(f"each series of '{title}' needs {count} values")


def _looks(series: Sequence[Series]) -> list[dict[str, Any]]:
    """How series are told apart: by colour, and where colours fail by mark and dash."""
    dashes = ("-", "--", ":")
    looks = (
        {"color": _PALETTE[k % 6], "marker": "os^D"[k % 4], "linestyle": dashes[k // 6 % 3], "lw": 2, "ms": 7}
        for k in itertools.count()
    )
    reference = {"color": _BASE, "marker": "_", "linestyle": "--", "lw": 2, "ms": 7}
    return [reference if one.reference else next(looks) for one in series]


def _drawn(
    title: str, about: str, height: float, series: Sequence[Series], draw: Callable[..., None], **axes: Any
) -> str:
    """What ``draw`` puts on axes, as an ``<svg>`` element; it is handed a way to give marks tooltips."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    tooltips: list[str] = []

    def tell(artist: Any, one: Series, k: int, where: str, unit: str) -> None:
        band, value = one.interval(k), one.values[k]
        shown = f" ({_text(band[0], unit)} to {_text(band[1], unit)})" if band else ""
        artist.set_gid(f"told-{len(tooltips)}")
        tooltips.append(f"{one.name}{where and f', {where}'}: {_text(value or 0.0, unit)}{shown}")

    names = [_short(one.name, 46) for one in series]
    columns = max(1, min(len(names), 54 // (max(map(len, names)) + 9)))
    height += 18 * math.ceil(len(names) / columns) if len(names) > 1 else 0
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        # Letters that the font for measuring lacks are in the reader's browser.
        warnings.simplefilter("ignore", UserWarning)
        # On a figure of its own: pyplot would touch the caller's backend and open figures.
        figure = Figure(figsize=(_WIDTH / 72, height / 72), dpi=72, layout="constrained", facecolor="none")
        FigureCanvasSVG(figure)
        plot = figure.add_subplot(facecolor="none", axisbelow=True, **axes)
        plot.spines[:].set_visible(False)
        plot.tick_params(length=0, pad=7)
        draw(plot, tell)
        if len(names) > 1:
            handles = [Line2D([], [], **look) for look in _looks(series)]
            figure.legend(handles, names, loc="outside upper left", ncols=columns, frameon=False)
        for artist in figure.findobj():
            artist.set_clip_on(False)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Type", "Format")))
    body = re.sub(r".*<svg[^>]*>|<defs>\s*<style.*?</defs>", "", file.getvalue(), flags=re.DOTALL)
    body = re.sub(r'<g id="told-(\d+)">', lambda g: f"<g><title>{html.escape(tooltips[int(g[1])])}</title>", body)
    # What is left of ids are marks that are used several times; several drawings share a page.
    key = hashlib.sha256(f"{title}{about}{body}".encode()).hexdigest()[:8]
    body = re.sub(r'( id="|xlink:href="#)', rf"\1p{key}", re.sub(r' id="\w+_\d+"', "", body))
    body = re.sub("|".join(_NAMES), lambda c: f"var(--{_NAMES[c[0]]}, {c[0]})", body)
    body = body.replace("'DejaVu Sans'", "var(--text, sans-serif)")
    return (
        f'<svg class="plot" viewBox="0 0 {_WIDTH} {height:g}" role="img" '
        f'aria-label="{html.escape(f"{title}. {about}" if about else title)}" '
        f'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">{body.strip()}'
    )


def _scale(axis: Any, series: Sequence[Series], unit: str) -> None:
    """An axis of values from 0, or to 100 %, unless something lies beyond."""
    ends = [value for one in series for value in one.values if value is not None]
    ends += [end for one in series for band in one.intervals if band for end in band]
    low, high = min([0.0, *ends]), max([1.0 if unit == "rate" else 0.0, *ends])
    room = 0.05 * (high - low)
    axis.axes.set(**{f"{axis.axis_name}lim": (low - (low < 0) * room, high + (unit != "rate") * room or 1)})
    axis.set_major_formatter(
        lambda value, _: f"{100 * value:.4g} %" if unit == "rate" else _text(round(value, 12) + 0.0, "")
    )


def line_chart(
    title: str, x_values: Sequence[float], series: Sequence[Series], *,
    x_label: str = "", y_label: str = "", unit: str = "", about: str = "", marks: bool = True,
) -> str:  # fmt: skip
    """Curves over a number line, with their intervals as bands.

    Args:
        title: what a screen reader says; the page has its own heading.
        x_values: places on the x axis, in any order.
        series: as many values each as there are places.
        x_label, y_label: of the axes.
        unit: "rate": the y axis goes from 0 to 100 %.
        about: more for the screen reader.
        marks: draw a mark at each value, with the numbers as its tooltip.

    Raises:
        ValueError: there is nothing to draw, or a series has another length.
    """
    _check(title, len(x_values), series)
    order = sorted(range(len(x_values)), key=lambda k: x_values[k])
    places = [x_values[k] for k in order]

    def draw(axes: Any, tell: Callable[..., None]) -> None:
        for one, look in zip(series, _looks(series), strict=True):
            values = [math.nan if one.values[k] is None else one.values[k] for k in order]
            bands = [one.interval(k) or (math.nan, math.nan) for k in order]
            if any(one.intervals):
                axes.fill_between(places, *zip(*bands, strict=True), color=look["color"], alpha=0.16, lw=0)
            axes.plot(places, values, **(look | {"marker": ""}))
            for k in order if marks else ():
                if one.values[k] is not None:
                    (mark,) = axes.plot(x_values[k], one.values[k], **(look | {"linestyle": ""}))
                    tell(mark, one, k, f"{x_label} {_text(x_values[k], '')}".strip(), unit)
        _scale(axes.yaxis, series, unit)
        axes.grid(axis="y")
        axes.locator_params(axis="x", nbins=6, steps=[1, 2, 5, 10])
        axes.xaxis.set_major_formatter(lambda value, _: _text(round(value, 12) + 0.0, ""))
        axes.set_xlabel(_short(x_label, 50))
        # Level and over the axis: nobody has to turn their head.
        axes.set_title(_short(y_label, 50), loc="left", pad=9)

    return _drawn(title, about, 250, series, draw)


def bar_chart(
    title: str, groups: Sequence[str], series: Sequence[Series], *,
    x_label: str = "", unit: str = "", about: str = "",
) -> str:  # fmt: skip
    """Level bars, grouped, each group under its name; intervals as whiskers. Arguments as of a line chart."""
    _check(title, len(groups), series)
    rows = len(series) + 1.4

    def draw(axes: Any, tell: Callable[..., None]) -> None:
        for place, group in enumerate(groups):
            axes.text(0, place * rows - 0.2, _short(group, 48), transform=axes.get_yaxis_transform())
            for row, (one, look) in enumerate(zip(series, _looks(series), strict=True), 1):
                value, band, y = one.values[place], one.interval(place), place * rows + row - 0.4
                if value is None:
                    axes.text(0, y, "not measured", va="center", color=_MUTED)
                    continue
                (bar,) = axes.barh(y, value, height=0.8, color=look["color"])
                tell(bar, one, place, group, unit)
                if band is not None:
                    axes.plot(band, [y, y], color=_INK, lw=1, marker="|", ms=6)
                axes.text(max([value, *(band or ())]), y, f"\u2002{_text(value, unit)}", va="center")
        _scale(axes.xaxis, series, unit)
        axes.set(ylim=(len(groups) * rows - 0.8, -0.9), yticks=[])
        axes.grid(axis="x")
        axes.locator_params(axis="x", nbins=5)
        axes.set_xlabel(_short(x_label, 50))

    return _drawn(title, about, 44 + 17 * rows * len(groups), series, draw)


def radar_chart(title: str, axes: Sequence[str], series: Sequence[Series], *, about: str = "") -> str:
    """Rates on three or more spokes, clockwise from the top, 0 at the centre and 100 % at the rim."""
    _check(title, len(axes), series, least=3)
    turns = [2 * math.pi * k / len(axes) for k in range(len(axes))]
    names = ["\n".join(_short(line, 15) for line in textwrap.wrap(name, 15)[:2]) for name in axes]

    def draw(polar: Any, tell: Callable[..., None]) -> None:
        for one, look in zip(series, _looks(series), strict=True):
            if None in one.values:
                raise ValueError(f"a radar has no gaps, and '{one.name}' of '{title}' has one")
            polar.plot([*turns, 0], [*one.values, one.values[0]], **(look | {"marker": ""}))
            polar.fill([*turns, 0], [*one.values, one.values[0]], color=look["color"], alpha=0.08)
            for k, turn in enumerate(turns):
                (mark,) = polar.plot(turn, one.values[k], **(look | {"linestyle": ""}))
                tell(mark, one, k, axes[k], "rate")
        polar.set(ylim=(0, 1), theta_offset=math.pi / 2, theta_direction=-1)
        polar.set_xticks(turns, names)
        for label, turn in zip(polar.get_xticklabels(), turns, strict=True):
            side = round(math.sin(turn), 1)
            label.set_horizontalalignment("left" if side > 0.2 else "right" if side < -0.2 else "center")
        polar.set_yticks([0.25, 0.5, 0.75, 1], ["25 %", "50 %", "75 %", "100 %"], fontsize=9)

    return _drawn(title, about, 300, series, draw, projection="polar")
