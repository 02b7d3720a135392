"""``recare-patch erase``, the main job, and ``plan``: what a run will cost, before it is run."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from click import FloatRange, command, echo

from recare_patch import cli
from recare_patch.cli import flag, option
from recare_patch.core import OutputError, RecipeError, ResumeError, read_text
from recare_patch.recipe import (
    KINDS,
    METHODS,
    PRESETS,
    WEIGHTS_NAME,
    Concept,
    Recipe,
    load_recipe,
    preset_overrides,
    recipe_for,
    same_concept,
)


# Long: an argument for each option, and the refusals that belong before torch is loaded.
@command()
@option(
    "--concept TEXT",
    'What to erase, such as "Van Gogh"; repeatable, one patch a concept.',
    into="concepts",
    multiple=True,
)
@option(
    "--concepts FILE",
    "A text file of concepts, one a line; lines that start with # are skipped.",
    cli.FOLDER,
    into="concepts_file",
)
@flag("--together", "One patch that erases all the concepts; with --method closed it always is.")
@option("--stack FOLDER", "Stack the concepts' patches into one file afterwards, exactly.", cli.FOLDER, into="stacked")
@option("--kind KIND", f"{' | '.join(KINDS)}.  [default: a recipe's, else guessed]")
@option("--alias NAME", "Another name of the concept, erased with it; repeatable.", into="aliases", multiple=True)
@cli.recipe_option("replace_with", "--replace-with")
@option(
    "--from TEXT",
    'Take the concept, as an attribute, out of this alone: --concept stars --from "Van Gogh".',
    into="subject",
)
@cli.recipe_option("continue_from", "--continue-from", metavar="PATCH")
@option("--add PATCH", "Put the concepts into this patch of --method closed; its own names stay as they are in it.")
@cli.recipe_option("method", "--method", help="see `recare-patch methods`")
@cli.base_option
@cli.clip_option
@cli.recipe_option("seed", "--seed")
@option("--recipe NAME|FILE|PATCH", "Start from a recipe; see `recare-patch recipes list`.")
@option("--preset NAME", f"Options that belong together: {' | '.join(PRESETS)}; others go before.")
@option("--out", "The patch's folder.  [default: CONCEPT-patch]", cli.FOLDER)
@flag("--resume", "Go on with the run in --out that was interrupted.")
@cli.recipe_option("adapter.rank", "--rank")
@cli.recipe_option("adapter.alpha", "--alpha", "the rank, where --rank is given")
@cli.recipe_option("adapter.layers", "--layers", "the method's, else cross-attention", metavar="SET")
@cli.recipe_option("erase.steps", "--steps")
@cli.recipe_option("erase.states", "--states")
@cli.recipe_option("erase.optimizer", "--optimizer")
@cli.recipe_option("precision", "--precision")
@cli.recipe_option("care_set.file", "--care-set", metavar="FILE")
@cli.device_option
@cli.memory_options
@flag("--save-target-images", "Keep the pictures of the concept, in target_images/.")
@cli.formats_option
@cli.set_option()
def erase(
    concepts: tuple[str, ...],
    concepts_file: Path | None,
    together: bool,
    stacked: Path | None,
    recipe: str | None,
    preset: str | None,
    out: Path | None,
    resume: bool,
    file_formats: str,
    assignments: tuple[str, ...],
    kind: str | None,
    subject: str | None,
    add: str | None,
    base: str | None,
    clip: str | None,
    aliases: tuple[str, ...],
    **run: Any,
) -> None:
    """Erase a concept from a base model and save the patch.

    \b
    recare-patch erase --concept "Van Gogh"
    recare-patch erase --concept tench --kind object --base path/to/pipeline
    recare-patch erase --recipe nudity-sd-1.5
    recare-patch erase --concept tench --replace-with cat
    recare-patch erase --concepts artists.txt --kind style --out patches --resume
    recare-patch erase --concepts artists.txt --kind style --method closed --out artists      # one patch of all
    recare-patch erase --concepts more.txt --kind style --method closed --add artists --out all

    Several processes share every step, with the same result:

    \b
    accelerate launch --multi_gpu --num_processes 4 -m recare_patch erase --recipe nudity-sd-1.5
    """
    named = cli.given_options()
    if "adapter.rank" in named:
        named.setdefault("adapter.alpha", float(named["adapter.rank"]))
    overrides = cli.overrides_from(assignments, named)
    if aliases:
        overrides["concept.aliases"] = list(aliases)
    texts = [*concepts, *(_listed(concepts_file) if concepts_file is not None else ())]
    if aliases and len(texts) > 1:
        raise RecipeError(f"--alias is of one concept, and there are {len(texts)}")
    if resume and not texts and recipe is None and out is not None:
        recipe = _recipe_of_run(out)
    asked = {**preset_overrides(preset), **overrides}
    # What is solved for all names at once is one patch, unless their patches are to be stacked.
    method = METHODS.get(asked["method"]).info if asked.get("method") in METHODS else None
    together = together or bool(method and method.rank_per_name and len(texts) > 1 and stacked is None)
    if add is not None:
        overrides["closed.hold"] = asked["closed.hold"] = _adding(add, out, method, resume=resume, stacked=stacked)
        base = base or cli.base_of([(Path(overrides["closed.hold"]), 1.0)])
        with contextlib.suppress(RecipeError):  # A stack has none.
            clip = clip or load_recipe(overrides["closed.hold"]).clip
    wanted: dict[str, Any] = {"subject": subject, "kind": kind, "recipe": recipe, "base": base, "clip": clip}
    plans = _plans(texts, together, asked, **wanted)
    _check_several(plans, stacked, named)
    alone, place = len(plans) == 1, out or Path()
    folders = [out if out and alone else place / f"{one.slug}-patch" for one in plans]
    if "continue_from" in named:
        overrides["continue_from"] = _earlier_patch(named["continue_from"])
    from recare_patch.patch import check_formats

    chosen = check_formats(file_formats.split(","))
    if plans[0].base == "atelier" and base is None:
        echo(
            "Base model: Atelier, the small one bundled with this package (64-pixel pictures). "
            f"For Stable Diffusion add --base FOLDER or --base {cli.SD_15}.",
            err=True,
        )
    from recare_patch.core import Crew, launched_together
    from recare_patch.erasure import erase_concept

    if add is not None and out is not None:
        words = {"also": [other.text for other in plans[0].also], "overrides": overrides, "preset": preset}
        _add(overrides["closed.hold"], plans[0], out, chosen, words | wanted | run)
        return
    crew = Crew.found() if launched_together() else None
    first = crew is None or crew.main
    if first and not alone:
        _check_free([] if resume else folders, folders, stacked)
    for one, folder in zip(plans, folders, strict=True):
        finished = (folder / WEIGHTS_NAME).is_file() and not (folder / ".run").exists()
        if finished and resume and not alone:
            echo(f"{one.title}: finished before, in {folder}", err=True)
            continue
        # Of several processes one speaks; all work.
        with cli.shown_progress() if first else contextlib.nullcontext() as progress:
            result = erase_concept(
                one.concept.text,
                also=[other.text for other in one.also],
                out=folder,
                resume=resume and (alone or folder.exists()),
                overrides=overrides,
                progress=progress,
                file_formats=chosen,
                preset=preset,
                **wanted,
                **run,
            )
        if first:
            _report(one.title, result)
    if stacked is not None and first:
        _stack(folders, stacked)


def _listed(file: Path) -> list[str]:
    """The concepts of a text file."""
    lines = read_text(file, f"the concepts in {file}", RecipeError).splitlines()
    found = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not found:
        raise RecipeError(f"{file} names no concept")
    return found


def _recipe_of_run(out: Path) -> str:
    """The recipe file of an interrupted run, so that ``--resume --out FOLDER`` is enough."""
    file = out / ".run" / "recipe.yaml"
    if not file.is_file():
        told = "name the concept with --concept to start one"
        raise ResumeError(f"there is no interrupted run in {out}: {told}")
    return str(file)


def _plans(texts: Sequence[str], together: bool, overrides: dict[str, Any], **wanted: str | None) -> list[Recipe]:
    """The recipe of each run as far as it is known before a model is loaded, with every fault it can have.

    A kind that is still to be guessed reads "object".
    """
    recipe, kind = wanted["recipe"], wanted["kind"]
    if together and len(texts) < 2:
        raise RecipeError(f"--together is for several concepts, and there is {len(texts) or 'none'}")
    if recipe is not None and len(texts) > 1:
        raise RecipeError(f"--recipe is for one concept, and there are {len(texts)}")
    if recipe is None and not texts:
        raise RecipeError('nothing to erase: give --concept "Van Gogh", or --recipe NAME')
    known = load_recipe(recipe) if recipe is not None else None

    def concept(text: str) -> dict[str, str]:
        return Concept(text=text, kind=kind or (known.concept.kind if known else "object")).model_dump()

    places: dict[str, Any] = {key: wanted[key] for key in ("base", "clip") if wanted[key] is not None}
    if wanted["subject"] is not None:
        places["subject"] = concept(wanted["subject"])
    if together:
        places["also"] = [concept(text) for text in texts[1:]]
    if known is not None:
        text = texts[0] if texts else known.concept.text
        changed = texts or kind is not None
        return [known.with_overrides(({"concept": concept(text)} if changed else {}) | places | overrides)]
    return [
        Recipe(concept=Concept(**concept(text))).with_overrides(places | overrides)
        for text in (texts[:1] if together else texts)
    ]


def _check_several(plans: Sequence[Recipe], stacked: Path | None, named: dict[str, Any]) -> None:
    """Refuse what cannot be meant for several runs."""
    slugs = [plan.slug for plan in plans]
    for number, plan in enumerate(plans):
        # All at once: the hundredth name of a file that this locale cannot write would come after days.
        os.fsencode(plan.slug)
        if plan.slug in slugs[:number]:
            first = plans[slugs.index(plan.slug)].title
            told = f"the concept '{plan.title}' is there twice"
            same = same_concept(first, plan.title)
            raise RecipeError(
                told if same else f"'{first}' and '{plan.title}' would both be called {plan.slug}: run one apart"
            )
    for given, key in (("--continue-from", "continue_from"), ("--care-set", "care_set.file")):
        if key in named and len(plans) > 1:
            raise RecipeError(f"{given} is for one patch, and there would be {len(plans)}")
    if stacked is not None and len(plans) < 2:
        raise RecipeError("--stack is for several patches, and there is one")


def _earlier_patch(text: str) -> str:
    """Where the patch of ``--continue-from`` lies; short names go as for other commands."""
    path, scale = cli.parse_patch(cli.short_patch(text))
    if scale != 1:
        raise RecipeError(f"--continue-from goes on from a whole patch, and '{text}' has a scale")
    return str(path)


def _check_free(new: Sequence[Path], patches: Sequence[Path], stacked: Path | None) -> None:
    """Refuse folders that could not be written to, before hours go into the first of several patches."""
    if stacked is not None and any(stacked in (one, *one.parents) for one in patches):
        raise OutputError(f"the stack cannot lie in {stacked}: its patches will lie there")
    for folder in filter(None, [*new, stacked]):
        if folder.exists() and not folder.is_dir():
            raise OutputError(f"cannot write into {folder}: it is a file, not a folder")
        if folder.is_dir() and any(folder.iterdir()):
            raise OutputError(f"{folder} already holds files: choose another folder")


def _stack(folders: Sequence[Path], out: Path) -> None:
    from recare_patch.combine import save_stack, stack
    from recare_patch.patch import Patch

    save_stack(stack([(Patch.load(folder), 1.0) for folder in folders]), out)
    echo(f"Stack of {len(folders)} patches: {out}")


def _adding(add: str, out: Path | None, method: Any, *, resume: bool, stacked: Path | None) -> str:
    """Where the patch of ``--add`` lies; refused where nothing can be added to it."""
    if method is None or not method.rank_per_name:
        raise RecipeError("--add puts names into a patch of the closed form: give --method closed with it")
    if out is None:
        raise RecipeError("--add makes a new patch, and the earlier one stays: say where with --out")
    if resume or stacked is not None:
        raise RecipeError(f"--add takes seconds, and does not go with {'--resume' if resume else '--stack'}")
    path, scale = cli.parse_patch(cli.short_patch(add))
    if scale != 1:
        raise RecipeError(f"--add adds to a whole patch, and '{add}' has a scale")
    return str(path)


def _add(earlier: str, recipe: Recipe, out: Path, formats: Sequence[str], words: dict[str, Any]) -> None:
    """Solve for new names beside those of an earlier patch, and write one patch of both."""
    from recare_patch.combine import new_folder, stack, write_stack
    from recare_patch.erasure import erase_concept
    from recare_patch.patch import Patch

    before = Patch.load(earlier)
    with new_folder(out) as folder, TemporaryDirectory() as place, cli.shown_progress() as progress:
        result = erase_concept(
            recipe.concept.text, out=Path(place) / "added", progress=progress, file_formats=["diffusers"], **words
        )
        for warning in result.warnings:
            echo(f"Warning: {warning}", err=True)
        made = stack([(before, 1.0), (result.patch, 1.0)], dtype=before.dtype)
        size = write_stack(made, folder, formats).stat().st_size
    assert made.metadata is not None
    names, own = made.metadata.names or (), result.patch.metadata.names if result.patch.metadata else None
    echo(f"Added {recipe.title} to {before.name}, whose names keep their rows.")
    echo(f"Patch: {out}  ({len(names)} names, {len(own or ())} of them new, {size:,} bytes)")


def _report(concept: str, result: Any) -> None:
    for warning in result.warnings:
        echo(f"Warning: {warning}", err=True)
    folder = result.folder
    if result.care_set is not None and result.care_set.words:
        echo(f"CARE-set: {', '.join(result.care_set.words)}")
    seconds, evaluations = result.cost.get("seconds"), result.cost.get("denoiser_evaluations")
    spent = [f"{seconds:.0f} s"] if isinstance(seconds, int | float) else []
    spent += [f"{evaluations:,} denoiser evaluations"] if isinstance(evaluations, int) else []
    echo(f"Erased {concept}{': ' + ', '.join(spent) if spent else ''}.")
    measured, seen = result.cost.get("measured"), result.cost.get("seen")
    if measured:
        echo(
            f"The run's own measure: {measured['gone']:.2f} of the concept gone (bar {measured['bars']['gone']:g}), "
            f"retained prompts drifted by {measured['drift']:.2f} (bar {measured['bars']['drift']:g})."
        )
    if seen:
        told = [f"{one['what']} in {one['after']} of {one['of']}, before {one['before']}" for one in seen]
        echo(f"CLIP sees in the preview: {'; '.join(told)}.")
    if alike := result.cost.get("read_as_names"):
        echo(f"The base reads these as names of it, so they go too: {', '.join(alike)}.")
    if moved := result.cost.get("moved_most"):
        most = [f"{word} {share:.0%}" for word, share in list(moved.items())[:5]]
        echo(f"Of what stays it moves most, in what values make of it: {', '.join(most)}.")
    echo(f"Patch: {folder}")
    if (folder / "preview.png").is_file():
        echo(f"Before and after: {folder / 'preview.png'}")
    echo(f'Load it in diffusers: pipe.load_lora_weights("{folder}")')
    for file in sorted(folder.glob("erase-*.safetensors")):
        echo(f"For A1111 and ComfyUI: {file}")


@command()
@option("--concept TEXT", "What would be erased.", None, "Van Gogh")
@option("--recipe NAME|FILE|PATCH", "Plan this recipe.")
@option("--kind KIND", f"{' | '.join(KINDS)}.  [default: a recipe's, else to be guessed]")
@cli.base_option
@cli.recipe_option("precision", "--precision", "")
@cli.recipe_option("erase.optimizer", "--optimizer")
@cli.memory_options
@option(
    "--tflops",
    "Speed that the device reaches, in 10^12 operations a second.  [default: guessed from --device]",
    FloatRange(min=0, min_open=True),
)
@cli.device_option
@flag("--collateral", "Tell the words that this erasure will move most; reads the base's weights.")
@option("--sheet FILE", "With --collateral: pictures of those words, before and after.", cli.FOLDER)
@cli.set_option()
def plan(
    concept: str,
    recipe: str | None,
    kind: str | None,
    base: str | None,
    vram: float | None,
    tflops: float | None,
    device: str,
    collateral: bool,
    sheet: Path | None,
    assignments: tuple[str, ...],
) -> None:
    """Print the memory and time that an erasure is expected to take, stage by stage.

    \b
    recare-patch plan --base path/to/pipeline --vram 6
    recare-patch plan --recipe tench-sd-1.5 --checkpointing
    recare-patch plan --concept "Van Gogh" --collateral --sheet moved.png

    Evaluations are exact, or the most where a run measures when to end. Memory and time are estimates: tensors are
    added up on a model without values, and operations divided by the device's speed. No weights are read but for
    --collateral, which solves for the closed form and tells by how much it moves what values make of other words.
    """
    cli.quiet_libraries()
    if sheet is not None:
        if not collateral:
            raise RecipeError("--sheet draws what --collateral tells: give both")
        from recare_patch.core import check_sheet

        check_sheet(sheet)
    overrides = cli.overrides_from(assignments)
    from recare_patch.erasure import UTILIZATION, choose, is_exact, measured_speed
    from recare_patch.erasure import plan as planned
    from recare_patch.models import chosen_device, defaults_for

    unknown: list[str] = []

    def guess(text: str, source: str, clip: str | None) -> str:
        # What the kind is changes words, and that it is seen in pictures costs.
        unknown.append(text)
        return "style"

    words: dict[str, Any] = {"kind": kind, "recipe": recipe, "base": base, "overrides": overrides}
    words |= {"guess_kind": guess, "beneath": lambda source: defaults_for(source, device)}
    made, footprint = recipe_for("" if recipe else concept, **words), None
    guessed = bool(unknown)
    if vram is not None:
        made, footprint = choose(made, vram, guessed=guessed)
    place = chosen_device(device)
    speed = tflops * 1e12 if tflops is not None else measured_speed(place, made.precision)
    found = planned(made, speed=speed, footprint=footprint, guessed=guessed)
    echo(f"Base: {made.base}, {made.precision}")
    echo(f"Levers: {made.memory.in_words()}")
    whole = ("all", sum(one.evaluations for one in found.stages), found.seconds, found.peak)
    rows = [(one.name, one.evaluations, one.seconds, one.peak) for one in found.stages] + [whole]
    cli.echo_table(
        [("stage", "evaluations", "seconds", "peak GB")]
        + [(name, f"{n:,}" if n else "–", f"{seconds:,.0f}", f"{peak / 1e9:.2f}") for name, n, seconds, peak in rows]
    )
    echo(f"Patch: {found.patch_bytes / 1e6:.2f} MB")
    source = "as given" if tflops is not None else f"{UTILIZATION:.0%} of a matrix product on {place}"
    sure = "exact" if is_exact(made) else "the most that there can be"
    echo(
        f"Evaluations are {sure}; memory and time are estimates, at {speed / 1e12:.3g} TFLOP/s ({source}). "
        "training.json will say what it was."
    )
    if collateral:
        _tell_collateral(made, device, sheet)


def _tell_collateral(recipe: Recipe, device: str, file: Path | None) -> None:
    from recare_patch.core import save_sheet
    from recare_patch.erasure import draw_forecast, forecast
    from recare_patch.models import load_base

    with cli.shown_progress() as progress:
        model = load_base(recipe.base, precision=recipe.precision, device=device, memory=recipe.memory)
        found = forecast(recipe, base=model, device=device, progress=progress)
        if file is not None:
            save_sheet(draw_forecast(found, recipe, model), file)
    echo("What it will move most beside its concept, in what values make of it:")
    cli.echo_table([("word", "moves by")] + [(word, f"{share:.1%}") for word, share in found.words.items()])
    if file is not None:
        echo(f"Before and after: {file}")
