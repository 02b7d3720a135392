"""Tokens that pull their cluster towards the concept, found one by one.

ReCARE, step "intra-cluster refinement" (Kim et al., arXiv 2606.24192, section 3.1).
"""

from __future__ import annotations

import torch
from torch import Tensor

PAPER_CLUSTER_SIZE = 16
"""Mean size of a cluster in the paper: 100 tokens in 6 clusters."""


SMALLEST_CLUSTER = 5
"""A cluster of fewer tokens is not refined. The length of a prototype of two or three others says
how alike those are, and drowns what it says about the concept: the odd one out would always go."""


def leave_one_out_distances(token_features: Tensor, concept_feature: Tensor) -> Tensor:
    """How far a cluster's prototype is from the concept's direction without each token.

    ``p₋w = (Σ − w) / (n − 1)`` and ``d₋w = ‖(I − u uᵀ) p₋w‖²``.

    Args:
        token_features: ``[n, width]`` of one cluster, n ≥ 2.
        concept_feature: ``[width]``, unit vector ``u``.

    Returns:
        ``[n]``, ``d₋w`` of every token.
    """
    others = (token_features.sum(0) - token_features) / (len(token_features) - 1)
    along = others @ concept_feature
    return (others - along[:, None] * concept_feature).square().sum(1)


def scaled_alpha(alpha: float, size: int) -> float:
    """The slack for a cluster of another size than the paper's.

    One of n tokens moves its cluster's prototype by about 1/(n − 1) of the way. The paper's slack
    was set on clusters of about 16; in one of five, the same slack would call nearly every second
    token an outlier.

    Args:
        alpha: slack for a cluster of :data:`PAPER_CLUSTER_SIZE` tokens.
        size: tokens in this cluster.
    """
    return alpha * max(1.0, (PAPER_CLUSTER_SIZE - 1) / max(1, size - 1))


def refine(token_features: Tensor, concept_feature: Tensor, *, alpha: float) -> Tensor:
    """Which tokens of one cluster may stay.

    A token goes when the prototype without it is farther from the concept than the others'
    prototypes are on average: ``d₋w > (1 + α) · mean over the others of d``.

    Args:
        token_features: ``[n, width]`` of one cluster.
        concept_feature: ``[width]``, unit vector.
        alpha: slack; see :func:`scaled_alpha`.

    Returns:
        ``[n]`` bool. In a cluster of fewer than :data:`SMALLEST_CLUSTER` tokens all stay.
    """
    count = len(token_features)
    if count < SMALLEST_CLUSTER:
        return torch.ones(count, dtype=torch.bool)
    features = token_features.double()
    distances = leave_one_out_distances(features, concept_feature.double())
    others = (distances.sum() - distances) / (count - 1)
    return distances <= (1 + alpha) * others
