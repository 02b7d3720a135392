"""The report: one HTML file that shows what a patch erased, what it kept and what that cost.

It stands alone: styles, plots and pictures are inside, nothing is fetched and no script runs. The
numbers are those of ``evidence.json`` beside it, and every text in it is escaped.
"""

from __future__ import annotations

import base64
import functools
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup
from PIL import Image

from recare_patch.core import Comparison, OutputError, write_text
from recare_patch.measure.card import intervals_meet, worst_first
from recare_patch.measure.evidence import (
    RATE,
    AttackFigure,
    Check,
    Evidence,
    Figure,
    Group,
    show_interval,
    show_value,
)
from recare_patch.measure.plots import Series, bar_chart, line_chart, radar_chart, thinned
from recare_patch.patch import REPORT_NAME
from recare_patch.recipe import WEIGHTS_NAME

Pictures = Image.Image | Path | Sequence[Comparison]
"""What the report shows under one caption: a sheet, its file, or pictures that it lays out itself."""

_LARGEST = 2400
"""Largest side of a sheet in the report, pixels."""

_LARGEST_OF_MANY = 320
"""Largest side of a picture that stands beside others: enough for a sharp screen."""

_GROUPS: dict[Group, tuple[str, str]] = {
    "erased": ("Erased", "How often the concept still shows, on prompts that name it in several ways."),
    "care": ("Guarded companions", "Whether what goes along with the concept is still drawn."),
    "kept": ("Kept", "Other concepts of its kind, agreement with the prompt, and distance to the base."),
    "memorization": ("Memorization", "What textual inversion recovers of the concept."),
    "check": ("Further figures", "Figures of the checks below."),
    "attack": ("Attack figures", "Figures under attack."),
}


@dataclass(frozen=True)
class _Group:
    title: str
    about: str
    figures: tuple[Figure, ...]


class _Image(NamedTuple):
    source: str
    width: int
    height: int


def write_report(
    evidence: Evidence,
    folder: str | os.PathLike[str],
    pictures: Mapping[str, Pictures] | None = None,
    training: Mapping[str, Any] | None = None,
) -> Path:
    """Write ``report.html`` into a folder, whole or not at all.

    Args:
        evidence: what was measured.
        folder: made if it is missing; where the weights are in it, their size is told.
        pictures: caption → pictures before and after; those of unsafe concepts are blurred until the
            reader asks for them.
        training: what the run's ``training.json`` holds, for the plots of losses and cost.

    Returns:
        The file.

    Raises:
        OutputError: a picture cannot be read, or the file cannot be written.
    """
    weights, training = Path(folder) / WEIGHTS_NAME, training or {}
    sheets = [_sheet(caption, found) for caption, found in (pictures or {}).items()]
    groups = {
        key: _Group(title, about, found)
        for key, (title, about) in _GROUPS.items()
        if (found := evidence.in_group(key))
    }
    stages, losses = _stage_plots(training.get("stages")), _loss_plots(training.get("losses"))
    contents = {
        **({"pictures": "Before and after"} if sheets else {}),
        **{key: one.title for key, one in groups.items()},
        **({"attacks": "Under attack"} if evidence.attacks else {}),
        **({"checks": "Away from the usual"} if evidence.checks else {}),
        **({"cost": "What it cost"} if stages or losses or evidence.cost else {}),
        "again": "Measure it again",
    }
    page = _template().render(
        evidence=evidence,
        contents=contents,
        tiles=_tiles(evidence, training, weights.stat().st_size if weights.is_file() else None),
        sheets=sheets,
        groups=groups,
        care_plots=_care_plots(evidence.in_group("care")),
        checks=[(one, _check_plot(one)) for one in evidence.checks],
        stages=stages,
        losses=losses,
        facts=_facts(evidence),
    )
    file = Path(folder) / REPORT_NAME
    write_text(file, page.lstrip())
    return file


@functools.cache
def _template() -> jinja2.Template:
    place = Path(__file__).parent
    pages = jinja2.Environment(
        autoescape=True,
        loader=jinja2.FileSystemLoader(place),
        finalize=_unbroken,
        lstrip_blocks=True,
        trim_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    pages.globals |= {
        "RATE": RATE,
        "across": lambda value: f"{6 + 156 * min(max(value, 0), 1):.4g}",
        "against_base": _against_base,
        "attack_name": _attack_name,
        "duration": _duration,
        "intervals_meet": intervals_meet,
        "json": lambda value: json.dumps(value, indent=2, ensure_ascii=False),
        "people": _people,
        "place": _place,
        "show_interval": show_interval,
        "show_value": show_value,
        "style": Markup((place / "report.css").read_text(encoding="utf-8")),
    }
    return pages.get_template("report.html.j2")


def _unbroken(value: Any) -> Any:
    """A number stays on a line with its percent."""
    text = isinstance(value, str) and not isinstance(value, Markup)
    return value.replace(" %", "\N{NO-BREAK SPACE}%") if text else value


def _tiles(evidence: Evidence, training: Mapping[str, Any], size: int | None) -> list[tuple[str, str, str]]:
    """What was erased, what was kept and what it cost, each by its worst figure."""
    tiles = []
    if gone := worst_first(evidence, "erased"):
        worst, name = gone[0], _short_names([one.name for one in gone])[0]
        told = f"of pictures show {evidence.concept}: {name}"
        told += f", the worst of {len(gone)}" if len(gone) > 1 else ""
        told += f"; base {worst.show(worst.base)}." if worst.base is not None else "."
        tiles.append(("Erased", worst.show(worst.patched), told))
    tiles += _kept_tile("Companions", worst_first(evidence, "care"))
    tiles += _kept_tile("Neighbours", worst_first(evidence, "kept"))
    if evidence.attacks:
        attack, count = max(evidence.attacks, key=lambda one: one.rate), len(evidence.attacks)
        told = (
            f"of tries bring it back under {_attack_name(attack)}"
            f"{f', the strongest of {count} attacks' if count > 1 else ''}: {attack.successes} of "
            f"{attack.trials}, and {attack.without} without the attack."
        )
        tiles.append(("Under attack", show_value(attack.rate, RATE), told))
    return [*tiles, *_cost_tile(training, size)] or [("Nothing", "–", "No figure was measured.")]


def _kept_tile(heading: str, lost: Sequence[Figure]) -> list[tuple[str, str, str]]:
    if not lost:
        return []
    worst, several = lost[0], len(lost) > 1
    if worst.patched >= (worst.base or 0):
        # All at the base's level or above: the one that gained least stands for them.
        told = (
            f"{worst.name}; base {worst.show(worst.base)}. No loss{f' among {len(lost)}' if several else ''}."
        )
    else:
        told = f"{worst.name}{f', the largest loss of {len(lost)}' if several else ''}"
        told += f"; base {worst.show(worst.base)}{', no clear change' if intervals_meet(worst) else ''}."
    return [(heading, worst.show(worst.patched), told)]


def _cost_tile(training: Mapping[str, Any], size: int | None) -> list[tuple[str, str, str]]:
    seconds, evaluations, memory = (
        _number(training.get(key)) for key in ("seconds", "denoiser_evaluations", "peak_memory_bytes")
    )
    weighs = "" if size is None else f"{size / 1e6:.2f} MB" if size >= 1e6 else f"{size / 1e3:.0f} kB"
    if seconds is None:
        return [("Cost", weighs, "is the size of the patch.")] if weighs else []
    facts = [
        *([] if evaluations is None else [f"{evaluations:,.0f} denoiser evaluations"]),
        *([f"{memory / 2**30:.1f} GiB of memory at most"] if memory else []),
        *([f"a patch of {weighs}"] if weighs else []),
    ]
    on = f" On {training['device']}." if training.get("device") else ""
    return [("Cost", _duration(seconds), f"to erase it{': ' if facts else ''}{', '.join(facts)}.{on}")]


def _number(value: Any) -> float | None:
    """A finite number, or ``None``: records are files that anyone may have edited."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _attack_name(attack: AttackFigure) -> str:
    return f"{attack.attack} ({attack.preset})" if attack.preset else attack.attack


def _duration(seconds: float) -> str:
    if seconds < 7200:
        return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"


def _against_base(figure: Figure) -> str:
    if figure.base is None:
        return ""
    difference = figure.patched - figure.base
    if figure.unit == RATE:
        shown = f"{100 * difference:+.1f} points"
    elif figure.base > 0:
        shown = f"{100 * difference / figure.base:+.1f} %"
    else:
        shown = f"{difference:+.4g}"
    return "the same" if shown[1:] in ("0.0 points", "0.0 %", "0") else shown.replace("-", "−")


def _short_names(names: Sequence[str]) -> list[str]:
    """Names without the words that all of them begin with ("CARE score, stars" → "stars")."""
    for mark in (", ", ": "):
        heads = {name.partition(mark)[0] for name in names}
        if len(heads) == 1 and all(name.partition(mark)[2] for name in names):
            return [name.partition(mark)[2] for name in names]
    return list(names)


def _care_plots(figures: Sequence[Figure]) -> list[tuple[str, Markup]]:
    """Companions beside the base, a plot for each metric: a radar from three on, else bars."""
    plots = []
    for metric in dict.fromkeys(one.metric for one in figures if one.unit == RATE):
        shown = [one for one in figures if one.metric == metric and one.unit == RATE]
        names = _short_names([one.name for one in shown])
        # The patched model comes first, so that it has the first colour wherever it is drawn.
        series = [Series("patched", [one.patched for one in shown], [one.interval for one in shown])]
        bases = [one.base for one in shown]
        if any(value is not None for value in bases):
            series.append(Series("base", bases, [one.base_interval for one in shown], reference=True))
        about = "; ".join(
            f"{name}: {one.show(one.patched)}, base {one.show(one.base)}"
            for name, one in zip(names, shown, strict=True)
        )
        if len(shown) >= 3 and None not in series[-1].values:
            plot = radar_chart(metric, names, series, about=about)
        else:
            plot = bar_chart(metric, names, series, unit=RATE, about=about)
        plots.append((metric, Markup(plot)))
    return plots


def _check_plot(check: Check) -> Markup:
    """A check's curve, or bars where its settings are words; nothing where nothing was measured."""
    points = check.points
    series = [
        Series(
            name,
            [point.values.get(name) for point in points],
            [point.intervals.get(name) for point in points],
            reference=name == "base",
        )
        for name in check.series
        if any(point.values.get(name) is not None for point in points)
    ]
    if not series:
        return Markup("")
    places = [point.x for point in points if isinstance(point.x, float)]
    shared: dict[str, str] = {"unit": check.unit, "about": "The numbers are in the table below."}
    if len(points) == len(places) > 1:
        drawn = line_chart(
            check.title, places, series, x_label=check.x_label, y_label=check.y_label, **shared
        )
    else:
        label, names = check.y_label or check.x_label, [_place(point.x) for point in points]
        drawn = bar_chart(check.title, names, series, x_label=label, **shared)
    return Markup(drawn)


def _place(x: float | str) -> str:
    return x if isinstance(x, str) else f"{x:g}".replace("-", "−")


def _sheet(caption: str, found: Pictures) -> dict[str, Any]:
    """A sheet whose labels are in the picture, or prompts over their pictures before and after."""
    if isinstance(found, Image.Image | Path):
        return {"caption": caption, "sheet": _image(caption, found, _LARGEST)}
    compared = [
        (
            one.label,
            [
                (when, [_image(caption, picture, _LARGEST_OF_MANY) for picture in pictures])
                for when, pictures in (("before", one.before), ("after", one.after))
            ],
        )
        for one in found
    ]
    return {"caption": caption, "sheet": None, "compared": compared}


def _image(caption: str, picture: Image.Image | Path, largest: int) -> _Image:
    """A picture as text that a page can hold."""
    try:
        image = picture if isinstance(picture, Image.Image) else Image.open(picture)
        image = image.convert("RGB")
    except (OSError, ValueError) as fault:
        raise OutputError(
            f"the sheet '{caption}' cannot be put into the report: {str(fault).splitlines()[0]}"
        ) from fault
    if max(image.size) > largest:
        image.thumbnail((largest, largest), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=90, method=4)
    code = base64.b64encode(buffer.getvalue()).decode("ascii")
    return _Image(f"data:image/webp;base64,{code}", image.width, image.height)


def _stage_plots(stages: Any) -> list[tuple[str, Markup]]:
    known = (
        {str(name): one for name, one in stages.items() if isinstance(one, Mapping)}
        if isinstance(stages, Mapping)
        else {}
    )
    plots = []
    for key, label in (("seconds", "seconds"), ("evaluations", "denoiser evaluations")):
        values = [_number(one.get(key)) for one in known.values()]
        if any(value is not None for value in values):
            about = "; ".join(
                f"{name}: {value:,.0f}"
                for name, value in zip(known, values, strict=True)
                if value is not None
            )
            plot = bar_chart(f"Erasing, {label}", list(known), [Series(label, values)], about=about)
            plots.append((f"Erasing, {label} by stage", Markup(plot)))
    return plots


def _loss_plots(losses: Any) -> list[tuple[str, Markup]]:
    plots = []
    for stage, values in losses.items() if isinstance(losses, Mapping) else ():
        found = map(_number, values) if isinstance(values, list | tuple) else ()
        numbers = [number for number in found if number is not None]
        if len(numbers) > 1:
            places, series = thinned(numbers)
            about = f"{len(numbers)} steps, from {numbers[0]:.4g} to {numbers[-1]:.4g}"
            title = f"Loss of {stage}"
            plot = line_chart(
                title, places, [series], x_label="step", y_label="loss", about=about, marks=False
            )
            plots.append((str(stage), Markup(plot)))
    return plots


def _people(value: Any) -> str:
    """A fact of any type as people read it."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.2f}".rstrip("0").rstrip(".")
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_people(one)}" for key, one in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_people, value))
    return str(value)


def _facts(evidence: Evidence) -> dict[str, Any]:
    """How it was measured."""
    suite = evidence.suite
    asked = ("steps", "guidance_scale", "first_seed", "detector")
    return {
        "concept": f"{evidence.concept} ({evidence.kind})",
        "method": evidence.method,
        "base": evidence.base,
        "base denoiser, SHA-256": evidence.base_denoiser_sha256,
        "patch, SHA-256": evidence.patch_sha256,
        "measured": evidence.created,
        **{key.replace("_", " "): suite[key] for key in asked if key in suite},
        **{key: value for key, value in evidence.options.items() if not isinstance(value, dict | list)},
        "versions": ", ".join(f"{name} {version}" for name, version in evidence.versions.items()),
    }
