"""Stable Diffusion 1.x and 2.x as one file, in the names of the original checkpoints.

A1111 and ComfyUI read a model as one file whose tensors have the names of CompVis' and Stability's
training code: ``model.diffusion_model.`` (the UNet, its blocks counted through), ``first_stage_model.``
(the autoencoder) and ``cond_stage_model.`` (the text encoder, in the names of OpenCLIP for 2.x). diffusers
converts such files to its folders (``loaders/single_file_utils.py``) and not back; this is the way
back, one tensor in memory at a time.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recare_patch.core import (
    BaseModelError,
    StreamedTensor,
    TensorInfo,
    read_safetensors_header,
    write_streamed,
)
from recare_patch.models import Layout

COMPONENTS = ("unet", "vae", "text_encoder")

_PREFIXES = {"unet": "model.diffusion_model.", "vae": "first_stage_model."}
_CLIP, _OPEN_CLIP = "cond_stage_model.transformer.", "cond_stage_model.model."
_SD2_WIDTH = 1024
_SIZES = {
    "unet": {"block_out_channels": [320, 640, 1280, 1280], "layers_per_block": 2},
    "vae": {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2},
}

_UNET_WHOLE = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET_BLOCK = re.compile(
    r"(?P<side>down|up)_blocks\.(?P<block>\d+)\.(?P<kind>resnets|attentions)\.(?P<layer>\d+)\.(?P<rest>.+)"
)
_UNET_SAMPLER = re.compile(r"(?P<side>down|up)_blocks\.(?P<block>\d+)\.(?:down|up)samplers\.0\.conv")
_UNET_MIDDLE = re.compile(r"mid_block\.(?P<kind>resnets|attentions)\.(?P<layer>\d+)\.(?P<rest>.+)")

_VAE_WHOLE = {"conv_norm_out": "norm_out", "conv_in": "conv_in", "conv_out": "conv_out"}
_VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
    # As diffusers wrote them before version 0.15.
    "query": "q",
    "key": "k",
    "value": "v",
    "proj_attn": "proj_out",
}
_VAE_BLOCK = re.compile(r"(?:down|up)_blocks\.(?P<block>\d+)\.resnets\.(?P<layer>\d+)\.(?P<rest>\w+)")
_VAE_SAMPLER = re.compile(r"(?P<way>down|up)_blocks\.(?P<block>\d+)\.(?:down|up)samplers\.0\.conv")
_VAE_MIDDLE = re.compile(r"mid_block\.(?:resnets\.(?P<resnet>\d+)|attentions\.0)\.(?P<rest>[\w.]+)")

_CLIP_LAYER = re.compile(
    r"text_model\.encoder\.layers\.(?P<layer>\d+)\.(?P<part>[\w.]+)\.(?P<what>weight|bias)"
)
_OPEN_CLIP_PARTS = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_OPEN_CLIP_WHOLE = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
}
_JOINED = ("q", "k", "v")


@dataclass(frozen=True)
class Entry:
    """One tensor of a checkpoint file.

    Attributes:
        name: in the file.
        component: of the pipeline it comes from.
        keys: what is joined along the first axis to make it; nearly always one.
        convolution: whether a matrix ``[out, in]`` is written as a kernel ``[out, in, 1, 1]``.
    """

    name: str
    component: str
    keys: tuple[str, ...]
    convolution: bool = False


def has_known_sizes(layout: Layout) -> bool:
    """Whether other tools know a model of this size: they have Stable Diffusion 1.x and 2.x built in."""
    width = layout.configs.get("unet", {}).get("cross_attention_dim")
    return width in (768, _SD2_WIDTH) and all(
        layout.configs.get(component, {}).get(key) == value
        for component, wanted in _SIZES.items()
        for key, value in wanted.items()
    )


def entries(layout: Layout, tensors: Mapping[str, Mapping[str, TensorInfo]]) -> list[Entry]:
    """The tensors of a pipeline's checkpoint file.

    Args:
        layout: the pipeline.
        tensors: component → its tensors' names and shapes.

    Raises:
        BaseModelError: the original names have no place for a tensor, since the model is of another kind.
    """
    found: list[Entry] = []
    joined: dict[str, dict[str, str]] = {}
    for component in COMPONENTS:
        config = layout.require(component)
        for key, info in tensors[component].items():
            if key.endswith("position_ids"):
                # A buffer that counts up: newer versions of transformers do not store it either.
                continue
            if component == "text_encoder":
                name, part = _text_name(key, layout)
            else:
                name = (_unet_name if component == "unet" else _vae_name)(key, config)
                part = ""
            if name is None:
                raise BaseModelError(
                    f"base {layout.name} cannot be written as a single file: the original names of Stable "
                    f"Diffusion 1.x and 2.x have no place for '{key}' of its {component.replace('_', ' ')}"
                )
            if part:
                joined.setdefault(name, {})[part] = key
                continue
            kernel = component == "vae" and ".attn_1." in name and len(info.shape) == 2
            found.append(Entry(name, component, (key,), kernel))
    for name, parts in joined.items():
        if set(parts) != set(_JOINED):
            raise BaseModelError(
                f"base {layout.name} cannot be written as a single file: its text encoder lacks a part of "
                f"'{name}'"
            )
        found.append(Entry(name, "text_encoder", tuple(parts[one] for one in _JOINED)))
    return found


def _unet_name(key: str, config: Mapping[str, Any]) -> str | None:
    name, _, what = key.rpartition(".")
    layers = config.get("layers_per_block", 2)
    if not isinstance(layers, int):
        return None
    each = layers + 1
    if name in _UNET_WHOLE:
        inner: str | None = _UNET_WHOLE[name]
    elif match := _UNET_BLOCK.fullmatch(name):
        number = each * int(match["block"]) + int(match["layer"])
        place = f"input_blocks.{number + 1}" if match["side"] == "down" else f"output_blocks.{number}"
        inner = _inside(place, match["kind"], match["rest"])
    elif match := _UNET_MIDDLE.fullmatch(name):
        layer = int(match["layer"])
        # Resnet, attention, resnet: the middle one is written like a second part of a block.
        place = f"middle_block.{2 * layer if match['kind'] == 'resnets' else 2 * layer + 1}"
        inner = _inside(place, match["kind"], match["rest"], middle=True)
    elif match := _UNET_SAMPLER.fullmatch(name):
        last = each * (int(match["block"]) + 1)
        if match["side"] == "down":
            inner = f"input_blocks.{last}.0.op"
        else:
            # It comes after the block's last attention, where the block has any.
            types = config.get("up_block_types") or ()
            attends = (
                "CrossAttn" in str(types[int(match["block"])]) if int(match["block"]) < len(types) else 0
            )
            inner = f"output_blocks.{last - 1}.{2 if attends else 1}.conv"
    else:
        inner = None
    return f"{_PREFIXES['unet']}{inner}.{what}" if inner else None


def _inside(place: str, kind: str, rest: str, *, middle: bool = False) -> str | None:
    if kind == "attentions":
        return f"{place}.{rest}" if middle else f"{place}.1.{rest}"
    part = _UNET_RESNET.get(rest)
    if part is None:
        return None
    return f"{place}.{part}" if middle else f"{place}.0.{part}"


def _vae_name(key: str, config: Mapping[str, Any]) -> str | None:
    name, _, what = key.rpartition(".")
    if name in ("quant_conv", "post_quant_conv"):
        return f"{_PREFIXES['vae']}{key}"
    side, _, rest = name.partition(".")
    blocks = config.get("up_block_types") or config.get("block_out_channels") or ()
    if side not in ("encoder", "decoder"):
        return None
    inner: str | None = None
    if rest in _VAE_WHOLE:
        inner = _VAE_WHOLE[rest]
    elif match := _VAE_BLOCK.fullmatch(rest):
        last = {"conv_shortcut": "nin_shortcut"}.get(match["rest"], match["rest"])
        inner = f"{_vae_block(side, int(match['block']), len(blocks))}.block.{match['layer']}.{last}"
    elif match := _VAE_SAMPLER.fullmatch(rest):
        inner = f"{_vae_block(side, int(match['block']), len(blocks))}.{match['way']}sample.conv"
    elif match := _VAE_MIDDLE.fullmatch(rest):
        if match["resnet"] is not None:
            inner = f"mid.block_{int(match['resnet']) + 1}.{match['rest']}"
        elif match["rest"] in _VAE_ATTENTION:
            inner = f"mid.attn_1.{_VAE_ATTENTION[match['rest']]}"
    return f"{_PREFIXES['vae']}{side}.{inner}.{what}" if inner else None


def _vae_block(side: str, block: int, blocks: int) -> str:
    """The original decoder counts its blocks from the picture's side."""
    return f"down.{block}" if side == "encoder" else f"up.{blocks - 1 - block}"


def _text_name(key: str, layout: Layout) -> tuple[str | None, str]:
    """The name, and which third of it the tensor is: OpenCLIP keeps queries, keys and values as one."""
    # Transformers 5 saves the encoder's parts without their common name.
    key = key if key.startswith("text_model.") else f"text_model.{key}"
    if layout.configs["unet"].get("cross_attention_dim") != _SD2_WIDTH:
        known = key.startswith(
            ("text_model.embeddings.", "text_model.encoder.", "text_model.final_layer_norm.")
        )
        return (f"{_CLIP}{key}", "") if known else (None, "")
    if key in _OPEN_CLIP_WHOLE:
        return f"{_OPEN_CLIP}{_OPEN_CLIP_WHOLE[key]}", ""
    match = _CLIP_LAYER.fullmatch(key)
    if match is None:
        return None, ""
    place = f"{_OPEN_CLIP}transformer.resblocks.{match['layer']}"
    if match["part"] in _OPEN_CLIP_PARTS:
        return f"{place}.{_OPEN_CLIP_PARTS[match['part']]}.{match['what']}", ""
    third = re.fullmatch(r"self_attn\.([qkv])_proj", match["part"])
    return (f"{place}.attn.in_proj_{match['what']}", third[1]) if third else (None, "")


# ------------------------------------------------------------------------ writing


def plan(layout: Layout) -> list[Entry]:
    """:func:`entries` of a pipeline on the disk, of the weights that diffusers loads by default.

    Raises:
        BaseModelError: see :func:`entries`; or weights are missing.
    """
    return entries(layout, {component: _infos(layout, component) for component in COMPONENTS})


def _files(layout: Layout, component: str) -> list[Path]:
    layout.require(component)
    return next(iter(layout.weight_sets(component).values()))


def _infos(layout: Layout, component: str) -> dict[str, TensorInfo]:
    return {
        key: info
        for file in _files(layout, component)
        for key, info in read_safetensors_header(file).tensors.items()
    }


def write_single_file(layout: Layout, file: Path, header: Mapping[str, str]) -> Path:
    """Write a pipeline as one checkpoint file, whole or not at all; dtypes stay.

    Args:
        layout: the pipeline.
        file: where to.
        header: entries of the file's header.

    Returns:
        The file.

    Raises:
        BaseModelError: see :func:`entries`; or its weights cannot be read.
        OutputError: the file cannot be written.
    """
    from safetensors import SafetensorError, safe_open

    with contextlib.ExitStack() as stack:
        stored: dict[str, dict[str, Any]] = {}
        infos: dict[str, dict[str, TensorInfo]] = {}
        try:
            for component in COMPONENTS:
                stored[component] = {}
                infos[component] = _infos(layout, component)
                for path in _files(layout, component):
                    handle = stack.enter_context(safe_open(path, "pt"))
                    stored[component] |= dict.fromkeys(handle.keys(), handle)
        except SafetensorError as fault:
            raise BaseModelError(
                f"base {layout.name} has damaged weights: {str(fault).splitlines()[0].lower()}"
            ) from fault

        def streamed(entry: Entry) -> StreamedTensor:
            parts = [infos[entry.component][key] for key in entry.keys]
            if len({part.dtype for part in parts}) > 1:
                raise BaseModelError(
                    f"base {layout.name} cannot be written as a single file: the parts of '{entry.name}' "
                    "have several dtypes"
                )
            shape: tuple[int, ...] = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
            handles = stored[entry.component]
            shape = (*shape, 1, 1) if entry.convolution else shape
            return StreamedTensor(
                entry.name,
                TensorInfo(parts[0].dtype, shape, sum(part.bytes for part in parts)),
                lambda: _bytes([handles[key].get_tensor(key) for key in entry.keys]),
            )

        found = entries(layout, infos)
        write_streamed(file, [streamed(entry) for entry in found], header)
    return file


def _bytes(tensors: Iterable[Tensor]) -> memoryview:
    """The bytes of tensors laid end to end, which is how they join along their first axis."""
    parts = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in tensors]
    whole: memoryview = (parts[0] if len(parts) == 1 else torch.cat(parts)).numpy().data
    return whole
