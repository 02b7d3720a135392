"""The concept in the negative prompt of a patched model, where users put what they do not want."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, StringConstraints

from recare_patch.measure.checks.protocol import CheckContext, Checker, CheckOptions, point
from recare_patch.measure.checks.scales import pixel_change
from recare_patch.measure.evidence import Check
from recare_patch.measure.meters import HitRate, Mean


class NegativePromptOptions(CheckOptions):
    """What is led away from."""

    negative: Annotated[str, StringConstraints(min_length=1, max_length=1000)] | None = Field(
        None, description="the negative prompt; None: the concept's name"
    )


class NegativePrompt(Checker[NegativePromptOptions]):
    """Companions and retained pictures without and with the concept in the negative prompt.

    A patch moves what the concept's name means, and guidance leads away from that in every picture: pictures that
    have nothing to do with the concept may come out otherwise than the base draws them with the same words.
    """

    name = "negative-prompt"
    options_type = NegativePromptOptions
    title = "The concept in the negative prompt"
    x_label = "negative prompt"

    def run(self, context: CheckContext, options: NegativePromptOptions) -> Check:
        """See the module."""
        retained = context.suite.drawing("retained", context.pictures)
        points, plain = [], dict[str, list[Any]]()
        guided = context.suite.guidance_scale > 1
        for negative in ("", *([options.negative or context.suite.concept] if guided else [])):
            found: dict[str, HitRate | Mean] = {}
            for which, patches in (("base", []), ("patched", context.applied)):
                stage = f"negative prompt '{negative}', {which}"
                asked = context.asked_companions(f"companions, {which}")
                found |= context.rates(asked, patches, stage, negative_prompt=negative)
                if not retained.prompts:
                    continue
                drawn = retained.prompts, retained.seeds, f"{stage}, retained", patches
                images = context.draw(*drawn, negative_prompt=negative)
                found[f"retained change, {which}"] = change = Mean()
                change.add(pixel_change(plain.setdefault(which, images), images))
            points.append(point(negative or "none", found, context.pictures))
        return self.told(
            points,
            "Pictures that do not name the concept, drawn with and without its name in the negative prompt, from the "
            "same seeds.",
            "The retained change is the mean absolute difference of pixels to the same model's picture without a "
            "negative prompt, as a share of their range. Where it is larger for the patched model than for the base, "
            "the patch ruins what a negative prompt does."
            if guided
            else "The suite draws without guidance, where a negative prompt does nothing.",
        )
