"""The table of erasing methods, and what is told of each; a method's file says it of itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from recare_patch.core import RecarePatchError, Registry, Settings
from recare_patch.recipe.concept import Concept

DENOISER_LAYERS = (
    "cross-attention",
    "cross-attention-kv",
    "cross-attention-v",
    "text",
    "text-input",
    "self-attention",
    "attention",
    "transformer-blocks",
    "outside-cross-attention",
    "all",
)
TEXT_LAYER_SETS = ("text-encoder",)
"""Layer sets that lie in the text encoders, not in the denoiser."""

LAYER_SETS = (*DENOISER_LAYERS, *TEXT_LAYER_SETS)

METHODS = Registry(
    "method",
    {
        "recare": "recare_patch.erasure.methods.recare:ReCARE",
        "s-grace": "recare_patch.erasure.methods.s_grace:SGrace",
        "forget-me-not": "recare_patch.erasure.methods.forget_me_not:ForgetMeNot",
        "closed": "recare_patch.erasure.methods.closed:Closed",
        "uce": "recare_patch.erasure.methods.uce:UCE",
        "esd": "recare_patch.erasure.methods.esd:ESD",
    },
    group="recare_patch.methods",
)
"""The erasing methods. Their modules import torch where they compute, so that a recipe is read without it."""


@dataclass(frozen=True)
class Paper:
    """How a reader finds a method's paper, and how an author cites it; ``venue`` ends with the year."""

    name: str
    authors: str
    venue: str
    arxiv: str
    author: str
    title: str
    booktitle: str = ""

    @property
    def short(self) -> str:
        """In plain text: "Kim et al., ICLR 2026, arXiv 2606.24192"."""
        return f"{self.authors}, {self.venue}, arXiv {self.arxiv}"


@dataclass(frozen=True)
class MethodInfo:
    """A method as users see it, and what a recipe must know of it.

    Attributes:
        title: as its paper writes it.
        what: how it erases, in one sentence.
        touches: what its patch changes.
        reads: what it needs beside the concept's name.
        caution: what a patch's card says among its limits; None: the method's title and weakness.
        layers: layer sets that it can train, the default first.
        options: its own section of a recipe, called like the method; None: it has none.
        replaces: what ``replace_with`` does, in one sentence; None: it cannot.
        separates: what ``subject`` does (removing an attribute from it); None: it cannot.
        continues: whether it can go on from an earlier patch.
        searches: whether the recipe's ``search`` is for it.
        compiles: whether it works on compiled layers.
        defaults: dotted recipe keys whose defaults are its own.
        rank_per_name: the adapter has a rank for each name of the concepts, where nobody says another one.
    """

    title: str
    paper: Paper
    what: str
    touches: str
    reads: str
    strength: str
    weakness: str
    caution: str | None = None
    layers: tuple[str, ...] = DENOISER_LAYERS
    options: type[Settings] | None = None
    replaces: str | None = None
    separates: str | None = None
    continues: bool = True
    searches: bool = False
    compiles: bool = True
    defaults: Mapping[str, Any] = field(default_factory=dict)
    rank_per_name: bool = False

    def as_data(self, name: str) -> dict[str, Any]:
        """All of it as plain data; ``name`` is the method's, and its section of a recipe is called like it."""
        section = section_of(name) if self.options else None
        own = {"target": METHODS.targets[name], "source": self.paper.short, "options": section}
        return {**asdict(self), **own, "defaults": dict(self.defaults)}


def method_info(name: str) -> MethodInfo:
    """What is known of a method.

    Raises:
        UnknownNameError: no such method; the sentence offers the nearest.
    """
    info: MethodInfo = METHODS.get(name).info
    return info


def section_of(method: str) -> str:
    """What a method's own section of a recipe is called."""
    return method.replace("-", "_")


RANK_KEYS = ("adapter.rank", "adapter.alpha")


def own_rank(info: MethodInfo, data: Mapping[str, Any]) -> dict[str, Any]:
    """The rank and alpha of a method that has one for each name; empty for others, or where no concept is sound."""
    if not info.rank_per_name:
        return {}
    count = 0
    for one in (data.get("concept"), *(data.get("also") or ())):
        try:
            concept = one if isinstance(one, Concept) else Concept(**one)  # type: ignore[arg-type]
        except (TypeError, ValueError, RecarePatchError):
            return {}
        count += len(concept.bare_names)
    return dict(zip(RANK_KEYS, (count, float(count)), strict=True))


ABILITIES = {
    "replace_with": ("replaces", "put something in the concept's place"),
    "subject": ("separates", "take an attribute out of a subject"),
    "continue_from": ("continues", "go on from an earlier patch"),
}
"""A recipe's key → which field of :class:`MethodInfo` allows it, and what it asks for."""
