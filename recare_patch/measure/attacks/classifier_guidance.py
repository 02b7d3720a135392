"""Classifier guidance: a small classifier of noisy latents pulls the sampling towards the concept.

Dhariwal and Nichol, arXiv 2105.05233, with a classifier that is fitted to pictures by the untouched base: those
of the concept against those of a prompt without it, noised as the base noises. As a probe of erasure it is of Lu
et al., arXiv 2505.17013. The pull is a share of the length of each step, so that one strength suits every
scheduler and prediction type.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from recare_patch.erasure import fit, noised
from recare_patch.measure.attacks import protocol
from recare_patch.measure.attacks.probes import words
from recare_patch.measure.attacks.protocol import Attack, AttackError, AttackOptions, AttackRun, AttackTarget, Trial
from recare_patch.models import Trajectory

if TYPE_CHECKING:
    from PIL.Image import Image

_WIDTH, _TIMES = 32, 16


class ClassifierGuidanceOptions(AttackOptions):
    """How the classifier is fitted, and how hard it pulls."""

    images: int = Field(24, ge=2, le=10_000, description="pictures it learns from, of the concept and of others each")
    steps: protocol.Steps = Field(300, description="training steps of the classifier")
    learning_rate: protocol.Rate = Field(2e-3, description="its peak")
    strength: float = Field(1.0, gt=0, le=10, description="length of the pull, as a share of each step's")


class LatentClassifier(nn.Module):
    """Whether noisy latents ``[batch, channels, height, width]`` at timesteps ``[batch]`` are the concept's: logits."""

    frequencies: Tensor

    def __init__(self, channels: int, num_train_timesteps: int) -> None:
        super().__init__()
        self.most = num_train_timesteps
        self.register_buffer("frequencies", 2.0 ** (torch.arange(_TIMES) / 2), persistent=False)
        self.times = nn.Linear(2 * _TIMES, 2 * _WIDTH)
        self.first = nn.Conv2d(channels, _WIDTH, 3, padding=1)
        self.second = nn.Conv2d(_WIDTH, 2 * _WIDTH, 3, stride=2, padding=1)
        self.third = nn.Conv2d(2 * _WIDTH, 2 * _WIDTH, 3, stride=2, padding=1)
        self.out = nn.Linear(2 * _WIDTH, 1)

    def forward(self, latents: Tensor, timesteps: Tensor) -> Tensor:
        """Logits ``[batch]``, fp32."""
        waves = timesteps.float()[:, None] / self.most * torch.pi * self.frequencies
        time = self.times(torch.cat([waves.sin(), waves.cos()], 1))[:, :, None, None]
        hidden = F.silu(self.first(latents.float()))
        hidden = F.silu(F.group_norm(self.second(hidden) + time, 8))
        hidden = F.silu(F.group_norm(self.third(hidden), 8))
        logits: Tensor = self.out(hidden.mean((2, 3)))[:, 0]
        return logits


class ClassifierGuidance(Attack[ClassifierGuidanceOptions]):
    """Draws the plain prompts while the classifier pulls the latents, after each step, towards the concept."""

    name = "classifier-guidance"
    options_type = ClassifierGuidanceOptions

    def images_wanted(self, options: ClassifierGuidanceOptions) -> int:
        """Those it learns from, or one for each trial."""
        return max(options.images, options.pictures)

    def trials(self, target: AttackTarget, options: ClassifierGuidanceOptions, seed: int) -> list[Trial]:
        """The target's prompts at seeds of their own: the classifier has seen the target's pictures."""
        rows = super().trials(target, options, seed)
        seeds = protocol.trial_seeds(seed, len(rows))
        return [{**one, "seed": own, "strength": options.strength} for one, own in zip(rows, seeds, strict=True)]

    def search(self, run: AttackRun[ClassifierGuidanceOptions], trials: list[Trial]) -> dict[str, Tensor]:
        """Fit the classifier."""
        options, target, base = run.options, run.target, run.target.base
        own = target.latents[: options.images]
        seeds = protocol.candidate_seeds(run.seed, len(own), first=700_000)
        with target.original():
            embeds = base.encode_prompts([target.concept.plain_prompt]).repeat(len(own))
            how: dict[str, Any] = {"steps": target.steps, "guidance_scale": target.guidance_scale}
            others = base.sample_latents(embeds, seeds, batch_size=options.batch_size, **how)
        clean = torch.cat([own.float(), others.to(own.device).float()])
        wanted = torch.cat([torch.ones(len(own)), torch.zeros(len(others))]).to(own.device)
        classifier = self._classifier(base, run.seed)
        rows = min(4 * options.batch_size, len(clean))

        def loss(step: int, generator: torch.Generator) -> Tensor:
            which = torch.randint(0, len(clean), (rows,), generator=generator)
            states, timesteps, _ = noised(base, clean[which], generator)
            made = classifier(states, timesteps.to(states.device))
            return F.binary_cross_entropy_with_logits(made, wanted[which])

        fit(list(classifier.parameters()), loss, run.loop("classifier", options.steps, options.learning_rate))
        return {name: one.detach().float().cpu() for name, one in classifier.state_dict().items()}

    @staticmethod
    def _classifier(base: Any, seed: int) -> LatentClassifier:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return LatentClassifier(base.latent_shape[0], base.num_train_timesteps).to(base.device)

    def drawing(self, target: AttackTarget, trials: list[Trial], tensors: Mapping[str, Tensor]) -> protocol.Draw:
        """Samples with the pull."""
        classifier = self._classifier(target.base, 0)
        try:
            classifier.load_state_dict(dict(tensors))
        except RuntimeError:
            told = f"does not fit base '{target.base.id}', whose latents have {target.base.latent_shape[0]} channels"
            raise AttackError(f"the saved attack's classifier {told}") from None
        classifier.requires_grad_(False)

        def draw(some: slice) -> list[Image]:
            return target.base.decode_latents(self._latents(target, trials[some], classifier))

        return draw

    def _latents(self, target: AttackTarget, trials: Sequence[Trial], classifier: LatentClassifier) -> Tensor:
        way = Trajectory(target.base, target.steps)
        latents = way.start(way.noise([one["seed"] for one in trials]))
        read = words(target, [one["prompt"] for one in trials])
        for number in range(len(way.timesteps)):
            before = latents
            latents = way.step(latents, number, *read, target.guidance_scale)
            if number + 1 < len(way.timesteps):
                pull = self._pull(way, latents, number + 1, classifier)
                length = (latents - before).float().flatten(1).norm(dim=1) * trials[0]["strength"]
                latents = latents + (pull * length[:, None, None, None]).to(latents)
        return latents

    @staticmethod
    def _pull(way: Trajectory, latents: Tensor, number: int, classifier: LatentClassifier) -> Tensor:
        """The direction in which the concept's log-probability rises fastest, each row of length 1."""
        with torch.enable_grad():
            given = latents.detach().float().requires_grad_()
            seen, times = way.seen(given, number)
            (gradient,) = torch.autograd.grad(F.logsigmoid(classifier(seen, times)).sum(), given)
        length = gradient.flatten(1).norm(dim=1).clamp(min=1e-12)
        return gradient / length[:, None, None, None]
