"""Samplers by name: how a pipeline goes from noise to a picture, whichever scheduler it came with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from recare_patch.core import Registry

SCHEDULERS = Registry(
    "scheduler",
    {
        "ddim": "diffusers:DDIMScheduler",
        "dpm-solver++": "diffusers:DPMSolverMultistepScheduler",
        "euler": "diffusers:EulerDiscreteScheduler",
        "pndm": "diffusers:PNDMScheduler",
        "unipc": "diffusers:UniPCMultistepScheduler",
    },
)
"""Which samplers can be asked for by name."""

# As Stable Diffusion uses it: its Runge-Kutta start needs four steps more.
_OPTIONS: dict[str, dict[str, Any]] = {"pndm": {"skip_prk_steps": True}}


@contextlib.contextmanager
def scheduled(pipeline: Any, name: str | None) -> Iterator[None]:
    """The pipeline with another scheduler of the same noise schedule, for as long as it is needed.

    Args:
        pipeline: a diffusers pipeline.
        name: of :data:`SCHEDULERS`; None: its own.

    Raises:
        UnknownNameError: no such scheduler.
    """
    if name is None:
        yield
        return
    own = pipeline.scheduler
    pipeline.scheduler = SCHEDULERS.get(name).from_config(own.config, **_OPTIONS.get(name, {}))
    try:
        yield
    finally:
        pipeline.scheduler = own
