"""The patch beside a personalisation LoRA: two adapters at once, each of which knows nothing of the other.

The LoRA is trained here, on the untouched base, as people train theirs: a few pictures of a subject,
a rare word for it, and plain noise prediction (Ruiz et al., DreamBooth, arXiv 2208.12242, with low
rank and without its prior preservation). The subject is one that the base knows under another name,
so that a detector can tell whether the rare word came to mean it.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, BeforeValidator, Field

from recare_patch.core import EvaluationError, PatchError, one_of, write_json
from recare_patch.erasure import OPTIMIZERS
from recare_patch.measure.checks.protocol import CONCEPT, Asked, CheckContext, CheckOptions, point
from recare_patch.measure.checks.tuning import Material, tune
from recare_patch.measure.evidence import Check
from recare_patch.measure.suites import Label, Prompt
from recare_patch.models import ATELIER
from recare_patch.models import lora as adapters
from recare_patch.patch import Patch
from recare_patch.recipe import LAYER_SETS, same_concept

ADAPTER = "personalisation"
BESIDE = "concept beside the subject"
SUBJECT = "subject"

_TRAIN_BLOCK, _SUBJECT_BLOCK, _BESIDE_BLOCK = 0, 1, 2


def _with_place(prompts: tuple[str, ...]) -> tuple[str, ...]:
    for prompt in prompts:
        if "{}" not in prompt:
            raise ValueError(f"the prompt '{prompt}' has no {{}} for the subject's new name")
    return prompts


class PersonalisationOptions(CheckOptions):
    """What the LoRA learns, and how.

    Attributes:
        subject: the prompt whose pictures, drawn by the base, show the subject; None: one that suits the
            base.
        label: what the detector, or else CLIP, calls the subject; given with ``subject``.
        word: the rare word that comes to mean it.
        class_word: what it is, in a common word that follows the rare one.
        prompts: what is drawn of the subject afterwards, ``{}`` for its new name.
        images: pictures drawn to learn from; those that do not show the subject are left out.
        layers, rank: of the LoRA; its alpha is its rank.
        steps, batch_size, learning_rate, optimizer: of the training.
    """

    subject: Prompt | None = None
    label: Label | None = None
    word: Label = "sks"
    class_word: Label | None = None
    prompts: Annotated[tuple[Prompt, ...], Field(min_length=1), AfterValidator(_with_place)] = (
        "a photo of {}",
        "a photo of {} on a street",
        "a painting of {}",
        "a photo of {} in the snow",
    )
    images: Annotated[int, Field(ge=1, le=1000)] = 16
    layers: Annotated[str, BeforeValidator(one_of("layer set", LAYER_SETS))] = "attention"
    rank: Annotated[int, Field(ge=1, le=1024)] = 4
    steps: Annotated[int, Field(ge=1, le=1_000_000)] = 200
    batch_size: Annotated[int, Field(ge=1, le=1024)] = 4
    learning_rate: Annotated[float, Field(gt=0, le=10)] = 1.0e-3
    optimizer: Annotated[str, BeforeValidator(one_of("optimizer", OPTIMIZERS.names()))] = "adamw"


def _resolved(context: CheckContext, options: PersonalisationOptions) -> PersonalisationOptions:
    """The options with a subject, one that the patch does not erase.

    Raises:
        EvaluationError: a subject without a label, or the other way round.
    """
    if (options.subject is None) != (options.label is None):
        raise EvaluationError("a subject and its label go together: give both, or neither")
    if options.subject is not None:
        return options.model_copy(update={"class_word": options.class_word or "object"})
    if context.base.id == ATELIER:
        name = "Otto Bly" if same_concept(context.suite.concept, "Mira Vale") else "Mira Vale"
        chosen = {"subject": f"a photo of {name}", "label": name.casefold(), "class_word": "person"}
    else:
        chosen = {"subject": "a photo of a red panda", "label": "red panda", "class_word": "animal"}
    chosen["class_word"] = options.class_word or chosen["class_word"]
    return options.model_copy(update=chosen)


class Personalisation:
    """See :class:`Checker`."""

    name = "personalisation"
    options_type = PersonalisationOptions

    def run(self, context: CheckContext, options: PersonalisationOptions) -> Check:
        """See :class:`Checker`."""
        options = _resolved(context, options)
        lora, cost = self._lora(context, options)
        name, count, label = f"{options.word} {options.class_word}", context.pictures, context.suite.label
        subject = options.label or ""
        drawn = [prompt.replace("{}", name) for prompt in options.prompts]
        asked = [
            context.asked_concept(),
            Asked(
                BESIDE,
                (context.concept.composed_prompt(name),) * count,
                context.own_seeds(_BESIDE_BLOCK, count),
                (label,) * count,
                (label,) * count,
            ),
            Asked(
                SUBJECT,
                tuple(drawn[number % len(drawn)] for number in range(count)),
                context.own_seeds(_SUBJECT_BLOCK, count),
                (subject,) * count,
                (subject,) * count,
            ),
        ]
        settings: list[tuple[str, list[tuple[Patch, float]]]] = [
            ("base", []),
            ("patch", context.applied),
            ("LoRA", [(lora, 1.0)]),
            ("patch and LoRA", [*context.applied, (lora, 1.0)]),
        ]
        points = [
            point(title, context.rates(asked, patches=patches, stage=f"personalisation, {title}"), count)
            for title, patches in settings
        ]
        return Check(
            name=self.name,
            title="Beside a personalisation LoRA",
            what=f"A LoRA was trained on the untouched base to draw '{subject}' when it is asked for "
            f"'{name}'. It is used alone and together with the patch.",
            x_label="in the base",
            y_label="pictures that show it",
            points=tuple(points),
            note=f"The series '{CONCEPT}' and '{BESIDE}' look for the erased concept, the latter in pictures "
            f"of '{asked[1].prompts[0]}'. Rank {options.rank} on {options.layers}, {lora.parameters:,} "
            f"parameters, {cost['images']} pictures by the base, {options.steps} steps of "
            f"{options.batch_size} at {options.learning_rate:g}: {cost['evaluations']:,} denoiser "
            "evaluations.",
        )

    def _lora(self, context: CheckContext, options: PersonalisationOptions) -> tuple[Patch, dict[str, Any]]:
        """The trained LoRA, and what it cost; read where it was trained before."""
        suite = context.suite
        fields = {
            "options": options.model_dump(mode="json", exclude={"prompts"}),
            "drawn": [
                suite.first_seed,
                suite.steps,
                suite.scheduler,
                suite.guidance_scale,
                context.detector.name,
            ],
        }
        folder = context.folder(self.name, fields)
        note = folder / "lora.json" if folder is not None else None
        if folder is not None and note is not None and note.is_file():
            # What cannot be read is trained again.
            with contextlib.suppress(ValueError, PatchError):
                return Patch.load(folder), json.loads(note.read_text(encoding="utf-8"))
        lora, cost = self._train(context, options, folder)
        if folder is not None and note is not None:
            lora.save(folder, torch.float32)
            write_json(note, cost)
            (folder / "checkpoint.safetensors").unlink(missing_ok=True)
        return lora, cost

    def _train(
        self, context: CheckContext, options: PersonalisationOptions, folder: Path | None
    ) -> tuple[Patch, dict[str, Any]]:
        base, suite = context.base, context.suite
        images = context.studio.draw(
            [str(options.subject)] * options.images,
            context.own_seeds(_TRAIN_BLOCK, options.images),
            steps=suite.steps,
            scheduler=suite.scheduler,
            guidance_scale=suite.guidance_scale,
            stage="personalisation, pictures of the subject",
        )
        shown = context.shows(images, str(options.label))
        kept = [image for image, hit in zip(images, shown, strict=True) if hit]
        if not kept:
            raise EvaluationError(
                f"there is no subject to learn: none of {len(images)} pictures of '{options.subject}' by the "
                f"base shows '{options.label}'"
            )
        caption = f"a photo of {options.word} {options.class_word}"
        material = Material(base.encode_images(kept), (caption,) * len(kept))
        parameters = adapters.attach(
            base.denoiser,
            layers=options.layers,
            rank=options.rank,
            alpha=float(options.rank),
            generator=torch.Generator().manual_seed(context.seed),
            name=ADAPTER,
        )
        try:
            evaluations = tune(
                base,
                parameters,
                material,
                steps=options.steps,
                batch_size=options.batch_size,
                learning_rate=options.learning_rate,
                seed=context.seed,
                stage="personalisation, training",
                optimizer=options.optimizer,
                checkpoint=folder / "checkpoint.safetensors" if folder is not None else None,
                progress=context.progress,
            )
            lora = Patch.from_adapter(base, ADAPTER, options.rank, float(options.rank), dtype=torch.float32)
        finally:
            adapters.detach(base.denoiser, ADAPTER)
        return lora, {"evaluations": evaluations, "images": len(kept)}
