"""The only training loop, the states it trains on, and names that it fits.

A method hands over a loss; nothing here knows what it means. Every step draws from a generator seeded by
``(seed, stage, step)`` alone, so a run that goes on from a checkpoint ends with the same tensors as one that
was never stopped.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from recare_patch.core import Crew, Progress, Registry, ResumeError, write_tensors
from recare_patch.models import PLACEHOLDER, PromptEmbeds, frozen, sample_timesteps

if TYPE_CHECKING:
    from recare_patch.models import BaseModel
    from recare_patch.recipe import Concept, Recipe

OPTIMIZERS = Registry(
    "optimizer", {"adamw": "recare_patch.erasure.loop:_adamw", "adamw8bit": "recare_patch.erasure.loop:_adamw8bit"}
)


def _adamw8bit(parameters: Sequence[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """AdamW with block-wise 8-bit states (Dettmers et al., 2022); small tensors keep 32 bits."""
    from bitsandbytes.optim import AdamW8bit

    optimizer: torch.optim.Optimizer = AdamW8bit(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=0.0)
    return optimizer


def _adamw(parameters: Sequence[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """AdamW with 32-bit states; on a GPU one kernel updates all tensors."""
    fused = all(parameter.is_cuda for parameter in parameters)
    return torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=0.0, fused=fused or None)


def step_generator(seed: int, stage: str, step: int) -> torch.Generator:
    """The generator of one step: the same numbers however the run got there."""
    mixed = (seed * 0x9E3779B1 + zlib.crc32(stage.encode()) * 0x85EBCA6B + step * 0xC2B2AE35) % 2**63
    return torch.Generator().manual_seed(mixed)


_CARRIED = "carried."


@dataclass
class Fitted:
    """What a finished loop leaves behind: the loss of every step, and what was kept across a resume."""

    losses: list[float] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)


class Carried(Protocol):
    """What changes beside the parameters while a loop runs, and must go on where it stopped."""

    def state(self) -> Mapping[str, Tensor]:
        """All of it, as tensors on the CPU."""

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what :meth:`state` returned."""


class Watch(Carried, Protocol):
    """Looks at what a loop has reached, every so many steps, and may end it or slow it down.

    Attributes:
        every: steps between two looks; the last step is looked at too.
        rate: what the learning rate is multiplied by.
        over: whether the loop has reached what it was after.
    """

    every: int

    @property
    def rate(self) -> float: ...  # noqa: D102

    @property
    def over(self) -> bool: ...  # noqa: D102

    def look(self) -> None:
        """Measure the parameters as they stand."""

    def settle(self) -> None:
        """The loop has ended."""


_BETTER = 1e-3
"""By what share a held-out loss must fall to be a new best: it creeps on long after it has said all."""


class EarlyStop:
    """Ends a loop whose loss on what it does not train on no longer falls, and keeps the best parameters."""

    def __init__(
        self, parameters: Sequence[nn.Parameter], held_out: Callable[[], float], *, patience: int, every: int
    ) -> None:
        """Look at ``held_out``, the loss of the parameters as they stand, ``every`` steps and after the last.

        So many looks in a row as ``patience`` says, without a new best, end the loop.
        """
        self.parameters, self.held_out, self.patience, self.every = parameters, held_out, patience, every
        self._best, self._since = math.inf, 0
        self._kept = [parameter.detach().clone() for parameter in parameters]

    rate = 1.0

    @property
    def over(self) -> bool:  # noqa: D102
        return self._since >= self.patience

    @torch.no_grad()
    def look(self) -> None:
        """Compare the parameters as they stand with the best so far."""
        loss = self.held_out()
        if loss < (1 - _BETTER) * self._best:
            self._best, self._since = loss, 0
            self._kept = [parameter.detach().clone() for parameter in self.parameters]
        else:
            self._since += 1

    @torch.no_grad()
    def settle(self) -> None:
        """Give the parameters the values that were best."""
        for parameter, value in zip(self.parameters, self._kept, strict=True):
            parameter.copy_(value)

    def state(self) -> dict[str, Tensor]:
        """Everything, as tensors on the CPU."""
        found = {f"kept.{k}": value.cpu() for k, value in enumerate(self._kept)}
        return found | {"best": torch.tensor(self._best, dtype=torch.float64), "since": torch.tensor(self._since)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what :meth:`state` returned."""
        self._best, self._since = float(state["best"]), int(state["since"])
        self._kept = [state[f"kept.{k}"].to(parameter.device) for k, parameter in enumerate(self.parameters)]


class Checkpoint:
    """Parameters, optimiser states and losses of one loop in one safetensors file, replaced in one rename."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def save(
        self,
        step: int,
        parameters: Sequence[nn.Parameter],
        optimizer: torch.optim.Optimizer,
        losses: list[float],
        extra: Mapping[str, Any],
        carried: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write the loop's state after ``step`` steps."""
        tensors = {f"{_CARRIED}{key}": value.contiguous() for key, value in (carried or {}).items()}
        scalars: dict[str, Any] = {}
        for index, parameter in enumerate(parameters):
            tensors[f"parameter.{index}"] = parameter.detach().cpu().contiguous()
            for key, value in optimizer.state[parameter].items():
                if isinstance(value, Tensor):
                    tensors[f"state.{index}.{key}"] = value.detach().cpu().clone().contiguous()
                else:
                    scalars[f"{index}.{key}"] = value
        note = {"step": step, "losses": losses, "scalars": scalars, "extra": dict(extra)}
        write_tensors(self.path, tensors, {"loop": json.dumps(note)})

    def load(
        self, parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer, carried: Carried | None = None
    ) -> tuple[int, list[float], dict[str, Any]] | None:
        """Restore what :meth:`save` wrote, or return ``None`` where there is nothing yet.

        Raises:
            ResumeError: if the file is damaged or belongs to other parameters.
        """
        if not self.path.exists():
            return None
        try:
            with safe_open(self.path, "pt") as handle:
                note = json.loads(handle.metadata()["loop"])
                tensors = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise ResumeError(
                f"the checkpoint {self.path.name} is damaged ({error}); start again without --resume"
            ) from error
        # torch keeps the step count of a plain AdamW on the CPU, and of a fused one with its parameter.
        fused = bool(optimizer.param_groups[0].get("fused"))
        with torch.no_grad():
            for index, parameter in enumerate(parameters):
                stored = tensors.get(f"parameter.{index}")
                if stored is None or stored.shape != parameter.shape:
                    raise ResumeError(
                        f"the checkpoint {self.path.name} fits another adapter; start again without --resume"
                    )
                parameter.copy_(stored)
                state: dict[str, Any] = {}
                prefix = f"state.{index}."
                for key, value in tensors.items():
                    if key.startswith(prefix):
                        name = key[len(prefix) :]
                        here = name == "step" and not fused
                        state[name] = value if here else value.to(parameter.device)
                for key, scalar in note["scalars"].items():
                    owner, name = key.split(".", 1)
                    if int(owner) == index:
                        state[name] = scalar
                optimizer.state[parameter] = state
        if carried is not None:
            carried.load_state(
                {key.removeprefix(_CARRIED): one for key, one in tensors.items() if key.startswith(_CARRIED)}
            )
        return int(note["step"]), list(note["losses"]), dict(note["extra"])


def learning_rate_at(step: int, steps: int, peak: float, schedule: str) -> float:
    """The learning rate of a step: constant, or a cosine from ``peak`` to a tenth of it."""
    if schedule == "constant" or steps < 2:
        return peak
    return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / (steps - 1))))


@dataclass(frozen=True)
class Loop:
    """How a loop runs, where its state is kept, and whom it tells.

    Attributes:
        stage: names it in progress, seeds and messages.
        learning_rate: peak of the ``schedule``, ``cosine`` (to a tenth) or ``constant``.
        optimizer: a name in :data:`OPTIMIZERS`.
        checkpoint: where to save and resume every ``save_every`` steps; ``None`` keeps nothing.
        extra, restore_extra: JSON values to carry across a resume.
        crew: processes that train together, each of which runs the loop; their gradients are averaged, and the
            first of them writes.
    """

    stage: str
    steps: int
    learning_rate: float
    seed: int
    optimizer: str = "adamw8bit"
    schedule: str = "cosine"
    checkpoint: Checkpoint | None = None
    save_every: int = 20
    extra: Callable[[], Mapping[str, Any]] = dict
    restore_extra: Callable[[dict[str, Any]], None] | None = None
    progress: Progress | None = None
    crew: Crew | None = None


def fit(
    parameters: Sequence[nn.Parameter],
    loss_at: Callable[[int, torch.Generator], Tensor],
    loop: Loop,
    *,
    carried: Carried | None = None,
    stop: Watch | None = None,
) -> Fitted:
    """Minimise a loss over ``parameters``, which come in an order that does not change between runs.

    Args:
        loss_at: the scalar loss of a step, given its number and its generator; gradients are clipped to norm 1.
        carried: what else must go on where it stopped.
        stop: may end the loop before its last step; not together with ``carried``.

    Raises:
        ResumeError: if the checkpoint does not fit.
        FloatingPointError: if the loss is not finite.
    """
    assert stop is None or carried is None
    optimizer: torch.optim.Optimizer = OPTIMIZERS.get(loop.optimizer)(list(parameters), loop.learning_rate)
    carried, steps, start = carried or stop, loop.steps, 0
    losses: list[float] = []
    if loop.checkpoint is not None and (found := loop.checkpoint.load(parameters, optimizer, carried)):
        start, losses, kept = found
        if loop.restore_extra:
            loop.restore_extra(kept)
    for step in range(start, steps):
        if stop is not None and stop.over:
            break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, steps, loop.learning_rate, loop.schedule)
            if stop is not None:
                group["lr"] *= stop.rate
        loss = loss_at(step, step_generator(loop.seed, loop.stage, step))
        if not torch.isfinite(loss):
            raise FloatingPointError(f"{loop.stage}: the loss is {loss.item()} at step {step}")
        _step(parameters, optimizer, loss, loop.crew)
        losses.append(round(loss.item(), 6))
        last = step + 1 == steps
        if stop is not None and (last or (step + 1) % stop.every == 0):
            stop.look()
            last = last or stop.over
        if loop.progress:
            loop.progress.update(loop.stage, steps if last else step + 1, steps, f"loss {losses[-1]:.4f}")
        if loop.checkpoint is not None and (last or (step + 1) % loop.save_every == 0):
            note = loop.extra()
            if loop.crew is None or loop.crew.main:
                state = carried.state() if carried is not None else None
                loop.checkpoint.save(step + 1, parameters, optimizer, losses, note, state)
    if stop is not None:
        stop.settle()
    return Fitted(losses, dict(loop.extra()))


def _step(
    parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer, loss: Tensor, crew: Crew | None
) -> None:
    optimizer.zero_grad(set_to_none=True)
    if loss.requires_grad:
        # Else all of this process's share is others'.
        loss.backward()
    if crew is not None:
        crew.mean_gradients(parameters)
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()


class StateSource(Protocol):
    """Gives each training step its noisy latents."""

    def draw(self, step: int, which: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """``(z_t [batch, c, h, w], timesteps [batch])`` of one step; ``which``: each row's erased prompt."""


def timestep_limit(base: BaseModel, up_to: float) -> int:
    """The first timestep beyond a share of the process, counted from its clean end."""
    return max(1, round(up_to * base.num_train_timesteps))


def noised(
    base: BaseModel, latents: Tensor, generator: torch.Generator, up_to: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """``(z_t, timesteps [batch], noise)`` of clean latents ``[batch, c, h, w]`` at uniformly drawn timesteps.

    ``up_to`` is the share of the process, from its clean end, that timesteps are drawn from.
    """
    timesteps = sample_timesteps(len(latents), 0, timestep_limit(base, up_to), generator).to(base.device)
    noise = torch.randn(latents.shape, generator=generator).to(base.device, latents.dtype)
    return base.add_noise(latents, noise, timesteps), timesteps, noise


class TargetImageStates:
    """Noised latents of the target images."""

    def __init__(self, base: BaseModel, latents: Tensor, erased: PromptEmbeds, empty: PromptEmbeds) -> None:
        self.base, self.latents = base, latents

    def draw(self, step: int, which: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """States and timesteps of one step."""
        index = torch.randint(0, len(self.latents), (len(which),), generator=generator)
        states, timesteps, _ = noised(self.base, self.latents[index], generator)
        return states, timesteps


STATES = Registry(
    "states",
    {
        "rollout": "recare_patch.erasure.rollouts:RolloutStates",
        "shared-rollout": "recare_patch.erasure.rollouts:SharedRolloutStates",
        "target-images": "recare_patch.erasure.loop:TargetImageStates",
    },
)
"""Where a step's states come from, by the recipe's ``erase.states``."""


def state_source(
    recipe: Recipe, base: BaseModel, latents: Tensor, names: PromptEmbeds, empty: PromptEmbeds
) -> StateSource:
    """What a recipe's states come from: target images ``[images, c, h, w]``, or rollouts under ``names``."""
    source: StateSource = STATES.get(recipe.erase.states)(base, latents, names, empty)
    return source


HELD_OUT = 16
"""States that a look at the held-out loss predicts."""

_LOOK_EVERY = 10
"""Steps between two looks."""


def most_evaluations(steps: int, batch_size: int, patience: int | None) -> int:
    """Denoiser evaluations of an inversion that takes all its steps; a training sample counts as 3."""
    looks = 0 if patience is None else -(-steps // _LOOK_EVERY)
    return steps * batch_size * 3 + looks * HELD_OUT


def name_templates(concept: Concept) -> tuple[str, ...]:
    """The concept's own prompts with :data:`PLACEHOLDER` where its name stands."""
    with_name = [prompt.replace(concept.text, PLACEHOLDER) for prompt in concept.name_prompts]
    return tuple(
        dict.fromkeys([concept.target_prompt_for(PLACEHOLDER), *(one for one in with_name if PLACEHOLDER in one)])
    )


def invert(
    base: BaseModel,
    latents: Tensor,
    prompts: Sequence[str],
    start: Tensor,
    loop: Loop,
    *,
    batch_size: int,
    patience: int | None = None,
    noise_up_to: float = 1.0,
) -> tuple[Tensor, Fitted]:
    """Fit token vectors so that the model, as it stands, predicts the noise on ``latents``.

    Args:
        base: the model to invert; an adapter that is on stays on.
        latents: clean latents of the pictures, ``[images, c, h, w]``.
        prompts: templates that hold :data:`PLACEHOLDER`.
        start: initial vectors ``[vectors, width]``.
        loop: its optimizer is AdamW whatever it says.
        patience: looks at a held-out fifth of the pictures without a new best that end the loop; the best
            vectors are returned then. None: all steps, on all pictures.
        noise_up_to: the share of the process, from its clean end, that states are drawn from.

    Returns:
        The vectors ``[vectors, width]``, fp32, and the fitted loop.
    """
    vectors, stop = nn.Parameter(start.detach().clone().float()), None
    if patience is not None:
        kept = max(1, len(latents) // 5)
        latents, held = latents[:-kept], latents[-kept:]
        generator = step_generator(loop.seed, f"{loop.stage} held out", 0)
        look = _held_out(base, held, prompts, vectors, noise_up_to, generator)
        stop = EarlyStop([vectors], look, patience=patience, every=_LOOK_EVERY)

    def loss_at(step: int, generator: torch.Generator) -> Tensor:
        index = torch.randint(0, len(latents), (batch_size,), generator=generator)
        states, timesteps, noise = noised(base, latents[index], generator, noise_up_to)
        target = base.training_target(latents[index], noise, timesteps)
        which = int(torch.randint(0, len(prompts), (1,), generator=generator))
        embeds = base.encode_with_vectors([prompts[which]], vectors).repeat(batch_size)
        return F.mse_loss(base.denoise(states, timesteps, embeds).float(), target.float())

    with frozen(*base.components.values()):
        loop = replace(loop, optimizer="adamw", save_every=50, crew=base.crew)
        return vectors.detach(), fit([vectors], loss_at, loop, stop=stop)


def _held_out(
    base: BaseModel, latents: Tensor, prompts: Sequence[str], vectors: Tensor, up_to: float, generator: torch.Generator
) -> Callable[[], float]:
    """The loss of the vectors as they stand, always on the same states, spread evenly over the timesteps."""
    rows = torch.arange(HELD_OUT)
    clean = latents[rows % len(latents)]
    timesteps = ((rows + 0.5) / HELD_OUT * timestep_limit(base, up_to)).long().to(base.device)
    noise = torch.randn(clean.shape, generator=generator).to(base.device, clean.dtype)
    states = base.add_noise(clean, noise, timesteps)
    target = base.training_target(clean, noise, timesteps).float()

    def loss() -> float:
        embeds = base.encode_with_vectors(prompts, vectors)[rows % len(prompts)]
        return F.mse_loss(base.denoise(states, timesteps, embeds).float(), target).item()

    return loss
