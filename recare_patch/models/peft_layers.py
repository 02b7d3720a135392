"""The one place that looks inside PEFT's wrapped layers.

PEFT replaces a layer by one that holds it as its base layer, beside any number of named adapters.
Everything else in the package sees either plain names, as if nothing were wrapped, or adapters.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


def tuner_layers(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Every layer of ``module`` that PEFT has wrapped, with its name."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, child in module.named_modules():
        if isinstance(child, BaseTunerLayer):
            yield name, child


def base_layers(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every submodule under its own name, as if nothing had been wrapped."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    def walk(parent: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
        for name, child in parent.named_children():
            full = f"{prefix}{name}"
            if isinstance(child, BaseTunerLayer):
                yield full, child.get_base_layer()
            else:
                yield full, child
                yield from walk(child, f"{full}.")

    yield from walk(module, "")


@contextmanager
def kept_requires_grad(module: nn.Module) -> Iterator[None]:
    """PEFT's switches also switch gradients; put those of every parameter back as they were."""
    flags = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def settle_adapter(network: nn.Module, name: str) -> None:
    """Move an adapter to where its network computes, if the network's own weights only visit there.

    accelerate's offloading keeps them elsewhere and brings them for each call; PEFT would leave the
    adapter where they are kept. A new adapter, which it leaves without values, gets room for them.

    Args:
        network: with the adapter in it.
        name: of the adapter.
    """
    for _, layer in tuner_layers(network):
        place = getattr(getattr(layer.get_base_layer(), "_hf_hook", None), "execution_device", None)
        parts = [layer.lora_A[name], layer.lora_B[name]] if name in layer.lora_A else []
        for part in parts if place is not None else []:
            if part.weight.is_meta:
                part.to_empty(device=place)
            else:
                part.to(place)


def remove_adapter(module: nn.Module, name: str) -> None:
    """Take an adapter out of a network; layers that hold no other one become plain again.

    Adapters that were on stay on, and none that was off is switched on in its place.

    Args:
        module: the network.
        name: of the adapter; one that is not there is no error.
    """
    with kept_requires_grad(module):
        for full, layer in list(tuner_layers(module)):
            if name in layer.active_adapters:
                was_off = layer.disable_adapters
                layer.set_adapter([other for other in layer.active_adapters if other != name])
                if was_off:
                    layer.enable_adapters(False)
            if name in layer.lora_A:
                layer.delete_adapter(name)
            if not layer.lora_A:
                parent, _, last = full.rpartition(".")
                setattr(module.get_submodule(parent), last, layer.get_base_layer())
    configs = getattr(module, "peft_config", None)
    if configs is None:
        return
    configs.pop(name, None)
    if not configs:
        del module.peft_config
        if hasattr(module, "_hf_peft_config_loaded"):
            setattr(module, "_hf_peft_config_loaded", False)  # noqa: B010 - no attribute that nn.Module types
