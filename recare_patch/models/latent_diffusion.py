"""A frozen text-to-image model: what the rest of the package asks of one, whatever its architecture.

A family is a subclass: it says how a folder is recognised, how its text encoders' outputs join, how its
denoiser is called and how it noises. Loading, pictures, token vectors and the memory levers are the same
for all.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from recare_patch.core import BaseModelError
from recare_patch.models import memory as levers
from recare_patch.models.inputs import PLACEHOLDER, EvaluationCounter, PromptEmbeds
from recare_patch.models.loading import Layout, stored_weights_hash, weights_hash
from recare_patch.models.lora import networks
from recare_patch.recipe import MemoryOptions

if TYPE_CHECKING:
    from pathlib import Path

    from PIL.Image import Image

    from recare_patch.core import Crew, Progress


class LatentDiffusion:
    """A frozen text-to-image model around a diffusers pipeline; no parameter of it asks for a gradient."""

    family: ClassVar[str]  # its name in FAMILIES
    pipeline_class: ClassVar[str]  # the diffusers pipeline that loads it
    denoiser_name: ClassVar[str] = "unet"  # the denoiser's component
    # The text encoders' components. A token's vector is those of all encoders end to end, in this order.
    encoder_names: ClassVar[tuple[str, ...]] = ("text_encoder",)
    left_out: ClassVar[tuple[str, ...]] = ()  # loaded as None, where the folder lists them or not
    other_prompts: ClassVar[tuple[str, ...]] = ()  # the pipeline asks for them when it encodes prompts
    upcast_vae: ClassVar[bool] = False  # keep the autoencoder in fp32 where fp16 overflows in it

    prediction_type: str  # epsilon, v_prediction or flow
    num_train_timesteps: int  # length of the diffusion process

    def __init__(
        self, pipeline: Any, base_id: str, *, device: torch.device | None = None, memory: MemoryOptions | None = None
    ) -> None:
        """Wrap a loaded pipeline of the family's class; by default it computes where its denoiser is."""
        self.id = base_id  # atelier, a hub id, or the name of the folder it came from
        self.pipeline = pipeline
        self.memory = memory or MemoryOptions()
        # Processes that share the rows of every denoise(); None: this one makes them all.
        self.crew: Crew | None = None
        self.denoiser: nn.Module = getattr(pipeline, self.denoiser_name)
        self.device = device or next(self.denoiser.parameters()).device
        self.dtype: torch.dtype = next(self._encoders[0].parameters()).dtype
        # Filled where what is in memory has lost digits, or is not there: component → its files or hash.
        self._files: dict[str, list[Path]] = {}
        self._hashes: dict[str, str] = {}
        self._config: Any = self.denoiser.config
        self._read_schedule()
        side, scale = self._config.sample_size, pipeline.vae_scale_factor
        size = self._native_size = (side, side) if isinstance(side, int) else (int(side[0]), int(side[1]))
        if self.memory.resolution is not None:
            size = levers.latent_size(base_id, self.memory.resolution, scale, self._step)
        self.latent_shape: tuple[int, int, int] = (int(self._config.in_channels), *size)
        self._size = {"height": size[0] * scale, "width": size[1] * scale}  # of a picture, in pixels
        # What the autoencoder's latents are moved by before they are scaled.
        self._shift = float(getattr(pipeline.vae.config, "shift_factor", None) or 0.0)
        for part in (self.denoiser, pipeline.vae, *self._encoders):
            part.requires_grad_(False).eval()
        self._token_widths = [one.get_input_embeddings().embedding_dim for one in self._encoders]
        self.token_width: int = sum(self._token_widths)
        pipeline.set_progress_bar_config(disable=True)
        self.counter = EvaluationCounter()
        self.counter.watch(self.denoiser)

    @staticmethod
    def recognises(layout: Layout) -> bool:
        """Whether a folder has this family's shape."""
        raise NotImplementedError

    @classmethod
    def check(cls, layout: Layout) -> None:
        """Refuse what could not be patched, by its configurations: a component is missing, or of another kind."""
        parts = (cls.denoiser_name, "vae", *cls.encoder_names, *map(_tokenizer, cls.encoder_names), "scheduler")
        for component in parts:
            layout.require(component, weights=False)

    def _read_schedule(self) -> None:
        """Set ``prediction_type``, ``num_train_timesteps`` and what else noising needs."""
        raise NotImplementedError

    def _join(self, outputs: Sequence[Any]) -> PromptEmbeds:
        """What the denoiser reads, from the outputs of the text encoders with all their hidden states."""
        raise NotImplementedError

    def _predict(self, latents: Tensor, timesteps: Tensor, embeds: PromptEmbeds) -> Tensor:
        """One call of the denoiser, in its own dtype and on its device."""
        raise NotImplementedError

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """``z_t`` from clean latents ``[batch, channels, height, width]`` and timesteps ``[batch]``."""
        raise NotImplementedError

    def training_target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the denoiser was trained to predict for :meth:`add_noise` of the same arguments."""
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
            files = {name: next(iter(layout.weight_sets(name).values()), []) for name in parts}
            if layout.single_file is not None:
                hashes = {name: weights_hash(part, name) for name, part in parts.items()}
        for part in parts.values():
            # The plain cast: diffusers' own warns of layers to be kept in fp32, and here there are none.
            nn.Module.to(part, dtype=dtype)
        upcast = cls.upcast_vae and dtype is torch.float16
        nn.Module.to(pipeline.vae, dtype=torch.float32 if upcast else dtype)
        denoiser, *encoders = parts.values()
        if memory == MemoryOptions():
            for part in (*encoders, pipeline.vae, denoiser):
                nn.Module.to(part, device)
        else:
            levers.place(pipeline, denoiser, encoders, memory, device, dtype)
        base = cls(pipeline, base_id, device=device, memory=memory)
        base._files, base._hashes = files, hashes
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
                # Only the fp16 variant of some files may be there.
                stored = map(layout.weight_files, (cls.denoiser_name, "vae", *cls.encoder_names))
                half = any(all(".fp16." in file.name for file in files) for files in stored)
                options |= {"dtype": dtype, "variant": "fp16" if half else None, "use_safetensors": True}
                return kind.from_pretrained(layout.folder, **options)
        except Exception as fault:
            # diffusers, transformers and safetensors each raise classes of their own on damaged files.
            reason = (str(fault).strip() or type(fault).__name__).splitlines()[0]
            raise BaseModelError(f"base {layout.name} cannot be loaded: {reason}") from fault

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

    @property
    def _encoders(self) -> list[Any]:
        return [getattr(self.pipeline, name) for name in self.encoder_names]

    @property
    def _tokenizers(self) -> list[Any]:
        return [getattr(self.pipeline, _tokenizer(name)) for name in self.encoder_names]

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

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> PromptEmbeds:
        """Encode prompts, without gradient."""
        options: dict[str, Any] = {"device": self.device, **dict.fromkeys(self.other_prompts)}
        options |= {"num_images_per_prompt": 1, "do_classifier_free_guidance": False}
        with self._on_device(self._encoders, self.memory.encoders_off_device):
            text, _, *pooled = self.pipeline.encode_prompt(list(prompts), **options)
        return PromptEmbeds(text, pooled[0] if pooled else None)

    def token_ids(self, text: str) -> list[int]:
        """The ids of a text's tokens, without start, end and padding."""
        return list(self._tokenizers[0](text, add_special_tokens=False).input_ids)

    def token_text(self, ids: Sequence[int]) -> str:
        """The text that token ids spell; special ones are left out."""
        text: str = self._tokenizers[0].decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text.strip()

    def token_table(self) -> Tensor:
        """The vectors of all tokens, ``[vocabulary, token_width]``, fp32."""
        count = len(self._tokenizers[0])
        tables = [encoder.get_input_embeddings().weight.detach()[:count] for encoder in self._encoders]
        return torch.cat(tables, 1).to(self.device).float()

    @property
    def special_token_ids(self) -> tuple[int, ...]:
        """Ids that stand for no text: start, end and the like."""
        return tuple(sorted(set(self._tokenizers[0].all_special_ids)))

    @torch.no_grad()
    def word_vector(self, word: str) -> Tensor:
        """The token vector of a word, ``[token_width]``, fp32; the mean where it has several tokens."""
        ids = self.token_ids(word)
        if not ids:
            raise BaseModelError(f"the word '{word}' has no token in base {self.id}")
        return self.token_table()[ids].mean(0)

    def _check_vectors(self, vectors: Tensor) -> None:
        if vectors.ndim != 2 or vectors.shape[1] != self.token_width:
            raise BaseModelError(
                f"token vectors of shape {tuple(vectors.shape)} do not fit base {self.id}: "
                f"[vectors, {self.token_width}] is needed"
            )

    def encode_with_vectors(self, prompts: Sequence[str], vectors: Tensor) -> PromptEmbeds:
        """Encode prompts that hold :data:`PLACEHOLDER`, differentiably in the vectors put there.

        Each placeholder takes as many token positions as there are vectors, ``[vectors, token_width]``.
        """
        self._check_vectors(vectors)
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
        """Encode prompts given as the vectors of their tokens, differentiably in all of them.

        Rows, ``[tokens, token_width]`` each, may differ in length; start, end and padding are added, and
        what is too long loses its end, as long prompts do.
        """
        if not rows:
            raise BaseModelError("there are no token vectors to encode")
        for row in rows:
            self._check_vectors(row)
        kept = [row[: self._tokenizers[0].model_max_length - 2] for row in rows]
        places = [(row, position) for row, one in enumerate(kept) for position in range(len(one))]
        return self._encode_tokens([[0] * len(one) for one in kept], places, torch.cat(kept))

    def _encode_tokens(
        self, rows: Sequence[Sequence[int]], places: Sequence[tuple[int, int]], vectors: Tensor
    ) -> PromptEmbeds:
        """Encode token ids between start, end and padding, with vectors in some places (row, position)."""
        # Encoders that are kept off the device stay on it as long as a backward pass will come.
        trained = any(weight.requires_grad for one in self._encoders for weight in one.parameters())
        keep = torch.is_grad_enabled() and (vectors.requires_grad or trained)
        row_index = torch.tensor([row for row, _ in places], dtype=torch.long, device=self.device)
        position_index = torch.tensor([k + 1 for _, k in places], dtype=torch.long, device=self.device)

        def read(tokenizer: Any, encoder: Any, own: Tensor) -> Any:
            def insert(module: nn.Module, args: Any, embedded: Tensor) -> Tensor:
                return embedded.index_put((row_index, position_index), own.to(self.device, embedded.dtype))

            length, mask = tokenizer.model_max_length, None
            framed = [[tokenizer.bos_token_id, *row[: length - 2], tokenizer.eos_token_id] for row in rows]
            padded = [row + [tokenizer.pad_token_id] * (length - len(row)) for row in framed]
            if getattr(encoder.config, "use_attention_mask", None):
                shown = [[1] * len(row) + [0] * (length - len(row)) for row in framed]
                mask = torch.tensor(shown, device=self.device)
            hook = encoder.get_input_embeddings().register_forward_hook(insert)
            try:
                ids = torch.tensor(padded, device=self.device)
                return encoder(ids, attention_mask=mask, output_hidden_states=True)
            finally:
                hook.remove()

        with self._on_device(self._encoders, self.memory.encoders_off_device, keep=keep):
            columns = vectors.split(self._token_widths, 1)
            return self._join(list(map(read, self._tokenizers, self._encoders, columns)))

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

    def _at_once(self, pictures: int, samples: int = 1) -> int:
        """How many pictures of so many samples each go through a network together."""
        most = self.memory.micro_batch
        return pictures if most is None else max(1, min(pictures, most // samples))

    @torch.no_grad()
    def encode_images(self, images: Sequence[Image], batch_size: int = 8) -> Tensor:
        """Scaled latents (posterior mean) ``[images, channels, height, width]``, fp32."""
        if not images:
            raise BaseModelError("there are no pictures to encode")
        vae, found, batch_size = self.pipeline.vae, [], self._at_once(batch_size)
        with self._on_device([vae], self.memory.vae_off_device):
            for start in range(0, len(images), batch_size):
                batch = [image.convert("RGB") for image in images[start : start + batch_size]]
                pixels = self.pipeline.image_processor.preprocess(batch, **self._size)
                mode = vae.encode(pixels.to(self.device, vae.dtype)).latent_dist.mode().float()
                found.append((mode - self._shift) * vae.config.scaling_factor)
        return torch.cat(found)

    @torch.no_grad()
    def decode_latents(self, latents: Tensor, batch_size: int = 8) -> list[Image]:
        """Pictures of scaled latents."""
        vae, images, batch_size = self.pipeline.vae, [], self._at_once(batch_size)
        with self._on_device([vae], self.memory.vae_off_device):
            for start in range(0, len(latents), batch_size):
                rows = latents[start : start + batch_size].to(self.device, vae.dtype)
                scaled = rows / vae.config.scaling_factor + self._shift
                pixels = vae.decode(scaled, return_dict=False)[0]
                images += self.pipeline.image_processor.postprocess(pixels, output_type="pil")
        return images

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

        At a ``guidance_scale`` of 1 or less no unconditional half is computed. ``prompt_embeds`` stand in
        place of ``prompts``, which are None then. Progress calls it ``stage``.
        """
        images: list[Image] = []
        for latents in self._batches(prompts, prompt_embeds, seeds, steps, guidance_scale, batch_size, progress, stage):
            images += self.decode_latents(latents, batch_size=len(latents))
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

        def named(embeds: PromptEmbeds, prefix: str = "") -> dict[str, Tensor]:
            parts = vars(embeds.to(self.device, self.dtype))
            return {f"{prefix}{name}": part for name, part in parts.items() if part is not None}

        # Guidance doubles the samples.
        batch_size = self._at_once(batch_size, 2 if guidance_scale > 1 else 1)
        for start in range(0, len(seeds), batch_size):
            rows, own = given[start : start + batch_size], seeds[start : start + batch_size]
            text = named(rows if isinstance(rows, PromptEmbeds) else self.encode_prompts(rows))
            if guidance_scale > 1:
                text |= named(self.encode_prompts([""] * len(own)), "negative_")
            with self._only_denoiser():
                latents = self.pipeline(
                    **text,
                    **self._size,
                    num_inference_steps=steps,
                    guidance_scale=guidance_scale,
                    generator=[torch.Generator().manual_seed(seed) for seed in own],
                    output_type="latent",
                ).images
            yield latents
            if progress:
                progress.update(stage, start + len(own), len(seeds))

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


def _tokenizer(encoder: str) -> str:
    return encoder.replace("text_encoder", "tokenizer")


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
