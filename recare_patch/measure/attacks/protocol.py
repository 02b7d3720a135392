"""What every attack is given, what it returns, and how its work is counted and kept."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Protocol, Self, TypeVar

from pydantic import Field

from recare_patch.core import ResumeError, Settings, SettingsError, unknown_name, write_json
from recare_patch.measure.meters import wilson_interval

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from recare_patch.core import Progress
    from recare_patch.models import BaseModel
    from recare_patch.recipe import Concept

BUDGETS = ("small", "published")
"""Presets of every attack's options: one for a CPU, one as its paper has it."""

SHOWN = 8
"""Pictures that a result carries, to be looked at."""

Steps = Annotated[int, Field(ge=1, le=1_000_000)]
Rate = Annotated[float, Field(gt=0, le=10)]
Share = Annotated[float, Field(ge=0, le=1)]


class AttackError(SettingsError):
    """An attack whose options hold faults, that has nothing to attack, or cannot be read."""


class AttackOptions(Settings):
    """Options that all attacks share.

    Attributes:
        pictures: trials: pictures that are judged, one for each attacked prompt.
        batch_size: prompts or pictures worked on together; memory and speed, hardly the result.
    """

    error: ClassVar[type[SettingsError]] = AttackError
    noun: ClassVar[str] = "attack options"

    pictures: Annotated[int, Field(ge=1, le=100_000)] = 24
    batch_size: Annotated[int, Field(ge=1, le=1024)] = 8

    @classmethod
    def published(cls) -> Mapping[str, Any]:
        """The values of the attack's paper, where they differ from the small budget's."""
        return {}

    @classmethod
    def preset(cls, budget: str, overrides: Mapping[str, Any] | None = None) -> Self:
        """The options of a budget, some of them set otherwise.

        Args:
            budget: a name of :data:`BUDGETS`.
            overrides: key → value.

        Raises:
            UnknownNameError: no such budget; the sentence offers the nearest.
            AttackError: unknown keys or bad values; all are told at once.
        """
        if budget not in BUDGETS:
            raise unknown_name("budget", budget, BUDGETS)
        start = cls.published() if budget == "published" else {}
        return cls(**{**start, **(overrides or {})})


@dataclass(frozen=True)
class AttackTarget:
    """A patched model and what is known of the concept it lost.

    Row ``i`` of pictures, latents, prompts and seeds belong together: the untouched base drew that
    picture, which shows the concept, from that prompt and seed.

    Attributes:
        base: the model, with the patch put in by the caller for the length of the attack.
        concept: what the patch erases.
        shows: which pictures show the concept; a detector bound to its label.
        images, latents: target pictures and their clean latents ``[images, c, h, w]``.
        original: a context in which the patch is off.
        prompts, seeds: of the target pictures, and what is attacked.
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

    def draw(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image]:
        """Pictures of the model as it stands, all in one batch."""
        return self.base.generate(
            list(prompts),
            list(seeds),
            steps=self.steps,
            guidance_scale=self.guidance_scale,
            batch_size=len(seeds),
        )


@dataclass(frozen=True)
class AttackResult:
    """What an attack reached.

    Attributes:
        attack: its registered name.
        successes, trials: tries in which the concept came back, of all.
        interval: 95 %, Wilson, of their ratio.
        without: successes of the plain prompts in as many trials, without the attack.
        evaluations: denoiser evaluations of the attack and of the pictures that were judged; target
            pictures are not counted.
        seconds: of the same.
        budget: the options it ran with.
        details: one entry a trial: at least ``prompt``, ``seed``, ``success`` and ``without``.
        tensors: learnt vectors, where there are any.
        prompts: what was drawn in each trial, as text.
        pictures: the first few pictures of the attack.
        base: share of such trials in which the untouched base shows the concept, where it was measured.
    """

    attack: str
    successes: int
    trials: int
    interval: tuple[float, float]
    without: int
    evaluations: int
    seconds: float
    budget: dict[str, Any]
    details: list[dict[str, Any]]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    prompts: list[str] = field(default_factory=list)
    pictures: list[Image] = field(default_factory=list)
    base: float | None = None

    @property
    def rate(self) -> float:
        """Attack success rate, 0 to 1."""
        return self.successes / self.trials

    @classmethod
    def of(
        cls,
        attack: str,
        details: Sequence[Mapping[str, Any]],
        meter: Meter,
        options: AttackOptions,
        *,
        tensors: Mapping[str, Tensor] | None = None,
        pictures: Sequence[Image] = (),
    ) -> AttackResult:
        """The result that the trials add up to."""
        successes = sum(bool(one["success"]) for one in details)
        spent = meter.so_far()
        return cls(
            attack,
            successes,
            len(details),
            wilson_interval(successes, len(details)),
            sum(bool(one["without"]) for one in details),
            spent["evaluations"],
            spent["seconds"],
            options.model_dump(),
            [dict(one) for one in details],
            dict(tensors or {}),
            [str(one["prompt"]) for one in details],
            list(pictures),
        )


Options = TypeVar("Options", bound=AttackOptions)


class Attack(Protocol[Options]):
    """One way to get the concept back.

    Attributes:
        name: as registered.
        options_type: its options; see :meth:`AttackOptions.preset`.
    """

    name: str
    options_type: type[Options]

    def candidates(self, concept: Concept, words: Sequence[str]) -> tuple[str, ...]:
        """Prompts whose pictures by the untouched base may serve as targets."""
        ...

    def images_wanted(self, options: Options) -> int:
        """How many target pictures it asks for."""
        ...

    def run(
        self,
        target: AttackTarget,
        options: Options,
        *,
        seed: int,
        progress: Progress | None = None,
        work: Path | None = None,
    ) -> AttackResult:
        """Attack; with a ``work`` folder, a run that was stopped goes on to the same result.

        Args:
            target: the patched model and the pictures of what it lost.
            options: the budget.
            seed: every random draw follows from it.
            progress: told of every step.
            work: for checkpoints; ``None`` keeps nothing.
        """
        ...

    def replay(
        self, target: AttackTarget, saved: AttackResult, *, progress: Progress | None = None
    ) -> AttackResult:
        """Try what was found before on another patch; nothing is learnt."""
        ...


class Meter:
    """Seconds and denoiser evaluations of an attack; they are kept with what a resume reads."""

    def __init__(self, base: BaseModel) -> None:
        self.base = base
        self._began, self._mark = time.perf_counter(), base.counter.total

    def so_far(self) -> dict[str, Any]:
        """``seconds`` and ``evaluations`` up to now."""
        return {
            "seconds": round(time.perf_counter() - self._began, 3),
            "evaluations": self.base.counter.total - self._mark,
        }

    def restore(self, kept: Mapping[str, Any]) -> None:
        """Go on from an earlier :meth:`so_far`."""
        self._began = time.perf_counter() - float(kept["seconds"])
        self._mark = self.base.counter.total - int(kept["evaluations"])

    def catch_up(self, kept: Mapping[str, Any]) -> None:
        """Count what a stopped run had spent when it wrote this, unless it is counted already."""
        so_far = self.so_far()
        more = ("evaluations", "seconds")
        if tuple(kept[key] for key in more) > tuple(so_far[key] for key in more):
            self.restore(kept)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside is not counted."""
        kept = self.so_far()
        try:
            yield
        finally:
            self.restore(kept)


def read_json(file: Path) -> Any:
    """A file of a run's own.

    Raises:
        ResumeError: it is damaged.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as fault:
        raise ResumeError(
            f"{file.name} of this run is damaged ({fault}); start again in a new --out"
        ) from None


def judged(
    target: AttackTarget,
    name: str,
    count: int,
    draw: Callable[[slice], list[Image]],
    options: AttackOptions,
    meter: Meter,
    *,
    progress: Progress | None = None,
    work: Path | None = None,
) -> list[bool]:
    """Draw pictures a batch at a time and say which of them show the concept.

    Args:
        target: who judges.
        name: of the stage, in progress and of its file.
        count: pictures.
        draw: the pictures of a range of trials.
        options: how many at once.
        meter: its count is kept beside the verdicts.
        progress: told after every batch.
        work: where the verdicts are kept.
    """
    file = work / f"{name.replace(' ', '-')}.json" if work else None
    found: list[bool] = []
    if file and file.exists():
        kept = read_json(file)
        found = list(kept["shows"])
        meter.catch_up(kept["meter"])
    with target.base.counter.stage(name):
        while len(found) < count:
            images = draw(slice(len(found), min(len(found) + options.batch_size, count)))
            found += [bool(hit) for hit in target.shows(images)]
            if progress:
                progress.update(name, len(found), count, f"{sum(found)} show the concept")
            if file:
                write_json(file, {"shows": found, "meter": meter.so_far()})
    return found


def first_pictures(
    count: int, draw: Callable[[slice], list[Image]], options: AttackOptions, meter: Meter
) -> list[Image]:
    """The first few pictures again, in the batches they were drawn in; not counted."""
    images: list[Image] = []
    with meter.paused():
        while len(images) < min(SHOWN, count):
            images += draw(slice(len(images), min(len(images) + options.batch_size, count)))
    return images[:SHOWN]


_STRIDE = 1_000_003


def trial_seeds(seed: int, count: int) -> tuple[int, ...]:
    """Seeds of pictures that no erasing run and no target picture was drawn from.

    Erasing takes blocks of 100,000 seeds above a multiple of the same stride; these lie far above.
    """
    return tuple((seed * _STRIDE + 900_000 + k) % 2**31 for k in range(count))


def candidate_seeds(seed: int, count: int) -> tuple[int, ...]:
    """Seeds of the pictures among which target pictures are looked for: none that an erasing run saw."""
    return tuple((seed * _STRIDE + 800_000 + k) % 2**31 for k in range(count))
