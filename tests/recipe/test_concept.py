from __future__ import annotations

import re
from typing import Any

import pytest
from pydantic import ValidationError

from recare_patch.core import ConceptError
from recare_patch.recipe import KINDS, Concept, Kind, names_concept, same_concept, slug_of


@pytest.mark.parametrize(
    ("text", "kind", "prompt", "composed"),
    [
        ("Van Gogh", "style", "A painting in the style of Van Gogh", "A painting of sea in the style of X"),
        ("tench", "object", "A photo of a tench", "A photo of a tench and sea"),
        ("apple", "object", "A photo of an apple", "A photo of an apple and sea"),
        ("the moon", "object", "A photo of the moon", "A photo of the moon and sea"),
        ("Mira Vale", "identity", "A photo of Mira Vale", "A photo of Mira Vale and sea"),
        ("nudity", "nsfw", "A photo of a nude person", "A photo of a nude person and sea"),
        ("Naked", "nsfw", "A photo of a nude person", "A photo of a nude person and sea"),
        ("violence", "nsfw", "A photo of violence", "A photo of a violence and sea"),
    ],
)
def test_prompts(text: str, kind: Kind, prompt: str, composed: str) -> None:
    concept = Concept(text=text, kind=kind)
    assert concept.target_prompt == concept.name_prompts[0] == prompt
    assert len(set(concept.name_prompts)) == len(concept.name_prompts)
    assert concept.composed_prompt("sea") == composed.replace("X", text)
    assert concept.anchor_prompt("sea") == "A sea"
    assert concept.retain_prompt("sea") == ("A painting of sea" if kind == "style" else "A photo of sea")


@pytest.mark.parametrize("kind", KINDS)
def test_a_name_stands_first_and_last_beside_other_words(kind: Kind) -> None:
    concept = Concept(text="heron", kind=kind)
    prompts = [concept.composed_prompt("sea", form) for form in range(concept.composed_forms)]
    assert all(re.findall(r"heron|sea", one) in (["heron", "sea"], ["sea", "heron"]) for one in prompts)
    assert {one.index("heron") < one.index("sea") for one in prompts} == {True, False}
    anchors = [concept.composed_anchor("sea", form) for form in range(concept.composed_forms)]
    assert concept.without_name("sea") == concept.retain_prompt("sea")
    assert concept.without_name("sea", 2) == "A painting of sea"
    assert anchors[0] == concept.anchor_prompt("sea") and not [one for one in anchors if "heron" in one]


@pytest.mark.parametrize("kind", KINDS)
def test_a_named_concept_has_its_bare_name_among_its_prompts(kind: Kind) -> None:
    concept = Concept(text="heron", kind=kind)
    assert "heron" in concept.name_prompts and " " not in concept.class_word
    assert concept.target_prompt_for("<*>").count("<*>") == 1


def test_names_of_files() -> None:
    told = {
        "Van Gogh": "van-gogh",
        "  Café/…/Noir ": "cafe-noir",
        "Dvořák": "dvorak",
        "C++": "c-plus-plus",
        "C#": "c-sharp",
        "C": "c",
        "葛飾北斎": "葛飾北斎",
        "がく": "がく",
        "かく": "かく",
        "Владимир Маяковский": "владимир-маяковский",
        "Van Gogh + tench": "van-gogh-tench",
        "Wham": "wham",
    }
    assert {text: slug_of(text) for text in told} == told
    # What cannot be read off a name, is reserved, or does not fit has a hash at its end, the same on every machine.
    long = [f"{'葛' * 99}{last}" for last in "上下"] + [" + ".join(f"artist {k}" for k in range(n)) for n in (99, 100)]
    hashed = ["Wham!", "Wham?", "♥️", "♠", "con", "LPT1", *long]
    slugs = [slug_of(text) for text in hashed]
    assert all(re.fullmatch(r"[\w-]+-[0-9a-f]{8}", slug) and len(slug.encode()) <= 100 for slug in slugs)
    assert len({slug.casefold() for slug in (*slugs, *told.values())}) == len(slugs) + len(told)
    assert slug_of("con") == slug_of("CON") and all(slug_of(slug) == slug for slug in slugs)


def test_text_is_tidied_and_kind_is_read_in_any_case() -> None:
    given: Any = {"text": "  Van \n Gogh ", "kind": "Style"}
    concept = Concept(**given)
    assert (concept.text, concept.kind, str(concept)) == ("Van Gogh", "style", "Van Gogh")
    with pytest.raises(ValidationError):
        concept.text = "b"  # type: ignore[misc]


def test_own_words_and_other_spellings() -> None:
    concept = Concept(text="Van Gogh", kind="style")
    assert concept.words == ("van", "gogh")
    assert "naked" in Concept(text="nudity", kind="nsfw").words
    assert same_concept("Van Gogh", "van-GOGH") and same_concept(concept, " van  gogh")
    assert not same_concept("Van Gogh", "vangogh")


def test_other_names() -> None:
    concept = Concept(text="Van Gogh", kind="style", aliases=("Vincent", "Van Gogh"))
    # Its own name again adds nothing.
    assert concept.name_prompts == (
        *Concept(text="Van Gogh", kind="style").name_prompts,
        "A painting in the style of Vincent",
    )
    assert names_concept("vincent", concept) and not names_concept("vincent", Concept(text="Van Gogh", kind="style"))
    with pytest.raises(ConceptError, match="at least one letter"):
        Concept(text="Van Gogh", kind="style", aliases=("",))


@pytest.mark.parametrize("text", ["", "   ", "!?", "x" * 101])
def test_a_text_that_names_nothing(text: str) -> None:
    with pytest.raises(ConceptError, match="a concept"):
        Concept(text=text, kind="style")


def test_all_faults_at_once_with_the_nearest_kind_and_key() -> None:
    given: Any = {"text": "", "kind": "stile", "knid": "x"}
    with pytest.raises(ConceptError) as caught:
        Concept(**given)
    assert len(caught.value.faults) == 3
    assert "did you mean 'style'?" in str(caught.value)
    assert "knid is not a key, did you mean 'kind'?" in str(caught.value)
