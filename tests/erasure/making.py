"""Short runs on tiny random models, and what a method has in one of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from recare_patch.careset import Clip
from recare_patch.core import NullProgress
from recare_patch.erasure.methods import Method
from recare_patch.erasure.prepare import Target, draw_target, find_companions, prepare, targets_of
from recare_patch.erasure.stages import ADAPTER, Run, Stages
from recare_patch.models import BaseModel, remove_adapter
from recare_patch.models import lora as adapters
from recare_patch.recipe import METHODS, Concept, Recipe

SMALL: dict[str, Any] = {
    "target_images.count": 4,
    "target_images.steps": 2,
    "target_images.batch_size": 2,
    "care_set.clustering": False,
    "care_set.refinement": False,
    "search.rounds": 1,
    "search.erase_steps": 3,
    "search.inversion_steps": 3,
    "search.batch_size": 2,
    "erase.steps": 22,
    "erase.batch_size": 2,
    "erase.retain_batch_size": 2,
    "erase.retained_pairs": 1,
    "erase.retained_images": 3,
    "erase.retained_vocabulary": 4,
    "adapter.rank": 2,
    "adapter.alpha": 1.0,
}
"""What makes a run short, whatever the method; of its steps the last checkpoint is not the last."""

ITS_OWN: dict[str, dict[str, Any]] = {"s-grace": {"s_grace.rounds": 2, "s_grace.attack_steps": 2}}
"""What makes a method's run short besides."""

TENCH = {"text": "tench", "kind": "object"}
STARS_FROM_VAN_GOGH = {"concept": {"text": "stars", "kind": "object"}, "subject": {"text": "Van Gogh", "kind": "style"}}


def small_recipe(base: Path | str, clip: Path | str, method: str = "recare", **changes: Any) -> Recipe:
    """Of Van Gogh's style; ``changes`` are recipe keys."""
    plain = Recipe(concept=Concept(text="Van Gogh", kind="style"), base=str(base), clip=str(clip))
    return plain.with_overrides({"method": method, **SMALL, **ITS_OWN.get(method, {}), **changes})


def prepared(recipe: Recipe, base: BaseModel, work: Path) -> tuple[Run, list[Target]]:
    """A run whose concepts are drawn and have their companions."""
    work.mkdir(parents=True, exist_ok=True)
    run = Run(recipe, work, base, Clip.load(str(recipe.clip)), NullProgress(), False)
    kind: type[Method] = METHODS.get(recipe.method)
    targets = targets_of(run)
    for target in targets:
        images = draw_target(target) if kind.needs.target_images else []
        if kind.needs.care_set:
            find_companions(target, images, None)
    return run, targets


def methods_of(recipe: Recipe, base: BaseModel, work: Path) -> list[Any]:
    """The methods of a run's concepts, up to their erasing: a fresh adapter is in the base."""
    run, targets = prepared(recipe, base, work)
    kind: type[Method] = METHODS.get(recipe.method)
    made = [kind(prepare(target, kind)) for target in targets]
    for one in made:
        one.search(Stages(run))
    attach(base, recipe)
    return made


def attach(base: BaseModel, recipe: Recipe) -> list[torch.nn.Parameter]:
    """A fresh adapter of the recipe's, in the place of an earlier one."""
    parameters, generator = [], torch.Generator().manual_seed(0)
    for network in base.components.values():
        remove_adapter(network, ADAPTER)
    for network in adapters.adapted(base, recipe.adapter.layers).values():
        options = recipe.adapter.model_dump()
        parameters += adapters.attach(network, **options, generator=generator)
    return parameters


def disturb(base: BaseModel, size: float = 0.3) -> None:
    """Give the adapter values that change something."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for network in base.components.values():
            for parameter in network.parameters():
                if parameter.requires_grad:
                    parameter.add_(size * torch.randn(parameter.shape, generator=generator))


class Killed(BaseException):
    """A run that ends in the middle."""


class Killer:
    """Ends a run at the n-th report of its progress."""

    def __init__(self, at: float) -> None:
        self.left, self.seen = at, 0

    def update(self, stage: str, done: int, total: int, note: str = "") -> None:
        if stage == "preview":
            return
        self.seen += 1
        if self.seen == self.left:
            raise Killed
