"""The patch at other strengths than the one it was trained for, and turned round."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Annotated

import numpy as np
from pydantic import AfterValidator, Field

from recare_patch.measure.checks.protocol import CheckContext, Checker, CheckOptions, in_order, point
from recare_patch.measure.evidence import Check
from recare_patch.measure.meters import HitRate, Mean

if TYPE_CHECKING:
    from PIL.Image import Image

RETAINED = "retained change"
"""The series of how far pictures of retained prompts have moved."""


class ScalesOptions(CheckOptions):
    """Which strengths."""

    scales: Annotated[tuple[Annotated[float, Field(ge=-100, le=100)], ...], AfterValidator(in_order)] = Field(
        (-1.0, -0.5, 0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0),
        min_length=1,
        description="1 erases as trained, 0 not at all; a negative one goes the other way",
    )


def pixel_change(before: Sequence[Image], after: Sequence[Image]) -> list[float]:
    """Mean absolute difference of each pair of pictures, as a share of the full range, 0 to 1."""
    pairs = zip(before, after, strict=True)
    return [
        float(np.abs(np.asarray(old, dtype=np.float32) - np.asarray(new, dtype=np.float32)).mean() / 255)
        for old, new in pairs
    ]


class Scales(Checker[ScalesOptions]):
    """Concept, companions and retained pictures at each strength."""

    name = "scales"
    options_type = ScalesOptions
    title = "The patch at other scales"
    x_label = "scale"

    def run(self, context: CheckContext, options: ScalesOptions) -> Check:
        """See the module."""
        asked = [*context.asked_concept(), *chain(*context.asked_care())]
        retained = context.suite.drawing("retained", context.pictures)

        def draw_retained(scale: float) -> list[Image]:
            # At scale 0 the base is drawn itself: the pictures are the same, and may be there already.
            patches = [(context.patch, scale)] if scale else []
            return context.draw(retained.prompts, retained.seeds, f"scales, {scale:g}, retained", patches)

        before = draw_retained(0.0) if retained.prompts else []
        points = []
        for scale in options.scales:
            patches = [(context.patch, scale)] if scale else []
            found: dict[str, HitRate | Mean] = {**context.rates(asked, patches, f"scales, {scale:g}")}
            if before:
                found[RETAINED] = change = Mean()
                change.add(pixel_change(before, draw_retained(scale)))
            points.append(point(scale, found, context.pictures))
        return self.told(
            points,
            "The patch was trained for scale 1. At 0 the base is untouched; a negative scale turns the patch round.",
            f"The {RETAINED} is the mean absolute difference of pixels to the base's own picture of the same "
            "seed, as a share of their range."
            if before
            else "",
        )
