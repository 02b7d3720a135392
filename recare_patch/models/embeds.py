"""What the rest of the package asks of a base model, whatever its architecture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from PIL.Image import Image

    from recare_patch.core import Crew, Progress
    from recare_patch.recipe import MemoryOptions

TEXT_ROOM = 75
"""Tokens between start and end of a text that CLIP's towers read."""

PLACEHOLDER = "<*>"
"""Stands in a prompt where learnt token vectors go (Gal et al., arXiv 2208.01618)."""


@dataclass(frozen=True)
class PromptEmbeds:
    """Encoded prompts, one row each.

    Attributes:
        prompt_embeds: ``[batch, tokens, width]``.
        pooled_prompt_embeds: ``[batch, pooled width]`` for architectures that use one.
    """

    prompt_embeds: Tensor
    pooled_prompt_embeds: Tensor | None = None

    def _map(self, change: Any) -> PromptEmbeds:
        pooled = self.pooled_prompt_embeds
        return PromptEmbeds(change(self.prompt_embeds), None if pooled is None else change(pooled))

    def __len__(self) -> int:
        return len(self.prompt_embeds)

    def __getitem__(self, index: Tensor | slice | int | Sequence[int]) -> PromptEmbeds:
        """Rows by index tensor, list or slice; a single number keeps the batch axis."""
        if isinstance(index, int):
            # A slice cannot overrun, so that iteration would never end.
            if not -len(self) <= index < len(self):
                raise IndexError(f"row {index} of {len(self)}")
            index = [index % len(self)]
        if isinstance(index, slice):
            return self._map(lambda rows: rows[index])
        where = torch.as_tensor(index)
        return self._map(lambda rows: rows[where.to(rows.device)])

    def repeat(self, count: int) -> PromptEmbeds:
        """All rows, ``count`` times over: ``[a, b]`` becomes ``[a, b, a, b]``."""
        return self._map(lambda rows: rows.repeat(count, *(1,) * (rows.ndim - 1)))

    def detach(self) -> PromptEmbeds:
        """The same numbers without their gradient."""
        return self._map(lambda rows: rows.detach())

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> PromptEmbeds:
        """Moved, cast, or both."""
        return self._map(lambda rows: rows.to(device=device, dtype=dtype))

    @staticmethod
    def cat(parts: Sequence[PromptEmbeds]) -> PromptEmbeds:
        """The rows of several, one after the other.

        Raises:
            ValueError: if there is nothing to join, or only some of them have pooled embeddings.
        """
        if not parts:
            raise ValueError("no prompt embeddings to join")
        pooled = [part.pooled_prompt_embeds for part in parts if part.pooled_prompt_embeds is not None]
        if pooled and len(pooled) != len(parts):
            raise ValueError(f"{len(pooled)} of {len(parts)} prompt embeddings have a pooled part")
        return PromptEmbeds(
            torch.cat([part.prompt_embeds for part in parts]), torch.cat(pooled) if pooled else None
        )


class EvaluationCounter:
    """Counts denoiser evaluations a sample at a time, by stage.

    A sample whose evaluation is recorded for a backward pass counts as three: the backward pass
    costs about two forward ones.

    Attributes:
        by_stage: stage → evaluations; set it to go on from an earlier count.
    """

    def __init__(self) -> None:
        self.by_stage: dict[str, int] = {}
        self._stage = "other"
        self._paused = False

    @property
    def total(self) -> int:
        """All evaluations so far."""
        return sum(self.by_stage.values())

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Evaluations inside count towards ``name``."""
        outer, self._stage = self._stage, name
        try:
            yield
        finally:
            self._stage = outer

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Evaluations inside are not counted: they are done a second time to save memory."""
        outer, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = outer

    def watch(self, denoiser: nn.Module) -> None:
        """Count every call of ``denoiser`` from now on."""
        denoiser.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._paused:
            return
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        recorded = torch.is_grad_enabled() and (
            any(value.requires_grad for value in tensors)
            or any(parameter.requires_grad for parameter in denoiser.parameters())
        )
        # UNets call them samples, transformers hidden states.
        latents = args[0] if args else kwargs.get("sample", kwargs.get("hidden_states"))
        assert latents is not None
        self.by_stage[self._stage] = self.by_stage.get(self._stage, 0) + len(latents) * (3 if recorded else 1)


class BaseModel(Protocol):
    """A frozen text-to-image model.

    Attributes:
        id: ``atelier``, a hub id, or the name of the folder it came from.
        family: its name in :data:`FAMILIES`.
        pipeline: the diffusers pipeline itself.
        denoiser: its UNet or transformer; no parameter of it asks for a gradient.
        denoiser_name: the denoiser's component: ``unet`` or ``transformer``.
        prediction_type: ``epsilon``, ``v_prediction`` or ``flow``.
        latent_shape: ``(channels, height, width)`` of one picture's latents.
        num_train_timesteps: length of the diffusion process.
        token_width: width of a token's vector in the text encoder; of several, in all of them together.
        counter: denoiser evaluations so far.
        memory: the levers that are in effect.
        crew: processes that share the rows of every :meth:`denoise`; None: this one makes them all.
    """

    id: str
    family: str
    pipeline: Any
    denoiser: nn.Module
    denoiser_name: str
    prediction_type: str
    latent_shape: tuple[int, int, int]
    num_train_timesteps: int
    token_width: int
    counter: EvaluationCounter
    memory: MemoryOptions
    crew: Crew | None

    @property
    def device(self) -> torch.device:
        """Where it is."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        ...

    def encode_prompts(self, prompts: Sequence[str]) -> PromptEmbeds:
        """Encode prompts, without gradient."""
        ...

    def encode_with_vectors(self, prompts: Sequence[str], vectors: Tensor) -> PromptEmbeds:
        """Encode prompts that hold :data:`PLACEHOLDER`, differentiably in the vectors put there.

        Args:
            prompts: templates; each placeholder takes as many token positions as there are vectors.
            vectors: ``[vectors, token_width]``.
        """
        ...

    def encode_token_vectors(self, rows: Sequence[Tensor]) -> PromptEmbeds:
        """Encode prompts given as the vectors of their tokens, differentiably in all of them.

        Args:
            rows: ``[tokens, token_width]`` each, without start, end and padding, which are added; rows
                may differ in length, and what is too long loses its end, as long prompts do.
        """
        ...

    def token_ids(self, text: str) -> list[int]:
        """The ids of a text's tokens, without start, end and padding."""
        ...

    def token_text(self, ids: Sequence[int]) -> str:
        """The text that token ids spell; special ones are left out."""
        ...

    def token_table(self) -> Tensor:
        """The vectors of all tokens, ``[vocabulary, token_width]``, fp32."""
        ...

    @property
    def special_token_ids(self) -> tuple[int, ...]:
        """Ids that stand for no text: start, end and the like."""
        ...

    def word_vector(self, word: str) -> Tensor:
        """The token vector of a word, ``[token_width]``, fp32; the mean where it has several tokens."""
        ...

    def denoise(self, latents: Tensor, timesteps: Tensor, embeds: PromptEmbeds) -> Tensor:
        """``model_pred`` for noisy latents.

        Args:
            latents: ``z_t``, ``[batch, channels, height, width]``.
            timesteps: ``[batch]``, or one for all.
            embeds: a row for each latent.

        Returns:
            ``[batch, channels, height, width]`` in the dtype of ``latents``.
        """
        ...

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """``z_t`` from clean latents, as :mod:`noise` has it for the prediction type."""
        ...

    def training_target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the denoiser was trained to predict for :meth:`add_noise` of the same arguments.

        Args:
            latents: clean ones, ``[batch, channels, height, width]``.
            noise: same shape.
            timesteps: ``[batch]``.
        """
        ...

    def encode_images(self, images: Sequence[Image], batch_size: int = 8) -> Tensor:
        """Scaled latents (posterior mean) ``[images, channels, height, width]``, fp32."""
        ...

    def decode_latents(self, latents: Tensor, batch_size: int = 8) -> list[Image]:
        """Pictures of scaled latents."""
        ...

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
        """Pictures through the diffusers pipeline, each from a generator of its own on the CPU."""
        ...

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
        """As :meth:`generate`, stopping at the scaled latents ``[rows, channels, height, width]``."""
        ...

    @property
    def components(self) -> Mapping[str, nn.Module]:
        """The networks that a patch may change, by their names in a patch: the denoiser, text encoders."""
        ...

    def component_hash(self, component: str) -> str:
        """SHA-256 of a network's own weights; see :func:`weights_hash`."""
        ...

    def denoiser_hash(self) -> str:
        """The same of the denoiser."""
        ...
