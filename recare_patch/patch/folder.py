"""The files of a patch: what they are called and which one holds the weights; read without torch."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from recare_patch.core import MOST_PICTURE, OutputError, PatchError, file_sha256, inside, read_bytes
from recare_patch.recipe import WEIGHTS_NAME, slug_of

if TYPE_CHECKING:
    from recare_patch.patch.patch import Patch

PEFT_NAME = "adapter_model.safetensors"
CARD_NAME = "README.md"
STACK_NAME = "stack.yaml"
"""What a stack was made of, beside its weights."""
REPORT_NAME = "report.html"
EVIDENCE_NAME = "evidence.json"
RECORD_NAME = "hub.json"
"""Where a fetched patch came from."""
PREVIEW_NAME = "preview.png"
TRAINING_NAME = "training.json"

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

_TEXTS = (CARD_NAME, "recipe.yaml", STACK_NAME, "care_set.json", TRAINING_NAME, EVIDENCE_NAME)


def weights_file(path: Path, *, of_any_tool: bool = False) -> Path:
    """The weights file of a patch's folder, or ``path`` where it is no folder.

    Args:
        path: folder or file.
        of_any_tool: take PEFT's file, or the only safetensors file in the folder, as well.

    Raises:
        PatchError: there is none, or several.
    """
    if not path.is_dir():
        if not path.exists():
            raise PatchError(f"there is no {'LoRA file' if of_any_tool else 'patch'} at {path}")
        return path
    for name in (WEIGHTS_NAME, PEFT_NAME) if of_any_tool else (WEIGHTS_NAME,):
        if (path / name).exists():
            if not inside(path / name, path):
                raise PatchError(f"{path / name} is a link that leads out of its folder: name the file itself")
            return path / name
    found = sorted(path.glob("*.safetensors")) if of_any_tool else []
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(one.name for one in found)
        raise PatchError(f"{path} holds several LoRA files ({names}): name one of them")
    pickled = sorted(one.name for one in path.iterdir() if one.suffix in PICKLES)
    if pickled:
        raise PatchError(
            f"{path} holds a pickle ({pickled[0]}), which can run code when it is opened: only safetensors is read"
        )
    wanted = "a safetensors file" if of_any_tool else WEIGHTS_NAME
    others = [] if of_any_tool else sorted(one.name for one in path.glob("*.safetensors"))
    told = (
        f"; `recare-patch convert {path / others[0]} --to diffusers --out FOLDER` makes one of a LoRA" if others else ""
    )
    raise PatchError(f"{path} is no patch: {wanted} is not in it{told}")


def target_file(path: str | Path, name: str) -> Path:
    """``path`` where it names a safetensors file, else ``name`` in that folder.

    Raises:
        OutputError: ``path`` names a file of another kind.
    """
    path = Path(path)
    if path.suffix in PICKLES and not path.is_dir():
        raise OutputError(f"cannot write {path}: LoRA files are written as .safetensors")
    return path if path.suffix == ".safetensors" and not path.is_dir() else path / name


@dataclass(frozen=True)
class SharedFile:
    """A file of a shared patch; its name is its path within the folder and within the repo."""

    name: str
    bytes: int
    sha256: str

    @classmethod
    def of(cls, folder: Path, name: str) -> SharedFile:
        """That of a file on the disk.

        Raises:
            PatchError: it cannot be read.
        """
        sha256 = file_sha256(folder / name)
        return cls(name, (folder / name).stat().st_size, sha256)


def kohya_name(patch: Patch) -> str:
    """The weights' file for A1111 and ComfyUI."""
    from recare_patch.patch.kohya import output_name

    return f"{output_name(patch)}.safetensors"


def text_names(patch: Patch) -> tuple[str, ...]:
    """The files of words and figures; of several concepts each has evidence in a folder of its own."""
    return (*_TEXTS, *_of_concepts(patch, EVIDENCE_NAME))


def report_names(patch: Patch) -> tuple[str, ...]:
    """The pages that show the evidence."""
    return (REPORT_NAME, *_of_concepts(patch, REPORT_NAME))


def all_names(patch: Patch) -> tuple[str, ...]:
    """All files that a patch may have, as paths within its folder."""
    return (WEIGHTS_NAME, kohya_name(patch), *text_names(patch), PREVIEW_NAME, *report_names(patch))


def _of_concepts(patch: Patch, name: str) -> tuple[str, ...]:
    if patch.metadata is None or not patch.metadata.by_concept:
        return ()
    return tuple(dict.fromkeys(f"{slug_of(one.concept)}/{name}" for one in patch.metadata.erased))


def git_hash(path: Path) -> str:
    """The id under which git, and so the Hub, lists a file that it does not keep elsewhere."""
    data = read_bytes(path, path.name, PatchError, most=MOST_PICTURE)
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def previews_of(folder: Path) -> dict[str, Path]:
    """The sheets of a report that is made of what lies in a patch's folder."""
    preview = folder / PREVIEW_NAME
    return {"Before and after, at the same seeds": preview} if preview.is_file() else {}
