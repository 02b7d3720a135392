"""The closed form in a null space: values that read names as something plainer, and what is retained as before.

After Li et al., "SPEED", ICLR 2026, arXiv 2503.07392. In columns, with ``T`` what the text encoders make of the last
token of each name ``[d, n]``, ``A`` the same of what takes its place, ``R`` of retained words, and means over columns,

    C_TT = T Tᵀ / n,   C_AT = A Tᵀ / n,   P = U₀ U₀ᵀ  the null space of R Rᵀ,   M = (C_TT P + ρ I)⁻¹
    ΔW = W (C_AT − C_TT) P [I − M K (Kᵀ P M K + λ I)⁻¹ Kᵀ P] M

where ``K`` is the start token's column and three centres of the empty prompt's: what every prompt has stays. Since
``(C_AT − C_TT) = (A − T) Tᵀ / n`` has a row for each name, so has ``ΔW``: it is a LoRA of rank ``n`` as it stands,
``B = W (A − T)`` and one ``A`` for all layers, and nothing is cut off.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Self

from pydantic import Field

from recare_patch import models
from recare_patch.core import BaseModelError, Settings
from recare_patch.erasure.methods import Context, Method, Needs, Work
from recare_patch.recipe import MethodInfo, Paper

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from recare_patch.erasure.stages import Stages
    from recare_patch.recipe import Recipe

logger = logging.getLogger(__name__)

RESIDUAL = "rank_residual"
"""The note that says what a rank lower than the number of names leaves out."""

WENT = "names_went"
"""The note that says how much of its way the name went that went least."""

FORECAST, TOLD = "moved_most", 20
"""The note that names the retained words that the patch moves most, and how many of them."""

_CENTRES, _ROUNDS = 3, 20

Small = Annotated[float, Field(gt=0, le=10_000)]


class ClosedOptions(Settings):
    """The closed form's own.

    The numbers are the paper's for states whose mean square is one, which Stable Diffusion's nearly are and those of
    any other base are made to be.
    """

    null_space: Small | None = Field(
        None,
        description="directions in which retained words' mean square is smaller may change; null: the smallest of "
        "0.001 to 10 at which the names go",
    )
    gone: float = Field(0.95, gt=0, le=1, description="how much of the way each name goes then, at least")
    ridge: Small = Field(0.05, description="ρ, of staying near the old weights everywhere")
    fixed_ridge: Small = Field(0.05, description="λ, by which the start token and the empty prompt may still move")
    words: int = Field(1000, ge=0, le=3000, description="the most frequent words that are retained")


class Closed(Method):
    """Solved, not trained, and exact: a rank a name."""

    info = MethodInfo(
        title="closed form",
        paper=Paper(
            *("SPEED", "Li et al.", "ICLR 2026", "2503.07392", "Li and others"),
            "{SPEED}: Scalable, Precise, and Efficient Concept Erasure for Diffusion Models",
            "International Conference on Learning Representations",
        ),
        what="solves for values that read a name as something plainer and retained words as before",
        touches="values of the denoiser's cross-attention",
        reads="the concept's names, and words that must stay",
        strength="a second for a name, and a hundred names at once; a few kilobytes",
        weakness="only the names that it was told; no step looks at a picture",
        layers=("cross-attention-v", "cross-attention-kv"),
        options=ClosedOptions,
        replaces="values at the concept's last token become those at the replacement's",
        continues=False,
        defaults={"adapter.layers": "cross-attention-v"},
        rank_per_name=True,
    )
    needs = Needs(target_images=False, words=True)

    def __init__(self, context: Context) -> None:
        """Look up what is edited.

        Raises:
            BaseModelError: values of this base do not read the text embeddings themselves.
        """
        import torch

        assert isinstance(context.recipe.own, ClosedOptions)
        self.context, self.options, base = context, context.recipe.own, context.base
        self.names = context.concept.bare_names
        instead = context.recipe.replace_with or _PLAIN[context.concept.kind]
        erased, others = base.word_states([*self.names, instead]).split([len(self.names), 1])
        self.erased, self.instead = erased, others.expand(len(erased), -1)
        for name, layer in models.base_layers(base.denoiser):
            if name in self.modules and isinstance(layer, torch.nn.Linear) and layer.in_features != erased.shape[1]:
                raise BaseModelError(
                    f"method 'closed' cannot edit base '{base.id}': '{name}' reads {layer.in_features} numbers "
                    f"a token, and the text encoder makes {erased.shape[1]}"
                )

    @classmethod
    def work(cls, recipe: Recipe) -> Mapping[str, Work]:
        """No denoiser at all."""
        return {}

    @property
    def modules(self) -> list[str]:
        """The layers that are edited."""
        return models.target_modules(self.context.base.denoiser, self.context.recipe.adapter.layers)

    @classmethod
    def erase(cls, methods: Sequence[Self], stages: Stages) -> None:
        """One solution for all names."""
        import torch

        first, base = methods[0], methods[0].context.base
        rank, layers = first.context.recipe.adapter.rank, dict(models.base_layers(base.denoiser))
        words = _retained(methods)

        def solve(generator: torch.Generator) -> dict[str, Tensor]:
            erased = torch.cat([one.erased for one in methods])
            instead = torch.cat([one.instead for one in methods])
            weights = []
            for name in first.modules:
                weight = layers[name].weight
                assert isinstance(weight, torch.Tensor)
                weights.append(models.in_double(weight.detach()))
            retained, empty = base.word_states(words), base.empty_states()
            every = torch.cat(weights)
            reads, went = solution(erased, instead, retained, empty, first.options, values=every, generator=generator)
            models.check_finite(reads, "the numbers that the closed form gives", base.dtype)
            made: dict[str, Tensor] = {}
            missed = total = 0.0
            moved, was = torch.zeros(2, len(words), dtype=reads.dtype).unbind()
            for name, weight in zip(first.modules, weights, strict=True):
                writes = weight @ (instead - erased).T
                a, b, cut = _at_rank(reads, writes, rank)
                made[f"{name}.A"], made[f"{name}.B"] = a.float(), b.float()
                missed, total = missed + cut, total + float((writes @ reads).square().sum())
                moved += (retained @ reads.T @ writes.T).square().sum(1).cpu()
                was += (retained @ weight.T).square().sum(1).cpu()
            share = (moved / was.clamp(min=1e-30)).sqrt()
            left = (missed / total) ** 0.5 if total else 0.0
            return made | {RESIDUAL: torch.tensor(left), WENT: torch.tensor(went), FORECAST: share.float()}

        made = stages.once("solve", solve)
        residual, went, share = float(made.pop(RESIDUAL)), float(made.pop(WENT)), made.pop(FORECAST)
        logger.info("the closed form at rank %d: %.2g of its norm is left out", rank, residual)
        stages.note(RESIDUAL, residual)
        stages.note(WENT, round(went, 4))
        if went < first.options.gone:
            stages.run.warn(
                f"a name goes {went:.0%} of its way alone: retained words leave it no more room; retain fewer "
                "(--set closed.words=…), or raise closed.null_space"
            )
        most = share.argsort(descending=True)[:TOLD].tolist()
        stages.note(FORECAST, {words[k]: round(float(share[k]), 4) for k in most})
        part = base.denoiser_name
        stages.set_adapter({models.full_name(part, m): (made[f"{m}.A"], made[f"{m}.B"]) for m in first.modules})


_PLAIN = {"style": "art", "object": "object", "identity": "person", "nsfw": "person"}
"""What a name becomes, as published."""


def _retained(methods: Sequence[Closed]) -> list[str]:
    """Words that name none of the run's concepts: companions, neighbours, and what people say most."""
    found = [word for one in methods for word in (*one.context.companions, *one.context.neighbours)]
    found += [word for one in methods for word in one.context.words[: one.options.words]]
    return list(dict.fromkeys(found))


def solution(
    erased: Tensor,
    instead: Tensor,
    retained: Tensor,
    empty: Tensor,
    options: ClosedOptions,
    *,
    values: Tensor,
    generator: torch.Generator,
) -> tuple[Tensor, float]:
    """What the update reads, ``[names, width]``: ``ΔW = W (instead − erased)ᵀ @ this``; and how far names go.

    The paper retains the words that an edit without any would move more than most, at one bound of the null space.
    Here the bound is found: words that seem untouched by that edit are moved by the one that spares the others.

    Args:
        erased, instead: states of the names and of what takes their place, ``[names, width]``, fp64.
        retained: states of words that must stay, ``[words, width]``.
        empty: states of the empty prompt, ``[tokens, width]``, the start token's first.
        options: of the method.
        values: all weights that are edited, ``[out, width]``.
        generator: for the centres.

    Returns:
        Beside it, of the name that goes least, the share of its way to what takes its place: 1 is all of it.
    """
    import torch

    # The paper's numbers are for states of this size, whatever the base's is.
    unit = (erased.shape[1] / torch.cat([erased, retained]).square().sum(1).mean()) ** 0.5
    names, eye = erased * unit, torch.eye(erased.shape[1], dtype=erased.dtype, device=erased.device)
    own = names.T @ names / len(names)
    seen = (retained * unit).T @ (retained * unit) / max(len(retained), 1)
    bounds, directions = torch.linalg.eigh(seen)
    fixed = torch.cat([empty[:1], _centres(empty[1:], generator)]).T * unit
    wanted = (instead - erased) @ values.T
    found, least = torch.zeros_like(erased), -1.0
    for most in (options.null_space,) if options.null_space is not None else _BOUNDS:
        free = directions[:, bounds < most]
        free = free @ free.T
        inverse = torch.linalg.inv(own @ free + options.ridge * eye)
        inner = fixed.T @ free @ inverse @ fixed
        inner = inner + options.fixed_ridge * torch.eye(len(inner), dtype=inner.dtype, device=inner.device)
        held = eye - inverse @ fixed @ torch.linalg.solve(inner, fixed.T @ free)
        # The states' unit goes twice into what the names are multiplied by.
        reads = unit * unit * (erased / len(erased)) @ free @ held @ inverse
        went = (erased @ reads.T @ wanted * wanted).sum(1) / wanted.square().sum(1).clamp(min=1e-30)
        if float(went.min()) > least:
            found, least = reads, float(went.min())
        if least >= options.gone:
            break
    return found, least


_BOUNDS = tuple(10 ** (k / 4) for k in range(-12, 5))


def _centres(states: Tensor, generator: torch.Generator) -> Tensor:
    """k-means of the empty prompt's states, ``[3, width]``; as many as there are where there are fewer."""
    import torch

    if len(states) <= _CENTRES:
        return states
    # Padding is often one state over and over.
    picks = torch.randperm(len(states), generator=generator)[:_CENTRES].to(states.device)
    centres = states[picks]
    for _ in range(_ROUNDS):
        nearest = torch.cdist(states, centres).argmin(1)
        groups = [states[nearest == k] for k in range(_CENTRES)]
        centres = torch.stack([group.mean(0) if len(group) else centres[k] for k, group in enumerate(groups)])
    return centres


def _at_rank(reads: Tensor, writes: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """``A`` ``[rank, in]`` and ``B`` ``[out, rank]`` of their product, and the squared norm that does not fit in.

    Where there is room a name has its own row and column, of equal norm; else singular values are cut off.
    """
    import torch

    a, b, missed = reads, writes, 0.0
    if len(reads) > rank:
        u, s, vh = torch.linalg.svd(writes @ reads, full_matrices=False)
        root, missed = s[:rank].sqrt(), float(s[rank:].square().sum())
        a, b = root[:, None] * vh[:rank], u[:, :rank] * root
    else:
        even = (b.norm(dim=0) / a.norm(dim=1).clamp(min=1e-30)).sqrt()
        even = torch.where(even > 0, even, 1.0)
        a, b = a * even[:, None], b / even
    room = rank - len(a)
    return torch.cat([a, a.new_zeros(room, a.shape[1])]), torch.cat([b, b.new_zeros(len(b), room)], 1), missed
