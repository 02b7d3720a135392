"""One patch, every way to use it, the same pictures: on the bundled base, in fp32."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline

from recare_patch.combine import merging
from recare_patch.combine import stacking as composing
from recare_patch.models import base_folder
from recare_patch.patch import Patch, write_kohya
from tests.patch.making import difference, draw, plain, trained

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
        found.append(exact.save(tmp_path_factory.mktemp("patches") / str(seed), torch.float32).parent)
    return found


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_every_way_draws_the_same(atelier: Path, patches: list[Path], tmp_path: Path) -> None:
    pipe, patch = plain(atelier), Patch.load(patches[0])
    untouched = draw(pipe, PROMPTS)
    with patch.apply(pipe):
        applied = draw(pipe, PROMPTS)
    assert difference(untouched, applied) > 60
    drawn = []
    kohya = write_kohya(patch, tmp_path / "kohya", dtype=torch.float32)
    for folder, name in ((patches[0], None), (kohya.parent, kohya.name)):
        pipe.load_lora_weights(folder, weight_name=name)
        drawn.append(draw(pipe, PROMPTS))
        pipe.unload_lora_weights()
    assert difference(draw(pipe, PROMPTS), untouched) == 0
    file = tmp_path / "merged.safetensors"
    merging.merge([(patch, 1.0)], atelier, tmp_path / "merged", single_file=file)
    single = StableDiffusionPipeline.from_single_file(
        str(file), config=str(tmp_path / "merged"), local_files_only=True, safety_checker=None
    )
    drawn += [draw(plain(tmp_path / "merged"), PROMPTS), draw(single, PROMPTS)]
    assert max(difference(applied, other) for other in drawn) <= 2
    merging.unmerge(tmp_path / "merged", [patch], tmp_path / "again")
    assert difference(draw(plain(tmp_path / "again"), PROMPTS), untouched) <= 2


@torch.no_grad()
def predicted(pipeline: Any) -> torch.Tensor:
    latents = torch.randn((2, 4, 16, 16), generator=torch.Generator().manual_seed(0))
    text, _ = pipeline.encode_prompt(PROMPTS, "cpu", 1, False)
    found: torch.Tensor = pipeline.unet(latents, torch.tensor([100, 700]), text).sample
    return found


def test_a_stack_is_what_set_adapters_makes(atelier: Path, patches: list[Path], tmp_path: Path) -> None:
    pipe, weights = plain(atelier), [0.8, -0.5]
    whole = composing.stack([(Patch.load(path), w) for path, w in zip(patches, weights, strict=True)])
    composing.save_stack(whole, tmp_path / "stack")
    for number, path in enumerate(patches):
        pipe.load_lora_weights(path, adapter_name=str(number))
    pipe.set_adapters(["0", "1"], weights)
    together = predicted(pipe)
    pipe.unload_lora_weights()
    untouched = predicted(pipe)
    pipe.load_lora_weights(tmp_path / "stack")
    stacked = predicted(pipe)
    assert (stacked - together).abs().max() < 1e-5 and (stacked - untouched).abs().max() > 1e-2
    pipe.unload_lora_weights()
    # Both patches at once through our own handle, in either order.
    with Patch.load(patches[1]).apply(pipe, -0.5), Patch.load(patches[0]).apply(pipe, 0.8):
        assert (predicted(pipe) - together).abs().max() < 1e-5
    assert torch.equal(predicted(pipe), untouched)
