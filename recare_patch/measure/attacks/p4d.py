"""P4D, prompting for debugging: a prompt that does to the patched model what the plain one did before.

With ``P`` the plain prompt, ``ε*`` the untouched model and ``ε`` the patched one, the tokens ``P*``
minimise ``‖ε(z_t, P*) − ε*(z_t, P)‖²`` on noised pictures of the concept (Chin et al., arXiv
2309.06135, equation 3). Continuous token vectors are learnt; each step looks at their nearest
neighbours in the vocabulary and applies the gradient found there to the continuous ones (Wen et al.,
arXiv 2302.03668).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor, nn
from torch.nn import functional as F

from recare_patch.core import one_of
from recare_patch.measure.attacks.protocol import AttackOptions, AttackResult, AttackTarget, Rate, Steps
from recare_patch.measure.attacks.search import (
    Rounds,
    Vocabulary,
    attack_prompts,
    name_candidates,
    prediction_errors,
    replay_prompts,
)

if TYPE_CHECKING:
    from recare_patch.core import Progress
    from recare_patch.recipe import Concept


class P4DOptions(AttackOptions):
    """How much is tried.

    Attributes:
        variant: ``n``: a prompt of new tokens alone; ``k``: new tokens between those of the plain one.
        tokens: N, of a prompt of variant n; published 16.
        every: K, tokens of the plain prompt between two new ones in variant k; published 3.
        steps: of the optimiser; published 3,000.
        check_every: steps between pictures; published 50.
        learning_rate, weight_decay: of AdamW; as published.
        pictures: attacked prompts.
    """

    variant: Annotated[Literal["n", "k"], BeforeValidator(one_of("variant", ("n", "k")))] = "n"
    tokens: Annotated[int, Field(ge=1, le=75)] = 16
    every: Annotated[int, Field(ge=1, le=75)] = 3
    steps: Steps = 120
    check_every: Steps = 20
    learning_rate: Rate = 0.1
    weight_decay: Annotated[float, Field(ge=0, le=10)] = 0.1

    @classmethod
    def published(cls) -> Mapping[str, Any]:
        """As in the paper and its release."""
        return {"steps": 3000, "check_every": 50, "pictures": 100}

    @property
    def rounds(self) -> Rounds:
        """The steps in rounds that end with a picture; the last may go on past ``steps``."""
        each = min(self.check_every, self.steps)
        return Rounds(-(-self.steps // each), each)


def nearest_tokens(vectors: Tensor, table: Tensor) -> Tensor:
    """The row of a vocabulary with the highest cosine to each vector.

    Args:
        vectors: ``[..., width]``.
        table: ``[tokens, width]``.

    Returns:
        Row numbers ``[...]``.
    """
    return (F.normalize(vectors, dim=-1) @ F.normalize(table, dim=-1).T).argmax(-1)


class _Search:
    """See :class:`PromptSearch`."""

    def __init__(
        self,
        target: AttackTarget,
        vocabulary: Vocabulary,
        rows: list[int],
        options: P4DOptions,
        generator: torch.Generator,
    ) -> None:
        base = target.base
        self.target, self.vocabulary, self.rows = target, vocabulary, rows
        texts = [target.prompts[row] for row in rows]
        self.plain = base.encode_prompts(texts)
        # -1 stands for a new token.
        self.layouts = [_layout(base.token_ids(text), options) for text in texts]
        count = max(layout.count(-1) for layout in self.layouts)
        table = self.vocabulary.vectors
        start = torch.randint(0, len(table), (len(rows), count), generator=generator)
        self.parameter = nn.Parameter(table[start.to(table.device)].clone())
        self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(
            [self.parameter], lr=options.learning_rate, weight_decay=options.weight_decay
        )

    def loss(self, rows: list[int], round_: int, generator: torch.Generator) -> Tensor:
        base = self.target.base
        clean = self.target.latents[[self.rows[row] for row in rows]]
        count = len(self.rows)
        noise = torch.randn((count, *clean.shape[1:]), generator=generator)[rows].to(clean)
        timesteps = torch.randint(0, base.num_train_timesteps, (count,), generator=generator)[rows]
        timesteps = timesteps.to(base.device)
        states = base.add_noise(clean, noise, timesteps)
        with torch.no_grad(), self.target.original():
            wanted = base.denoise(states, timesteps, self.plain[rows])
        table = self.vocabulary.vectors
        nearest = table[nearest_tokens(self.parameter.detach(), table)]
        # The value of the neighbours, the gradient of the continuous vectors.
        learnt = self.parameter + (nearest - self.parameter).detach()
        embeds = base.encode_token_vectors([self._fill(row, learnt[row]) for row in rows])
        return prediction_errors(base.denoise(states, timesteps, embeds), wanted).sum()

    def _fill(self, row: int, learnt: Tensor) -> Tensor:
        new = iter(learnt)
        table = self.vocabulary.table
        return torch.stack([next(new) if token < 0 else table[token] for token in self.layouts[row]])

    def project(self) -> None:
        """Nothing: the continuous vectors are free, and looked at through their neighbours."""

    def prompts(self) -> list[str]:
        tokens = self.vocabulary.ids[
            nearest_tokens(self.parameter.detach(), self.vocabulary.vectors).cpu()
        ].tolist()
        found = []
        for layout, own in zip(self.layouts, tokens, strict=True):
            new = iter(own)
            filled = [next(new) if token < 0 else token for token in layout]
            found.append(self.vocabulary.text(torch.tensor(filled)))
        return found


def _layout(plain: list[int], options: P4DOptions) -> list[int]:
    """Token ids of a prompt with -1 where new tokens go: N of them, or one before every K of the plain."""
    if options.variant == "n":
        return [-1] * options.tokens
    laid: list[int] = []
    for start in range(0, max(len(plain), 1), options.every):
        laid += [-1, *plain[start : start + options.every]]
    return laid


class P4D:
    """See :class:`Attack`.

    Success is a picture of the found prompt, at the seed of the plain one, that shows the concept at
    any check, or of the plain one without an attack. The paper draws the one prompt whose pictures
    are most like the target's, which can only succeed less often.
    """

    name = "p4d"
    options_type = P4DOptions

    def candidates(self, concept: Concept, words: Sequence[str]) -> tuple[str, ...]:
        """Prompts that name the concept."""
        return name_candidates(concept, words)

    def images_wanted(self, options: P4DOptions) -> int:
        """One for each attacked prompt."""
        return options.pictures

    def run(
        self,
        target: AttackTarget,
        options: P4DOptions,
        *,
        seed: int,
        progress: Progress | None = None,
        work: Path | None = None,
    ) -> AttackResult:
        """See :class:`Attack`."""
        vocabulary = Vocabulary(target.base)
        return attack_prompts(
            self.name,
            target,
            options,
            options.rounds,
            lambda rows, generator: _Search(target, vocabulary, rows, options, generator),
            seed=seed,
            progress=progress,
            work=work,
        )

    def replay(
        self, target: AttackTarget, saved: AttackResult, *, progress: Progress | None = None
    ) -> AttackResult:
        """See :class:`Attack`."""
        return replay_prompts(self.name, target, saved, self.options_type(**saved.budget), progress)
