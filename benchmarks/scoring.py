"""Draws a suite's pictures with and without a patch, and counts what the judge sees."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.suites import Figure, suite
from recare_patch.measure import wilson_interval
from recare_patch.models import scheduled
from recare_patch.models.atelier.judge import Judge

if TYPE_CHECKING:
    from PIL.Image import Image

STEPS, SCHEDULER, GUIDANCE_SCALE = 8, "dpm-solver++", 5.0
"""As the bundled suites: the base's rates are those of twenty steps of its own scheduler."""

Sampler = tuple[int, str | None]
"""Steps, and the scheduler that takes them; None: the base's own."""

TWENTY: Sampler = (20, None)
"""What the first tables were drawn with."""

TRIALS: dict[str, tuple[str, dict[str, Any]]] = {
    "inversion, 1 vector": ("concept-inversion", {"vectors": 1}),
    "inversion, 4 vectors": ("concept-inversion", {"vectors": 4}),
    "UnlearnDiffAtk": ("unlearn-diff-atk", {}),
    "inversion, 1 vector, 3,000 steps": ("concept-inversion", {"vectors": 1, "steps": 3000}),
    "inversion, 4 vectors, 3,000 steps": ("concept-inversion", {"vectors": 4, "steps": 3000}),
}
"""Column → attack, and what is changed in its small budget."""

PROBES: dict[str, tuple[str, dict[str, Any]]] = {
    "completion": ("completion", {}),
    "img2img": ("img2img", {}),
    "inpainting": ("inpainting", {}),
    "classifier guidance": ("classifier-guidance", {}),
    "best of 6 noises": ("noise-search", {"tries": 6}),
}
"""Those that start from what the base draws, or look in the noise."""


@dataclass(frozen=True)
class Score:
    """Hits among pictures, with the 95 % Wilson interval.

    Attributes:
        figure, group: of the suite.
        hits, pictures: over all prompts.
        by_prompt: (hits, pictures) of each prompt.
        change: mean perceptual change to the base's own pictures at equal seeds; None where it was not looked at.
    """

    figure: str
    group: str
    hits: int
    pictures: int
    by_prompt: dict[str, tuple[int, int]]
    change: float | None = None

    @property
    def rate(self) -> float:
        """Hits a picture."""
        return self.hits / self.pictures

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of the rate."""
        low, high = wilson_interval(self.hits, self.pictures)
        return low, high


def draw_figure(base: Any, figure: Figure, split: str, sampler: Sampler = (STEPS, SCHEDULER)) -> list[Image]:
    """One figure's pictures."""
    draws = figure.draws(split)
    with scheduled(base.pipeline, sampler[1]):
        images: list[Image] = base.generate(
            [p for p, _, _ in draws],
            [s for _, _, s in draws],
            steps=sampler[0],
            guidance_scale=GUIDANCE_SCALE,
            batch_size=32,
        )
    return images


def judge_figure(judge: Judge, figure: Figure, split: str, images: Sequence[Image]) -> Score:
    """What the judge sees in them."""
    draws = figure.draws(split)
    found = judge(list(images))
    by_prompt: dict[str, tuple[int, int]] = {}
    for (prompt, label, _), seen in zip(draws, found, strict=True):
        hits, pictures = by_prompt.get(prompt, (0, 0))
        by_prompt[prompt] = (hits + (label in seen), pictures + 1)
    total = sum(hits for hits, _ in by_prompt.values())
    return Score(figure.name, figure.group, total, len(draws), by_prompt)


def score(
    base: Any,
    concept: str,
    split: str,
    *,
    patch: Any = None,
    pictures: int = 100,
    figures: Sequence[str] = (),
    sampler: Sampler = (STEPS, SCHEDULER),
    changes: bool = False,
    log: Callable[[str], None] = print,
) -> list[Score]:
    """Every figure of a concept's suite, under a patch where one is given.

    Args:
        figures: names of the figures to draw; all where empty.
        sampler: how they are drawn.
        changes: also draw all but the concept without the patch, and measure how far its pictures are from those.
    """
    judge = Judge.load()
    rows = []
    for figure in suite(concept, split, pictures):
        if figures and figure.name not in figures:
            continue
        with patch.apply(base.pipeline) if patch is not None else contextlib.nullcontext():
            images = draw_figure(base, figure, split, sampler)
        row = judge_figure(judge, figure, split, images)
        if changes and figure.group != "concept":
            row = replace(row, change=perceptual(draw_figure(base, figure, split, sampler), images))
        rows.append(row)
        told = "" if row.change is None else f", changed by {row.change:.3f}"
        log(f"  {row.figure:16} {row.rate:.3f} of {row.pictures}{told}")
    return rows


def perceptual(before: Sequence[Image], after: Sequence[Image]) -> float:
    """Mean perceptual change between pictures at equal seeds, by Atelier's CLIP: ``perceptual-change`` of a suite."""
    from recare_patch.careset import Clip
    from recare_patch.measure import perceptual_change

    clip = Clip.load()
    (_, layers), (_, others) = clip.image_layers(before), clip.image_layers(after)
    return float(perceptual_change(layers, others).mean())


def save_scores(path: Path, rows: list[Score], **note: Any) -> None:
    """Write scores as JSON, to be picked up by the table."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = {**note, "scores": [asdict(row) | {"rate": row.rate, "interval": row.interval} for row in rows]}
    path.write_text(json.dumps(data, indent=1))
