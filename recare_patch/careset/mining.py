"""From target images to a CARE-set: mine, cluster, refine (Kim et al., arXiv 2606.24192, section 3.1)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from recare_patch.careset.care_set import BARRED, KEPT, NAMES_CONCEPT, CareSet, CareToken
from recare_patch.careset.lexicon import is_barred
from recare_patch.core import CareSetError, NullProgress
from recare_patch.recipe import CareSetOptions, Concept, Kind, names_concept

if TYPE_CHECKING:
    from PIL.Image import Image

    from recare_patch.careset.clip import Clip
    from recare_patch.core import Progress

NEAREST_CLUSTER = "in the cluster nearest to the concept: its other names"
FARTHEST_CLUSTER = "in the cluster farthest from the concept: noise"
BY_CHANCE = "not mined more often than by chance"
PULLS = "pulls its cluster towards the concept"

PAPER_TOKENS_PER_IMAGE = 50
PAPER_CLUSTER_SIZE = 16
"""Mean size of a cluster in the paper: 100 tokens in 6 clusters."""

SMALLEST_CLUSTER = 5
"""A cluster of fewer tokens is not refined. The length of a prototype of two or three others says
how alike those are, and drowns what it says about the concept: the odd one out would always go."""


def concept_feature(concept: Concept, clip: Clip, image_features: Tensor | None = None) -> Tensor:
    """The unit vector ``u`` that stands for the concept among texts, ``[width]``.

    CLIP may not know every name of a concept (a small one knows "nude" and not "nudity"), and the feature
    of an unknown word points nowhere. The target images tell: it is the name that they are most like, or
    the mean of all names without any.
    """
    features = clip.text_features(list(dict.fromkeys([concept.text, *concept.name_prompts])))
    if image_features is None or not len(image_features):
        return F.normalize(features.mean(0), dim=0)
    return features[int((image_features @ features.T).mean(0).argmax())]


def default_tokens_per_image(vocabulary: int) -> int:
    """How many tokens to take from each image when nobody says.

    The paper takes 50 of CLIP's 49,408. Fifty of a hundred words would be every second one, right
    or wrong; a square root shrinks more slowly than the vocabulary, because a picture does not hold
    fewer things when there are fewer words for them. The factor reaches the paper's 50 at 1,600
    words and takes ten of Atelier's 64.
    """
    return max(1, min(PAPER_TOKENS_PER_IMAGE, round(1.25 * math.sqrt(vocabulary))))


def chance_level(images: int, tokens_per_image: int, vocabulary: int) -> float:
    """The count that a token must exceed to be more than chance, less than ``images``.

    Were the tokens of each image drawn at random, a token's count would be binomial with
    ``p = tokens_per_image / vocabulary``; the level is its mean and three standard deviations.
    Of CLIP's own vocabulary it is a handful of hundreds of images, and drops next to nothing; among
    a hundred words it is what tells companions from words that fill up the number.
    """
    p = min(1.0, tokens_per_image / vocabulary)
    level = images * p + 3 * math.sqrt(images * p * (1 - p))
    # With few images the level can pass them all: then a token found in every image still counts.
    return min(level, images - 0.5)


def mine(image_features: Tensor, token_features: Tensor, *, tokens_per_image: int, keep: int) -> tuple[Tensor, Tensor]:
    """Count in how many images each token is among the most like, and keep the most frequent.

    Equal counts are ordered by mean cosine with the images, then by index: the same images always
    give the same list. Of features, ``[images or tokens, width]``, all rows are unit vectors.

    Returns:
        At most ``keep`` tokens, the most frequent first, and their counts: ``[m]`` int64 each.
    """
    cosine = image_features @ token_features.T
    best = cosine.argsort(dim=1, descending=True, stable=True)[:, :tokens_per_image]
    counts = torch.bincount(best.flatten(), minlength=len(token_features))
    by_mean = (image_features.mean(0) @ token_features.T).argsort(descending=True, stable=True)
    order = by_mean[counts[by_mean].argsort(descending=True, stable=True)]
    order = order[counts[order] > 0][:keep]
    return order, counts[order]


def residuals(token_features: Tensor, u: Tensor) -> Tensor:
    """What of each token the concept's direction does not explain: ``r(w) = ‖(I − u uᵀ) w‖``, ``[n]``.

    It is 0 for the concept itself and 1 for what is unrelated to it. Rows ``w`` and ``u`` are unit vectors.
    """
    along = token_features @ u
    return (token_features - along[:, None] * u).norm(dim=1)


def effective_clusters(tokens: int, clusters: int) -> int:
    """How many clusters so many tokens bear; 1 means that clustering is left out.

    Two clusters are dropped whole, so at least three are needed; and a cluster must hold about
    three tokens before a mean over it says more than its members.
    """
    fitting = min(clusters, tokens // 3)
    return fitting if fitting >= 3 else 1


def token_map(token_features: Tensor, *, seed: int) -> Tensor:
    """Lay tokens out in two dimensions by t-SNE, started from their principal axes: ``[n, 2]`` float32.

    Fewer than eight tokens, or tokens that are all alike, are laid out by their principal axes alone.
    """
    count = len(token_features)
    axes = torch.zeros(count, 2, dtype=torch.float64)
    if count > 1:
        centred = token_features.double() - token_features.double().mean(0)
        u, s, _ = torch.linalg.svd(centred, full_matrices=False)
        found = min(2, len(s))
        axes[:, :found] = u[:, :found] * s[:found]
        # Which way an axis points is chance, and differs from one linear-algebra library to the next.
        largest = axes.gather(0, axes.abs().argmax(0, keepdim=True))
        axes *= torch.where(largest < 0, -1.0, 1.0)
        # Features are unit vectors: what is left of tokens that are all alike is rounding, another on each machine.
        axes[axes.abs() < 1e-6] = 0
    spread = float(axes[:, 0].std(correction=0)) if count > 1 else 0.0
    # A few points have no neighbourhoods that t-SNE could keep. Tokens that are all alike have no map: it
    # would divide by their spread, and its compiled code crashes on the result.
    if count < 8 or spread < 1e-6:
        return axes.float()
    from sklearn.manifold import TSNE

    tsne = TSNE(
        n_components=2,
        init=(1e-4 / spread * axes).float().numpy(),
        # Neighbours that matter; the usual 30 needs three times as many tokens.
        perplexity=min(30.0, (count - 1) / 3),
        # The exact gradient is fast enough for hundreds, and its sums run in one order.
        method="exact" if count <= 500 else "barnes_hut",
        random_state=seed % 2**32,
    )
    placed = tsne.fit_transform(token_features.double().numpy())
    return torch.from_numpy(np.ascontiguousarray(placed, dtype=np.float32))


def cluster_tokens(token_features: Tensor, u: Tensor, *, clusters: int, seed: int) -> Tensor:
    """The cluster of each token by k-means on their map, numbered by mean residual, the nearest first.

    The nearest one holds the concept's own names and the farthest one noise, if there are three or more;
    there are fewer than asked for where the tokens do not bear it (:func:`effective_clusters`).
    """
    from sklearn.cluster import KMeans

    positions = token_map(token_features, seed=seed)
    count = effective_clusters(len(token_features), clusters)
    # Tokens with one and the same feature cannot be told apart by any clustering.
    count = min(count, len(np.unique(positions.numpy(), axis=0)))
    labels = torch.zeros(len(token_features), dtype=torch.int64)
    if count < 3:
        return labels
    found = KMeans(n_clusters=count, n_init=10, random_state=seed % 2**32).fit(positions.double().numpy())
    raw = torch.from_numpy(found.labels_.astype(np.int64))
    distance = residuals(token_features, u)
    means = torch.stack([distance[raw == label].mean() for label in range(count)])
    for rank, label in enumerate(means.argsort(stable=True).tolist()):
        labels[raw == label] = rank
    return labels


def scaled_alpha(alpha: float, size: int) -> float:
    """The slack for a cluster of another size than the paper's.

    One of n tokens moves its cluster's prototype by about 1/(n − 1) of the way. The paper's slack
    was set on clusters of about 16; in one of five, the same slack would call nearly every second
    token an outlier.
    """
    return alpha * max(1.0, (PAPER_CLUSTER_SIZE - 1) / max(1, size - 1))


def refine(token_features: Tensor, u: Tensor, *, alpha: float) -> Tensor:
    """Which tokens of one cluster may stay, ``[n]`` bool; of fewer than :data:`SMALLEST_CLUSTER` all do.

    ``p₋w = (Σ − w) / (n − 1)`` is the prototype without a token, ``d₋w = ‖(I − u uᵀ) p₋w‖²`` its distance
    from the concept's direction. A token goes where that is farther than the others' are on average:
    ``d₋w > (1 + α) · mean over the others of d``.
    """
    count = len(token_features)
    if count < SMALLEST_CLUSTER:
        return torch.ones(count, dtype=torch.bool)
    features, u = token_features.double(), u.double()
    prototypes = (features.sum(0) - features) / (count - 1)
    along = prototypes @ u
    distances = (prototypes - along[:, None] * u).square().sum(1)
    others = (distances.sum() - distances) / (count - 1)
    return distances <= (1 + alpha) * others


class _Sorting:
    """The mined tokens while one after another is dropped."""

    def __init__(self, concept: Concept, names: Sequence[str], features: Tensor, counts: list[int], u: Tensor) -> None:
        self.names, self.features, self.counts, self.u = names, features, counts, u
        self.verdicts = [
            NAMES_CONCEPT if names_concept(name, concept) else BARRED if is_barred(name, concept) else KEPT
            for name in names
        ]
        self.clusters: list[int | None] = [None] * len(names)
        self.made = 1
        self.notes: list[str] = []

    def kept(self) -> list[int]:
        return [i for i, verdict in enumerate(self.verdicts) if verdict == KEPT]

    def drop(self, why: dict[int, str], otherwise: str) -> None:
        """Drop tokens for a reason each, or note that this would have been everything."""
        if len(why) == len(self.kept()):
            self.notes.append(otherwise)
            return
        for i, reason in why.items():
            self.verdicts[i] = reason

    def cluster(self, options: CareSetOptions, *, small: bool, seed: int) -> None:
        """Drop the cluster of the concept's names and, in a large vocabulary, the one of noise."""
        # Names of the concept take part: they are what draws its other names into one cluster.
        sound = [i for i, verdict in enumerate(self.verdicts) if verdict != BY_CHANCE]
        count = effective_clusters(len(sound), options.clusters)
        if count == 1:
            self.notes.append(
                f"no clustering: {len(sound)} tokens and {options.clusters} clusters leave nothing to drop"
            )
            return
        if count < options.clusters:
            self.notes.append(f"{count} clusters instead of {options.clusters}: there are only {len(sound)} tokens")
        labels: list[int] = cluster_tokens(self.features[sound], self.u, clusters=options.clusters, seed=seed).tolist()
        self.made = 1 + max(labels)
        for i, label in zip(sound, labels, strict=True):
            self.clusters[i] = label
        unwanted: dict[int | None, str] = {0: NEAREST_CLUSTER} if self.made > 1 else {}
        if small:
            # Chance has thinned the list already; a whole cluster more would be companions.
            self.notes.append("the farthest cluster was kept: in a small vocabulary, chance tells the noise")
        elif self.made > 1:
            unwanted[max(labels)] = FARTHEST_CLUSTER
        going = {i: unwanted[self.clusters[i]] for i in self.kept() if self.clusters[i] in unwanted}
        self.drop(going, "no cluster was dropped: nothing would have been left")

    def refine(self, alpha: float) -> None:
        """Drop what pulls its cluster towards the concept; some of every cluster always stays."""
        companions = self.kept()
        for cluster in dict.fromkeys(self.clusters[i] for i in companions):
            members = [i for i in companions if self.clusters[i] == cluster]
            stays = refine(self.features[members], self.u, alpha=scaled_alpha(alpha, len(members)))
            for i, stay in zip(members, stays.tolist(), strict=True):
                if not stay:
                    self.verdicts[i] = PULLS

    def tokens(self) -> tuple[CareToken, ...]:
        distances = residuals(self.features, self.u).tolist()
        return tuple(
            CareToken(
                text=self.names[i],
                count=self.counts[i],
                cluster=self.clusters[i],
                residual=round(distances[i], 6),
                kept=verdict == KEPT,
                reason=verdict,
            )
            for i, verdict in enumerate(self.verdicts)
        )


def no_word(clip: str) -> str:
    """The sentence for a CLIP of whose vocabulary nothing can be mined."""
    return (
        f"the tokenizer of the CLIP '{clip}' has no whole word to mine: choose another --clip, "
        "or give words of your own with --care-set"
    )


def _words(clip: Clip) -> tuple[list[str], dict[str, int]]:
    words, fragments = clip.vocabulary()
    if not words:
        raise CareSetError(no_word(clip.id))
    return words, dict(Counter(reason for _, reason in fragments))


def mined_care_set(
    concept: Concept,
    images: Sequence[Image],
    clip: Clip,
    options: CareSetOptions | None = None,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> CareSet:
    """The published way: mine CLIP's own vocabulary in ``images`` of the concept, cluster it, refine the clusters.

    The default ``options`` suit the size of CLIP's vocabulary; ``seed`` is that of t-SNE and k-means. All
    mined tokens are listed, kept or dropped with the reason.

    Raises:
        CareSetError: no images, no whole word in the vocabulary, or nothing but names of the concept found.
    """
    options, progress = options or CareSetOptions(), progress or NullProgress()
    if not len(images):
        raise CareSetError(f"a CARE-set for '{concept}' needs target images, and none were given")
    words, fragments = _words(clip)
    usual = default_tokens_per_image(len(words))
    each, keep = options.tokens_per_image or usual, options.keep or 2 * usual  # twice, as in the paper
    progress.update("CARE-set", 0, 3)
    seen = clip.image_features(images)
    progress.update("CARE-set", 1, 3)
    vocabulary = clip.text_features(words)
    progress.update("CARE-set", 2, 3)
    mined, counts = mine(seen, vocabulary, tokens_per_image=each, keep=keep)
    names = [words[i] for i in mined.tolist()]
    sorting = _Sorting(concept, names, vocabulary[mined], counts.tolist(), concept_feature(concept, clip, seen))
    if not sorting.kept():
        raise CareSetError(
            f"all {len(names)} words that CLIP '{clip.id}' finds in the pictures of '{concept}' name the "
            "concept itself: draw more target images, or give words of your own with --care-set"
        )
    level = chance_level(len(images), each, len(words))
    sorting.drop(
        {i: BY_CHANCE for i in sorting.kept() if sorting.counts[i] <= level},
        "no word was mined more often than by chance: the most frequent were taken anyway",
    )
    if options.clustering:
        sorting.cluster(options, small=usual < PAPER_TOKENS_PER_IMAGE, seed=seed)
    if options.refinement:
        sorting.refine(options.alpha)
    progress.update("CARE-set", 3, 3)
    used = {"tokens_per_image": min(each, len(words)), "keep": keep, "clusters": sorting.made, "file": None}
    return CareSet(
        concept=concept,
        clip=clip.id,
        seed=seed,
        images=len(images),
        settings=options.model_copy(update=used),
        tokens=sorting.tokens(),
        dropped=fragments,
        notes=tuple(sorting.notes),
    )


_MEDIA = ("A photo", "A painting")
_PEOPLE = ("A photo of a person", "A photo of a man", "A photo of a woman")
_PLACES = ("A photo of a house", "A photo of a tree", "A photo of a street")
_NEUTRAL: dict[str, tuple[str, ...]] = {
    "style": (*_MEDIA, "An oil painting", "A sketch", "A painting of a person", "A painting of a house"),
    "object": (*_MEDIA, *_PEOPLE[:1], *_PLACES),
    "identity": (*_MEDIA, *_PEOPLE, *_PLACES[:1]),
    "nsfw": (*_MEDIA, *_PEOPLE, *_PLACES[:1]),
}
"""What a base draws that does not know the concept: the medium, and the plainest subjects."""


@dataclass(frozen=True)
class ConceptScore:
    """How well pictures show a concept."""

    share: float = 0.0  # of the pictures that are more like the concept than like anything plain, 0 to 1
    margin: float = 0.0  # mean difference of the two cosines
    threshold: float = 0.5  # the share below which the base is taken not to draw the concept

    @property
    def drawn(self) -> bool:
        """Whether enough of the pictures show the concept."""
        return self.share >= self.threshold


def score_concept(images: Sequence[Image], clip: Clip, concept: Concept) -> ConceptScore:
    """Measure whether its target images show a concept rather than anything plain; 0 for no images."""
    if not len(images):
        return ConceptScore()
    own = [name for name in concept.name_prompts if name != concept.text] or [concept.text]
    margin = margins(images, clip, own, _NEUTRAL[concept.kind])
    return ConceptScore(float((margin > 0).float().mean()), float(margin.mean()))


def shows(images: Sequence[Image], clip: Clip, own: Sequence[str], rivals: Sequence[str]) -> list[bool]:
    """Whether each picture is more like one of some texts than like any of others."""
    return [bool(one > 0) for one in margins(images, clip, own, rivals)]


def margins(images: Sequence[Image], clip: Clip, own: Sequence[str], rivals: Sequence[str]) -> Tensor:
    """By how much each picture is more like the nearest of some texts than like that of others, ``[pictures]``."""
    seen = clip.image_features(images)
    best, other = ((seen @ clip.text_features(list(texts)).T).amax(1) for texts in (own, rivals))
    return best - other


def guess_kind(
    text: str,
    generate: Callable[[Sequence[str], Sequence[int]], Sequence[Image]],
    clip: Clip,
    *,
    seed: int = 0,
    count: int = 6,
) -> Kind:
    """The kind whose prompt template draws a concept best.

    Words for nudity are of kind "nsfw" without drawing anything. Otherwise ``count`` pictures are drawn
    with each template at the same seeds, and the kind wins whose pictures are most like the name.

    Raises:
        ConceptError: the name is empty or too long.
    """
    if "nude" in Concept(text=text, kind="nsfw").words:
        return "nsfw"
    kinds: tuple[Kind, ...] = ("style", "object", "identity")
    prompts = [Concept(text=text, kind=kind).target_prompt for kind in kinds for _ in range(count)]
    images = list(generate(prompts, list(range(seed, seed + count)) * len(kinds)))
    name = clip.text_features([text])[0]
    scores = (clip.image_features(images) @ name).view(len(kinds), count).mean(1)
    # Templates that draw the same thing differ by noise: the first of them is the plainer reading.
    close = (scores >= scores.max() - 0.01).nonzero().flatten()
    return kinds[int(torch.min(close))]
