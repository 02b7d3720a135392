"""``recare-patch methods``, ``recipes``, ``careset`` and ``atelier``: what there is to erase with."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from click import Context, argument, command, echo, group, pass_context

from recare_patch import cli
from recare_patch.cli import flag, option
from recare_patch.core import BaseModelError, CareSetError, RecarePatchError, RecipeError, unknown_name
from recare_patch.recipe import (
    KINDS,
    METHODS,
    Concept,
    MethodInfo,
    Recipe,
    list_recipes,
    load_recipe,
    measured,
    method_info,
)

if TYPE_CHECKING:
    from recare_patch.careset import CareSet

_FIGURES = (
    ("shown", "{:.0%} still shown"),
    ("care", "companions kept {:.0%}"),
    ("kept", "styles and objects kept {:.0%}"),
    ("recovered", "concept inversion brings back {:.0%}"),
    ("UnlearnDiffAtk", "UnlearnDiffAtk {:.0%}"),
    ("seconds", "{:.0f} s"),
    ("evaluations", "{:,} evaluations"),
)


@command()
@argument("name", required=False, metavar="[NAME]")
@cli.json_option
def methods(name: str | None, as_json: bool) -> None:
    """List the erasing methods: what they touch, cost, and are good and bad at.

    Figures are of the bundled base, where they were measured.
    """
    if name is not None and name.casefold() not in METHODS:
        raise unknown_name("method", name, METHODS)
    chosen = {key: method_info(key) for key in (METHODS if name is None else [name.casefold()])}
    figures = measured()
    if as_json:
        facts = {key: {**info.as_data(key), "measured": figures.get(key, {})} for key, info in chosen.items()}
        echo(json.dumps(facts, indent=2, ensure_ascii=False))
        return
    for number, (key, info) in enumerate(chosen.items()):
        if number:
            echo()
        _tell(key, info, figures.get(key, {}))


def _tell(name: str, info: MethodInfo, figures: Mapping[str, Mapping[str, Any]]) -> None:
    echo(f"{name}  ({info.title}; {info.paper.short})")
    echo(f"  {info.what}")
    rows = [
        ("touches", info.touches),
        ("reads", info.reads),
        ("strength", info.strength),
        ("weakness", info.weakness),
        ("--replace-with", info.replaces or "no"),
        ("--from", info.separates or "no"),
        ("--continue-from", "yes" if info.continues else "no"),
    ]
    for concept, one in figures.items():
        told = [form.format(one[key]) for key, form in _FIGURES if one.get(key) is not None]
        if one.get("bytes") is not None:
            told.append(f"{one['bytes'] / 1e3:.0f} kB")
        rows.append((f"on {concept}", ", ".join(told)))
    cli.echo_table([(f"  {label}", text) for label, text in rows], left=2)


@group()
def recipes() -> None:
    """List the bundled recipes, show one in full, validate files."""


@recipes.command(name="list")
def list_() -> None:
    """List the bundled recipes."""
    rows = [(info.name, info.concept, info.kind, info.base) for info in list_recipes()]
    cli.echo_table([("name", "concept", "kind", "base"), *rows], left=4)


@recipes.command(name="show")
@argument("source", type=cli.PLACE, metavar="NAME|FILE|PATCH")
def show_recipe(source: str) -> None:
    """Show a recipe in full, with what its base asks for where it says nothing, and the defaults."""
    shown = load_recipe(source)
    if shown.base.casefold() != "atelier":
        from recare_patch.erasure import resolve_recipe

        # Where the base cannot be looked at, what the file says is all that is known.
        with contextlib.suppress(BaseModelError):
            shown = resolve_recipe("", recipe=source)
    echo(shown.to_yaml(), nl=False)


@recipes.command()
@argument("sources", type=cli.PLACE, metavar="NAME|FILE|PATCH...", nargs=-1, required=True)
@pass_context
def validate(ctx: Context, sources: tuple[str, ...]) -> None:
    """Check recipes and tell all faults; exit code 2 if there are any."""
    faulty = False
    for source in sources:
        try:
            recipe = load_recipe(source)
        except RecarePatchError as fault:
            faulty = True
            echo(f"Error: {fault}", err=True)
        else:
            echo(f"{source}: sound ({recipe.method} erases {recipe.concept} from {recipe.base})")
    if faulty:
        ctx.exit(2)


@group()
def careset() -> None:
    """Build, show, plot and edit CARE-sets: what co-occurs with a concept and must stay."""


@careset.command()
@option("--concept TEXT", "The concept whose companions to find.")
@option("--kind KIND", f"{' | '.join(KINDS)}.  [default: a recipe's, else guessed]")
@option("--alias NAME", "Another name of the concept, never its companion; repeatable.", into="aliases", multiple=True)
@cli.base_option
@cli.clip_option
@cli.recipe_option("seed", "--seed")
@option("--recipe NAME|FILE|PATCH", "Start from a recipe.")
@option("--out", "The file.  [default: CONCEPT-care-set.json]", cli.FOLDER)
@cli.recipe_option("precision", "--precision", "")
@cli.device_option
@cli.memory_options
@cli.set_option()
def build(
    concept: str | None,
    aliases: tuple[str, ...],
    recipe: str | None,
    out: Path | None,
    device: str,
    assignments: tuple[str, ...],
    **words: Any,
) -> None:
    """Draw pictures of a concept and find its CARE-set in them, as `erase` would."""
    if concept is None and recipe is None:
        raise RecipeError('no concept given: add --concept "Van Gogh", or --recipe NAME')
    overrides = cli.overrides_from(assignments)
    if aliases:
        overrides["concept.aliases"] = list(aliases)
    if concept is not None:
        # Faults of spelling are told before any model is loaded.
        Recipe(concept=Concept(text=concept, kind=words["kind"] or "object")).with_overrides(overrides)
    from recare_patch.careset import default_clip
    from recare_patch.erasure import PREPARING, care_set_of, load_clip, resolve_recipe
    from recare_patch.models import load_base

    with cli.shown_progress() as progress:
        words |= {"recipe": recipe, "overrides": overrides, "device": device}
        plan = resolve_recipe(concept or "", only=PREPARING, **words)
        model = load_base(plan.base, precision=plan.precision, device=device, memory=plan.memory)
        clip = load_clip(plan.clip or default_clip(plan.base), model.device, plan.memory)
        found = care_set_of(plan, model, clip, progress)
    _save(found, out if out is not None else Path(f"{plan.concept.slug}-care-set.json"))


@careset.command()
@argument("path", type=cli.FOLDER)
@flag("--all", "Show dropped tokens too, with the reason.", "everything")
def show(path: Path, everything: bool) -> None:
    """Show a CARE-set: a file, or the one in a patch folder."""
    care_set = _load(path)
    kept = sum(token.kept for token in care_set.tokens)
    echo(
        f"{care_set.concept} ({care_set.concept.kind}): {kept} kept of {len(care_set.tokens)} tokens "
        f"mined from {care_set.images} pictures"
    )
    width = max((len(token.text) for token in care_set.tokens), default=5)
    echo(f"{'token':<{width}}  {'count':>5}  {'cluster':>7}  {'residual':>8}  {'kept':<4}  reason")
    for token in care_set.tokens:
        if token.kept or everything:
            cluster = "-" if token.cluster is None else str(token.cluster)
            line = f"{token.text:<{width}}  {token.count:>5}  {cluster:>7}  {token.residual:>8.3f}  "
            echo((line + f"{'yes' if token.kept else 'no':<4}  {token.reason}").rstrip())
    if not everything and kept < len(care_set.tokens):
        dropped = len(care_set.tokens) - kept
        echo(f"{dropped} dropped tokens are not shown; add --all for them and the reasons.")


@careset.command()
@argument("path", type=cli.FOLDER)
@option("--out", "The picture.  [default: beside the file, .png]", cli.FOLDER)
@cli.clip_option
def plot(path: Path, out: Path | None, clip: str | None) -> None:
    """Draw the map of a CARE-set: its clusters, and what was kept and dropped."""
    care_set = _load(path)
    target = out if out is not None else _file(path).with_suffix(".png")
    from recare_patch.careset import Clip, plot_care_set

    cli.quiet_libraries()
    plot_care_set(care_set, target, Clip.load(clip or getattr(care_set, "clip", None) or "atelier"))
    echo(f"Map: {target}")


@careset.command()
@argument("path", type=cli.FOLDER)
@option("--add WORD", "Keep this word too; repeatable.", into="added", multiple=True)
@option("--remove WORD", "Drop this word; repeatable.", into="removed", multiple=True)
@option("--out", "The file.  [default: the one that is edited]", cli.FOLDER)
def edit(path: Path, added: tuple[str, ...], removed: tuple[str, ...], out: Path | None) -> None:
    """Add words to a CARE-set or remove some; use it with `erase --care-set`."""
    if not added and not removed:
        raise CareSetError("nothing to edit: give --add WORD or --remove WORD")
    care_set = _load(path)
    if removed:
        care_set = care_set.with_removed(removed)
    if added:
        care_set = care_set.with_added(added)
    _save(care_set, out if out is not None else _file(path))


def _file(path: Path) -> Path:
    return path / "care_set.json" if path.is_dir() else path


def _load(path: Path) -> CareSet:
    from recare_patch.careset import CareSet

    file = _file(path)
    if not file.is_file():
        raise CareSetError(f"there is no CARE-set at {file}")
    return CareSet.load(file)


def _save(care_set: CareSet, file: Path) -> None:
    care_set.save(file)
    echo(f"{len(care_set.words)} CARE-concepts of {care_set.concept}: {', '.join(care_set.words)}")
    echo(f"CARE-set: {file}")


@group()
def atelier() -> None:
    """Show what Atelier is, the small base model bundled with this package."""


@atelier.command()
def info() -> None:
    """Show what the bundled base model is, what it can draw, and what co-occurs in it."""
    from recare_patch.models.atelier import info as describe

    facts = describe()
    if not facts.parameters:
        raise BaseModelError(
            "the bundled base model has no weights yet: make them with `python -m benchmarks.atelier train` "
            "in a checkout"
        )
    echo("Atelier: Stable Diffusion's anatomy, small: 64-pixel pictures, trained on scenes drawn by code")
    echo(f"pipeline: {facts.folder}")
    echo(f"size: {facts.megabytes:.1f} MB in all")
    for part, count in facts.parameters.items():
        echo(f"  {part:<24}{count / 1e6:7.2f} M parameters")
    echo("draws:")
    for kind, names in facts.concepts.items():
        echo(f"  {kind:<10}{', '.join(names)}")
    echo("co-occurrence, P(companion | concept):")
    for concept, companions in facts.co_occurrence.items():
        echo(f"  {concept:<10}{', '.join(f'{word} {share:.2f}' for word, share in companions.items())}")
    echo(f'In diffusers: StableDiffusionPipeline.from_pretrained("{facts.folder}")')
