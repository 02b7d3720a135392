"""Scores against computations from their formulas, and against what they must not depend on."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from recare_patch.careset import Clip
from recare_patch.core import EvaluationError
from recare_patch.measure.judges import DISTRACTORS, MostLike
from recare_patch.measure.meters import (
    Care,
    FeatureDistance,
    HitRate,
    Kept,
    Mean,
    Shown,
    perceptual_change,
    wilson_interval,
)
from recare_patch.measure.suites import Suite
from tests.measure.making import SUITE, noise

LABELS = SUITE["labels"]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def units(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(rows, width, generator=generator(seed)), dim=-1)


@pytest.fixture(scope="module")
def clip(tiny_clip: Path) -> Clip:
    return Clip.load(str(tiny_clip))


@pytest.mark.parametrize(("k", "n"), [(3, 96), (50, 100), (95, 96), (1, 10), (480, 1000)])
def test_the_interval_inverts_the_score_test(k: int, n: int) -> None:
    """At its bounds the score test just fails to reject k of n."""
    for bound in wilson_interval(k, n):
        assert abs(k / n - bound) == pytest.approx(1.959964 * math.sqrt(bound * (1 - bound) / n), rel=1e-6)


def test_known_intervals() -> None:
    assert wilson_interval(0, 100) == pytest.approx((0.0, 0.036994), abs=1e-6)
    assert wilson_interval(100, 100) == pytest.approx((0.963006, 1.0), abs=1e-6)
    assert wilson_interval(0, 7)[0] == 0.0 and wilson_interval(7, 7)[1] == 1.0
    assert wilson_interval(0, 0) == (0.0, 1.0)
    for k, n in ((-1, 5), (6, 5), (0, -1)):
        with pytest.raises(ValueError, match="k hits of n trials need"):
            wilson_interval(k, n)


def test_a_rate_counts_parts() -> None:
    rate = HitRate()
    with pytest.raises(EvaluationError, match="a rate needs pictures"):
        _ = rate.value
    for hit, part in ((True, "a"), (False, "b"), (True, "a"), (False, "a")):
        rate.add(hit, part)
    assert (rate.value, rate.by, rate.interval) == (0.5, {"a": (2, 3), "b": (0, 1)}, wilson_interval(2, 4))


def test_a_mean_is_that_of_all_values_at_once() -> None:
    values = torch.randn(1000, generator=generator(), dtype=torch.float64) * 3 + 1e6
    mean = Mean()
    for part in values.split(7):
        mean.add(part)
    assert mean.value == pytest.approx(values.mean().item(), rel=1e-12)
    half = 1.959964 * values.std().item() / math.sqrt(1000)
    assert mean.interval == pytest.approx((mean.value - half, mean.value + half), rel=1e-9)
    one = Mean()
    one.add([2.0])
    assert one.value == 2.0 and one.interval is None


def test_a_hit_is_the_arg_max_over_word_and_rivals(clip: Clip) -> None:
    images = noise(12)
    features = clip.image_features(images)
    for word in ("stars", " cat ", "person"):
        choices = [word.strip(), *(one for one in DISTRACTORS if one != word.strip())]
        best = (features @ clip.text_features(choices).T).argmax(1)
        assert MostLike(clip, word)(images) == (best == 0).tolist()


def test_the_word_does_not_compete_with_itself_and_wins_a_tie(clip: Clip) -> None:
    images = noise(3)
    assert MostLike(clip, "car", ["Car "])(images) == MostLike(clip, "car", [])(images) == [True] * 3

    class Alike:
        def text_features(self, texts: list[str]) -> torch.Tensor:
            return torch.ones(len(texts), 4)

        def image_features(self, images: list[Image.Image]) -> torch.Tensor:
            return torch.ones(len(images), 4)

    assert MostLike(Alike(), "car", ["boat"])(images) == [True] * 3  # type: ignore[arg-type]


def test_the_rivals_are_coco_and_two_words() -> None:
    assert len(DISTRACTORS) == len(set(DISTRACTORS)) == 82
    assert (DISTRACTORS[0], DISTRACTORS[9]) == ("person", "traffic light")
    assert DISTRACTORS[-4:] == ("hair drier", "toothbrush", "stars", "freshwater")


def test_perceptual_change_is_its_formula() -> None:
    shapes = ((3, 4, 5), (3, 2, 6))
    before, after = (
        [torch.randn(shape, generator=generator(seed + k)) for k, shape in enumerate(shapes)] for seed in (1, 3)
    )
    found = perceptual_change(before, after)
    for row in range(3):
        layers = []
        for a, b in zip(before, after, strict=True):
            x, y = a[row].double().numpy(), b[row].double().numpy()
            x, y = (one / np.linalg.norm(one, axis=1, keepdims=True) for one in (x, y))
            layers.append(((x - y) ** 2).sum(1).mean())
        assert found[row].item() == pytest.approx(sum(layers) / len(layers), rel=1e-5)
    assert perceptual_change(before, before).abs().max() < 1e-12
    assert perceptual_change([before[0]], [-before[0]]).tolist() == pytest.approx([4.0] * 3)
    with pytest.raises(EvaluationError, match="2 layers cannot be compared with 1"):
        perceptual_change(before, after[:1])


@pytest.mark.parametrize("name", ["KID", "FID"])
def test_a_distance_grows_with_the_difference(name: str) -> None:
    before, other = units(200, 16, 1), units(200, 16, 2)
    found = []
    for after in (other, F.normalize(other + 0.3, dim=-1), F.normalize(other + 1.0, dim=-1)):
        distance = FeatureDistance(name, 16, 200)
        for start in range(0, 200, 32):
            distance.add(before[start : start + 32], after[start : start + 32])
        base, patched = distance.result()
        found.append(patched[0])
        assert (patched[1] is None) == (name == "FID")
    assert found[0] < found[1] < found[2]
    # What chance alone makes of the same distribution is what the base is to itself.
    assert abs(found[0] - base[0]) < 0.2 * found[1]
    # The very same pictures, of equal seeds, are as far from the base as the base from itself.
    same = FeatureDistance(name, 16, 200)
    same.add(before, before)
    base, patched = same.result()
    assert patched[0] == pytest.approx(base[0], rel=1e-3, abs=2e-2)


def test_kid_is_the_unbiased_estimate_of_its_kernel_and_leaves_the_global_generator_alone() -> None:
    before, after = units(40, 8, 1), F.normalize(units(40, 8, 2) + 0.5, dim=-1)

    def run() -> tuple[FeatureDistance, float, tuple[float, float] | None]:
        distance = FeatureDistance("KID", 8, 40)
        distance.add(before, after)
        return distance, *distance.result()[1]

    torch.manual_seed(5)
    state = torch.get_rng_state()
    distance, found, interval = run()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    assert run()[1:] == (found, interval)
    first = distance._first_half

    def kernel(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return ((a @ b.T) + 1) ** 3

    def whole(real: torch.Tensor, other: torch.Tensor) -> float:
        n = len(real)
        inside = [(kernel(x, x).sum() - kernel(x, x).trace()) / (n * (n - 1)) for x in (real, other)]
        return float(inside[0] + inside[1] - 2 * kernel(real, other).mean())

    wanted = (whole(before[first], after[~first]) + whole(before[~first], after[first])) / 2
    assert interval is not None and interval[0] < wanted < interval[1]
    # A hundred subsets come near the estimate on all pictures.
    assert found == pytest.approx(wanted, rel=0.15)


def test_a_distance_needs_pictures_and_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EvaluationError, match="KID needs at least 4 pictures, got 3"):
        FeatureDistance("KID", 8, 3)
    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", None)
    with pytest.raises(EvaluationError, match=r'FID needs .* pip install "recare-patch\[eval\]"'):
        FeatureDistance("FID", 8, 10)


def test_the_care_meter_gives_the_care_score(clip: Clip) -> None:
    before, after = noise(10, 1), noise(10, 2)
    meter = Care(Suite(**SUITE).care_drawing(0, 10), "stars", LABELS, clip)
    for rows in (range(0, 4), range(4, 10)):
        meter.take(rows, ([before[row] for row in rows], [after[row] for row in rows]))
    (figure,) = meter.figures()
    most_like = MostLike(clip, "stars", LABELS)
    assert (figure.base, figure.patched) == (np.mean(most_like(before)), np.mean(most_like(after)))
    assert (figure.name, figure.group, figure.pictures) == ("CARE score, stars", "care", 10)
    assert sum(part.pictures for part in figure.by) == 10
    assert "/" not in (figure.detector or "")


class Bright:
    """Shows a label wherever the first pixel is bright; "monet" wherever it is dark."""

    name = "bright"

    def labels(self) -> tuple[str, ...]:
        return ("van gogh", "monet", "picasso")

    def rate(self, images: list[Image.Image], label: str) -> list[bool]:
        return [(np.asarray(one)[0, 0, 0] > 127) != (label == "monet") for one in images]


def test_a_detector_is_asked_for_each_label() -> None:
    drawing = Suite(**SUITE).drawing("neighbours", 4)
    meter = Shown(drawing, Bright(), "neighbours", "kept", "neighbour shown", "higher", by_label=True)
    dark, bright = Image.new("RGB", (2, 2), "black"), Image.new("RGB", (2, 2), "white")
    meter.take([0, 1, 2, 3], ([dark, bright, dark, dark], [bright] * 4))
    (figure,) = meter.figures()
    parts = [(part.label, part.base, part.patched) for part in figure.by]
    assert parts == [("monet", 1.0, 0.0), ("picasso", 0.5, 1.0)]
    assert (figure.base, figure.patched) == (0.75, 0.5)
    assert figure.base_interval == pytest.approx(wilson_interval(3, 4), abs=1e-6)
    # Prompts that the base does not follow say little.
    meter = Shown(Suite(**SUITE).drawing("implicit", 2), Bright(), "c", "erased", "concept rate", "lower")
    meter.take([0, 1], ([dark] * 2, [dark] * 2))
    assert "say little" in meter.figures()[0].note


def test_retained_pictures_give_four_figures(clip: Clip) -> None:
    drawing, before = Suite(**SUITE).drawing("retained", 8), noise(8, 1)
    features, layers = clip.image_layers(before)
    assert torch.allclose(features, clip.image_features(before), atol=1e-6)
    # 32 pixels in patches of 8, without the class token; two layers 32 wide.
    assert [tuple(layer.shape) for layer in layers] == [(8, 16, 32)] * 2
    meter = Kept(drawing, clip, ("clip-score", "kid", "fid", "perceptual-change", "care-score"))
    meter.take(list(range(8)), (before, before))
    figures = {figure.metric: figure for figure in meter.figures()}
    assert tuple(one.name for one in figures.values()) == meter.names
    assert set(figures) == {"CLIP score", "KID", "FID", "perceptual change"}
    assert figures["perceptual change"].patched == 0 and figures["perceptual change"].base is None
    cosines = [
        max(0.0, float(image @ text)) for image, text in zip(features, clip.text_features(drawing.prompts), strict=True)
    ]
    assert figures["CLIP score"].base == figures["CLIP score"].patched
    assert figures["CLIP score"].base == pytest.approx(np.mean(cosines), abs=1e-5)
    assert {one.pictures for one in figures.values()} == {8}
    # Two halves of two pictures each are the least that has a distance.
    assert Kept(Suite(**SUITE).drawing("retained", 3), clip, ("kid", "clip-score")).names == (
        "CLIP score, retained prompts",
    )
