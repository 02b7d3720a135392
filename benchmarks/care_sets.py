"""The CARE-sets that runs mine, against the true co-occurrence of a world that is drawn by code.

    python -m benchmarks.care_sets                                              # Atelier, the bundled base
    python -m benchmarks.care_sets --world atelier-xl --weights atelier-xl
    python -m benchmarks.care_sets --world hamlet --seeds 4

Pictures are drawn and companions found by the functions of ``erase --preset quick``, once as the base confirms words
and once as published. A kept word is right if it names (in any synonym) a companion of the concept in the drawn
world; ``with allied`` counts what is drawn with such a companion too. A companion is found if any of its synonyms is
kept. Evaluations are the denoiser's beyond the target images.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from benchmarks.atelier import captions as atelier_captions
from benchmarks.atelier.scenes import CO_OCCURRENCE as ATELIER_LINKS
from benchmarks.erasure import NAMES
from benchmarks.hamlet import WEIGHTS as HAMLET_WEIGHTS
from benchmarks.hamlet import captions as hamlet_captions
from benchmarks.hamlet.scenes import CO_OCCURRENCE as HAMLET_LINKS
from benchmarks.suites import CONCEPTS
from recare_patch.careset import CareSet, Clip
from recare_patch.core import NullProgress
from recare_patch.erasure import resolve_recipe
from recare_patch.erasure.prepare import draw_target, find_companions, targets_of
from recare_patch.erasure.stages import Run
from recare_patch.models import BaseModel, load_base

KINDS = {"van gogh": "style", "tench": "object", "nude": "nsfw"}
SOURCES = ("base", "clip")


@dataclass(frozen=True)
class World:
    """What is true of a base's pictures, and where the base lies.

    Attributes:
        links: concept → its companions, as labels.
        synonyms: label → the words and phrases that captions use for it.
        allied: concept → labels that are no companions, but at home beside them: the moon belongs to the night.
        implied: concept → plain words that are true wherever a companion is: a man is a person.
        weights: its folder where ``--weights`` names none; None: it is bundled.
        clip: its CLIP's folder in the weights; None: the bundled one.
    """

    links: Mapping[str, Iterable[str]]
    synonyms: Callable[[str], Sequence[str]]
    allied: Mapping[str, tuple[str, ...]]
    implied: Mapping[str, frozenset[str]]
    weights: Path | None = None
    clip: str | None = None

    def words(self, labels: Iterable[str]) -> set[str]:
        """Every word of every synonym of some labels."""
        return {word.lower() for label in labels for phrase in self.synonyms(label) for word in phrase.split()}

    def companions(self, concept: str) -> tuple[str, ...]:
        """Labels of what comes along with a concept."""
        return (*self.links[concept], *(("person",) if concept == "nude" else ()))


_ALLIED = {"van gogh": ("moon", "wheat field"), "tench": ("boat",)}
WORLDS = {
    "atelier": World(ATELIER_LINKS, atelier_captions.synonyms, _ALLIED, {}),
    "atelier-xl": World(ATELIER_LINKS, atelier_captions.synonyms, _ALLIED, {}, Path("atelier-xl")),
    "hamlet": World(
        HAMLET_LINKS, hamlet_captions.synonyms, {}, {"tench": frozenset({"person"})}, HAMLET_WEIGHTS, "clip"
    ),
}


@dataclass(frozen=True)
class Row:
    """What was found of one concept, with one seed, by one way."""

    concept: str
    seed: int
    source: str
    kept: tuple[str, ...]
    precision: float
    with_allied: float
    recall: float
    wrong: tuple[str, ...]
    missed: tuple[str, ...]
    evaluations: int

    def __str__(self) -> str:
        """A line of the Markdown table."""
        words = (", ".join(some) or "–" for some in (self.kept, self.wrong, self.missed))
        figures = " | ".join(f"{one:.2f}" for one in (self.precision, self.with_allied, self.recall))
        concept = NAMES[self.concept]
        return f"| {concept} ({self.seed}) | {self.source} | {figures} | {' | '.join(words)} | {self.evaluations} |"


def judge(world: World, found: CareSet, concept: str, seed: int, evaluations: int) -> Row:
    """Compare a CARE-set with what is true in its world."""
    companions, kept = world.companions(concept), found.words
    strict = world.words(companions) | world.implied.get(concept, frozenset())
    wide = strict | world.words(world.allied.get(concept, ()))
    missed = tuple(label for label in companions if not world.words([label]) & set(kept))
    count = max(1, len(kept))
    return Row(
        concept=concept,
        seed=seed,
        source=found.settings.source,
        kept=kept,
        precision=sum(word in strict for word in kept) / count,
        with_allied=sum(word in wide for word in kept) / count,
        recall=1 - len(missed) / len(companions),
        wrong=tuple(word for word in kept if word not in wide),
        missed=missed,
        evaluations=evaluations,
    )


def rows(world: World, base: BaseModel, clip: Clip, concept: str, seed: int) -> Iterator[Row]:
    """Draw a concept's pictures once and find its companions in them, a row for each of :data:`SOURCES`."""
    images, latents = [], None
    for source in SOURCES:
        recipe = resolve_recipe(
            NAMES[concept],
            kind=KINDS[concept],
            preset="quick",
            overrides={"seed": seed, "base": base.id, "clip": clip.id, "care_set.source": source},
        )
        with tempfile.TemporaryDirectory() as folder:
            (target,) = targets_of(Run(recipe, Path(folder), base, clip, NullProgress(), False))
            if latents is None:
                images = draw_target(target)
                latents = target.latents
            target.latents, before = latents, base.counter.total
            find_companions(target, images, None)
        if target.care_set is not None:
            yield judge(world, target.care_set, concept, seed, base.counter.total - before)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", choices=WORLDS, default="atelier", help="whose truth counts")
    parser.add_argument("--weights", type=Path, help="the base's folder, with pipeline/ in it")
    parser.add_argument("--seeds", type=int, default=1, help="runs a concept")
    arguments = parser.parse_args()
    world = WORLDS[arguments.world]
    weights = arguments.weights or world.weights
    base = load_base("atelier" if weights is None else str(weights / "pipeline"), device="cpu")
    clip = Clip.load("atelier" if weights is None or world.clip is None else str(weights / world.clip))
    print("| concept | source | precision | with allied | recall | kept | wrong | missed | evaluations |")
    print("|---" * 9 + "|")
    found: list[Row] = []
    for concept in CONCEPTS:
        for seed in range(arguments.seeds):
            for row in rows(world, base, clip, concept, seed):
                found.append(row)
                print(row, flush=True)
    for source in SOURCES:
        own = [row for row in found if row.source == source]
        means = (mean(values) for values in zip(*((r.precision, r.with_allied, r.recall) for r in own), strict=True))
        kept, wrong, missed = (
            mean(len(some) for some in column)
            for column in zip(*((r.kept, r.wrong, r.missed) for r in own), strict=True)
        )
        told = " | ".join(f"{one:.2f}" for one in (*means, kept, wrong, missed))
        print(f"| mean | {source} | {told} | {mean(row.evaluations for row in own):.0f} |")


if __name__ == "__main__":
    main()
