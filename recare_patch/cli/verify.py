"""``recare-patch verify``: is a patch what it says, and are its figures true?"""

from __future__ import annotations

import json
from pathlib import Path

import click

from recare_patch.cli import common

_WORDS = {True: "ok", False: "FAIL", None: "-"}


@click.command()
@click.argument("patch", metavar="PATCH", type=click.Path(path_type=Path))
@common.base_option
@common.concept_option
@click.option(
    "--figures",
    "figures",
    multiple=True,
    metavar="all|none|NAME",
    help="Figures to measure again, by name; repeatable. none: integrity alone.  [default: all]",
)
@click.option(
    "--pictures",
    type=click.IntRange(1, 1_000_000),
    help="Pictures a figure.  [default: as many as were recorded]",
)
@click.option(
    "--tolerance",
    type=click.FloatRange(0, 1),
    help="Share by which a figure without an interval may differ.  [default: 0.05]",
)
@common.clip_option
@click.option(
    "--cache",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="FOLDER",
    help="Keep drawn pictures here, and use those that are there already.  [default: draw all anew]",
)
@common.device_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def verify(
    ctx: click.Context,
    patch: Path,
    base: str | None,
    concept: str | None,
    figures: tuple[str, ...],
    pictures: int | None,
    tolerance: float | None,
    clip: str | None,
    cache: Path | None,
    device: str,
    as_json: bool,
) -> None:
    """Check a patch, its records and its card, then measure its figures again.

    \b
    recare-patch verify van-gogh-patch
    recare-patch verify van-gogh-patch --figures none
    recare-patch verify van-gogh-patch --figures "concept, plain prompts" --pictures 50

    The exit code is 0 where everything holds, 1 where something does not, 2 on bad input.
    """
    from recare_patch.measure import verify as verifying

    with common.shown_progress() as progress:
        found = verifying.verify(
            patch,
            base,
            concept=concept,
            figures=figures or ("all",),
            pictures=pictures,
            tolerance=verifying.TOLERANCE if tolerance is None else tolerance,
            clip=clip,
            cache=cache,
            device=device,
            progress=progress,
        )
    if as_json:
        findings = [{"about": one.about, "holds": one.holds, "told": one.told} for one in found.findings]
        click.echo(json.dumps({"holds": found.holds, "findings": findings}, indent=2, ensure_ascii=False))
    else:
        for one in found.findings:
            click.echo(f"{_WORDS[one.holds]:<6}{one.about}: {one.told}")
        checked = [one for one in found.findings if one.holds is not None]
        if found.holds:
            click.echo(f"{patch} holds: {len(checked)} checked.")
        else:
            click.echo(f"{patch} does not hold: {len(found.failed)} of {len(checked)} failed.")
    ctx.exit(0 if found.holds else 1)
