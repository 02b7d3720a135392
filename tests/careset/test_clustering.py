from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from recare_patch.careset.clustering import cluster_tokens, effective_clusters, residuals, token_map


def unit(rows: int, width: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, width, generator=generator, dtype=torch.float64), dim=1)


def blobs(
    sizes: tuple[int, ...], along: tuple[float, ...], seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tight groups of unit rows whose cosine with the concept (the first axis) is as given."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for group, (size, cosine) in enumerate(zip(sizes, along, strict=True)):
        centre = torch.zeros(16, dtype=torch.float64)
        centre[0], centre[group + 1] = cosine, (1 - cosine**2) ** 0.5
        rows.append(centre + 0.02 * torch.randn(size, 16, generator=generator, dtype=torch.float64))
    concept = torch.zeros(16, dtype=torch.float64)
    concept[0] = 1
    return F.normalize(torch.cat(rows), dim=1), concept


@pytest.mark.parametrize("seed", range(4))
def test_residual_equals_the_projection_written_out(seed: int) -> None:
    tokens, concept = unit(11, 7, seed), unit(1, 7, seed + 50)[0]
    projector = torch.eye(7, dtype=torch.float64) - torch.outer(concept, concept)
    wanted = torch.stack([torch.linalg.norm(projector @ token) for token in tokens])
    torch.testing.assert_close(residuals(tokens, concept), wanted)
    assert residuals(concept[None], concept)[0] < 1e-12


def test_nearest_and_farthest_clusters_are_found() -> None:
    tokens, concept = blobs((6, 7, 6, 8), (0.95, 0.5, 0.3, 0.0))
    found = cluster_tokens(tokens, concept, clusters=4, seed=0)
    assert found.labels.tolist() == [0] * 6 + [1] * 7 + [2] * 6 + [3] * 8
    assert (found.nearest, found.farthest) == (0, 3)
    assert found.positions.shape == (27, 2)


def test_clusters_are_numbered_by_mean_residual() -> None:
    tokens, concept = unit(40, 12, 3), unit(1, 12, 4)[0]
    found = cluster_tokens(tokens, concept, clusters=6, seed=0)
    distances = residuals(tokens, concept)
    means = [float(distances[found.labels == label].mean()) for label in range(6)]
    assert means == sorted(means)


def test_the_same_seed_gives_the_same_clusters() -> None:
    tokens, concept = unit(30, 12, 3).float(), unit(1, 12, 4)[0].float()
    first, second = (cluster_tokens(tokens, concept, clusters=5, seed=7) for _ in range(2))
    assert torch.equal(first.labels, second.labels)
    assert torch.equal(first.positions, second.positions)


@pytest.mark.parametrize("count", range(1, 12))
def test_few_tokens_are_clustered_or_left_in_one(count: int) -> None:
    found = cluster_tokens(unit(count, 5, count), unit(1, 5, 99)[0], clusters=7, seed=0)
    made = effective_clusters(count, 7)
    assert len(set(found.labels.tolist())) == made
    assert (found.nearest is None) == (made == 1)
    assert torch.isfinite(found.positions).all()


def test_equal_tokens_do_not_break_clustering() -> None:
    same = unit(1, 5, 0).repeat(12, 1)
    found = cluster_tokens(same, unit(1, 5, 1)[0], clusters=4, seed=0)
    assert torch.isfinite(found.positions).all()
    assert found.labels.shape == (12,)


def test_effective_clusters() -> None:
    assert [effective_clusters(n, 7) for n in (0, 8, 9, 12, 21, 100)] == [1, 1, 3, 4, 7, 7]
    assert effective_clusters(100, 2) == 1


def test_a_map_of_one_token_is_its_origin() -> None:
    assert token_map(unit(1, 5, 0), seed=0).tolist() == [[0.0, 0.0]]
