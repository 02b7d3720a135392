"""LoRA in a live denoiser or text encoder: where it goes, how it starts, and how to look past it.

Low-rank adaptation (Hu et al., arXiv 2106.09685) adds ``(alpha / rank) · B A`` to a frozen weight.
PEFT does the arithmetic: it replaces a layer by one that holds it as its base layer, beside any number
of named adapters. The frozen teacher is the same network with the adapter off, so it costs no memory.

A layer's full name in a patch is ``<component>.<module>``, such as ``unet.mid_block.attentions.0.proj_in``.
The modules of a text encoder are named as all LoRA files name them, ``text_encoder.text_model.encoder…``:
transformers 5 leaves ``text_model.`` out in some of its classes, in memory and on the disk.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from recare_patch.core import NoMatchingModuleError, PatchError, unknown_name
from recare_patch.recipe import LAYER_SETS, TEXT_LAYER_SETS

if TYPE_CHECKING:
    from recare_patch.models.latent_diffusion import LatentDiffusion

UNET = "unet"
TRANSFORMER = "transformer"
DENOISERS = (UNET, TRANSFORMER)
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
COMPONENTS = (*DENOISERS, *TEXT_ENCODERS)

ADAPTER_NAME = "recare"
TEACHER_NAME = "teacher"
"""An adapter of this name belongs to the frozen teacher: it is on where all others are off."""

_SIDES: dict[str, tuple[str | None, ...]] = {
    "cross-attention": ("cross",),
    "cross-attention-kv": ("cross",),
    "cross-attention-v": ("cross",),
    "text": ("cross", "pooled"),
    "self-attention": ("self",),
    "attention": ("cross", "self"),
    "transformer-blocks": ("cross", "self", "block", "pooled"),
    "outside-cross-attention": ("self", "block", "pooled", None),
    "all": ("cross", "self", "block", "pooled", None),
}
"""Layer set of a denoiser → whose layers are in it: the prompt's, the picture's own, other linear ones
of a transformer's blocks, those that take in a pooled prompt, all others."""

_POOLED = "add_embedding."
"""Where a UNet takes in a pooled prompt: Stable Diffusion XL's way beside its cross-attention."""

_ENDS = {
    "cross-attention-kv": ("to_k", "to_v", "add_k_proj", "add_v_proj"),
    "cross-attention-v": ("to_v", "add_v_proj"),
}
"""Layer set → how the names of those that it takes of them end."""


@dataclass(frozen=True)
class TextSide:
    """The linear layers of a denoiser that only a prompt passes, as was seen while it computed.

    Attributes:
        stream: all of them, by name.
        entry: those that read what the text encoder made, first of all.
    """

    stream: frozenset[str]
    entry: tuple[str, ...]


TEXT_SIDES: WeakKeyDictionary[nn.Module, TextSide] = WeakKeyDictionary()
"""Denoiser → its text side, where a base has looked."""

COMPILED = "_orig_mod."
"""What torch.compile puts into the names of what it wraps."""


def full_name(component: str, module: str) -> str:
    """A layer's name in a patch, from its name in the network or in a weights file."""
    module = module.replace(COMPILED, "")
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
    """The networks of a diffusers pipeline that a patch may change, by component; compiled ones as they were."""
    found = {name: getattr(pipe, name, None) for name in COMPONENTS}
    found = {name: getattr(one, COMPILED[:-1], one) for name, one in found.items()}
    return {name: one for name, one in found.items() if isinstance(one, nn.Module)}


def tuner_layers(network: nn.Module) -> Iterator[tuple[str, Any]]:
    """Every layer of ``network`` that PEFT has wrapped, with its name."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return ((name, one) for name, one in network.named_modules() if isinstance(one, BaseTunerLayer))


def base_layers(network: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every submodule under its own name, as if nothing had been wrapped."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, child in network.named_children():
        if isinstance(child, BaseTunerLayer):
            yield f"{prefix}{name}", child.get_base_layer()
        else:
            yield f"{prefix}{name}", child
            yield from base_layers(child, f"{prefix}{name}.")


def named_layers(parts: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Every submodule of some components' networks by its full name, as if nothing had been wrapped."""
    return {full_name(part, name): one for part, net in parts.items() for name, one in base_layers(net)}


def named_tuner_layers(parts: Mapping[str, nn.Module]) -> Iterator[tuple[str, Any]]:
    """Every layer of some components' networks that PEFT has wrapped, with its full name."""
    return ((full_name(part, name), one) for part, net in parts.items() for name, one in tuner_layers(net))


def _is_attention(module: nn.Module) -> bool:
    """Whether a module projects to queries, keys and values: diffusers' ``Attention`` and its kin."""
    return all(hasattr(module, name) for name in ("to_q", "to_k", "to_v"))


def _prompt_layers(attention: nn.Module) -> tuple[str, ...] | None:
    """The layers of an attention block that take keys and values from the prompt; None: all of them.

    diffusers says so itself: ``is_cross_attention`` where the whole block does, and a width of added
    keys where prompt and picture share one block. A name such as ``attn2`` says nothing: in some
    transformers it belongs to the picture's attention to itself.
    """
    if getattr(attention, "is_cross_attention", False) is True:
        return None
    shared = getattr(attention, "added_kv_proj_dim", None)
    return ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out") if shared else ()


def prompt_attention(denoiser: nn.Module) -> list[nn.Module]:
    """The attention blocks of a denoiser that read the prompt, in the order in which it holds them."""
    return [one for _, one in base_layers(denoiser) if _is_attention(one) and _prompt_layers(one) != ()]


def adapted(base: LatentDiffusion, layers: str) -> dict[str, nn.Module]:
    """The networks of a base that hold a named layer set, by component; UnknownNameError for other names."""
    if layers not in LAYER_SETS:
        raise unknown_name("layer set", layers, LAYER_SETS)
    in_text = layers in TEXT_LAYER_SETS
    return {part: network for part, network in base.components.items() if (part in TEXT_ENCODERS) == in_text}


def target_modules(network: nn.Module, layers: str) -> list[str]:
    """Names of the layers in a named set, in the order in which the network holds them.

    In a denoiser these are ``cross-attention`` (queries, keys, values and output of the blocks that read
    the prompt), ``cross-attention-kv`` (their keys and values only), ``cross-attention-v`` (their values), ``text``
    (``cross-attention`` and all layers that only the prompt passes, pooled or not), ``text-input`` (those that
    read it first), ``self-attention``, ``attention`` (both), ``transformer-blocks`` (these, the blocks'
    feed-forward layers, what leads into and out of the blocks, and what takes in a pooled prompt, which brings the
    concept along; linear layers alone, as most LoRAs of Stable Diffusion have them),
    ``outside-cross-attention`` (every linear and convolution layer but those; what ReCARE's release trains,
    arXiv 2606.24192) or ``all``; in a text encoder ``text-encoder`` (every linear layer of its blocks, not what
    projects its pooled output).

    Raises:
        UnknownNameError: for another name.
        NoMatchingModuleError: the set is empty in this network.
    """
    if layers not in LAYER_SETS:
        raise unknown_name("layer set", layers, LAYER_SETS)
    kind = type(network).__name__
    everything = list(base_layers(network))
    if layers in TEXT_LAYER_SETS:
        start = ("encoder.layers.", "text_model.encoder.layers.")
        linear = [name for name, module in everything if isinstance(module, nn.Linear)]
        if found := [name for name in linear if name.startswith(start)]:
            return found
        raise NoMatchingModuleError(
            f"layer set '{layers}' matches no module of this {kind}: no linear layer is under '{start[0]}'"
        )
    if hasattr(network, "get_input_embeddings"):
        raise NoMatchingModuleError(
            f"layer set '{layers}' is one of denoisers, and a {kind} is a text encoder: "
            f"it has {', '.join(TEXT_LAYER_SETS)}"
        )
    # The prompt's layers and the picture's own; a block inside another decides for itself, as it comes later.
    side: dict[str, str] = {}
    blocks = {name: module for name, module in everything if _is_attention(module)}
    for name, block in blocks.items():
        cross = _prompt_layers(block)
        for inner, _ in block.named_modules():
            reads = cross is None or inner.split(".")[0] in cross
            side[f"{name}.{inner}"] = "cross" if reads else "self"
    side = dict.fromkeys(_in_blocks(network, tuple(blocks)), "block") | side
    side |= {name: "pooled" for name, _ in everything if name.startswith(_POOLED)}
    every = [name for name, module in everything if isinstance(module, nn.Linear | nn.Conv2d)]
    seen = TEXT_SIDES.get(network, TextSide(frozenset(), ()))
    found = [name for name in every if side.get(name) in _SIDES.get(layers, ())]
    if layers == "text":
        found = [name for name in every if name in seen.stream or name in found]
    elif layers == "text-input":
        found = list(seen.entry) or target_modules(network, "cross-attention-kv")
    if layers in _ENDS:
        found = [name for name in found if name.endswith(_ENDS[layers])]
    if not found:
        raise NoMatchingModuleError(
            f"layer set '{layers}' matches no module of this {kind}: it has {len(every)} linear and "
            f"convolution layers and {len(blocks)} attention blocks, "
            f"{len(prompt_attention(network))} of which read the prompt"
        )
    return found


def _in_blocks(network: nn.Module, attention: tuple[str, ...]) -> set[str]:
    """Linear layers, and convolutions that are no more, of the blocks that hold an attention block.

    And those beside such a list of blocks, which lead into and out of it; what belongs to a whole network does not.
    """
    around, beside = set[str](), set[str]()
    for name in attention:
        block, _, _ = name.rpartition(".")
        kept_in = block.rpartition(".")[0] if block.rpartition(".")[2].isdigit() else ""
        if block and not isinstance(network.get_submodule(block), nn.ModuleList):
            around.add(block)
            beside.add(kept_in.rpartition(".")[0])
    linear = {
        name
        for name, module in base_layers(network)
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1))
    }
    inside = {name for name in linear for block in around if name.startswith(f"{block}.")}
    return inside | {name for name in linear if name.rpartition(".")[0] in beside - {""}}


def attach(
    network: nn.Module, *, layers: str, rank: int, alpha: float, generator: torch.Generator, name: str = ADAPTER_NAME
) -> list[nn.Parameter]:
    """Put a new LoRA into a network and switch it on; the outputs do not change yet, as ``B`` is zero.

    ``A`` starts Kaiming-uniform, as in PEFT, from ``generator``, layer after layer. The network's own
    weights are left as they are and get no gradient.

    Returns:
        The new parameters, fp32, ``A`` and ``B`` of each of :func:`target_modules`' layers, in their order.

    Raises:
        UnknownNameError, NoMatchingModuleError: see :func:`target_modules`.
        ValueError: the network already holds an adapter of this name.
    """
    kind = type(network).__name__
    if name in getattr(network, "peft_config", {}):
        raise ValueError(f"the {kind} already holds an adapter named '{name}'")
    targets = target_modules(network, layers)
    wrapped = inject(network, dict.fromkeys(targets, rank), name, alpha=alpha)
    if sorted(wrapped) != sorted(targets):
        # PEFT matches names by their ends; silence here would train the wrong layers.
        remove_adapter(network, name)
        raise NoMatchingModuleError(
            f"layer set '{layers}' names {len(targets)} modules of this {kind}, but the adapter went into "
            f"{len(wrapped)}"
        )
    parameters: list[nn.Parameter] = []
    for full in targets:
        layer = wrapped[full]
        down, up = layer.lora_A[name].float(), layer.lora_B[name].float()
        start = torch.empty(down.weight.shape, device=generator.device)
        nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=generator)
        with torch.no_grad():
            down.weight.copy_(start)
            up.weight.zero_()
        layer.eval()
        parameters += [down.weight.requires_grad_(True), up.weight.requires_grad_(True)]
    return parameters


def inject(network: nn.Module, ranks: Mapping[str, int], name: str, *, alpha: float | None = None) -> dict[str, Any]:
    """Put a LoRA without values into layers of a network, each of its rank; by default ``alpha`` is the rank too.

    Returns:
        The layers that hold it now, by name.
    """
    from peft import LoraConfig, inject_adapter_in_model

    rank = max(ranks.values())
    odd = {f"^{re.escape(layer)}": one for layer, one in ranks.items() if one != rank}
    config = LoraConfig(
        r=rank,
        lora_alpha=rank if alpha is None else alpha,  # type: ignore[arg-type]
        target_modules=list(ranks),
        rank_pattern=odd,
        alpha_pattern=odd if alpha is None else {},
        lora_dropout=0.0,
        bias="none",
    )
    modes = [(module, module.training) for module in network.modules()]
    # PEFT draws its own start from the global generator: keep that one where it was. It also warns of
    # a second adapter, which is what was asked for.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        inject_adapter_in_model(config, network, adapter_name=name)
    settle_adapter(network, name)
    for module, training in modes:
        module.training = training
    _tell_network(network, True)
    return {full: layer for full, layer in tuner_layers(network) if name in layer.lora_A}


def _tell_network(network: nn.Module, loaded: bool) -> None:
    """Let the network's own methods (unload_lora, a later load_lora_weights) know of adapters."""
    if hasattr(network, "_hf_peft_config_loaded"):
        setattr(network, "_hf_peft_config_loaded", loaded)  # noqa: B010 - no attribute that nn.Module types


def settle_adapter(network: nn.Module, name: str) -> None:
    """Move an adapter to where its network computes, if the network's own weights only visit there.

    accelerate's offloading brings them for each call, and PEFT would leave the adapter where they are
    kept. A new adapter, which it leaves without values, gets room for them.
    """
    for _, layer in tuner_layers(network):
        place = getattr(getattr(layer.get_base_layer(), "_hf_hook", None), "execution_device", None)
        if place is not None and name in layer.lora_A:
            for part in (layer.lora_A[name], layer.lora_B[name]):
                part.to_empty(device=place) if part.weight.is_meta else part.to(place)


def remove_adapter(network: nn.Module, name: str = ADAPTER_NAME) -> None:
    """Take an adapter out, if it is there; layers that hold no other one become plain again.

    Other adapters stay on or off as they were.
    """
    with kept_requires_grad(network):
        for full, layer in list(tuner_layers(network)):
            if name in layer.active_adapters:
                was_off = layer.disable_adapters
                layer.set_adapter([other for other in layer.active_adapters if other != name])
                if was_off:
                    layer.enable_adapters(False)
            if name in layer.lora_A:
                layer.delete_adapter(name)
            if not layer.lora_A:
                parent, _, last = full.rpartition(".")
                setattr(network.get_submodule(parent), last, layer.get_base_layer())
    configs = getattr(network, "peft_config", None)
    if configs is not None:
        configs.pop(name, None)
        if not configs:
            del network.peft_config
            _tell_network(network, False)


detach = remove_adapter


@contextmanager
def kept_requires_grad(*networks: nn.Module) -> Iterator[None]:
    """PEFT's switches also switch gradients; put those of every parameter back as they were."""
    flags = [(one, one.requires_grad) for network in networks for one in network.parameters()]
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextmanager
def off(*networks: nn.Module) -> Iterator[None]:
    """The frozen teacher: inside, networks compute as if they held no adapter but its own."""
    layers = [
        (layer, bool(layer.disable_adapters), list(layer.active_adapters))
        for network in networks
        for _, layer in tuner_layers(network)
    ]
    with kept_requires_grad(*networks):
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
    """Let one adapter of a network be on, and no other; layers that do not hold it compute without any."""
    with kept_requires_grad(network):
        for _, layer in tuner_layers(network):
            layer.set_adapter([name] if name in layer.lora_A else [])


@contextmanager
def frozen(*networks: nn.Module) -> Iterator[None]:
    """Inside, adapters stay on but get no gradient: a textual inversion against them is cheaper so."""
    with kept_requires_grad(*networks):
        for network in networks:
            for _, layer in tuner_layers(network):
                layer.requires_grad_(False)
        yield


def _weights(network: nn.Module, name: str) -> dict[str, nn.Parameter]:
    return {
        f"{full}.lora_{side}.weight": factors[name].weight
        for full, layer in tuner_layers(network)
        for side, factors in (("A", layer.lora_A), ("B", layer.lora_B))
        if name in factors
    }


def adapter_state(network: nn.Module, name: str = ADAPTER_NAME) -> dict[str, Tensor]:
    """Copies of an adapter's tensors, unscaled: ``<module>.lora_A.weight`` and ``….lora_B.weight``."""
    state = {key: weight.detach().clone() for key, weight in _weights(network, name).items()}
    if not state:
        raise PatchError(f"the {type(network).__name__} holds no adapter named '{name}'")
    return state


def load_adapter_state(network: nn.Module, state: Mapping[str, Tensor], name: str = ADAPTER_NAME) -> None:
    """Put back what :func:`adapter_state` returned; PatchError, with nothing changed, if it does not fit."""
    places = _weights(network, name)
    if odd := sorted(set(places) ^ set(state)):
        raise PatchError(f"the tensors do not belong to adapter '{name}': {len(odd)} differ, first '{odd[0]}'")
    for key, place in places.items():
        if place.shape != state[key].shape:
            raise PatchError(f"tensor '{key}' has shape {tuple(state[key].shape)}, not {tuple(place.shape)}")
    with torch.no_grad():
        for key, place in places.items():
            place.copy_(state[key])
