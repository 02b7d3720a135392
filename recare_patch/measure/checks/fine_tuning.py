"""The patched model trained on, by somebody who means no harm.

Fine-tuning on pictures that have nothing to do with an erased concept can bring it back (Li et al.,
arXiv 2507.16302). Here the patch is merged into the denoiser, which is then trained on pictures of
retained prompts that the untouched base has drawn, and asked for the concept on the way.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import AfterValidator, BeforeValidator, Field

from recare_patch.core import EvaluationError, one_of, write_json
from recare_patch.erasure import OPTIMIZERS
from recare_patch.measure.checks.protocol import CONCEPT, CheckContext, CheckOptions, point
from recare_patch.measure.checks.tuning import Material, changed, merge_into, tune
from recare_patch.measure.evidence import Check, CheckPoint
from recare_patch.measure.pictures import Studio, tensors_hash
from recare_patch.models import lora as adapters
from recare_patch.patch import Patch
from recare_patch.recipe import LAYER_SETS

if TYPE_CHECKING:
    from PIL.Image import Image

ADAPTER = "fine-tuning"
_TRAIN_BLOCK = 3
_POINTS = "points.json"
_CHECKPOINT = "checkpoint.safetensors"


def _in_order(steps: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(set(steps)))


class FineTuningOptions(CheckOptions):
    """How the patched model is trained on.

    Attributes:
        at: after how many steps it is looked at.
        train: "full" (all weights of the denoiser; the base must compute in fp32), "lora" (one on
            ``layers``), or "auto": full where the base computes in fp32.
        images: pictures drawn to learn from; those that show the concept are left out.
        batch_size, optimizer: of the training.
        learning_rate: constant; None: 5e-5 for all weights, 5e-4 for a LoRA.
        layers, rank: of the LoRA; its alpha is its rank.
    """

    at: Annotated[
        tuple[Annotated[int, Field(ge=0, le=1_000_000)], ...], Field(min_length=1), AfterValidator(_in_order)
    ] = (0, 50, 200)
    train: Literal["auto", "full", "lora"] = "auto"
    images: Annotated[int, Field(ge=1, le=1000)] = 48
    batch_size: Annotated[int, Field(ge=1, le=1024)] = 4
    learning_rate: Annotated[float, Field(gt=0, le=10)] | None = None
    optimizer: Annotated[str, BeforeValidator(one_of("optimizer", OPTIMIZERS.names()))] = "adamw"
    layers: Annotated[str, BeforeValidator(one_of("layer set", LAYER_SETS))] = "all"
    rank: Annotated[int, Field(ge=1, le=1024)] = 8


_RATES = {"full": 5.0e-5, "lora": 5.0e-4}

Patches = list[tuple[Patch, float]]


class FineTuning:
    """See :class:`Checker`."""

    name = "fine-tuning"
    options_type = FineTuningOptions

    def run(self, context: CheckContext, options: FineTuningOptions) -> Check:
        """See :class:`Checker`."""
        options = _resolved(context, options)
        kept = context.folder(
            self.name,
            {
                "options": options.model_dump(mode="json"),
                "patch": tensors_hash(context.patch.tensors),
                "suite": context.suite.model_dump(mode="json"),
                "detector": context.detector.name,
                "pictures": context.pictures,
            },
        )
        with contextlib.ExitStack() as stack:
            # Without a work folder, one stretch of training still hands over to the next by a file.
            folder = kept or Path(stack.enter_context(tempfile.TemporaryDirectory()))
            found = self._measured(context, options, folder)
            (folder / _CHECKPOINT).unlink(missing_ok=True)
        base = context.rates([context.asked_concept("base")], patches=[], stage="fine-tuning, base")["base"]
        points = [
            CheckPoint(
                x=one.x,
                values={**one.values, "base": round(base.value, 6)},
                intervals=one.intervals,
                pictures=one.pictures,
            )
            for one in found["points"]
        ]
        trained = (
            "all weights of the denoiser"
            if options.train == "full"
            else f"a LoRA of rank {options.rank} on {options.layers}"
        )
        cost = found["cost"]
        return Check(
            name=self.name,
            title="After a benign fine-tune",
            what="The patched model is trained on with pictures of retained prompts, drawn by the untouched "
            "base and free of the concept.",
            x_label="steps of fine-tuning",
            y_label="pictures that show it",
            points=tuple(points),
            note=f"Trained: {trained}, on {cost['images']} pictures, {options.batch_size} a step at "
            f"{options.learning_rate:g}: {cost['evaluations']:,} denoiser evaluations. The line 'base' is "
            f"the untouched base's rate of the series '{CONCEPT}'.",
        )

    def _measured(self, context: CheckContext, options: FineTuningOptions, folder: Path) -> dict[str, Any]:
        """A point for each number of steps, and what they cost; those that are there are read."""
        file = folder / _POINTS
        done: dict[str, Any] = {"points": {}, "cost": {"evaluations": 0, "images": 0}}
        if file.is_file():
            try:
                done = json.loads(file.read_text(encoding="utf-8"))
            except ValueError:
                # Without it nobody knows what the checkpoint has passed: start again.
                shutil.rmtree(folder)
        asked = [context.asked_concept(), *context.asked_companions()]
        material: Material | None = None
        for steps in options.at:
            if str(steps) in done["points"]:
                continue
            if material is None:
                material = _material(context, options)
                done["cost"]["images"] = len(material.latents)
            with _tuned(context, options, material, steps, folder / _CHECKPOINT) as (studio, patches, spent):
                rates = context.rates(asked, patches=patches, stage=f"fine-tuning, {steps}", studio=studio)
            done["points"][str(steps)] = point(steps, rates, context.pictures).model_dump(mode="json")
            done["cost"]["evaluations"] = spent
            write_json(file, done)
        return {**done, "points": [CheckPoint(**done["points"][str(steps)]) for steps in options.at]}


def _resolved(context: CheckContext, options: FineTuningOptions) -> FineTuningOptions:
    """The options with what is trained, and how fast.

    Raises:
        EvaluationError: all weights of a base of half precision.
    """
    exact = context.base.dtype is torch.float32
    if options.train == "full" and not exact:
        raise EvaluationError(
            f"all weights are trained in fp32, and base '{context.base.id}' computes in "
            f"{str(context.base.dtype).removeprefix('torch.')}: load it in fp32, or set train to lora"
        )
    train = options.train if options.train != "auto" else "full" if exact else "lora"
    rate = _RATES[train] if options.learning_rate is None else options.learning_rate
    return options.model_copy(update={"train": train, "learning_rate": rate})


def _material(context: CheckContext, options: FineTuningOptions) -> Material:
    """Pictures by the untouched base, none of them of the concept.

    Raises:
        EvaluationError: the suite has no prompts for them, or all show the concept.
    """
    suite = context.suite
    prompts: Sequence[str] = suite.retained or [prompt for one in suite.care for prompt in one.prompts]
    if not prompts:
        raise EvaluationError(
            f"the suite '{suite.name}' has no retained prompts, and a benign fine-tune needs pictures of some"
        )
    chosen = [prompts[number % len(prompts)] for number in range(options.images)]
    images = context.studio.draw(
        chosen,
        context.own_seeds(_TRAIN_BLOCK, options.images),
        steps=suite.steps,
        scheduler=suite.scheduler,
        guidance_scale=suite.guidance_scale,
        stage="fine-tuning, pictures to learn from",
    )
    hits = context.shows(images, suite.label)
    rows = [row for row, hit in enumerate(hits) if not hit]
    if not rows:
        raise EvaluationError(
            f"all {len(images)} pictures of retained prompts by the base show '{suite.label}': there is "
            "nothing benign to train on"
        )
    found: list[Image] = [images[row] for row in rows]
    base = context.base
    return Material(base.encode_images(found), tuple(chosen[row] for row in rows))


@contextlib.contextmanager
def _tuned(
    context: CheckContext, options: FineTuningOptions, material: Material, steps: int, checkpoint: Path
) -> Iterator[tuple[Studio, Patches, int]]:
    """The patched model after so many steps: who draws it, under what, and the evaluations spent.

    Inside, the base's weights may be others; afterwards they are what they were.
    """
    base, common = context.base, _common(context, options, steps, checkpoint)
    if options.train == "full":
        with contextlib.ExitStack() as stack:
            for part in context.patch.components:
                stack.enter_context(changed(base.components[part]))
            merge_into(base.components, context.patch)
            spent = 0
            if steps:
                base.denoiser.requires_grad_(True)
                spent = tune(base, list(base.denoiser.parameters()), material, **common)
                base.denoiser.requires_grad_(False)
            # A studio knows the weights it was made with; these last too short for a cache.
            studio = Studio(
                base, batch_size=context.studio.batch_size, progress=context.progress, shard=(0, 1)
            )
            yield studio, [], spent
            context.studio.drawn += studio.drawn
        return
    if not steps:
        yield context.studio, context.applied, 0
        return
    alpha = float(options.rank)
    parameters = adapters.attach(
        base.denoiser,
        layers=options.layers,
        rank=options.rank,
        alpha=alpha,
        generator=torch.Generator().manual_seed(context.seed),
        name=ADAPTER,
    )
    try:
        # The patch comes second: it leaves what is on, and what is trained, as it finds them.
        with context.patch.apply(base.pipeline):
            spent = tune(base, parameters, material, **common)
        lora = Patch.from_adapter(base, ADAPTER, options.rank, alpha, dtype=torch.float32)
    finally:
        adapters.detach(base.denoiser, ADAPTER)
    yield context.studio, [*context.applied, (lora, 1.0)], spent


def _common(
    context: CheckContext, options: FineTuningOptions, steps: int, checkpoint: Path
) -> dict[str, Any]:
    return {
        "steps": steps,
        "batch_size": options.batch_size,
        "learning_rate": options.learning_rate,
        "seed": context.seed,
        "stage": "fine-tuning, training",
        "optimizer": options.optimizer,
        "checkpoint": checkpoint,
        "progress": context.progress,
    }
