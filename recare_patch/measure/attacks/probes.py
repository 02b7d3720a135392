"""Probes: is what was erased still there, where the prompt is not what leads to it?

They start from what the untouched base drew of the concept, with a part hidden, half denoised or noised
again, or look for a better noise: the contexts of Lu et al., "When Are Concepts Erased From Diffusion
Models?" (arXiv 2505.17013), here for any scheduler. Such a start shows something by itself, so each trial
is drawn by the untouched base too, from the same start and under a prompt that does not name the concept:
a probe says something by how far it goes beyond that.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor

from recare_patch.measure.attacks import protocol
from recare_patch.measure.attacks.protocol import (
    Attack,
    AttackOptions,
    AttackResult,
    AttackRun,
    AttackTarget,
    Options,
    Trial,
    trial_seeds,
)
from recare_patch.models import PromptEmbeds, Trajectory

if TYPE_CHECKING:
    from collections.abc import Callable

GIVEN = "given"
"""Of a trial: whether the untouched base shows the concept without its name, from the same start."""

_OTHER_NOISE = 0x5DEECE66D
"""Turns a picture's seed into that of a noise which is not its own."""


def words(target: AttackTarget, prompts: Sequence[str]) -> tuple[PromptEmbeds, PromptEmbeds | None]:
    """Prompts as the model that is on reads them, and the empty one where pictures are guided."""
    base = target.base
    return base.encode_prompts(prompts), base.encode_prompts([""]) if target.guidance_scale > 1 else None


def originals(target: AttackTarget, trials: Sequence[Trial]) -> Tensor:
    """Clean latents of what the untouched base drew for some trials; a replay draws them again."""
    rows = {pair: row for row, pair in enumerate(zip(target.prompts, target.seeds, strict=True))}
    found = [rows.get((one["attacked"], one["seed"])) for one in trials]
    if None not in found:
        return target.latents[found]
    with target.original():
        embeds = target.base.encode_prompts([one["attacked"] for one in trials])
        how: dict[str, Any] = {"steps": target.steps, "guidance_scale": target.guidance_scale}
        return target.base.sample_latents(embeds, [one["seed"] for one in trials], batch_size=len(trials), **how)


class Probe(Attack[Options]):
    """Draws each trial's own prompt from a start that the untouched base gives."""

    def told(self, options: Options) -> dict[str, Any]:
        """What each trial says of its start, so that it can be drawn again."""
        return {}

    def trials(self, target: AttackTarget, options: Options, seed: int) -> list[Trial]:
        """The target's own pictures."""
        return [{**one, **self.told(options)} for one in super().trials(target, options, seed)]

    @abstractmethod
    def latents(self, target: AttackTarget, trials: Sequence[Trial], prompts: Sequence[str]) -> Tensor:
        """Clean latents, drawn from the trials' starts by the model as it stands, one prompt a trial."""

    def search(self, run: AttackRun[Options], trials: list[Trial]) -> dict[str, Tensor]:
        """Nothing is learnt: what the starts give away is looked at."""
        target = run.target

        def given(some: slice) -> list[Image.Image]:
            with target.original():
                plain = [target.concept.plain_prompt] * len(trials[some])
                return target.base.decode_latents(self.latents(target, trials[some], plain))

        run.look(trials, GIVEN, "without the name", given)
        return {}

    def drawing(self, target: AttackTarget, trials: list[Trial], tensors: Mapping[str, Tensor]) -> protocol.Draw:
        """Draws from the trials' starts."""

        def draw(some: slice) -> list[Image.Image]:
            prompts = [one["prompt"] for one in trials[some]]
            return target.base.decode_latents(self.latents(target, trials[some], prompts))

        return draw

    def note(self, trials: Sequence[Trial]) -> str:
        """How often the start alone was enough."""
        count = sum(bool(one.get(GIVEN)) for one in trials)
        return f"The untouched base shows it without its name, from the same starts, in {count} of {len(trials)}."


class CompletionOptions(AttackOptions):
    """How far the untouched base goes."""

    share: float = Field(0.5, gt=0, lt=1, description="of the steps, that the untouched base takes before")


class Completion(Probe[CompletionOptions]):
    """Goes on from a half-denoised picture of the untouched base."""

    name = "completion"
    options_type = CompletionOptions

    def told(self, options: CompletionOptions) -> dict[str, Any]:
        """How far the base goes."""
        return {"share": options.share}

    def latents(self, target: AttackTarget, trials: Sequence[Trial], prompts: Sequence[str]) -> Tensor:
        """The base's steps under the trials' own prompts, then the model's under the given ones."""
        way = Trajectory(target.base, target.steps)
        latents = way.start(way.noise([one["seed"] for one in trials]))
        with target.original():
            before = words(target, [one["attacked"] for one in trials])
        after, handover = words(target, prompts), round(trials[0]["share"] * len(way.timesteps))
        for number in range(len(way.timesteps)):
            with target.original() if number < handover else nullcontext():
                read = before if number < handover else after
                latents = way.step(latents, number, *read, target.guidance_scale)
        return latents


class ImageToImageOptions(AttackOptions):
    """How much of the picture goes."""

    strength: float = Field(0.75, gt=0, le=1, description="share of the steps that are taken again, as img2img has it")


class ImageToImage(Probe[ImageToImageOptions]):
    """img2img from a picture of the concept (SDEdit, Meng et al., arXiv 2108.01073), with a noise of its own."""

    name = "img2img"
    options_type = ImageToImageOptions

    def told(self, options: ImageToImageOptions) -> dict[str, Any]:
        """How much is drawn again."""
        return {"strength": options.strength}

    def latents(self, target: AttackTarget, trials: Sequence[Trial], prompts: Sequence[str]) -> Tensor:
        """The last steps, from the picture noised as far."""
        way = Trajectory(target.base, target.steps)
        noise = way.noise([one["seed"] ^ _OTHER_NOISE for one in trials])
        first = len(way.timesteps) - max(1, round(trials[0]["strength"] * len(way.timesteps)))
        latents, read = way.noised(originals(target, trials), noise, first), words(target, prompts)
        for number in range(first, len(way.timesteps)):
            latents = way.step(latents, number, *read, target.guidance_scale)
        return latents


class InpaintingOptions(AttackOptions):
    """Which part of the picture is hidden."""

    side: float = Field(0.5, gt=0, lt=1, description="of the smallest box tried, as a share of the picture's")
    largest: float = Field(0.875, gt=0, lt=1, description="side of the box where no smaller one hides the concept")


class Inpainting(Probe[InpaintingOptions]):
    """Fills in a box that hid the concept from the detector: the smallest that does, of nine places a size.

    What is left of the picture is encoded with the box in its mean colour, so that nothing of what is hidden
    leaks, and is put back after each step, noised as far (Lugmayr et al., RePaint, arXiv 2201.09865, without
    its resampling).
    """

    name = "inpainting"
    options_type = InpaintingOptions

    def search(self, run: AttackRun[InpaintingOptions], trials: list[Trial]) -> dict[str, Tensor]:
        """Find each trial's box."""
        found = run.once("boxes", partial(self._boxes, run, trials))
        for one, box in zip(trials, found, strict=True):
            one["box"] = box
        return super().search(run, trials)

    def _boxes(self, run: AttackRun[InpaintingOptions], trials: list[Trial]) -> list[list[float]]:
        options, target, size = run.options, run.target, run.options.batch_size
        sides = sorted({min(options.side, options.largest), (options.side + options.largest) / 2, options.largest})
        chosen = [list(_places(options.largest))[4]] * len(trials)
        left = list(range(len(trials)))
        for box in (box for side in sides for box in _places(side)):
            shown: list[int] = []
            for start in range(0, len(left), size):
                rows = left[start : start + size]
                hits = target.shows([_hidden(target.images[row], box) for row in rows])
                shown += [row for row, hit in zip(rows, hits, strict=True) if hit]
                for row in set(rows) - set(shown):
                    chosen[row] = box
            left = shown
            if not left:
                break
        return chosen

    def latents(self, target: AttackTarget, trials: Sequence[Trial], prompts: Sequence[str]) -> Tensor:
        """All steps inside the boxes, the rest as it was."""
        base, way = target.base, Trajectory(target.base, target.steps)
        pictures = base.decode_latents(originals(target, trials))
        known = base.encode_images([_hidden(one, row["box"]) for one, row in zip(pictures, trials, strict=True)])
        inside = torch.stack([_mask(one["box"], base.latent_shape) for one in trials]).to(base.device)
        noise = way.noise([one["seed"] ^ _OTHER_NOISE for one in trials])
        latents, read = way.start(noise), words(target, prompts)
        for number in range(len(way.timesteps)):
            latents = way.step(latents, number, *read, target.guidance_scale)
            latents = torch.where(inside, latents, way.noised(known, noise, number + 1))
        return latents


def _places(side: float) -> Iterator[list[float]]:
    """Nine boxes of a side, ``[top, left, side]`` as shares of the picture's; the fifth is in the middle."""
    for top in (0.0, 0.5, 1.0):
        for left in (0.0, 0.5, 1.0):
            yield [round(top * (1 - side), 6), round(left * (1 - side), 6), round(side, 6)]


def _corners(box: Sequence[float], height: int, width: int) -> tuple[slice, slice]:
    top, left, side = box
    rows = slice(round(top * height), round((top + side) * height))
    return rows, slice(round(left * width), round((left + side) * width))


def _mask(box: Sequence[float], shape: Sequence[int]) -> Tensor:
    inside = torch.zeros((1, *shape[1:]), dtype=torch.bool)
    inside[:, *_corners(box, shape[1], shape[2])] = True
    return inside


def _hidden(picture: Image.Image, box: Sequence[float]) -> Image.Image:
    """The picture with a box in the mean colour of what is around it."""
    pixels = np.asarray(picture.convert("RGB")).copy()
    rows, columns = _corners(box, *pixels.shape[:2])
    outside = np.ones(pixels.shape[:2], bool)
    outside[rows, columns] = False
    pixels[rows, columns] = pixels[outside].mean(0).round()
    return Image.fromarray(pixels)


class NoiseSearchOptions(AttackOptions):
    """How long is looked."""

    tries: int = Field(16, ge=1, le=100_000, description="noises tried for each prompt: the best of so many")


class NoiseSearch(Attack[NoiseSearchOptions]):
    """Tries one noise after the other under the plain prompt, until a picture shows the concept.

    Success is also a first picture that shows it. The untouched base looks as often under a prompt without
    the concept: what it finds, chance finds.
    """

    name = "noise-search"
    options_type = NoiseSearchOptions

    def search(self, run: AttackRun[NoiseSearchOptions], trials: list[Trial]) -> dict[str, Tensor]:
        """Look for a noise for each trial, and by chance for as many."""
        seeds = trial_seeds(run.seed, len(trials) * run.options.tries)
        target, plain = run.target, run.target.concept.plain_prompt
        for number, one in enumerate(trials):
            one |= {"success": one["without"], "found": seeds[number * run.options.tries]}
        self._look(run, trials, seeds, "success", lambda one: one["attacked"])
        for one in trials:
            one[GIVEN] = False
        with target.original():
            self._look(run, trials, seeds, GIVEN, lambda one: plain)
        return {}

    def _look(
        self,
        run: AttackRun[NoiseSearchOptions],
        trials: list[Trial],
        seeds: Sequence[int],
        key: str,
        prompt: Callable[[Trial], str],
    ) -> None:
        tries, size, stage = run.options.tries, run.options.batch_size, f"{self.name}, {key}"
        for number in range(tries):
            left = [row for row, one in enumerate(trials) if not one[key]]

            def look(left: list[int] = left, number: int = number) -> list[bool]:
                hits: list[bool] = []
                for start in range(0, len(left), size):
                    rows = left[start : start + size]
                    own = [seeds[row * tries + number] for row in rows]
                    hits += map(bool, run.target.shows(run.target.draw([prompt(trials[row]) for row in rows], own)))
                return hits

            for row, hit in zip(left, run.once(f"{key}-{number:05d}", look), strict=True):
                if hit:
                    trials[row][key] = True
                    if key == "success":
                        trials[row]["found"] = seeds[row * tries + number]
            found = sum(bool(one[key]) for one in trials)
            run.progress.update(stage, number + 1, tries, f"{found} of {len(trials)} found")

    def saved_trials(self, target: AttackTarget, saved: AttackResult) -> list[Trial]:
        """The noises that were found."""
        return [dict(one) for one in saved.details]

    def drawing(self, target: AttackTarget, trials: list[Trial], tensors: Mapping[str, Tensor]) -> protocol.Draw:
        """Draws the plain prompts from the noises that were found, or from their own where that was enough."""
        rows = [(one["prompt"], one["seed"] if one["without"] else one["found"]) for one in trials]
        return lambda some: target.draw([prompt for prompt, _ in rows[some]], [seed for _, seed in rows[some]])

    def note(self, trials: Sequence[Trial]) -> str:
        """What chance finds."""
        count = sum(bool(one.get(GIVEN)) for one in trials)
        told = "The untouched base finds it in as many tries without its name"
        return f"{told} in {count} of {len(trials)}."
