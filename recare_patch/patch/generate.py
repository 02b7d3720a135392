"""Pictures before and after patches."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from recare_patch.core import Progress
from recare_patch.models import Load, load_to_draw
from recare_patch.patch.apply import check_together
from recare_patch.patch.gate import gated as put_in_gated
from recare_patch.patch.patch import Patch

if TYPE_CHECKING:
    from recare_patch.recipe import MemoryOptions


BATCH = 8
"""Pictures drawn together."""


@dataclass
class GeneratedPair:
    """The same prompt and seed before and after a patch; without one, ``after`` is the base's own picture."""

    prompt: str
    seed: int
    before: Image.Image
    after: Image.Image


def generate_pictures(
    base: str,
    patches: Sequence[tuple[Path, float]],
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int | None = None,
    guidance_scale: float | None = None,
    gated: bool = False,
    device: str = "auto",
    precision: str | None = None,
    memory: MemoryOptions | None = None,
    vram: float | None = None,
    progress: Progress | None = None,
) -> list[GeneratedPair]:
    """Every prompt at every seed, before and after the patches.

    Args:
        base: folder or id of the base model, or ``atelier``.
        patches: patch folders with their scales.
        prompts, seeds: each prompt is drawn at each seed.
        steps, guidance_scale: of the sampler; by default 20 and 5, or what a base of few steps is drawn with.
        gated: let each patch's scale follow the prompt; see :class:`Gate`.
        device: where to draw.
        precision, memory, vram: as :func:`load_to_draw` takes them; the first patch's recipe says what is usual.
        progress: hears of the steps.
    """
    loaded = [(Patch.load(path), scale) for path, scale in patches]
    if loaded:
        check_together(loaded)
    told = loaded[0][0].metadata if loaded else None
    recorded = told.parsed_recipe.precision if told is not None and told.recipe is not None else None
    how: dict[str, Any] = {"precision": precision, "device": device, "memory": memory, "vram": vram}
    guided = guidance_scale is None or guidance_scale > 1
    model = load_to_draw(base, recorded=recorded, load=Load(pictures=BATCH, guided=guided), **how)
    few = model.few_steps
    steps = steps or (few.steps if few else 20)
    guidance = guidance_scale if guidance_scale is not None else few.guidance if few else 5.0
    texts = [prompt for prompt in prompts for _ in seeds]
    numbers = [seed for _ in prompts for seed in seeds]

    def draw() -> list[Image.Image]:
        return model.generate(texts, numbers, steps=steps, guidance_scale=guidance, batch_size=BATCH, progress=progress)

    after: list[Image.Image] | None = None
    if loaded:
        put_in = put_in_gated if gated else Patch.apply
        # First, so that a patch that does not fit is refused before anything is drawn.
        with contextlib.ExitStack() as stack:
            for patch, scale in loaded:
                stack.enter_context(put_in(patch, model.pipeline, scale))
            after = draw()
    before = draw()
    after = before if after is None else after
    return [GeneratedPair(*row) for row in zip(texts, numbers, before, after, strict=True)]


generate = generate_pictures
"""What the package calls it."""
