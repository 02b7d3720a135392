"""``recare-patch push``, ``pull``, ``search`` and ``index``: patches on the Hub, and pages that list them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from click import IntRange, argument, command, echo

from recare_patch import cli
from recare_patch.cli import flag, option
from recare_patch.core import HubError, OutputError, write_text

if TYPE_CHECKING:
    from recare_patch.share import Found


@command()
@argument("folder", type=cli.FOLDER, metavar="PATCH")
@argument("repo", required=False, metavar="[OWNER/NAME]")
@flag("--public", "Let everybody see it.  [default: a private repo]")
@option(
    "--license ID",
    "As the Hub calls it, such as apache-2.0.  [default: the base's, where it is known]",
    into="license_id",
)
@flag("--new-card", "Write the card anew, in place of the one in the folder.")
@flag("--overwrite", "Take a repo that holds something else.")
@flag("--dry-run", "Show what would be sent; nothing is, and nobody is asked.")
def push(folder: Path, repo: str | None, dry_run: bool, **options: Any) -> None:
    """Send a patch to the Hub, with its card, evidence and a file for A1111 and ComfyUI.

    \b
    recare-patch push van-gogh-patch --dry-run
    recare-patch push van-gogh-patch
    recare-patch push van-gogh-patch OWNER/van-gogh --public

    The login is that of `hf auth login`. An upload that was interrupted goes on with the next call.
    """
    cli.quiet_libraries()
    from recare_patch import share
    from recare_patch.patch import yaml_text

    with cli.shown_progress() as progress:
        made = share.push(cli.short_patch(str(folder)), repo, dry_run=dry_run, progress=progress, **options)
    for note in made.notes:
        echo(f"Warning: {note}", err=True)
    seen = "private" if made.private else "public"
    if dry_run:
        echo(f"Would send to {made.repo} ({seen}):")
        for file in made.files:
            echo(f"  {file.name:<40}{file.bytes:>12,} bytes")
        echo(f"Left out: {', '.join(made.left_out) or 'nothing'}")
        echo(f"Front matter of the card:\n{yaml_text(made.front_matter)}")
        return
    for what, names in (
        ("Sent", made.sent),
        ("There already", made.unchanged),
        ("Removed", made.removed),
        ("Left out", made.left_out),
    ):
        if names:
            echo(f"{what}: {', '.join(names)}")
    echo(f"Patch: {made.url} ({seen}, commit {made.commit})")
    echo(f"Fetch it: recare-patch pull {made.repo}@{made.commit}")


@command()
@argument("repo", metavar="OWNER/NAME[@REVISION]")
@option("--out DIR", "The folder.  [default: NAME]", cli.FOLDER)
@option("--revision NAME", "Branch, tag or commit.  [default: the newest of main]")
@option("--base FOLDER|HUB-ID", "Refuse a patch that does not fit this base model.")
@cli.device_option
def pull(repo: str, out: Path | None, **options: Any) -> None:
    """Fetch a patch from the Hub, checked, into a new folder.

    \b
    recare-patch pull OWNER/van-gogh
    recare-patch pull OWNER/van-gogh@v2 --base atelier --out van-gogh-patch

    Only the files of a patch are taken: no pickles, no code. A fetch that was interrupted goes on with
    the next call. Some commands take `hub:OWNER/NAME` in place of a folder.
    """
    cli.quiet_libraries()
    from recare_patch import share

    with cli.shown_progress() as progress:
        got = share.pull(repo, out, progress=progress, **options)
    if got.left:
        echo(f"Not taken: {', '.join(got.left)}")
    if got.same_base is not None:
        told = "the very weights that it was made for" if got.same_base else "other weights"
        echo(f"Base: {told}.")
    state = "" if got.fresh else ", here already and unchanged"
    echo(f"Patch: {got.folder} ({len(got.files)} files of {got.repo} at {got.commit}{state})")


@command()
@argument("text", required=False)
@option("--base NAME|HUB-ID", "Made for this base model.")
@option("--concept TEXT", 'What is erased, such as "Van Gogh".')
@option("--tag TAG", "With this tag; repeatable.", into="tags", multiple=True)
@option("--owner NAME", "Of this user or organisation.")
@option("--limit", "", IntRange(1, 1000), 20)
@cli.json_option
@flag("--markdown", "Print an index in Markdown, for a collection's page.")
@option("--out FILE", "A page (.html) to write instead of printing.", cli.FOLDER)
@flag("--force", "Replace a file that is there.")
def search(text: str | None, as_json: bool, markdown: bool, out: Path | None, force: bool, **wanted: Any) -> None:
    """Find patches on the Hub; TEXT is looked for in their names.

    \b
    recare-patch search --concept "Van Gogh"
    recare-patch search --base stable-diffusion-v1-5/stable-diffusion-v1-5 --json

    Figures are those that the cards claim: `recare-patch verify` measures them again.
    """
    if as_json + markdown + (out is not None) > 1:
        raise HubError("--json, --markdown and --out are ways to show the same: give one")
    if out is not None:
        _check_page(out, force, (".html",))
    cli.quiet_libraries()
    from recare_patch import share

    found = share.search(text, **wanted)
    if out is not None:
        share.write_ledger(out, [share.found_row(one, share.endpoint()) for one in found], "Patches on the Hub")
        echo(f"Ledger: {out} ({len(found)} patches)")
    elif as_json:
        echo(json.dumps([asdict(one) for one in found], indent=2, ensure_ascii=False))
    elif markdown:
        rows = [share.row_of_found(one, share.endpoint()) for one in found]
        echo(share.index_text(rows, "Patches on the Hub"), nl=False)
    else:
        _table(found)


def _table(found: Sequence[Found]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if not found:
        echo("Nothing was found.")
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


@command()
@argument("folders", nargs=-1, required=True, type=cli.FOLDER, metavar="PATCH...")
@option("--title", "", None, "Patches")
@option("--out FILE", "Markdown, or a page that sorts itself (.html).  [default: print Markdown]", cli.FOLDER)
@flag("--force", "Replace a file that is there.")
@option("--eval-unlearn DIR", "Write one patch's run for eval-unlearn's leaderboard into this folder.", cli.FOLDER)
def index(folders: tuple[Path, ...], title: str, out: Path | None, force: bool, eval_unlearn: Path | None) -> None:
    """List patches: what they erase, from what, how well, and whether `verify` measured the same here.

    \b
    recare-patch index van-gogh-patch nudity-patch --out README.md
    recare-patch index my-patches --out ledger.html
    recare-patch index van-gogh-patch --eval-unlearn run

    A folder of patches stands for those in it. The figures are those of each patch's evidence. `recare-patch search
    --out ledger.html` lists those on the Hub.
    """
    if eval_unlearn is not None:
        _export(folders, eval_unlearn, out)
        return
    if out is not None:
        _check_page(out, force)
    cli.quiet_libraries()
    from recare_patch import share

    folders = tuple(share.patches_in([Path(cli.short_patch(str(one))) for one in folders]))
    if out is not None and out.suffix == ".html":
        share.write_ledger(out, [share.ledger_row(one, out) for one in folders], title)
        echo(f"Ledger: {out} ({len(folders)} patches)")
        return
    text = share.index_text([share.row_of_folder(cli.short_patch(str(one))) for one in folders], title)
    if out is None:
        echo(text, nl=False)
    else:
        write_text(out, text)
        echo(f"Index: {out} ({len(folders)} patches)")


def _check_page(out: Path, force: bool, endings: tuple[str, ...] = ()) -> None:
    """Refuse to write over a file, or one of another kind."""
    if endings and out.suffix not in endings:
        raise OutputError(f"cannot write {out}: a page is written as {' or '.join(endings)}")
    if out.exists() and not force:
        raise OutputError(f"{out} is there already; choose another --out or add --force")


def _export(folders: Sequence[Path], place: Path, out: Path | None) -> None:
    """One patch's run for eval-unlearn."""
    if len(folders) != 1 or out is not None:
        raise OutputError("--eval-unlearn writes the run of one patch, and no page: leave other patches and --out out")
    cli.quiet_libraries()
    from recare_patch import share

    patch = Path(cli.short_patch(str(folders[0])))
    written = share.write_free_run(patch, place)
    echo(f"Run: {', '.join(map(str, written))}")
    echo(f"Its pipeline: recare-patch merge --patch {patch} --out {place / 'model'}")
    echo(f"Then: eval-unlearn run --config {place / 'free_run.json'}")
