"""``recare-patch convert``: LoRA files to and from the shape of A1111 and ComfyUI."""

from __future__ import annotations

from pathlib import Path

import click

from recare_patch.cli import common
from recare_patch.core import OutputError


@click.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.option(
    "--to",
    "shape",
    type=click.Choice(["kohya", "diffusers"]),
    required=True,
    help="kohya: for A1111 and ComfyUI; diffusers: a patch again.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    metavar="FILE|FOLDER",
    help="A .safetensors file, or the folder for it.",
)
@click.option(
    "--base",
    metavar="FOLDER|HUB-ID",
    help="Resolve names against this model's modules, and check that it fits.  [default: by SD's names]",
)
@click.option(
    "--precision",
    type=click.Choice(["fp16", "bf16", "fp32"]),
    default="fp16",
    show_default=True,
    help="Of the file.",
)
@click.option("--force", is_flag=True, help="Replace a file that is there.")
def convert(source: Path, shape: str, out: Path, base: str | None, precision: str, force: bool) -> None:
    """Convert a patch, or any LoRA file, to another tool's shape.

    Diffusers' files of any age, PEFT's and kohya's are read; alphas are multiplied in.
    """
    import torch

    from recare_patch.patch import from_any, output_name, target_file, write_kohya
    from recare_patch.recipe import WEIGHTS_NAME

    common.quiet_libraries()
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    if base is None:
        weights = from_any(source)
    else:
        from recare_patch.models import base_layers, load_base

        model = load_base(base, device="cpu")
        weights = from_any(source, [name for name, _ in base_layers(model.denoiser)])
        with common.shown_progress():
            weights.check_base(model)
    stem = f"{output_name(weights)}.safetensors" if shape == "kohya" else WEIGHTS_NAME
    file = target_file(out, stem)
    if file.exists() and not force:
        raise OutputError(f"{file} is there already; choose another --out or add --force")
    write_kohya(weights, file, dtype=dtype) if shape == "kohya" else weights.write(file, dtype)
    parts = ", ".join(name.replace("_", " ") for name in weights.components)
    click.echo(f"{file}: {shape} from {weights.format}, {len(weights.modules)} modules ({parts})")
