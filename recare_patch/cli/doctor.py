"""``recare-patch doctor``: a rehearsal of an erasure on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from click import Context, command, echo, pass_context

from recare_patch import cli
from recare_patch.cli import option
from recare_patch.core import OutputError, write_text
from recare_patch.recipe import KINDS, PRESETS

if TYPE_CHECKING:
    from recare_patch.erasure import Diagnosis


@command()
@option("--concept TEXT", "What would be erased.  [default: Van Gogh, or the recipe's]")
@option("--kind KIND", " | ".join(KINDS))
@cli.base_option
@cli.clip_option
@option("--recipe NAME|FILE|PATCH", "Rehearse this recipe.")
@option("--preset NAME", f"Options that belong together: {' | '.join(PRESETS)}.")
@cli.recipe_option("method", "--method", help="see `recare-patch methods`")
@cli.recipe_option("precision", "--precision", "")
@cli.recipe_option("erase.optimizer", "--optimizer")
@cli.memory_options
@cli.device_option
@cli.set_option()
@option("--report FILE", "Write the report here too, as Markdown.", cli.FOLDER)
@cli.json_option
@pass_context
def doctor(
    ctx: Context,
    /,
    concept: str | None,
    recipe: str | None,
    assignments: tuple[str, ...],
    report: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Rehearse an erasure: load all of it, take one step of every stage, and tell whether it will work.

    \b
    recare-patch doctor --base stable-diffusion-v1-5/stable-diffusion-v1-5
    recare-patch doctor --recipe nudity-sdxl --vram 12 --report doctor.md

    About two minutes on a card. Nothing is left behind, and the report is what a bug report should contain. The
    exit code is 0 where an erasure is ready to run, 1 where it is not, 2 on bad input.
    """
    overrides = cli.overrides_from(assignments)
    if report is not None and report.exists():
        raise OutputError(f"{report} is there already; choose another --report")
    from recare_patch.erasure import rehearse

    text = concept if concept is not None else "" if recipe else "Van Gogh"
    with cli.shown_progress() as progress:
        found = rehearse(text, recipe=recipe, overrides=overrides, progress=progress, **options)
    told = in_words(found)
    if report is not None:
        write_text(report, f"```text\n{told}\n```\n\nThe recipe:\n\n```yaml\n{found.recipe}```\n")
    echo(json.dumps(found.as_data(), indent=2, ensure_ascii=False) if as_json else told)
    ctx.exit(0 if found.ready else 1)


def in_words(found: Diagnosis) -> str:
    """A diagnosis as text: checks, figures by stage, versions, verdict."""
    lines = [f"{one.state:<8}{one.name}: {one.told}" for one in found.checks]
    if found.stages:
        rows = [("stage", "evaluations", "seconds", "GB planned", "GB measured")]
        for one in found.stages:
            seconds = "" if one.seconds is None else f"{one.seconds:,.0f}"
            measured = "" if one.measured is None else f"{one.measured / 1e9:.2f}"
            rows.append((one.name, f"{one.evaluations:,}", seconds, f"{one.planned / 1e9:.2f}", measured))
        lines += ["", *cli.table_lines(rows)]
    lines += ["", ", ".join(f"{name} {version}" for name, version in found.versions.items()), ""]
    if found.ready:
        return "\n".join([*lines, "Ready. Run:", f"  {found.command}"])
    return "\n".join([*lines, "Not ready: mend what FAILED above, and try again."])
