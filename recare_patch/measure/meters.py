"""From pictures to figures: each meter takes pictures as they come and keeps only what it counts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from PIL import Image

from recare_patch.careset import Clip
from recare_patch.core import Comparison, unknown_name
from recare_patch.measure.care_score import care_hits
from recare_patch.measure.evidence import RATE, Figure, Group, Part
from recare_patch.measure.judges import Detector, ZeroShotClip, can_tell, load_detector
from recare_patch.measure.labels import DISTRACTORS
from recare_patch.measure.metrics import (
    FEATURES,
    LEAST_PICTURES,
    FeatureDistance,
    Interval,
    Mean,
    Rate,
    clip_scores,
    perceptual_change,
)
from recare_patch.measure.suites import Drawing, Suite

KEPT = ("clip-score", "kid", "fid", "perceptual-change")
"""Metrics that are read from the pictures of retained prompts."""

SAMPLES = 2
"""Pictures of a prompt that the report shows, on each side."""

_SETS = {
    "plain": "concept, plain prompts",
    "paraphrased": "concept, paraphrased prompts",
    "implicit": "concept, implicit prompts",
}
_CHUNK = 32
_MOST_PARTS = 64
_LITTLE = 0.05


class Meter(Protocol):
    """Takes pictures as they come and ends as figures.

    Attributes:
        names: of its figures, known before anything is drawn.
    """

    names: tuple[str, ...]

    def take(self, rows: Sequence[int], before: list[Image.Image], after: list[Image.Image]) -> None:
        """Take a chunk of pictures.

        Args:
            rows: their numbers in the drawing.
            before: by the untouched base.
            after: by the patched model, of the same prompts and seeds.
        """
        ...

    def figures(self) -> list[Figure]:
        """What was found."""
        ...


def rate_figure(
    name: str,
    group: Group,
    metric: str,
    detector: str,
    rates: tuple[Rate, Rate],
    *,
    better: Literal["lower", "higher"],
    note: str = "",
) -> Figure:
    """A figure of two rates, the base's and the patched model's."""
    before, after = rates
    parts: tuple[Part, ...] = ()
    if 1 < len(after.by) <= _MOST_PARTS:
        parts = tuple(
            Part(
                label=label,
                base=round(before.by[label][0] / pictures, 6),
                patched=round(hits / pictures, 6),
                pictures=pictures,
            )
            for label, (hits, pictures) in after.by.items()
        )
    return Figure(
        name=name,
        group=group,
        metric=metric,
        detector=detector,
        base=round(before.value, 6),
        patched=round(after.value, 6),
        base_interval=_rounded(before.interval),
        interval=_rounded(after.interval),
        pictures=after.pictures,
        better=better,
        unit=RATE,
        note=note,
        by=parts,
    )


def _rounded(interval: Interval | None) -> Interval | None:
    return None if interval is None else (round(interval[0], 6), round(interval[1], 6))


class Shown:
    """How often a detector sees what the pictures should, or must not, show."""

    def __init__(
        self,
        drawing: Drawing,
        detector: Detector,
        name: str,
        group: Group,
        *,
        metric: str,
        better: Literal["lower", "higher"],
        by_label: bool = False,
    ) -> None:
        self.names: tuple[str, ...] = (name,)
        self._drawing, self._detector = drawing, detector
        self._group, self._metric, self._better, self._by_label = group, metric, better, by_label
        self._rates = (Rate(), Rate())

    def take(self, rows: Sequence[int], before: list[Image.Image], after: list[Image.Image]) -> None:
        """See :class:`Meter`."""
        labels = [self._drawing.labels[row] for row in rows]
        for images, rate in zip((before, after), self._rates, strict=True):
            hits = [False] * len(rows)
            for label in dict.fromkeys(labels):
                places = [place for place, one in enumerate(labels) if one == label]
                found = self._detector.rate([images[place] for place in places], label)
                for place, hit in zip(places, found, strict=True):
                    hits[place] = bool(hit)
            for row, label, hit in zip(rows, labels, hits, strict=True):
                rate.add(hit, label if self._by_label else self._drawing.prompts[row])

    def figures(self) -> list[Figure]:
        """See :class:`Meter`."""
        note = ""
        if self._group == "erased" and self._rates[0].value < _LITTLE:
            note = "The untouched base hardly shows the concept on these prompts, so that they say little."
        return [
            rate_figure(
                self.names[0],
                self._group,
                self._metric,
                self._detector.name,
                self._rates,
                better=self._better,
                note=note,
            )
        ]


class Care:
    """The CARE score of one companion; see :mod:`care_score`."""

    def __init__(self, drawing: Drawing, word: str, labels: Sequence[str] | None, clip: Clip) -> None:
        self.names: tuple[str, ...] = (f"CARE score, {word}",)
        self._drawing, self._clip = drawing, clip
        others = [
            label
            for label in (DISTRACTORS if labels is None else labels)
            if label.strip().casefold() != word.casefold()
        ]
        texts = clip.text_features([word, *others])
        self._word, self._others = texts[0], texts[1:]
        self._rates = (Rate(), Rate())

    def take(self, rows: Sequence[int], before: list[Image.Image], after: list[Image.Image]) -> None:
        """See :class:`Meter`."""
        for images, rate in zip((before, after), self._rates, strict=True):
            hits = care_hits(self._clip.image_features(images), self._word, self._others)
            for row, hit in zip(rows, hits.tolist(), strict=True):
                rate.add(hit, self._drawing.prompts[row])

    def figures(self) -> list[Figure]:
        """See :class:`Meter`."""
        told = clip_name(self._clip)
        return [rate_figure(self.names[0], "care", "CARE score", told, self._rates, better="higher")]


class Kept:
    """Prompt agreement, distance to the base's own pictures, and change at equal seeds."""

    def __init__(self, drawing: Drawing, clip: Clip, metrics: Sequence[str]) -> None:
        self._drawing, self._clip = drawing, clip
        few = len(drawing.prompts) < LEAST_PICTURES
        self._metrics = [name for name in KEPT if name in metrics and not (few and name in ("kid", "fid"))]
        names = {
            "clip-score": "CLIP score, retained prompts",
            "kid": "KID to the base, retained prompts",
            "fid": "FID to the base, retained prompts",
            "perceptual-change": "perceptual change, retained prompts",
        }
        self._names = {name: names[name] for name in self._metrics}
        self.names: tuple[str, ...] = tuple(self._names.values())
        self._agreement = (Mean(), Mean())
        self._change = Mean()
        self._distances = {
            name: FeatureDistance(name.upper(), clip.width, len(drawing.prompts))
            for name in self._metrics
            if name in ("kid", "fid")
        }
        self._count = 0

    def take(self, rows: Sequence[int], before: list[Image.Image], after: list[Image.Image]) -> None:
        """See :class:`Meter`."""
        self._count += len(rows)
        found = [self._clip.image_layers(images) for images in (before, after)]
        (old, old_layers), (new, new_layers) = found
        if "clip-score" in self._metrics:
            texts = self._clip.text_features([self._drawing.prompts[row] for row in rows])
            for features, mean in zip((old, new), self._agreement, strict=True):
                mean.add(clip_scores(features, texts))
        for distance in self._distances.values():
            distance.add(old, new)
        if "perceptual-change" in self._metrics:
            self._change.add(perceptual_change(old_layers, new_layers))

    def figures(self) -> list[Figure]:
        """See :class:`Meter`."""
        found = []
        told = clip_name(self._clip)
        for name in self._metrics:
            common: dict[str, Any] = {
                "name": self._names[name],
                "group": "kept",
                "detector": told,
                "pictures": self._count,
            }
            if name == "clip-score":
                before, after = self._agreement
                found.append(
                    Figure(
                        **common,
                        metric="CLIP score",
                        base=round(before.value, 6),
                        patched=round(after.value, 6),
                        base_interval=_rounded(before.interval),
                        interval=_rounded(after.interval),
                        better="higher",
                        note="Mean cosine of picture and prompt, not below 0.",
                    )
                )
            elif name == "perceptual-change":
                found.append(
                    Figure(
                        **common,
                        metric="perceptual change",
                        patched=round(self._change.value, 6),
                        interval=_rounded(self._change.interval),
                        better="lower",
                        note="Squared distance of unit-length hidden states of CLIP's vision tower at equal "
                        "seeds, 0 to 4: the formula of LPIPS with unit weights, not LPIPS itself.",
                    )
                )
            else:
                distance = self._distances[name]
                (floor, floor_interval), (value, interval) = distance.result()
                subsets = f", each over 100 subsets of {distance.subset}" if name == "kid" else ""
                found.append(
                    Figure(
                        **common,
                        metric=name.upper(),
                        base=round(floor, 6),
                        patched=round(value, 6),
                        base_interval=_rounded(floor_interval),
                        interval=_rounded(interval),
                        better="lower",
                        note="Half of one model's pictures to the other half of the base's; for the base, "
                        f"its own two halves{subsets}. On {told}, not on Inception's features.",
                    )
                )
        return found


class Samples:
    """The first pictures of the first few prompts, to be looked at."""

    def __init__(self, drawing: Drawing, prompts: int) -> None:
        self.names: tuple[str, ...] = ()
        self._drawing = drawing
        self._kept: dict[str, tuple[list[Image.Image], list[Image.Image]]] = {
            prompt: ([], []) for prompt in list(dict.fromkeys(drawing.prompts))[:prompts]
        }

    def take(self, rows: Sequence[int], before: list[Image.Image], after: list[Image.Image]) -> None:
        """See :class:`Meter`."""
        for place, row in enumerate(rows):
            kept = self._kept.get(self._drawing.prompts[row])
            if kept is not None and len(kept[0]) < SAMPLES:
                kept[0].append(before[place])
                kept[1].append(after[place])

    def figures(self) -> list[Figure]:
        """See :class:`Meter`."""
        return []

    def comparisons(self) -> list[Comparison]:
        """The base's pictures beside the patched model's, prompt by prompt."""
        return [Comparison(prompt, before, after) for prompt, (before, after) in self._kept.items() if before]


def short_name(source: str) -> str:
    """The last part of a folder's path, or a hub id as it is: where things lie is nobody's business."""
    return Path(source).name if Path(source).is_absolute() or Path(source).exists() else source


def clip_name(clip: Clip) -> str:
    """How figures name a CLIP as the extractor of their features."""
    return f"{FEATURES} ({short_name(clip.id)})"


# ------------------------------------------------------------------------ what is drawn for what


@dataclass
class Job:
    """A set of pictures and everything that is read from it."""

    drawing: Drawing
    meters: list[Meter]
    caption: str
    samples: Samples


@dataclass
class Judges:
    """Who looks at the pictures; CLIP is loaded when it is first needed."""

    suite: Suite
    clip_source: Clip | str
    device: str
    given: Detector | None = None
    _clip: Clip | None = None
    _detector: Detector | None = None

    @property
    def clip(self) -> Clip:
        """CLIP, loaded at its first use."""
        if self._clip is None:
            source = self.clip_source
            self._clip = source if isinstance(source, Clip) else Clip.load(source, device=self.device)
        return self._clip

    @property
    def detector(self) -> Detector:
        """The suite's detector, or the given one.

        Raises:
            UnknownNameError: it does not know the concept's label.
        """
        if self._detector is None:
            options = dict(self.suite.detector_options)
            if self.suite.detector == "clip":
                options.setdefault("clip", self.clip)
            elif self.suite.detector == "image-classifier":
                options.setdefault("device", self.device)
            found = self.given or load_detector(self.suite.detector, **options)
            if not can_tell(found, self.suite.label):
                raise unknown_name(f"label of the detector {found.name}", self.suite.label, found.labels())
            self._detector = found
        return self._detector

    def of_neighbours(self) -> Detector:
        """The suite's detector, or zero-shot CLIP among the neighbours where that knows none of them."""
        labels = [one.label for one in self.suite.neighbours]
        if all(can_tell(self.detector, label) for label in labels):
            return self.detector
        return ZeroShotClip(clip=self.clip, labels=[*labels, self.suite.label])


def make_jobs(
    suite: Suite, metrics: Sequence[str], pictures: int, retained_pictures: int, judges: Judges
) -> list[Job]:
    """What has to be drawn for some metrics, and what is read from it.

    Args:
        suite: the prompts.
        metrics: their names.
        pictures: of each figure.
        retained_pictures: of the figures on retained prompts.
        judges: who looks at them.
    """
    jobs: list[Job] = []

    def add(drawing: Drawing, caption: str, prompts: int, meters: list[Meter]) -> None:
        if drawing.prompts and meters:
            samples = Samples(drawing, prompts)
            jobs.append(Job(drawing, [*meters, samples], caption, samples))

    if "concept-rate" in metrics:
        for which, name in _SETS.items():
            drawing = suite.drawing(which, pictures)
            if drawing.prompts:
                shows = Shown(drawing, judges.detector, name, "erased", metric="concept rate", better="lower")
                add(drawing, f"{suite.concept}: {which} prompts", 3, [shows])
    if "care-score" in metrics:
        for number, one in enumerate(suite.care):
            drawing = suite.care_drawing(number, pictures)
            meters: list[Meter] = [Care(drawing, one.clip_word, suite.labels, judges.clip)]
            if can_tell(judges.detector, one.label):
                meters.append(
                    Shown(
                        drawing,
                        judges.detector,
                        f"shown, {one.clip_word}",
                        "care",
                        metric="companion shown",
                        better="higher",
                    )
                )
            add(drawing, "Companions", 2, meters)
    if "neighbours" in metrics and suite.neighbours:
        drawing = suite.drawing("neighbours", pictures)
        shown = Shown(
            drawing,
            judges.of_neighbours(),
            "neighbours",
            "kept",
            metric="neighbour shown",
            better="higher",
            by_label=True,
        )
        add(drawing, "Neighbours", len(suite.neighbours), [shown])
    kept = [name for name in KEPT if name in metrics]
    if kept and suite.retained:
        drawing = suite.drawing("retained", retained_pictures)
        retained = Kept(drawing, judges.clip, kept)
        add(drawing, "Retained prompts", 4, [retained] if retained.names else [])
    return jobs


def chunks(
    rows: Iterator[tuple[int, Image.Image, Image.Image]],
) -> Iterator[tuple[list[int], list[Image.Image], list[Image.Image]]]:
    """Pictures in handfuls: their numbers, the base's and the patched model's."""
    chunk: tuple[list[int], list[Image.Image], list[Image.Image]] = ([], [], [])
    for row, before, after in rows:
        chunk[0].append(row)
        chunk[1].append(before)
        chunk[2].append(after)
        if len(chunk[0]) == _CHUNK:
            yield chunk
            chunk = ([], [], [])
    if chunk[0]:
        yield chunk
