"""The only training loop, and the states it trains on.

A method hands over a loss; nothing here knows what it means. Every step draws from a generator seeded by
``(seed, stage, step)`` alone, so a run that goes on from a checkpoint ends with the same tensors as one that
was never stopped.
"""

from __future__ import annotations

import json
import logging
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from recare_patch.core import Crew, Progress, Registry, ResumeError, keep_tensors, kept_tensors, told_at
from recare_patch.models import LossScale, check_trained, sample_timesteps

if TYPE_CHECKING:
    from recare_patch.models import BaseModel, PromptEmbeds
    from recare_patch.recipe import Recipe

logger = logging.getLogger(__name__)

OPTIMIZERS = Registry(
    "optimizer", {"adamw": "recare_patch.erasure.loop:_adamw", "adamw8bit": "recare_patch.erasure.loop:_adamw8bit"}
)


def _adamw8bit(parameters: Sequence[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """AdamW with block-wise 8-bit states (Dettmers et al., 2022); small tensors keep 32 bits."""
    if any(parameter.device.type == "mps" for parameter in parameters):
        # No kernels there; a LoRA's states are small.
        logger.info("the optimizer adamw8bit is not made for %s: adamw is used", parameters[0].device)
        return _adamw(parameters, lr)
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


class Average:
    """The exponential moving average of parameters over a loop's steps.

    Large steps of a few states each leave noise in the parameters, and the mean of the last of them has little of it
    (an equal mean of a whole stretch: Izmailov et al., arXiv 1803.05407).
    Early steps count less: after ``n`` steps the weight of what came before is ``n / (n + 9)``, ``decay`` at most.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float) -> None:
        def averaged(mean: Tensor, now: Tensor, taken: Tensor | int) -> Tensor:
            return mean.lerp(now, 1 - min(decay, int(taken) / (int(taken) + 9)))

        self.parameters = nn.ParameterList(parameters)
        self._mean = AveragedModel(self.parameters, avg_fn=averaged)

    def take(self) -> None:
        """Take in the parameters as they stand after a step."""
        self._mean.update_parameters(self.parameters)

    @torch.no_grad()
    def settle(self) -> None:
        """Give the parameters their mean."""
        for mean, parameter in zip(self._mean.parameters(), self.parameters, strict=True):
            parameter.copy_(mean)

    def state(self) -> dict[str, Tensor]:
        """Everything, as tensors on the CPU."""
        return {key: one.cpu() for key, one in self._mean.state_dict().items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what :meth:`state` returned."""
        self._mean.load_state_dict(dict(state))


class AllCarried:
    """Several things to carry as one."""

    def __init__(self, parts: Sequence[Carried]) -> None:
        self.parts = parts

    def state(self) -> Mapping[str, Tensor]:
        """That of each, its keys behind its place."""
        return {f"{k}:{key}": one for k, part in enumerate(self.parts) for key, one in part.state().items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what :meth:`state` returned."""
        for k, part in enumerate(self.parts):
            prefix = f"{k}:"
            part.load_state({key[len(prefix) :]: one for key, one in state.items() if key.startswith(prefix)})


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
        scaling: LossScale | None = None,
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
        note: dict[str, Any] = {"step": step, "losses": losses, "scalars": scalars, "extra": dict(extra)}
        if scaling is not None:
            note["scaling"] = scaling.state
        keep_tensors(self.path, tensors, {"loop": json.dumps(note)})

    def load(
        self,
        parameters: Sequence[nn.Parameter],
        optimizer: torch.optim.Optimizer,
        carried: Carried | None = None,
        scaling: LossScale | None = None,
    ) -> tuple[int, list[float], dict[str, Any]] | None:
        """Restore what :meth:`save` wrote, or return ``None`` where there is nothing yet, or it is damaged.

        Raises:
            ResumeError: if it belongs to other parameters.
        """
        found = kept_tensors(self.path)
        if found is None:
            return None
        tensors, note = found[0], json.loads(found[1]["loop"])
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
        if scaling is not None and "scaling" in note:
            scaling.state = note["scaling"]
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
        average: decay of the parameters' :class:`Average`, which the loop ends with; 0: it ends with the last ones.
        checkpoint: where to save and resume every ``save_every`` steps; ``None`` keeps nothing.
        dtype: in which the base computes that the loss goes through.
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
    average: float = 0.0
    dtype: torch.dtype = torch.float32
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
        stop: may end the loop before its last step; not together with ``carried`` or an average.

    Raises:
        ResumeError: if the checkpoint does not fit.
        NonFiniteError: a loss, a gradient or a parameter is no number; the last checkpoint is left as it is.
    """
    assert stop is None or (carried is None and not loop.average)
    scaling = LossScale(loop.dtype)
    optimizer: torch.optim.Optimizer = OPTIMIZERS.get(loop.optimizer)(list(parameters), loop.learning_rate)
    average = Average(parameters, loop.average) if loop.average else None
    carried, steps, start = carried or stop, loop.steps, 0
    if average is not None:
        carried = AllCarried([average, carried] if carried is not None else [average])
    losses: list[float] = []
    if loop.checkpoint is not None and (found := loop.checkpoint.load(parameters, optimizer, carried, scaling)):
        start, losses, kept = found
        if loop.restore_extra:
            loop.restore_extra(kept)
    saved = str(start or "")
    for step in range(start, steps):
        if stop is not None and stop.over:
            break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, steps, loop.learning_rate, loop.schedule)
            if stop is not None:
                group["lr"] *= stop.rate
        with told_at(f"{loop.stage}, step {step + 1}", saved and f"; the checkpoint of step {saved} is kept"):
            loss = loss_at(step, step_generator(loop.seed, loop.stage, step))
            if scaling.backward(loss, parameters, loop.crew):
                nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
            if average is not None:
                average.take()
            losses.append(round(loss.item(), 6))
            last = step + 1 == steps
            if last or (step + 1) % loop.save_every == 0:
                check_trained(parameters, loop.dtype)
            if stop is not None and (last or (step + 1) % stop.every == 0):
                stop.look()
                last = last or stop.over
        if loop.progress:
            loop.progress.update(loop.stage, steps if last else step + 1, steps, f"loss {losses[-1]:.4f}")
        if loop.checkpoint is not None and (last or (step + 1) % loop.save_every == 0):
            note, saved = loop.extra(), str(step + 1)
            if loop.crew is None or loop.crew.main:
                state = carried.state() if carried is not None else None
                loop.checkpoint.save(step + 1, parameters, optimizer, losses, note, state, scaling)
    for one in (stop, average):
        if one is not None:
            one.settle()
    return Fitted(losses, dict(loop.extra()))


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
