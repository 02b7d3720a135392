"""``recare-patch erase``: the main job."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import click

from recare_patch.cli import common
from recare_patch.core import OutputError, RecipeError, ResumeError
from recare_patch.recipe import (
    KINDS,
    LAYER_SETS,
    METHODS,
    OPTIMIZERS,
    PRECISIONS,
    PRESETS,
    STATES,
    WEIGHTS_NAME,
    Concept,
    EraseOptions,
    Recipe,
    load_recipe,
    preset_overrides,
)


@click.command()
@click.option(
    "--concept",
    "concepts",
    metavar="TEXT",
    multiple=True,
    help='What to erase, such as "Van Gogh"; repeatable, one patch a concept.',
)
@click.option(
    "--concepts",
    "concepts_file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="A text file of concepts, one a line; lines that start with # are skipped.",
)
@click.option("--together", is_flag=True, help="One patch that erases all the concepts.")
@click.option(
    "--stack",
    "stacked",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Stack the concepts' patches into one file afterwards, exactly.",
)
@click.option("--kind", metavar="KIND", help=f"{' | '.join(KINDS)}.  [default: a recipe's, else guessed]")
@click.option(
    "--replace-with", metavar="TEXT", help='What its prompts show instead, such as "cat" for tench.'
)
@click.option(
    "--from",
    "subject",
    metavar="TEXT",
    help='Take the concept, as an attribute, out of this alone: --concept stars --from "Van Gogh".',
)
@click.option(
    "--continue-from",
    metavar="PATCH",
    help="Go on training this patch, so that one patch erases its concept and this one.",
)
@click.option(
    "--method",
    metavar="NAME",
    help=f"{' | '.join(METHODS)}; see `recare-patch methods`.  [default: recare]",
)
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
@click.option(
    "--layers",
    metavar="SET",
    help=f"{' | '.join(LAYER_SETS)}.  [default: the method's, else cross-attention]",
)
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
    concepts: tuple[str, ...],
    concepts_file: Path | None,
    together: bool,
    stacked: Path | None,
    kind: str | None,
    replace_with: str | None,
    subject: str | None,
    continue_from: str | None,
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
    recare-patch erase --concept tench --replace-with cat
    recare-patch erase --concepts artists.txt --kind style --out patches --resume

    Several processes share every step, with the same result:

    \b
    accelerate launch --multi_gpu --num_processes 4 -m recare_patch erase --recipe nudity-sd-1.5
    """
    if alpha is None and rank is not None:
        alpha = float(rank)
    overrides = common.overrides_from(
        assignments,
        method=method,
        replace_with=replace_with,
        continue_from=continue_from,
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
    texts = [*concepts, *(_listed(concepts_file) if concepts_file is not None else ())]
    if resume and not texts and recipe is None and out is not None:
        recipe = _recipe_of_run(out)
    overrides = {**preset_overrides(preset), **overrides}
    plan, *others = _plans(texts, together, subject, kind, recipe, base, clip, overrides)
    several = [plan, *others]
    folders = [_folder(one, out, alone=not others) for one in several]
    _check_several(several, stacked, continue_from, care_set)
    if continue_from is not None:
        overrides["continue_from"] = _earlier_patch(continue_from)
    from recare_patch.patch import check_formats

    chosen = check_formats(file_formats.split(","))
    if plan.base == "atelier" and base is None:
        click.echo(
            "Base model: Atelier, the small one bundled with this package (64-pixel pictures). "
            f"For Stable Diffusion add --base FOLDER or --base {common.SD_15}.",
            err=True,
        )
    from recare_patch.core import Crew
    from recare_patch.erasure import erase_concept

    crew = Crew.found()
    first = crew is None or crew.main
    if first and others:
        _check_free([] if resume else folders, folders, stacked)
    for one, folder in zip(several, folders, strict=True):
        if len(several) > 1 and resume and _finished(folder):
            click.echo(f"{one.title}: finished before, in {folder}", err=True)
            continue
        # Of several processes one speaks; all work.
        with common.shown_progress() if first else contextlib.nullcontext() as progress:
            result = erase_concept(
                one.concept.text,
                also=[other.text for other in one.also],
                subject=subject,
                kind=kind,
                recipe=recipe,
                base=base,
                clip=clip,
                out=folder,
                resume=resume and (len(several) == 1 or folder.exists()),
                overrides=overrides,
                vram=vram,
                progress=progress,
                device=device,
                save_target_images=save_target_images,
                file_formats=chosen,
            )
        if first:
            _report(one.title, result)
    if stacked is not None and first:
        _stack(folders, stacked)


def _listed(file: Path) -> list[str]:
    """The concepts of a text file."""
    try:
        # Some editors mark UTF-8 text by three bytes at its start.
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except OSError as fault:
        reason = (fault.strerror or str(fault)).lower()
        raise RecipeError(f"cannot read the concepts in {file}: {reason}") from None
    except ValueError:
        raise RecipeError(f"cannot read the concepts in {file}: it is not UTF-8 text") from None
    found = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not found:
        raise RecipeError(f"{file} names no concept")
    return found


def _plans(
    texts: list[str],
    together: bool,
    subject: str | None,
    kind: str | None,
    recipe: str | None,
    base: str | None,
    clip: str | None,
    overrides: dict[str, Any],
) -> list[Recipe]:
    """The runs, each as far as it is known now."""
    if together and len(texts) < 2:
        raise RecipeError(f"--together is for several concepts, and there is {len(texts) or 'none'}")
    if recipe is not None and len(texts) > 1:
        raise RecipeError(f"--recipe is for one concept, and there are {len(texts)}")
    asked: list[tuple[str | None, list[str]]] = [(text, []) for text in texts] or [(None, [])]
    if together:
        asked = [(texts[0], texts[1:])]
    return [_check(text, also, subject, kind, recipe, base, clip, overrides) for text, also in asked]


def _check_several(
    plans: list[Recipe], stacked: Path | None, continue_from: str | None, care_set: str | None
) -> None:
    """Refuse what cannot be meant for several runs."""
    slugs = [plan.slug for plan in plans]
    double = next((plan.title for k, plan in enumerate(plans) if plan.slug in slugs[:k]), None)
    if double is not None:
        raise RecipeError(f"the concept '{double}' is there twice")
    for option, value in (("--continue-from", continue_from), ("--care-set", care_set)):
        if value is not None and len(plans) > 1:
            raise RecipeError(f"{option} is for one patch, and there would be {len(plans)}")
    if stacked is not None and len(plans) < 2:
        raise RecipeError("--stack is for several patches, and there is one")


def _folder(plan: Recipe, out: Path | None, *, alone: bool) -> Path:
    name = f"{plan.slug}-patch"
    return Path(name) if out is None else out if alone else out / name


def _earlier_patch(text: str) -> str:
    """Where the patch of ``--continue-from`` lies; short names go as for other commands."""
    path, scale = common.parse_patch(common.short_patch(text))
    if scale != 1:
        raise RecipeError(f"--continue-from goes on from a whole patch, and '{text}' has a scale")
    return str(path)


def _check_free(new: list[Path], patches: list[Path], stacked: Path | None) -> None:
    """Refuse folders that could not be written to, before hours go into the first of several patches."""
    if stacked is not None and any(stacked in (one, *one.parents) for one in patches):
        raise OutputError(f"the stack cannot lie in {stacked}: its patches will lie there")
    for folder in [*new, *([stacked] if stacked is not None else [])]:
        if folder.exists() and not folder.is_dir():
            raise OutputError(f"cannot write into {folder}: it is a file, not a folder")
        if folder.is_dir() and any(folder.iterdir()):
            raise OutputError(f"{folder} already holds files: choose another folder")


def _finished(folder: Path) -> bool:
    return (folder / WEIGHTS_NAME).is_file() and not (folder / ".run").exists()


def _stack(folders: list[Path], out: Path) -> None:
    from recare_patch.combine import save_stack, stack
    from recare_patch.patch import Patch

    save_stack(stack([(Patch.load(folder), 1.0) for folder in folders]), out)
    click.echo(f"Stack of {len(folders)} patches: {out}")


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
    also: list[str],
    subject: str | None,
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
    places: dict[str, Any] = {
        key: value for key, value in (("base", base), ("clip", clip)) if value is not None
    }
    if also:
        places["also"] = [Concept(text=one, kind=kind or "object").model_dump() for one in also]
    if subject is not None:
        places["subject"] = Concept(text=subject, kind=kind or "object").model_dump()
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
