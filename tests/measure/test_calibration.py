"""Calibration: a detector that errs says so in the interval, and evidence cannot lie about it."""

from __future__ import annotations

import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from recare_patch.core import EvaluationError
from recare_patch.measure import evaluate
from recare_patch.measure.calibration import CORRECTED, Calibration, calibrate, corrected_figures
from recare_patch.measure.claims import faults
from recare_patch.measure.meters import Shown
from recare_patch.measure.run import measure_again
from recare_patch.measure.suites import Drawing, Suite
from recare_patch.measure.verify import compare
from recare_patch.models import BaseModel
from recare_patch.patch import Patch
from tests.measure.making import SUITE, make_patch

WITH, WITHOUT = Image.new("RGB", (8, 8), "white"), Image.new("RGB", (8, 8), "black")


class Erring:
    """Sees white pictures, and is wrong in a share of all, on purpose."""

    name = "erring"

    def __init__(self, wrong: float, seed: int) -> None:
        self.wrong, self.draws = wrong, random.Random(seed)

    def labels(self) -> tuple[str, ...]:
        return ()

    def rate(self, images: Sequence[Image.Image], label: str) -> list[bool]:
        return [(image.getpixel((0, 0)) == (255, 255, 255)) != (self.draws.random() < self.wrong) for image in images]


class Gallery:
    """A studio whose pictures are white where the prompt names the concept."""

    def stream(self, prompts: Sequence[str], seeds: Sequence[int], **_: Any) -> Any:
        return ((row, WITH if "van gogh" in prompt else WITHOUT) for row, prompt in enumerate(prompts))


@pytest.mark.parametrize("truth", [0.0, 0.1, 0.5])
def test_the_corrected_interval_covers_the_judges_rate(truth: float) -> None:
    suite, covered, naive, pictures = Suite(**SUITE), 0, 0, 200
    for repetition in range(100):
        detector = Erring(0.15, repetition)
        calibration = calibrate(Gallery(), suite, detector, pictures)  # type: ignore[arg-type]
        drawing = Drawing("plain", ("a",) * pictures, tuple(range(pictures)), ("van gogh",) * pictures)
        meter = Shown(drawing, detector, "concept", "erased", "concept rate", "lower")
        after = [WITH] * round(truth * pictures) + [WITHOUT] * (pictures - round(truth * pictures))
        meter.take(range(pictures), ([WITH] * pictures, after))
        raw = meter.figures()
        (figure,) = corrected_figures(raw, calibration, detector.name)
        assert figure.interval is not None and figure.base_interval is not None and raw[0].interval is not None
        covered += figure.interval[0] <= truth <= figure.interval[1]
        naive += raw[0].interval[0] <= truth <= raw[0].interval[1]
    assert covered >= 90
    assert truth == 0.5 or naive < 60


def test_a_detector_that_sees_nothing_says_so() -> None:
    assert Calibration(10, 20, 10, 20).corrected(5, 20) == (0.25, (0.0, 1.0))
    assert Calibration(0, 0, 0, 0).corrected(5, 20)[1] == (0.0, 1.0)
    value, (low, high) = Calibration(20, 20, 0, 20).corrected(0, 20)
    assert (value, low) == (0.0, 0.0) and 0.1 < high < 0.3
    with pytest.raises(EvaluationError, match="counts hits among pictures"):
        Calibration(3, 2, 0, 1)
    with pytest.raises(EvaluationError, match="is no calibration"):
        Calibration.of_data({"with": [1]})
    with pytest.raises(EvaluationError, match="no retained prompts to calibrate"):
        calibrate(Gallery(), Suite(**{**SUITE, "retained": []}), Erring(0, 0), 4)  # type: ignore[arg-type]


def test_calibrated_figures_are_evidence_that_is_checked(
    base: BaseModel, tiny_clip: Path, tmp_path: Path, one_thread: None
) -> None:
    folder = make_patch(base, tmp_path / "patch", tiny_clip)
    how: dict[str, Any] = {"metrics": ["concept-rate"], "pictures": 4, "cache": False, "device": "cpu"}
    evidence = evaluate(folder, base=base, suite=Suite(**SUITE), calibrate=6, **how)
    corrected = [one for one in evidence.figures if one.name.endswith(CORRECTED)]
    assert [one.name for one in corrected] == [
        f"concept, {which} prompts{CORRECTED}" for which in ("plain", "paraphrased", "implicit")
    ]
    assert evidence.command.endswith("--calibrate 6") and not faults(evidence)
    again = measure_again(evidence, Patch.load(folder), base)
    assert again.figures == evidence.figures
    assert all(one.holds is not False for one in compare(evidence, again, [one.name for one in corrected]))
    (alone,) = measure_again(evidence, Patch.load(folder), base, figures=[corrected[0].name]).figures
    assert alone == corrected[0]
    lie = corrected[0].model_copy(update={"patched": 0.0, "interval": (0.0, 0.01)})
    rest = tuple(one for one in evidence.figures if one.name != lie.name)
    assert any(
        "does not follow from the rate and the calibration" in told
        for told in faults(evidence.model_copy(update={"figures": (*rest, lie)}))
    )
    bare = evidence.model_copy(update={"options": {}})
    assert any("the calibration behind it is not told" in told for told in faults(bare))
    shutil.rmtree(folder)
