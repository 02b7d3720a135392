"""The patch with few steps, many steps, and other ways to take them."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field

from recare_patch.core import one_of
from recare_patch.measure.checks.protocol import CheckContext, CheckOptions, point
from recare_patch.measure.evidence import Check
from recare_patch.measure.meters import HitRate
from recare_patch.recipe import SCHEDULERS

TITLES = {"ddim": "DDIM", "dpm-solver++": "DPM-Solver++", "euler": "Euler", "pndm": "PNDM", "unipc": "UniPC"}
"""How readers know the schedulers."""


def _once(values: tuple[int | str, ...]) -> tuple[int | str, ...]:
    return tuple(dict.fromkeys(values))


class SamplersOptions(CheckOptions):
    """Which samplers.

    Attributes:
        steps: numbers of steps of the base's own scheduler.
        schedulers: names of :data:`SCHEDULERS`.
        scheduler_steps: steps of each of those; None: the suite's.
    """

    steps: Annotated[tuple[Annotated[int, Field(ge=1, le=1000)], ...], AfterValidator(_once)] = (4, 8, 20, 50)
    schedulers: Annotated[
        tuple[Annotated[str, BeforeValidator(one_of("scheduler", SCHEDULERS.names()))], ...],
        AfterValidator(_once),
    ] = ("ddim", "euler", "dpm-solver++", "unipc")
    scheduler_steps: Annotated[int, Field(ge=1, le=1000)] | None = None


class Samplers:
    """See :class:`Checker`."""

    name = "samplers"
    options_type = SamplersOptions

    def run(self, context: CheckContext, options: SamplersOptions) -> Check:
        """See :class:`Checker`."""
        steps = context.suite.steps if options.scheduler_steps is None else options.scheduler_steps
        settings: list[tuple[str, int, str | None]] = [
            (f"{number} step{'s' if number > 1 else ''}", number, None) for number in options.steps
        ]
        settings += [(TITLES.get(name, name), steps, name) for name in options.schedulers]
        points = []
        for title, number, scheduler in settings:
            found: dict[str, HitRate] = {}
            for which, patches in (("base", []), ("patched", context.applied)):
                asked = [
                    context.asked_concept(f"concept, {which}"),
                    *context.asked_companions(f"companions, {which}"),
                ]
                found |= context.rates(
                    asked,
                    patches=patches,
                    stage=f"samplers, {title}, {which}",
                    steps=number,
                    scheduler=scheduler,
                )
            points.append(point(title, found, context.pictures))
        own = type(context.base.pipeline.scheduler).__name__.removesuffix("Scheduler")
        named = f"; a named scheduler takes {steps} of them" if options.schedulers else ""
        return Check(
            name=self.name,
            title="Other samplers",
            what=f"Steps are those of the base's own scheduler ({own}){named}. Base and patched model draw "
            "from the same seeds.",
            x_label="sampler",
            y_label="pictures that show it",
            points=tuple(points),
            note="Where the base itself hardly shows the concept or its companions, the patched model's rate "
            "says little.",
        )
