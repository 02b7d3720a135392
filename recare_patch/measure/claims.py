"""What evidence can be caught at without a picture: counts, intervals and dates that cannot be, and its command."""

from __future__ import annotations

import datetime
import re
import shlex
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from recare_patch.core import EvaluationError, printable
from recare_patch.measure.calibration import CORRECTED, Calibration
from recare_patch.measure.checks.scales import RETAINED
from recare_patch.measure.evidence import RATE, AttackFigure, Check, Evidence, Figure, Interval
from recare_patch.measure.judges import short_name
from recare_patch.measure.meters import wilson_interval
from recare_patch.measure.suites import Suite, list_suites
from recare_patch.models import ATELIER
from recare_patch.recipe import same_concept

if TYPE_CHECKING:
    from recare_patch.measure.run import Options

_ROUNDED = 1e-6
"""Evidence is rounded to six digits."""

SHOWN = 0.01
"""Where the 95 % interval of the base's own rate begins below, the base does not show what is counted."""

_COMMANDS = ("recare-patch evaluate", "recare-patch audit FOLDER")
_FLAGS = (
    *("--patch", "--base", "--suite", "--metric", "--check", "--pictures", "--detector", "--label", "--prompts"),
    *("--concept", "--kind", "--column", "--rows", "--without", "--calibrate"),
)


def rebuilt_command(command: str) -> str:
    """The command of evidence as this package writes it, from its parsed options; nothing where it is another.

    A reader may paste it into a shell: a stranger's text is never shown as it is.
    """
    try:
        words = shlex.split(command)
    except ValueError:
        return ""
    start = 3 if words[1:2] == ["audit"] else 2
    flags, values = words[start::2], words[start + 1 :: 2]
    known = " ".join(words[:start]) in _COMMANDS and len(flags) == len(values) and set(flags) <= set(_FLAGS)
    plain = all(value == printable(value) and not value.startswith("-") and len(value) <= 300 for value in values)
    return shlex.join(words) if known and plain else ""


def written_command(
    suite: Suite,
    asked: Options,
    base_id: str,
    detector: str | None = None,
    more: Sequence[str] = (),
    start: str = "evaluate --patch FOLDER",
) -> str:
    """The command line that measures the same; folders are left for the reader to name."""
    words = ["recare-patch", *start.split()]
    words += ["--base", base_id] if base_id != ATELIER else []
    words += ["--suite", suite.name] if suite.name in list_suites() else []
    for flag, names in (("--metric", asked.metrics or ()), ("--check", asked.checks)):
        words += [word for name in names for word in (flag, name)]
    words += ["--pictures", str(asked.pictures)]
    if detector is not None:
        name, colon, source = detector.partition(":")
        words += ["--detector", name + colon + (short_name(source) if source else "")]
    return shlex.join([*words, *more])


def shows(hits: int, pictures: int) -> bool:
    """Whether a rate of the untouched base is one: what it never shows, no patch can be said to erase or to keep."""
    return wilson_interval(hits, pictures)[0] >= SHOWN


def faults(evidence: Evidence) -> list[str]:
    """What evidence says that cannot be true, whatever the pictures were."""
    found = [fault for figure in evidence.figures for fault in (*_of_figure(figure), *_of_corrected(figure, evidence))]
    found += [fault for attack in evidence.attacks for fault in _of_attack(attack)]
    found += [fault for check in evidence.checks for fault in _of_check(check)]
    # A day of grace for other clocks.
    if datetime.date.fromisoformat(evidence.created[:10]) > datetime.date.today() + datetime.timedelta(days=1):
        found.append(f"it is dated {evidence.created[:10]}, which is yet to come")
    told = evidence.suite.get("concept")
    if isinstance(told, str) and not same_concept(told, evidence.concept):
        found.append(f"its suite is one of '{told}', and it speaks of '{evidence.concept}'")
    if evidence.command and not rebuilt_command(evidence.command):
        found.append("its command is none that recare-patch evaluate leaves")
    return found


def _rate(what: str, value: float | None, interval: Interval | None, pictures: int) -> Iterator[str]:
    """Faults of a share of pictures: it must be one of so many, with Wilson's interval."""
    if value is None:
        return
    hits = round(value * pictures)
    if not 0 <= hits <= pictures or abs(value * pictures - hits) > _ROUNDED * max(pictures, 1):
        yield f"{what} is {value:g}, which no count of {pictures:,} pictures gives"
        return
    if interval is None:
        return
    true = wilson_interval(hits, pictures)
    if max(abs(a - b) for a, b in zip(interval, true, strict=True)) > 2 * _ROUNDED:
        told = " to ".join(f"{100 * bound:.1f}" for bound in interval)
        right = " to ".join(f"{100 * bound:.1f}" for bound in true)
        yield f"{what} has the interval {told} %, and {hits:,} of {pictures:,} have {right} %"


def _of_figure(figure: Figure) -> Iterator[str]:
    if figure.unit != RATE or figure.metric.endswith(CORRECTED):
        return
    sides = (("base", figure.base, figure.base_interval), ("patched", figure.patched, figure.interval))
    for side, value, interval in sides:
        yield from _rate(f"'{figure.name}', {side},", value, interval, figure.pictures)
        parts = [(part.base if side == "base" else part.patched, part.pictures) for part in figure.by]
        for part in figure.by:
            own = part.base if side == "base" else part.patched
            yield from _rate(f"'{figure.name}', {side} of '{part.label}',", own, None, part.pictures)
        if value is None or not parts or any(own is None for own, _ in parts):
            continue
        pictures, hits = sum(count for _, count in parts), sum(round((own or 0) * count) for own, count in parts)
        if (hits, pictures) != (round(value * figure.pictures), figure.pictures):
            whole = f"{round(value * figure.pictures):,} of {figure.pictures:,}"
            yield f"'{figure.name}', {side}, counts {whole} pictures, and its parts {hits:,} of {pictures:,}"


def _of_corrected(figure: Figure, evidence: Evidence) -> Iterator[str]:
    """Faults of a corrected rate: it must follow from the rate and from what the detector was calibrated by."""
    if not figure.metric.endswith(CORRECTED):
        return
    raw = next((one for one in evidence.figures if one.name == figure.name.removesuffix(CORRECTED)), None)
    try:
        calibration = Calibration.of_data(evidence.options["calibration"])
    except (KeyError, EvaluationError):
        raw = None
    if raw is None:
        yield f"'{figure.name}' is corrected, and the rate or the calibration behind it is not told"
        return
    right = calibration.figure(raw)
    for side in ("base", "patched", "base_interval", "interval"):
        given, true = (getattr(one, side) for one in (figure, right))
        pairs = (
            zip(given, true, strict=True) if isinstance(given, tuple) and isinstance(true, tuple) else [(given, true)]
        )
        if any(a != b and (a is None or b is None or abs(a - b) > 2 * _ROUNDED) for a, b in pairs):
            which = side.replace("_", " ")
            yield f"'{figure.name}' does not follow from the rate and the calibration: its {which} differs"


def _of_attack(attack: AttackFigure) -> Iterator[str]:
    yield from _rate(f"attack '{attack.attack}'", attack.rate, attack.interval, attack.trials)


def _of_check(check: Check) -> Iterator[str]:
    for point in check.points if check.unit == RATE else ():
        for series, value in point.values.items():
            if point.pictures is not None and not series.startswith(RETAINED):
                about = f"check '{check.name}', {series} at {point.x},"
                yield from _rate(about, value, point.intervals.get(series), point.pictures)


def tidy(text: str) -> str:
    """A text of evidence for a reader: each of its lines shows signs alone."""
    return "\n".join(map(printable, re.split(r"\r?\n", text)))
