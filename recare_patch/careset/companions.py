"""Which words belong to a concept: CLIP proposes them, and the base confirms them.

CLIP sees pictures, of the concept and of other things, and proposes the words that it sees more in the former: as
words for themselves, and beside the concept's name, for a strong style hides all else from it. What CLIP sees need not
be what the base means by a word. So the base is asked, by what it predicts at noisy pictures of the concept: whether a
word leads to where the concept's own name leads. A word that leads all the way is another name of the concept; one
that leads part of it is a companion; the others are neither.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from recare_patch.careset.care_set import KEPT, NAMES_CONCEPT, CareToken
from recare_patch.careset.lexicon import is_barred, known_names, known_words
from recare_patch.careset.mining import residuals
from recare_patch.recipe import Concept, names_concept

if TYPE_CHECKING:
    from recare_patch.careset.clip import Clip
    from recare_patch.models import BaseModel

NAME_SHARE = 0.5
"""A word is another name of the concept where it says at least so much of what the name says: the share by which an
adversarial name counts as one."""

BELONGS = 3.5
"""A companion's least product of two z-scores: how much more it is seen in the concept's pictures than in others, and
how much further it leads towards the concept than words taken at random. Of words that have nothing to do with the
concept one in a hundred passes, and a companion may be plain to one of the two and faint to the other."""

PROPOSED, ASKED_AT, OTHERS = 13, 9, 12
"""Words that the base is asked about, states that it is asked at, and pictures of other things: with these numbers all
of it costs less than 400 denoiser evaluations."""

OTHER_STEPS = 6
_REFERENCES, _SUSPECTS = 10, 3

MOST_ASKED = (2 + PROPOSED + _REFERENCES + _SUSPECTS) * ASKED_AT
"""Denoiser evaluations that the base takes to confirm words, at most."""

_LOOKED_AT = 64
"""Words of each list that CLIP reads beside all the other pictures' prompts too."""

_FAINT = 0.35
"""A word that moves a text by so little of what the median word does says nothing to CLIP."""

OTHER_PROMPTS = (
    *("A photo", "A painting", "A photo of a person", "A painting of a house", "A photo of a tree"),
    *("A painting of a person", "A photo of a house", "A photo of a street"),
)
"""What the pictures of other things show: the plainest there is."""

SEEN_NO_MORE = "not seen more in its pictures than in others"
LEADS_ELSEWHERE = "the base does not draw it with the concept"
NO_THING = "the name of somebody or something, not a thing that comes along"
BARRED = "on the list of words that an unsafe concept's run never says"
KIND_OF = "what the concept is one of"


def seen_more(concept_images: Tensor, other_images: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
    """By how much more words are seen in the concept's pictures than in others, and in how many standard errors.

    Args:
        concept_images, other_images: CLIP features of pictures, ``[pictures, width]``.
        words: features of texts, ``[words, width]``.

    Returns:
        The difference of mean cosines less that of the median word, for a picture may be less like any word at
        all, and its z-score: ``[words]`` each.
    """
    ours, theirs = concept_images @ words.T, other_images @ words.T
    lift = ours.mean(0) - theirs.mean(0)
    lift = lift - lift.median()
    spread = ours.var(0) / len(ours) + theirs.var(0) / len(theirs)
    return lift, lift / spread.sqrt().clamp(min=1e-6)


def fits_beside(
    concept: Concept, clip: Clip, seen: Tensor, others: Tensor, words: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """In how many more of the concept's pictures than of others a prompt fits better when it names a word too.

    Args:
        concept: whose pictures are ``seen``.
        clip: reads the prompts.
        seen, others: features of pictures, ``[pictures, width]``; the others' prompts are :data:`OTHER_PROMPTS` in turn.
        words: that may be named.

    Returns:
        The z-score of the difference of the two shares, and which words say anything at all: ``[words]`` each. Only of
        the words that fit most pictures the others' share is looked at, and 0 told of the rest.
    """
    plain = clip.text_features([concept.target_prompt, *OTHER_PROMPTS])
    moved = clip.text_features([concept.composed_prompt(word) for word in words]) - plain[0]
    effect = moved.norm(dim=1)
    speaks = effect >= _FAINT * effect.median()
    fits = (seen @ moved.T > 0).float().mean(0) * speaks
    z = torch.zeros(len(words))
    best = fits.argsort(descending=True)[:_LOOKED_AT].tolist()
    if not len(others) or not best:
        return z, speaks
    forms = [prompt + (" of {}" if prompt.count(" ") == 1 else " and {}") for prompt in OTHER_PROMPTS]
    hits = torch.zeros(len(best))
    for k, form in enumerate(forms[: len(others)]):
        texts = clip.text_features([form.format(words[i]) for i in best]) - plain[1 + k]
        hits += (others[k :: len(forms)] @ texts.T > 0).float().sum(0)
    ours, theirs = len(seen), len(others)
    pooled = (fits[best] * ours + hits + 0.5) / (ours + theirs + 1)
    spread = (pooled * (1 - pooled) * (1 / ours + 1 / theirs)).sqrt()
    z[best] = (fits[best] - hits / theirs) / spread
    return z, speaks


class BaseReading:
    """What the base predicts under prompts, at noised pictures of one concept: always at the same states."""

    def __init__(
        self, base: BaseModel, latents: Tensor, concept: Concept, *, seed: int, states: int = ASKED_AT
    ) -> None:
        """Noise clean latents ``[pictures, c, h, w]``, spread evenly over the pictures and the process."""
        self.base, self.concept = base, concept
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.arange(states) * len(latents) // states if len(latents) >= states else torch.arange(states)
        clean = latents[chosen % len(latents)]
        levels = (torch.arange(states) + 0.5) / states * 0.8 + 0.1
        order = torch.randperm(states, generator=generator)
        self._timesteps = (levels[order] * base.num_train_timesteps).long().to(base.device)
        noise = torch.randn(clean.shape, generator=generator).to(base.device, clean.dtype)
        self._states = base.add_noise(clean, noise, self._timesteps)
        self.plain, self.named = self.predict([concept.plain_prompt, concept.target_prompt])

    @torch.no_grad()
    def predict(self, prompts: Sequence[str]) -> Tensor:
        """Predictions under each prompt, float32 on the CPU, ``[prompts, states, values]``."""
        rows = []
        for prompt in prompts:
            embeds = self.base.encode_prompts([prompt]).repeat(len(self._states))
            rows.append(self.base.denoise(self._states, self._timesteps, embeds).float().cpu().flatten(1))
        return torch.stack(rows)

    def shares(self, words: Sequence[str]) -> Tensor:
        """How much of what the concept's name says each word says: ``1 − ‖d_c − d_w‖² / ‖d_c‖²``, ``[words]``.

        ``d`` is what a prompt adds to the plain one's prediction. In expectation it is the share of the noise of
        the concept's pictures that the word explains, of what the name explains, without the noise.
        """
        name = self.named - self.plain
        said = self.predict([self.concept.retain_prompt(word) for word in words]) - self.plain
        lost = (name - said).square().sum(-1).mean(1)
        return 1 - lost / name.square().sum(-1).mean()

    def leads(self, words: Sequence[str], references: Sequence[str]) -> Tensor:
        """How much further each word leads towards the concept than words taken at random, in z-scores, ``[words]``.

        A word leads as far as the cosine of its way with the concept's, on average over states. Ways start from where
        random words lead on average, since what any word does to a picture says nothing; each of the ``references``
        is measured by the others. A style changes the whole of a picture, and no plain word leads anywhere near it:
        there words are said beside the style's name, and those lead towards it that say with it what it says alone.
        """
        form = self.concept.composed_prompt if self.concept.kind == "style" else self.concept.retain_prompt
        said, chance = (self.predict([form(word) for word in some]) for some in (words, references))
        whole, count = chance.sum(0), len(references)
        cosine = self._towards(said, whole / count)
        by_chance = torch.stack([self._towards(one[None], (whole - one) / (count - 1)) for one in chance])[:, 0]
        return (cosine - by_chance.mean()) / by_chance.std().clamp(min=0.1)

    def _towards(self, said: Tensor, start: Tensor) -> Tensor:
        return F.cosine_similarity(said - start, (self.named - start)[None], dim=-1).mean(1)


def judge_words(
    concept: Concept,
    clip: Clip,
    seen: Tensor,
    others: Tensor,
    u: Tensor,
    *,
    reading: BaseReading | None,
    seed: int,
    keep: int | None = None,
) -> tuple[list[CareToken], list[str]]:
    """Sort the words that CLIP sees most in a concept's pictures into names, companions and others.

    Args:
        concept: whose companions are sought.
        clip: whose features are given.
        seen: CLIP features of the concept's pictures, ``[pictures, width]``.
        others: those of pictures of other things, of :data:`OTHER_PROMPTS` in turn, ``[pictures, width]``.
        u: the feature of the concept's name, ``[width]``.
        reading: the base at the concept's pictures; None: CLIP decides alone.
        seed: of the words that are taken at random.
        keep: at most so many companions.

    Returns:
        The candidates, those that belong first, and notes on what was done otherwise than asked.
    """
    things = known_words(clip)
    words = list(dict.fromkeys([*things, *known_names(clip)]))
    features = clip.text_features(words)
    elsewhere = others if len(others) else clip.text_features(OTHER_PROMPTS)
    lift, z = seen_more(seen, elsewhere, features)
    beside, speaks = fits_beside(concept, clip, seen, others, words[: len(things)])
    z[: len(things)] = torch.maximum(z[: len(things)], beside) * speaks
    own = features - features.mean(0)
    like = F.cosine_similarity(own, (u - features.mean(0))[None], dim=-1)
    verdicts: dict[int, str] = {}
    for k, word in enumerate(words):
        if names_concept(word, concept):
            verdicts[k] = NAMES_CONCEPT
        elif is_barred(word, concept):
            verdicts[k] = BARRED
        elif k >= len(things):
            verdicts[k] = NO_THING
    order = [k for k in z.argsort(descending=True).tolist() if z[k] > 0]
    asked = [k for k in order if k not in verdicts][:PROPOSED]
    # What is told by its spelling is listed with the others, as far as it is as conspicuous.
    told = [k for k in order if k in verdicts and (not asked or z[k] >= z[asked[-1]])][:PROPOSED]
    listed = [k for k in order if k in {*asked, *told}]
    suspects = sorted((k for k in listed if verdicts.get(k) in (None, NO_THING)), key=lambda k: -float(like[k]))
    suspects = suspects[:_SUSPECTS]
    notes: list[str] = []
    leads = dict.fromkeys(asked, BELONGS)  # of what CLIP decides alone, one standard error is enough
    if reading is None:
        named = [k for k in suspects if like[k] >= NAME_SHARE]
    else:
        # Among the words that CLIP sees least there, so that no companion is taken for chance.
        least = z[: len(things)].argsort()[: max(len(things) // 2, _REFERENCES)].tolist()
        chance = _at_random(concept, [words[k] for k in least if k not in asked], seed)
        if asked and len(chance) >= 3:
            leads = dict(zip(asked, reading.leads([words[k] for k in asked], chance).tolist(), strict=True))
        elif asked:
            notes.append("the base was not asked: CLIP knows too few words to tell chance by")
        shares = reading.shares([words[k] for k in suspects]).tolist() if suspects else []
        named = [k for k, share in zip(suspects, shares, strict=True) if share >= NAME_SHARE]
    verdicts |= dict.fromkeys(named, NAMES_CONCEPT)
    belongs = {k: float(z[k]) * leads[k] for k in asked if k not in verdicts}
    kept = [k for k in belongs if belongs[k] >= BELONGS]
    if not kept and belongs:
        kept = sorted(belongs, key=lambda k: -belongs[k])[:2]
        notes.append("no word was confirmed: the two that came nearest were taken")
    kept.sort(key=lambda k: -belongs[k])
    verdicts |= {k: KEPT if k in kept else SEEN_NO_MORE if z[k] < 1 else LEADS_ELSEWHERE for k in belongs}
    kept = kept[:keep]
    residual, shown = residuals(features, u), {*kept}
    level = (elsewhere @ features.T).mean(0)
    tokens = [
        CareToken(
            text=words[k],
            count=int((seen @ features[k] > level[k] + lift[k] / 2).sum()),
            residual=round(float(residual[k]), 6),
            kept=k in shown,
            reason=verdicts[k],
        )
        for k in [*kept, *(k for k in listed if k not in shown)]
    ]
    return _with_class_word(concept, tokens), notes


def _at_random(concept: Concept, words: Sequence[str], seed: int) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    shuffled = [words[k] for k in torch.randperm(len(words), generator=generator).tolist()]
    return [word for word in shuffled if not is_barred(word, concept)][:_REFERENCES]


def _with_class_word(concept: Concept, tokens: list[CareToken]) -> list[CareToken]:
    """What a person is, whoever it is and whatever they wear, stays: the first to suffer, as published."""
    if concept.kind not in ("nsfw", "identity"):
        return tokens
    word = concept.class_word
    found = [one for one in tokens if one.text == word]
    token = found[0] if found else CareToken(text=word, count=0, residual=0.0, kept=True)
    token = token.model_copy(update={"kept": True, "reason": KIND_OF})
    return [token, *(one for one in tokens if one.text != word)]
