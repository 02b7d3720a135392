"""The figures of a patch on its card: nothing but what ``evidence.json`` says."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from recare_patch.core import EvidenceError
from recare_patch.measure.evidence import Evidence, intervals_meet, show_value, worst_erased, worst_kept
from recare_patch.patch import MEASURED, UNMEASURED, join_card, split_card, template
from recare_patch.recipe import Concept

EVIDENCE_START = "<!-- recare-patch: evidence, from evidence.json -->"
EVIDENCE_END = "<!-- recare-patch: end of evidence -->"
"""The marks around the part of a card that is made from ``evidence.json``."""

_AWAY = {"scales": "at scales other than 1", "fine-tuning": "on fine-tunes of it"}
"""What a card's limits say nothing was measured of → the check that does."""

_SECTION = re.compile(rf"{re.escape(EVIDENCE_START)}.*?{re.escape(EVIDENCE_END)}\n*", re.DOTALL)
_FOLLOWING = re.compile(r"^## (?:Use it|Limits)[ \t]*$", re.MULTILINE)


def model_index(evidence: Evidence) -> dict[str, Any]:
    """The figures of the patched model, and each attack, as one entry of the Hub's ``model-index``."""
    suite = str(evidence.suite.get("name") or evidence.base)
    metrics: list[dict[str, Any]] = [
        {
            "type": re.sub(r"[^a-z0-9]+", "-", one.metric.casefold()).strip("-") or "score",
            "name": one.name,
            "value": one.patched,
        }
        for one in evidence.figures
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
    # Not by the Hub client's EvalResult: without metrics it leaves the result out, and cards have it.
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


def evidence_section(evidence: Evidence) -> str:
    """The part of a card that shows the figures: Markdown between two marks.

    Cards that were written before are held against it to the byte.
    """
    lost = worst_kept(evidence)
    text = template("evidence_template.md").render(
        evidence=evidence,
        gone=worst_erased(evidence),
        lost=lost,
        by_chance=lost is not None and lost.patched < (lost.base or 0) and intervals_meet(lost),
        others=[one.title for one in evidence.checks if one.name != "scales"],
        show_value=show_value,
    )
    return f"{EVIDENCE_START}\n{text}{EVIDENCE_END}\n"


def claimed_figures(card: str) -> tuple[Any, str | None]:
    """What a card says was measured: its ``model-index`` as it stands there, and its part on evidence.

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


def _away(checks: Collection[str]) -> str:
    """The line of a card's limits that tells which of what lies away from base and scale was measured."""
    told, left = ([words for name, words in _AWAY.items() if (name in checks) == known] for known in (True, False))
    if not told or not left:
        return MEASURED if told else UNMEASURED
    start = UNMEASURED.partition(". ")[0]
    return f"{start}. What was measured {told[0]} is told under Evidence; {left[0]}, nothing was measured."


def with_evidence(card: str, evidence: Evidence) -> str:
    """A card, this package's or another's, with the figures in its header and its body in place of old ones.

    Applied twice, it gives the same text as once. Everything else stays as it is, but comments in the
    front matter are lost.

    Raises:
        EvidenceError: the front matter is not a YAML mapping, or the marks of the part are broken.
    """
    front, body = split_card(card)
    section, following = evidence_section(evidence), _FOLLOWING.search(body)
    if _sections(body):
        body = _SECTION.sub(lambda _: f"{section}\n", body)
    elif following:
        body = f"{body[: following.start()]}{section}\n{body[following.start() :]}"
    else:
        body = f"{body.rstrip()}\n\n{section}" if body.strip() else f"\n{section}"
    for line in {_away(()), _away(_AWAY), *map(_away, ((name,) for name in _AWAY))}:
        body = body.replace(line, _away({one.name for one in evidence.checks}))
    front.pop("model-index", None)
    return join_card({**front, "model-index": [model_index(evidence)]}, body)
