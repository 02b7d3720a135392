"""The header of a card in the Hub's own terms, from which it is found and shown."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from recare_patch.patch.metadata import PatchMetadata
from recare_patch.recipe import KINDS, slug_of

TAG = "recare-patch"
"""The tag of every patch that this package makes."""

UNSAFE_TAG = "not-for-all-audiences"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*/[\w.\-]+", re.ASCII)


def hub_id(base: str) -> str | None:
    """The base's id on the Hub, or ``None`` for the bundled one and for folders."""
    return base if _HUB_ID.fullmatch(base) else None


def base_tag(base: str) -> str:
    """The tag that stands for a base: the Hub makes those of ids itself, others are plain."""
    if hub_id(base):
        return f"base_model:{base}"
    return re.sub(r"[^\w.\-]+", "-", base) or "local-base"


def concept_tag(concept: str) -> str:
    """The tag that stands for an erased concept: "Van Gogh" → "concept:van-gogh"."""
    return f"concept:{slug_of(concept)}"


def _tags_of(metadata: PatchMetadata) -> list[str]:
    return [concept_tag(one.concept) for one in metadata.erased]


def sample_prompt(metadata: PatchMetadata) -> str | None:
    """A prompt that shows what a patch does; ``None`` for a stack, whose parts need not know theirs.

    Of several concepts it names the last one: that is in the preview of a patch that was continued too.
    """
    known = [one for one in metadata.erased if one.kind is not None]
    return known[-1].as_concept().target_prompt if known and metadata.parts is None else None


def is_unsafe(metadata: PatchMetadata) -> bool:
    """Whether it deals with unsafe content; in a mixed stack, parts of unknown kind count as if they did."""
    kinds = [metadata.kind, *(one.kind for one in metadata.erased)]
    return "nsfw" in kinds or (metadata.kind not in KINDS and None in kinds)


def front_matter(metadata: PatchMetadata, previews: Sequence[str]) -> dict[str, Any]:
    """The card's header.

    A base that is not on the Hub (the bundled one, a folder) cannot be linked, so it is a tag.

    Args:
        metadata: of the patch.
        previews: pictures beside the card; the first is its thumbnail. Unsafe concepts show none in
            the widget, and are marked as not for all audiences.
    """
    front: dict[str, Any] = {}
    tags = ["text-to-image", "diffusers", "lora", "template:sd-lora"]
    if hub_id(metadata.base):
        front |= {"base_model": metadata.base, "base_model_relation": "adapter"}
    else:
        tags.append(base_tag(metadata.base))
    if metadata.base_family.startswith("stable-diffusion"):
        tags += ["stable-diffusion", metadata.base_family]
    tags += ["concept-erasure", TAG, metadata.method, *_tags_of(metadata)]
    unsafe = is_unsafe(metadata)
    if unsafe:
        tags.append(UNSAFE_TAG)
    front |= {"library_name": "diffusers", "pipeline_tag": "text-to-image"}
    front |= license_of(metadata.base)
    front["tags"] = list(dict.fromkeys(tags))
    if (prompt := sample_prompt(metadata)) is not None:
        front["instance_prompt"] = prompt
        if previews and not unsafe:
            front["widget"] = [{"text": prompt, "output": {"url": url}} for url in previews]
    if previews:
        front["thumbnail"] = previews[0]
    return front


def license_of(base: str) -> dict[str, str]:
    """The licence of a patch, which is that of the base it is made of; this project's for the bundled one.

    Returns:
        ``license``, and for an unknown one ``license_name`` and, where it can be read, ``license_link``.
    """
    folded = base.casefold()
    if folded == "atelier":
        return {"license": _own_license()}
    if re.search(r"stable-diffusion-(v?1|inpainting)", folded) or folded.startswith("compvis/"):
        return {"license": "creativeml-openrail-m"}
    if re.search(r"stable-diffusion-(2|xl)", folded):
        return {"license": "openrail++"}
    unknown = {"license": "other", "license_name": "license-of-the-base-model"}
    return unknown | ({"license_link": f"https://huggingface.co/{base}"} if hub_id(base) else {})


def _own_license() -> str:
    try:
        found = importlib.metadata.metadata("recare-patch").get_all("License-Expression")
    except importlib.metadata.PackageNotFoundError:
        found = None
    return found[0].lower() if found else "other"


@dataclass(frozen=True)
class Identity:
    """What makes two cards speak of one patch: the same concepts, erased from the same base.

    Attributes:
        concepts: the tags of what is erased.
        base: the tag of the base.
    """

    concepts: frozenset[str]
    base: str

    @classmethod
    def of(cls, metadata: PatchMetadata) -> Identity:
        """That of a patch."""
        return cls(frozenset(_tags_of(metadata)), base_tag(metadata.base))


def identity_in(front: Mapping[str, Any], like: Identity) -> Identity | None:
    """That of a card, which may be anybody's; ``None`` where it is not a patch's of this package.

    Args:
        front: the card's header.
        like: the patch it is held against: a base that is a plain tag cannot be told from others
            without knowing its name.
    """
    tags = front.get("tags")
    tags = {tag for tag in tags if isinstance(tag, str)} if isinstance(tags, list) else set()
    if TAG not in tags:
        return None
    linked = front.get("base_model")
    linked = linked[0] if isinstance(linked, list) and linked else linked
    plain = like.base if like.base in tags else "another base"
    base = base_tag(linked) if isinstance(linked, str) else plain
    return Identity(frozenset(tag for tag in tags if tag.startswith("concept:")), base)
