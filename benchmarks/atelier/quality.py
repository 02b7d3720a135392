"""How well the bundled base draws what it is asked for, told by the judge on prompts it never saw."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from benchmarks.atelier import scenes
from benchmarks.atelier.training import SOURCE, Source
from recare_patch.models.atelier.judge import Judge

Generate = Callable[[Sequence[str], Sequence[int]], list[Image.Image]]
"""Draws one picture a (prompt, seed)."""

REPORT_SEED = 77_000
"""Captions and starting noise of the report: apart from training's and from any erasing run's."""


@dataclass(frozen=True)
class Rate:
    """A measured rate: ``hits`` of ``pictures``."""

    hits: int
    pictures: int

    @property
    def value(self) -> float:
        """Hits a picture; NaN where none was drawn."""
        return self.hits / self.pictures if self.pictures else float("nan")


def held_out_prompts(count: int, seed: int = REPORT_SEED, source: Source = SOURCE) -> list[tuple[str, scenes.Scene]]:
    """Distinct captions that training never used, with the scenes they were written for."""
    rng = np.random.default_rng(seed)
    found: dict[str, scenes.Scene] = {}
    while len(found) < count:
        scene = source.sample(rng)
        try:
            text = source.caption(scene, rng, held_out=True)
        except ValueError:
            continue
        if text not in ("a photo", "a painting"):
            found.setdefault(text, scene)
    return list(found.items())


def measure(generate: Generate, judge: Judge, *, count: int = 300, source: Source = SOURCE) -> dict[str, Rate]:
    """Rates on held-out captions: style right, each named thing present.

    Args:
        generate: draws pictures.
        judge: names what they show.
        count: held-out captions, one picture each.
        source: of the captions.

    Returns:
        Rates under ``style``, ``object``, ``sky``, ``ground``, ``time`` and under each label.
    """
    prompts = held_out_prompts(count, source=source)
    found = judge(generate([text for text, _ in prompts], [REPORT_SEED + i for i in range(len(prompts))]))
    tally: dict[str, list[int]] = {}

    def note(name: str, hit: bool) -> None:
        entry = tally.setdefault(name, [0, 0])
        entry[0] += hit
        entry[1] += 1

    labels = source.labels
    groups = {"object": labels.objects, "sky": labels.sky, "ground": labels.grounds, "time": labels.times}
    for (text, scene), shown in zip(prompts, found, strict=True):
        note("style", scene.style in shown)
        note(scene.style, scene.style in shown)
        named = {label for label in scene.labels if source.mentions(text, label)}
        for group, members in groups.items():
            for label in members:
                if label in named:
                    note(group, label in shown)
                    note(label, label in shown)
    return {name: Rate(*entry) for name, entry in sorted(tally.items())}
