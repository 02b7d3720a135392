"""``recare-patch inspect``: what a LoRA file holds."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from recare_patch.core import PatchError, SafetensorsHeader, read_safetensors_header
from recare_patch.recipe import METADATA_KEY, PARTS_KEY, WEIGHTS_NAME, Recipe, parts_in_header

_CONCEPT = "recare_patch.concept"
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
        if facts["format"] == "kohya":
            from recare_patch.patch import from_any

            from_any(file)
        else:
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
        dtypes, whether it has alphas, what other tools are told of it (architecture, title), and what
        a patch of ours records about itself.
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
        "made_for": header.metadata.get("modelspec.architecture")
        or header.metadata.get("ss_base_model_version"),
        "title": header.metadata.get("modelspec.title") or header.metadata.get("ss_output_name"),
        "made_by": "recare-patch" if {METADATA_KEY, PARTS_KEY} & set(header.metadata) else None,
    }
    if PARTS_KEY in header.metadata:
        facts |= _stack(header.metadata, str(file))
    elif facts["made_by"]:
        recipe = Recipe.from_yaml(header.metadata[METADATA_KEY], source=f"the recipe in {file}")
        facts |= {
            "erases": header.metadata.get(_CONCEPT, recipe.title),
            "kind": " and ".join(dict.fromkeys(one.kind for one in recipe.concepts)),
            "base": recipe.base,
            "method": recipe.method,
            "layers": recipe.adapter.layers,
            "seed": recipe.seed,
        }
    facts["metadata"] = sorted(header.metadata)
    return facts


def _stack(header: Mapping[str, str], source: str) -> dict[str, Any]:
    """What a stack says of itself: what it erases, how it was made, and of what."""
    ours = PARTS_KEY.removesuffix("parts")
    try:
        how = json.loads(header.get(f"{ours}stacking", "{}"))
    except (ValueError, RecursionError):
        how = None
    if not isinstance(how, dict):
        raise PatchError(f"{source} has a malformed header entry '{ours}stacking'")
    return {
        "erases": header.get(f"{ours}concept"),
        "kind": header.get(f"{ours}kind"),
        "base": header.get(f"{ours}base"),
        "method": f"stack ({how.get('method', 'unknown')})",
        "layers": header.get(f"{ours}layers"),
        "relative_error": how.get("relative_error"),
        "stack_of": [
            {key: part.get(key) for key in ("name", "concept", "scale", "sha256")}
            for part in parts_in_header(header, source)
        ],
    }


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
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return ", ".join(f"{one['name']} at {one['scale']:g} ({one['sha256'][:12]}…)" for one in value)
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
