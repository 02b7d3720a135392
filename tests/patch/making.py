"""Strong random patches, and what a pipeline draws and is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import save_file

from recare_patch.careset import CareSet
from recare_patch.core import file_sha256, write_json
from recare_patch.measure import Evidence, with_evidence
from recare_patch.models import BaseModel, load_base
from recare_patch.models import lora as adapters
from recare_patch.patch import Patch, PatchMetadata, card_text
from recare_patch.recipe import Concept, Recipe

PROMPTS, SEEDS = ["a painting in the style of van gogh", "a photo of a cat"], [5, 6]


def trained(
    folder: Path,
    *,
    layers: str = "cross-attention",
    rank: int = 2,
    alpha: float = 6.0,
    seed: int = 0,
    concept: str = "Van Gogh",
) -> tuple[BaseModel, Patch]:
    """A base that holds a strong random adapter in its denoiser or its text encoders, and its patch."""
    base = load_base(folder, device="cpu")
    generator = torch.Generator().manual_seed(seed)
    for network in adapters.adapted(base, layers).values():
        given = adapters.attach(network, layers=layers, rank=rank, alpha=alpha, generator=generator)
        for parameter in given:
            parameter.data.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    recipe = Recipe(
        concept={"text": concept, "kind": "style"},  # type: ignore[arg-type]
        method="s-grace" if layers == "text-encoder" else "recare",
        adapter={"layers": layers, "rank": rank, "alpha": alpha},  # type: ignore[arg-type]
        base=str(folder),
    )
    care = None if layers == "text-encoder" else CareSet.of_words(recipe.concept, ["stars"])
    metadata = PatchMetadata.describe(recipe, base, care, {"torch": "2"})
    return base, Patch.from_adapter(base, "recare", rank, alpha, metadata)


def plain(folder: Path) -> StableDiffusionPipeline:
    """The pipeline as diffusers loads it."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: Any, prompts: Sequence[str] | None = PROMPTS, steps: int = 3, **options: Any) -> list[Image.Image]:
    """A picture of each prompt at its seed of :data:`SEEDS`, and the following ones, as a base draws them."""
    given = prompts if prompts is not None else options["prompt_embeds"]
    count = len(given) * options.get("num_images_per_prompt", 1)
    generators = [torch.Generator().manual_seed(SEEDS[0] + k) for k in range(count)]
    options = {"guidance_scale": 5.0, "generator": generators} | options
    images: list[Image.Image] = pipeline(prompts, num_inference_steps=steps, **options).images
    return images


def difference(first: Sequence[Image.Image], second: Sequence[Image.Image]) -> int:
    """The largest, of 255."""
    pairs = zip(first, second, strict=True)
    return max(int(np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max()) for a, b in pairs)


def state(pipeline: Any) -> dict[str, Any]:
    """Everything that a patch could leave changed."""
    found: dict[str, Any] = {
        "adapters": pipeline.get_list_adapters(),
        "active": pipeline.get_active_adapters() if pipeline.get_list_adapters() else [],
        "random": torch.get_rng_state().tolist(),
        "encode_prompt": "encode_prompt" in vars(pipeline),
    }
    for part in ("unet", "text_encoder"):
        network = getattr(pipeline, part)
        found[part] = {
            "modules": [(name, type(module), module.training) for name, module in network.named_modules()],
            "gradients": [(name, p.requires_grad) for name, p in network.named_parameters()],
            "configs": sorted(getattr(network, "peft_config", {})),
            "loaded": bool(network._hf_peft_config_loaded),
            "weights": {name: hash(tensor.numpy().tobytes()) for name, tensor in network.state_dict().items()},
        }
    return found


def same(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> None:
    """The same tensors to the bit, under the same names."""
    assert first.keys() == second.keys()
    for key, tensor in first.items():
        assert tensor.dtype == second[key].dtype and torch.equal(tensor, second[key]), key


def pair(rank: int = 2, inner: int = 6, outer: int = 5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors of random numbers."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rank, inner, generator=generator), torch.randn(outer, rank, generator=generator)


def factors(*names: str, **sizes: int) -> dict[str, torch.Tensor]:
    """A patch's tensors for layers of these full names."""
    return {f"{name}.lora_{side}.weight": one for name in names for side, one in zip("AB", pair(**sizes), strict=True)}


def file_of(place: Path, tensors: Mapping[str, torch.Tensor], header: dict[str, str] | None = None) -> Path:
    """A safetensors file; ``place`` is it, or its folder."""
    file = place if place.suffix else place / "x.safetensors"
    save_file(dict(tensors), file, header)
    return file


def write_patch(folder: Path, patch: Patch, evidence: Evidence | None = None) -> Path:
    """The files of a patch as a run and its evaluation leave them."""
    weights = patch.save(folder)
    about = patch.metadata
    assert about is not None and about.recipe is not None
    training = {"patch_sha256": file_sha256(weights), "seconds": 1.5, "denoiser_evaluations": 12}
    write_json(folder / "training.json", training)
    (folder / "recipe.yaml").write_text(about.recipe)
    if about.care_set is not None:
        (folder / "care_set.json").write_text(about.care_set)
    Image.new("RGB", (32, 16), "navy").save(folder / "preview.png")
    card = card_text(about, training)
    if evidence is not None:
        same = ("base", "base_denoiser_sha256", "concept", "kind", "method")
        changes = {"patch_sha256": file_sha256(weights)} | {key: getattr(about, key) for key in same}
        evidence = evidence.model_copy(update=changes)
        evidence.save(folder)
        card = with_evidence(card, evidence)
    (folder / "README.md").write_text(card)
    return folder


def as_another(patch: Patch, concept: str, kind: str) -> Patch:
    """The same tensors, said to erase something else."""
    assert patch.metadata is not None
    erased = Concept(text=concept, kind=kind)  # type: ignore[arg-type]
    recipe = patch.metadata.parsed_recipe.model_copy(update={"concept": erased})
    care = CareSet.of_words(erased, ["stars"]).to_json()
    changes = {"concept": concept, "kind": kind, "recipe": recipe.to_yaml(), "care_set": care}
    return Patch(patch.tensors, patch.metadata.model_copy(update=changes))
