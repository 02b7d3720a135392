"""``recare-patch search``: patches on the Hub."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from recare_patch.cli import common
from recare_patch.core import HubError

if TYPE_CHECKING:
    from recare_patch.share import Found


@click.command()
@click.argument("text", required=False)
@click.option("--base", metavar="NAME|HUB-ID", help="Made for this base model.")
@click.option("--concept", metavar="TEXT", help='What is erased, such as "Van Gogh".')
@click.option("--tag", "tags", multiple=True, metavar="TAG", help="With this tag; repeatable.")
@click.option("--owner", metavar="NAME", help="Of this user or organisation.")
@click.option("--limit", type=click.IntRange(1, 1000), default=20, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--markdown", is_flag=True, help="Print an index in Markdown, for a collection's page.")
def search(
    text: str | None,
    base: str | None,
    concept: str | None,
    tags: tuple[str, ...],
    owner: str | None,
    limit: int,
    as_json: bool,
    markdown: bool,
) -> None:
    """Find patches on the Hub; TEXT is looked for in their names.

    \b
    recare-patch search --concept "Van Gogh"
    recare-patch search --base stable-diffusion-v1-5/stable-diffusion-v1-5 --json

    Figures are those that the cards claim: `recare-patch verify` measures them again.
    """
    if as_json and markdown:
        raise HubError("--json and --markdown are two ways to print: give one")
    common.quiet_libraries()
    from recare_patch import share as sharing

    found = sharing.search(text, base=base, concept=concept, tags=tags, owner=owner, limit=limit)
    if as_json:
        click.echo(json.dumps([asdict(one) for one in found], indent=2, ensure_ascii=False))
    elif markdown:
        from recare_patch.share import endpoint

        rows = [sharing.row_of_found(one, endpoint()) for one in found]
        click.echo(sharing.index_text(rows, "Patches on the Hub"), nl=False)
    else:
        _table(found)


def _table(found: Sequence[Found]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if not found:
        click.echo("Nothing was found.")
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("patch", "erases", "base", "still shows", "licence", "changed"):
        table.add_column(name, overflow="fold")
    table.add_column("downloads", justify="right")
    for one in found:
        shown = max((rate.value for rate in one.rates("concept-rate")), default=None)
        cells = (
            one.repo + (" (private)" if one.private else ""),
            ", ".join(one.concepts),
            one.base,
            "–" if shown is None else f"{100 * shown:.1f} %",
            one.license,
            one.modified,
            f"{one.downloads:,}",
        )
        # As text: what strangers wrote is no markup.
        table.add_row(*map(Text, cells))
    Console().print(table)
