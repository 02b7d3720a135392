"""Concept inversion: learn a new name for what was erased (Pham et al., arXiv 2308.01508).

Textual inversion against the patched model: word vectors are fitted so that the model, adapter and
all, predicts the noise on pictures of the concept. It needs the weights and such pictures, and asks
whether the concept is gone or merely has lost its name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from recare_patch.erasure import Checkpoint, invert, name_templates
from recare_patch.measure.attacks.protocol import (
    AttackError,
    AttackOptions,
    AttackResult,
    AttackTarget,
    Meter,
    Rate,
    Steps,
    first_pictures,
    judged,
    trial_seeds,
)

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from recare_patch.core import Progress
    from recare_patch.recipe import Concept

VECTORS = "vectors"
"""The tensor that is saved: ``[vectors, token_width]``, fp32."""


class ConceptInversionOptions(AttackOptions):
    """How much is tried.

    Attributes:
        vectors: word vectors of the new name.
        steps: training steps; the literature that compares erasers takes 3,000.
        batch_size: states a step, and pictures drawn together.
        learning_rate: its highest value, falling to a tenth; published 5e-3.
        images: target pictures it learns from.
        init_word: the word that the vectors start from; None: the kind's own.
        pictures: pictures drawn with the new name.
    """

    vectors: Annotated[int, Field(ge=1, le=16)] = 1
    steps: Steps = 400
    learning_rate: Rate = 2.0e-2
    images: Annotated[int, Field(ge=1, le=10_000)] = 24
    init_word: Annotated[str, Field(min_length=1, max_length=100)] | None = None
    pictures: Annotated[int, Field(ge=1, le=100_000)] = 50

    @classmethod
    def published(cls) -> Mapping[str, Any]:
        """Steps and rate as in the literature's comparisons; the paper itself goes to 5,000 steps."""
        return {"steps": 3000, "learning_rate": 5.0e-3, "images": 25, "pictures": 100}


class ConceptInversion:
    """See :class:`Attack`.

    Success is a picture, drawn with the learnt name in one of the concept's templates, that shows
    the concept.
    """

    name = "concept-inversion"
    options_type = ConceptInversionOptions

    def candidates(self, concept: Concept, words: Sequence[str]) -> tuple[str, ...]:
        """The target prompt alone."""
        return (concept.target_prompt,)

    def images_wanted(self, options: ConceptInversionOptions) -> int:
        """The pictures it learns from."""
        return options.images

    def run(
        self,
        target: AttackTarget,
        options: ConceptInversionOptions,
        *,
        seed: int,
        progress: Progress | None = None,
        work: Path | None = None,
    ) -> AttackResult:
        """See :class:`Attack`."""
        base, meter = target.base, Meter(target.base)
        start = base.word_vector(options.init_word or target.concept.class_word)
        with base.counter.stage(self.name):
            vectors, _ = invert(
                base,
                target.latents,
                name_templates(target.concept),
                start.repeat(options.vectors, 1),
                steps=options.steps,
                batch_size=options.batch_size,
                learning_rate=options.learning_rate,
                seed=seed,
                stage=self.name,
                checkpoint=Checkpoint(work / "vectors.checkpoint.safetensors") if work else None,
                extra=meter.so_far,
                restore_extra=meter.catch_up,
                progress=progress,
            )
        seeds = trial_seeds(seed, options.pictures)
        return self._judge(target, vectors, seeds, options, meter, progress, work)

    def replay(
        self, target: AttackTarget, saved: AttackResult, *, progress: Progress | None = None
    ) -> AttackResult:
        """Draw with vectors that were learnt on another patch.

        Raises:
            AttackError: they do not fit this base model.
        """
        vectors = saved.tensors.get(VECTORS)
        if vectors is None or vectors.ndim != 2 or vectors.shape[1] != target.base.token_width:
            shape = "none" if vectors is None else "x".join(map(str, vectors.shape))
            raise AttackError(
                f"the saved attack's word vectors ({shape}) do not fit base '{target.base.id}', which needs "
                f"{target.base.token_width} values each"
            )
        options = self.options_type(**saved.budget)
        seeds = tuple(int(one["seed"]) for one in saved.details)
        return self._judge(target, vectors, seeds, options, Meter(target.base), progress, None)

    def _judge(
        self,
        target: AttackTarget,
        vectors: Tensor,
        seeds: Sequence[int],
        options: ConceptInversionOptions,
        meter: Meter,
        progress: Progress | None,
        work: Path | None,
    ) -> AttackResult:
        base, concept = target.base, target.concept
        templates = [name_templates(concept)[k % len(name_templates(concept))] for k in range(len(seeds))]
        plain = [concept.name_prompts[k % len(concept.name_prompts)] for k in range(len(seeds))]
        named = base.encode_with_vectors(list(dict.fromkeys(templates)), vectors.to(base.device)).detach()
        row = {template: k for k, template in enumerate(dict.fromkeys(templates))}

        def with_name(rows: slice) -> list[Image]:
            return base.generate(
                None,
                seeds[rows],
                steps=target.steps,
                guidance_scale=target.guidance_scale,
                batch_size=len(seeds[rows]),
                prompt_embeds=named[[row[template] for template in templates[rows]]],
            )

        def without_name(rows: slice) -> list[Image]:
            return target.draw(plain[rows], seeds[rows])

        count = len(seeds)
        without = judged(
            target, f"{self.name}, plain", count, without_name, options, meter, progress=progress, work=work
        )
        found = judged(
            target, f"{self.name}, judge", count, with_name, options, meter, progress=progress, work=work
        )
        details = [
            {"prompt": template, "attacked": prompt, "seed": seed, "success": hit, "without": before}
            for template, prompt, seed, hit, before in zip(
                templates, plain, seeds, found, without, strict=True
            )
        ]
        return AttackResult.of(
            self.name,
            details,
            meter,
            options,
            tensors={VECTORS: vectors.detach().float().cpu()},
            pictures=first_pictures(count, with_name, options, meter),
        )
