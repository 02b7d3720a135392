"""A base, recipes for it, runs of them, and a method as one of them makes it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from recare_patch.erasure import EraseResult, erase
from recare_patch.models import BaseModel, load_base
from recare_patch.recipe import Recipe
from tests.erasure.making import methods_of, small_recipe


@pytest.fixture
def base(tiny_sd: Path) -> BaseModel:
    return load_base(tiny_sd, device="cpu")


@pytest.fixture(scope="session")
def small(tiny_sd: Path, tiny_clip: Path) -> Callable[..., Recipe]:
    """A recipe for the tiny models, from a method and changes of its keys."""
    return lambda method="recare", **changes: small_recipe(tiny_sd, tiny_clip, method, **changes)


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., EraseResult]:
    """A run of a recipe into a folder of that name."""

    def run(recipe: Recipe, name: str = "p", **options: Any) -> EraseResult:
        return erase(recipe, tmp_path / name, device="cpu", **{"preview": False, **options})

    return run


@pytest.fixture
def method(base: BaseModel, small: Callable[..., Recipe], tmp_path: Path) -> Callable[..., Any]:
    """A method of a run of one concept, up to its erasing."""
    made = 0

    def make(recipe: Recipe | str, on: BaseModel = base, **changes: Any) -> Any:
        nonlocal made
        made += 1
        recipe = small(recipe, **changes) if isinstance(recipe, str) else recipe
        (one,) = methods_of(recipe, on, tmp_path / f"work {made}")
        return one

    return make
