"""What stacking changes: each concept's figures under its patch alone, and under the whole stack.

Base, patch and stack draw the same prompts from the same seeds, those of the concept's suite. The
stack's evidence is written as ``evaluate`` writes it; the patch alone is measured beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from recare_patch.careset import Clip
from recare_patch.core import EvaluationError, Progress, file_sha256, write_json
from recare_patch.measure.evidence import show_value
from recare_patch.measure.pictures import PictureCache, default_cache
from recare_patch.measure.run import PICTURES, Options, evaluate, score
from recare_patch.measure.suites import Suite, own_recipe, resolve_suite, suited
from recare_patch.models import BaseModel, load_to_draw
from recare_patch.patch import Patch, concepts_of
from recare_patch.recipe import WEIGHTS_NAME, MemoryOptions

CHANGE_NAME = "evidence_change.json"
"""The figures side by side, in the stack's folder."""


@dataclass(frozen=True)
class FigureChange:
    """One figure of one concept: of the base, under the concept's own patch at scale 1, under the stack.

    ``base`` is None for distances to it, an interval where none is known.
    """

    concept: str
    name: str
    unit: str
    better: str
    pictures: int
    base: float | None
    alone: float
    stacked: float
    alone_interval: tuple[float, float] | None
    stacked_interval: tuple[float, float] | None

    def show(self) -> tuple[str, str, str]:
        """Base, patch alone and stack, as people read them."""
        base, alone, stacked = (show_value(one, self.unit) for one in (self.base, self.alone, self.stacked))
        return base, alone, stacked


def change_in_evidence(
    parts: Sequence[Patch],
    stack: str | Path,
    *,
    base: BaseModel | str | Path | None = None,
    suites: Sequence[Suite] = (),
    pictures: int = PICTURES,
    metrics: Sequence[str] | None = None,
    clip: Clip | str | None = None,
    cache: str | Path | None = None,
    device: str = "auto",
    memory: MemoryOptions | None = None,
    vram: float | None = None,
    progress: Progress | None = None,
) -> tuple[FigureChange, ...]:
    """Measure a stack beside each of its parts alone.

    Leaves the stack's evidence and report in a folder for each concept, and all figures side by side in
    ``evidence_change.json``.

    Args:
        parts: the patches that were stacked, loaded from files.
        stack: the stack's folder.
        base: the base model; None: the one that the stack was made for.
        suites: to judge a concept by instead of its own; see :func:`resolve_suite`.
        pictures: of each figure.
        metrics, clip, cache, device, memory, vram, progress: see :func:`evaluate`.

    Raises:
        RecarePatchError: one sentence on what was wrong; what was drawn stays in the cache.
    """
    whole, folder = Patch.load(stack), Path(stack).expanduser()
    if base is None:
        base = whole.metadata.base if whole.metadata is not None else ""
    model = base
    if isinstance(model, str | Path):
        made = next(filter(None, map(own_recipe, parts)), None)
        drawn: dict[str, Any] = {"device": device, "memory": memory, "vram": vram}
        model = load_to_draw(model, recorded=made.precision if made else None, **drawn)
    place = Path(cache).expanduser() if cache is not None else default_cache()
    how: dict[str, Any] = {"metrics": metrics, "pictures": pictures, "clip": clip}
    how |= {"device": device, "progress": progress}
    changes: list[FigureChange] = []
    for concept in concepts_of(whole):
        part = next((one for one in parts if concept in concepts_of(one)), None)
        if part is None:
            raise EvaluationError(f"none of the given patches erases '{concept}', which the stack does")
        given = next((one for one in suites if one.concept == concept), None)
        suite = suited(resolve_suite(whole, given, model.id, concept=concept), model)
        together = evaluate(whole, base=model, suite=suite, concept=concept, cache=place, **how)
        alone = score(part, model, suite, Options(cache=PictureCache(place), **how))
        assert alone is not None, "a stack is measured in one process"
        single = {one.name: one for one in alone.evidence.figures}
        for one in together.figures:
            if (before := single.get(one.name)) is not None:
                shared = (concept, one.name, one.unit, one.better, one.pictures, one.base)
                found = (before.patched, one.patched, before.interval, one.interval)
                changes.append(FigureChange(*shared, *found))
    note = {"stack_sha256": file_sha256(folder / WEIGHTS_NAME), "base": model.id, "pictures": pictures}
    write_json(folder / CHANGE_NAME, note | {"figures": [asdict(one) for one in changes]})
    return tuple(changes)
