"""Memory levers: each gives what the plain run gives, or nearly, and does what it is for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recare_patch.core import BaseModelError, RecipeError
from recare_patch.erasure import erase
from recare_patch.models import BaseModel, load_base
from recare_patch.models import lora as adapters
from recare_patch.patch import Patch
from recare_patch.recipe import MemoryOptions, Recipe
from tests.models.test_architectures import small_recipe

LEVERS: dict[str, dict[str, Any]] = {
    "encoders": {"encoders_off_device": True},
    "vae": {"vae_off_device": True},
    "tiling": {"vae_tiling": True},
    "checkpointing": {"checkpointing": True},
    "micro batch": {"micro_batch": 2},
    "both": {"checkpointing": True, "micro_batch": 1},
    "offload": {"offload": True, "checkpointing": True},
    "channels last": {"channels_last": True},
}


def _attached(base: BaseModel, scale: float) -> list[torch.nn.Parameter]:
    """An adapter that does something."""
    generator = torch.Generator().manual_seed(0)
    found = adapters.attach(base.denoiser, layers="cross-attention", rank=2, alpha=2.0, generator=generator)
    with torch.no_grad():
        for parameter in found[1::2]:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return found


def _step(base: BaseModel) -> tuple[float, list[torch.Tensor], int]:
    """Loss and gradients of five rows through an adapter, and what was counted."""
    parameters = _attached(base, 0.1)
    latents = torch.randn((5, *base.latent_shape), generator=torch.Generator().manual_seed(1))
    embeds = base.encode_prompts(["a cat", "", "stars", "a boat", "night"])
    before = base.counter.total
    loss = base.denoise(latents, torch.tensor([10, 200, 400, 600, 900]), embeds).square().mean()
    loss.backward()
    grads = [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]
    adapters.detach(base.denoiser)
    return loss.item(), grads, base.counter.total - before


def _same_steps(base: BaseModel, plain: BaseModel) -> None:
    assert base.denoiser_hash() == plain.denoiser_hash()
    (loss, grads, counted), (wanted, wanted_grads, _) = _step(base), _step(plain)
    assert loss == pytest.approx(wanted, rel=1e-4)
    assert len(grads) > 0 and counted == 15
    torch.testing.assert_close(grads, wanted_grads, rtol=1e-3, atol=1e-5)


def _drawn(base: BaseModel, *prompts: str) -> np.ndarray[Any, Any]:
    images = base.generate(prompts, list(range(len(prompts))), steps=2, guidance_scale=4.0)
    return np.stack([np.asarray(image, int) for image in images])


@pytest.fixture(scope="module", params=["tiny_sdxl", "tiny_sd3"])
def folder(request: pytest.FixtureRequest) -> Path:
    found: Path = request.getfixturevalue(request.param)
    return found


@pytest.fixture(scope="module")
def plain(folder: Path) -> BaseModel:
    return load_base(folder, device="cpu")


@pytest.mark.parametrize("lever", LEVERS)
def test_a_lever_changes_no_result(folder: Path, plain: BaseModel, lever: str) -> None:
    base = load_base(folder, device="cpu", memory=MemoryOptions(**LEVERS[lever]))
    _same_steps(base, plain)
    apart = np.abs(_drawn(base, "a cat", "stars") - _drawn(plain, "a cat", "stars")).max()
    # Tiles are cut, and each sees less of the picture around it.
    assert (apart > 1) == (lever == "tiling")


# What is compiled when is the same for every compiler, and the real one takes its time.
@pytest.mark.parametrize("compiler", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_blocks_see_adapters_come_and_go(
    folder: Path, plain: BaseModel, compiler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recare_patch.models.memory.COMPILER", compiler)
    torch._dynamo.reset()
    base = load_base(folder, device="cpu", memory=MemoryOptions(compile=True))
    assert any(one._compiled_call_impl is not None for one in base.denoiser.modules())
    torch.testing.assert_close(_switched(base), _switched(plain), rtol=1e-3, atol=1e-4)
    _same_steps(base, plain)


@torch.no_grad()
def _switched(base: BaseModel) -> list[torch.Tensor]:
    """Predictions before an adapter, with it, with it off, with it on again, and after it."""
    latents = torch.randn((2, *base.latent_shape), generator=torch.Generator().manual_seed(2))
    given = latents, torch.tensor([100, 800]), base.encode_prompts(["a cat", "stars"])
    found = [base.denoise(*given)]
    _attached(base, 1.0)
    found.append(base.denoise(*given))
    with adapters.off(base.denoiser):
        found.append(base.denoise(*given))
    found.append(base.denoise(*given))
    adapters.detach(base.denoiser)
    found.append(base.denoise(*given))
    assert not torch.allclose(found[0], found[1], atol=1e-3)
    return found


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_quantized_weights_come_near(folder: Path, plain: BaseModel, kind: str) -> None:
    base = load_base(folder, device="cpu", memory=MemoryOptions(weights=kind))
    assert base.denoiser_hash() == plain.denoiser_hash()
    (loss, grads, counted), (wanted, wanted_grads, _) = _step(base), _step(plain)
    assert loss == pytest.approx(wanted, rel=0.2)
    assert counted == 15
    one, other = (torch.cat([grad.flatten() for grad in found]) for found in (grads, wanted_grads))
    assert torch.nn.functional.cosine_similarity(one, other, dim=0) > 0.9
    small, large = (sum(p.nbytes for p in model.denoiser.parameters()) for model in (base, plain))
    assert small < large


def test_a_whole_run_under_levers(tiny_sdxl: Path, tiny_clip: Path, tmp_path: Path) -> None:
    flags = ("offload", "checkpointing", "encoders_off_device", "vae_off_device")
    levers = {**dict.fromkeys(flags, True), "micro_batch": 3}
    # Which words a random model confirms may hang on the last digits of a sum.
    recipe = small_recipe(tiny_sdxl, tiny_clip, **{"care_set.source": "clip"})
    with_levers, without = (
        erase(recipe.with_overrides({"memory": memory}), tmp_path / name, device="cpu", preview=False)
        for name, memory in (("patch", levers), ("without", {}))
    )
    told = json.loads((tmp_path / "patch" / "training.json").read_text())
    assert told["memory"] == levers
    assert told["peak_memory_bytes"] >= max(s["peak_memory_bytes"] for s in told["stages"].values()) > 0
    for key, tensor in with_levers.patch.tensors.items():
        torch.testing.assert_close(tensor.float(), without.patch.tensors[key].float(), rtol=0.1, atol=2e-3)
    drawn = []
    for memory in (MemoryOptions(**levers), MemoryOptions()):
        base = load_base(tiny_sdxl, device="cpu", memory=memory)
        before = _drawn(base, "van gogh")
        with Patch.load(tmp_path / "patch").apply(base.pipeline, scale=3.0):
            drawn.append(_drawn(base, "van gogh"))
        assert np.array_equal(_drawn(base, "van gogh"), before)
        assert np.abs(before - drawn[-1]).max() > 0
    assert np.abs(drawn[0] - drawn[1]).max() <= 1


def test_levers_leave_old_recipes_alone(tiny_sd: Path, tiny_clip: Path) -> None:
    recipe = small_recipe(tiny_sd, tiny_clip)
    # As a patch made before there were levers carries it.
    new = {"memory", *MemoryOptions.model_fields}
    old = [line for line in recipe.to_yaml().splitlines() if line.strip().split(":")[0] not in new]
    assert Recipe.from_yaml("\n".join(old)) == recipe
    with pytest.raises(RecipeError, match="compiled ones are closed"):
        recipe.with_overrides({"method": "forget-me-not", "memory.compile": True})


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
def test_bad_levers(options: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        MemoryOptions(**options)
