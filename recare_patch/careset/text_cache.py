"""Features of whole word lists, kept between runs: a CLIP takes minutes for them on a CPU.

One file a list in ``recare-patch/clip`` below the user's cache folder, or in the folder that the environment
variable ``RECARE_PATCH_CLIP_CACHE`` names; where that is empty, nothing is kept. A damaged file is made anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from recare_patch.core import RecarePatchError, keep_tensors, kept_tensors, user_cache

VARIABLE = "RECARE_PATCH_CLIP_CACHE"
MOST = 20
"""Files that are kept, of about 15 MB each: the longest unused go."""


def _folder() -> Path | None:
    named = os.environ.get(VARIABLE)
    if named is not None:
        return Path(named).expanduser() if named else None
    return user_cache("clip")


def network_digest(*parts: nn.Module) -> str:
    """SHA-256 over the values of networks' weights, in the order of their names."""
    digest = hashlib.sha256()
    for part in parts:
        for name, tensor in sorted(part.state_dict().items()):
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def list_key(network: str, rows: Iterable[Iterable[int]]) -> str:
    """What the features follow from: the network's digest, and the ids of every text's tokens."""
    ids = "\n".join(" ".join(map(str, row)) for row in rows)
    return hashlib.sha256(f"{network}\n{ids}".encode()).hexdigest()


def kept(key: str, shape: tuple[int, int]) -> Tensor | None:
    """The features under a key, float16 of this shape; None where there are none that can be read."""
    folder = _folder()
    if folder is None:
        return None
    file = folder / f"{key}.safetensors"
    try:
        sealed = kept_tensors(file)
        found = sealed[0].get("features") if sealed is not None else None
        if found is not None:
            os.utime(file)
    except OSError:
        return None
    if found is None or tuple(found.shape) != shape or found.dtype != torch.float16:
        return None
    return found if bool(torch.isfinite(found).all()) else None


def keep(key: str, features: Tensor) -> None:
    """Keep float16 features under a key, whole or not at all; a place that takes nothing is no fault."""
    folder = _folder()
    if folder is None:
        return
    with contextlib.suppress(RecarePatchError, OSError):
        folder.mkdir(parents=True, exist_ok=True)
        keep_tensors(folder / f"{key}.safetensors", {"features": features})
        files = sorted(folder.glob("*.safetensors"), key=lambda file: file.stat().st_mtime, reverse=True)
        for file in files[MOST:]:
            file.unlink()
