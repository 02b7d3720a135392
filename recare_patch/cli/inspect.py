"""``recare-patch inspect``: what a LoRA file holds."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import click

from recare_patch.errors import PatchError
from recare_patch.files import SafetensorsHeader, read_safetensors_header
from recare_patch.recipe import METADATA_KEY, WEIGHTS_NAME, Recipe

_DOWN = re.compile(r"\.(lora_A|lora_down|lora\.down)\.(?:\w+\.)?weight$")


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option(
    "--check/--no-check", default=True, help="Read the tensors of a patch and check them.  [default: check]"
)
def inspect(path: Path, as_json: bool, check: bool) -> None:
    """Show what a patch, or any LoRA file, holds."""
    file = _weights_file(path)
    header = read_safetensors_header(file)
    facts = describe(file, header)
    if check and facts["made_by"] == "recare-patch":
        from recare_patch.patch import Patch

        Patch.load(path)
        facts["checked"] = True
    if as_json:
        click.echo(json.dumps(facts, indent=2, ensure_ascii=False))
        return
    for name, value in facts.items():
        if value not in (None, [], {}):
            click.echo(f"{name.replace('_', ' ') + ':':<16}{_in_words(value)}")


def describe(file: Path, header: SafetensorsHeader) -> dict[str, Any]:
    """The facts of a LoRA file that its header tells.

    Returns:
        File, bytes, format ("diffusers", "kohya", "peft", "not a LoRA"), parts, modules, ranks,
        dtypes, whether it has alphas, and what a patch of ours records about itself.
    """
    keys = list(header.tensors)
    down = {key: one for key, one in header.tensors.items() if _DOWN.search(key)}
    facts: dict[str, Any] = {
        "file": str(file),
        "bytes": file.stat().st_size,
        "format": _format(keys),
        "parts": dict(Counter(_part(key) for key in down)),
        "modules": len(down),
        "ranks": {
            str(rank): n
            for rank, n in sorted(Counter(one.shape[0] for one in down.values() if one.shape).items())
        },
        "dtypes": dict(sorted(Counter(one.dtype for one in header.tensors.values()).items())),
        "alphas": sum(key.endswith(".alpha") for key in keys),
        "made_by": "recare-patch" if METADATA_KEY in header.metadata else None,
    }
    if facts["made_by"]:
        recipe = Recipe.from_yaml(header.metadata[METADATA_KEY], source=f"the recipe in {file}")
        facts |= {
            "erases": recipe.concept.text,
            "kind": recipe.concept.kind,
            "base": recipe.base,
            "method": recipe.method,
            "layers": recipe.adapter.layers,
            "seed": recipe.seed,
        }
    facts["metadata"] = sorted(header.metadata)
    return facts


def _weights_file(path: Path) -> Path:
    if path.is_dir():
        if (path / WEIGHTS_NAME).is_file():
            return path / WEIGHTS_NAME
        found = sorted(path.glob("*.safetensors"))
        if len(found) == 1:
            return found[0]
        raise PatchError(f"{path} is no patch: {WEIGHTS_NAME} is not in it")
    if not path.exists():
        raise PatchError(f"there is no patch at {path}")
    return path


def _format(keys: list[str]) -> str:
    if any(key.startswith("lora_") and ".lora_down." in key for key in keys):
        return "kohya"
    if any(key.startswith("base_model.model.") for key in keys):
        return "peft"
    if any(_DOWN.search(key) for key in keys):
        return "diffusers"
    return "not a LoRA"


def _part(key: str) -> str:
    """The model that a tensor belongs to, by its key's first part."""
    for prefix, part in (("lora_unet", "unet"), ("lora_te", "text_encoder"), ("base_model", "model")):
        if key.startswith(prefix):
            return part
    return key.split(".")[0]


def _in_words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} ({number}×)" for key, number in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
