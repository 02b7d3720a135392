"""Which weight of the model A1111 and ComfyUI find under each name that is written for them.

Their rules are facts of their sources, told here in tables of our own:

* A1111, AUTOMATIC1111/stable-diffusion-webui, ``extensions-builtin/Lora/networks.py``: a name is turned
  into that of a module of the original model (``convert_diffusers_name_to_compvis``, three entries a
  block); a name that is unknown is tried with ``diffusion_model`` for ``lora_unet``, and with
  ``0_transformer_text_model`` and ``transformer_text_model`` for ``lora_te1_text_model``
  (``load_network``); ``…_q_proj`` and its like name the whole ``MultiheadAttention`` where there is no
  module of that name (``re_x_proj``). The scale is ``alpha / dim``, ``dim`` the rows of ``lora_down``
  (``network.py``, ``network_lora.py``).
* ComfyUI, comfyanonymous/ComfyUI, ``comfy/lora.py`` and ``unet_to_diffusers`` in ``comfy/utils.py``: a
  dictionary from name to weight, of the original names with underscores and of diffusers' names; text
  encoders by ``LORA_CLIP_MAP``. The scale is ``alpha / rank``.

What the weights of a real model are called is taken from ``recare_patch.patch.original_layout``,
which diffusers' own converter bears out in ``tests/combine/test_merging.py``.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from recare_patch.patch import Patch, write_kohya
from recare_patch.patch.kohya import to_kohya
from recare_patch.patch.original_layout import unet_name
from recare_patch.patch.reading import from_any

UNETS: dict[str, dict[str, Any]] = {
    "SD 1.5": {"cross_attention_dim": 768, "attention_head_dim": 8},
    "SD 2.1": {
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
    },
    "SDXL": {
        "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "block_out_channels": (320, 640, 1280),
        "transformer_layers_per_block": (1, 2, 10),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
        "use_linear_projection": True,
    },
}
A1111_MISSES = {
    "SD 1.5": set(),
    "SD 2.1": set(),
    # By diffusers' names A1111 takes the first upsampler for SD 1's, which stands at another place, and
    # does not know the embedding of sizes. Only the layer set "all" changes them.
    "SDXL": {"up_blocks.0.upsamplers.0.conv", "add_embedding.linear_1", "add_embedding.linear_2"},
}
RESNET = {
    "conv1": "in_layers_2",
    "conv2": "out_layers_3",
    "time_emb_proj": "emb_layers_1",
    "conv_shortcut": "skip_connection",
}
TEXT_PARTS = (*(f"self_attn.{one}_proj" for one in ("q", "k", "v", "out")), "mlp.fc1", "mlp.fc2")
ENCODERS = {
    # Model → (component, layers, where A1111 has them, prefix of ComfyUI's weights).
    "SD 1.5": [("text_encoder", 12, "transformer_text_model_encoder_layers", "clip_l")],
    "SD 2.1": [("text_encoder", 23, "model_transformer_resblocks", "clip_h")],
    "SDXL": [
        ("text_encoder", 12, "0_transformer_text_model_encoder_layers", "clip_l"),
        ("text_encoder_2", 32, "1_model_transformer_resblocks", "clip_g"),
    ],
}


Real = tuple[str, dict[str, str]]


@pytest.fixture(scope="module", params=UNETS)
def real(request: pytest.FixtureRequest) -> Real:
    """A real UNet made without weights: layer's name → its name in the original checkpoint, underscored."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNETS[request.param])
    original = {}
    for name, module in unet.named_modules():
        if not isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            continue
        if name.startswith("add_embedding."):
            found = f"label_emb.0.{2 * (int(name[-1]) - 1)}"
        else:
            whole = unet_name(f"{name}.weight", dict(unet.config))
            assert whole is not None, name
            found = whole.removeprefix("model.diffusion_model.").removesuffix(".weight")
        original[name] = found.replace(".", "_")
    assert len(set(original.values())) == len(original) > 250
    return request.param, original


def made_of(names: list[str]) -> Patch:
    """A patch of the smallest factors for these layers."""
    return Patch({f"{name}.lora_{side}.weight": torch.ones(1, 1) for name in names for side in "AB"})


def kohya_names(patch: Patch) -> dict[str, str]:
    """Layer's full name → what it is called in our kohya file."""
    written, _ = to_kohya(patch)
    short = list(dict.fromkeys(key.split(".")[0] for key in written))
    return dict(zip(patch.modules, short, strict=True))


def a1111_unet(name: str, modules: set[str]) -> str | None:
    """The module that A1111 finds, among the names of those that the model has."""

    def inside(kind: str, part: str) -> str:
        return RESNET.get(part, part) if kind == "resnets" else part

    found = None
    if match := re.match(r"lora_unet_(conv_in|conv_out|time_embedding_linear_\d)", name):
        found = {
            "conv_in": "input_blocks_0_0",
            "conv_out": "out_2",
            "time_embedding_linear_1": "time_embed_0",
            "time_embedding_linear_2": "time_embed_2",
        }[match[1]]
    elif match := re.match(r"lora_unet_(down|up)_blocks_(\d+)_(attentions|resnets)_(\d+)_(.+)", name):
        first, side = (1, "input") if match[1] == "down" else (0, "output")
        entry = first + 3 * int(match[2]) + int(match[4])
        found = f"{side}_blocks_{entry}_{int(match[3] == 'attentions')}_{inside(match[3], match[5])}"
    elif match := re.match(r"lora_unet_mid_block_(attentions|resnets)_(\d+)_(.+)", name):
        entry = 1 if match[1] == "attentions" else 2 * int(match[2])
        found = f"middle_block_{entry}_{inside(match[1], match[3])}"
    elif match := re.match(r"lora_unet_down_blocks_(\d+)_downsamplers_0_conv", name):
        found = f"input_blocks_{3 + 3 * int(match[1])}_0_op"
    elif match := re.match(r"lora_unet_up_blocks_(\d+)_upsamplers_0_conv", name):
        found = f"output_blocks_{2 + 3 * int(match[1])}_{2 if int(match[1]) > 0 else 1}_conv"
    for one in (found, name.removeprefix("lora_unet_")):
        if one in modules:
            return one
    return None


def a1111_text(name: str, modules: set[str], *, sd2: bool) -> str | None:
    """The same for text encoders."""
    match = re.match(r"lora_te(2?)_text_model_encoder_layers_(\d+)_(.+)", name)
    found = name
    if match and (match[1] or sd2):
        part = match[3].replace("mlp_fc1", "mlp_c_fc").replace("mlp_fc2", "mlp_c_proj")
        part = part if "mlp" in part else part.replace("self_attn", "attn")
        found = f"{'1_' if match[1] else ''}model_transformer_resblocks_{match[2]}_{part}"
    elif match:
        found = f"transformer_text_model_encoder_layers_{match[2]}_{match[3]}"
    tries = [found, re.sub(r"_(q|k|v|out)_proj$", "", found)]
    tries += [
        name.replace("lora_te1_text_model", one)
        for one in ("0_transformer_text_model", "transformer_text_model")
    ]
    return next((one for one in tries if one in modules), None)


def test_a1111_finds_the_unets_layers(real: Real) -> None:
    model, original = real
    names = kohya_names(made_of([f"unet.{name}" for name in original]))
    modules = set(original.values())
    found = {name: a1111_unet(names[f"unet.{name}"], modules) for name in original}
    missed = {name for name, module in found.items() if module is None}
    assert missed == A1111_MISSES[model]
    assert {name: module for name, module in found.items() if module} == {
        name: module for name, module in original.items() if name not in missed
    }


@pytest.mark.parametrize("model", ENCODERS)
def test_a1111_finds_the_text_encoders_layers(model: str) -> None:
    full, expected = [], {}
    for component, layers, place, _ in ENCODERS[model]:
        for layer in range(layers):
            for part in TEXT_PARTS:
                name = f"{component}.text_model.encoder.layers.{layer}.{part}"
                full.append(name)
                if "resblocks" in place:
                    # OpenCLIP keeps queries, keys and values in one module.
                    last = {"mlp.fc1": "mlp_c_fc", "mlp.fc2": "mlp_c_proj"}.get(part, "attn")
                else:
                    last = part.replace(".", "_")
                expected[name] = f"{place}_{layer}_{last}"
    # The UNet's width tells the model, and with it what the first encoder is called.
    width = UNETS[model]["cross_attention_dim"]
    cross = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    patch = Patch(
        {
            **made_of(full).tensors,
            f"{cross}.lora_A.weight": torch.ones(1, width),
            f"{cross}.lora_B.weight": torch.ones(1, 1),
        }
    )
    names = kohya_names(patch)
    modules = set(expected.values())
    found = {name: a1111_text(names[name], modules, sd2=model == "SD 2.1") for name in full}
    assert found == expected


def comfy_unet(original: dict[str, str]) -> dict[str, str]:
    """Every name that ComfyUI knows for a UNet's layers → the layer's original name."""
    listed = {
        "conv_in",
        "conv_out",
        *(f"{one}_embedding.linear_{n}" for one in ("time", "add") for n in (1, 2)),
    }
    attention = {"proj_in", "proj_out"}
    block = {
        *(f"attn{n}.{one}" for n in (1, 2) for one in ("to_q", "to_k", "to_v", "to_out.0")),
        "ff.net.0.proj",
        "ff.net.2",
    }
    resnet = {"conv1", "conv2", "time_emb_proj", "conv_shortcut"}
    found = {}
    for name, place in original.items():
        # The first half of its dictionary: every weight by its own name.
        found[f"lora_unet_{place}"] = place
        _, _, rest = name.partition("attentions.")
        inner = rest.partition(".")[2]
        known = (
            name in listed
            or (rest and (inner in attention or re.sub(r"transformer_blocks\.\d+\.", "", inner) in block))
            or (".resnets." in name and name.rpartition(".")[2] in resnet)
            or re.fullmatch(r"(down|up)_blocks\.\d+\.(down|up)samplers\.0\.conv", name)
        )
        if known:
            found[f"lora_unet_{name.replace('.', '_')}"] = place
    return found


def test_comfyui_finds_the_unets_layers(real: Real) -> None:
    _, original = real
    names = kohya_names(made_of([f"unet.{name}" for name in original]))
    known = comfy_unet(original)
    assert {name: known.get(names[f"unet.{name}"]) for name in original} == original


@pytest.mark.parametrize("model", ENCODERS)
def test_comfyui_finds_the_text_encoders_layers(model: str) -> None:
    """Its dictionary: ``lora_te`` and ``lora_te1`` for the first encoder, ``lora_te2`` for SDXL's second."""
    full, known, expected = [], {}, {}
    for component, layers, _, clip in ENCODERS[model]:
        for layer in range(layers):
            for part in TEXT_PARTS:
                name = f"{component}.text_model.encoder.layers.{layer}.{part}"
                weight = f"{clip}.transformer.text_model.encoder.layers.{layer}.{part}"
                full.append(name)
                expected[name] = weight
                for prefix in ("lora_te2",) if clip == "clip_g" else ("lora_te", "lora_te1"):
                    short = f"{prefix}_text_model_encoder_layers_{layer}_{part.replace('.', '_')}"
                    known[short] = weight
    names = kohya_names(made_of(full))
    assert {name: known.get(names[name]) for name in full} == expected


def test_names_of_both_tools_are_read(real: Real, tmp_path: Path) -> None:
    """diffusers' names in kohya's spelling, and the original ones, are the same layers."""
    _, original = real
    for prefix_of in (lambda name: name.replace(".", "_"), lambda name: original[name]):
        tensors = {}
        for name in original:
            short = f"lora_unet_{prefix_of(name)}"
            tensors |= {f"{short}.lora_{side}.weight": torch.ones(1, 1) for side in ("down", "up")}
        save_file(tensors, tmp_path / "x.safetensors")
        read = from_any(tmp_path / "x.safetensors")
        assert set(read.modules) == {f"unet.{name}" for name in original}


@pytest.mark.parametrize(
    "alpha", [torch.tensor(4, dtype=torch.int64), torch.tensor(4.0), torch.tensor([4.0], dtype=torch.float16)]
)
def test_the_scale_is_the_same_everywhere(alpha: torch.Tensor, tmp_path: Path) -> None:
    """Of any alpha that is read, and of the one that is written: ``alpha / rank`` times ``up @ down``."""
    generator = torch.Generator().manual_seed(0)
    down, up = torch.randn(8, 6, generator=generator), torch.randn(5, 8, generator=generator)
    short = "lora_unet_mid_block_attentions_0_proj_in"
    save_file(
        {f"{short}.lora_down.weight": down, f"{short}.lora_up.weight": up, f"{short}.alpha": alpha},
        tmp_path / "x.safetensors",
    )
    wanted = up @ down * (4 / 8)
    patch = from_any(tmp_path / "x.safetensors")
    assert torch.allclose(patch.update("unet.mid_block.attentions.0.proj_in"), wanted, atol=1e-6)
    again = load_file(write_kohya(patch, tmp_path / "y.safetensors", dtype=torch.float32))
    rank = again[f"{short}.lora_down.weight"].shape[0]
    scale = again[f"{short}.alpha"].item() / rank
    assert again[f"{short}.alpha"].is_floating_point() and scale == 1
    found = again[f"{short}.lora_up.weight"] @ again[f"{short}.lora_down.weight"] * scale
    assert torch.allclose(found, wanted, atol=1e-6)
