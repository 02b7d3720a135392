"""Attacks on disk: JSON for people and programs, safetensors for what was learnt."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from recare_patch.core import (
    EvidenceError,
    PatchError,
    file_sha256,
    load_json,
    read_bytes,
    read_tensors,
    write_json,
    write_tensors,
)
from recare_patch.measure.attacks.protocol import AttackError, AttackResult, Share
from recare_patch.measure.evidence import AttackFigure
from recare_patch.recipe import slug_of

logger = logging.getLogger(__name__)

JSON_NAME, TENSORS_NAME = "attack.json", "attack.safetensors"
FORMAT_VERSION = 1


class _Trial(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    prompt: str
    attacked: str
    seed: Annotated[int, Field(ge=0, lt=2**63)]


class _Note(BaseModel):
    """What stands in the JSON file; it may be a stranger's."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    version: Annotated[int, Field(ge=FORMAT_VERSION, le=FORMAT_VERSION)]
    about: dict[str, Any]
    attack: str
    successes: int
    trials: Annotated[int, Field(gt=0)]
    interval: tuple[Share, Share]
    without: int
    evaluations: int
    seconds: float
    budget: dict[str, Any]
    details: list[_Trial]
    prompts: list[str]
    base: float | None = None
    note: Annotated[str, Field(max_length=10_000)] = ""
    tensors: list[str]


_RESULT = [name for name in _Note.model_fields if name in AttackResult.__annotations__ and name != "tensors"]


def save_attack(result: AttackResult, folder: str | Path, about: Mapping[str, Any] | None = None) -> Path:
    """Write a result, without its pictures, and what it was run against.

    Returns:
        The JSON file. It is written last: a folder that has it holds a whole attack.

    Raises:
        OutputError: it cannot be written.
    """
    folder = Path(folder)
    if result.tensors:
        write_tensors(folder / TENSORS_NAME, result.tensors, {"attack": result.attack})
    note: dict[str, Any] = {"version": FORMAT_VERSION, "about": dict(about or {})}
    note |= {name: getattr(result, name) for name in _RESULT} | {"tensors": sorted(result.tensors)}
    write_json(folder / JSON_NAME, note)
    return folder / JSON_NAME


def load_attack(folder: str | Path) -> AttackResult:
    """Read what :func:`save_attack` wrote.

    Raises:
        AttackError: the folder holds no saved attack, or a damaged one.
    """
    note, tensors = _read(Path(folder)), {}
    if note.tensors:
        try:
            tensors = read_tensors(Path(folder) / TENSORS_NAME)
        except PatchError as fault:
            raise _damaged(folder, str(fault)) from None
        if sorted(tensors) != sorted(note.tensors):
            raise _damaged(folder, f"{TENSORS_NAME} is of another one")
    return AttackResult(**note.model_dump(include={*_RESULT}), tensors=tensors)


def load_about(folder: str | Path) -> dict[str, Any]:
    """What a saved attack was run against; see :func:`save_attack`.

    Raises:
        AttackError: the folder holds no saved attack, or a damaged one.
    """
    return _read(Path(folder)).about


def _damaged(folder: str | Path, what: str) -> AttackError:
    return AttackError(f"the saved attack in {folder} is damaged: {what}")


def _read(folder: Path) -> _Note:
    file = folder / JSON_NAME
    if not file.is_file():
        raise AttackError(f"{folder} holds no saved attack: {JSON_NAME} is not in it")
    try:
        data = read_bytes(file, JSON_NAME, AttackError, within=folder)
        load_json(data)  # For its limits; pydantic reads tuples out of JSON alone.
        note = _Note.model_validate_json(data)
    except (OSError, AttackError):
        raise _damaged(folder, f"{JSON_NAME} is not readable") from None
    except ValidationError as faults:
        first = faults.errors()[0]
        if first["type"] == "less_than_equal" and first["loc"] == ("version",):
            raise AttackError(
                f"the saved attack in {folder} has format {first['input']}, newer than the {FORMAT_VERSION} "
                "that this version of recare-patch reads; update it"
            ) from None
        told = "is not readable" if first["type"] == "json_invalid" else "lacks parts of one"
        raise _damaged(folder, f"{JSON_NAME} {told}") from None
    except ValueError as fault:
        raise _damaged(folder, f"{JSON_NAME} is not readable: {fault}") from None
    if not len(note.details) == len(note.prompts) == note.trials:
        raise _damaged(folder, f"{JSON_NAME} lacks parts of one")
    return note


def attack_figures(
    weights: Path, given: Sequence[Path | str] | None, out: Path, concept: str | None
) -> tuple[AttackFigure, ...]:
    """What saved attacks found: those named, or those beside the patch, of one of its several concepts."""
    folders: list[Path] = []
    beside = (weights.parent / "attacks", f"{weights.parent}-attacks")
    for place in map(Path, beside if given is None else given):
        if given is None and concept is not None:
            place /= slug_of(concept)
        inner = [file.parent for file in sorted(place.glob(f"*/{JSON_NAME}"))]
        # A named folder without any is told of by the reader of attacks.
        folders += [place] if given and (not inner or (place / JSON_NAME).is_file()) else inner
    sha256, figures = file_sha256(weights), []
    for folder in folders:
        about = load_about(folder)
        if about.get("patch_sha256") != sha256:
            told = f"the saved attack in {folder} was run against another patch"
            if given:
                raise EvidenceError(told)
            logger.warning("%s: it is left out", told)
            continue
        figures.append(attack_figure(folder, out))
    return tuple(figures)


def attack_figure(folder: Path, out: Path) -> AttackFigure:
    """What evidence in a folder ``out`` tells of a saved attack."""
    result, about = load_attack(folder), load_about(folder)
    found = {name: getattr(result, name) for name in AttackFigure.model_fields if hasattr(result, name)}
    found |= {"preset": str(about.get("preset", "")), "detector": about.get("detector")}
    return AttackFigure(**found, folder=Path(os.path.relpath(folder, out)).as_posix())
