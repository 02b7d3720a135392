"""The scoring suites: choosing and reporting share neither prompts nor seeds."""

from __future__ import annotations

import argparse
import contextlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image
from safetensors.torch import save_file

from benchmarks import cost, methods, stacking
from benchmarks.erasure import made_before
from benchmarks.in_place import interval_of_runs
from benchmarks.paper_procedure import PaperSettings, expected_evaluations
from benchmarks.suites import ALL_CONCEPTS, suite
from recare_patch.measure import wilson_interval
from recare_patch.models.atelier.judge import LABELS
from recare_patch.recipe import METADATA_KEY, WEIGHTS_NAME, Concept, Recipe


@pytest.mark.parametrize("concept", ALL_CONCEPTS)
def test_choosing_and_reporting_are_apart(concept: str) -> None:
    choose, report = (
        [draw for figure in suite(concept, split) for draw in figure.draws(split)] for split in ("choose", "report")
    )
    assert not {p.lower() for p, _, _ in choose} & {p.lower() for p, _, _ in report}
    assert not {s for _, _, s in choose} & {s for _, _, s in report}


@pytest.mark.parametrize("concept", ALL_CONCEPTS)
def test_every_reported_figure_has_a_hundred_pictures_and_known_labels(concept: str) -> None:
    for figure in suite(concept, "report"):
        draws = figure.draws("report")
        assert len(draws) >= 100
        assert len({(p, s) for p, _, s in draws}) == len(draws)
        assert {label for _, label, _ in draws} <= set(LABELS)


@pytest.mark.parametrize("size", stacking.SIZES)
def test_stacks_are_judged_by_known_labels_on_prompts_apart(size: int) -> None:
    parts = list(stacking.CONCEPTS)[:size]
    words = dict.fromkeys(parts, ("stars", "water", "fisherman", "house", "meadow", "nothing"))
    chosen, reported = (stacking.figures(parts, words, split, 100) for split in ("choose", "report"))
    assert [one.name for one in chosen] == [one.name for one in reported]
    assert len({one.name for one in reported}) == len(reported)
    assert [one.name for one in reported if one.group == "concept"] == [f"{part}: concept" for part in parts]
    for one in reported:
        labels = {label for _, label in one.items}
        assert labels <= set(LABELS)
        # What some part erases is looked for where it should be gone, and nowhere else.
        assert labels == {one.name.split(":")[0]} if one.group == "concept" else not labels & set(parts)
    choose = {draw[0].lower() for one in chosen for draw in one.draws("choose")}
    assert not choose & {draw[0].lower() for one in reported for draw in one.draws("report")}


@pytest.mark.parametrize("run", [False, True])
def test_the_published_procedure_stands_beside_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: bool) -> None:
    stage = {"seconds": 8.0, "evaluations": 4}
    row: dict[str, Any] = {
        "base": "sd-1.5",
        "card_gb": None,
        "device": "cpu",
        "cut": True,
        "precision": "bf16",
        "memory": {"micro_batch": 2, "resolution": "256x384"},
        "latent_shape": [4, 48, 32],
        "rank": 4,
        "cost": {"stages": {"erase": stage}, "seconds": 9.0, "denoiser_evaluations": 4},
        "peak_memory_bytes": 2**30,
        "patch_bytes": 10**6,
        "whole_evaluations": {"erase": 100},
        "planned": {"peak_memory_bytes": 2**31},
        "paper_evaluations": expected_evaluations(PaperSettings()),
    }
    if run:
        ran = {"seconds": {"erase": 3.0}, "evaluations": {"erase": 6}}
        row["paper"] = {**ran, "peak_memory_bytes": 2**32, "whole_seconds": 53_300.0}
    (tmp_path / "sd-1.5.json").write_text(json.dumps(row))
    monkeypatch.setattr(cost, "RESULTS", tmp_path)
    head, _, ours, paper = cost.table(argparse.Namespace()).splitlines()
    assert {line.count("|") for line in (head, ours, paper)} == {12}
    assert "| ours, bf16, micro batch 2 | cpu | 256x384 | 4 (cut) | 9 | 1.00 (2.00) |" in ours
    assert ours.endswith("| 100 | 200 |")
    assert paper.endswith("| 106,600 | 53,300 |" if run else "| 106,600 | 213,200 |")


def test_pictures_of_the_methods_whose_patches_are_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[list[str]] = []

    class Applied:
        def apply(self, pipeline: object) -> contextlib.nullcontext[None]:
            return contextlib.nullcontext()

    def generate(prompts: list[str], seeds: list[int], **options: object) -> list[Image.Image]:
        asked.append(prompts)
        return [Image.new("RGB", (64, 64)) for _ in prompts]

    pipeline = SimpleNamespace(scheduler=DDIMScheduler())
    base = SimpleNamespace(pipeline=pipeline, generate=generate)
    monkeypatch.setattr("recare_patch.models.load_base", lambda *_, **__: base)
    monkeypatch.setattr("recare_patch.patch.patch.Patch.load", lambda _: Applied())
    (tmp_path / "van-gogh-uce").mkdir()
    methods.main(["pictures", "--work", str(tmp_path), "--out", str(tmp_path)])
    assert len(asked) == 2 and asked[0] == asked[1] and len(asked[0]) == len(suite("van gogh", "report"))
    with Image.open(tmp_path / "methods-van-gogh.png") as sheet:
        assert sheet.width > 2 * 64


def test_conceptbench_is_one_table_of_what_was_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def scores(shown: float, stars: float) -> list[dict[str, object]]:
        figures = (("concept", "concept", shown), ("CARE stars", "care", stars), ("other", "styles", 0.5))
        return [{"figure": f, "group": g, "rate": rate, "interval": [0, 1]} for f, g, rate in figures]

    monkeypatch.setattr(methods, "RESULTS", tmp_path)
    for name, row, found in (
        ("van-gogh.base", "base", scores(0.9, 0.8)),
        ("van-gogh.uce", "uce", scores(0.1, 0.4)),
        ("mira-vale.base", "base", scores(1.0, 1.0)),
        # Stacks and variants are no methods, nudity is in no group, and tench was not measured.
        ("van-gogh.other", "recare + s-grace", scores(0.0, 0.8)),
        ("nude.base", "base", scores(1.0, 1.0)),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps({"row": row, "scores": found}))
    methods.main(["conceptbench"])
    head, _, base, uce = capsys.readouterr().out.splitlines()
    assert [cell.split(":")[0].strip() for cell in head.split("|")[2:-1:3]] == ["identity", "object", "style"]
    assert base == "| base | 100% | 100% | 100% | – | – | – | 90% | 100% | 100% |"
    assert uce == "| uce | – | – | – | – | – | – | 10% | 50% | 100% |"


def test_the_interval_of_several_attacks_is_that_of_their_rates() -> None:
    # Student's t for four degrees of freedom is 2.776 at 95 %.
    assert interval_of_runs([8, 9, 5, 11, 12], 50) == pytest.approx((0.18 - 0.06799, 0.18 + 0.06799), abs=1e-4)
    # Attacks that agree do not make it narrower than their pictures do.
    assert interval_of_runs([0] * 5, 50) == wilson_interval(0, 250)
    assert interval_of_runs([2], 50) == wilson_interval(2, 50)


def test_a_row_is_not_another_recipes_patch(tmp_path: Path) -> None:
    recipe = Recipe(concept=Concept(text="cat", kind="object"))
    assert not made_before(tmp_path, recipe)
    save_file({"x": torch.zeros(1)}, tmp_path / WEIGHTS_NAME, metadata={METADATA_KEY: recipe.to_yaml()})
    assert made_before(tmp_path, recipe)
    with pytest.raises(SystemExit, match="another recipe"):
        made_before(tmp_path, recipe.with_overrides({"erase.retain_weight": 6}))
