"""``recare-patch merge`` and ``unmerge``: patches into a base's weights, and out again."""

from __future__ import annotations

from pathlib import Path

import click

from recare_patch.cli import common

_FOLDER = click.Path(path_type=Path)


@click.command()
@click.option(
    "--patch",
    "patches",
    multiple=True,
    required=True,
    metavar="DIR[:SCALE]",
    help="A patch and its scale; repeatable.",
)
@common.base_option
@click.option("--out", required=True, type=_FOLDER, metavar="DIR", help="The merged pipeline folder.")
@click.option(
    "--single-file",
    type=_FOLDER,
    metavar="FILE",
    help="Write it as one .safetensors checkpoint as well, in the names that A1111 and ComfyUI read.",
)
@click.option("--verify", is_flag=True, help="Draw with the patch and with the merged folder, and compare.")
@click.option("--any-base", is_flag=True, help="Merge also into other weights than the patch was made for.")
@common.device_option
def merge(
    patches: tuple[str, ...],
    base: str | None,
    out: Path,
    single_file: Path | None,
    verify: bool,
    any_base: bool,
    device: str,
) -> None:
    """Write a base with patches in its weights, as a complete diffusers pipeline folder.

    \b
    recare-patch merge --patch van-gogh-patch --out atelier-without-van-gogh
    recare-patch merge --patch a-patch --patch b-patch:0.7 --base FOLDER --out merged --verify
    recare-patch merge --patch a-patch --base FOLDER --out merged --single-file merged.safetensors

    Whoever loads the folder cannot leave the patch out. It records what was merged.
    """
    chosen = [common.parse_patch(common.short_patch(text)) for text in patches]
    source = base or common.base_of(chosen)
    from recare_patch.combine import merging
    from recare_patch.patch import Patch

    with common.shown_progress() as progress:
        loaded = [(Patch.load(path), scale) for path, scale in chosen]
        record = merging.merge(
            loaded,
            source,
            out,
            single_file=single_file,
            device=device,
            any_base=any_base,
            progress=progress,
        )
        apart = merging.compare(loaded, source, out, device=device) if verify else None
    told = ", ".join(f"{part.name} at {part.scale:g}" for part in record.patches)
    click.echo(f"Merged: {out}  ({told} into {record.base})")
    if single_file is not None:
        click.echo(f"Single file: {single_file}  ({single_file.stat().st_size:,} bytes)")
    if apart is not None:
        click.echo(f"Pictures with the patch and with the merged folder differ by at most {apart} of 255.")


@click.command()
@click.argument("folder", type=_FOLDER)
@click.option(
    "--patch", "patches", multiple=True, required=True, metavar="DIR", help="What was merged; repeatable."
)
@click.option(
    "--base",
    metavar="FOLDER|HUB-ID",
    help="The base as it was, to tell how close the result is.  [default: not compared]",
)
@click.option("--out", required=True, type=_FOLDER, metavar="DIR", help="The base's folder.")
@common.device_option
def unmerge(folder: Path, patches: tuple[str, ...], base: str | None, out: Path, device: str) -> None:
    """Take patches out of a merged folder: the base again, within rounding.

    \b
    recare-patch unmerge merged --patch van-gogh-patch --base atelier --out again
    """
    chosen = [common.parse_patch(common.short_patch(text))[0] for text in patches]
    from recare_patch.combine import merging
    from recare_patch.patch import Patch

    with common.shown_progress() as progress:
        loaded = [Patch.load(path) for path in chosen]
        made = merging.unmerge(folder, loaded, out, base=base, device=device, progress=progress)
    click.echo(f"Base: {made.folder}")
    if made.max_difference is not None:
        click.echo(f"No weight differs from the base's by more than {made.max_difference:.2g}, as measured.")
    elif made.same_hash:
        click.echo("Its denoiser is the base's: all weights are the same when rounded to fp16.")
    elif made.expected_difference is not None:
        click.echo(
            f"No weight differs from the base's by more than {made.expected_difference:.2g}, as the merge "
            "found; name the base with --base to measure it."
        )
    else:
        click.echo("It is the base within rounding; name the base with --base to measure how close.")
