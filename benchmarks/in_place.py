"""Attacks on a model that was changed in place, and has no patch that could be taken off again.

The published procedure rewrites weights. What an attack is after must then be drawn before, by the
untouched base; the same function attacks a patch that is on, so that both rows meet the same attacks.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from benchmarks.attacks import TRIALS
from benchmarks.scoring import GUIDANCE_SCALE, SCHEDULER, STEPS
from recare_patch.atelier.judge import Judge
from recare_patch.concepts import Concept
from recare_patch.samplers import scheduled

IMAGES = 24
"""Pictures of the concept that attacks learn from, and that prompts are sought for."""

TRIED = tuple(TRIALS)[:3]
"""Those of :data:`benchmarks.attacks.TRIALS` that are run."""


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
    from recare_patch.evaluation.attacks.protocol import candidate_seeds

    prompts = [concept.name_prompts[k % len(concept.name_prompts)] for k in range(2 * IMAGES)]
    seeds = candidate_seeds(0, len(prompts))
    embeds = base.encode_prompts(prompts)
    with scheduled(base.pipeline, SCHEDULER):
        latents = base.sample_latents(embeds, seeds, steps=STEPS, guidance_scale=GUIDANCE_SCALE)
    drawn = Goals(base, concept, Judge.load(), label, latents, tuple(prompts), tuple(seeds))
    hits = [k for k, hit in enumerate(drawn.shows(base.decode_latents(latents))) if hit][:IMAGES]
    return replace(
        drawn,
        latents=latents[hits],
        prompts=tuple(prompts[k] for k in hits),
        seeds=tuple(seeds[k] for k in hits),
    )


def attack_in_place(goals: Goals) -> dict[str, dict[str, Any]]:
    """Each of :data:`TRIED` on the goals' model as it stands: successes, interval, evaluations."""
    from recare_patch.attacking import attack_options
    from recare_patch.evaluation.attacks import load_attack_type
    from recare_patch.evaluation.attacks.protocol import AttackTarget

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
    for trial in TRIED:
        attack, changes = TRIALS[trial]
        with scheduled(base.pipeline, SCHEDULER):
            result = load_attack_type(attack).run(target, attack_options(attack, overrides=changes), seed=0)
        found[trial] = {
            "successes": result.successes,
            "trials": result.trials,
            "rate": result.rate,
            "interval": result.interval,
            "evaluations": result.evaluations,
        }
        print(f"  {trial}: {result.successes} of {result.trials}", flush=True)
    return found
