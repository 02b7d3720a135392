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
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

from recare_patch.models import lora
from recare_patch.models.inputs import PromptEmbeds
from recare_patch.models.layout import Layout, family_of
from recare_patch.models.loading import PRECISIONS
from recare_patch.models.memory import forget_activations, linear_layers, tile
from recare_patch.models.rehearsal import Rehearsal, latents_of, text_of, text_side, without_values
from recare_patch.recipe import TEXT_LAYER_SETS, MemoryOptions

if TYPE_CHECKING:
    from recare_patch.models.captured import Captured
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
    read_linear: int  # of the text encoders, where they can be quantized too
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
    encoded_at_once: int  # prompts
    reading: int  # the same with its backward pass
    forgetful: int  # the same, activations forgotten
    row: int  # of an encoded prompt
    latent: int  # of one picture's latents, fp32


def quantizable(network: nn.Module) -> int:
    """Weights of the linear layers that can be quantized."""
    return sum(layer.weight.numel() for _, _, layer in linear_layers(network))


def bytes_of(*networks: nn.Module) -> int:
    """Of their parameters."""
    return sum(p.numel() * p.element_size() for network in networks for p in network.parameters())


def phantom(layout: Layout, precision: str, memory: MemoryOptions | None = None) -> LatentDiffusion:
    """A base on the meta device, from its configurations alone; it has no tokenizers.

    Levers that place weights or change layers are left to :func:`memory.place`.

    Raises:
        BaseModelError: it is of no supported family.
    """
    family = family_of(layout)
    parts, scheduler = _parts(family, layout, precision)
    tokenizers = {family.tokenizer_name(name): None for name in family.encoder_names}
    left_out = dict.fromkeys(name for name in family.left_out)
    extra = {"requires_safety_checker": False} if "safety_checker" in left_out else {}
    import diffusers

    pipeline = getattr(diffusers, family.pipeline_class)(
        **parts, **tokenizers, scheduler=scheduler, **left_out, **extra
    )
    return family(pipeline, layout.name.strip("'"), device=META, memory=memory)


def _parts(family: type[LatentDiffusion], layout: Layout, precision: str) -> tuple[dict[str, Any], Any]:
    """The networks of a base on the meta device, and its scheduler."""
    import diffusers
    import transformers

    dtype = PRECISIONS[precision]
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
        nn.Module.to(parts[name].eval().requires_grad_(False), dtype=torch.float32 if upcast else dtype)
    kind = layout.index["scheduler"][1]
    return parts, getattr(diffusers, kind).from_config(layout.require("scheduler", weights=False))


class _Subject:
    """What is counted of a base: its networks, and one call of each."""

    denoiser: Any
    encoders: list[Any]
    vae: Any
    adapted: dict[str, nn.Module]  # networks that hold the adapter's layers
    row: int  # bytes of an encoded prompt
    latent: int  # bytes of one picture's latents, fp32
    decoded_at_once: int

    def predict(self, *, learnt: bool = False) -> Tensor:
        """One sample's prediction, with a gradient in its prompt where that is ``learnt``."""
        raise NotImplementedError

    def read(self, prompts: int, *, learnt: bool = False) -> list[Tensor]:
        """What the text encoders make of so many prompts, whose tokens' vectors may be ``learnt``."""
        raise NotImplementedError

    def decode(self) -> None:
        """One picture's latents through the autoencoder."""
        raise NotImplementedError

    def tile(self) -> None:
        """Let the autoencoder work in tiles."""
        raise NotImplementedError


class _Family(_Subject):
    """A base whose class says how its networks are called."""

    def __init__(self, layout: Layout, recipe: Recipe) -> None:
        base = phantom(layout, recipe.precision, MemoryOptions(resolution=recipe.memory.resolution))
        self.base, self.denoiser, self.encoders, self.vae = base, base.denoiser, base._encoders, base.pipeline.vae
        self.adapted = lora.adapted(base, recipe.adapter.layers)
        self.decoded_at_once, self.tile = base.decoded_at_once, base.tile_pictures  # type: ignore[method-assign]
        with torch.no_grad():
            self._embeds = _read(base, 1)
        self._latents = torch.empty((1, *base.latent_shape), device=META)
        self.latent = self._latents.nbytes
        self.row = sum(one.nbytes for one in vars(self._embeds).values() if one is not None)

    def predict(self, *, learnt: bool = False) -> Tensor:
        embeds = self._embeds.detach()
        embeds.prompt_embeds.requires_grad_(learnt)
        return self.base.denoise(self._latents, torch.zeros(1, dtype=torch.long, device=META), embeds)

    def read(self, prompts: int, *, learnt: bool = False) -> list[Tensor]:
        return [_read(self.base, prompts, learnt=learnt).prompt_embeds]

    def decode(self) -> None:
        self.vae.decode(torch.empty(self._latents.shape, device=META, dtype=self.vae.dtype), return_dict=False)


class _Run(_Subject):
    """A base of the general class, by a run of its pipeline without values."""

    def __init__(self, layout: Layout, recipe: Recipe, family: type[Captured]) -> None:
        parts, scheduler = _parts(family, layout, recipe.precision)
        size, native = recipe.memory.resolution, family.native_pixels(layout)
        width, height = map(int, size.split("x")) if size is not None else (native, native)
        self.run = run = Rehearsal(family, layout, parts, scheduler)
        self.denoiser, self.vae = parts[family.denoiser_name], parts["vae"]
        self.encoders = [parts[name] for name in family.encoder_names]
        run.run(width * 2, height * 2)
        larger = run.told()
        run.run(width, height)
        self._told = run.told()
        self._reads = [run.calls[name][0] for name in family.encoder_names]
        self._decodes = run.calls["vae"][0]
        lora.TEXT_SIDES[self.denoiser] = text_side(run, larger, self._told)
        self.adapted = {family.denoiser_name: self.denoiser}
        if recipe.adapter.layers in TEXT_LAYER_SETS:
            self.adapted = {name: parts[name] for name in family.encoder_names[:2]}
        self._text = text_of(self._told, larger)
        self.row = sum(one.nbytes for one in self._text)
        self.latent = 4 * latents_of(self._told, larger)
        self.decoded_at_once = max(1, min(8, 512**2 // (width * height)))
        self.tile = lambda: tile(self.vae, width, height)  # type: ignore[method-assign]

    def predict(self, *, learnt: bool = False) -> Tensor:
        for one in self._text:
            one.requires_grad_(learnt)
        return self.run.predict(self._told)

    def read(self, prompts: int, *, learnt: bool = False) -> list[Tensor]:
        made: list[Tensor] = []
        for encoder, (own, args, kwargs) in zip(self.encoders, self._reads, strict=True):
            rows = tree_map(lambda one: one.repeat(prompts, 1) if isinstance(one, Tensor) else one, (args, kwargs))
            hook = encoder.get_input_embeddings().register_forward_hook(
                lambda module, args, embedded: embedded.detach().requires_grad_(learnt)
            )
            made += [one for one in tree_leaves(own(*rows[0], **rows[1])) if isinstance(one, Tensor)][-1:]
            hook.remove()
        return made

    def decode(self) -> None:
        own, args, kwargs = self._decodes
        own(*args, **kwargs)


def measure(layout: Layout, recipe: Recipe) -> Footprint:
    """What a recipe's base takes at its precision and resolution, its other levers left aside.

    Raises:
        BaseModelError: it is of no supported family, or its pipeline cannot run without values.
    """
    from recare_patch.models.captured import Captured

    family = family_of(layout)
    one: _Subject = _Run(layout, recipe, family) if issubclass(family, Captured) else _Family(layout, recipe)
    denoiser, networks = one.denoiser, [one.denoiser, one.vae, *one.encoders]
    blocks = [bytes_of(m) for name, m in denoiser.named_modules() if _is_block(name)]
    whole, generator, options = bytes_of(denoiser), torch.Generator(), recipe.adapter
    parameters = [
        parameter
        for network in one.adapted.values()
        for parameter in lora.attach(
            network, layers=options.layers, rank=options.rank, alpha=options.alpha, generator=generator
        )
    ]

    def backward(made: list[Tensor]) -> None:
        torch.stack([part.float().mean() for part in made]).sum().backward()
        for parameter in parameters:
            parameter.grad = None

    def peak_of(work: Callable[[], Any]) -> int:
        return _peak(networks, work)

    with fused_attention() as attention, without_values():
        with torch.no_grad():
            with FlopCounterMode(display=False) as counted:
                one.predict()
            operations = counted.get_total_flops() + sum(attention)
            predicting, decoding = peak_of(one.predict), peak_of(one.decode)
            one.tile()
            tiled = peak_of(one.decode)
            encoding = peak_of(lambda: one.read(_PROMPTS)) // _PROMPTS
        # As where word vectors are fitted: a patch may leave the denoiser alone.
        reading = peak_of(lambda: backward(one.read(1, learnt=True)))
        training = peak_of(lambda: backward([one.predict(learnt=True)]))
        forgetful = reading
        if family.large_encoders:
            forget_activations(*one.encoders)
            forgetful = peak_of(lambda: backward(one.read(1, learnt=True)))
        denoiser.enable_gradient_checkpointing()
        checkpointed = peak_of(lambda: backward([one.predict(learnt=True)]))
    return Footprint(
        denoiser=whole,
        linear=quantizable(denoiser),
        read_linear=sum(map(quantizable, one.encoders)) if family.large_encoders else 0,
        size=PRECISIONS[recipe.precision].itemsize,
        block=max(blocks, default=whole),
        encoders=bytes_of(*one.encoders),
        vae=bytes_of(one.vae),
        adapter=sum(parameter.numel() for parameter in parameters),
        operations=float(operations),
        predicting=predicting,
        training=training,
        checkpointed=checkpointed,
        decoding=decoding,
        tiled=tiled,
        decoded_at_once=one.decoded_at_once,
        encoding=encoding,
        encoded_at_once=family.encoded_at_once,
        reading=reading,
        forgetful=forgetful,
        row=one.row,
        latent=one.latent,
    )


_PROMPTS = 8
"""So many are encoded to see what one of several takes: alone it would bear all that they share."""


def _is_block(name: str) -> bool:
    """Whether a module is one whose activations diffusers forgets as a whole."""
    parent, _, last = name.rpartition(".")
    return last.isdigit() and parent.rpartition(".")[2].endswith(("resnets", "blocks", "layers"))


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


def _peak(networks: list[nn.Module], work: Callable[[], Any]) -> int:
    tensors = [t for network in networks for t in (*network.parameters(), *network.buffers())]
    with Tracker(tensors) as tracker:
        work()
    return tracker.peak
