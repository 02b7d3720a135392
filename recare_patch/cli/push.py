"""``recare-patch push``: a patch onto the Hub."""

from __future__ import annotations

from pathlib import Path

import click

from recare_patch.cli import common


@click.command()
@click.argument("folder", type=click.Path(path_type=Path), metavar="PATCH")
@click.argument("repo", required=False, metavar="[OWNER/NAME]")
@click.option("--public", is_flag=True, help="Let everybody see it.  [default: a private repo]")
@click.option(
    "--license",
    "license_id",
    metavar="ID",
    help="As the Hub calls it, such as apache-2.0.  [default: the base's, where it is known]",
)
@click.option("--new-card", is_flag=True, help="Write the card anew, in place of the one in the folder.")
@click.option("--overwrite", is_flag=True, help="Take a repo that holds something else.")
@click.option("--dry-run", is_flag=True, help="Show what would be sent; nothing is, and nobody is asked.")
def push(
    folder: Path,
    repo: str | None,
    public: bool,
    license_id: str | None,
    new_card: bool,
    overwrite: bool,
    dry_run: bool,
) -> None:
    """Send a patch to the Hub, with its card, evidence and a file for A1111 and ComfyUI.

    \b
    recare-patch push van-gogh-patch --dry-run
    recare-patch push van-gogh-patch
    recare-patch push van-gogh-patch OWNER/van-gogh --public

    The login is that of `hf auth login`. An upload that was interrupted goes on with the next call.
    """
    common.quiet_libraries()
    from recare_patch import share as sharing
    from recare_patch.patch import yaml_text

    with common.shown_progress() as progress:
        made = sharing.push(
            common.short_patch(str(folder)),
            repo,
            public=public,
            license_id=license_id,
            new_card=new_card,
            overwrite=overwrite,
            dry_run=dry_run,
            progress=progress,
        )
    for note in made.notes:
        click.echo(f"Warning: {note}", err=True)
    if dry_run:
        seen = "private" if made.private else "public"
        click.echo(f"Would send to {made.repo} ({seen}):")
        for file in made.files:
            click.echo(f"  {file.name:<40}{file.bytes:>12,} bytes")
        click.echo(f"Left out: {', '.join(made.left_out) or 'nothing'}")
        click.echo(f"Front matter of the card:\n{yaml_text(made.front_matter)}")
        return
    if made.sent:
        click.echo(f"Sent: {', '.join(made.sent)}")
    if made.unchanged:
        click.echo(f"There already: {', '.join(made.unchanged)}")
    if made.removed:
        click.echo(f"Removed: {', '.join(made.removed)}")
    if made.left_out:
        click.echo(f"Left out: {', '.join(made.left_out)}")
    click.echo(f"Patch: {made.url} ({'private' if made.private else 'public'}, commit {made.commit})")
    click.echo(f"Fetch it: recare-patch pull {made.repo}@{made.commit}")
