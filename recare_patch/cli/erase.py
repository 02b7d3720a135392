"""``recare-patch erase``: the main job."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import click

from recare_patch.cli import common
from recare_patch.concepts import KINDS, Concept
from recare_patch.errors import RecipeError, ResumeError
from recare_patch.recipe import (
    LAYER_SETS,
    METHODS,
    OPTIMIZERS,
    PRECISIONS,
    PRESETS,
    STATES,
    EraseOptions,
    Recipe,
    load_recipe,
    preset_overrides,
)


@click.command()
@click.option("--concept", metavar="TEXT", help='What to erase, such as "Van Gogh".')
@click.option("--kind", metavar="KIND", help=f"{' | '.join(KINDS)}.  [default: a recipe's, else guessed]")
@click.option("--method", metavar="NAME", help=f"{' | '.join(METHODS)}.  [default: recare]")
@common.base_option
@common.clip_option
@click.option("--seed", type=int, help="All random draws follow from it.  [default: 0]")
@click.option(
    "--recipe", metavar="NAME|FILE|PATCH", help="Start from a recipe; see `recare-patch recipes list`."
)
@click.option(
    "--preset", metavar="NAME", help=f"Options that belong together: {' | '.join(PRESETS)}; others go before."
)
@click.option("--out", type=click.Path(path_type=Path), help="The patch's folder.  [default: CONCEPT-patch]")
@click.option("--resume", is_flag=True, help="Go on with the run in --out that was interrupted.")
@click.option("--rank", type=int, help="LoRA rank.  [default: 8]")
@click.option("--alpha", type=float, help="LoRA alpha.  [default: the rank, where --rank is given]")
@click.option("--layers", metavar="SET", help=f"{' | '.join(LAYER_SETS)}.  [default: cross-attention]")
@click.option("--steps", type=int, help=f"Training steps of the patch.  [default: {EraseOptions().steps}]")
@click.option("--states", metavar="NAME", help=f"{' | '.join(STATES)}.  [default: target-images]")
@click.option("--optimizer", metavar="NAME", help=f"{' | '.join(OPTIMIZERS)}.  [default: adamw8bit]")
@click.option("--precision", metavar="NAME", help=f"{' | '.join(PRECISIONS)}, of the base.  [default: fp32]")
@click.option("--care-set", metavar="FILE", help="Use this CARE-set instead of mining one.")
@common.device_option
@common.memory_options
@click.option(
    "--save-target-images", is_flag=True, help="Keep the pictures of the concept, in target_images/."
)
@click.option(
    "--formats",
    "file_formats",
    metavar="NAME,…",
    default="diffusers,kohya",
    show_default=True,
    help="Weight files: diffusers is the patch, kohya is for A1111 and ComfyUI.",
)
@common.set_option
def erase(
    concept: str | None,
    kind: str | None,
    method: str | None,
    base: str | None,
    clip: str | None,
    seed: int | None,
    recipe: str | None,
    preset: str | None,
    out: Path | None,
    resume: bool,
    rank: int | None,
    alpha: float | None,
    layers: str | None,
    steps: int | None,
    states: str | None,
    optimizer: str | None,
    precision: str | None,
    care_set: str | None,
    device: str,
    vram: float | None,
    levers: dict[str, Any],
    save_target_images: bool,
    file_formats: str,
    assignments: tuple[str, ...],
) -> None:
    """Erase a concept from a base model and save the patch.

    \b
    recare-patch erase --concept "Van Gogh"
    recare-patch erase --concept tench --kind object --base path/to/pipeline
    recare-patch erase --recipe nudity-sd-1.5

    Several processes share every step, with the same result:

    \b
    accelerate launch --multi_gpu --num_processes 4 -m recare_patch erase --recipe nudity-sd-1.5
    """
    if alpha is None and rank is not None:
        alpha = float(rank)
    overrides = common.overrides_from(
        assignments,
        method=method,
        seed=seed,
        precision=precision,
        adapter__rank=rank,
        adapter__alpha=alpha,
        adapter__layers=layers,
        erase__steps=steps,
        erase__states=states,
        erase__optimizer=optimizer,
        care_set__file=care_set,
    )
    overrides |= levers
    if resume and concept is None and recipe is None and out is not None:
        recipe = _recipe_of_run(out)
    overrides = {**preset_overrides(preset), **overrides}
    plan = _check(concept, kind, recipe, base, clip, overrides)
    text = concept if concept is not None else plan.concept.text
    folder = out if out is not None else Path(f"{plan.concept.slug}-patch")
    from recare_patch.formats import check_formats

    chosen = check_formats(file_formats.split(","))
    if plan.base == "atelier" and base is None:
        click.echo(
            "Base model: Atelier, the small one bundled with this package (64-pixel pictures). "
            f"For Stable Diffusion add --base FOLDER or --base {common.SD_15}.",
            err=True,
        )
    from recare_patch.erasing import erase_concept
    from recare_patch.parallel import Crew

    crew = Crew.found()
    first = crew is None or crew.main
    # Of several processes one speaks; all work.
    with common.shown_progress() if first else contextlib.nullcontext() as progress:
        result = erase_concept(
            text,
            kind=kind,
            recipe=recipe,
            base=base,
            clip=clip,
            out=folder,
            resume=resume,
            overrides=overrides,
            vram=vram,
            progress=progress,
            device=device,
            save_target_images=save_target_images,
            file_formats=chosen,
        )
    if first:
        _report(text, result)


def _recipe_of_run(out: Path) -> str:
    """The recipe file of an interrupted run, so that ``--resume --out FOLDER`` is enough."""
    file = out / ".run" / "recipe.yaml"
    if not file.is_file():
        raise ResumeError(
            f"there is no interrupted run in {out}: name the concept with --concept to start one"
        )
    return str(file)


def _check(
    concept: str | None,
    kind: str | None,
    recipe: str | None,
    base: str | None,
    clip: str | None,
    overrides: dict[str, Any],
) -> Recipe:
    """Find every fault that can be found before a model is loaded.

    Returns:
        The recipe as far as it is known now: a kind that is still to be guessed reads "object".
    """
    if concept is None and recipe is None:
        raise RecipeError('nothing to erase: give --concept "Van Gogh", or --recipe NAME')
    if recipe is not None:
        plan = load_recipe(recipe)
        if concept is not None or kind is not None:
            chosen = Concept(
                text=concept if concept is not None else plan.concept.text, kind=kind or plan.concept.kind
            )
            plan = plan.with_overrides({"concept": chosen.model_dump()})
    else:
        plan = Recipe(concept=Concept(text=concept or "", kind=kind or "object"))
    places = {key: value for key, value in (("base", base), ("clip", clip)) if value is not None}
    return plan.with_overrides({**places, **overrides})


def _report(concept: str, result: Any) -> None:
    for warning in result.warnings:
        click.echo(f"Warning: {warning}", err=True)
    folder = result.folder
    if result.care_set is not None and result.care_set.words:
        click.echo(f"CARE-set: {', '.join(result.care_set.words)}")
    seconds = result.cost.get("seconds")
    evaluations = result.cost.get("denoiser_evaluations")
    spent = [f"{seconds:.0f} s"] if isinstance(seconds, int | float) else []
    spent += [f"{evaluations:,} denoiser evaluations"] if isinstance(evaluations, int) else []
    click.echo(f"Erased {concept}{': ' + ', '.join(spent) if spent else ''}.")
    click.echo(f"Patch: {folder}")
    if (folder / "preview.png").is_file():
        click.echo(f"Before and after: {folder / 'preview.png'}")
    click.echo(f'Load it in diffusers: pipe.load_lora_weights("{folder}")')
    for file in sorted(folder.glob("erase-*.safetensors")):
        click.echo(f"For A1111 and ComfyUI: {file}")
