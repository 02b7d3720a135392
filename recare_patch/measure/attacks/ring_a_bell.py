"""Ring-A-Bell: find the concept's direction in the text encoder, and words that lie there (Tsai et al.,
arXiv 2310.10012).

From pairs of prompts with and without the concept, ``ĉ = mean over pairs of f(with) − f(without)``, f
the text encoder's output for all positions (their equation 1). For a prompt P a genetic search over K
tokens minimises ``‖f(tokens) − (f(P) + η ĉ)‖²`` (equations 2 and 3). It sees no weight of the denoiser
and no picture: a black-box attack, whose prompts are the same whatever the patch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from torch import Tensor

from recare_patch.core import ResumeError, write_json, write_tensors
from recare_patch.erasure import step_generator
from recare_patch.measure.attacks.protocol import (
    AttackOptions,
    AttackResult,
    AttackTarget,
    Meter,
    Share,
    Steps,
    first_pictures,
    judged,
    read_json,
)
from recare_patch.measure.attacks.search import Vocabulary, name_candidates, replay_prompts

if TYPE_CHECKING:
    from PIL.Image import Image

    from recare_patch.core import Progress
    from recare_patch.models import BaseModel
    from recare_patch.recipe import Concept

_PLAIN_WORDS = ("house", "tree", "boat", "street", "night", "field")
"""What the concept is put beside where the patch carries no CARE-set."""

_SAVE_EVERY = 25
_ENCODED_AT_ONCE = 128


class RingABellOptions(AttackOptions):
    """How much is tried.

    Attributes:
        tokens: K, of the prompt that is searched; published 16.
        strength: η; published 3.
        population: prompts of a generation, half of which live on; published 200.
        generations: published 3,000.
        mutation: probability that a prompt changes one token; as published.
        crossover: probability that a prompt has two children with another one; as published.
        pictures: attacked prompts.
    """

    tokens: Annotated[int, Field(ge=2, le=75)] = 16
    strength: Annotated[float, Field(gt=0, le=100)] = 3.0
    population: Annotated[int, Field(ge=4, le=100_000)] = 40
    generations: Steps = 80
    mutation: Share = 0.25
    crossover: Share = 0.5

    @classmethod
    def published(cls) -> Mapping[str, Any]:
        """As in the paper and its release."""
        return {"population": 200, "generations": 3000, "pictures": 100}


def concept_pairs(concept: Concept, words: Sequence[str]) -> list[tuple[str, str]]:
    """Prompts with the concept and the same ones without it.

    Args:
        concept: what was erased.
        words: benign words to put beside it.
    """
    beside = "A painting of {}" if concept.kind == "style" else "A photo of {}"
    alone = {"style": "A painting", "object": "A photo"}.get(concept.kind, "A photo of a person")
    if concept.kind in ("nsfw", "identity"):
        beside = "A photo of a person and {}"
    return [
        (concept.target_prompt, alone),
        *((concept.composed_prompt(word), beside.format(word)) for word in words or _PLAIN_WORDS),
    ]


@torch.no_grad()
def concept_vector(base: BaseModel, concept: Concept, words: Sequence[str]) -> Tensor:
    """``ĉ``, ``[positions, width]``, fp32."""
    pairs = concept_pairs(concept, words)
    present = base.encode_prompts([one for one, _ in pairs]).prompt_embeds.float()
    absent = base.encode_prompts([one for _, one in pairs]).prompt_embeds.float()
    return (present - absent).mean(0)


class GeneticSearch:
    """Token sequences near a point of the text encoder's output.

    Attributes:
        population: numbers of tokens in the vocabulary, ``[prompts, K]``, nearest first.
        distances: squared distance of each, ``[prompts]``; NaN where not yet known.
        best: the nearest sequence met so far, ``[K]``, and ``best_distance``.
    """

    def __init__(
        self, vocabulary: Vocabulary, wanted: Tensor, options: RingABellOptions, generator: torch.Generator
    ) -> None:
        self.vocabulary, self.wanted, self.options = vocabulary, wanted, options
        size = (options.population, options.tokens)
        self.population = torch.randint(0, len(vocabulary.ids), size, generator=generator)
        self.distances = torch.full((options.population,), float("nan"))
        self.best, self.best_distance = self.population[0], float("inf")
        self._measure()

    @torch.no_grad()
    def _measure(self) -> None:
        """Find the missing distances and sort by them."""
        base, table = self.vocabulary.base, self.vocabulary.vectors
        missing = self.distances.isnan().nonzero().flatten()
        # An empty tensor splits into one empty part.
        for some in missing.split(_ENCODED_AT_ONCE) if len(missing) else ():
            rows = list(table[self.population[some].to(table.device)])
            embeds = base.encode_token_vectors(rows).prompt_embeds.float()
            self.distances[some] = (embeds - self.wanted).square().flatten(1).sum(1).cpu()
        order = self.distances.argsort(stable=True)
        self.population, self.distances = self.population[order], self.distances[order]
        if self.distances[0] < self.best_distance:
            self.best, self.best_distance = self.population[0].clone(), float(self.distances[0])

    def step(self, generator: torch.Generator) -> None:
        """One generation: the nearer half lives on, has children, and all may mutate."""
        options = self.options
        parents = self.population[: max(2, options.population // 2)]
        known = self.distances[: len(parents)]
        chosen = (torch.rand(len(parents), generator=generator) < options.crossover).nonzero().flatten()
        mates = torch.randint(0, len(parents), (len(chosen),), generator=generator)
        cuts = torch.randint(1, options.tokens, (len(chosen), 1), generator=generator)
        first = torch.arange(options.tokens) < cuts
        a, b = parents[chosen], parents[mates]
        population = torch.cat([parents, torch.where(first, a, b), torch.where(first, b, a)])
        distances = torch.cat([known, torch.full((2 * len(chosen),), float("nan"))])
        mutated = torch.rand(len(population), generator=generator) < options.mutation
        places = torch.randint(0, options.tokens, (len(population), 1), generator=generator)
        tokens = torch.randint(0, len(self.vocabulary.ids), (len(population), 1), generator=generator)
        changed = population.scatter(1, places, tokens)
        self.population = torch.where(mutated[:, None], changed, population)
        self.distances = torch.where(mutated, torch.tensor(float("nan")), distances)
        self._measure()

    def state(self) -> dict[str, Tensor]:
        """What a resume needs."""
        return {"population": self.population, "distances": self.distances, "best": self.best}

    def restore(self, state: Mapping[str, Tensor], best_distance: float) -> None:
        """Go on from an earlier :meth:`state`."""
        self.population, self.distances = state["population"], state["distances"]
        self.best, self.best_distance = state["best"], best_distance

    def text(self) -> str:
        """The nearest prompt."""
        return self.vocabulary.text(self.vocabulary.ids[self.best])


class RingABell:
    """See :class:`Attack`.

    Success is a picture of the found prompt, at the seed of the plain one, that shows the concept.
    """

    name = "ring-a-bell"
    options_type = RingABellOptions

    def candidates(self, concept: Concept, words: Sequence[str]) -> tuple[str, ...]:
        """Prompts that name the concept."""
        return name_candidates(concept, words)

    def images_wanted(self, options: RingABellOptions) -> int:
        """One for each attacked prompt."""
        return options.pictures

    def run(
        self,
        target: AttackTarget,
        options: RingABellOptions,
        *,
        seed: int,
        progress: Progress | None = None,
        work: Path | None = None,
    ) -> AttackResult:
        """See :class:`Attack`."""
        meter = Meter(target.base)
        count = min(options.pictures, len(target.prompts))
        plain, seeds = target.prompts[:count], target.seeds[:count]
        # Prompts that differ in their seed alone share a search: it never sees a picture.
        different = list(dict.fromkeys(plain))
        vocabulary = Vocabulary(target.base)
        searched: dict[str, dict[str, Any]] = {}
        for number, prompt in enumerate(different):
            searched[prompt] = self._search(
                target, vocabulary, prompt, number, len(different), options, seed, meter, progress, work
            )
        found = [str(searched[prompt]["prompt"]) for prompt in plain]

        def attacked(some: slice) -> list[Image]:
            return target.draw(found[some], seeds[some])

        def without_attack(some: slice) -> list[Image]:
            return target.draw(plain[some], seeds[some])

        without = judged(
            target, f"{self.name}, plain", count, without_attack, options, meter, progress=progress, work=work
        )
        hits = judged(
            target, f"{self.name}, judge", count, attacked, options, meter, progress=progress, work=work
        )
        details = [
            {**searched[prompt], "attacked": prompt, "seed": own, "success": hit, "without": before}
            for prompt, own, hit, before in zip(plain, seeds, hits, without, strict=True)
        ]
        pictures = first_pictures(count, attacked, options, meter)
        return AttackResult.of(self.name, details, meter, options, pictures=pictures)

    def _search(
        self,
        target: AttackTarget,
        vocabulary: Vocabulary,
        prompt: str,
        number: int,
        of: int,
        options: RingABellOptions,
        seed: int,
        meter: Meter,
        progress: Progress | None,
        work: Path | None,
    ) -> dict[str, Any]:
        """The prompt nearest to the concept-laden one: ``prompt``, its ``distance`` and that at the start."""
        done = work / f"prompt-{number:04d}.json" if work else None
        if done and done.exists():
            kept = read_json(done)
            meter.catch_up(kept["meter"])
            return dict(kept["found"])
        base, stage = target.base, f"{self.name} {number}"
        with torch.no_grad():
            wanted = base.encode_prompts([prompt]).prompt_embeds[0].float()
        wanted = wanted + options.strength * concept_vector(base, target.concept, target.words)
        search = GeneticSearch(vocabulary, wanted, options, step_generator(seed, f"{stage} start", 0))
        first, start = 0, search.best_distance
        file = work / f"prompt-{number:04d}.checkpoint.safetensors" if work else None
        if file and file.exists():
            first, note, state = _load(file)
            search.restore(state, float(note["best_distance"]))
            meter.catch_up(note["meter"])
        for generation in range(first, options.generations):
            search.step(step_generator(seed, stage, generation))
            if progress:
                progress.update(
                    self.name,
                    number * options.generations + generation + 1,
                    of * options.generations,
                    f"distance {search.best_distance:.1f}",
                )
            if file and (generation + 1) % _SAVE_EVERY == 0:
                note = {
                    "generation": generation + 1,
                    "best_distance": search.best_distance,
                    "meter": meter.so_far(),
                }
                write_tensors(file, search.state(), {"search": json.dumps(note)})
        found = {
            "prompt": search.text(),
            "distance": round(search.best_distance, 4),
            "distance_at_start": round(start, 4),
        }
        if done:
            write_json(done, {"found": found, "meter": meter.so_far()})
        if file:
            file.unlink(missing_ok=True)
        return found

    def replay(
        self, target: AttackTarget, saved: AttackResult, *, progress: Progress | None = None
    ) -> AttackResult:
        """See :class:`Attack`."""
        return replay_prompts(self.name, target, saved, self.options_type(**saved.budget), progress)


def _load(file: Path) -> tuple[int, dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(file, "pt") as handle:
            note = json.loads(handle.metadata()["search"])
            state = {key: handle.get_tensor(key) for key in ("population", "distances", "best")}
            return int(note["generation"]), note, state
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as fault:
        raise ResumeError(
            f"the checkpoint {file.name} is damaged ({fault}); start again in a new --out"
        ) from fault
