"""The figures of a patch on its card: nothing but what ``evidence.json`` says."""

from __future__ import annotations

import re
from typing import Any

from recare_patch.core import EvidenceError
from recare_patch.measure.evidence import RATE, Check, Evidence, Figure, show_value
from recare_patch.patch import MEASURED, UNMEASURED, join_card, plain, split_card
from recare_patch.recipe import Concept

EVIDENCE_START = "<!-- recare-patch: evidence, from evidence.json -->"
EVIDENCE_END = "<!-- recare-patch: end of evidence -->"
"""The marks around the part of a card that is made from ``evidence.json``."""


_SECTION = re.compile(rf"{re.escape(EVIDENCE_START)}.*?{re.escape(EVIDENCE_END)}\n*", re.DOTALL)
_FOLLOWING = re.compile(r"^## (?:Use it|Limits)[ \t]*$", re.MULTILINE)
_SCALES = "scales"


def model_index(evidence: Evidence) -> dict[str, Any]:
    """The figures of a patch as one entry of the Hub's ``model-index``.

    Args:
        evidence: what was measured.

    Returns:
        ``name`` and ``results``: one result, its task text-to-image, its dataset the suite, a metric
        for each figure and each attack. Values are those of the patched model.
    """
    suite = str(evidence.suite.get("name") or evidence.base)
    metrics: list[dict[str, Any]] = [
        {"type": _metric_type(one.metric), "name": one.name, "value": one.patched} for one in evidence.figures
    ]
    metrics += [
        {
            "type": "attack-success-rate",
            "name": f"{one.attack}, {one.preset}" if one.preset else one.attack,
            "value": round(one.rate, 6),
        }
        for one in evidence.attacks
    ]
    slug = Concept(text=evidence.concept, kind=evidence.kind).slug
    return {
        "name": f"{slug} erased from {evidence.base.rsplit('/', 1)[-1]}",
        "results": [
            {
                "task": {"type": "text-to-image", "name": "Text-to-Image"},
                "dataset": {"type": suite, "name": suite},
                "metrics": metrics,
            }
        ],
    }


def _metric_type(metric: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", metric.casefold()).strip("-") or "score"


def worst_erased(evidence: Evidence) -> Figure | None:
    """Of the rates that the patch should bring down, the highest under it."""
    found = [one for one in evidence.in_group("erased") if one.unit == RATE and one.better == "lower"]
    return max(found, key=lambda one: one.patched, default=None)


def worst_kept(evidence: Evidence) -> Figure | None:
    """Of the rates that the patch should leave alone, the one that lost most against the base."""
    kept = [
        (one.patched - one.base, one)
        for one in evidence.in_group("care", "kept")
        if one.unit == RATE and one.better == "higher" and one.base is not None
    ]
    return min(kept, key=lambda pair: pair[0], default=(0.0, None))[1]


def evidence_section(evidence: Evidence) -> str:
    """The part of a card that shows the figures: Markdown between two marks."""
    head = "| figure | base | patched | 95 % interval | pictures | judged by |\n|---|---:|---:|---:|---:|---|"
    rows = [
        f"| {plain(one.name)} | {one.show(one.base)} | {one.show(one.patched)} | "
        f"{one.show_interval(one.interval) or '–'} | {one.pictures:,} | {plain(one.detector or one.metric)} |"
        for one in evidence.figures
    ]
    lines = [
        "## Evidence",
        "",
        *_in_short(evidence),
        f"Measured on {evidence.created[:10]} with the suite "
        f"{plain(str(evidence.suite.get('name') or 'of its own'))}, the same prompts and seeds for the base "
        f"and for the patched model. The weights measured have SHA-256 `{evidence.patch_sha256}`.",
        "",
    ]
    lines += [head, *rows, ""] if rows else ["No figure was measured.", ""]
    if evidence.attacks:
        lines += [
            "| attack | came back | 95 % interval | without it | evaluations |",
            "|---|---:|---:|---:|---:|",
            *(
                f"| {plain(one.attack)}{f', {plain(one.preset)}' if one.preset else ''} | "
                f"{one.successes} of {one.trials} | {one.show_interval()} | "
                f"{one.without} of {one.trials} | {one.evaluations:,} |"
                for one in evidence.attacks
            ),
            "",
        ]
    for check in evidence.checks:
        if check.name == _SCALES:
            lines += _scales(check)
    others = [plain(one.title) for one in evidence.checks if one.name != _SCALES]
    if others:
        lines += [f"Also measured, with curves in the report: {', '.join(others)}.", ""]
    lines += ["Measure it again:", "", "```bash", "recare-patch verify FOLDER", "```"]
    return "\n".join([EVIDENCE_START, *lines, EVIDENCE_END]) + "\n"


def _in_short(evidence: Evidence) -> list[str]:
    """What is gone and what was lost along with it, each by its worst rate."""
    told = []
    gone, lost = worst_erased(evidence), worst_kept(evidence)
    if gone is not None:
        base = f", against {gone.show(gone.base)} of the base's" if gone.base is not None else ""
        told.append(
            f"**Erased:** {plain(evidence.concept)} shows in {gone.show(gone.patched)} of the pictures"
            f"{base} ({plain(gone.name)}: the highest of its rates)."
        )
    if lost is not None and lost.base is not None:
        rates = f"{lost.show(lost.patched)} of the pictures, against {lost.show(lost.base)} of the base's"
        if lost.patched >= lost.base:
            told.append(
                f"**Kept:** nothing that should stay was lost; {plain(lost.name)} gained least: {rates}."
            )
        else:
            chance = "; the intervals meet, so this may be chance" if _meet(lost) else ""
            told.append(f"**Kept:** of all that should stay, {plain(lost.name)} lost most: {rates}{chance}.")
    # Two spaces at a line's end make Markdown break it there.
    return ["  \n".join(told), ""] if told else []


def _meet(figure: Figure) -> bool:
    """Whether the intervals of base and patched model have a value in common."""
    before, after = figure.base_interval, figure.interval
    return before is not None and after is not None and after[1] >= before[0] and before[1] >= after[0]


def _scales(check: Check) -> list[str]:
    """How the patch behaves at other strengths, as a table."""
    head = ["scale", *map(plain, check.series)]
    rows = [
        [plain(str(point.x)) if isinstance(point.x, str) else f"{point.x:g}"]
        + [show_value(point.values.get(name), check.unit) for name in check.series]
        for point in check.points
    ]
    table = [f"| {' | '.join(cells)} |" for cells in (head, ["---:"] * len(head), *rows)]
    return [f"### {plain(check.title)}", "", *table, ""]


# ---------------------------------------------------------------------- in a card


def claimed_figures(card: str) -> tuple[Any, str | None]:
    """What a card says was measured.

    Args:
        card: the whole text.

    Returns:
        Its ``model-index`` as it stands there, None where there is none; and the part between the
        marks of :func:`evidence_section`, None where there is none.

    Raises:
        EvidenceError: the front matter is not a YAML mapping, or the part has no end or is there twice.
    """
    front, body = split_card(card)
    sections = _sections(body)
    return front.get("model-index"), f"{sections[0].rstrip()}\n" if sections else None


def _sections(body: str) -> list[str]:
    marks = body.count(EVIDENCE_START), body.count(EVIDENCE_END)
    # Counted first: looking for the end of each of many starts would take time by their square.
    found = _SECTION.findall(body) if marks == (1, 1) else []
    if marks != (len(found), len(found)):
        raise EvidenceError(
            "the card's part on evidence must stand once between its two marks, "
            f"'{EVIDENCE_START}' and '{EVIDENCE_END}'"
        )
    return found


def with_evidence(card: str, evidence: Evidence) -> str:
    """A card with the figures in its front matter and in its body; what it said of them before goes.

    Applied twice, it gives the same text as once. Everything else stays as it is, but comments in the
    front matter are lost.

    Args:
        card: the whole text of a card, this package's or another's.
        evidence: what was measured.

    Raises:
        EvidenceError: the front matter is not a YAML mapping, or the marks of the part are broken.
    """
    front, body = split_card(card)
    sections = _sections(body)
    front = {key: value for key, value in front.items() if key != "model-index"}
    front["model-index"] = [model_index(evidence)]
    section = evidence_section(evidence)
    following = _FOLLOWING.search(body)
    if sections:
        body = _SECTION.sub(lambda _: f"{section}\n", body)
    elif following:
        body = f"{body[: following.start()]}{section}\n{body[following.start() :]}"
    else:
        body = f"{body.rstrip()}\n\n{section}" if body.strip() else f"\n{section}"
    if evidence.checks:
        body = body.replace(UNMEASURED, MEASURED)
    return join_card(front, body)
