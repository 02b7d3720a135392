"""Concept inversion: learn a new name for what was erased (Pham et al., arXiv 2308.01508).

Textual inversion against the patched model: word vectors are fitted so that the model, adapter and
all, predicts the noise on pictures of the concept. It needs the weights and such pictures, and asks
whether the concept is gone or merely has lost its name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from recare_patch.erasure import invert, name_templates
from recare_patch.measure.attacks import protocol
from recare_patch.measure.attacks.protocol import AttackOptions, AttackRun, AttackTarget, Trial, Values

if TYPE_CHECKING:
    from torch import Tensor

    from recare_patch.recipe import Concept

VECTORS = "vectors"
"""The tensor that is saved: ``[vectors, token_width]``, fp32."""


class ConceptInversionOptions(AttackOptions):
    """How much is tried; a batch is of states a step, and of pictures."""

    # As in the literature's comparisons of erasers; the paper itself goes to 5,000 steps.
    published: ClassVar[Values] = {"steps": 3000, "learning_rate": 5e-3, "images": 25, "pictures": 100}

    vectors: int = Field(1, ge=1, le=16, description="word vectors of the new name")
    steps: protocol.Steps = Field(400, description="training steps; published 3,000")
    learning_rate: protocol.Rate = Field(2e-2, description="its peak; it falls to a tenth; published 5e-3")
    images: int = Field(24, ge=1, le=10_000, description="target pictures it learns from")
    init_word: Annotated[str, Field(min_length=1, max_length=100)] | None = Field(
        None, description="the word that the vectors start from; else the kind's own"
    )
    pictures: protocol.Pictures = Field(50, description="trials: pictures drawn with the new name")


class ConceptInversion(protocol.Attack[ConceptInversionOptions]):
    """Success is a picture, drawn with the learnt name in one of the concept's templates, that shows it."""

    name = "concept-inversion"
    options_type = ConceptInversionOptions

    def candidates(self, concept: Concept, words: Sequence[str]) -> tuple[str, ...]:
        """The target prompt alone."""
        return (concept.target_prompt,)

    def images_wanted(self, options: ConceptInversionOptions) -> int:
        """The pictures it learns from."""
        return options.images

    def trials(self, target: AttackTarget, options: ConceptInversionOptions, seed: int) -> list[Trial]:
        """The concept's templates and plain prompts in turn."""
        return _trials(target.concept, protocol.trial_seeds(seed, options.pictures))

    def search(self, run: AttackRun[ConceptInversionOptions], trials: list[Trial]) -> dict[str, Tensor]:
        """Fit the vectors."""
        options, target = run.options, run.target
        start = target.base.word_vector(options.init_word or target.concept.class_word)
        vectors, _ = invert(
            target.base,
            target.latents,
            name_templates(target.concept),
            start.repeat(options.vectors, 1),
            run.loop("vectors", options.steps, options.learning_rate),
            batch_size=options.batch_size,
        )
        return {VECTORS: vectors.detach().float().cpu()}

    def saved_trials(self, target: AttackTarget, saved: protocol.AttackResult) -> list[Trial]:
        """The same at the saved seeds."""
        vectors, width = saved.tensors.get(VECTORS), target.base.token_width
        if vectors is None or vectors.ndim != 2 or vectors.shape[1] != width:
            shape = "none" if vectors is None else "x".join(map(str, vectors.shape))
            raise protocol.AttackError(
                f"the saved attack's word vectors ({shape}) do not fit base '{target.base.id}', which needs "
                f"{width} values each"
            )
        return _trials(target.concept, [one["seed"] for one in saved.details])

    def drawing(self, target: AttackTarget, trials: list[Trial], tensors: Mapping[str, Tensor]) -> protocol.Draw:
        """Draws the templates with the learnt name in them."""
        different = list(dict.fromkeys(one["prompt"] for one in trials))
        named = target.base.encode_with_vectors(different, tensors[VECTORS].to(target.base.device)).detach()
        rows = [different.index(one["prompt"]) for one in trials]
        return lambda some: target.draw(None, [one["seed"] for one in trials[some]], named[rows[some]])


def _trials(concept: Concept, seeds: Sequence[int]) -> list[Trial]:
    templates, plain = name_templates(concept), concept.name_prompts
    return [
        {"prompt": templates[k % len(templates)], "attacked": plain[k % len(plain)], "seed": seed}
        for k, seed in enumerate(seeds)
    ]
