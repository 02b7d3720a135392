from __future__ import annotations

import math

import pytest

from recare_patch.measure import wilson_interval


def reference(k: int, n: int, z: float) -> tuple[float, float]:
    """The two rates at which the score test just fails to reject k of n, by bisection."""

    def rejected(p: float) -> bool:
        return abs(k / n - p) > z * math.sqrt(p * (1 - p) / n)

    def edge(inside: float, outside: float) -> float:
        for _ in range(200):
            middle = (inside + outside) / 2
            inside, outside = (inside, middle) if rejected(middle) else (middle, outside)
        return inside

    return edge(k / n, 0.0), edge(k / n, 1.0)


@pytest.mark.parametrize(("k", "n"), [(3, 96), (50, 100), (95, 96), (1, 10), (480, 1000)])
def test_interval_inverts_the_score_test(k: int, n: int) -> None:
    assert wilson_interval(k, n) == pytest.approx(reference(k, n, 1.959963984540054), abs=1e-9)


def test_known_values() -> None:
    assert wilson_interval(0, 100) == pytest.approx((0.0, 0.036994), abs=1e-6)
    assert wilson_interval(100, 100) == pytest.approx((0.963006, 1.0), abs=1e-6)
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_a_higher_confidence_is_wider() -> None:
    low, high = wilson_interval(7, 50)
    lower, higher = wilson_interval(7, 50, 0.99)
    assert lower < low < 0.14 < high < higher


@pytest.mark.parametrize(
    ("k", "n", "confidence"), [(-1, 5, 0.95), (6, 5, 0.95), (0, -1, 0.95), (1, 5, 1.0), (1, 5, 0.0)]
)
def test_impossible_counts(k: int, n: int, confidence: float) -> None:
    with pytest.raises(ValueError, match=r"must be|need"):
        wilson_interval(k, n, confidence)
