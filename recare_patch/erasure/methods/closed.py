"""The closed form: values that read names as something plainer, and everything else as before.

After Li et al., "SPEED", ICLR 2026, arXiv 2503.07392: values alone, names by their last token, what every prompt has
fixed, exact at a rank a name. ``e`` are the text encoder's states of name ``k`` after other words and alone, ``t`` its
mean and ``a`` that of what takes its place. The update is ``ΔW = W (A − T) X``: one column of ``W (A − T)`` for each
name, and for each one row of ``X`` ``[names, width]``, which tells the name from everything else by least squares,

    min over X:   Σ_k w_k mean ‖X e − 1_k‖²  +  tr X S Xᵀ
    X = Y (E + S)⁻¹,   Y = Σ_k w_k 1_k mean eᵀ,   E = Σ_k w_k mean e eᵀ
    S = mean r rᵀ + mean p pᵀ + mean c cᵀ + K Kᵀ / λ + H Hᵀ / η + ρ I

with ``r`` retained words, ``p`` all places of prompts made of them, ``c`` companions, ``K`` the start token and three
centres of the empty prompt, and ``H`` the names of a patch that this one is added to. The paper forbids the directions
that retained words use most and spares no other; where names are many and the width is small, that leaves little
room, and what is left is read by prompts that no list has. Here each direction costs what prompts read of it.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, NamedTuple, Self

from pydantic import Field

from recare_patch import models
from recare_patch.core import PatchError, Settings
from recare_patch.erasure.methods import Context, Needs, SolvedMethod, at_rank, padded, weights_of
from recare_patch.patch import Named, Patch, names_of
from recare_patch.recipe import MethodInfo, Paper, concept_key

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

SAME = "read_as_names"
"""The note that names words which the base reads as one of the names, so that they cannot be retained."""

_CENTRES, _ROUNDS = 3, 20

Small = Annotated[float, Field(gt=0, le=10_000)]


class ClosedOptions(Settings):
    """The closed form's own.

    The numbers are for states whose mean square is one, which Stable Diffusion's nearly are and those of any other
    base are made to be.
    """

    gone: float = Field(0.95, gt=0, le=1, description="how much of the way each name goes, at least and on average")
    ridge: Small | None = Field(
        None,
        description="ρ, of staying near the old weights everywhere; null: of 0.00001 to 0.1 the one at which words "
        "that it was not solved for move least",
    )
    fixed_ridge: Small = Field(0.05, description="λ, by which the start token and the empty prompt may still move")
    words: int = Field(1500, ge=0, le=1500, description="the most frequent words that are retained")
    told: int = Field(20, ge=1, le=10_000, description="how many of those that it moves most training.json tells")
    instead: dict[str, Annotated[str, Field(min_length=1, max_length=200)]] = Field(
        {}, description="concept → what its names are read as, where that is not the plainest word of its kind"
    )
    hold: Annotated[str, Field(min_length=1)] | None = Field(
        None, description="a patch of the closed form on whose names this one must do nothing, so that it can be added"
    )


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
            IncompatiblePatchError: the patch that is to be held was made for a base of other shapes.
            PatchError: it has no row for each name, or has one of these already.
        """
        assert isinstance(context.recipe.own, ClosedOptions)
        self.context, self.options, base = context, context.recipe.own, context.base
        self.asked = Asked.of(context)
        self.earlier: Patch | None = None
        if self.options.hold is not None:
            self.earlier = Patch.load(self.options.hold)
            own = {concept_key(name) for name in self.asked.names}
            if there := [one.name for one in names_of(self.earlier) if concept_key(one.name) in own]:
                raise PatchError(f"patch {self.earlier.name} has the name '{there[0]}' already: nothing is to be added")
        if not context.number:  # The first of a run's concepts looks for all.
            self.check_reads(base.empty_states().shape[1])
            if self.earlier is not None:
                self.earlier.check_base(base)

    @classmethod
    def erase(cls, methods: Sequence[Self], stages: Stages) -> None:
        """One solution for all names."""
        import torch

        first, base = methods[0], methods[0].context.base
        rank, told = first.context.recipe.adapter.rank, first.options.told
        asked = [one.asked for one in methods]
        words = _retained(asked, first.options.words)

        def solve(generator: torch.Generator) -> dict[str, Tensor]:
            weights = first.weights()
            held: tuple[str, ...] = ()
            if (earlier := first.earlier) is not None:
                # What the earlier patch left is the base of this one, and its names stay there.
                held = tuple(one.name for one in names_of(earlier))
                full = {name: models.full_name(base.denoiser_name, name) for name in weights}
                there = {name: one for name, one in full.items() if one in earlier.ranks}
                weights |= {name: weights[name] + models.in_double(earlier.update(one)) for name, one in there.items()}
            found = _solved(asked, words, weights, first.options, generator, held=held)
            made: dict[str, Tensor] = {}
            missed = total = 0.0
            for name, out in found.writes.items():
                a, b, cut = _factors(found.reads, out, rank)
                made[f"{name}.A"], made[f"{name}.B"] = a.float(), b.float()
                missed, total = missed + cut, total + float((out @ found.reads).square().sum())
            left = (missed / total) ** 0.5 if total else 0.0
            figures = {WENT: found.went, FORECAST: found.moved.float(), SAME: found.same}
            return made | {RESIDUAL: torch.tensor(left)} | figures

        made = stages.once("solve", solve)
        residual, went, moved, same = (made.pop(key) for key in (RESIDUAL, WENT, FORECAST, SAME))
        logger.info("the closed form at rank %d: %.2g of its norm is left out", rank, float(residual))
        stages.note(RESIDUAL, float(residual))
        stages.note(WENT, round(float(went.min()), 4))
        # They go with the name, and are among those that move most.
        if alike := [words[k] for k in same.nonzero().flatten().tolist()]:
            stages.note(SAME, alike)
        if went.min() < 0.9 * first.options.gone:
            stages.run.warn(
                f"a name goes {float(went.min()):.0%} of its way alone: retained words leave it no more room; retain "
                "fewer (--set closed.words=…)"
            )
        # The last row is of all names together.
        most = moved[-1].argsort(descending=True)[:told].tolist()
        stages.note(FORECAST, {words[k]: round(float(moved[-1, k]), 4) for k in most})
        if not float(residual):
            stages.run.named = _told(asked, words, went, moved * (same == 0))
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
        recipe, concept = context.recipe, context.concept
        own = recipe.own.instead.get(concept.text) if isinstance(recipe.own, ClosedOptions) else None
        return cls(context, _known(context), own or recipe.replace_with or PLAIN[concept.kind])


class Solved(NamedTuple):
    """A closed form.

    Attributes:
        reads: ``X`` ``[names, width]``.
        writes: layer → ``W (A − T)`` ``[out, names]``.
        went: share of its way that each name goes, over what may stand before it, ``[names]``; 1 is all.
        moved: what the values make of each word moves by, as a share of its length: by each name's row alone, and
            by all together in the last row, ``[names + 1, words]``.
        same: words that the base reads as one of the names, ``[words]``.
    """

    reads: Tensor
    writes: dict[str, Tensor]
    went: Tensor
    moved: Tensor
    same: Tensor


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
    found = _solved(asked, words, weights_of(base, names), options, generator)
    made: dict[str, Tensor] = {}
    least = 100 * float(found.went.min())
    logger.info("training starts from the closed form, in which each name goes %.0f %% of its way or more", least)
    for name, out in found.writes.items():
        a, b = (found.reads, out) if len(found.reads) <= rank else at_rank(out @ found.reads, rank)[:2]
        made |= {f"{name}.A": a.float(), f"{name}.B": b.float()}
    return made


def _solved(
    asked: Sequence[Asked],
    words: Sequence[str],
    weights: Mapping[str, Tensor],
    options: ClosedOptions,
    generator: torch.Generator,
    held: Sequence[str] = (),
) -> Solved:
    """Read names, words and prompts, and solve; ``held`` are names that must not move."""
    import torch

    base, chance = asked[0].context.base, generator
    names = [(name, one.instead) for one in asked for name in one.names]
    concepts = [one.context.concept for one in asked]
    forms = sorted({form for one in concepts for form in _forms(one)})
    every = torch.cat(list(weights.values()))
    gram = every.T @ every
    said = base.word_states([*words, *(word for each in zip(*names, strict=True) for word in each), *held])
    retained, erased, instead, fixed_names = said.split([len(words), len(names), len(names), len(held)])
    shift = instead - erased
    same = _read_as(retained, instead, shift, gram)
    kept = [word for word, alike in zip(words, same.tolist(), strict=True) if not alike]

    def one_of(texts: Sequence[str]) -> str:
        return texts[int(torch.randint(len(texts), (1,), generator=chance))]

    def joined(number: int, last: str) -> str:
        before = forms[number % len(forms)].format(one_of(kept)) if kept else forms[number % len(forms)].split("{}")[0]
        return f"{before} {one_of(_JOINS)} {last}".replace("  ", " ")

    each = max(_LEAST_BEFORE, min(_MOST_BEFORE, _NAMES_READ // len(names)))
    beginnings = [[form.format(name) for form in forms] for name, _ in names]
    before = [one + [joined(k, name) for k in range(each)] for one, (name, _) in zip(beginnings, names, strict=True)]
    contexts = base.word_states([text for texts in before for text in texts])
    owner = torch.arange(len(names)).repeat_interleave(torch.tensor([len(texts) for texts in before]))
    # Each word in a prompt, as far as there is room, and as many prompts as there are numbers to be told apart.
    count = min(max(len(kept), every.shape[1]), _PROMPTS)
    prompts = [joined(k, kept[k % len(kept)]) for k in range(count)] if kept else list(_BEGUN)
    empty = base.empty_states()
    companions = dict.fromkeys(word for one in asked for word in one.context.companions if word in kept)
    stays = [retained[~same], base.token_states(prompts)]
    if companions:
        stays.append(retained[[words.index(word) for word in companions]])
    reads, went = solution(
        torch.cat([erased, contexts]),
        torch.cat([torch.arange(len(names)), owner]),
        shift,
        stays,
        options,
        fixed=torch.cat([empty[:1], _centres(empty[1:], generator)]),
        held=fixed_names,
        gram=gram,
    )
    models.check_finite(reads, "the numbers that the closed form gives", base.dtype)
    size = _length(retained, gram).clamp(min=1e-30)
    alone = (retained @ reads.T).abs().T * _length(shift, gram)[:, None] / size
    moved = torch.cat([alone, (_length(retained @ reads.T @ shift, gram) / size)[None]])
    return Solved(reads, {name: one @ shift.T for name, one in weights.items()}, went, moved.cpu(), same)


_JOINS = ("and", "with", "in", "at", "by", "")
_BEGUN = ("A photo", "A painting")
_LEAST_BEFORE, _MOST_BEFORE, _NAMES_READ = 2, 16, 256
"""Texts that end with a name: of each so many, and about so many in all."""
_PROMPTS = 512
"""Prompts of retained words at most; all of their places are read."""

_ALIKE = 0.9
"""The cosine above which the base reads a word as a name, both seen from what takes the name's place."""

PLAIN = {"style": "art", "object": "object", "identity": "person", "nsfw": "person"}
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


def _length(rows: Tensor, gram: Tensor) -> Tensor:
    """Length of what the values make of states, ``[rows]``; ``gram`` is ``Wᵀ W``."""
    return (rows @ gram * rows).sum(1).clamp(min=0).sqrt()


def _read_as(words: Tensor, instead: Tensor, shift: Tensor, gram: Tensor) -> Tensor:
    """Which words the base reads as one of the names, as "kitten" for "cat" in a small world.

    To retain such a word and to move its name asks for the impossible, and what is near pays for it.
    """
    import torch

    found = torch.zeros(len(words), dtype=torch.bool, device=words.device)
    for place, to in zip(instead, shift, strict=True):
        seen = words - place
        cosine = -(seen @ gram @ to) / (_length(seen, gram) * _length(to[None], gram)).clamp(min=1e-30)
        found |= cosine > _ALIKE
    return found


# Long for its arguments, which it tells.
def solution(
    states: Tensor,
    owner: Tensor,
    shift: Tensor,
    stays: Sequence[Tensor],
    options: ClosedOptions,
    *,
    fixed: Tensor,
    held: Tensor,
    gram: Tensor,
) -> tuple[Tensor, Tensor]:
    """``X`` ``[names, width]`` of the equation above, and how far each name goes, ``[names]``.

    The weight of a name that does not go far enough is raised. The ridge is found: half of what stays is held against
    the solution for the other half.

    Args:
        states: names after other words and alone, ``[states, width]``, fp64.
        owner: which name each of them ends with, ``[states]``.
        shift: ``A − T``, ``[names, width]``.
        stays: groups of states that must stay, ``[…, width]`` each, which count alike.
        options: of the method.
        fixed: what every prompt has, ``[…, width]``.
        held: names that must not move at all, ``[…, width]``; there may be none.
        gram: ``Wᵀ W`` of all weights that are edited, ``[width, width]``.
    """
    import torch

    unit = (states.shape[1] / torch.cat([states, *stays]).square().sum(1).mean()) ** 0.5
    rows, eye = states * unit, torch.eye(states.shape[1], dtype=states.dtype, device=states.device)
    is_of = torch.nn.functional.one_hot(owner, len(shift)).to(rows)
    share = is_of / is_of.sum(0)
    apart = shift @ gram @ shift.T

    def stay(groups: Sequence[Tensor]) -> Tensor:
        found = fixed.T @ fixed * unit**2 / options.fixed_ridge / len(fixed)
        found = found + held.T @ held * unit**2 * _HELD
        return found + sum((unit**2 * one.T @ one / max(len(one), 1) for one in groups), torch.zeros_like(eye))

    def solved(must: Tensor, weight: Tensor) -> Tensor:
        counts = (share @ weight)[:, None] * rows
        return (is_of.T @ counts) @ torch.linalg.inv(rows.T @ counts + must)

    def gone(reads: Tensor) -> Tensor:
        along = (rows @ reads.T @ apart)[range(len(rows)), owner] / apart.diagonal()[owner].clamp(min=1e-30)
        return share.T @ along

    weight = rows.new_full((len(shift),), _WEIGHT)
    ridge = options.ridge
    if ridge is None:
        halves = [([one[k::2] for one in stays], [one[1 - k :: 2] for one in stays]) for k in (0, 1)]
        lost = dict.fromkeys(_RIDGES, 0.0)
        for (half, others), one in itertools.product(halves, _RIDGES):
            reads = solved(stay(half) + one * eye, weight)
            for group in filter(len, others):
                moved = _length(group @ reads.T @ shift, gram) / _length(group, gram).clamp(min=1e-30)
                lost[one] += float(moved.square().mean())
        ridge = min(_RIDGES, key=lambda one: lost[one])
    must = stay(stays) + ridge * eye
    for _ in range(_RAISED):
        reads = solved(must, weight)
        if (short := gone(reads) < options.gone).logical_not().all():
            break
        weight = torch.where(short, weight * 3, weight)
    return reads * unit, gone(reads)


_RIDGES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
_WEIGHT, _RAISED = 0.1, 10
"""A name's weight against what stays, and how often it may be tripled."""
_HELD = 1e6


def _told(asked: Sequence[Asked], words: Sequence[str], went: Tensor, moved: Tensor) -> tuple[Named, ...]:
    """What is left of each name, and what its row moves most."""
    found: list[Named] = []
    for concept in asked:
        for name in concept.names:
            k = len(found)
            told = {"name": name, "concept": concept.context.concept.text, "instead": concept.instead}
            worst = {}
            if words:
                most = int(moved[k].argmax())
                worst = {"worst": words[most], "lost": round(float(moved[k, most]), 4)}
            found.append(Named(**told, left=round(1 - float(went[k]), 4), **worst))
    return tuple(found)


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
