"""Groups of mined tokens, and the two groups that are not companions of the concept.

ReCARE, step "global clustering" (Kim et al., arXiv 2606.24192, section 3.1): t-SNE of the tokens'
text features to two dimensions, k-means there; the cluster nearest to the concept holds its own
names, the farthest one noise.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_FEWEST_FOR_TSNE = 8
"""Below this many points t-SNE has no neighbourhoods to keep; their principal axes do as well."""

_MOST_FOR_EXACT = 500


@dataclass(frozen=True)
class Clustering:
    """Tokens on a map, in clusters.

    Attributes:
        labels: ``[n]`` int64; clusters are numbered by their mean residual, nearest first.
        positions: ``[n, 2]`` float32 map.
        nearest: the cluster of the concept's own names, or None where none is to be dropped.
        farthest: the cluster of noise, or None where none is to be dropped.
    """

    labels: Tensor
    positions: Tensor
    nearest: int | None
    farthest: int | None


def residuals(token_features: Tensor, concept_feature: Tensor) -> Tensor:
    """What of each token the concept's direction does not explain: ``r(w) = ‖(I − u uᵀ) w‖``.

    Args:
        token_features: ``[n, width]``, unit rows ``w``.
        concept_feature: ``[width]``, unit vector ``u``.

    Returns:
        ``[n]``, 0 for the concept itself, 1 for what is unrelated to it.
    """
    along = token_features @ concept_feature
    return (token_features - along[:, None] * concept_feature).norm(dim=1)


def effective_clusters(tokens: int, clusters: int) -> int:
    """How many clusters so many tokens bear.

    Two clusters are dropped whole, so at least three are needed; and a cluster must hold about
    three tokens before a mean over it says more than its members.

    Args:
        tokens: number of tokens to cluster.
        clusters: the number asked for.

    Returns:
        The number to make; 1 means that clustering is left out.
    """
    fitting = min(clusters, tokens // 3)
    return fitting if fitting >= 3 else 1


def token_map(token_features: Tensor, *, seed: int) -> Tensor:
    """Lay tokens out in two dimensions by t-SNE, started from their principal axes.

    Args:
        token_features: ``[n, width]``, unit rows.
        seed: of t-SNE's own draws.

    Returns:
        ``[n, 2]`` float32. Fewer than eight tokens, or tokens that are all alike, are laid out by
        their principal axes alone.
    """
    axes = _principal_axes(token_features)
    spread = float(axes[:, 0].std(correction=0)) if len(axes) > 1 else 0.0
    # Tokens that are all alike have no map: t-SNE would divide by their spread, and its compiled
    # code crashes on the result.
    if len(axes) < _FEWEST_FOR_TSNE or spread < 1e-6:
        return axes.float()
    from sklearn.manifold import TSNE

    count = len(axes)
    # Perplexity is the number of neighbours that matter; the usual 30 needs three times as many tokens.
    perplexity = min(30.0, (count - 1) / 3)
    tsne = TSNE(
        n_components=2,
        init=(1e-4 / spread * axes).float().numpy(),
        perplexity=perplexity,
        # The exact gradient is fast enough for hundreds, and its sums run in one order.
        method="exact" if count <= _MOST_FOR_EXACT else "barnes_hut",
        random_state=seed % 2**32,
    )
    placed = tsne.fit_transform(token_features.double().numpy())
    return torch.from_numpy(np.ascontiguousarray(placed, dtype=np.float32))


def _principal_axes(features: Tensor) -> Tensor:
    """The first two principal components, ``[n, 2]`` float64, each with its largest value positive."""
    centred = features.double() - features.double().mean(0)
    positions = torch.zeros(len(features), 2, dtype=torch.float64)
    if len(features) > 1:
        u, s, _ = torch.linalg.svd(centred, full_matrices=False)
        axes = min(2, len(s))
        positions[:, :axes] = u[:, :axes] * s[:axes]
        # Which way an axis points is chance, and differs from one linear-algebra library to the next.
        largest = positions.gather(0, positions.abs().argmax(0, keepdim=True))
        positions *= torch.where(largest < 0, -1.0, 1.0)
    return positions


def cluster_tokens(
    token_features: Tensor, concept_feature: Tensor, *, clusters: int, seed: int
) -> Clustering:
    """Cluster tokens on their map and find the two clusters to drop.

    Args:
        token_features: ``[n, width]``, unit rows.
        concept_feature: ``[width]``, unit vector.
        clusters: how many; fewer where the tokens do not bear it (:func:`effective_clusters`).
        seed: of t-SNE and k-means.

    Returns:
        The clustering; with too few tokens one cluster, of which nothing is dropped.
    """
    from sklearn.cluster import KMeans

    positions = token_map(token_features, seed=seed)
    count = effective_clusters(len(token_features), clusters)
    # Tokens with one and the same feature cannot be told apart by any clustering.
    count = min(count, len(np.unique(positions.numpy(), axis=0)))
    if count < 3:
        return Clustering(torch.zeros(len(token_features), dtype=torch.int64), positions, None, None)
    found = KMeans(n_clusters=count, n_init=10, random_state=seed % 2**32).fit(positions.double().numpy())
    raw = torch.from_numpy(found.labels_.astype(np.int64))
    distance = residuals(token_features, concept_feature)
    means = torch.stack([distance[raw == label].mean() for label in range(count)])
    order = means.argsort(stable=True)
    labels = torch.empty_like(raw)
    for rank, label in enumerate(order.tolist()):
        labels[raw == label] = rank
    return Clustering(labels, positions, 0, count - 1)
