"""Which words of CLIP's vocabulary keep turning up in pictures of the concept.

ReCARE, step "mine" (Kim et al., arXiv 2606.24192, section 3.1): for every target image the
vocabulary tokens with the highest cosine, counted over the images, the most frequent kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

PAPER_TOKENS_PER_IMAGE = 50
PAPER_KEEP = 100


@dataclass(frozen=True)
class MinedTokens:
    """Tokens by how many images they were among the best for, most frequent first.

    Attributes:
        indices: ``[m]`` int64, rows of the vocabulary.
        counts: ``[m]`` int64, images of which the token was among the best.
    """

    indices: Tensor
    counts: Tensor


def default_tokens_per_image(vocabulary_size: int) -> int:
    """How many tokens to take from each image when nobody says.

    The paper takes 50 of CLIP's 49,408. Fifty of a hundred words would be every second one, right
    or wrong; a square root shrinks more slowly than the vocabulary, because a picture does not hold
    fewer things when there are fewer words for them. The factor reaches the paper's 50 at 1,600
    words and takes ten of Atelier's 64.

    Args:
        vocabulary_size: number of words to choose from.
    """
    return max(1, min(PAPER_TOKENS_PER_IMAGE, round(1.25 * math.sqrt(vocabulary_size))))


def default_keep(vocabulary_size: int) -> int:
    """How many mined tokens go on when nobody says: twice those of an image, as in the paper.

    Args:
        vocabulary_size: number of words to choose from.
    """
    return max(1, min(PAPER_KEEP, 2 * default_tokens_per_image(vocabulary_size)))


def top_tokens(image_features: Tensor, token_features: Tensor, tokens_per_image: int) -> Tensor:
    """The tokens most like each image.

    Args:
        image_features: ``[images, width]``, unit rows.
        token_features: ``[tokens, width]``, unit rows.
        tokens_per_image: how many; all of them where the vocabulary is smaller.

    Returns:
        ``[images, min(tokens_per_image, tokens)]`` int64, best first; of equals, the lower index.
    """
    cosine = image_features @ token_features.T
    return cosine.argsort(dim=1, descending=True, stable=True)[:, :tokens_per_image]


def mine(image_features: Tensor, token_features: Tensor, *, tokens_per_image: int, keep: int) -> MinedTokens:
    """Count in how many images each token is among the best, and keep the most frequent.

    Equal counts are ordered by mean cosine with the images, then by index: the same images always
    give the same list.

    Args:
        image_features: ``[images, width]``, unit rows.
        token_features: ``[tokens, width]``, unit rows.
        tokens_per_image: tokens taken from each image.
        keep: the most tokens returned; those never taken are not returned.
    """
    best = top_tokens(image_features, token_features, tokens_per_image)
    counts = torch.bincount(best.flatten(), minlength=len(token_features))
    mean = image_features.mean(0) @ token_features.T
    by_mean = mean.argsort(descending=True, stable=True)
    order = by_mean[counts[by_mean].argsort(descending=True, stable=True)]
    order = order[counts[order] > 0][:keep]
    return MinedTokens(order, counts[order])


def is_small(vocabulary_size: int) -> bool:
    """Whether a vocabulary is too small for the paper's numbers.

    Args:
        vocabulary_size: number of words to choose from.
    """
    return default_tokens_per_image(vocabulary_size) < PAPER_TOKENS_PER_IMAGE


def chance_level(images: int, tokens_per_image: int, vocabulary_size: int) -> float:
    """The count that a token must exceed to be more than chance.

    Were the tokens of each image drawn at random, a token's count would be binomial with
    ``p = tokens_per_image / vocabulary_size``; the level is its mean and three standard deviations.
    Of CLIP's own vocabulary it is a handful of hundreds of images, and drops next to nothing; among
    a hundred words it is what tells companions from words that fill up the number.

    Args:
        images: number of images.
        tokens_per_image: tokens taken from each.
        vocabulary_size: number of words to choose from.

    Returns:
        The level, in images; below the number of images unless every token is taken from each.
    """
    p = min(1.0, tokens_per_image / vocabulary_size)
    level = images * p + 3 * math.sqrt(images * p * (1 - p))
    # With few images the level can pass them all: then a token found in every image still counts.
    return min(level, images - 0.5)
