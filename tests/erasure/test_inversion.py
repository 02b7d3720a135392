"""Textual inversion: it may end early, keep to low noise, and start from an earlier name."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from recare_patch.core import NullProgress, Progress
from recare_patch.core.errors import RecipeError
from recare_patch.erasure import planning
from recare_patch.erasure.inversion import HELD_OUT, invert, most_evaluations
from recare_patch.erasure.loop import Checkpoint, Fitted
from recare_patch.erasure.run import erase
from recare_patch.models import BaseModel
from recare_patch.models.loading import load_base
from recare_patch.recipe.recipe import Recipe
from tests.models.test_architectures import small_recipe

LATER = ("scheduler", "patience", "noise_up_to", "warm_start")


@pytest.fixture(scope="module")
def base(tiny_sd: Path) -> BaseModel:
    return load_base(tiny_sd, device="cpu")


class _Killed(NullProgress):
    def __init__(self, at: int) -> None:
        self.at = at

    def update(self, stage: str, done: int, total: int, note: str = "") -> None:
        if done == self.at:
            raise KeyboardInterrupt


def _invert(
    base: BaseModel,
    *,
    steps: int = 40,
    rate: float = 1.0,
    progress: Progress | None = None,
    **options: object,
) -> tuple[Tensor, Fitted]:
    latents = torch.randn((10, *base.latent_shape), generator=torch.Generator().manual_seed(0))
    start = base.word_vector("art")[None]
    return invert(
        base,
        latents,
        ["a painting of <*>", "<*>"],
        start,
        steps=steps,
        batch_size=2,
        learning_rate=rate,
        seed=1,
        stage="inversion",
        progress=progress,
        **options,  # type: ignore[arg-type]
    )


def test_it_ends_when_nothing_gets_better(base: BaseModel) -> None:
    before = base.counter.total
    # Steps as short as these leave the vectors where they are: the first look stays the best.
    vectors, fitted = _invert(base, patience=2, rate=1e-20)
    assert len(fitted.losses) == 30
    assert torch.equal(vectors, base.word_vector("art")[None])
    assert base.counter.total - before == 30 * 2 * 3 + 3 * HELD_OUT < most_evaluations(40, 2, 2)


def test_enough_patience_takes_all_steps(base: BaseModel) -> None:
    before = base.counter.total
    _, fitted = _invert(base, patience=100, steps=12, rate=1e-4)
    assert len(fitted.losses) == 12
    assert base.counter.total - before == most_evaluations(12, 2, 100) == 12 * 2 * 3 + 2 * HELD_OUT


def test_a_resumed_one_ends_with_the_same_bits(base: BaseModel, tmp_path: Path) -> None:
    options = {"patience": 6, "rate": 0.3, "steps": 120}
    vectors, fitted = _invert(base, **options)  # type: ignore[arg-type]
    assert len(fitted.losses) > 63
    checkpoint = Checkpoint(tmp_path / "inversion.safetensors")
    with contextlib.suppress(KeyboardInterrupt):
        _invert(base, checkpoint=checkpoint, progress=_Killed(63), **options)  # type: ignore[arg-type]
    assert checkpoint.path.exists()
    for _ in range(2):
        # The second time there is nothing left to do.
        again, refitted = _invert(base, checkpoint=checkpoint, **options)  # type: ignore[arg-type]
        assert torch.equal(again, vectors)
        assert refitted.losses == fitted.losses


def test_low_noise_alone(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    denoise = base.denoise

    def look(latents: Tensor, timesteps: Tensor, embeds: object) -> Tensor:
        seen.extend(timesteps.tolist())
        return denoise(latents, timesteps, embeds)  # type: ignore[arg-type]

    monkeypatch.setattr(base, "denoise", look)
    _invert(base, steps=12, noise_up_to=0.3, patience=5)
    assert max(seen) < 300 and min(seen) < 30
    seen.clear()
    _invert(base, steps=12)
    assert max(seen) > 700


def _starts(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    found: list[Tensor] = []

    def keep(base: BaseModel, latents: Tensor, prompts: object, start: Tensor, **options: object) -> object:
        found.append(start.clone())
        vectors, fitted = invert(base, latents, prompts, start, **options)  # type: ignore[arg-type]
        found.append(vectors.clone())
        return vectors, fitted

    monkeypatch.setattr("recare_patch.erasure.run.invert", keep)
    # A random model's names explain nothing, and only names that count are gone on from.
    monkeypatch.setattr("recare_patch.erasure.run.NAME_RECOVERY", -1e9)
    return found


@pytest.mark.parametrize("warm", [False, True])
def test_a_round_starts_from_the_name_before(
    tiny_sd: Path, tiny_clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warm: bool
) -> None:
    found = _starts(monkeypatch)
    recipe = small_recipe(tiny_sd, tiny_clip, **{"search.rounds": 2, "search.warm_start": warm})
    erase(recipe, tmp_path / "patch", device="cpu", preview=False)
    first, made, second, _ = found
    assert torch.equal(second, made if warm else first)


def test_a_run_costs_at_most_what_was_planned(tiny_sd: Path, tiny_clip: Path, tmp_path: Path) -> None:
    changes = {"search.patience": 1, "search.inversion_steps": 40, "search.learning_rate": 1e-20}
    recipe = small_recipe(tiny_sd, tiny_clip, **changes)
    planned = planning.evaluations(recipe)
    cost = erase(recipe, tmp_path / "patch", device="cpu", preview=False).cost
    counted = {stage: one["evaluations"] for stage, one in cost["stages"].items() if one["evaluations"]}
    assert counted.keys() == planned.keys()
    assert counted.pop("search 1 inversion") < planned.pop("search 1 inversion")
    assert counted == planned


def test_a_plan_says_that_there_may_be_less(tiny_sd: Path, run_cli: Callable[..., str]) -> None:
    plain = ["plan", "--base", str(tiny_sd), "--tflops", "1"]
    assert "Evaluations are exact" in run_cli(*plain)
    assert "Evaluations are the most that there can be" in run_cli(*plain, "--set", "search.patience=3")


@pytest.fixture
def run_cli() -> Callable[..., str]:
    from click.testing import CliRunner

    from recare_patch.cli import cli

    def run(*arguments: str) -> str:
        result = CliRunner().invoke(cli, list(arguments))
        assert result.exit_code == 0, result.output
        return result.output

    return run


def test_recipes_from_before_keep_their_hash(tiny_sd: Path, tiny_clip: Path) -> None:
    recipe = small_recipe(tiny_sd, tiny_clip)
    old = re.sub(rf"^  ({'|'.join(LATER)}):.*\n", "", recipe.to_yaml(), flags=re.M)
    assert len(old.splitlines()) == len(recipe.to_yaml().splitlines()) - len(LATER)
    assert Recipe.from_yaml(old).hash == recipe.hash
    changes: dict[str, object] = {
        "target_images.scheduler": "euler",
        "search.patience": 3,
        "search.noise_up_to": 0.5,
        "search.warm_start": True,
    }
    for key, value in changes.items():
        assert recipe.with_overrides({key: value}).hash != recipe.hash


def test_nothing_to_hold_out(tiny_sd: Path, tiny_clip: Path) -> None:
    with pytest.raises(RecipeError, match="count must be at least 2"):
        small_recipe(tiny_sd, tiny_clip, **{"search.patience": 1, "target_images.count": 1})
