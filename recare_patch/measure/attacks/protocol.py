"""What every attack is given and returns, and the run that all of them share."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Generic, TypeVar

from pydantic import Field

from recare_patch.core import NullProgress, Settings, SettingsError, keep_json, kept_json

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from recare_patch.core import Progress
    from recare_patch.erasure import Loop
    from recare_patch.models import BaseModel
    from recare_patch.recipe import Concept

BUDGETS = ("small", "published")
"""Presets of every attack's options: one for a CPU, one as its paper has it."""

SHOWN = 8
"""Pictures that a result carries, to be looked at."""

Steps = Annotated[int, Field(ge=1, le=1_000_000)]
Rate = Annotated[float, Field(gt=0, le=10)]
Share = Annotated[float, Field(ge=0, le=1)]
Pictures = Annotated[int, Field(ge=1, le=100_000)]

Values = Mapping[str, Any]

Trial = dict[str, Any]
"""One try: the plain prompt (``attacked``), its ``seed``, the ``prompt`` that was found, and whether pictures
of the two show the concept (``without``, ``success``)."""

Draw = Callable[[slice], "list[Image]"]
"""Draws the pictures of some of the trials, in one batch."""


class AttackError(SettingsError):
    """An attack whose options hold faults, that has nothing to attack, or cannot be read."""


class AttackOptions(Settings):
    """Options that all attacks share."""

    error: ClassVar[type[SettingsError]] = AttackError
    noun: ClassVar[str] = "attack options"
    published: ClassVar[Values] = {}
    """The values of the attack's paper, where they differ from the small budget's."""

    pictures: Pictures = Field(24, description="trials: pictures that are judged, one a prompt")
    batch_size: int = Field(8, ge=1, le=1024, description="prompts or pictures worked on together")


@dataclass(frozen=True)
class AttackTarget:
    """A base model, patched by the caller for the length of the attack, and the concept it lost.

    The untouched base drew each of the ``images``, which show the concept, from its row of prompts and seeds.

    Attributes:
        shows: which pictures show the concept; a detector bound to its label.
        latents: clean ones of the images, ``[images, c, h, w]``.
        original: a context in which the patch is off.
        steps, guidance_scale: of the pictures that are judged.
        words: benign companions of the concept, from the patch's CARE-set.
    """

    base: BaseModel
    concept: Concept
    shows: Callable[[Sequence[Image]], list[bool]]
    images: list[Image]
    latents: Tensor
    original: Callable[[], AbstractContextManager[None]]
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    steps: int = 20
    guidance_scale: float = 5.0
    words: tuple[str, ...] = ()

    def draw(self, prompts: list[str] | None, seeds: list[int], embeds: Any = None) -> list[Image]:
        """Pictures of prompts, or of encoded ones, by the model as it stands; all in one batch."""
        how: dict[str, Any] = {"steps": self.steps, "guidance_scale": self.guidance_scale, "batch_size": len(seeds)}
        return self.base.generate(prompts, seeds, prompt_embeds=embeds, **how)

    def drawing(self, trials: Sequence[Trial], key: str) -> Draw:
        """Draws the prompts of trials: ``prompt`` or ``attacked``."""
        rows = [(one[key], one["seed"]) for one in trials]
        return lambda some: self.draw([prompt for prompt, _ in rows[some]], [seed for _, seed in rows[some]])


@dataclass(frozen=True)
class AttackResult:
    """What an attack reached: tries in which the concept came back, of all.

    Attributes:
        interval: 95 %, Wilson, of their ratio.
        without: successes of the plain prompts in as many trials, without the attack.
        evaluations, seconds: of the attack and of the pictures that were judged; not of target pictures.
        budget: the options it ran with.
        tensors: learnt vectors, where there are any.
        prompts: what was drawn in each trial, as text.
        pictures: the first few pictures of the attack.
        base: share of such trials in which the untouched base shows the concept, where it was measured.
        note: a sentence on what the successes are worth.
    """

    attack: str
    successes: int
    trials: int
    interval: tuple[float, float]
    without: int
    evaluations: int
    seconds: float
    budget: dict[str, Any]
    details: list[Trial]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    prompts: list[str] = field(default_factory=list)
    pictures: list[Image] = field(default_factory=list)
    base: float | None = None
    note: str = ""

    @property
    def rate(self) -> float:
        """Attack success rate, 0 to 1."""
        return self.successes / self.trials


Options = TypeVar("Options", bound=AttackOptions)


@dataclass
class AttackRun(Generic[Options]):
    """What an attack is given, what it has spent, and where it keeps what a resume reads."""

    name: str
    target: AttackTarget
    options: Options
    seed: int
    progress: Progress
    work: Path | None

    def __post_init__(self) -> None:
        self._began, self._mark = time.perf_counter(), self.target.base.counter.total

    def spent(self) -> dict[str, Any]:
        """``seconds`` and denoiser ``evaluations`` up to now."""
        seconds = round(time.perf_counter() - self._began, 3)
        return {"seconds": seconds, "evaluations": self.target.base.counter.total - self._mark}

    def catch_up(self, kept: Mapping[str, Any]) -> None:
        """Count what a stopped run had spent when it wrote this, unless it is counted already."""
        now = self.spent()
        if (kept["evaluations"], kept["seconds"]) > (now["evaluations"], now["seconds"]):
            self._began = time.perf_counter() - float(kept["seconds"])
            self._mark = self.target.base.counter.total - int(kept["evaluations"])

    def loop(self, name: str, steps: int, learning_rate: float) -> Loop:
        """A training loop whose checkpoint a resume reads, its cost counted."""
        from recare_patch.erasure import Checkpoint, Loop

        return Loop(
            self.name,
            steps,
            learning_rate,
            self.seed,
            checkpoint=Checkpoint(self.work / f"{name}.checkpoint.safetensors") if self.work else None,
            extra=self.spent,
            restore_extra=self.catch_up,
            progress=self.progress,
        )

    def read(self, name: str) -> Any:
        """What a stopped run had found, its cost counted; None where it kept nothing under this name."""
        kept = kept_json(self.work / f"{name}.json") if self.work is not None else None
        if kept is None:
            return None
        self.catch_up(kept["meter"])
        return kept.get("found")

    def write(self, name: str, found: Any) -> None:
        """Keep something, JSON values, for a resume."""
        if self.work is not None:
            keep_json(self.work / f"{name}.json", {"found": found, "meter": self.spent()})

    def once(self, name: str, find: Callable[[], Any]) -> Any:
        """What is found, or was; files called ``name.checkpoint`` have then served their turn."""
        found = self.read(name)
        if found is None:
            found = find()
            self.write(name, found)
            for checkpoint in self.work.glob(f"{name}.checkpoint.*") if self.work else ():
                checkpoint.unlink()
        return found

    def look(self, trials: list[Trial], key: str, stage: str, draw: Draw) -> None:
        """Draw the trials' pictures, a batch at a time, and put into each whether it shows the concept."""
        name = f"{self.name}, {stage}"
        found: list[bool] = self.read(name.replace(" ", "-")) or []
        with self.target.base.counter.stage(name):
            while len(found) < len(trials):
                images = draw(slice(len(found), len(found) + self.options.batch_size))
                found += [bool(hit) for hit in self.target.shows(images)]
                self.progress.update(name, len(found), len(trials), f"{sum(found)} show the concept")
                self.write(name.replace(" ", "-"), found)
        for one, hit in zip(trials, found, strict=True):
            one[key] = hit


class Attack(ABC, Generic[Options]):
    """One way to get the concept back: a subclass names its options and says how it searches."""

    name: ClassVar[str]
    options_type: type[Options]

    def candidates(self, concept: Concept, words: Sequence[str]) -> tuple[str, ...]:
        """Prompts whose pictures by the untouched base may serve as targets.

        Here those that name the concept, alone and beside its companions.
        """
        return tuple(dict.fromkeys([*concept.name_prompts, *map(concept.composed_prompt, words)]))

    def images_wanted(self, options: Options) -> int:
        """How many target pictures it asks for; here one for each attacked prompt."""
        return options.pictures

    def trials(self, target: AttackTarget, options: Options, seed: int) -> list[Trial]:
        """What is tried; here the target's own prompts and seeds."""
        pairs = list(zip(target.prompts, target.seeds, strict=True))[: options.pictures]
        return [{"prompt": prompt, "attacked": prompt, "seed": seed} for prompt, seed in pairs]

    @abstractmethod
    def search(self, run: AttackRun[Options], trials: list[Trial]) -> dict[str, Tensor]:
        """Put into each trial the ``prompt`` that is drawn, and ``success`` where it was seen on the way.

        What was learnt beside prompts is returned.
        """

    def saved_trials(self, target: AttackTarget, saved: AttackResult) -> list[Trial]:
        """What was tried on another patch; :class:`AttackError` where it does not fit this base model."""
        return [dict(one) for one in saved.details]

    def drawing(self, target: AttackTarget, trials: list[Trial], tensors: Mapping[str, Tensor]) -> Draw:
        """Draws what was found for each trial."""
        return target.drawing(trials, "prompt")

    def note(self, trials: Sequence[Trial]) -> str:
        """A sentence on what the successes are worth; here none."""
        return ""

    def run(
        self,
        target: AttackTarget,
        options: Options,
        *,
        seed: int,
        progress: Progress | None = None,
        work: Path | None = None,
        saved: AttackResult | None = None,
    ) -> AttackResult:
        """Attack, or try on another patch what a ``saved`` attack had found: nothing is learnt then.

        With a ``work`` folder, a run that was stopped goes on to the same result.
        """
        from recare_patch.measure.meters import wilson_interval

        run = AttackRun(self.name, target, options, seed, progress or NullProgress(), work)
        trials = self.saved_trials(target, saved) if saved else self.trials(target, options, seed)
        run.look(trials, "without", "plain", target.drawing(trials, "attacked"))
        if saved:
            tensors = saved.tensors
        else:
            with target.base.counter.stage(self.name):
                tensors = self.search(run, trials)
        draw = self.drawing(target, trials, tensors)
        # Those that look while they search have seen it.
        if saved or "success" not in trials[0]:
            run.look(trials, "success", "replay" if saved else "judge", draw)
        successes, spent = sum(bool(one["success"]) for one in trials), run.spent()
        pictures: list[Image] = []
        while len(pictures) < min(SHOWN, len(trials)):
            # Again, in the batches they were drawn in: a resumed run has not seen them.
            pictures += draw(slice(len(pictures), len(pictures) + options.batch_size))
        return AttackResult(
            attack=self.name,
            successes=successes,
            trials=len(trials),
            interval=wilson_interval(successes, len(trials)),
            without=sum(bool(one["without"]) for one in trials),
            **spent,
            budget=options.model_dump(),
            details=trials,
            tensors=tensors,
            prompts=[one["prompt"] for one in trials],
            pictures=pictures[:SHOWN],
            note=self.note(trials),
        )


# Erasing takes blocks of 100,000 seeds above a multiple of this stride; these lie far above.
_STRIDE, _CANDIDATES, _TRIALS = 1_000_003, 800_000, 900_000


def candidate_seeds(seed: int, count: int, first: int = _CANDIDATES) -> tuple[int, ...]:
    """Seeds of the pictures among which target pictures are looked for: none that an erasing run saw."""
    return tuple((seed * _STRIDE + first + k) % 2**31 for k in range(count))


def trial_seeds(seed: int, count: int) -> tuple[int, ...]:
    """Seeds of pictures that no erasing run and no target picture was drawn from."""
    return candidate_seeds(seed, count, _TRIALS)
