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

import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Self

from pydantic import Field

from recare_patch import models
from recare_patch.core import Settings
from recare_patch.erasure.methods import Context, Needs, SolvedMethod, at_rank, padded, weights_of
from recare_patch.recipe import MethodInfo, Paper

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from recare_patch.erasure.stages import Stages
    from recare_patch.recipe import Concept

logger = logging.getLogger(__name__)

RESIDUAL = "rank_residual"
"""The note that says what a rank lower than the number of names leaves out."""

WENT = "names_went"
"""The note that says how much of its way the name went that went least."""

FORECAST = "moved_most"
"""The note that names the retained words that the patch moves most."""

_CENTRES, _ROUNDS = 3, 20

Small = Annotated[float, Field(gt=0, le=10_000)]


class ClosedOptions(Settings):
    """The closed form's own.

    The numbers are the paper's for states whose mean square is one, which Stable Diffusion's nearly are and those of
    any other base are made to be.
    """

    null_space: Small | None = Field(
        None,
        description="directions in which retained words' mean square is smaller may change; null: of 0.001 to 10 the "
        "one at which words that it was not solved for move least, and the names go",
    )
    gone: float = Field(0.9, gt=0, le=1, description="how much of the way each name goes then, at least")
    ridge: Small | None = Field(
        None, description="ρ, of staying near the old weights everywhere; null: the paper's 1 or 0.05, found likewise"
    )
    fixed_ridge: Small = Field(0.05, description="λ, by which the start token and the empty prompt may still move")
    words: int = Field(1500, ge=0, le=1500, description="the most frequent words that are retained")
    told: int = Field(20, ge=1, le=10_000, description="how many of those that it moves most training.json tells")


class Closed(SolvedMethod):
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
        layers=("cross-attention-v", "cross-attention-kv", "text-input"),
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
        assert isinstance(context.recipe.own, ClosedOptions)
        self.context, self.options, base = context, context.recipe.own, context.base
        self.asked = Asked.of(context)
        if not context.number:  # The first of a run's concepts looks for all.
            self.check_reads(base.empty_states().shape[1])

    @classmethod
    def erase(cls, methods: Sequence[Self], stages: Stages) -> None:
        """One solution for all names."""
        import torch

        first, base = methods[0], methods[0].context.base
        rank = first.context.recipe.adapter.rank
        asked = [one.asked for one in methods]
        words = _retained(asked, first.options.words)

        def solve(generator: torch.Generator) -> dict[str, Tensor]:
            weights = first.weights()
            reads, writes, went, retained = _solved(asked, words, weights, first.options, generator)
            made: dict[str, Tensor] = {}
            missed = total = 0.0
            moved, was = torch.zeros(2, len(words), dtype=reads.dtype).unbind()
            for name, out in writes.items():
                a, b, cut = _factors(reads, out, rank)
                made[f"{name}.A"], made[f"{name}.B"] = a.float(), b.float()
                missed, total = missed + cut, total + float((out @ reads).square().sum())
                moved += (retained @ reads.T @ out.T).square().sum(1).cpu()
                was += (retained @ weights[name].T).square().sum(1).cpu()
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
        most = share.argsort(descending=True)[: first.options.told].tolist()
        stages.note(FORECAST, {words[k]: round(float(share[k]), 4) for k in most})
        part = base.denoiser_name
        stages.set_adapter({models.full_name(part, m): (made[f"{m}.A"], made[f"{m}.B"]) for m in first.modules})


@dataclass(frozen=True)
class Asked:
    """One concept's part of a solution: what names it, and what all of these become."""

    context: Context
    names: tuple[str, ...]
    instead: str

    @classmethod
    def of(cls, context: Context) -> Asked:
        """The names of a run's concept, and its recipe's replacement or the plainest word of its kind."""
        return cls(context, _known(context), context.recipe.replace_with or _PLAIN[context.concept.kind])


def started(contexts: Sequence[Context], rank: int, generator: torch.Generator) -> dict[str, Tensor]:
    """The closed form as a start for training: ``<layer>.A`` ``[n, width]`` and ``<layer>.B`` ``[out, n]``.

    ``n`` is the number of names, at most ``rank``. Empty where no trained layer's values read the text themselves.
    """
    import torch

    first = contexts[0]
    base, options = first.base, ClosedOptions()
    trained = set(models.target_modules(base.denoiser, first.recipe.adapter.layers))
    width = base.empty_states().shape[1]

    def readable(layer: torch.nn.Module) -> bool:
        # Weights that wait elsewhere or are quantized cannot be read here.
        if not isinstance(layer, torch.nn.Linear) or layer.in_features != width:
            return False
        return not layer.weight.is_meta and layer.weight.is_floating_point()

    layers = dict(models.base_layers(base.denoiser))
    values = models.target_modules(base.denoiser, "cross-attention-v")
    names = [name for name in values if name in trained and readable(layers[name])]
    if not names:
        logger.info("no trained value of base %s reads the prompt and can be read: training starts from zero", base.id)
        return {}
    asked = [Asked.of(context) for context in contexts]
    words = _retained(asked, options.words)
    reads, writes, went, _ = _solved(asked, words, weights_of(base, names), options, generator)
    logger.info("training starts from the closed form, in which each name goes %.0f %% of its way or more", 100 * went)
    made: dict[str, Tensor] = {}
    for name, out in writes.items():
        a, b = (reads, out) if len(reads) <= rank else at_rank(out @ reads, rank)[:2]
        made |= {f"{name}.A": a.float(), f"{name}.B": b.float()}
    return made


def _solved(
    asked: Sequence[Asked],
    words: Sequence[str],
    weights: Mapping[str, Tensor],
    options: ClosedOptions,
    generator: torch.Generator,
) -> tuple[Tensor, dict[str, Tensor], float, Tensor]:
    """What the update reads ``[names, width]`` and writes by layer ``[out, names]``; how far the name went that went
    least; the words' states ``[words, width]``.
    """
    import torch

    base = asked[0].context.base
    names = [(name, one.instead) for one in asked for name in one.names]
    erased, instead = base.word_states([word for each in zip(*names, strict=True) for word in each]).chunk(2)
    # Words alone, beside what people write before them, and that by itself.
    forms = sorted({form for one in asked for form in _forms(one.context.concept)})
    beside = [forms[k % len(forms)].format(word) for k, word in enumerate(words)]
    whole = [f"{one} and {other}" for one, other in zip(beside[:_WHOLE], reversed(words), strict=False)]
    begun = [form.removesuffix("{}").strip() for form in forms]
    retained, empty = base.word_states([*words, *beside, *begun]), base.empty_states()
    seen = base.prompt_states(whole or [""])[:, 1:].flatten(0, 1)
    every = torch.cat(list(weights.values()))
    reads, went = solution(erased, instead, retained, empty, options, values=every, beside=seen, generator=generator)
    models.check_finite(reads, "the numbers that the closed form gives", base.dtype)
    return (
        reads,
        {name: weight @ (instead - erased).T for name, weight in weights.items()},
        went,
        retained[: len(words)],
    )


_WHOLE = 24
"""Whole prompts that are looked at."""

_PLAIN = {"style": "art", "object": "object", "identity": "person", "nsfw": "person"}
"""What a name becomes, as published."""


def _known(context: Context) -> tuple[str, ...]:
    """The concept's names; of those that nobody gave, the ones whose words the base has whole.

    What it reads in pieces that it never met together is no name to it, and to move it takes what else is near.
    """
    base, given = context.base, (context.concept.text, *context.concept.aliases)
    names = context.concept.bare_names
    whole = tuple(name for name in names if len(base.token_ids(name)) <= len(name.split()))
    return whole if whole and len(names) > len(given) else names


def _forms(concept: Concept) -> tuple[str, ...]:
    """Beginnings of prompts in which a retained word stands."""
    return tuple(dict.fromkeys((concept.retain_prompt("{}"), concept.target_prompt_for("{}"), "A photo of {}")))


def _retained(asked: Sequence[Asked], most: int) -> list[str]:
    """Words that name none of the run's concepts: companions, neighbours, and ``most`` of what people say most."""
    found = [word for one in asked for word in (*one.context.companions, *one.context.neighbours)]
    found += [word for one in asked for word in one.context.words[:most]]
    return list(dict.fromkeys(found))


def solution(
    erased: Tensor,
    instead: Tensor,
    retained: Tensor,
    empty: Tensor,
    options: ClosedOptions,
    *,
    values: Tensor,
    beside: Tensor,
    generator: torch.Generator,
) -> tuple[Tensor, float]:
    """What the update reads, ``[names, width]``: ``ΔW = W (instead − erased)ᵀ @ this``; and how far names go.

    The paper retains the words that an edit without any would move more than most, at one bound of the null space.
    Here all are retained, and bound and ridge are found: each half of the words, and whole prompts, are held against
    the solution for the other half. A small bound spares what it was told and moves what it was not, since an update
    with little room is a large one.

    Args:
        erased, instead: states of the names and of what takes their place, ``[names, width]``, fp64.
        retained: states of words that must stay, ``[words, width]``.
        empty: states of the empty prompt, ``[tokens, width]``, the start token's first.
        options: of the method.
        values: all weights that are edited, ``[out, width]``.
        beside: states of whole prompts without the names, ``[tokens, width]``: looked at and not solved for.
        generator: for the centres.

    Returns:
        Beside it, of the name that goes least, the share of its way to what takes its place: 1 is all of it.
    """
    import torch

    # The paper's numbers are for states of this size, whatever the base's is.
    unit = (erased.shape[1] / torch.cat([erased, retained]).square().sum(1).mean()) ** 0.5
    names, eye = erased * unit, torch.eye(erased.shape[1], dtype=erased.dtype, device=erased.device)
    own = names.T @ names / len(names)
    fixed = torch.cat([empty[:1], _centres(empty[1:], generator)]).T * unit
    wanted = (instead - erased) @ values.T

    def spared(rows: Tensor) -> tuple[Tensor, Tensor]:
        sizes, directions = torch.linalg.eigh((rows * unit).T @ (rows * unit) / max(len(rows), 1))
        return sizes, directions

    def solved(room: tuple[Tensor, Tensor], bound: float, ridge: float) -> Tensor:
        free = room[1][:, room[0] < bound]
        free = free @ free.T
        inverse = torch.linalg.inv(own @ free + ridge * eye)
        inner = fixed.T @ free @ inverse @ fixed
        inner = inner + options.fixed_ridge * torch.eye(len(inner), dtype=inner.dtype, device=inner.device)
        held = eye - inverse @ fixed @ torch.linalg.solve(inner, fixed.T @ free)
        # The states' unit goes twice into what the names are multiplied by.
        return unit * unit * (erased / len(erased)) @ free @ held @ inverse

    def went(reads: Tensor) -> float:
        along = (erased @ reads.T @ wanted * wanted).sum(1) / wanted.square().sum(1).clamp(min=1e-30)
        return float(along.min())

    bounds = _BOUNDS if options.null_space is None else (options.null_space,)
    ridges = _RIDGES if options.ridge is None else (options.ridge,)
    bound, ridge = bounds[0], ridges[0]
    if len(bounds) * len(ridges) > 1:
        halves = []
        for k in (0, 1):
            others = torch.cat([retained[1 - k :: 2], beside])
            halves.append((spared(retained[k::2]), others, (others @ values.T).square().sum(1).clamp(min=1e-30)))
        tried: list[tuple[bool, float, float, float]] = []
        for one, held in itertools.product(bounds, ridges):
            moved, least = 0.0, 1.0
            for room, others, said in halves:
                reads = solved(room, one, held)
                least = min(least, went(reads))
                moved += float(((others @ reads.T @ wanted).square().sum(1) / said).mean())
            # Among those at which the names go what moves least; else that at which they go farthest.
            tried.append((least < options.gone, moved if least >= options.gone else -least, one, held))
        bound, ridge = min(tried)[2:]
    reads = solved(spared(retained), bound, ridge)
    return reads, went(reads)


_RIDGES = (0.05, 1.0)
_BOUNDS = tuple(10 ** (k / 2) for k in range(-6, 3))


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


def _factors(reads: Tensor, writes: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """``A`` and ``B`` of their product, see :func:`at_rank`.

    Where there is room a name has its own row and column, of equal norm, and nothing is cut off.
    """
    import torch

    if len(reads) > rank:
        return at_rank(writes @ reads, rank)
    even = (writes.norm(dim=0) / reads.norm(dim=1).clamp(min=1e-30)).sqrt()
    even = torch.where(even > 0, even, 1.0)
    return *padded(reads * even[:, None], writes / even, rank), 0.0
