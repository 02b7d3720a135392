"""What a method is given: pictures of each concept, its companions, and prompts to erase and to hold."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from recare_patch.careset import (
    NAMES_CONCEPT,
    CareSet,
    build_care_set,
    concept_feature,
    names_concept,
    score_concept,
)
from recare_patch.core import CareSetError, RecipeError, yaml_mapping
from recare_patch.core import show as sheets
from recare_patch.erasure.inversion import name_templates
from recare_patch.erasure.methods import ErasingContext, Instead, Needs
from recare_patch.erasure.methods.adversaries import Adversaries
from recare_patch.erasure.stages import Run, Target, first_seed
from recare_patch.erasure.states import STATES, StateSource
from recare_patch.models import PromptEmbeds
from recare_patch.recipe import Concept, Recipe

COMPOSED_BESIDE = 64
"""Words beyond the CARE-set that the concept's name is joined to, when prompts are varied."""

RELATED_WORDS = 50
"""At most so many words name a concept to S-GRACE, as published; CLIP's whole vocabulary may have more."""


def check_files(recipe: Recipe, needs: Needs, given: CareSet | None) -> None:
    """Read the files that a recipe names, so that a faulty one is told before anything is drawn.

    Args:
        recipe: of the run.
        needs: of its method.
        given: a CARE-set that goes before the recipe's.

    Raises:
        CareSetError: there is no CARE-set in its file.
        RecipeError: there are no word lists in theirs.
    """
    if needs.care_set and given is None and recipe.care_set.file:
        CareSet.load(Path(recipe.care_set.file))
    if recipe.method == "s-grace" and recipe.s_grace.words is not None:
        read_words(recipe.s_grace.words)


# ------------------------------------------------------------------------ pictures and companions


def draw_target(run: Run, target: Target) -> list[Image.Image]:
    """Draw a concept's target images; sets ``latents`` and ``shown``.

    Returns:
        The pictures.
    """
    count, seed = run.recipe.target_images.count, first_seed(run.recipe, 1, target.number)
    target.latents = run.pictures(target.stage("target images"), target.drawn_prompts, count, seed)
    images = run.base.decode_latents(target.latents)
    _check_drawn(run, target, images)
    target.shown = run.clip.image_features(images).mean(0)
    if run.keep_images and run.main:
        folder = run.work.parent / "target_images"
        folder.mkdir(exist_ok=True)
        for number, image in enumerate(images):
            sheets.save_sheet(image, folder / f"{number + target.number * count:04d}.png")
    return images


def _check_drawn(run: Run, target: Target, images: list[Image.Image]) -> None:
    score = score_concept(images, run.clip, target.concept)
    if not score.drawn:
        run.warn(
            f"the base may not draw '{target.concept.text}': {score.share:.0%} of its {len(images)} "
            f"target images look more like it than anything else (at least {score.threshold:.0%} expected)"
        )


def find_companions(run: Run, target: Target, images: list[Image.Image], given: CareSet | None) -> None:
    """Mine a concept's CARE-set, or take the one that is given; sets ``care_set``.

    Raises:
        CareSetError: no word is left, or a file holds no CARE-set.
    """
    file = run.work / f"{target.stage('care set').replace(' ', '_')}.json"
    if given is None and run.recipe.care_set.file:
        given = CareSet.load(Path(run.recipe.care_set.file))
    missing = not file.exists()
    run.wait()
    if given is not None:
        if run.main:
            given.save(file)
        run.wait()
    elif missing:
        with run.ledger.stage(target.stage("CARE-set")):
            options, seed = run.recipe.care_set, run.recipe.seed
            if run.main:
                built = build_care_set(
                    target.concept, images, run.clip, options, seed=seed, progress=run.progress
                )
                built.save(file)
            run.wait()
    found = CareSet.load(file)
    if target.attribute is not None:
        # By itself it stays: only what shows the subject loses it.
        found = found.with_added([target.attribute.text])
    unguarded = [word for word in found.words if any(names_concept(word, other) for other in target.others)]
    if set(unguarded) != set(found.words):
        found = found.with_removed(unguarded)
    elif unguarded:
        found = found.model_copy(update={"tokens": ()})
    if not found.words:
        raise CareSetError(
            f"no word of the CARE-set for '{target.concept.text}' was kept: draw more target images "
            "(--set target_images.count=…) or give a set of your own with --care-set"
        )
    target.care_set = found


# ------------------------------------------------------------------------ words and prompts


def words_around(run: Run, target: Target) -> tuple[list[str], Tensor, list[str]]:
    """CLIP's words that do not name the concept, the cosine of each with it, and those that do.

    Another name shows in the pictures: a word that the target images resemble about as much as the
    concept itself, more than half way from the best guarded word. So does one that clustering put
    among the names, unless it is farther from the concept than some guarded word ("Monet" beside
    "Van Gogh" shares its cluster, and is a neighbour that must stay). Without pictures the words
    themselves are compared. Names of the run's other concepts are in neither list.
    """
    if target.around is not None:
        return target.around
    concept, care_set = target.concept, target.care_set
    words, _ = run.clip.vocabulary()
    if target.others:
        words = [word for word in words if not any(names_concept(word, other) for other in target.others)]
    features, own = run.clip.text_features(words), concept_feature(concept, run.clip)
    cosine = features @ own
    shown = target.shown if target.shown is not None else own
    resembled, itself = features @ shown, own @ shown
    guarded = [k for k, word in enumerate(words) if care_set and word in care_set.words]
    limit = cosine[guarded].max() if guarded else cosine.median()
    halfway = (itself + (resembled[guarded].max() if guarded else resembled.median())) / 2
    named = {t.text for t in care_set.tokens if t.reason == NAMES_CONCEPT} if care_set else set()
    kept, names = [], []
    for k, word in enumerate(words):
        if names_concept(word, concept) or resembled[k] > halfway or (word in named and cosine[k] > limit):
            names.append(word)
        else:
            kept.append(k)
    target.around = [words[k] for k in kept], cosine[kept], names
    return target.around


def _guarded_prompts(concept: Concept, words: Sequence[str]) -> list[str]:
    """Prompts about the CARE-set that must not move: its retain prompts, its anchors, and plain photos."""
    forms = (concept.retain_prompt, concept.anchor_prompt, "A photo of {}".format)
    return list(dict.fromkeys(form(word) for form in forms for word in words))


def _paired_prompts(run: Run, target: Target, words: Sequence[str]) -> list[str]:
    """Guarded words beside other things: a companion is seldom alone in a prompt that people write."""
    each = run.recipe.erase.retained_pairs
    others = [word for word in words_around(run, target)[0] if word not in words]
    if not each or not others:
        return []
    generator = torch.Generator().manual_seed(run.recipe.seed + 1)
    forms = ("A {other} with {word}", "A painting of {other} and {word}", "A photo of {other} and {word}")
    prompts = []
    for word in words:
        for k, pick in enumerate(torch.randint(0, len(others), (each,), generator=generator).tolist()):
            prompts.append(forms[k % len(forms)].format(other=others[pick], word=word))
    return list(dict.fromkeys(prompts))


def _vocabulary_prompts(run: Run, target: Target) -> list[str]:
    """Prompts about everything else the base draws: the concept's neighbours, and words at random."""
    wanted = run.recipe.erase.retained_vocabulary
    concept = target.concept
    if not wanted:
        return []
    words, cosine, _ = words_around(run, target)
    generator = torch.Generator().manual_seed(run.recipe.seed)
    near = cosine.argsort(descending=True).tolist()[: wanted // 2]
    others = [k for k in torch.randperm(len(words), generator=generator).tolist() if k not in set(near)]
    prompts = []
    for k in [*near, *others][:wanted]:
        beside = words[int(torch.randint(0, len(words), (1,), generator=generator))]
        prompts += [
            f"A photo of {words[k]}",
            f"A painting of {words[k]}",
            # Prompts that people write have two things in them.
            f"A painting of {beside} in the style of {words[k]}",
            f"A photo of {beside} and {words[k]}",
        ]
        if concept.kind == "style":
            prompts.append(concept.target_prompt_for(words[k]))
    # Shuffled, because only the first of them get pictures.
    prompts = [prompts[k] for k in torch.randperm(len(prompts), generator=generator).tolist()]
    return prompts


def neighbour_prompts(run: Run, target: Target) -> list[str]:
    """Two prompts of other things near the concept, for the preview."""
    words, cosine, _ = words_around(run, target)
    guarded = target.care_set.words if target.care_set else ()
    near = [words[int(k)] for k in cosine.argsort(descending=True) if words[int(k)] not in guarded][:2]
    concept = target.concept
    return [
        concept.target_prompt_for(word) if concept.kind == "style" else f"A photo of {word}" for word in near
    ]


def _word_lists(run: Run, target: Target) -> tuple[tuple[str, ...], list[str], int]:
    """Words that name the concept; prompts that must not move; how many of these speak of the CARE-set."""
    file = run.recipe.s_grace.words if run.recipe.method == "s-grace" else None
    if file is not None:
        related, unrelated = read_words(file)
        guarded = _guarded_prompts(target.concept, unrelated)
        return related, guarded, len(guarded)
    words = target.care_set.words if target.care_set is not None else ()
    guarded = _guarded_prompts(target.concept, words)
    guarded += _paired_prompts(run, target, words) if words else []
    names = words_around(run, target)[2]
    if len(names) > RELATED_WORDS:
        cosine = run.clip.text_features(names) @ concept_feature(target.concept, run.clip)
        names = [names[k] for k in cosine.argsort(descending=True).tolist()[:RELATED_WORDS]]
    names = list(dict.fromkeys((target.concept.text, *names)))
    return tuple(names), [*guarded, *_vocabulary_prompts(run, target)], len(guarded)


def read_words(file: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The lists ``related`` and ``unrelated`` of a YAML file.

    Raises:
        RecipeError: it cannot be read, a list is missing or empty, or holds something else than words.
    """
    try:
        text = Path(file).read_text(encoding="utf-8")
    except OSError as fault:
        reason = (fault.strerror or str(fault)).lower()
        raise RecipeError(f"cannot read the word list {file}: {reason}") from None
    except ValueError:
        raise RecipeError(f"cannot read the word list {file}: it is not UTF-8 text") from None
    lists = yaml_mapping(text, source=file, noun="word list", error=RecipeError)
    unknown = [key for key in lists if key not in ("related", "unrelated")]
    if unknown:
        raise RecipeError(f"{file} has a key '{unknown[0]}': a word list has related and unrelated")
    found = []
    for key in ("related", "unrelated"):
        words = lists.get(key)
        if (
            not isinstance(words, list)
            or not words
            or not all(isinstance(w, str) and w.strip() for w in words)
        ):
            raise RecipeError(f"{file} needs a list of words under '{key}'")
        found.append(tuple(dict.fromkeys(word.strip() for word in words)))
    return found[0], found[1]


# ------------------------------------------------------------------------ the context


def prepare(
    run: Run, target: Target, needs: Needs, adversarial: Sequence[PromptEmbeds] = ()
) -> ErasingContext:
    """All that a method needs about one concept, with the adapter not yet in place.

    Args:
        run: the run.
        target: the concept, drawn and with its companions, where the method needs them.
        needs: of the method.
        adversarial: names that the search has found, a row each.
    """
    recipe, base, concept, options = run.recipe, run.base, target.concept, run.recipe.erase
    empty = base.encode_prompts([""])
    erased = [concept.target_prompt]
    if target.attribute is not None:
        erased.append(target.joined_prompt)
    names = PromptEmbeds.cat([base.encode_prompts(erased), *adversarial])
    parts: dict[str, Any] = {}
    beside: list[str] = []
    near: list[str] = []
    if needs.retained:
        related, retain, guarded = _word_lists(run, target)
        parts |= {"related": related, "retained_prompts": tuple(retain), "guarded": guarded}
        parts["retained"] = base.encode_prompts(retain) if retain else None
        if needs.retained_images and options.retained_images:
            parts |= _retained_pictures(run, target, retain, guarded)
    if needs.composed:
        words = target.care_set.words if target.care_set is not None else ()
        parts["guarded_anchors"] = len(words)
        if words:
            parts["anchors"] = base.encode_prompts([concept.anchor_prompt(word) for word in words])
        if options.composed:
            beside, near = _joined_words(run, target, words)
            parts["composed"] = base.encode_prompts([concept.composed_prompt(word) for word in beside])
            parts["anchors"] = base.encode_prompts([concept.anchor_prompt(word) for word in beside])
            if aliases := _aliases(concept, near):
                parts["aliases"] = base.encode_prompts(aliases)
    if needs.adversaries and recipe.adversary.count and target.attribute is None:
        assert target.latents is not None
        parts["adversaries"] = Adversaries(
            base, target.latents, name_templates(concept), concept.class_word, recipe.adversary
        )
    if target.latents is not None:
        source_type = STATES.get(options.states)
        assert isinstance(source_type, type)
        source: StateSource = source_type(base, target.latents, names, empty)
        parts |= {"states": source, "latents": target.latents}
    count = len(concept.name_prompts)
    parts["prompts"] = (*concept.name_prompts, *map(concept.composed_prompt, beside))
    parts["became"] = (*[f"A {concept.class_word}"] * count, *map(concept.retain_prompt, beside))
    if target.attribute is not None:
        prompts = [concept.target_prompt] * len(erased)
        prompts += [concept.composed_prompt(word) for word in beside] + (
            _aliases(concept, near) if beside else []
        )
        pair = [base.encode_prompts([one]) for one in (target.joined_prompt, concept.target_prompt)]
        parts["instead"] = Instead(base.encode_prompts(prompts), *pair)
    elif recipe.replace_with is not None:
        other = Concept(text=recipe.replace_with, kind="object" if concept.kind == "nsfw" else concept.kind)
        forms = [*other.name_prompts, *[other.target_prompt] * count][:count]
        parts["became"] = (*forms, *map(other.composed_prompt, beside))
        prompts = [other.target_prompt] * len(names)
        if beside:
            prompts += [other.composed_prompt(word) for word in beside]
            prompts += [*forms[1:], *map(other.composed_prompt, near)]
        parts["instead"] = Instead(base.encode_prompts(prompts))
    return ErasingContext(base, options, names, empty, recipe=recipe, concept=concept, **parts)


def _joined_words(run: Run, target: Target, words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Words that the erased name is joined to; and those that show in its pictures without naming it.

    The latter are no anchors, but people write them beside the name.
    """
    others, _, names = words_around(run, target)
    shuffle = torch.Generator().manual_seed(run.recipe.seed + 2)
    shuffled = [others[k] for k in torch.randperm(len(others), generator=shuffle).tolist()]
    free = [word for word in shuffled if word not in words]
    if target.attribute is not None:
        words = [word for word in words if not names_concept(word, target.attribute)]
        free = [word for word in free if not names_concept(word, target.attribute)]
    near = [word for word in names if not names_concept(word, target.concept)]
    return [*words, *free[:COMPOSED_BESIDE]], near


def _aliases(concept: Concept, near: Sequence[str]) -> list[str]:
    """Further prompts that name the concept."""
    return [*concept.name_prompts[1:], *map(concept.composed_prompt, near)]


def _retained_pictures(run: Run, target: Target, retain: Sequence[str], guarded: int) -> dict[str, Any]:
    # Of guarded prompts and of others in turn, as far as there are both.
    order = sorted(range(len(retain)), key=lambda k: (k - guarded + 0.5, k) if k >= guarded else (k, k))
    pictured = [order[i % len(order)] for i in range(run.recipe.erase.retained_images)]
    texts = [retain[k] for k in pictured]
    seed = first_seed(run.recipe, 2, target.number)
    latents = run.pictures(target.stage("retained images"), texts, len(texts), seed)
    return {"pictured": torch.tensor(pictured), "retained_latents": latents}
