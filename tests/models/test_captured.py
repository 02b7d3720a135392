"""Bases made from a pipeline's own calls: the same as a class of their own, and what is refused in one sentence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from recare_patch.core import BaseModelError
from recare_patch.models import defaults_for, load_base, lora, read_layout
from recare_patch.models.captured import Captured
from recare_patch.recipe import MemoryOptions, preset_overrides
from tests.pipelines import make_pipeline


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pipeline("FLUX.1 dev", tmp_path_factory.mktemp("tiny") / "tiny-flux")


@pytest.mark.parametrize("name", ["tiny_sd", "tiny_sd_v", "tiny_sdxl", "tiny_sd3"])
def test_the_general_way_is_the_class_of_its_own(name: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(name)
    layout, own = read_layout(folder, name), load_base(folder, device="cpu")
    general = Captured.of(layout).load(layout, name, torch.float32, torch.device("cpu"), MemoryOptions())
    assert (general.latent_shape, general.prediction_type) == (own.latent_shape, own.prediction_type)
    prompts, generator = ["a cat", "a painting by van gogh", "a house at night"], torch.Generator().manual_seed(0)
    clean, noise = torch.randn((2, 3, *own.latent_shape), generator=generator)
    at, found = torch.tensor([20, 400, 950]), []
    for base in (own, general):
        states = base.add_noise(clean, noise, at)
        with torch.no_grad():
            made = base.denoise(states, at, base.encode_prompts(prompts))
            vectors = base.encode_with_vectors(["a photo of <*>"], base.word_vector("cat")[None])
            named = base.denoise(states[:1], at[:1], vectors)
        latents = base.sample_latents(base.encode_prompts(prompts[:2]), [0, 1], steps=2, guidance_scale=5.0)
        found.append((made, named, latents, base.training_target(clean, noise, at)))
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-5)


def test_a_flux_shaped_base_asks_for_the_layers_of_its_text(flux: Path) -> None:
    asked = defaults_for(str(flux))
    assert asked.values["adapter.layers"] == "text" and asked.of_method["closed"]["adapter.layers"] == "text-input"
    # A preset was chosen on other layers: here it says nothing of them.
    assert not any(key.startswith("adapter.") for key in asked.preset(preset_overrides("robust")))
    base = load_base(flux, device="cpu", memory=MemoryOptions(resolution="32x32"))
    assert lora.target_modules(base.denoiser, "text-input") == ["context_embedder"]
    text = lora.target_modules(base.denoiser, "text")
    assert any("add_k_proj" in one for one in text) and any("ff_context" in one for one in text)
    assert not any("single" in one for one in text)
    assert any("single" in one for one in lora.target_modules(base.denoiser, "attention"))


class TestRefusals:
    """Each in one sentence, before weights are read."""

    @pytest.fixture
    def copy(self, flux: Path, tmp_path: Path) -> Path:
        return Path(shutil.copytree(flux, tmp_path / "copy"))

    def _edit(self, file: Path, **changes: Any) -> None:
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    def _refused(self, folder: Path, match: str) -> None:
        with pytest.raises(BaseModelError, match=match) as caught:
            load_base(folder, device="cpu")
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("kind", "match"),
        [
            ("DDPMPipeline", "reads no prompt: a text-to-image pipeline is needed"),
            ("WanPipeline", "draws videos"),
            ("SanaVideoPipeline", "draws videos"),
            ("FluxFillPipeline", "fills holes in pictures"),
            ("WanImageToVideoPipeline", "draws videos"),
            ("StableCascadeDecoderPipeline", "not called 'unet' or 'transformer'"),
            ("PRXPixelPipeline", "draws in pixels: a pipeline with one denoiser and one autoencoder is needed"),
            ("FluxControlNetPipeline", "has a part 'controlnet'"),
            ("ToTheMoonPipeline", "no pipeline of the installed diffusers"),
        ],
    )
    def test_other_pipelines(self, copy: Path, kind: str, match: str) -> None:
        self._edit(copy / "model_index.json", _class_name=kind)
        self._refused(copy, match)

    @pytest.mark.parametrize(
        "part", ["transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer_2", "scheduler"]
    )
    def test_a_component_is_missing(self, copy: Path, part: str) -> None:
        shutil.rmtree(copy / part)
        self._refused(copy, f"lacks its component '{part}'")

    def test_a_quantized_denoiser_cannot_be_trained(self, copy: Path) -> None:
        self._edit(copy / "transformer" / "config.json", quantization_config={"quant_method": "gguf"})
        self._refused(copy, "was quantized by gguf: give the plain weights")

    def test_a_size_that_it_cannot_draw(self, tmp_path: Path) -> None:
        sana = make_pipeline("Sana", tmp_path / "sana")
        with pytest.raises(BaseModelError, match=r"cannot draw 48x48 pixels: .* divisible by 32"):
            load_base(sana, device="cpu", memory=MemoryOptions(resolution="48x48"))
