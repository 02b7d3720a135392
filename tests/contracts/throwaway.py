"""A method as another package brings it; tests/contracts/test_entry_points.py installs it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Self

from pydantic import Field
from torch import Generator, Tensor, no_grad
from torch.nn import functional as F

from recare_patch.core import Settings
from recare_patch.erasure.methods import Context, LossMethod, Work
from recare_patch.erasure.stages import Stages
from recare_patch.models import off
from recare_patch.recipe import MethodInfo, Paper, Recipe


class ThrowAwayOptions(Settings):
    """Its section of a recipe, ``throw_away``."""

    strength: float = Field(1.0, gt=0, le=10, description="of the loss")


class ThrowAway(LossMethod):
    """``s ‖ε(z_t,c) − sg ε*(z_t,∅)‖²``: the concept's prompts are drawn as nothing."""

    info = MethodInfo(
        title="Throw-Away",
        paper=Paper("Throw-Away", "Doe et al.", "2026", "2601.00001", "Doe, Jo", "Away"),
        what="draws the concept's prompts as nothing",
        touches="cross-attention of the denoiser",
        reads="pictures of the concept",
        strength="short",
        weakness="guards nothing at all",
        options=ThrowAwayOptions,
        defaults={"erase.steps": 60},
    )

    def __init__(self, context: Context) -> None:
        self.context = context
        self.names = context.base.encode_prompts(list(context.erased.names))
        self.empty = context.base.encode_prompts([""])

    def loss(self, latents: Tensor, timesteps: Tensor, which: Tensor, generator: Generator) -> Tensor:
        """The loss of one step."""
        base = self.context.base
        with no_grad(), off(*base.components.values()):
            nothing = base.denoise(latents, timesteps, self.empty.repeat(len(latents))).float()
        named = base.denoise(latents, timesteps, self.names[which]).float()
        assert isinstance(self.context.recipe.own, ThrowAwayOptions)
        return self.context.recipe.own.strength * F.mse_loss(named, nothing)

    @classmethod
    def work(cls, recipe: Recipe) -> Mapping[str, Work]:
        """One frozen prediction and one trained one a state, which counts as three."""
        rows = recipe.erase.batch_size
        return {"erase": Work(len(recipe.concepts) * recipe.erase.steps * rows * 4, rows, rows)}

    @classmethod
    def erase(cls, methods: Sequence[Self], stages: Stages) -> None:
        """One loop over all concepts."""
        stages.fit_losses(methods)
