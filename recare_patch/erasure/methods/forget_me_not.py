"""Forget-Me-Not: take the picture's attention off a concept's tokens (Zhang et al., arXiv 2303.17591).

Noise prediction plays no part: what is trained is where the cross-attention of every layer looks, on noisy
pictures of the concept. The tokens are those of its name, or of a short textual inversion. Stable Diffusion
1.x fills prompts up with the end-of-text token; that padding is never among the concept's tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field

from recare_patch import models
from recare_patch.core import BaseModelError, ConceptError, Settings
from recare_patch.erasure.methods import Context, Method, Work
from recare_patch.recipe import MethodInfo, Paper

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from recare_patch.erasure.stages import Stages
    from recare_patch.models import BaseModel
    from recare_patch.recipe import Recipe


class ForgetMeNotOptions(Settings):
    """Forget-Me-Not's own."""

    inversion_steps: int = Field(
        0,
        ge=0,
        le=1_000_000,
        description="of a textual inversion that finds the concept's tokens in its pictures; 0: the tokens are those "
        "of its name",
    )
    vectors: int = Field(1, ge=1, le=16, description="how many tokens the inversion fits")


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
        self.blocks = models.prompt_attention(denoiser)
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
                if (layer := getattr(block, name, None)) is not None:
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
                added = [seen["add_k_proj"][k]] if "add_k_proj" in seen else []
                yield _map(block, query, seen["to_k"][k], added, positions)

    def outputs(self) -> list[Tensor]:
        """Each block's output, ``[rows, pixels, width]``."""
        import torch

        return [torch.cat(seen["output"]) for seen in self._calls]


def _recorder(seen: dict[str, list[Tensor]], name: str) -> Any:
    def record(module: nn.Module, args: Any, output: Any) -> None:
        seen.setdefault(name, []).append(output[0] if isinstance(output, tuple) else output)

    return record


def _map(block: Any, query: Tensor, key: Tensor, added: Sequence[Tensor], positions: Sequence[int]) -> Tensor:
    """``softmax(q kᵀ / √d)``, the columns of some of the prompt's tokens.

    Where prompt and picture share a block, the picture's queries look at both; the prompt's keys are added.
    """
    import torch

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
    ids = base.token_ids(prompt)[: models.TEXT_ROOM]
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

    info = MethodInfo(
        title="Forget-Me-Not",
        paper=Paper(
            *("Forget-Me-Not", "Zhang et al.", "2023", "2303.17591"),
            "Zhang, Gong and Wang, Kai and Xu, Xingqian and Wang, Zhangyang and Shi, Humphrey",
            "{Forget-Me-Not}: Learning to Forget in Text-to-Image Diffusion Models",
        ),
        what="takes the picture's attention off the concept's tokens",
        touches="keys of the denoiser's cross-attention, its queries and output by name",
        reads="a few pictures of the concept",
        strength="erases in seconds",
        weakness="nothing holds what is near the concept, and attacks bring it back",
        layers=("cross-attention-kv", "cross-attention"),
        options=ForgetMeNotOptions,
        replaces="attention gives under the concept's prompts what it gave under the replacement's",
        compiles=False,
        defaults={
            "adapter.layers": "cross-attention-kv",
            "target_images.count": 8,
            "erase.steps": 35,
            "erase.batch_size": 4,
            "erase.learning_rate": 4.0e-3,
        },
    )

    def __init__(self, context: Context) -> None:
        """Encode the concept's prompts and find its tokens in them.

        Raises:
            ConceptError: they are not there.
        """
        from recare_patch.erasure.loop import state_source

        self.context, base, concept = context, context.base, context.concept
        assert isinstance(context.recipe.own, ForgetMeNotOptions)
        self.options, self.attention = context.recipe.own, Attention(base.denoiser)
        self.embeds = base.encode_prompts(concept.name_prompts)
        # The whole name first: one of its words may be another one of the prompt's, as in "The Who".
        self.positions = [
            name_positions(base, prompt, [concept.text])
            or name_positions(base, prompt, concept.aliases)
            or name_positions(base, prompt, concept.words)
            for prompt in concept.name_prompts
        ]
        if not self.options.inversion_steps and not all(self.positions):
            raise ConceptError(
                f"method 'forget-me-not' cannot find '{concept.text}' among the tokens of its own prompts"
            )
        self.wanted: models.PromptEmbeds | None = None
        if context.recipe.replace_with is not None:
            after = [after for _, after in context.erased.pairs[: len(concept.name_prompts)]]
            self.wanted = base.encode_prompts(after)
        names, empty = base.encode_prompts(list(context.erased.names)), base.encode_prompts([""])
        self.states = state_source(context.recipe, base, context.latents, names, empty)

    def search(self, stages: Stages) -> None:
        """Take tokens from a textual inversion in the place of the name's own, if the recipe says so."""
        from recare_patch.models import PLACEHOLDER

        context, base = self.context, self.context.base
        if not self.options.inversion_steps:
            return
        prompt = context.concept.target_prompt_for(PLACEHOLDER)
        word = context.recipe.search.init_word or context.concept.class_word
        start = base.word_vector(word).repeat(self.options.vectors, 1)
        steps = self.options.inversion_steps
        vectors = stages.invert("inversion", context.latents, prompt, start, steps)
        self.embeds = base.encode_with_vectors([prompt], vectors).detach()
        first = len(base.token_ids(prompt.split(PLACEHOLDER)[0])) + 1
        self.positions = [tuple(range(first, first + self.options.vectors))]
        if self.wanted is not None:
            self.wanted = self.wanted[0]

    @classmethod
    def work(cls, recipe: Recipe) -> Mapping[str, Work]:
        """The inversions, then the erasing: one training sample a state, and a frozen one for a replacement."""
        from recare_patch.erasure.inversion import HELD_OUT, most_evaluations
        from recare_patch.erasure.rollouts import rollout_evaluations
        from recare_patch.erasure.stages import stage_name

        assert isinstance(recipe.own, ForgetMeNotOptions)
        search, erase, found = recipe.search, recipe.erase, {}
        most = most_evaluations(recipe.own.inversion_steps, search.batch_size, search.patience)
        looks = 0 if search.patience is None else HELD_OUT
        for number in range(len(recipe.concepts)) if recipe.own.inversion_steps else ():
            found[stage_name("inversion", number)] = Work(most, search.batch_size, looks, reads=True)
        frozen = erase.batch_size if recipe.replace_with is not None else 0
        evaluations = len(recipe.concepts) * erase.steps * (frozen + 3 * erase.batch_size)
        found["erase"] = Work(evaluations + rollout_evaluations(recipe), erase.batch_size, frozen)
        return found

    def loss(self, step: int, generator: torch.Generator) -> Tensor:
        """The loss of a step: one of the prompts, on a batch of noisy pictures."""
        import torch
        from torch.nn import functional as F

        base, rows = self.context.base, self.context.recipe.erase.batch_size
        prompt = int(torch.randint(0, len(self.embeds), (1,), generator=generator))
        latents, timesteps = self.states.draw(step, torch.zeros(rows, dtype=torch.long), generator)
        wanted: list[Tensor] = []
        if self.wanted is not None:
            with torch.no_grad(), models.off(*base.components.values()), self.attention.watched():
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
        """One loop, in which the concepts take turns."""
        count = len(methods)

        def loss_at(step: int, generator: torch.Generator) -> Tensor:
            return methods[step % count].loss(step // count, generator)

        steps = methods[0].context.recipe.erase.steps * count
        stages.fit("erase", loss_at, steps, every=20 * count)
