"""A frozen text-to-image model: what the rest of the package asks of one, whatever its architecture.

A family is a subclass: it says how a folder is recognised, how its text encoders' outputs join, how its
denoiser is called and how it noises. Loading, pictures, token vectors and the memory levers are the same
for all.
"""

from __future__ import annotations

import inspect
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from recare_patch.core import BaseModelError, noted
from recare_patch.models import memory as levers
from recare_patch.models.encoding import PromptEncoding, parts_of
from recare_patch.models.few_steps import FewSteps
from recare_patch.models.inputs import EvaluationCounter, PromptEmbeds
from recare_patch.models.layout import Layout
from recare_patch.models.loading import PRECISIONS, stored_weights_hash, weights_hash
from recare_patch.models.lora import networks
from recare_patch.models.noising import Noising
from recare_patch.models.precision import check_finite, check_weights
from recare_patch.recipe import MemoryOptions

if TYPE_CHECKING:
    from pathlib import Path

    from PIL.Image import Image

    from recare_patch.core import Crew, Progress

logger = logging.getLogger(__name__)

DECODED_AT_ONCE = 512**2
"""Pixels that go through the autoencoder together, or one picture: more fill a device without being faster."""


class LatentDiffusion(PromptEncoding, Noising):
    """A frozen text-to-image model around a diffusers pipeline; no parameter of it asks for a gradient."""

    family: ClassVar[str]  # its name in FAMILIES
    pipeline_class: ClassVar[str]  # the diffusers pipeline that loads it
    denoiser_name: ClassVar[str] = "unet"  # the denoiser's component
    left_out: ClassVar[tuple[str, ...]] = ()  # loaded as None, where the folder lists them or not
    large_encoders: ClassVar[bool] = False  # levers of weights and activations are for its text encoders too
    upcast_vae: ClassVar[bool] = False  # keep the autoencoder in fp32 where fp16 overflows in it

    few_steps: FewSteps | None = None  # how it is drawn with, where it was distilled to few steps

    def __init__(
        self, pipeline: Any, base_id: str, *, device: torch.device | None = None, memory: MemoryOptions | None = None
    ) -> None:
        """Wrap a loaded pipeline of the family's class; by default it computes where its denoiser is."""
        self.id, self.pipeline, self.memory = base_id, pipeline, memory or MemoryOptions()
        # Processes that share the rows of every denoise(); None: this one makes them all.
        self.crew: Crew | None = None
        self.denoiser: nn.Module = getattr(pipeline, self.denoiser_name)
        self.device = device or next(self.denoiser.parameters()).device
        self.dtype: torch.dtype = next(self._encoders[0].parameters()).dtype
        # Filled where what is in memory has lost digits, or is not there: component → its files or hash.
        self._files: dict[str, list[Path]] = {}
        self._hashes: dict[str, str] = {}
        self._config: Any = self.denoiser.config
        for part in self._networks:
            part.requires_grad_(False).eval()
        self._token_widths = [one.get_input_embeddings().embedding_dim for one in self._encoders]
        self.token_width = sum(self._token_widths)
        pipeline.set_progress_bar_config(disable=True)
        self.counter = EvaluationCounter()
        self.counter.watch(self.denoiser)
        self._read_schedule()
        self._read_size()
        if self.memory.vae_tiling:
            self.tile_pictures()

    def _read_size(self) -> None:
        """Set ``latent_shape``, that of one picture's latents, and the size of a picture in pixels."""
        side, scale = self._config.sample_size, self.pipeline.vae_scale_factor
        size = self._native_size = (side, side) if isinstance(side, int) else (int(side[0]), int(side[1]))
        if self.memory.resolution is not None:
            size = levers.latent_size(self.id, self.memory.resolution, scale, self._step)
        self.latent_shape: tuple[int, ...] = (int(self._config.in_channels), *size)
        self._size = {"height": size[0] * scale, "width": size[1] * scale}
        # What the autoencoder's latents are moved by before they are scaled.
        self._shift = float(getattr(self.pipeline.vae.config, "shift_factor", None) or 0.0)

    @property
    def picture_size(self) -> tuple[int, int]:
        """Width and height of a picture in pixels."""
        return self._size["width"], self._size["height"]

    @property
    def _networks(self) -> list[nn.Module]:
        """The networks of the pipeline that are used."""
        return [self.denoiser, self.pipeline.vae, *self._encoders]

    @staticmethod
    def recognises(layout: Layout) -> bool:
        """Whether a folder has this family's shape."""
        raise NotImplementedError

    @classmethod
    def check(cls, layout: Layout, *, weights: bool = True) -> None:
        """Refuse what could not be patched: a component or its ``weights`` are missing, or of another kind."""
        for component in (cls.denoiser_name, "vae", *cls.encoder_names):
            layout.require(component, weights=weights)
        for component in (*map(cls.tokenizer_name, cls.encoder_names), "scheduler"):
            layout.require(component, weights=False)

    @classmethod
    def networks_read(cls, layout: Layout) -> list[str]:
        """The components whose weights a run reads."""
        return [cls.denoiser_name, "vae", *cls.encoder_names]

    @classmethod
    def native_pixels(cls, layout: Layout) -> int:
        """The longer side of the pictures that a base was trained on, as its configurations say."""
        side, vae = layout.configs[cls.denoiser_name].get("sample_size") or 0, layout.configs.get("vae", {})
        scale = 2 ** (len(vae.get("block_out_channels", [0])) - 1)
        return int((side if isinstance(side, int) else max(side)) * scale)

    @classmethod
    def usual_guidance(cls, layout: Layout) -> float:
        """The guidance that its pipeline draws with unasked."""
        import diffusers

        call = inspect.signature(getattr(diffusers, cls.pipeline_class).__call__)
        return float(call.parameters["guidance_scale"].default)

    def _predict(self, latents: Tensor, timesteps: Tensor, embeds: PromptEmbeds) -> Tensor:
        """One call of the denoiser, in its own dtype and on its device."""
        raise NotImplementedError

    @property
    def _step(self) -> int:
        """Pixels that both sides of a picture must be a multiple of."""
        return int(self.pipeline.vae_scale_factor * 2 ** (len(self._config.block_out_channels) - 1))

    @classmethod
    def load(
        cls, layout: Layout, base_id: str, dtype: torch.dtype, device: torch.device, memory: MemoryOptions
    ) -> Self:
        """Load a folder of this family, as :func:`load_base` does.

        The safety checker is not loaded, as it would hide what an eraser must show.
        """
        for component in (cls.denoiser_name, "vae", *cls.encoder_names):
            layout.require(component)
        cls.check(layout)
        pipeline = cls._read_pipeline(layout, dtype)
        parts = {name: getattr(pipeline, name) for name in (cls.denoiser_name, *cls.encoder_names)}
        hashes: dict[str, str] = {}
        files: dict[str, list[Path]] = {}
        if dtype is torch.bfloat16 or memory.weights != "full" or memory.offload:
            # What the hash looks at is lost in memory: it is taken from the files, when it is asked for.
            if layout.single_file is not None:
                hashes = {name: weights_hash(part, name) for name, part in parts.items()}
            else:
                files = {name: layout.weights(name) for name in parts}
        for part in parts.values():
            # The plain cast: diffusers' own warns of layers to be kept in fp32, and here there are none.
            nn.Module.to(part, dtype=dtype)
        upcast = cls.upcast_vae and dtype is torch.float16
        nn.Module.to(pipeline.vae, dtype=torch.float32 if upcast else dtype)
        for name, part in [*parts.items(), ("vae", pipeline.vae)]:
            check_weights(part, f"base {layout.name} has a {name}")
        denoiser, *encoders = parts.values()
        if memory == MemoryOptions():
            for part in (*encoders, pipeline.vae, denoiser):
                nn.Module.to(part, device)
        else:
            levers.place(pipeline, denoiser, encoders, memory, device, dtype, large_encoders=cls.large_encoders)
        base = cls(pipeline, base_id, device=device, memory=memory)
        base._files, base._hashes = files, hashes
        base.few_steps = layout.few_steps
        return base

    @classmethod
    def _read_pipeline(cls, layout: Layout, dtype: torch.dtype) -> Any:
        import diffusers

        kind = getattr(diffusers, cls.pipeline_class)
        options: dict[str, Any] = {"local_files_only": True, **dict.fromkeys(cls.left_out)}
        try:
            with warnings.catch_warnings(), _without_bars():
                warnings.simplefilter("ignore", FutureWarning)
                if layout.single_file is not None:
                    # Without casting, which would lose digits that the hash looks at.
                    return kind.from_single_file(str(layout.single_file), config=str(layout.folder), **options)
                options |= {"dtype": dtype, "use_safetensors": True}
                with layout.plain_folder(cls.networks_read(layout)) as folder:
                    return kind.from_pretrained(folder, **options)
        except Exception as fault:
            # diffusers, transformers and safetensors each raise classes of their own on damaged files.
            reason = (str(fault).strip() or type(fault).__name__).splitlines()[0]
            raise BaseModelError(f"base {layout.name} cannot be loaded: {reason}") from fault

    @property
    def precision(self) -> str:
        """The name of what it computes in, in :data:`PRECISIONS`."""
        return next(name for name, dtype in PRECISIONS.items() if dtype is self.dtype)

    @property
    def components(self) -> dict[str, nn.Module]:
        """The networks that a patch may change, by their names in a patch: the denoiser, text encoders."""
        return networks(self.pipeline)

    def component_hash(self, component: str) -> str:
        """SHA-256 of a network's own weights; see :func:`weights_hash`."""
        if component in self._files and component not in self._hashes:
            self._hashes[component] = stored_weights_hash(self._files[component], component)
        return self._hashes.get(component) or weights_hash(self.components[component], component)

    def denoiser_hash(self) -> str:
        """SHA-256 of the denoiser's own weights."""
        return self.component_hash(self.denoiser_name)

    def denoise(self, latents: Tensor, timesteps: Tensor, embeds: PromptEmbeds) -> Tensor:
        """``model_pred`` for noisy latents ``z_t``, both ``[batch, channels, height, width]`` of one dtype.

        Timesteps are ``[batch]`` or one for all; embeddings have a row for each latent.
        """
        timesteps, embeds = timesteps.to(self.device), embeds.to(self.device, self.dtype)
        rows = latents.to(self.device, self.dtype)

        def part(chosen: slice) -> Tensor:
            given = rows[chosen], timesteps[chosen] if timesteps.ndim else timesteps, embeds[chosen]
            if self.memory.micro_batch is None:
                return self._predict(*given)
            return levers.in_chunks(self._predict, given, self.memory.micro_batch, self.counter)

        whole = slice(0, len(latents))
        model_pred = part(whole) if self.crew is None else self.crew.share(len(latents), part, rows)
        return model_pred.to(latents.dtype)

    def tile_pictures(self) -> None:
        """Let the autoencoder work on one picture at a time, in tiles of half a side."""
        levers.tile(self.pipeline.vae, *self.picture_size)

    def _at_once(self, pictures: int, samples: int = 1) -> int:
        """How many pictures of so many samples each go through a network together."""
        most = self.memory.micro_batch
        return pictures if most is None else max(1, min(pictures, most // samples))

    @property
    def decoded_at_once(self) -> int:
        """Pictures that go through the autoencoder together: :data:`DECODED_AT_ONCE` pixels, or one."""
        return self._at_once(min(8, max(1, DECODED_AT_ONCE // math.prod(self._size.values()))))

    @torch.no_grad()
    def encode_images(self, images: Sequence[Image]) -> Tensor:
        """Scaled latents (posterior mean) ``[images, channels, height, width]``, fp32."""
        if not images:
            raise BaseModelError("there are no pictures to encode")
        vae, found = self.pipeline.vae, []
        with self._on_device([vae], self.memory.vae_off_device):
            for rows in parts_of(len(images), self.decoded_at_once):
                batch = [image.convert("RGB") for image in images[rows]]
                pixels = self.pipeline.image_processor.preprocess(batch, **self._size)
                mode = self._through_vae(lambda rows: vae.encode(rows).latent_dist.mode(), pixels, "latents").float()
                found.append((mode - self._shift) * vae.config.scaling_factor)
        return torch.cat(found)

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> list[Image]:
        """Pictures of scaled latents, :attr:`decoded_at_once` at a time."""
        vae, images = self.pipeline.vae, []

        def decode(rows: Tensor) -> Tensor:
            made: Tensor = vae.decode(rows / vae.config.scaling_factor + self._shift, return_dict=False)[0]
            return made

        with noted("decoding pictures"), self._on_device([vae], self.memory.vae_off_device):
            for rows in parts_of(len(latents), self.decoded_at_once):
                pixels = self._through_vae(decode, latents[rows], "pixels")
                images += self.pipeline.image_processor.postprocess(pixels, output_type="pil")
        return images

    def _through_vae(self, call: Callable[[Tensor], Tensor], rows: Tensor, what: str) -> Tensor:
        """What the autoencoder makes of rows; it is kept in fp32 from the first ones on at which fp16 overflows."""
        vae = self.pipeline.vae
        made = call(rows.to(self.device, vae.dtype))
        if vae.dtype is torch.float16 and not torch.isfinite(made).all():
            logger.warning("the autoencoder of base %s overflows in fp16: it computes in fp32 from here on", self.id)
            nn.Module.to(vae, dtype=torch.float32)
            made = call(rows.to(self.device, torch.float32))
        return check_finite(made, f"the {what} that the autoencoder of base {self.id} makes", vae.dtype)

    def generate(
        self,
        prompts: Sequence[str] | None,
        seeds: Sequence[int],
        *,
        steps: int = 20,
        guidance_scale: float = 5.0,
        batch_size: int = 8,
        progress: Progress | None = None,
        prompt_embeds: PromptEmbeds | None = None,
        negative_prompt: str = "",
        stage: str = "generate",
    ) -> list[Image]:
        """Pictures through the pipeline itself, one a seed.

        Each picture's noise comes from a CPU generator of its own, so the batch size and the device
        do not choose it, and a plain pipeline call with such generators draws the same.

        At a ``guidance_scale`` of 1 or less no unconditional half is computed, and the ``negative_prompt``, which
        guidance leads away from, does nothing. ``prompt_embeds`` stand in place of ``prompts``, which are None then.
        Progress calls it ``stage``.
        """
        images: list[Image] = []
        how = steps, guidance_scale, batch_size, progress, stage, negative_prompt
        for latents in self._batches(prompts, prompt_embeds, seeds, *how):
            images += self.decode_latents(latents)
        return images

    def sample_latents(self, embeds: PromptEmbeds, seeds: Sequence[int], *how: Any, **more: Any) -> Tensor:
        """As :meth:`generate`, stopping at the scaled latents ``[rows, channels, height, width]``."""
        return torch.cat(list(self._batches(None, embeds, seeds, *how, **more))).float()

    def _batches(
        self,
        prompts: Sequence[str] | None,
        embeds: PromptEmbeds | None,
        seeds: Sequence[int],
        steps: int = 20,
        guidance_scale: float = 5.0,
        batch_size: int = 8,
        progress: Progress | None = None,
        stage: str = "generate",
        negative_prompt: str = "",
    ) -> Iterator[Tensor]:
        given = prompts if embeds is None else embeds
        if given is None or (prompts is not None and embeds is not None):
            raise BaseModelError("give either prompts or prompt embeddings to draw from")
        if len(given) != len(seeds):
            raise BaseModelError(
                f"{len(given)} prompts were given with {len(seeds)} seeds: one seed a prompt is needed"
            )
        if not seeds:
            raise BaseModelError("there is no prompt to draw a picture of")

        # Guidance doubles the samples.
        batch_size = self._at_once(batch_size, 2 if guidance_scale > 1 else 1)
        empty = self._guided_from(min(batch_size, len(seeds)), negative_prompt) if guidance_scale > 1 else None
        for start in range(0, len(seeds), batch_size):
            rows, own = given[start : start + batch_size], seeds[start : start + batch_size]
            latents = self._drawn(rows, own, steps, guidance_scale, empty)
            yield check_finite(latents, f"the latents that base {self.id} draws", self.dtype)
            if progress:
                progress.update(stage, start + len(own), len(seeds))

    def _guided_from(self, rows: int, away: str) -> PromptEmbeds | None:
        """What guidance starts from in a batch: a prompt to lead away from, mostly the empty one."""
        return self.encode_prompts([away] * rows)

    def _drawn(self, rows: Any, seeds: Sequence[int], steps: int, guidance_scale: float, empty: Any) -> Tensor:
        """Latents of one batch of prompts, or embeddings, by the pipeline's own call."""

        def named(embeds: PromptEmbeds, prefix: str = "") -> dict[str, Tensor]:
            parts = vars(embeds.to(self.device, self.dtype))
            return {f"{prefix}{name}": part for name, part in parts.items() if part is not None}

        text = named(rows if isinstance(rows, PromptEmbeds) else self.encode_prompts(rows))
        if empty is not None:
            text |= named(empty[: len(seeds)], "negative_")
        with self._only_denoiser():
            latents: Tensor = self.pipeline(
                **text,
                **self._size,
                num_inference_steps=steps,
                guidance_scale=guidance_scale,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                output_type="latent",
            ).images
        return latents

    @contextmanager
    def _only_denoiser(self) -> Iterator[None]:
        """The pipeline takes its device from the first network it has, and it may hold one elsewhere."""
        # Past the pipeline's own setter, which would write down that it has no such part.
        held = vars(self.pipeline)
        others = {name: held[name] for name in ("vae", *self.encoder_names)}
        held.update(dict.fromkeys(others))
        try:
            yield
        finally:
            held.update(others)


BaseModel = LatentDiffusion


@contextmanager
def _without_bars() -> Iterator[None]:
    """Loading shows bars of its own, one library inside the other; the package has its own progress."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    with ExitStack() as stack:
        for log in (diffusers_logging, transformers_logging):
            if log.is_progress_bar_enabled():
                log.disable_progress_bar()
                stack.callback(log.enable_progress_bar)
        yield
