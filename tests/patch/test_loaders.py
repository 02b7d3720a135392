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

import itertools
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from recare_patch.patch import Patch
from recare_patch.patch.kohya import to_kohya
from recare_patch.patch.original_layout import unet_name
from recare_patch.patch.reading import from_any
from tests.patch.making import file_of

UNETS: dict[str, dict[str, Any]] = {
    "SD 1.5": {"cross_attention_dim": 768, "attention_head_dim": 8},
    "SD 2.1": {
        "cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True,
    },
    "SDXL": {
        "cross_attention_dim": 2048, "attention_head_dim": (5, 10, 20), "use_linear_projection": True,
        "block_out_channels": (320, 640, 1280), "transformer_layers_per_block": (1, 2, 10),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}  # fmt: skip
# By diffusers' names A1111 takes the first upsampler of SDXL for SD 1's, which stands at another place. Only the
# layer set "all" changes it.
SDXL_MISSES = {"up_blocks.0.upsamplers.0.conv"}
RESNET = {
    "conv1": "in_layers_2", "conv2": "out_layers_3", "time_emb_proj": "emb_layers_1",
    "conv_shortcut": "skip_connection",
}  # fmt: skip
OUTSIDE = {
    "conv_in": "input_blocks_0_0", "conv_out": "out_2", "time_embedding_linear_1": "time_embed_0",
    "time_embedding_linear_2": "time_embed_2",
}  # fmt: skip
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


def original_names(model: str) -> dict[str, str]:
    """Each layer of a real UNet made without weights → its name in the original checkpoint, underscored."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNETS[model])
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
    return original


def kohya_names(names: Iterable[str], **more: torch.Tensor) -> dict[str, str]:
    """Layer's full name → what it is called in the kohya file of a patch of the smallest factors."""
    ones = {f"{name}.lora_{side}.weight": torch.ones(1, 1) for name in names for side in "AB"}
    patch = Patch(ones | more)
    short = dict.fromkeys(key.split(".")[0] for key in to_kohya(patch)[0])
    return dict(zip(patch.modules, short, strict=True))


def a1111_unet(name: str, modules: set[str]) -> str | None:
    """The module that A1111 finds, among the names of those that the model has."""
    name = name.removeprefix("lora_unet_")
    found = None
    if match := re.match(r"conv_in|conv_out|time_embedding_linear_\d", name):
        found = OUTSIDE[match[0]]
    elif match := re.match(r"(down|up)_blocks_(\d+)_(attentions|resnets)_(\d+)_(.+)", name):
        first, side = (1, "input") if match[1] == "down" else (0, "output")
        entry, resnet = first + 3 * int(match[2]) + int(match[4]), match[3] == "resnets"
        found = f"{side}_blocks_{entry}_{int(not resnet)}_"
        found += RESNET.get(match[5], match[5]) if resnet else match[5]
    elif match := re.match(r"mid_block_(attentions|resnets)_(\d+)_(.+)", name):
        resnet = match[1] == "resnets"
        found = f"middle_block_{2 * int(match[2])}_" if resnet else "middle_block_1_"
        found += RESNET.get(match[3], match[3]) if resnet else match[3]
    elif match := re.match(r"down_blocks_(\d+)_downsamplers_0_conv", name):
        found = f"input_blocks_{3 + 3 * int(match[1])}_0_op"
    elif match := re.match(r"up_blocks_(\d+)_upsamplers_0_conv", name):
        found = f"output_blocks_{2 + 3 * int(match[1])}_{2 if int(match[1]) > 0 else 1}_conv"
    return next((one for one in (found, name) if one in modules), None)


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
    places = ("0_transformer_text_model", "transformer_text_model")
    tries = [found, re.sub(r"_(q|k|v|out)_proj$", "", found)]
    tries += [name.replace("lora_te1_text_model", one) for one in places]
    return next((one for one in tries if one in modules), None)


ATTENTION = {f"attn{n}.{one}" for n in (1, 2) for one in ("to_q", "to_k", "to_v", "to_out.0")}
BLOCK = ATTENTION | {"ff.net.0.proj", "ff.net.2"}
LISTED = {f"{one}_embedding.linear_{n}" for one in ("time", "add") for n in (1, 2)} | {"conv_in", "conv_out"}


def comfy_unet(original: dict[str, str]) -> dict[str, str]:
    """Every name that ComfyUI knows for a UNet's layers → the layer's original name."""
    # The first half of its dictionary: every weight by its own name.
    found = {f"lora_unet_{place}": place for place in original.values()}
    for name, place in original.items():
        inner = name.partition("attentions.")[2].partition(".")[2]
        if (
            name in LISTED
            or inner in ("proj_in", "proj_out")
            or re.sub(r"transformer_blocks\.\d+\.", "", inner) in BLOCK
            or (".resnets." in name and name.rpartition(".")[2] in RESNET)
            or re.fullmatch(r"(down|up)_blocks\.\d+\.(down|up)samplers\.0\.conv", name)
        ):
            found[f"lora_unet_{name.replace('.', '_')}"] = place
    return found


@pytest.mark.parametrize("model", UNETS)
def test_the_unets_layers(model: str, tmp_path: Path) -> None:
    original = original_names(model)
    names, modules = kohya_names(f"unet.{name}" for name in original), set(original.values())
    found = {name: a1111_unet(names[f"unet.{name}"], modules) for name in original}
    assert {name for name, module in found.items() if module is None} == (SDXL_MISSES if model == "SDXL" else set())
    assert all(found[name] in (place, None) for name, place in original.items())
    known = comfy_unet(original)
    assert {name: known.get(names[f"unet.{name}"]) for name in original} == original
    # diffusers' names in kohya's spelling, and the original ones, are read as the same layers.
    for spelled in ([name.replace(".", "_") for name in original], modules):
        keys = [f"lora_unet_{one}.lora_{side}.weight" for one in spelled for side in ("down", "up")]
        file = file_of(tmp_path, {key: torch.ones(1, 1) for key in keys})
        assert set(from_any(file).modules) == {f"unet.{name}" for name in original}


@pytest.mark.parametrize("model", ENCODERS)
def test_the_text_encoders_layers(model: str) -> None:
    """ComfyUI has ``lora_te`` and ``lora_te1`` for the first encoder, ``lora_te2`` for SDXL's second."""
    a1111, comfy, known = {}, {}, {}
    for component, layers, place, clip in ENCODERS[model]:
        for layer, part in itertools.product(range(layers), TEXT_PARTS):
            inside = f"text_model.encoder.layers.{layer}.{part}"
            last = part.replace(".", "_")
            if "resblocks" in place:
                # OpenCLIP keeps queries, keys and values in one module.
                last = {"mlp.fc1": "mlp_c_fc", "mlp.fc2": "mlp_c_proj"}.get(part, "attn")
            a1111[f"{component}.{inside}"] = f"{place}_{layer}_{last}"
            comfy[f"{component}.{inside}"] = f"{clip}.transformer.{inside}"
            for prefix in ("lora_te2",) if clip == "clip_g" else ("lora_te", "lora_te1"):
                known[f"{prefix}_{inside.replace('.', '_')}"] = f"{clip}.transformer.{inside}"
    # The UNet's width tells the model, and with it what the first encoder is called.
    cross = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.lora_{}.weight"
    width = UNETS[model]["cross_attention_dim"]
    names = kohya_names(a1111, **{cross.format("A"): torch.ones(1, width), cross.format("B"): torch.ones(1, 1)})
    modules = set(a1111.values())
    assert {name: a1111_text(names[name], modules, sd2=model == "SD 2.1") for name in a1111} == a1111
    assert {name: known.get(names[name]) for name in comfy} == comfy
    # Without a UNet, as a patch of the encoders alone.
    assert {name: known.get(short) for name, short in kohya_names(comfy).items()} == comfy
