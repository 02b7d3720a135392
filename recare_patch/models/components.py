"""The networks of a base that a patch may change, and what their layers are called in a patch.

A layer's full name is ``<component>.<module>``, such as ``unet.mid_block.attentions.0.proj_in``. The
modules of a text encoder are named as all LoRA files name them, ``text_encoder.text_model.encoder…``:
transformers 5 leaves ``text_model.`` out in some of its classes, in memory and on the disk.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from recare_patch.models.peft_layers import base_layers, tuner_layers

UNET = "unet"
TRANSFORMER = "transformer"
DENOISERS = (UNET, TRANSFORMER)
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
COMPONENTS = (*DENOISERS, *TEXT_ENCODERS)


def full_name(component: str, module: str) -> str:
    """A layer's name in a patch, from its name in the network or in a weights file."""
    if component in TEXT_ENCODERS and module.startswith("encoder."):
        module = f"text_model.{module}"
    return f"{component}.{module}"


def split_name(full: str) -> tuple[str, str]:
    """Component and module of a full name."""
    component, _, module = full.partition(".")
    return component, module


def in_words(component: str) -> str:
    """What messages call a component."""
    return "UNet" if component == UNET else component.replace("_", " ")


def networks(pipe: Any) -> dict[str, nn.Module]:
    """The networks of a diffusers pipeline that a patch may change, by component."""
    found = {name: getattr(pipe, name, None) for name in COMPONENTS}
    return {name: one for name, one in found.items() if isinstance(one, nn.Module)}


def named_layers(parts: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Every submodule by its full name, as if nothing had been wrapped.

    Args:
        parts: component → network.
    """
    return {full_name(part, name): one for part, net in parts.items() for name, one in base_layers(net)}


def named_tuner_layers(parts: Mapping[str, nn.Module]) -> Iterator[tuple[str, Any]]:
    """Every layer that PEFT has wrapped, with its full name; see :func:`named_layers`."""
    for part, net in parts.items():
        for name, layer in tuner_layers(net):
            yield full_name(part, name), layer
