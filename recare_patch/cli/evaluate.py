"""``recare-patch evaluate``: what a patch removed, what it kept, and how sure that is."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

import click

from recare_patch.cli import common
from recare_patch.core import EvaluationError, unknown_name
from recare_patch.recipe import PRECISIONS, slug_of

if TYPE_CHECKING:
    from recare_patch.measure import Evidence

METRICS = (
    "concept-rate",
    "care-score",
    "neighbours",
    "clip-score",
    "kid",
    "fid",
    "perceptual-change",
    "memorization",
)
"""The metrics there are, repeated here because their home needs torch."""

CHECKS = ("fine-tuning", "personalisation", "samplers", "scales", "spellings")
"""The checks there are, repeated for the same reason."""


@click.command()
@click.option("--patch", required=True, metavar="DIR", help="The patch to evaluate.")
@common.base_option
@click.option(
    "--suite", metavar="NAME|FILE", help="Prompts and seeds.  [default: the concept's own, else the recipe's]"
)
@click.option(
    "--metric",
    "metrics",
    multiple=True,
    metavar="NAME",
    help=f"{' | '.join(METRICS)}; repeatable.  [default: all that need no training]",
)
@click.option(
    "--pictures", type=click.IntRange(1, 1_000_000), default=200, show_default=True, help="Of each figure."
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where evidence.json and report.html go.  [default: the patch's folder]",
)
@click.option(
    "--cache",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="FOLDER",
    help="Where pictures are kept, those of the erased concept too.  [default: the user's cache folder]",
)
@click.option("--no-cache", is_flag=True, help="Keep no pictures: a run that is stopped starts again.")
@click.option(
    "--prompts",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="One prompt a line, drawn once each, in place of the suite's retained prompts.",
)
@click.option(
    "--attacks",
    type=click.Path(path_type=Path, file_okay=False),
    multiple=True,
    metavar="FOLDER",
    help="Saved attacks to tell of; repeatable.  [default: PATCH-attacks, where it is there]",
)
@click.option(
    "--check",
    "checks",
    multiple=True,
    metavar="NAME",
    help=f"Away from its own setting: {' | '.join(CHECKS)} | all; repeatable.",
)
@click.option(
    "--check-pictures",
    type=click.IntRange(1, 100_000),
    default=24,
    show_default=True,
    help="Behind each value of a check.",
)
@common.concept_option
@click.option("--card", is_flag=True, help="Write the figures into the patch's card as well.")
@click.option(
    "--detector",
    metavar="NAME[:FOLDER]",
    help="Who judges the pictures, with its weights where it takes any.  [default: as the suite]",
)
@click.option("--label", metavar="TEXT", help="What the detector calls the concept.  [default: as the suite]")
@common.clip_option
@click.option("--seed", type=click.IntRange(min=0), help="First seed.  [default: the suite's]")
@click.option("--precision", metavar="NAME", help=f"{' | '.join(PRECISIONS)}.  [default: the recipe's]")
@click.option(
    "--batch-size", type=click.IntRange(1, 1024), help="Pictures drawn together.  [default: by the base]"
)
@common.device_option
def evaluate(
    patch: str,
    base: str | None,
    suite: str | None,
    metrics: tuple[str, ...],
    pictures: int,
    out: Path | None,
    cache: Path | None,
    no_cache: bool,
    prompts: Path | None,
    attacks: tuple[Path, ...],
    checks: tuple[str, ...],
    check_pictures: int,
    concept: str | None,
    card: bool,
    detector: str | None,
    label: str | None,
    clip: str | None,
    seed: int | None,
    precision: str | None,
    batch_size: int | None,
    device: str,
) -> None:
    """Score a patch beside its base on the same seeds, and write evidence.json and report.html.

    \b
    recare-patch evaluate --patch van-gogh-patch --card
    recare-patch evaluate --patch van-gogh-patch --metric clip-score --metric fid --prompts coco.txt
    accelerate launch --multi_gpu --num_processes 8 -m recare_patch evaluate --patch van-gogh-patch

    Pictures are drawn once: a run that was stopped goes on where it was, and a second one draws
    nothing.
    """
    for name in metrics:
        if name not in METRICS:
            raise unknown_name("metric", name, METRICS)
    for name in checks:
        if name.strip().casefold() not in (*CHECKS, "all"):
            raise unknown_name("check", name, (*CHECKS, "all"))
    if precision is not None and precision not in PRECISIONS:
        raise unknown_name("precision", precision, PRECISIONS)
    if no_cache and cache is not None:
        raise EvaluationError("--no-cache and --cache exclude each other")
    from recare_patch.measure import run as evaluating

    first = evaluating.is_first_process()
    folder = out if out is not None else Path(patch) if Path(patch).is_dir() else Path(patch).parent
    several = common.several_concepts(patch)
    # A suite that is named is for one of several concepts, and says itself for which.
    for one in several if several and concept is None and suite is None else (concept,):
        # Of several processes one speaks; all draw.
        with common.shown_progress() if first else contextlib.nullcontext() as progress:
            evidence = evaluating.evaluate(
                patch,
                base=base,
                suite=suite,
                concept=one,
                metrics=metrics or None,
                pictures=pictures,
                out=out,
                cache=False if no_cache else cache,
                detector=detector,
                label=label,
                clip=clip,
                prompts_file=prompts,
                attacks=attacks or None,
                checks=checks,
                check_pictures=check_pictures,
                card=card,
                precision=precision,
                batch_size=batch_size,
                seed=seed,
                device=device,
                progress=progress,
            )
        if first:
            if several:
                click.echo(f"{evidence.concept}:")
            _report(evidence, folder / slug_of(evidence.concept) if several else folder, card)


def _report(evidence: Evidence, folder: Path, card: bool) -> None:
    rows = [("figure", "base", "patched", "95 % interval", "pictures")]
    rows += [
        (
            one.name,
            one.show(one.base),
            one.show(one.patched),
            one.show_interval(one.interval) or "–",
            f"{one.pictures:,}",
        )
        for one in evidence.figures
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        click.echo("  ".join(cells))
    for one in evidence.attacks:
        click.echo(f"{one.attack}: {one.successes} of {one.trials} ({one.show_interval()})")
    drawn, found = evidence.cost.get("pictures_drawn"), evidence.cost.get("pictures_from_cache")
    click.echo(f"Pictures: {drawn:,} drawn, {found:,} from the cache, {evidence.cost['seconds']:,.0f} s")
    click.echo(f"Evidence: {folder / 'evidence.json'}")
    click.echo(f"Report: {folder / 'report.html'}")
    if card:
        click.echo("The figures are in the patch's card.")
