"""What a run will cost, before it is run: denoiser evaluations exactly, memory and time as estimates.

The base is built from its configurations on torch's meta device, where tensors have shapes and no
values. One prediction and one training sample go through it there, in the very code of a run, and what
lives at the worst moment is added up.
"""

from __future__ import annotations

import math
import time
import types
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from recare_patch.careset import ASKED_AT, MOST_ASKED, OTHER_STEPS, OTHERS
from recare_patch.core import RecipeError
from recare_patch.erasure.gauge import STATES, look_evaluations
from recare_patch.erasure.methods import LossMethod, Work
from recare_patch.erasure.preflight import check_files, check_names, tokenizer_of
from recare_patch.erasure.stages import attach, earlier_patch, stage_name
from recare_patch.models import PRECISIONS, PromptEmbeds, family_of, find_layout, lora, scheduled
from recare_patch.recipe import METHODS, MemoryOptions, Recipe

if TYPE_CHECKING:
    from recare_patch.models import LatentDiffusion, Layout

META = torch.device("meta")
USED = 0.7
"""Share of a card's GB that a plan fills; the driver, fragments and other programs take some too."""
UTILIZATION = 0.4
"""Share of a large matrix product's speed that a denoiser reaches; an assumption."""

_GB = 1e9
"""Bytes. A card sold as 12 GB has 12 GiB, 7 % more; that is left to others too."""
_WEIGHT_BYTES = {"int8": 1.01, "nf4": 0.5625}
"""Of a quantized weight, with the scales of its row or block."""


def evaluations(recipe: Recipe, sampler_steps: int | None = None) -> dict[str, int]:
    """Denoiser evaluations of every stage, as ``training.json`` will count them.

    What may end early, or ask about fewer words, is counted at its most; ``sampler_steps`` is how often the base's
    scheduler calls the denoiser for a picture, by default as often as the recipe has steps.

    Raises:
        RecipeError: the source of states costs what cannot be told in advance.
    """
    return {stage: work.evaluations for stage, work in _works(recipe, sampler_steps).items()}


def _works(recipe: Recipe, sampler_steps: int | None = None) -> dict[str, Work]:
    """What every stage computes; a stage that draws pictures has no rows of its own."""
    if recipe.erase.states == "rollout":
        raise RecipeError("what the states 'rollout' will cost is not known before a run: they stop at random")
    method, images = METHODS.get(recipe.method), recipe.target_images
    picture = (sampler_steps or images.steps) * (2 if images.guidance_scale > 1 else 1)
    found: dict[str, Work] = {}
    confirmed = _confirmed(recipe)
    if confirmed or (method.needs.care_set and _measured(recipe)):
        few = min(images.steps, OTHER_STEPS) * (2 if images.guidance_scale > 1 else 1)
        found["other pictures"] = Work(OTHERS * few)
    for number in range(len(recipe.concepts)):
        if confirmed:
            found[stage_name("CARE-set", number)] = Work(MOST_ASKED, predicted=ASKED_AT)
        if method.needs.target_images:
            found[stage_name("target images", number)] = Work(images.count * picture)
        if method.needs.retained_images:
            found[stage_name("retained images", number)] = Work(recipe.erase.retained_images * picture)
    found |= method.work(recipe)
    if _measured(recipe):
        one, plain = found["erase"], recipe.subject is None and recipe.replace_with is None
        looks = one.evaluations + look_evaluations(recipe, pictures=plain and method.needs.care_set)
        found["erase"] = replace(one, evaluations=looks, predicted=max(one.predicted, STATES))
    return {stage: work for stage, work in found.items() if work.evaluations}


def _confirmed(recipe: Recipe) -> bool:
    """Whether the base is asked about companions."""
    options = recipe.care_set
    return METHODS.get(recipe.method).needs.care_set and options.source == "base" and options.file is None


def _measured(recipe: Recipe) -> bool:
    """Whether the run may end by what it measures of itself: what has one loss is trained in the one loop that can."""
    return recipe.erase.ends == "measured" and issubclass(METHODS.get(recipe.method), LossMethod)


def is_exact(recipe: Recipe) -> bool:
    """Whether a run takes all of :func:`evaluations`: nothing in it ends early, or asks about fewer words."""
    return recipe.search.patience is None and not _confirmed(recipe) and not _measured(recipe)


class _Tracker(TorchDispatchMode):
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
def _fused_attention() -> Iterator[list[int]]:
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


def _bytes(*networks: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for network in networks for p in network.parameters())


def phantom(layout: Layout, precision: str, resolution: str | None = None) -> LatentDiffusion:
    """A base on the meta device, from its configurations alone; it has no tokenizers.

    Raises:
        BaseModelError: it is of no supported family.
    """
    import diffusers
    import transformers

    family, dtype = family_of(layout), PRECISIONS[precision]
    family.check(layout)
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
        nn.Module.to(parts[name], dtype=dtype)
    scheduler = getattr(diffusers, layout.index["scheduler"][1]).from_config(layout.require("scheduler", weights=False))
    tokenizers = {name.replace("text_encoder", "tokenizer"): None for name in family.encoder_names}
    left_out = dict.fromkeys(name for name in family.left_out)
    extra = {"requires_safety_checker": False} if "safety_checker" in left_out else {}
    pipeline = getattr(diffusers, family.pipeline_class)(
        **parts, **tokenizers, scheduler=scheduler, **left_out, **extra
    )
    return family(pipeline, layout.name.strip("'"), device=META, memory=MemoryOptions(resolution=resolution))


def measure(layout: Layout, recipe: Recipe) -> Footprint:
    """What a recipe's base takes at its precision and resolution, its levers left aside."""
    check_files(recipe)
    base = phantom(layout, recipe.precision, recipe.memory.resolution)
    check_names(recipe, tokenizer_of(layout), base.id)
    earlier_patch(recipe, base, weights=False)
    denoiser, encoders, vae = base.denoiser, base._encoders, base.pipeline.vae
    linear = sum(m.weight.numel() for m in denoiser.modules() if isinstance(m, nn.Linear))
    blocks = [_bytes(m) for name, m in denoiser.named_modules() if _is_block(name)]
    whole, generator = _bytes(denoiser), torch.Generator()
    networks = lora.adapted(base, recipe.adapter.layers).values()
    parameters = [one for network in networks for one in attach(recipe, network, lora.ADAPTER_NAME, generator)]
    embeds = _embeds(base)
    # As where word vectors are fitted: a patch may leave the denoiser alone.
    embeds.prompt_embeds.requires_grad_()
    latents = torch.empty((1, *base.latent_shape), device=META)
    at = torch.zeros(1, dtype=torch.long, device=META)

    def trained() -> None:
        base.denoise(latents, at, embeds).mean().backward()
        for parameter in (*parameters, embeds.prompt_embeds):
            parameter.grad = None

    def predicted() -> None:
        with torch.no_grad():
            base.denoise(latents, at, embeds.detach())

    with _fused_attention() as attention:
        with FlopCounterMode(display=False) as counted:
            predicted()
        operations = counted.get_total_flops() + sum(attention)
        peaks = [_peak(base, predicted), _peak(base, trained)]
        denoiser.enable_gradient_checkpointing()  # type: ignore[operator]
        peaks.append(_peak(base, trained))
        picture = torch.empty((1, *base.latent_shape), device=META, dtype=vae.dtype)
        with torch.no_grad():
            decoding = _peak(base, lambda: vae.decode(picture, return_dict=False))
    return Footprint(
        denoiser=whole,
        linear=linear,
        size=base.dtype.itemsize,
        block=max(blocks, default=whole),
        encoders=_bytes(*encoders),
        vae=_bytes(vae),
        adapter=sum(parameter.numel() for parameter in parameters),
        operations=float(operations),
        predicting=peaks[0],
        training=peaks[1],
        checkpointed=peaks[2],
        decoding=decoding,
    )


def _is_block(name: str) -> bool:
    """Whether a module is one whose activations diffusers forgets as a whole."""
    parent, _, last = name.rpartition(".")
    return last.isdigit() and parent.rpartition(".")[2] in ("resnets", "transformer_blocks")


def _embeds(base: LatentDiffusion) -> PromptEmbeds:
    outputs = []
    for encoder in base._encoders:
        ids = torch.zeros((1, encoder.config.max_position_embeddings), dtype=torch.long, device=META)
        with torch.no_grad():
            outputs.append(encoder(ids, output_hidden_states=True))
    return base._join(outputs)


def _peak(base: LatentDiffusion, work: Callable[[], Any]) -> int:
    networks = [base.denoiser, base.pipeline.vae]
    tensors = [t for network in networks for t in (*network.parameters(), *network.buffers())]
    with _Tracker(tensors) as tracker:
        work()
    return tracker.peak


@dataclass(frozen=True)
class PlannedStage:
    """One stage of a run, called as in ``training.json``."""

    name: str
    evaluations: int  # exactly; of an inversion that may end early, at most
    seconds: float  # expected
    peak: int  # bytes on the device at the worst moment, expected


@dataclass(frozen=True)
class Plan:
    """What a run is expected to take."""

    stages: tuple[PlannedStage, ...]
    footprint: Footprint
    speed: float  # floating-point operations a second that the times assume
    patch_bytes: int  # of its tensors in fp16

    @property
    def peak(self) -> int:
        """Bytes at the worst moment of all stages."""
        return max(stage.peak for stage in self.stages)

    @property
    def seconds(self) -> float:
        """Of all stages together."""
        return sum(stage.seconds for stage in self.stages)


def plan(recipe: Recipe, *, speed: float, footprint: Footprint | None = None) -> Plan:
    """Plan a run on a device of a ``speed`` in floating-point operations a second; see :func:`measured_speed`.

    Raises:
        BaseModelError: the base is not found, or of no supported family.
        RecipeError: see :func:`evaluations`.
    """
    layout, _ = find_layout(recipe.base, weights=False)
    found = footprint or measure(layout, recipe)
    works = _works(recipe, _sampler_steps(layout, recipe))
    stages = tuple(
        PlannedStage(stage, work.evaluations, _seconds(found, recipe, work, speed), _stage_peak(found, recipe, work))
        for stage, work in works.items()
    )
    return Plan(stages, found, speed, 2 * found.adapter)


def _sampler_steps(layout: Layout, recipe: Recipe) -> int:
    """How often a picture's sampler calls the denoiser."""
    import diffusers

    kind, images = getattr(diffusers, layout.index["scheduler"][1]), recipe.target_images
    holder = types.SimpleNamespace(scheduler=kind.from_config(layout.require("scheduler", weights=False)))
    with scheduled(holder, images.scheduler):
        holder.scheduler.set_timesteps(images.steps)
        return len(holder.scheduler.timesteps)


def _seconds(found: Footprint, recipe: Recipe, work: Work, speed: float) -> float:
    memory = recipe.memory
    # Of a training sample's three evaluations one is a forward pass, which each of these repeats.
    repeated = memory.checkpointing + (memory.micro_batch is not None)
    training = 0.75 if work.trained else 0.0
    return work.evaluations * found.operations * (1 + training * repeated / 3) / speed


def resident(found: Footprint, memory: MemoryOptions) -> int:
    """Bytes of the weights that stay on the device throughout."""
    saved = found.linear * (found.size - _WEIGHT_BYTES.get(memory.weights, found.size))
    denoiser = found.block if memory.offload else found.denoiser - saved
    encoders = 0 if memory.encoders_off_device else found.encoders
    vae = 0 if memory.vae_off_device else found.vae
    return int(denoiser + encoders + vae)


def _stage_peak(found: Footprint, recipe: Recipe, work: Work) -> int:
    memory, erase = recipe.memory, recipe.erase
    # fp32 weights and gradients, and two moments of one or four bytes each.
    adapter = found.adapter * (8 + (2 if erase.optimizer == "adamw8bit" else 8))
    fixed = resident(found, memory) + (found.encoders if memory.encoders_off_device else 0)
    trained, predicted = work.trained, work.predicted
    if not trained and not predicted:
        images = recipe.target_images
        guided, most = 2 if images.guidance_scale > 1 else 1, memory.micro_batch or 10**6
        drawing = max(1, min(images.batch_size, most // guided)) * guided * found.predicting
        # A tile is half of a picture's side or less.
        decoding = found.decoding / 4 if memory.vae_tiling else min(8, most) * found.decoding
        vae = found.vae if memory.vae_off_device else 0
        return int(max(fixed + drawing, resident(found, memory) + vae + decoding))
    one = found.checkpointed if memory.checkpointing else found.training
    if memory.micro_batch:
        trained, predicted = min(trained, memory.micro_batch), min(predicted, memory.micro_batch)
    # Where word vectors are fitted, the encoders take part in the backward pass.
    weights = fixed if work.reads else resident(found, memory)
    return int(weights + adapter + max(trained * one, predicted * found.predicting))


_SETS: tuple[dict[str, Any], ...] = (
    {},
    *({"micro_batch": size} for size in (8, 4, 2, 1)),
    *({"micro_batch": size, "checkpointing": True} for size in (8, 4, 2, 1)),
    {"micro_batch": 1, "checkpointing": True, "weights": "int8"},
    {"micro_batch": 1, "checkpointing": True, "weights": "nf4"},
    {"micro_batch": 1, "checkpointing": True, "offload": True},
)
"""Levers from fast to slow; those before int8 change no result. Parts that wait off the device cost little,
and come first of all."""


def choose(recipe: Recipe, gigabytes: float) -> tuple[Recipe, Footprint]:
    """The recipe with the fastest set of levers that is expected to fit a card, and what its base takes.

    Args:
        recipe: of the run; levers that it sets already stay, its micro batch as the largest.
        gigabytes: GB (10⁹ bytes) of the card's memory, of which :data:`USED` is filled.

    Raises:
        BaseModelError: the base is not found, or of no supported family.
        RecipeError: nothing fits.
    """
    half = recipe if recipe.precision != "fp32" else recipe.with_overrides({"precision": "bf16"})
    layout, _ = find_layout(half.base, weights=False)
    found = measure(layout, half)
    own = half.memory.model_dump(exclude_defaults=True)
    smallest = math.inf
    for levers in _SETS:
        for tiling in (False, True):
            chosen = {"encoders_off_device": True, "vae_off_device": True, "vae_tiling": tiling, **levers}
            kept = {**chosen, **own}
            if "micro_batch" in own:
                # What a recipe sets for one card is the most that another one takes at once.
                kept["micro_batch"] = min(own["micro_batch"], levers.get("micro_batch", own["micro_batch"]))
            tried = half.with_overrides({"memory": kept})
            peak = plan(tried, speed=1.0, footprint=found).peak
            smallest = min(smallest, peak)
            if peak <= USED * gigabytes * _GB:
                return tried, found
    raise RecipeError(
        f"nothing makes base '{recipe.base}' fit into {gigabytes:g} GB: the smallest set of levers is "
        f"expected to take {smallest / _GB:.1f} GB, and {USED * gigabytes:.1f} are used of such a card; a "
        "smaller memory.resolution takes less"
    )


def measured_speed(device: torch.device, precision: str) -> float:
    """Operations a second to expect here: :data:`UTILIZATION` of what a large matrix product reaches."""
    size = 8192 if device.type == "cuda" else 1024
    factor = torch.ones((size, size), device=device, dtype=PRECISIONS[precision])
    best = math.inf
    for _ in range(4):
        began = time.perf_counter()
        factor @ factor
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    return float(UTILIZATION * 2 * size**3 / best)
