"""Attacks on disk: JSON for people and programs, safetensors for what was learnt."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recare_patch.core import write_json, write_tensors
from recare_patch.measure.attacks.protocol import AttackError, AttackResult

JSON_NAME, TENSORS_NAME = "attack.json", "attack.safetensors"
FORMAT_VERSION = 1

_PARTS: dict[str, type | tuple[type, ...]] = {
    "attack": str,
    "successes": int,
    "trials": int,
    "interval": list,
    "without": int,
    "evaluations": int,
    "seconds": (int, float),
    "budget": dict,
    "details": list,
    "prompts": list,
}


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
    note |= {name: getattr(result, name) for name in _PARTS}
    note |= {"interval": list(result.interval), "base": result.base, "tensors": sorted(result.tensors)}
    write_json(folder / JSON_NAME, note)
    return folder / JSON_NAME


def load_attack(folder: str | Path) -> AttackResult:
    """Read what :func:`save_attack` wrote.

    Raises:
        AttackError: the folder holds no saved attack, or a damaged one.
    """
    note = _read(Path(folder))
    tensors: dict[str, Any] = {}
    if note["tensors"]:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            tensors = load_file(Path(folder) / TENSORS_NAME)
        except (SafetensorError, OSError) as fault:
            raise _damaged(folder, f"{TENSORS_NAME}: {str(fault).splitlines()[0]}") from None
        if sorted(tensors) != sorted(note["tensors"]):
            raise _damaged(folder, f"{TENSORS_NAME} is of another one")
    low, high = map(float, note["interval"])
    parts = {name: note[name] for name in _PARTS} | {"interval": (low, high)}
    return AttackResult(**parts, tensors=tensors, base=note.get("base"))


def load_about(folder: str | Path) -> dict[str, Any]:
    """What a saved attack was run against; see :func:`save_attack`.

    Raises:
        AttackError: the folder holds no saved attack, or a damaged one.
    """
    about: dict[str, Any] = _read(Path(folder))["about"]
    return about


def _damaged(folder: str | Path, what: str) -> AttackError:
    return AttackError(f"the saved attack in {folder} is damaged: {what}")


def _read(folder: Path) -> dict[str, Any]:
    file = folder / JSON_NAME
    if not file.is_file():
        raise AttackError(f"{folder} holds no saved attack: {JSON_NAME} is not in it")
    try:
        note = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise _damaged(folder, f"{JSON_NAME} is not readable") from None
    version = note.get("version") if isinstance(note, dict) else None
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise AttackError(
            f"the saved attack in {folder} has format {version}, newer than the {FORMAT_VERSION} that this "
            "version of recare-patch reads; update it"
        )
    sound = (
        version == FORMAT_VERSION
        and all(isinstance(note.get(name), kind) for name, kind in _PARTS.items())
        and len(note["interval"]) == 2
        and all(isinstance(value, int | float) and 0 <= value <= 1 for value in note["interval"])
        and isinstance(note.get("base"), int | float | None)
        and isinstance(note.get("about"), dict)
        and isinstance(note.get("tensors"), list)
        and len(note["details"]) == len(note["prompts"]) == note["trials"] > 0
        and all(map(_is_trial, note["details"]))
        and all(isinstance(prompt, str) for prompt in note["prompts"])
    )
    if not sound:
        raise _damaged(folder, f"{JSON_NAME} lacks parts of one")
    return dict(note)


def _is_trial(entry: object) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("prompt"), str)
        and isinstance(entry.get("attacked"), str)
        and isinstance(entry.get("seed"), int)
        and 0 <= entry["seed"] < 2**63
    )
