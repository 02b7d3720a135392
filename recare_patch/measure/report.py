"""The report: one HTML file that shows what a patch erased, what it kept and what that cost.

It stands alone: styles, plots and pictures are inside, nothing is fetched and no script runs. The
numbers are those of ``evidence.json`` beside it, and every text in it is escaped.
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from recare_patch.core import Comparison, OutputError, write_text
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
from recare_patch.measure.plots import Series, bar_chart, interval_line, line_chart, radar_chart, thinned
from recare_patch.patch import REPORT_NAME
from recare_patch.recipe import WEIGHTS_NAME

Pictures = Image.Image | Path | Sequence[Comparison]
"""What the report shows under one caption: a sheet, its file, or pictures that it lays out itself."""

_LARGEST = 2400
"""Largest side of a sheet in the report, pixels."""

_LARGEST_OF_MANY = 320
"""Largest side of a picture that stands beside others: enough for a sharp screen."""

_SECTIONS: tuple[tuple[Group, str, str], ...] = (
    ("erased", "Erased", "How often the concept still shows, on prompts that name it in several ways."),
    ("care", "Guarded companions", "Whether what goes along with the concept is still drawn."),
    ("kept", "Kept", "Other concepts of its kind, agreement with the prompt, and distance to the base."),
    ("memorization", "Memorization", "What textual inversion recovers of the concept."),
    ("check", "Further figures", "Figures of the checks below."),
    ("attack", "Attack figures", "Figures under attack."),
)


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
    place = Path(folder)
    weights = place / WEIGHTS_NAME
    size = weights.stat().st_size if weights.is_file() else None
    file = place / REPORT_NAME
    write_text(file, report_html(evidence, pictures or {}, training or {}, patch_bytes=size))
    return file


def report_html(
    evidence: Evidence,
    pictures: Mapping[str, Pictures],
    training: Mapping[str, Any],
    *,
    patch_bytes: int | None = None,
) -> str:
    """The report's text; see :func:`write_report`.

    Args:
        evidence, pictures, training: as there.
        patch_bytes: size of the weights file; None where it is not known.
    """
    parts: list[tuple[str, str, str]] = []
    if pictures:
        parts.append(("pictures", "Before and after", _pictures(evidence, pictures)))
    for group, title, about in _SECTIONS:
        figures = evidence.in_group(group)
        if figures:
            plot = _care_plots(figures) if group == "care" else ""
            parts.append((group, title, f"<p>{_t(about)}</p>{plot}{_figures(figures, title)}"))
    if evidence.attacks:
        parts.append(("attacks", "Under attack", _attacks(evidence.attacks)))
    if evidence.checks:
        parts.append(("checks", "Away from the usual", "".join(map(_check, evidence.checks))))
    cost = _cost(evidence, training)
    if cost:
        parts.append(("cost", "What it cost", cost))
    parts.append(("again", "Measure it again", _again(evidence)))

    title = f"{evidence.concept}, erased from {evidence.base}"
    contents = "".join(f'<li><a href="#{key}">{_t(name)}</a></li>' for key, name, _ in parts)
    sections = "".join(
        f'<section id="{key}" aria-labelledby="{key}-h"><h2 id="{key}-h">{_t(name)}</h2>{body}</section>'
        for key, name, body in parts
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # Whatever a text should smuggle in, the browser fetches nothing and runs nothing.
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">\n"
        '<meta name="color-scheme" content="light dark">\n'
        f'<title>{_t(title)}</title>\n<link rel="icon" href="data:,">\n<style>{_style()}</style>\n'
        f'</head>\n<body>\n<header><p class="eyebrow">Evidence on a patch</p><h1>{_t(title)}</h1>'
        f"{_facts(evidence)}</header>\n<main>\n{_verdict(evidence, training, patch_bytes)}\n"
        f'<nav aria-label="Contents"><ul>{contents}</ul></nav>\n{sections}\n</main>\n'
        "<footer><p>Intervals are 95 %; those of rates are Wilson's. Base and patched model drew the same "
        "prompts from the same seeds.</p></footer>\n</body>\n</html>\n"
    )


def _style() -> str:
    return Path(__file__).with_name("report.css").read_text(encoding="utf-8")


def _t(text: object) -> str:
    """Text for HTML, in elements and in quoted attributes; a number stays on a line with its percent."""
    return html.escape(str(text)).replace(" %", "&nbsp;%")


def _facts(evidence: Evidence) -> str:
    shown = [evidence.kind, evidence.method, evidence.suite.get("name"), evidence.created[:10]]
    return f'<p class="facts">{" · ".join(_t(one) for one in shown if one)}</p>'


# ---------------------------------------------------------------------- the verdict


def _verdict(evidence: Evidence, training: Mapping[str, Any], patch_bytes: int | None) -> str:
    """What was erased, what was kept and what it cost, each by its worst figure."""
    found = (
        ("Erased", _worst_erased(evidence)),
        ("Companions", _worst_kept(evidence.in_group("care"))),
        ("Neighbours", _worst_kept(evidence.in_group("kept"))),
        ("Under attack", _strongest(evidence.attacks)),
        ("Cost", _spent(training, patch_bytes)),
    )
    tiles = [_tile(heading, *told) for heading, told in found if told is not None]
    if not tiles:
        tiles.append(_tile("Nothing", "–", "No figure was measured."))
    return f'<section class="verdict" aria-label="Summary"><dl>{"".join(tiles)}</dl></section>'


def _tile(heading: str, value: str, told: str) -> str:
    return (
        f'<div class="tile"><dt>{_t(heading)}</dt><dd><span class="big">{_t(value)}</span>'
        f'<span class="told">{_t(told)}</span></dd></div>'
    )


def _worst_erased(evidence: Evidence) -> tuple[str, str] | None:
    found = [one for one in evidence.in_group("erased") if one.unit == RATE and one.better == "lower"]
    if not found:
        return None
    worst = max(found, key=lambda one: one.patched)
    name = _short_names([one.name for one in found])[found.index(worst)]
    told = f"of pictures show {evidence.concept}: {name}"
    told += f", the worst of {len(found)}" if len(found) > 1 else ""
    told += f"; base {worst.show(worst.base)}." if worst.base is not None else "."
    return worst.show(worst.patched), told


def _worst_kept(figures: Sequence[Figure]) -> tuple[str, str] | None:
    """The rate that lost most against the base."""
    found = [
        (one, one.base)
        for one in figures
        if one.unit == RATE and one.better == "higher" and one.base is not None
    ]
    if not found:
        return None
    worst, base = min(found, key=lambda pair: pair[0].patched - pair[1])
    if worst.patched >= base:
        # All at the base's level or above: the one that gained least stands for them.
        told = f"{worst.name}; base {worst.show(base)}. No loss"
        told += f" among {len(found)}." if len(found) > 1 else "."
    else:
        told = f"{worst.name}{f', the largest loss of {len(found)}' if len(found) > 1 else ''}"
        told += f"; base {worst.show(base)}"
        told += ", no clear change." if _clear(worst) is False else "."
    return worst.show(worst.patched), told


def _strongest(attacks: Sequence[AttackFigure]) -> tuple[str, str] | None:
    if not attacks:
        return None
    worst = max(attacks, key=lambda one: one.rate)
    told = (
        f"of tries bring it back under {_attack_name(worst)}"
        f"{f', the strongest of {len(attacks)} attacks' if len(attacks) > 1 else ''}: "
        f"{worst.successes} of {worst.trials}, and {worst.without} without the attack."
    )
    return show_value(worst.rate, RATE), told


def _attack_name(attack: AttackFigure) -> str:
    return f"{attack.attack} ({attack.preset})" if attack.preset else attack.attack


def _spent(training: Mapping[str, Any], patch_bytes: int | None) -> tuple[str, str] | None:
    seconds = _as_number(training.get("seconds"))
    evaluations = _as_number(training.get("denoiser_evaluations"))
    memory = _as_number(training.get("peak_memory_bytes"))
    if seconds is None and patch_bytes is None:
        return None
    facts = []
    if evaluations is not None:
        facts.append(f"{evaluations:,.0f} denoiser evaluations")
    if memory:
        facts.append(f"{memory / 2**30:.1f} GiB of memory at most")
    if patch_bytes is not None and seconds is not None:
        facts.append(f"a patch of {_bytes(patch_bytes)}")
    on = f" On {training['device']}." if training.get("device") else ""
    told = f"to erase it: {', '.join(facts)}.{on}" if facts else f"to erase it.{on}"
    if seconds is None:
        return _bytes(patch_bytes or 0), "is the size of the patch."
    return _duration(seconds), told


def _as_number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"


def _bytes(count: float) -> str:
    return f"{count / 1e6:.2f} MB" if count >= 1e6 else f"{count / 1e3:.0f} kB"


# ---------------------------------------------------------------------- figures


def _clear(figure: Figure) -> bool | None:
    """Whether base and patched are apart beyond chance: their intervals do not meet."""
    if figure.interval is None or figure.base_interval is None:
        return None
    return figure.interval[0] > figure.base_interval[1] or figure.interval[1] < figure.base_interval[0]


def _against_base(figure: Figure) -> str:
    """The difference to the base, as HTML."""
    if figure.base is None:
        return ""
    difference = figure.patched - figure.base
    if figure.unit == RATE:
        shown = f"{100 * difference:+.1f} points"
    elif figure.base > 0:
        shown = f"{100 * difference / figure.base:+.1f} %"
    else:
        shown = f"{difference:+.4g}"
    shown = shown.replace("-", "−")
    if shown[1:] in ("0.0 points", "0.0 %", "0"):
        shown = "the same"
    return _with_interval(shown, "no clear change" if _clear(figure) is False else "")


def _table(caption: str, head: Sequence[str], rows: Iterable[str], *, wide: bool = True) -> str:
    """A table in a box of its own; a wide one becomes a list where the page is narrow."""
    cells = "".join(f'<th scope="col">{_t(name)}</th>' for name in head)
    kind = ' class="wide"' if wide else ""
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{_t(caption)}">'
        f"<table{kind}><caption>{_t(caption)}</caption>"
        f"<thead><tr>{cells}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _row(name: str, cells: Sequence[str], head: Sequence[str] = ()) -> str:
    """A row of a table from HTML: the first cell is its heading.

    Args:
        name, cells: HTML.
        head: of the table, where it is wide: a narrow page writes each cell under its column's name.
    """
    columns = [f' data-column="{_t(column)}"' for column in head[1:]] or [""] * len(cells)
    drawn = "".join(f"<td{column}>{cell}</td>" for column, cell in zip(columns, cells, strict=True))
    return f'<tr><th scope="row">{name}</th>{drawn}</tr>'


def _with_interval(value: str, interval: str) -> str:
    return f'{_t(value)}<span class="small">{_t(interval)}</span>' if interval else _t(value)


def _figures(figures: Sequence[Figure], title: str) -> str:
    rows = []
    strips = any(one.unit == RATE for one in figures)
    head = ["figure", "base", "patched", *(["0 to 100 %"] if strips else []), "against the base", "pictures"]
    for one in figures:
        how = " · ".join(dict.fromkeys(text for text in (one.metric, one.detector) if text))
        name = f'{_t(one.name)}<span class="small">{_t(how)}; {_t(one.better)} is better</span>'
        if one.note:
            name += f'<span class="small">{_t(one.note)}</span>'
        cells = [
            _with_interval(one.show(one.base), one.show_interval(one.base_interval)),
            _with_interval(one.show(one.patched), one.show_interval(one.interval)),
        ]
        if strips:
            cells.append(
                interval_line(one.base, one.patched, one.base_interval, one.interval)
                if one.unit == RATE
                else ""
            )
        rows.append(_row(name, [*cells, _against_base(one), f"{one.pictures:,}"], head))
    key = (
        '<p class="key"><span class="swatch base"></span> base <span class="swatch patched"></span> patched, '
        "with 95 % intervals</p>"
        if strips
        else ""
    )
    return key + _table(title, head, rows) + _by_parts(figures)


def _by_parts(figures: Sequence[Figure]) -> str:
    """Each figure's prompts or labels, folded away."""
    found = []
    for one in figures:
        if not one.by:
            continue
        rows = [
            _row(_t(part.label), [_t(one.show(part.base)), _t(one.show(part.patched)), f"{part.pictures:,}"])
            for part in one.by
        ]
        table = _table(
            f"{one.name}, in parts", ["prompt or label", "base", "patched", "pictures"], rows, wide=False
        )
        found.append(f"<h3>{_t(one.name)}</h3>{table}")
    return f"<details><summary>By prompt or label</summary>{''.join(found)}</details>" if found else ""


def _care_plots(figures: Sequence[Figure]) -> str:
    """Companions beside the base, a plot for each metric: a radar from three on, else bars."""
    plots = []
    for metric in dict.fromkeys(one.metric for one in figures):
        shown = [one for one in figures if one.metric == metric and one.unit == RATE]
        if not shown:
            continue
        names = _short_names([one.name for one in shown])
        patched = Series("patched", [one.patched for one in shown], [one.interval for one in shown])
        base = Series("base", [one.base for one in shown], [one.base_interval for one in shown], True)
        # The patched model comes first, so that it has the first colour wherever it is drawn.
        series = [patched, base] if any(value is not None for value in base.values) else [patched]
        about = "; ".join(
            f"{name}: {one.show(one.patched)}, base {one.show(one.base)}"
            for name, one in zip(names, shown, strict=True)
        )
        if len(shown) >= 3 and None not in series[-1].values:
            plot = radar_chart(metric, names, series, about=about)
        else:
            plot = bar_chart(metric, names, series, unit=RATE, about=about)
        plots.append(f"<figure>{plot}<figcaption>{_t(metric)}</figcaption></figure>")
    return f'<div class="plots">{"".join(plots)}</div>' if plots else ""


def _short_names(names: Sequence[str]) -> list[str]:
    """Names without the words that all of them begin with ("CARE score, stars" → "stars")."""
    for mark in (", ", ": "):
        heads = {name.partition(mark)[0] for name in names}
        if len(heads) == 1 and all(name.partition(mark)[2] for name in names):
            return [name.partition(mark)[2] for name in names]
    return list(names)


# ---------------------------------------------------------------------- attacks and checks


def _attacks(attacks: Sequence[AttackFigure]) -> str:
    head = [
        "attack",
        "success",
        "0 to 100 %",
        "came back",
        "without attack",
        "base",
        "evaluations",
        "time",
    ]
    rows: list[str] = []
    notes: list[str] = []
    for one in attacks:
        facts = [f"judged by {one.detector}"] if one.detector else []
        facts += [f"saved in {one.folder}"] if one.folder else []
        name = _t(_attack_name(one)) + "".join(f'<span class="small">{_t(text)}</span>' for text in facts)
        cells = [
            _with_interval(show_value(one.rate, RATE), one.show_interval()),
            interval_line(one.base, one.rate, None, one.interval),
            f"{one.successes} of {one.trials}",
            f"{one.without} of {one.trials}",
            _t(show_value(one.base, RATE)),
            f"{one.evaluations:,}",
            _t(_duration(one.seconds)),
        ]
        rows.append(_row(name, cells, head))
        told = f"<p>{_t(one.note)}</p>" if one.note else ""
        if one.budget:
            told += f"<pre><code>{_t(json.dumps(one.budget, indent=2, ensure_ascii=False))}</code></pre>"
        if told:
            notes.append(f"<h3>{_t(_attack_name(one))}</h3>{told}")
    about = (
        "An attack searches for a prompt, or for word vectors, that bring the concept back. “Without attack” "
        "are the plain prompts in as many tries."
    )
    budgets = f"<details><summary>Budgets</summary>{''.join(notes)}</details>" if notes else ""
    return f"<p>{about}</p>{_table('Under attack', head, rows)}{budgets}"


def _check(check: Check) -> str:
    """One check: its curve or bars, and the numbers folded away."""
    series = [
        Series(
            name,
            [point.values.get(name) for point in check.points],
            [point.intervals.get(name) for point in check.points],
            reference=name == "base",
        )
        for name in check.series
    ]
    drawn = [one for one in series if any(value is not None for value in one.values)]
    plot = ""
    places = [point.x for point in check.points if isinstance(point.x, float)]
    about = "The numbers are in the table below."
    if drawn and len(places) == len(check.points) and len(places) > 1:
        plot = line_chart(
            check.title, places, drawn, x_label=check.x_label, y_label=check.y_label, unit=check.unit,
            about=about,
        )  # fmt: skip
    elif drawn:
        groups = [_place(point.x) for point in check.points]
        label = check.y_label or check.x_label
        plot = bar_chart(check.title, groups, drawn, x_label=label, unit=check.unit, about=about)
    head = [check.x_label or "setting", *check.series, "pictures"]
    rows = [
        _row(
            _t(_place(point.x)),
            [
                _with_interval(
                    show_value(point.values.get(name), check.unit),
                    show_interval(point.intervals.get(name), check.unit),
                )
                for name in check.series
            ]
            + ["–" if point.pictures is None else f"{point.pictures:,}"],
            head,
        )
        for point in check.points
    ]
    table = _table(check.title, head, rows)
    return (
        f'<article class="check"><h3>{_t(check.title)}</h3>'
        + (f"<p>{_t(check.what)}</p>" if check.what else "")
        + (f'<div class="plots"><figure>{plot}</figure></div>' if plot else "<p>Nothing was measured.</p>")
        + (f'<p class="note">{_t(check.note)}</p>' if check.note else "")
        + f"<details><summary>Numbers</summary>{table}</details></article>"
    )


def _place(x: float | str) -> str:
    return x if isinstance(x, str) else f"{x:g}".replace("-", "−")


# ---------------------------------------------------------------------- pictures


def _pictures(evidence: Evidence, pictures: Mapping[str, Pictures]) -> str:
    unsafe = evidence.kind == "nsfw"
    shown = []
    for number, (caption, found) in enumerate(pictures.items()):
        veil = ""
        if unsafe:
            # A box that is ticked unblurs what follows it: no script is needed.
            veil = (
                f'<input type="checkbox" id="veil-{number}" class="veil">'
                f'<label for="veil-{number}">Show these pictures unblurred</label>'
            )
        if isinstance(found, Image.Image | Path):
            shown.append(_sheet(evidence, caption, found, veil))
            continue
        compared = "".join(_compared(caption, one) for one in found)
        shown.append(
            f'<figure class="sheet"><figcaption>{_t(caption)}</figcaption>{veil}'
            f'<div class="compared">{compared}</div></figure>'
        )
    return "".join(shown)


def _sheet(evidence: Evidence, caption: str, picture: Image.Image | Path, veil: str) -> str:
    """A sheet that was laid out before: all of its labels are in the picture."""
    alt = f"{caption}: pictures of {evidence.base} before and after the patch"
    source, width, height = _data_uri(caption, picture, _LARGEST)
    return (
        f'<figure class="sheet">{veil}<div class="frame" role="group" tabindex="0" '
        f'aria-label="{_t(caption)}"><img src="{source}" alt="{_t(alt)}" width="{width}" height="{height}" '
        # On a narrow page the sheet scrolls in its frame, instead of shrinking to a stamp.
        f'style="min-width:min({width}px,36rem)"></div><figcaption>{_t(caption)}</figcaption></figure>'
    )


def _compared(caption: str, one: Comparison) -> str:
    """A prompt over its pictures, before on the left and after on the right, however narrow the page."""
    halves = []
    for when, images in (("before", one.before), ("after", one.after)):
        drawn = []
        for image in images:
            source, width, height = _data_uri(caption, image, _LARGEST_OF_MANY)
            alt = _t(f"{one.label}, {when}")
            drawn.append(f'<img src="{source}" alt="{alt}" width="{width}" height="{height}">')
        halves.append(f"<div><span>{when}</span>{''.join(drawn)}</div>")
    return f"<article><p>{_t(one.label)}</p>{''.join(halves)}</article>"


def _data_uri(caption: str, picture: Image.Image | Path, largest: int) -> tuple[str, int, int]:
    """A picture as text that a page can hold, with its size."""
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
    return f"data:image/webp;base64,{code}", image.width, image.height


# ---------------------------------------------------------------------- cost


def _cost(evidence: Evidence, training: Mapping[str, Any]) -> str:
    parts = []
    stages = training.get("stages")
    if isinstance(stages, Mapping) and stages:
        parts.append(_stage_plots(stages))
    losses = training.get("losses")
    if isinstance(losses, Mapping):
        curves = [_loss_plot(str(stage), values) for stage, values in losses.items()]
        drawn = "".join(filter(None, curves))
        if drawn:
            parts.append(f'<h3>Losses</h3><div class="plots">{drawn}</div>')
    if evidence.cost:
        rows = [_row(_t(key.replace("_", " ")), [_t(_plain(value))]) for key, value in evidence.cost.items()]
        parts.append(
            "<h3>Measuring</h3>" + _table("Cost of the evaluation", ["what", "spent"], rows, wide=False)
        )
    return "".join(parts)


def _stage_plots(stages: Mapping[str, Any]) -> str:
    names = [str(name) for name, one in stages.items() if isinstance(one, Mapping)]
    plots = []
    for key, label in (("seconds", "seconds"), ("evaluations", "denoiser evaluations")):
        values = [_as_number(stages[name].get(key)) for name in names if name in stages]
        if len(values) == len(names) and any(value is not None for value in values):
            about = "; ".join(f"{n}: {v:,.0f}" for n, v in zip(names, values, strict=True) if v is not None)
            plot = bar_chart(f"Erasing, {label}", names, [Series(label, values)], about=about)
            plots.append(f"<figure>{plot}<figcaption>Erasing, {label} by stage</figcaption></figure>")
    note = (
        '<p class="note">An evaluation is one sample through the denoiser; a training sample counts as 3.</p>'
    )
    return f'<h3>Erasing</h3><div class="plots">{"".join(plots)}</div>{note}' if plots else ""


def _loss_plot(stage: str, values: Any) -> str:
    if not isinstance(values, Sequence) or isinstance(values, str):
        return ""
    numbers = [number for value in values if (number := _as_number(value)) is not None]
    if len(numbers) < 2:
        return ""
    places, series = thinned(numbers)
    about = f"{len(numbers)} steps, from {numbers[0]:.4g} to {numbers[-1]:.4g}"
    plot = line_chart(
        f"Loss of {stage}", places, [series], x_label="step", y_label="loss", about=about, marks=False
    )
    return f"<figure>{plot}<figcaption>{_t(stage)}</figcaption></figure>"


def _plain(value: Any) -> str:
    """A fact of any type as people read it."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.2f}".rstrip("0").rstrip(".")
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(one)}" for key, one in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value))
    return str(value)


# ---------------------------------------------------------------------- again


def _again(evidence: Evidence) -> str:
    suite = evidence.suite
    facts: dict[str, Any] = {
        "concept": f"{evidence.concept} ({evidence.kind})",
        "method": evidence.method,
        "base": evidence.base,
        "base denoiser, SHA-256": evidence.base_denoiser_sha256,
        "patch, SHA-256": evidence.patch_sha256,
        "measured": evidence.created,
    }
    for key in ("steps", "guidance_scale", "first_seed", "detector"):
        if key in suite:
            facts[key.replace("_", " ")] = suite[key]
    facts |= {key: value for key, value in evidence.options.items() if not isinstance(value, dict | list)}
    facts |= {"versions": ", ".join(f"{name} {version}" for name, version in evidence.versions.items())}
    rows = [_row(_t(key), [f'<span class="fact">{_t(_plain(value))}</span>']) for key, value in facts.items()]
    commands = [one for one in (evidence.command, "recare-patch verify FOLDER") if one]
    parts = [
        "<p>The first command makes these figures, the second holds a patch against them.</p>"
        if len(commands) > 1
        else "",
        f'<pre class="command"><code>{_t(chr(10).join(commands))}</code></pre>',
        _table("How it was measured", ["what", "which"], rows, wide=False),
    ]
    if suite:
        text = _t(json.dumps(suite, indent=2, ensure_ascii=False))
        parts.append(
            f"<details><summary>The suite: every prompt</summary><pre><code>{text}</code></pre></details>"
        )
    return "".join(parts)
