"""``recare-patch pull``: a patch from the Hub."""

from __future__ import annotations

from pathlib import Path

import click

from recare_patch.cli import common


@click.command()
@click.argument("repo", metavar="OWNER/NAME[@REVISION]")
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR", help="The folder.  [default: NAME]")
@click.option("--revision", metavar="NAME", help="Branch, tag or commit.  [default: the newest of main]")
@click.option("--base", metavar="FOLDER|HUB-ID", help="Refuse a patch that does not fit this base model.")
@common.device_option
def pull(repo: str, out: Path | None, revision: str | None, base: str | None, device: str) -> None:
    """Fetch a patch from the Hub, checked, into a new folder.

    \b
    recare-patch pull OWNER/van-gogh
    recare-patch pull OWNER/van-gogh@v2 --base atelier --out van-gogh-patch

    Only the files of a patch are taken: no pickles, no code. A fetch that was interrupted goes on with
    the next call. Some commands take `hub:OWNER/NAME` in place of a folder.
    """
    common.quiet_libraries()
    from recare_patch import share as sharing

    with common.shown_progress() as progress:
        got = sharing.pull(repo, out, revision=revision, base=base, device=device, progress=progress)
    if got.left:
        click.echo(f"Not taken: {', '.join(got.left)}")
    if got.same_base is not None:
        click.echo(
            "Base: the very weights that it was made for." if got.same_base else "Base: other weights."
        )
    state = "" if got.fresh else ", here already and unchanged"
    click.echo(f"Patch: {got.folder} ({len(got.files)} files of {got.repo} at {got.commit}{state})")
