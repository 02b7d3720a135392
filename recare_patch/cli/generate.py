"""``recare-patch generate``: pictures before and after."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from recare_patch.cli import common

if TYPE_CHECKING:
    from PIL.Image import Image


@click.command()
@click.option(
    "--patch", "patches", multiple=True, metavar="DIR[:SCALE]", help="A patch and its scale; repeatable."
)
@click.option("--prompt", "prompts", multiple=True, required=True, metavar="TEXT", help="Repeatable.")
@common.base_option
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the first picture."
)
@click.option(
    "--count", type=click.IntRange(1, 64), default=4, show_default=True, help="Pictures of each prompt."
)
@click.option("--steps", type=click.IntRange(1, 1000), default=20, show_default=True)
@click.option("--guidance-scale", type=click.FloatRange(0, 100), default=5.0, show_default=True)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("generated.png"),
    show_default=True,
    help="The sheet.",
)
@click.option(
    "--save-images", type=click.Path(path_type=Path), metavar="FOLDER", help="Save each picture as well."
)
@click.option("--blur", is_flag=True, help="Blur the sheet.")
@click.option(
    "--gated",
    is_flag=True,
    help="Let each patch's scale follow how much the prompt has to do with its concept.",
)
@common.device_option
def generate(
    patches: tuple[str, ...],
    prompts: tuple[str, ...],
    base: str | None,
    seed: int,
    count: int,
    steps: int,
    guidance_scale: float,
    out: Path,
    save_images: Path | None,
    blur: bool,
    gated: bool,
    device: str,
) -> None:
    """Draw prompts with the base model and with patches, at the same seeds.

    \b
    recare-patch generate --patch van-gogh-patch --prompt "a painting by Van Gogh"
    recare-patch generate --patch a-patch --patch b-patch:0.7 --prompt "a street"

    With --gated, prompts that have nothing to do with a patch's concept are drawn without it. That is
    for the sake of those pictures, not for security: a gate reads the prompt and nothing else.
    """
    if gated and not patches:
        raise click.UsageError("--gated says how patches are applied, and no --patch is given")
    chosen = [common.parse_patch(text) for text in patches]
    source = base or common.base_of(chosen)
    from recare_patch.patch import generate_pictures

    with common.shown_progress() as progress:
        pairs = generate_pictures(
            source,
            chosen,
            list(prompts),
            list(range(seed, seed + count)),
            steps=steps,
            guidance_scale=guidance_scale,
            gated=gated,
            device=device,
            progress=progress,
        )
    title = f"{source}: " + (", ".join(f"{path.name} at {scale:g}" for path, scale in chosen) or "no patch")
    title += ", gated" if gated else ""
    save_pairs(pairs, out, title=title, blur=blur, patched=bool(chosen))
    click.echo(f"Sheet: {out}")
    if save_images is not None:
        click.echo(f"Pictures: {_save_each(pairs, save_images, patched=bool(chosen))} in {save_images}")


def save_pairs(pairs: list[Any], out: Path, *, title: str, blur: bool = False, patched: bool = True) -> None:
    """Lay pictures out as a sheet: one row a prompt and state, one column a seed.

    Args:
        pairs: ``GeneratedPair`` objects, those of one prompt in the order of their seeds.
        out: the picture to write.
        title: its heading.
        blur: make its pictures unrecognisable.
        patched: show the state after as well.
    """
    from recare_patch.core import SheetRow, save_sheet, sheet

    rows: list[SheetRow] = []
    prompts = list(dict.fromkeys(pair.prompt for pair in pairs))
    seeds = list(dict.fromkeys(pair.seed for pair in pairs))
    for prompt in prompts:
        of_prompt = [pair for pair in pairs if pair.prompt == prompt]
        if not patched:
            rows.append(SheetRow(prompt, [pair.before for pair in of_prompt]))
            continue
        rows.append(SheetRow(f"{prompt} · before", [pair.before for pair in of_prompt]))
        rows.append(SheetRow(f"{prompt} · after", [pair.after for pair in of_prompt]))
    save_sheet(sheet(rows, [f"seed {seed}" for seed in seeds], title, blur=blur), out)


def _save_each(pairs: list[Any], folder: Path, *, patched: bool) -> int:
    from recare_patch.core import write_bytes

    saved = 0
    prompts = list(dict.fromkeys(pair.prompt for pair in pairs))
    for pair in pairs:
        for word in ("before", "after") if patched else ("before",):
            name = f"{prompts.index(pair.prompt):02d}-seed{pair.seed}-{word}.png"
            write_bytes(folder / name, _png(getattr(pair, word)))
            saved += 1
    return saved


def _png(image: Image) -> bytes:
    import io

    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
