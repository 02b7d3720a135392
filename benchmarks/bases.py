"""Bases of the published sizes with random weights: mechanics, memory and speed without a download.

The configurations are facts about the public models; what is drawn with them is noise. Their tokenizer
is Atelier's, whose ids fit into the published vocabulary.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from recare_patch.models import PRECISIONS, BaseModel, family_of, read_layout
from recare_patch.recipe import MemoryOptions

_CROSS, _PLAIN = "CrossAttn{}Block2D", "{}Block2D"
_SCHEDULE = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
_CLIP_L = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
}


def _vae(side: int, scale: float) -> dict[str, Any]:
    return {
        "_class_name": "AutoencoderKL",
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2,
        "latent_channels": 4,
        "norm_num_groups": 32,
        "sample_size": side,
        "scaling_factor": scale,
    }


def _unet(side: int, channels: list[int], crossing: list[bool], **more: Any) -> dict[str, Any]:
    kinds = [_CROSS if one else _PLAIN for one in crossing]
    return {
        "_class_name": "UNet2DConditionModel",
        "sample_size": side,
        "in_channels": 4,
        "out_channels": 4,
        "layers_per_block": 2,
        "block_out_channels": channels,
        "down_block_types": [kind.format("Down") for kind in kinds],
        "up_block_types": [kind.format("Up") for kind in reversed(kinds)],
        **more,
    }


BASES: dict[str, dict[str, dict[str, Any]]] = {
    "sd-1.5": {
        "unet": _unet(64, [320, 640, 1280, 1280], [True] * 3 + [False], cross_attention_dim=768, attention_head_dim=8),
        "vae": _vae(512, 0.18215),
        "text_encoder": _CLIP_L,
        "scheduler": _SCHEDULE,
    },
    "sd-2.1": {
        "unet": _unet(
            96,
            [320, 640, 1280, 1280],
            [True] * 3 + [False],
            cross_attention_dim=1024,
            attention_head_dim=[5, 10, 20, 20],
            use_linear_projection=True,
            upcast_attention=True,
        ),
        "vae": _vae(768, 0.18215),
        "text_encoder": _CLIP_L
        | {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 23,
            "num_attention_heads": 16,
            "hidden_act": "gelu",
            "projection_dim": 512,
        },
        "scheduler": _SCHEDULE | {"prediction_type": "v_prediction"},
    },
    "sdxl": {
        "unet": _unet(
            128,
            [320, 640, 1280],
            [False, True, True],
            cross_attention_dim=2048,
            attention_head_dim=[5, 10, 20],
            transformer_layers_per_block=[1, 2, 10],
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        ),
        "vae": _vae(1024, 0.13025),
        "text_encoder": _CLIP_L,
        "text_encoder_2": _CLIP_L
        | {
            "hidden_size": 1280,
            "intermediate_size": 5120,
            "num_hidden_layers": 32,
            "num_attention_heads": 20,
            "hidden_act": "gelu",
            "projection_dim": 1280,
        },
        "scheduler": _SCHEDULE,
    },
}
"""Name → component → its configuration, of CompVis' and Stability's public models."""


def write_configurations(name: str, folder: Path) -> Path:
    """A pipeline folder without weights, as ``recare-patch plan --base`` reads it.

    Args:
        name: of :data:`BASES`.
        folder: where to write.
    """
    parts = BASES[name]
    large = "text_encoder_2" in parts
    index: dict[str, Any] = {"_class_name": f"StableDiffusion{'XL' if large else ''}Pipeline"}
    for part, config in parts.items():
        encoder = "CLIPTextModelWithProjection" if part.endswith("_2") else "CLIPTextModel"
        kind = config.get("_class_name", encoder)
        index[part] = ["transformers" if part.startswith("text") else "diffusers", kind]
        file = "scheduler_config.json" if part == "scheduler" else "config.json"
        (folder / part).mkdir(parents=True, exist_ok=True)
        (folder / part / file).write_text(json.dumps(config, indent=2))
        if part.startswith("text"):
            index[part.replace("text_encoder", "tokenizer")] = ["transformers", "CLIPTokenizer"]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    return folder


def make_base(
    name: str, folder: Path, *, precision: str = "bf16", device: str = "cpu", memory: MemoryOptions | None = None
) -> BaseModel:
    """A base of a published size with random weights, made in memory at the precision it runs in.

    Args:
        name: of :data:`BASES`.
        folder: for its configurations.
        precision: of its weights.
        device: where it computes.
        memory: levers.
    """
    import diffusers
    import transformers

    from recare_patch.models import memory as levers
    from recare_patch.models.atelier import PIPELINE

    layout = read_layout(write_configurations(name, folder), name)
    family = family_of(layout)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(PIPELINE / "tokenizer")
    markers = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    generator = torch.Generator().manual_seed(0)
    parts: dict[str, Any] = {}
    for part, config in BASES[name].items():
        library = transformers if part.startswith("text") else diffusers
        kind = getattr(library, layout.index[part][1])
        if part == "scheduler":
            parts[part] = kind.from_config(config)
            continue
        with torch.device("meta"):
            of_text = library is transformers
            made = kind(kind.config_class(**config, **markers)) if of_text else kind.from_config(config)
        parts[part] = _filled(made, PRECISIONS[precision], generator)
    for part in family.encoder_names:
        parts[part.replace("text_encoder", "tokenizer")] = tokenizer
    extra: dict[str, Any] = dict.fromkeys(family.left_out)
    if "safety_checker" in extra:
        extra["requires_safety_checker"] = False
    pipeline = getattr(diffusers, family.pipeline_class)(**parts, **extra)
    options, place = memory or MemoryOptions(), torch.device(device)
    encoders = [parts[part] for part in family.encoder_names]
    levers.place(pipeline, pipeline.unet, encoders, options, place, PRECISIONS[precision])
    return family(pipeline, name, device=place, memory=options)


def _filled(network: nn.Module, dtype: torch.dtype, generator: torch.Generator) -> nn.Module:
    """Give a network from the meta device values that keep its activations in bounds."""
    network = nn.Module.to(network, dtype=dtype).to_empty(device="cpu")
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            with torch.no_grad():
                if parameter.ndim < 2:
                    scales = "norm" in type(module).__name__.lower() and name == "weight"
                    parameter.fill_(1.0 if scales else 0.0)
                else:
                    # In small pieces: a whole tensor in fp32 would be the run's peak.
                    for rows in parameter.view(len(parameter), -1).split(1024):
                        values = torch.randn(rows.shape, generator=generator, dtype=torch.float32)
                        rows.copy_(values * (0.5 * parameter[0].numel() ** -0.5))
        for name, buffer in module.named_buffers(recurse=False):
            if name == "position_ids":
                buffer.copy_(torch.arange(buffer.shape[-1]).expand_as(buffer))
    return network.requires_grad_(False)
