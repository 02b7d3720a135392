"""What a run happened on: package versions and memory, as its records tell them."""

from __future__ import annotations

import contextlib
import platform
import resource
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import recare_patch

if TYPE_CHECKING:
    import torch


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Package → version: this package, Python, and those of ``packages`` that are installed."""
    found = {"recare-patch": recare_patch.__version__, "python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def device_name(device: torch.device) -> str:
    """What records call a device: ``cpu``, or ``cuda:0 (NVIDIA …)``."""
    if device.type != "cuda":
        return str(device)
    import torch

    return f"{device} ({torch.cuda.get_device_name(device)})"


def forget_peak_memory(device: torch.device) -> None:
    """Let :func:`peak_memory` start anew, where the system allows it."""
    if device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats(device)
        return
    # Linux forgets a process's highest resident size when 5 is written here (proc(5)).
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int:
    """Peak memory in bytes since the start, or since it was last forgotten.

    Of the device if it has its own, else of the process.
    """
    if device.type == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
