"""The report: one HTML file that shows what a patch erased, what it kept and what that cost.

It stands alone: styles, plots and pictures are inside, nothing is fetched and no script runs. The
numbers are those of ``evidence.json`` beside it, and every text in it is escaped.
"""

from __future__ import annotations

import base64
import functools
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from PIL import Image

from recare_patch.core import Comparison, OutputError, read_picture, write_text
from recare_patch.measure.claims import rebuilt_command, tidy
from recare_patch.measure.evidence import (
    RATE,
    AttackFigure,
    Audited,
    Check,
    Evidence,
    Figure,
    Group,
    intervals_meet,
    show_interval,
    show_value,
    worst_first,
)
from recare_patch.measure.plots import Series, bar_chart, line_chart, radar_chart, thinned
from recare_patch.patch import REPORT_NAME, finite, spent
from recare_patch.recipe import WEIGHTS_NAME

Pictures = Image.Image | Path | Sequence[Comparison]
"""What the report shows under one caption: a sheet, its file, or pictures that it lays out itself."""

_LARGEST = 2400
"""Largest side of a sheet in the report, pixels."""

_LARGEST_OF_MANY = 320
"""Largest side of a picture that stands beside others: enough for a sharp screen."""

_WHATS = {
    "patch": "a patch",
    "lora": "a LoRA",
    "weights": "weights",
    "pipeline": "a pipeline",
    "defence": "a defence at sampling time",
}

_GROUPS: dict[Group, tuple[str, str]] = {
    "erased": ("Erased", "How often the concept still shows, on prompts that name it in several ways."),
    "care": ("Guarded companions", "Whether what goes along with the concept is still drawn."),
    "kept": ("Kept", "Other concepts of its kind, agreement with the prompt, and distance to the base."),
    "memorization": ("Memorization", "What textual inversion recovers of the concept."),
    "check": ("Further figures", "Figures of the checks below."),
    "attack": ("Attack figures", "Figures under attack."),
}


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
    stages, losses = _stage_plots(training.get("stages")), _loss_plots(training.get("losses"))
    contents: dict[str, tuple[str, Any]] = {
        "pictures": ("Before and after", pictures),
        **{group: (title, evidence.in_group(group)) for group, (title, _) in _GROUPS.items()},
        "attacks": ("Under attack", evidence.attacks),
        "checks": ("Away from the usual", evidence.checks),
        "cost": ("What it cost", stages or losses or evidence.cost),
        "again": ("Measure it again", True),
    }
    page = _template().render(
        evidence=evidence,
        contents={key: title for key, (title, found) in contents.items() if found},
        abouts={group: about for group, (_, about) in _GROUPS.items()},
        gone=worst_first(evidence, "erased"),
        seconds=finite(training.get("seconds")),
        spent=spent(training),
        device=training.get("device"),
        size=_bytes(weights.stat().st_size) if weights.is_file() else "",
        pictures=pictures or {},
        kept={"Companions": worst_first(evidence, "care"), "Neighbours": worst_first(evidence, "kept")},
        care_plots=_care_plots(evidence.in_group("care")),
        checks=[(one, _check_plot(one)) for one in evidence.checks],
        stages=stages,
        losses=losses,
        facts=_facts(evidence),
        command=rebuilt_command(evidence.command),
    )
    file = Path(folder) / REPORT_NAME
    write_text(file, page.lstrip())
    return file


def environment() -> jinja2.Environment:
    """The templates of this folder; every text that is put into them is escaped."""
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
        "LARGEST": _LARGEST,
        "LARGEST_OF_MANY": _LARGEST_OF_MANY,
        "RATE": RATE,
        "WHATS": _WHATS,
        "across": lambda value: f"{6 + 156 * min(max(value, 0), 1):.4g}",
        "against_base": _against_base,
        "attack_name": _attack_name,
        "duration": _duration,
        "image": _image,
        "intervals_meet": intervals_meet,
        "json": lambda value: json.dumps(value, indent=2, ensure_ascii=False),
        "people": _people,
        "place": _place,
        "short_names": _short_names,
        "show_interval": show_interval,
        "show_value": show_value,
        "style": Markup((place / "report.css").read_text(encoding="utf-8")),
    }
    return pages


@functools.cache
def _template() -> jinja2.Template:
    return environment().get_template("report.html.j2")


def _unbroken(value: Any) -> Any:
    """A number stays on a line with its percent."""
    text = isinstance(value, str) and not isinstance(value, Markup)
    return tidy(value).replace(" %", "\N{NO-BREAK SPACE}%") if text else value


def _attack_name(attack: AttackFigure) -> str:
    return f"{attack.attack} ({attack.preset})" if attack.preset else attack.attack


def _bytes(count: int) -> str:
    return f"{count / 1e6:.2f} MB" if count >= 1e6 else f"{count / 1e3:.0f} kB"


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
    x, y, about = check.x_label, check.y_label, "The numbers are in the table below."
    if len(points) == len(places) > 1:
        drawn = line_chart(check.title, places, series, x_label=x, y_label=y, unit=check.unit, about=about)
    else:
        names = [_place(point.x) for point in points]
        drawn = bar_chart(check.title, names, series, x_label=y or x, unit=check.unit, about=about)
    return Markup(drawn)


def _place(x: float | str) -> str:
    return x if isinstance(x, str) else f"{x:g}".replace("-", "−")


def _image(caption: str, picture: Image.Image | Path, largest: int) -> dict[str, Any]:
    """A picture as text that a page can hold, with its size."""
    try:
        image = picture.convert("RGB") if isinstance(picture, Image.Image) else read_picture(picture, picture.name)
    except OutputError as fault:
        raise OutputError(f"the sheet '{caption}' cannot be put into the report: {fault}") from fault
    if max(image.size) > largest:
        image.thumbnail((largest, largest), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=90, method=4)
    code = base64.b64encode(buffer.getvalue()).decode("ascii")
    return {"source": f"data:image/webp;base64,{code}", "width": image.width, "height": image.height}


def _stage_plots(stages: Any) -> list[tuple[str, Markup]]:
    found = stages.items() if isinstance(stages, Mapping) else ()
    known = {str(name): one for name, one in found if isinstance(one, Mapping)}
    plots = []
    for key, label in (("seconds", "seconds"), ("evaluations", "denoiser evaluations")):
        values = [finite(one.get(key)) for one in known.values()]
        if any(value is not None for value in values):
            about = "; ".join(
                f"{name}: {value:,.0f}" for name, value in zip(known, values, strict=True) if value is not None
            )
            plot = bar_chart(f"Erasing, {label}", list(known), [Series(label, values)], about=about)
            plots.append((f"Erasing, {label} by stage", Markup(plot)))
    return plots


def _loss_plots(losses: Any) -> list[tuple[str, Markup]]:
    plots = []
    for stage, values in losses.items() if isinstance(losses, Mapping) else ():
        found = map(finite, values) if isinstance(values, list | tuple) else ()
        numbers = [number for number in found if number is not None]
        if len(numbers) > 1:
            places, series = thinned(numbers)
            about = f"{len(numbers)} steps, from {numbers[0]:.4g} to {numbers[-1]:.4g}"
            labels = {"x_label": "step", "y_label": "loss", "about": about}
            plot = line_chart(f"Loss of {stage}", places, [series], marks=False, **labels)
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


def _audited(found: Audited) -> dict[str, Any]:
    changes = ", ".join(found.changes) or ("the text's or the picture's way" if found.what == "defence" else "nothing")
    files = {"its files": ", ".join(found.files)} if found.files else {}
    return {"what it is": found.what, "changes": changes, **files}


def _facts(evidence: Evidence) -> dict[str, Any]:
    """How it was measured."""
    suite = evidence.suite
    asked = ("steps", "guidance_scale", "first_seed", "detector")
    return {
        "concept": f"{evidence.concept} ({evidence.kind})",
        **({"method": evidence.method} if evidence.audited is None else _audited(evidence.audited)),
        "base": evidence.base,
        "base denoiser, SHA-256": evidence.base_denoiser_sha256,
        ("patch" if evidence.audited is None else evidence.audited.name) + ", SHA-256": evidence.patch_sha256,
        "measured": evidence.created,
        **{key.replace("_", " "): suite[key] for key in asked if key in suite},
        **{key: value for key, value in evidence.options.items() if not isinstance(value, dict | list)},
        "versions": ", ".join(f"{name} {version}" for name, version in evidence.versions.items()),
    }
