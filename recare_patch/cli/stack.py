"""``recare-patch stack``: several patches into one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from recare_patch.cli import common
from recare_patch.core import PatchError

if TYPE_CHECKING:
    from recare_patch.combine import Moments
    from recare_patch.measure import FigureChange
    from recare_patch.patch import Patch


@click.command()
@click.argument("patches", nargs=-1, required=True, metavar="PATCH[:SCALE]...")
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), metavar="DIR", help="Folder of the stack."
)
@click.option(
    "--method",
    default="concat",
    show_default=True,
    metavar="concat|regmean|ties|dare|svd",
    help="concat is the exact sum; regmean keeps more of what must stay, and draws with the base to learn "
    "what that is; the others are of smaller rank, at an error that is told.",
)
@click.option("--rank", type=click.IntRange(1, 4096), help="Of the stack.  [default: what the method needs]")
@click.option(
    "--density",
    type=click.FloatRange(0, 1, min_open=True),
    help="Share of the values that ties and dare keep.  [default: 0.2 for ties, 0.5 for dare]",
)
@click.option(
    "--kept-weight",
    type=click.FloatRange(min=0, min_open=True),
    help="How much regmean holds what must stay against each concept.  [default: 1]",
)
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of dare's and regmean's draws."
)
@click.option(
    "--precision", type=click.Choice(["fp16", "fp32"]), default="fp16", show_default=True, help="Of the file."
)
@click.option(
    "--formats",
    "file_formats",
    metavar="NAME,…",
    default="diffusers,kohya",
    show_default=True,
    help="Weight files: diffusers is the stack, kohya is for A1111 and ComfyUI.",
)
@click.option(
    "--evidence",
    is_flag=True,
    help="Measure each concept under its patch alone and under the stack; takes pictures, so minutes.",
)
@click.option(
    "--pictures",
    type=click.IntRange(1, 1_000_000),
    default=200,
    show_default=True,
    help="Of each figure of --evidence.",
)
@common.base_option
@common.clip_option
@common.device_option
def stack(
    patches: tuple[str, ...],
    out: Path,
    method: str,
    rank: int | None,
    density: float | None,
    kept_weight: float | None,
    seed: int,
    precision: str,
    file_formats: str,
    evidence: bool,
    pictures: int,
    base: str | None,
    clip: str | None,
    device: str,
) -> None:
    """Make one patch of several, each at its own scale.

    \b
    recare-patch stack van-gogh-patch nudity-patch --out both
    recare-patch stack van-gogh nudity:0.8 --out both --method regmean
    recare-patch stack van-gogh nudity --out both --method svd --rank 4
    recare-patch stack van-gogh nudity --out both --evidence --pictures 50

    A patch is a folder or a file; "van-gogh" finds the folder "van-gogh-patch" too.
    """
    chosen = [common.parse_patch(common.short_patch(text)) for text in patches]
    import torch

    from recare_patch.combine import stacking as composing
    from recare_patch.patch import Patch, check_formats

    written = check_formats(file_formats.split(","))

    common.quiet_libraries()
    loaded = [(Patch.load(path), scale) for path, scale in chosen]
    dtype = torch.float16 if precision == "fp16" else torch.float32
    composing.check_stacking(loaded, method=method, rank=rank, density=density)
    if kept_weight is not None and method != "regmean":
        raise PatchError(f"--kept-weight is for --method regmean, and '{method}' takes none")
    moments = _measured(loaded, out, base, clip, device, seed, kept_weight) if method == "regmean" else None
    made = composing.stack(
        loaded, method=method, rank=rank, density=density, seed=seed, dtype=dtype, moments=moments
    )
    met = composing.interference(loaded)
    for warning in met.warnings:
        click.echo(f"Warning: {warning}", err=True)
    file = composing.save_stack(made, out, file_formats=written)
    assert made.metadata is not None and made.metadata.stacking is not None
    error = made.metadata.stacking.relative_error
    click.echo(
        f"Stack: {out}  ({len(made.metadata.parts or ())} patches, rank {made.metadata.rank}, "
        f"{file.stat().st_size:,} bytes)"
    )
    click.echo(f"Differs from the sum of its parts by {error:.2g} of its norm.")
    if met.in_short:
        click.echo(met.in_short)
    if evidence:
        from recare_patch.measure import stack as stack_evidence

        with common.shown_progress() as progress:
            changes = stack_evidence.change_in_evidence(
                [patch for patch, _ in loaded],
                out,
                base=base,
                pictures=pictures,
                clip=clip,
                device=device,
                progress=progress,
            )
        _report(changes, out / stack_evidence.CHANGE_NAME)


def _measured(
    loaded: Sequence[tuple[Patch, float]],
    out: Path,
    base: str | None,
    clip: str | None,
    device: str,
    seed: int,
    kept_weight: float | None,
) -> Moments:
    """What the parts' layers read, for ``regmean``; faults of the call are told before anything is drawn."""
    from recare_patch.careset import Clip, default_clip
    from recare_patch.combine import KEPT_WEIGHT, measure_moments
    from recare_patch.core import claim_folder
    from recare_patch.models import load_base
    from recare_patch.patch import check_together

    known = check_together(loaded)
    with claim_folder(out, resumable=False):
        pass
    weight = KEPT_WEIGHT if kept_weight is None else kept_weight
    with common.shown_progress() as progress:
        model = load_base(base or (known.base if known else "atelier"), device=device)
        tower = Clip.load(clip or default_clip(model.id), device=model.device)
        found = measure_moments(
            [patch for patch, _ in loaded], model, tower, kept_weight=weight, seed=seed, progress=progress
        )
    click.echo(f"Looked at what the layers read: {found.evaluations:,} denoiser evaluations.")
    return found


def _report(changes: Sequence[FigureChange], file: Path) -> None:
    rows = [("figure", "base", "alone", "stacked")]
    for concept in dict.fromkeys(one.concept for one in changes):
        rows.append((f"{concept}:", "", "", ""))
        rows += [(f"  {one.name}", *one.show()) for one in changes if one.concept == concept]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        click.echo("  ".join(cells).rstrip())
    click.echo(f"Side by side: {file}")
