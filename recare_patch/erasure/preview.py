"""Pictures before and after, and what CLIP sees in them: the first thing that a user looks at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from recare_patch.careset import shows
from recare_patch.core import SheetRow, sheet, told_at
from recare_patch.erasure import prepare
from recare_patch.models import scheduled
from recare_patch.patch import Patch

if TYPE_CHECKING:
    from PIL.Image import Image

    from recare_patch.erasure.stages import Run

EACH = 4
"""Pictures of each prompt, before and after."""


@dataclass(frozen=True)
class Seen:
    """In how many pictures of a prompt CLIP sees what it is about."""

    role: str  # erased, replaced, kept or neighbour
    what: str
    before: int
    after: int
    of: int

    def __str__(self) -> str:
        return f"{self.what} in {self.after} of {self.of} pictures, before {self.before} of {self.of}"


@dataclass(frozen=True)
class Preview:
    """The sheet, and what is seen on it."""

    sheet: Image
    seen: tuple[Seen, ...]


@dataclass(frozen=True)
class _Row:
    role: str
    prompt: str
    what: str
    own: tuple[str, ...]  # texts that say what the prompt is about
    target: prepare.Target | None = None  # of what is erased, where its own pictures say how it looks


def _rows(targets: Sequence[prepare.Target], replaced: bool) -> list[_Row]:
    rows = []
    for target in targets:
        concept = target.concept
        name = target.attribute.text if target.attribute is not None else concept.text
        own = concept.name_prompts if target.attribute is None else (target.asked,)
        whole = target if target.attribute is None else None
        rows.append(_Row("replaced" if replaced else "erased", target.asked, name, own, whole))
        for word in target.care_words[:3]:
            rows.append(_Row("kept", concept.retain_prompt(word), word, (concept.retain_prompt(word), word)))
        for prompt in prepare.neighbour_prompts(target):
            what = prompt.removeprefix("A photo of ").removeprefix(concept.target_prompt_for(""))
            rows.append(_Row("neighbour", prompt, what, (prompt,)))
    return rows


def draw_preview(run: Run, targets: Sequence[prepare.Target], patch: Patch) -> Preview:
    """Draw what is erased, companions and neighbours at the same seeds with and without the patch.

    What CLIP sees is told to the user, as a warning where the concept is still there or a companion has gone.
    """
    base, options = run.base, run.recipe.target_images
    rows, first = _rows(targets, run.recipe.replace_with is not None), prepare.first_seed(run.recipe, 7)
    texts = [row.prompt for row in rows for _ in range(EACH)]
    seeds = [first + k for _ in rows for k in range(EACH)]

    def draw() -> list[Image]:
        with told_at("preview"), scheduled(base.pipeline, options.scheduler):
            return base.generate(
                texts, seeds, steps=options.steps, guidance_scale=options.guidance_scale, batch_size=options.batch_size
            )

    run.progress.update("preview", 0, 2)
    before = draw()
    run.progress.update("preview", 1, 2)
    with patch.apply(base.pipeline):
        after = draw()
    run.progress.update("preview", 2, 2)
    drawn, seen = [], []
    for k, row in enumerate(rows):
        mine = slice(EACH * k, EACH * (k + 1))
        there = [sum(_sees(run, row, some)) for some in (before[mine], after[mine])]
        seen.append(Seen(row.role, row.what, there[0], there[1], EACH))
        drawn.append(SheetRow(f"{row.role}: {row.prompt}", [*before[mine], *after[mine]]))
    title = f"{run.recipe.title} · {run.recipe.method}"
    for one in seen:
        _warn(run, one)
    return Preview(sheet(drawn, ["before"] * EACH + ["after"] * EACH, title, blur=run.unsafe), tuple(seen))


def _sees(run: Run, row: _Row, images: Sequence[Image]) -> list[bool]:
    if row.target is not None:
        return prepare.sees(row.target, images)
    rivals = [text for text in prepare.plain_rivals(row.what) if text not in row.own]
    return shows(images, run.clip, row.own, rivals)


def _warn(run: Run, one: Seen) -> None:
    if one.role in ("erased", "replaced") and 2 * one.before > one.of and 4 * one.after > one.of:
        run.warn(f"CLIP still sees {one}; look at preview.png before you rely on the patch")
    elif one.role == "kept" and 4 * one.before > 3 * one.of and 2 * one.after < one.before:
        run.warn(f"a companion has suffered: CLIP sees {one}")
