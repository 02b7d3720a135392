"""Prompt-gated application: a patch's scale follows how much a prompt has to do with its concept.

After the Facilitated Transport of Lyu et al. ("One-dimensional Adapter to Rule Them All", arXiv
2312.16145), where an adapter's strength is the larger of two likenesses of prompt and concept: that of
their text features, and the share of the concept's tokens that the prompt holds. Here the first lies
between two sets of prompts, because the cosine of two texts that share nothing is far from 0 and differs
between text encoders. Features are those of the pipeline's own text encoder, read without any LoRA.

A gate reads the prompt and nothing else. Whoever wants the concept writes around it, or hands over
embeddings: a gate is there for pictures that have nothing to do with the concept, not for security.
"""

from __future__ import annotations

import hashlib
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recare_patch.careset import FUNCTION_WORDS, MEDIUM_WORDS
from recare_patch.core import IncompatiblePatchError, PatchError
from recare_patch.models import TEXT_ENCODERS, named_tuner_layers, networks, off
from recare_patch.patch.apply import AppliedPatch
from recare_patch.patch.patch import Patch
from recare_patch.recipe import Concept, names_concept

logger = logging.getLogger(__name__)

CLOSED = 0.6
"""Relatedness up to which a gate is closed. On the choosing prompts of ``benchmarks/suites.py`` and the
bundled base, no retained prompt of three concepts lies above it."""

OPEN = 0.8
"""Relatedness from which it is open; no choosing prompt that names a concept lies below it."""

_WORDS = 64
_FREQUENT = 4000
_FEWEST_WORDS = 8
_BATCH = 128


class Gate:
    """How much a prompt has to do with a concept, 0 to 1.

    Prompts of the concept are its names, and itself beside each reference word; others are the reference
    words alone, beside each other and in the concept's place. Reference words are the companions that the
    patch guards and 64 others, spread over the tokenizer's frequent words. With ``μ₁``, ``μ₀`` the means of
    both sets' unit features and ``f`` that of a prompt::

        relatedness = max(⟨f − μ₀, μ₁ − μ₀⟩ / ‖μ₁ − μ₀‖², share of a name's tokens that the prompt holds)
        gate = clamp((relatedness − CLOSED) / (OPEN − CLOSED), 0, 1)

    A gate for several concepts opens as far as the one that a prompt is most related to.

    Attributes:
        concepts: what opens it.
        words: the reference words.

    Example:
        >>> gate = Gate.of(Patch.load("van-gogh-patch"), pipe)  # doctest: +SKIP
        >>> gate(["a car on a street", "a car by Van Gogh"])  # doctest: +SKIP
        tensor([0., 1.])
    """

    def __init__(self, pipe: Any, concepts: Sequence[Concept], *, care_words: Sequence[str] = ()) -> None:
        """Measure where the concepts lie by a pipeline's CLIP text encoder; ``care_words`` must not open it.

        Raises:
            IncompatiblePatchError: the pipeline does not read prompts as Stable Diffusion does.
            PatchError: there is no concept.
        """
        tokenizer, encoder = getattr(pipe, "tokenizer", None), getattr(pipe, "text_encoder", None)
        whole = hasattr(tokenizer, "get_vocab") and hasattr(pipe, "encode_prompt")
        if not whole or not isinstance(encoder, nn.Module):
            raise IncompatiblePatchError(
                f"a {type(pipe).__name__} has no tokenizer, text encoder and encode_prompt, and a gate needs them"
            )
        if not concepts:
            raise PatchError("a gate needs at least one concept, and none was given")
        self._tokenizer: Any = tokenizer
        self._encoder = encoder
        frequent = _frequent_words(tokenizer)
        plain = [word for word in frequent if not any(names_concept(word, concept) for concept in concepts)]
        if len(plain) > _WORDS:
            plain = [plain[k * len(plain) // _WORDS] for k in range(_WORDS)]
        self.words = tuple(dict.fromkeys([*care_words, *plain]))
        if len(self.words) < _FEWEST_WORDS:
            raise IncompatiblePatchError(
                f"a gate needs at least {_FEWEST_WORDS} words to compare with, and the tokenizer of this "
                f"{type(pipe).__name__} has {len(self.words)}"
            )
        self.concepts = tuple(concepts)
        # Where each concept lies: the origin, the way from there over its squared length, both [width].
        self._ways = [self._way(concept) for concept in concepts]
        # What a prompt may call a concept: its text, and words that name it without being part of that.
        names = [
            name
            for one in concepts
            for name in (one.text, *(word for word in one.words if word not in one.text.casefold()))
        ]
        self._names = [name for name in self._ids(names) if name]

    @classmethod
    def of(cls, patch: Patch, pipe: Any) -> Gate:
        """The gate of a patch, from what its header says; it opens for each of its concepts.

        Raises:
            PatchError: the patch does not say what it erases.
            IncompatiblePatchError: as above.
        """
        told = patch.metadata
        if told is None:
            raise PatchError(
                f"{patch.name} does not say what it erases, so its scale cannot follow the prompt: "
                "apply it without a gate"
            )
        unnamed = any(part.concept is None for part in told.parts or ())
        if unnamed or any(one.kind is None for one in told.erased):
            raise PatchError(
                f"a part of {patch.name} does not say what it erases, so the scale cannot follow the "
                "prompt: apply it without a gate, or stack it again from patches that do"
            )
        return cls(pipe, [one.as_concept() for one in told.erased], care_words=told.care_words)

    def likeness(self, prompts: Sequence[str]) -> Tensor:
        """How far each prompt's feature lies on the way from unrelated prompts to the concept's.

        Returns:
            fp32 ``[prompts]`` on the CPU: about 0 for unrelated prompts and 1 for the concept's own.
        """
        features = self._features(prompts)
        return torch.stack([(features - origin) @ way for origin, way in self._ways]).amax(0)

    def relatedness(self, prompts: Sequence[str]) -> Tensor:
        """The larger of :meth:`likeness` and the share of a name's tokens, ``[prompts]``."""
        rows = self._ids(prompts)
        shares = [max(len(row & name) / len(name) for name in self._names) for row in rows]
        return torch.maximum(self.likeness(prompts), torch.tensor(shares))

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """The share of a patch's scale that each prompt gets: fp32 ``[prompts]``, 0 to 1, on the CPU."""
        return ((self.relatedness(prompts) - CLOSED) / (OPEN - CLOSED)).clamp(0, 1)

    def _way(self, concept: Concept) -> tuple[Tensor, Tensor]:
        named = [*concept.name_prompts, *(concept.composed_prompt(word) for word in self.words)]
        plain = []
        for word, other in zip(self.words, [*self.words[1:], self.words[0]], strict=True):
            beside = concept.model_copy(update={"text": other}).composed_prompt(word)
            plain += [concept.retain_prompt(word), concept.anchor_prompt(word)]
            plain += [concept.target_prompt_for(word), f"A photo of {word}", beside]
        origin = self._features(plain).mean(0)
        way = self._features(named).mean(0) - origin
        return origin, way / (way @ way)

    def _ids(self, texts: Sequence[str]) -> list[frozenset[int]]:
        special = frozenset(self._tokenizer.all_special_ids)
        return [frozenset(row) - special for row in self._tokenizer(list(texts), truncation=True)["input_ids"]]

    @torch.no_grad()
    def _features(self, texts: Sequence[str]) -> Tensor:
        """Unit features at the end of each text, fp32 ``[texts, width]`` on the CPU."""
        device = next(self._encoder.parameters()).device
        rows = []
        with off(self._encoder):
            for start in range(0, len(texts), _BATCH):
                # The encoder is causal and read at the end of text: padding behind it changes nothing.
                tokens = self._tokenizer(
                    list(texts[start : start + _BATCH]),
                    padding="longest",
                    truncation=True,
                    max_length=self._tokenizer.model_max_length,
                    return_tensors="pt",
                )
                found = self._encoder(tokens["input_ids"].to(device))
                pooled = found.get("text_embeds", found.get("pooler_output"))
                if pooled is None:
                    raise IncompatiblePatchError(
                        f"a gate reads CLIP's text features, and a {type(self._encoder).__name__} gives none"
                    )
                rows.append(F.normalize(pooled.float(), dim=-1).cpu())
        return torch.cat(rows)


def _frequent_words(tokenizer: Any) -> list[str]:
    """Whole words of a byte-pair vocabulary, the most frequent first: its tokens are numbered so."""
    ranked = sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    words = [token.removesuffix("</w>") for token, _ in ranked if token.endswith("</w>")]
    useless = FUNCTION_WORDS | MEDIUM_WORDS
    return [word for word in words if len(word) >= 3 and word.isascii() and word.isalpha() and word not in useless][
        :_FREQUENT
    ]


class GatedPatch:
    """A patch in a pipeline at a strength of its own for each prompt.

    Every picture of a batch is drawn at ``applied.scale`` times its prompt's gate, in both halves of
    classifier-free guidance. A changed text encoder encodes prompt and negative prompt each at its own gate.
    Embeddings that the pipeline did not make itself while gated are drawn at the full scale.

    Attributes:
        applied: the patch in the pipeline; its ``set_scale`` and ``scale`` mean the scale at an open gate.
        gate: what opens it.
        values: prompt → gate, of all prompts so far.
    """

    def __init__(self, applied: AppliedPatch, gate: Callable[[Sequence[str]], Tensor]) -> None:
        """Gate a patch that is in a pipeline already; ``remove()`` takes it out as well."""
        self.applied, self.gate = applied, gate
        self.values: dict[str, float] = {}
        self._drawn: dict[bytes, float] = {}
        self._hooks: list[Any] = []
        self._factors = {component: _Factors() for component in applied.patch.components}
        parts = networks(applied.pipe)
        self._refuse_fused()
        for component, factors in self._factors.items():
            self._hooks.append(parts[component].register_forward_pre_hook(self._refuse_fused))
            self._hooks.append(parts[component].register_forward_pre_hook(factors.look, with_kwargs=True))
            for _, layer in named_tuner_layers({component: parts[component]}):
                if applied.adapter_name in layer.lora_B:
                    up = layer.lora_B[applied.adapter_name]
                    self._hooks.append(up.register_forward_hook(factors.scale))
        _Listener.of(applied.pipe).gates.append(self)

    def remove(self) -> None:
        """Take gate and patch out; the pipeline is then what it was. Removing twice does nothing."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        listener = vars(self.applied.pipe).get("encode_prompt")
        if isinstance(listener, _Listener) and self in listener.gates:
            listener.gates.remove(self)
            if not listener.gates:
                del self.applied.pipe.encode_prompt
        self.applied.remove()

    def __enter__(self) -> GatedPatch:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _refuse_fused(self, *_: Any) -> None:
        if self.applied.compiled:
            raise IncompatiblePatchError(
                f"patch {self.applied.patch.name} cannot be gated where networks are compiled, since a gate changes "
                "what single layers give: apply it without a gate, or do not compile"
            )
        if self.applied.fused:
            raise PatchError(
                f"patch {self.applied.patch.name} is fused into the weights, where no gate reaches it: call "
                "pipe.unfuse_lora() first"
            )

    def _ask(self, texts: Sequence[Any]) -> Tensor:
        # Of what each of a pipeline's text encoders is given: the widest open.
        asked = [[one] if isinstance(one, str) else list(one) for one in texts if one is not None]
        return torch.stack([self.gate(one) for one in asked if len(one) == len(asked[0])]).amax(0)

    def judge(self, call: Mapping[str, Any]) -> list[Tensor]:
        """The gates of prompts and of negative prompts; none where embeddings are given in their place."""
        prompt = call.get("prompt")
        texts = [prompt] if isinstance(prompt, str) else list(prompt or ())
        if not texts or call.get("prompt_embeds") is not None:
            return []
        own = self._ask([texts, call.get("prompt_2"), call.get("prompt_3")])
        against = [call.get(name) for name in ("negative_prompt", "negative_prompt_2", "negative_prompt_3")]
        for text, value in zip(texts, own.tolist(), strict=True):
            if text and text not in self.values:
                self.values[text] = value
                logger.info("%s at %.2f of its scale for '%s'", self.applied.patch.name, value, text)
        return [own, self._ask(against if any(against) else [""])]

    def before(self, judged: list[Tensor]) -> None:
        """Tell the text encoders, which are called for the prompts and then for the negative ones."""
        for component, factors in self._factors.items():
            if component in TEXT_ENCODERS:
                factors.coming = list(judged)

    def after(self, call: Mapping[str, Any], judged: list[Tensor], embeds: Tensor) -> None:
        """Tell the denoiser what was encoded at which gate."""
        # Half precision, because pipelines cast what they encoded.
        values = embeds.detach().to("cpu", torch.float16).contiguous().view(torch.uint8).numpy()
        keys = [hashlib.sha256(row.data).digest() for row in values]
        if judged:
            each = judged[0].repeat_interleave(call.get("num_images_per_prompt") or 1)
            self._drawn |= dict(zip(keys, each.tolist(), strict=True))
        rows = torch.tensor([self._drawn.get(key, 1.0) for key in keys])
        for component, factors in self._factors.items():
            if component not in TEXT_ENCODERS:
                factors.coming = [rows]


class _Factors:
    """What each row of one network's batch gets of the patch."""

    def __init__(self) -> None:
        # The gates of the next calls, one row a text or picture; the last stay for all later ones, and
        # without any the patch is at its full scale.
        self.coming: list[Tensor] = []
        self._rows: Tensor | None = None

    def look(self, network: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Before a network computes: a factor for each row of its batch."""
        inputs = [one for one in (*args, *kwargs.values()) if isinstance(one, Tensor) and one.ndim]
        batch = len(inputs[0]) if inputs else 0
        if not self.coming:
            self._rows = None
            return
        rows = self.coming.pop(0) if len(self.coming) > 1 else self.coming[0]
        # With guidance the unconditional half comes first and has as many rows.
        whole = batch % len(rows) == 0
        self._rows = rows.repeat(batch // len(rows)) if whole else rows.amax().expand(batch)

    def scale(self, up: nn.Module, args: tuple[Any, ...], update: Tensor) -> Tensor:
        """After ``B``: each row's share of the update, ``[batch, …]``."""
        if self._rows is None:
            return update
        rows = self._rows if len(self._rows) == len(update) else self._rows.amax().expand(len(update))
        return update * rows.to(update).reshape(-1, *(1,) * (update.ndim - 1))


class _Listener:
    """Stands in a pipeline's place of ``encode_prompt`` and tells every gate what is asked for."""

    def __init__(self, pipe: Any) -> None:
        self._encode = pipe.encode_prompt
        self.gates: list[GatedPatch] = []
        self._judging = False

    @classmethod
    def of(cls, pipe: Any) -> _Listener:
        """The pipeline's, set up where it has none."""
        found = vars(pipe).get("encode_prompt")
        if not isinstance(found, _Listener):
            found = pipe.encode_prompt = cls(pipe)
        return found

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._judging:
            # A gate that encodes through the pipeline asks for itself.
            return self._encode(*args, **kwargs)
        bound = inspect.signature(self._encode).bind(*args, **kwargs)
        bound.apply_defaults()
        # All judge before any is told: judging calls the text encoder, too.
        self._judging = True
        try:
            judged = [gate.judge(bound.arguments) for gate in self.gates]
        finally:
            self._judging = False
        for gate, own in zip(self.gates, judged, strict=True):
            gate.before(own)
        encoded = self._encode(*args, **kwargs)
        for gate, own in zip(self.gates, judged, strict=True):
            gate.after(bound.arguments, own, encoded[0])
        return encoded


def gated(
    patch: Patch,
    pipe: Any,
    scale: float = 1.0,
    *,
    adapter_name: str | None = None,
    gate: Callable[[Sequence[str]], Tensor] | None = None,
) -> GatedPatch:
    """Put a patch into a diffusers pipeline, to be as strong as each prompt has to do with its concept.

    The gate is not in the patch's file: plain diffusers applies the patch at one scale to every prompt.

    Args:
        patch, pipe, adapter_name: see :meth:`Patch.apply`; the pipeline has a CLIP text encoder.
        scale: at an open gate.
        gate: gives each prompt its share of the scale, ``[prompts]``; :meth:`Gate.of` the patch by default.

    Raises:
        PatchError, IncompatiblePatchError: as :meth:`Patch.apply` and :meth:`Gate.of`; the pipeline is then
            as it was.

    Example:
        >>> with gated(Patch.load("van-gogh-patch"), pipe):  # doctest: +SKIP
        ...     pipe(["a car on a street", "a car by Van Gogh"])
    """
    opens = Gate.of(patch, pipe) if gate is None else gate
    applied = patch.apply(pipe, scale, adapter_name)
    try:
        return GatedPatch(applied, opens)
    except IncompatiblePatchError:
        applied.remove()
        raise
