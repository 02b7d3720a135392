"""What a shared patch consists of: known files, and nothing else."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from recare_patch.core import file_sha256
from recare_patch.patch.formats import output_name
from recare_patch.patch.patch import Patch, concepts_of
from recare_patch.recipe import WEIGHTS_NAME, slug_of

CARD_NAME = "README.md"
"""The card, beside the weights."""
STACK_NAME = "stack.yaml"
"""What a stack was made of, beside its weights."""
REPORT_NAME = "report.html"
"""The file beside ``evidence.json``."""
EVIDENCE_NAME = "evidence.json"
"""The file beside the weights."""

RECORD_NAME = "hub.json"
"""Where a fetched patch came from, beside its weights."""

PREVIEW_NAME = "preview.png"
TRAINING_NAME = "training.json"

_TEXTS = (CARD_NAME, "recipe.yaml", STACK_NAME, "care_set.json", TRAINING_NAME, EVIDENCE_NAME)
_BLOCK = 1 << 20


@dataclass(frozen=True)
class SharedFile:
    """A file of a shared patch.

    Attributes:
        name: its path within the folder and within the repo.
        bytes: its size.
        sha256: of its content.
    """

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
    return tuple(dict.fromkeys(f"{slug_of(concept)}/{name}" for concept in concepts_of(patch)))


def git_hash(path: Path) -> str:
    """The id under which git, and so the Hub, lists a file that it does not keep elsewhere."""
    digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as handle:
        while block := handle.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def previews_of(folder: Path) -> dict[str, Path]:
    """The sheets of a report that is made of what lies in a patch's folder."""
    preview = folder / PREVIEW_NAME
    return {"Before and after, at the same seeds": preview} if preview.is_file() else {}
