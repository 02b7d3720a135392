"""P4D, prompting for debugging: a prompt that does to the patched model what the plain one did before.

With ``P`` the plain prompt, ``ε*`` the untouched model and ``ε`` the patched one, the tokens ``P*``
minimise ``‖ε(z_t, P*) − ε*(z_t, P)‖²`` on noised pictures of the concept (Chin et al., arXiv
2309.06135, equation 3). Continuous token vectors are learnt; each step looks at their nearest
neighbours in the vocabulary and applies the gradient found there to the continuous ones (Wen et al.,
arXiv 2302.03668).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor, nn
from torch.nn import functional as F

from recare_patch.core import one_of
from recare_patch.measure.attacks.protocol import AttackOptions, Rate, Steps, Values
from recare_patch.measure.attacks.search import Group, PromptAttack, prediction_errors

NEW = -1
"""Stands for a new token among those of a prompt."""


class P4DOptions(AttackOptions):
    """How much is tried."""

    published: ClassVar[Values] = {"steps": 3000, "check_every": 50, "pictures": 100}

    variant: Annotated[Literal["n", "k"], BeforeValidator(one_of("variant", ("n", "k")))] = Field(
        "n", description="n: a prompt of new tokens alone; k: new tokens between those of the plain one"
    )
    tokens: int = Field(16, ge=1, le=75, description="N, of a prompt of variant n; as published")
    every: int = Field(3, ge=1, le=75, description="K, plain tokens between two new ones; as published")
    steps: Steps = Field(120, description="of the optimiser; published 3,000")
    check_every: Steps = Field(20, description="steps between pictures; published 50")
    learning_rate: Rate = Field(0.1, description="of AdamW; as published")
    weight_decay: float = Field(0.1, ge=0, le=10, description="of AdamW; as published")


def layout(plain: list[int], options: P4DOptions) -> list[int]:
    """Token ids of a prompt, with new ones alone (N of them), or one before every K of the plain ones."""
    if options.variant == "n":
        return [NEW] * options.tokens
    starts = range(0, max(len(plain), 1), options.every)
    return [token for start in starts for token in (NEW, *plain[start : start + options.every])]


def filled(tokens: list[int], new: Tensor, known: Sequence[Any] | Tensor) -> list[Any]:
    """What stands for each token of a layout: for new ones the next of ``new``, else ``known[token]``."""
    following = iter(new)
    return [next(following) if token == NEW else known[token] for token in tokens]


def nearest_tokens(vectors: Tensor, table: Tensor) -> Tensor:
    """The row ``[...]`` of a table ``[tokens, width]`` with the highest cosine to each vector."""
    return (F.normalize(vectors, dim=-1) @ F.normalize(table, dim=-1).T).argmax(-1)


class _Group(Group):
    """Continuous token vectors, looked at through their neighbours."""

    def begin(self, options: P4DOptions, generator: torch.Generator) -> None:
        self.plain = self.target.base.encode_prompts(self.texts)
        self.layouts = [layout(self.target.base.token_ids(text), options) for text in self.texts]
        size = (len(self.rows), max(one.count(NEW) for one in self.layouts))
        table = self.vocabulary.vectors
        start = torch.randint(0, len(table), size, generator=generator).to(table.device)
        self.parameter = nn.Parameter(table[start].clone())
        self.optimizer = torch.optim.AdamW(
            [self.parameter], lr=options.learning_rate, weight_decay=options.weight_decay
        )

    def loss(self, rows: list[int], round_: int, generator: torch.Generator) -> Tensor:
        base, vocabulary = self.target.base, self.vocabulary
        clean, noise = self.pictures(rows, generator)
        timesteps = torch.randint(0, base.num_train_timesteps, (len(self.rows),), generator=generator)[rows]
        timesteps = timesteps.to(base.device)
        states = base.add_noise(clean, noise, timesteps)
        with torch.no_grad(), self.target.original():
            wanted = base.denoise(states, timesteps, self.plain[rows])
        nearest = vocabulary.vectors[nearest_tokens(self.parameter.detach(), vocabulary.vectors)]
        # The value of the neighbours, the gradient of the continuous vectors.
        learnt = self.parameter + (nearest - self.parameter).detach()
        prompts = [torch.stack(filled(self.layouts[row], learnt[row], vocabulary.table)) for row in rows]
        predicted = base.denoise(states, timesteps, base.encode_token_vectors(prompts))
        return prediction_errors(predicted, wanted).sum()

    def prompts(self) -> list[str]:
        nearest = nearest_tokens(self.parameter.detach(), self.vocabulary.vectors).cpu()
        every = range(len(self.vocabulary.table))
        return [
            self.vocabulary.text(torch.tensor(filled(tokens, own, every)))
            for tokens, own in zip(self.layouts, self.vocabulary.ids[nearest], strict=True)
        ]


class P4D(PromptAttack[P4DOptions]):
    """The paper draws the one prompt whose pictures are most like the target's: it succeeds less often."""

    name = "p4d"
    options_type = P4DOptions
    group = _Group

    def rounds(self, options: P4DOptions) -> tuple[int, int]:
        """Rounds that end with a check; the last may go on past ``steps``."""
        each = min(options.check_every, options.steps)
        return -(-options.steps // each), each
