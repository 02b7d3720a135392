"""Numbers that stay numbers: loss scaling for fp16, and what is said where one is NaN or infinite."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from recare_patch.core import BaseModelError, NonFiniteError

if TYPE_CHECKING:
    from recare_patch.core import Crew

logger = logging.getLogger(__name__)

_WIDER = {torch.float16: "--precision bf16 or fp32", torch.bfloat16: "--precision fp32"}
"""The precisions that hold what a dtype does not."""


def check_finite(tensor: Tensor, what: str, dtype: torch.dtype, *, trained: bool = False) -> Tensor:
    """The tensor as it is.

    Args:
        tensor: of any shape.
        what: it is, as the subject of a sentence.
        dtype: in which the base computes.
        trained: whether a lower learning rate may help too.

    Raises:
        NonFiniteError: it holds NaN or infinity; the sentence says what helps.
    """
    if not torch.isfinite(tensor).all():
        verb = "is" if tensor.ndim == 0 else "hold"
        raise NonFiniteError(
            f"{what} {verb} {'NaN' if tensor.isnan().any() else 'infinite'}: {advice(dtype, trained=trained)}"
        )
    return tensor


def check_weights(network: nn.Module, what: str) -> None:
    """BaseModelError for weights that are no numbers: one sum a tensor, which holds what it sums.

    ``what`` is the network with its base, and a verb, as the start of a sentence.
    """
    for name, weight in network.named_parameters():
        if weight.is_floating_point() and not weight.sum(dtype=torch.float32).isfinite():
            bad = ~torch.isfinite(weight)
            if not bad.any():
                continue
            way = "its file may be damaged: fetch it anew"
            if weight.dtype is torch.float16:
                way = f"they may be too large for fp16: {advice(weight.dtype)}, else fetch the file anew"
            raise BaseModelError(f"{what} with {int(bad.sum())} NaN or infinite weights, first in '{name}'; {way}")


def check_trained(parameters: Sequence[Tensor], dtype: torch.dtype) -> None:
    """NonFiniteError where what was trained is no number any more."""
    check_finite(_largest(parameters), "what was trained", dtype, trained=True)


def _largest(tensors: Sequence[Tensor]) -> Tensor:
    """The largest absolute value, NaN where there is one: one kernel for all on a GPU."""
    return nn.utils.get_total_norm([one.detach() for one in tensors], norm_type=torch.inf)


def advice(dtype: torch.dtype, *, trained: bool = False) -> str:
    """What to try where a base that computes in ``dtype`` gave what is no number."""
    ways = [way for way in (_WIDER.get(dtype), "a lower learning rate" if trained else None) if way]
    return f"try {', or '.join(ways)}" if ways else "the weights of the base, or of a patch in it, may be damaged"


def in_double(tensor: Tensor) -> Tensor:
    """The tensor in fp64, on the CPU where its device has none (Apple's)."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


_FIRST, _SEARCH, _GROW_AFTER = 2.0**16, 16.0, 200


class LossScale:
    """Dynamic loss scaling (Micikevicius et al., "Mixed Precision Training", arXiv 1710.03740, section 3.2).

    What flows back through a network in fp16 is too small for it, so the loss is multiplied before the backward
    pass and the gradients are divided by the same power of two after it, in fp32. A step whose gradients overflow
    is left out and the scale halved (divided by 16 until a first step went well: runs are short); it doubles after
    200 good ones. With bf16 and fp32 nothing is multiplied.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.scale, self.good, self.settled = _FIRST if dtype is torch.float16 else 1.0, 0, False

    def backward(
        self, loss: Tensor, parameters: Sequence[nn.Parameter], crew: Crew | None = None, what: str = "loss"
    ) -> bool:
        """Give fp32 parameters the gradients of a loss, averaged over a crew; False: they overflowed, take no step.

        Of several processes all get the same answer. ``what`` the loss is called in messages.

        Raises:
            NonFiniteError: the loss or, at any scale, a gradient is no number.
        """
        check_finite(loss.detach(), f"the {what}", self.dtype, trained=True)
        for parameter in parameters:
            parameter.grad = None
        if loss.requires_grad:
            # Else all of this process's share is others'.
            (loss.float() * self.scale if self.scale != 1 else loss).backward()
        if crew is not None:
            crew.mean_gradients(parameters)
        grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if self.scale != 1:
            torch._foreach_div_(grads, self.scale)
        sound = bool(_largest(grads).isfinite())
        if not sound and self.scale <= 1:
            # It cannot be NaN and infinite alike on all devices, so no kind is told.
            raise NonFiniteError(f"a gradient of the {what} is NaN or infinite: {advice(self.dtype, trained=True)}")
        if self.dtype is torch.float16:
            self._adjust(sound)
        return sound

    def _adjust(self, sound: bool) -> None:
        self.good = self.good + 1 if sound else 0
        if not sound:
            self.scale = max(self.scale / (2 if self.settled else _SEARCH), 1.0)
            logger.info(
                "gradients overflow fp16: the step is left out, and the loss scaled by %g from here on", self.scale
            )
        elif self.good % _GROW_AFTER == 0:
            self.scale *= 2
        self.settled = self.settled or sound

    @property
    def state(self) -> list[float]:
        """All that a resumed loop needs."""
        return [self.scale, float(self.good), float(self.settled)]

    @state.setter
    def state(self, state: Sequence[float]) -> None:
        self.scale, self.good, self.settled = state[0], int(state[1]), bool(state[2])
