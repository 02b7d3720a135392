"""``recare-patch index``: a page that lists patches."""

from __future__ import annotations

from pathlib import Path

import click

from recare_patch.cli import common
from recare_patch.core import OutputError


@click.command()
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="PATCH...")
@click.option("--title", default="Patches", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE", help="Markdown.  [default: print it]")
@click.option("--force", is_flag=True, help="Replace a file that is there.")
def index(folders: tuple[Path, ...], title: str, out: Path | None, force: bool) -> None:
    """List patches in a Markdown table: what they erase, from what, how well.

    \b
    recare-patch index van-gogh-patch nudity-patch --out README.md

    The figures are those of each patch's evidence. `recare-patch search --markdown` lists those on the Hub.
    """
    if out is not None and out.exists() and not force:
        raise OutputError(f"{out} is there already; choose another --out or add --force")
    common.quiet_libraries()
    from recare_patch import share as sharing
    from recare_patch.core import write_text

    text = sharing.index_text([sharing.row_of_folder(common.short_patch(str(one))) for one in folders], title)
    if out is None:
        click.echo(text, nl=False)
    else:
        write_text(out, text)
        click.echo(f"Index: {out} ({len(folders)} patches)")
