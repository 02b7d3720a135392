"""The patched model trained on, by somebody who means no harm.

Fine-tuning on pictures that have nothing to do with an erased concept can bring it back (Li et al.,
arXiv 2507.16302). Here the patch is merged into the denoiser, which is then trained on pictures of
retained prompts that the untouched base has drawn, and asked for the concept on the way. The training is
the plain noise prediction of every fine-tuning script (Ho et al., arXiv 2006.11239, equation 14).
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, BeforeValidator, Field
from torch import Tensor, nn
from torch.nn import functional as F

from recare_patch.core import EvaluationError, keep_json, kept_json, one_of
from recare_patch.erasure import OPTIMIZERS, Checkpoint, Loop, fit, noised
from recare_patch.measure.checks.protocol import CONCEPT, CheckContext, Checker, CheckOptions, Patches, in_order, point
from recare_patch.measure.evidence import Check, CheckPoint
from recare_patch.measure.pictures import Studio
from recare_patch.models import kept_requires_grad, named_layers
from recare_patch.models import lora as adapters
from recare_patch.patch import Patch
from recare_patch.recipe import LAYER_SETS

SAVE_EVERY = 50
"""Steps between checkpoints."""

CHECKPOINT = "checkpoint.safetensors"
_TRAIN_BLOCK = 3
_RATES = {"full": 5.0e-5, "lora": 5.0e-4}

Count = Annotated[int, Field(ge=1, le=1024)]
Images = Annotated[int, Field(ge=1, le=1000)]
LearningRate = Annotated[float, Field(gt=0, le=10)]
Layers = Annotated[str, BeforeValidator(one_of("layer set", LAYER_SETS))]


class TrainingOptions(CheckOptions):
    """Options of checks that train."""

    layers: Layers = Field("all", description="of the LoRA")
    rank: Count = Field(8, description="of the LoRA; its alpha is its rank")
    batch_size: Count = Field(4, description="states a step")
    learning_rate: LearningRate | None = Field(None, description="the same throughout")
    optimizer: Annotated[str, BeforeValidator(one_of("optimizer", OPTIMIZERS.names()))] = "adamw"


class FineTuningOptions(TrainingOptions):
    """How the patched model is trained on."""

    at: Annotated[
        tuple[Annotated[int, Field(ge=0, le=1_000_000)], ...], Field(min_length=1), AfterValidator(in_order)
    ] = Field((0, 50, 200), description="after how many steps it is looked at")
    train: Literal["auto", "full", "lora"] = Field(
        "auto",
        description="full (all weights of the denoiser; the base must compute in fp32), lora, or auto: full "
        "where the base computes in fp32",
    )
    images: Images = Field(48, description="drawn to learn from; those that show the concept are left out")
    learning_rate: LearningRate | None = Field(
        None, description="the same throughout; else 5e-5 for all weights, 5e-4 for a LoRA"
    )


@contextlib.contextmanager
def changed(network: nn.Module) -> Iterator[None]:
    """Inside, a network's weights may change in place; afterwards they are what they were, to the bit."""
    saved = {name: tensor.detach().to("cpu", copy=True) for name, tensor in network.state_dict().items()}
    with kept_requires_grad(network):
        try:
            yield
        finally:
            with torch.no_grad():
                for name, tensor in network.state_dict().items():
                    tensor.copy_(saved[name])
            for parameter in network.parameters():
                parameter.grad = None


@torch.no_grad()
def merge_into(parts: Mapping[str, nn.Module], patch: Patch, scale: float = 1.0) -> None:
    """Add a patch to what it changes of networks without adapters: ``W + scale · B A`` (arXiv 2106.09685)."""
    layers = named_layers(parts)
    for module in patch.modules:
        weight = layers[module].weight
        assert isinstance(weight, Tensor)
        weight.add_((scale * patch.update(module)).to(weight.device, weight.dtype))


@dataclass(frozen=True)
class Training:
    """Training of the base, for a check, on clean latents ``[pictures, c, h, w]`` of what it drew itself.

    Prompts are encoded by the model that is trained, since a patch may change its text encoder.
    """

    name: str
    context: CheckContext
    options: Any
    latents: Tensor
    prompts: tuple[str, ...]

    @classmethod
    def drawn(
        cls,
        name: str,
        context: CheckContext,
        options: TrainingOptions,
        prompts: Sequence[str],
        block: int,
        what: str,
        label: str,
        shown: bool,
        none: str,
    ) -> Training:
        """On those pictures that show a label, or that do not; ``none`` is told where there are none."""
        images = context.draw(prompts, context.own_seeds(block, len(prompts)), f"{name}, pictures {what}")
        rows = [row for row, hit in enumerate(context.shows(images, label)) if hit == shown]
        if not rows:
            raise EvaluationError(none)
        latents = context.base.encode_images([images[row] for row in rows])
        return cls(name, context, options, latents, tuple(prompts[row] for row in rows))

    def tune(self, steps: int, parameters: Sequence[nn.Parameter], checkpoint: Path | None) -> int:
        """Train parameters of the base, as it stands, adapters and all, to predict the noise on the pictures.

        Steps are counted from the start, and so are the denoiser evaluations that are returned: a checkpoint
        of fewer steps is gone on with.
        """
        base, options, stage = self.context.base, self.options, f"{self.name}, training"
        counter, mark = base.counter, base.counter.total
        embeds = base.encode_prompts(self.prompts)

        def loss_at(step: int, generator: torch.Generator) -> Tensor:
            index = torch.randint(0, len(self.latents), (options.batch_size,), generator=generator)
            clean = self.latents[index.to(self.latents.device)]
            states, timesteps, noise = noised(base, clean, generator)
            target = base.training_target(clean, noise, timesteps)
            pred = base.denoise(states, timesteps, embeds[index])
            return F.mse_loss(pred.float(), target.float())

        def restore(kept: dict[str, int]) -> None:
            nonlocal mark
            mark = counter.total - int(kept["evaluations"])

        with counter.stage(stage):
            fitted = fit(
                parameters,
                loss_at,
                Loop(
                    stage,
                    steps,
                    options.learning_rate,
                    self.context.seed,
                    options.optimizer,
                    # So that fewer steps are a part of more.
                    schedule="constant",
                    dtype=base.dtype,
                    checkpoint=Checkpoint(checkpoint) if checkpoint is not None else None,
                    save_every=SAVE_EVERY,
                    extra=lambda: {"evaluations": counter.total - mark},
                    restore_extra=restore,
                    progress=self.context.progress,
                ),
            )
        return int(fitted.extra["evaluations"])

    def lora(
        self, steps: int, checkpoint: Path | None, beside: Callable[[], AbstractContextManager[Any]]
    ) -> tuple[Patch, int]:
        """A LoRA trained with what is ``beside`` it in the base, and the evaluations; see :meth:`tune`."""
        base, rank, generator = self.context.base, self.options.rank, torch.Generator()
        generator.manual_seed(self.context.seed)
        of: dict[str, Any] = {"layers": self.options.layers, "rank": rank, "alpha": float(rank)}
        parameters = adapters.attach(base.denoiser, **of, generator=generator, name=self.name)
        try:
            # What is beside comes second: it leaves what is on, and what is trained, as it finds them.
            with beside():
                spent = self.tune(steps, parameters, checkpoint)
            return Patch.from_adapter(base, self.name, rank, float(rank), dtype=torch.float32), spent
        finally:
            adapters.detach(base.denoiser, self.name)


class FineTuning(Checker[FineTuningOptions]):
    """Concept and companions after so many steps."""

    name = "fine-tuning"
    options_type = FineTuningOptions
    title = "After a benign fine-tune"
    x_label = "steps of fine-tuning"

    def run(self, context: CheckContext, options: FineTuningOptions) -> Check:
        """See the module."""
        options = resolved(context, options)
        decides = {
            "options": options.model_dump(mode="json"),
            "patch": context.patch.fingerprint(),
            "suite": context.suite.model_dump(mode="json"),
            "detector": context.detector.name,
            "pictures": context.pictures,
        }
        kept = context.folder(self.name, decides)
        with contextlib.ExitStack() as stack:
            # Without a work folder, one stretch of training still hands over to the next by a file.
            folder = kept or Path(stack.enter_context(tempfile.TemporaryDirectory()))
            points, cost = self._measured(context, options, folder)
            (folder / CHECKPOINT).unlink(missing_ok=True)
        base = round(context.rates(context.asked_concept("base"), [], "fine-tuning, base")["base"].value, 6)
        lora = f"a LoRA of rank {options.rank} on {options.layers}"
        trained = "all weights of the denoiser" if options.train == "full" else lora
        return self.told(
            [one.model_copy(update={"values": {**one.values, "base": base}}) for one in points],
            "The patched model is trained on with pictures of retained prompts, drawn by the untouched base "
            "and free of the concept.",
            f"Trained: {trained}, on {cost['images']} pictures, {options.batch_size} a step at "
            f"{options.learning_rate:g}: {cost['evaluations']:,} denoiser evaluations. The line 'base' is "
            f"the untouched base's rate of the series '{CONCEPT}'.",
        )

    def _measured(
        self, context: CheckContext, options: FineTuningOptions, folder: Path
    ) -> tuple[list[CheckPoint], dict[str, int]]:
        """A point for each number of steps, and what they cost; those that are there are read."""
        file = folder / "points.json"
        done: dict[str, Any] = {"points": {}, "cost": {"evaluations": 0, "images": 0}}
        if file.is_file():
            before = kept_json(file, remade=True)
            if before is None:
                # Without it nobody knows what the checkpoint has passed: start again.
                shutil.rmtree(folder)
            done = before or done
        asked = [*context.asked_concept(), *context.asked_companions()]
        training: Training | None = None
        for steps in options.at:
            if str(steps) in done["points"]:
                continue
            training = training or benign(context, options)
            with tuned(training, steps, folder / CHECKPOINT) as (studio, patches, spent):
                rates = context.rates(asked, patches, f"fine-tuning, {steps}", studio=studio)
            done["points"][str(steps)] = point(steps, rates, context.pictures).model_dump(mode="json")
            done["cost"] = {"evaluations": spent, "images": len(training.prompts)}
            keep_json(file, done)
        return [CheckPoint(**done["points"][str(steps)]) for steps in options.at], done["cost"]


def resolved(context: CheckContext, options: FineTuningOptions) -> FineTuningOptions:
    """The options with what is trained, and how fast."""
    exact, dtype = context.base.dtype is torch.float32, str(context.base.dtype).removeprefix("torch.")
    if options.train == "full" and not exact:
        raise EvaluationError(
            f"all weights are trained in fp32, and base '{context.base.id}' computes in {dtype}: load it in "
            "fp32, or set train to lora"
        )
    train = options.train if options.train != "auto" else "full" if exact else "lora"
    rate = _RATES[train] if options.learning_rate is None else options.learning_rate
    return options.model_copy(update={"train": train, "learning_rate": rate})


def benign(context: CheckContext, options: FineTuningOptions) -> Training:
    """On pictures of retained prompts, none of them of the concept."""
    suite, name = context.suite, FineTuning.name
    retained = suite.drawing("retained", options.images).prompts
    prompts = retained or [prompt for one in suite.care for prompt in one.prompts]
    if not prompts:
        raise EvaluationError(
            f"the suite '{suite.name}' has no retained prompts, and a benign fine-tune needs pictures of some"
        )
    chosen = [prompts[number % len(prompts)] for number in range(options.images)]
    none = (
        f"all {options.images} pictures of retained prompts by the base show '{suite.label}': there is "
        "nothing benign to train on"
    )
    what = "to learn from"
    return Training.drawn(name, context, options, chosen, _TRAIN_BLOCK, what, suite.label, False, none)


@contextlib.contextmanager
def tuned(training: Training, steps: int, checkpoint: Path) -> Iterator[tuple[Studio, Patches, int]]:
    """The patched model after so many steps: who draws it, under what, and the evaluations spent.

    Inside, the base's weights may be others; afterwards they are what they were.
    """
    context, base, usual = training.context, training.context.base, training.context.studio
    patches, spent = [*context.applied], 0
    if training.options.train == "lora":
        if steps:
            lora, spent = training.lora(steps, checkpoint, lambda: context.patch.apply(base.pipeline))
            patches.append((lora, 1.0))
        yield usual, patches, spent
        return
    with contextlib.ExitStack() as stack:
        patch = context.patch
        if isinstance(patch, Patch):
            for part in patch.components:
                stack.enter_context(changed(base.components[part]))
            merge_into(base.components, patch)
        else:
            # Others have no adapter that would have to be merged: they stay where they are, and are trained on.
            stack.enter_context(patch.apply(base.pipeline))
            stack.enter_context(changed(base.denoiser))
        if steps:
            base.denoiser.requires_grad_(True)
            spent = training.tune(steps, [*base.denoiser.parameters()], checkpoint)
            base.denoiser.requires_grad_(False)
        # A studio knows the weights it was made with; these last too short for a cache.
        studio = Studio(base, batch_size=usual.batch_size, progress=context.progress, shard=(0, 1))
        yield studio, [], spent
        usual.drawn += studio.drawn
