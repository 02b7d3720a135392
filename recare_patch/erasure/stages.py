"""The state of one erasing run: its folder, its costs, and the concepts that it is about."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file
from torch import Tensor

from recare_patch.careset import Clip
from recare_patch.core import Progress, write_tensors
from recare_patch.erasure.ledger import Ledger
from recare_patch.erasure.loop import Checkpoint
from recare_patch.models import BaseModel
from recare_patch.recipe import Concept, Recipe, scheduled

if TYPE_CHECKING:
    from recare_patch.careset import CareSet

logger = logging.getLogger(__name__)

_SEED_STRIDE = 1_000_003
_BLOCKS = 10
"""Blocks of seeds that a concept may use."""


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
        around: what :func:`words_around` found: a large vocabulary takes a while to
            encode.
    """

    concept: Concept
    number: int = 0
    attribute: Concept | None = None
    others: tuple[Concept, ...] = ()
    latents: Tensor | None = None
    shown: Tensor | None = None
    care_set: CareSet | None = None
    around: tuple[list[str], Tensor, list[str]] | None = None

    def stage(self, name: str) -> str:
        """A stage's name, told apart from that of the run's other concepts."""
        return f"{name} {self.number + 1}" if self.number else name

    @property
    def drawn_prompts(self) -> list[str]:
        """The prompts of its target images, in turn."""
        plain = self.concept.target_prompt
        return [self.joined_prompt, plain] if self.attribute is not None else [plain]

    @property
    def joined_prompt(self) -> str:
        """The subject with the attribute that is taken from it."""
        assert self.attribute is not None
        return self.concept.composed_prompt(self.attribute.text)


class Run:
    """What the stages of a run share.

    Attributes:
        recipe, work, base, clip, progress: of the run; ``work`` is its hidden folder.
        keep_images: keep target images beside the patch.
        ledger: its costs.
        warnings: what the user should know, one sentence each.
        losses: loop → the loss of every step.
        notes: further figures for ``training.json``.
        targets: its concepts.
        ground: an earlier patch's adapter that the run goes on from, by component; empty without one.
    """

    def __init__(
        self,
        recipe: Recipe,
        work: Path,
        base: BaseModel,
        clip: Clip,
        progress: Progress,
        save_target_images: bool,
    ) -> None:
        """A run, or the rest of one that was stopped in ``work``."""
        self.recipe, self.work, self.base, self.clip, self.progress = recipe, work, base, clip, progress
        self.keep_images = save_target_images
        self.ledger = Ledger(work / "cost.json", base)
        self.warnings: list[str] = []
        self.losses: dict[str, list[float]] = {}
        self.notes: dict[str, float] = {}
        self.ground: dict[str, dict[str, Tensor]] = {}
        first = recipe.subject or recipe.concept
        attribute = recipe.concept if recipe.subject is not None else None
        concepts = (first, *recipe.also)
        self.targets = [
            Target(one, k, attribute, tuple(other for other in concepts if other is not one))
            for k, one in enumerate(concepts)
        ]

    def warn(self, sentence: str) -> None:
        """Tell the user now, and again at the end."""
        logger.warning(sentence)
        self.warnings.append(sentence)

    @property
    def unsafe(self) -> bool:
        """Whether pictures of what it erases should be seen by as few as possible."""
        return any(target.concept.kind == "nsfw" for target in self.targets)

    def pictures(self, stage: str, prompts: Sequence[str], count: int, first_seed: int) -> Tensor:
        """Clean latents ``[count, c, h, w]`` of pictures of the prompts in turn, from the frozen base."""
        each, crew = self.recipe.target_images.batch_size, self.base.crew
        batches = [range(start, min(start + each, count)) for start in range(0, count, each)]
        files = [self.work / f"{stage.replace(' ', '-')}-{rows[0]:05d}.safetensors" for rows in batches]
        here = [file.exists() for file in files]
        # All processes look before any writes; each then draws every n-th batch.
        self.wait()
        done: dict[int, Tensor] = {}
        with self.ledger.stage(stage):
            for k, rows in enumerate(batches):
                if here[k]:
                    done[k] = load_file(files[k])["latents"].to(self.base.device)
                elif crew is None or k % crew.count == crew.index:
                    done[k] = self._drawn([prompts[i % len(prompts)] for i in rows], first_seed + rows[0])
                    # Latents decode to pictures: of unsafe concepts they stay in memory, and a
                    # resumed run draws them again from the same seeds.
                    if not self.unsafe or self.keep_images:
                        write_tensors(files[k], {"latents": done[k].cpu()}, {})
                self.progress.update(stage, rows[-1] + 1, count)
            for k, rows in enumerate(batches):
                if crew is not None and not here[k]:
                    place = torch.empty((len(rows), *self.base.latent_shape), device=self.base.device)
                    done[k] = crew.send(done.get(k, place), k % crew.count)
        return torch.cat([done[k] for k in range(len(batches))])

    def _drawn(self, prompts: list[str], first_seed: int) -> Tensor:
        options = self.recipe.target_images
        with scheduled(self.base.pipeline, options.scheduler):
            return self.base.sample_latents(
                self.base.encode_prompts(prompts),
                [first_seed + k for k in range(len(prompts))],
                steps=options.steps,
                guidance_scale=options.guidance_scale,
                batch_size=options.batch_size,
            )

    @property
    def main(self) -> bool:
        """Whether this process is the one that writes what belongs to all."""
        return self.base.crew is None or self.base.crew.main

    def wait(self) -> None:
        """Wait until all processes of the run have come this far."""
        if self.base.crew is not None:
            self.base.crew.wait()

    def checkpoint(self, stage: str) -> Checkpoint:
        """Where a loop's state is kept."""
        return Checkpoint(self.work / f"{stage.replace(' ', '-')}.checkpoint.safetensors")


def first_seed(recipe: Recipe, block: int, number: int = 0) -> int:
    """The first seed of a block of pictures: apart from those of other blocks, concepts and runs.

    Args:
        recipe: of the run.
        block: 1 to 9.
        number: of the concept.
    """
    return (recipe.seed * _SEED_STRIDE + (block + _BLOCKS * number) * 100_000) % 2**31
