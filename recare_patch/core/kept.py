"""What a run keeps on the disk to go on from, sealed: a bit that flips there changes no result unnoticed.

Each file carries the SHA-256 of what it holds. What does not match is made anew by those who can, and refused in one
sentence by those who cannot; it is never computed with.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recare_patch.core.errors import PatchError, ResumeError
from recare_patch.core.files import load_tensors, read_safetensors_header, write_json, write_tensors
from recare_patch.core.untrusted import read_json

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

_SEAL = "sha256"


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the names, types, shapes and values of tensors, in the order of the names."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def keep_tensors(path: Path, tensors: Mapping[str, Tensor], note: Mapping[str, str] | None = None) -> None:
    """Keep tensors and texts beside them, as :func:`write_tensors` writes."""
    told = dict(note or {})
    write_tensors(path, tensors, told | {_SEAL: _sealed(tensors, told)})


def kept_tensors(path: Path, *, remade: bool = True) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """What :func:`keep_tensors` kept; None where nothing is there.

    Args:
        path: the file.
        remade: what is damaged is made anew by the caller: it is None, and a warning.

    Raises:
        ResumeError: it is damaged, and not ``remade``.
    """
    if not path.exists():
        return None
    try:
        header = read_safetensors_header(path)
        tensors, note = load_tensors(path, header), dict(header.metadata)
    except PatchError:
        tensors, note = {}, {}
    if note.pop(_SEAL, None) == _sealed(tensors, note):
        return tensors, note
    _tell_damaged(path, remade)
    return None


def keep_json(path: Path, found: Any) -> None:
    """Keep JSON values, as :func:`write_json` writes."""
    write_json(path, {_SEAL: _json_hash(found), "kept": found})


def kept_json(path: Path, *, remade: bool = False) -> Any:
    """What :func:`keep_json` kept, as JSON gives it back; see :func:`kept_tensors`."""
    if not path.exists():
        return None
    try:
        told = read_json(path, path.name, ResumeError)
        if told[_SEAL] == _json_hash(told["kept"]):
            return told["kept"]
    except (ResumeError, LookupError, TypeError):
        pass
    _tell_damaged(path, remade)
    return None


def _sealed(tensors: Mapping[str, Tensor], note: Mapping[str, str]) -> str:
    return hashlib.sha256(f"{tensors_hash(tensors)}{json.dumps(note, sort_keys=True)}".encode()).hexdigest()


def _json_hash(found: Any) -> str:
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


def _tell_damaged(path: Path, remade: bool) -> None:
    if not remade:
        raise ResumeError(
            f"{path.name} of this run is damaged, or of another version of recare-patch: start again in a new --out"
        )
    logger.warning("%s of this run is damaged, or of another version of recare-patch: it is made anew", path.name)
