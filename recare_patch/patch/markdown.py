"""Cards as text: YAML between two lines of ``---``, then Markdown."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping
from typing import Any

import yaml

from recare_patch.core import EvidenceError, load_yaml

CARD_NAME = "README.md"
"""The card's file, beside the weights."""

_FRONT = re.compile(r"\A---[ \t]*\n(.*?\n)?---[ \t]*(?:\n|\Z)", re.DOTALL)


def plain(text: str) -> str:
    """Text of a user's that a card may show: no HTML, no Markdown, one line."""
    return re.sub(r"([\\`*_\[\]|#])", r"\\\1", html.escape(" ".join(text.split()), quote=False))


def split_card(card: str) -> tuple[dict[str, Any], str]:
    """A card's front matter and its body.

    Args:
        card: the whole text.

    Returns:
        The front matter as a mapping, empty where there is none, and everything after it.

    Raises:
        EvidenceError: the front matter is not a YAML mapping.
    """
    text = card.replace("\r\n", "\n").removeprefix("\ufeff")
    match = _FRONT.match(text)
    if match is None:
        return {}, text
    try:
        front = load_yaml(match[1] or "")
    except yaml.YAMLError:
        raise EvidenceError("the card's front matter, between its --- lines, is not readable YAML") from None
    if front is None:
        front = {}
    if not isinstance(front, dict):
        raise EvidenceError(
            "the card's front matter, between its --- lines, is not a mapping of keys to values"
        )
    return front, text[match.end() :]


def join_card(front: Mapping[str, Any], body: str) -> str:
    """The whole text of a card; comments that its front matter once had are lost."""
    return f"---\n{yaml_text(front)}\n---\n{body.rstrip()}\n"


def yaml_text(front: Mapping[str, Any]) -> str:
    """Front matter without its lines of ``---``, keys in their order."""
    return yaml.safe_dump(dict(front), sort_keys=False, allow_unicode=True, width=100).strip()
