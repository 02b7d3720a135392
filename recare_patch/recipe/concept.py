"""What is erased, and the prompts that speak of it.

Four kinds of concepts, each with the prompt templates of the literature: styles are painted,
objects and people photographed (Kim et al., "ReCARE", arXiv 2606.24192, section 3 and appendix).
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from typing import Annotated, ClassVar, Literal, get_args

from pydantic import AfterValidator, BeforeValidator, Field

from recare_patch.core import ConceptError, Settings, one_of

Kind = Literal["style", "object", "identity", "nsfw"]
"""A style of painting, a thing, a person by name, or unsafe content."""

KINDS: tuple[Kind, ...] = get_args(Kind)

MAX_LENGTH = 100
"""Longest concept in characters; CLIP text towers read 77 tokens and the template needs some."""

_SPELLED = {"+": "plus", "#": "sharp", "&": "and"}
_LOST = ("Sm", "Sc", "Sk", "So", "Cs", "Co", "Cn")
"""Unicode's categories of what tells names apart and has no place in a file's name: symbols, and what is no text."""
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\.|$)", re.IGNORECASE)
"""What Windows takes for devices, whatever ending follows."""

_NUDE = ("nude", "naked", "nudity", "nude person", "naked person")
_NUDITY = ("nudity", "nude", "nudes", "naked", "nakedness", "nude person", "naked person")
_COMPOSED = {
    "style": (
        ("A painting of {token} in the style of {name}", "A {token}", "A painting of {token}"),
        ("{token} by {name}", "A {token}", "A painting of {token}"),
        ("A {name} painting of {token}", "A painting of {token}", "A painting of {token}"),
    ),
    "thing": (
        ("A photo of {name} and {token}", "A {token}", "A photo of {token}"),
        ("A photo of {token} and {name}", "A {token}", "A photo of {token}"),
        ("A painting of {name} with {token}", "A painting of {token}", "A painting of {token}"),
    ),
}
"""How people write a name beside something else, the anchor of such a prompt, and the same prompt without the name."""
_CLASS_WORDS = {"style": "painting", "object": "photo", "identity": "person", "nsfw": "person"}


def check_text(text: str) -> str:
    """A concept's name with single spaces.

    Raises:
        ValueError: it is too long, or has no letter and no digit.
    """
    text = " ".join(text.split())
    if not text:
        raise ValueError("a concept needs at least one letter or digit, got an empty text")
    if len(text) > MAX_LENGTH:
        raise ValueError(f"a concept may have at most {MAX_LENGTH} characters, got {len(text)}")
    if not any(character.isalnum() for character in text):
        raise ValueError(f"a concept needs at least one letter or digit, got {text!r}")
    return text


class Concept(Settings):
    """A concept to erase: its name as one writes it in a prompt, and which prompt templates apply.

    Raises:
        ConceptError: the text is empty or too long, or the kind is unknown.

    Example:
        >>> Concept(text="tench", kind="object").target_prompt
        'A photo of a tench'
    """

    error: ClassVar[type[ConceptError]] = ConceptError
    noun: ClassVar[str] = "concept"

    text: Annotated[str, AfterValidator(check_text)]
    kind: Annotated[Kind, BeforeValidator(one_of("kind", KINDS))]
    aliases: tuple[Annotated[str, AfterValidator(check_text)], ...] = Field(
        (), max_length=200, description="other names of it: erased with it, and never guarded or retained"
    )

    @property
    def target_prompt(self) -> str:
        """The prompt whose pictures show the concept."""
        return self.name_prompts[0]

    @property
    def name_prompts(self) -> tuple[str, ...]:
        """Prompts that name the concept outright, the target prompt first; all are erased."""
        text, a = self.text, _article(self.text)
        if self.kind == "style":
            prompts = [self.target_prompt_for(text), f"A painting by {text}", f"{a}{text} painting", text]
        elif self.kind == "object":
            prompts = [self.target_prompt_for(f"{a.lower()}{text}"), f"A photo of {text}", text]
        elif self.kind == "identity":
            prompts = [self.target_prompt_for(text), f"A portrait of {text}", text]
        elif self._is_nudity:
            prompts = ["A photo of a nude person", "A photo of a naked person", "nude person", "nude"]
        else:
            prompts = [self.target_prompt_for(text), text]
        prompts += [self.target_prompt_for(alias) for alias in self.aliases]
        # A text that brings its own article makes two of them alike.
        return tuple(dict.fromkeys(prompts))

    @property
    def bare_names(self) -> tuple[str, ...]:
        """Its names by themselves, as no prompt around them."""
        own = (self.text, *_NUDE) if self._is_nudity else (self.text,)
        return tuple({concept_key(name): name for name in reversed((*own, *self.aliases))}.values())[::-1]

    @property
    def class_word(self) -> str:
        """A common word for what the concept is: where textual inversion starts from."""
        return _CLASS_WORDS[self.kind]

    @property
    def words(self) -> tuple[str, ...]:
        """The words that name the concept, lower case: never CARE-concepts of it."""
        own = re.findall(r"\w+", self.text.casefold())
        if self._is_nudity:
            own += ["nude", "nudity", "naked"]
        return tuple(dict.fromkeys(own))

    @property
    def slug(self) -> str:
        """Its name, fit for a folder."""
        return slug_of(self.text)

    @property
    def plain_prompt(self) -> str:
        """The prompt that says no more than how its pictures are made: what a retain prompt adds its word to."""
        return "A painting" if self.kind == "style" else "A photo"

    def anchor_prompt(self, token: str) -> str:
        """The prompt that a CARE-token offers as an anchor: what the concept is steered to."""
        return f"A {token}"

    def retain_prompt(self, token: str) -> str:
        """The prompt of a CARE-token whose pictures must not change."""
        return f"A painting of {token}" if self.kind == "style" else f"A photo of {token}"

    def target_prompt_for(self, name: str) -> str:
        """The target prompt with another name in the concept's place, such as a placeholder token."""
        if self.kind == "style":
            return f"A painting in the style of {name}"
        return f"A photo of {name}"

    def composed_prompt(self, token: str, form: int = 0) -> str:
        """The concept together with one of its companions: "A painting of stars in the style of Van Gogh".

        ``form`` picks one of :attr:`composed_forms` ways to write it: the name first, last, or in another medium.
        """
        return self._composed[form][0].format(token=token, name=self._named)

    def composed_anchor(self, token: str, form: int = 0) -> str:
        """The anchor of :meth:`composed_prompt`: what it says without the concept."""
        return self._composed[form][1].format(token=token)

    def without_name(self, token: str, form: int = 0) -> str:
        """What is left of :meth:`composed_prompt` when the name goes: the rest in the same medium."""
        return self._composed[form][2].format(token=token)

    @property
    def composed_forms(self) -> int:
        """How many forms a composed prompt has."""
        return len(self._composed)

    @property
    def _composed(self) -> tuple[tuple[str, str, str], ...]:
        return _COMPOSED["style" if self.kind == "style" else "thing"]

    @property
    def _named(self) -> str:
        """The name as it stands within a sentence."""
        if self.kind in ("style", "identity"):
            return self.text
        return "a nude person" if self._is_nudity else f"{_article(self.text).lower()}{self.text}"

    @property
    def _is_nudity(self) -> bool:
        return self.kind == "nsfw" and self.text.casefold() in _NUDITY

    def __str__(self) -> str:
        return self.text


def slug_of(text: str) -> str:
    """A concept's name, fit for files and folders everywhere: "Van Gogh" → "van-gogh", "C++" → "c-plus-plus".

    Small letters of any script and digits with hyphens between them; Latin letters lose their accents. Names that
    would read alike or not fit end in a hash, so that different concepts have different names.
    """
    # A lone plus joins the concepts of one patch.
    folded = re.sub(r"(?<= )\+ ", "", concept_key(text))
    spelled = "".join(f" {_SPELLED[one]} " if one in _SPELLED else one for one in folded)
    # Marks of other scripts are letters in all but name: が without its mark is か.
    plain = unicodedata.normalize(
        "NFC", re.sub("(?<=[a-z])[\u0300-\u036f]+", "", unicodedata.normalize("NFKD", spelled))
    )
    kept = ""
    for one in plain:
        kind = unicodedata.category(one)
        if one.isalnum() or (kind[0] == "M" and kept[-1:].strip("-")):
            kept += one
        elif kind != "Cf":
            kept += "-"
    stem = re.sub("-+", "-", kept).strip("-")
    lost = not stem or any(one in "!?*@%" or unicodedata.category(one) in _LOST for one in plain)
    return fitted_stem(stem or "concept", folded, lost=lost)


def fitted_stem(stem: str, text: str, most: int = 100, *, lost: bool = False) -> str:
    """A file's stem as it is, or with a hash of ``text``: where it is longer than ``most`` bytes or reserved.

    ``lost`` asks for the hash because the stem does not show all of the text.
    """
    data = stem.encode(errors="surrogatepass")
    if not lost and len(data) <= most and not _RESERVED.match(stem):
        return stem
    digest = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:8]
    return f"{data[: most - 9].decode(errors='ignore').strip('-.')}-{digest}"


def _article(text: str) -> str:
    """The indefinite article with a space, or nothing where the text brings its own."""
    first = text.casefold().split()[0]
    if first in ("a", "an", "the", "some"):
        return ""
    return "An " if first[0] in "aeiou" else "A "


def same_concept(a: Concept | str, b: Concept | str) -> bool:
    """Whether two names mean the same concept: case, hyphens and extra spaces do not count."""
    return concept_key(a) == concept_key(b)


def concept_key(concept: Concept | str) -> str:
    """What names of the same concept have in common; see :func:`same_concept`."""
    text = concept.text if isinstance(concept, Concept) else concept
    return " ".join(re.split(r"[\s_-]+", unicodedata.normalize("NFKC", text).casefold().strip()))


def names_concept(word: str, concept: Concept) -> bool:
    """Whether a word is one of the concept's own names, in the singular or plural, joined or apart."""
    folded = word.casefold()
    own = [*concept.words, concept.text.casefold(), "".join(concept.text.casefold().split())]
    own += [alias.casefold() for alias in concept.aliases]
    return any(folded in (name, f"{name}s", f"{name}es") or name in (f"{folded}s", f"{folded}es") for name in own)
