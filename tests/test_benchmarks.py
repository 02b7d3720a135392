"""The scoring suites: choosing and reporting share neither prompts nor seeds."""

from __future__ import annotations

import pytest

from benchmarks.suites import CONCEPTS, suite
from recare_patch.atelier.judge import LABELS


@pytest.mark.parametrize("concept", CONCEPTS)
def test_choosing_and_reporting_are_apart(concept: str) -> None:
    choose, report = (
        [draw for figure in suite(concept, split) for draw in figure.draws(split)]
        for split in ("choose", "report")
    )
    assert not {p.lower() for p, _, _ in choose} & {p.lower() for p, _, _ in report}
    assert not {s for _, _, s in choose} & {s for _, _, s in report}


@pytest.mark.parametrize("concept", CONCEPTS)
def test_every_reported_figure_has_a_hundred_pictures_and_known_labels(concept: str) -> None:
    for figure in suite(concept, "report"):
        draws = figure.draws("report")
        assert len(draws) >= 100
        assert len({(p, s) for p, _, s in draws}) == len(draws)
        assert {label for _, label, _ in draws} <= set(LABELS)
