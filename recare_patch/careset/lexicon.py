"""The words that companions, neighbours and retained prompts are taken from, and those that never are.

The lists lie beside this module in ``words/``, one file each, to be read and corrected by people. A byte-pair
vocabulary is none of them: most of its entries are pieces of words, and many of its words are nobody's.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from recare_patch.recipe import Concept, names_concept

if TYPE_CHECKING:
    from recare_patch.careset.clip import Clip

_FOLDER = Path(__file__).parent / "words"

_PLURALS = (("s", ""), ("es", ""), ("ies", "y"))

_COMMON = 1000
"""So many words of the lexicon say whether a vocabulary is that of the language at large."""


@cache
def _lines(name: str) -> tuple[str, ...]:
    text = (_FOLDER / f"{name}.txt").read_text(encoding="utf-8")
    return tuple(line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#"))


@cache
def _set(name: str) -> frozenset[str]:
    return frozenset(word for line in _lines(name) for word in line.split())


def nouns() -> tuple[str, ...]:
    """Words that name a thing, the most frequent in print first."""
    return _lines("nouns")


def names() -> tuple[str, ...]:
    """Names of people and places, and other words that are no plain noun, the most frequent in print first."""
    return _lines("names")


def styles() -> tuple[str, ...]:
    """Painters and manners that pictures are made in."""
    return _lines("styles")


def is_barred(word: str, concept: Concept) -> bool:
    """Whether a word stays out of a run that erases the concept: never drawn, guarded, retained or joined.

    The concept's own names and aliases do, and of unsafe concepts every word of the stop lists.
    """
    if names_concept(word, concept):
        return True
    if concept.kind != "nsfw":
        return False
    return not _parts(word).isdisjoint(_set("unsafe") | _set("minors"))


def is_about_minors(word: str) -> bool:
    """Whether a word or phrase speaks of minors."""
    return not _parts(word).isdisjoint(_set("minors"))


def _parts(text: str) -> frozenset[str]:
    """The words of a text as a list may spell them: apart and joined, without accents, of plurals the singular too."""
    letters = unicodedata.normalize("NFKD", unicodedata.normalize("NFKC", text).casefold())
    plain = "".join(letter for letter in letters if not unicodedata.combining(letter) and letter.isprintable())
    words = re.findall(r"[^\W_]+(?:&[^\W_]+)?", plain)
    found = {plain, *words, "".join(words), *map("".join, pairwise(words))}
    singular = {word[: -len(end)] + new for word in found for end, new in _PLURALS if word.endswith(end)}
    return frozenset(found | singular)


def vocabulary_of(clip: Clip) -> tuple[bool, frozenset[str]]:
    """Whether a CLIP was trained on the language at large, and the words that its vocabulary has whole.

    Such a one has most of the lexicon's commonest words whole. The vocabulary of a small world splits nearly all
    of them; what it splits it has hardly met.
    """
    whole, _ = clip.vocabulary()
    there = frozenset(word.casefold() for word in whole)
    return 2 * sum(word in there for word in nouns()[:_COMMON]) >= _COMMON, there


def known_words(clip: Clip) -> list[str]:
    """The words of :func:`nouns` that a CLIP knows, the most frequent first.

    One that was trained on the language at large knows all of them, whatever number of tokens they take. In a small
    world those are known that are whole tokens; where none is, the vocabulary itself is taken.
    """
    is_open, there = vocabulary_of(clip)
    if is_open:
        return list(nouns())
    own = dict.fromkeys(word.casefold() for word in clip.vocabulary()[0])
    return [word for word in nouns() if word in there] or list(own)


def known_names(clip: Clip) -> list[str]:
    """The words of :func:`names` that a CLIP knows, as :func:`known_words` decides it."""
    is_open, there = vocabulary_of(clip)
    return [word for word in names() if is_open or word in there]


def known_styles(clip: Clip, but: Iterable[Concept] = ()) -> list[str]:
    """The manners of :func:`styles` that a CLIP knows, without those that name one of some concepts."""
    is_open, there = vocabulary_of(clip)
    found = [one for one in styles() if is_open or all(part in there for part in one.casefold().split())]
    return [one for one in found if not any(shares_name(one, concept) for concept in but)]


def shares_name(text: str, concept: Concept) -> bool:
    """Whether a text has a word that names the concept."""
    return any(names_concept(part, concept) for part in (text, *text.split()))
