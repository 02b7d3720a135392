"""Several processes that train as one: who they are, and how they share a step's states.

``accelerate launch``, ``torchrun`` or MPI start them. Every process draws a step's numbers in full and
predicts its share of the rows; predictions are gathered, so each process computes the whole loss and
the same update as one process would, up to the order of sums.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from recare_patch.core.files import launched_together


def processes() -> Any | None:
    """What accelerate knows of this process, where it was launched as one of several; else None."""
    if not launched_together():
        return None
    from accelerate import PartialState

    # A long wait: one process may be measuring while the others are done.
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=datetime.timedelta(days=7))
    return state if state.num_processes > 1 else None


def process_device(device: str) -> str:
    """``auto`` under several processes is the device that accelerate gave this one."""
    state = processes() if device == "auto" else None
    return device if state is None else str(state.device)


@dataclass(frozen=True)
class Crew:
    """This process, by its number from 0, among the at least two that train together."""

    index: int
    count: int

    @classmethod
    def found(cls) -> Crew | None:
        """The crew that this process was launched in; None where it is alone."""
        state = processes()
        return None if state is None else cls(state.process_index, state.num_processes)

    @property
    def main(self) -> bool:
        """Whether this process is the one that writes."""
        return self.index == 0

    def wait(self) -> None:
        """Wait until all processes have come this far."""
        dist.barrier()

    def own(self, rows: int) -> slice:
        """The rows of a batch that are this process's: consecutive, as equal in number as can be."""
        return slice(rows * self.index // self.count, rows * (self.index + 1) // self.count)

    def share(self, rows: int, predict: Callable[[slice], Tensor], like: Tensor) -> Tensor:
        """All rows of a prediction, of which this process makes its own; ``like``: a tensor of its shape.

        The gradient flows through a process's own rows, times the number of processes, so that the
        mean of all processes' gradients (:meth:`mean_gradients`) is the gradient of the loss, whatever
        else of it does not pass through here.
        """
        own = self.own(rows)
        made = predict(own) if own.stop > own.start else like.new_zeros((0, *like.shape[1:]))
        return _GatherRows.apply(made, rows, self)

    def gather(self, made: Tensor, rows: int) -> Tensor:
        """Each process's :meth:`own` rows, joined in order."""
        most = -(-rows // self.count)
        padded = made.new_zeros((most, *made.shape[1:]))
        padded[: len(made)] = made
        found = [torch.empty_like(padded) for _ in range(self.count)]
        dist.all_gather(found, padded.contiguous())
        sizes = [Crew(k, self.count).own(rows) for k in range(self.count)]
        return torch.cat([one[: s.stop - s.start] for one, s in zip(found, sizes, strict=True)])

    def mean_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Give every process the mean of all processes' gradients."""
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([grad.reshape(-1) for grad in grads])
        dist.all_reduce(flat)
        flat /= self.count
        for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = part.view_as(parameter).clone()

    def sum(self, number: float, device: torch.device) -> float:
        """The sum of a number over all processes."""
        return self.most(number, device, dist.ReduceOp.SUM)

    def most(self, number: float, device: torch.device, how: Any = dist.ReduceOp.MAX) -> float:
        """The largest of a number over all processes, or what else ``how`` makes of all."""
        total = torch.tensor([float(number)], dtype=torch.float64, device=device)
        dist.all_reduce(total, how)
        return float(total)

    def send(self, rows: Tensor, source: int) -> Tensor:
        """A tensor that one process has, to all; the others give one of its shape and dtype."""
        rows = rows.contiguous()
        dist.broadcast(rows, source)
        return rows


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, made: Tensor, rows: int, crew: Crew) -> Tensor:
        ctx.rows, ctx.crew = rows, crew
        return crew.gather(made, rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0][ctx.crew.own(ctx.rows)] * ctx.crew.count, None, None
