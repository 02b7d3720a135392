"""What a run will cost, before it is run: denoiser evaluations exactly, memory and time as estimates.

What each stage asks of the base at its worst moment is told here, and what that takes by :mod:`models.footprint`.
"""

from __future__ import annotations

import math
import time
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from recare_patch.careset import ASKED_AT, MOST_ASKED, OTHER_STEPS, OTHERS, PROPOSED, clip_bytes, default_clip
from recare_patch.core import RecipeError
from recare_patch.erasure.gauge import LOOKED_AT, PICTURES, STATES, look_evaluations, picture_evaluations
from recare_patch.erasure.methods import LossMethod, Work
from recare_patch.erasure.preflight import check_files, check_names, tokenizer_of
from recare_patch.erasure.prepare import JOINED, RELATED_WORDS
from recare_patch.erasure.stages import earlier_patch, stage_name
from recare_patch.models import (
    PRECISIONS,
    TEXT_ROOM,
    Load,
    family_of,
    find_layout,
    first_fit,
    lever_sets,
    measure,
    peak,
    phantom,
    scheduled,
)
from recare_patch.recipe import METHODS, Recipe

if TYPE_CHECKING:
    from recare_patch.models import Footprint, Layout

UTILIZATION = 0.4
"""Share of a large matrix product's speed that a denoiser reaches; an assumption."""

KIND, KIND_PICTURES, KIND_STEPS, KIND_BATCH = "kind", 4, 10, 4
"""The stage that sees a concept's kind in pictures: as many of each of three kinds' prompts, in so many steps, so many
together."""

ENCODING = "encoding"
"""The prompts of a method, read by the text encoders."""

PREPARING = (KIND, "other pictures", "target images", "CARE-set")
"""The stages that find a CARE-set."""

_MINED = 50
"""Companions that the published mining may find, where nothing bounds them."""


def evaluations(recipe: Recipe, sampler_steps: int | None = None) -> dict[str, int]:
    """Denoiser evaluations of every stage, as ``training.json`` will count them.

    What may end early, or ask about fewer words, is counted at its most; ``sampler_steps`` is how often the base's
    scheduler calls the denoiser for a picture, by default as often as the recipe has steps.

    Raises:
        RecipeError: the source of states costs what cannot be told in advance.
    """
    return {stage: work.evaluations for stage, work in _works(recipe, sampler_steps).items() if work.evaluations}


def _works(recipe: Recipe, sampler_steps: int | None = None, *, guessed: bool = False) -> dict[str, Work]:
    """What every stage asks of the base."""
    if recipe.erase.states == "rollout":
        raise RecipeError("what the states 'rollout' will cost is not known before a run: they stop at random")
    method, images = METHODS.get(recipe.method), recipe.target_images
    each, batch = 2 if images.guidance_scale > 1 else 1, images.batch_size
    picture = (sampler_steps or images.steps) * each
    found: dict[str, Work] = {}
    if guessed:
        found[KIND] = Work(3 * KIND_PICTURES * KIND_STEPS * 2, pictures=KIND_BATCH)
    confirmed = _confirmed(recipe)
    if confirmed or (method.needs.care_set and _measured(recipe)):
        found["other pictures"] = Work(OTHERS * min(images.steps, OTHER_STEPS) * each, pictures=batch)
    for number in range(len(recipe.concepts)):
        if confirmed:
            found[stage_name("CARE-set", number)] = Work(MOST_ASKED, predicted=ASKED_AT)
        if method.needs.target_images:
            found[stage_name("target images", number)] = Work(images.count * picture, pictures=batch)
        if method.needs.retained_images:
            count = recipe.erase.retained_images
            found[stage_name("retained images", number)] = Work(count * picture, pictures=batch)
    found |= method.work(recipe)
    if _measured(recipe):
        one, plain = found["erase"], recipe.subject is None and recipe.replace_with is None
        seen = plain and method.needs.care_set and ends_early(recipe)
        looks = one.evaluations + look_evaluations(recipe, words=_held_words(recipe), pictures=seen)
        drawn = min(batch, PICTURES * len(recipe.concepts)) if seen else 0
        found |= dict.fromkeys(LOOKED_AT if seen else (), Work(picture_evaluations(recipe), pictures=batch))
        found["erase"] = replace(one, evaluations=looks, predicted=max(one.predicted, STATES), pictures=drawn)
    found = {stage: work for stage, work in found.items() if work.evaluations or work.reads}
    return found | {"preview": Work(0, pictures=batch)}


def _loads(found: Footprint, recipe: Recipe, works: Mapping[str, Work]) -> dict[str, Load]:
    """What every stage asks of a device: encoding beside those of :func:`_works`, before the method's own."""
    images, erase, count = recipe.target_images, recipe.erase, len(recipe.concepts)
    needs, own = METHODS.get(recipe.method).needs, METHODS.get(recipe.method).work(recipe)
    latents = count * (images.count * needs.target_images + erase.retained_images * needs.retained_images)
    looks = clip_bytes(recipe.clip or default_clip(recipe.base))
    pictures, (retained, others) = latents * found.latent, _prompts(recipe)
    texts = count * (retained + others) * found.row
    # fp32 weights and gradients, and two moments of one or four bytes each; an adversary has those too.
    adapter = found.adapter * (8 + (2 if erase.optimizer == "adamw8bit" else 8))
    adapter += recipe.adversary.count * found.row * 16 // found.size
    loads = {}
    for stage, work in works.items():
        if (stage in own or stage == "preview") and ENCODING not in loads:
            table = retained or others
            loads[ENCODING] = Load(encoded=table, looks=looks, held=pictures + texts - table * found.row)
        held = pictures + (texts + adapter if stage in own or stage == "preview" else 0)
        guided = images.guidance_scale > 1 or stage == KIND
        rows = {"trained": work.trained, "predicted": work.predicted, "reads": int(work.reads)}
        loads[stage] = Load(pictures=work.pictures, guided=guided, held=held, looks=looks, **rows)
    return loads


def _prompts(recipe: Recipe) -> tuple[int, int]:
    """Prompts of one concept whose embeddings a run keeps, at most: of what is retained, and of what is erased."""
    needs, erase, words = METHODS.get(recipe.method).needs, recipe.erase, _held_words(recipe)
    each = 5 if recipe.concept.kind == "style" else 4
    retained = words * (3 + erase.retained_pairs) + erase.retained_vocabulary * each if needs.retained else 0
    # Prompts that join the name to words, their anchors, and all of them again beside the names.
    beside = recipe.concept.composed_forms * (words + JOINED)
    joined = 3 * beside + 2 * RELATED_WORDS if needs.joined and erase.composed else 0
    return retained, joined + len(recipe.concept.name_prompts) + 2 * PICTURES


def _held_words(recipe: Recipe) -> int:
    """Words that a run guards of each concept, at most: what a person is comes on top of those it is asked about."""
    if not METHODS.get(recipe.method).needs.care_set:
        return 0
    return PROPOSED + 1 if _confirmed(recipe) else recipe.care_set.keep or _MINED


def _confirmed(recipe: Recipe) -> bool:
    """Whether the base is asked about companions."""
    options = recipe.care_set
    return METHODS.get(recipe.method).needs.care_set and options.source == "base" and options.file is None


def _measured(recipe: Recipe) -> bool:
    """Whether the run measures itself: what has one loss is trained in the one loop that can."""
    return recipe.erase.ends == "measured" and issubclass(METHODS.get(recipe.method), LossMethod)


def ends_early(recipe: Recipe) -> bool:
    """Whether the run may end before its last step: beside adversaries it takes all of them, whatever it measures."""
    return _measured(recipe) and not recipe.adversary.count


def is_exact(recipe: Recipe) -> bool:
    """Whether a run takes all of :func:`evaluations`: nothing in it ends early, or asks about fewer words."""
    return recipe.search.patience is None and not _confirmed(recipe) and not ends_early(recipe)


def _measured_base(layout: Layout, recipe: Recipe) -> Footprint:
    """What a recipe's base takes, once all is refused that a run would refuse before it draws."""
    family_of(layout).check(layout, weights=False)
    check_files(recipe)
    if any((layout.folder / "tokenizer" / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        check_names(recipe, tokenizer_of(layout), layout.name.strip("'"))
    if recipe.continue_from is not None:
        earlier_patch(recipe, phantom(layout, recipe.precision, recipe.memory), weights=False)
    return measure(layout, recipe)


@dataclass(frozen=True)
class PlannedStage:
    """One stage of a run, called as in ``training.json``."""

    name: str
    evaluations: int  # exactly; of an inversion that may end early, at most
    seconds: float  # expected
    peak: int  # bytes on the device at the worst moment, expected


@dataclass(frozen=True)
class Plan:
    """What a run is expected to take."""

    stages: tuple[PlannedStage, ...]
    footprint: Footprint
    speed: float  # floating-point operations a second that the times assume
    patch_bytes: int  # of its tensors in fp16

    @property
    def peak(self) -> int:
        """Bytes at the worst moment of all stages."""
        return max(stage.peak for stage in self.stages)

    @property
    def seconds(self) -> float:
        """Of all stages together."""
        return sum(stage.seconds for stage in self.stages)


def plan(recipe: Recipe, *, speed: float, footprint: Footprint | None = None, guessed: bool = False) -> Plan:
    """Plan a run on a device of a ``speed`` in floating-point operations a second; see :func:`measured_speed`.

    ``guessed`` says that the concept's kind is still to be seen in pictures.

    Raises:
        BaseModelError: the base is not found, or of no supported family.
        RecipeError: see :func:`evaluations`.
    """
    layout, _ = find_layout(recipe.base, weights=False)
    found = footprint or _measured_base(layout, recipe)
    works = _works(recipe, _sampler_steps(layout, recipe), guessed=guessed)
    stages = []
    for stage, load in _loads(found, recipe, works).items():
        # A text encoder multiplies each of its weights once for every token.
        encoding = 2 * found.encoders / found.size * load.encoded * (TEXT_ROOM + 2) / speed
        work = works.get(stage, Work(0))
        seconds = _seconds(found, recipe, work, speed) + encoding
        stages.append(PlannedStage(stage, work.evaluations, seconds, peak(found, recipe.memory, load)))
    return Plan(tuple(stages), found, speed, 2 * found.adapter)


def _sampler_steps(layout: Layout, recipe: Recipe) -> int:
    """How often a picture's sampler calls the denoiser."""
    import diffusers

    kind, images = getattr(diffusers, layout.index["scheduler"][1]), recipe.target_images
    holder = types.SimpleNamespace(scheduler=kind.from_config(layout.require("scheduler", weights=False)))
    with scheduled(holder, images.scheduler):
        # How far its timesteps are shifted does not change their number.
        shifted = {"mu": 1.0} if holder.scheduler.config.get("use_dynamic_shifting") else {}
        holder.scheduler.set_timesteps(images.steps, **shifted)
        return len(holder.scheduler.timesteps)


def _seconds(found: Footprint, recipe: Recipe, work: Work, speed: float) -> float:
    memory = recipe.memory
    # Of a training sample's three evaluations one is a forward pass, which each of these repeats.
    repeated = memory.checkpointing + (memory.micro_batch is not None)
    training = 0.75 if work.trained else 0.0
    return work.evaluations * found.operations * (1 + training * repeated / 3) / speed


def choose(
    recipe: Recipe,
    gigabytes: float,
    *,
    guessed: bool = False,
    only: Sequence[str] = (),
    footprint: Footprint | None = None,
) -> tuple[Recipe, Footprint]:
    """The recipe with the fastest set of levers that is expected to fit a card, and what its base takes.

    Args:
        recipe: of the run; levers that it sets already stay, its micro batch as the largest.
        gigabytes: GB (10⁹ bytes) of the card's memory, of which a part is filled; see :func:`first_fit`.
        guessed: whether the concept's kind is still to be seen in pictures.
        only: stages that must fit; none said: all.
        footprint: of its base, where it is known already.

    Raises:
        BaseModelError: the base is not found, or of no supported family.
        RecipeError: nothing fits.
    """
    half = recipe if recipe.precision != "fp32" else recipe.with_overrides({"precision": "bf16"})
    found = footprint or _measured_base(find_layout(half.base, weights=False)[0], half)
    works = _works(half, guessed=guessed)
    loads = [load for stage, load in _loads(found, half, works).items() if not only or stage in only]
    sets = lever_sets(half.memory)
    memory = first_fit(half.base, sets, lambda one: max(peak(found, one, load) for load in loads), gigabytes)
    return half.with_overrides({"memory": memory.model_dump()}), found


def measured_speed(device: torch.device, precision: str) -> float:
    """Operations a second to expect here: :data:`UTILIZATION` of what a large matrix product reaches."""
    size = 8192 if device.type == "cuda" else 1024
    factor = torch.ones((size, size), device=device, dtype=PRECISIONS[precision])
    best = math.inf
    for _ in range(4):
        began = time.perf_counter()
        factor @ factor
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    return float(UTILIZATION * 2 * size**3 / best)
