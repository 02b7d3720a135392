"""Holds a patch against what is said of it: is it the file that was made, and are its figures true?

Integrity comes first and costs seconds: the weights are what their records say to the byte, they fit
their base, and the card claims no more than the evidence. Only then are the figures measured again,
with the suite, seeds and picture counts of the evidence.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from recare_patch.core import (
    EvidenceError,
    PatchError,
    Progress,
    RecarePatchError,
    file_sha256,
    unknown_name,
    yaml_mapping,
)
from recare_patch.measure.attacks.saved import load_about, load_attack
from recare_patch.measure.card import claimed_figures, evidence_section, model_index
from recare_patch.measure.evidence import (
    RATE,
    AttackFigure,
    Evidence,
    Figure,
    Part,
    show_interval,
    show_value,
)
from recare_patch.measure.meters import wilson_interval
from recare_patch.measure.suites import Suite, folder_of, list_suites, load_suite, subject_of
from recare_patch.models import BaseModel, load_base
from recare_patch.patch import (
    CARD_NAME,
    EVIDENCE_NAME,
    STACK_NAME,
    Patch,
    PatchMetadata,
    PatchPart,
    concepts_of,
    from_any,
    output_name,
)
from recare_patch.recipe import WEIGHTS_NAME

logger = logging.getLogger(__name__)

TOLERANCE = 0.05
"""Of figures without an interval: this share of the recorded value may be missed."""

FLOOR = 1e-4
"""And this much at least, for values near zero."""

_TRAINING = "training.json"
_SLACK = 1e-6


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        about: what.
        holds: True, or False; None where it could not be looked at and nothing speaks against it.
        told: a sentence.
    """

    about: str
    holds: bool | None
    told: str


@dataclass(frozen=True)
class Verification:
    """All that was looked at.

    Attributes:
        findings: in their order.
        measured: the figures as measured again; None where they were not, and for a patch of several
            concepts, which are measured each on its own.
    """

    findings: tuple[Finding, ...]
    measured: Evidence | None = None

    @property
    def holds(self) -> bool:
        """Whether nothing failed."""
        return not self.failed

    @property
    def failed(self) -> tuple[Finding, ...]:
        """What does not hold."""
        return tuple(one for one in self.findings if one.holds is False)


Measure = Callable[[Evidence, Patch, BaseModel, "Plan"], Evidence]
"""Measures evidence again: the recorded one, the patch, its base and the plan → the new one."""


@dataclass(frozen=True)
class Plan:
    """What is measured again, and how.

    Attributes:
        folder: of the patch.
        figures: names of the figures.
        attacks: whether saved attacks are drawn again.
        pictures: for each figure; None: as many as recorded.
        clip: of figures that CLIP reads; None: as the patch's recipe says.
        cache: folder of pictures that were drawn before; None: none are used.
        device: for models that the evaluation loads itself.
        progress: told of the pictures.
    """

    folder: Path
    figures: tuple[str, ...]
    attacks: bool = False
    pictures: int | None = None
    clip: str | None = None
    cache: Path | None = None
    device: str = "auto"
    progress: Progress | None = None


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
    progress: Progress | None = None,
    measure: Measure | None = None,
) -> Verification:
    """Check a patch's integrity, then measure its figures again.

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
        device: ``auto``, ``cpu``, ``cuda`` …
        progress: told of the pictures.
        measure: how figures are measured, for tests.

    Returns:
        The findings. A damaged or altered patch is a finding, not an error.

    Raises:
        PatchError: there is no patch.
        BaseModelError: the base cannot be loaded.
        UnknownNameError: the evidence has no such figure.
        EvaluationError: what measured it is not here, such as a detector's package; or the patch erases
            no such concept.
    """
    sound = check_integrity(patch, concept)
    loaded = sound.patch
    metadata = loaded.metadata if loaded is not None else None
    findings = list(sound.findings)
    for record in sound.records:
        findings += record.named(_check_attacks(record.folder, record.evidence))
    wanted = _wanted([one.evidence for one in sound.records if one.evidence is not None], figures)
    plans = [
        Plan(
            record.folder,
            wanted.get(id(record.evidence), ()),
            attacks=record.evidence is not None
            and bool(record.evidence.attacks)
            and _asks_for(figures, "all"),
            pictures=pictures,
            clip=clip,
            cache=cache,
            device=device,
            progress=progress,
        )
        for record in sound.records
    ]
    if loaded is None or metadata is None or any(one.holds is False for one in findings):
        if any(plan.figures or plan.attacks for plan in plans):
            told = "not measured again, since the patch or its records do not hold"
            findings.append(Finding("figures", None, told))
        return Verification(tuple(findings))
    measured = None
    for record, plan in zip(sound.records, plans, strict=True):
        found, measured = _verify_figures(loaded, metadata, record, plan, base, tolerance, measure)
        findings += record.named(found)
    return Verification(tuple(findings), None if metadata.by_concept else measured)


def _verify_figures(
    patch: Patch,
    metadata: PatchMetadata,
    record: Record,
    plan: Plan,
    base: str | Path | None,
    tolerance: float,
    measure: Measure | None,
) -> tuple[list[Finding], Evidence | None]:
    """Whether the base, the suite and the figures are those that the evidence tells of."""
    evidence = record.evidence
    model, findings = _check_base(patch, metadata, evidence, base, plan.device)
    if evidence is None or not (plan.figures or plan.attacks):
        return findings, None
    findings += _check_suite(evidence)
    if any(one.holds is False for one in findings):
        return findings, None
    measured = (measure or _measure_again)(evidence, patch, model, plan)
    findings += compare(evidence, measured, plan.figures, tolerance=tolerance)
    left = [one.name for one in evidence.figures if one.name not in plan.figures]
    if left:
        findings.append(Finding("figures", None, f"{len(left)} were not asked for: {', '.join(left)}"))
    return findings, measured


@dataclass(frozen=True)
class Record:
    """The evidence on one concept.

    Attributes:
        folder: where it lies.
        concept: which of several concepts; None for a patch of one.
        evidence: None where there is none, or none that can be read.
        findings: from reading it.
    """

    folder: Path
    concept: str | None
    evidence: Evidence | None
    findings: tuple[Finding, ...] = ()

    @property
    def name(self) -> str:
        """What messages call its file."""
        return EVIDENCE_NAME if self.concept is None else f"{self.folder.name}/{EVIDENCE_NAME}"

    def named(self, findings: Sequence[Finding]) -> list[Finding]:
        """Findings that say which of several concepts they are about."""
        if self.concept is None:
            return list(findings)
        return [replace(one, about=f"{self.concept}: {one.about}") for one in findings]


@dataclass(frozen=True)
class Integrity:
    """Whether the files of a patch agree with each other.

    Attributes:
        folder: they lie in it.
        findings: what was looked at.
        patch: as loaded; None where its weights cannot be.
        records: the evidence; of several concepts one for each.
    """

    folder: Path
    findings: tuple[Finding, ...]
    patch: Patch | None
    records: tuple[Record, ...]

    @property
    def evidence(self) -> Evidence | None:
        """What lies beside the weights; that on several concepts lies in a folder for each."""
        return self.records[0].evidence if [one.concept for one in self.records] == [None] else None

    @property
    def failed(self) -> tuple[Finding, ...]:
        """What does not hold."""
        return tuple(one for one in self.findings if one.holds is False)


def check_integrity(patch: str | Path, concept: str | None = None) -> Integrity:
    """Hold the files of a patch against each other; nothing outside of its folder is read, nothing measured.

    Args:
        patch: its folder, or its safetensors file.
        concept: one of several that the patch erases; all of them by default.

    Returns:
        The findings on weights, evidence, hash, records and card. A damaged or altered patch is a finding,
        not an error.

    Raises:
        PatchError: there is no patch.
        EvaluationError: the patch erases no such concept.
    """
    file = _weights_file(Path(patch).expanduser())
    folder = file.parent
    findings, loaded = _check_weights(file)
    metadata = loaded.metadata if loaded is not None else None
    stacked = metadata is not None and metadata.parts is not None
    several = metadata is not None and metadata.by_concept
    if loaded is None or not several:
        if loaded is not None and concept is not None:
            subject_of(loaded, concept)
        records = [_read_evidence(folder)]
    else:
        chosen = concepts_of(loaded) if concept is None else (subject_of(loaded, concept).concept.text,)
        records = [_read_evidence(folder_of(loaded, folder, one), one) for one in chosen]
    for record in records:
        findings += record.named(record.findings)
    findings += _check_records(file, records, stacked)
    if loaded is not None and metadata is not None:
        findings += _check_folder(folder, metadata, records)
        findings += _check_other_file(folder, loaded)
    findings += _check_card(folder, None if several else records[0].evidence)
    return Integrity(folder, tuple(findings), loaded, tuple(records))


def _weights_file(path: Path) -> Path:
    """The weights file; a patch that is missing is bad input, a damaged one is a finding."""
    file = path / WEIGHTS_NAME if path.is_dir() else path
    if file.is_file():
        return file
    Patch.load(path)
    raise PatchError(f"there is no patch at {path}")


def _asks_for(figures: Sequence[str], word: str) -> bool:
    return word in [name.strip().casefold() for name in figures]


def _wanted(records: Sequence[Evidence], figures: Sequence[str]) -> dict[int, tuple[str, ...]]:
    """The names of the figures to measure again, by the identity of the evidence.

    Raises:
        UnknownNameError: no evidence has a figure of a name.
    """
    if _asks_for(figures, "none"):
        return {}
    if _asks_for(figures, "all"):
        return {id(one): tuple(figure.name for figure in one.figures) for one in records}
    asked = {name.strip().casefold() for name in figures}
    known = dict.fromkeys(figure.name for one in records for figure in one.figures)
    for name in figures if records else ():
        if name.strip().casefold() not in map(str.casefold, known):
            raise unknown_name("figure", name, known)
    return {
        id(one): tuple(figure.name for figure in one.figures if figure.name.casefold() in asked)
        for one in records
    }


# ---------------------------------------------------------------------- integrity


def _check_weights(file: Path) -> tuple[list[Finding], Patch | None]:
    about = "weights"
    try:
        patch = Patch.load(file)
        if patch.metadata is None:
            told = "carries no record of its making: it is not recare-patch's, or its header was stripped"
            return [Finding(about, False, f"{file.name} {told}")], patch
        if patch.metadata.recipe is not None:
            # A recipe that cannot be read, in a sound header, has been altered.
            assert patch.metadata.parsed_recipe
    except RecarePatchError as fault:
        return [Finding(about, False, str(fault))], None
    size = file.stat().st_size
    told = f"{len(patch.modules)} modules, {patch.parameters:,} finite values, {size:,} bytes"
    return [Finding(about, True, told)], patch


def _read_evidence(folder: Path, concept: str | None = None) -> Record:
    def record(evidence: Evidence | None, holds: bool | None, told: str) -> Record:
        return Record(folder, concept, evidence, (Finding("evidence", holds, told),))

    if not (folder / EVIDENCE_NAME).exists():
        return record(None, None, f"there is no {EVIDENCE_NAME}; recare-patch evaluate makes it")
    try:
        found = Evidence.load(folder / EVIDENCE_NAME)
    except EvidenceError as fault:
        return record(None, False, str(fault))
    held = {"figure": found.figures, "attack": found.attacks, "check": found.checks}
    told = ", ".join(f"{len(some)} {name}{'' if len(some) == 1 else 's'}" for name, some in held.items())
    return record(found, True, f"{told}, of {found.created[:10]}")


def _check_records(file: Path, records: Sequence[Record], stacked: bool) -> list[Finding]:
    """The weights' hash, as it is and as it was written down."""
    about, now = "hash", file_sha256(file)
    name, key = (STACK_NAME, "sha256") if stacked else (_TRAINING, "patch_sha256")
    recorded: dict[str, str] = {}
    if (file.parent / name).exists():
        try:
            text = (file.parent / name).read_text(encoding="utf-8")
            if stacked:
                found: Any = yaml_mapping(text, source=name, noun="stack", error=PatchError)
            elif not isinstance(found := json.loads(text), dict):
                raise ValueError("no mapping")
        except (ValueError, OSError, RecursionError, PatchError):
            return [Finding(about, False, f"{name} is not readable as {'YAML' if stacked else 'JSON'}")]
        if key in found:
            recorded[name] = str(found[key])
    recorded |= {one.name: one.evidence.patch_sha256 for one in records if one.evidence is not None}
    wrong = [name for name, value in recorded.items() if value != now]
    if wrong:
        told = f"the weights have SHA-256 {now[:12]}…, and {wrong[0]} records {recorded[wrong[0]][:12]}…"
        return [Finding(about, False, told)]
    if not recorded:
        told = f"neither {name} nor {EVIDENCE_NAME} records the weights' SHA-256, which is {now}"
        return [Finding(about, None if stacked else False, told)]
    return [Finding(about, True, f"{now[:12]}…, as recorded in {' and '.join(recorded)}")]


def _check_folder(folder: Path, metadata: PatchMetadata, records: Sequence[Record]) -> list[Finding]:
    """What lies beside the weights says what their header says."""
    wrong = []
    recipe = folder / "recipe.yaml"
    if recipe.is_file() and recipe.read_bytes() != (metadata.recipe or "").encode():
        wrong.append("recipe.yaml is not the recipe in the weights")
    parts = folder / STACK_NAME
    if parts.is_file() and not _lists_parts(parts, metadata):
        wrong.append(f"{STACK_NAME} does not list the parts that the weights do")
    words = folder / "care_set.json"
    if words.is_file() and metadata.care_set is not None:
        try:
            same = json.loads(words.read_text(encoding="utf-8")) == json.loads(metadata.care_set)
        except (ValueError, RecursionError):
            same = False
        if not same:
            wrong.append("care_set.json is not the CARE-set in the weights")
    for record in records:
        if record.evidence is None:
            continue
        expected: dict[str, str | None] = {
            "concept": metadata.concept,
            "kind": metadata.kind,
            "method": metadata.method,
        }
        if record.concept is not None:
            kind = next((one.kind for one in metadata.erased if one.concept == record.concept), None)
            expected |= {"concept": record.concept, "kind": kind or record.evidence.kind}
        for what, header in expected.items():
            told = getattr(record.evidence, what)
            if told != header:
                wrong.append(f"{record.name} says {what} '{told}', the weights '{header}'")
    if wrong:
        return [Finding("records", False, "; ".join(wrong))]
    what = "parts" if metadata.parts else "recipe, CARE-set"
    return [Finding("records", True, f"{what} and evidence agree with the weights' header")]


def _check_other_file(folder: Path, patch: Patch) -> list[Finding]:
    """The file for other tools, where there is one, holds the same weights."""
    about, file = "kohya file", folder / f"{output_name(patch)}.safetensors"
    if not file.is_file():
        return []
    try:
        other = from_any(file).tensors
    except RecarePatchError as fault:
        return [Finding(about, False, str(fault))]
    same = patch.tensors.keys() == other.keys() and all(
        torch.equal(tensor.to(other[key].dtype), other[key]) for key, tensor in patch.tensors.items()
    )
    told = "holds the patch's weights" if same else "holds other weights than the patch"
    return [Finding(about, same, f"{file.name} {told}")]


def _lists_parts(file: Path, metadata: PatchMetadata) -> bool:
    try:
        text = file.read_text(encoding="utf-8")
        told = yaml_mapping(text, source=STACK_NAME, noun="stack", error=PatchError).get("parts")
        return tuple(PatchPart(**one) for one in told or ()) == (metadata.parts or ())
    except (OSError, ValueError, TypeError, PatchError):
        return False


def _check_card(folder: Path, evidence: Evidence | None) -> list[Finding]:
    """The card's figures are the evidence's, no better and no worse."""
    about, card = "card", folder / CARD_NAME
    if not card.is_file():
        return [Finding(about, None, f"there is no {CARD_NAME}")]
    try:
        index, section = claimed_figures(card.read_text(encoding="utf-8"))
    except EvidenceError as fault:
        return [Finding(about, False, str(fault))]
    except (OSError, UnicodeDecodeError):
        return [Finding(about, False, f"{CARD_NAME} is not readable as UTF-8 text")]
    if index is None and section is None:
        return [Finding(about, None, "claims no figures")]
    if evidence is None:
        return [Finding(about, False, f"claims figures, and no readable {EVIDENCE_NAME} bears them out")]
    wrong = _index_faults(index, evidence) if index is not None else []
    if section is not None and section != evidence_section(evidence):
        wrong.append(f"its part on evidence is not the one that {EVIDENCE_NAME} gives")
    if wrong:
        return [Finding(about, False, "; ".join(wrong))]
    return [Finding(about, True, f"claims the figures of {EVIDENCE_NAME}")]


def _index_faults(index: Any, evidence: Evidence) -> list[str]:
    expected = model_index(evidence)
    if index == [expected]:
        return []
    try:
        claimed = {one["name"]: one["value"] for one in index[0]["results"][0]["metrics"]}
    except (LookupError, TypeError):
        return ["its model-index is not one that recare-patch writes"]
    metrics = {one["name"]: one["value"] for one in expected["results"][0]["metrics"]}
    faults = [
        f"claims {value} for '{name}', and {EVIDENCE_NAME} says {metrics[name]}"
        if name in metrics
        else f"claims '{name}', which is not in {EVIDENCE_NAME}"
        for name, value in claimed.items()
        if name not in metrics or metrics[name] != value
    ]
    faults += [f"leaves out '{name}'" for name in metrics if name not in claimed]
    return faults or [f"its model-index is not the one that {EVIDENCE_NAME} gives"]


def _attack_title(attack: AttackFigure) -> str:
    return f"attack '{attack.attack}{f', {attack.preset}' if attack.preset else ''}'"


def _check_attacks(folder: Path, evidence: Evidence | None) -> list[Finding]:
    """Attacks are recorded as they were saved, where what was saved is here."""
    findings = []
    for one in evidence.attacks if evidence is not None else ():
        place = _saved(folder, one)
        if place is None:
            continue
        try:
            about, saved = load_about(place), load_attack(place)
        except RecarePatchError as fault:
            findings.append(Finding(_attack_title(one), False, str(fault)))
            continue
        wrong = [
            f"{what} {getattr(one, what)}, and {one.folder} says {getattr(saved, what)}"
            for what in ("attack", "successes", "trials", "without")
            if getattr(one, what) != getattr(saved, what)
        ]
        if evidence is not None and about.get("patch_sha256") != evidence.patch_sha256:
            wrong.append(f"{one.folder} was run against another patch")
        told = "; ".join(wrong) if wrong else f"as saved in {one.folder}"
        findings.append(Finding(_attack_title(one), not wrong, told))
    return findings


def _saved(folder: Path, attack: AttackFigure) -> Path | None:
    """The folder of a saved attack, if it is here."""
    place = folder / attack.folder if attack.folder is not None else None
    return place if place is not None and place.is_dir() else None


def _check_base(
    patch: Patch, metadata: PatchMetadata, evidence: Evidence | None, base: str | Path | None, device: str
) -> tuple[BaseModel, list[Finding]]:
    """The base to measure on, and whether it is the one of the patch and of the evidence."""
    recipe = metadata.parsed_recipe if metadata.recipe is not None else None
    source = base or (recipe.base if recipe is not None else metadata.base)
    made_in = recipe.precision if recipe is not None else "fp32"
    model = load_base(source, precision=made_in, device=device)
    try:
        patch.check_base(model, strict=True)
    except RecarePatchError as fault:
        return model, [Finding("base", False, str(fault))]
    told = f"{model.id}, the very weights that it was made for"
    if evidence is not None:
        precision = str(evidence.options.get("precision", made_in))
        if precision != made_in:
            # Rounding changes the hash: the evidence speaks of the base as it was loaded then.
            model = load_base(source, precision=precision, device=device)
        if model.denoiser_hash() != evidence.base_denoiser_sha256:
            told = (
                f"{EVIDENCE_NAME} was measured on a denoiser with SHA-256 "
                f"{evidence.base_denoiser_sha256[:12]}…, and that of {model.id} has "
                f"{model.denoiser_hash()[:12]}…"
            )
            return model, [Finding("base", False, told)]
    return model, [Finding("base", True, told)]


def _check_suite(evidence: Evidence) -> list[Finding]:
    """Prompts can be chosen to suit a patch: says whether they are those of this package."""
    about = "suite"
    try:
        suite = Suite(**evidence.suite)
    except RecarePatchError as fault:
        return [Finding(about, False, f"{EVIDENCE_NAME} holds no sound suite: {fault}")]
    if suite.name not in list_suites():
        told = f"'{suite.name}' is not among the bundled ones: its prompts are in {EVIDENCE_NAME}"
        return [Finding(about, None, told)]
    bundled = load_suite(suite.name, concept=suite.concept, kind=suite.kind).model_dump()
    changed = [key for key, value in suite.model_dump().items() if bundled[key] != value]
    if changed:
        told = f"'{suite.name}' with {', '.join(changed)} of its own, unlike the bundled one"
        return [Finding(about, None, told)]
    return [Finding(about, True, f"'{suite.name}' as bundled")]


# ---------------------------------------------------------------------- figures


def compare(
    recorded: Evidence, measured: Evidence, names: Sequence[str], *, tolerance: float = TOLERANCE
) -> list[Finding]:
    """Which recorded figures hold against newly measured ones; see :func:`verify`.

    Args:
        recorded: the evidence at hand.
        measured: the same suite, measured now.
        names: figures to compare.
        tolerance: of figures without an interval.
    """
    found = {one.name: one for one in measured.figures}
    findings = []
    for name in names:
        about = f"figure '{name}'"
        if name in found:
            findings.append(_compare_figure(recorded.figure(name), found[name], tolerance, about))
        else:
            findings.append(Finding(about, False, "is recorded, and measuring again does not give it"))
    findings += _compare_attacks(recorded, measured)
    findings += _compare_checks(recorded, measured, tolerance)
    return findings


def _compare_figure(recorded: Figure, measured: Figure, tolerance: float, about: str) -> Finding:
    for what in ("group", "metric", "detector", "better", "unit"):
        old, new = getattr(recorded, what), getattr(measured, what)
        if old != new:
            return Finding(about, False, f"is recorded with {what} '{old}', and has '{new}'")
    same = recorded.pictures == measured.pictures
    unit, states, told = recorded.unit, [], []
    for side, values, intervals in (
        ("base", (recorded.base, measured.base), (recorded.base_interval, measured.base_interval)),
        ("patched", (recorded.patched, measured.patched), (recorded.interval, measured.interval)),
    ):
        if values == (None, None):
            continue
        state, why = _agree(values, intervals, same, tolerance, unit)
        states.append(state)
        told.append(f"{side} {why}")
    wrong = [_part_fault(part, measured, unit, tolerance) for part in recorded.by] if same else []
    faults = [fault for fault in wrong if fault]
    told += faults[:1]
    holds = False if faults or False in states else None if None in states else True
    return Finding(about, holds, "; ".join(told))


def _part_fault(part: Part, measured: Figure, unit: str, tolerance: float) -> str:
    """What does not hold of one prompt's numbers, if anything; rates by Wilson's interval."""
    found = [one for one in measured.by if one.label == part.label]
    where = f"its part '{part.label}'"
    if len(found) != 1 or found[0].pictures != part.pictures:
        return f"{where} is not measured that way again"
    for side, old, new in (
        ("base", part.base, found[0].base),
        ("patched", part.patched, found[0].patched),
    ):
        if (old, new) == (None, None):
            continue
        intervals = tuple(_part_interval(value, part.pictures, unit) for value in (old, new))
        state, why = _agree((old, new), (intervals[0], intervals[1]), True, tolerance, unit)
        if state is False:
            return f"{where}: {side} {why}"
    return ""


def _part_interval(value: float | None, pictures: int, unit: str) -> tuple[float, float] | None:
    if value is None or unit != RATE or not pictures or not 0 <= value <= 1:
        return None
    return wilson_interval(round(value * pictures), pictures)


def _agree(
    values: tuple[float | None, float | None],
    intervals: tuple[tuple[float, float] | None, tuple[float, float] | None],
    same: bool,
    tolerance: float,
    unit: str,
) -> tuple[bool | None, str]:
    """Whether a recorded and a new value agree, and the sentence on it."""
    (old, new), (old_interval, new_interval) = values, intervals
    shown = f"{show_value(old, unit)} recorded, {show_value(new, unit)} measured"
    if old is None or new is None:
        return False, shown
    if not same:
        if new_interval is None:
            return None, f"{shown}: not comparable, since the number of pictures differs"
        return _within(old, new_interval), f"{shown} on other pictures ({show_interval(new_interval, unit)})"
    if old_interval is None:
        allowed = max(tolerance * abs(old), FLOOR)
        return abs(new - old) <= allowed + 1e-12, f"{shown} (within {100 * tolerance:g} % is allowed)"
    holds = _within(new, old_interval) and (new_interval is None or _within(old, new_interval))
    return holds, f"{shown} (recorded interval {show_interval(old_interval, unit)})"


def _within(value: float, interval: tuple[float, float]) -> bool:
    return interval[0] - _SLACK <= value <= interval[1] + _SLACK


def _compare_attacks(recorded: Evidence, measured: Evidence) -> list[Finding]:
    findings = []
    for one in recorded.attacks:
        again = [new for new in measured.attacks if (new.attack, new.preset) == (one.attack, one.preset)]
        if not again:
            told = f"{one.successes} of {one.trials} recorded, and not drawn again"
            findings.append(Finding(_attack_title(one), None, told))
            continue
        states, told_of = [], []
        for side, values in (
            ("success", (one.rate, again[0].rate)),
            ("without attack", (one.without / one.trials, again[0].without / again[0].trials)),
        ):
            intervals = tuple(
                wilson_interval(round(value * trials), trials)
                for value, trials in zip(values, (one.trials, again[0].trials), strict=True)
            )
            state, why = _agree(values, (intervals[0], intervals[1]), True, 0.0, RATE)
            states.append(state)
            told_of.append(f"{side} {why}")
        findings.append(Finding(f"{_attack_title(one)} drawn again", all(states), "; ".join(told_of)))
    return findings


def _compare_checks(recorded: Evidence, measured: Evidence, tolerance: float) -> list[Finding]:
    findings = []
    for one in recorded.checks:
        about = f"check '{one.name}'"
        again = [new for new in measured.checks if new.name == one.name]
        if not again:
            findings.append(Finding(about, None, "not measured again"))
            continue
        points = {point.x: point for point in again[0].points}
        wrong = []
        for point in one.points:
            there = points.get(point.x)
            for series, old in point.values.items():
                new = there.values.get(series) if there else None
                if (old, new) == (None, None):
                    continue
                state, why = _agree(
                    (old, new),
                    (point.intervals.get(series), there.intervals.get(series) if there else None),
                    there is not None and there.pictures == point.pictures,
                    tolerance,
                    one.unit,
                )
                if state is False:
                    wrong.append(f"{series} at {point.x}: {why}")
        told = "; ".join(wrong) if wrong else f"all {len(one.points)} points hold"
        findings.append(Finding(about, not wrong, told))
    return findings


# ---------------------------------------------------------------------- measuring


def _measure_again(evidence: Evidence, patch: Patch, base: BaseModel, plan: Plan) -> Evidence:
    """Through the evaluation itself, on the suite, seeds and counts that the evidence holds."""
    from recare_patch.measure.run import measure_again

    measured = evidence.model_copy(update={"figures": (), "attacks": (), "checks": ()})
    if plan.figures:
        try:
            measured = measure_again(
                evidence,
                patch,
                base,
                figures=plan.figures,
                pictures=plan.pictures,
                clip=plan.clip,
                cache=plan.cache,
                device=plan.device,
                progress=plan.progress,
            )
        except RecarePatchError:
            raise
        except (TypeError, ValueError) as fault:
            # The options are free-form in the file, and were altered if they cannot be used.
            raise EvidenceError(f"{EVIDENCE_NAME} cannot be measured by its options: {fault}") from fault
    if plan.attacks:
        found = [_drawn_again(one, patch, base, plan) for one in evidence.attacks]
        measured = measured.model_copy(update={"attacks": tuple(one for one in found if one is not None)})
    return measured


def _drawn_again(attack: AttackFigure, patch: Patch, base: BaseModel, plan: Plan) -> AttackFigure | None:
    """What a saved attack found, drawn and judged once more; None where it is not here."""
    from recare_patch.measure.attacks.run import attack_patch

    place = _saved(plan.folder, attack)
    if place is None:
        return None
    about = load_about(place)
    result = attack_patch(
        patch,
        replay=place,
        concept=about.get("concept"),
        base=base,
        detector=about.get("detector"),
        label=about.get("label"),
        seed=about.get("seed", 0),
        steps=about.get("steps"),
        scheduler=about.get("scheduler"),
        guidance_scale=about.get("guidance_scale"),
        progress=plan.progress,
        device=plan.device,
    )
    found = {name: getattr(result, name) for name in ("successes", "trials", "interval", "without")}
    return attack.model_copy(update=found)
