"""``recare-patch recipes``: list, show and validate recipes."""

from __future__ import annotations

import click

from recare_patch.core import RecarePatchError
from recare_patch.recipe import list_recipes, load_recipe


@click.group()
def recipes() -> None:
    """List the bundled recipes, show one in full, validate files."""


@recipes.command(name="list")
def list_() -> None:
    """List the bundled recipes."""
    rows = [("name", "concept", "kind", "base")]
    rows += [(info.name, info.concept, info.kind, info.base) for info in list_recipes()]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for row in rows:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


@recipes.command()
@click.argument("source", metavar="NAME|FILE|PATCH")
def show(source: str) -> None:
    """Show a recipe in full, defaults included."""
    click.echo(load_recipe(source).to_yaml(), nl=False)


@recipes.command()
@click.argument("sources", metavar="NAME|FILE|PATCH...", nargs=-1, required=True)
@click.pass_context
def validate(ctx: click.Context, sources: tuple[str, ...]) -> None:
    """Check recipes and tell all faults; exit code 2 if there are any."""
    faulty = False
    for source in sources:
        try:
            recipe = load_recipe(source)
        except RecarePatchError as fault:
            faulty = True
            click.echo(f"Error: {fault}", err=True)
        else:
            click.echo(f"{source}: sound ({recipe.method} erases {recipe.concept} from {recipe.base})")
    if faulty:
        ctx.exit(2)
