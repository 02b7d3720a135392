"""Plans: evaluations as they will be counted, memory that follows the levers, and what cannot be planned."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from recare_patch.cli import cli
from recare_patch.core import RecarePatchError, RecipeError
from recare_patch.erasure import EraseResult, erase, planning, resolve_recipe
from recare_patch.erasure.planning import choose, evaluations, is_exact, plan
from recare_patch.erasure.prepare import Target
from recare_patch.models import BaseModel, Footprint, find_layout, load_base, measure
from recare_patch.models.fitting import USED
from recare_patch.recipe import MemoryOptions, Recipe, load_recipe, preset_overrides
from tests.erasure.making import TENCH, attach, small_recipe
from tests.tiny import make_tiny_sd

GIB = 2**30
SHARED: dict[str, Any] = {"erase.states": "shared-rollout"}
EXACT: dict[str, Any] = {"erase.ends": "steps", "care_set.source": "clip"}
"""Nothing in such a run ends early, and nothing is asked that depends on an answer."""
MONET = {"text": "Monet", "kind": "style"}
LARGE = Footprint(
    denoiser=5 * GIB,
    linear=2 * GIB,
    read_linear=0,
    size=2,
    block=GIB // 10,
    encoders=GIB,
    vae=GIB // 5,
    adapter=10**6,
    operations=6e12,
    predicting=GIB // 8,
    training=5 * GIB,
    checkpointed=GIB // 2,
    decoding=GIB,
    tiled=GIB // 4,
    decoded_at_once=1,
    encoding=10 * 2**20,
    encoded_at_once=32,
    reading=GIB // 8,
    forgetful=GIB // 8,
    row=300_000,
    latent=260_000,
)


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("recare", SHARED | {"erase.retain_batch_size": None, "erase.steps": 21, "also": [TENCH]}),
        ("esd", {"target_images.guidance_scale": 1.0, "also": [TENCH]}),
        ("esd", SHARED | {"replace_with": "Monet"}),
        ("s-grace", {"s_grace.rounds": 2, "s_grace.attack_steps": 1, "erase.steps": 1, "also": [TENCH]}),
        ("forget-me-not", {"forget_me_not.inversion_steps": 2, "search.patience": 100, "also": [TENCH]}),
        ("forget-me-not", SHARED | {"replace_with": "Monet"}),
        ("uce", {"also": [TENCH]}),
        ("recare", {"also": [TENCH], "adversary.count": 2, "search.patience": 100, "search.rounds": 2}),
        ("recare", {"replace_with": "Monet", "target_images.scheduler": "pndm", "target_images.steps": 5}),
        ("recare", {"replace_with": "Monet", "adversary.count": 1, "erase.retained_images": 0}),
        ("esd", {"subject": MONET}),
        ("recare", {"subject": MONET, "adversary.count": 1}),
    ],
)
def test_evaluations_are_those_that_a_run_counts(
    small: Callable[..., Recipe], run: Callable[..., EraseResult], method: str, changes: dict[str, Any]
) -> None:
    recipe = small(method, **{"erase.steps": 2, **EXACT, **changes})
    assert is_exact(recipe) == ("search.patience" not in changes)
    planned = {one.name: one.evaluations for one in plan(recipe, speed=1e9).stages if one.evaluations}
    cost = run(recipe).cost
    counted = {stage: one["evaluations"] for stage, one in cost["stages"].items() if one["evaluations"]}
    assert planned == counted and sum(planned.values()) == cost["denoiser_evaluations"]


def _both(recipe: Recipe, result: EraseResult) -> tuple[dict[str, int], dict[str, int]]:
    """What was planned, and what was counted."""
    stages = result.cost["stages"]
    return evaluations(recipe), {name: one["evaluations"] for name, one in stages.items() if one["evaluations"]}


def test_a_run_costs_at_most_what_was_planned(small: Callable[..., Recipe], run: Callable[..., EraseResult]) -> None:
    changes = {"search.patience": 1, "search.inversion_steps": 40, "search.learning_rate": 1e-20}
    recipe = small(**changes, **EXACT, **{"erase.steps": 2})
    planned, counted = _both(recipe, run(recipe))
    assert counted.pop("search 1 inversion") < planned.pop("search 1 inversion")
    assert counted == planned


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("recare", {"erase.steps": 15, "also": [TENCH]}),
        ("recare", {"erase.steps": 4, "subject": MONET}),
        ("esd", {"erase.steps": 11, "erase.ends": "measured"}),
        ("s-grace", {"erase.steps": 1}),
    ],
)
def test_what_a_run_decides_on_the_way_is_planned_at_its_most(
    small: Callable[..., Recipe],
    run: Callable[..., EraseResult],
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    changes: dict[str, Any],
) -> None:
    """Also where CLIP sees the concept in every picture that the run looks at."""
    monkeypatch.setattr(Target, "seen_by_clip", property(lambda self: True, lambda self, value: None), raising=False)
    monkeypatch.setattr("recare_patch.erasure.prepare.sees", lambda *asked: [True])
    recipe = small(method, **{"search.rounds": 0, "erase.gone": 1e-9, "erase.drift": 10.0, **changes})
    assert not is_exact(recipe)
    planned, counted = _both(recipe, run(recipe))
    assert planned.keys() == counted.keys()
    for stage, count in counted.items():
        least = {"CARE-set": 1, "CARE-set 2": 1, "erase": 0.5 * planned[stage]}.get(stage, planned[stage])
        assert least <= count <= planned[stage], stage


@pytest.mark.parametrize("name", ["tiny_sd", "tiny_sdxl", "tiny_sd3"])
def test_a_footprint_is_the_loaded_models(
    name: str, tiny_clip: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(name)
    recipe = small_recipe(folder, tiny_clip)
    # No weights are needed.
    bare = shutil.copytree(folder, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    found = measure(find_layout(bare, weights=False)[0], recipe)
    base = load_base(folder)

    def size(*networks: Any) -> int:
        return sum(p.numel() * p.element_size() for network in networks for p in network.parameters())

    second = getattr(base.pipeline, "text_encoder_2", torch.nn.Identity())
    assert found.encoders == size(base.pipeline.text_encoder, second)
    assert (found.denoiser, found.vae) == (size(base.denoiser), size(base.pipeline.vae))
    assert found.adapter == sum(parameter.numel() for parameter in attach(base, recipe))
    assert found.predicting < found.checkpointed < found.training
    assert found.operations > 0


def test_fewer_bytes_for_every_lever(small: Callable[..., Recipe]) -> None:
    def peak(**levers: object) -> int:
        return plan(small(memory=levers), speed=1e12, footprint=LARGE).peak

    plain, few = peak(), {"micro_batch": 1, "checkpointing": True}
    assert peak(micro_batch=1) < peak(micro_batch=2) < plain
    assert peak(checkpointing=True) < plain and peak(**few) < peak(micro_batch=1)
    away = {"vae_off_device": True, "vae_tiling": True}
    assert peak(**few) >= peak(**few, **away) >= peak(**few, **away, encoders_off_device=True)
    assert peak(**few, weights="nf4") < peak(**few, weights="int8") < peak(**few)
    assert peak(**few, offload=True) < peak(**few, weights="nf4")


def test_the_fastest_levers_that_fit_are_chosen(small: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "measure", lambda layout, recipe: LARGE)
    seconds = []
    for gigabytes in (8, 12, 24, 48):
        chosen, _ = choose(small(), gigabytes)
        assert chosen.precision == "bf16"
        found = plan(chosen, speed=1e12, footprint=LARGE)
        assert found.peak <= USED * gigabytes * 1e9
        seconds.append(found.seconds)
    assert seconds == sorted(seconds, reverse=True)
    # What a recipe sets itself stays.
    assert choose(small(**{"memory.checkpointing": True}), 48)[0].memory.checkpointing
    # A micro batch is the most: a smaller card takes fewer samples, and not the slowest lever.
    assert choose(small(**{"memory.micro_batch": 4}), 8)[0].memory == choose(small(), 8)[0].memory
    with pytest.raises(RecipeError, match=r"fit into 1 GB: the smallest set .* is expected to take"):
        choose(small(), 1)


def test_a_kind_is_seen_in_pictures_as_the_run_draws(
    tiny_sd: Path, tiny_clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the run's precision and under its levers, which a plan has counted; told a kind, nothing is drawn."""
    loaded: list[dict[str, Any]] = []

    def load(source: str, **how: Any) -> BaseModel:
        loaded.append(how)
        return load_base(source, **how)

    monkeypatch.setattr("recare_patch.erasure.run.load_base", load)
    words: dict[str, Any] = {"base": str(tiny_sd), "clip": str(tiny_clip), "device": "cpu", "vram": 8}
    words["also"] = ["moon"]
    recipe = resolve_recipe("boat", **words)
    (how,) = loaded
    assert how["precision"] == recipe.precision == "bf16"
    assert how["memory"] == recipe.memory and recipe.memory.encoders_off_device
    assert resolve_recipe("boat", kind="object", **words).memory == recipe.memory and len(loaded) == 1
    stages = plan(recipe, speed=1.0, footprint=LARGE, guessed=True).stages
    assert (stages[0].name, stages[0].evaluations) == ("kind", 240)


def test_what_is_not_known_before_a_run(small: Callable[..., Recipe]) -> None:
    with pytest.raises(RecipeError, match="states 'rollout' will cost is not known"):
        evaluations(small(**{"erase.states": "rollout"}))


def test_the_command(tiny_sd: Path, tiny_sdxl: Path) -> None:
    def tell(*arguments: object, code: int = 0) -> str:
        found = CliRunner().invoke(cli, ["plan", *map(str, arguments)])
        assert found.exit_code == code, found.output
        return found.output + found.stderr

    told = tell("--base", tiny_sdxl, "--vram", 6, "--tflops", "0.5", "--set", "erase.steps=10")
    assert "Levers: encoders off device, vae off device\n" in told
    assert {("target", "images"), ("all",)} <= {tuple(line.split()[:n]) for line in told.splitlines() for n in (1, 2)}
    assert "estimates, at 0.5 TFLOP/s (as given)" in told
    plain = ("--base", tiny_sd, "--tflops", 1)
    exact = (*plain, "--set", "erase.ends=steps", "--set", "care_set.source=clip")
    assert "Evaluations are exact" in tell(*exact)
    rows = {line.split()[0] for line in tell(*exact, "--concept", "zebra").splitlines()}
    assert rows - {line.split()[0] for line in tell(*exact, "--kind", "object").splitlines()} == {"kind"}
    assert {"encoding", "preview"} < rows
    for told in (tell(*exact, "--set", "search.patience=3"), tell(*plain)):
        assert "Evaluations are the most that there can be" in told
    assert "allowed are full, int8, nf4" in tell("--base", tiny_sdxl, "--weights", "int4", code=2)
    assert "needs checkpointing" in tell("--offload", code=2)


def test_words() -> None:
    assert MemoryOptions().in_words() == "no lever"
    assert MemoryOptions(checkpointing=True, micro_batch=2).in_words() == "checkpointing, micro batch 2"


@pytest.mark.parametrize(("preset", "part"), [("quick", 15), ("robust", 25)])
def test_fast_presets_take_a_small_part_of_the_published_evaluations_at_most(preset: str, part: int) -> None:
    recipe = load_recipe("van-gogh-atelier").with_overrides(preset_overrides(preset))
    assert sum(evaluations(recipe).values()) <= 107_400 / part


@pytest.mark.parametrize("case", ["inpainting", "long name", "long alias", "no CARE-set"])
def test_what_a_run_refuses_a_plan_refuses_in_the_same_words(case: str, tiny_sd: Path, tmp_path: Path) -> None:
    base = make_tiny_sd(tmp_path / "nine", in_channels=9) if case == "inpainting" else tiny_sd
    changes: dict[str, Any] = {
        "long name": {"concept": {"text": "葛飾北斎 " * 19, "kind": "style"}},
        "long alias": {"concept": {"text": "tench", "kind": "object", "aliases": ["zqx " * 25]}},
        "no CARE-set": {"care_set": {"file": str(tmp_path / "none.json")}},
    }.get(case, {})
    recipe = Recipe(**({"concept": {"text": "Van Gogh", "kind": "style"}, "base": str(base)} | changes))
    told = []
    for refused in (lambda: plan(recipe, speed=1e12), lambda: erase(recipe, tmp_path / "out")):
        with pytest.raises(RecarePatchError) as caught:
            refused()
        told.append(str(caught.value))
    assert told[0] == told[1] and not (tmp_path / "out").exists()
    assert ("tokens, and the text encoder reads 75" in told[0]) is case.startswith("long")
