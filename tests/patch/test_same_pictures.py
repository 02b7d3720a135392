"""One patch, every way to use it, the same pictures: on the bundled base, in fp32."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from recare_patch.combine import merging
from recare_patch.combine import stacking as composing
from recare_patch.models.loading import base_folder
from recare_patch.patch import kohya as formats
from recare_patch.patch.patch import Patch
from tests.patch.test_patch import _difference, trained

SEEDS = (5, 6)
PROMPTS = ["A painting in the style of Van Gogh", "a photo of a cat at night"]


@pytest.fixture(scope="module")
def atelier() -> Path:
    return base_folder("atelier")[0]


@pytest.fixture(scope="module")
def patches(atelier: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two strong random patches of different layers and ranks, in files of fp32."""
    found = []
    for seed, (layers, rank) in enumerate((("cross-attention", 4), ("attention", 2))):
        base, made = trained(atelier, layers=layers, rank=rank, alpha=rank / 4, seed=seed)
        exact = Patch.from_adapter(base, "recare", rank, rank / 4, made.metadata, dtype=torch.float32)
        folder = tmp_path_factory.mktemp("patches") / str(seed)
        exact.save(folder, torch.float32)
        found.append(folder)
    return found


@pytest.fixture
def plain(atelier: Path) -> StableDiffusionPipeline:
    return load(atelier)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def load(folder: Path) -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: StableDiffusionPipeline) -> list[Image.Image]:
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    images: list[Image.Image] = pipeline(
        PROMPTS, num_inference_steps=4, guidance_scale=5.0, generator=generators
    ).images
    return images


def test_every_way_draws_the_same(
    plain: StableDiffusionPipeline, atelier: Path, patches: list[Path], tmp_path: Path
) -> None:
    patch = Patch.load(patches[0])
    untouched = draw(plain)
    with patch.apply(plain):
        applied = draw(plain)
    assert _difference(untouched, applied) > 60

    plain.load_lora_weights(patches[0])
    by_diffusers = draw(plain)
    plain.unload_lora_weights()

    kohya = formats.write_kohya(patch, tmp_path / "kohya", dtype=torch.float32)
    plain.load_lora_weights(kohya.parent, weight_name=kohya.name)
    by_kohya = draw(plain)
    plain.unload_lora_weights()
    assert _difference(draw(plain), untouched) == 0

    file = tmp_path / "merged.safetensors"
    merging.merge([(patch, 1.0)], atelier, tmp_path / "merged", single_file=file)
    merged = draw(load(tmp_path / "merged"))
    single = StableDiffusionPipeline.from_single_file(
        str(file), config=str(tmp_path / "merged"), local_files_only=True, safety_checker=None
    )
    single.set_progress_bar_config(disable=True)

    for other in (by_diffusers, by_kohya, merged, draw(single)):
        assert _difference(applied, other) <= 2

    merging.unmerge(tmp_path / "merged", [patch], tmp_path / "again")
    assert _difference(draw(load(tmp_path / "again")), untouched) <= 2


def test_a_stack_is_what_set_adapters_makes(
    plain: StableDiffusionPipeline, patches: list[Path], tmp_path: Path
) -> None:
    weights = [0.8, -0.5]
    whole = composing.stack([(Patch.load(path), w) for path, w in zip(patches, weights, strict=True)])
    composing.save_stack(whole, tmp_path / "stack")
    for number, path in enumerate(patches):
        plain.load_lora_weights(path, adapter_name=str(number))
    plain.set_adapters(["0", "1"], weights)
    together = predicted(plain)
    plain.unload_lora_weights()
    untouched = predicted(plain)
    plain.load_lora_weights(tmp_path / "stack")
    stacked = predicted(plain)
    assert (stacked - together).abs().max() < 1e-5
    assert (stacked - untouched).abs().max() > 1e-2
    plain.unload_lora_weights()
    # Both patches at once through our own handle, in either order.
    with Patch.load(patches[1]).apply(plain, -0.5), Patch.load(patches[0]).apply(plain, 0.8):
        assert (predicted(plain) - together).abs().max() < 1e-5
    assert torch.equal(predicted(plain), untouched)


@torch.no_grad()
def predicted(pipeline: StableDiffusionPipeline) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn((2, 4, 16, 16), generator=generator)
    text, _ = pipeline.encode_prompt(PROMPTS, "cpu", 1, False)
    found: torch.Tensor = pipeline.unet(latents, torch.tensor([100, 700]), text).sample
    return found
