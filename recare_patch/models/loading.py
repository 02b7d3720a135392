"""Where a base comes from, and what tells it from another."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import platform
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

import recare_patch
from recare_patch.core import BaseModelError, nearest, noted, open_tensors, unknown_name
from recare_patch.models.hub_source import cached_layout, fetch, published
from recare_patch.models.layout import Layout, family_of, read_layout, read_single_file
from recare_patch.models.lora import TEXT_ENCODERS, UNET, tuner_layers
from recare_patch.recipe import MemoryOptions

if TYPE_CHECKING:
    from recare_patch.models.latent_diffusion import LatentDiffusion

ATELIER = "atelier"
"""The name of the bundled base."""

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Precision → dtype of a base's weights."""

ACCELERATORS = ("cuda", "mps", "xpu")
"""Kinds of devices in the order in which ``auto`` looks for them."""

logger = logging.getLogger(__name__)

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*/[\w.\-]+")


def base_folder(source: str | Path = ATELIER) -> tuple[Path, str]:
    """The whole pipeline folder behind a source, and the id to remember it by; BaseModelError if there is none."""
    source = str(source)
    if source.lower() == ATELIER:
        folder = Path(__file__).parent / "atelier" / "weights" / "pipeline"
        if not folder.is_dir():
            raise BaseModelError(
                "the bundled base 'atelier' is not in this installation; reinstall the package or name another base"
            )
        return folder, ATELIER
    folder = Path(source).expanduser()
    if folder.is_dir():
        # Only its name is remembered: a patch is published, and the path is its maker's business.
        return folder, folder.resolve().name
    if folder.exists():
        raise BaseModelError(f"base {source} is a file, and a pipeline folder, a hub id or '{ATELIER}' is needed here")
    if _HUB_ID.fullmatch(source):
        return fetch(source, whole=True), source
    guess = nearest(source, [ATELIER])
    hint = f"; did you mean '{guess}'?" if guess else ""
    raise BaseModelError(
        f"base '{source}' was not found: give a diffusers pipeline folder, a hub id (owner/name) or '{ATELIER}'{hint}"
    )


def find_layout(source: str | Path = ATELIER, *, weights: bool = True) -> tuple[Layout, str]:
    """What a base consists of, and the id to remember it by; see :func:`load_base`, :func:`base_folder`.

    Without ``weights`` a hub id needs no network where it is in the hub's cache or well known.
    """
    file = Path(source).expanduser()
    if file.is_file():
        return read_single_file(file), file.stem
    if _HUB_ID.fullmatch(name := str(source)) and not file.is_dir():
        known = None if weights else cached_layout(name) or published(name)
        return known or read_layout(fetch(name, weights=weights), f"'{name}'"), name
    folder, base_id = base_folder(source)
    return read_layout(folder, f"'{base_id}'"), base_id


def load_base(
    source: str | Path = ATELIER,
    *,
    precision: str = "fp32",
    device: str | torch.device = "auto",
    memory: MemoryOptions | None = None,
) -> LatentDiffusion:
    """Load a base model, frozen.

    Args:
        source: ``atelier`` (bundled), a diffusers pipeline folder, a hub id ``owner/name``, or a
            single-file checkpoint ``model.safetensors``.
        precision: a name in :data:`PRECISIONS`; adapters stay in fp32 all the same. Where the device has no
            bf16, fp16 is used, and said.
        device: ``auto`` takes a GPU where there is one.
        memory: levers that make it fit a smaller device.

    Raises:
        BaseModelError: it is missing, incomplete, of an unsupported architecture or damaged.
        UnknownNameError: for another precision.
    """
    chosen, memory = chosen_device(device), memory or MemoryOptions()
    precision, told = usable_precision(precision, chosen)
    if told is not None:
        logger.warning(told)
    if memory.weights != "full" and chosen.type == "mps":
        raise BaseModelError(f"memory.weights {memory.weights} has no kernels on {chosen}: give full, or --device cpu")
    layout, base_id = find_layout(source)
    with noted("loading the base"):
        return family_of(layout).load(layout, base_id, PRECISIONS[precision], chosen, memory)


def weights_hash(network: nn.Module, component: str = UNET) -> str:
    """SHA-256 over names, shapes and fp16-rounded values, in the order of the names, without adapters.

    Rounding makes a model loaded in fp32 from an fp16 file the same as that file; half of the
    precision of fp32 still tells any two trainings apart. bf16 weights have lost digits that fp16
    keeps, so their hash differs from the original's. Text encoders are named differently by different
    versions of transformers, and their hash is the same for all.
    """
    wrapped = {name for name, _ in tuner_layers(network)}
    weights: dict[str, Tensor] = {}
    for name, tensor in network.state_dict().items():
        before, _, last = name.rpartition(".base_layer.")
        if before in wrapped:
            weights[f"{before}.{last}"] = tensor
        elif not any(name.startswith(f"{layer}.") for layer in wrapped):
            weights[name] = tensor
    return _digest((name, weights[own]) for name, own in _hashed_names(weights, component).items())


def stored_weights_hash(files: Sequence[Path], component: str = UNET) -> str:
    """:func:`weights_hash` of a network's safetensors shards, with one tensor in memory at a time."""
    with contextlib.ExitStack() as stack:
        handles = [stack.enter_context(open_tensors(file)) for file in files]
        places = {name: handle for handle in handles for name in handle.keys()}  # noqa: SIM118 - no mapping
        names = _hashed_names(places, component)
        return _digest((name, places[own].get_tensor(own)) for name, own in names.items())


def _hashed_names(weights: Mapping[str, object], component: str) -> dict[str, str]:
    """The name that goes into the hash → the name in the network or the file, in order."""
    names = {name: name for name in weights}
    if component in TEXT_ENCODERS:
        # Old files store the positions 0, 1, 2, … as well, which newer classes count for themselves.
        names = {name.removeprefix("text_model."): name for name in weights if not name.endswith("position_ids")}
    return dict(sorted(names.items()))


def _digest(weights: Iterable[tuple[str, Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, tensor in weights:
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        rounded = tensor.detach().to("cpu", torch.float16).contiguous()
        digest.update(rounded.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _available(kind: str) -> bool:
    backend = torch.backends.mps if kind == "mps" else getattr(torch, kind, None)
    return backend is not None and bool(backend.is_available())


def chosen_device(device: str | torch.device) -> torch.device:
    """The device of a name; ``auto`` is the first accelerator that is there. BaseModelError for others."""
    if device == "auto":
        return torch.device(next((kind for kind in ACCELERATORS if _available(kind)), "cpu"))
    try:
        chosen = torch.device(device)
    except RuntimeError as fault:
        raise BaseModelError(f"'{device}' is no device: give auto, cpu, {', '.join(ACCELERATORS)}") from fault
    if chosen.type in ACCELERATORS and not _available(chosen.type):
        raise BaseModelError(f"device '{device}' is not available here: give auto or cpu")
    return chosen


def usable_precision(precision: str, device: torch.device) -> tuple[str, str | None]:
    """The precision that a device computes in, and a sentence where it is another one than was asked for.

    Raises:
        UnknownNameError: for a name that is not in :data:`PRECISIONS`.
    """
    if precision not in PRECISIONS:
        raise unknown_name("precision", precision, PRECISIONS)
    if precision != "bf16" or _has_bf16(device):
        return precision, None
    return "fp16", f"{device_name(device)} does not compute in bf16: fp16 is used, with loss scaling"


def _has_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        with torch.cuda.device(device):
            # Emulated, as on cards before Ampere, it is slower than fp32.
            return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type != "mps" or torch.backends.mps.is_macos_or_newer(14, 0)


def device_name(device: torch.device) -> str:
    """What records call a device: ``cpu``, ``mps``, or ``cuda:0 (NVIDIA …)``."""
    if device.type in ("cuda", "xpu"):
        return f"{device} ({getattr(torch, device.type).get_device_name(device)})"
    return str(device)


def forget_peak_memory(device: torch.device) -> None:
    """Let :func:`peak_memory` start anew, where the system allows it."""
    if device.type in ("cuda", "xpu"):
        getattr(torch, device.type).reset_peak_memory_stats(device)
        return
    if device.type == "mps":
        torch.mps.empty_cache()
        return
    # Linux forgets a process's highest resident size when 5 is written here (proc(5)).
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_memory(device: torch.device) -> int:
    """Peak memory in bytes of the device if it has its own, else of the process, since last forgotten."""
    if device.type in ("cuda", "xpu"):
        return int(getattr(torch, device.type).max_memory_allocated(device))
    if device.type == "mps":
        # Metal counts no peak: what its driver holds, with what it keeps for later, seldom falls.
        return int(torch.mps.driver_allocated_memory())
    try:
        import resource
    except ImportError:  # Windows has no such module
        import psutil

        told = psutil.Process().memory_info()
        return int(getattr(told, "peak_wset", told.rss))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Package → version: this package, Python, and those of ``packages`` that are installed."""
    found = {"recare-patch": recare_patch.__version__, "python": platform.python_version()}
    for package in packages:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
