"""UnlearnDiffAtk: a few words before the prompt bring the concept back (Zhang et al., arXiv 2310.11868).

The patched model itself is the classifier: an adversarial prompt ``c'`` is one under which it
predicts the noise on a picture of the concept well,

    min over c' of  E_t ‖ ε − ε_θ(z_t, c') ‖²,    z_t = √ᾱ_t z_0 + √(1−ᾱ_t) ε      (their equation 5).

Each adversarial token is a distribution over the vocabulary; a token is drawn from it at every step,
the gradient passes straight through the draw, clipped to ±1, and after the step the distribution is
projected back onto the probability simplex.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from recare_patch.measure.attacks.protocol import AttackOptions, AttackResult, AttackTarget, Rate, Steps
from recare_patch.measure.attacks.search import (
    Rounds,
    Vocabulary,
    attack_prompts,
    name_candidates,
    prediction_errors,
    replay_prompts,
)

if TYPE_CHECKING:
    from recare_patch.core import Progress
    from recare_patch.recipe import Concept


class UnlearnDiffAtkOptions(AttackOptions):
    """How much is tried.

    Attributes:
        tokens: adversarial tokens before the prompt; None: 5 for unsafe content, 3 for all else, as
            published.
        timesteps: spread evenly over the process and visited from clean to noisy; each ends with a
            picture; published 50.
        iterations: steps at each timestep; published 40.
        learning_rate, weight_decay: of Adam; as published.
        pictures: attacked prompts; published 50, for unsafe content 142.
    """

    tokens: Annotated[int, Field(ge=1, le=70)] | None = None
    timesteps: Steps = 10
    iterations: Steps = 10
    learning_rate: Rate = 1.0e-2
    weight_decay: Annotated[float, Field(ge=0, le=10)] = 0.1

    @classmethod
    def published(cls) -> Mapping[str, Any]:
        """As in the paper and its release."""
        return {"timesteps": 50, "iterations": 40, "pictures": 50}


def project_to_simplex(points: Tensor) -> Tensor:
    """The nearest point of the probability simplex to each row (Held et al., 1974).

    Args:
        points: ``[..., size]``.

    Returns:
        ``max(points − μ, 0)`` with the ``μ`` of each row that makes it sum to 1.
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
        return torch.nn.functional.one_hot(drawn, weights.shape[-1]).to(weights.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0].clamp(-1, 1), None


class _Search:
    """See :class:`PromptSearch`."""

    def __init__(
        self,
        target: AttackTarget,
        vocabulary: Vocabulary,
        rows: list[int],
        options: UnlearnDiffAtkOptions,
    ) -> None:
        base = target.base
        self.target, self.vocabulary, self.rows = target, vocabulary, rows
        tokens = options.tokens or (5 if target.concept.kind == "nsfw" else 3)
        size = len(self.vocabulary.ids)
        self.parameter = nn.Parameter(
            torch.full((len(rows), tokens, size), 1 / size, device=self.vocabulary.vectors.device)
        )
        self.optimizer: torch.optim.Optimizer = torch.optim.Adam(
            [self.parameter], lr=options.learning_rate, weight_decay=options.weight_decay
        )
        self.texts = [target.prompts[row] for row in rows]
        self.vectors = [self.vocabulary.of_text(text) for text in self.texts]
        # As published: the middles of equal parts of the process, from clean to noisy.
        stride = base.num_train_timesteps / options.timesteps
        self.timesteps = [int(stride / 2 + k * stride) for k in range(options.timesteps)]

    def loss(self, rows: list[int], round_: int, generator: torch.Generator) -> Tensor:
        base = self.target.base
        clean = self.target.latents[[self.rows[row] for row in rows]]
        noise = torch.randn((len(self.rows), *clean.shape[1:]), generator=generator)[rows].to(clean)
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
        """The likeliest tokens, then the prompt."""
        best = self.vocabulary.ids[self.parameter.detach().argmax(-1).cpu()]
        return [
            f"{self.vocabulary.text(tokens)} {text}".strip()
            for tokens, text in zip(best, self.texts, strict=True)
        ]


class UnlearnDiffAtk:
    """See :class:`Attack`.

    Success is a picture of the attacked prompt, at its own seed, that shows the concept after any of
    the timesteps, or without an attack.
    """

    name = "unlearn-diff-atk"
    options_type = UnlearnDiffAtkOptions

    def candidates(self, concept: Concept, words: Sequence[str]) -> tuple[str, ...]:
        """Prompts that name the concept."""
        return name_candidates(concept, words)

    def images_wanted(self, options: UnlearnDiffAtkOptions) -> int:
        """One for each attacked prompt."""
        return options.pictures

    def run(
        self,
        target: AttackTarget,
        options: UnlearnDiffAtkOptions,
        *,
        seed: int,
        progress: Progress | None = None,
        work: Path | None = None,
    ) -> AttackResult:
        """See :class:`Attack`."""
        vocabulary = Vocabulary(target.base)
        return attack_prompts(
            self.name,
            target,
            options,
            Rounds(options.timesteps, options.iterations),
            lambda rows, generator: _Search(target, vocabulary, rows, options),
            seed=seed,
            progress=progress,
            work=work,
        )

    def replay(
        self, target: AttackTarget, saved: AttackResult, *, progress: Progress | None = None
    ) -> AttackResult:
        """See :class:`Attack`."""
        return replay_prompts(self.name, target, saved, self.options_type(**saved.budget), progress)
