"""The only training loop: seed, optimiser, checkpoint, resume, progress.

A method hands over a loss; nothing here knows what it means. Every step draws from a generator
seeded by ``(seed, stage, step)`` alone, so a run that goes on from a checkpoint ends with the same
tensors as one that was never stopped.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from recare_patch.core import Crew, Progress, Registry, ResumeError, write_tensors

OPTIMIZERS = Registry(
    "optimizer",
    {
        "adamw": "recare_patch.erasure.loop:_adamw",
        "adamw8bit": "recare_patch.erasure.loop:_adamw8bit",
    },
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
    """What a finished loop leaves behind.

    Attributes:
        losses: the loss of every step.
        extra: what the caller asked to keep across a resume, for example evaluation counts.
    """

    losses: list[float] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)


class Carried(Protocol):
    """What changes beside the parameters while a loop runs, and must go on where it stopped."""

    def state(self) -> Mapping[str, Tensor]:
        """All of it, as tensors on the CPU."""
        ...

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what :meth:`state` returned."""
        ...


_BETTER = 1e-3
"""By what share a held-out loss must fall to be a new best: it creeps on long after it has said all."""


class EarlyStop:
    """Ends a loop whose loss on what it does not train on no longer falls, and keeps the best parameters.

    Attributes:
        every: steps between two looks; the loop's last step has one too.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        held_out: Callable[[], float],
        *,
        patience: int,
        every: int,
    ) -> None:
        """Watch a loop.

        Args:
            parameters: what is trained.
            held_out: the loss of the parameters as they stand.
            patience: so many looks in a row without a new best end the loop.
            every: steps between two looks.
        """
        self.parameters, self.held_out, self.patience, self.every = parameters, held_out, patience, every
        self._best, self._since = math.inf, 0
        self._kept = [parameter.detach().clone() for parameter in parameters]

    @property
    def over(self) -> bool:
        """Whether the loop should end here."""
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
        """See :class:`Carried`."""
        found = {f"kept.{k}": value.cpu() for k, value in enumerate(self._kept)}
        return found | {
            "best": torch.tensor(self._best, dtype=torch.float64),
            "since": torch.tensor(self._since),
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """See :class:`Carried`."""
        self._best, self._since = float(state["best"]), int(state["since"])
        self._kept = [state[f"kept.{k}"].to(parameter.device) for k, parameter in enumerate(self.parameters)]


class Checkpoint:
    """Parameters, optimiser states and losses of one loop in one safetensors file."""

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
        """Write the loop's state after ``step`` steps; the file is replaced in one rename."""
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
        self,
        parameters: Sequence[nn.Parameter],
        optimizer: torch.optim.Optimizer,
        carried: Carried | None = None,
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


def fit(
    parameters: Sequence[nn.Parameter],
    loss_at: Callable[[int, torch.Generator], Tensor],
    *,
    stage: str,
    steps: int,
    learning_rate: float,
    seed: int,
    optimizer: str = "adamw8bit",
    schedule: str = "cosine",
    max_grad_norm: float = 1.0,
    checkpoint: Checkpoint | None = None,
    save_every: int = 20,
    extra: Callable[[], Mapping[str, Any]] = dict,
    restore_extra: Callable[[dict[str, Any]], None] | None = None,
    progress: Progress | None = None,
    crew: Crew | None = None,
    carried: Carried | None = None,
    stop: EarlyStop | None = None,
) -> Fitted:
    """Minimise a loss over ``parameters``.

    Args:
        parameters: what is trained, in an order that does not change between runs.
        loss_at: the scalar loss of a step, given its number and its generator.
        stage: names the loop in progress, seeds and messages.
        steps: optimiser steps.
        learning_rate: peak of the schedule.
        seed: of the run.
        optimizer: a name in :data:`OPTIMIZERS`.
        schedule: ``cosine`` (to a tenth) or ``constant``.
        max_grad_norm: gradients are clipped to this norm.
        checkpoint: where to save and resume; ``None`` keeps nothing.
        save_every: steps between checkpoints.
        extra, restore_extra: JSON values to carry across a resume.
        progress: told after every step.
        crew: processes that train together, each of which calls this; their gradients are averaged, and
            the first of them writes.
        carried: what else must go on where it stopped.
        stop: may end the loop before its last step; not together with ``carried``.

    Raises:
        ResumeError: if the checkpoint does not fit.
        FloatingPointError: if the loss is not finite.
    """
    make = OPTIMIZERS.get(optimizer)
    assert callable(make)
    optimiser: torch.optim.Optimizer = make(list(parameters), learning_rate)
    assert stop is None or carried is None
    carried = carried or stop
    start = 0
    losses: list[float] = []
    if checkpoint is not None and (found := checkpoint.load(parameters, optimiser, carried)):
        start, losses, kept = found
        if restore_extra:
            restore_extra(kept)
    for step in range(start, steps):
        if stop is not None and stop.over:
            break
        for group in optimiser.param_groups:
            group["lr"] = learning_rate_at(step, steps, learning_rate, schedule)
        loss = loss_at(step, step_generator(seed, stage, step))
        if not torch.isfinite(loss):
            raise FloatingPointError(f"{stage}: the loss is {loss.item()} at step {step}")
        optimiser.zero_grad(set_to_none=True)
        if loss.requires_grad:
            # Else all of this process's share is others'.
            loss.backward()
        if crew is not None:
            crew.mean_gradients(parameters)
        nn.utils.clip_grad_norm_(parameters, max_grad_norm)
        optimiser.step()
        losses.append(round(loss.item(), 6))
        last = step + 1 == steps
        if stop is not None and (last or (step + 1) % stop.every == 0):
            stop.look()
            last = last or stop.over
        if progress:
            progress.update(stage, steps if last else step + 1, steps, f"loss {losses[-1]:.4f}")
        if checkpoint is not None and (last or (step + 1) % save_every == 0):
            note = extra()
            if crew is None or crew.main:
                state = carried.state() if carried is not None else None
                checkpoint.save(step + 1, parameters, optimiser, losses, note, state)
    if stop is not None:
        stop.settle()
    return Fitted(losses, dict(extra()))
