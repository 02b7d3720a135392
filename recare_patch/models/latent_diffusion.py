"""What latent diffusion models of every architecture here have in common.

A family is a subclass: it says how a folder is recognised, how its text encoders' outputs join, and
how its denoiser is called. Loading, pictures, token vectors and the memory levers are the same for all.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from recare_patch.core import BaseModelError
from recare_patch.models import memory as levers
from recare_patch.models.components import networks
from recare_patch.models.embeds import PLACEHOLDER, EvaluationCounter, PromptEmbeds
from recare_patch.models.hashing import stored_weights_hash, weights_hash
from recare_patch.models.layout import Layout
from recare_patch.recipe import MemoryOptions

if TYPE_CHECKING:
    from pathlib import Path

    from PIL.Image import Image

    from recare_patch.core import Crew, Progress


@contextmanager
def _without_bars() -> Iterator[None]:
    """Loading shows bars of its own, one library inside the other; the package has its own progress."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    shown = [log for log in (diffusers_logging, transformers_logging) if log.is_progress_bar_enabled()]
    for log in shown:
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log in shown:
            log.enable_progress_bar()


class LatentDiffusion:
    """See :class:`BaseModel`.

    Attributes:
        pipeline_class: the diffusers pipeline that loads it.
        denoiser_name: the denoiser's component.
        encoder_names: the text encoders' components. A token's vector is those of all encoders end to
            end, in this order.
        left_out: components that are loaded as None, where the folder lists them or not.
        upcast_vae: keep the autoencoder in fp32 where the rest is fp16, in which it overflows.
    """

    family: str
    pipeline_class: ClassVar[str]
    denoiser_name: str = "unet"
    encoder_names: ClassVar[tuple[str, ...]] = ("text_encoder",)
    left_out: ClassVar[tuple[str, ...]] = ()
    upcast_vae: ClassVar[bool] = False

    prediction_type: str
    num_train_timesteps: int

    def __init__(
        self,
        pipeline: Any,
        base_id: str,
        *,
        device: torch.device | None = None,
        memory: MemoryOptions | None = None,
    ) -> None:
        """Wrap a loaded pipeline; its weights are frozen.

        Args:
            pipeline: of the family's class.
            base_id: what to call it.
            device: where it computes; by default where its denoiser is.
            memory: levers that are in effect.

        Raises:
            BaseModelError: see :meth:`_read_schedule`; or the size asked for does not fit.
        """
        self.id = base_id
        self.pipeline = pipeline
        self.memory = memory or MemoryOptions()
        self.crew: Crew | None = None
        self.denoiser: nn.Module = getattr(pipeline, self.denoiser_name)
        self._device = device or next(self.denoiser.parameters()).device
        self._dtype: torch.dtype = next(self._encoders[0].parameters()).dtype
        # Filled where what is in memory has lost digits, or is not there: component → its files or hash.
        self._files: dict[str, list[Path]] = {}
        self._hashes: dict[str, str] = {}
        self._read_schedule()
        self.latent_shape: tuple[int, int, int] = (
            int(self._config.in_channels),
            *levers.latent_size(
                base_id, self._native_size, pipeline.vae_scale_factor, self._step, self.memory.resolution
            ),
        )
        for part in (self.denoiser, pipeline.vae, *self._encoders):
            part.requires_grad_(False).eval()
        self.token_width: int = sum(self._token_widths)
        pipeline.set_progress_bar_config(disable=True)
        self.counter = EvaluationCounter()
        self.counter.watch(self.denoiser)

    def _read_schedule(self) -> None:
        """Set ``prediction_type``, ``num_train_timesteps`` and what else noising needs.

        Raises:
            BaseModelError: the scheduler has no noise schedule to train with.
        """
        raise NotImplementedError

    @property
    def _config(self) -> Any:
        """The denoiser's configuration."""
        return self.denoiser.config

    @property
    def _native_size(self) -> tuple[int, int]:
        """Height and width of the latents that the denoiser was trained on."""
        size = self._config.sample_size
        return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))

    @property
    def _step(self) -> int:
        """Pixels that both sides of a picture must be a multiple of."""
        halvings = len(self._config.block_out_channels) - 1
        return int(self.pipeline.vae_scale_factor * 2**halvings)

    # ------------------------------------------------------------------ loading

    @staticmethod
    def recognises(layout: Layout) -> bool:
        """Whether a folder has this family's shape."""
        raise NotImplementedError

    @classmethod
    def check(cls, layout: Layout) -> None:
        """Refuse what could not be patched.

        Raises:
            BaseModelError: a component is missing, or is not what this family has.
        """
        raise NotImplementedError

    @classmethod
    def _require(cls, layout: Layout) -> None:
        """Refuse a folder that lacks a component or its weights."""
        with_weights = (cls.denoiser_name, "vae", *cls.encoder_names)
        tokenizers = [name.replace("text_encoder", "tokenizer") for name in cls.encoder_names]
        for component in (*with_weights, *tokenizers, "scheduler"):
            layout.require(component, weights=component in with_weights)

    @classmethod
    def load(
        cls,
        layout: Layout,
        base_id: str,
        *,
        dtype: torch.dtype,
        device: torch.device,
        memory: MemoryOptions | None = None,
    ) -> Self:
        """Load a folder; the safety checker is not loaded, as it would hide what an eraser must show.

        Args:
            layout: the folder, already found to be of this family.
            base_id: what to call it.
            dtype: what to compute in.
            device: where.
            memory: levers to use.

        Raises:
            BaseModelError: see :meth:`check`, or its files cannot be read.
        """
        memory = memory or MemoryOptions()
        cls.check(layout)
        pipeline = cls._read_pipeline(layout, dtype)
        denoiser = getattr(pipeline, cls.denoiser_name)
        encoders = {name: getattr(pipeline, name) for name in cls.encoder_names}
        hashes: dict[str, str] = {}
        files: dict[str, list[Path]] = {}
        if dtype is torch.bfloat16 or levers.changes_weights(memory):
            # What the hash looks at is lost in memory: it is taken from the files, when it is asked for.
            files = {name: layout.loaded_files(name) for name in (cls.denoiser_name, *encoders)}
        if layout.single_file is not None and files:
            hashes = {name: weights_hash(getattr(pipeline, name), name) for name in files}
        for part in (denoiser, *encoders.values()):
            # The plain cast: diffusers' own warns of layers to be kept in fp32, and here there are none.
            nn.Module.to(part, dtype=dtype)
        nn.Module.to(
            pipeline.vae, dtype=torch.float32 if cls.upcast_vae and dtype is torch.float16 else dtype
        )
        levers.place(pipeline, denoiser, list(encoders.values()), memory, device, dtype)
        base = cls(pipeline, base_id, device=device, memory=memory)
        base._files, base._hashes = files, hashes
        return base

    @classmethod
    def _read_pipeline(cls, layout: Layout, dtype: torch.dtype) -> Any:
        import diffusers

        kind = getattr(diffusers, cls.pipeline_class)
        left_out: dict[str, Any] = dict.fromkeys(cls.left_out)
        try:
            with warnings.catch_warnings(), _without_bars():
                warnings.simplefilter("ignore", FutureWarning)
                if layout.single_file is not None:
                    # Without casting, which would lose digits that the hash looks at.
                    return kind.from_single_file(
                        str(layout.single_file), config=str(layout.folder), local_files_only=True, **left_out
                    )
                # Only the fp16 variant of some files may be there.
                parts = (cls.denoiser_name, "vae", *cls.encoder_names)
                half = any(layout.only_in_half(part) for part in parts)
                return kind.from_pretrained(
                    layout.folder,
                    dtype=dtype,
                    variant="fp16" if half else None,
                    use_safetensors=True,
                    local_files_only=True,
                    **left_out,
                )
        except Exception as fault:
            # diffusers, transformers and safetensors each raise classes of their own on damaged files.
            reason = (str(fault).strip() or type(fault).__name__).splitlines()[0]
            raise BaseModelError(f"base {layout.name} cannot be loaded: {reason}") from fault

    # ------------------------------------------------------------------ properties

    @property
    def device(self) -> torch.device:
        """Where the denoiser computes."""
        return self._device

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in."""
        return self._dtype

    @property
    def components(self) -> Mapping[str, nn.Module]:
        """See :class:`BaseModel`."""
        return networks(self.pipeline)

    def component_hash(self, component: str) -> str:
        """See :class:`BaseModel`."""
        if component in self._files and component not in self._hashes:
            self._hashes[component] = stored_weights_hash(self._files[component], component)
        return self._hashes.get(component) or weights_hash(self.components[component], component)

    def denoiser_hash(self) -> str:
        """See :class:`BaseModel`."""
        return self.component_hash(self.denoiser_name)

    @property
    def _encoders(self) -> list[Any]:
        return [getattr(self.pipeline, name) for name in self.encoder_names]

    @property
    def _tokenizers(self) -> list[Any]:
        return [
            getattr(self.pipeline, name.replace("text_encoder", "tokenizer")) for name in self.encoder_names
        ]

    @property
    def _token_widths(self) -> list[int]:
        return [encoder.get_input_embeddings().embedding_dim for encoder in self._encoders]

    # ------------------------------------------------------------------ text

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> PromptEmbeds:
        """See :class:`BaseModel`."""
        with self._on_device(self._encoders, self.memory.encoders_off_device):
            return self._through_pipeline(list(prompts))

    def _through_pipeline(self, prompts: list[str]) -> PromptEmbeds:
        """Encode prompts as the diffusers pipeline does, without guidance."""
        raise NotImplementedError

    def _join(self, outputs: Sequence[Any]) -> PromptEmbeds:
        """What the denoiser reads, from the outputs of the text encoders with all their hidden states."""
        raise NotImplementedError

    @contextmanager
    def _on_device(self, parts: Sequence[nn.Module], parked: bool, *, keep: bool = False) -> Iterator[None]:
        """Parts that are kept off the device come to it, and go again unless ``keep``."""
        if parked:
            for part in parts:
                part.to(self.device)
        try:
            yield
        finally:
            if parked and not keep:
                for part in parts:
                    part.to(levers.HOST)

    def token_ids(self, text: str) -> list[int]:
        """See :class:`BaseModel`."""
        return list(self._tokenizers[0](text, add_special_tokens=False).input_ids)

    def token_text(self, ids: Sequence[int]) -> str:
        """See :class:`BaseModel`."""
        text: str = self._tokenizers[0].decode(
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text.strip()

    def token_table(self) -> Tensor:
        """See :class:`BaseModel`."""
        count = len(self._tokenizers[0])
        tables = [encoder.get_input_embeddings().weight.detach()[:count] for encoder in self._encoders]
        return torch.cat(tables, 1).to(self.device).float()

    @property
    def special_token_ids(self) -> tuple[int, ...]:
        """See :class:`BaseModel`."""
        return tuple(sorted(set(self._tokenizers[0].all_special_ids)))

    def encode_with_vectors(self, prompts: Sequence[str], vectors: Tensor) -> PromptEmbeds:
        """See :class:`BaseModel`.

        Raises:
            BaseModelError: if the vectors have another width than the text encoder's tokens, a prompt
                has no placeholder, or its placeholder lies beyond the prompt's length.
        """
        if vectors.ndim != 2 or vectors.shape[1] != self.token_width:
            raise BaseModelError(
                f"token vectors of shape {tuple(vectors.shape)} do not fit base {self.id}: "
                f"[vectors, {self.token_width}] is needed"
            )
        length = self._tokenizers[0].model_max_length
        rows: list[list[int]] = []
        places: list[tuple[int, int]] = []
        for row, prompt in enumerate(prompts):
            segments = prompt.split(PLACEHOLDER)
            if len(segments) == 1:
                raise BaseModelError(f"the prompt '{prompt}' has no {PLACEHOLDER} for the token vectors")
            ids = self.token_ids(segments[0])
            for segment in segments[1:]:
                places += [(row, len(ids) + k) for k in range(len(vectors))]
                # Any token would do: the vector is put in its place.
                ids += [0] * len(vectors) + self.token_ids(segment)
            rows.append(ids)
        if any(position >= length - 2 for _, position in places):
            raise BaseModelError(f"{len(vectors)} token vectors do not fit into a prompt of {length} tokens")
        return self._encode_tokens(rows, places, vectors.repeat(len(places) // len(vectors), 1))

    def encode_token_vectors(self, rows: Sequence[Tensor]) -> PromptEmbeds:
        """See :class:`BaseModel`.

        Raises:
            BaseModelError: if there are no rows, or vectors of another width than the tokens'.
        """
        if not rows:
            raise BaseModelError("there are no token vectors to encode")
        for row in rows:
            if row.ndim != 2 or row.shape[1] != self.token_width:
                raise BaseModelError(
                    f"token vectors of shape {tuple(row.shape)} do not fit base {self.id}: "
                    f"[tokens, {self.token_width}] is needed"
                )
        room = self._tokenizers[0].model_max_length - 2
        kept = [row[:room] for row in rows]
        places = [(row, position) for row, one in enumerate(kept) for position in range(len(one))]
        return self._encode_tokens([[0] * len(one) for one in kept], places, torch.cat(kept))

    def _encode_tokens(
        self, rows: Sequence[Sequence[int]], places: Sequence[tuple[int, int]], vectors: Tensor
    ) -> PromptEmbeds:
        """Encode token ids between start, end and padding, with vectors in the place of some of them.

        Args:
            rows: ids of each prompt; what is too long loses its end.
            places: row and position in it of each vector.
            vectors: ``[places, token_width]``.
        """
        # Encoders that are kept off the device stay on it as long as a backward pass will come.
        trained = any(weight.requires_grad for one in self._encoders for weight in one.parameters())
        keep = torch.is_grad_enabled() and (vectors.requires_grad or trained)
        with self._on_device(self._encoders, self.memory.encoders_off_device, keep=keep):
            columns = vectors.split(self._token_widths, 1)
            parts = zip(self._tokenizers, self._encoders, columns, strict=True)
            return self._join([self._one_encoder(*part, rows, places) for part in parts])

    def _one_encoder(
        self,
        tokenizer: Any,
        encoder: Any,
        vectors: Tensor,
        rows: Sequence[Sequence[int]],
        places: Sequence[tuple[int, int]],
    ) -> Any:
        length = tokenizer.model_max_length
        framed = [[tokenizer.bos_token_id, *row[: length - 2], tokenizer.eos_token_id] for row in rows]
        ids = [row + [tokenizer.pad_token_id] * (length - len(row)) for row in framed]
        row_index = torch.tensor([row for row, _ in places], dtype=torch.long, device=self.device)
        position_index = torch.tensor([k + 1 for _, k in places], dtype=torch.long, device=self.device)

        def insert(module: nn.Module, args: Any, embedded: Tensor) -> Tensor:
            chosen = vectors.to(self.device, embedded.dtype)
            return embedded.index_put((row_index, position_index), chosen)

        mask = None
        if getattr(encoder.config, "use_attention_mask", None):
            mask = torch.tensor(
                [[1] * len(row) + [0] * (length - len(row)) for row in framed], device=self.device
            )
        hook = encoder.get_input_embeddings().register_forward_hook(insert)
        try:
            return encoder(
                torch.tensor(ids, device=self.device), attention_mask=mask, output_hidden_states=True
            )
        finally:
            hook.remove()

    @torch.no_grad()
    def word_vector(self, word: str) -> Tensor:
        """See :class:`BaseModel`.

        Raises:
            BaseModelError: if the word has no token.
        """
        ids = self.token_ids(word)
        if not ids:
            raise BaseModelError(f"the word '{word}' has no token in base {self.id}")
        return self.token_table()[ids].mean(0)

    # ------------------------------------------------------------------ denoising

    def _predict(self, latents: Tensor, timesteps: Tensor, embeds: PromptEmbeds) -> Tensor:
        """One call of the denoiser, in its own dtype and on its device."""
        raise NotImplementedError

    def denoise(self, latents: Tensor, timesteps: Tensor, embeds: PromptEmbeds) -> Tensor:
        """See :class:`BaseModel`."""
        timesteps, embeds = timesteps.to(self.device), embeds.to(self.device, self.dtype)
        rows = latents.to(self.device, self.dtype)

        def part(chosen: slice) -> Tensor:
            times = timesteps[chosen] if timesteps.ndim else timesteps
            return levers.in_chunks(
                self._predict, rows[chosen], times, embeds[chosen], self.memory.micro_batch, self.counter
            )

        whole = slice(0, len(latents))
        model_pred = part(whole) if self.crew is None else self.crew.share(len(latents), part, rows)
        return model_pred.to(latents.dtype)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """See :class:`BaseModel`."""
        raise NotImplementedError

    def training_target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """See :class:`BaseModel`."""
        raise NotImplementedError

    # ------------------------------------------------------------------ pictures

    @property
    def _shift(self) -> float:
        """What the autoencoder's latents are moved by before they are scaled."""
        return float(getattr(self.pipeline.vae.config, "shift_factor", None) or 0.0)

    @torch.no_grad()
    def encode_images(self, images: Sequence[Image], batch_size: int = 8) -> Tensor:
        """See :class:`BaseModel`.

        Raises:
            BaseModelError: if there are no pictures.
        """
        if not images:
            raise BaseModelError("there are no pictures to encode")
        vae, processor = self.pipeline.vae, self.pipeline.image_processor
        height, width = self._picture_size
        batch_size = self._at_once(batch_size)
        found = []
        with self._on_device([vae], self.memory.vae_off_device):
            for start in range(0, len(images), batch_size):
                batch = [image.convert("RGB") for image in images[start : start + batch_size]]
                pixels = processor.preprocess(batch, height=height, width=width).to(self.device, vae.dtype)
                mode = vae.encode(pixels).latent_dist.mode().float()
                found.append((mode - self._shift) * vae.config.scaling_factor)
        return torch.cat(found)

    @torch.no_grad()
    def decode_latents(self, latents: Tensor, batch_size: int = 8) -> list[Image]:
        """See :class:`BaseModel`."""
        vae, images = self.pipeline.vae, []
        batch_size = self._at_once(batch_size)
        with self._on_device([vae], self.memory.vae_off_device):
            for start in range(0, len(latents), batch_size):
                scaled = latents[start : start + batch_size].to(self.device, vae.dtype)
                scaled = scaled / vae.config.scaling_factor + self._shift
                pixels = vae.decode(scaled, return_dict=False)[0]
                images += self.pipeline.image_processor.postprocess(pixels, output_type="pil")
        return images

    def _at_once(self, pictures: int, samples: int = 1) -> int:
        """How many pictures of so many samples each go through a network together."""
        most = self.memory.micro_batch
        return pictures if most is None else max(1, min(pictures, most // samples))

    @property
    def _picture_size(self) -> tuple[int, int]:
        height, width = (side * self.pipeline.vae_scale_factor for side in self.latent_shape[1:])
        return height, width

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
        stage: str = "generate",
    ) -> list[Image]:
        """Pictures through the pipeline itself, one a seed.

        Each picture's noise comes from a CPU generator of its own, so the batch size and the device
        do not choose it, and a plain pipeline call with such generators draws the same.

        Args:
            prompts: one a seed; ``None`` where ``prompt_embeds`` is given.
            seeds: one a picture.
            steps: of the pipeline's own scheduler.
            guidance_scale: at 1 or less no unconditional half is computed.
            batch_size: pictures at once.
            progress: told after every batch.
            prompt_embeds: one row a seed, in place of the prompts.
            stage: how progress calls it.

        Raises:
            BaseModelError: if prompts and seeds differ in number.
        """
        images: list[Image] = []
        for latents in self._batches(
            prompts, prompt_embeds, seeds, steps, guidance_scale, batch_size, progress, stage
        ):
            images += self.decode_latents(latents, batch_size=len(latents))
        return images

    def sample_latents(
        self,
        embeds: PromptEmbeds,
        seeds: Sequence[int],
        steps: int = 20,
        guidance_scale: float = 5.0,
        batch_size: int = 8,
        progress: Progress | None = None,
        stage: str = "generate",
    ) -> Tensor:
        """See :class:`BaseModel`; arguments as in :meth:`generate`."""
        found = self._batches(None, embeds, seeds, steps, guidance_scale, batch_size, progress, stage)
        return torch.cat(list(found)).float()

    def _batches(
        self,
        prompts: Sequence[str] | None,
        embeds: PromptEmbeds | None,
        seeds: Sequence[int],
        steps: int,
        guidance_scale: float,
        batch_size: int,
        progress: Progress | None,
        stage: str,
    ) -> Iterator[Tensor]:
        if (prompts is None) == (embeds is None):
            raise BaseModelError("give either prompts or prompt embeddings to draw from")
        given = len(prompts) if prompts is not None else len(embeds or ())
        if given != len(seeds):
            raise BaseModelError(
                f"{given} prompts were given with {len(seeds)} seeds: one seed a prompt is needed"
            )
        if not seeds:
            raise BaseModelError("there is no prompt to draw a picture of")
        # Guidance doubles the samples.
        batch_size = self._at_once(batch_size, 2 if guidance_scale > 1 else 1)
        for start in range(0, len(seeds), batch_size):
            rows = slice(start, start + batch_size)
            chosen = self.encode_prompts(prompts[rows]) if prompts is not None else embeds[rows]  # type: ignore[index]
            yield self._draw(chosen, seeds[rows], steps, guidance_scale)
            if progress:
                progress.update(stage, min(start + batch_size, len(seeds)), len(seeds))

    def _draw(self, embeds: PromptEmbeds, seeds: Sequence[int], steps: int, guidance_scale: float) -> Tensor:
        text = _named(embeds.to(self.device, self.dtype))
        if guidance_scale > 1:
            nothing = self.encode_prompts([""] * len(seeds)).to(self.device, self.dtype)
            text |= {f"negative_{name}": rows for name, rows in _named(nothing).items()}
        height, width = self._picture_size
        with self._only_denoiser():
            latents: Tensor = self.pipeline(
                **text,
                height=height,
                width=width,
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


def _named(embeds: PromptEmbeds) -> dict[str, Tensor]:
    """Embeddings under the names that pipelines take them by."""
    found = {"prompt_embeds": embeds.prompt_embeds}
    if embeds.pooled_prompt_embeds is not None:
        found["pooled_prompt_embeds"] = embeds.pooled_prompt_embeds
    return found
