"""What a run measures of itself while it trains, and what it does about it.

Two numbers without units, at states that are never trained on: how much of what an erased prompt says has gone, and
how far a retained prompt has drifted beside what it says. They are the same on every base, whatever its widths and
rates, so a run that ends by them needs no number that was found on another one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from recare_patch.core import NonFiniteError
from recare_patch.models import PromptEmbeds, advice, off

if TYPE_CHECKING:
    from recare_patch.erasure.loop import Carried
    from recare_patch.erasure.methods import LossMethod, RetainedPrompts
    from recare_patch.models import BaseModel
    from recare_patch.recipe import Recipe

LOOK_EVERY = 10
"""Steps between two looks."""

STATES = 8
"""States of each kind that a look predicts; the frozen model's predictions at them are made once."""

WORD_STATES, MOST_WORDS = 2, 24
"""States at which a look predicts each guarded word, and of how many words at most. Many are held and few of them
drift, which all of them together hardly show."""

PICTURES, PICTURE_STEPS = 12, 8
"""Pictures of each concept, and steps of each, when a run looks whether CLIP still sees it."""

LOOKED_AT = ("looked-at pictures", "looked-at pictures, unnamed")
"""Stages that draw what a run looks at by the untouched base: with the concept's name, and without it."""

_COOLING, _SMALL, _SLOWER, _OVERSHOT, _MOST, _FURTHER = 0.5, 0.25, 0.7, 0.15, 8.0, 1.25
"""By how much the rate falls from look to look once the concept has gone; the rate at which a run may end; by how much
it falls after a step too far; how much may come back between two looks; the most that the
retained weight rises; by how much the first bar rises where pictures still show the concept."""

_FLOOR, _LEAST = 0.25, 0.5
"""How often a guarded word that does not drift at all is held, beside one that drifts as far as all do on average; and
what a word is taken to say at least, as a share of what the median one does."""

_STANDS, _CREEPS = 3, 0.05
"""Looks in which the first number must have risen by so much, or it stands."""


def look_evaluations(recipe: Recipe, *, words: int, pictures: bool) -> int:
    """Denoiser evaluations that a run's looks take at most.

    Args:
        recipe: of the run.
        words: that it guards, of each concept.
        pictures: whether they look at pictures too: the run may end early.
    """
    count = len(recipe.concepts)
    looks = -(-recipe.erase.steps * count // LOOK_EVERY)
    each = (4 + 2 * looks) * STATES + (2 + looks) * WORD_STATES * min(words, MOST_WORDS)
    # Pictures are looked at once the rate has fallen twice, which two looks before it have seen to.
    return count * each + pictures * picture_evaluations(recipe) * (looks // 3)


def picture_evaluations(recipe: Recipe) -> int:
    """Denoiser evaluations of all the pictures that one look draws."""
    images = recipe.target_images
    each = min(images.steps, PICTURE_STEPS) * (2 if images.guidance_scale > 1 else 1)
    return len(recipe.concepts) * PICTURES * each


@dataclass(frozen=True)
class Reading:
    """What one look found.

    Attributes:
        gone: of what the erased prompts say along the concept's own direction, the share that is no longer said: 0
            untouched, 1 as the empty prompt or what they become, above 1 pushed away from it. Of names alone or
            prompts that have one in them, whichever has less of it.
        drift: mean squared change of retained prompts' predictions beside what they say: 0 untouched, 1 as far as
            from the prompt to the empty one.
    """

    gone: float
    drift: float


class Gauge:
    """Looks at one concept, always at the same states."""

    def __init__(self, method: LossMethod, seed: int) -> None:
        """Draw the states, and predict at them by the frozen model.

        That takes ``4 * STATES`` evaluations, and ``2 * WORD_STATES`` for each guarded word.
        """
        context = method.context
        self.base: BaseModel = context.base
        base, erased, texts = self.base, context.erased, context.retained
        generator, rows = torch.Generator().manual_seed(seed), torch.arange(STATES)
        # Half of the rows are names, against nothing; half are prompts that have the name in them, against those
        # that they become.
        half, empty = STATES // 2, base.encode_prompts([""])
        sure = torch.tensor(method.sure_names or range(len(method.names)))
        names, nothing, pairs = method.names[sure], empty, erased.pairs
        if erased.attribute is not None:
            # The subject stays: what must go is what the attribute adds to it.
            pairs, names = (erased.attribute,), base.encode_prompts([erased.attribute[0]])
            nothing = base.encode_prompts([erased.attribute[1]])
        elif erased.instead is not None:
            nothing = base.encode_prompts([erased.instead[0][0]])
        picks = [pairs[int(k)] for k in torch.linspace(0, len(pairs) - 1, STATES - half).round()]
        asked, instead = (base.encode_prompts([pair[k] for pair in picks]) for k in (0, 1))
        self._named = PromptEmbeds.cat([names[rows[:half] % len(names)], asked])
        plain = PromptEmbeds.cat([nothing.repeat(half), instead])
        self._group = (rows >= half).long()
        self._states, self._times = self._noised(context.latents[rows * len(context.latents) // STATES], generator)
        self._held: PromptEmbeds | None = None
        self.words: GuardedWords | None = None
        with torch.no_grad(), off(*base.components.values()):
            self._without = base.denoise(self._states, self._times, plain).float()
            self._said = base.denoise(self._states, self._times, self._named).float() - self._without
            if texts.prompts:
                self._held_at(texts, context.latents, empty, generator)
            if texts.guarded and context.companions:
                self.words = GuardedWords(method, generator)

    def _held_at(
        self, texts: RetainedPrompts, latents: Tensor, empty: PromptEmbeds, generator: torch.Generator
    ) -> None:
        """Companions' prompts and others' in equal parts, each at a picture of its own where there is one."""
        base, half, count = self.base, STATES // 2, len(texts.prompts)
        guarded = texts.guarded or count
        picks = [int(k) for k in torch.linspace(0, guarded - 1, half).round()]
        start = guarded if guarded < count else 0
        picks += [int(k) for k in torch.linspace(start, count - 1, STATES - half).round()]
        own = {prompt: k for k, prompt in enumerate(texts.pictured.tolist())}
        clean = torch.stack([texts.latents[own[p]] if p in own else latents[p % len(latents)] for p in picks])
        self._held = base.encode_prompts([texts.prompts[p] for p in picks])
        self._held_states, self._held_times = self._noised(clean, generator)
        self._kept = base.denoise(self._held_states, self._held_times, self._held).float()
        nothing = base.denoise(self._held_states, self._held_times, empty.repeat(STATES)).float()
        self._contributed = float((self._kept - nothing).square().sum())

    def _noised(self, clean: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return _noised(self.base, clean, torch.randperm(STATES, generator=generator) + 0.5, STATES, generator)

    @torch.no_grad()
    def look(self) -> Reading:
        """Measure the model as it stands, and hold each guarded word as often as it drifts.

        That takes ``2 * STATES`` evaluations, half of them where nothing is retained, and ``WORD_STATES`` a word.
        """
        base = self.base
        now = base.denoise(self._states, self._times, self._named).float() - self._without
        along, whole = ((one * self._said).flatten(1).sum(1).cpu() for one in (now, self._said))
        # Prompts that say nothing, on this base, have nothing that could go.
        parts = [[one[self._group == k].sum() for one in (along, whole)] for k in (0, 1)]
        gone = [1 - float(part / said.clamp(min=1e-12)) for part, said in parts]
        drift = 0.0
        if self._held is not None:
            moved = base.denoise(self._held_states, self._held_times, self._held).float() - self._kept
            drift = float(moved.square().sum()) / max(self._contributed, 1e-12)
        if self.words is not None:
            self.words.look()
        if not math.isfinite(sum(gone) + drift):
            raise NonFiniteError(f"the predictions at a look are NaN or infinite: {advice(base.dtype, trained=True)}")
        return Reading(min(gone), drift)


def _noised(
    base: BaseModel, clean: Tensor, places: Tensor, count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Noisy latents and their timesteps, at ``places`` ``[rows]`` of ``count`` over the process but for its ends."""
    times = ((places / count * 0.8 + 0.1) * base.num_train_timesteps).long().to(base.device)
    noise = torch.randn(clean.shape, generator=generator).to(base.device, clean.dtype)
    return base.add_noise(clean, noise, times), times


class GuardedWords:
    """How far each guarded word of a concept drifts, and so how often the method is to hold its prompts."""

    def __init__(self, method: LossMethod, generator: torch.Generator) -> None:
        """Predict by the frozen model, which is on, under each word and the empty prompt."""
        self._method, context = method, method.context
        self._base, texts = context.base, context.retained
        words = context.companions[:MOST_WORDS]
        prompts = [context.concept.retain_prompt(word) for word in words for _ in range(WORD_STATES)]
        own = {texts.prompts[prompt]: k for k, prompt in enumerate(texts.pictured.tolist())}
        others = len(context.latents)
        clean = torch.stack(
            [texts.latents[own[p]] if p in own else context.latents[k % others] for k, p in enumerate(prompts)]
        )
        base, turns = self._base, torch.arange(len(prompts)) % WORD_STATES + 0.5
        self._states, self._times = _noised(base, clean, turns, WORD_STATES, generator)
        self._named = base.encode_prompts(prompts)
        self._kept = self._predict(self._named)
        said = self._apart(self._predict(base.encode_prompts([""]).repeat(len(prompts))))
        # What hardly says anything would have drifted far at every step.
        self._said = said.clamp(min=max(_LEAST * float(said.median()), 1e-12))
        # A prompt counts as the word that drifts farthest of those it names.
        told = [f" {text.casefold()} " for text in texts.prompts[: texts.guarded]]
        self._names = torch.tensor([[f" {word.casefold()} " in text for word in words] for text in told])

    def _predict(self, embeds: PromptEmbeds) -> Tensor:
        rows = torch.arange(len(self._states)).split(STATES)
        return torch.cat([self._base.denoise(self._states[k], self._times[k], embeds[k]).float() for k in rows])

    def _apart(self, predicted: Tensor) -> Tensor:
        """Of each word, the squared distance from what the frozen model predicts, ``[words]``."""
        return (predicted - self._kept).flatten(1).square().sum(1).view(-1, WORD_STATES).sum(1).cpu()

    def look(self) -> None:
        """Hold each word as often as it has drifted.

        Not more firmly all together: where companions are much of what the concept's name says, that kept the concept.
        """
        drift = self._apart(self._predict(self._named)) / self._said
        shares = _FLOOR + drift / drift.mean().clamp(min=1e-12)
        found = torch.where(self._names, shares, 0).amax(1)
        self._method.held_shares = torch.where(found > 0, found, shares.mean())


class Governor:
    """Ends an erasing when all of its concepts are gone and nothing retained has drifted, and steers until then.

    While a retained prompt has drifted too far the weight of all rises, and those that drift are held more often; when
    steps overshoot (what was gone comes back, or drift jumps) the rate falls; and once the concepts are gone the rate
    falls look by look, so that the run ends on small steps as it does on a schedule. The first bar is where to look at
    pictures: it rises while they still show a concept, and falls to where the first number stands. It is a
    :class:`Watch`.

    Where adversaries train along, what they find is not what a look sees: the run takes all its steps at its own rate,
    and only the retained weight is steered.
    """

    every = LOOK_EVERY

    def __init__(
        self,
        methods: Sequence[LossMethod],
        seed: int,
        *,
        gone: float,
        drift: float,
        still_seen: Callable[[], float] | None = None,
        carried: Carried | None = None,
        early: bool = True,
    ) -> None:
        """Make the gauges, one a concept.

        Args:
            methods: of the run.
            seed: of their states.
            gone, drift: the bars, see :class:`Reading`.
            still_seen: draws pictures and tells in what share of them a concept is seen; None: nobody looks.
            carried: what else must go on where it stopped.
            early: whether it may end the run, and change its rate.
        """
        self._still_seen, self.early = still_seen, early
        self.seen: float | None = None
        self.methods, self.bars, self._carried, self.asked = methods, Reading(gone, drift), carried, gone
        self.gauges = [Gauge(method, seed + number) for number, method in enumerate(methods)]
        self.readings: list[Reading] = []
        self.rate, self._retain, self.over = 1.0, 1.0, False

    @property
    def last(self) -> Reading:
        """What the last look found."""
        return self.readings[-1] if self.readings else Reading(0.0, 0.0)

    @property
    def reached(self) -> bool:
        """Whether both numbers are within their bars, and no picture showed the concept at the last look at any.

        That the first number stands short of the recipe's bar is enough only where pictures have told so. Beside
        adversaries it does not count: a name that became the subject's still says what the subject says.
        """
        if not self.early:
            return self.last.drift <= self.bars.drift
        told = self.over or self.last.gone >= self.asked
        return told and not self.seen and self.last.gone >= self.bars.gone and self.last.drift <= self.bars.drift

    def told(self) -> dict[str, Any]:
        """What was reached, for ``training.json``."""
        rows = [[round(one.gone, 4), round(one.drift, 4)] for one in self.readings]
        bars = {"gone": self.bars.gone, "drift": self.bars.drift}
        return {
            "gone": round(self.last.gone, 4),
            "drift": round(self.last.drift, 4),
            "reached": self.reached,
            "bars": bars,
            "looks": rows,
        }

    def look(self) -> None:
        """Measure the concept that has gone least and what has drifted farthest, and steer."""
        found, before = [gauge.look() for gauge in self.gauges], self.last
        now = Reading(min(one.gone for one in found), max(one.drift for one in found))
        self.readings.append(now)
        if self.early:
            self._steer_rate(before, now)
        within = now.drift <= self.bars.drift
        self._retain = min(self._retain * 1.5, _MOST) if not within else max(1.0, self._retain / 1.25)
        self._tell()

    def _steer_rate(self, before: Reading, now: Reading) -> None:
        if self._stands():
            self.bars = Reading(now.gone, self.bars.drift)
        bars = self.bars
        gone, within = now.gone >= bars.gone, now.drift <= bars.drift
        if gone and within and self.rate <= _SMALL:
            self.seen = self._still_seen() if self._still_seen is not None else None
            self.over = not self.seen
            if not self.over:
                # How much must go differs from base to base and from concept to concept: pictures tell.
                self.bars, self.rate = Reading(bars.gone * _FURTHER, bars.drift), 1.0
        elif gone:
            self.rate = max(self.rate * _COOLING, _SMALL / 2)
        elif before.gone >= bars.gone:
            # Cooled too early, or the retained part has pulled the concept back.
            self.rate = min(1.0, self.rate / _COOLING)
        elif before.gone - now.gone > _OVERSHOT or now.drift > 2 * max(before.drift, bars.drift):
            self.rate *= _SLOWER

    def _stands(self) -> bool:
        """Whether the first number has stopped short of its bar: then pictures tell whether it is enough."""
        if self._still_seen is None or len(self.readings) <= _STANDS or not 0 < self.last.gone < self.bars.gone:
            return False
        recent = [one.gone for one in self.readings[-_STANDS - 1 :]]
        return max(recent[1:]) - recent[0] < _CREEPS

    def _tell(self) -> None:
        for method in self.methods:
            method.retain_scale = self._retain

    def settle(self) -> None:
        """Nothing: the parameters of the last step are the result."""

    def state(self) -> Mapping[str, Tensor]:
        """Everything, as tensors on the CPU."""
        rows = [[one.gone, one.drift] for one in self.readings]
        found = {
            "readings": torch.tensor(rows, dtype=torch.float64).reshape(-1, 2),
            "steering": torch.tensor([self.rate, self._retain, float(self.over), self.bars.gone], dtype=torch.float64),
            "seen": torch.tensor([] if self.seen is None else [self.seen], dtype=torch.float64),
        }
        for k, method in enumerate(self.methods):
            if method.held_shares is not None:
                found[f"shares:{k}"] = method.held_shares
        inner = self._carried.state() if self._carried is not None else {}
        return found | {f"inner:{key}": one for key, one in inner.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what :meth:`state` returned."""
        self.readings = [Reading(*row) for row in state["readings"].tolist()]
        self.rate, self._retain, over, gone = state["steering"].tolist()
        self.over, self.bars = bool(over), Reading(gone, self.bars.drift)
        self.seen = float(state["seen"]) if len(state["seen"]) else None
        for k, method in enumerate(self.methods):
            method.held_shares = state.get(f"shares:{k}")
        if self._carried is not None:
            self._carried.load_state(
                {key.removeprefix("inner:"): one for key, one in state.items() if key.startswith("inner:")}
            )
        self._tell()
