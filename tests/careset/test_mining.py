"""The arithmetic of mining, clustering and refinement, against the formulas written out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from recare_patch.careset.mining import (
    PAPER_CLUSTER_SIZE,
    SMALLEST_CLUSTER,
    chance_level,
    cluster_tokens,
    default_tokens_per_image,
    effective_clusters,
    mine,
    refine,
    residuals,
    scaled_alpha,
    token_map,
)


def unit(rows: int, width: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, width, generator=generator, dtype=torch.float64), dim=1)


def projector(u: Tensor) -> Tensor:
    return torch.eye(len(u), dtype=u.dtype) - torch.outer(u, u)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("tokens", "k"), [(30, 4), (7, 7), (12, 1), (2, 50)])
def test_counts_equal_a_brute_force_count(seed: int, tokens: int, k: int) -> None:
    images, words = unit(17, 9, seed), unit(tokens, 9, seed + 100)
    wanted = [0] * tokens
    for image in images:
        for _, i in sorted((-float(image @ word), i) for i, word in enumerate(words))[:k]:
            wanted[i] += 1
    indices, counts = (one.tolist() for one in mine(images, words, tokens_per_image=k, keep=tokens))
    assert dict(zip(indices, counts, strict=True)) == {i: count for i, count in enumerate(wanted) if count}
    assert counts == sorted(counts, reverse=True)
    few, _ = mine(images, words, tokens_per_image=k, keep=2)
    assert few.tolist() == indices[:2]


def test_equal_counts_are_ordered_by_mean_cosine_then_index() -> None:
    images = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    words = torch.tensor([[0.6, 0.8], [1.0, 0.0], [0.6, -0.8], [0.0, 1.0]])
    indices, counts = mine(images, words, tokens_per_image=3, keep=4)
    assert (indices.tolist(), counts.tolist()) == ([1, 0, 2], [2, 2, 2])


def test_defaults_reach_the_papers_numbers_and_never_pass_them() -> None:
    assert {default_tokens_per_image(size) for size in (1_600, 25_000, 49_408)} == {50}
    taken = [default_tokens_per_image(size) for size in range(1, 2_000)]
    assert taken == sorted(taken)
    assert min(taken) == 1 and taken[63] == 10
    assert all(t <= size for size, t in zip(range(2, 2_000), taken[1:], strict=True))


def test_chance_level_is_three_deviations_above_the_mean_of_a_binomial() -> None:
    n, k, size = 48, 10, 64
    draws = torch.distributions.Binomial(n, torch.tensor(k / size))
    assert chance_level(n, k, size) == pytest.approx(float(draws.mean + 3 * draws.stddev), rel=1e-6)
    for images, each, vocabulary in ((1, 10, 64), (2, 50, 60), (48, 64, 64), (3, 1, 1)):
        assert chance_level(images, each, vocabulary) < images
    # In CLIP's own vocabulary it hardly matters.
    assert math.ceil(chance_level(500, 50, 25_000)) <= 5


@pytest.mark.parametrize("seed", range(4))
def test_residual_equals_the_projection_written_out(seed: int) -> None:
    tokens, u = unit(11, 7, seed), unit(1, 7, seed + 50)[0]
    torch.testing.assert_close(residuals(tokens, u), (tokens @ projector(u)).norm(dim=1))
    assert residuals(u[None], u)[0] < 1e-12


def test_clusters_are_found_and_numbered_by_mean_residual() -> None:
    # Tight groups of unit rows whose cosine with the concept (the first axis) is as given.
    generator = torch.Generator().manual_seed(0)
    u, rows = torch.eye(16, dtype=torch.float64)[0], []
    sizes = (6, 7, 6, 8)
    for group, (size, cosine) in enumerate(zip(sizes, (0.5, 0.95, 0.0, 0.3), strict=True)):
        centre = cosine * u + (1 - cosine**2) ** 0.5 * torch.eye(16, dtype=torch.float64)[group + 1]
        rows.append(centre + 0.02 * torch.randn(size, 16, generator=generator, dtype=torch.float64))
    found = cluster_tokens(F.normalize(torch.cat(rows), dim=1), u, clusters=4, seed=0)
    assert found.tolist() == [1] * 6 + [0] * 7 + [3] * 6 + [2] * 8

    tokens, u = unit(40, 12, 3), unit(1, 12, 4)[0]
    labels, again = (cluster_tokens(tokens, u, clusters=6, seed=7) for _ in range(2))
    assert torch.equal(labels, again)
    means = [float(residuals(tokens, u)[labels == label].mean()) for label in range(6)]
    assert means == sorted(means)


@pytest.mark.parametrize("count", range(1, 12))
def test_few_tokens_are_clustered_or_left_in_one(count: int) -> None:
    tokens = unit(count, 5, count)
    found = cluster_tokens(tokens, unit(1, 5, 99)[0], clusters=7, seed=0)
    assert len(set(found.tolist())) == effective_clusters(count, 7)
    assert torch.isfinite(token_map(tokens, seed=0)).all()


def test_equal_tokens_do_not_break_clustering() -> None:
    found = cluster_tokens(unit(1, 5, 0).repeat(12, 1), unit(1, 5, 1)[0], clusters=4, seed=0)
    assert found.tolist() == [0] * 12
    assert [effective_clusters(n, 7) for n in (0, 8, 9, 12, 21, 100)] == [1, 1, 3, 4, 7, 7]
    assert effective_clusters(100, 2) == 1
    assert token_map(unit(1, 5, 0), seed=0).tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("alpha", [0.0, 0.01, 0.3])
def test_refine_equals_brute_force(seed: int, alpha: float) -> None:
    tokens, u = unit(12, 9, seed), unit(1, 9, seed + 70)[0]
    # Every prototype computed afresh from the tokens that are left.
    rests = [torch.cat([tokens[:i], tokens[i + 1 :]]).mean(0) for i in range(12)]
    d = [float((projector(u) @ rest).norm()) ** 2 for rest in rests]
    wanted = [own <= (1 + alpha) * (sum(d) - own) / 11 for own in d]
    assert refine(tokens, u, alpha=alpha).tolist() == wanted
    assert any(wanted)


def test_a_token_towards_the_concept_goes_and_the_others_stay() -> None:
    others = torch.zeros(9, 8)
    others[:, 0], others[:, 1] = 0.2, 1
    others += 0.01 * torch.randn(9, 8, generator=torch.Generator().manual_seed(0))
    pulling = 0.95 * torch.eye(8)[:1] + 0.3 * torch.eye(8)[1:2]
    tokens = F.normalize(torch.cat([others, pulling]), dim=1)
    assert refine(tokens, torch.eye(8)[0], alpha=0.05).tolist() == [True] * 9 + [False]


@pytest.mark.parametrize("size", range(SMALLEST_CLUSTER))
def test_small_clusters_are_left_alone(size: int) -> None:
    assert refine(unit(size, 4, 0), unit(1, 4, 1)[0], alpha=0.0).tolist() == [True] * size


def test_slack_is_the_papers_at_its_cluster_size_and_wider_below() -> None:
    assert scaled_alpha(0.01, PAPER_CLUSTER_SIZE) == scaled_alpha(0.01, 40) == 0.01
    assert scaled_alpha(0.01, 6) == pytest.approx(0.03)
    assert scaled_alpha(0.0, 2) == 0.0
