from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from recare_patch.careset.refinement import (
    PAPER_CLUSTER_SIZE,
    SMALLEST_CLUSTER,
    leave_one_out_distances,
    refine,
    scaled_alpha,
)


def unit(rows: int, width: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, width, generator=generator, dtype=torch.float64), dim=1)


def brute_distances(tokens: torch.Tensor, concept: torch.Tensor) -> list[float]:
    """Every prototype computed afresh from the tokens that are left."""
    width = len(concept)
    projector = torch.eye(width, dtype=tokens.dtype) - torch.outer(concept, concept)
    found = []
    for out in range(len(tokens)):
        rest = [tokens[i] for i in range(len(tokens)) if i != out]
        prototype = sum(rest, torch.zeros(width, dtype=tokens.dtype)) / len(rest)
        found.append(float(torch.linalg.norm(projector @ prototype)) ** 2)
    return found


def brute_refine(tokens: torch.Tensor, concept: torch.Tensor, alpha: float) -> list[bool]:
    d = brute_distances(tokens, concept)
    stays = []
    for i, own in enumerate(d):
        others = [value for k, value in enumerate(d) if k != i]
        stays.append(not own > (1 + alpha) * (sum(others) / len(others)))
    return stays


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("size", [2, 3, 5, 16])
def test_leave_one_out_equals_brute_force(seed: int, size: int) -> None:
    tokens, concept = unit(size, 9, seed), unit(1, 9, seed + 70)[0]
    wanted = torch.tensor(brute_distances(tokens, concept), dtype=torch.float64)
    torch.testing.assert_close(leave_one_out_distances(tokens, concept), wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("alpha", [0.0, 0.01, 0.3])
def test_refine_equals_brute_force(seed: int, alpha: float) -> None:
    tokens, concept = unit(12, 9, seed), unit(1, 9, seed + 70)[0]
    assert refine(tokens, concept, alpha=alpha).tolist() == brute_refine(tokens, concept, alpha)


def test_a_token_towards_the_concept_goes_and_the_others_stay() -> None:
    concept = torch.zeros(8)
    concept[0] = 1
    others = torch.zeros(9, 8)
    others[:, 1] = 1
    others[:, 0] = 0.2
    others += 0.01 * torch.randn(9, 8, generator=torch.Generator().manual_seed(0))
    pulling = torch.zeros(1, 8)
    pulling[0, 0], pulling[0, 1] = 0.95, 0.3
    tokens = F.normalize(torch.cat([others, pulling]), dim=1)
    assert refine(tokens, concept, alpha=0.05).tolist() == [True] * 9 + [False]


@pytest.mark.parametrize("size", range(SMALLEST_CLUSTER))
def test_small_clusters_are_left_alone(size: int) -> None:
    assert refine(unit(size, 4, 0), unit(1, 4, 1)[0], alpha=0.0).tolist() == [True] * size


def test_not_every_token_can_go() -> None:
    for seed in range(30):
        assert refine(unit(6, 5, seed), unit(1, 5, seed + 500)[0], alpha=0.0).any()


def test_slack_is_the_papers_at_its_cluster_size_and_wider_below() -> None:
    assert scaled_alpha(0.01, PAPER_CLUSTER_SIZE) == 0.01
    assert scaled_alpha(0.01, 40) == 0.01
    assert scaled_alpha(0.01, 6) == pytest.approx(0.03)
    assert scaled_alpha(0.0, 2) == 0.0
