"""Figures on a card: those of the evidence, once, and in a form that the Hub reads."""

from __future__ import annotations

import pytest

from recare_patch.core import EvidenceError
from recare_patch.measure.card import (
    EVIDENCE_END,
    EVIDENCE_START,
    claimed_figures,
    evidence_section,
    model_index,
    with_evidence,
)
from recare_patch.measure.evidence import Check, CheckPoint
from recare_patch.patch import MEASURED, UNMEASURED, card_text
from tests.measure.test_evidence import make_evidence, make_figure
from tests.patch.test_card import TRAINING, front_of, metadata


def test_the_model_index_is_what_the_hub_reads() -> None:
    from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results

    index = [model_index(make_evidence())]
    name, results = model_index_to_eval_results(index)
    assert name == "van-gogh erased from atelier"
    assert [(one.metric_type, one.metric_name, one.metric_value) for one in results] == [
        ("concept-rate", "concept, plain prompts", 0.02),
        ("care-score", "CARE score, stars", 0.95),
        ("kid", "KID to the base", 0.0031),
        ("attack-success-rate", "concept-inversion, small", 0.075),
    ]
    assert eval_results_to_model_index(name, results) == index


def test_evidence_goes_into_a_card_once() -> None:
    named = zip(make_evidence().checks, ("scales", "fine-tuning"), strict=True)
    scales, tuned = (check.model_copy(update={"name": name}) for check, name in named)
    evidence = make_evidence(checks=(scales, tuned))
    before = card_text(metadata(), TRAINING)
    card = with_evidence(before, evidence)
    assert with_evidence(card, evidence) == card
    front, old = front_of(card), front_of(before)
    assert front.pop("model-index") == [model_index(evidence)]
    assert front == old
    # The part stands before the limits, and nothing else of the body changes but the line on them.
    start, end = card.index(EVIDENCE_START), card.index(EVIDENCE_END)
    assert start < end < card.index("## Limits")
    rest = card[:start] + card[end + len(EVIDENCE_END) :].lstrip("\n")
    kept = rest.split("---\n", 2)[2].replace(MEASURED, UNMEASURED)
    assert kept == before.split("---\n", 2)[2].rstrip("\n") + "\n"
    assert "nothing was measured" not in card
    # It says "measured" of no more than was.
    for checks, words in (((scales,), "on fine-tunes of it, nothing was"), ((make_evidence().checks), UNMEASURED)):
        assert words in with_evidence(card, make_evidence(checks=checks))
    assert claimed_figures(card) == ([model_index(evidence)], evidence_section(evidence))
    # A second measurement takes the first one's place.
    again = make_evidence(figures=(make_figure(patched=0.03),), attacks=(), checks=())
    replaced = with_evidence(card, again)
    assert replaced.count(EVIDENCE_START) == 1
    assert "concept-inversion" not in replaced
    assert front_of(replaced)["model-index"] == [model_index(again)]


SECTION = """\
<!-- recare-patch: evidence, from evidence.json -->
## Evidence

**Erased:** Van Gogh shows in 2.0 % of the pictures, against 90.0 % of the base's (concept, plain prompts: \
the highest of its rates).\x20\x20
**Kept:** of all that should stay, CARE score, stars lost most: 50.0 % of the pictures, against 97.0 % of \
the base's.

Measured on 2026-01-31 with the suite van-gogh-atelier, the same prompts and seeds for the base and for the \
patched model. The weights measured have SHA-256 `{sha256}`.

| figure | base | patched | 95 % interval | pictures | judged by |
|---|---:|---:|---:|---:|---|
| concept, plain prompts | 90.0 % | 2.0 % | 0.8–5.0 % | 200 | atelier-judge |
| CARE score, stars | 97.0 % | 50.0 % | 40.0–60.0 % | 200 | atelier-judge |

| attack | came back | 95 % interval | without it | evaluations |
|---|---:|---:|---:|---:|
| concept-inversion, small | 3 of 40 | 2.6–19.9 % | 1 of 40 | 12,000 |

### At other \\| scales

| scale | Van Gogh | stars |
| ---: | ---: | ---: |
| -1 | 100.0 % | – |
| 0.5 | 25.0 % | – |

Also measured, with curves in the report: In other spellings.

Measure it again:

```bash
recare-patch verify FOLDER
```
<!-- recare-patch: end of evidence -->
"""


def test_the_part_on_evidence_stays_to_the_byte() -> None:
    """Cards that were published are held against it."""
    points = (CheckPoint(x=-1, values={"Van Gogh": 1.0}), CheckPoint(x=0.5, values={"Van Gogh": 0.25, "stars": None}))
    scales = Check(name="scales", title="At other | scales", points=points)
    kept = make_figure(
        name="CARE score, stars", group="care", better="higher", base=0.97, patched=0.5,
        base_interval=(0.93, 0.99), interval=(0.4, 0.6),
    )  # fmt: skip
    evidence = make_evidence(figures=(make_figure(), kept), checks=(scales, make_evidence().checks[1]))
    assert evidence_section(evidence) == SECTION.replace("{sha256}", evidence.patch_sha256)
    assert "may be chance" in evidence_section(make_evidence())
    gained = kept.model_copy(update={"patched": 0.99, "interval": (0.95, 1.0)})
    assert "nothing that should stay was lost" in evidence_section(make_evidence(figures=(gained,)))
    nothing = evidence_section(make_evidence(figures=(), attacks=(), checks=()))
    assert "**Erased" not in nothing and "No figure was measured.\n\nMeasure it again" in nothing


OTHERS = ["", "# A title\n\nMy words.", "---\nlicense: mit\n---\n", "---\n---\nMy words."]


@pytest.mark.parametrize("card", [*OTHERS, "\ufeff---\r\na: b\r\n---\r\nMy words.\r\n"])
def test_other_cards_take_evidence_too(card: str) -> None:
    evidence = make_evidence()
    made = with_evidence(card, evidence)
    assert with_evidence(made, evidence) == made
    assert front_of(made)["model-index"] == [model_index(evidence)]
    assert ("My words." in made) == ("My words." in card)
    assert claimed_figures(card) == (None, None)


MARKS = [f"{EVIDENCE_END}\n{EVIDENCE_START}", f"{EVIDENCE_START}\n{EVIDENCE_END}\n" * 2]


@pytest.mark.parametrize("card", ["---\na: [\n---\n", "---\n- a\n---\n", EVIDENCE_START, EVIDENCE_END, *MARKS])
def test_broken_cards_are_left_alone(card: str) -> None:
    with pytest.raises(EvidenceError, match="the card's"):
        with_evidence(card, make_evidence())


def test_names_in_evidence_are_shown_as_text() -> None:
    nasty = "a|b <script> [d](e) `c` <!-- recare-patch: end of evidence --> {{ evidence }}"
    evidence = make_evidence(figures=(make_figure(name=nasty, detector=nasty),))
    card = with_evidence("", evidence)
    assert with_evidence(card, evidence) == card
    section = evidence_section(evidence)
    assert "<script>" not in section and "[d](e)" not in section and section.count("<!--") == 2
    (index,) = front_of(card)["model-index"]
    assert index["results"][0]["metrics"][0]["name"] == nasty
