"""Which words belong to a concept: CLIP proposes them, and the base confirms them.

CLIP sees pictures, of the concept and of other things, and proposes the words that it sees more in the former: as
words for themselves, and beside the concept's name, for a strong style hides all else from it. What CLIP sees need not
be what the base means by a word. So the base is asked, by what it predicts at noisy pictures of the concept: whether a
word leads to where the concept's own name leads. A word that leads all the way is another name of the concept; one
that leads part of it is a companion; the others are neither.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from recare_patch.careset.care_set import BARRED, KEPT, MAY_BELONG, NAMES_CONCEPT, CareToken
from recare_patch.careset.lexicon import is_barred, known_names, known_words, vocabulary_of
from recare_patch.careset.mining import no_word, residuals
from recare_patch.core import CareSetError
from recare_patch.recipe import Concept, names_concept

if TYPE_CHECKING:
    from recare_patch.careset.clip import Clip
    from recare_patch.models import BaseModel

NAME_SHARE = 0.5
"""A word is another name of the concept where it says at least so much of what the name says: the share by which an
adversarial name counts as one."""

NAME_LIKENESS = 0.4
"""Where no base is asked: the cosine with the concept's name, beyond what all words have in common."""

BELONGS, BELONGS_BESIDE = 4.0, 2.0
"""A companion's least product of two z-scores: how much more it is seen in the concept's pictures than in others, and
how much further it leads towards the concept than words taken at random. Of products of two standard normal numbers
one in three hundred is as large, and a companion may be plain to one of the two and faint to the other. Said beside a
style's name, words lead more surely, and less is enough."""

_PLAINLY = 4.0
"""A z-score of what CLIP sees beyond which it counts no more: how a concept looks can be like a word that is nowhere in
its pictures, in each of them alike, and then the base must say so too."""

PROPOSED, ASKED_AT, OTHERS = 20, 7, 12
"""Words that the base is asked about, states that it is asked at, and pictures of other things: with these numbers all
of it costs less than 400 denoiser evaluations."""

OTHER_STEPS = 6
_REFERENCES, _SUSPECTS = 9, 3

MOST_ASKED = (2 + PROPOSED + _REFERENCES + _SUSPECTS) * ASKED_AT
"""Denoiser evaluations that the base takes to confirm words, at most."""

_LOOKED_AT = 64
"""Words of each list that CLIP reads beside all the other pictures' prompts too."""

_FEWEST = 3
"""Of so many words taken at random can chance be told."""

_FAINT = 0.35
"""A word that moves a text by so little of what the median word does says nothing to CLIP."""

OTHER_PROMPTS = ("A photo", "A painting")
"""What the pictures of other things show: whatever the base draws unasked. Prompts that name plain things would put
people and houses into them more often than chance does, and people would be seen beside nothing."""

SEEN_NO_MORE = "not seen more in its pictures than in others"
LEADS_ELSEWHERE = "the base does not draw it with the concept"
NO_THING = "the name of somebody or something, not a thing that comes along"
KIND_OF = "what the concept is one of"
ENOUGH = "belongs to it, but others do more, and no more are wanted"


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
    # One picture tells nothing of how far pictures differ: the others stand in, or the words.
    spreads = [side.var(0) for side in (ours, theirs) if len(side) > 1] or [lift.var(correction=0).expand_as(lift)]
    spread = spreads[0] / len(ours) + spreads[-1] / len(theirs)
    return lift, lift / spread.sqrt().clamp(min=1e-6)


def fits_beside(
    concept: Concept, clip: Clip, seen: Tensor, others: Tensor, words: Sequence[str], *, among_words: bool = False
) -> tuple[Tensor, Tensor]:
    """In how many more of the concept's pictures than of others a prompt fits better when it names a word too.

    Args:
        concept: who the word is named beside.
        clip: reads the prompts.
        seen: features of pictures of the concept, ``[pictures, width]``.
        others: those of pictures of :data:`OTHER_PROMPTS` in turn; there may be none.
        words: that may be named.
        among_words: they are so many that what is usual among them is what chance does.

    Returns:
        The z-score of the difference of the two shares, and which words say anything at all: ``[words]`` each. Only of
        the words that fit most pictures the others' share is looked at, and 0 told of the rest.
    """
    plain = clip.text_features([concept.target_prompt, *OTHER_PROMPTS])
    moved = clip.text_features([concept.composed_prompt(word) for word in words]) - plain[0]
    speaks = _not_faint(moved)
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
    return torch.minimum(z, _among_words(fits)) if among_words else z, speaks


def _not_faint(moved: Tensor) -> Tensor:
    effect = moved.norm(dim=1)
    return effect >= _FAINT * effect.median()


def spoken(clip: Clip, plain: str, prompts: Sequence[str]) -> list[bool]:
    """Whether each prompt says more to CLIP than the plain one: a word that a small CLIP never met says nothing."""
    if not prompts:
        return []
    found: list[bool] = _not_faint(clip.text_features(prompts) - clip.text_features([plain])).tolist()
    return found


def _among_words(values: Tensor) -> Tensor:
    """Each value's distance from the median, in standard deviations as the median distance tells them."""
    apart = values - values.median()
    return apart / (1.4826 * apart.abs().median()).clamp(min=1e-6)


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


class _Sight:
    """What CLIP sees of each word that it knows, in the concept's pictures and in others.

    Attributes:
        words: the things first, then names of somebody or something.
        things: how many of the words are things.
        z: how much more each word is seen in the concept's pictures, in standard errors, ``[words]``.
        chance: what the largest of so many z-scores is by chance.
        like: how much each word is like the concept's name, beyond what all words have in common, ``[words]``.
    """

    def __init__(self, concept: Concept, clip: Clip, seen: Tensor, others: Tensor, u: Tensor) -> None:
        things = known_words(clip)
        self.words, self.things = list(dict.fromkeys([*things, *known_names(clip)])), len(things)
        if not self.words:
            raise CareSetError(no_word(clip.id))
        self._seen, self._u, self._features = seen, u, clip.text_features(self.words)
        elsewhere = others if len(others) else clip.text_features(OTHER_PROMPTS)
        self._level = (elsewhere @ self._features.T).mean(0)
        self._lift, self.z = seen_more(seen, elsewhere, self._features)
        # In the language at large hardly any word has to do with the concept, so that the others tell how far a word
        # that has not is from none by chance; the words of a small world all have to do with one another.
        is_open, _ = vocabulary_of(clip)
        self.chance = math.sqrt(2 * math.log(max(len(things), 2))) if is_open else 1.0
        if is_open:
            self.z = torch.minimum(self.z, _among_words(self._lift))
        self._least = self.z[: len(things)].argsort(stable=True).tolist()
        beside, speaks = fits_beside(concept, clip, seen, others, things, among_words=is_open)
        self.z[: self.things] = torch.maximum(self.z[: self.things], beside) * speaks
        # A word that says nothing leads wherever the concept's name does when it stands beside it.
        self._least = [k for k in self._least if speaks[k]]
        middle = self._features.mean(0)
        self.like = F.cosine_similarity(self._features - middle, (u - middle)[None], dim=-1)

    def told(self, concept: Concept) -> dict[int, str]:
        """What spelling alone says of words: those that no companion can be, with the reason."""
        told: dict[int, str] = {}
        for k, word in enumerate(self.words):
            if names_concept(word, concept):
                told[k] = NAMES_CONCEPT
            elif is_barred(word, concept):
                told[k] = BARRED
            elif k >= self.things:
                told[k] = NO_THING
        return told

    def proposed(self, told: dict[int, str]) -> tuple[list[int], list[int]]:
        """The words to be asked about, and these with the told ones that are as conspicuous; most seen first."""
        order = [k for k in self.z.argsort(descending=True, stable=True).tolist() if self.z[k] > 0]
        asked = [k for k in order if k not in told][:PROPOSED]
        known = [k for k in order if k in told and (not asked or self.z[k] >= self.z[asked[-1]])][:PROPOSED]
        return asked, [k for k in order if k in {*asked, *known}]

    def suspects(self, listed: Sequence[int], told: dict[int, str]) -> list[int]:
        """Those of the listed words that are the likest to be other names of the concept."""
        open_ = [k for k in listed if told.get(k) in (None, NO_THING)]
        return sorted(open_, key=lambda k: -float(self.like[k]))[:_SUSPECTS]

    def by_chance(self, concept: Concept, asked: Sequence[int], seed: int) -> list[str]:
        """Words taken at random among those that are seen least, so that no companion is taken for chance."""
        least = self._least[: max(self.things // 2, _REFERENCES)]
        words = [self.words[k] for k in least if k not in asked]
        shuffled = torch.randperm(len(words), generator=torch.Generator().manual_seed(seed)).tolist()
        return [words[k] for k in shuffled if not is_barred(words[k], concept)][:_REFERENCES]

    def tokens(self, listed: Sequence[int], kept: Sequence[int], verdicts: dict[int, str]) -> list[CareToken]:
        """The listed words with their verdicts, the kept ones first."""
        residual = residuals(self._features, self._u)
        halfway = self._level + self._lift / 2
        return [
            CareToken(
                text=self.words[k],
                count=int((self._seen @ self._features[k] > halfway[k]).sum()),
                residual=round(float(residual[k]), 6),
                kept=k in kept,
                reason=verdicts[k],
            )
            for k in [*kept, *(k for k in listed if k not in kept)]
        ]


# Long for its arguments and what they mean.
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

    Raises:
        CareSetError: the CLIP knows no word.
    """
    sight, notes = _Sight(concept, clip, seen, others, u), []
    verdicts = sight.told(concept)
    asked, listed = sight.proposed(verdicts)
    suspects = sight.suspects(listed, verdicts)
    enough = BELONGS_BESIDE if concept.kind == "style" else BELONGS
    # Of what CLIP decides alone, what chance does not reach is enough.
    leads = dict.fromkeys(asked, enough / sight.chance)
    if reading is None:
        shares = (sight.like[suspects] * NAME_SHARE / NAME_LIKENESS).tolist()
    else:
        shares = reading.shares([sight.words[k] for k in suspects]).tolist() if suspects else []
        chance = sight.by_chance(concept, asked, seed)
        if asked and len(chance) >= _FEWEST:
            leads = dict(zip(asked, reading.leads([sight.words[k] for k in asked], chance).tolist(), strict=True))
        elif asked:
            notes.append("the base was not asked: CLIP knows too few words to tell chance by")
    verdicts |= {k: NAMES_CONCEPT for k, share in zip(suspects, shares, strict=True) if share >= NAME_SHARE}
    most, least = (_PLAINLY, enough / _PLAINLY) if reading is not None else (math.inf, math.inf)
    seen_by = {k: min(float(sight.z[k]), most) for k in asked}
    belongs = {k: seen_by[k] * leads[k] for k in asked if k not in verdicts}
    best = sorted(belongs, key=lambda k: -belongs[k])
    kept, first = [k for k in best if belongs[k] >= enough], _class_words(concept)
    if best and not kept and not first:
        kept = best[:2]
        notes.append("no word was confirmed: the two that came nearest were taken")
    elsewhere = LEADS_ELSEWHERE if reading is not None else SEEN_NO_MORE
    for k in best:
        # What is faint to CLIP may still be drawn along: the base says so as plainly as it must of any companion.
        near = min(seen_by[k], leads[k]) > 0 and (belongs[k] >= enough / 2 or leads[k] >= least)
        verdicts[k] = ENOUGH if k in kept else MAY_BELONG if near else SEEN_NO_MORE if seen_by[k] < 1 else elsewhere
    room = None if keep is None else max(keep - len(first), 0)
    kept = [k for k in kept if sight.words[k] not in first][:room]
    tokens = sight.tokens(listed, kept, verdicts | dict.fromkeys(kept, KEPT))
    counts = {token.text: token for token in tokens}
    kinds = [counts.get(word) or CareToken(text=word, count=0, residual=0.0, kept=True) for word in first]
    kinds = [token.model_copy(update={"kept": True, "reason": KIND_OF}) for token in kinds]
    return [*kinds, *(token for token in tokens if token.text not in first)], notes


def _class_words(concept: Concept) -> list[str]:
    """What a person is, whoever it is and whatever they wear, stays: the first to suffer, as published."""
    word = concept.class_word
    return [word] if concept.kind in ("nsfw", "identity") and not names_concept(word, concept) else []
