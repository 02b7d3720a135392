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
    from recare_patch.base_models import load_base
    from recare_patch.careset import CareSet, build_care_set
    from recare_patch.composing import stack
    from recare_patch.concepts import Concept
    from recare_patch.erasing import EraseResult, erase, erase_concept
    from recare_patch.erasing import generate_pictures as generate
    from recare_patch.errors import RecarePatchError
    from recare_patch.evaluating import evaluate
    from recare_patch.merging import merge, unmerge
    from recare_patch.patch import Patch, apply_all
    from recare_patch.recipe import Recipe, load_recipe
    from recare_patch.sharing import pull, push, search

_HOMES = {
    "CareSet": "recare_patch.careset:CareSet",
    "Concept": "recare_patch.concepts:Concept",
    "EraseResult": "recare_patch.erasing:EraseResult",
    "Patch": "recare_patch.patch:Patch",
    "RecarePatchError": "recare_patch.errors:RecarePatchError",
    "Recipe": "recare_patch.recipe:Recipe",
    "apply_all": "recare_patch.patch:apply_all",
    "build_care_set": "recare_patch.careset:build_care_set",
    "erase": "recare_patch.erasing:erase",
    "erase_concept": "recare_patch.erasing:erase_concept",
    "evaluate": "recare_patch.evaluating:evaluate",
    "generate": "recare_patch.erasing:generate_pictures",
    "load_base": "recare_patch.base_models:load_base",
    "load_recipe": "recare_patch.recipe:load_recipe",
    "merge": "recare_patch.merging:merge",
    "pull": "recare_patch.sharing:pull",
    "push": "recare_patch.sharing:push",
    "search": "recare_patch.sharing:search",
    "stack": "recare_patch.composing:stack",
    "unmerge": "recare_patch.merging:unmerge",
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
