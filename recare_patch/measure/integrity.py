"""Holds the files of a patch against each other: is it the file that was made, and what does its card claim?

It costs seconds: nothing is drawn, and nothing outside of the patch's folder is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from recare_patch.core import (
    EvidenceError,
    PatchError,
    RecarePatchError,
    file_sha256,
    inside,
    load_json,
    printable,
    read_bytes,
    read_text,
    yaml_mapping,
)
from recare_patch.measure.attacks.saved import load_about, load_attack
from recare_patch.measure.card import claimed_figures, evidence_section, model_index
from recare_patch.measure.claims import faults
from recare_patch.measure.evidence import AttackFigure, Evidence
from recare_patch.measure.header import header_faults, update_difference
from recare_patch.measure.suites import folder_of, subject_of
from recare_patch.patch import (
    CARD_NAME,
    EVIDENCE_NAME,
    PREVIEW_NAME,
    RECORD_NAME,
    REPORT_NAME,
    STACK_NAME,
    TRAINING_NAME,
    Patch,
    PatchMetadata,
    PatchPart,
    all_names,
    concepts_of,
    from_any,
    kohya_name,
)
from recare_patch.recipe import WEIGHTS_NAME, same_concept

Told = tuple[bool | None, str]
"""Whether a thing holds, and a sentence on it; see :class:`Finding`."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        holds: True, or False; None where it could not be looked at and nothing speaks against it.
        told: a sentence.
        claims: what is recorded and was not measured again, by name.
    """

    about: str
    holds: bool | None
    told: str
    claims: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        # Much of it comes from a stranger's file, and verify's own lines are told from it by standing on one each.
        object.__setattr__(self, "about", printable(self.about))
        object.__setattr__(self, "told", printable(self.told))
        object.__setattr__(self, "claims", tuple(map(printable, self.claims)))


@dataclass(frozen=True)
class Findings:
    """What was looked at, in its order."""

    findings: tuple[Finding, ...]

    @property
    def failed(self) -> tuple[Finding, ...]:
        """What does not hold."""
        return tuple(one for one in self.findings if one.holds is False)

    @property
    def holds(self) -> bool:
        """Whether nothing failed."""
        return not self.failed

    @property
    def unmeasured(self) -> tuple[str, ...]:
        """What the files claim and nobody measured again."""
        return tuple(dict.fromkeys(claim for one in self.findings for claim in one.claims))


@dataclass(frozen=True)
class Record:
    """The evidence on one concept.

    Attributes:
        folder: where it lies.
        concept: which of several concepts; None for a patch of one.
        evidence: None where there is none, or none that can be read.
        finding: from reading it.
    """

    folder: Path
    concept: str | None
    evidence: Evidence | None
    finding: Finding

    @classmethod
    def read(cls, folder: Path, root: Path, concept: str | None = None) -> Record:
        """That in a folder, whatever state it is in; no link may lead out of the patch's own folder, ``root``."""
        file, found, holds = folder / EVIDENCE_NAME, None, None
        told = f"there is no {EVIDENCE_NAME}; recare-patch evaluate makes it"
        if file.exists() or file.is_symlink():
            try:
                text = read_text(file, f"the evidence {file}", EvidenceError, within=root)
                found, holds = Evidence.from_json(text, source=str(file)), True
                held = {"figure": found.figures, "attack": found.attacks, "check": found.checks}
                counts = [f"{len(some)} {what}{'' if len(some) == 1 else 's'}" for what, some in held.items()]
                told = f"{', '.join(counts)}, of {found.created[:10]}"
            except EvidenceError as fault:
                holds, told = False, str(fault)
        return cls(folder, concept, found, Finding("evidence", holds, told))

    @property
    def name(self) -> str:
        """What messages call its file."""
        return EVIDENCE_NAME if self.concept is None else f"{self.folder.name}/{EVIDENCE_NAME}"

    def named(self, findings: Sequence[Finding]) -> list[Finding]:
        """Findings that say which of several concepts they are about."""
        if self.concept is None:
            return list(findings)
        return [
            replace(
                one,
                about=f"{self.concept}: {one.about}",
                claims=tuple(f"{self.concept}: {claim}" for claim in one.claims),
            )
            for one in findings
        ]


@dataclass(frozen=True)
class Integrity(Findings):
    """Whether the files of a patch agree with each other.

    Attributes:
        folder: they lie in it.
        patch: as loaded; None where its weights cannot be.
        records: the evidence; of several concepts one for each.
    """

    folder: Path
    patch: Patch | None
    records: tuple[Record, ...]

    @property
    def evidence(self) -> Evidence | None:
        """What lies beside the weights; that on several concepts lies in a folder for each."""
        return self.records[0].evidence if [one.concept for one in self.records] == [None] else None


def check_integrity(patch: str | Path, concept: str | None = None) -> Integrity:
    """Look at weights, evidence, hash, records and card; damage and alterations are findings, not errors.

    Args:
        patch: its folder, or its safetensors file.
        concept: one of several that the patch erases; all of them by default.

    Raises:
        PatchError: there is no patch.
        EvaluationError: the patch erases no such concept.
    """
    path = Path(patch).expanduser()
    file = path / WEIGHTS_NAME if path.is_dir() else path
    if not file.is_file():
        # It says what is missing, or that there is a pickle.
        Patch.load(path)
        raise PatchError(f"there is no patch at {path}")
    folder = file.parent
    weights, loaded = _check_weights(file)
    metadata = loaded.metadata if loaded is not None else None
    several = metadata is not None and metadata.by_concept
    asked = subject_of(loaded, concept).concept.text if loaded is not None and concept is not None else None
    if loaded is not None and several:
        chosen = concepts_of(loaded) if asked is None else (asked,)
        records = [Record.read(folder_of(loaded, folder, one), folder, one) for one in chosen]
    else:
        records = [Record.read(folder, folder)]
    findings = [Finding("weights", *weights)]
    for record in records:
        findings += record.named([record.finding])
        if record.evidence is not None:
            told = faults(record.evidence)
            more = f"; and {len(told) - 3} more" if len(told) > 3 else ""
            about = Finding("counts", not told, "; ".join(told[:3]) + more or "agree with their intervals and dates")
            findings += record.named([about])
    stacked = metadata is not None and metadata.parts is not None
    findings.append(Finding("hash", *_check_hash(file, records, stacked=stacked)))
    if loaded is not None and metadata is not None:
        findings.append(Finding("header", *_check_header(loaded)))
        findings.append(Finding("records", *_check_records(folder, metadata, records)))
        if (kohya := folder / kohya_name(loaded)).is_file():
            findings.append(Finding("kohya file", *_check_kohya(kohya, loaded)))
    findings.append(Finding("card", *_check_card(folder / CARD_NAME, None if several else records[0].evidence)))
    findings.append(_not_looked_at(folder, loaded, records))
    return Integrity(tuple(findings), folder, loaded, tuple(records))


def _check_weights(file: Path) -> tuple[Told, Patch | None]:
    try:
        if not inside(file, file.parent) and file.name == WEIGHTS_NAME:
            return (False, f"{file.name} is a link that leads out of its folder"), None
        patch = Patch.load(file)
        if patch.metadata is None:
            told = "carries no record of its making: it is not recare-patch's, or its header was stripped"
            return (False, f"{file.name} {told}"), patch
        if patch.metadata.recipe is not None:
            # A recipe that cannot be read, in a sound header, has been altered.
            assert patch.metadata.parsed_recipe
    except RecarePatchError as fault:
        return (False, str(fault)), None
    size = file.stat().st_size
    told = f"{len(patch.modules)} modules, {patch.parameters:,} finite values, {size:,} bytes"
    return (True, told), patch


def _mapping_in(file: Path) -> dict[str, Any] | None:
    """What a stranger's file of JSON, or a stack's of YAML, holds; None where it is not readable."""
    try:
        text = read_text(file, file.name, PatchError, within=file.parent)
        if file.name == STACK_NAME:
            return dict(yaml_mapping(text, source=STACK_NAME, noun="stack", error=PatchError))
        found = load_json(text)
    except (ValueError, PatchError):
        return None
    return found if isinstance(found, dict) else None


def _check_hash(file: Path, records: Sequence[Record], *, stacked: bool) -> Told:
    """The weights' hash, as it is and as it was written down."""
    now = file_sha256(file)
    name, key = (STACK_NAME, "sha256") if stacked else (TRAINING_NAME, "patch_sha256")
    recorded: dict[str, str] = {}
    if (file.parent / name).exists():
        found = _mapping_in(file.parent / name)
        if found is None:
            return False, f"{name} is not readable as {'YAML' if stacked else 'JSON'}"
        if key not in found and not stacked:
            return False, f"{name} does not record the weights' SHA-256"
        recorded |= {name: str(found[key])} if key in found else {}
    recorded |= {one.name: one.evidence.patch_sha256 for one in records if one.evidence is not None}
    wrong = next((name for name, value in recorded.items() if value != now), None)
    if wrong is not None:
        return False, f"the weights have SHA-256 {now[:12]}…, and {wrong} records {recorded[wrong][:12]}…"
    if not recorded:
        told = f"neither {name} nor {EVIDENCE_NAME} records the weights' SHA-256, which is {now}"
        return None if stacked else False, told
    return True, f"{now[:12]}…, as recorded in {' and '.join(recorded)}"


def _check_records(folder: Path, metadata: PatchMetadata, records: Sequence[Record]) -> Told:
    """What lies beside the weights says what their header says."""
    wrong = []
    recipe, parts, words = (folder / name for name in ("recipe.yaml", STACK_NAME, "care_set.json"))
    if recipe.exists():
        try:
            same = read_bytes(recipe, recipe.name, PatchError, within=folder) == (metadata.recipe or "").encode()
        except PatchError:
            same = False
        if not same:
            wrong.append("recipe.yaml is not the recipe in the weights")
    if parts.is_file() and not _lists_parts(parts, metadata):
        wrong.append(f"{STACK_NAME} does not list the parts that the weights do")
    if words.is_file() and metadata.care_set is not None:
        try:
            same = _mapping_in(words) == load_json(metadata.care_set)
        except ValueError:
            same = False
        if not same:
            wrong.append("care_set.json is not the CARE-set in the weights")
    for record in records:
        if record.evidence is None:
            continue
        concept, kind = metadata.concept, metadata.kind
        if record.concept is not None:
            own = next((one.kind for one in metadata.erased if one.concept == record.concept), None)
            concept, kind = record.concept, own or record.evidence.kind
        for what, header in (("concept", concept), ("kind", kind), ("method", metadata.method)):
            told = getattr(record.evidence, what)
            if told != header:
                wrong.append(f"{record.name} says {what} '{told}', the weights '{header}'")
    held = "parts" if metadata.parts else "recipe, CARE-set"
    return not wrong, "; ".join(wrong) or f"{held} and evidence agree with the weights' header"


def _lists_parts(file: Path, metadata: PatchMetadata) -> bool:
    try:
        told = (_mapping_in(file) or {}).get("parts")
        return tuple(PatchPart(**one) for one in told or ()) == (metadata.parts or ())
    except (ValueError, TypeError, PatchError):
        return False


def _check_header(patch: Patch) -> Told:
    """What the weights' header says of them is what its recipe and the tensors say."""
    try:
        wrong = header_faults(patch)
    except RecarePatchError as fault:
        return False, str(fault)
    held = "parts" if patch.metadata is not None and patch.metadata.parts else "recipe"
    return not wrong, "; ".join(wrong[:5]) or f"says what its {held} and the tensors say"


def _check_kohya(file: Path, patch: Patch) -> Told:
    """The file for other tools makes the same update, and says the same of itself."""
    try:
        if not inside(file, file.parent):
            return False, f"{file.name} is a link that leads out of its folder"
        other = from_any(file)
        apart, where = update_difference(patch, other)
    except RecarePatchError as fault:
        return False, str(fault)
    if other.format != "kohya":
        return False, f"{file.name} has the shape of {other.format}, and not kohya's"
    # Each factor is rounded once; a file in another precision than the patch's has its own rounding.
    allowed = 1e-6 if other.dtype == patch.dtype else 4 * max(torch.finfo(one.dtype).eps for one in (patch, other))
    if not apart <= allowed:
        return False, f"{file.name} makes another update than the patch: ‖Δ − Δ′‖ is {apart:.2g} of ‖Δ‖ in '{where}'"
    if other.metadata != patch.metadata:
        return False, f"{file.name} says other things of itself than the patch"
    return True, f"{file.name} makes the patch's update, to {apart:.1g} of it"


def _not_looked_at(folder: Path, patch: Patch | None, records: Sequence[Record]) -> Finding:
    """What nobody can check, or nobody did: every other file, and words that stand beside the figures."""
    claims = [name for name in (PREVIEW_NAME, REPORT_NAME) if (folder / name).exists()]
    if (folder / TRAINING_NAME).exists():
        claims.append(f"the costs in {TRAINING_NAME}")
    if (folder / CARD_NAME).exists():
        claims.append(f"the words in {CARD_NAME}")
    for record in records:
        one = record.evidence
        if one is not None and (one.cost or one.versions or any(figure.note for figure in one.figures)):
            claims.append(f"cost, versions and notes in {record.name}")
    known = {*all_names(patch), STACK_NAME, RECORD_NAME} if patch is not None and patch.metadata is not None else set()
    tops = {name.split("/")[0] for name in known} | {"attacks"}
    others = sorted(one.name for one in islice(folder.iterdir(), 1000) if one.name not in tops) if known else []
    told = [*claims, *others[:10], *([f"{len(others) - 10} other files"] if len(others) > 10 else [])]
    return Finding("not looked at", None, ", ".join(told) or "nothing", tuple(claims))


def _check_card(card: Path, evidence: Evidence | None) -> Told:
    """The card's figures are the evidence's, no better and no worse."""
    if not card.exists():
        return None, f"there is no {CARD_NAME}"
    try:
        index, section = claimed_figures(read_text(card, CARD_NAME, EvidenceError, within=card.parent))
    except EvidenceError as fault:
        return False, str(fault)
    if index is None and section is None:
        return None, "claims no figures"
    if evidence is None:
        return False, f"claims figures, and no readable {EVIDENCE_NAME} bears them out"
    wrong = _index_faults(index, evidence) if index is not None else []
    if section is not None and section != evidence_section(evidence):
        wrong.append(f"its part on evidence is not the one that {EVIDENCE_NAME} gives")
    return not wrong, "; ".join(wrong) or f"claims the figures of {EVIDENCE_NAME}"


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
        f"claims {claimed.get(name, 'nothing')} for '{name}', and {EVIDENCE_NAME} says {value}"
        for name, value in {**dict.fromkeys(claimed, "nothing"), **metrics}.items()
        if claimed.get(name) != metrics.get(name)
    ]
    return faults or [f"its model-index is not the one that {EVIDENCE_NAME} gives"]


def check_attacks(record: Record) -> list[Finding]:
    """Attacks are recorded as they were saved, where what was saved is here.

    Not a part of :func:`check_integrity`: they may lie beside the patch's folder.
    """
    findings = []
    for one in record.evidence.attacks if record.evidence is not None else ():
        place = saved_attack(record, one)
        if place is None or record.evidence is None:
            continue
        try:
            about, saved = load_about(place), load_attack(place)
        except RecarePatchError as fault:
            findings.append(Finding(attack_title(one), False, str(fault)))
            continue
        wrong = [
            f"{what} {getattr(one, what)}, and {one.folder} says {getattr(saved, what)}"
            for what in ("attack", "successes", "trials", "without")
            if getattr(one, what) != getattr(saved, what)
        ]
        if about.get("patch_sha256") != record.evidence.patch_sha256:
            wrong.append(f"{one.folder} was run against another patch")
        # Judged by another word, nothing ever comes back.
        label, own = str(about.get("label", "")), (str(record.evidence.suite.get("label", "")), record.evidence.concept)
        if label and own[0] and not any(same_concept(label, word) for word in own):
            wrong.append(f"{one.folder} was judged by '{label}', and the figures by '{own[0]}'")
        if not same_concept(str(about.get("concept", record.evidence.concept)), record.evidence.concept):
            wrong.append(f"{one.folder} was after '{about['concept']}'")
        told = "; ".join(wrong) or f"as saved in {one.folder}"
        findings.append(Finding(attack_title(one), not wrong, told))
    return findings


def attack_title(attack: AttackFigure) -> str:
    """What findings call an attack."""
    return f"attack '{attack.attack}{f', {attack.preset}' if attack.preset else ''}'"


def saved_attack(record: Record, attack: AttackFigure) -> Path | None:
    """The folder of a saved attack, if it is here: in the patch's folder, or in the one of attacks beside it."""
    if attack.folder is None or attack.folder != printable(attack.folder):
        return None
    place, root = record.folder / attack.folder, record.folder
    if record.concept is not None:
        # Of several concepts, evidence lies a folder deeper.
        root = root.parent
    root = root.resolve()
    if not any(inside(place, one) for one in (root, root.with_name(f"{root.name}-attacks"))):
        return None
    return place if place.is_dir() else None
