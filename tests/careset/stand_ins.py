"""Stand-ins for CLIP and for the base, of which tests say what they see."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


class WordClip:
    """A stand-in for CLIP: a text is the sum of its words' axes, a picture the words it is made of.

    Words in one group share most of their axis, as synonyms do: the less, the larger the ``spread``.
    """

    id = "words"

    def __init__(self, *groups: Sequence[str], filler: int = 40, spread: float = 0.25) -> None:
        groups = (*groups, *([f"filler{k}"] for k in range(filler)))
        self.words = [word for group in groups for word in group]
        generator = torch.Generator().manual_seed(0)
        self.width = 2 * len(groups) + 8
        self.axes: dict[str, Tensor] = {}
        for at, group in enumerate(groups):
            for word in group:
                own = spread * torch.randn(self.width, generator=generator) / self.width**0.5
                own[at] += 1
                self.axes[word] = F.normalize(own, dim=0)

    def vocabulary(self) -> tuple[list[str], list[tuple[str, str]]]:
        return list(self.words), [("ight", "a piece"), ("the", "a function word")]

    def text_features(self, texts: Sequence[str], batch_size: int = 256) -> Tensor:
        rows = []
        for text in texts:
            parts = [self.axes[w] for w in text.lower().split() if w in self.axes]
            rows.append(F.normalize(sum(parts, torch.full((self.width,), 1e-3)), dim=0))
        return torch.stack(rows) if rows else torch.empty(0, self.width)

    def image_features(self, images: Sequence[Any], batch_size: int = 32) -> Tensor:
        return self.text_features([" ".join(words) for words in images])


class Told:
    """A stand-in for what the base says of words: of each, what share of the name it says, and how far it leads."""

    def __init__(self, leads: Mapping[str, float], shares: Mapping[str, float]) -> None:
        self._leads, self._shares = leads, shares
        self.asked: list[str] = []
        self.references: list[str] = []

    def shares(self, words: Sequence[str]) -> Tensor:
        return torch.tensor([self._shares.get(word, 0.1) for word in words])

    def leads(self, words: Sequence[str], references: Sequence[str]) -> Tensor:
        self.asked, self.references = list(words), list(references)
        return torch.tensor([self._leads.get(word, -0.5) for word in words])


class LyingClip:
    """A stand-in for a CLIP of a large vocabulary, with no more than CLIPs are asked for.

    A text lies towards the concept as far as its nearest word is said to; pictures are of the concept.
    """

    id = "lying"
    width = 64

    def __init__(self, vocabulary: Sequence[str], near: Mapping[str, float]) -> None:
        self._words, self._near = list(vocabulary), near
        self._mean, self._concept = self._axes(["mean", "concept"])

    def _axes(self, texts: Sequence[str]) -> Tensor:
        """A direction of its own for each text, always the same."""
        drawn = b"".join(hashlib.shake_128(text.encode()).digest(self.width) for text in texts)
        rows = torch.frombuffer(bytearray(drawn), dtype=torch.uint8).view(len(texts), self.width)
        return F.normalize(rows.float() - 127.5, dim=1)

    def vocabulary(self) -> tuple[list[str], list[tuple[str, str]]]:
        return list(self._words), []

    def text_features(self, texts: Sequence[str], **_: Any) -> Tensor:
        parts = [[text.casefold(), *text.casefold().split()] for text in texts]
        along = torch.tensor([max(self._near.get(word, 0.0) for word in words) for words in parts])
        return F.normalize(1.2 * self._mean + along[:, None] * self._concept + 0.8 * self._axes(texts), dim=1)

    def image_features(self, images: Sequence[Any], **_: Any) -> Tensor:
        if not len(images):
            return torch.empty(0, self.width)
        own = self._axes([f"picture {image}" for image in images])
        return F.normalize(0.5 * self._mean + self._concept + own, dim=1)
