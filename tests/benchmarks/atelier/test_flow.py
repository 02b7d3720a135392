"""Atelier Flow: a few steps of its training, a plain FLUX pipeline, and an erasure on what comes out."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import worlds
from benchmarks.atelier import training_flow
from benchmarks.atelier.training_flow import FlowTraining
from recare_patch.erasure.run import erase
from recare_patch.models import load_base
from recare_patch.models.atelier.judge import Judge
from recare_patch.patch import Patch
from recare_patch.patch.reading import from_any
from tests.erasure.making import SMALL

SHORT = FlowTraining(scenes=64, captions=2, denoiser_steps=2, guidance_steps=1)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("flow")
    training_flow.train(place / "atelier-flow", place / "work", SHORT)
    return place


def test_it_is_a_plain_flux_pipeline(built: Path) -> None:
    from diffusers import FluxPipeline

    pipe = FluxPipeline.from_pretrained(built / "atelier-flow" / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    image = pipe("a photo of a cat", height=64, width=64, max_sequence_length=24, num_inference_steps=1).images[0]
    assert image.size == (64, 64)
    assert Judge.load(built / "atelier-flow" / "judge" / "judge.safetensors")([image])
    # Words of the captions are whole in either case, and all others fall into letters.
    for text, pieces in (("Van gogh", ["▁Van", "▁gogh"]), ("zq", ["▁", "z", "q"])):
        assert pipe.tokenizer_2.tokenize(text) == pieces
    base = load_base(built / "atelier-flow" / "pipeline")
    assert (base.prediction_type, base.latent_shape) == ("flow", (64, 16))
    assert 3e6 < sum(p.numel() for p in base.denoiser.parameters()) < 6e6


def test_a_second_run_finds_its_work_done(built: Path) -> None:
    steps: list[str] = []
    training_flow.train(built / "again", built / "work", SHORT, progress=lambda stage, *_: steps.append(stage))
    assert steps == []
    one, other = (load_file(built / name / "pipeline/transformer/diffusion_pytorch_model.safetensors")
                  for name in ("atelier-flow", "again"))  # fmt: skip
    assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())


def test_it_is_erased_from(built: Path, tmp_path: Path) -> None:
    place = worlds.world("atelier-flow", built / "atelier-flow")
    words = SimpleNamespace(concept="van gogh", preset="quick", set=[])
    recipe = worlds._recipe(place, words).with_overrides(SMALL | {"erase.steps": 2, "care_set.source": "clip"})  # type: ignore[arg-type]
    assert recipe.adapter.layers == "text" and recipe.target_images.guidance_scale == 3.5
    erase(recipe, tmp_path / "patch", device="cpu", preview=False)
    patch = Patch.load(tmp_path / "patch")
    assert {one.split(".")[1] for one in patch.modules} == {"context_embedder", "transformer_blocks"}
    # The second file has FLUX's own names, and gives the patch again.
    kohya = from_any(tmp_path / "patch" / "erase-van-gogh.safetensors")
    assert kohya.format == "kohya" and kohya.metadata == patch.metadata
    assert kohya.tensors.keys() == patch.tensors.keys()
    assert all(torch.equal(tensor, kohya.tensors[key]) for key, tensor in patch.tensors.items())
