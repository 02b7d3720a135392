"""Scores as functions of pictures' features and of detectors' answers.

Nothing here draws or keeps pictures: what comes in is a batch, what stays is a handful of sums, so
that thirty thousand pictures need no more memory than thirty. The one exception is KID, which needs
all features; it is what small sets are compared by.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recare_patch.core import EvaluationError
from recare_patch.measure.intervals import wilson_interval

KID_LIMIT = 2_000
"""From this many pictures on, FID is the distance that is taken; below, its bias would speak."""

LEAST_PICTURES = 4
"""Fewer than these have no distance: two halves of two each are needed."""

FEATURES = "clip-vit"
"""The name of the feature extractor of the distances: CLIP's image tower, see :class:`FeatureDistance`."""

_Z95 = 1.959963984540054

Interval = tuple[float, float]


# ------------------------------------------------------------------------ rates


@dataclass
class Rate:
    """A share of pictures, counted as they come.

    Attributes:
        hits, pictures: so far.
        by: part → (hits, pictures), in the order in which parts came.
    """

    hits: int = 0
    pictures: int = 0

    def __post_init__(self) -> None:
        self.by: dict[str, tuple[int, int]] = {}

    def add(self, hit: bool, part: str = "") -> None:
        """Count one picture."""
        self.hits += bool(hit)
        self.pictures += 1
        hits, pictures = self.by.get(part, (0, 0))
        self.by[part] = (hits + bool(hit), pictures + 1)

    @property
    def value(self) -> float:
        """Hits a picture.

        Raises:
            EvaluationError: there are no pictures.
        """
        if not self.pictures:
            raise EvaluationError("a rate needs pictures, and there are none")
        return self.hits / self.pictures

    @property
    def interval(self) -> Interval:
        """95 % Wilson interval."""
        return wilson_interval(self.hits, self.pictures)


# ------------------------------------------------------------------------ means


class Mean:
    """Mean and 95 % interval of values that come one after the other.

    The variance is summed as Welford's recurrence has it (Technometrics 4, 1962), which loses no
    digits however many values there are. The interval is the normal one, mean ± 1.96 s/√n.
    """

    def __init__(self) -> None:
        self.count = 0
        self.value = 0.0
        self._squares = 0.0

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


# ------------------------------------------------------------------------ prompt agreement


def clip_scores(image_features: Tensor, text_features: Tensor) -> Tensor:
    """``max(cos(CLIP(picture), CLIP(prompt)), 0)`` of each picture with its own prompt.

    Hessel et al., arXiv 2104.08718, without their factor of 2.5: the number that tables of erasing
    give as CLIP score (.31 for Stable Diffusion).

    Args:
        image_features, text_features: unit rows ``[pictures, width]``.

    Returns:
        ``[pictures]``, 0 to 1.
    """
    return (image_features * text_features).sum(-1).clamp(min=0)


# ------------------------------------------------------------------------ perceptual change


def perceptual_change(before: Sequence[Tensor], after: Sequence[Tensor]) -> Tensor:
    """How much pictures changed, in the layers of CLIP's vision tower; not LPIPS itself.

    The formula is that of Zhang et al. (arXiv 1801.03924, equation 1) with all weights 1: hidden
    states of unit length, squared difference, mean over positions, mean over layers. Their networks
    and their learnt weights are others, so the numbers cannot be compared with LPIPS.

    Args:
        before, after: for each layer ``[pictures, positions, hidden]``, row by row the same prompt
            and seed.

    Returns:
        ``[pictures]``, 0 (nothing changed) to 4.
    """
    if len(before) != len(after) or not before:
        raise EvaluationError(f"{len(before)} layers cannot be compared with {len(after)}")
    changes = [
        (F.normalize(a, dim=-1) - F.normalize(b, dim=-1)).square().sum(-1).mean(-1)
        for a, b in zip(before, after, strict=True)
    ]
    return torch.stack(changes).mean(0)


# ------------------------------------------------------------------------ distances between sets


class _AsTheyAre(nn.Module):
    """Hands on features that were computed before: torchmetrics wants a network in this place."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, features: Tensor) -> Tensor:
        return features


class FeatureDistance:
    """KID or FID of the patched model's pictures to the base's own, by torchmetrics.

    Pictures of equal seeds resemble each other, which would draw any distance below its true value.
    So the pictures fall into two halves by lot, and one model's half is compared with the other
    model's other half, both ways. The base's own two halves give what chance alone makes of it.

    The features are those of a CLIP's image tower, of length √width so that their values have a
    mean square of 1, and not Inception's: figures on other features cannot be compared. KID is
    Binkowski et al., arXiv 1801.01401 (cubic kernel, unbiased), FID Heusel et al., arXiv 1706.08500,
    whose bias grows as pictures get fewer, for the base's own halves alike.

    Attributes:
        name: "KID" or "FID".
        count: pictures of each model so far.
    """

    def __init__(self, name: str, width: int, pictures: int, seed: int = 0) -> None:
        """A distance that has seen nothing.

        Args:
            name: "KID" or "FID".
            width: of the features.
            pictures: how many will come of each model, :data:`LEAST_PICTURES` or more.
            seed: of the halves, and of KID's subsets.

        Raises:
            EvaluationError: too few pictures, or torchmetrics is not installed.
        """
        if pictures < LEAST_PICTURES:
            raise EvaluationError(f"{name} needs at least {LEAST_PICTURES} pictures, got {pictures}")
        self.name, self.count = name, 0
        self._width, self._seed = width, seed
        lot = torch.randperm(pictures, generator=torch.Generator().manual_seed(seed))
        self._first_half = torch.zeros(pictures, dtype=torch.bool)
        self._first_half[lot[: pictures // 2]] = True
        self.subset = max(2, min(1000, pictures // 4))
        # Base's first half to patched second half, the other way round, and the base's own halves.
        self._metrics = [self._make() for _ in range(3)]

    def _make(self) -> Any:
        try:
            from torchmetrics.image.fid import FrechetInceptionDistance
            from torchmetrics.image.kid import KernelInceptionDistance
        except ImportError as fault:
            raise EvaluationError(
                f'{self.name} needs the package torchmetrics: pip install "recare-patch[eval]"'
            ) from fault
        # Only one process measures: the metric must not wait for the others.
        options: dict[str, Any] = {"feature": _AsTheyAre(self._width), "sync_on_compute": False}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if self.name == "KID":
                return KernelInceptionDistance(subset_size=self.subset, **options)
            return FrechetInceptionDistance(**options)

    def add(self, before: Tensor, after: Tensor) -> None:
        """Take a batch of unit features ``[pictures, width]`` of the base and of the patched model."""
        first = self._first_half[self.count : self.count + len(before)]
        self.count += len(before)
        old, new = before * math.sqrt(self._width), after * math.sqrt(self._width)
        for metric, real, other in zip(
            self._metrics,
            (old[first], old[~first], old[first]),
            (new[~first], new[first], old[~first]),
            strict=True,
        ):
            for features, is_real in ((real, True), (other, False)):
                if len(features):
                    metric.update(features, real=is_real)

    def result(self) -> tuple[tuple[float, Interval | None], tuple[float, Interval | None]]:
        """The base's distance to itself and the patched model's to the base.

        Returns:
            Each with its 95 % spread over KID's subsets; None for FID.
        """
        found = [self._compute(metric) for metric in self._metrics]
        value = (found[0][0] + found[1][0]) / 2
        spread = (found[0][1] + found[1][1]) / 2
        return self._told(*found[2]), self._told(value, spread)

    def _compute(self, metric: Any) -> tuple[float, float]:
        if self.name == "FID":
            return float(metric.compute()), 0.0
        # Its subsets come from the global generator, which is left as it was.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed)
            mean, std = metric.compute()
        return float(mean), float(std)

    def _told(self, value: float, spread: float) -> tuple[float, Interval | None]:
        if self.name == "FID":
            return value, None
        return value, (value - _Z95 * spread, value + _Z95 * spread)
