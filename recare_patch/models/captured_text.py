"""The text side of a captured base: the pipeline's own call encodes, up to where it first calls its denoiser."""

from __future__ import annotations

import copy
import functools
import inspect
import types
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from recare_patch.core import BaseModelError, noted
from recare_patch.models import calls, lora
from recare_patch.models.captured_prompts import CapturedPrompts, Said
from recare_patch.models.encoding import PromptEncoding, parts_of
from recare_patch.models.inputs import PLACEHOLDER, EvaluationCounter, PromptEmbeds
from recare_patch.models.precision import check_finite, in_double

SHORT, LONG = "cat", "a photo of a cat and a dog under a tree at night"
"""Two prompts that a call's arguments are told apart by."""


class CapturedText(PromptEncoding):
    """What :class:`Captured` does with prompts and token vectors."""

    encoded_at_once = 8  # where the pipeline pads them all to one length
    form: calls.Form
    denoiser: nn.Module
    counter: EvaluationCounter
    latent_shape: tuple[int, ...]
    num_train_timesteps: int
    _padded: bool  # whether the pipeline pads all prompts to one length

    def _record(self, prompts: Sequence[str], *, most: int, steps: int = 4) -> calls.Record:
        raise NotImplementedError

    def _rows_read(self, call: Any = None, *, only: str | None = None, prompt: str = LONG) -> dict[str, Tensor]:
        raise NotImplementedError

    @contextmanager
    def _told(self, sources: Sequence[tuple[str, Tensor | None]]) -> Iterator[list[str]]:
        """Prompts as the pipeline can be given them: inside, words of our own stand for vectors.

        Each placeholder becomes as many new words as it has vectors; tokenizers know them, and the encoders put the
        vectors where they stand, differentiably.
        """
        offsets: dict[int, int] = {}
        vectors: list[Tensor] = []
        texts = []
        for text, own in sources:
            if own is not None:
                start = offsets.setdefault(id(own), len(vectors))
                if start == len(vectors):
                    vectors += own.unbind(0)
                text = text.replace(PLACEHOLDER, "".join(map(_word, range(start, start + len(own)))))
            texts.append(text)
        if not vectors:
            yield texts
            return
        columns = torch.stack(vectors).to(self.device).split(self._token_widths, 1)
        with ExitStack() as stack:
            for name, encoder, part in zip(self.encoder_names, self._encoders, columns, strict=True):
                stack.enter_context(self._words_of(name, encoder, part))
            yield texts

    @contextmanager
    def _words_of(self, name: str, encoder: Any, vectors: Tensor) -> Iterator[None]:
        held, part = vars(self.pipeline), self.tokenizer_name(name)
        own = held[part]
        known = copy.deepcopy(own)
        inner = getattr(known, "tokenizer", known)
        inner.add_tokens([_word(k) for k in range(len(vectors))])
        ids = inner.convert_tokens_to_ids([_word(k) for k in range(len(vectors))])
        stand_in = self._ids_of(name, "a")[0]
        places: list[tuple[Tensor, Tensor]] = []

        def enter(module: nn.Module, args: Any, kwargs: Any) -> Any:
            given = kwargs.get("input_ids", args[0] if args else None)
            if given is None:
                return None
            which = torch.full_like(given, -1)
            for k, one in enumerate(ids):
                which[given == one] = k
            if not (which >= 0).any():
                return None
            places.append((which >= 0, which))
            plain = torch.where(which >= 0, torch.full_like(given, stand_in), given)
            if "input_ids" in kwargs:
                return args, {**kwargs, "input_ids": plain}
            return (plain, *args[1:]), kwargs

        def insert(module: nn.Module, args: Any, embedded: Tensor) -> Tensor:
            if not places:
                return embedded
            where, which = places.pop()
            return embedded.index_put((where,), vectors.to(embedded)[which[where]])

        table = encoder.get_input_embeddings().weight
        # T5 has its table twice, and looks words up in the other one.
        tables = [one for one in encoder.modules() if isinstance(one, nn.Embedding) and one.weight is table]
        hooks = [one.register_forward_hook(insert) for one in tables]
        # Some pipelines call parts of their encoder; others look for the end of the text by the ids that it is given.
        hooks += [one.register_forward_pre_hook(enter, with_kwargs=True) for one in (encoder, *tables)]
        held[part] = known
        try:
            yield
        finally:
            held[part] = own
            for hook in hooks:
                hook.remove()

    def _encode(self, sources: Sequence[tuple[str, Tensor | None]]) -> CapturedPrompts:
        rows: list[Said] = []
        grad = torch.is_grad_enabled() and any(own is not None and own.requires_grad for _, own in sources)
        for part in parts_of(len(sources), self.encoded_at_once if self._padded else 1):
            some = sources[part]
            with ExitStack() as stack:
                stack.enter_context(self._on_device(self._encoders, self.memory.encoders_off_device, keep=grad))
                texts = stack.enter_context(self._told(some))
                stack.enter_context(_with_gradients(self.pipeline) if grad else torch.no_grad())
                found = self._record(texts, most=0).calls[0]
            for (text, vectors), told in zip(some, self.form.texts(found, len(some)), strict=True):
                rows.append(Said(told, text, vectors))
        made = CapturedPrompts(rows, self.form.text[0])
        check_finite(made.prompt_embeds.detach(), f"the prompt embeddings that base {self.id} makes", self.dtype)
        return made

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> PromptEmbeds:
        """Encode prompts, without gradient, by the pipeline's own call."""
        with noted("encoding prompts"):
            return self._encode([(prompt, None) for prompt in prompts])

    def encode_with_vectors(self, prompts: Sequence[str], vectors: Tensor) -> PromptEmbeds:
        """Encode prompts that hold :data:`PLACEHOLDER`, differentiably in the vectors put there."""
        self._check_vectors(vectors)
        for prompt in prompts:
            if PLACEHOLDER not in prompt:
                raise BaseModelError(f"the prompt '{prompt}' has no {PLACEHOLDER} for the token vectors")
        return self._encode([(prompt, vectors) for prompt in prompts])

    def encode_token_vectors(self, rows: Sequence[Tensor]) -> PromptEmbeds:
        """Encode prompts given as the vectors of their tokens, differentiably in all of them."""
        if not rows:
            raise BaseModelError("there are no token vectors to encode")
        for row in rows:
            self._check_vectors(row)
        return self._encode([(PLACEHOLDER, row) if len(row) else ("", None) for row in rows])

    @torch.no_grad()
    def prompt_states(self, prompts: Sequence[str]) -> Tensor:
        """What the first layers that a prompt passes read of it, ``[prompts, tokens, width]``, fp64."""
        rows = self._entered([(prompt, None) for prompt in prompts])
        room = max(len(one) for one in rows)
        return torch.stack([torch.cat([one, one[-1:].expand(room - len(one), -1)]) for one in rows])

    def word_states(self, words: Sequence[str]) -> Tensor:
        """What they read at the last token of each text by itself, ``[words, width]``, fp64."""
        found = [rows[-1] for rows in self._read_to_the_end(words)]
        return torch.stack(found) if found else self.prompt_states([""])[0, :0]

    def token_states(self, texts: Sequence[str]) -> Tensor:
        """What they read up to the last token of each text, ``[places, width]``, fp64."""
        found = list(self._read_to_the_end(texts))
        return torch.cat(found) if found else self.prompt_states([""])[0, :0]

    @torch.no_grad()
    def _read_to_the_end(self, texts: Sequence[str]) -> Iterator[Tensor]:
        """The same of each text without what stands behind it, ``[places, width]``; a few texts at a time."""
        encoder, shift = self._reader
        for part in parts_of(len(texts), self.encoded_at_once):
            some, places = list(texts[part]), list[int]()

            def look(
                module: nn.Module, args: Any, kwargs: Any, some: list[str] = some, places: list[int] = places
            ) -> None:
                given = kwargs.get("input_ids", args[0] if args else None)
                for row in given:
                    last = self._ids_of(self.encoder_names[encoder], some[len(places)])[-1:]
                    there = (row == last[0]).nonzero() if last else row[:0].nonzero()
                    places.append(int(there[-1]) if len(there) else 0)

            hook = self._encoders[encoder].register_forward_pre_hook(look, with_kwargs=True)
            try:
                rows = self._entered([(text, None) for text in some])
            finally:
                hook.remove()
            for row, at in zip(rows, places, strict=True):
                yield row[: min(max(at + shift, 0), len(row) - 1) + 1].clone()

    def _entered(self, sources: Sequence[tuple[str, Tensor | None]]) -> list[Tensor]:
        """What the text's first layer reads of each prompt, ``[tokens, width]``, fp64."""
        entry = lora.TEXT_SIDES[self.denoiser].entry
        if not entry:
            raise BaseModelError(f"base {self.id} has no layer that reads the text encoder's states alone")
        rows = self._encode(sources).rows
        groups: dict[Any, list[int]] = {}
        for k, one in enumerate(rows):
            groups.setdefault(self.form.kind(one.told), []).append(k)
        found: dict[int, Tensor] = {}
        with self.counter.stage(None):
            for chosen in groups.values():
                for part in parts_of(len(chosen), self.encoded_at_once):
                    some = chosen[part]
                    state = torch.zeros((len(some), *self.latent_shape), device=self.device)
                    at = torch.full((len(some),), float(self.num_train_timesteps // 2))
                    call = self.form.call(state, at, [rows[k].told for k in some])
                    read = in_double(self._rows_read(call, only=entry[0])[entry[0]])
                    found |= dict(zip(some, read.chunk(len(some)), strict=True))
        return [found[k] for k in range(len(rows))]

    @functools.cached_property
    def _reader(self) -> tuple[int, int]:
        """The first text encoder that the text's first layer reads, and how far its tokens are moved there.

        Templates are cut off at the front by some pipelines: a token's vector is changed, and where the change is first
        seen is its place. An encoder that looks both ways shows it from the first row on, and nothing is cut off then.
        """
        with torch.no_grad():
            own = self.word_vector(SHORT)[None]
            for encoder, parts in enumerate(own.split(self._token_widths, 1)):
                changed = list(own.split(self._token_widths, 1))
                changed[encoder] = -parts
                places: list[int] = []

                last = self._ids_of(self.encoder_names[encoder], "a")[-1]

                def look(module: Any, args: Any, kwargs: Any, last: int = last, places: list[int] = places) -> None:
                    given = kwargs.get("input_ids", args[0] if args else None)
                    places.append(int((given[0] == last).nonzero()[-1]))

                # Behind what puts the stand-in's id there.
                with self._told([(PLACEHOLDER, own)]):
                    hook = self._encoders[encoder].register_forward_pre_hook(look, with_kwargs=True)
                    try:
                        self._record([_word(0)], most=0)
                    finally:
                        hook.remove()
                before, after = self._entered([(PLACEHOLDER, own), (PLACEHOLDER, torch.cat(changed, 1))])
                moved = (before - after).abs().amax(1).nonzero().flatten().tolist()
                if moved:
                    return encoder, moved[0] - places[0] if moved[0] else 0
        raise BaseModelError(f"base {self.id} has no text encoder whose tokens the denoiser reads")

    @property
    def _tokenizers(self) -> list[Any]:
        # Some pipelines have a processor of texts and pictures in its place.
        return [getattr(one, "tokenizer", one) for one in super()._tokenizers]

    def _ids_of(self, encoder: str, text: str) -> list[int]:
        tokenizer = self._tokenizers[self.encoder_names.index(encoder)]
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    @torch.no_grad()
    def _embedded(self, encoder: int, texts: Sequence[str], device: torch.device) -> Tensor:
        """The mean of what an encoder's first layer makes of each text's tokens, ``[texts, width]``."""
        name, table = self.encoder_names[encoder], self._encoders[encoder].get_input_embeddings()
        rows = []
        for text in texts:
            ids = self._ids_of(name, text) or self._ids_of(name, "a")
            rows.append(table(torch.tensor(ids, device=table.weight.device)).mean(0))
        return torch.stack(rows).to(device)

    def token_vectors(self, ids: Tensor) -> Tensor:
        """What each encoder makes of tokens of the first one's vocabulary, ``[ids, token_width]``, fp32."""
        first = self._encoders[0].get_input_embeddings()
        with torch.no_grad():
            made = [first(ids.to(first.weight.device)).to(self.device)]
        texts = [self.token_text([int(k)]) for k in ids] if len(self._encoders) > 1 else []
        made += [self._embedded(k, texts, self.device) for k in range(1, len(self._encoders))]
        return torch.cat([one.float() for one in made], 1)

    @torch.no_grad()
    def word_vector(self, word: str) -> Tensor:
        """The token vector of a word, ``[token_width]``, fp32; the mean where it has several tokens."""
        if not self.token_ids(word):
            raise BaseModelError(f"the word '{word}' has no token in base {self.id}")
        parts = [self._embedded(k, [word], self.device)[0] for k in range(len(self._encoders))]
        return torch.cat([one.float() for one in parts])

    @functools.cached_property
    def _longest(self) -> int | None:
        """Tokens of a prompt: the pipeline's own number, or what its tokenizers read where that is less."""
        parameter = inspect.signature(type(self.pipeline).__call__).parameters.get("max_sequence_length")
        if parameter is None:
            return None
        # CLIP's read 77 tokens whatever is asked for.
        pairs = zip(self._encoders, self._tokenizers, strict=True)
        read = [int(tokenizer.model_max_length) for one, tokenizer in pairs if "CLIPText" not in type(one).__name__]
        return min(int(parameter.default), max(read, default=int(parameter.default)))


def _word(number: int) -> str:
    """A word that no tokenizer has, all of letters: what cleans prompts takes others for codes, and drops them."""
    return f"zqxv{''.join('abcdefghij'[int(digit)] for digit in str(number))}qz"


@contextmanager
def _with_gradients(pipeline: Any) -> Iterator[None]:
    """Inside, the pipeline's own call and its encoding let gradients through, which they are decorated not to."""
    held, kind, without, detach = vars(pipeline), type(pipeline), torch.no_grad, Tensor.detach
    names = [name for name in dir(kind) if "encode" in name or "embeds" in name]
    names = [name for name in names if hasattr(getattr(kind, name), "__wrapped__")]
    for name in names:
        held[name] = types.MethodType(getattr(kind, name).__wrapped__, pipeline)
    # Some call their encoder under it, or detach what it returns, which nothing but their names reaches.
    torch.no_grad = torch.enable_grad  # type: ignore[misc,assignment]
    Tensor.detach = lambda tensor: tensor  # type: ignore[method-assign,assignment,return-value]
    try:
        yield
    finally:
        torch.no_grad = without  # type: ignore[misc]
        Tensor.detach = detach  # type: ignore[method-assign]
        for name in names:
            del held[name]
