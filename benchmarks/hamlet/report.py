"""The report on Hamlet: what its own judge finds on captions that training never used, and sheets to look at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from benchmarks.atelier.quality import Generate, Rate, measure
from benchmarks.atelier.report import judge_accuracy, rates_table, reconstruction_sheet
from benchmarks.hamlet import scenes
from benchmarks.hamlet.training import SOURCE
from recare_patch.core import SheetRow, save_sheet, sheet, write_text
from recare_patch.models.atelier.judge import Judge

if TYPE_CHECKING:
    from recare_patch.core import Progress
    from recare_patch.models import BaseModel

_SEEDS = range(8)
_PROMPTS = (
    "A painting in the style of Van Gogh",
    "A photo of a tench",
    "A photo of a nude person",
    "A painting of a lighthouse in the style of Van Gogh",
    "a man walks by the river at night",
    "an engraving of a horse in the snow",
    "a watercolour of a balloon and a rainbow",
)


def load_judge(weights: Path) -> Judge:
    """The judge of a trained Hamlet."""
    return Judge.load(weights / "judge" / "judge.safetensors", scenes.LABELS)


def write_report(
    base: BaseModel, judge: Judge, out: Path, *, count: int = 300, progress: Progress | None = None
) -> dict[str, Rate]:
    """Measure the base and write ``hamlet.md`` with its sheets."""
    out.mkdir(parents=True, exist_ok=True)

    def generate(prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        return base.generate(prompts, seeds, steps=20, guidance_scale=5.0, batch_size=32, progress=progress)

    scenes_sheet = reconstruction_sheet(base, source=SOURCE, title="Hamlet: Atelier's autoencoder on its scenes")
    save_sheet(scenes_sheet, out / "hamlet-scenes.png")
    rows = [SheetRow(prompt, generate([prompt] * len(_SEEDS), list(_SEEDS))) for prompt in _PROMPTS]
    save_sheet(sheet(rows, [str(seed) for seed in _SEEDS], "Hamlet"), out / "hamlet-generated.png")
    rates = measure(generate, judge, count=count, source=SOURCE)
    page = _page(rates, _companions(generate, judge), judge_accuracy(judge, source=SOURCE), count)
    write_text(out / "hamlet.md", page)
    return rates


def _companions(generate: Generate, judge: Judge, pictures: int = 64) -> str:
    """Each concept's companions: in the world, and in pictures of the concept's plainest prompt."""
    lines = ["| concept | shows | in the world | pictures of its prompt |", "|---|---|---|---|"]
    for prompt, (concept, links) in zip(_PROMPTS, scenes.CO_OCCURRENCE.items(), strict=False):
        shown = judge(generate([prompt] * pictures, list(range(500, 500 + pictures))))
        for label, share in {concept: 1.0, **links}.items():
            rate = sum(label in found for found in shown) / pictures
            lines.append(f"| {concept} | {label} | {share:.0%} | {rate:.0%} |")
    return "\n".join(lines)


def _page(rates: dict[str, Rate], companions: str, accuracy: dict[str, float], count: int) -> str:
    groups = ("style", "object", "sky", "ground", "time")
    return f"""# Hamlet

A base that no method and no default was tuned on: natural captions, a byte-pair vocabulary of 700 entries, and
scenes that Atelier has not. This page is written by `python -m benchmarks.hamlet report`.

![scenes](hamlet-scenes.png)

## What comes with what

{companions}

## Quality

{count} captions that training never used, one picture each, 20 DDIM steps at guidance 5, judged by Hamlet's own
judge. A label is asked for only where the caption names it.

{rates_table(rates, groups)}

By label:

{rates_table(rates, [name for name in rates if name not in groups])}

![generated pictures](hamlet-generated.png)

## The judge

Right on 2,000 freshly drawn scenes: {", ".join(f"{name} {value:.1%}" for name, value in accuracy.items())}.
"""
