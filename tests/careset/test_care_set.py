"""The CARE-set as a document: edited by hand, and read from anywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recare_patch.careset import CareSet, CareToken
from recare_patch.core import CareSetError
from recare_patch.recipe import Concept, names_concept

VAN_GOGH = Concept(text="Van Gogh", kind="style")


@pytest.fixture
def care_set() -> CareSet:
    mined = {"stars": 30, "night": 22, "vale": 20, "wheat": 11}
    tokens = tuple(
        CareToken(text=text, count=count, cluster=1, residual=0.8, kept=text != "vale", reason="why")
        for text, count in mined.items()
    )
    return CareSet(concept=VAN_GOGH, clip="atelier", seed=3, images=48, tokens=tokens, dropped={"a function word": 4})


def test_words_and_prompts(care_set: CareSet) -> None:
    assert care_set.words == ("stars", "night", "wheat")
    assert care_set.anchors() == ("A stars", "A night", "A wheat")
    assert care_set.retain_prompts()[0] == "A painting of stars"
    assert CareSet.of_words(VAN_GOGH, ["stars", "night"]).words == ("stars", "night")


def test_written_and_read_again(care_set: CareSet, tmp_path: Path) -> None:
    path = tmp_path / "care_set.json"
    care_set.save(path)
    assert CareSet.load(path) == care_set
    assert CareSet.from_json(care_set.to_json().encode("utf-8-sig")) == care_set


def test_added_words_are_guarded(care_set: CareSet) -> None:
    more = care_set.with_added(["vale", " wheat  field ", "Stars"])
    assert more.words == ("stars", "night", "vale", "wheat", "wheat field")
    assert {t.text: t.reason for t in more.tokens}["vale"] == "added by hand"
    assert care_set.words == ("stars", "night", "wheat")
    assert care_set.with_added("cypress").words[-1] == "cypress"


@pytest.mark.parametrize("word", ["Gogh", "van gogh", "VanGogh", "vans", "", "   ", "\x00", "…", "x" * 101])
def test_names_of_the_concept_and_no_words_cannot_be_added(care_set: CareSet, word: str) -> None:
    with pytest.raises(CareSetError, match=r"names the concept|a word (has|is)") as caught:
        care_set.with_added([word])
    assert "\n" not in str(caught.value)


def test_removed_words_stay_listed(care_set: CareSet) -> None:
    fewer = care_set.with_removed(["Night"])
    assert fewer.words == ("stars", "wheat")
    assert [t.reason for t in fewer.tokens if t.text == "night"] == ["removed by hand"]
    assert fewer.with_added(["night"]).words == care_set.words
    with pytest.raises(CareSetError, match="did you mean 'stars'"):
        care_set.with_removed(["star"])
    with pytest.raises(CareSetError, match="'vale' is not among the guarded words"):
        care_set.with_removed(["vale"])
    with pytest.raises(CareSetError, match="keep at least one"):
        care_set.with_removed(["stars", "night", "wheat"])


@pytest.mark.parametrize(
    ("word", "concept", "own"),
    [
        ("gogh", VAN_GOGH, True),
        ("vangogh", VAN_GOGH, True),
        ("night", VAN_GOGH, False),
        ("sunflowers", Concept(text="sunflower", kind="object"), True),
        ("tenches", Concept(text="tench", kind="object"), True),
        ("naked", Concept(text="nudity", kind="nsfw"), True),
        ("nudes", Concept(text="nudity", kind="nsfw"), True),
        ("person", Concept(text="nudity", kind="nsfw"), False),
    ],
)
def test_own_names(word: str, concept: Concept, own: bool) -> None:
    assert names_concept(word, concept) is own


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("tokens.0.count", -1, "tokens.0.count must be at least 0"),
        ("tokens.1.residual", float("nan"), "is not finite"),
        ("tokens.1.text", "", "tokens.1.text"),
        ("tokens.1.text", "a\nb\x07", "printable"),
        ("tokens.1.text", "STARS", "'STARS' is there twice"),
        ("tokens.1.text", ["stars"], "tokens.1.text must be text"),
        ("tokens", "stars", "tokens"),
        ("version", 2, "format version 2"),
        ("version", True, "format version True"),
        ("concept.text", "", "concept"),
        ("concept.kind", "stile", "did you mean 'style'"),
        ("settings.alpha", -1, "settings.alpha"),
        ("settings.clustres", 7, "did you mean 'clusters'"),
        ("tokns", [], "tokns is not a key, did you mean 'tokens'"),
        ("images", 1e400, "is not finite"),
        ("dropped", {"x": -1}, "dropped.x"),
        ("notes", [1], "notes.0"),
        ("seed", -1, "seed"),
    ],
)
def test_wrong_entries_are_told_in_one_sentence(
    care_set: CareSet, tmp_path: Path, place: str, value: Any, message: str
) -> None:
    data = inner = json.loads(care_set.to_json())
    *parts, last = [int(part) if part.isdigit() else part for part in place.split(".")]
    for part in parts:
        inner = inner[part]
    inner[last] = value
    path = tmp_path / "set.json"
    path.write_text(json.dumps(data))
    with pytest.raises(CareSetError) as caught:
        CareSet.load(path)
    told = str(caught.value)
    assert message in told and str(path) in told and "\n" not in told


def test_what_is_no_care_set_is_told_in_one_sentence(tmp_path: Path) -> None:
    whole = b'{"concept": {"text": "Van Gogh", "kind": "style"}}'
    deep, long = (b"[" * 200_000, b'{"a":' * 100_000), b'{"images": ' + b"9" * 10_000 + b"}"
    twice, yaml = b'{"tokens": [], "tokens": []}', b"version: 1\ntokens: []\n"
    path = tmp_path / "set.json"
    for content in (b"", b"[]", b"{", b"\xff\xfe\x00", whole, *deep, long, twice, yaml):
        path.write_bytes(content)
        with pytest.raises(CareSetError) as caught:
            CareSet.load(path)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 600, content[:24]


def test_unreadable_places(tmp_path: Path) -> None:
    huge = tmp_path / "huge.json"
    with huge.open("wb") as handle:
        handle.truncate(17_000_000)
    with pytest.raises(CareSetError, match="at most 16,000,000 are read"):
        CareSet.load(huge)
    for path in (tmp_path, tmp_path / "none.json", tmp_path / "a\x00b", huge / "x"):
        with pytest.raises(CareSetError):
            CareSet.load(path)


KEYS = st.sampled_from(["version", "concept", "tokens", "text", "kind", "count"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner),
    max_leaves=12,
)
PLACES = st.sampled_from(["version", "concept", "settings", "tokens", "notes", "dropped", ""])


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=JSON, place=PLACES)
def test_any_json_is_read_or_refused(care_set: CareSet, value: Any, place: str) -> None:
    data = json.loads(care_set.to_json()) | {place: value} if place else value
    try:
        found = CareSet.from_json(json.dumps(data))
    except CareSetError:
        return
    assert CareSet.from_json(found.to_json()) == found
