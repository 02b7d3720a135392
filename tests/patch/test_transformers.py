"""LoRAs for transformers: keys as each pipeline writes them, and the original checkpoints' names, there and back.

What ComfyUI makes of a fused weight is its ``z_image_to_diffusers``, ``flux_to_diffusers`` and ``mmdit_to_diffusers``:
the rows of queries, keys and values one below another, and in FLUX.1's single blocks the MLP's below them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from recare_patch.core import PatchError, read_safetensors_header
from recare_patch.patch import Patch, has_kohya_names, write_kohya
from recare_patch.patch.kohya import RANKS_KEY, to_kohya
from recare_patch.patch.reading import from_any
from recare_patch.patch.transformers import KINDS
from tests.patch.making import file_of, same

_ONE = {"num_layers": 1}
SIZES: dict[str, tuple[str, dict[str, Any]]] = {
    "FluxTransformer2DModel": ("FluxPipeline", _ONE | {"num_single_layers": 1, "guidance_embeds": True}),
    "ChromaTransformer2DModel": ("ChromaPipeline", _ONE | {"num_single_layers": 1}),
    "Flux2Transformer2DModel": ("Flux2Pipeline", _ONE | {"num_single_layers": 1}),
    "SD3Transformer2DModel": ("StableDiffusion3Pipeline", {"num_layers": 2, "dual_attention_layers": (0,)}),
    "ZImageTransformer2DModel": ("ZImagePipeline", {"n_layers": 1, "n_refiner_layers": 1}),
    "Lumina2Transformer2DModel": ("Lumina2Pipeline", _ONE | {"num_refiner_layers": 1}),
    "QwenImageTransformer2DModel": ("QwenImagePipeline", _ONE),
    "Krea2Transformer2DModel": ("Krea2Pipeline", _ONE),
}
"""Published widths, few blocks: every name and size is a real model's."""


@cache
def shapes(name: str) -> dict[str, tuple[int, ...]]:
    """Each layer that a LoRA can change, with its weight's shape; nothing is allocated."""
    with torch.device("meta"):
        model = getattr(diffusers, name)(**SIZES[name][1])
    layers = (nn.Linear, nn.Conv2d)
    return {full: tuple(one.weight.shape) for full, one in model.named_modules() if isinstance(one, layers)}


def patch_of(name: str, wanted: Callable[[str], bool] = lambda _: True, rank: int = 1) -> Patch:
    """A random LoRA of those layers; ranks differ."""
    generator, tensors = torch.Generator().manual_seed(3), {}
    for i, (module, (outer, *inner)) in enumerate(m for m in shapes(name).items() if wanted(m[0])):
        own = rank + i % 2
        tensors[f"transformer.{module}.lora_A.weight"] = torch.randn(own, *inner, generator=generator).half()
        up = torch.randn(outer, own, *([1] * (len(inner) - 1)), generator=generator).half()
        tensors[f"transformer.{module}.lora_B.weight"] = up
    return Patch(tensors)


def changes(down: Tensor, up: Tensor) -> Tensor:
    """What a LoRA adds to a layer's output for some inputs: whole updates of these widths fill gigabytes."""
    inputs = torch.randn(down.shape[1], 3, generator=torch.Generator().manual_seed(4))
    return up.float() @ (down.float() @ inputs)


def as_dict(patch: Patch) -> dict[str, Tensor]:
    return dict(patch.tensors)


@pytest.mark.parametrize("name", SIZES)
def test_keys_are_those_that_the_pipeline_writes(name: str, tmp_path: Path) -> None:
    made, pipeline = patch_of(name), getattr(diffusers, SIZES[name][0])
    bare = {key.removeprefix("transformer."): tensor for key, tensor in made.tensors.items()}
    pipeline.save_lora_weights(tmp_path, transformer_lora_layers=bare)
    same(Patch.load(tmp_path).tensors, made.tensors)
    own = made.save(tmp_path / "ours")
    assert load_file(own).keys() == load_file(tmp_path / "pytorch_lora_weights.safetensors").keys()
    same(pipeline.lora_state_dict(str(own.parent)), as_dict(made))


@pytest.mark.parametrize("name", SIZES)
def test_there_and_back(name: str, tmp_path: Path) -> None:
    """kohya's file has the original names alone, and gives the same tensors again; so do those names with dots."""
    made = patch_of(name)
    told = {"denoiser_class": name}
    tensors, header = to_kohya(made, **told)  # type: ignore[arg-type]
    assert all(key.startswith("lora_unet_") for key in tensors)
    same(from_any(file_of(tmp_path / "k.safetensors", tensors, header)).tensors, made.tensors)
    # Without our header the layers get what changes them.
    plain = {key: tensor for key, tensor in header.items() if key != RANKS_KEY}
    same(from_any(file_of(tmp_path / "p.safetensors", tensors, plain)).tensors, made.tensors)
    kind = next(kind for kind in KINDS if name in kind.classes)
    dotted = {_dotted(kind, key): tensor for key, tensor in tensors.items() if not key.endswith("alpha")}
    read = from_any(file_of(tmp_path / "c.safetensors", dotted))
    assert read.format == "comfyui"
    same(read.tensors, made.tensors)


def _dotted(kind: Any, key: str) -> str:
    short, _, end = key.removeprefix("lora_unet_").partition(".")
    return f"diffusion_model.{kind.named(short)}.{end.replace('lora_down', 'lora_A').replace('lora_up', 'lora_B')}"


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("FluxTransformer2DModel", lambda one: "blocks" in one),
        ("FluxTransformer2DModel", lambda one: "add_k" in one or "add_v" in one),
        ("Flux2Transformer2DModel", lambda one: "blocks" in one or one == "context_embedder"),
        ("ZImageTransformer2DModel", lambda one: "final" not in one and "all_x" not in one),
        ("QwenImageTransformer2DModel", lambda one: True),
    ],
)
def test_diffusers_reads_the_original_names(name: str, wanted: Callable[[str], bool], tmp_path: Path) -> None:
    """The pipeline's own loader finds in kohya's file the updates of the patch, and no others."""
    made = patch_of(name, wanted, rank=2)
    file = write_kohya(made, tmp_path, dtype=torch.float32, denoiser_class=name)
    found = getattr(diffusers, SIZES[name][0]).lora_state_dict(str(tmp_path), weight_name=file.name)
    updates = {key.replace(".lora_A.weight", ""): key for key in found if ".lora_A." in key}
    for module, key in updates.items():
        update = changes(found[key], found[key.replace("lora_A", "lora_B")])
        if module in made.modules:
            assert torch.allclose(update, changes(*made.factors(module)), rtol=1e-3, atol=1e-3), module
        else:
            assert not update.any(), module
    assert set(made.modules) <= set(updates)


def test_fused_weights_are_what_comfyui_expects() -> None:
    made = patch_of("FluxTransformer2DModel", lambda one: one.startswith("single"))
    tensors = to_kohya(made)[0]
    down, up = (tensors[f"lora_unet_single_blocks_0_linear1.lora_{one}.weight"].float() for one in ("down", "up"))
    parts = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
    stem = "transformer.single_transformer_blocks.0."
    apart = changes(down, up) - torch.cat([changes(*made.factors(stem + one)) for one in parts])
    assert apart.abs().max() < 1e-3
    # What is not changed has zeros.
    made = patch_of("ZImageTransformer2DModel", lambda one: one.startswith("layers") and one.endswith("to_k"))
    up = to_kohya(made)[0]["lora_unet_layers_0_attention_qkv.lora_up.weight"]
    q, k, v = up.chunk(3)
    assert not q.any() and k.all() and not v.any() and up.shape[1] == 1
    # Scale and shift stand the other way round in the last layer.
    for name in ("FluxTransformer2DModel", "SD3Transformer2DModel"):
        made = patch_of(name, lambda one: one == "norm_out.linear")
        turned = to_kohya(made, denoiser_class=name)[0]["lora_unet_final_layer_adaLN_modulation_1.lora_up.weight"]
        scale, shift = made.factors("transformer.norm_out.linear")[1].chunk(2)
        assert torch.equal(turned, torch.cat([shift, scale]))


def test_files_of_other_trainers(tmp_path: Path) -> None:
    """One dense LoRA for queries, keys and values; alphas; diffusers' names after ComfyUI's prefix; OneTrainer's."""
    down, up = torch.randn(4, 3840), torch.randn(3 * 3840, 4)
    name = "lora_unet_context_refiner_0_attention_qkv"
    dense = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(2.0)}
    read = from_any(file_of(tmp_path, dense))
    updates = [changes(*read.factors(f"transformer.context_refiner.0.attention.to_{one}")) for one in "qkv"]
    assert torch.allclose(torch.cat(updates), changes(down, up) / 2, atol=1e-2)
    split = {f"diffusion_model.layers.0.attention.to_q.lora_{s}.weight": t for s, t in (("A", down), ("B", up[:3840]))}
    assert from_any(file_of(tmp_path, split)).modules == ("transformer.layers.0.attention.to_q",)
    key = "lora_transformer_single_transformer_blocks_0_attn_to_q.lora_{}.weight"
    one_trainer = {key.format("down"): torch.ones(1, 8), key.format("up"): torch.ones(8, 1)}
    read = from_any(file_of(tmp_path, one_trainer))
    assert read.modules == ("transformer.single_transformer_blocks.0.attn.to_q",)
    text = "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.lora_{}.weight"
    both = split | {text.format("A"): torch.ones(1, 8), text.format("B"): torch.ones(8, 1)}
    assert from_any(file_of(tmp_path, both)).components == ("transformer", "text_encoder")


def test_what_fits_several_or_none(tmp_path: Path) -> None:
    def refused(tensors: Mapping[str, Tensor], told: str, header: dict[str, str] | None = None) -> None:
        save_file(dict(tensors), tmp_path / "x.safetensors", header)
        with pytest.raises(PatchError, match=told) as caught:
            from_any(tmp_path / "x.safetensors")
        assert "\n" not in str(caught.value)

    either = patch_of("FluxTransformer2DModel", lambda one: "add_" in one)
    assert not has_kohya_names(either)
    with pytest.raises(PatchError, match="or --base says which model"):
        to_kohya(either)
    odd = "lora_unet_double_blocks_0_img_attn_qkv.lora_{}.weight"
    refused({odd.format("down"): torch.ones(2, 8), odd.format("up"): torch.ones(20, 2)}, "layers of another size")
    kernel = {odd.format("down"): torch.ones(2, 8, 1, 1), odd.format("up"): torch.ones(24, 2, 1, 1)}
    refused(kernel, "of another size")
    conv = {"A": torch.ones(2, 8, 1, 1), "B": torch.ones(8, 2, 1, 1)}
    made = Patch({f"transformer.layers.0.attention.to_q.lora_{side}.weight": one for side, one in conv.items()})
    with pytest.raises(PatchError, match="of another size"):
        to_kohya(made)
    w1 = "diffusion_model.layers.0.feed_forward.w1.lora_{}.weight"
    refused({w1.format("A"): torch.ones(2, 8), w1.format("B"): torch.ones(8, 2)}, "say with --base for which")
    tensors, header = to_kohya(patch_of("ZImageTransformer2DModel"))
    name = "lora_unet_layers_0_attention_qkv"
    first, second, third = json.loads(header[RANKS_KEY])[name]
    for ranks, told in (([second, first, third], "hides ranks"), ([1, 1], "another size"), (9, "malformed")):
        refused(tensors, told, header | {RANKS_KEY: json.dumps({name: ranks})})
    both = {f"diffusion_model.layers.0.attention.{one}.lora_{s}.weight": torch.ones(shape)
            for one, rows in (("qkv", 24), ("to_q", 8)) for s, shape in (("A", (1, 8)), ("B", (rows, 1)))}  # fmt: skip
    refused(both, "twice")


def test_the_header_says_which_model(tmp_path: Path) -> None:
    file = write_kohya(patch_of("FluxTransformer2DModel", lambda one: "single" in one), tmp_path)
    header = read_safetensors_header(file).metadata
    expected = {"ss_network_module": "networks.lora_flux", "ss_base_model_version": "flux1", "ss_v2": "False",
                "modelspec.architecture": "flux-1/lora", "modelspec.resolution": "1024x1024"}  # fmt: skip
    assert expected.items() <= header.items()
