"""Erase a concept from a diffusion model and keep its benign companions, as a small LoRA patch.

Example:
    >>> from recare_patch import erase, load_recipe  # doctest: +SKIP
    >>> result = erase(load_recipe("van-gogh"), "van-gogh-patch")  # doctest: +SKIP
    >>> result.patch.apply(pipe, scale=1.0)  # doctest: +SKIP
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from recare_patch.careset import CareSet, build_care_set
    from recare_patch.combine import merge, stack, unmerge
    from recare_patch.core import RecarePatchError
    from recare_patch.erasure import EraseResult, erase, erase_concept
    from recare_patch.measure import evaluate
    from recare_patch.models import load_base
    from recare_patch.patch import Patch, apply_all
    from recare_patch.patch import generate_pictures as generate
    from recare_patch.recipe import Concept, Recipe, load_recipe
    from recare_patch.share import pull, push, search

_HOMES = {
    "CareSet": "recare_patch.careset:CareSet",
    "Concept": "recare_patch.recipe.concept:Concept",
    "EraseResult": "recare_patch.erasure.run:EraseResult",
    "Patch": "recare_patch.patch.patch:Patch",
    "RecarePatchError": "recare_patch.core.errors:RecarePatchError",
    "Recipe": "recare_patch.recipe.recipe:Recipe",
    "apply_all": "recare_patch.patch.apply:apply_all",
    "build_care_set": "recare_patch.careset:build_care_set",
    "erase": "recare_patch.erasure.run:erase",
    "erase_concept": "recare_patch.erasure.run:erase_concept",
    "evaluate": "recare_patch.measure.run:evaluate",
    "generate": "recare_patch.patch.generate:generate_pictures",
    "load_base": "recare_patch.models.loading:load_base",
    "load_recipe": "recare_patch.recipe.recipe:load_recipe",
    "merge": "recare_patch.combine.merging:merge",
    "pull": "recare_patch.share:pull",
    "push": "recare_patch.share:push",
    "search": "recare_patch.share:search",
    "stack": "recare_patch.combine.stacking:stack",
    "unmerge": "recare_patch.combine.merging:unmerge",
}

__all__ = [
    "CareSet",
    "Concept",
    "EraseResult",
    "Patch",
    "RecarePatchError",
    "Recipe",
    "apply_all",
    "build_care_set",
    "erase",
    "erase_concept",
    "evaluate",
    "generate",
    "load_base",
    "load_recipe",
    "merge",
    "pull",
    "push",
    "search",
    "stack",
    "unmerge",
]


def __getattr__(name: str) -> Any:
    # Torch takes seconds to import: nothing here loads it before it is used (PEP 562).
    if name in _HOMES:
        module, _, attribute = _HOMES[name].partition(":")
        return getattr(import_module(module), attribute)
    raise AttributeError(f"module 'recare_patch' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
