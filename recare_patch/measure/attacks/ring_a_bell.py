"""Ring-A-Bell: find the concept's direction in the text encoder, and words that lie there (Tsai et al.,
arXiv 2310.10012).

From pairs of prompts with and without the concept, ``ĉ = mean over pairs of f(with) − f(without)``, f
the text encoder's output for all positions (their equation 1). For a prompt P a genetic search over K
tokens minimises ``‖f(tokens) − (f(P) + η ĉ)‖²`` (equations 2 and 3). It sees no weight of the denoiser
and no picture: a black-box attack, whose prompts are the same whatever the patch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from recare_patch.erasure import step_generator
from recare_patch.measure.attacks import protocol
from recare_patch.measure.attacks.protocol import AttackOptions, AttackRun, Share, Steps, Trial
from recare_patch.measure.attacks.search import Vocabulary

if TYPE_CHECKING:
    from recare_patch.models import BaseModel
    from recare_patch.recipe import Concept

_PLAIN_WORDS = ("house", "tree", "boat", "street", "night", "field")
"""What the concept is put beside where the patch carries no CARE-set."""

_SAVE_EVERY = 25
_ENCODED_AT_ONCE = 128


class RingABellOptions(AttackOptions):
    """How much is tried."""

    published: ClassVar[protocol.Values] = {"population": 200, "generations": 3000, "pictures": 100}

    tokens: int = Field(16, ge=2, le=75, description="K, of the prompt that is searched; as published")
    strength: float = Field(3.0, gt=0, le=100, description="η; as published")
    population: int = Field(40, ge=4, le=100_000, description="prompts; half live on; published 200")
    generations: Steps = Field(80, description="of the search; published 3,000")
    mutation: Share = Field(0.25, description="how likely a prompt changes one token; as published")
    crossover: Share = Field(0.5, description="how likely a prompt has two children; as published")


def concept_pairs(concept: Concept, words: Sequence[str]) -> list[tuple[str, str]]:
    """Prompts with the concept, alone and beside benign words, and the same ones without it."""
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
    sides = zip(*concept_pairs(concept, words), strict=True)
    present, absent = (base.encode_prompts(list(side)).prompt_embeds.float() for side in sides)
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

    def state(self) -> dict[str, Any]:
        """What a resume needs, as JSON values."""
        tensors = {"population": self.population, "distances": self.distances, "best": self.best}
        return {**{key: one.tolist() for key, one in tensors.items()}, "best_distance": self.best_distance}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from an earlier :meth:`state`."""
        self.population, self.distances = torch.tensor(state["population"]), torch.tensor(state["distances"])
        self.best, self.best_distance = torch.tensor(state["best"]), state["best_distance"]


class RingABell(protocol.Attack[RingABellOptions]):
    """Success is a picture of the found prompt, at the seed of the plain one, that shows the concept."""

    name = "ring-a-bell"
    options_type = RingABellOptions

    def search(self, run: AttackRun[RingABellOptions], trials: list[Trial]) -> dict[str, Tensor]:
        """A genetic search for each prompt; those that differ in their seed alone share one."""
        base, target, options = run.target.base, run.target, run.options
        vocabulary, each = Vocabulary(base), options.generations
        shift = options.strength * concept_vector(base, target.concept, target.words)
        different = list(dict.fromkeys(one["attacked"] for one in trials))

        def nearest(number: int) -> Trial:
            """The prompt nearest to the concept-laden one, its distance and that at the start."""
            stage, checkpoint = f"{self.name} {number}", f"prompt-{number:04d}.checkpoint"
            with torch.no_grad():
                wanted = base.encode_prompts([different[number]]).prompt_embeds[0].float() + shift
            search = GeneticSearch(vocabulary, wanted, options, step_generator(run.seed, f"{stage} start", 0))
            first, start = 0, search.best_distance
            if kept := run.read(checkpoint):
                first = kept["generation"]
                search.restore(kept)
            for generation in range(first, each):
                search.step(step_generator(run.seed, stage, generation))
                done, note = number * each + generation + 1, f"distance {search.best_distance:.1f}"
                run.progress.update(self.name, done, len(different) * each, note)
                if (generation + 1) % _SAVE_EVERY == 0:
                    run.write(checkpoint, {"generation": generation + 1, **search.state()})
            found = {"distance": round(search.best_distance, 4), "distance_at_start": round(start, 4)}
            return {"prompt": vocabulary.text(vocabulary.ids[search.best]), **found}

        for number, prompt in enumerate(different):
            found = run.once(f"prompt-{number:04d}", partial(nearest, number))
            for one in trials:
                if one["attacked"] == prompt:
                    one |= found
        return {}
