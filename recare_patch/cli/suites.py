"""``recare-patch suites``: prompts that patches are judged by."""

from __future__ import annotations

from click import argument, echo, group

from recare_patch import cli


@group()
def suites() -> None:
    """List the suites, and fetch prompt files of public repositories."""


@suites.command(name="list")
def list_() -> None:
    """List the bundled suites, and the prompt files that can be fetched."""
    from recare_patch.measure import list_suites, published

    echo("Bundled:")
    for name in list_suites():
        echo(f"  {name}")
    echo("Prompt files of public repositories, fetched by a pinned commit:")
    rows = [("  name", "repository", "licence", "rows", "here")]
    for one in published().values():
        count = f"{one.rows:,}" if one.rows else "–"
        rows.append((f"  {one.name}", one.repository, one.licence, count, "yes" if one.file.is_file() else "no"))
    cli.echo_table(rows, left=3)


@suites.command()
@argument("names", metavar="NAME...", nargs=-1, required=True)
def fetch(names: tuple[str, ...]) -> None:
    """Fetch prompt files from their own repositories, to be named by `evaluate --suite`.

    \b
    recare-patch suites fetch unlearndiffatk/vangogh
    recare-patch evaluate --patch van-gogh-patch --suite unlearndiffatk/vangogh

    Each comes from a pinned commit, and is checked against its SHA-256: a pinned one, or else that of the file which
    came first. RECARE_PATCH_SUITES_URL names a mirror of raw.githubusercontent.com.
    """
    from recare_patch.measure import fetch_suite

    for name in names:
        one = fetch_suite(name)
        echo(f"{one.name}: {one.file} ({one.repository}, {one.licence}{f'; {one.note}' if one.note else ''})")
