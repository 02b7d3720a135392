"""What every check is given, and what its points are made of."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NamedTuple, TypeVar

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
    from recare_patch.measure.erasers import Eraser
    from recare_patch.measure.judges import Detector
    from recare_patch.measure.pictures import Studio
    from recare_patch.measure.suites import Suite
    from recare_patch.models import BaseModel

PICTURES = 24
"""Pictures behind each value, where nothing else is asked for: minutes on a CPU."""

CONCEPT, COMPANIONS = "concept", "companions"
"""The series of pictures whose prompts name the concept, and of those of all CARE concepts in turn."""

_FIRST_BLOCK = 100
"""Seeds of the checks' own pictures lie above those of every set of a suite."""

_SEED_STRIDE = 1000
_CHUNK = 32

Patches = Sequence[tuple["Eraser", float]]
"""What is put into the base, each at its scale."""


class CheckOptions(Settings):
    """The options of a check; every check has its own."""

    error: ClassVar[type[SettingsError]] = EvaluationError
    noun: ClassVar[str] = "check options"


class Asked(NamedTuple):
    """A picture that counts in the series ``name`` of a check.

    CLIP looks for the ``word`` where the detector does not know the ``label``.
    """

    name: str
    prompt: str
    seed: int
    label: str
    word: str


def turns(name: str, prompts: Sequence[str], seeds: Sequence[int], label: str, word: str | None = None) -> list[Asked]:
    """A picture for each seed, of prompts that take turns, all looked at for one thing."""
    return [Asked(name, prompts[k % len(prompts)], seed, label, word or label) for k, seed in enumerate(seeds)]


@dataclass(frozen=True, eq=False)
class CheckContext:
    """A patch, its base and who judges; the base is plain before and after every check.

    Attributes:
        suite: gives prompts, labels, seeds, steps and guidance.
        studio: draws pictures of ``base``, in one process.
        pictures: behind each value.
        seed: of all training, and of the pictures that it learns from.
        progress: told of training steps; of pictures the studio tells.
        work: folder for checkpoints, so that a stopped training goes on; None keeps nothing.
        clip: gives the CLIP that looks for what the detector has no label for; None: there is none.
    """

    base: BaseModel
    patch: Eraser
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

    def asked_concept(self, name: str = CONCEPT) -> list[Asked]:
        """Pictures of the suite's plain prompts; the evaluation draws the same first ones."""
        drawing = self.suite.drawing("plain", self.pictures)
        return turns(name, drawing.prompts, drawing.seeds, self.suite.label)

    def asked_care(self) -> list[list[Asked]]:
        """Pictures of each CARE concept, a series each."""
        drawings = [self.suite.care_drawing(k, self.pictures) for k in range(len(self.suite.care))]
        return [
            turns(f"{one.clip_word} shown", drawing.prompts, drawing.seeds, one.label, one.clip_word)
            for one, drawing in zip(self.suite.care, drawings, strict=True)
        ]

    def asked_companions(self, name: str = COMPANIONS) -> list[Asked]:
        """Pictures of all CARE concepts in turn, as one series."""
        each = self.asked_care()
        count = self.pictures if each else 0
        return [each[k % len(each)][k // len(each)]._replace(name=name) for k in range(count)]

    def own_seeds(self, block: int, count: int) -> tuple[int, ...]:
        """Seeds of a check's own pictures, from no set of the suite; ``block`` numbers its sets."""
        first = self.suite.first_seed + BLOCK * (_FIRST_BLOCK + block) + _SEED_STRIDE * self.seed
        return tuple(range(first, first + count))

    def draw(
        self, prompts: Sequence[str], seeds: Sequence[int], stage: str, patches: Patches = (), **more: Any
    ) -> list[Image]:
        """Pictures as the suite has them drawn; ``more`` are other fields of a :class:`Request`."""
        return self.studio.draw(prompts, seeds, patches=patches, stage=stage, **{**self._sampler, **more})

    @property
    def _sampler(self) -> dict[str, Any]:
        return {name: getattr(self.suite, name) for name in ("steps", "guidance_scale", "scheduler")}

    def shows(self, images: Sequence[Image], label: str, word: str | None = None) -> list[bool]:
        """Which pictures show a label: by the detector, or by CLIP where that does not know it.

        CLIP decides as the CARE score does: the word, or else the label, goes before every distractor.
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
        self, asked: Sequence[Asked], patches: Patches, stage: str, *, studio: Studio | None = None, **sampler: Any
    ) -> dict[str, HitRate]:
        """How often pictures show what they are looked at for, by the name of their series.

        Args:
            asked: drawn in this order.
            patches: what is put into the base.
            stage: how progress calls it.
            studio: another one than the context's, of a base whose weights were changed.
            sampler: ``steps`` and ``scheduler`` (None: the base's own) in place of the suite's, or other fields of a
                :class:`Request`.
        """
        stream = (studio or self.studio).stream(
            [one.prompt for one in asked],
            [one.seed for one in asked],
            patches=patches,
            stage=stage,
            **{**self._sampler, **sampler},
        )
        rates = {one.name: HitRate() for one in asked}
        while chunk := list(islice(stream, _CHUNK)):
            alike: dict[tuple[str, str], list[tuple[str, Image]]] = {}
            for row, image in chunk:
                alike.setdefault((asked[row].label, asked[row].word), []).append((asked[row].name, image))
            for (label, word), held in alike.items():
                hits = self.shows([image for _, image in held], label, word)
                for (name, _), hit in zip(held, hits, strict=True):
                    rates[name].add(hit, label)
        return rates

    def folder(self, name: str, fields: Mapping[str, Any]) -> Path | None:
        """Where a check keeps what it trained, named by what decides it: base, seed and ``fields``.

        It may not be there yet; None where nothing is kept.
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
    values = {name: round(one.value, 6) for name, one in found.items()}
    intervals = {
        name: (round(max(one.interval[0], 0.0), 6), round(one.interval[1], 6))
        for name, one in found.items()
        if one.interval is not None
    }
    x = x if isinstance(x, str) else float(x)
    return CheckPoint(x=x, values=values, intervals=intervals, pictures=pictures)


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
        known = {key: getattr(self, key) for key in ("name", "title", "x_label", "y_label")}
        return Check(what=what, points=tuple(points), note=note, **known)
