"""Measures the figures of a patch again: are those of its evidence true?

Integrity comes first and costs seconds, see :mod:`integrity`. Only then are the figures measured again,
with the suite, seeds and picture counts of the evidence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recare_patch.core import EvidenceError, Progress, RecarePatchError, unknown_name
from recare_patch.measure.attacks.saved import load_about
from recare_patch.measure.evidence import RATE, AttackFigure, Check, Evidence, Figure, show_interval, show_value
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

    A figure holds when the value measured now lies within the recorded interval and the recorded value
    within the interval measured now, for the base and for the patched model. The second half keeps a
    wide interval from proving anything. With fewer pictures only the second half is asked for.
    Figures without an interval may differ by ``tolerance`` of the recorded value.

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
            findings.append(Finding("figures", None, told))
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
    if evidence is None or not plan:
        return findings, None
    findings.append(check_suite(evidence))
    if any(one.holds is False for one in findings):
        return findings, None
    measured = measured_again(evidence, patch, model, plan, how)
    findings += compare(evidence, measured, plan.figures, tolerance=tolerance)
    left = [one.name for one in evidence.figures if one.name not in plan.figures]
    if left:
        findings.append(Finding("figures", None, f"{len(left)} were not asked for: {', '.join(left)}"))
    return findings, measured


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
    if evidence is not None and (now := model.denoiser_hash()) != evidence.base_denoiser_sha256:
        told = (
            f"{EVIDENCE_NAME} was measured on a denoiser with SHA-256 "
            f"{evidence.base_denoiser_sha256[:12]}…, and that of {model.id} has {now[:12]}…"
        )
        return model, Finding("base", False, told)
    return model, Finding("base", True, f"{model.id}, the very weights that it was made for")


def check_suite(evidence: Evidence) -> Finding:
    """Prompts can be chosen to suit a patch: says whether they are those of this package."""
    try:
        suite = Suite(**evidence.suite)
    except RecarePatchError as fault:
        return Finding("suite", False, f"{EVIDENCE_NAME} holds no sound suite: {fault}")
    if suite.name not in list_suites():
        told = f"'{suite.name}' is not among the bundled ones: its prompts are in {EVIDENCE_NAME}"
        return Finding("suite", None, told)
    bundled = load_suite(suite.name, concept=suite.concept, kind=suite.kind).model_dump()
    changed = [key for key, value in suite.model_dump().items() if bundled[key] != value]
    if changed:
        told = f"'{suite.name}' with {', '.join(changed)} of its own, unlike the bundled one"
        return Finding("suite", None, told)
    return Finding("suite", True, f"'{suite.name}' as bundled")


def compare(
    recorded: Evidence, measured: Evidence, names: Sequence[str], *, tolerance: float = TOLERANCE
) -> list[Finding]:
    """Which recorded figures, attacks and checks hold against newly measured ones; see :func:`verify`."""
    figures = {one.name: one for one in measured.figures}
    attacks = {(one.attack, one.preset): one for one in measured.attacks}
    checks = {one.name: one for one in measured.checks}
    findings = [_compare_figure(recorded.figure(name), figures.get(name), tolerance) for name in names]
    for one in recorded.attacks:
        about, again = attack_title(one), attacks.get((one.attack, one.preset))
        if again is None:
            told = f"{one.successes} of {one.trials} recorded, and not drawn again"
            findings.append(Finding(about, None, told))
            continue
        found = _held(_of_attack(one), _of_attack(again), RATE, tolerance)
        told = "; ".join(why for _, why in found)
        findings.append(Finding(f"{about} drawn again", all(state for state, _ in found), told))
    for check in recorded.checks:
        about = f"check '{check.name}'"
        if check.name not in checks:
            findings.append(Finding(about, None, "not measured again"))
            continue
        found = _held(_of_check(check), _of_check(checks[check.name]), check.unit, tolerance)
        wrong = "; ".join(why for state, why in found if state is False)
        findings.append(Finding(about, not wrong, wrong or f"all {len(check.points)} points hold"))
    return findings


def _compare_figure(recorded: Figure, measured: Figure | None, tolerance: float) -> Finding:
    about = f"figure '{recorded.name}'"
    if measured is None:
        return Finding(about, False, "is recorded, and measuring again does not give it")
    for what in ("group", "metric", "detector", "better", "unit"):
        old, new = getattr(recorded, what), getattr(measured, what)
        if old != new:
            return Finding(about, False, f"is recorded with {what} '{old}', and has '{new}'")
    found = _held(_of_figure(recorded), _of_figure(measured), recorded.unit, tolerance)
    told, states = [why for _, why in found], {state for state, _ in found}
    if recorded.pictures == measured.pictures:
        old_parts, new_parts = _of_parts(recorded), dict(_of_parts(measured))
        faults = [
            f"{what} is not measured that way again"
            for what, reading in old_parts
            if what not in new_parts or new_parts[what][2] != reading[2]
        ]
        parts = _held(old_parts, [*new_parts.items()], recorded.unit, tolerance)
        faults += [why for state, why in parts if state is False]
        told += faults[:1]
        states |= {False} if faults else set()
    return Finding(about, False if False in states else None if None in states else True, "; ".join(told))


def _of_figure(figure: Figure) -> list[tuple[str, Reading]]:
    return [
        ("base", (figure.base, figure.base_interval, figure.pictures)),
        ("patched", (figure.patched, figure.interval, figure.pictures)),
    ]


def _of_parts(figure: Figure) -> list[tuple[str, Reading]]:
    """Of each prompt; rates have Wilson's interval."""
    found: list[tuple[str, Reading]] = []
    for part in figure.by:
        for side, value in (("base", part.base), ("patched", part.patched)):
            rate = value is not None and figure.unit == RATE and part.pictures and 0 <= value <= 1
            band = wilson_interval(round((value or 0) * part.pictures), part.pictures) if rate else None
            found.append((f"its part '{part.label}': {side}", (value, band, part.pictures)))
    return found


def _of_attack(attack: AttackFigure) -> list[tuple[str, Reading]]:
    counts, trials = {"success": attack.successes, "without attack": attack.without}, attack.trials
    return [(what, (k / trials, wilson_interval(k, trials), None)) for what, k in counts.items()]


def _of_check(check: Check) -> list[tuple[str, Reading]]:
    return [
        (f"{series} at {point.x}:", (value, point.intervals.get(series), point.pictures))
        for point in check.points
        for series, value in point.values.items()
    ]


def _held(
    recorded: Sequence[tuple[str, Reading]], measured: Sequence[tuple[str, Reading]], unit: str, tolerance: float
) -> list[tuple[bool | None, str]]:
    """Whether recorded and new values agree, and a sentence on each; None where they cannot be compared."""
    again, found = dict(measured), list[tuple[bool | None, str]]()
    for what, (old, old_band, old_pictures) in recorded:
        new, new_band, new_pictures = again.get(what, (None, None, None))
        told = f"{what} {show_value(old, unit)} recorded, {show_value(new, unit)} measured"
        holds: bool | None
        if old is None and new is None:
            continue
        if old is None or new is None:
            holds = False
        elif old_pictures != new_pictures:
            holds = None if new_band is None else _within(old, new_band)
            told += (
                ": not comparable, since the number of pictures differs"
                if new_band is None
                else f" on other pictures ({show_interval(new_band, unit)})"
            )
        elif old_band is None:
            holds = abs(new - old) <= max(tolerance * abs(old), FLOOR) + 1e-12
            told += f" (within {100 * tolerance:g} % is allowed)"
        else:
            holds = _within(new, old_band) and (new_band is None or _within(old, new_band))
            told += f" (recorded interval {show_interval(old_band, unit)})"
        found.append((holds, told))
    return found


def _within(value: float, interval: Interval) -> bool:
    return interval[0] - _SLACK <= value <= interval[1] + _SLACK


def measured_again(evidence: Evidence, patch: Patch, base: BaseModel, plan: Plan, how: Mapping[str, Any]) -> Evidence:
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
    found = (_drawn_again(one, patch, base, plan.record.folder, how) for one in plan.attacks)
    return measured.model_copy(update={"attacks": tuple(one for one in found if one is not None)})


def _drawn_again(
    attack: AttackFigure, patch: Patch, base: BaseModel, folder: Path, how: Mapping[str, Any]
) -> AttackFigure | None:
    """What a saved attack found, drawn and judged once more; None where it is not here."""
    from recare_patch.measure.attacks.run import attack_patch

    place = saved_attack(folder, attack)
    if place is None:
        return None
    about = load_about(place)
    asked = ("concept", "detector", "label", "steps", "scheduler", "guidance_scale")
    told = {"seed": 0, **{key: about[key] for key in (*asked, "seed") if key in about}}
    settings = {"progress": how["progress"], "device": how["device"]}
    result = attack_patch(patch, replay=place, base=base, **told, **settings)
    found = {name: getattr(result, name) for name in ("successes", "trials", "interval", "without")}
    return attack.model_copy(update=found)
