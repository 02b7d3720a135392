"""Adversaries that train beside a patch: names that keep looking for the concept while it is erased.

The search of ReCARE's first stage finds names in a model that was erased once, and erases those. A later
attacker looks in the finished model, with more words and more steps. So a few adversaries, each a name of one
or several word vectors, are improved by textual inversion (Gal et al., arXiv 2208.01618) before every step
of the erasing itself, and what they found is erased with the concept's own name: adversarial training (as
AdvUnlearn does with prompts, Zhang et al., arXiv 2405.15234), at the cost of a few states a step.

An adversary may also change the embeddings of a whole prompt, behind the text encoder. Whatever words can
say to the denoiser it can say too, and it finds it in a tenth of the steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recare_patch.erasure.inversion import name_templates
from recare_patch.erasure.loop import noised
from recare_patch.models import LossScale, PromptEmbeds, lora

if TYPE_CHECKING:
    from recare_patch.models import BaseModel
    from recare_patch.recipe import AdversaryOptions, Concept

_SINGLE = 0.25
"""Share of adversaries that have one word vector: the commonest attack."""

_SPREAD = 0.1
"""Standard deviation of the noise on an adversary's first vectors, in those of the vocabulary."""


@dataclass
class _Member:
    learnt: nn.Parameter  # word vectors [vectors, width], or a prompt's embeddings [1, tokens, width]
    optimizer: torch.optim.Optimizer
    first: Tensor  # word vectors that it started from
    template: int  # the one in which these stood
    age: int = 0  # in steps
    prompt: PromptEmbeds | None = None  # whose embeddings are learnt, with all else that is told of it


class Adversaries:
    """Names that are improved against the model as it stands, on clean latents ``[images, c, h, w]`` of the concept.

    Half of them start from the concept's class word, the others from random tokens. Every draw comes from the
    generator that is passed in, and :meth:`state` holds all the rest, so that a resumed run goes on as if it had
    not stopped.
    """

    def __init__(self, base: BaseModel, latents: Tensor, concept: Concept, options: AdversaryOptions) -> None:
        self.base, self.latents, self.options = base, latents, options
        self.templates = name_templates(concept)
        self._start = base.word_vector(concept.class_word)
        table = base.token_table()
        self._spread, self._vocabulary = _SPREAD * table.std(), len(table)
        self._members: list[_Member | None] = [None] * options.count
        self._turn, self._scaling = 0, LossScale(base.dtype)

    def improve(self, generator: torch.Generator) -> None:
        """Some steps of textual inversion for the adversary whose turn it is; one too old starts anew."""
        options, base = self.options, self.base
        for _ in range(options.steps):
            place = self._turn % options.count
            self._turn += 1
            member = self._members[place]
            if member is None or member.age >= options.life:
                member = self._newcomer(generator)
            index = torch.randint(0, len(self.latents), (options.batch_size,), generator=generator)
            states, timesteps, noise = noised(base, self.latents[index], generator)
            target = base.training_target(self.latents[index], noise, timesteps).float()
            with lora.frozen(*base.components.values()), torch.enable_grad():
                embeds = self._said(member, generator)
                made = base.denoise(states, timesteps, embeds.repeat(options.batch_size)).float()
                sound = self._scaling.backward(
                    F.mse_loss(made, target), [member.learnt], base.crew, "loss of an adversarial name"
                )
            if sound:
                nn.utils.clip_grad_norm_([member.learnt], 1.0)
                member.optimizer.step()
            member.age += 1
            self._members[place] = member

    @torch.no_grad()
    def names(self, rows: int, generator: torch.Generator) -> PromptEmbeds:
        """Prompts with adversaries for names: the one that was improved last, then others by lot."""
        there = [member for member in self._members if member is not None]
        last = self._members[(self._turn - 1) % len(self._members)]
        assert last is not None
        made = []
        for row in range(rows):
            chosen = there[int(torch.randint(0, len(there), (1,), generator=generator))] if row else last
            made.append(self._said(chosen, generator).detach())
        return PromptEmbeds.cat(made)

    def _said(self, member: _Member, generator: torch.Generator) -> PromptEmbeds:
        """An adversary as the denoiser is told it, one row; names stand in a template drawn by lot."""
        if member.prompt is not None:
            return member.prompt.said_by(member.learnt.to(self.base.dtype))
        return self.base.encode_with_vectors([self.templates[self._lot(generator)]], member.learnt)

    def state(self) -> dict[str, Tensor]:
        """All that a resumed run needs, as tensors."""
        found = {"turn": torch.tensor(self._turn), "scaling": torch.tensor(self._scaling.state, dtype=torch.float64)}
        for place, member in enumerate(self._members):
            if member is not None:
                learnt = member.learnt
                found |= {f"{place}.vectors": learnt.detach().cpu(), f"{place}.age": torch.tensor(member.age)}
                found |= {f"{place}.first": member.first.cpu(), f"{place}.template": torch.tensor(member.template)}
                for key, value in member.optimizer.state[learnt].items():
                    found[f"{place}.optimizer.{key}"] = value.detach().cpu()
        return found

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what :meth:`state` returned."""
        self._turn, self._scaling.state = int(state["turn"]), state["scaling"].tolist()
        for place in range(len(self._members)):
            if f"{place}.vectors" in state:
                member = self._member(state[f"{place}.first"], int(state[f"{place}.template"]))
                with torch.no_grad():
                    member.learnt.copy_(state[f"{place}.vectors"])
                prefix, device = f"{place}.optimizer.", self.base.device
                member.optimizer.state[member.learnt] = {
                    # torch keeps the step count on the CPU.
                    key[len(prefix) :]: value.clone() if key.endswith("step") else value.to(device)
                    for key, value in state.items()
                    if key.startswith(prefix)
                }
                member.age = int(state[f"{place}.age"])
                self._members[place] = member

    def _newcomer(self, generator: torch.Generator) -> _Member:
        single, of_class = (torch.rand(2, generator=generator) < torch.tensor([_SINGLE, 0.5])).tolist()
        count = 1 if single else self.options.vectors
        tokens = torch.randint(0, self._vocabulary, (count,), generator=generator)
        first = self._start.repeat(count, 1) if of_class else self.base.token_vectors(tokens)
        noise = torch.randn(first.shape, generator=generator).to(first.device)
        first = first + self._spread * noise
        return self._member(first, self._lot(generator) if self.options.space == "embeddings" else 0)

    def _lot(self, generator: torch.Generator) -> int:
        return int(torch.randint(0, len(self.templates), (1,), generator=generator))

    def _member(self, first: Tensor, template: int) -> _Member:
        first, prompt = first.detach().float().to(self.base.device), None
        learnt = first
        if self.options.space == "embeddings":
            with torch.no_grad():
                prompt = self.base.encode_with_vectors([self.templates[template]], first).detach()
            learnt = prompt.prompt_embeds
        parameter = nn.Parameter(learnt.clone().float())
        optimizer = torch.optim.Adam([parameter], lr=self.options.learning_rate)
        return _Member(parameter, optimizer, first, template, prompt=prompt)
