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
    open_tensors,
    read_safetensors_header,
    write_streamed,
)
from recare_patch.models import Layout
from recare_patch.patch.kohya import ORIGINAL_RESNET, ORIGINAL_UNET

COMPONENTS = ("unet", "vae", "text_encoder")

_SD2_WIDTH = 1024
_SIZES = {
    "unet": {"block_out_channels": [320, 640, 1280, 1280], "layers_per_block": 2},
    "vae": {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2},
}
_UNET_WHOLE = ORIGINAL_UNET | {"conv_norm_out": "out.0"}
_UNET_RESNET = ORIGINAL_RESNET | {"norm1": "in_layers.0", "norm2": "out_layers.0"}
_UNET_LAYER = re.compile(r"(?:(down|up)_blocks\.(\d+)|mid_block)\.(resnets|attentions)\.(\d+)\.(.+)")
_UNET_SAMPLER = re.compile(r"(down|up)_blocks\.(\d+)\.(?:down|up)samplers\.0\.conv")

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
_VAE_BLOCK = re.compile(
    r"(?:down|up)_blocks\.(\d+)\.(?:resnets\.(?P<layer>\d+)\.(?P<last>\w+)|(?P<way>down|up)samplers\.0\.conv)"
)
_VAE_MIDDLE = re.compile(r"mid_block\.(?:resnets\.(?P<resnet>\d+)|attentions\.0)\.(?P<last>[\w.]+)")

_CLIP_LAYER = re.compile(r"text_model\.encoder\.layers\.(\d+)\.([\w.]+)\.(weight|bias)")
_CLIP_KNOWN = ("text_model.embeddings.", "text_model.encoder.", "text_model.final_layer_norm.")
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


@dataclass(frozen=True)
class Entry:
    """One tensor of a checkpoint file: its name there, and what of a component is joined to make it.

    Nearly always one tensor is; several are joined along their first axis.
    """

    name: str
    component: str
    keys: tuple[str, ...]
    convolution: bool = False
    """Whether a matrix ``[out, in]`` is written as a kernel ``[out, in, 1, 1]``."""


def has_known_sizes(layout: Layout) -> bool:
    """Whether other tools know a model of this size: they have Stable Diffusion 1.x and 2.x built in."""
    width = layout.configs.get("unet", {}).get("cross_attention_dim")
    return width in (768, _SD2_WIDTH) and all(
        layout.configs.get(component, {}).get(key) == value
        for component, wanted in _SIZES.items()
        for key, value in wanted.items()
    )


def entries(layout: Layout, tensors: Mapping[str, Mapping[str, TensorInfo]]) -> list[Entry]:
    """The tensors of a pipeline's checkpoint file, from each component's tensors by name.

    Raises:
        BaseModelError: the original names have no place for a tensor, since the model is of another kind.
    """
    unfit = f"base {layout.name} cannot be written as a single file:"
    found: list[Entry] = []
    joined: dict[str, dict[str, str]] = {}
    for component in COMPONENTS:
        config = layout.require(component)
        for key, info in tensors[component].items():
            if key.endswith("position_ids"):
                # A buffer that counts up: newer versions of transformers do not store it either.
                continue
            part = ""
            if component == "text_encoder":
                name, part = _text_name(key, layout)
            else:
                name = (unet_name if component == "unet" else _vae_name)(key, config)
            if name is None:
                raise BaseModelError(
                    f"{unfit} the original names of Stable Diffusion 1.x and 2.x have no place for '{key}' "
                    f"of its {component.replace('_', ' ')}"
                )
            if part:
                joined.setdefault(name, {})[part] = key
                continue
            kernel = component == "vae" and ".attn_1." in name and len(info.shape) == 2
            found.append(Entry(name, component, (key,), kernel))
    for name, parts in joined.items():
        if set(parts) != set("qkv"):
            raise BaseModelError(f"{unfit} its text encoder lacks a part of '{name}'")
        found.append(Entry(name, "text_encoder", tuple(parts[one] for one in "qkv")))
    return found


def unet_name(key: str, config: Mapping[str, Any]) -> str | None:
    """What the original checkpoints call a tensor of a UNet."""
    name, _, what = key.rpartition(".")
    layers = config.get("layers_per_block", 2)
    if not isinstance(layers, int):
        return None
    inner = _UNET_WHOLE.get(name)
    if match := _UNET_LAYER.fullmatch(name):
        side, block, kind, layer, rest = match.groups()
        attends = int(kind == "attentions")
        last = rest if attends else _UNET_RESNET.get(rest)
        if side is None:
            # Resnet, attention, resnet: the middle one is written like a second part of a block.
            place = f"middle_block.{2 * int(layer) + attends}"
        else:
            number = (layers + 1) * int(block) + int(layer) + (side == "down")
            place = f"{'input' if side == 'down' else 'output'}_blocks.{number}.{attends}"
        inner = f"{place}.{last}" if last else None
    elif match := _UNET_SAMPLER.fullmatch(name):
        block = int(match[2])
        end = (layers + 1) * (block + 1)
        # On the way up it comes after the block's last attention, where the block has any.
        types = config.get("up_block_types") or ()
        after = 2 if block < len(types) and "CrossAttn" in str(types[block]) else 1
        inner = f"input_blocks.{end}.0.op" if match[1] == "down" else f"output_blocks.{end - 1}.{after}.conv"
    return f"model.diffusion_model.{inner}.{what}" if inner else None


def _vae_name(key: str, config: Mapping[str, Any]) -> str | None:
    name, _, what = key.rpartition(".")
    if name in ("quant_conv", "post_quant_conv"):
        return f"first_stage_model.{key}"
    side, _, rest = name.partition(".")
    if side not in ("encoder", "decoder"):
        return None
    inner = _VAE_WHOLE.get(rest)
    if match := _VAE_BLOCK.fullmatch(rest):
        block, last = int(match[1]), match["last"]
        last = "nin_shortcut" if last == "conv_shortcut" else last
        # The original decoder counts its blocks from the picture's side.
        blocks = len(config.get("up_block_types") or config.get("block_out_channels") or ())
        place = f"down.{block}" if side == "encoder" else f"up.{blocks - 1 - block}"
        inner = f"{place}.{match['way']}sample.conv" if last is None else f"{place}.block.{match['layer']}.{last}"
    elif match := _VAE_MIDDLE.fullmatch(rest):
        if match["resnet"] is not None:
            inner = f"mid.block_{int(match['resnet']) + 1}.{match['last']}"
        elif match["last"] in _VAE_ATTENTION:
            inner = f"mid.attn_1.{_VAE_ATTENTION[match['last']]}"
    return f"first_stage_model.{side}.{inner}.{what}" if inner else None


def _text_name(key: str, layout: Layout) -> tuple[str | None, str]:
    """The name, and which third of it the tensor is: OpenCLIP keeps queries, keys and values as one."""
    # Transformers 5 saves the encoder's parts without their common name.
    key = key if key.startswith("text_model.") else f"text_model.{key}"
    if layout.configs["unet"].get("cross_attention_dim") != _SD2_WIDTH:
        return (f"cond_stage_model.transformer.{key}" if key.startswith(_CLIP_KNOWN) else None), ""
    if key in _OPEN_CLIP_WHOLE:
        return f"cond_stage_model.model.{_OPEN_CLIP_WHOLE[key]}", ""
    match = _CLIP_LAYER.fullmatch(key)
    if match is None:
        return None, ""
    layer, part, what = match.groups()
    place = f"cond_stage_model.model.transformer.resblocks.{layer}"
    if part in _OPEN_CLIP_PARTS:
        return f"{place}.{_OPEN_CLIP_PARTS[part]}.{what}", ""
    third = re.fullmatch(r"self_attn\.([qkv])_proj", part)
    return (f"{place}.attn.in_proj_{what}", third[1]) if third else (None, "")


def plan(layout: Layout) -> list[Entry]:
    """:func:`entries` of a pipeline on the disk, of the weights that diffusers loads by default.

    Raises:
        BaseModelError: see :func:`entries`; or weights are missing.
    """
    return entries(layout, {component: _infos(layout, component) for component in COMPONENTS})


def _files(layout: Layout, component: str) -> list[Path]:
    layout.require(component)
    return next(iter(layout.weight_sets(component).values()), [])


def _infos(layout: Layout, component: str) -> dict[str, TensorInfo]:
    headers = [read_safetensors_header(file).tensors for file in _files(layout, component)]
    return {key: info for tensors in headers for key, info in tensors.items()}


def write_single_file(layout: Layout, file: Path, header: Mapping[str, str]) -> Path:
    """Write a pipeline as one checkpoint file with these header entries, whole or not at all; dtypes stay.

    Raises:
        BaseModelError: see :func:`entries`; or its weights cannot be read.
        OutputError: the file cannot be written.
    """
    from safetensors import SafetensorError

    infos = {component: _infos(layout, component) for component in COMPONENTS}
    stored: dict[tuple[str, str], Any] = {}
    with contextlib.ExitStack() as stack:
        try:
            for component in COMPONENTS:
                for path in _files(layout, component):
                    handle = stack.enter_context(open_tensors(path))
                    stored |= {(component, key): handle for key in handle.keys()}  # noqa: SIM118 - it is no dict
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
            shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:], *(1, 1) * entry.convolution)
            return StreamedTensor(
                entry.name,
                TensorInfo(parts[0].dtype, shape, sum(part.bytes for part in parts)),
                lambda: _bytes(stored[entry.component, key].get_tensor(key) for key in entry.keys),
            )

        write_streamed(file, [streamed(entry) for entry in entries(layout, infos)], header)
    return file


def _bytes(tensors: Iterable[Tensor]) -> memoryview:
    """The bytes of tensors laid end to end, which is how they join along their first axis."""
    parts = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in tensors]
    whole: memoryview = (parts[0] if len(parts) == 1 else torch.cat(parts)).numpy().data
    return whole
