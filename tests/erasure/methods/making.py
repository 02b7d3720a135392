"""A context of a tiny run, as a method gets it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from recare_patch.careset.clip import Clip
from recare_patch.core import NullProgress
from recare_patch.erasure.methods import ErasingContext, load_method
from recare_patch.erasure.prepare import draw_target, find_companions, prepare
from recare_patch.erasure.stages import Run
from recare_patch.models import BaseModel
from recare_patch.models import lora as adapters
from recare_patch.recipe.concept import Concept
from recare_patch.recipe.recipe import Recipe
from tests.contracts.test_methods import SMALL


def make_recipe(method: str, *, text: str = "Van Gogh", kind: str = "style", **changes: Any) -> Recipe:
    plain = Recipe(concept=Concept(text=text, kind=kind))  # type: ignore[arg-type]
    return plain.with_overrides({"method": method, **SMALL, **changes})


def contexts_of(recipe: Recipe, base: BaseModel, clip: Path, work: Path) -> list[ErasingContext]:
    """What a run prepares for its method, and the adapter in place."""
    work.mkdir(parents=True, exist_ok=True)
    run = Run(recipe, work, base, Clip.load(str(clip)), NullProgress(), False)
    needs = load_method(recipe.method).needs
    found = []
    for target in run.targets:
        images = draw_target(run, target) if needs.target_images else []
        if needs.care_set:
            find_companions(run, target, images, None)
        found.append(prepare(run, target, needs))
    for network in adapters.adapted(base, recipe.adapter.layers).values():
        adapters.attach(
            network,
            layers=recipe.adapter.layers,
            rank=recipe.adapter.rank,
            alpha=recipe.adapter.alpha,
            generator=torch.Generator().manual_seed(0),
        )
    return found


def disturb(base: BaseModel, size: float = 0.3) -> None:
    """Give the adapter values that change something."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for network in base.components.values():
            for parameter in network.parameters():
                if parameter.requires_grad:
                    parameter.add_(size * torch.randn(parameter.shape, generator=generator))
