"""What a base asks of a recipe that says nothing: settings by the size and family of the model, not by its name."""

from __future__ import annotations

import logging
from typing import Any

import torch

from recare_patch.models.captured import Captured
from recare_patch.models.layout import Layout, family_of
from recare_patch.models.loading import chosen_device, find_layout, usable_precision
from recare_patch.recipe import Beneath

logger = logging.getLogger(__name__)

FULL_SIZE = 256
"""Pixels of a native side from which a base is one of the size that people use, and no small model for experiments."""

FULL_SIZE_VALUES: dict[str, Any] = {
    # More pictures in more steps than a base of 64 pixels needs, a few at once.
    "target_images.count": 48,
    "target_images.steps": 25,
    "target_images.scheduler": None,
    # Textual inversion at the rate of its paper and of ReCARE's release (arXiv 2208.01618): about a third of the spread
    # of CLIP's token vectors a step, where the plain default would take more than all of it.
    "search.inversion_steps": 300,
    "search.batch_size": 4,
    "search.learning_rate": 5.0e-3,
    "search.erase_steps": 100,
    # How far AdamW can move a weight by then, Σ rate × LoRA scale × rms of A in units of 1/√fan-in: .18. ReCARE's
    # second stage comes to .11, ESD today to .28; LECO, SPM and sliders stay below .1 (`python -m benchmarks.reach`).
    # A run ends earlier when it sees itself done; small steps, since one moves 16 to 70 cross-attentions together.
    "erase.steps": 200,
    "erase.learning_rate": 1.0e-3,
}


def defaults_for(source: str, device: str | torch.device = "auto") -> Beneath:
    """What a base asks of a recipe, from its configurations alone; nothing is fetched but those.

    Args:
        source: as :func:`load_base` takes it.
        device: of the run, which decides the precision.

    Raises:
        BaseModelError: the base is not found, or of no supported family.
    """
    layout, _ = find_layout(source, weights=False)
    firm: dict[str, Any] = {}
    if (few := layout.few_steps) is not None:
        logger.info("base %s draws in %d steps at guidance %g: %s", layout.name, few.steps, few.guidance, few.why)
        firm = {"steps": few.steps, "guidance_scale": few.guidance, "scheduler": None}
    values, of_method, family = _asked(layout, chosen_device(device)), {}, family_of(layout)
    unet = family.denoiser_name == "unet" and not issubclass(family, Captured)
    if issubclass(family, Captured):
        # Layers that prompt and picture share collapse under a naive edit: what only the prompt passes is the default.
        values["adapter.layers"] = "text"
        of_method = {name: {"adapter.layers": "text-input"} for name in ("closed", "uce")}
    elif unet and len(family.encoder_names) > 1:
        # The pooled prompt says the concept beside the cross-attention, and brings it back where that alone is trained.
        of_method = {name: {"adapter.layers": "text"} for name in ("recare", "esd")}
    # Adversaries were not measured enough on transformers to be their default.
    return Beneath(values, {f"target_images.{key}": one for key, one in firm.items()}, of_method, by_default=unet)


def device_memory(device: str | torch.device = "auto") -> float | None:
    """The memory of a CUDA device in GiB, as cards are sold; None where a device has none of its own."""
    chosen = chosen_device(device)
    if chosen.type != "cuda":
        return None
    return float(torch.cuda.get_device_properties(chosen).total_memory / 2**30)


def _asked(layout: Layout, device: torch.device) -> dict[str, Any]:
    family = family_of(layout)
    native = family.native_pixels(layout)
    if native < FULL_SIZE:
        return {}
    found = FULL_SIZE_VALUES | {
        "target_images.batch_size": 4 if native < 1024 else 2,
        "target_images.guidance_scale": family.usual_guidance(layout),
    }
    if len(family.encoder_names) > 1 or issubclass(family, Captured):
        # Many more layers read the prompt: at rank 8 a patch of SDXL would take 13 MB.
        found |= {"adapter.rank": 4, "adapter.alpha": 4.0}
    if device.type != "cpu":
        found["precision"] = usable_precision("bf16", device)[0]
    return found
