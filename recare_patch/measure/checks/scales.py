"""The patch at other strengths than the one it was trained for, and turned round."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import numpy as np
from pydantic import AfterValidator, Field

from recare_patch.measure.checks.protocol import CheckContext, CheckOptions, point
from recare_patch.measure.evidence import Check
from recare_patch.measure.meters import HitRate, Mean

if TYPE_CHECKING:
    from PIL.Image import Image

RETAINED = "retained change"
"""The series of how far pictures of retained prompts have moved."""


def _in_order(scales: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(sorted(set(scales)))


class ScalesOptions(CheckOptions):
    """Which strengths.

    Attributes:
        scales: 1 erases as trained, 0 not at all; a negative one goes the other way.
    """

    scales: Annotated[
        tuple[Annotated[float, Field(ge=-100, le=100)], ...],
        Field(min_length=1),
        AfterValidator(_in_order),
    ] = (-1.0, -0.5, 0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)


def pixel_change(before: Sequence[Image], after: Sequence[Image]) -> list[float]:
    """Mean absolute difference of each pair of pictures, as a share of the full range, 0 to 1."""
    pairs = zip(before, after, strict=True)
    return [
        float(np.abs(np.asarray(old, dtype=np.float32) - np.asarray(new, dtype=np.float32)).mean() / 255)
        for old, new in pairs
    ]


class Scales:
    """See :class:`Checker`."""

    name = "scales"
    options_type = ScalesOptions

    def run(self, context: CheckContext, options: ScalesOptions) -> Check:
        """See :class:`Checker`."""
        suite, asked = context.suite, [context.asked_concept(), *context.asked_care()]
        retained = suite.drawing("retained", context.pictures)

        def draw_retained(scale: float) -> list[Image]:
            return context.studio.draw(
                retained.prompts,
                retained.seeds,
                # At scale 0 the base is drawn itself: the pictures are the same, and may be there already.
                patches=[(context.patch, scale)] if scale else [],
                steps=suite.steps,
                scheduler=suite.scheduler,
                guidance_scale=suite.guidance_scale,
                stage=f"scales, {scale:g}, retained",
            )

        before = draw_retained(0.0) if retained.prompts else []
        points = []
        for scale in options.scales:
            patches = [(context.patch, scale)] if scale else []
            found: dict[str, HitRate | Mean] = {
                **context.rates(asked, patches=patches, stage=f"scales, {scale:g}")
            }
            if before:
                change = Mean()
                change.add(pixel_change(before, draw_retained(scale)))
                found[RETAINED] = change
            points.append(point(scale, found, context.pictures))
        note = ""
        if before:
            note = (
                f"The {RETAINED} is the mean absolute difference of pixels to the base's own picture of the "
                "same seed, as a share of their range."
            )
        return Check(
            name=self.name,
            title="The patch at other scales",
            what="The patch was trained for scale 1. At 0 the base is untouched; a negative scale turns the "
            "patch round.",
            x_label="scale",
            y_label="pictures that show it",
            points=tuple(points),
            note=note,
        )
