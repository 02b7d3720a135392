"""``recare-patch inspect``, ``convert`` and ``generate``: what a LoRA file holds, and what it changes."""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from click import Choice, FloatRange, IntRange, UsageError, argument, command, echo

from recare_patch import cli
from recare_patch.cli import flag, option
from recare_patch.core import OutputError, PatchError, SafetensorsHeader, load_json, read_safetensors_header
from recare_patch.recipe import METADATA_KEY, PARTS_KEY, WEIGHTS_NAME, Recipe, parts_in_header

_OURS = PARTS_KEY.removesuffix("parts")
_DOWN = re.compile(r"\.(lora_A|lora_down|lora\.down)\.(?:\w+\.)?weight$")


@command()
@argument("path", type=cli.FOLDER)
@cli.json_option
@option("--check/--no-check", "Read the tensors of a patch and check them.", None, True)
def inspect(path: Path, as_json: bool, check: bool) -> None:
    """Show what a patch, or any LoRA file, holds."""
    file = _weights_file(path)
    facts = described(file, read_safetensors_header(file))
    if check and facts["made_by"] == "recare-patch":
        from recare_patch.patch import Patch, from_any

        if facts["format"] == "kohya":
            from_any(file)
        else:
            Patch.load(path)
        facts["checked"] = True
    if as_json:
        echo(json.dumps(facts, indent=2, ensure_ascii=False))
        return
    names = facts.pop("names", [])
    for name, value in facts.items():
        if value not in (None, [], {}):
            echo(f"{name.replace('_', ' ') + ':':<16}{_in_words(value)}")
    if names:
        cli.echo_table([("name", "read as", "scale", "left", "moves most"), *map(_of_name, names)], left=2)


def _of_name(told: Mapping[str, Any]) -> tuple[str, ...]:
    """A line on one name: what is left of it by the text's values, and what its row moves most."""
    left = "–" if told["left"] is None else f"{1 - told['scale'] * (1 - told['left']):.0%}"
    lost = "–" if told["lost"] is None else f"{told['worst']} {abs(told['scale']) * told['lost']:.1%}"
    name = told["name"] if told["name"] == told["concept"] else f"{told['name']} ({told['concept']})"
    return name, told["instead"], f"{told['scale']:g}", left, lost


def _weights_file(path: Path) -> Path:
    if not path.exists():
        raise PatchError(f"there is no patch at {path}")
    if not path.is_dir() or (path / WEIGHTS_NAME).is_file():
        return path / WEIGHTS_NAME if path.is_dir() else path
    found = sorted(path.glob("*.safetensors"))
    if len(found) != 1:
        raise PatchError(f"{path} is no patch: {WEIGHTS_NAME} is not in it")
    return found[0]


def described(file: Path, header: SafetensorsHeader) -> dict[str, Any]:
    """The facts of a LoRA file that its header tells, and what a patch of ours records about itself."""
    from recare_patch.patch import transformers_of

    told, keys = header.metadata, list(header.tensors)
    models = transformers_of(keys)
    down = {key: one for key, one in header.tensors.items() if _DOWN.search(key)}
    ranks = Counter(one.shape[0] for one in down.values() if one.shape)
    facts: dict[str, Any] = {
        "file": str(file),
        "bytes": file.stat().st_size,
        "format": _format(keys),
        "parts": dict(Counter(_part(key, "transformer" if models else "unet") for key in down)),
        "modules": len(down),
        "ranks": {str(rank): n for rank, n in sorted(ranks.items())},
        "dtypes": dict(sorted(Counter(one.dtype for one in header.tensors.values()).items())),
        "alphas": sum(key.endswith(".alpha") for key in keys),
        "made_for": told.get("modelspec.architecture")
        or told.get("ss_base_model_version")
        or " or ".join(models)
        or None,
        "title": told.get("modelspec.title") or told.get("ss_output_name"),
        "made_by": "recare-patch" if {METADATA_KEY, PARTS_KEY} & set(told) else None,
    }
    if PARTS_KEY in told:
        facts |= _stack(told, str(file))
    elif facts["made_by"]:
        recipe = Recipe.from_yaml(told[METADATA_KEY], source=f"the recipe in {file}")
        facts |= {
            "erases": told.get(f"{_OURS}concept", recipe.title),
            "kind": " and ".join(dict.fromkeys(one.kind for one in recipe.concepts)),
            "base": recipe.base,
            "method": recipe.method,
            "layers": recipe.adapter.layers,
            "seed": recipe.seed,
        }
    if names := _names(told, str(file)):
        facts["names"] = names
    return facts | {"metadata": sorted(told)}


def _names(header: Mapping[str, str], source: str) -> list[dict[str, Any]]:
    """The names that have a row each, and what is known of them."""
    from recare_patch.patch import PatchMetadata

    about = PatchMetadata.from_header(header, source) if f"{_OURS}names" in header else None
    return [one.model_dump() for one in (about.names or ())] if about is not None else []


def _stack(header: Mapping[str, str], source: str) -> dict[str, Any]:
    """What a stack says of itself: what it erases, how it was made, and of what."""
    try:
        how = load_json(header.get(f"{_OURS}stacking", "{}"))
    except ValueError:
        how = None
    if not isinstance(how, dict) or not isinstance(how.get("relative_error"), int | float | None):
        raise PatchError(f"{source} has a malformed header entry '{_OURS}stacking'")
    return {
        "erases": header.get(f"{_OURS}concept"),
        "kind": header.get(f"{_OURS}kind"),
        "base": header.get(f"{_OURS}base"),
        "method": f"stack ({how.get('method', 'unknown')})",
        "layers": header.get(f"{_OURS}layers"),
        "relative_error": how.get("relative_error"),
        "stack_of": [
            {key: part.get(key) for key in ("name", "concept", "scale", "sha256")}
            for part in parts_in_header(header, source)
        ],
    }


def _format(keys: Sequence[str]) -> str:
    if any(key.startswith("lora_") and ".lora_down." in key for key in keys):
        return "kohya"
    for prefix, shape in (("base_model.model.", "peft"), ("diffusion_model.", "comfyui")):
        if any(key.startswith(prefix) for key in keys):
            return shape
    return "diffusers" if any(_DOWN.search(key) for key in keys) else "not a LoRA"


def _part(key: str, denoiser: str) -> str:
    """The model that a tensor belongs to, by its key's first part."""
    known = {
        "lora_unet": denoiser,
        "lora_transformer": denoiser,
        "diffusion_model": denoiser,
        "lora_te": "text_encoder",
    }
    known["base_model"] = "model"
    return next((part for prefix, part in known.items() if key.startswith(prefix)), key.split(".")[0])


def _in_words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} ({number}×)" for key, number in value.items())
    if isinstance(value, list):
        return ", ".join(
            f"{one['name']} at {one['scale']:g} ({one['sha256'][:12]}…)" if isinstance(one, dict) else str(one)
            for one in value
        )
    if isinstance(value, float):
        return f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


@command()
@argument("source", type=cli.FOLDER)
@option(
    "--to",
    "kohya: for A1111, Forge and ComfyUI; diffusers: a patch again.",
    Choice(["kohya", "diffusers"]),
    into="shape",
    required=True,
)
@option("--out FILE|FOLDER", "A .safetensors file, or the folder for it.", cli.FOLDER, required=True)
@option(
    "--base FOLDER|HUB-ID",
    "Resolve names against this model's modules, and check that it fits.  [default: by the names of known models]",
)
@option("--precision", "Of the file.", Choice(["fp16", "bf16", "fp32"]), "fp16")
@flag("--force", "Replace a file that is there.")
def convert(source: Path, shape: str, out: Path, base: str | None, precision: str, force: bool) -> None:
    """Convert a patch, or any LoRA file, to another tool's shape.

    Diffusers' files of any age, PEFT's, kohya's and ComfyUI's own are read, of Stable Diffusion 1 to 3, FLUX, Z-Image,
    Lumina 2, Qwen-Image and Krea 2; alphas are multiplied in.
    """
    import torch

    from recare_patch.patch import from_any, output_name, target_file, write_kohya

    cli.quiet_libraries()
    denoiser_class: str | None = None
    if base is None:
        weights = from_any(source)
    else:
        from recare_patch.models import base_layers, load_base

        model = load_base(base, device="cpu")
        denoiser_class = type(model.denoiser).__name__
        weights = from_any(source, [name for name, _ in base_layers(model.denoiser)])
        with cli.shown_progress():
            weights.check_base(model)
    file = target_file(out, f"{output_name(weights)}.safetensors" if shape == "kohya" else WEIGHTS_NAME)
    if file.exists() and not force:
        raise OutputError(f"{file} is there already; choose another --out or add --force")
    dtypes = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
    if shape == "kohya":
        write_kohya(weights, file, dtype=dtypes[precision], denoiser_class=denoiser_class)
    else:
        weights.write(file, dtypes[precision])
    parts = ", ".join(name.replace("_", " ") for name in weights.components)
    echo(f"{file}: {shape} from {weights.format}, {len(weights.modules)} modules ({parts})")


@command()
@option("--patch DIR[:SCALE]", "A patch and its scale; repeatable.", into="patches", multiple=True)
@option("--prompt TEXT", "Repeatable.", into="prompts", multiple=True, required=True)
@cli.base_option
@option("--seed", "Of the first picture.", cli.SEED, 0)
@option("--count", "Pictures of each prompt.", IntRange(1, 64), 4)
@option("--steps", "[default: 20, or those of a base of few steps]", IntRange(1, 1000))
@option("--guidance-scale", "[default: 5, or that of a base of few steps]", FloatRange(0, 100))
@option("--out", "The sheet.", cli.FOLDER, Path("generated.png"))
@option("--save-images FOLDER", "Save each picture as well.", cli.FOLDER)
@flag("--blur", "Blur the sheet.")
@flag("--gated", "Let each patch's scale follow how much the prompt has to do with its concept.")
@cli.device_option
@cli.drawing_options
def generate(
    patches: tuple[str, ...],
    prompts: tuple[str, ...],
    base: str | None,
    seed: int,
    count: int,
    out: Path,
    save_images: Path | None,
    blur: bool,
    gated: bool,
    **options: Any,
) -> None:
    """Draw prompts with the base model and with patches, at the same seeds.

    \b
    recare-patch generate --patch van-gogh-patch --prompt "a painting by Van Gogh"
    recare-patch generate --patch a-patch --patch b-patch:0.7 --prompt "a street"

    With --gated, prompts that have nothing to do with a patch's concept are drawn without it. That is
    for the sake of those pictures, not for security: a gate reads the prompt and nothing else.
    """
    if gated and not patches:
        raise UsageError("--gated says how patches are applied, and no --patch is given")
    if seed + count - 1 > cli.MOST_SEED:
        raise UsageError(
            f"the last of {count} pictures has seed {seed + count - 1}, and {cli.MOST_SEED} is the highest"
        )
    chosen = [cli.parse_patch(text) for text in patches]
    source = base or cli.base_of(chosen)
    from recare_patch.core import check_sheet, check_writable
    from recare_patch.patch import generate_pictures

    check_sheet(out)
    if save_images is not None:
        check_writable(save_images, folder=True)

    seeds = list(range(seed, seed + count))
    options |= {"gated": gated, "memory": cli.given_memory()}
    with cli.shown_progress() as progress:
        pairs = generate_pictures(source, chosen, list(prompts), seeds, progress=progress, **options)
    title = f"{source}: " + (", ".join(f"{path.name} at {scale:g}" for path, scale in chosen) or "no patch")
    title += ", gated" if gated else ""
    save_pairs(pairs, out, title=title, blur=blur, patched=bool(chosen))
    echo(f"Sheet: {out}")
    if save_images is not None:
        echo(f"Pictures: {_save_each(pairs, save_images, patched=bool(chosen))} in {save_images}")


def save_pairs(pairs: Sequence[Any], out: Path, *, title: str, blur: bool = False, patched: bool = True) -> None:
    """Lay ``GeneratedPair`` objects out as a sheet: one row a prompt and state, one column a seed."""
    from recare_patch.core import SheetRow, save_sheet, sheet

    rows: list[SheetRow] = []
    for prompt in dict.fromkeys(pair.prompt for pair in pairs):
        for word in ("before", "after") if patched else ("before",):
            drawn = [getattr(pair, word) for pair in pairs if pair.prompt == prompt]
            rows.append(SheetRow(f"{prompt} · {word}" if patched else prompt, drawn))
    columns = [f"seed {seed}" for seed in dict.fromkeys(pair.seed for pair in pairs)]
    save_sheet(sheet(rows, columns, title, blur=blur), out)


def _save_each(pairs: Sequence[Any], folder: Path, *, patched: bool) -> int:
    from recare_patch.core import write_bytes

    words = ("before", "after") if patched else ("before",)
    prompts = list(dict.fromkeys(pair.prompt for pair in pairs))
    for pair in pairs:
        for word in words:
            buffer = io.BytesIO()
            getattr(pair, word).save(buffer, format="PNG")
            name = f"{prompts.index(pair.prompt):02d}-seed{pair.seed}-{word}.png"
            write_bytes(folder / name, buffer.getvalue())
    return len(pairs) * len(words)
