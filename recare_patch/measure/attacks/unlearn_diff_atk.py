"""UnlearnDiffAtk: a few words before the prompt bring the concept back (Zhang et al., arXiv 2310.11868).

The patched model itself is the classifier: an adversarial prompt ``c'`` is one under which it
predicts the noise on a picture of the concept well,

    min over c' of  E_t ‖ ε − ε_θ(z_t, c') ‖²,    z_t = √ᾱ_t z_0 + √(1−ᾱ_t) ε      (their equation 5).

Each adversarial token is a distribution over the vocabulary; a token is drawn from it at every step,
the gradient passes straight through the draw, clipped to ±1, and after the step the distribution is
projected back onto the probability simplex.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from recare_patch.measure.attacks.protocol import AttackOptions, Rate, Steps, Values
from recare_patch.measure.attacks.search import Group, PromptAttack, prediction_errors


class UnlearnDiffAtkOptions(AttackOptions):
    """How much is tried; of unsafe content the paper attacks 142 prompts."""

    published: ClassVar[Values] = {"timesteps": 50, "iterations": 40, "pictures": 50}

    tokens: Annotated[int, Field(ge=1, le=70)] | None = Field(
        None, description="new ones before the prompt; else, as published, 5 for unsafe content, 3 for others"
    )
    timesteps: Steps = Field(10, description="from clean to noisy; each ends with a picture; published 50")
    iterations: Steps = Field(10, description="steps at each timestep; published 40")
    learning_rate: Rate = Field(1e-2, description="of Adam; as published")
    weight_decay: float = Field(0.1, ge=0, le=10, description="of Adam; as published")


def project_to_simplex(points: Tensor) -> Tensor:
    """The nearest point of the probability simplex to each row of ``[..., size]`` (Held et al., 1974).

    It is ``max(points − μ, 0)`` with the ``μ`` of each row that makes it sum to 1.
    """
    falling, _ = points.sort(dim=-1, descending=True)
    excess = falling.cumsum(-1) - 1
    counts = torch.arange(1, points.shape[-1] + 1, device=points.device)
    # The largest support whose least member stays positive.
    support = (falling * counts > excess).sum(-1, keepdim=True).clamp(min=1)
    threshold = excess.gather(-1, support - 1) / support
    return (points - threshold).clamp(min=0)


class _Draw(torch.autograd.Function):
    """One token of each distribution as a one-hot row; backwards, the gradient clipped to ±1."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, drawn: Tensor) -> Tensor:
        return F.one_hot(drawn, weights.shape[-1]).to(weights.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0].clamp(-1, 1), None


class _Group(Group):
    """A distribution over the vocabulary for each new token."""

    def begin(self, options: UnlearnDiffAtkOptions, generator: torch.Generator) -> None:
        tokens = options.tokens or (5 if self.target.concept.kind == "nsfw" else 3)
        size = len(self.vocabulary.ids)
        start = torch.full((len(self.rows), tokens, size), 1 / size, device=self.vocabulary.vectors.device)
        self.parameter = nn.Parameter(start)
        self.optimizer = torch.optim.Adam([self.parameter], lr=options.learning_rate, weight_decay=options.weight_decay)
        self.vectors = [self.vocabulary.of_text(text) for text in self.texts]
        # As published: the middles of equal parts of the process, from clean to noisy.
        stride = self.target.base.num_train_timesteps / options.timesteps
        self.timesteps = [int(stride / 2 + k * stride) for k in range(options.timesteps)]

    def loss(self, rows: list[int], round_: int, generator: torch.Generator) -> Tensor:
        base = self.target.base
        clean, noise = self.pictures(rows, generator)
        weights = self.parameter.detach().flatten(0, 1).cpu()
        drawn = torch.multinomial(weights, 1, generator=generator).view(self.parameter.shape[:2])
        one_hot: Tensor = _Draw.apply(self.parameter, drawn.to(self.parameter.device))
        adversarial = one_hot @ self.vocabulary.vectors
        embeds = base.encode_token_vectors([torch.cat([adversarial[row], self.vectors[row]]) for row in rows])
        timesteps = torch.full((len(rows),), self.timesteps[round_], device=base.device)
        wanted = base.training_target(clean, noise, timesteps)
        predicted = base.denoise(base.add_noise(clean, noise, timesteps), timesteps, embeds)
        return prediction_errors(predicted, wanted).sum()

    def project(self) -> None:
        with torch.no_grad():
            self.parameter.copy_(project_to_simplex(self.parameter))

    def prompts(self) -> list[str]:
        # The likeliest tokens, then the prompt.
        best = self.vocabulary.ids[self.parameter.detach().argmax(-1).cpu()]
        return [f"{self.vocabulary.text(tokens)} {text}".strip() for tokens, text in zip(best, self.texts, strict=True)]


class UnlearnDiffAtk(PromptAttack[UnlearnDiffAtkOptions]):
    """A round at each timestep."""

    name = "unlearn-diff-atk"
    options_type = UnlearnDiffAtkOptions
    group = _Group

    def rounds(self, options: UnlearnDiffAtkOptions) -> tuple[int, int]:
        """A round at each timestep."""
        return options.timesteps, options.iterations
