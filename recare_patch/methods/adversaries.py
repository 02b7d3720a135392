"""Adversaries that train beside a patch: names that keep looking for the concept while it is erased.

The search of ReCARE's first stage finds names in a model that was erased once, and erases those. A later
attacker looks in the finished model, with more words and more steps. So a few adversaries, each a name of one
or several word vectors, are improved by textual inversion (Gal et al., arXiv 2208.01618) before every step
of the erasing itself, and what they found is erased with the concept's own name: adversarial training (as
AdvUnlearn does with prompts, Zhang et al., arXiv 2405.15234), at the cost of a few states a step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recare_patch import adapters
from recare_patch.base_models import PromptEmbeds
from recare_patch.states import noised

if TYPE_CHECKING:
    from recare_patch.base_models import BaseModel
    from recare_patch.recipe import AdversaryOptions

_SINGLE = 0.25
"""Share of adversaries that have one word vector: the commonest attack."""

_SPREAD = 0.1
"""Standard deviation of the noise on an adversary's first vectors, in those of the vocabulary."""


class Adversaries:
    """Names that are improved against the model as it stands.

    Every draw comes from the generator that is passed in, and :meth:`state` holds all the rest, so that
    a resumed run goes on as if it had not stopped.

    Args:
        base: the model, with the adapter that is being trained.
        latents: clean latents of pictures of the concept, ``[images, c, h, w]``.
        templates: prompts that hold :data:`~recare_patch.base_models.PLACEHOLDER`.
        class_word: what half of the adversaries start from; the others start from random tokens.
        options: the recipe's ``adversary`` section.
    """

    def __init__(
        self,
        base: BaseModel,
        latents: Tensor,
        templates: Sequence[str],
        class_word: str,
        options: AdversaryOptions,
    ) -> None:
        self.base, self.latents, self.templates, self.options = base, latents, tuple(templates), options
        self._start = base.word_vector(class_word)
        self._spread = _SPREAD * base.token_table().std()
        self._members: list[tuple[nn.Parameter, torch.optim.Adam, int] | None] = [None] * options.count
        self._turn = 0

    def improve(self, generator: torch.Generator) -> None:
        """Some steps of textual inversion for the adversary whose turn it is; one too old starts anew."""
        options, base = self.options, self.base
        for _ in range(options.steps):
            place = self._turn % options.count
            self._turn += 1
            member = self._members[place]
            if member is None or member[2] >= options.life:
                member = self._newcomer(generator)
            vectors, optimizer, age = member
            index = torch.randint(0, len(self.latents), (options.batch_size,), generator=generator)
            states, timesteps, noise = noised(base, self.latents[index], generator)
            target = base.training_target(self.latents[index], noise, timesteps).float()
            with adapters.frozen(*base.components.values()), torch.enable_grad():
                embeds = base.encode_with_vectors([self._template(generator)], vectors)
                made = base.denoise(states, timesteps, embeds.repeat(options.batch_size)).float()
                (vectors.grad,) = torch.autograd.grad(F.mse_loss(made, target), [vectors])
            if base.crew is not None:
                base.crew.mean_gradients([vectors])
            nn.utils.clip_grad_norm_([vectors], 1.0)
            optimizer.step()
            self._members[place] = vectors, optimizer, age + 1

    @torch.no_grad()
    def names(self, rows: int, generator: torch.Generator) -> PromptEmbeds:
        """Prompts with adversaries for names: the one that was improved last, then others by lot."""
        there = [member for member in self._members if member is not None]
        last = self._members[(self._turn - 1) % len(self._members)]
        assert last is not None
        made = []
        for row in range(rows):
            chosen = there[int(torch.randint(0, len(there), (1,), generator=generator))] if row else last
            made.append(self.base.encode_with_vectors([self._template(generator)], chosen[0].detach()))
        return PromptEmbeds.cat(made)

    def state(self) -> dict[str, Tensor]:
        """All that a resumed run needs, as tensors."""
        found = {"turn": torch.tensor(self._turn)}
        for place, member in enumerate(self._members):
            if member is not None:
                vectors, optimizer, age = member
                found |= {f"{place}.vectors": vectors.detach().cpu(), f"{place}.age": torch.tensor(age)}
                for key, value in optimizer.state[vectors].items():
                    found[f"{place}.optimizer.{key}"] = value.detach().cpu()
        return found

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what :meth:`state` returned."""
        self._turn = int(state["turn"])
        for place in range(len(self._members)):
            if f"{place}.vectors" in state:
                vectors, optimizer = self._member(state[f"{place}.vectors"])
                prefix = f"{place}.optimizer."
                optimizer.state[vectors] = {
                    # torch keeps the step count on the CPU.
                    key[len(prefix) :]: value.clone() if key.endswith("step") else value.to(vectors.device)
                    for key, value in state.items()
                    if key.startswith(prefix)
                }
                self._members[place] = vectors, optimizer, int(state[f"{place}.age"])

    def _template(self, generator: torch.Generator) -> str:
        return self.templates[int(torch.randint(0, len(self.templates), (1,), generator=generator))]

    def _newcomer(self, generator: torch.Generator) -> tuple[nn.Parameter, torch.optim.Adam, int]:
        single, of_class = (torch.rand(2, generator=generator) < torch.tensor([_SINGLE, 0.5])).tolist()
        count = 1 if single else self.options.vectors
        table = self.base.token_table()
        tokens = torch.randint(0, len(table), (count,), generator=generator).to(table.device)
        first = self._start.repeat(count, 1) if of_class else table[tokens]
        noise = torch.randn(first.shape, generator=generator).to(first.device)
        return (*self._member(first + self._spread * noise), 0)

    def _member(self, vectors: Tensor) -> tuple[nn.Parameter, torch.optim.Adam]:
        parameter = nn.Parameter(vectors.detach().clone().float().to(self.base.device))
        return parameter, torch.optim.Adam([parameter], lr=self.options.learning_rate)
