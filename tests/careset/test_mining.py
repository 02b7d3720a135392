from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from recare_patch.careset.mining import (
    PAPER_KEEP,
    PAPER_TOKENS_PER_IMAGE,
    chance_level,
    default_keep,
    default_tokens_per_image,
    is_small,
    mine,
    top_tokens,
)


def unit(rows: int, width: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)), dim=1)


def brute_counts(images: torch.Tensor, tokens: torch.Tensor, k: int) -> list[int]:
    counts = [0] * len(tokens)
    for image in images:
        scored = [(-float(image @ token), i) for i, token in enumerate(tokens)]
        for _, i in sorted(scored)[:k]:
            counts[i] += 1
    return counts


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("tokens", "k"), [(30, 4), (7, 7), (12, 1)])
def test_counts_equal_a_brute_force_count(seed: int, tokens: int, k: int) -> None:
    images, words = unit(17, 9, seed).double(), unit(tokens, 9, seed + 100).double()
    found = mine(images, words, tokens_per_image=k, keep=tokens)
    wanted = brute_counts(images, words, k)
    counts = [0] * tokens
    for index, count in zip(found.indices.tolist(), found.counts.tolist(), strict=True):
        counts[index] = count
    assert counts == wanted
    assert found.counts.tolist() == sorted(found.counts.tolist(), reverse=True)
    assert min(found.counts.tolist()) > 0


def test_keep_takes_the_most_frequent() -> None:
    images, words = unit(40, 6, 0), unit(25, 6, 1)
    every = mine(images, words, tokens_per_image=5, keep=25)
    few = mine(images, words, tokens_per_image=5, keep=4)
    assert few.indices.tolist() == every.indices[:4].tolist()


def test_equal_counts_are_ordered_by_mean_cosine_then_index() -> None:
    images = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    words = torch.tensor([[0.6, 0.8], [1.0, 0.0], [0.6, -0.8], [0.0, 1.0]])
    found = mine(images, words, tokens_per_image=3, keep=4)
    assert found.indices.tolist() == [1, 0, 2]
    assert found.counts.tolist() == [2, 2, 2]


def test_more_tokens_asked_than_there_are() -> None:
    assert top_tokens(unit(3, 4, 0), unit(2, 4, 1), 50).shape == (3, 2)


def test_defaults_reach_the_papers_numbers_and_never_pass_them() -> None:
    for size in (1_600, 25_000, 49_408):
        assert default_tokens_per_image(size) == PAPER_TOKENS_PER_IMAGE
        assert default_keep(size) == PAPER_KEEP
        assert not is_small(size)
    taken = [default_tokens_per_image(size) for size in range(1, 2_000)]
    assert taken == sorted(taken)
    assert min(taken) == 1
    assert all(t <= size for size, t in zip(range(2, 2_000), taken[1:], strict=True))
    assert is_small(64)


def test_chance_level_is_three_deviations_above_the_mean_of_a_binomial() -> None:
    n, k, size = 48, 10, 64
    draws = torch.distributions.Binomial(n, torch.tensor(k / size))
    assert chance_level(n, k, size) == pytest.approx(float(draws.mean + 3 * draws.stddev), rel=1e-6)


@pytest.mark.parametrize(("images", "k", "size"), [(1, 10, 64), (2, 50, 60), (48, 64, 64), (3, 1, 1)])
def test_a_token_of_every_image_always_passes_chance(images: int, k: int, size: int) -> None:
    assert chance_level(images, k, size) < images


def test_chance_hardly_matters_in_clips_own_vocabulary() -> None:
    assert math.ceil(chance_level(500, 50, 25_000)) <= 5
