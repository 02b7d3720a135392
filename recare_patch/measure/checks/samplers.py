"""The patch with few steps, many steps, and other ways to take them."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field

from recare_patch.core import one_of
from recare_patch.measure.checks.protocol import CheckContext, Checker, CheckOptions, once, point
from recare_patch.measure.evidence import Check
from recare_patch.measure.meters import HitRate
from recare_patch.recipe import SCHEDULERS

TITLES = {"ddim": "DDIM", "dpm-solver++": "DPM-Solver++", "euler": "Euler", "pndm": "PNDM", "unipc": "UniPC"}
"""How readers know the schedulers."""

Steps = Annotated[int, Field(ge=1, le=1000)]
Scheduler = Annotated[str, BeforeValidator(one_of("scheduler", SCHEDULERS))]


class SamplersOptions(CheckOptions):
    """Which samplers."""

    steps: Annotated[tuple[Steps, ...], AfterValidator(once)] = Field(
        (4, 8, 20, 50), description="numbers of steps of the base's own scheduler"
    )
    schedulers: Annotated[tuple[Scheduler, ...], AfterValidator(once)] = Field(
        ("ddim", "euler", "dpm-solver++", "unipc"), description="other schedulers"
    )
    scheduler_steps: Steps | None = Field(None, description="steps of each of those; else the suite's")


class Samplers(Checker[SamplersOptions]):
    """Concept and companions, by the base and the patched model, with each sampler."""

    name = "samplers"
    options_type = SamplersOptions
    title = "Other samplers"
    x_label = "sampler"

    def run(self, context: CheckContext, options: SamplersOptions) -> Check:
        """See the module."""
        steps = context.suite.steps if options.scheduler_steps is None else options.scheduler_steps
        settings: list[tuple[str, int, str | None]] = [
            *((f"{number} step{'s' if number > 1 else ''}", number, None) for number in options.steps),
            *((TITLES.get(name, name), steps, name) for name in options.schedulers),
        ]
        points = []
        for title, number, scheduler in settings:
            found: dict[str, HitRate] = {}
            for which, patches in (("base", []), ("patched", context.applied)):
                asked = context.asked_concept(f"concept, {which}")
                asked += context.asked_companions(f"companions, {which}")
                stage = f"samplers, {title}, {which}"
                found |= context.rates(asked, patches, stage, steps=number, scheduler=scheduler)
            points.append(point(title, found, context.pictures))
        own = type(context.base.pipeline.scheduler).__name__.removesuffix("Scheduler")
        named = f"; a named scheduler takes {steps} of them" if options.schedulers else ""
        return self.told(
            points,
            f"Steps are those of the base's own scheduler ({own}){named}. Base and patched model draw from "
            "the same seeds.",
            "Where the base itself hardly shows the concept or its companions, the patched model's rate says little.",
        )
