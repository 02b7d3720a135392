"""What stacking changes: each concept's figures under its patch alone, and under the whole stack.

Base, patch and stack draw the same prompts from the same seeds, those of the concept's suite. The
stack's evidence is written as ``evaluate`` writes it; the patch alone is measured beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from recare_patch.careset import Clip
from recare_patch.core import EvaluationError, Progress, file_sha256, write_json
from recare_patch.measure.evidence import Figure, show_value
from recare_patch.measure.pictures import PictureCache, default_cache
from recare_patch.measure.run import PICTURES, Options, evaluate, score
from recare_patch.measure.suites import Suite, resolve_suite
from recare_patch.models import BaseModel, load_base
from recare_patch.patch import Patch, concepts_of
from recare_patch.recipe import WEIGHTS_NAME

CHANGE_NAME = "evidence_change.json"
"""The figures side by side, in the stack's folder."""


@dataclass(frozen=True)
class FigureChange:
    """One figure of one concept, three times.

    Attributes:
        concept: whose suite it is of.
        name, unit, better, pictures: see :class:`Figure`.
        base: of the untouched base; ``None`` for distances to it.
        alone: under the concept's own patch at scale 1.
        stacked: under the stack.
        alone_interval, stacked_interval: 95 %; ``None`` where none is known.
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
        return tuple(show_value(one, self.unit) for one in (self.base, self.alone, self.stacked))  # type: ignore[return-value]


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
        metrics: see :func:`evaluate`.
        clip, cache, device, progress: see :func:`evaluate`.

    Returns:
        The figures, by concept, in the order of the parts.

    Raises:
        RecarePatchError: one sentence on what was wrong; what was drawn stays in the cache.
    """
    whole = Patch.load(stack)
    folder = Path(stack).expanduser()
    model: BaseModel
    if base is None or isinstance(base, str | Path):
        made_for = whole.metadata.base if whole.metadata is not None else ""
        model = load_base(base if base is not None else made_for, device=device)
    else:
        model = base
    place = Path(cache).expanduser() if cache is not None else default_cache()
    changes: list[FigureChange] = []
    for concept in concepts_of(whole):
        part = next((one for one in parts if concept in concepts_of(one)), None)
        if part is None:
            raise EvaluationError(f"none of the given patches erases '{concept}', which the stack does")
        given = next((one for one in suites if one.concept == concept), None)
        suite = resolve_suite(whole, given, model.id, concept=concept)
        together = evaluate(
            whole,
            base=model,
            suite=suite,
            concept=concept,
            metrics=metrics,
            pictures=pictures,
            clip=clip,
            cache=place,
            device=device,
            progress=progress,
        )
        options = Options(
            metrics=metrics,
            pictures=pictures,
            clip=clip,
            cache=PictureCache(place),
            device=device,
            progress=progress,
        )
        alone = score(part, model, suite, options)
        assert alone is not None, "a stack is measured in one process"
        single = {one.name: one for one in alone.evidence.figures}
        changes += [_change(concept, single[one.name], one) for one in together.figures if one.name in single]
    write_json(
        folder / CHANGE_NAME,
        {
            "stack_sha256": file_sha256(folder / WEIGHTS_NAME),
            "base": model.id,
            "pictures": pictures,
            "figures": [asdict(one) for one in changes],
        },
    )
    return tuple(changes)


def _change(concept: str, alone: Figure, stacked: Figure) -> FigureChange:
    return FigureChange(
        concept=concept,
        name=stacked.name,
        unit=stacked.unit,
        better=stacked.better,
        pictures=stacked.pictures,
        base=stacked.base,
        alone=alone.patched,
        stacked=stacked.patched,
        alone_interval=alone.interval,
        stacked_interval=stacked.interval,
    )
