"""``recare-patch stack``, ``scale``, ``merge``, ``unmerge``: several patches in one, parts of one, and in a base."""

from __future__ import annotations

import math
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


# Long: an argument for each option, and one straight way.
@command()
@argument("patches", nargs=-1, required=True, type=cli.PLACE, metavar="PATCH[:SCALE]...")
@option("--out DIR", "Folder of the stack.", cli.FOLDER, required=True)
@option(
    "--method solved|concat|regmean|ties|dare|svd",
    "solved solves closed forms anew for all their names and adds other patches; concat is the exact sum; regmean "
    "keeps more of what must stay, and draws with the base to learn what that is; the others are of smaller rank, at "
    "an error that is told.  [default: solved for two closed forms or more, else concat]",
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
    method: str | None,
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
    recare-patch stack artists people a-trained-patch --out all    # two closed forms, solved anew, and a third added

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
    alone, others = combine.closed_forms(loaded)
    method = method or (combine.SOLVED if len(alone) > 1 else "concat")
    solved = method == combine.SOLVED
    plan = combine.plan_stack(
        loaded, method="concat" if solved else method, rank=None if solved else rank, density=density
    )
    if solved and rank is not None:
        raise PatchError("--rank is that of the names here: --method svd makes smaller stacks")
    if kept_weight is not None and method != "regmean":
        raise PatchError(f"--kept-weight is for --method regmean, and '{method}' takes none")
    moments = None
    with combine.new_folder(out) as folder:
        if method == "regmean":
            known = plan.known.base if plan.known else "atelier"
            places["base"], moments = _measured(loaded, places, known, kept_weight, seed)
        if solved:
            with cli.shown_progress() as progress:
                how = {key: places[key] for key in ("base", "clip", "device", "memory")}
                made = combine.solve(loaded, **how, dtype=dtype, progress=progress)
        else:
            made = plan.stack(seed=seed, dtype=dtype, moments=moments)
        in_short, warnings = combine.told_of(plan.interference())
        for warning in warnings:
            echo(f"Warning: {warning}", err=True)
        size = combine.write_stack(made, folder, written).stat().st_size
    assert made.metadata is not None and made.metadata.stacking is not None
    about = made.metadata
    echo(f"Stack: {out}  ({len(about.parts or ())} patches, rank {about.rank}, {size:,} bytes)")
    echo(f"Differs from the sum of its parts by {made.metadata.stacking.relative_error:.2g} of its norm.")
    if solved:
        count = len(about.names or ())
        added = f"; {len(others)} other{'s are' if len(others) > 1 else ' is'} added" if others else ""
        echo(f"{len(alone)} closed forms are solved anew for all their names ({count}), not added{added}.")
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
@argument("patch", type=cli.PLACE)
@option(
    "--concept TEXT[:SCALE]",
    "A concept, or one of its names, and its new strength, 0 if none is told; repeatable.",
    into="concepts",
    multiple=True,
    required=True,
)
@option("--out DIR", "The folder of what is left.", cli.FOLDER, required=True)
@cli.formats_option
def scale(patch: str, concepts: tuple[str, ...], out: Path, file_formats: str) -> None:
    """Scale single names of a patch of many, or take them back.

    \b
    recare-patch scale artists-patch --concept "Monet:0.5" --out weaker
    recare-patch scale artists-patch --concept Monet --concept Picasso --out without-two

    For closed forms and stacks of them, in which each name has a row of its own: all other names do to the bit
    what they did. `recare-patch inspect` lists the names.
    """
    path, whole = cli.parse_patch(cli.short_patch(patch))
    if whole != 1:
        raise PatchError(f"the strength of all names is that of the patch, and '{patch}' has a scale: load it so")
    asked = dict(map(_named_scale, concepts))
    from recare_patch import combine
    from recare_patch.patch import Patch, check_formats

    chosen = check_formats(file_formats.split(","))
    cli.quiet_libraries()
    made = combine.scale_names(Patch.load(path), asked)
    with combine.new_folder(out) as folder:
        size = combine.write_stack(made, folder, chosen).stat().st_size
    names = (made.metadata.names if made.metadata else None) or ()
    echo(f"Patch: {out}  ({len(names)} name{'s' * (len(names) != 1)}, {size:,} bytes)")


def _named_scale(text: str) -> tuple[str, float]:
    """A name and its scale, "NAME:0.5"; a name alone is taken out."""
    name, colon, said = text.rpartition(":")
    if not colon:
        return text, 0.0
    try:
        scale = float(said)
    except ValueError:
        scale = math.nan
    if not name or not math.isfinite(scale):
        raise PatchError(f"--concept takes a name and a number, such as 'Monet:0.5', got '{text}'")
    return name, scale


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
    if len(combine.closed_forms(loaded)[0]) > 1:
        echo(
            "Note: several of these are closed forms, and were added; `recare-patch stack` solves them together, and "
            "one patch is merged.",
            err=True,
        )
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
