"""What every check is given, and what its points are made of."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

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

CONCEPT = "concept"
"""The series of pictures whose prompts name the concept."""

COMPANIONS = "companions"
"""The series of pictures of all CARE concepts, taken in turn."""

SUITES = "suite"
"""What a check asks for to draw with the suite's own scheduler."""

_FIRST_BLOCK = 100
"""Seeds of the checks' own pictures lie above those of every set of a suite."""

_SEED_STRIDE = 1000
_CHUNK = 32


class CheckOptions(Settings):
    """The options of a check; every check has its own."""

    error: ClassVar[type[SettingsError]] = EvaluationError
    noun: ClassVar[str] = "check options"


@dataclass(frozen=True)
class Asked:
    """Pictures that become one series of a check.

    Attributes:
        name: of the series.
        prompts, seeds: one each a picture.
        labels: what the detector looks for in each.
        words: what CLIP looks for where the detector does not know the label.
    """

    name: str
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    labels: tuple[str, ...]
    words: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class CheckContext:
    """A patch, its base and who judges; the base is plain before and after every check.

    Attributes:
        base: the model that the patch was made for, with no LoRA switched on.
        patch: what is checked.
        suite: gives prompts, labels, seeds, steps and guidance.
        detector: says what a picture shows.
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
    def applied(self) -> list[tuple[Patch, float]]:
        """The patch as it is used, at scale 1."""
        return [(self.patch, 1.0)]

    # ------------------------------------------------------------------ what is drawn

    def asked_concept(self, name: str = CONCEPT) -> Asked:
        """Pictures of the suite's plain prompts; the evaluation draws the same first ones."""
        drawing = self.suite.drawing("plain", self.pictures)
        return Asked(name, drawing.prompts, drawing.seeds, drawing.labels, drawing.labels)

    def asked_care(self) -> list[Asked]:
        """Pictures of each CARE concept, a series each."""
        found = []
        for number, one in enumerate(self.suite.care):
            drawing = self.suite.care_drawing(number, self.pictures)
            words = (one.clip_word,) * self.pictures
            found.append(
                Asked(f"{one.clip_word} shown", drawing.prompts, drawing.seeds, drawing.labels, words)
            )
        return found

    def asked_companions(self, name: str = COMPANIONS) -> list[Asked]:
        """Pictures of all CARE concepts in turn, as one series; none where the suite has none."""
        each = self.asked_care()
        if not each:
            return []
        places = [(each[row % len(each)], row // len(each)) for row in range(self.pictures)]
        return [
            Asked(
                name,
                tuple(one.prompts[place] for one, place in places),
                tuple(one.seeds[place] for one, place in places),
                tuple(one.labels[place] for one, place in places),
                tuple(one.words[place] for one, place in places),
            )
        ]

    def own_seeds(self, block: int, count: int) -> tuple[int, ...]:
        """Seeds of a check's own pictures, from no set of the suite.

        Args:
            block: a number for each set of such pictures.
            count: how many.
        """
        first = self.suite.first_seed + BLOCK * (_FIRST_BLOCK + block) + _SEED_STRIDE * self.seed
        return tuple(first + number for number in range(count))

    # ------------------------------------------------------------------ what is seen

    def shows(self, images: Sequence[Image], label: str, word: str | None = None) -> list[bool]:
        """Which pictures show a label: by the detector, or by CLIP where that does not know it.

        CLIP decides as the CARE score does: the word goes before every distractor.

        Args:
            images: the pictures.
            label: what the detector calls it.
            word: what CLIP compares with; None: the label.

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
        *,
        patches: Sequence[tuple[Patch, float]],
        stage: str,
        steps: int | None = None,
        scheduler: str | None = SUITES,
        studio: Studio | None = None,
    ) -> dict[str, HitRate]:
        """How often pictures show what they are looked at for.

        Args:
            asked: the series, drawn one after the other.
            patches: what is put into the base, each at its scale.
            stage: how progress calls it.
            steps: of the scheduler; None: the suite's.
            scheduler: a name, None for the base's own; by default the suite's.
            studio: another one than the context's, of a base whose weights were changed.

        Returns:
            Name of the series → rate.
        """
        rows = [(one, number) for one in asked for number in range(len(one.prompts))]
        stream = (studio or self.studio).stream(
            [one.prompts[number] for one, number in rows],
            [one.seeds[number] for one, number in rows],
            patches=patches,
            steps=self.suite.steps if steps is None else steps,
            guidance_scale=self.suite.guidance_scale,
            scheduler=self.suite.scheduler if scheduler == SUITES else scheduler,
            stage=stage,
        )
        rates = {one.name: HitRate() for one in asked}
        for chunk in _chunks(stream):
            places: dict[tuple[str, str], list[tuple[str, Image]]] = {}
            for row, image in chunk:
                one, number = rows[row]
                key = one.labels[number], one.words[number]
                places.setdefault(key, []).append((one.name, image))
            for (label, word), held in places.items():
                hits = self.shows([image for _, image in held], label, word)
                for (name, _), hit in zip(held, hits, strict=True):
                    rates[name].add(hit, label)
        return rates

    # ------------------------------------------------------------------ keeping

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


def _chunks(stream: Iterator[tuple[int, Image]]) -> Iterator[list[tuple[int, Image]]]:
    chunk: list[tuple[int, Image]] = []
    for one in stream:
        chunk.append(one)
        if len(chunk) == _CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def point(x: float | str, found: Mapping[str, HitRate | Mean], pictures: int) -> CheckPoint:
    """One point of a check.

    Args:
        x: the setting.
        found: name of a series → what was counted.
        pictures: behind each value.
    """
    intervals = {
        name: (round(max(one.interval[0], 0.0), 6), round(one.interval[1], 6))
        for name, one in found.items()
        if one.interval is not None
    }
    return CheckPoint(
        x=float(x) if isinstance(x, int) else x,
        values={name: round(one.value, 6) for name, one in found.items()},
        intervals=intervals,
        pictures=pictures,
    )


Options = TypeVar("Options", bound=CheckOptions)


class Checker(Protocol[Options]):
    """One check.

    Attributes:
        name: as registered.
        options_type: its options.
    """

    name: str
    options_type: type[Options]

    def run(self, context: CheckContext, options: Options) -> Check:
        """Draw, look and tell; the base is left as it was found.

        Args:
            context: what is checked, and who judges.
            options: how.
        """
        ...
