"""Prompts as token ids with learnt vectors between them, and their way through one text encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from recare_patch.core import BaseModelError

Tokens = tuple[list[list[int]], list[tuple[int, int]]]
"""A row of token ids for each prompt, without start and end, and the places (row, position) of vectors."""


def tokens_around(tokenizer: Any, texts: Sequence[Sequence[str]], count: int) -> Tokens:
    """Prompts given as the texts around ``count`` vectors each time; BaseModelError where these do not fit."""
    length = tokenizer.model_max_length
    rows: list[list[int]] = []
    places: list[tuple[int, int]] = []
    for row, segments in enumerate(texts):
        first, *others = (list(tokenizer(text, add_special_tokens=False).input_ids) for text in segments)
        for segment in others:
            places += [(row, len(first) + k) for k in range(count)]
            # Any token would do: the vector is put in its place.
            first += [0] * count + segment
        rows.append(first)
    if any(position >= length - 2 for _, position in places):
        raise BaseModelError(f"{count} token vectors do not fit into a prompt of {length} tokens")
    return rows, places


def encode_tokens(tokenizer: Any, encoder: Any, tokens: Tokens, vectors: Tensor) -> Any:
    """An encoder's output, with all hidden states, of ids between start, end and padding.

    ``vectors`` ``[places, width]`` take the tokens' places, differentiably.
    """
    rows, places = tokens
    table = encoder.get_input_embeddings()
    device, length, mask = table.weight.device, tokenizer.model_max_length, None
    row_index = torch.tensor([row for row, _ in places], dtype=torch.long, device=device)
    position_index = torch.tensor([k + 1 for _, k in places], dtype=torch.long, device=device)

    def insert(module: nn.Module, args: Any, embedded: Tensor) -> Tensor:
        return embedded.index_put((row_index, position_index), vectors.to(device, embedded.dtype))

    framed = [[tokenizer.bos_token_id, *row[: length - 2], tokenizer.eos_token_id] for row in rows]
    padded = [row + [tokenizer.pad_token_id] * (length - len(row)) for row in framed]
    if getattr(encoder.config, "use_attention_mask", None):
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in framed], device=device)
    hook = table.register_forward_hook(insert)
    try:
        return encoder(torch.tensor(padded, device=device), attention_mask=mask, output_hidden_states=True)
    finally:
        hook.remove()
