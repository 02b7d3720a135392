"""What an erasure will move beside its concept, told before anything is trained."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from recare_patch.core import Progress, SheetRow, sheet
from recare_patch.erasure.run import erase
from recare_patch.models import scheduled

if TYPE_CHECKING:
    from PIL.Image import Image

    from recare_patch.careset import Clip
    from recare_patch.models import BaseModel
    from recare_patch.patch import Patch
    from recare_patch.recipe import Recipe

EACH = 3
"""Pictures of each word on a sheet, before and after."""

_ROWS = 8


@dataclass(frozen=True)
class Forecast:
    """What moves most.

    Attributes:
        words: word → by how much of its length what the values make of it moves, the most first.
        patch: the closed form that moves it.
    """

    words: dict[str, float]
    patch: Patch


def forecast(
    recipe: Recipe,
    *,
    most: int = 20,
    device: str = "auto",
    base: BaseModel | None = None,
    clip: Clip | None = None,
    progress: Progress | None = None,
) -> Forecast:
    """The words that an erasure of a recipe's concepts will move most, by the closed form, which takes a second.

    Li et al. (SPEED, arXiv 2503.07392) choose by such a list what they retain; here it is also what ReCARE starts from.

    Args:
        recipe: of any method; its concepts, base and CLIP are read.
        most: how many words are told.
        device, base, clip, progress: as :func:`erase` takes them.

    Raises:
        RecarePatchError: the base's values do not read the prompt, or the recipe takes an attribute from a subject.
    """
    same = ("concept", "also", "replace_with", "subject", "base", "clip", "seed", "precision", "memory")
    closed = type(recipe)(method="closed", closed={"told": most}, **{key: getattr(recipe, key) for key in same})
    with TemporaryDirectory() as folder:
        result = erase(
            closed, Path(folder) / "closed", preview=False, device=device, base=base, clip=clip, progress=progress
        )
        return Forecast(dict(result.cost["moved_most"]), result.patch)


def draw_forecast(found: Forecast, recipe: Recipe, base: BaseModel, *, seed: int = 0) -> Image:
    """A sheet of the words that move most, with and without the closed form at the same seeds."""
    options, words = recipe.target_images, list(found.words)[:_ROWS]
    texts = [f"A photo of {word}" for word in words for _ in range(EACH)]
    how: dict[str, Any] = {"steps": options.steps, "guidance_scale": options.guidance_scale}

    def draw() -> list[Image]:
        with scheduled(base.pipeline, options.scheduler):
            seeds = [seed + k for _ in words for k in range(EACH)]
            return base.generate(texts, seeds, batch_size=options.batch_size, **how)

    before = draw()
    with found.patch.apply(base.pipeline):
        after = draw()
    rows = [
        SheetRow(f"{word}: {found.words[word]:.0%}", [*before[k * EACH :][:EACH], *after[k * EACH :][:EACH]])
        for k, word in enumerate(words)
    ]
    title = f"what the closed form of {recipe.title} moves most"
    return sheet(rows, ["before"] * EACH + ["after"] * EACH, title, blur=recipe.concept.kind == "nsfw")
