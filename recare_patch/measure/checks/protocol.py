"""What every check is given, and what its points are made of."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from recare_patch.core import EvaluationError, Settings, SettingsError
from recare_patch.measure.evidence import Check, CheckPoint
from recare_patch.measure.judges import MostLike, can_tell
from recare_patch.measure.meters import HitRate, Mean
from recare_patch.measure.suites import BLOCK
from recare_patch.models import weights_hash
from recare_patch.recipe import Concept

if TYPE_CHECKING:
    from PIL.Image import Image

    from recare_patch.careset import Clip
    from recare_patch.core import Progress
    from recare_patch.measure.judges import Detector
    from recare_patch.measure.pictures import Studio
    from recare_patch.measure.suites import Suite
    from recare_patch.models import BaseModel
    from recare_patch.patch import Patch

PICTURES = 24
"""Pictures behind each value, where nothing else is asked for: minutes on a CPU."""

CONCEPT, COMPANIONS = "concept", "companions"
"""The series of pictures whose prompts name the concept, and of those of all CARE concepts in turn."""

SUITES = "suite"
"""Asks for the suite's own scheduler."""

_FIRST_BLOCK = 100
"""Seeds of the checks' own pictures lie above those of every set of a suite."""

_SEED_STRIDE = 1000
_CHUNK = 32

Patches = Sequence[tuple["Patch", float]]
"""What is put into the base, each at its scale."""


class CheckOptions(Settings):
    """The options of a check; every check has its own."""

    error: ClassVar[type[SettingsError]] = EvaluationError
    noun: ClassVar[str] = "check options"


@dataclass(frozen=True)
class Asked:
    """Pictures that become one series of a check.

    Attributes:
        rows: prompt, seed, what the detector looks for, and what CLIP looks for where the detector does
            not know that.
    """

    name: str
    rows: tuple[tuple[str, int, str, str], ...]

    @classmethod
    def turns(
        cls, name: str, prompts: Sequence[str], seeds: Sequence[int], label: str, word: str | None = None
    ) -> Asked:
        """A picture for each seed, of prompts that take turns, all looked at for one thing."""
        rows = ((prompts[k % len(prompts)], seed, label, word or label) for k, seed in enumerate(seeds))
        return cls(name, tuple(rows))


@dataclass(frozen=True, eq=False)
class CheckContext:
    """A patch, its base and who judges; the base is plain before and after every check.

    Attributes:
        base: the model that the patch was made for, with no LoRA switched on.
        suite: gives prompts, labels, seeds, steps and guidance.
        studio: draws pictures of ``base``, in one process.
        pictures: behind each value.
        seed: of all training, and of the pictures that it learns from.
        progress: told of training steps; of pictures the studio tells.
        work: folder for checkpoints, so that a stopped training goes on; None keeps nothing.
        clip: gives the CLIP that looks for what the detector has no label for; None: there is none.
    """

    base: BaseModel
    patch: Patch
    suite: Suite
    detector: Detector
    studio: Studio
    pictures: int = PICTURES
    seed: int = 0
    progress: Progress | None = None
    work: Path | None = None
    clip: Callable[[], Clip] | None = None

    def __post_init__(self) -> None:
        if self.pictures < 1:
            raise EvaluationError(f"a check needs at least 1 picture a value, got {self.pictures}")
        if self.studio.base is not self.base:
            raise EvaluationError(
                f"the studio draws base '{self.studio.base.id}', and what is checked is base '{self.base.id}'"
            )

    @property
    def concept(self) -> Concept:
        """What the patch erases."""
        return Concept(text=self.suite.concept, kind=self.suite.kind)

    @property
    def applied(self) -> Patches:
        """The patch as it is used, at scale 1."""
        return [(self.patch, 1.0)]

    def asked_concept(self, name: str = CONCEPT) -> Asked:
        """Pictures of the suite's plain prompts; the evaluation draws the same first ones."""
        drawing = self.suite.drawing("plain", self.pictures)
        return Asked.turns(name, drawing.prompts, drawing.seeds, self.suite.label)

    def asked_care(self) -> list[Asked]:
        """Pictures of each CARE concept, a series each."""
        found = []
        for number, one in enumerate(self.suite.care):
            drawing, word = self.suite.care_drawing(number, self.pictures), one.clip_word
            found.append(Asked.turns(f"{word} shown", drawing.prompts, drawing.seeds, one.label, word))
        return found

    def asked_companions(self, name: str = COMPANIONS) -> list[Asked]:
        """Pictures of all CARE concepts in turn, as one series; none where the suite has none."""
        each = self.asked_care()
        turns = (each[k % len(each)].rows[k // len(each)] for k in range(self.pictures))
        return [Asked(name, tuple(turns))] if each else []

    def own_seeds(self, block: int, count: int) -> tuple[int, ...]:
        """Seeds of a check's own pictures, from no set of the suite; ``block`` numbers its sets."""
        first = self.suite.first_seed + BLOCK * (_FIRST_BLOCK + block) + _SEED_STRIDE * self.seed
        return tuple(range(first, first + count))

    def draw(
        self, prompts: Sequence[str], seeds: Sequence[int], stage: str, patches: Patches = ()
    ) -> list[Image]:
        """Pictures as the suite has them drawn."""
        suite = self.suite
        return self.studio.draw(
            prompts,
            seeds,
            patches=patches,
            steps=suite.steps,
            guidance_scale=suite.guidance_scale,
            scheduler=suite.scheduler,
            stage=stage,
        )

    def shows(self, images: Sequence[Image], label: str, word: str | None = None) -> list[bool]:
        """Which pictures show a label: by the detector, or by CLIP where that does not know it.

        CLIP decides as the CARE score does: the word, or else the label, goes before every distractor.

        Raises:
            EvaluationError: the detector does not know it, and there is no CLIP.
        """
        if not images:
            return []
        if can_tell(self.detector, label):
            return [bool(hit) for hit in self.detector.rate(images, label)]
        if self.clip is None:
            raise EvaluationError(
                f"the detector {self.detector.name} cannot tell '{label}', and there is no CLIP to ask"
            )
        return MostLike(self.clip(), word or label, self.suite.labels)(images)

    def rates(
        self,
        asked: Sequence[Asked],
        patches: Patches,
        stage: str,
        *,
        steps: int | None = None,
        scheduler: str | None = SUITES,
        studio: Studio | None = None,
    ) -> dict[str, HitRate]:
        """How often pictures show what they are looked at for, by the name of their series.

        Args:
            asked: the series, drawn one after the other.
            patches: what is put into the base.
            stage: how progress calls it.
            steps: of the scheduler; None: the suite's.
            scheduler: a name, None for the base's own; by default the suite's.
            studio: another one than the context's, of a base whose weights were changed.
        """
        rows = [(one.name, *row) for one in asked for row in one.rows]
        stream = (studio or self.studio).stream(
            [prompt for _, prompt, *_ in rows],
            [seed for _, _, seed, *_ in rows],
            patches=patches,
            steps=self.suite.steps if steps is None else steps,
            guidance_scale=self.suite.guidance_scale,
            scheduler=self.suite.scheduler if scheduler == SUITES else scheduler,
            stage=stage,
        )
        rates = {one.name: HitRate() for one in asked}
        while chunk := list(islice(stream, _CHUNK)):
            alike: dict[tuple[str, str], list[tuple[str, Image]]] = {}
            for row, image in chunk:
                name, _, _, label, word = rows[row]
                alike.setdefault((label, word), []).append((name, image))
            for (label, word), held in alike.items():
                hits = self.shows([image for _, image in held], label, word)
                for (name, _), hit in zip(held, hits, strict=True):
                    rates[name].add(hit, label)
        return rates

    def folder(self, name: str, fields: Mapping[str, Any]) -> Path | None:
        """Where a check keeps what it trained, named by everything that decides it.

        Args:
            name: of the check.
            fields: what decides it beside the base and the seed; JSON values.

        Returns:
            The folder, which may not be there yet; None where nothing is kept.
        """
        if self.work is None:
            return None
        decides = {
            "base": [self.base.id, self.base.denoiser_hash(), weights_hash(self.base.pipeline.text_encoder)],
            "precision": str(self.base.dtype),
            "seed": self.seed,
            **fields,
        }
        text = json.dumps(decides, sort_keys=True, allow_nan=False)
        return self.work / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def once(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Each value once, in its first place."""
    return tuple(dict.fromkeys(values))


def in_order(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Each value once, from the least to the greatest."""
    return tuple(sorted(set(values)))


def point(x: float | str, found: Mapping[str, HitRate | Mean], pictures: int) -> CheckPoint:
    """What was counted of each series at one setting."""
    intervals = {
        name: (round(max(one.interval[0], 0.0), 6), round(one.interval[1], 6))
        for name, one in found.items()
        if one.interval is not None
    }
    return CheckPoint(
        x=x if isinstance(x, str) else float(x),
        values={name: round(one.value, 6) for name, one in found.items()},
        intervals=intervals,
        pictures=pictures,
    )


Options = TypeVar("Options", bound=CheckOptions)


class Checker(ABC, Generic[Options]):
    """One check: its options, its name and how readers are told of it."""

    name: ClassVar[str]
    options_type: type[Options]
    title: ClassVar[str]
    x_label: ClassVar[str]
    y_label: ClassVar[str] = "pictures that show it"

    @abstractmethod
    def run(self, context: CheckContext, options: Options) -> Check:
        """Draw, look and tell; the base is left as it was found."""

    def told(self, points: Sequence[CheckPoint], what: str, note: str = "") -> Check:
        """The check of these points, with a sentence on what was done and a note for the reader."""
        return Check(
            name=self.name,
            title=self.title,
            what=what,
            x_label=self.x_label,
            y_label=self.y_label,
            points=tuple(points),
            note=note,
        )
