"""Pictures before and after patches."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from recare_patch.core import Progress
from recare_patch.models import load_base
from recare_patch.patch.apply import check_together
from recare_patch.patch.gate import gated as put_in_gated
from recare_patch.patch.patch import Patch


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
    steps: int = 20,
    guidance_scale: float = 5.0,
    gated: bool = False,
    device: str = "auto",
    progress: Progress | None = None,
) -> list[GeneratedPair]:
    """Every prompt at every seed, before and after the patches.

    Args:
        base: folder or id of the base model, or ``atelier``.
        patches: patch folders with their scales.
        prompts, seeds: each prompt is drawn at each seed.
        steps, guidance_scale: of the sampler.
        gated: let each patch's scale follow the prompt; see :class:`Gate`.
        device: where to draw.
        progress: hears of the steps.
    """
    loaded = [(Patch.load(path), scale) for path, scale in patches]
    if loaded:
        check_together(loaded)
    model = load_base(base, device=device)
    texts = [prompt for prompt in prompts for _ in seeds]
    numbers = [seed for _ in prompts for seed in seeds]

    def draw() -> list[Image.Image]:
        return model.generate(texts, numbers, steps=steps, guidance_scale=guidance_scale, progress=progress)

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
