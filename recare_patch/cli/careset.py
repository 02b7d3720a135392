"""``recare-patch careset``: build, look at, and edit the benign companions of a concept."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from recare_patch.cli import common
from recare_patch.core import CareSetError, RecipeError
from recare_patch.recipe import KINDS, Concept, Recipe

if TYPE_CHECKING:
    from recare_patch.careset import CareSet


@click.group()
def careset() -> None:
    """Build, show, plot and edit CARE-sets: what co-occurs with a concept and must stay."""


@careset.command()
@click.option("--concept", metavar="TEXT", help="The concept whose companions to find.")
@click.option("--kind", metavar="KIND", help=f"{' | '.join(KINDS)}.  [default: a recipe's, else guessed]")
@common.base_option
@common.clip_option
@click.option("--seed", type=int, help="[default: 0]")
@click.option("--recipe", metavar="NAME|FILE|PATCH", help="Start from a recipe.")
@click.option("--out", type=click.Path(path_type=Path), help="The file.  [default: CONCEPT-care-set.json]")
@common.device_option
@common.set_option
def build(
    concept: str | None,
    kind: str | None,
    base: str | None,
    clip: str | None,
    seed: int | None,
    recipe: str | None,
    out: Path | None,
    device: str,
    assignments: tuple[str, ...],
) -> None:
    """Draw pictures of a concept and mine its CARE-set from them."""
    if concept is None and recipe is None:
        raise RecipeError('no concept given: add --concept "Van Gogh", or --recipe NAME')
    overrides = common.overrides_from(assignments, seed=seed)
    if concept is not None:
        # Faults of spelling are told before any model is loaded.
        Recipe(concept=Concept(text=concept, kind=kind or "object")).with_overrides(overrides)
    from recare_patch.careset import Clip, build_care_set, default_clip
    from recare_patch.erasure import resolve_recipe, target_seeds
    from recare_patch.models import load_base
    from recare_patch.recipe import scheduled

    with common.shown_progress() as progress:
        plan = resolve_recipe(
            concept or "", kind=kind, recipe=recipe, base=base, clip=clip, overrides=overrides, device=device
        )
        path = out if out is not None else Path(f"{plan.concept.slug}-care-set.json")
        model = load_base(plan.base, precision=plan.precision, device=device)
        options = plan.target_images
        with scheduled(model.pipeline, options.scheduler):
            images = model.generate(
                [plan.concept.target_prompt] * options.count,
                target_seeds(plan),
                steps=options.steps,
                guidance_scale=options.guidance_scale,
                batch_size=options.batch_size,
                progress=progress,
            )
        reader = Clip.load(plan.clip or default_clip(plan.base))
        found = build_care_set(plan.concept, images, reader, plan.care_set, seed=plan.seed, progress=progress)
    found.save(path)
    click.echo(f"{len(found.words)} CARE-concepts of {plan.concept}: {', '.join(found.words)}")
    click.echo(f"CARE-set: {path}")


@careset.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--all", "everything", is_flag=True, help="Show dropped tokens too, with the reason.")
def show(path: Path, everything: bool) -> None:
    """Show a CARE-set: a file, or the one in a patch folder."""
    care_set = _load(path)
    kept = sum(token.kept for token in care_set.tokens)
    click.echo(
        f"{care_set.concept} ({care_set.concept.kind}): {kept} kept of {len(care_set.tokens)} tokens "
        f"mined from {care_set.images} pictures"
    )
    width = max((len(token.text) for token in care_set.tokens), default=5)
    click.echo(f"{'token':<{width}}  {'count':>5}  {'cluster':>7}  {'residual':>8}  {'kept':<4}  reason")
    for token in care_set.tokens:
        if token.kept or everything:
            cluster = "-" if token.cluster is None else str(token.cluster)
            line = f"{token.text:<{width}}  {token.count:>5}  {cluster:>7}  {token.residual:>8.3f}  "
            click.echo((line + f"{'yes' if token.kept else 'no':<4}  {token.reason}").rstrip())
    if not everything and kept < len(care_set.tokens):
        click.echo(
            f"{len(care_set.tokens) - kept} dropped tokens are not shown; add --all for them and the reasons."
        )


@careset.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="The picture.  [default: beside the file, .png]")
@common.clip_option
def plot(path: Path, out: Path | None, clip: str | None) -> None:
    """Draw the map of a CARE-set: its clusters, and what was kept and dropped."""
    care_set = _load(path)
    target = out if out is not None else _file(path).with_suffix(".png")
    from recare_patch.careset import Clip, plot_care_set

    common.quiet_libraries()
    plot_care_set(care_set, target, Clip.load(clip or _clip_of(care_set)))
    click.echo(f"Map: {target}")


@careset.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--add", "added", multiple=True, metavar="WORD", help="Keep this word too; repeatable.")
@click.option("--remove", "removed", multiple=True, metavar="WORD", help="Drop this word; repeatable.")
@click.option("--out", type=click.Path(path_type=Path), help="The file.  [default: the one that is edited]")
def edit(path: Path, added: tuple[str, ...], removed: tuple[str, ...], out: Path | None) -> None:
    """Add words to a CARE-set or remove some; use it with `erase --care-set`."""
    if not added and not removed:
        raise CareSetError("nothing to edit: give --add WORD or --remove WORD")
    care_set = _load(path)
    if removed:
        care_set = care_set.with_removed(removed)
    if added:
        care_set = care_set.with_added(added)
    target = out if out is not None else _file(path)
    care_set.save(target)
    click.echo(f"{len(care_set.words)} CARE-concepts of {care_set.concept}: {', '.join(care_set.words)}")
    click.echo(f"CARE-set: {target}")


def _file(path: Path) -> Path:
    return path / "care_set.json" if path.is_dir() else path


def _load(path: Path) -> CareSet:
    from recare_patch.careset import CareSet

    file = _file(path)
    if not file.is_file():
        raise CareSetError(f"there is no CARE-set at {file}")
    return CareSet.load(file)


def _clip_of(care_set: Any) -> str:
    return str(getattr(care_set, "clip", None) or "atelier")
