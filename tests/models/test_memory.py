"""Memory levers: each gives what the plain run gives, or nearly, and does what it is for."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from recare_patch.core.errors import BaseModelError, RecipeError
from recare_patch.erasure.run import erase
from recare_patch.models import BaseModel
from recare_patch.models import lora as adapters
from recare_patch.models.loading import load_base
from recare_patch.patch.patch import Patch
from recare_patch.recipe.recipe import MemoryOptions, Recipe
from tests.models.test_architectures import small_recipe

LEVERS = {
    "encoders": {"encoders_off_device": True},
    "vae": {"vae_off_device": True},
    "tiling": {"vae_tiling": True},
    "checkpointing": {"checkpointing": True},
    "micro batch": {"micro_batch": 2},
    "both": {"checkpointing": True, "micro_batch": 1},
    "offload": {"offload": True, "checkpointing": True},
    "channels last": {"channels_last": True},
}
QUANTIZED = {"int8": {"weights": "int8"}, "nf4": {"weights": "nf4"}}


def _step(base: BaseModel) -> tuple[float, list[torch.Tensor], int]:
    """Loss and gradients of five rows through an adapter that does something, and what was counted."""
    parameters = adapters.attach(
        base.denoiser,
        layers="cross-attention",
        rank=2,
        alpha=2.0,
        generator=torch.Generator().manual_seed(0),
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in parameters[1::2]:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 10)
    latents = torch.randn((5, *base.latent_shape), generator=generator)
    at = torch.tensor([10, 200, 400, 600, 900])
    embeds = base.encode_prompts(["a cat", "", "stars", "a boat", "night"])
    before = base.counter.total
    loss = base.denoise(latents, at, embeds).square().mean()
    loss.backward()
    grads = [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]
    adapters.detach(base.denoiser)
    return loss.item(), grads, base.counter.total - before


@pytest.fixture(scope="module", params=["tiny_sdxl", "tiny_sd3"])
def folder(request: pytest.FixtureRequest) -> Path:
    found: Path = request.getfixturevalue(request.param)
    return found


@pytest.fixture(scope="module")
def plain(folder: Path) -> BaseModel:
    return load_base(folder, device="cpu")


@pytest.mark.parametrize("lever", LEVERS)
def test_a_lever_changes_no_result(folder: Path, plain: BaseModel, lever: str) -> None:
    base = load_base(folder, device="cpu", memory=MemoryOptions(**LEVERS[lever]))  # type: ignore[arg-type]
    assert base.denoiser_hash() == plain.denoiser_hash()
    loss, grads, counted = _step(base)
    wanted, wanted_grads, wanted_count = _step(plain)
    assert loss == pytest.approx(wanted, rel=1e-4)
    assert len(grads) == len(wanted_grads) > 0
    for one, other in zip(grads, wanted_grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
    assert counted == wanted_count == 15
    found, pictures = (
        one.generate(["a cat", "stars"], [1, 2], steps=2, guidance_scale=4.0) for one in (base, plain)
    )
    for picture, other in zip(found, pictures, strict=True):
        assert np.abs(np.asarray(picture, int) - np.asarray(other, int)).max() <= 1


@pytest.mark.parametrize(
    "compiler",
    [
        # What is compiled when is the same for every compiler, and the real one takes its time.
        "eager",
        pytest.param("inductor", marks=pytest.mark.slow),
    ],
)
def test_compiled_blocks_see_adapters_come_and_go(
    folder: Path, plain: BaseModel, compiler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recare_patch.models.memory.COMPILER", compiler)
    torch._dynamo.reset()
    base = load_base(folder, device="cpu", memory=MemoryOptions(compile=True))
    assert any(one._compiled_call_impl is not None for one in base.denoiser.modules())
    assert base.denoiser_hash() == plain.denoiser_hash()
    for found, wanted in zip(_switched(base), _switched(plain), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
    loss, grads, counted = _step(base)
    wanted_loss, wanted_grads, wanted_count = _step(plain)
    assert loss == pytest.approx(wanted_loss, rel=1e-4) and counted == wanted_count
    for one, other in zip(grads, wanted_grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


@torch.no_grad()
def _switched(base: BaseModel) -> list[torch.Tensor]:
    """Predictions before an adapter, with it, with it off, with it on again, and after it."""
    generator = torch.Generator().manual_seed(2)
    latents = torch.randn((2, *base.latent_shape), generator=generator)
    at, embeds = torch.tensor([100, 800]), base.encode_prompts(["a cat", "stars"])
    found = [base.denoise(latents, at, embeds)]
    for parameter in adapters.attach(
        base.denoiser, layers="cross-attention", rank=2, alpha=2.0, generator=generator
    ):
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    found.append(base.denoise(latents, at, embeds))
    with adapters.off(base.denoiser):
        found.append(base.denoise(latents, at, embeds))
    found.append(base.denoise(latents, at, embeds))
    adapters.detach(base.denoiser)
    found.append(base.denoise(latents, at, embeds))
    assert not torch.allclose(found[0], found[1], atol=1e-3)
    return found


@pytest.mark.parametrize("kind", QUANTIZED)
def test_quantized_weights_come_near(folder: Path, plain: BaseModel, kind: str) -> None:
    base = load_base(folder, device="cpu", memory=MemoryOptions(**QUANTIZED[kind]))  # type: ignore[arg-type]
    assert base.denoiser_hash() == plain.denoiser_hash()
    loss, grads, counted = _step(base)
    wanted, wanted_grads, _ = _step(plain)
    assert loss == pytest.approx(wanted, rel=0.2)
    assert counted == 15
    one, other = (torch.cat([grad.flatten() for grad in found]) for found in (grads, wanted_grads))
    assert torch.nn.functional.cosine_similarity(one, other, dim=0) > 0.9
    sizes = [
        sum(weight.numel() * weight.element_size() for weight in model.denoiser.parameters())
        for model in (base, plain)
    ]
    assert sizes[0] < sizes[1]


def test_a_whole_run_under_levers(tiny_sdxl: Path, tiny_clip: Path, tmp_path: Path) -> None:
    levers = {
        "offload": True,
        "checkpointing": True,
        "encoders_off_device": True,
        "vae_off_device": True,
        "micro_batch": 3,
    }
    recipe = small_recipe(tiny_sdxl, tiny_clip, memory=levers)
    result = erase(recipe, tmp_path / "patch", device="cpu", preview=False)
    told = json.loads((tmp_path / "patch" / "training.json").read_text())
    assert told["memory"] == levers
    assert told["peak_memory_bytes"] >= max(s["peak_memory_bytes"] for s in told["stages"].values()) > 0
    # The same tensors as without it.
    without = erase(
        small_recipe(tiny_sdxl, tiny_clip), tmp_path / "without", device="cpu", preview=False
    ).patch
    for key, tensor in result.patch.tensors.items():
        torch.testing.assert_close(tensor.float(), without.tensors[key].float(), rtol=0.1, atol=2e-3)
    drawn = []
    for memory in (recipe.memory, MemoryOptions()):
        base = load_base(tiny_sdxl, device="cpu", memory=memory)
        before = np.asarray(base.generate(["van gogh"], [0], steps=2)[0], int)
        with Patch.load(tmp_path / "patch").apply(base.pipeline, scale=3.0):
            drawn.append(np.asarray(base.generate(["van gogh"], [0], steps=2)[0], int))
        assert np.array_equal(np.asarray(base.generate(["van gogh"], [0], steps=2)[0], int), before)
        assert np.abs(before - drawn[-1]).max() > 0
    assert np.abs(drawn[0] - drawn[1]).max() <= 1


def test_levers_leave_old_recipes_alone(tiny_sd: Path, tiny_clip: Path) -> None:
    recipe = small_recipe(tiny_sd, tiny_clip)
    # As a patch made before there were levers carries it.
    old = "\n".join(
        line
        for line in recipe.to_yaml().splitlines()
        if not line.startswith("memory:") and line.strip().split(":")[0] not in MemoryOptions.model_fields
    )
    assert Recipe.from_yaml(old).hash == recipe.hash
    assert recipe.with_overrides({"memory.checkpointing": True, "memory.micro_batch": 2}).hash == recipe.hash
    faster = {"memory.channels_last": True, "memory.compile": True}
    assert recipe.with_overrides(faster).hash == recipe.hash
    with pytest.raises(RecipeError, match="compiled ones are closed"):
        recipe.with_overrides({"method": "forget-me-not", "memory.compile": True})
    for change in ({"memory.weights": "nf4"}, {"memory.resolution": "512x384"}):
        assert recipe.with_overrides(change).hash != recipe.hash


def test_resolution(tiny_sdxl: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = load_base(tiny_sdxl, device="cpu", memory=MemoryOptions(resolution="96x40"))
    assert base.latent_shape == (4, 10, 24)
    assert base.generate(["a cat"], [0], steps=1)[0].size == (96, 40)
    caplog.clear()
    load_base(tiny_sdxl, device="cpu", memory=MemoryOptions(resolution="32x32"))
    assert "was not trained on pictures of 32x32: the nearest of its sizes is 64x64" in caplog.text
    with pytest.raises(BaseModelError, match="multiples of 8, such as 48x32"):
        load_base(tiny_sdxl, device="cpu", memory=MemoryOptions(resolution="50x33"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weights": "int4"}, "nf4"),
        ({"offload": True}, "needs checkpointing"),
        ({"offload": True, "checkpointing": True, "weights": "nf4"}, "choose one"),
        ({"compile": True, "weights": "int8"}, "compile does not go with int8 weights"),
        ({"compile": True, "offload": True, "checkpointing": True}, "compile does not go with offload"),
        ({"micro_batch": 0}, "at least 1"),
        ({"resolution": "512"}, "write WIDTHxHEIGHT"),
        ({"checkpoint": True}, "did you mean 'checkpointing'"),
    ],
)
def test_bad_levers(options: dict[str, object], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        MemoryOptions(**options)  # type: ignore[arg-type]
