"""The word lists, which vocabulary is the language at large, and words that stay out of a run."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from recare_patch.careset import FUNCTION_WORDS, MEDIUM_WORDS, lexicon
from recare_patch.careset.lexicon import (
    is_about_minors,
    is_barred,
    known_names,
    known_styles,
    known_words,
    names,
    nouns,
    styles,
)
from recare_patch.recipe import Concept

NUDITY = Concept(text="nudity", kind="nsfw")
TENCH = Concept(text="tench", kind="object")


def listed(name: str) -> list[str]:
    """The words of a stop list, in the file's order."""
    lines = (Path(lexicon.__file__).parent / "words" / f"{name}.txt").read_text("utf-8").splitlines()
    return [word for line in lines if not line.startswith("#") for word in line.split()]


STOPPED = sorted({*listed("unsafe"), *listed("minors")})


def clip_of(*words: str) -> Any:
    return SimpleNamespace(vocabulary=lambda: (list(words), []))


def test_lists_are_clean() -> None:
    things, proper = nouns(), names()
    for words in (things, proper):
        assert len(words) > 5_000 and len(set(words)) == len(words)
        assert all(re.fullmatch("[a-z]{3,}", word) for word in words)
        assert not (FUNCTION_WORDS | MEDIUM_WORDS) & set(words)
    assert not set(things) & set(proper)
    folded = [style.casefold() for style in styles()]
    assert len(set(folded)) == len(folded) > 100
    assert all(style == " ".join(style.split()) and not is_barred(style, NUDITY) for style in styles())
    for name in ("unsafe", "minors"):
        words = tuple(listed(name))
        assert list(words) == sorted(set(words)) and all(re.fullmatch("[a-z&-]+", word) for word in words)


def test_stopped_words_are_barred_where_an_unsafe_concept_is_erased_and_nowhere_else() -> None:
    for word in STOPPED:
        for spelling in (
            word,
            word.upper(),
            f"a {word} there",
            f"{word}-like",
            f"half-{word}",
            f"{word}s",
            f"«{word}»",
        ):
            assert is_barred(spelling, NUDITY), spelling
        assert not is_barred(word, TENCH)
    assert all(is_about_minors(word) for word in listed("minors"))


@pytest.mark.parametrize(
    "spelling",
    [
        *("G-String", "g string", "strip-tease", "a stripper's pole", "S&M", "blow job", "BLOW-JOB", "nude-person"),
        *(
            "school girl",
            "school-girls",
            "Schoolgirl's",
            "under-age",
            "half_naked",
            "ｎｕｄｅ",
            "nüdes",
            "nip\u00adple",
        ),
        *("fetishes", "orgies", "naked,", "wet\u00a0lingerie", "sixteen", "nurseries", "boy"),
    ],
)
def test_a_stopped_word_is_known_in_every_spelling(spelling: str) -> None:
    assert is_barred(spelling, NUDITY)


@pytest.mark.parametrize("word", ["person", "woman", "man", "beach", "sea", "river", "towel", "cat", "essex", "Sussex"])
def test_plain_words_are_not_barred(word: str) -> None:
    assert not is_barred(word, NUDITY)
    assert not is_about_minors(word)


def test_aliases_are_barred_like_the_name() -> None:
    concept = Concept(text="tench", kind="object", aliases=("doctor fish", "Tinca"))
    for word in ("tench", "tenches", "tinca", "TINCAS", "Doctor Fish"):
        assert is_barred(word, concept), word
    assert not is_barred("doctor", concept)


def test_a_vocabulary_of_the_language_at_large_knows_all_words() -> None:
    large = clip_of(*(word.upper() for word in nouns()[:600]), "ight", "xyz")
    assert known_words(large) == list(nouns())
    assert known_names(large) == list(names())
    assert known_styles(large) == list(styles())
    others = known_styles(large, but=[Concept(text="Van Gogh", kind="style"), Concept(text="monet", kind="style")])
    assert others and not {"gogh", "monet"} & {part.casefold() for style in others for part in style.split()}


def test_a_small_vocabulary_knows_its_whole_words() -> None:
    rare, some = nouns()[5_000], nouns()[3]
    small = clip_of("qqqq", rare, some.title(), names()[7], "Monet")
    assert known_words(small) == [some, rare]
    assert set(known_names(small)) - {"monet"} == {names()[7]}
    assert known_styles(small) == ["Monet"]
    assert known_styles(small, but=[Concept(text="Monet", kind="style")]) == []
    # Just short of half of the commonest words it is still a small world's.
    assert known_words(clip_of(*nouns()[:499])) == list(nouns()[:499])
    assert known_words(clip_of(*nouns()[:500])) == list(nouns())


def test_a_vocabulary_without_a_word_of_the_list_is_taken_itself() -> None:
    assert known_words(clip_of("Qqq", "qqq", "zzz")) == ["qqq", "zzz"]
    assert known_words(clip_of()) == known_names(clip_of()) == known_styles(clip_of()) == []
