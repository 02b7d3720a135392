"""From target images to a CARE-set: mine, cluster, refine (Kim et al., arXiv 2606.24192, section 3.1)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn import functional as F

from recare_patch.careset import care_set as reasons
from recare_patch.careset.care_set import CareSet, CareToken, names_concept
from recare_patch.careset.clustering import Clustering, cluster_tokens, effective_clusters, residuals
from recare_patch.careset.mining import (
    MinedTokens,
    chance_level,
    default_keep,
    default_tokens_per_image,
    is_small,
    mine,
)
from recare_patch.careset.refinement import refine, scaled_alpha
from recare_patch.concepts import Concept
from recare_patch.errors import CareSetError
from recare_patch.recipe import CareSetOptions

if TYPE_CHECKING:
    from PIL.Image import Image

    from recare_patch.clip import Clip
    from recare_patch.progress import Progress


def concept_feature(concept: Concept, clip: Clip, image_features: Tensor | None = None) -> Tensor:
    """The unit vector ``u`` that stands for the concept among texts.

    CLIP may not know every name of a concept (a small one knows "nude" and not "nudity"), and the
    feature of an unknown word points nowhere. The pictures tell: of the concept's names, the one
    that they are most like.

    Args:
        concept: what is erased.
        clip: where features come from.
        image_features: ``[images, width]`` of its target images; None: the mean of all its names.

    Returns:
        ``[width]`` unit vector.
    """
    names = list(dict.fromkeys([concept.text, *concept.name_prompts]))
    features = clip.text_features(names)
    if image_features is None or not len(image_features):
        return F.normalize(features.mean(0), dim=0)
    return features[int((image_features @ features.T).mean(0).argmax())]


def build_care_set(
    concept: Concept,
    images: Sequence[Image],
    clip: Clip,
    options: CareSetOptions | None = None,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> CareSet:
    """Find the benign concepts that come along with a concept in its pictures.

    Args:
        concept: what is erased.
        images: pictures of it, from the untouched base.
        clip: mines, and measures distances.
        options: how; the defaults suit the vocabulary's size.
        seed: of t-SNE and k-means.
        progress: told about images and words.

    Returns:
        All mined tokens, kept or dropped with the reason.

    Raises:
        CareSetError: no images, no whole word in CLIP's vocabulary, or nothing but names of the
            concept was found.
    """
    options = options or CareSetOptions()
    if not len(images):
        raise CareSetError(f"a CARE-set for '{concept}' needs target images, and none were given")
    words, fragments = clip.vocabulary()
    if not words:
        raise CareSetError(
            f"the tokenizer of the CLIP '{clip.id}' has no whole word to mine: choose another --clip, "
            "or give words of your own with --care-set"
        )
    vocabulary_size = len(words)
    tokens_per_image = options.tokens_per_image or default_tokens_per_image(vocabulary_size)
    keep = options.keep or default_keep(vocabulary_size)
    _report(progress, 0)
    seen = clip.image_features(images)
    _report(progress, 1)
    vocabulary = clip.text_features(words)
    _report(progress, 2)
    mined = mine(seen, vocabulary, tokens_per_image=tokens_per_image, keep=keep)
    u = concept_feature(concept, clip, seen)

    names = [words[i] for i in mined.indices.tolist()]
    features = vocabulary[mined.indices]
    distances = residuals(features, u)
    least = chance_level(len(images), tokens_per_image, vocabulary_size)
    notes: list[str] = []
    verdicts, clusters, made = _judge(
        names,
        features,
        mined,
        u,
        concept,
        options,
        least=least,
        small=is_small(vocabulary_size),
        seed=seed,
        notes=notes,
    )
    if all(verdict != reasons.KEPT for verdict in verdicts):
        raise CareSetError(
            f"all {len(names)} words that CLIP '{clip.id}' finds in the {len(images)} pictures of '{concept}' name the concept "
            "itself or are chance: draw more target images, or give words of your own with --care-set"
        )
    _report(progress, 3)
    used = options.model_copy(
        update={
            "tokens_per_image": min(tokens_per_image, vocabulary_size),
            "keep": keep,
            "clusters": made,
            "file": None,
        }
    )
    return CareSet(
        concept=concept,
        clip=clip.id,
        seed=seed,
        images=len(images),
        settings=used,
        tokens=tuple(
            CareToken(
                text=name,
                count=int(count),
                cluster=cluster,
                residual=round(float(distance), 6),
                kept=verdict == reasons.KEPT,
                reason=verdict,
            )
            for name, count, cluster, distance, verdict in zip(
                names, mined.counts, clusters, distances, verdicts, strict=True
            )
        ),
        dropped=dict(Counter(token.reason for token in fragments)),
        notes=tuple(notes),
    )


def _report(progress: Progress | None, done: int) -> None:
    if progress is not None:
        progress.update("CARE-set", done, 3)


def _judge(
    names: Sequence[str],
    features: Tensor,
    mined: MinedTokens,
    u: Tensor,
    concept: Concept,
    options: CareSetOptions,
    *,
    least: float,
    small: bool,
    seed: int,
    notes: list[str],
) -> tuple[list[str], list[int | None], int]:
    """The verdict and the cluster of every mined token, and how many clusters were made."""
    verdicts = [reasons.KEPT] * len(names)
    clusters: list[int | None] = [None] * len(names)
    for i, name in enumerate(names):
        if names_concept(name, concept):
            verdicts[i] = reasons.NAMES_CONCEPT
        elif float(mined.counts[i]) <= least:
            verdicts[i] = reasons.BY_CHANCE
    # Names of the concept stay in the clustering: they are what draws its other names together.
    sound = [i for i in range(len(names)) if verdicts[i] != reasons.BY_CHANCE]
    companions = [i for i in sound if verdicts[i] == reasons.KEPT]
    if not companions:
        return verdicts, clusters, 1
    clustering = _clustering(features[sound], u, options, seed, notes)
    made = 1
    if clustering is not None:
        labels: list[int] = clustering.labels.tolist()
        made = 1 + max(labels)
        for i, label in zip(sound, labels, strict=True):
            clusters[i] = label
        unwanted = {clustering.nearest: reasons.NEAREST_CLUSTER}
        if not small:
            unwanted[clustering.farthest] = reasons.FARTHEST_CLUSTER
        elif clustering.farthest is not None:
            notes.append(
                "the farthest cluster was not dropped: in a small vocabulary, noise is what is mined by chance"
            )
        left = [i for i in companions if clusters[i] not in unwanted]
        if left:
            for i in companions:
                if i not in left:
                    verdicts[i] = unwanted[clusters[i]]
            companions = left
        else:
            notes.append("no cluster was dropped: nothing would have been left")
    if options.refinement:
        _refine(features, u, companions, clusters, options.alpha, verdicts)
    return verdicts, clusters, made


def _clustering(
    features: Tensor, u: Tensor, options: CareSetOptions, seed: int, notes: list[str]
) -> Clustering | None:
    if not options.clustering:
        return None
    count = effective_clusters(len(features), options.clusters)
    if count == 1:
        notes.append(f"no clustering: {len(features)} tokens are too few for three clusters")
    elif count < options.clusters:
        notes.append(f"{count} clusters instead of {options.clusters}: only {len(features)} tokens")
    return cluster_tokens(features, u, clusters=options.clusters, seed=seed)


def _refine(
    features: Tensor,
    u: Tensor,
    companions: Sequence[int],
    clusters: Sequence[int | None],
    alpha: float,
    verdicts: list[str],
) -> None:
    """Drop what pulls its cluster towards the concept; at least one token of every cluster stays below the mean."""
    for cluster in dict.fromkeys(clusters[i] for i in companions):
        members = [i for i in companions if clusters[i] == cluster]
        stays = refine(features[members], u, alpha=scaled_alpha(alpha, len(members)))
        for i, kept in zip(members, stays.tolist(), strict=True):
            if not kept:
                verdicts[i] = reasons.PULLS
