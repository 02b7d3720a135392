"""Attacks on a model that was changed in place, and has no patch that could be taken off again.

The published procedure rewrites weights. What an attack is after must then be drawn before, by the
untouched base; the same function attacks a patch that is on, so that both rows meet the same attacks.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from benchmarks.scoring import GUIDANCE_SCALE, SCHEDULER, STEPS, TRIALS
from recare_patch.measure import wilson_interval
from recare_patch.models import scheduled
from recare_patch.models.atelier.judge import Judge
from recare_patch.recipe import Concept

IMAGES = 24
"""Pictures of the concept that attacks learn from, and that prompts are sought for."""

TRIED: dict[str, int] = {"inversion, 1 vector": 1, "inversion, 4 vectors": 5, "UnlearnDiffAtk": 1}
"""Which of :data:`benchmarks.scoring.TRIALS` are run, and with how many seeds.

What four vectors find differs much more from one search to the next than its pictures do.
"""


@dataclass(frozen=True)
class Goals:
    """Pictures by the untouched base that show the concept."""

    base: Any
    concept: Concept
    judge: Judge
    label: str
    latents: Tensor
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]

    def shows(self, images: Any) -> list[bool]:
        """Which pictures show it, by the judge."""
        return [self.label in seen for seen in self.judge(list(images))]


def draw_goals(base: Any, concept: Concept, label: str) -> Goals:
    """Draw what attacks are after; the base must be as it was loaded.

    Args:
        base: Atelier.
        concept: what is erased later.
        label: the judge's.
    """
    from recare_patch.measure import candidate_seeds

    prompts = [concept.name_prompts[k % len(concept.name_prompts)] for k in range(2 * IMAGES)]
    seeds = candidate_seeds(0, len(prompts))
    embeds = base.encode_prompts(prompts)
    with scheduled(base.pipeline, SCHEDULER):
        latents = base.sample_latents(embeds, seeds, steps=STEPS, guidance_scale=GUIDANCE_SCALE)
    drawn = Goals(base, concept, Judge.load(), label, latents, tuple(prompts), tuple(seeds))
    hits = [k for k, hit in enumerate(drawn.shows(base.decode_latents(latents))) if hit][:IMAGES]
    return replace(
        drawn, latents=latents[hits], prompts=tuple(prompts[k] for k in hits), seeds=tuple(seeds[k] for k in hits)
    )


def interval_of_runs(successes: Sequence[int], trials: int) -> tuple[float, float]:
    """95 % interval of the rate of several attacks, each of ``trials`` pictures.

    Pictures of one attack stand or fall together, so the attacks' rates are what is sampled: Student's
    interval of their mean, and never narrower than Wilson's over all pictures.
    """
    from scipy.stats import t

    low, high = wilson_interval(sum(successes), trials * len(successes))
    if len(successes) > 1:
        rates = [k / trials for k in successes]
        mean, error = statistics.mean(rates), statistics.stdev(rates) / len(rates) ** 0.5
        half = float(t.ppf(0.975, len(rates) - 1)) * error
        low, high = max(0.0, min(low, mean - half)), min(1.0, max(high, mean + half))
    return low, high


def attack_in_place(goals: Goals, tried: dict[str, int] | None = None) -> dict[str, dict[str, Any]]:
    """Attacks on the goals' model as it stands: successes by seed, interval, evaluations.

    Args:
        goals: see :func:`draw_goals`.
        tried: trial → number of seeds; :data:`TRIED` by default.
    """
    from recare_patch.measure import AttackTarget, attack_options, load_attack_type

    base, found = goals.base, {}
    target = AttackTarget(
        base=base,
        concept=goals.concept,
        shows=goals.shows,
        images=base.decode_latents(goals.latents),
        latents=goals.latents,
        # None of these attacks looks at the model as it was.
        original=contextlib.nullcontext,
        prompts=goals.prompts,
        seeds=goals.seeds,
        steps=STEPS,
        guidance_scale=GUIDANCE_SCALE,
    )
    for trial, seeds in (TRIED if tried is None else tried).items():
        attack, changes = TRIALS[trial]
        options, results = attack_options(attack, overrides=changes), []
        for seed in range(seeds):
            with scheduled(base.pipeline, SCHEDULER):
                results.append(load_attack_type(attack).run(target, options, seed=seed))
            print(f"  {trial}: {results[-1].successes} of {results[-1].trials}", flush=True)
        each = [result.successes for result in results]
        trials = results[0].trials
        found[trial] = {
            "successes": sum(each),
            "trials": trials * seeds,
            "by_seed": each,
            "rate": sum(each) / (trials * seeds),
            "interval": interval_of_runs(each, trials),
            "evaluations": sum(result.evaluations for result in results),
        }
    return found
