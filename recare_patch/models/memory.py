"""Memory levers: what a base gives up in speed, and seldom in exactness, for room on the device.

Each is one key of a recipe's ``memory`` section. They work below :class:`LatentDiffusion`'s methods: no
method, loop or metric knows which of them are in use, and nothing here is called where none is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from recare_patch.core import BaseModelError
from recare_patch.recipe import MemoryOptions

if TYPE_CHECKING:
    from recare_patch.models.inputs import EvaluationCounter, PromptEmbeds

    Inputs = tuple[Tensor, Tensor, PromptEmbeds]

HOST = torch.device("cpu")
"""Where parts wait that are not needed on the device."""

COMPILER = "inductor"
"""What :func:`compile_blocks` compiles with."""

_BLOCK = re.compile(r"(^|\.)transformer_blocks\.\d+$")


def place(
    pipeline: Any,
    denoiser: nn.Module,
    encoders: Sequence[nn.Module],
    memory: MemoryOptions,
    device: torch.device,
    dtype: torch.dtype,
    *,
    large_encoders: bool = False,
) -> None:
    """Put the networks of a pipeline loaded on the host where the levers want them, as they want them.

    Where text encoders are large, weights are quantized in them and activations forgotten as in the denoiser.
    """
    if large_encoders and memory.checkpointing:
        forget_activations(*encoders)
    for encoder in encoders:
        if large_encoders and memory.weights != "full":
            quantize(encoder, memory.weights, dtype)
        nn.Module.to(encoder, HOST if memory.encoders_off_device else device)
    nn.Module.to(pipeline.vae, HOST if memory.vae_off_device else device)
    if memory.channels_last:
        for network in (denoiser, pipeline.vae):
            nn.Module.to(network, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if memory.compile:
        compile_blocks(denoiser)
    if memory.checkpointing:
        denoiser.enable_gradient_checkpointing()  # type: ignore[operator]
    if memory.offload:
        from accelerate import cpu_offload

        # Its hooks make new parameters, which ask for gradients as these do.
        denoiser.requires_grad_(False)
        cpu_offload(denoiser, execution_device=device, offload_buffers=True)
        return
    if memory.weights != "full":
        quantize(denoiser, memory.weights, dtype)
    nn.Module.to(denoiser, device)


def compile_blocks(denoiser: nn.Module) -> None:
    """Compile the transformer blocks in place, each when it is first used (Ansel et al., ASPLOS 2024).

    Blocks of one shape share what was compiled, and what counts evaluations stays outside. A block is
    compiled anew where an adapter comes, goes, or is switched: at most a dozen times in a run.
    """
    import torch._dynamo

    # Each width, with and without adapter, with and without gradient, in a few batch sizes.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    for name, module in denoiser.named_modules():
        if _BLOCK.search(name):
            module.compile(backend=COMPILER)


def forget_activations(*encoders: nn.Module) -> None:
    """Let text encoders forget their layers' activations and compute them again (Chen et al., arXiv 1604.06174)."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    for encoder in encoders:
        getattr(encoder, "activation_checkpointing_enable", encoder.gradient_checkpointing_enable)()  # type: ignore[operator]
        for layer in encoder.modules():
            if isinstance(layer, GradientCheckpointingLayer):
                # Such a layer does it only while it trains; what is in it stays as it is.
                layer.training = True


def linear_layers(network: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """The linear layers that can be quantized, by the module that holds each and their name there.

    Left out are those of a text encoder that transformers keeps in fp32, as T5's last ones.
    """
    plain = getattr(network, "_keep_in_fp32_modules", None) or ()
    for parent in network.modules():
        for name, layer in parent.named_children():
            if type(layer) is nn.Linear and name not in plain:
                yield parent, name, layer


def quantize(denoiser: nn.Module, weights: str, dtype: torch.dtype) -> None:
    """Exchange linear layers in place for bitsandbytes', with frozen 8-bit or 4-bit weights.

    Weights are quantized when they come to the device: int8 by rows (Dettmers et al., arXiv 2208.07339)
    or nf4 by blocks of 64 (Dettmers et al., arXiv 2305.14314). Products are computed in ``dtype``.
    """
    from bitsandbytes import nn as kinds

    for parent, name, layer in list(linear_layers(denoiser)):
        sizes = (layer.in_features, layer.out_features, layer.bias is not None)
        if weights == "nf4":
            made = kinds.Linear4bit(*sizes, compute_dtype=dtype, quant_type="nf4", device="meta")
            made.weight = kinds.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
            # Its packing for certain CPUs has no backward pass.
            made.support_avx512bf16_for_cpu = False
        else:
            made = kinds.Linear8bitLt(*sizes, has_fp16_weights=False, device="meta")
            made.weight = kinds.Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
        made.bias = layer.bias
        setattr(parent, name, made)
    # What PEFT looks at to wrap such layers by its own kinds.
    setattr(denoiser, f"is_loaded_in_{4 if weights == 'nf4' else 8}bit", True)


def in_chunks(
    predict: Callable[[Tensor, Tensor, PromptEmbeds], Tensor], inputs: Inputs, most: int, counter: EvaluationCounter
) -> Tensor:
    """Predict a batch at most ``most`` samples at a time.

    Where the prediction is recorded for a backward pass, each chunk's activations are forgotten and
    computed again when their turn comes (Chen et al., arXiv 1604.06174): one chunk's lie in memory at any
    time, at the price of one more forward pass, which the counter leaves out.
    """
    latents, timesteps, embeds = inputs
    if len(latents) <= most:
        return predict(*inputs)
    parts = []
    for start in range(0, len(latents), most):
        rows = slice(start, start + most)
        chunk = (latents[rows], timesteps[rows] if timesteps.ndim else timesteps, embeds[rows])
        if not torch.is_grad_enabled():
            parts.append(predict(*chunk))
            continue
        again = lambda: (nullcontext(), counter.stage(None))  # noqa: E731
        parts.append(checkpoint(predict, *chunk, use_reentrant=False, preserve_rng_state=False, context_fn=again))
    return torch.cat(parts)


def deciding(memory: MemoryOptions) -> dict[str, Any]:
    """The levers that are set and decide what is drawn; the others change it by rounding."""
    return memory.model_dump(include={"weights", "vae_tiling", "resolution"}, exclude_defaults=True)


def tile(vae: Any, width: int, height: int) -> None:
    """Let an autoencoder work on one picture at a time, in tiles of half a side."""
    vae.enable_slicing()
    vae.enable_tiling()
    # Its own tiles are as large as the pictures that it was trained on, which would never be cut.
    side = max(width, height) // 2
    if hasattr(vae, "tile_latent_min_size"):
        scale = 2 ** (len(vae.config.block_out_channels) - 1)
        vae.tile_latent_min_size, vae.tile_sample_min_size = side // scale, side
    elif hasattr(vae, "tile_sample_min_height"):
        vae.tile_sample_min_height = vae.tile_sample_min_width = side
        vae.tile_sample_stride_height = vae.tile_sample_stride_width = side * 3 // 4


def latent_size(name: str, resolution: str, scale: int, step: int) -> tuple[int, int]:
    """Height and width of a base's latents for ``WIDTHxHEIGHT`` pixels, ``scale`` of them a latent's side.

    Raises:
        BaseModelError: a side is no multiple of ``step``.
    """
    width, height = map(int, resolution.split("x"))
    if width % step or height % step:
        near = "x".join(str(max(step, round(side / step) * step)) for side in (width, height))
        raise BaseModelError(
            f"base {name} cannot draw {resolution} pixels: both sides must be multiples of {step}, such as {near}"
        )
    return height // scale, width // scale
