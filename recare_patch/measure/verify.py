"""Measures the figures of a patch again: are those of its evidence true?

Integrity comes first and costs seconds, see :mod:`integrity`. Only then are the figures measured again,
with the suite, seeds and picture counts of the evidence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from recare_patch.core import EvidenceError, Progress, RecarePatchError, unknown_name
from recare_patch.measure.attacks.saved import load_about
from recare_patch.measure.calibration import CORRECTED
from recare_patch.measure.claims import shows
from recare_patch.measure.erasers import Eraser
from recare_patch.measure.evidence import RATE, AttackFigure, Check, Evidence, Figure, show_interval, show_value
from recare_patch.measure.header import layer_faults
from recare_patch.measure.integrity import (
    Finding,
    Findings,
    Record,
    attack_title,
    check_attacks,
    check_integrity,
    saved_attack,
)  # fmt: skip
from recare_patch.measure.meters import wilson_interval
from recare_patch.measure.suites import Suite, list_suites, load_suite
from recare_patch.measure.unwritten import subject_in
from recare_patch.models import BaseModel, Load, load_to_draw
from recare_patch.patch import EVIDENCE_NAME, Patch
from recare_patch.recipe import MemoryOptions

TOLERANCE = 0.05
"""Of figures without an interval: this share of the recorded value may be missed."""

FLOOR = 1e-4
"""And this much at least, for values near zero."""

_SLACK = 1e-6

Interval = tuple[float, float]
Reading = tuple[float | None, Interval | None, int | None]
"""A value, its interval and the number of pictures behind it."""


@dataclass(frozen=True)
class Verification(Findings):
    """All that was looked at, in its order.

    Attributes:
        measured: the figures as measured again; None where they were not, and for several concepts.
    """

    measured: Evidence | None = None


@dataclass(frozen=True)
class Plan:
    """What is measured again of the evidence on one concept: figures by name, and saved attacks."""

    record: Record
    figures: tuple[str, ...] = ()
    attacks: tuple[AttackFigure, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.figures or self.attacks)


def verify(
    patch: str | Path,
    base: str | Path | None = None,
    *,
    concept: str | None = None,
    figures: Sequence[str] = ("all",),
    pictures: int | None = None,
    tolerance: float = TOLERANCE,
    clip: str | None = None,
    cache: Path | None = None,
    device: str = "auto",
    precision: str | None = None,
    memory: MemoryOptions | None = None,
    vram: float | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Check a patch's integrity, then measure its figures again; damage and alterations are findings.

    Saved attacks beside the evidence are drawn again with what they found; nothing is searched anew.

    A rate holds when the recorded value lies within the interval of the new one and the new one within that of the
    recorded count, for the base and for the patched model; both intervals are computed here, from counts of pictures
    that the verifier drew. Other figures hold within the interval measured now, or, without one, within ``tolerance``
    of the new value. A rate of something that the base itself never shows means nothing, and
    where it shows the concept on no prompts at all, none of them holds.
    With another number of pictures the recorded value must lie within the new interval. What was not measured again
    is among ``unmeasured``.

    Args:
        patch: its folder, or its safetensors file.
        base: the base model; by default the one that it was made for.
        concept: one of several that the patch erases; all of them by default, each by its own evidence.
        figures: names of figures; "all" of them and the attacks, or "none" for integrity alone.
        pictures: pictures a figure, instead of the recorded number.
        tolerance: of figures without an interval, relative.
        clip: of figures that CLIP reads; by default the recipe's.
        cache: folder of pictures drawn before; none by default, so that each is drawn anew.
        device, progress: of the drawing.
        precision: None: the recorded one.
        memory, vram: see :func:`load_to_draw`; levers that decide the pictures are the recorded ones.

    Raises:
        PatchError: there is no patch.
        BaseModelError: the base cannot be loaded.
        UnknownNameError: the evidence has no such figure.
        EvaluationError: what measured it is not here, such as a detector's package; or the patch erases
            no such concept.
    """
    how = {"pictures": pictures, "clip": clip, "cache": cache, "device": device, "progress": progress}
    drawn = {"device": device, "precision": precision, "memory": memory, "vram": vram}
    sound = check_integrity(patch, concept)
    loaded, findings = sound.patch, list(sound.findings)
    for record in sound.records:
        findings += record.named(check_attacks(record))
    plans = _plans(sound.records, figures)
    if loaded is None or loaded.metadata is None or any(one.holds is False for one in findings):
        if any(plans):
            told = "not measured again, since the patch or its records do not hold"
            findings.append(Finding("figures", None, told, _claims(plans)))
        return Verification(tuple(findings))
    measured = None
    for plan in plans:
        found, measured = _verify_figures(loaded, plan, base, tolerance, how, drawn)
        findings += plan.record.named(found)
    return Verification(tuple(findings), None if loaded.metadata.by_concept else measured)


def _plans(records: Sequence[Record], figures: Sequence[str]) -> list[Plan]:
    asked = {name.strip().casefold(): name for name in figures}
    known = [one.name for record in records if record.evidence for one in record.evidence.figures]
    if not asked.keys() & {"all", "none"} and any(record.evidence for record in records):
        folded = {name.casefold() for name in known}
        for name in (name for key, name in asked.items() if key not in folded):
            raise unknown_name("figure", name, known)
    plans = []
    for record in records:
        if record.evidence is None or "none" in asked:
            plans.append(Plan(record))
            continue
        names = [one.name for one in record.evidence.figures]
        if "all" in asked:
            plans.append(Plan(record, tuple(names), record.evidence.attacks))
        else:
            plans.append(Plan(record, tuple(name for name in names if name.casefold() in asked)))
    return plans


def _verify_figures(
    patch: Patch,
    plan: Plan,
    base: str | Path | None,
    tolerance: float,
    how: Mapping[str, Any],
    drawn: Mapping[str, Any],
) -> tuple[list[Finding], Evidence | None]:
    """Whether the base, the suite and the figures are those that the evidence tells of."""
    evidence = plan.record.evidence
    model, found = _check_base(patch, evidence, base, drawn)
    findings = [found]
    if patch.metadata is not None:
        wrong = layer_faults(patch, model)
        told = "; ".join(wrong) or f"{len(patch.modules)} modules, those that are named '{patch.metadata.layers}'"
        findings.append(Finding("layers", not wrong, told))
    if evidence is None or not plan:
        if evidence is not None and (claims := _claims([replace(plan, **_all_of(evidence))])):
            findings.append(Finding("figures", None, "not measured again, as was asked", claims))
        return findings, None
    findings.append(check_suite(evidence))
    if any(one.holds is False for one in findings):
        return findings, None
    measured = measured_again(evidence, patch, model, plan, how)
    other = how["pictures"] is not None
    findings += compare(evidence, measured, plan.figures, tolerance=tolerance, other_count=other)
    left = [one.name for one in evidence.figures if one.name not in plan.figures]
    if left:
        claims = tuple(f"figure '{name}'" for name in left)
        findings.append(Finding("figures", None, f"{len(left)} were not asked for: {', '.join(left)}", claims))
    return findings, measured


def _all_of(evidence: Evidence) -> dict[str, Any]:
    return {"figures": tuple(one.name for one in evidence.figures), "attacks": evidence.attacks}


def _claims(plans: Sequence[Plan]) -> tuple[str, ...]:
    """What would be measured again, by name."""
    found = [f"figure '{name}'" for plan in plans for name in plan.figures]
    found += [attack_title(one) for plan in plans for one in plan.attacks]
    evidence = [plan.record.evidence for plan in plans if plan.record.evidence is not None]
    return (*found, *(f"check '{check.name}'" for one in evidence for check in one.checks))


def _check_base(
    patch: Patch, evidence: Evidence | None, base: str | Path | None, drawn: Mapping[str, Any]
) -> tuple[BaseModel, Finding]:
    """The base to measure on, and whether it is the one of the patch and of the evidence."""
    assert patch.metadata is not None
    recipe = patch.metadata.parsed_recipe if patch.metadata.recipe is not None else None
    source = base or (recipe.base if recipe is not None else patch.metadata.base)
    recorded = dict(evidence.options) if evidence is not None else {}
    precision = drawn["precision"] or recorded.get("precision")
    given = (drawn["memory"] or MemoryOptions()).model_dump(exclude_defaults=True)
    decided, batch = (recorded.get(key) for key in ("memory", "batch_size"))
    memory = MemoryOptions(**{**given, **(decided if isinstance(decided, dict) else {})})
    load = Load(pictures=batch if isinstance(batch, int) else 8)
    how = {**drawn, "precision": precision, "memory": memory, "load": load}
    model = load_to_draw(source, recorded=recipe.precision if recipe is not None else None, **how)
    try:
        patch.check_base(model, strict=True)
    except RecarePatchError as fault:
        return model, Finding("base", False, str(fault))
    if evidence is not None:
        if (now := model.denoiser_hash()) != evidence.base_denoiser_sha256:
            told = (
                f"{EVIDENCE_NAME} was measured on a denoiser with SHA-256 "
                f"{evidence.base_denoiser_sha256[:12]}…, and that of {model.id} has {now[:12]}…"
            )
            return model, Finding("base", False, told)
        if evidence.base not in (patch.metadata.base, model.id):
            told = f"{EVIDENCE_NAME} names the base '{evidence.base}', and the patch '{patch.metadata.base}'"
            return model, Finding("base", False, told)
    return model, Finding("base", True, f"{model.id}, the very weights that it was made for")


def check_suite(evidence: Evidence) -> Finding:
    """Prompts can be chosen to suit a patch: says whether they are those of this package."""
    try:
        suite = Suite(**evidence.suite)
    except RecarePatchError as fault:
        return Finding("suite", False, f"{EVIDENCE_NAME} holds no sound suite: {fault}")
    if suite.kind != evidence.kind:
        return Finding("suite", False, f"'{suite.name}' is for a {suite.kind}, and the patch erases a {evidence.kind}")
    if suite.name not in list_suites():
        told = f"'{suite.name}' is not among the bundled ones: its prompts and its judge are {EVIDENCE_NAME}'s choice"
        return Finding("suite", None, told)
    bundled = load_suite(suite.name, concept=suite.concept, kind=suite.kind).model_dump()
    changed = [key for key, value in suite.model_dump().items() if bundled[key] != value]
    if changed:
        told = f"'{suite.name}' with {', '.join(changed)} of its own, unlike the bundled one"
        return Finding("suite", None, told)
    return Finding("suite", True, f"'{suite.name}' as bundled")


def compare(
    recorded: Evidence,
    measured: Evidence,
    names: Sequence[str],
    *,
    tolerance: float = TOLERANCE,
    other_count: bool = False,
) -> list[Finding]:
    """Which recorded figures, attacks and checks hold against newly measured ones; see :func:`verify`.

    ``other_count`` says that the verifier asked for another number of pictures than the recorded one.
    """
    figures = {one.name: one for one in measured.figures}
    attacks = {(one.attack, one.preset): one for one in measured.attacks}
    checks = {one.name: one for one in measured.checks}
    counts = tuple(recorded.options.get(key) for key in ("pictures", "retained_pictures"))
    erased = [one for one in measured.figures if one.unit == RATE and one.better == "lower" and one.base is not None]
    all_measured = len(erased) == sum(one.unit == RATE and one.better == "lower" for one in recorded.figures)
    how = _How(tolerance, other_count, counts, means=any(map(_shows, erased)) or not all_measured)
    findings = [_compare_figure(recorded.figure(name), figures.get(name), how) for name in names]
    for one in recorded.attacks:
        about, again = attack_title(one), attacks.get((one.attack, one.preset))
        if again is None:
            told = f"{one.successes} of {one.trials} recorded, and not drawn again"
            findings.append(Finding(about, None, told, (about,)))
            continue
        found = _held(_of_attack(one), _of_attack(again), RATE, _How(tolerance))
        told = "; ".join(why for _, why in found)
        # Whether it sought as hard as is told, nobody sees from what it found.
        claims = (f"how hard {about} sought",)
        findings.append(Finding(f"{about} drawn again", all(state for state, _ in found), told, claims))
    for check in recorded.checks:
        about = f"check '{check.name}'"
        if check.name not in checks:
            findings.append(Finding(about, None, "not measured again", (about,)))
            continue
        found = _held(_of_check(check), _of_check(checks[check.name]), check.unit, _How(tolerance))
        wrong = "; ".join(why for state, why in found if state is False)
        findings.append(Finding(about, not wrong, wrong or f"all {len(check.points)} points hold"))
    return findings


@dataclass(frozen=True)
class _How:
    """What may differ: a share of values without an interval, and the number of pictures if another was asked for.

    Recorded numbers must then be among ``counts``, those of the recorded options. ``means`` says that the base shows on
    some prompts what is erased.
    """

    tolerance: float
    other_count: bool = False
    counts: tuple[Any, ...] = ()
    means: bool = True


def _compare_figure(recorded: Figure, measured: Figure | None, how: _How) -> Finding:
    about = f"figure '{recorded.name}'"
    if measured is None:
        return Finding(about, False, "is recorded, and measuring again does not give it")
    for what in ("group", "metric", "detector", "better", "unit"):
        old, new = getattr(recorded, what), getattr(measured, what)
        if old != new:
            return Finding(about, False, f"is recorded with {what} '{old}', and has '{new}'")
    if how.other_count and recorded.pictures != measured.pictures and recorded.pictures not in how.counts:
        return Finding(about, False, f"is recorded of {recorded.pictures:,} pictures, and its options give others")
    # A corrected rate is wider than its count says: it has an interval of its own.
    unit = "" if recorded.metric.endswith(CORRECTED) else recorded.unit
    found = _held(_of_figure(recorded), _of_figure(measured), unit, how)
    told, states = [why for _, why in found], {state for state, _ in found}
    claims = [about] if None in states else []
    if recorded.pictures == measured.pictures:
        old_parts, new_parts = _of_parts(recorded), dict(_of_parts(measured))
        faults = [
            f"{what} is not measured that way again"
            for what, reading in old_parts
            if what not in new_parts or new_parts[what][2] != reading[2]
        ]
        parts = _held(old_parts, [*new_parts.items()], recorded.unit, how)
        faults += [why for state, why in parts if state is False]
        told += faults[:1]
        states |= {False} if faults else set()
    elif None not in states:
        claims.append(f"{about} on {recorded.pictures:,} pictures")
    if measured.unit == RATE and measured.base is not None:
        hits, count = round(measured.base * measured.pictures), measured.pictures
        if not _shows(measured):
            told.append(f"it means nothing, since the base itself shows it in {hits} of {count:,} pictures")
            # Nothing is erased that is nowhere; on some prompts the base may well not show it, which says little.
            states |= {None if how.means or measured.better == "higher" else False}
            claims = claims or [about]
    holds = False if False in states else None if None in states else True
    return Finding(about, holds, "; ".join(told), tuple(claims))


def _shows(figure: Figure) -> bool:
    """Whether the base itself shows what a rate counts."""
    return figure.base is not None and shows(round(figure.base * figure.pictures), figure.pictures)


def _of_figure(figure: Figure) -> list[tuple[str, Reading]]:
    return [
        ("base", (figure.base, figure.base_interval, figure.pictures)),
        ("patched", (figure.patched, figure.interval, figure.pictures)),
    ]


def _of_parts(figure: Figure) -> list[tuple[str, Reading]]:
    """Of each prompt."""
    return [
        (f"its part '{part.label}': {side}", (value, None, part.pictures))
        for part in figure.by
        for side, value in (("base", part.base), ("patched", part.patched))
    ]


def _of_attack(attack: AttackFigure) -> list[tuple[str, Reading]]:
    counts, trials = {"success": attack.successes, "without attack": attack.without}, attack.trials
    return [(what, (k / trials, None, trials)) for what, k in counts.items()]


def _of_check(check: Check) -> list[tuple[str, Reading]]:
    return [
        (f"{series} at {point.x}:", (value, point.intervals.get(series), point.pictures))
        for point in check.points
        for series, value in point.values.items()
    ]


def _held(
    recorded: Sequence[tuple[str, Reading]], measured: Sequence[tuple[str, Reading]], unit: str, how: _How
) -> list[tuple[bool | None, str]]:
    """Whether recorded and new values agree, and a sentence on each; None where they cannot be compared.

    What may differ follows from the verifier's own pictures: the interval of the new value, computed here, and of
    rates the one that so many pictures give the old value.
    """
    again, found = dict(measured), list[tuple[bool | None, str]]()
    for what, (old, old_band, old_pictures) in recorded:
        new, band, pictures = again.get(what, (None, None, None))
        told = f"{what} {show_value(old, unit)} recorded, {show_value(new, unit)} measured"
        holds: bool | None
        if old is None and new is None:
            continue
        rate = unit == RATE and bool(pictures) and new is not None and 0 <= new <= 1
        if rate:
            band = _wilson(new, pictures)
        if old is None or new is None:
            holds = False
        elif old_pictures != pictures and not how.other_count:
            holds = False
            told += f": of {_count(old_pictures)} pictures, and it takes {_count(pictures)}"
        elif old_pictures != pictures:
            holds = None if band is None else _within(old, band)
            told += (
                ": not comparable, since the number of pictures differs"
                if band is None
                else f" on other pictures ({show_interval(band, unit)})"
            )
        elif band is None:
            holds = old_band is None and abs(new - old) <= max(how.tolerance * abs(new), FLOOR) + 1e-12
            told += f" (within {100 * how.tolerance:g} % is allowed)"
            told += "" if old_band is None else ", with an interval that nothing gives"
        else:
            holds = _within(old, band) and (not rate or _within(new, _wilson(old, pictures)))
            told += f" (interval {show_interval(band, unit)})"
            if not rate and old_band is not None and _width(old_band) > 2 * _width(band) + FLOOR:
                holds = False
                told += f", recorded with the interval {show_interval(old_band, unit)}"
        found.append((holds, told))
    return found


def _wilson(value: float | None, pictures: int | None) -> Interval:
    count = pictures or 0
    return wilson_interval(min(max(round((value or 0) * count), 0), count), count)


def _width(interval: Interval) -> float:
    return interval[1] - interval[0]


def _count(pictures: int | None) -> str:
    return "no" if pictures is None else f"{pictures:,}"


def _within(value: float, interval: Interval) -> bool:
    return interval[0] - _SLACK <= value <= interval[1] + _SLACK


def measured_again(evidence: Evidence, patch: Eraser, base: BaseModel, plan: Plan, how: Mapping[str, Any]) -> Evidence:
    """Through the evaluation itself, on the suite, seeds and counts that the evidence holds."""
    from recare_patch.measure.run import measure_again

    measured = evidence.model_copy(update={"figures": (), "attacks": (), "checks": ()})
    if plan.figures:
        try:
            measured = measure_again(evidence, patch, base, figures=plan.figures, **how)
        except RecarePatchError:
            raise
        except (TypeError, ValueError) as fault:
            # The options are free-form in the file, and were altered if they cannot be used.
            raise EvidenceError(f"{EVIDENCE_NAME} cannot be measured by its options: {fault}") from fault
    found = (_drawn_again(one, patch, base, plan.record, how) for one in plan.attacks)
    return measured.model_copy(update={"attacks": tuple(one for one in found if one is not None)})


def _drawn_again(
    attack: AttackFigure, patch: Eraser, base: BaseModel, record: Record, how: Mapping[str, Any]
) -> AttackFigure | None:
    """What a saved attack found, drawn and judged once more; None where it is not here."""
    from recare_patch.measure.attacks.run import attack_patch

    place = saved_attack(record, attack)
    if place is None:
        return None
    about = load_about(place)
    asked = ("concept", "detector", "label", "steps", "scheduler", "guidance_scale")
    told = {"seed": 0, **{key: about[key] for key in (*asked, "seed") if key in about}}
    settings = {"progress": how["progress"], "device": how["device"]}
    if patch.metadata is None and record.evidence is not None:
        told["subject"] = subject_in(Suite(**record.evidence.suite), base.id)
    try:
        result = attack_patch(patch, replay=place, base=base, **told, **settings)
    except (TypeError, ValueError) as fault:
        if isinstance(fault, RecarePatchError):
            raise
        raise EvidenceError(f"{attack.folder} cannot be drawn again by what it says of itself: {fault}") from fault
    found = {name: getattr(result, name) for name in ("successes", "trials", "interval", "without")}
    return attack.model_copy(update=found)
