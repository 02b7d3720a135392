"""From target images to a CARE-set: mine, cluster, refine (Kim et al., arXiv 2606.24192, section 3.1)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn import functional as F

from recare_patch.careset import care_set as reasons
from recare_patch.careset.care_set import CareSet, CareToken, names_concept
from recare_patch.careset.clustering import cluster_tokens, effective_clusters, residuals
from recare_patch.careset.mining import (
    chance_level,
    default_keep,
    default_tokens_per_image,
    is_small,
    mine,
)
from recare_patch.careset.refinement import refine, scaled_alpha
from recare_patch.core import CareSetError
from recare_patch.recipe import CareSetOptions, Concept

if TYPE_CHECKING:
    from PIL.Image import Image

    from recare_patch.careset.clip import Clip
    from recare_patch.core import Progress


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
    tokens_per_image = options.tokens_per_image or default_tokens_per_image(len(words))
    keep = options.keep or default_keep(len(words))
    _report(progress, 0)
    seen = clip.image_features(images)
    _report(progress, 1)
    vocabulary = clip.text_features(words)
    _report(progress, 2)
    mined = mine(seen, vocabulary, tokens_per_image=tokens_per_image, keep=keep)

    features = vocabulary[mined.indices]
    names = [words[i] for i in mined.indices.tolist()]
    sorting = _Sorting(names, features, mined.counts, concept_feature(concept, clip, seen))
    sorting.set_names_apart(concept)
    if sorting.kept():
        sorting.drop_chance(chance_level(len(images), tokens_per_image, len(words)))
        sorting.cluster(options, small=is_small(len(words)), seed=seed)
        if options.refinement:
            sorting.refine(options.alpha)
    else:
        raise CareSetError(
            f"all {len(names)} words that CLIP '{clip.id}' finds in the pictures of '{concept}' name the "
            "concept itself: draw more target images, or give words of your own with --care-set"
        )
    _report(progress, 3)
    used = {
        "tokens_per_image": min(tokens_per_image, len(words)),
        "keep": keep,
        "clusters": sorting.made,
        "file": None,
    }
    return CareSet(
        concept=concept,
        clip=clip.id,
        seed=seed,
        images=len(images),
        settings=options.model_copy(update=used),
        tokens=sorting.tokens(),
        dropped=dict(Counter(token.reason for token in fragments)),
        notes=tuple(sorting.notes),
    )


def _report(progress: Progress | None, done: int) -> None:
    if progress is not None:
        progress.update("CARE-set", done, 3)


class _Sorting:
    """The mined tokens while one after another is dropped.

    Attributes:
        verdicts: "kept", or why not; one a token.
        clusters: the cluster of each token; None where it was not clustered.
        made: how many clusters were made.
        notes: what was done otherwise than asked.
    """

    def __init__(self, names: Sequence[str], features: Tensor, counts: Tensor, u: Tensor) -> None:
        self.names, self.features, self.counts, self.u = names, features, counts, u
        self.verdicts = [reasons.KEPT] * len(names)
        self.clusters: list[int | None] = [None] * len(names)
        self.made = 1
        self.notes: list[str] = []

    def kept(self) -> list[int]:
        return [i for i, verdict in enumerate(self.verdicts) if verdict == reasons.KEPT]

    def set_names_apart(self, concept: Concept) -> None:
        for i, name in enumerate(self.names):
            if names_concept(name, concept):
                self.verdicts[i] = reasons.NAMES_CONCEPT

    def drop_chance(self, level: float) -> None:
        """Drop what was mined too rarely to mean something, unless that is everything."""
        rare = [i for i in self.kept() if float(self.counts[i]) <= level]
        if len(rare) == len(self.kept()):
            self.notes.append(
                "no word was mined more often than by chance: the most frequent were taken anyway"
            )
            return
        for i in rare:
            self.verdicts[i] = reasons.BY_CHANCE

    def cluster(self, options: CareSetOptions, *, small: bool, seed: int) -> None:
        """Drop the cluster of the concept's names and, in a large vocabulary, the one of noise."""
        if not options.clustering:
            return
        # Names of the concept take part: they are what draws its other names into one cluster.
        sound = [i for i, verdict in enumerate(self.verdicts) if verdict != reasons.BY_CHANCE]
        count = effective_clusters(len(sound), options.clusters)
        if count == 1:
            self.notes.append(
                f"no clustering: {len(sound)} tokens and {options.clusters} clusters leave nothing to drop"
            )
            return
        if count < options.clusters:
            self.notes.append(
                f"{count} clusters instead of {options.clusters}: there are only {len(sound)} tokens"
            )
        clustering = cluster_tokens(self.features[sound], self.u, clusters=options.clusters, seed=seed)
        labels: list[int] = clustering.labels.tolist()
        self.made = 1 + max(labels)
        for i, label in zip(sound, labels, strict=True):
            self.clusters[i] = label
        unwanted = {clustering.nearest: reasons.NEAREST_CLUSTER}
        if small:
            # Chance has thinned the list already; a whole cluster more would be companions.
            self.notes.append("the farthest cluster was kept: in a small vocabulary, chance tells the noise")
        else:
            unwanted[clustering.farthest] = reasons.FARTHEST_CLUSTER
        going = [i for i in self.kept() if self.clusters[i] in unwanted]
        if len(going) == len(self.kept()):
            self.notes.append("no cluster was dropped: nothing would have been left")
            return
        for i in going:
            self.verdicts[i] = unwanted[self.clusters[i]]

    def refine(self, alpha: float) -> None:
        """Drop what pulls its cluster towards the concept; some of every cluster always stays."""
        companions = self.kept()
        for cluster in dict.fromkeys(self.clusters[i] for i in companions):
            members = [i for i in companions if self.clusters[i] == cluster]
            stays = refine(self.features[members], self.u, alpha=scaled_alpha(alpha, len(members)))
            for i, stay in zip(members, stays.tolist(), strict=True):
                if not stay:
                    self.verdicts[i] = reasons.PULLS

    def tokens(self) -> tuple[CareToken, ...]:
        distances = residuals(self.features, self.u).tolist()
        return tuple(
            CareToken(
                text=name,
                count=int(self.counts[i]),
                cluster=self.clusters[i],
                residual=round(distances[i], 6),
                kept=self.verdicts[i] == reasons.KEPT,
                reason=self.verdicts[i],
            )
            for i, name in enumerate(self.names)
        )
