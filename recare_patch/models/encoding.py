"""The text side of a base: prompts and token vectors to what the denoiser reads, a few at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from recare_patch.core import BaseModelError, noted
from recare_patch.models import memory as levers
from recare_patch.models.inputs import PLACEHOLDER, PromptEmbeds
from recare_patch.models.precision import check_finite, in_double
from recare_patch.models.tokens import Tokens, encode_tokens, tokens_around
from recare_patch.recipe import MemoryOptions

ENCODED_AT_ONCE = 32
"""Prompts that go through the text encoders together: SDXL's hold 10 MB of each while they work."""


def parts_of(count: int, most: int) -> list[slice]:
    """Slices of at most ``most`` rows, one at least."""
    return [slice(start, start + most) for start in range(0, max(count, 1), max(most, 1))]


def tokenizer_of(encoder: str) -> str:
    """What the component that makes a text encoder's tokens is usually called."""
    return encoder.replace("text_encoder", "tokenizer")


class PromptEncoding:
    """What :class:`LatentDiffusion` does with its text encoders."""

    # The text encoders' components. A token's vector is those of all encoders end to end, in this order.
    encoder_names: ClassVar[tuple[str, ...]] = ("text_encoder",)
    tokenizer_names: ClassVar[dict[str, str]] = {}  # text encoder → its tokenizer's component, where it is another
    encoded_at_once: ClassVar[int] = ENCODED_AT_ONCE  # prompts, at most
    other_prompts: ClassVar[tuple[str, ...]] = ()  # the pipeline asks for them when it encodes prompts

    id: str  # atelier, a hub id, or the name of the folder it came from
    pipeline: Any
    memory: MemoryOptions
    device: torch.device
    dtype: torch.dtype
    token_width: int
    _token_widths: list[int]

    def _join(self, outputs: Sequence[Any]) -> PromptEmbeds:
        """What the denoiser reads, from the outputs of the text encoders with all their hidden states."""
        raise NotImplementedError

    @classmethod
    def tokenizer_name(cls, encoder: str) -> str:
        """The component that makes a text encoder's tokens."""
        return cls.tokenizer_names.get(encoder, tokenizer_of(encoder))

    @property
    def _encoders(self) -> list[Any]:
        return [getattr(self.pipeline, name) for name in self.encoder_names]

    @property
    def tokenizer(self) -> Any:
        """Of the first text encoder."""
        return self._tokenizers[0]

    @property
    def _tokenizers(self) -> list[Any]:
        return [getattr(self.pipeline, self.tokenizer_name(name)) for name in self.encoder_names]

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
        """Encode prompts, without gradient, :data:`ENCODED_AT_ONCE` at a time."""
        options: dict[str, Any] = {"device": self.device, **dict.fromkeys(self.other_prompts)}
        options |= {"num_images_per_prompt": 1, "do_classifier_free_guidance": False}

        def encoded(some: Sequence[str]) -> PromptEmbeds:
            text, _, *pooled = self.pipeline.encode_prompt(list(some), **options)
            check_finite(text, f"the prompt embeddings that base {self.id} makes", self.dtype)
            return PromptEmbeds(text, pooled[0] if pooled else None)

        with noted("encoding prompts"), self._on_device(self._encoders, self.memory.encoders_off_device):
            return PromptEmbeds.cat([encoded(prompts[rows]) for rows in parts_of(len(prompts), ENCODED_AT_ONCE)])

    def word_states(self, words: Sequence[str]) -> Tensor:
        """What the denoiser reads at the last token of each text by itself, ``[words, width]``, fp64."""
        found = self.empty_states()[:1].repeat(len(words), 1)
        for place, rows, read in self._read_short(words):
            found[rows] = in_double(read[:, place])
        return found

    def token_states(self, texts: Sequence[str]) -> Tensor:
        """What it reads at all places of some texts but the first, to the end of each, ``[places, width]``, fp64."""
        found = [read[:, 1 : place + 2].flatten(0, 1) for place, _, read in self._read_short(texts)]
        return in_double(torch.cat(found)) if found else self.empty_states()[:0]

    def _read_short(self, texts: Sequence[str]) -> Iterator[tuple[int, list[int], Tensor]]:
        """Texts by their length: the place of their last token, which these are, and what is read of them.

        CLIP's text encoders look back only, so padding is left out: a word takes a twentieth of a prompt's time.
        """
        places = [min(len(self.token_ids(text)), self.tokenizer.model_max_length - 2) for text in texts]
        for place in sorted(set(places)):
            rows = [k for k, one in enumerate(places) if one == place]
            with self._short_prompts(place + 2):
                yield place, rows, self.encode_prompts([texts[k] for k in rows]).prompt_embeds

    def empty_states(self) -> Tensor:
        """What the denoiser reads of the empty prompt, ``[tokens, width]``, fp64; the start token's first."""
        return self.prompt_states([""])[0]

    def prompt_states(self, prompts: Sequence[str]) -> Tensor:
        """What the denoiser's layers read of prompts, ``[prompts, tokens, width]``, fp64."""
        return in_double(self.encode_prompts(prompts).prompt_embeds)

    @contextmanager
    def _short_prompts(self, length: int) -> Iterator[None]:
        """Inside, prompts are padded to so many tokens, where every text encoder looks back only."""
        causal = all("CLIPText" in type(encoder).__name__ for encoder in self._encoders)
        before = [one.model_max_length for one in self._tokenizers]
        if causal:
            for one, most in zip(self._tokenizers, before, strict=True):
                one.model_max_length = min(length, most)
        try:
            yield
        finally:
            for one, most in zip(self._tokenizers, before, strict=True):
                one.model_max_length = most

    def token_ids(self, text: str) -> list[int]:
        """The ids of a text's tokens, without start, end and padding."""
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def token_text(self, ids: Sequence[int]) -> str:
        """The text that token ids spell; special ones are left out."""
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text.strip()

    def token_table(self) -> Tensor:
        """The vectors of all tokens, ``[vocabulary, token_width]``, fp32."""
        count = len(self.tokenizer)
        return self.token_vectors(torch.arange(count))

    def token_vectors(self, ids: Tensor) -> Tensor:
        """Rows of :meth:`token_table`, ``[ids, token_width]``, which is itself not made: SDXL's takes 400 MB."""
        tables = [encoder.get_input_embeddings().weight.detach() for encoder in self._encoders]
        return torch.cat([table[ids.to(table.device)].to(self.device) for table in tables], 1).float()

    @property
    def special_token_ids(self) -> tuple[int, ...]:
        """Ids that stand for no text: start, end and the like."""
        return tuple(sorted(set(self.tokenizer.all_special_ids)))

    @torch.no_grad()
    def word_vector(self, word: str) -> Tensor:
        """The token vector of a word, ``[token_width]``, fp32; the mean where it has several tokens."""
        ids = self.token_ids(word)
        if not ids:
            raise BaseModelError(f"the word '{word}' has no token in base {self.id}")
        return self.token_vectors(torch.tensor(ids)).mean(0)

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
        texts = [prompt.split(PLACEHOLDER) for prompt in prompts]
        for prompt, segments in zip(prompts, texts, strict=True):
            if len(segments) == 1:
                raise BaseModelError(f"the prompt '{prompt}' has no {PLACEHOLDER} for the token vectors")
        # SDXL's second tokenizer reads "!" as its padding, in a text too: the places may differ.
        read = [tokens_around(tokenizer, texts, len(vectors)) for tokenizer in self._tokenizers]
        return self._encode_tokens(read, vectors.repeat(len(read[0][1]) // len(vectors), 1))

    def encode_token_vectors(self, rows: Sequence[Tensor]) -> PromptEmbeds:
        """Encode prompts given as the vectors of their tokens, differentiably in all of them.

        Rows, ``[tokens, token_width]`` each, may differ in length; start, end and padding are added, and
        what is too long loses its end, as long prompts do.
        """
        if not rows:
            raise BaseModelError("there are no token vectors to encode")
        for row in rows:
            self._check_vectors(row)
        kept = [row[: self.tokenizer.model_max_length - 2] for row in rows]
        places = [(row, position) for row, one in enumerate(kept) for position in range(len(one))]
        read = [[0] * len(one) for one in kept], places
        return self._encode_tokens([read] * len(self._encoders), torch.cat(kept))

    def _encode_tokens(self, read: Sequence[Tokens], vectors: Tensor) -> PromptEmbeds:
        """Encode each tokenizer's ids between start, end and padding, with vectors in some places."""
        # Encoders that are kept off the device stay on it as long as a backward pass will come.
        trained = any(weight.requires_grad for one in self._encoders for weight in one.parameters())
        keep = torch.is_grad_enabled() and (vectors.requires_grad or trained)
        # A backward pass wants all activations anyway.
        count = len(read[0][0])
        parts = parts_of(count, count if keep else ENCODED_AT_ONCE)
        with self._on_device(self._encoders, self.memory.encoders_off_device, keep=keep):
            return PromptEmbeds.cat([self._read_tokens(read, vectors, part) for part in parts])

    def _read_tokens(self, read: Sequence[Tokens], vectors: Tensor, part: slice) -> PromptEmbeds:
        """Some rows of :meth:`_encode_tokens` in one batch."""
        # Tokenizers may place a vector differently in its row, but not in another row.
        here = [k for k, (row, _) in enumerate(read[0][1]) if part.start <= row < part.stop]
        some = [(rows[part], [(places[k][0] - part.start, places[k][1]) for k in here]) for rows, places in read]
        columns = (vectors if len(here) == len(vectors) else vectors[here]).split(self._token_widths, 1)
        return self._join(list(map(encode_tokens, self._tokenizers, self._encoders, some, columns)))
