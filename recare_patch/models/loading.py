"""Base models: one file an architecture, behind one protocol.

A new architecture is one file with a class that has the methods of
:class:`BaseModel`, most of them from
:class:`LatentDiffusion`, and one line in :data:`FAMILIES`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from recare_patch.core import BaseModelError, Registry, nearest, unknown_name
from recare_patch.models.embeds import (
    PLACEHOLDER,
    TEXT_ROOM,
    BaseModel,
    EvaluationCounter,
    PromptEmbeds,
)
from recare_patch.models.hashing import weights_hash
from recare_patch.models.layout import Layout, read_layout
from recare_patch.models.single_file import read_single_file

if TYPE_CHECKING:
    from recare_patch.models.latent_diffusion import LatentDiffusion
    from recare_patch.recipe import MemoryOptions

__all__ = [
    "ATELIER",
    "FAMILIES",
    "PLACEHOLDER",
    "PRECISIONS",
    "TEXT_ROOM",
    "BaseModel",
    "EvaluationCounter",
    "PromptEmbeds",
    "base_folder",
    "chosen_device",
    "family_of",
    "find_layout",
    "load_base",
    "weights_hash",
]

ATELIER = "atelier"
"""The name of the bundled base."""

FAMILIES = Registry(
    "base model family",
    {
        "stable-diffusion": "recare_patch.models.stable_diffusion:StableDiffusion",
        "stable-diffusion-3": "recare_patch.models.stable_diffusion_3:StableDiffusion3",
        "stable-diffusion-xl": "recare_patch.models.stable_diffusion_xl:StableDiffusionXL",
    },
    group="recare_patch.base_models",
)

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Precision → dtype of a base's weights."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*/[\w.\-]+")


def _bundled() -> Path:
    return Path(__file__).parent / "atelier" / "weights" / "pipeline"


def _find(source: str, *, weights: bool = True) -> tuple[Path, str]:
    """The folder behind a source, and the id to remember it by; fetches a hub id into the cache."""
    if source.lower() == ATELIER:
        folder = _bundled()
        if not folder.is_dir():
            raise BaseModelError(
                "the bundled base 'atelier' is not in this installation; reinstall the package or name "
                "another base"
            )
        return folder, ATELIER
    folder = Path(source).expanduser()
    if folder.is_dir():
        # Only its name is remembered: a patch is published, and the path is its maker's business.
        return folder, folder.resolve().name
    if folder.exists():
        raise BaseModelError(
            f"base {source} is a file, and a pipeline folder, a hub id or '{ATELIER}' is needed here"
        )
    if _HUB_ID.fullmatch(source):
        return _fetch(source, weights), source
    guess = nearest(source, [ATELIER])
    hint = f"; did you mean '{guess}'?" if guess else ""
    raise BaseModelError(
        f"base '{source}' was not found: give a diffusers pipeline folder, a hub id (owner/name) or "
        f"'{ATELIER}'{hint}"
    )


def base_folder(source: str | Path = ATELIER) -> tuple[Path, str]:
    """The pipeline folder behind a source, and the id to remember it by; fetches a hub id.

    Raises:
        BaseModelError: there is none.
    """
    return _find(str(source))


def _fetch(hub_id: str, weights: bool) -> Path:
    from diffusers import DiffusionPipeline
    from huggingface_hub import snapshot_download

    try:
        if not weights:
            return Path(snapshot_download(hub_id, allow_patterns=["*.json"]))
        # Components handed over as None are not fetched.
        found = DiffusionPipeline.download(
            hub_id, use_safetensors=True, safety_checker=None, feature_extractor=None
        )
    except Exception as fault:
        # The hub's client raises a dozen unrelated classes: offline, not found, gated, refused, …
        # What the system said, of no network or a full disk, is the shortest true account of them.
        told = next((one for one in _chain(fault) if isinstance(one, OSError) and one.strerror), fault)
        reason = (getattr(told, "strerror", None) or str(told).strip() or type(told).__name__).splitlines()[0]
        raise BaseModelError(
            f"base {hub_id} is no folder here and could not be fetched from the hub ({reason})"
        ) from fault
    return Path(found)


def _chain(fault: BaseException) -> Iterator[BaseException]:
    """A fault and those that led to it."""
    one: BaseException | None = fault
    while one is not None:
        yield one
        one = one.__cause__ or one.__context__


def chosen_device(device: str | torch.device) -> torch.device:
    """The device of a name; ``auto`` is a GPU where there is one.

    Raises:
        BaseModelError: there is no such device.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as fault:
        raise BaseModelError(f"'{device}' is no device: give auto, cpu or cuda") from fault
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise BaseModelError(f"device '{device}' is not available here: give auto or cpu")
    return chosen


def find_layout(source: str | Path = ATELIER, *, weights: bool = True) -> tuple[Layout, str]:
    """What a base consists of, and the id to remember it by; fetches a hub id.

    Args:
        source: see :func:`load_base`.
        weights: whether they are needed too; of a hub id only the configurations are fetched otherwise.

    Raises:
        BaseModelError: it is missing, or incomplete.
    """
    file = Path(source).expanduser()
    if file.is_file():
        return read_single_file(file), file.stem
    folder, base_id = _find(str(source), weights=weights)
    return read_layout(folder, f"'{base_id}'"), base_id


def family_of(layout: Layout) -> type[LatentDiffusion]:
    """The class that a base of this layout is loaded with.

    Raises:
        BaseModelError: there is none for it.
    """
    for name in FAMILIES.names():
        family: type[LatentDiffusion] = FAMILIES.get(name)
        if family.recognises(layout):
            return family
    if "unet" not in layout.configs and "transformer" not in layout.configs:
        raise BaseModelError(f"base {layout.name} lacks its component 'unet'")
    kind = layout.index.get("_class_name", "pipeline of unknown class")
    raise BaseModelError(
        f"base {layout.name} is a {kind}, and what can be patched is Stable Diffusion 1.x, 2.x, XL or 3, "
        "or a pipeline of such a shape"
    )


def load_base(
    source: str | Path = ATELIER,
    *,
    precision: str = "fp32",
    device: str | torch.device = "auto",
    memory: MemoryOptions | None = None,
) -> BaseModel:
    """Load a base model, frozen.

    Args:
        source: ``atelier`` (bundled), a diffusers pipeline folder, a hub id ``owner/name``, or a
            single-file checkpoint ``model.safetensors`` (see :mod:`single_file`).
        precision: ``fp32``, ``bf16`` or ``fp16``; adapters stay in fp32 all the same.
        device: ``auto`` takes a GPU where there is one.
        memory: levers that make it fit a smaller device.

    Raises:
        BaseModelError: it is missing, incomplete, of an unsupported architecture or damaged.
        UnknownNameError: for another precision.
    """
    if precision not in PRECISIONS:
        raise unknown_name("precision", precision, PRECISIONS)
    chosen = chosen_device(device)
    layout, base_id = find_layout(source)
    family = family_of(layout)
    return family.load(layout, base_id, dtype=PRECISIONS[precision], device=chosen, memory=memory)
