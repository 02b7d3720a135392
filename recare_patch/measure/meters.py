"""From pictures to figures: each meter takes pictures as they come and keeps only what it counts.

So thirty thousand pictures need no more memory than thirty. The one exception is KID, which needs all
features; it is what small sets are compared by.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence, Set
from itertools import islice
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from recare_patch.careset import Clip
from recare_patch.core import Comparison, EvaluationError
from recare_patch.measure.evidence import RATE, Better, Figure, Group, Part
from recare_patch.measure.judges import Detector, Judges, MostLike, can_tell, short_name
from recare_patch.measure.names import METRICS
from recare_patch.measure.suites import Drawing

KID_LIMIT = 2_000
"""From this many pictures on, FID is the distance that is taken; below, its bias would speak."""

LEAST_PICTURES = 4
"""Fewer than these have no distance: two halves of two each are needed."""

_CHUNK = 32
_MOST_PARTS = 64
_LITTLE = 0.05
_SAMPLES = 2
_MOST_SHOWN = 24
_Z95 = 1.959963984540054

Interval = tuple[float, float]
Pair = tuple[list[Image.Image], list[Image.Image]]
"""Pictures by the untouched base and by the patched model, of the same prompts and seeds."""


def default_metrics(retained_pictures: int) -> tuple[str, ...]:
    """What is measured where nothing is named: all but memorization, which has to train, and one distance."""
    left_out = {"memorization", "fid" if retained_pictures < KID_LIMIT else "kid"}
    return tuple(name for name in METRICS if name not in left_out)


def wilson_interval(k: int, n: int) -> Interval:
    """Wilson's 95 % interval of a rate of ``k`` hits of ``n`` (JASA 22, 1927); (0, 1) without trials.

    Unlike the normal one it has a width at rates of 0 and 1, where erasure is measured.
    """
    if n < 0 or not 0 <= k <= n:
        raise ValueError(f"k hits of n trials need 0 <= k <= n, got k={k}, n={n}")
    if n == 0:
        return 0.0, 1.0
    # scipy.stats takes half a second to import, and not every command that reads evidence needs it.
    from scipy.stats import binomtest

    found = binomtest(k, n).proportion_ci(0.95, method="wilson")
    return float(found.low), float(found.high)


class HitRate:
    """A share of pictures, counted as they come, with its 95 % Wilson interval."""

    def __init__(self) -> None:
        self.hits = self.pictures = 0
        self.by: dict[str, tuple[int, int]] = {}  # part → (hits, pictures), in the order in which parts came

    def add(self, hit: bool, part: str = "") -> None:
        """Count one picture."""
        self.hits += bool(hit)
        self.pictures += 1
        hits, pictures = self.by.get(part, (0, 0))
        self.by[part] = (hits + bool(hit), pictures + 1)

    @property
    def value(self) -> float:
        """Hits a picture."""
        if not self.pictures:
            raise EvaluationError("a rate needs pictures, and there are none")
        return self.hits / self.pictures

    @property
    def interval(self) -> Interval:
        """95 % Wilson interval."""
        return wilson_interval(self.hits, self.pictures)


class Mean:
    """Mean and normal 95 % interval of values that come one after the other.

    The variance is summed as Welford's recurrence has it (Technometrics 4, 1962): it loses no digits.
    """

    def __init__(self) -> None:
        self.count, self.value, self._squares = 0, 0.0, 0.0

    def add(self, values: Tensor | Sequence[float]) -> None:
        """Take a batch of values."""
        for value in values.tolist() if isinstance(values, Tensor) else values:
            self.count += 1
            change = value - self.value
            self.value += change / self.count
            self._squares += change * (value - self.value)

    @property
    def interval(self) -> Interval | None:
        """95 % interval of the mean; None for fewer than two values."""
        if self.count < 2:
            return None
        half = _Z95 * math.sqrt(self._squares / (self.count - 1) / self.count)
        return self.value - half, self.value + half


def perceptual_change(before: Sequence[Tensor], after: Sequence[Tensor]) -> Tensor:
    """How much pictures changed, in the layers of CLIP's vision tower: 0 (not at all) to 4, ``[pictures]``.

    The formula is that of Zhang et al. (arXiv 1801.03924, equation 1) with all weights 1: hidden states of
    unit length, squared difference, mean over positions, mean over layers. Their networks and their learnt
    weights are others, so the numbers cannot be compared with LPIPS.

    Args:
        before, after: for each layer ``[pictures, positions, hidden]``, row by row the same seed.
    """
    if len(before) != len(after) or not before:
        raise EvaluationError(f"{len(before)} layers cannot be compared with {len(after)}")
    changes = [
        (F.normalize(a, dim=-1) - F.normalize(b, dim=-1)).square().sum(-1).mean(-1)
        for a, b in zip(before, after, strict=True)
    ]
    return torch.stack(changes).mean(0)


class _AsTheyAre(nn.Identity):
    """Hands on features that were computed before: torchmetrics wants a network in this place."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width


class FeatureDistance:
    """KID or FID of the patched model's pictures to the base's own, by torchmetrics.

    Pictures of equal seeds resemble each other, which would draw any distance below its true value. So they
    fall into two halves by lot, and one model's half is compared with the other's other half, both ways.
    The base's own two halves give what chance alone makes of it.

    The features are those of a CLIP's image tower, of length √width so that their values have a mean square
    of 1, and not Inception's: figures on other features cannot be compared. KID is Binkowski et al., arXiv
    1801.01401 (cubic kernel, unbiased), FID Heusel et al., arXiv 1706.08500, whose bias grows as pictures get
    fewer, for the base's own halves alike.
    """

    def __init__(self, name: str, width: int, pictures: int) -> None:
        """Either "KID" or "FID", of features of such a width; so many pictures will come of each model."""
        if pictures < LEAST_PICTURES:
            raise EvaluationError(f"{name} needs at least {LEAST_PICTURES} pictures, got {pictures}")
        try:
            from torchmetrics.image.fid import FrechetInceptionDistance
            from torchmetrics.image.kid import KernelInceptionDistance
        except ImportError as fault:
            raise EvaluationError(f'{name} needs the package torchmetrics: pip install "recare-patch[eval]"') from fault
        self.name, self._width, self._count = name, width, 0
        lot = torch.randperm(pictures, generator=torch.Generator().manual_seed(0))
        self._first_half = torch.zeros(pictures, dtype=torch.bool)
        self._first_half[lot[: pictures // 2]] = True
        self.subset = max(2, min(1000, pictures // 4))
        # Only one process measures: the metric must not wait for the others.
        options: dict[str, Any] = {"feature": _AsTheyAre(width), "sync_on_compute": False}
        kind: Any = FrechetInceptionDistance
        if name == "KID":
            kind, options["subset_size"] = KernelInceptionDistance, self.subset
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Base's first half to patched second half, the other way round, and the base's own halves.
            self._metrics = [kind(**options) for _ in range(3)]

    def add(self, before: Tensor, after: Tensor) -> None:
        """Take a batch of unit features ``[pictures, width]`` of the base and of the patched model."""
        first = self._first_half[self._count : self._count + len(before)]
        self._count += len(before)
        old, new = before * math.sqrt(self._width), after * math.sqrt(self._width)
        halves = ((old[first], new[~first]), (old[~first], new[first]), (old[first], old[~first]))
        for metric, (real, other) in zip(self._metrics, halves, strict=True):
            for features, is_real in ((real, True), (other, False)):
                if len(features):
                    metric.update(features, real=is_real)

    def result(self) -> tuple[tuple[float, Interval | None], tuple[float, Interval | None]]:
        """The base's distance to itself and the patched model's to the base, each with its 95 % spread.

        The spread is that over KID's subsets; None for FID.
        """
        found = []
        for metric in self._metrics:
            # Its subsets come from the global generator, which is left as it was.
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                computed = metric.compute()
            found.append((float(computed), 0.0) if self.name == "FID" else tuple(map(float, computed)))
        (one, one_std), (other, other_std), (own, own_std) = found
        value, half, own_half = (one + other) / 2, _Z95 * (one_std + other_std) / 2, _Z95 * own_std
        if self.name == "FID":
            return (own, None), (value, None)
        return (own, (own - own_half, own + own_half)), (value, (value - half, value + half))


def rate_figure(rates: tuple[HitRate, HitRate], **told: Any) -> Figure:
    """A figure of two rates, the base's and the patched model's; ``told`` are its other fields."""
    before, after = rates
    if 1 < len(after.by) <= _MOST_PARTS:
        parts = [(label, before.by[label][0], *counted) for label, counted in after.by.items()]
        told["by"] = tuple(
            Part(label=label, base=round(old / count, 6), patched=round(new / count, 6), pictures=count)
            for label, old, new, count in parts
        )
    values = _compared(*((one.value, one.interval) for one in rates))
    return Figure(**told, **values, pictures=after.pictures, unit=RATE)


def _compared(*found: tuple[float, Interval | None] | None) -> dict[str, Any]:
    """The fields of a figure that hold its values, the base's and the patched model's, rounded."""
    told: dict[str, Any] = {}
    for name, one in zip(("base", "patched"), found, strict=True):
        if one is not None:
            value, interval = one
            told[name] = round(value, 6)
            rounded = None if interval is None else tuple(round(bound, 6) for bound in interval)
            told["interval" if name == "patched" else "base_interval"] = rounded
    return told


class Shown:
    """How often a detector sees what the pictures should, or must not, show: one figure, with its parts."""

    def __init__(
        self,
        drawing: Drawing,
        detector: Detector | None,
        name: str,
        group: Group,
        metric: str,
        better: Better,
        by_label: bool = False,
    ) -> None:
        """The parts are those of the prompts, or of the labels."""
        self.names, self._rates = (name,), (HitRate(), HitRate())
        self._drawing, self._detector = drawing, detector
        self._parts = drawing.labels if by_label else drawing.prompts
        self._told: dict[str, Any] = {"name": name, "group": group, "metric": metric, "better": better}
        if detector is not None:
            self._told["detector"] = detector.name
        self._agreed = HitRate(), HitRate()

    def _see(self, images: list[Image.Image], label: str) -> list[bool]:
        assert self._detector is not None
        return self._detector.rate(images, label)

    def take(self, rows: Sequence[int], pair: Pair) -> None:
        """Ask for each label once."""
        for images, rate, agreed in zip(pair, self._rates, self._agreed, strict=True):
            seen: dict[int, bool] = {}
            for label in dict.fromkeys(self._drawing.labels[row] for row in rows):
                places = [place for place, row in enumerate(rows) if self._drawing.labels[row] == label]
                seen |= zip(places, self._see([images[place] for place in places], label), strict=True)
                for unanimous in getattr(self._detector, "unanimous", ()):
                    agreed.add(unanimous)
            for place, row in enumerate(rows):
                rate.add(seen[place], self._parts[row])

    def figures(self) -> list[Figure]:
        """One rate."""
        note = ""
        if self._told["group"] == "erased" and self._rates[0].value < _LITTLE:
            note = "The untouched base hardly shows the concept on these prompts, so that they say little."
        if self._agreed[1].pictures:
            base, patched = (f"{one.value:.0%}" for one in self._agreed)
            note = f"{note} Its detectors agree on {base} of the base's pictures, and on {patched} of the patched ones."
        return [rate_figure(self._rates, **self._told, note=note.strip())]


class Care(Shown):
    """The CARE score of one companion; see :class:`MostLike`."""

    def __init__(self, drawing: Drawing, word: str, labels: Sequence[str] | None, clip: Clip) -> None:
        super().__init__(drawing, None, f"CARE score, {word}", "care", "CARE score", "higher")
        self._told["detector"], self._most_like = clip_name(clip), MostLike(clip, word, labels)

    def _see(self, images: list[Image.Image], label: str) -> list[bool]:
        return self._most_like(images)


_KEPT = {
    "clip-score": ("CLIP score", "CLIP score, retained prompts"),
    "kid": ("KID", "KID to the base, retained prompts"),
    "fid": ("FID", "FID to the base, retained prompts"),
    "perceptual-change": ("perceptual change", "perceptual change, retained prompts"),
}
"""What is read from the pictures of retained prompts: metric → how figures call it, the figure's name."""


class Kept:
    """Prompt agreement, distance to the base's own pictures, and change at equal seeds."""

    def __init__(self, drawing: Drawing, clip: Clip, metrics: Sequence[str]) -> None:
        """A meter of those of the metrics that it knows, and that have pictures enough."""
        self._drawing, self._clip, self._count = drawing, clip, 0
        few = len(drawing.prompts) < LEAST_PICTURES
        self._metrics = [name for name in _KEPT if name in metrics and not (few and name in ("kid", "fid"))]
        self.names = tuple(_KEPT[name][1] for name in self._metrics)
        self._agreement, self._change = (Mean(), Mean()), Mean()
        self._distances = {
            name: FeatureDistance(name.upper(), clip.width, len(drawing.prompts))
            for name in self._metrics
            if name in ("kid", "fid")
        }

    def take(self, rows: Sequence[int], pair: Pair) -> None:
        """Read the pictures' features once for all metrics."""
        self._count += len(rows)
        (old, old_layers), (new, new_layers) = map(self._clip.image_layers, pair)
        if "clip-score" in self._metrics:
            texts = self._clip.text_features([self._drawing.prompts[row] for row in rows])
            for features, mean in zip((old, new), self._agreement, strict=True):
                # Hessel et al., arXiv 2104.08718, without their factor of 2.5: the number that tables of
                # erasing give as CLIP score (.31 for Stable Diffusion).
                mean.add((features * texts).sum(-1).clamp(min=0))
        for distance in self._distances.values():
            distance.add(old, new)
        if "perceptual-change" in self._metrics:
            self._change.add(perceptual_change(old_layers, new_layers))

    def figures(self) -> list[Figure]:
        """One for each metric."""
        return [self._figure(name) for name in self._metrics]

    def _figure(self, name: str) -> Figure:
        metric, title = _KEPT[name]
        told: dict[str, Any] = {"name": title, "group": "kept", "metric": metric, "pictures": self._count}
        told |= {"detector": clip_name(self._clip), "better": "higher" if name == "clip-score" else "lower"}
        if name == "clip-score":
            told["note"] = "Mean cosine of picture and prompt, not below 0."
            return Figure(**told, **_compared(*((one.value, one.interval) for one in self._agreement)))
        if name == "perceptual-change":
            told["note"] = (
                "Squared distance of unit-length hidden states of CLIP's vision tower at equal seeds, 0 to "
                "4: the formula of LPIPS with unit weights, not LPIPS itself."
            )
            return Figure(**told, **_compared(None, (self._change.value, self._change.interval)))
        distance = self._distances[name]
        subsets = f", each over 100 subsets of {distance.subset}" if name == "kid" else ""
        told["note"] = (
            "Half of one model's pictures to the other half of the base's; for the base, its own two "
            f"halves{subsets}. On {told['detector']}, not on Inception's features."
        )
        return Figure(**told, **_compared(*distance.result()))


class Paired:
    """Whether pictures of prompts with the concept still show what the prompts without it ask for.

    The in-prompt CLIP score of Ren et al., "Six-CD" (CVPR 2025, arXiv 2406.14855): the mean cosine of a picture, drawn
    from the prompt with the concept, and its prompt without. A companion figure for any concept, which needs no words.
    """

    names = ("companions, paired prompts",)

    def __init__(self, drawing: Drawing, clip: Clip) -> None:
        self._drawing, self._clip, self._agreement = drawing, clip, (Mean(), Mean())

    def take(self, rows: Sequence[int], pair: Pair) -> None:
        """Compare a chunk with its prompts without the concept."""
        texts = self._clip.text_features([self._drawing.without[row] for row in rows])
        for images, mean in zip(pair, self._agreement, strict=True):
            mean.add((self._clip.image_features(images) * texts).sum(-1).clamp(min=0))

    def figures(self) -> list[Figure]:
        """One mean."""
        told: dict[str, Any] = {"name": self.names[0], "group": "care", "metric": "in-prompt CLIP score"}
        told |= {"detector": clip_name(self._clip), "better": "higher", "pictures": self._agreement[0].count}
        note = "Mean cosine of the pictures with the same prompts without the concept, not below 0."
        return [Figure(**told, note=note, **_compared(*((one.value, one.interval) for one in self._agreement)))]


def clip_name(clip: Clip) -> str:
    """How figures name a CLIP as the extractor of their features."""
    return f"clip-vit ({short_name(clip.id)})"


Meter = Shown | Kept | Paired
"""Takes chunks of pictures, of some rows of the drawing, and ends as figures of known ``names``."""


class Job:
    """A set of pictures and everything that is read from it."""

    def __init__(self, drawing: Drawing, caption: str, prompts: int, meters: Sequence[Meter]) -> None:
        """Pictures of the first few prompts are kept to be looked at, under a caption."""
        self.drawing, self.caption, self.meters = drawing, caption, list(meters)
        first = list(dict.fromkeys(drawing.prompts))[:prompts]
        self._samples: dict[str, Pair] = {prompt: ([], []) for prompt in first}

    def take(self, rows: Sequence[int], pair: Pair) -> None:
        """Take a chunk of pictures."""
        for meter in self.meters:
            meter.take(rows, pair)
        for row, before, after in zip(rows, *pair, strict=True):
            kept = self._samples.get(self.drawing.prompts[row])
            if kept is not None and len(kept[0]) < _SAMPLES:
                kept[0].append(before)
                kept[1].append(after)

    def comparisons(self) -> list[Comparison]:
        """The base's pictures beside the patched model's, prompt by prompt."""
        return [Comparison(prompt, *pair) for prompt, pair in self._samples.items() if pair[0]]


def make_jobs(
    judges: Judges, metrics: Sequence[str], pictures: int, retained_pictures: int, wanted: Set[str] | None
) -> list[Job]:
    """What is drawn of the judges' suite for some metrics, or of their wanted figures, and read from it."""
    suite = judges.suite
    jobs: list[Job] = []
    for which in ("plain", "paraphrased", "implicit"):
        drawing, read = suite.drawing(which, pictures), list[Meter]()
        title, name = f"{suite.concept}: {which} prompts", f"concept, {which} prompts"
        if drawing.prompts and "concept-rate" in metrics:
            read.append(Shown(drawing, judges.detector, name, "erased", "concept rate", "lower"))
        if drawing.without and "care-score" in metrics:
            read.append(Paired(drawing, judges.clip))
        jobs.append(Job(drawing, title, 3, read))
    for number, one in enumerate(suite.care if "care-score" in metrics else ()):
        drawing, word = suite.care_drawing(number, pictures), one.clip_word
        meters: list[Meter] = [Care(drawing, word, suite.labels, judges.clip)]
        if can_tell(judges.detector, one.label):
            shown = Shown(drawing, judges.detector, f"shown, {word}", "care", "companion shown", "higher")
            meters.append(shown)
        jobs.append(Job(drawing, "Companions", 2, meters))
    if "neighbours" in metrics and suite.holds("neighbours"):
        drawing, detector = suite.drawing("neighbours", pictures), judges.of_neighbours()
        shown = Shown(drawing, detector, "neighbours", "kept", "neighbour shown", "higher", by_label=True)
        jobs.append(Job(drawing, "Neighbours", min(len(suite.neighbour_labels), _MOST_SHOWN), [shown]))
    if suite.holds("retained") and not _KEPT.keys().isdisjoint(metrics):
        drawing = suite.drawing("retained", retained_pictures)
        jobs.append(Job(drawing, "Retained prompts", 4, [Kept(drawing, judges.clip, metrics)]))
    for job in jobs:
        job.meters = [one for one in job.meters if one.names and (wanted is None or wanted & {*one.names})]
    return [job for job in jobs if job.meters]


def chunks(rows: Iterator[tuple[int, Image.Image, Image.Image]]) -> Iterator[tuple[list[int], Pair]]:
    """Pictures in handfuls: their numbers, the base's and the patched model's."""
    while chunk := list(islice(rows, _CHUNK)):
        numbers, before, after = map(list, zip(*chunk, strict=True))
        yield numbers, (before, after)
