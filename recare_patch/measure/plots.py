"""Small plots as inline SVG: curves, bars, a radar and an interval on a line.

They are drawn for a page that styles them: colours come from its custom properties ``--plot-0`` to
``--plot-5`` and ``--base``, all else from its classes, so that one drawing serves a light and a dark
page. A drawing is as wide as a phone's column, so that its text stays readable there.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

WIDTH = 380
"""Of a plot, in its own units; a page shows it at 340 to 500 pixels."""

COLOURS = 6
"""Series beyond these take the colours again, with another dash."""

_FONT = 12.0
_LINE = 16.0
_RIGHT, _TOP, _BOTTOM = 14.0, 10.0, 46.0
_DIGIT = 7.6
"""Width of a digit in the widest of common fonts."""
_DASHES = ("", "6 4", "2 3")
_MOST_POINTS = 120


@dataclass(frozen=True)
class Series:
    """One line of a plot, or one bar in each group.

    Attributes:
        name: in the legend.
        values: one for each place on the x axis; None leaves a gap.
        intervals: low and high of each value, or None where it has none; may be empty.
        reference: what the others are held against: drawn in the colour of the base.
    """

    name: str
    values: Sequence[float | None]
    intervals: Sequence[tuple[float, float] | None] = field(default_factory=tuple)
    reference: bool = False

    def interval(self, place: int) -> tuple[float, float] | None:
        """The interval of one value, if it has one."""
        return self.intervals[place] if place < len(self.intervals) else None


def _element(tag: str, text: str | None = None, **attributes: str | float | None) -> str:
    """One SVG element: numbers with two decimals, text escaped; ``class_`` and ``x_y`` for class, x-y."""
    parts = []
    for name, value in attributes.items():
        if value is None or value == "":
            continue
        shown = _number(value) if isinstance(value, int | float) else html.escape(value)
        parts.append(f' {name.rstrip("_").replace("_", "-")}="{shown}"')
    body = "/>" if text is None else f">{html.escape(text, quote=False)}</{tag}>"
    return f"<{tag}{''.join(parts)}{body}"


def _number(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _text_width(text: str) -> float:
    """Roughly, in the plot's units: what legends and labels are laid out by."""
    return sum(1.0 if ord(character) > 0x2E80 else 0.56 for character in text) * _FONT


@dataclass(frozen=True)
class _Look:
    """How a series is told from the others: by colour, and where colours fail by mark and dash."""

    colour: str
    dash: str
    mark: str


_SHAPES = ("M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0Z", "M-4-4h8v8h-8Z", "M0-5L5 4H-5Z", "M0-5L5 0L0 5L-5 0Z")
_REFERENCE = _Look("var(--base)", "5 3", "M-4-1h8v2h-8Z")


def _looks(series: Sequence[Series]) -> list[_Look]:
    looks, number = [], 0
    for one in series:
        if one.reference:
            looks.append(_REFERENCE)
            continue
        colour = f"var(--plot-{number % COLOURS})"
        looks.append(_Look(colour, _DASHES[number // COLOURS % len(_DASHES)], _SHAPES[number % len(_SHAPES)]))
        number += 1
    return looks


def _shorten(text: str, width: float) -> str:
    if _text_width(text) <= width:
        return text
    while text and _text_width(f"{text}…") > width:
        text = text[:-1]
    return f"{text.rstrip()}…"


def _wrap(text: str, width: float, lines: int) -> list[str]:
    """At most so many lines of at most that width; the last is shortened where the text is longer."""
    found = [""]
    words = text.split()
    for number, word in enumerate(words):
        longer = f"{found[-1]} {word}".strip()
        if not found[-1] or _text_width(longer) <= width:
            found[-1] = longer
        elif len(found) == lines:
            found[-1] = " ".join([found[-1], *words[number:]])
            break
        else:
            found.append(word)
    return [_shorten(line, width) for line in found]


def _document(parts: Sequence[str], height: float, title: str, about: str) -> str:
    """The drawing; its title and description are what a screen reader says of it."""
    label = html.escape(f"{title}. {about}" if about else title)
    return (
        f'<svg class="plot" viewBox="0 0 {WIDTH} {_number(height)}" role="img" aria-label="{label}" '
        f'xmlns="http://www.w3.org/2000/svg">{"".join(parts)}</svg>'
    )


def _alike(low: float, high: float) -> bool:
    return math.isclose(low, high, rel_tol=1e-9, abs_tol=1e-11)


def nice_ticks(low: float, high: float, wanted: int = 6) -> list[float]:
    """Round numbers that cover a range, in steps of 1, 2 or 5 times a power of ten.

    Args:
        low, high: the range; equal ones are given some room.
        wanted: about how many.

    Example:
        >>> nice_ticks(0, 0.9)
        [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"a range has finite ends, got {low} and {high}")
    low, high = min(low, high), max(low, high)
    if _alike(low, high):
        room = max(abs(high) / 2, 1e-9) if abs(high) > 1e-9 else 1.0
        low, high = low - room, high + room
    raw = (high - low) / max(wanted - 1, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next((m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.9), 10 * power)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(k * step, 12) + 0.0 for k in range(first, last + 1)]


def tick_text(value: float, unit: str = "") -> str:
    """A number on an axis: rates in percent, thousands with a comma.

    Example:
        >>> tick_text(0.2, "rate"), tick_text(12000), tick_text(0.05)
        ('20 %', '12,000', '0.05')
    """
    if unit == "rate":
        return f"{100 * value:.4g} %"
    if abs(value) >= 1000 and value == round(value):
        return f"{value:,.0f}"
    return f"{value:.4g}".replace("-", "−")


def _legend(series: Sequence[Series], *, lines: bool) -> tuple[list[str], float]:
    """A legend over the plot, in as many rows as it needs, and its height; none for a single series."""
    if len(series) < 2:
        return [], 0.0
    parts, x, y = [], 2.0, _TOP + 2
    for one, look in zip(series, _looks(series), strict=True):
        shown = _shorten(one.name, WIDTH - 32)
        width = 26 + _text_width(shown) + 14
        if x > 2 and x + width - 14 > WIDTH:
            x, y = 2.0, y + _LINE
        if lines:
            parts.append(
                _element("path", d=f"M{_number(x)} {_number(y)}h20", stroke=look.colour, stroke_width=2,
                         stroke_dasharray=look.dash, fill="none")
            )  # fmt: skip
            parts.append(_marker(look, x + 10, y, ""))
        else:
            parts.append(_element("rect", x=x + 4, y=y - 5, width=12, height=10, rx=2, fill=look.colour))
        parts.append(_element("text", shown, x=x + 26, y=y + 4, class_="plot-text"))
        x += width
    return parts, y - _TOP + 16


def _marker(look: _Look, x: float, y: float, told: str) -> str:
    """The mark of one value; ``told`` is its tooltip."""
    title = f"<title>{html.escape(told, quote=False)}</title>" if told else ""
    return (
        f'<path d="{look.mark}" transform="translate({_number(x)} {_number(y)})" fill="{look.colour}">'
        f"{title}</path>"
    )


def _range(series: Sequence[Series], unit: str) -> tuple[float, float]:
    ends = [value for one in series for value in one.values if value is not None]
    ends += [end for one in series for interval in one.intervals if interval for end in interval]
    return min([0.0, *ends]), max([1.0 if unit == "rate" else 0.0, *ends])


def line_chart(
    title: str,
    x_values: Sequence[float],
    series: Sequence[Series],
    *,
    x_label: str = "",
    y_label: str = "",
    unit: str = "",
    about: str = "",
    marks: bool = True,
) -> str:
    """Curves over a number line, with their intervals as bands.

    Args:
        title: what a screen reader says; the page has its own heading.
        x_values: places on the x axis, in any order.
        series: as many values each as there are places.
        x_label, y_label: of the axes.
        unit: "rate": the y axis goes from 0 to 100 %.
        about: more for the screen reader.
        marks: draw a mark at each value, with the numbers as its tooltip.

    Returns:
        An ``<svg>`` element.

    Raises:
        ValueError: there is nothing to draw, or a series has another length.
    """
    if not x_values or not series:
        raise ValueError("a plot needs places and series, and got none")
    if any(len(one.values) != len(x_values) for one in series):
        raise ValueError(f"each series of '{title}' needs {len(x_values)} values")
    legend, room = _legend(series, lines=True)
    top = _TOP + room + (20 if y_label else 4)
    height = top + 190 + _BOTTOM
    bottom, right = height - _BOTTOM, WIDTH - _RIGHT
    y_ticks = nice_ticks(*_range(series, unit))
    left = 10 + _DIGIT * max(len(tick_text(tick, unit)) for tick in y_ticks)
    x_ticks = nice_ticks(min(x_values), max(x_values))
    x_low, x_high = min(x_values), max(x_values)
    if _alike(x_low, x_high):
        x_low, x_high = x_ticks[0], x_ticks[-1]

    def across(value: float) -> float:
        return left + (value - x_low) / (x_high - x_low) * (right - left)

    def down(value: float) -> float:
        return bottom - (value - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]) * (bottom - top)

    parts = [*legend, *_grid(y_ticks, unit, down, left, right)]
    parts += [
        part
        for tick in x_ticks
        if x_low - 1e-9 <= tick <= x_high + 1e-9
        for part in (
            _element("path", d=f"M{_number(across(tick))} {_number(bottom)}v4", class_="plot-axis"),
            _element("text", tick_text(tick), x=across(tick), y=bottom + 18, class_="plot-text",
                     text_anchor="middle"),
        )
    ]  # fmt: skip
    parts.append(_element("path", d=f"M{_number(left)} {_number(bottom)}H{right:g}", class_="plot-axis"))
    parts += _axis_labels(x_label, y_label, (left + right) / 2, height, top)
    order = sorted(range(len(x_values)), key=lambda k: x_values[k])
    for one, look in zip(series, _looks(series), strict=True):
        for run in _runs(order, one.values):
            bands = [(k, interval) for k in run if (interval := one.interval(k)) is not None]
            if len(bands) > 1:
                there = [f"{_number(across(x_values[k]))} {_number(down(high))}" for k, (_, high) in bands]
                back = [f"{_number(across(x_values[k]))} {_number(down(low))}" for k, (low, _) in bands[::-1]]
                parts.append(
                    _element("path", d=f"M{'L'.join([*there, *back])}Z", fill=look.colour, fill_opacity=0.16)
                )
            line = "L".join(f"{_number(across(x_values[k]))} {_number(down(one.values[k]))}" for k in run)  # type: ignore[arg-type]
            parts.append(
                _element("path", d=f"M{line}", stroke=look.colour, stroke_width=2, stroke_dasharray=look.dash,
                         stroke_linejoin="round", fill="none")
            )  # fmt: skip
            if marks:
                parts += [
                    _marker(look, across(x_values[k]), down(value),
                            _told(one, k, f"{x_label} {tick_text(x_values[k])}".strip(), unit))
                    for k in run
                    if (value := one.values[k]) is not None
                ]  # fmt: skip
    return _document(parts, height, title, about)


def _runs(order: Sequence[int], values: Sequence[float | None]) -> list[list[int]]:
    """Places in their order, cut where a value is missing."""
    runs: list[list[int]] = [[]]
    for k in order:
        if values[k] is None:
            runs.append([])
        else:
            runs[-1].append(k)
    return [run for run in runs if run]


def _told(one: Series, place: int, where: str, unit: str) -> str:
    value, interval = one.values[place], one.interval(place)
    assert value is not None
    told = f"{one.name}, {where}: {_exact(value, unit)}" if where else f"{one.name}: {_exact(value, unit)}"
    return f"{told} ({_exact(interval[0], unit)} to {_exact(interval[1], unit)})" if interval else told


def _exact(value: float, unit: str) -> str:
    return f"{100 * value:.1f} %" if unit == "rate" else tick_text(value)


def _grid(
    ticks: Sequence[float], unit: str, down: Callable[[float], float], left: float, right: float
) -> list[str]:
    return [
        part
        for tick in ticks
        for part in (
            _element("path", d=f"M{_number(left)} {_number(down(tick))}H{right:g}", class_="plot-grid"),
            _element("text", tick_text(tick, unit), x=left - 7, y=down(tick) + 4, class_="plot-text",
                     text_anchor="end"),
        )
    ]  # fmt: skip


def _axis_labels(x_label: str, y_label: str, middle: float, height: float, top: float) -> list[str]:
    parts = []
    if x_label:
        parts.append(
            _element("text", _shorten(x_label, WIDTH - 60), x=middle, y=height - 8,
                     class_="plot-label", text_anchor="middle")
        )  # fmt: skip
    if y_label:
        # Level and over the axis: nobody has to turn their head.
        parts.append(_element("text", _shorten(y_label, WIDTH - 12), x=2, y=top - 12, class_="plot-label"))
    return parts


def bar_chart(
    title: str,
    groups: Sequence[str],
    series: Sequence[Series],
    *,
    x_label: str = "",
    unit: str = "",
    about: str = "",
) -> str:
    """Level bars, grouped, each group under its name; intervals as whiskers.

    Args:
        title: what a screen reader says.
        groups: names of the groups, top to bottom.
        series: as many values each as there are groups.
        x_label: of the axis of values.
        unit: "rate": the axis goes from 0 to 100 %.
        about: more for the screen reader.

    Returns:
        An ``<svg>`` element.

    Raises:
        ValueError: there is nothing to draw, or a series has another length.
    """
    if not groups or not series:
        raise ValueError("a plot needs groups and series, and got none")
    if any(len(one.values) != len(groups) for one in series):
        raise ValueError(f"each series of '{title}' needs {len(groups)} values")
    legend, room = _legend(series, lines=False)
    left, right = 2.0, WIDTH - 58.0
    ticks = nice_ticks(*_range(series, unit), 3 if unit == "rate" else 4)
    bar, gap = (12.0, 3.0) if len(series) > 1 else (14.0, 0.0)
    each = 18 + len(series) * (bar + gap) + 8
    top = _TOP + room
    bottom = top + each * len(groups) + 2
    height = bottom + (_BOTTOM if x_label else _BOTTOM - 22)

    def across(value: float) -> float:
        return left + (value - ticks[0]) / (ticks[-1] - ticks[0]) * (right - left)

    parts = [*legend]
    for tick in ticks:
        x = across(tick)
        anchor = "start" if x < left + 12 else "middle"
        parts.append(
            _element("path", d=f"M{_number(x)} {_number(top)}V{_number(bottom)}", class_="plot-grid")
        )
        parts.append(
            _element("text", tick_text(tick, unit), x=x, y=bottom + 16, class_="plot-text",
                     text_anchor=anchor)
        )  # fmt: skip
    y = top
    for place, group in enumerate(groups):
        parts.append(_element("text", _shorten(group, WIDTH - 8), x=left, y=y + 13, class_="plot-ink"))
        y += 18
        for one, look in zip(series, _looks(series), strict=True):
            value, interval = one.values[place], one.interval(place)
            if value is None:
                parts.append(_element("text", "not measured", x=left + 4, y=y + 10, class_="plot-text"))
            else:
                start, end = sorted((across(0), across(value)))
                bar_title = html.escape(_told(one, place, group, unit), quote=False)
                parts.append(
                    f'<rect x="{_number(start)}" y="{_number(y)}" width="{_number(max(end - start, 1.5))}" '
                    f'height="{bar:g}" rx="1.5" fill="{look.colour}">'
                    f"<title>{bar_title}</title></rect>"
                )
                reach = end
                if interval is not None:
                    low, high = across(interval[0]), across(interval[1])
                    middle = y + bar / 2
                    parts.append(
                        _element("path", class_="plot-whisker",
                                 d=f"M{_number(low)} {_number(middle)}H{_number(high)}"
                                   f"M{_number(low)} {_number(middle - 3)}v6"
                                   f"M{_number(high)} {_number(middle - 3)}v6")
                    )  # fmt: skip
                    reach = max(end, high)
                parts.append(
                    _element("text", _exact(value, unit), x=reach + 6, y=y + bar - 2, class_="plot-ink")
                )
            y += bar + gap
        y += 8
    parts += _axis_labels(x_label, "", (left + right) / 2, height, top)
    return _document(parts, height, title, about)


def radar_chart(title: str, axes: Sequence[str], series: Sequence[Series], *, about: str = "") -> str:
    """Rates on spokes, 0 at the centre and 100 % at the rim.

    Args:
        title: what a screen reader says.
        axes: names of the spokes, clockwise from the top; at least three.
        series: one closed line each, values 0 to 1.
        about: more for the screen reader.

    Returns:
        An ``<svg>`` element.

    Raises:
        ValueError: fewer than three spokes, or a series has another length or a gap.
    """
    if len(axes) < 3:
        raise ValueError(f"a radar needs at least three spokes, got {len(axes)}")
    if any(len(one.values) != len(axes) or None in one.values for one in series):
        raise ValueError(f"each series of '{title}' needs {len(axes)} values")
    legend, room = _legend(series, lines=True)
    radius, x0 = 104.0, WIDTH / 2
    y0 = _TOP + room + radius + 36
    turns = [2 * math.pi * k / len(axes) for k in range(len(axes))]

    def at(turn: float, value: float) -> tuple[float, float]:
        return x0 + radius * value * math.sin(turn), y0 - radius * value * math.cos(turn)

    def ring(values: Sequence[float]) -> str:
        corners = [at(turn, value) for turn, value in zip(turns, values, strict=True)]
        return "M" + "L".join(f"{_number(x)} {_number(y)}" for x, y in corners) + "Z"

    parts = [*legend]
    for level in (0.25, 0.5, 0.75, 1.0):
        parts.append(_element("path", d=ring([level] * len(axes)), class_="plot-grid", fill="none"))
        parts.append(
            _element(
                "text", f"{100 * level:.0f} %", x=x0 + 4, y=y0 - radius * level + 12, class_="plot-faint"
            )
        )
    for turn, name in zip(turns, axes, strict=True):
        x, y = at(turn, 1.0)
        parts.append(
            _element("path", d=f"M{_number(x0)} {_number(y0)}L{_number(x)} {_number(y)}", class_="plot-grid")
        )
        side = math.sin(turn)
        anchor = "middle" if abs(side) < 0.3 else "start" if side > 0 else "end"
        x, y = at(turn, 1.1)
        room_there = (WIDTH - x if anchor == "start" else x if anchor == "end" else 140.0) - 2
        lines = _wrap(name, room_there, 2)
        above = (len(lines) - 1) * _LINE if math.cos(turn) > 0.3 else 0.0
        below = 8.0 if math.cos(turn) < -0.3 else 4.0
        parts += [
            _element("text", line, x=x, y=y + below - above + k * _LINE, class_="plot-ink",
                     text_anchor=anchor)
            for k, line in enumerate(lines)
        ]  # fmt: skip
    for one, look in zip(series, _looks(series), strict=True):
        values = [min(max(value or 0.0, 0.0), 1.0) for value in one.values]
        parts.append(
            _element(
                "path",
                d=ring(values),
                stroke=look.colour,
                stroke_width=2,
                stroke_dasharray=look.dash,
                fill=look.colour,
                fill_opacity=0.08,
            )
        )
        for place, (turn, value) in enumerate(zip(turns, values, strict=True)):
            parts.append(_marker(look, *at(turn, value), _told(one, place, axes[place], "rate")))
    return _document(parts, y0 + radius + 34, title, about)


def interval_line(
    base: float | None,
    patched: float,
    base_interval: tuple[float, float] | None = None,
    interval: tuple[float, float] | None = None,
) -> str:
    """Two rates with their intervals on one line from 0 to 1, for a cell of a table.

    The numbers stand in the cells beside it, so a screen reader skips it.
    """
    width, height, edge = 168.0, 28.0, 6.0

    def across(value: float) -> float:
        return edge + min(max(value, 0.0), 1.0) * (width - 2 * edge)

    parts = [
        _element("path", class_="plot-grid",
                 d=f"M{edge:g} 14H{width - edge:g}M{edge:g} 10v8M{width / 2:g} 11v6M{width - edge:g} 10v8")
    ]  # fmt: skip
    for name, value, band, y in (
        ("base", base, base_interval, 9.0),
        ("patched", patched, interval, 19.0),
    ):
        if value is None:
            continue
        if band is not None:
            parts.append(
                _element("path", d=f"M{_number(across(band[0]))} {y:g}H{_number(across(band[1]))}",
                         class_=f"strip-{name}")
            )  # fmt: skip
        parts.append(_element("circle", cx=across(value), cy=y, r=4, class_=f"dot-{name}"))
    return (
        f'<svg class="strip" viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}" '
        f'aria-hidden="true">{"".join(parts)}</svg>'
    )


def thinned(values: Sequence[float], most: int = _MOST_POINTS) -> tuple[list[float], Series]:
    """A long series as means of equal stretches, with the lowest and highest of each as its interval.

    Args:
        values: one a step; those that are not finite are left out.
        most: stretches at most.

    Returns:
        The middles of the stretches, counted in steps from 1, and the series of means.
    """
    steps = [(k + 1, value) for k, value in enumerate(values) if math.isfinite(value)]
    size = max(1, math.ceil(len(steps) / most))
    parts = [steps[start : start + size] for start in range(0, len(steps), size)]
    places = [sum(step for step, _ in part) / len(part) for part in parts]
    means = [sum(value for _, value in part) / len(part) for part in parts]
    bands = [(min(v for _, v in part), max(v for _, v in part)) for part in parts]
    return places, Series("loss", means, bands if size > 1 else ())
