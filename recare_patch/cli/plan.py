"""``recare-patch plan``: what a run will cost, before it is run."""

from __future__ import annotations

from typing import Any

import click

from recare_patch.cli import common
from recare_patch.recipe import OPTIMIZERS, PRECISIONS


@click.command()
@click.option(
    "--concept", metavar="TEXT", default="Van Gogh", show_default=True, help="What would be erased."
)
@click.option("--recipe", metavar="NAME|FILE|PATCH", help="Plan this recipe.")
@common.base_option
@click.option("--precision", metavar="NAME", help=f"{' | '.join(PRECISIONS)}, of the base.")
@click.option("--optimizer", metavar="NAME", help=f"{' | '.join(OPTIMIZERS)}.  [default: adamw8bit]")
@common.memory_options
@click.option(
    "--tflops",
    type=click.FloatRange(min=0, min_open=True),
    help="Speed that the device reaches, in 10^12 operations a second.  [default: guessed from --device]",
)
@common.device_option
@common.set_option
def plan(
    concept: str,
    recipe: str | None,
    base: str | None,
    precision: str | None,
    optimizer: str | None,
    vram: float | None,
    levers: dict[str, Any],
    tflops: float | None,
    device: str,
    assignments: tuple[str, ...],
) -> None:
    """Print the memory and time that an erasure is expected to take, stage by stage.

    \b
    recare-patch plan --base path/to/pipeline --vram 6
    recare-patch plan --recipe tench-sd-1.5 --checkpointing

    Evaluations are exact. Memory and time are estimates: tensors are added up on a model without values,
    and operations divided by the device's speed. No weights are read.
    """
    common.quiet_libraries()
    overrides = common.overrides_from(assignments, precision=precision, erase__optimizer=optimizer) | levers
    from recare_patch.erasure import planning, resolve_recipe
    from recare_patch.models import chosen_device

    # The kind changes words, not costs.
    made = resolve_recipe(
        "" if recipe else concept,
        kind=None if recipe else "object",
        recipe=recipe,
        base=base,
        overrides=overrides,
    )
    footprint = None
    if vram is not None:
        made, footprint = planning.choose(made, vram)
    place = chosen_device(device)
    speed = tflops * 1e12 if tflops is not None else planning.measured_speed(place, made.precision)
    found = planning.plan(made, speed=speed, footprint=footprint)
    click.echo(f"Base: {made.base}, {made.precision}")
    click.echo(f"Levers: {made.memory.in_words()}")
    rows = [("stage", "evaluations", "seconds", "peak GB")]
    rows += [_row(one.name, one.evaluations, one.seconds, one.peak) for one in found.stages]
    rows.append(_row("all", sum(one.evaluations for one in found.stages), found.seconds, found.peak))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
        click.echo("  ".join(cells))
    click.echo(f"Patch: {found.patch_bytes / 1e6:.2f} MB")
    source = (
        "as given" if tflops is not None else f"{planning.UTILIZATION:.0%} of a matrix product on {place}"
    )
    sure = "exact" if made.search.patience is None else "the most that there can be"
    click.echo(
        f"Evaluations are {sure}; memory and time are estimates, at {speed / 1e12:.3g} TFLOP/s ({source}). "
        "training.json will say what it was."
    )


def _row(name: str, evaluations: int, seconds: float, peak: int) -> tuple[str, str, str, str]:
    return name, f"{evaluations:,}", f"{seconds:,.0f}", f"{peak / 1e9:.2f}"
