"""Prompts as a captured call holds them: whatever a pipeline tells its denoiser of a text, a row a prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from recare_patch.models import calls
from recare_patch.models.inputs import PromptEmbeds


@dataclass(frozen=True)
class Said:
    """One prompt: what the denoiser is told of it, and where that came from.

    Attributes:
        told: the text's arguments, of one row.
        text: the prompt.
        vectors: what stands for its placeholders, ``[vectors, token_width]``.
    """

    told: dict[calls.Path, Any]
    text: str | None
    vectors: Tensor | None = None


class CapturedPrompts(PromptEmbeds):
    """Encoded prompts as a captured call holds them, one :class:`Said` a row."""

    rows: tuple[Said, ...]
    main: calls.Path

    def __init__(self, rows: Sequence[Said], main: calls.Path) -> None:
        object.__setattr__(self, "rows", tuple(rows))
        object.__setattr__(self, "main", main)

    @property
    def prompt_embeds(self) -> Tensor:  # type: ignore[override]
        """What the text encoder made of the tokens, ``[batch, tokens, width]``; short prompts end in zeros."""
        found = [_matrix(one.told[self.main]) for one in self.rows]
        room = max(len(one) for one in found)
        return torch.stack([torch.cat([one, one.new_zeros(room - len(one), one.shape[1])]) for one in found])

    @property
    def pooled_prompt_embeds(self) -> Tensor | None:  # type: ignore[override]
        """None: all else that is told of a prompt is in its row."""
        return None

    def _map(self, change: Any) -> PromptEmbeds:
        raise NotImplementedError

    def _with(self, change: Callable[[Tensor], Tensor]) -> CapturedPrompts:
        def changed(value: Any) -> Any:
            if isinstance(value, Tensor):
                return change(value)
            return type(value)(map(changed, value)) if isinstance(value, list | tuple) else value

        rows = [replace(one, told={path: changed(value) for path, value in one.told.items()}) for one in self.rows]
        return CapturedPrompts(rows, self.main)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Tensor | slice | int | Sequence[int]) -> PromptEmbeds:
        if isinstance(index, int):
            if not -len(self) <= index < len(self):
                raise IndexError(f"row {index} of {len(self)}")
            index = [index]
        chosen = self.rows[index] if isinstance(index, slice) else [self.rows[int(k)] for k in index]
        return CapturedPrompts(chosen, self.main)

    def repeat(self, count: int) -> PromptEmbeds:
        """All rows, ``count`` times over."""
        return CapturedPrompts(self.rows * count, self.main)

    def said_by(self, prompt_embeds: Tensor) -> PromptEmbeds:
        """All else of it with other token embeddings, one row ``[1, tokens, width]``; no prompt of its own any more."""

        def changed(value: Any) -> Any:
            if isinstance(value, Tensor):
                return prompt_embeds.reshape(value.shape).to(value.dtype)
            return type(value)(map(changed, value))

        (row,) = self.rows
        return CapturedPrompts([Said({**row.told, self.main: changed(row.told[self.main])}, None)], self.main)

    def detach(self) -> PromptEmbeds:
        """The same numbers without their gradient."""
        return self._with(Tensor.detach)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> PromptEmbeds:
        """Moved; the pipeline has chosen the dtypes, and some of what it tells are masks and numbers."""
        return self if device is None else self._with(lambda value: value.to(device))

    @classmethod
    def _joined(cls, parts: Sequence[PromptEmbeds]) -> PromptEmbeds:
        rows = [one for part in parts if isinstance(part, CapturedPrompts) for one in part.rows]
        assert isinstance(parts[0], CapturedPrompts)
        return CapturedPrompts(rows, parts[0].main)


def _matrix(value: Any) -> Tensor:
    """A text argument of one row as ``[tokens, width]``."""
    while not isinstance(value, Tensor):
        value = value[0]
    return value.reshape(-1, value.shape[-1])
