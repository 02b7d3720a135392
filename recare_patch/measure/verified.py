"""What ``verify`` found on this machine: kept in the user's cache, and never read from a patch's own folder.

A patch could bring any record; what is told here was measured here.
"""

from __future__ import annotations

import datetime
import hashlib
from dataclasses import dataclass
from pathlib import Path

from recare_patch import __version__
from recare_patch.core import file_sha256, keep_json, kept_json, user_cache
from recare_patch.measure.integrity import Findings
from recare_patch.patch import EVIDENCE_NAME, weights_file


@dataclass(frozen=True)
class Remembered:
    """One verification.

    Attributes:
        holds: whether everything did.
        figures: how many were measured again.
        date: ISO.
        same: whether it was of the evidence that lies there now.
    """

    holds: bool
    figures: int
    date: str
    same: bool


def _evidence_hash(folder: Path) -> str:
    """Of all evidence on a patch: of several concepts each has its own folder."""
    files = sorted([*folder.glob(EVIDENCE_NAME), *folder.glob(f"*/{EVIDENCE_NAME}")])
    return hashlib.sha256("".join(map(file_sha256, files)).encode()).hexdigest()


def _place(weights: Path) -> Path:
    return user_cache("verified") / f"{file_sha256(weights)}.json"


def remember(patch: Path, found: Findings) -> None:
    """Keep what a verification came to, where it measured figures again."""
    measured = [one for one in found.findings if "figure '" in one.about and one.holds is not None]
    if not measured:
        return
    weights = weights_file(patch)
    note = {"holds": found.holds, "figures": len(measured), "version": __version__}
    note |= {"date": datetime.datetime.now(datetime.UTC).date().isoformat(), "evidence": _evidence_hash(weights.parent)}
    keep_json(_place(weights), note)


def remembered(patch: Path) -> Remembered | None:
    """The last verification of a patch on this machine; None where there was none."""
    weights = weights_file(patch)
    note = kept_json(_place(weights), remade=True)
    if note is None:
        return None
    same = note["evidence"] == _evidence_hash(weights.parent)
    return Remembered(note["holds"], note["figures"], note["date"], same)
