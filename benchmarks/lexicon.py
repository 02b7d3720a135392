"""Makes the word lists that companions and retained prompts are taken from.

    pip install symspellpy==6.10.1 lemminflect==0.2.3
    python -m benchmarks.lexicon

Both packages are under the MIT licence and only read here. Frequencies are of words in print (Google Books
Ngrams, CC BY 3.0) that a spelling list knows (SCOWL). A word that the lexicon of word forms knows as a noun goes
into ``nouns.txt``; one that it does not know in lower case is a name of somebody or something, and goes into
``names.txt``.
"""

from __future__ import annotations

import csv
import gzip
import io
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

from recare_patch.careset import FUNCTION_WORDS, MEDIUM_WORDS, is_barred
from recare_patch.recipe import Concept

FREQUENT = 30_000
"""Rank of the rarest word that is taken."""

FOLDER = Path(__file__).parents[1] / "recare_patch" / "careset" / "words"

_HEADS = {
    "nouns": "Words that people use for things, the most frequent first: CARE-sets and retained prompts take theirs "
    "here.",
    "names": "Names of people and places, the most frequent first: they may name a concept, and are never guarded.",
}
_MADE = (
    "Made by `python -m benchmarks.lexicon` from symspellpy 6.10.1 and lemminflect 0.2.3 (MIT licence);",
    "frequencies are of Google Books Ngrams (CC BY 3.0).",
)


def word_lists() -> dict[str, list[str]]:
    """The lists, the most frequent word first."""
    frequent = (files("symspellpy") / "frequency_dictionary_en_82_765.txt").read_text(encoding="utf-8-sig")
    forms: dict[str, set[str]] = {}
    for word, part, *_ in _rows("lemma_lu"):
        forms.setdefault(word, set()).add(part)
    # What nobody wants to see must be known for what it is, said of things or not.
    unsafe, rows = Concept(text="nudity", kind="nsfw"), _rows("infl_lu")
    compared = {word for word, part, *steps in rows if part == "adj" and any(steps) and not is_barred(word, unsafe)}
    found: dict[str, list[str]] = {"nouns": [], "names": []}
    for line in frequent.splitlines()[:FREQUENT]:
        word = line.split()[0]
        if len(word) < 3 or not word.isalpha() or word in FUNCTION_WORDS or word in MEDIUM_WORDS:
            continue
        if word not in forms:
            found["names"].append(word)
        elif "noun" in forms[word] and word not in compared:
            found["nouns"].append(word)
    return found


def _rows(name: str) -> Iterator[list[str]]:
    packed = (files("lemminflect") / "resources" / f"{name}.csv.gz").read_bytes()
    with gzip.open(io.BytesIO(packed), "rt", encoding="utf-8") as lines:
        yield from csv.reader(lines)


def main() -> None:
    """Write the lists."""
    for name, words in word_lists().items():
        head = "".join(f"# {line}\n" for line in (_HEADS[name], *_MADE))
        (FOLDER / f"{name}.txt").write_text(head + "\n".join(words) + "\n", encoding="utf-8")
        print(f"{name}: {len(words)} words")


if __name__ == "__main__":
    main()
