"""Tells one set of weights from another, however they are stored or wrapped."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor, nn

from recare_patch.models.components import TEXT_ENCODERS, UNET
from recare_patch.models.peft_layers import tuner_layers


def base_weights(module: nn.Module) -> dict[str, Tensor]:
    """A module's own parameters and buffers by name, as if no adapter had ever been attached."""
    adapters = [name for name, _ in tuner_layers(module)]
    weights: dict[str, Tensor] = {}
    for name, tensor in module.state_dict().items():
        wrapped = next((layer for layer in adapters if name.startswith(f"{layer}.")), None)
        if wrapped is not None:
            inner = name[len(wrapped) + 1 :]
            if not inner.startswith("base_layer."):
                continue
            name = f"{wrapped}.{inner.removeprefix('base_layer.')}"
        weights[name] = tensor
    return weights


def weights_hash(module: nn.Module, component: str = UNET) -> str:
    """SHA-256 over names, shapes and fp16-rounded values, in the order of the names.

    Rounding makes a model loaded in fp32 from an fp16 file the same as that file; half of the
    precision of fp32 still tells any two trainings apart. bf16 weights have lost digits that fp16
    keeps, so their hash differs from the original's.

    Args:
        module: the network.
        component: which one it is; text encoders are named differently by different versions of
            transformers, and their hash is the same for all.
    """
    weights = base_weights(module)
    return _digest((name, weights[own]) for name, own in _hashed_names(weights, component).items())


def stored_weights_hash(files: Sequence[Path], component: str = UNET) -> str:
    """:func:`weights_hash` of a network on the disk, with one tensor in memory at a time.

    Args:
        files: all shards of its safetensors weights.
        component: see :func:`weights_hash`.
    """
    from safetensors import safe_open

    with ExitStack() as stack:
        handles = [stack.enter_context(safe_open(file, "pt")) for file in files]
        places = {name: handle for handle in handles for name in handle.keys()}  # noqa: SIM118 - no mapping
        names = _hashed_names(places, component)
        return _digest((name, places[own].get_tensor(own)) for name, own in names.items())


def _hashed_names(weights: Mapping[str, object], component: str) -> dict[str, str]:
    """The name that goes into the hash → the name in the network or the file, in order."""
    names = {name: name for name in weights}
    if component in TEXT_ENCODERS:
        # Old files store the positions 0, 1, 2, … as well, which newer classes count for themselves.
        names = {
            name.removeprefix("text_model."): name for name in weights if not name.endswith("position_ids")
        }
    return dict(sorted(names.items()))


def _digest(weights: Iterable[tuple[str, Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, tensor in weights:
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        rounded = tensor.detach().to("cpu", torch.float16).contiguous()
        digest.update(rounded.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
