"""The published ReCARE procedure, with all its redundancies, as the row to compare with.

Written from the description of the release (Kim et al., arXiv 2606.24192): 500 target images of 50
steps, two rounds of 200 erasing and 3,000 inversion steps at batch 1, then 200 steps of the second
stage, training every linear and convolution layer outside cross-attention. Each training state costs
a rollout of its own, each prediction at guidance 1 carries an unconditional half that is multiplied
by zero, conditions go through the denoiser one by one, and prompts are encoded again at every step.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recare_patch.careset import CareSet, Clip, build_care_set
from recare_patch.erasure import recare_target
from recare_patch.models import PLACEHOLDER, BaseModel, PromptEmbeds, classifier_free, sample_timesteps
from recare_patch.models import lora as adapters
from recare_patch.recipe import CareSetOptions, Concept


@dataclass(frozen=True)
class PaperSettings:
    """The released settings."""

    target_images: int = 500
    steps: int = 50
    rounds: int = 2
    erase_steps: int = 200
    inversion_steps: int = 3000
    final_steps: int = 200
    guidance: float = 3.0
    w_plus: float = 1.0
    w_minus: float = 3.0
    search_rate: float = 5e-6
    final_rate: float = 2e-5
    inversion_rate: float = 5e-3
    seed: int = 0


def expected_evaluations(settings: PaperSettings) -> dict[str, float]:
    """What the procedure evaluates on average, counted from its settings; a training sample counts as 3.

    A rollout stops at a random step, so that a run's own count differs by a few hundred.
    """
    names = 1 + settings.rounds
    state = 2 * (settings.steps + 1) / 2
    # Both halves of each of the frozen model's conditions, and of the trained predictions.
    one_name = state + 2 * 1 + 2 * 3
    final = state + 2 * (1 + 1 + names + 1) + 2 * 2 * 3
    found = {
        "target images": settings.target_images * settings.steps * 2,
        "search: erase": settings.rounds * settings.erase_steps * one_name,
        "search: inversion": settings.rounds * settings.inversion_steps * 3,
        "erase": settings.final_steps * final,
    }
    return {**found, "all": sum(found.values())}


@dataclass
class PaperRun:
    """What the procedure cost and found; the base's denoiser is left erased."""

    seconds: dict[str, float] = field(default_factory=dict)
    evaluations: dict[str, int] = field(default_factory=dict)
    care_set: CareSet | None = None


class _Procedure:
    def __init__(self, base: BaseModel, concept: Concept, settings: PaperSettings, log: Callable[[str], None]) -> None:
        self.base, self.concept, self.settings, self.log = base, concept, settings, log
        self.generator = torch.Generator().manual_seed(settings.seed)
        names = adapters.target_modules(base.denoiser, "outside-cross-attention")
        modules = dict(base.denoiser.named_modules())
        self.trained = [p for name in names for p in modules[name].parameters()]
        self.original = [p.detach().clone() for p in self.trained]
        self.adapted = [p.detach().clone() for p in self.trained]

    def _use(self, weights: list[Tensor]) -> None:
        with torch.no_grad():
            for parameter, value in zip(self.trained, weights, strict=True):
                parameter.copy_(value)

    def _both_halves(self, latents: Tensor, timestep: Tensor, embeds: PromptEmbeds, scale: float) -> Tensor:
        empty = self.base.encode_prompts([""])
        pred = self.base.denoise(latents.repeat(2, 1, 1, 1), timestep.expand(2), PromptEmbeds.cat([empty, embeds]))
        uncond, cond = pred.chunk(2)
        return classifier_free(uncond, cond, scale)

    def _state(self, embeds: PromptEmbeds) -> tuple[Tensor, Tensor]:
        """Roll the adapted model out from noise under a prompt to a random step."""
        scheduler = type(self.base.pipeline.scheduler).from_config(self.base.pipeline.scheduler.config)
        scheduler.set_timesteps(self.settings.steps)
        stop = int(torch.randint(0, self.settings.steps, (1,), generator=self.generator))
        latents = torch.randn((1, *self.base.latent_shape), generator=self.generator).to(self.base.device)
        with torch.no_grad():
            for timestep in scheduler.timesteps[: stop + 1]:
                pred = self._both_halves(latents, timestep, embeds, self.settings.guidance)
                latents = scheduler.step(pred, timestep, latents).prev_sample
        return latents, scheduler.timesteps[stop]

    def _frozen(self, latents: Tensor, timestep: Tensor, conditions: list[PromptEmbeds]) -> list[Tensor]:
        self.adapted = [p.detach().clone() for p in self.trained]
        self._use(self.original)
        with torch.no_grad():
            found = [self._both_halves(latents, timestep, c, 1.0) for c in conditions]
        self._use(self.adapted)
        return found

    def _train(self, steps: int, rate: float, loss: Callable[[], Tensor], stage: str) -> None:
        for parameter in self.trained:
            parameter.requires_grad_(True)
        optimizer = torch.optim.AdamW(self.trained, lr=rate)
        for step in range(steps):
            value = loss()
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            optimizer.step()
            if (step + 1) % 50 == 0:
                self.log(f"{stage} {step + 1}/{steps} loss {value.item():.4f}")
        for parameter in self.trained:
            parameter.requires_grad_(False)

    def erase_name(self, name: Callable[[], PromptEmbeds], stage: str) -> None:
        def loss() -> Tensor:
            embeds = name()
            latents, timestep = self._state(embeds)
            (target,) = self._frozen(latents, timestep, [self.base.encode_prompts([""])])
            return F.mse_loss(self._both_halves(latents, timestep, embeds, 1.0), target)

        self._train(self.settings.erase_steps, self.settings.search_rate, loss, stage)

    def invert(self, images: list[Any], stage: str) -> Tensor:
        base, settings = self.base, self.settings
        vector = nn.Parameter(base.word_vector(self.concept.class_word)[None].clone())
        optimizer = torch.optim.AdamW([vector], lr=settings.inversion_rate)
        template = self.concept.target_prompt_for(PLACEHOLDER)
        for step in range(settings.inversion_steps):
            pick = int(torch.randint(0, len(images), (1,), generator=self.generator))
            latents = base.encode_images([images[pick]])
            timestep = sample_timesteps(1, 0, base.num_train_timesteps, self.generator)
            noise = torch.randn(latents.shape, generator=self.generator).to(latents)
            states = base.add_noise(latents, noise, timestep)
            target = base.training_target(latents, noise, timestep)
            loss = F.mse_loss(base.denoise(states, timestep, base.encode_with_vectors([template], vector)), target)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            if (step + 1) % 500 == 0:
                self.log(f"{stage} {step + 1}/{settings.inversion_steps}")
        return vector.detach()

    def final(self, names: list[Callable[[], PromptEmbeds]], care_set: CareSet) -> None:
        base, settings = self.base, self.settings
        anchors, retained = care_set.anchors(), care_set.retain_prompts()

        def pick(count: int) -> int:
            return int(torch.randint(0, count, (1,), generator=self.generator))

        def loss() -> Tensor:
            erased = names[pick(len(names))]()
            anchor = base.encode_prompts([anchors[pick(len(anchors))]])
            retain = base.encode_prompts([retained[pick(len(retained))]])
            latents, timestep = self._state(erased)
            conditions = [base.encode_prompts([""]), anchor, *(name() for name in names), retain]
            empty, towards, *away, kept = self._frozen(latents, timestep, conditions)
            target = recare_target(empty, towards, torch.stack(away), settings.w_plus, settings.w_minus)
            student = self._both_halves(latents, timestep, erased, 1.0)
            held = self._both_halves(latents, timestep, retain, 1.0)
            return F.mse_loss(student, target) + F.mse_loss(held, kept)

        self._train(settings.final_steps, settings.final_rate, loss, "erase")


def run(
    base: BaseModel,
    concept: Concept,
    clip: Clip,
    settings: PaperSettings | None = None,
    log: Callable[[str], None] = print,
    mining: CareSetOptions | None = None,
) -> PaperRun:
    """Run the procedure on a base, in place.

    Args:
        base: a freshly loaded base; its denoiser is changed.
        concept: what to erase.
        clip: for the CARE-set.
        settings: the released ones by default.
        log: told what is done.
        mining: how companions are found; as published by default.

    Returns:
        Seconds and denoiser evaluations by stage (a training sample counts as 3).
    """
    settings = settings or PaperSettings()
    result = PaperRun()
    procedure = _Procedure(base, concept, settings, log)

    def timed(stage: str, work: Callable[[], Any]) -> Any:
        began, before = time.perf_counter(), base.counter.total
        value = work()
        result.seconds[stage] = result.seconds.get(stage, 0.0) + time.perf_counter() - began
        result.evaluations[stage] = result.evaluations.get(stage, 0) + base.counter.total - before
        log(f"{stage}: {result.seconds[stage]:.0f} s, {result.evaluations[stage]} evaluations")
        return value

    count = settings.target_images
    seeds = [settings.seed * 1_000_003 + 700_000 + k for k in range(count)]
    images = timed(
        "target images",
        lambda: base.generate(
            [concept.target_prompt] * count, seeds, steps=settings.steps, guidance_scale=7.5, batch_size=10
        ),
    )
    options = mining or CareSetOptions(source="clip")
    care_set = timed("CARE-set", lambda: build_care_set(concept, images, clip, options, seed=settings.seed))
    result.care_set = care_set
    template = concept.target_prompt_for(PLACEHOLDER)
    names: list[Callable[[], PromptEmbeds]] = [lambda: base.encode_prompts([concept.target_prompt])]
    for number in range(settings.rounds):
        current = names[-1]
        timed("search: erase", partial(procedure.erase_name, current, f"search {number + 1}"))
        vector = timed("search: inversion", partial(procedure.invert, images, f"inversion {number + 1}"))

        def adversarial(vector: Tensor = vector) -> PromptEmbeds:
            with torch.no_grad():
                return base.encode_with_vectors([template], vector)

        names.append(adversarial)
    procedure._use(procedure.original)
    timed("erase", lambda: procedure.final(names, care_set))
    return result
