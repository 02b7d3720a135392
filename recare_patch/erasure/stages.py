"""What the stages of a run share: its folder, its costs, its pictures, its adapter and its loops."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from recare_patch.core import (
    IncompatiblePatchError,
    Progress,
    keep_json,
    keep_tensors,
    kept_json,
    kept_tensors,
    load_json,
    told_at,
)
from recare_patch.erasure.inversion import invert
from recare_patch.erasure.loop import AllCarried, Carried, Checkpoint, Loop, fit, state_source, step_generator
from recare_patch.models import BaseModel, forget_peak_memory, full_name, lora, peak_memory, scheduled
from recare_patch.patch import Patch
from recare_patch.recipe import Recipe

if TYPE_CHECKING:
    from PIL.Image import Image

    from recare_patch.careset import Clip
    from recare_patch.erasure.gauge import Governor
    from recare_patch.erasure.methods import LossMethod
    from recare_patch.models import PromptEmbeds
    from recare_patch.patch import Named

logger = logging.getLogger(__name__)

ADAPTER = "recare"

LossAt = Callable[[int, torch.Generator], Tensor]
"""The scalar loss of a step, from its number and its generator."""


class Ledger:
    """Seconds, denoiser evaluations and peak memory of every stage, in a JSON file that a resume goes on from.

    Of several processes evaluations are summed, and the peak is the highest.
    """

    def __init__(self, path: Path, base: BaseModel) -> None:
        self.path, self.base = path, base
        self.stages: dict[str, dict[str, float]] = kept_json(path) or {}
        self._began, self._evaluations, self._peak = 0.0, 0, 0
        self._between = peak_memory(base.device)

    @property
    def peak(self) -> int:
        """The highest figure of all stages, and of what came before and between them: loading, encoding, decoding."""
        return max(self._between, *(int(one.get("peak_memory_bytes", 0)) for one in self.stages.values()))

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Book what happens inside on a stage; one that was done before a resume is not booked again."""
        if name in self.stages:
            # What little is repeated to restore it is not counted twice.
            with told_at(name):
                yield
            return
        self._began, self._evaluations, self._peak = time.perf_counter(), self.base.counter.total, 0
        self._between = max(self._between, peak_memory(self.base.device))
        forget_peak_memory(self.base.device)
        with told_at(name):
            yield
        self.stages[name] = self.so_far()
        if self.base.crew is None or self.base.crew.main:
            keep_json(self.path, self.stages)

    def so_far(self) -> dict[str, float]:
        """The figures of the stage under way; where processes share the work, all of them must ask."""
        evaluations = self.base.counter.total - self._evaluations
        peak = max(self._peak, peak_memory(self.base.device))
        if (crew := self.base.crew) is not None:
            evaluations = int(crew.sum(evaluations, self.base.device))
            peak = int(crew.most(peak, self.base.device))
        seconds = round(time.perf_counter() - self._began, 3)
        return {"seconds": seconds, "evaluations": evaluations, "peak_memory_bytes": peak}

    def told(self) -> str:
        """:meth:`so_far` for the note of a file that a stage keeps; of several processes nothing."""
        return json.dumps(self.so_far() if self.base.crew is None else {})

    def book(self, name: str, told: str) -> None:
        """Book a stage whose result is there, if a kill came between the two; ``told`` is what its file says."""
        if name not in self.stages and (cost := load_json(told)):
            self.stages[name] = cost

    def restore(self, kept: Mapping[str, Any]) -> None:
        """Go on with a stage of which :meth:`so_far` told ``kept``."""
        self._began = time.perf_counter() - float(kept["seconds"])
        self._peak = int(kept.get("peak_memory_bytes", 0))
        if self.base.crew is None or self.base.crew.main:
            # One process brings along what all of them did before.
            self._evaluations = self.base.counter.total - int(kept["evaluations"])


def stage_name(name: str, number: int) -> str:
    """The name of a stage of the ``number``-th concept of a run."""
    return f"{name} {number + 1}" if number else name


class Run:
    """The state of one erasing run.

    Attributes:
        work: its hidden folder.
        keep_images: keep target images beside the patch.
        warnings: what the user should know, one sentence each.
        losses: loop → the loss of every step.
        notes: further figures for ``training.json``.
        ground: an earlier patch's adapter that the run goes on from, by component; empty without one.
        governor: what ended the erasing, where it was measured.
        others: pictures of plain other things, drawn once.
        language: words that none of its concepts has, by what they are, looked up once.
        named: whose rows the adapter has, where each name has one.
        still_seen: draws a few pictures as the model stands, and tells in what share of them CLIP sees a concept.
    """

    def __init__(
        self, recipe: Recipe, work: Path, base: BaseModel, clip: Clip, progress: Progress, keep_images: bool
    ) -> None:
        self.recipe, self.work, self.base, self.clip, self.progress = recipe, work, base, clip, progress
        self.keep_images, self.ledger = keep_images, Ledger(work / "cost.json", base)
        self.warnings: list[str] = []
        self.losses: dict[str, list[float]] = {}
        self.notes: dict[str, Any] = {}
        self.ground: dict[str, dict[str, Tensor]] = {}
        self.governor: Governor | None = None
        self.still_seen: Callable[[], float] | None = None
        self.others: list[Image] = []
        self.named: tuple[Named, ...] | None = None
        self.language: dict[str, tuple[str, ...]] = {}

    def warn(self, sentence: str) -> None:
        """Tell the user now, and again at the end."""
        logger.warning(sentence)
        self.warnings.append(sentence)

    @property
    def unsafe(self) -> bool:
        """Whether pictures of what it erases should be seen by as few as possible."""
        first = self.recipe.subject or self.recipe.concept
        return any(concept.kind == "nsfw" for concept in (first, *self.recipe.also))

    @property
    def main(self) -> bool:
        """Whether this process is the one that writes what belongs to all."""
        return self.base.crew is None or self.base.crew.main

    def wait(self) -> None:
        """Wait until all processes of the run have come this far."""
        if self.base.crew is not None:
            self.base.crew.wait()

    def file(self, stage: str, ending: str = ".safetensors") -> Path:
        """Where a stage keeps what it made."""
        return self.work / f"{stage.replace(' ', '-')}{ending}"

    def pictures(
        self, stage: str, prompts: Sequence[str], count: int, first_seed: int, *, steps: int | None = None
    ) -> Tensor:
        """Clean latents ``[count, c, h, w]`` of pictures of the prompts in turn, from the frozen base.

        With ``steps`` they are drawn in so few by the fast sampler: pictures for a look, and not to train on.
        """
        each, crew = self.recipe.target_images.batch_size, self.base.crew
        batches = [range(start, min(start + each, count)) for start in range(0, count, each)]
        files = [self.file(stage, f"-{rows[0]:05d}.safetensors") for rows in batches]
        # All processes look before any writes; each then draws every n-th batch.
        here = [kept_tensors(file) for file in files]
        self.wait()
        done: dict[int, Tensor] = {}
        with self.ledger.stage(stage):
            for k, rows in enumerate(batches):
                if (kept := here[k]) is not None:
                    done[k] = kept[0]["latents"].to(self.base.device)
                    if stage not in self.ledger.stages and (cost := load_json(kept[1]["cost"])):
                        self.ledger.restore(cost)
                elif crew is None or k % crew.count == crew.index:
                    done[k] = self._drawn([prompts[i % len(prompts)] for i in rows], first_seed + rows[0], steps)
                    # Latents decode to pictures: of unsafe concepts they stay in memory, and a
                    # resumed run draws them again from the same seeds.
                    if not self.unsafe or self.keep_images:
                        keep_tensors(files[k], {"latents": done[k].cpu()}, {"cost": self.ledger.told()})
                self.progress.update(stage, rows[-1] + 1, count)
            for k, rows in enumerate(batches):
                if crew is not None and here[k] is None:
                    place = torch.empty((len(rows), *self.base.latent_shape), device=self.base.device)
                    done[k] = crew.send(done.get(k, place), k % crew.count)
        return torch.cat([done[k] for k in range(len(batches))])

    def _drawn(self, prompts: list[str], first_seed: int, few: int | None) -> Tensor:
        seeds = [first_seed + k for k in range(len(prompts))]
        return self.sampled(self.base.encode_prompts(prompts), seeds, steps=few)

    def sampled(self, embeds: PromptEmbeds, seeds: Sequence[int], *, steps: int | None = None) -> Tensor:
        """Clean latents ``[len(seeds), c, h, w]`` that the model draws as it stands; ``steps`` as for pictures."""
        options = self.recipe.target_images
        scheduler = options.scheduler
        if steps is not None:
            scheduler = quick_sampler(self.base) or scheduler
        with scheduled(self.base.pipeline, scheduler):
            return self.base.sample_latents(
                embeds,
                list(seeds),
                steps=min(options.steps, steps or options.steps),
                guidance_scale=options.guidance_scale,
                batch_size=options.batch_size,
            )


def quick_sampler(base: BaseModel) -> str | None:
    """The sampler that makes pictures for a look in few steps; None where the base has no such noise schedule."""
    return "dpm-solver++" if hasattr(base.pipeline.scheduler, "alphas_cumprod") else None


class Stages:
    """What a run offers a method: loops and results that survive an interruption, counted and told."""

    def __init__(self, run: Run, parameters: Sequence[nn.Parameter] = (), number: int = 0) -> None:
        """Stages of a run's ``number``-th concept, or of all concepts together."""
        self.run, self.parameters, self.number = run, parameters, number

    @contextlib.contextmanager
    def adapter(self, seed: int) -> Iterator[Stages]:
        """Inside, the recipe's adapter is in the base; its first values follow from ``seed``."""
        run, generator = self.run, torch.Generator().manual_seed(seed)
        parameters: list[nn.Parameter] = []
        try:
            for part, network in lora.adapted(run.base, run.recipe.adapter.layers).items():
                parameters += attach(run.recipe, network, ADAPTER, generator)
                if part in run.ground:
                    lora.load_adapter_state(network, run.ground[part], ADAPTER)
                    lora.switch_to(network, ADAPTER)
            yield Stages(run, parameters, self.number)
        finally:
            for part, network in run.base.components.items():
                lora.detach(network, ADAPTER)
                if part in run.ground:
                    lora.switch_to(network, lora.TEACHER_NAME)

    @contextlib.contextmanager
    def booked(self, stage: str) -> Iterator[None]:
        """What happens inside is counted under a stage's name."""
        with self.run.ledger.stage(stage_name(stage, self.number)):
            yield

    def fit(
        self,
        stage: str,
        loss_at: LossAt,
        steps: int,
        *,
        every: int = 20,
        carried: Carried | None = None,
        rate: float | None = None,
        governed: Callable[[], Governor] | None = None,
        average: float = 0.0,
    ) -> Governor | None:
        """Train the adapter.

        Args:
            stage: its name, a different one for each.
            every: checkpoints fall on multiples of this many steps.
            carried: what else goes on where it stopped.
            rate: of learning; None: the recipe's of the erasing.
            governed: makes what ends the loop before its last step, and steers it on the way; it is returned.
            average: decay of the mean of its weights that the adapter ends with; 0: it ends with the last ones.
        """
        run, options = self.run, self.run.recipe.erase
        loop = replace(
            self._loop(stage, steps, rate or options.learning_rate),
            optimizer=options.optimizer,
            schedule=options.schedule if governed is None else "constant",
            average=average,
            save_every=every,
            crew=run.base.crew,
        )
        with run.ledger.stage(loop.stage):
            governor = governed() if governed is not None else None
            run.losses[loop.stage] = fit(self.parameters, loss_at, loop, carried=carried, stop=governor).losses
        return governor

    def _loop(self, stage: str, steps: int, learning_rate: float) -> Loop:
        run, stage = self.run, stage_name(stage, self.number)
        return Loop(
            stage,
            steps,
            learning_rate,
            run.recipe.seed,
            dtype=run.base.dtype,
            checkpoint=Checkpoint(run.file(stage, ".checkpoint.safetensors")),
            extra=run.ledger.so_far,
            restore_extra=run.ledger.restore,
            progress=run.progress,
        )

    def fit_losses(self, methods: Sequence[LossMethod]) -> None:
        """One loop, in which the concepts take turns; each has as many steps as it would have alone."""
        count, recipe = len(methods), self.run.recipe
        sources = []
        for one in methods:
            context = one.context
            empty = context.base.encode_prompts([""])
            sources.append(state_source(recipe, context.base, context.latents, one.names, empty))

        def loss_at(step: int, generator: torch.Generator) -> Tensor:
            method, turn = methods[step % count], step // count
            which = torch.randint(0, len(method.names), (recipe.erase.batch_size,), generator=generator)
            latents, timesteps = sources[step % count].draw(turn, which, generator)
            return method.loss(latents, timesteps, which, generator)

        hunters = [one.adversaries for one in methods if one.adversaries is not None]
        carried = hunters[0] if len(hunters) == 1 else AllCarried(hunters) if hunters else None
        options, steps = recipe.erase, recipe.erase.steps * count
        if options.ends == "steps":
            self.fit("erase", loss_at, steps, every=20 * count, carried=carried, average=options.average)
            return
        from recare_patch.erasure.gauge import Governor

        def governed() -> Governor:
            bars = {"gone": options.gone, "drift": options.drift}
            seen, early = self.run.still_seen, not hunters
            return Governor(methods, recipe.seed, **bars, still_seen=seen, carried=carried, early=early)

        self.run.governor = self.fit("erase", loss_at, steps, every=20 * count, governed=governed)

    def once(self, stage: str, make: Callable[[torch.Generator], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """What ``make`` returns from a generator for all of its draws, or from the disk where it was made before."""
        run, stage = self.run, stage_name(stage, self.number)
        file = run.file(stage)
        here = kept_tensors(file)
        run.wait()
        if here is not None:
            run.ledger.book(stage, here[1]["cost"])
        with run.ledger.stage(stage):
            made = here[0] if here is not None else make(step_generator(run.recipe.seed, stage, 0))
            if run.main and here is None:
                keep_tensors(file, {key: one.detach().cpu() for key, one in made.items()}, {"cost": run.ledger.told()})
        run.progress.update(stage, 1, 1)
        return {key: one.detach().to(run.base.device) for key, one in made.items()}

    def invert(self, stage: str, latents: Tensor, prompt: str, start: Tensor, steps: int) -> Tensor:
        """Textual inversion against the model as it stands; see :func:`invert`."""
        run, options = self.run, self.run.recipe.search
        loop = self._loop(stage, steps, options.learning_rate)
        with run.ledger.stage(loop.stage):
            vectors, fitted = invert(
                run.base,
                latents,
                [prompt],
                start,
                loop,
                batch_size=options.batch_size,
                patience=options.patience,
                noise_up_to=options.noise_up_to,
            )
        run.losses[loop.stage] = fitted.losses
        return vectors

    def set_adapter(self, factors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Give the adapter its values, where they are computed and not trained.

        Args:
            factors: full name of a layer → ``A`` ``[rank, in]`` and ``B`` ``[out, rank]``, whose product is
                what is added to its weight.
        """
        for part, network in lora.adapted(self.run.base, self.run.recipe.adapter.layers).items():
            _fill(self.run.recipe, part, network, ADAPTER, lambda name: factors[name])

    def begin(self, factors: Mapping[str, Tensor]) -> None:
        """Let the adapter start from an update of lower rank; its other ranks start as they are.

        Args:
            factors: ``<layer>.A`` ``[n, in]`` and ``<layer>.B`` ``[out, n]`` of layers of the denoiser.
        """
        base, options = self.run.base, self.run.recipe.adapter
        network = base.components[base.denoiser_name]
        state = lora.adapter_state(network, ADAPTER)
        for name in {key.rpartition(".")[0] for key in factors}:
            a, b = state[f"{name}.lora_A.weight"], state[f"{name}.lora_B.weight"]
            down, up = factors[f"{name}.A"].to(a), factors[f"{name}.B"].to(b)
            # Rows as long as those that training starts from elsewhere, so that a step in B reaches as far.
            longer = a.norm(dim=1).mean() / down.norm(dim=1).clamp(min=1e-30)
            a[: len(down)] = down * longer[:, None]
            b[:, : len(down)] = up / longer * (options.rank / options.alpha)
        lora.load_adapter_state(network, state, ADAPTER)

    def note(self, key: str, value: Any) -> None:
        """A figure, or several by name, for ``training.json``."""
        self.run.notes[key] = value


def attach(recipe: Recipe, network: nn.Module, name: str, generator: torch.Generator) -> list[nn.Parameter]:
    """Put a recipe's adapter into a network."""
    options = recipe.adapter
    return lora.attach(
        network, layers=options.layers, rank=options.rank, alpha=options.alpha, generator=generator, name=name
    )


def _fill(
    recipe: Recipe, part: str, network: nn.Module, adapter: str, factors: Callable[[str], tuple[Tensor, Tensor]]
) -> dict[str, Tensor]:
    """Give an adapter values; it multiplies by alpha / rank."""
    state = lora.adapter_state(network, adapter)
    for key in state:
        module, _, side = key.rpartition(".lora_")
        a, b = factors(full_name(part, module))
        scale = recipe.adapter.rank / recipe.adapter.alpha
        state[key] = a.float() if side == "A.weight" else b.float() * scale
    lora.load_adapter_state(network, state, adapter)
    return state


def earlier_patch(recipe: Recipe, base: BaseModel, *, weights: bool = True) -> Patch | None:
    """The patch that a recipe goes on from; ``weights`` says whether the base has any to look at.

    Raises:
        IncompatiblePatchError: it has other layers or another rank than the recipe's adapter.
    """
    if recipe.continue_from is None:
        return None
    options, earlier = recipe.adapter, Patch.load(recipe.continue_from)
    earlier.check_base(base) if weights else earlier.check_shapes(base.components, f"base '{base.id}'")
    wanted = [
        full_name(part, name)
        for part, network in lora.adapted(base, options.layers).items()
        for name in lora.target_modules(network, options.layers)
    ]
    if sorted(earlier.modules) != sorted(wanted) or set(earlier.ranks.values()) != {options.rank}:
        ranks = " and ".join(map(str, sorted(set(earlier.ranks.values()))))
        raise IncompatiblePatchError(
            f"patch {earlier.name} cannot be gone on with: it changes {len(earlier.modules)} layers at rank "
            f"{ranks}, and this run would train {len(wanted)} at rank {options.rank}"
        )
    return earlier


@contextlib.contextmanager
def continued(run: Run, earlier: Patch | None) -> Iterator[None]:
    """Inside, the model that an earlier patch left is the teacher; a new adapter starts as the patch's."""
    if earlier is None:
        yield
        return
    networks = lora.adapted(run.base, run.recipe.adapter.layers)
    try:
        for part, network in networks.items():
            generator = torch.Generator().manual_seed(run.recipe.seed)
            attach(run.recipe, network, lora.TEACHER_NAME, generator)
            run.ground[part] = _fill(run.recipe, part, network, lora.TEACHER_NAME, earlier.factors)
            network.requires_grad_(False)
        yield
    finally:
        run.ground = {}
        for network in networks.values():
            lora.detach(network, lora.TEACHER_NAME)
