"""Hamlet, a base that nothing was tuned on: natural captions, an ordinary vocabulary, other scenes."""

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
"""What ``python -m benchmarks.hamlet train`` made of seed 0: ``pipeline``, ``clip`` and ``judge``."""
