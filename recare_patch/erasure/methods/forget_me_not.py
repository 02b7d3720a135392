"""Forget-Me-Not: take the picture's attention off a concept's tokens (Zhang et al., arXiv 2303.17591).

Noise prediction plays no part: what is trained is where the cross-attention of every layer looks, on noisy
pictures of the concept. The tokens are those of its name, or of a short textual inversion. Stable Diffusion
1.x fills prompts up with the end-of-text token; that padding is never among the concept's tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recare_patch.core import BaseModelError, ConceptError
from recare_patch.erasure.methods.protocol import ErasingContext, Method, Stages
from recare_patch.models import PLACEHOLDER, TEXT_ROOM, BaseModel, PromptEmbeds
from recare_patch.models import lora as adapters


class Attention:
    """Looks into the attention blocks that read the prompt, without changing what they compute.

    Queries, keys and outputs are read by hooks on the layers that make them, so the blocks keep their own
    processors and their fast kernels; the maps are computed beside them.
    """

    def __init__(self, denoiser: nn.Module) -> None:
        """Find the blocks.

        Args:
            denoiser: with or without adapters.

        Raises:
            BaseModelError: there are none.
        """
        self.blocks = adapters.prompt_attention(denoiser)
        if not self.blocks:
            raise BaseModelError(f"no attention block of this {type(denoiser).__name__} reads the prompt")
        self._calls: list[dict[str, list[Tensor]]] = []

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Inside, the next prediction is recorded; afterwards no hook is left."""
        self._calls = [{} for _ in self.blocks]
        hooks = []
        for seen, block in zip(self._calls, self.blocks, strict=True):
            for name in ("to_q", "to_k", "add_k_proj"):
                if isinstance(layer := getattr(block, name, None), nn.Module):
                    hooks.append(layer.register_forward_hook(_recorder(seen, name)))
            hooks.append(block.register_forward_hook(_recorder(seen, "output")))
        try:
            yield
        finally:
            # A recorded chunk that is computed again in its backward pass is no new one.
            for hook in hooks:
                hook.remove()

    def maps(self, positions: Sequence[int]) -> Iterator[Tensor]:
        """Each block's attention to some tokens of the prompt, ``[rows, heads, pixels, positions]``."""
        for block, seen in zip(self.blocks, self._calls, strict=True):
            for k, query in enumerate(seen["to_q"]):
                yield _map(block, query, seen["to_k"][k], [one[k] for one in _added(seen)], positions)

    def outputs(self) -> list[Tensor]:
        """Each block's output, ``[rows, pixels, width]``."""
        return [torch.cat(seen["output"]) for seen in self._calls]


def _added(seen: dict[str, list[Tensor]]) -> list[list[Tensor]]:
    return [seen["add_k_proj"]] if "add_k_proj" in seen else []


def _recorder(seen: dict[str, list[Tensor]], name: str) -> Any:
    def record(module: nn.Module, args: Any, output: Any) -> None:
        seen.setdefault(name, []).append(output[0] if isinstance(output, tuple) else output)

    return record


def _map(block: Any, query: Tensor, key: Tensor, added: Sequence[Tensor], positions: Sequence[int]) -> Tensor:
    """``softmax(q kᵀ / √d)``, the columns of some of the prompt's tokens.

    Where prompt and picture share a block, the picture's queries look at both; the prompt's keys are added.
    """

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (block.heads, -1)).transpose(1, 2).float()

    def normed(x: Tensor, name: str) -> Tensor:
        norm = getattr(block, name, None)
        return norm(x) if norm is not None else x

    q, k = normed(heads(query), "norm_q"), normed(heads(key), "norm_k")
    offset = 0
    if added:
        offset = k.shape[2]
        k = torch.cat([k, normed(heads(added[0]), "norm_added_k")], 2)
    weights = (q @ k.transpose(-1, -2) * block.scale).softmax(-1)
    columns = torch.tensor([offset + position for position in positions], device=weights.device)
    return weights.index_select(-1, columns)


def name_positions(base: BaseModel, prompt: str, words: Sequence[str]) -> tuple[int, ...]:
    """The places of words in an encoded prompt: after the start of text, and never in the padding.

    Args:
        base: whose tokenizer reads the prompt.
        prompt: what is read.
        words: each may have several tokens.
    """
    ids = base.token_ids(prompt)[:TEXT_ROOM]
    found: dict[int, None] = {}
    for word in words:
        own = base.token_ids(word)
        for start in range(len(ids) - len(own) + 1) if own else ():
            if ids[start : start + len(own)] == own:
                found |= dict.fromkeys(range(start + 1, start + 1 + len(own)))
    return tuple(sorted(found))


class ForgetMeNot(Method):
    """``Σ_layers mean ‖A[:, concept tokens]‖²`` on noisy pictures of the concept.

    With a replacement, each block's output under the concept's prompt becomes what the untouched model's
    was under the replacement's: attention is steered to something instead of away.
    """

    def __init__(self, context: ErasingContext) -> None:
        """Encode the concept's prompts and find its tokens in them.

        Raises:
            ConceptError: they are not there.
        """
        super().__init__(context)
        assert context.recipe is not None and context.concept is not None
        base, concept = context.base, context.concept
        self.attention = Attention(base.denoiser)
        prompts = concept.name_prompts
        self.embeds = context.base.encode_prompts(prompts)
        # The whole name first: one of its words may be another one of the prompt's, as in "The Who".
        self.positions = [
            name_positions(base, prompt, [concept.text]) or name_positions(base, prompt, concept.words)
            for prompt in prompts
        ]
        if not context.recipe.forget_me_not.inversion_steps and not all(self.positions):
            raise ConceptError(
                f"method 'forget-me-not' cannot find '{concept.text}' among the tokens of its own prompts"
            )
        self.wanted: PromptEmbeds | None = None
        if context.recipe.replace_with is not None:
            self.wanted = base.encode_prompts(context.became[: len(prompts)])

    def find_tokens(self, stages: Stages, number: int) -> None:
        """Take tokens from a textual inversion in the place of the name's own, if the recipe says so."""
        context = self.context
        assert context.recipe is not None and context.concept is not None and context.latents is not None
        base, options = context.base, context.recipe.forget_me_not
        if not options.inversion_steps:
            return
        prompt = context.concept.target_prompt_for(PLACEHOLDER)
        word = context.recipe.search.init_word or context.concept.class_word
        start = base.word_vector(word).repeat(options.vectors, 1)
        stage = f"inversion {number}" if number > 1 else "inversion"
        vectors = stages.invert(stage, context.latents, prompt, start, options.inversion_steps)
        self.embeds = base.encode_with_vectors([prompt], vectors).detach()
        first = len(base.token_ids(prompt.split(PLACEHOLDER)[0])) + 1
        self.positions = [tuple(range(first, first + options.vectors))]
        if self.wanted is not None:
            self.wanted = self.wanted[0]

    def loss(self, step: int, generator: torch.Generator) -> Tensor:
        """The loss of a step: one of the prompts, on a batch of noisy pictures."""
        context, base = self.context, self.context.base
        assert context.states is not None
        rows = context.options.batch_size
        prompt = int(torch.randint(0, len(self.embeds), (1,), generator=generator))
        which = torch.zeros(rows, dtype=torch.long)
        latents, timesteps = context.states.draw(step, which, generator)
        wanted: list[Tensor] = []
        if self.wanted is not None:
            with torch.no_grad(), adapters.off(*base.components.values()), self.attention.watched():
                base.denoise(latents, timesteps, self.wanted[prompt].repeat(rows))
            wanted = self.attention.outputs()
        with self.attention.watched():
            base.denoise(latents, timesteps, self.embeds[prompt].repeat(rows))
        if wanted:
            pairs = zip(self.attention.outputs(), wanted, strict=True)
            losses = [F.mse_loss(a.float(), b.float()) / b.float().square().mean() for a, b in pairs]
        else:
            losses = [a.square().sum(-1).mean() for a in self.attention.maps(self.positions[prompt])]
        return torch.stack(losses).mean()

    @classmethod
    def erase(cls, methods: Sequence[Self], stages: Stages) -> None:
        """See :class:`Method`."""
        count = len(methods)
        for number, one in enumerate(methods, start=1):
            one.find_tokens(stages, number)

        def loss_at(step: int, generator: torch.Generator) -> Tensor:
            return methods[step % count].loss(step // count, generator)

        stages.fit("erase", loss_at, methods[0].context.options.steps * count, every=20 * count)
