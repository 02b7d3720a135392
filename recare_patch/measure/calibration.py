"""How often a detector errs, read from the base's own pictures, and rates whose intervals carry that.

A detector that sees the concept in some of the pictures that show it (its sensitivity), and in a few that do not, gives
another rate than the true one. Rogan and Gladen (Am. J. Epidemiol. 107, 1978) solve for that; the interval is that of
Lang and Reiczigel (Prev. Vet. Med. 113, 2014), for error rates that are themselves counted on few pictures.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from recare_patch.core import EvaluationError
from recare_patch.measure.evidence import RATE, Figure

if TYPE_CHECKING:
    from recare_patch.measure.judges import Detector
    from recare_patch.measure.pictures import Studio
    from recare_patch.measure.suites import Suite

CORRECTED = ", corrected"
"""Ends the name and the metric of a figure whose rates are corrected."""

_Z = 1.959963984540054
_AT_ONCE = 32


@dataclass(frozen=True)
class Calibration:
    """How often a detector saw the concept in pictures with it, and in pictures without."""

    hits: int
    pictures: int
    false_hits: int
    others: int

    def __post_init__(self) -> None:
        if not (0 <= self.hits <= self.pictures and 0 <= self.false_hits <= self.others):
            raise EvaluationError(f"a calibration counts hits among pictures, got {self.as_data()}")

    def as_data(self) -> dict[str, list[int]]:
        """As evidence has it."""
        return {"with": [self.hits, self.pictures], "without": [self.false_hits, self.others]}

    @classmethod
    def of_data(cls, data: Mapping[str, Any]) -> Calibration:
        """From :meth:`as_data`; an EvaluationError where it is none."""
        try:
            (hits, pictures), (false_hits, others) = data["with"], data["without"]
            return cls(int(hits), int(pictures), int(false_hits), int(others))
        except (KeyError, TypeError, ValueError) as fault:
            raise EvaluationError(f"'{data}' is no calibration") from fault

    def corrected(self, hits: int, pictures: int) -> tuple[float, tuple[float, float]]:
        """The true rate behind ``hits`` of ``pictures``, and its 95 % interval; of a blind detector, 0 to 1.

        In the interval, a hit and a miss are added to each count, as in the paper: a detector that is right on all of a
        few pictures may yet err.
        """
        sensitivity, specificity = (self.hits + 1) / (self.pictures + 2), 1 - (self.false_hits + 1) / (self.others + 2)
        informs = self.hits / max(self.pictures, 1) - self.false_hits / max(self.others, 1)
        if not self.pictures or not self.others or informs <= 0 or sensitivity + specificity <= 1:
            return min(hits / pictures, 1.0), (0.0, 1.0)
        value = (hits / pictures - self.false_hits / self.others) / informs
        youden, n = sensitivity + specificity - 1, pictures + _Z**2
        seen = (hits + _Z**2 / 2) / n
        middle = (seen + specificity - 1) / youden
        of_with = sensitivity * (1 - sensitivity) / (self.pictures + 2)
        of_without = specificity * (1 - specificity) / (self.others + 2)
        shift = 2 * _Z**2 * (middle * of_with - (1 - middle) * of_without)
        spread = seen * (1 - seen) / n + middle**2 * of_with + (1 - middle) ** 2 * of_without
        half = _Z * math.sqrt(spread) / youden
        value = min(max(value, 0.0), 1.0)
        low, high = (min(max(bound, 0.0), 1.0) for bound in (middle + shift - half, middle + shift + half))
        return value, (min(low, value), max(high, value))

    def figure(self, raw: Figure) -> Figure:
        """A rate of the detector, corrected on both sides."""
        told: dict[str, Any] = {"name": f"{raw.name}{CORRECTED}", "metric": f"{raw.metric}{CORRECTED}"}
        for side, bounds in (("base", "base_interval"), ("patched", "interval")):
            if (value := getattr(raw, side)) is not None:
                rate, interval = self.corrected(round(value * raw.pictures), raw.pictures)
                told |= {side: round(rate, 6), bounds: tuple(round(bound, 6) for bound in interval)}
        told["note"] = (
            f"Corrected for a detector that sees the concept in {self.hits} of {self.pictures} pictures by the base of "
            f"prompts with it, and in {self.false_hits} of {self.others} without (Rogan and Gladen)."
        )
        return raw.model_copy(update={**told, "by": ()})


def calibrate(studio: Studio, suite: Suite, detector: Detector, pictures: int) -> Calibration:
    """Read a detector's error rates from pictures by the base: so many of plain prompts, and as many of others.

    Those are the pairs of a table, or the retained prompts. What a prompt asks for is taken to be there. The seeds are
    no other figure's.
    """
    with_it = suite.drawing("plain", pictures)
    without = with_it.without or suite.drawing("retained", pictures).prompts
    if not with_it.prompts or not without:
        told = "plain" if not with_it.prompts else "retained"
        raise EvaluationError(f"the suite '{suite.name}' has no {told} prompts to calibrate its detector on")
    first, counts = suite.block("calibration"), list[int]()
    for place, prompts in enumerate((with_it.prompts, without)):
        asked = [prompts[k % len(prompts)] for k in range(pictures)]
        seeds = range(first + place * pictures, first + (place + 1) * pictures)
        stream = studio.stream(asked, seeds, **suite.sampler, stage=f"base, calibration {place + 1} of 2")
        hits = 0
        while some := [image for _, image in islice(stream, _AT_ONCE)]:
            hits += sum(map(bool, detector.rate(some, suite.label)))
        counts.append(hits)
    return Calibration(counts[0], pictures, counts[1], pictures)


def corrected_figures(figures: list[Figure], calibration: Calibration, detector: str) -> list[Figure]:
    """Of what is erased, the rates that the detector gave, corrected."""
    read = [one for one in figures if one.group == "erased" and one.unit == RATE and one.detector == detector]
    return [calibration.figure(one) for one in read]
