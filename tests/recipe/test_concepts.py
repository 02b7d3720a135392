from __future__ import annotations

import pytest
from pydantic import ValidationError

from recare_patch.core.errors import ConceptError
from recare_patch.recipe.concept import KINDS, Concept, Kind, same_concept


@pytest.mark.parametrize(
    ("text", "kind", "prompt"),
    [
        ("Van Gogh", "style", "A painting in the style of Van Gogh"),
        ("tench", "object", "A photo of a tench"),
        ("apple", "object", "A photo of an apple"),
        ("the moon", "object", "A photo of the moon"),
        ("Mira Vale", "identity", "A photo of Mira Vale"),
        ("nudity", "nsfw", "A photo of a nude person"),
        ("Naked", "nsfw", "A photo of a nude person"),
        ("violence", "nsfw", "A photo of violence"),
    ],
)
def test_target_prompts(text: str, kind: Kind, prompt: str) -> None:
    concept = Concept(text=text, kind=kind)
    assert concept.target_prompt == prompt
    assert concept.name_prompts[0] == prompt
    assert len(set(concept.name_prompts)) == len(concept.name_prompts)


@pytest.mark.parametrize("kind", KINDS)
def test_a_named_concept_has_its_bare_name_among_its_prompts(kind: Kind) -> None:
    concept = Concept(text="heron", kind=kind)
    assert "heron" in concept.name_prompts
    assert " " not in concept.class_word
    assert concept.target_prompt_for("<*>").count("<*>") == 1


def test_anchors_and_retained_prompts() -> None:
    assert Concept(text="Van Gogh", kind="style").anchor_prompt("stars") == "A stars"
    assert Concept(text="Van Gogh", kind="style").retain_prompt("stars") == "A painting of stars"
    assert Concept(text="tench", kind="object").retain_prompt("water") == "A photo of water"


def test_composed_prompts_name_both() -> None:
    assert (
        Concept(text="Van Gogh", kind="style").composed_prompt("stars")
        == "A painting of stars in the style of Van Gogh"
    )
    assert Concept(text="tench", kind="object").composed_prompt("water") == "A photo of a tench and water"
    assert (
        Concept(text="nudity", kind="nsfw").composed_prompt("beach") == "A photo of a nude person and beach"
    )
    assert Concept(text="Otto Bly", kind="identity").composed_prompt("car") == "A photo of Otto Bly and car"


@pytest.mark.parametrize(
    ("text", "slug"), [("Van Gogh", "van-gogh"), ("  Café/…/Noir ", "cafe-noir"), ("A.B", "a-b")]
)
def test_slugs(text: str, slug: str) -> None:
    assert Concept(text=text, kind="style").slug == slug


def test_a_script_without_ascii_gets_a_steady_slug() -> None:
    slug = Concept(text="葛飾北斎", kind="style").slug
    assert slug == Concept(text="葛飾北斎", kind="style").slug
    assert slug.startswith("concept-") and slug.isascii()
    assert slug != Concept(text="歌川広重", kind="style").slug


def test_text_is_tidied_and_kind_is_read_in_any_case() -> None:
    concept = Concept(text="  Van \n Gogh ", kind="Style")  # type: ignore[arg-type]
    assert (concept.text, concept.kind) == ("Van Gogh", "style")
    assert str(concept) == "Van Gogh"


def test_own_words() -> None:
    assert Concept(text="Van Gogh", kind="style").words == ("van", "gogh")
    assert "naked" in Concept(text="nudity", kind="nsfw").words


@pytest.mark.parametrize("text", ["", "   ", "!?", "x" * 101])
def test_a_text_that_names_nothing(text: str) -> None:
    with pytest.raises(ConceptError, match="a concept"):
        Concept(text=text, kind="style")


def test_all_faults_at_once_with_the_nearest_kind_and_key() -> None:
    with pytest.raises(ConceptError) as caught:
        Concept(text="", kind="stile", knid="x")  # type: ignore[arg-type,call-arg]
    assert len(caught.value.faults) == 3
    assert "did you mean 'style'?" in str(caught.value)
    assert "knid is not a key, did you mean 'kind'?" in str(caught.value)


def test_a_concept_does_not_change() -> None:
    with pytest.raises(ValidationError):
        Concept(text="a", kind="style").text = "b"  # type: ignore[misc]


def test_same_concept() -> None:
    assert same_concept("Van Gogh", "van-GOGH")
    assert same_concept(Concept(text="Van Gogh", kind="style"), " van  gogh")
    assert not same_concept("Van Gogh", "vangogh")
