"""What a denoiser is given beside its latents, and the count of how often it is asked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from recare_patch.core import Registry, noted

TEXT_ROOM = 75
"""Tokens between start and end of a text that CLIP's towers read."""

PLACEHOLDER = "<*>"
"""Stands in a prompt where learnt token vectors go (Gal et al., arXiv 2208.01618)."""


@dataclass(frozen=True)
class PromptEmbeds:
    """Encoded prompts, one row each."""

    prompt_embeds: Tensor
    """``[batch, tokens, width]``."""

    pooled_prompt_embeds: Tensor | None = None
    """``[batch, pooled width]``, for architectures that use one."""

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

    def said_by(self, prompt_embeds: Tensor) -> PromptEmbeds:
        """All else of it with other token embeddings, one row ``[1, tokens, width]``."""
        return replace(self, prompt_embeds=prompt_embeds)

    def detach(self) -> PromptEmbeds:
        """The same numbers without their gradient."""
        return self._map(lambda rows: rows.detach())

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> PromptEmbeds:
        """Moved, cast, or both."""
        return self._map(lambda rows: rows.to(device=device, dtype=dtype))

    @classmethod
    def _joined(cls, parts: Sequence[PromptEmbeds]) -> PromptEmbeds:
        """What :meth:`cat` of a subclass's parts is."""
        raise NotImplementedError

    @staticmethod
    def cat(parts: Sequence[PromptEmbeds]) -> PromptEmbeds:
        """The rows of several, one after the other; all of them have pooled embeddings, or none."""
        if not parts:
            raise ValueError("no prompt embeddings to join")
        if type(parts[0]) is not PromptEmbeds:
            return type(parts[0])._joined(parts)
        pooled = [part.pooled_prompt_embeds for part in parts if part.pooled_prompt_embeds is not None]
        if pooled and len(pooled) != len(parts):
            raise ValueError(f"{len(pooled)} of {len(parts)} prompt embeddings have a pooled part")
        return PromptEmbeds(torch.cat([part.prompt_embeds for part in parts]), torch.cat(pooled) if pooled else None)


class EvaluationCounter:
    """Counts denoiser evaluations a sample at a time, by stage.

    A sample whose evaluation is recorded for a backward pass counts as three: the backward pass
    costs about two forward ones.
    """

    def __init__(self) -> None:
        self.by_stage: dict[str, int] = {}  # set it to go on from an earlier count
        self._stage: str | None = "other"
        self._first = "sample"

    @property
    def total(self) -> int:
        """All evaluations so far."""
        return sum(self.by_stage.values())

    @contextmanager
    def stage(self, name: str | None) -> Iterator[None]:
        """Evaluations inside count towards ``name``; None: not at all, as they only save memory."""
        outer, self._stage = self._stage, name
        try:
            with noted(name) if name is not None else nullcontext():
                yield
        finally:
            self._stage = outer

    def watch(self, denoiser: nn.Module) -> None:
        """Count every call of ``denoiser`` from now on."""
        self._first = next(iter(signature(denoiser.forward).parameters))
        denoiser.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._stage is None:
            return
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        recorded = torch.is_grad_enabled() and (
            any(value.requires_grad for value in tensors)
            or any(parameter.requires_grad for parameter in denoiser.parameters())
        )
        # UNets call them samples, transformers hidden states; all of them name them first.
        latents = args[0] if args else next(kwargs[name] for name in (self._first, "sample") if name in kwargs)
        self.by_stage[self._stage] = self.by_stage.get(self._stage, 0) + len(latents) * (3 if recorded else 1)


def sample_timesteps(count: int, low: int, high: int, generator: torch.Generator) -> Tensor:
    """Uniform timesteps ``low ≤ t < high``, ``[count]``, int64, on the generator's device."""
    if not low < high:
        raise ValueError(f"the range of timesteps is empty: low {low}, high {high}")
    return torch.randint(low, high, (count,), generator=generator, device=generator.device)


SCHEDULERS = Registry(
    "scheduler",
    {
        "ddim": "diffusers:DDIMScheduler",
        "dpm-solver++": "diffusers:DPMSolverMultistepScheduler",
        "euler": "diffusers:EulerDiscreteScheduler",
        "pndm": "diffusers:PNDMScheduler",
        "unipc": "diffusers:UniPCMultistepScheduler",
    },
)
"""Samplers by the names of a recipe: how a pipeline goes from noise to a picture."""

# As Stable Diffusion uses it: its Runge-Kutta start needs four steps more.
_OPTIONS: dict[str, dict[str, Any]] = {"pndm": {"skip_prk_steps": True}}


@contextmanager
def scheduled(pipeline: Any, name: str | None) -> Iterator[None]:
    """The pipeline with another scheduler of the same noise schedule, for as long as it is needed.

    Args:
        pipeline: a diffusers pipeline.
        name: of :data:`SCHEDULERS`; None: its own, as where that is of flow matching, which these are not for.

    Raises:
        UnknownNameError: no such scheduler.
    """
    own, kind = pipeline.scheduler, None if name is None else SCHEDULERS.get(name)
    if name is None or kind is None or not hasattr(own, "alphas_cumprod"):
        yield
        return
    pipeline.scheduler = kind.from_config(own.config, **_OPTIONS.get(name, {}))
    try:
        yield
    finally:
        pipeline.scheduler = own
