"""Plans: evaluations as they will be counted, memory that follows the levers, and what cannot be planned."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from recare_patch.cli import cli
from recare_patch.core.errors import RecipeError
from recare_patch.erasure import planning
from recare_patch.erasure.planning import Footprint
from recare_patch.erasure.run import erase
from recare_patch.models import lora as adapters
from recare_patch.models.loading import find_layout, load_base
from recare_patch.recipe.recipe import MemoryOptions, load_recipe, preset_overrides
from tests.models.test_architectures import small_recipe

GIB = 2**30
LARGE = Footprint(
    denoiser=5 * GIB,
    linear=2 * GIB,
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
)


@pytest.mark.parametrize(
    "changes",
    [
        {"erase.states": "shared-rollout", "erase.retain_batch_size": None, "erase.steps": 21},
        {"method": "esd", "target_images.guidance_scale": 1.0},
        {"method": "s-grace", "s_grace.rounds": 2, "s_grace.attack_steps": 1, "erase.steps": 1},
        {"method": "forget-me-not", "forget_me_not.inversion_steps": 2, "erase.steps": 2},
        {
            "also": [{"text": "stars", "kind": "object"}],
            "adversary.count": 2,
            "search.inversion_steps": 1,
            "target_images.count": 2,
        },
        {"also": [{"text": "tench", "kind": "object"}], "replace_with": None, "adversary.count": 1},
        {"replace_with": "Monet", "target_images.scheduler": "pndm", "target_images.steps": 5},
        {"method": "esd", "subject": {"text": "Monet", "kind": "style"}},
        {"subject": {"text": "Monet", "kind": "style"}},
    ],
)
def test_evaluations_are_those_that_a_run_counts(
    tiny_sd: Path, tiny_clip: Path, tmp_path: Path, changes: dict[str, object]
) -> None:
    recipe = small_recipe(tiny_sd, tiny_clip, **changes)
    planned = {stage.name: stage.evaluations for stage in planning.plan(recipe, speed=1e9).stages}
    cost = erase(recipe, tmp_path / "patch", device="cpu", preview=False).cost
    counted = {stage: one["evaluations"] for stage, one in cost["stages"].items() if one["evaluations"]}
    assert planned == counted
    assert sum(planned.values()) == cost["denoiser_evaluations"]


@pytest.mark.parametrize("name", ["tiny_sd", "tiny_sdxl", "tiny_sd3"])
def test_a_footprint_is_the_loaded_models(
    name: str, tiny_clip: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(name)
    recipe = small_recipe(folder, tiny_clip)
    # No weights are needed.
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    found = planning.measure(find_layout(bare, weights=False)[0], recipe)
    base = load_base(folder)

    def size(*networks: torch.nn.Module) -> int:
        return sum(p.numel() * p.element_size() for network in networks for p in network.parameters())

    assert found.denoiser == size(base.denoiser)
    assert found.vae == size(base.pipeline.vae)
    assert found.encoders == size(
        *(base.pipeline.text_encoder, getattr(base.pipeline, "text_encoder_2", torch.nn.Identity()))
    )
    parameters = adapters.attach(
        base.denoiser, layers="cross-attention", rank=2, alpha=1.0, generator=torch.Generator()
    )
    assert found.adapter == sum(parameter.numel() for parameter in parameters)
    assert found.predicting < found.checkpointed < found.training
    assert found.operations > 0


def test_fewer_bytes_for_every_lever(tiny_sd: Path, tiny_clip: Path) -> None:
    recipe = small_recipe(tiny_sd, tiny_clip)

    def peak(**levers: object) -> int:
        options = recipe.with_overrides({"memory": levers})
        return planning.plan(options, speed=1e12, footprint=LARGE).peak

    plain = peak()
    assert peak(micro_batch=1) < peak(micro_batch=2) < plain
    assert peak(checkpointing=True) < plain
    assert peak(micro_batch=1, checkpointing=True) < peak(micro_batch=1)
    small = {"micro_batch": 1, "checkpointing": True}
    held = [peak(**small), peak(**small, vae_off_device=True, vae_tiling=True)]
    held.append(peak(**small, vae_off_device=True, vae_tiling=True, encoders_off_device=True))
    assert held == sorted(held, reverse=True)
    assert peak(**small, weights="nf4") < peak(**small, weights="int8") < peak(**small)
    assert peak(**small, offload=True) < peak(**small, weights="nf4")


def test_the_fastest_levers_that_fit_are_chosen(
    tiny_sd: Path, tiny_clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "measure", lambda layout, recipe: LARGE)
    recipe = small_recipe(tiny_sd, tiny_clip)
    seconds = []
    for gigabytes in (8, 12, 24, 48):
        chosen, _ = planning.choose(recipe, gigabytes)
        assert chosen.precision == "bf16"
        found = planning.plan(chosen, speed=1e12, footprint=LARGE)
        assert found.peak <= planning.USED * gigabytes * 1e9
        seconds.append(found.seconds)
    assert seconds == sorted(seconds, reverse=True)
    # What a recipe sets itself stays.
    kept, _ = planning.choose(recipe.with_overrides({"memory.checkpointing": True}), 48)
    assert kept.memory.checkpointing
    # A micro batch is the most: a smaller card takes fewer samples, and not the slowest lever.
    bound, _ = planning.choose(recipe.with_overrides({"memory.micro_batch": 4}), 8)
    assert bound.memory == planning.choose(recipe, 8)[0].memory
    with pytest.raises(RecipeError, match=r"fit into 1 GB: the smallest set .* is expected to take"):
        planning.choose(recipe, 1)


def test_what_is_not_known_before_a_run(tiny_sd: Path, tiny_clip: Path) -> None:
    with pytest.raises(RecipeError, match="states 'rollout' will cost is not known"):
        planning.evaluations(small_recipe(tiny_sd, tiny_clip, **{"erase.states": "rollout"}))


def test_the_command(tiny_sdxl: Path) -> None:
    run = CliRunner().invoke(
        cli,
        ["plan", "--base", str(tiny_sdxl), "--vram", "6", "--tflops", "0.5", "--set", "erase.steps=10"],
    )
    assert run.exit_code == 0, run.output
    lines = run.output.splitlines()
    assert "Levers: encoders off device, vae off device" in lines
    assert any(line.split()[:2] == ["target", "images"] for line in lines)
    assert any(line.split()[0] == "all" for line in lines if line)
    assert "estimates, at 0.5 TFLOP/s (as given)" in run.output
    refused = CliRunner().invoke(cli, ["plan", "--base", str(tiny_sdxl), "--weights", "int4"])
    assert refused.exit_code == 2 and "allowed are full, int8, nf4" in refused.output + str(refused.stderr)
    refused = CliRunner().invoke(cli, ["plan", "--offload"])
    assert refused.exit_code == 2 and "needs checkpointing" in refused.output + str(refused.stderr)


def test_words() -> None:
    assert MemoryOptions().in_words() == "no lever"
    assert MemoryOptions(checkpointing=True, micro_batch=2).in_words() == "checkpointing, micro batch 2"


@pytest.mark.parametrize("preset", ["quick", "robust"])
def test_fast_presets_take_a_thirtieth_of_the_published_evaluations(preset: str) -> None:
    recipe = load_recipe("van-gogh-atelier").with_overrides(preset_overrides(preset))
    assert sum(planning.evaluations(recipe).values()) <= 3600
