"""``recare-patch stack``, ``merge`` and ``unmerge``: several patches into one, or into a base's weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from click import Choice, FloatRange, IntRange, argument, command, echo

from recare_patch import cli
from recare_patch.cli import flag, option
from recare_patch.core import PatchError

if TYPE_CHECKING:
    from recare_patch.combine import Moments
    from recare_patch.models import BaseModel
    from recare_patch.patch import Patch


@command()
@argument("patches", nargs=-1, required=True, type=cli.PLACE, metavar="PATCH[:SCALE]...")
@option("--out DIR", "Folder of the stack.", cli.FOLDER, required=True)
@option(
    "--method concat|regmean|ties|dare|svd",
    "concat is the exact sum; regmean keeps more of what must stay, and draws with the base to learn what "
    "that is; the others are of smaller rank, at an error that is told.",
    None,
    "concat",
)
@option("--rank", "Of the stack.  [default: what the method needs]", IntRange(1, 4096))
@option(
    "--density",
    "Share of the values that ties and dare keep.  [default: 0.2 for ties, 0.5 for dare]",
    FloatRange(0, 1, min_open=True),
)
@option(
    "--kept-weight",
    "How much regmean holds what must stay against each concept.  [default: 1]",
    FloatRange(min=0, min_open=True),
)
@option("--seed", "Of dare's and regmean's draws.", cli.SEED, 0)
@option("--precision", "Of the file.", Choice(["fp16", "fp32"]), "fp16")
@cli.formats_option
@flag("--evidence", "Measure each concept under its patch alone and under the stack; takes pictures, so minutes.")
@option("--pictures", "Of each figure of --evidence.", IntRange(1, 1000000), 200)
@cli.base_option
@cli.clip_option
@cli.device_option
@cli.memory_options
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
    **places: Any,
) -> None:
    """Make one patch of several, each at its own scale.

    \b
    recare-patch stack van-gogh-patch nudity-patch --out both
    recare-patch stack van-gogh nudity:0.8 --out both --method regmean
    recare-patch stack van-gogh nudity --out both --method svd --rank 4
    recare-patch stack van-gogh nudity --out both --evidence --pictures 50

    A patch is a folder or a file; "van-gogh" finds the folder "van-gogh-patch" too.
    """
    chosen = [cli.parse_patch(cli.short_patch(text)) for text in patches]
    places["memory"] = cli.given_memory()
    import torch

    from recare_patch import combine
    from recare_patch.patch import Patch, check_formats

    written = check_formats(file_formats.split(","))
    cli.quiet_libraries()
    loaded = [(Patch.load(path), scale) for path, scale in chosen]
    dtype = torch.float16 if precision == "fp16" else torch.float32
    plan = combine.plan_stack(loaded, method=method, rank=rank, density=density)
    if kept_weight is not None and method != "regmean":
        raise PatchError(f"--kept-weight is for --method regmean, and '{method}' takes none")
    moments = None
    with combine.new_folder(out) as folder:
        if method == "regmean":
            known = plan.known.base if plan.known else "atelier"
            places["base"], moments = _measured(loaded, places, known, kept_weight, seed)
        made = plan.stack(seed=seed, dtype=dtype, moments=moments)
        in_short, warnings = combine.told_of(plan.interference())
        for warning in warnings:
            echo(f"Warning: {warning}", err=True)
        size = combine.write_stack(made, folder, written).stat().st_size
    assert made.metadata is not None and made.metadata.stacking is not None
    about = made.metadata
    echo(f"Stack: {out}  ({len(about.parts or ())} patches, rank {about.rank}, {size:,} bytes)")
    echo(f"Differs from the sum of its parts by {made.metadata.stacking.relative_error:.2g} of its norm.")
    if in_short:
        echo(in_short)
    if evidence:
        _tell_change([patch for patch, _ in loaded], out, pictures, places)


def _measured(
    loaded: Sequence[tuple[Patch, float]], places: Mapping[str, Any], known: str, kept_weight: float | None, seed: int
) -> tuple[BaseModel, Moments]:
    """The base, and what the parts' layers read in it, for ``regmean``."""
    from recare_patch.careset import Clip, default_clip
    from recare_patch.combine import KEPT_WEIGHT, measure_moments
    from recare_patch.models import Load, load_to_draw

    weight = KEPT_WEIGHT if kept_weight is None else kept_weight
    with cli.shown_progress() as progress:
        how = {key: places[key] for key in ("device", "memory", "vram")}
        model = load_to_draw(places["base"] or known, precision="fp32", load=Load(pictures=8), **how)
        tower = Clip.load(places["clip"] or default_clip(model.id), device=model.device)
        patches = [patch for patch, _ in loaded]
        found = measure_moments(patches, model, tower, kept_weight=weight, seed=seed, progress=progress)
    echo(f"Looked at what the layers read: {found.evaluations:,} denoiser evaluations.")
    return model, found


def _tell_change(patches: Sequence[Patch], out: Path, pictures: int, places: Mapping[str, Any]) -> None:
    from recare_patch.measure import CHANGE_NAME, change_in_evidence

    with cli.shown_progress() as progress:
        changes = change_in_evidence(patches, out, pictures=pictures, progress=progress, **places)
    rows = [("figure", "base", "alone", "stacked")]
    for concept in dict.fromkeys(one.concept for one in changes):
        rows.append((f"{concept}:", "", "", ""))
        rows += [(f"  {one.name}", *one.show()) for one in changes if one.concept == concept]
    cli.echo_table(rows)
    echo(f"Side by side: {out / CHANGE_NAME}")


@command()
@option("--patch DIR[:SCALE]", "A patch and its scale; repeatable.", into="patches", multiple=True, required=True)
@cli.base_option
@option("--out DIR", "The merged pipeline folder.", cli.FOLDER, required=True)
@option(
    "--single-file FILE",
    "Write it as one .safetensors checkpoint as well, in the names that A1111 and ComfyUI read.",
    cli.FOLDER,
)
@flag("--verify", "Draw with the patch and with the merged folder, and compare.")
@flag("--any-base", "Merge also into other weights than the patch was made for.")
@cli.device_option
@cli.memory_options
def merge(
    patches: tuple[str, ...],
    base: str | None,
    out: Path,
    single_file: Path | None,
    verify: bool,
    device: str,
    any_base: bool,
    vram: float | None,
) -> None:
    """Write a base with patches in its weights, as a complete diffusers pipeline folder.

    \b
    recare-patch merge --patch van-gogh-patch --out atelier-without-van-gogh
    recare-patch merge --patch a-patch --patch b-patch:0.7 --base cli.FOLDER --out merged --verify
    recare-patch merge --patch a-patch --base cli.FOLDER --out merged --single-file merged.safetensors

    Whoever loads the folder cannot leave the patch out. It records what was merged.
    """
    chosen = [cli.parse_patch(cli.short_patch(text)) for text in patches]
    source = base or cli.base_of(chosen)
    from recare_patch import combine
    from recare_patch.patch import Patch

    with cli.shown_progress() as progress:
        loaded = [(Patch.load(path), scale) for path, scale in chosen]
        options: Any = {"single_file": single_file, "any_base": any_base, "progress": progress}
        record = combine.merge(loaded, source, out, device=device, **options)
        how: Any = {"device": device, "memory": cli.given_memory(), "vram": vram}
        apart = combine.compare(loaded, source, out, **how) if verify else None
    told = ", ".join(f"{part.name} at {part.scale:g}" for part in record.patches)
    echo(f"Merged: {out}  ({told} into {record.base})")
    if single_file is not None:
        echo(f"Single file: {single_file}  ({single_file.stat().st_size:,} bytes)")
    if apart is not None:
        echo(f"Pictures with the patch and with the merged folder differ by at most {apart} of 255.")


@command()
@argument("folder", type=cli.FOLDER)
@option("--patch DIR", "What was merged; repeatable.", into="patches", multiple=True, required=True)
@option("--base FOLDER|HUB-ID", "The base as it was, to tell how close the result is.  [default: not compared]")
@option("--out DIR", "The base's folder.", cli.FOLDER, required=True)
@cli.device_option
def unmerge(folder: Path, patches: tuple[str, ...], base: str | None, out: Path, device: str) -> None:
    """Take patches out of a merged folder: the base again, within rounding.

    \b
    recare-patch unmerge merged --patch van-gogh-patch --base atelier --out again
    """
    chosen = [cli.parse_patch(cli.short_patch(text))[0] for text in patches]
    from recare_patch import combine
    from recare_patch.patch import Patch

    with cli.shown_progress() as progress:
        loaded = [Patch.load(path) for path in chosen]
        made = combine.unmerge(folder, loaded, out, base=base, device=device, progress=progress)
    echo(f"Base: {made.folder}")
    none_apart = "No weight differs from the base's by more than"
    if made.max_difference is not None:
        echo(f"{none_apart} {made.max_difference:.2g}, as measured.")
    elif made.same_hash:
        echo("Its denoiser is the base's: all weights are the same when rounded to fp16.")
    elif made.expected_difference is not None:
        echo(
            f"{none_apart} {made.expected_difference:.2g}, as the merge found; name the base with --base to measure it."
        )
    else:
        echo("It is the base within rounding; name the base with --base to measure how close.")
