"""How much of the concept a patched model still holds: the memorization score.

The name is Forget-Me-Not's (Zhang et al., arXiv 2303.17591); no formula of theirs could be found in
public, so this one is ours and its figures cannot be compared with theirs. Textual inversion (Gal et
al., arXiv 2208.01618) on pictures of the concept recovers a token from the patched model. The score
is the cosine of the token's text feature with that of the concept's own name; beside it stands the
rate at which pictures of the recovered token show the concept.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from recare_patch.core import EvaluationError, keep_tensors, kept_tensors
from recare_patch.erasure import Loop, invert
from recare_patch.measure.evidence import Figure
from recare_patch.measure.meters import HitRate, rate_figure
from recare_patch.measure.suites import Suite, own_recipe
from recare_patch.models import PLACEHOLDER
from recare_patch.recipe import Concept

if TYPE_CHECKING:
    from recare_patch.core import Progress
    from recare_patch.measure.erasers import Eraser
    from recare_patch.measure.judges import Detector
    from recare_patch.measure.pictures import Studio
    from recare_patch.models import BaseModel

MEMORIZATION = ("memorization, cosine with the name", "memorization, recovered pictures")
"""The names of its two figures."""


@dataclass(frozen=True)
class Recovery:
    """How a token is recovered: from so many pictures of the concept, by such an inversion."""

    images: int = 24
    steps: int = 200
    batch_size: int = 8
    learning_rate: float = 2.0e-2
    vectors: int = 1
    init_word: str = "person"
    seed: int = 0


def text_feature(base: BaseModel, text: str, vectors: Tensor | None = None) -> Tensor:
    """The text encoder's last hidden state at end-of-text: ``[width]``, unit length, fp32, on the CPU.

    The text holds :data:`PLACEHOLDER` where vectors ``[vectors, token_width]`` are given.
    """
    with torch.no_grad():
        if vectors is None:
            embeds = base.encode_prompts([text])
            tokens = len(base.token_ids(text))
        else:
            embeds = base.encode_with_vectors([text], vectors.to(base.device))
            parts = text.split(PLACEHOLDER)
            tokens = sum(len(base.token_ids(part)) for part in parts) + (len(parts) - 1) * len(vectors)
    states = embeds.prompt_embeds[0]
    # Start of text, the tokens, then end of text; what follows is padding.
    if tokens + 1 >= len(states):
        raise EvaluationError(f"'{text}' is longer than the {len(states)} tokens that the text encoder reads")
    return F.normalize(states[tokens + 1].float(), dim=0).cpu()


def memorization_score(base: BaseModel, concept: Concept, vectors: Tensor) -> float:
    """Cosine of a recovered token's text feature with that of the concept's own name, −1 to 1."""
    return float(text_feature(base, PLACEHOLDER, vectors) @ text_feature(base, concept.text))


def recover(
    studio: Studio,
    suite: Suite,
    patches: Sequence[tuple[Eraser, float]],
    options: Recovery,
    *,
    progress: Progress | None = None,
    stage: str = "memorization",
) -> Tensor:
    """The token that the model under patches gives back for the pictures of a suite's concept.

    It is ``[vectors, token_width]``, fp32, on the CPU, and is read from the cache where it was recovered
    before. Without patches it is recovered from the base itself, which has drawn the pictures.
    """
    base, cache, first = studio.base, studio.cache, suite.block("memorization")
    concept = Concept(text=suite.concept, kind=suite.kind)
    fields = {
        "what": "recovered token",
        "concept": concept.model_dump(),
        "options": asdict(options),
        "images": [first, suite.steps, suite.guidance_scale, suite.scheduler],
    }
    file = cache.path(studio.key(patches, fields), ".safetensors") if cache is not None else None
    if file is not None and (kept := kept_tensors(file)) is not None:
        return kept[0]["vectors"]
    images = studio.draw(
        [concept.target_prompt] * options.images,
        range(first, first + options.images),
        **suite.sampler,
        stage="pictures of the concept",
    )
    latents = base.encode_images(images)
    start = base.word_vector(options.init_word).repeat(options.vectors, 1)
    with contextlib.ExitStack() as stack:
        for patch, scale in patches:
            stack.enter_context(patch.apply(base.pipeline, scale=scale))
        stack.enter_context(base.counter.stage(stage))
        vectors, _ = invert(
            base,
            latents,
            [concept.target_prompt_for(PLACEHOLDER)],
            start,
            Loop(stage, options.steps, options.learning_rate, options.seed, progress=progress),
            batch_size=options.batch_size,
        )
    vectors = vectors.float().cpu()
    if file is not None:
        keep_tensors(file, {"vectors": vectors})
    return vectors


def memorization_figures(
    studio: Studio, patch: Eraser, suite: Suite, detector: Detector, pictures: int, progress: Progress | None
) -> list[Figure]:
    """The score, and the rate of so many pictures of the recovered token, for the base and the patched model.

    The inversion has the learning rate, batch and first word of the patch's own search.
    """
    concept = Concept(text=suite.concept, kind=suite.kind)
    options = Recovery(init_word=concept.class_word)
    if recipe := own_recipe(patch):
        search = {name: getattr(recipe.search, name) for name in ("learning_rate", "batch_size")}
        options = Recovery(init_word=recipe.search.init_word or concept.class_word, **search)
    first = suite.block("memorization") + options.images
    prompts, seeds = [concept.target_prompt_for(PLACEHOLDER)] * pictures, range(first, first + pictures)
    scores: list[float] = []
    rates = (HitRate(), HitRate())
    for rate, stage, patches in zip(rates, ("base", "patched"), ([], [(patch, 1.0)]), strict=True):
        vectors = recover(studio, suite, patches, options, progress=progress, stage=f"{stage}, memorization")
        scores.append(round(memorization_score(studio.base, concept, vectors), 6))
        how = {"patches": patches, "vectors": vectors, "stage": f"{stage}, recovered", **suite.sampler}
        for _, image in studio.stream(prompts, seeds, **how):
            rate.add(detector.rate([image], suite.label)[0])
    score = Figure(
        name=MEMORIZATION[0],
        group="memorization",
        metric="memorization score",
        base=scores[0],
        patched=scores[1],
        pictures=options.images,
        better="lower",
        note=f"Cosine of the text features of the concept's name and of the token that textual inversion "
        f"recovers from {options.images} pictures in {options.steps} steps of {options.batch_size}. The "
        "definition is this project's own.",
    )
    told = {"name": MEMORIZATION[1], "group": "memorization", "metric": "concept rate", "better": "lower"}
    note = "Pictures of the recovered token."
    return [score, rate_figure(rates, **told, detector=detector.name, note=note)]
