"""How sure a rate is."""

from __future__ import annotations

import math
from statistics import NormalDist


def wilson_interval(k: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a binomial rate (Wilson, JASA 22, 1927, equation for p).

    Unlike the normal interval it stays within 0 and 1 and has a width at rates of 0 and 1, where
    erasure is measured.

    Args:
        k: number of hits.
        n: number of trials.
        confidence: between 0 and 1.

    Returns:
        Lower and upper bound; (0, 1) without trials.

    Raises:
        ValueError: the counts are no counts, or the confidence is not between 0 and 1.
    """
    if n < 0 or not 0 <= k <= n:
        raise ValueError(f"k hits of n trials need 0 <= k <= n, got k={k}, n={n}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")
    if n == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    rate = k / n
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    # Rounding must not push the exact bounds of 0 and n hits past them.
    low = 0.0 if k == 0 else max(0.0, centre - half)
    high = 1.0 if k == n else min(1.0, centre + half)
    return low, high
