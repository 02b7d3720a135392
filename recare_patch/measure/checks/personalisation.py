"""The patch beside a personalisation LoRA: two adapters at once, each of which knows nothing of the other.

The LoRA is trained here, on the untouched base, as people train theirs: a few pictures of a subject,
a rare word for it, and plain noise prediction (Ruiz et al., DreamBooth, arXiv 2208.12242, with low
rank and without its prior preservation). The subject is one that the base knows under another name,
so that a detector can tell whether the rare word came to mean it.
"""

from __future__ import annotations

from contextlib import nullcontext, suppress
from dataclasses import replace
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, Field

from recare_patch.core import EvaluationError, PatchError, file_sha256, keep_json, kept_json
from recare_patch.measure.checks.fine_tuning import (
    CHECKPOINT,
    Count,
    Images,
    Layers,
    LearningRate,
    Training,
    TrainingOptions,
)
from recare_patch.measure.checks.protocol import CONCEPT, CheckContext, Checker, Patches, point, turns
from recare_patch.measure.evidence import Check
from recare_patch.measure.suites import Label, Prompt
from recare_patch.models import ATELIER
from recare_patch.patch import Patch
from recare_patch.recipe import same_concept

BESIDE = "concept beside the subject"
SUBJECT = "subject"

_TRAIN_BLOCK, _SUBJECT_BLOCK, _BESIDE_BLOCK = 0, 1, 2


def _with_place(prompts: tuple[str, ...]) -> tuple[str, ...]:
    for prompt in prompts:
        if "{}" not in prompt:
            raise ValueError(f"the prompt '{prompt}' has no {{}} for the subject's new name")
    return prompts


class PersonalisationOptions(TrainingOptions):
    """What the LoRA learns, and how."""

    subject: Prompt | None = Field(
        None, description="the prompt whose pictures show the subject; else one that suits the base"
    )
    label: Label | None = Field(None, description="what the detector, or else CLIP, calls the subject; goes with it")
    word: Label = Field("sks", description="the rare word that comes to mean it")
    class_word: Label | None = Field(None, description="a common word for it that follows the rare one")
    prompts: Annotated[tuple[Prompt, ...], Field(min_length=1), AfterValidator(_with_place)] = Field(
        ("a photo of {}", "a photo of {} on a street", "a painting of {}", "a photo of {} in the snow"),
        description="what is drawn of the subject afterwards, {} for its new name",
    )
    images: Images = Field(16, description="drawn to learn from; those not of the subject are left out")
    layers: Layers = Field("attention", description="of the LoRA")
    rank: Count = Field(4, description="of the LoRA; its alpha is its rank")
    steps: Annotated[int, Field(ge=1, le=1_000_000)] = Field(200, description="of the training")
    learning_rate: LearningRate = Field(1.0e-3, description="the same throughout")


def resolved(context: CheckContext, options: PersonalisationOptions) -> PersonalisationOptions:
    """The options with a subject, one that the patch does not erase."""
    if (options.subject is None) != (options.label is None):
        raise EvaluationError("a subject and its label go together: give both, or neither")
    if options.subject is not None:
        subject, label, word = options.subject, options.label, "object"
    elif context.base.id == ATELIER:
        name = "Otto Bly" if same_concept(context.suite.concept, "Mira Vale") else "Mira Vale"
        subject, label, word = f"a photo of {name}", name.casefold(), "person"
    else:
        subject, label, word = "a photo of a red panda", "red panda", "animal"
    chosen = {"subject": subject, "label": label, "class_word": options.class_word or word}
    return options.model_copy(update=chosen)


class Personalisation(Checker[PersonalisationOptions]):
    """Concept and subject with neither, with each and with both."""

    name = "personalisation"
    options_type = PersonalisationOptions
    title = "Beside a personalisation LoRA"
    x_label = "in the base"

    def run(self, context: CheckContext, options: PersonalisationOptions) -> Check:
        """See the module."""
        options = resolved(context, options)
        lora, cost = self._lora(context, options)
        name, count, subject = f"{options.word} {options.class_word}", context.pictures, options.label or ""
        beside = context.concept.composed_prompt(name)
        drawn = [prompt.replace("{}", name) for prompt in options.prompts]
        asked = [
            *context.asked_concept(),
            *turns(BESIDE, [beside], context.own_seeds(_BESIDE_BLOCK, count), context.suite.label),
            *turns(SUBJECT, drawn, context.own_seeds(_SUBJECT_BLOCK, count), subject),
        ]
        settings: dict[str, Patches] = {
            "base": [],
            "patch": context.applied,
            "LoRA": [(lora, 1.0)],
            "patch and LoRA": [*context.applied, (lora, 1.0)],
        }
        return self.told(
            [
                point(title, context.rates(asked, patches, f"personalisation, {title}"), count)
                for title, patches in settings.items()
            ],
            f"A LoRA was trained on the untouched base to draw '{subject}' when it is asked for '{name}'. It "
            "is used alone and together with the patch.",
            f"The series '{CONCEPT}' and '{BESIDE}' look for the erased concept, the latter in pictures of "
            f"'{beside}'. Rank {options.rank} on {options.layers}, {lora.parameters:,} parameters, "
            f"{cost['images']} pictures by the base, {options.steps} steps of {options.batch_size} at "
            f"{options.learning_rate:g}: {cost['evaluations']:,} denoiser evaluations.",
        )

    def _lora(self, context: CheckContext, options: PersonalisationOptions) -> tuple[Patch, dict[str, Any]]:
        """The trained LoRA, and what it cost; read where it was trained before."""
        suite = context.suite
        how = [suite.first_seed, suite.steps, suite.scheduler, suite.guidance_scale, context.detector.name]
        decides = {"options": options.model_dump(mode="json", exclude={"prompts"}), "drawn": how}
        folder = context.folder(self.name, decides)
        if folder is not None and (before := kept_json(folder / "lora.json", remade=True)) is not None:
            # What is not as it was written is trained again.
            with suppress(PatchError):
                lora = Patch.load(folder)
                if lora.sha256() == before["sha256"]:
                    return lora, before["cost"]
        prompts, label, what = [str(options.subject)] * options.images, str(options.label), "of the subject"
        none = (
            f"there is no subject to learn: none of {options.images} pictures of '{options.subject}' by the "
            f"base shows '{label}'"
        )
        drawn = Training.drawn(self.name, context, options, prompts, _TRAIN_BLOCK, what, label, True, none)
        captions = (f"a photo of {options.word} {options.class_word}",) * len(drawn.prompts)
        checkpoint = folder / CHECKPOINT if folder else None
        lora, spent = replace(drawn, prompts=captions).lora(options.steps, checkpoint, nullcontext)
        cost = {"evaluations": spent, "images": len(captions)}
        if folder is not None:
            sha256 = file_sha256(lora.save(folder, torch.float32))
            keep_json(folder / "lora.json", {"cost": cost, "sha256": sha256})
            (folder / CHECKPOINT).unlink(missing_ok=True)
        return lora, cost
