"""What a base takes on a device, measured without one: bytes and operations on torch's meta device.

The base is built from its configurations, where tensors have shapes and no values. Prompts, a prediction, a training
sample and a picture go through it there, in the very code of a run, and what lives at the worst moment is added up.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from recare_patch.core import BaseModelError
from recare_patch.models import lora
from recare_patch.models.inputs import PromptEmbeds
from recare_patch.models.layout import Layout, family_of
from recare_patch.models.loading import PRECISIONS
from recare_patch.recipe import MemoryOptions

if TYPE_CHECKING:
    from recare_patch.models.latent_diffusion import LatentDiffusion
    from recare_patch.recipe import Recipe

META = torch.device("meta")


class Tracker(TorchDispatchMode):
    """Bytes of all tensors that live, now and at most, apart from those that were there before."""

    def __init__(self, before: list[Tensor]) -> None:
        super().__init__()
        self.now, self.peak = 0, 0
        self._kept = [tensor.untyped_storage() for tensor in before]
        self._seen: dict[int, Any] = {storage._cdata: None for storage in self._kept}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return made

    def _add(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return

        def forget(_: Any) -> None:
            del self._seen[key]
            self.now -= size

        self._seen[key] = weakref.ref(storage, forget)
        self.now += size
        self.peak = max(self.peak, self.now)


class _Attention(torch.autograd.Function):
    """Fused attention's shapes: it keeps its inputs, its output and one number a row, and no matrix."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_empty((*query.shape[:-1], value.shape[-1]))
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = ctx.saved_tensors[:3]
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


@contextmanager
def fused_attention() -> Iterator[list[int]]:
    """The meta device knows only attention that writes out its matrix, devices run the fused kind: the operations."""
    operations: list[int] = []

    def shapes(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        pairs = math.prod(query.shape[:-1]) * key.shape[-2]
        operations.append(2 * pairs * (query.shape[-1] + value.shape[-1]))
        made: Tensor = _Attention.apply(query, key, value)
        return made

    # A torch function mode would not reach what is computed again during a backward pass.
    own = functional.scaled_dot_product_attention
    functional.scaled_dot_product_attention = shapes
    try:
        yield operations
    finally:
        functional.scaled_dot_product_attention = own


@dataclass(frozen=True)
class Footprint:
    """What a base takes, in bytes and operations, at one precision and resolution."""

    denoiser: int  # bytes of its weights
    linear: int  # weights of its linear layers, which can be quantized, not in bytes
    size: int  # bytes of one weight
    block: int  # of the largest part that is computed at once when activations are forgotten
    encoders: int
    vae: int
    adapter: int  # parameters of the LoRA
    operations: float  # floating-point operations of one sample's prediction
    predicting: int  # what lives at most while one sample is predicted
    training: int  # the same with its backward pass
    checkpointed: int  # the same, activations forgotten
    decoding: int  # while one picture is decoded
    tiled: int  # the same in tiles
    decoded_at_once: int  # pictures
    encoding: int  # while one of several prompts is encoded
    reading: int  # the same with its backward pass
    row: int  # of an encoded prompt
    latent: int  # of one picture's latents, fp32


def bytes_of(*networks: nn.Module) -> int:
    """Of their parameters."""
    return sum(p.numel() * p.element_size() for network in networks for p in network.parameters())


def phantom(layout: Layout, precision: str, memory: MemoryOptions | None = None) -> LatentDiffusion:
    """A base on the meta device, from its configurations alone; it has no tokenizers.

    Levers that place weights or change layers are left to :func:`memory.place`.

    Raises:
        BaseModelError: it is of no supported family.
    """
    import diffusers
    import transformers

    family, dtype = family_of(layout), PRECISIONS[precision]
    if not family.counted:
        raise BaseModelError(
            f"what base {layout.name} takes is not counted, as it is made from its pipeline's calls; choose levers "
            "by hand, such as --set memory.micro_batch=1 (docs/memory.md)"
        )
    parts: dict[str, Any] = {}
    for name in (family.denoiser_name, "vae", *family.encoder_names):
        config = dict(layout.require(name, weights=False))
        kind = layout.index[name][1]
        with META:
            if name in family.encoder_names:
                made = getattr(transformers, kind)
                parts[name] = made(made.config_class.from_dict(config))
            else:
                parts[name] = getattr(diffusers, kind).from_config(config)
        upcast = name == "vae" and family.upcast_vae and dtype is torch.float16
        nn.Module.to(parts[name], dtype=torch.float32 if upcast else dtype)
    scheduler = getattr(diffusers, layout.index["scheduler"][1]).from_config(layout.require("scheduler", weights=False))
    tokenizers = {family.tokenizer_name(name): None for name in family.encoder_names}
    left_out = dict.fromkeys(name for name in family.left_out)
    extra = {"requires_safety_checker": False} if "safety_checker" in left_out else {}
    pipeline = getattr(diffusers, family.pipeline_class)(
        **parts, **tokenizers, scheduler=scheduler, **left_out, **extra
    )
    return family(pipeline, layout.name.strip("'"), device=META, memory=memory)


def measure(layout: Layout, recipe: Recipe) -> Footprint:
    """What a recipe's base takes at its precision and resolution, its other levers left aside."""
    base = phantom(layout, recipe.precision, MemoryOptions(resolution=recipe.memory.resolution))
    denoiser, encoders, vae = base.denoiser, base._encoders, base.pipeline.vae
    linear = sum(m.weight.numel() for m in denoiser.modules() if isinstance(m, nn.Linear))
    blocks = [bytes_of(m) for name, m in denoiser.named_modules() if _is_block(name)]
    whole, generator, options = bytes_of(denoiser), torch.Generator(), recipe.adapter
    parameters = [
        one
        for network in lora.adapted(base, options.layers).values()
        for one in lora.attach(
            network, layers=options.layers, rank=options.rank, alpha=options.alpha, generator=generator
        )
    ]
    with torch.no_grad():
        embeds = _read(base, 1)
    # As where word vectors are fitted: a patch may leave the denoiser alone.
    embeds.prompt_embeds.requires_grad_()
    latents = torch.empty((1, *base.latent_shape), device=META)
    at = torch.zeros(1, dtype=torch.long, device=META)

    def backward(made: Tensor) -> None:
        made.mean().backward()
        for parameter in (*parameters, embeds.prompt_embeds):
            parameter.grad = None

    def decoded() -> None:
        vae.decode(torch.empty((1, *base.latent_shape), device=META, dtype=vae.dtype), return_dict=False)

    with fused_attention() as attention:
        with torch.no_grad():
            with FlopCounterMode(display=False) as counted:
                base.denoise(latents, at, embeds.detach())
            operations = counted.get_total_flops() + sum(attention)
            predicting = _peak(base, lambda: base.denoise(latents, at, embeds.detach()))
            decoding = _peak(base, decoded)
            base.tile_pictures()
            tiled = _peak(base, decoded)
            encoding = _peak(base, lambda: _read(base, _PROMPTS)) // _PROMPTS
        reading = _peak(base, lambda: backward(_read(base, 1, learnt=True).prompt_embeds))
        training = _peak(base, lambda: backward(base.denoise(latents, at, embeds)))
        denoiser.enable_gradient_checkpointing()  # type: ignore[operator]
        checkpointed = _peak(base, lambda: backward(base.denoise(latents, at, embeds)))
    return Footprint(
        denoiser=whole,
        linear=linear,
        size=base.dtype.itemsize,
        block=max(blocks, default=whole),
        encoders=bytes_of(*encoders),
        vae=bytes_of(vae),
        adapter=sum(parameter.numel() for parameter in parameters),
        operations=float(operations),
        predicting=predicting,
        training=training,
        checkpointed=checkpointed,
        decoding=decoding,
        tiled=tiled,
        decoded_at_once=base.decoded_at_once,
        encoding=encoding,
        reading=reading,
        row=sum(one.nbytes for one in vars(embeds).values() if one is not None),
        latent=latents.nbytes,
    )


_PROMPTS = 8
"""So many are encoded to see what one of several takes: alone it would bear all that they share."""


def _is_block(name: str) -> bool:
    """Whether a module is one whose activations diffusers forgets as a whole."""
    parent, _, last = name.rpartition(".")
    return last.isdigit() and parent.rpartition(".")[2] in ("resnets", "transformer_blocks")


def _read(base: LatentDiffusion, prompts: int, *, learnt: bool = False) -> PromptEmbeds:
    """What the text encoders make of so many prompts, whose tokens' vectors may be learnt."""
    outputs = []
    for encoder in base._encoders:
        ids = torch.zeros((prompts, encoder.config.max_position_embeddings), dtype=torch.long, device=META)
        hook = encoder.get_input_embeddings().register_forward_hook(
            lambda module, args, embedded: embedded.detach().requires_grad_(learnt)
        )
        outputs.append(encoder(ids, output_hidden_states=True))
        hook.remove()
    return base._join(outputs)


def _peak(base: LatentDiffusion, work: Callable[[], Any]) -> int:
    networks = [base.denoiser, base.pipeline.vae, *base._encoders]
    tensors = [t for network in networks for t in (*network.parameters(), *network.buffers())]
    with Tracker(tensors) as tracker:
        work()
    return tracker.peak
