"""What a method is given: pictures of each concept, its companions, and prompts to erase and to hold."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from recare_patch.careset import (
    NAMES_CONCEPT,
    OTHER_PROMPTS,
    OTHER_STEPS,
    OTHERS,
    CareSet,
    build_care_set,
    concept_feature,
    is_about_minors,
    is_barred,
    known_names,
    known_styles,
    known_words,
    margins,
    score_concept,
    spoken,
)
from recare_patch.core import CareSetError, keep_json, kept_json, load_json, save_sheet, told_at
from recare_patch.erasure.gauge import LOOKED_AT, PICTURE_STEPS, PICTURES
from recare_patch.erasure.methods import Context, ErasedPrompts, Method, RetainedPrompts
from recare_patch.erasure.stages import Run, stage_name
from recare_patch.recipe import Concept, Recipe, names_concept

if TYPE_CHECKING:
    from PIL.Image import Image

JOINED = 64
"""Words beyond the CARE-set that the concept's name is joined to, when prompts are varied."""

RELATED_WORDS = 50
"""At most so many words name a concept, as S-GRACE has published; CLIP's whole vocabulary may have more."""

_NEAREST = 24
"""Words near a concept that its neighbours in the preview are taken from: some of them may say nothing to CLIP."""

_MOST_WORDS, _MOST_NAMES = 1500, 250
"""Of things, and of people and places, the most frequent."""

_SEED_STRIDE = 1_000_003
_BLOCKS = 10
"""Blocks of seeds that a concept may use."""


def first_seed(recipe: Recipe, block: int, number: int = 0) -> int:
    """The first seed of a block (1 to 9) of pictures: apart from those of other blocks, concepts and runs."""
    return (recipe.seed * _SEED_STRIDE + (block + _BLOCKS * number) * 100_000) % 2**31


_PLAINEST = (
    *("A photo", "A painting", "A photo of a person", "A painting of a house", "A photo of a tree"),
    *("A painting of a person", "A photo of a house", "A photo of a street"),
)


@dataclass
class Target:
    """One concept of a run, and what is found out about it.

    Attributes:
        concept: whose prompts are erased: the recipe's, or the subject that an attribute is taken from.
        number: of the concept in the run, from 0.
        attribute: what is taken from it; None: it goes altogether.
        others: the run's other concepts, which nothing may guard.
        latents: clean latents of its target images, ``[images, c, h, w]``.
        shown: mean CLIP feature of the target images, ``[width]``; None where none are drawn.
        care_set: its companions, where the method needs them.
        around: what :meth:`words_around` found: a large vocabulary takes a while to encode.
        seen_by_clip: whether CLIP sees it in its target images.
        images: some of these, for CLIP to compare with.
        level: the margin above which a picture shows it, see :func:`sees`.
    """

    run: Run
    concept: Concept
    number: int
    attribute: Concept | None
    others: tuple[Concept, ...]
    latents: Tensor
    shown: Tensor | None = None
    care_set: CareSet | None = None
    around: tuple[list[str], Tensor, list[str]] | None = None
    seen_by_clip: bool = False
    images: Sequence[Image] = ()
    level: float | None = None

    @property
    def asked(self) -> str:
        """The prompt that is erased first: with the attribute, where one is taken away."""
        if self.attribute is None:
            return self.concept.target_prompt
        return self.concept.composed_prompt(self.attribute.text)

    @property
    def care_words(self) -> tuple[str, ...]:
        """Its companions; none without a CARE-set."""
        return self.care_set.words if self.care_set is not None else ()

    @property
    def held_words(self) -> tuple[str, ...]:
        """The guarded words and those that may belong to the concept too."""
        doubtful = self.care_set.doubtful if self.care_set is not None else ()
        return (*self.care_words, *(word for word in doubtful if not any(is_barred(word, one) for one in self.others)))

    def words_around(self) -> tuple[list[str], Tensor, list[str]]:
        """Words that do not name the concept, the cosine of each with it, and words that do.

        The base has told another name from a companion where it was asked. Of the words that it was not asked about,
        those are names that the target images resemble about as much as the concept itself, more than half way from
        the best guarded word; without pictures the words themselves are compared. Names of the run's other concepts
        are in neither list, nor is anything that a run of an unsafe concept never says.
        """
        if self.around is not None:
            return self.around
        concept, clip = self.concept, self.run.clip
        things, manners = known_words(clip), {style.casefold() for style in known_styles(clip)}
        words = list(dict.fromkeys([*things, *(word for word in known_names(clip) if word not in manners)]))
        words = [word for word in words if not any(names_concept(word, other) for other in self.others)]
        features, own = clip.text_features(words), concept_feature(concept, clip)
        cosine = features @ own
        shown = self.shown if self.shown is not None else own
        resembled, itself = features @ shown, own @ shown
        guarded = [k for k, word in enumerate(words) if word in self.care_words]
        halfway = (itself + (resembled[guarded].max() if guarded else resembled.median())) / 2
        tokens = self.care_set.tokens if self.care_set is not None else ()
        said = {token.text: token.reason == NAMES_CONCEPT for token in tokens}
        kept, names, are_things = [], [], set(things)
        for k, word in enumerate(words):
            if said.get(word, names_concept(word, concept) or bool(resembled[k] > halfway)):
                names.append(k)
            elif word in are_things and not any(is_barred(word, one) for one in (concept, *self.others)):
                kept.append(k)
        names = [k for k in names if not is_about_minors(words[k])]
        # Pictures in which CLIP sees little bring thousands; each would be a prompt that is kept encoded.
        sure = {k for k in names if said.get(words[k]) or names_concept(words[k], concept)}
        nearest = set(sorted(names, key=lambda k: (k not in sure, -float(resembled[k])))[:RELATED_WORDS])
        self.around = [words[k] for k in kept], cosine[kept], [words[k] for k in names if k in nearest]
        return self.around

    def styles_around(self) -> list[str]:
        """Manners that pictures are made in and that none of the run's concepts names, the nearest first."""
        found = known_styles(self.run.clip, but=(self.concept, *self.others))
        if not found:
            return []
        cosine = self.run.clip.text_features(found) @ concept_feature(self.concept, self.run.clip)
        return [found[k] for k in cosine.argsort(descending=True).tolist()]


def targets_of(run: Run) -> list[Target]:
    """The concepts of a run, nothing found out about them yet."""
    recipe, none = run.recipe, torch.empty((0, *run.base.latent_shape), device=run.base.device)
    concepts = (recipe.subject or recipe.concept, *recipe.also)
    attribute = recipe.concept if recipe.subject is not None else None
    return [
        Target(run, one, k, attribute, tuple(other for other in concepts if other is not one), none)
        for k, one in enumerate(concepts)
    ]


def draw_target(target: Target) -> list[Image]:
    """Draw a concept's target images; sets ``latents`` and ``shown``, and returns the pictures."""
    run, concept = target.run, target.concept
    count, seed = run.recipe.target_images.count, first_seed(run.recipe, 1, target.number)
    prompts = [target.asked, concept.target_prompt] if target.attribute is not None else [target.asked]
    stage = stage_name("target images", target.number)
    target.latents = run.pictures(stage, prompts, count, seed)
    with told_at(stage):
        images = run.base.decode_latents(target.latents)
    score = score_concept(images, run.clip, concept)
    target.seen_by_clip, target.images = score.drawn, images[:PICTURES]
    if not score.drawn:
        run.warn(
            f"the base may not draw '{concept.text}': {score.share:.0%} of its {len(images)} "
            f"target images look more like it than anything else (at least {score.threshold:.0%} expected)"
        )
    target.shown = run.clip.image_features(images).mean(0)
    if run.keep_images and run.main:
        folder = run.work.parent / "target_images"
        folder.mkdir(exist_ok=True)
        for number, image in enumerate(images):
            save_sheet(image, folder / f"{number + target.number * count:04d}.png")
    return images


def find_companions(target: Target, images: Sequence[Image], given: CareSet | None) -> None:
    """Mine a concept's CARE-set from its pictures, or take the one that is given; sets ``care_set``.

    Raises:
        CareSetError: no word is left, or a file holds no CARE-set.
    """
    run, options = target.run, target.run.recipe.care_set
    stage = stage_name("care set", target.number).replace(" ", "_")
    file = run.work / f"{stage}.json"
    if given is None and options.file:
        given = CareSet.load(Path(options.file))
    kept = kept_json(file, remade=True)
    run.wait()
    # A resumed run has them too: by them it tells later what it sees in pictures.
    others = _other_pictures(run) if given is None and options.source == "base" else []
    booked = stage_name("CARE-set", target.number)
    if given is not None:
        if run.main:
            keep_json(file, {"set": load_json(given.to_json()), "cost": "{}"})
        run.wait()
    elif kept is not None:
        run.ledger.book(booked, kept["cost"])
    else:
        with run.ledger.stage(booked):
            built = build_care_set(
                target.concept,
                images,
                run.clip,
                options,
                base=run.base,
                latents=target.latents,
                others=others,
                seed=run.recipe.seed,
                progress=run.progress,
            )
            if run.main:
                keep_json(file, {"set": load_json(built.to_json()), "cost": run.ledger.told()})
            run.wait()
    found = CareSet.from_json(json.dumps(kept_json(file)["set"]))
    if target.attribute is not None:
        # By itself it stays: only what shows the subject loses it.
        found = found.with_added([target.attribute.text])
    unguarded = [word for word in found.words if any(is_barred(word, one) for one in target.others)]
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


def _other_pictures(run: Run) -> list[Image]:
    """Pictures of the plainest other things, once a run: what a companion must not be seen in as often."""
    if run.others:
        return run.others
    latents = run.pictures("other pictures", OTHER_PROMPTS, OTHERS, first_seed(run.recipe, 3), steps=OTHER_STEPS)
    with told_at("other pictures"):
        run.others = run.base.decode_latents(latents)
    return run.others


def looker(targets: Sequence[Target]) -> Callable[[], float] | None:
    """What draws a few pictures of the concepts as the model stands, and tells in what share CLIP still sees one.

    None where CLIP does not see the concepts in the base's own pictures: it would see nothing in any.
    """
    run = targets[0].run
    goes = run.recipe.replace_with is None
    looked_at = [one for one in targets if goes and one.attribute is None and one.seen_by_clip]
    if not looked_at:
        return None
    _other_pictures(run)
    pairs = [pair for target in looked_at for pair in _looked_at(target)]
    texts, bare = zip(*pairs, strict=True)
    seed, shown = first_seed(run.recipe, 4), []
    for stage, prompts in zip(LOOKED_AT, (texts, bare), strict=True):
        latents = run.pictures(stage, prompts, len(prompts), seed, steps=PICTURE_STEPS)
        with told_at(stage):
            shown.append(_margins_in_turn(looked_at, run.base.decode_latents(latents)))
    # Each picture is its own measure: half way from what the prompt draws without the name to what it draws with it.
    halfway, tells = (shown[0] + shown[1]) / 2, shown[0] > shown[1]
    own, seeds = run.base.encode_prompts(list(texts)), [seed + k for k in range(len(texts))]

    def still_seen() -> float:
        images = run.base.decode_latents(run.sampled(own, seeds, steps=PICTURE_STEPS))
        count = int(((_margins_in_turn(looked_at, images) > halfway) & tells).sum())
        # One picture may be taken for what it is not.
        return count / len(texts) if count > len(looked_at) else 0.0

    return still_seen


def _margins_in_turn(targets: Sequence[Target], images: Sequence[Image]) -> Tensor:
    """Of :data:`PICTURES` pictures for each target in turn, by how much CLIP sees it in them."""
    parts = (images[k * PICTURES : (k + 1) * PICTURES] for k in range(len(targets)))
    return torch.cat([_margins(target, part) for target, part in zip(targets, parts, strict=True)])


def _margins(target: Target, images: Sequence[Image]) -> Tensor:
    """By how much CLIP sees a concept in each picture rather than a plain thing, ``[pictures]``."""
    return margins(images, target.run.clip, target.concept.name_prompts, plain_rivals(target.concept.text))


def _looked_at(target: Target) -> list[tuple[str, str]]:
    """Prompts that a run looks at, and each without the name: in two thirds it stands deep among other things.

    A name goes first where it stands alone; a run that looked there alone would end while people's own sentences
    still bring the concept back.
    """
    concept, (around, _, _) = target.concept, target.words_around()
    plain = [(prompt, concept.plain_prompt) for prompt in concept.name_prompts[: PICTURES // 3]]
    words = [word for pair in itertools.zip_longest(target.care_words, around[:PICTURES]) for word in pair if word]
    pairs = [f"{words[k % len(words)]} and {words[(k + 1) % len(words)]}" for k in range(PICTURES)] if words else []
    forms = [(pair, k % concept.composed_forms) for k, pair in enumerate(pairs)]
    deep = [(concept.composed_prompt(*form), concept.without_name(*form)) for form in forms]
    prompts = [*plain, *deep][:PICTURES]
    return [prompts[k % len(prompts)] for k in range(PICTURES)]


def sees(target: Target, images: Sequence[Image]) -> list[bool]:
    """Whether CLIP sees a concept in each picture: more of it than half way from other pictures to its own."""
    if target.level is None:
        ends = [_margins(target, some) for some in (target.images, target.run.others)]
        target.level = float(sum(one.mean() for one in ends)) / 2 if all(map(len, ends)) else 0.0
    return [bool(one > target.level) for one in _margins(target, images)]


def plain_rivals(named: str) -> list[str]:
    """Prompts of the plainest things, but not of the one that is named: what a picture of it is not taken for."""
    return [prompt for prompt in _PLAINEST if prompt.split()[-1] != named.casefold()]


def neighbour_prompts(target: Target) -> list[str]:
    """Two prompts of other things of the concept's kind, near it, for the preview."""
    if target.concept.kind == "style" and (styles := target.styles_around()):
        return [target.concept.target_prompt_for(style) for style in styles[:2]]
    words, cosine, _ = target.words_around()
    order = [words[int(k)] for k in cosine.argsort(descending=True)]
    prompts = [f"A photo of {word}" for word in order if word not in target.care_words][:_NEAREST]
    said = spoken(target.run.clip, "A photo", prompts)
    return [prompt for prompt, said_anything in zip(prompts, said, strict=True) if said_anything][:2]


def prepare(target: Target, method: type[Method]) -> Context:
    """All that a method needs about one concept, which is drawn and has its companions, where it needs them."""
    run, needs = target.run, method.needs
    texts, guarded, related = _retained_texts(target, method) if needs.retained else ([], 0, ())
    pictured: list[int] = []
    latents = torch.empty((0, *run.base.latent_shape), device=run.base.device)
    if needs.retained_images and run.recipe.erase.retained_images:
        # Of guarded prompts and of others in turn, as far as there are both.
        order = sorted(range(len(texts)), key=lambda k: (k - guarded + 0.5, k) if k >= guarded else (k, k))
        pictured = [order[i % len(order)] for i in range(run.recipe.erase.retained_images)]
        stage, seed = stage_name("retained images", target.number), first_seed(run.recipe, 2, target.number)
        latents = run.pictures(stage, [texts[k] for k in pictured], len(pictured), seed)
    return Context(
        base=run.base,
        recipe=run.recipe,
        concept=target.concept,
        number=target.number,
        latents=target.latents,
        erased=_erased_prompts(target, joins=needs.joined),
        retained=RetainedPrompts(tuple(texts), guarded, latents, torch.tensor(pictured, dtype=torch.long)),
        related=related,
        companions=target.held_words,
        **(_language(target) if needs.words or run.recipe.erase.start == "closed" else {}),
    )


def _language(target: Target) -> dict[str, tuple[str, ...]]:
    """What people say, without what names one of the run's concepts or is barred beside it."""
    run, concepts = target.run, (target.concept, *target.others)
    if not run.language:
        # Of things, and in turn whatever the tokenizer has whole: "starry" is no thing, and pictures follow it.
        whole = (word.casefold() for word in run.clip.vocabulary()[0] if word.isalpha() and len(word) > 2)
        turns = itertools.zip_longest(known_words(run.clip), whole)
        words = dict.fromkeys(word for pair in turns for word in pair if word is not None)
        lists = {"words": list(words), "neighbours": known_styles(run.clip)}
        lists["neighbours"] += known_names(run.clip)[:_MOST_NAMES]
        for key, found in lists.items():
            may_stay = (one for one in found if not any(_is_named(one, concept) for concept in concepts))
            run.language[key] = tuple(itertools.islice(may_stay, _MOST_WORDS))
    return run.language


def _is_named(text: str, concept: Concept) -> bool:
    return any(is_barred(part, concept) for part in dict.fromkeys((text, *text.split())))


def _retained_texts(target: Target, method: type[Method]) -> tuple[list[str], int, tuple[str, ...]]:
    """Prompts that must not move; how many of these speak of the CARE-set; words that name the concept."""
    run, concept = target.run, target.concept
    if method.needs.word_lists and (lists := method.word_lists(run.recipe)) is not None:
        guarded = _guarded_prompts(concept, lists[1])
        return guarded, len(guarded), lists[0]
    guarded = [*_guarded_prompts(concept, target.held_words), *_paired_prompts(target)]
    related = tuple(dict.fromkeys((concept.text, *target.words_around()[2])))
    return [*guarded, *_vocabulary_prompts(target)], len(guarded), related


def _guarded_prompts(concept: Concept, words: Sequence[str]) -> list[str]:
    """Prompts about the CARE-set that must not move: its retain prompts, its anchors, and plain photos."""
    forms = (concept.retain_prompt, concept.anchor_prompt, "A photo of {}".format)
    return list(dict.fromkeys(form(word) for form in forms for word in words))


def _paired_prompts(target: Target) -> list[str]:
    """Guarded words beside other things: a companion is seldom alone in a prompt that people write."""
    each, words = target.run.recipe.erase.retained_pairs, target.held_words
    if not each or not words:
        return []
    others = [word for word in target.words_around()[0] if word not in words]
    if not others:
        return []
    generator = torch.Generator().manual_seed(target.run.recipe.seed + 1)
    forms = ("A {other} with {word}", "A painting of {other} and {word}", "A photo of {other} and {word}")
    prompts = []
    for word in words:
        for k, pick in enumerate(torch.randint(0, len(others), (each,), generator=generator).tolist()):
            prompts.append(forms[k % len(forms)].format(other=others[pick], word=word))
    return list(dict.fromkeys(prompts))


def _vocabulary_prompts(target: Target) -> list[str]:
    """Prompts about everything else the base draws: the concept's neighbours, and words at random."""
    wanted, concept = target.run.recipe.erase.retained_vocabulary, target.concept
    if not wanted:
        return []
    words, cosine, _ = target.words_around()
    generator = torch.Generator().manual_seed(target.run.recipe.seed)
    near = cosine.argsort(descending=True).tolist()[: wanted // 2]
    others = [k for k in torch.randperm(len(words), generator=generator).tolist() if k not in set(near)]
    styles, prompts = target.styles_around()[:wanted], []
    for number, k in enumerate([*near, *others][:wanted]):
        beside = words[int(torch.randint(0, len(words), (1,), generator=generator))]
        # Prompts that people write have two things in them, or a thing and a manner.
        prompts += [f"A photo of {words[k]}", f"A painting of {words[k]}", f"A photo of {beside} and {words[k]}"]
        if styles:
            style = styles[number % len(styles)]
            prompts.append(f"A painting of {words[k]} in the style of {style}")
            if concept.kind == "style":
                prompts.append(concept.target_prompt_for(style))
    # Shuffled, because only the first of them get pictures.
    prompts = list(dict.fromkeys(prompts))
    return [prompts[k] for k in torch.randperm(len(prompts), generator=generator).tolist()]


def _erased_prompts(target: Target, *, joins: bool) -> ErasedPrompts:
    """The texts that name the concept, and what becomes of them."""
    recipe, concept, words = target.run.recipe, target.concept, target.care_words
    # An attribute is taken out of the subject under the subject's own name; aliases are the attribute's.
    further = map(concept.target_prompt_for, concept.aliases) if target.attribute is None else (target.asked,)
    names = tuple(dict.fromkeys((concept.target_prompt, *further)))
    beside, near = _joined_words(target) if joins and recipe.erase.composed else ([], [])
    every = [(word, form) for word in beside for form in range(concept.composed_forms)]
    joined = tuple(itertools.starmap(concept.composed_prompt, every))
    anchors = tuple(itertools.starmap(concept.composed_anchor, every)) or tuple(map(concept.anchor_prompt, words))
    aliases = (*concept.name_prompts[1:], *map(concept.composed_prompt, near)) if beside else ()
    forms = (f"A {concept.class_word}",) * len(concept.name_prompts)
    after = tuple(itertools.starmap(concept.without_name, every))
    instead = attribute = None
    if target.attribute is not None:
        instead = (concept.target_prompt,) * len(names), joined, aliases
        attribute = target.asked, concept.target_prompt
    elif recipe.replace_with is not None:
        kind = "object" if concept.kind == "nsfw" else concept.kind
        other = Concept(text=recipe.replace_with, kind=kind)
        forms = (*other.name_prompts, *[other.target_prompt] * len(forms))[: len(forms)]
        # Another kind's forms are other sentences: the first of them says the same.
        same = other.composed_forms if (other.kind == "style") == (concept.kind == "style") else 1
        after = tuple(other.composed_prompt(word, form % same) for word, form in every)
        named = (*forms[1:], *map(other.composed_prompt, near)) if beside else ()
        instead = (other.target_prompt,), after, named
    return ErasedPrompts(
        names=names,
        joined=joined,
        anchors=anchors,
        guarded_anchors=len(words) * (concept.composed_forms if beside else 1),
        aliases=aliases,
        instead=instead,
        attribute=attribute,
        pairs=tuple(zip((*concept.name_prompts, *joined), (*forms, *after), strict=True)),
    )


def _joined_words(target: Target) -> tuple[list[str], list[str]]:
    """Words that the erased name is joined to; and those that show in its pictures without naming it.

    The latter are no anchors, but people write them beside the name.
    """
    words, (others, _, names) = target.care_words, target.words_around()
    shuffle = torch.Generator().manual_seed(target.run.recipe.seed + 2)
    shuffled = [others[k] for k in torch.randperm(len(others), generator=shuffle).tolist()]
    beside = list(dict.fromkeys((*target.held_words, *shuffled)))
    if target.attribute is not None:
        beside = [word for word in beside if not names_concept(word, target.attribute)]
    kept = sum(word in words for word in beside)
    near = [word for word in names if not names_concept(word, target.concept)]
    return beside[: kept + JOINED], near
