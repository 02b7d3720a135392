"""UCE, the closed-form baseline: keys and values that read a concept as something else.

Gandikota et al., "Unified Concept Editing in Diffusion Models", WACV 2024, arXiv 2308.14761, equation 7:
with ``c`` the text embeddings of the concept, ``d`` those that take their place, ``r`` retained ones,

    W' = (w_e Σ W d cᵀ + w_r Σ W r rᵀ + λ W) (w_e Σ c cᵀ + w_r Σ r rᵀ + λ I)⁻¹

so that ``W' − W = W G`` with one ``G = w_e Σ (d − c) cᵀ (…)⁻¹`` for all layers. Sums are means here, so that
the weights do not depend on how many prompts there are.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Self

from pydantic import Field

from recare_patch import models
from recare_patch.core import Settings
from recare_patch.erasure.methods import Context, Needs, SolvedMethod, at_rank
from recare_patch.recipe import MethodInfo, Paper

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from recare_patch.erasure.stages import Stages

logger = logging.getLogger(__name__)

RESIDUAL = "rank_residual"
"""The note that says what the patch's rank leaves out of the closed form."""


Weight = Annotated[float, Field(ge=0, le=10_000)]


class UCEOptions(Settings):
    """UCE's own: the weights of its closed form."""

    erase_weight: Weight = Field(1.0, description="of the erased embeddings")
    retain_weight: Weight = Field(0.1, description="of the retained ones")
    ridge: float = Field(0.5, gt=0, le=10_000, description="λ, of staying near the old weights everywhere")


class UCE(SolvedMethod):
    """Solved, not trained; exported at the adapter's rank by a singular value decomposition."""

    info = MethodInfo(
        title="UCE",
        paper=Paper(
            *("UCE", "Gandikota et al.", "WACV 2024", "2308.14761"),
            "Gandikota, Rohit and Orgad, Hadas and Belinkov, Yonatan and Materzy{\\'n}ska, Joanna and Bau, David",
            "Unified Concept Editing in Diffusion Models",
            "IEEE/CVF Winter Conference on Applications of Computer Vision",
        ),
        what="solves for keys and values that read the concept as nothing",
        touches="keys and values of the denoiser's cross-attention",
        reads="the concept's name, words of CLIP's vocabulary",
        strength="no training and no pictures: a few seconds",
        weakness="only words that it was told; no step looks at a picture",
        layers=("cross-attention-kv", "text-input"),
        options=UCEOptions,
        replaces="keys and values of the concept's tokens become those of the replacement's",
        continues=False,
        defaults={"adapter.layers": "cross-attention-kv", "adapter.rank": 16, "adapter.alpha": 16.0},
    )
    needs = Needs(target_images=False, retained=True, joined=True)

    def __init__(self, context: Context) -> None:
        """Encode the concept's prompts, what takes their place, and what must stay.

        Raises:
            BaseModelError: keys and values of this base do not read the text embeddings themselves.
        """
        import torch

        assert isinstance(context.recipe.own, UCEOptions)
        self.context, self.options, base = context, context.recipe.own, context.base
        concept, instead = zip(*(self._aligned(*pair) for pair in context.erased.pairs), strict=True)
        self.concept, self.instead = torch.cat(concept), torch.cat(instead)
        width = self.concept.shape[1]
        self.check_reads(width)
        self.retained = torch.zeros(0, width).double()
        if context.retained.prompts:
            kept = base.prompt_states(list(context.retained.prompts))
            self.retained = kept[:, 1:].flatten(0, 1)

    def _aligned(self, prompt: str, other: str) -> tuple[Tensor, Tensor]:
        """Embeddings of a prompt from where it parts from the other one, and the other's in their place.

        Both end with their last token, end-of-text and padding, so they are laid end to end.

        Returns:
            ``[tokens, width]`` each, fp64.
        """
        base = self.context.base
        rows = base.prompt_states([prompt, other])
        ids, others = base.token_ids(prompt), base.token_ids(other)
        same = next((k for k, (a, b) in enumerate(zip(ids, others, strict=False)) if a != b), len(others))
        shift = len(ids) - len(others)
        places = [k for k in range(1 + min(same, len(ids)), rows.shape[1]) if 1 <= k - shift < rows.shape[1]]
        return rows[0, places], rows[1, [k - shift for k in places]]

    def moments(self) -> tuple[Tensor, Tensor]:
        """``w_e Σ (d − c) cᵀ`` and ``w_e Σ c cᵀ + w_r Σ r rᵀ``, ``[width, width]`` each, fp64."""
        options, erased = self.options, self.concept
        moved = options.erase_weight * (self.instead - erased).T @ erased / len(erased)
        seen = options.erase_weight * erased.T @ erased / len(erased)
        if len(self.retained):
            seen = seen + options.retain_weight * self.retained.T @ self.retained / len(self.retained)
        return moved, seen

    @classmethod
    def erase(cls, methods: Sequence[Self], stages: Stages) -> None:
        """One solution for all concepts."""
        import torch

        first, context = methods[0], methods[0].context
        rank = context.recipe.adapter.rank

        def solve(generator: torch.Generator) -> dict[str, Tensor]:
            both = [one.moments() for one in methods]
            moved, seen = (torch.stack([one[k] for one in both]).sum(0) for k in (0, 1))
            ridge = first.options.ridge * torch.eye(len(seen), dtype=seen.dtype, device=seen.device)
            change = torch.linalg.solve(seen + ridge, moved.T).T
            models.check_finite(change, "the numbers that the closed form gives", context.base.dtype)
            made: dict[str, Tensor] = {}
            missed = total = 0.0
            for name, weight in first.weights().items():
                update = weight @ change
                a, b, cut = at_rank(update, rank)
                made[f"{name}.A"], made[f"{name}.B"] = a.float(), b.float()
                missed, total = missed + cut, total + float(update.square().sum())
            residual = math.sqrt(missed / total) if total else 0.0
            return made | {RESIDUAL: torch.tensor(residual)}

        made = stages.once("solve", solve)
        residual = float(made.pop(RESIDUAL))
        logger.info("the closed form at rank %d: %.2g of its norm is left out", rank, residual)
        stages.note(RESIDUAL, residual)
        part = context.base.denoiser_name
        stages.set_adapter({models.full_name(part, m): (made[f"{m}.A"], made[f"{m}.B"]) for m in first.modules})
