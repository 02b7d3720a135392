"""LoRA in a live denoiser or text encoder: where it goes, how it starts, and how to look past it.

Low-rank adaptation (Hu et al., arXiv 2106.09685) adds ``(alpha / rank) · B A`` to a frozen weight.
PEFT does the arithmetic. What is here finds the layers by what they *are* (an attention block that
reads the prompt, whatever it is called) and starts them from a given generator. The frozen teacher
is the same network with the adapter off, so it costs no memory.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from recare_patch.core import NoMatchingModuleError, PatchError, unknown_name
from recare_patch.models.components import TEXT_ENCODERS
from recare_patch.models.peft_layers import (
    base_layers,
    kept_requires_grad,
    remove_adapter,
    settle_adapter,
    tuner_layers,
)
from recare_patch.recipe import LAYER_SETS, TEXT_LAYER_SETS

if TYPE_CHECKING:
    from recare_patch.models.embeds import BaseModel

ADAPTER_NAME = "recare"

TEACHER_NAME = "teacher"
"""An adapter of this name belongs to the frozen teacher: it is on where all others are off."""


def _is_attention(module: nn.Module) -> bool:
    """Whether a module projects to queries, keys and values: diffusers' ``Attention`` and its kin."""
    return all(hasattr(module, name) for name in ("to_q", "to_k", "to_v"))


def _reads_prompt(attention: nn.Module) -> bool:
    """Whether an attention block takes keys and values from the prompt.

    diffusers says so itself: ``is_cross_attention`` where the whole block does, and a width of added
    keys where prompt and picture share one block. A name such as ``attn2`` says nothing: in some
    transformers it belongs to the picture's attention to itself.
    """
    return getattr(attention, "is_cross_attention", False) is True or bool(
        getattr(attention, "added_kv_proj_dim", None)
    )


def prompt_attention(denoiser: nn.Module) -> list[nn.Module]:
    """The attention blocks of a denoiser that read the prompt, in the order in which it holds them."""
    return [one for _, one in base_layers(denoiser) if _is_attention(one) and _reads_prompt(one)]


_PROMPT_SIDE = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


def adapted(base: BaseModel, layers: str) -> dict[str, nn.Module]:
    """The networks of a base that hold a named layer set, by component.

    Raises:
        UnknownNameError: for another name.
    """
    if layers not in LAYER_SETS:
        raise unknown_name("layer set", layers, LAYER_SETS)
    if layers in TEXT_LAYER_SETS:
        return {part: network for part, network in base.components.items() if part in TEXT_ENCODERS}
    return {part: network for part, network in base.components.items() if part not in TEXT_ENCODERS}


def target_modules(network: nn.Module, layers: str) -> list[str]:
    """Names of the layers in a named set, in the order in which the network holds them.

    Args:
        network: a diffusers UNet or transformer, or a transformers text encoder, with or without adapters.
        layers: in a denoiser ``cross-attention`` (queries, keys, values and output of the blocks that read
            the prompt), ``cross-attention-kv`` (their keys and values only), ``self-attention``,
            ``attention`` (both), ``outside-cross-attention`` (every linear and convolution layer but
            those; what ReCARE's release trains, arXiv 2606.24192) or ``all``; in a text encoder
            ``text-encoder`` (every linear layer of its blocks).

    Raises:
        UnknownNameError: for another name.
        NoMatchingModuleError: if the set is empty in this network.
    """
    if layers not in LAYER_SETS:
        raise unknown_name("layer set", layers, LAYER_SETS)
    if layers in TEXT_LAYER_SETS:
        return _text_modules(network, layers)
    owner: dict[str, str] = {}
    kinds: dict[str, str] = {}
    linear: list[str] = []
    for name, module in base_layers(network):
        if _is_attention(module):
            kinds[name] = "cross" if _reads_prompt(module) else "self"
            mixed = kinds[name] == "cross" and getattr(module, "is_cross_attention", False) is not True
            for inner, _ in module.named_modules():
                # In a block shared by both, only the added projections belong to the prompt.
                prompt_side = not mixed or inner.split(".")[0] in _PROMPT_SIDE
                owner[f"{name}.{inner}"] = kinds[name] if prompt_side else "self"
        if isinstance(module, nn.Linear | nn.Conv2d):
            linear.append(name)
    if hasattr(network, "get_input_embeddings"):
        raise NoMatchingModuleError(
            f"layer set '{layers}' is one of denoisers, and a {type(network).__name__} is a text encoder: "
            f"it has {', '.join(TEXT_LAYER_SETS)}"
        )

    def keys_or_values(name: str) -> bool:
        return name.rsplit(".", 1)[-1] in ("to_k", "to_v", "add_k_proj", "add_v_proj")

    chosen = {
        "cross-attention": lambda name: owner.get(name) == "cross",
        "cross-attention-kv": lambda name: owner.get(name) == "cross" and keys_or_values(name),
        "self-attention": lambda name: owner.get(name) == "self",
        "attention": lambda name: owner.get(name) is not None,
        "outside-cross-attention": lambda name: owner.get(name) != "cross",
        "all": lambda name: True,
    }[layers]
    found = [name for name in linear if chosen(name)]
    if not found:
        raise NoMatchingModuleError(
            f"layer set '{layers}' matches no module of this {type(network).__name__}: "
            f"it has {len(linear)} linear and convolution layers and {len(kinds)} attention blocks, "
            f"{sum(kind == 'cross' for kind in kinds.values())} of which read the prompt"
        )
    return found


def _text_modules(network: nn.Module, layers: str) -> list[str]:
    """The linear layers of a text encoder's blocks: not what projects its pooled output."""
    blocks = "encoder.layers."
    found = [
        name
        for name, module in base_layers(network)
        if isinstance(module, nn.Linear) and name.removeprefix("text_model.").startswith(blocks)
    ]
    if not found:
        raise NoMatchingModuleError(
            f"layer set '{layers}' matches no module of this {type(network).__name__}: it has no linear "
            f"layer under '{blocks}'"
        )
    return found


def attach(
    network: nn.Module,
    *,
    layers: str,
    rank: int,
    alpha: float,
    generator: torch.Generator,
    name: str = ADAPTER_NAME,
) -> list[nn.Parameter]:
    """Put a new LoRA into a network and switch it on; the outputs do not change yet, as ``B`` is zero.

    Args:
        network: a denoiser or text encoder; its own weights are left as they are and get no gradient.
        layers: a name for :func:`target_modules`.
        rank: inner dimension.
        alpha: the update is scaled by ``alpha / rank``.
        generator: for the initial ``A`` (Kaiming-uniform, as PEFT does), layer after layer.
        name: of the adapter.

    Returns:
        The new parameters, fp32, ``A`` and ``B`` of each layer in the network's order.

    Raises:
        UnknownNameError, NoMatchingModuleError: see :func:`target_modules`.
        ValueError: if the network already holds an adapter of this name.
    """
    from peft import LoraConfig, inject_adapter_in_model

    if name in getattr(network, "peft_config", {}):
        raise ValueError(f"the {type(network).__name__} already holds an adapter named '{name}'")
    targets = target_modules(network, layers)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, lora_dropout=0.0, bias="none")
    modes = [(module, module.training) for module in network.modules()]
    # PEFT draws its own start from the global generator: keep that one where it was. It also warns of
    # a second adapter, which is what was asked for.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        inject_adapter_in_model(config, network, adapter_name=name)
    settle_adapter(network, name)
    for module, training in modes:
        module.training = training
    if hasattr(network, "_hf_peft_config_loaded"):
        # Lets the network's own methods (unload_lora, a later load_lora_weights) see the adapter.
        setattr(network, "_hf_peft_config_loaded", True)  # noqa: B010 - no attribute that nn.Module types
    wrapped = {full: layer for full, layer in tuner_layers(network) if name in layer.lora_A}
    if sorted(wrapped) != sorted(targets):
        # PEFT matches names by their ends; silence here would train the wrong layers.
        detach(network, name)
        raise NoMatchingModuleError(
            f"layer set '{layers}' names {len(targets)} modules of this {type(network).__name__}, "
            f"but the adapter went into {len(wrapped)}"
        )
    parameters: list[nn.Parameter] = []
    for full in targets:
        layer = wrapped[full]
        down, up = layer.lora_A[name], layer.lora_B[name]
        down.float(), up.float()
        start = torch.empty(down.weight.shape, device=generator.device)
        nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=generator)
        with torch.no_grad():
            down.weight.copy_(start)
            up.weight.zero_()
        layer.eval()
        for parameter in (down.weight, up.weight):
            parameter.requires_grad_(True)
            parameters.append(parameter)
    return parameters


def detach(network: nn.Module, name: str = ADAPTER_NAME) -> None:
    """Take an adapter out; layers that hold no other one become the plain layers they were.

    Args:
        network: a denoiser or text encoder.
        name: of the adapter; one that is not there is no error.
    """
    remove_adapter(network, name)


@contextmanager
def off(*networks: nn.Module) -> Iterator[None]:
    """The frozen teacher: inside, networks compute as if they held no adapter but its own.

    What was on before is on again afterwards, also when an error passes through.

    Args:
        networks: those of a base that may hold one, ``*base.components.values()``.
    """
    layers = [
        (layer, bool(layer.disable_adapters), list(layer.active_adapters))
        for network in networks
        for _, layer in tuner_layers(network)
    ]
    with ExitStack() as kept:
        for network in networks:
            kept.enter_context(kept_requires_grad(network))
        try:
            for layer, _, _ in layers:
                if TEACHER_NAME in layer.lora_A:
                    layer.set_adapter([TEACHER_NAME], inference_mode=True)
                else:
                    layer.enable_adapters(False)
            yield
        finally:
            for layer, was_off, active in layers:
                if TEACHER_NAME in layer.lora_A:
                    layer.set_adapter(active, inference_mode=True)
                layer.enable_adapters(not was_off)


def switch_to(network: nn.Module, name: str) -> None:
    """Let one adapter of a network be on, and no other.

    Args:
        network: a denoiser or text encoder.
        name: of the adapter; layers that do not hold it compute without any.
    """
    with kept_requires_grad(network):
        for _, layer in tuner_layers(network):
            layer.set_adapter([name] if name in layer.lora_A else [])


@contextmanager
def frozen(*networks: nn.Module) -> Iterator[None]:
    """Inside, adapters stay on but get no gradient: a textual inversion against them is cheaper so."""
    with ExitStack() as kept:
        for network in networks:
            kept.enter_context(kept_requires_grad(network))
            for _, layer in tuner_layers(network):
                for parameter in layer.parameters():
                    parameter.requires_grad_(False)
        yield


def adapter_state(network: nn.Module, name: str = ADAPTER_NAME) -> dict[str, Tensor]:
    """Copies of an adapter's tensors, unscaled: ``<module>.lora_A.weight`` and ``….lora_B.weight``.

    Raises:
        PatchError: if the network holds no adapter of that name.
    """
    state: dict[str, Tensor] = {}
    for full, layer in tuner_layers(network):
        if name in layer.lora_A:
            state[f"{full}.lora_A.weight"] = layer.lora_A[name].weight.detach().clone()
            state[f"{full}.lora_B.weight"] = layer.lora_B[name].weight.detach().clone()
    if not state:
        raise PatchError(f"the {type(network).__name__} holds no adapter named '{name}'")
    return state


def load_adapter_state(network: nn.Module, state: Mapping[str, Tensor], name: str = ADAPTER_NAME) -> None:
    """Put back what :func:`adapter_state` returned; nothing is changed unless everything fits.

    Raises:
        PatchError: if tensors are missing, extra or of another shape.
    """
    places: dict[str, nn.Parameter] = {}
    for full, layer in tuner_layers(network):
        if name in layer.lora_A:
            places[f"{full}.lora_A.weight"] = layer.lora_A[name].weight
            places[f"{full}.lora_B.weight"] = layer.lora_B[name].weight
    odd = sorted(set(places) ^ set(state))
    if odd:
        raise PatchError(
            f"the tensors do not belong to adapter '{name}': {len(odd)} differ, first '{odd[0]}'"
        )
    for key, place in places.items():
        if place.shape != state[key].shape:
            raise PatchError(f"tensor '{key}' has shape {tuple(state[key].shape)}, not {tuple(place.shape)}")
    with torch.no_grad():
        for key, place in places.items():
            place.copy_(state[key])
