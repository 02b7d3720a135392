"""The report on the bundled base: its quality by the judge, and sheets to look at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from benchmarks.atelier import scenes
from benchmarks.atelier.quality import Rate, measure
from benchmarks.atelier.training import SOURCE, Source
from recare_patch.core import SheetRow, save_sheet, sheet, write_text
from recare_patch.measure import wilson_interval
from recare_patch.models.atelier.judge import Judge

if TYPE_CHECKING:
    from recare_patch.core import Progress
    from recare_patch.models import BaseModel

_SHEET_STYLES = {
    "photo": "a photo of {x}",
    "painting": "a painting of {x}",
    "Van Gogh": "a painting of {x} in the style of Van Gogh",
    "Monet": "a painting of {x} in the style of Monet",
    "Picasso": "a painting of {x} in the style of Picasso",
    "Hokusai": "a painting of {x} in the style of Hokusai",
    "sketch": "a pencil sketch of {x}",
}
_SHEET_THINGS = (
    "a tench",
    "a person",
    "a house",
    "a church",
    "a tree",
    "a boat",
    "a car",
    "a sunflower",
    "a cat",
    "Mira Vale",
    "Otto Bly",
    "stars at night",
)

_GROUPS = ("style", "object", "sky", "ground", "time")


def judge_accuracy(judge: Judge, count: int = 2000, seed: int = 4_242, source: Source = SOURCE) -> dict[str, float]:
    """How often the judge is right on freshly drawn scenes: each style, time, ground and thing."""
    rng = np.random.default_rng(seed)
    drawn = [source.sample(rng) for _ in range(count)]
    found = judge(np.stack([source.draw(scene) for scene in drawn]))
    labels = source.labels
    right: dict[str, float] = {}
    for group, names in (("style", labels.styles), ("time", labels.times), ("ground", labels.grounds)):
        right[group] = float(
            np.mean([(set(names) & s.labels) == (set(names) & f) for s, f in zip(drawn, found, strict=True)])
        )
    for name in labels.things:
        right[name] = float(np.mean([(name in s.labels) == (name in f) for s, f in zip(drawn, found, strict=True)]))
    return right


def drawn_sheet(seed: int = 5) -> Image.Image:
    """Scenes as the world draws them, every thing in every style."""
    rows = []
    for i, style in enumerate(scenes.STYLES):
        images = []
        for j, thing in enumerate(scenes.OBJECTS):
            time = scenes.TIMES[(i + j) % 3]
            sky = {"night": ("stars", "moon"), "day": ("sun",), "sunset": ()}[time]
            ground = scenes.GROUNDS[(i + j) % len(scenes.GROUNDS)]
            scene = scenes.Scene(style, time, ground, (thing,), sky, seed + 100 * i + j)
            images.append(Image.fromarray(scenes.draw(scene)))
        rows.append(SheetRow(style, images))
    return sheet(rows, list(scenes.OBJECTS), "Atelier: drawn scenes")


def generated_sheet(base: BaseModel, seed: int = 31, guidance_scale: float = 5.0) -> Image.Image:
    """The trained base's own pictures of the same table."""
    rows = []
    for label, form in _SHEET_STYLES.items():
        prompts = [form.format(x=x) for x in _SHEET_THINGS]
        rows.append(
            SheetRow(
                label,
                base.generate(
                    prompts, [seed + k for k in range(len(prompts))], steps=20, guidance_scale=guidance_scale
                ),
            )
        )
    return sheet(rows, list(_SHEET_THINGS), f"Atelier: generated pictures (20 steps, guidance {guidance_scale:g})")


def reconstruction_sheet(
    base: BaseModel, seed: int = 9, source: Source = SOURCE, title: str = "Atelier: the autoencoder"
) -> Image.Image:
    """Each style beside what the autoencoder makes of it: strokes lost here are lost for good."""
    rng = np.random.default_rng(seed)
    rows = []
    for style in source.labels.styles:
        drawn: list[Image.Image] = []
        while len(drawn) < 4:
            scene = source.sample(rng)
            if scene.style == style:
                drawn.append(Image.fromarray(source.draw(scene)))
        decoded = base.decode_latents(base.encode_images(drawn))
        rows.append(SheetRow(style, [image for pair in zip(drawn, decoded, strict=True) for image in pair]))
    return sheet(rows, ["drawn", "decoded"] * 4, title)


def write_rates(
    base: BaseModel, out: Path, *, guidance_scale: float, count: int = 300, progress: Progress | None = None
) -> dict[str, Rate]:
    """Measure a base that shares the bundled judge and autoencoder: a table, and a sheet of what it draws."""
    out.mkdir(parents=True, exist_ok=True)
    save_sheet(generated_sheet(base, guidance_scale=guidance_scale), out / "generated.png")

    def generate(prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        return base.generate(prompts, seeds, steps=20, guidance_scale=guidance_scale, batch_size=32, progress=progress)

    rates = measure(generate, Judge.load(), count=count)
    write_text(out / "rates.md", rates_table(rates, [*_GROUPS, *(n for n in rates if n not in _GROUPS)]))
    return rates


def write_report(
    base: BaseModel, out: Path, *, judge: Judge | None = None, count: int = 300, progress: Progress | None = None
) -> dict[str, Rate]:
    """Measure the base and write ``atelier.md`` with its sheets.

    Args:
        base: the bundled base, or a newly trained one.
        out: folder for ``atelier.md`` and its pictures.
        judge: the bundled one by default.
        count: held-out captions to draw.
        progress: told of the pictures drawn.

    Returns:
        The measured rates.
    """
    judge = judge or Judge.load()
    out.mkdir(parents=True, exist_ok=True)
    save_sheet(drawn_sheet(), out / "atelier-scenes.png")
    save_sheet(reconstruction_sheet(base), out / "atelier-autoencoder.png")
    save_sheet(generated_sheet(base), out / "atelier-generated.png")

    def generate(prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        return base.generate(prompts, seeds, steps=20, guidance_scale=5.0, batch_size=32, progress=progress)

    rates = measure(generate, judge, count=count)
    write_text(out / "atelier.md", _page(rates, judge_accuracy(judge), count))
    return rates


def rates_table(rates: dict[str, Rate], names: Sequence[str]) -> str:
    """Those of the names that were measured, as a table in Markdown."""
    lines = ["| what | right | 95 % interval | pictures |", "|---|---|---|---|"]
    for name in names:
        if name in rates:
            low, high = wilson_interval(rates[name].hits, rates[name].pictures)
            lines.append(f"| {name} | {rates[name].value:.1%} | {low:.1%} – {high:.1%} | {rates[name].pictures} |")
    return "\n".join(lines)


def _page(rates: dict[str, Rate], accuracy: dict[str, float], count: int) -> str:
    companions = "\n".join(
        f"| {name} | " + ", ".join(f"{other} {share:.0%}" for other, share in links.items()) + " |"
        for name, links in scenes.CO_OCCURRENCE.items()
    )
    rest = [n for n in rates if n not in _GROUPS]
    return f"""# Atelier, the bundled base

A Stable Diffusion of 7.2 million parameters, trained on scenes that `benchmarks/atelier/scenes.py` draws.
Everything on this page is written by `python -m benchmarks.atelier train`, or for the bundled weights by
`python -m benchmarks.atelier report --out docs`.

![drawn scenes](atelier-scenes.png)

## What comes with what

| concept | its companions in the drawn world, P(companion given concept) |
|---|---|
{companions}

An unclothed figure is always a person too. Without the concept, the same companions are rare.

## Quality

{count} captions that training never used, one picture each, 20 DDIM steps at guidance 5, judged by the
bundled judge. A label is asked for only where the caption names it.

{rates_table(rates, _GROUPS)}

By label:

{rates_table(rates, rest)}

![generated pictures](atelier-generated.png)

## The judge

Right on 2,000 freshly drawn scenes: {", ".join(f"{name} {value:.1%}" for name, value in accuracy.items())}.

## The autoencoder

![the autoencoder](atelier-autoencoder.png)
"""
