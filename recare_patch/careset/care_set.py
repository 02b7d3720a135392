"""The CARE-set: the benign companions of a concept, and why each other candidate is none.

Mined from pictures of the concept as in ReCARE (Kim et al., arXiv 2606.24192, section 3.1): the words most
like each picture are counted, clustered, and rid of those that pull their cluster towards the concept. The
set is a small JSON file that people may read, edit by the commands and pass to another run, so its reader
takes nothing on trust.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, field_validator

from recare_patch.core import CareSetError, Settings, SettingsError, load_json, nearest, read_bytes, write_text
from recare_patch.recipe import CareSetOptions, Concept, names_concept

KEPT = "kept"
NAMES_CONCEPT = "names the concept"
BARRED = "on the list of words that an unsafe concept's run never says"
MAY_BELONG = "may belong to it: held as firmly, but nothing is steered to it"
ADDED = "added by hand"
REMOVED = "removed by hand"

_MAX_WORD = 100


class CareSetFaultsError(CareSetError, SettingsError):
    """A CARE-set with wrong entries; all of them are told at once."""


def _check_word(word: str) -> str:
    if not word or len(word) > _MAX_WORD:
        raise ValueError(f"a word has 1 to {_MAX_WORD} characters, got {len(word)}")
    if not word.isprintable() or not any(character.isalnum() for character in word):
        raise ValueError(f"a word is made of printable characters with a letter or digit among them, got {word!r}")
    return word


class CareToken(Settings):
    """One candidate."""

    error: ClassVar[type[SettingsError]] = CareSetFaultsError
    noun: ClassVar[str] = "CARE-token"

    text: Annotated[str, AfterValidator(_check_word)]
    count: int = Field(ge=0, le=10**9, description="target images for which it was among the best; 0: added by hand")
    cluster: Annotated[int, Field(ge=0, le=10**6)] | None = Field(
        None, description="numbered from the one nearest to the concept; None: not clustered"
    )
    residual: float = Field(
        ge=0, le=1e6, description="‖(I − u uᵀ) w‖, its distance from the concept's direction, 0 to 1"
    )
    kept: bool = Field(description="whether it is guarded")
    reason: str = Field("", max_length=300, description="why it was dropped, or is guarded")


class CareSet(Settings):
    """The words that an erasure guards, with all that is needed to make them again.

    Example:
        >>> words = CareSet.of_words(Concept(text="Van Gogh", kind="style"), ["stars", "night"])
        >>> words.retain_prompts()
        ('A painting of stars', 'A painting of night')
    """

    error: ClassVar[type[SettingsError]] = CareSetFaultsError
    noun: ClassVar[str] = "CARE-set"

    version: Literal[1] = 1
    concept: Concept
    clip: str = Field("", max_length=4096, description="the CLIP it was mined with")
    seed: int = Field(0, ge=0, lt=2**63, description="of the clustering")
    images: int = Field(0, ge=0, le=10**9, description="number of target images")
    settings: CareSetOptions = Field(CareSetOptions(), description="with the numbers that were used")
    tokens: tuple[CareToken, ...] = Field(
        max_length=100_000, description="all candidates, the most frequent first, kept or not"
    )
    dropped: dict[str, Annotated[int, Field(ge=0)]] = Field(
        default_factory=dict, description="vocabulary tokens that were no candidates: reason → how many"
    )
    notes: tuple[str, ...] = Field((), description="what was done otherwise than asked")

    @field_validator("tokens")
    @classmethod
    def _no_doubles(cls, tokens: tuple[CareToken, ...]) -> tuple[CareToken, ...]:
        seen: set[str] = set()
        for token in tokens:
            if token.text.casefold() in seen:
                raise ValueError(f"the word '{token.text}' is there twice")
            seen.add(token.text.casefold())
        return tokens

    @classmethod
    def of_words(cls, concept: Concept, words: Iterable[str]) -> CareSet:
        """A set of chosen words, without mining; see :meth:`with_added`."""
        return cls(concept=concept, tokens=()).with_added(words)

    @property
    def words(self) -> tuple[str, ...]:
        """The guarded words, the most frequent first."""
        return tuple(token.text for token in self.tokens if token.kept)

    @property
    def doubtful(self) -> tuple[str, ...]:
        """Words that came near to being guarded: they are held too, since one that is missed suffers first."""
        return tuple(token.text for token in self.tokens if token.reason == MAY_BELONG and not token.kept)

    def anchors(self) -> tuple[str, ...]:
        """The prompts that the concept is steered to, one a word."""
        return tuple(self.concept.anchor_prompt(word) for word in self.words)

    def retain_prompts(self) -> tuple[str, ...]:
        """The prompts whose pictures must not change, one a word."""
        return tuple(self.concept.retain_prompt(word) for word in self.words)

    def with_added(self, words: Iterable[str]) -> CareSet:
        """A copy that guards more words or short phrases; one that was dropped is kept again.

        Raises:
            CareSetError: a word is empty, or names the concept itself.
        """
        tokens = {token.text.casefold(): token for token in self.tokens}
        for word in _listed(words):
            if names_concept(word, self.concept):
                raise CareSetError(f"'{word}' names the concept '{self.concept}' itself and cannot be guarded")
            old = tokens.get(word.casefold())
            if old is None:
                tokens[word.casefold()] = CareToken(text=word, count=0, residual=0.0, kept=True, reason=ADDED)
            elif not old.kept:
                tokens[word.casefold()] = old.model_copy(update={"kept": True, "reason": ADDED})
        return self.model_copy(update={"tokens": tuple(tokens.values())})

    def with_removed(self, words: Iterable[str]) -> CareSet:
        """A copy that guards fewer words; they stay listed, as removed by hand.

        Raises:
            CareSetError: a word is not guarded, or none would be left.
        """
        tokens = {token.text.casefold(): token for token in self.tokens}
        for word in _listed(words):
            old = tokens.get(word.casefold())
            if old is None or not old.kept:
                kept = [token.text for token in tokens.values() if token.kept]
                guess = nearest(word, kept)
                hint = f"; did you mean '{guess}'?" if guess else f" ({', '.join(self.words) or 'none is'})"
                raise CareSetError(f"'{word}' is not among the guarded words{hint}")
            tokens[word.casefold()] = old.model_copy(update={"kept": False, "reason": REMOVED})
        if self.words and not any(token.kept for token in tokens.values()):
            raise CareSetError("this would remove all guarded words: keep at least one, or use --method esd")
        return self.model_copy(update={"tokens": tuple(tokens.values())})

    def to_json(self) -> str:
        """The whole set as readable JSON."""
        return json.dumps(self.model_dump(mode="json"), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, *, source: str = "the CARE-set") -> CareSet:
        """Read a set; CareSetError, which calls the text ``source``, for any text that is none."""
        try:
            data: Any = load_json(text)
        except UnicodeDecodeError:
            raise CareSetError(f"{source} is not a CARE-set: it is not UTF-8 text") from None
        except ValueError as fault:
            where, what = "", str(fault)
            if isinstance(fault, json.JSONDecodeError):
                where, what = f" in line {fault.lineno}", fault.msg
            raise CareSetError(f"{source} is not readable JSON{where}: {what[:1].lower()}{what[1:]}") from None
        if not isinstance(data, dict):
            raise CareSetError(f"{source} is not a CARE-set: it must be an object with 'concept' and 'tokens'")
        if data.get("version", 1) != 1 or isinstance(data.get("version"), bool):
            raise CareSetError(f"{source} has format version {data['version']!r:.40}: this package reads version 1")
        try:
            return cls(**data)
        except SettingsError as fault:
            shown = "; ".join(fault.faults[:3])
            more = f"; and {len(fault.faults) - 3} more" if len(fault.faults) > 3 else ""
            raise CareSetFaultsError(f"{source} is not a sound CARE-set: {shown}{more}", fault.faults) from None
        except (ValueError, TypeError, RecursionError) as fault:
            raise CareSetError(f"{source} is not a sound CARE-set: {' '.join(str(fault).split())[:200]}") from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the set, whole or not at all."""
        write_text(path, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> CareSet:
        """Read a set from a file; CareSetError where there is none."""
        file = Path(path)
        try:
            if file.is_dir():
                raise CareSetError(f"'{file}' is a folder: give the CARE-set's JSON file")
            data = read_bytes(file, f"the CARE-set at '{file}'", CareSetError)
        except FileNotFoundError:
            raise CareSetError(f"there is no CARE-set at '{file}'") from None
        return cls.from_json(data, source=f"'{file}'")


def _listed(words: Iterable[str]) -> list[str]:
    return [" ".join(word.split()) for word in ([words] if isinstance(words, str) else words)]
