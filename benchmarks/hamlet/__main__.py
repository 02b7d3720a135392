"""``python -m benchmarks.hamlet``: train, measure and sample Hamlet, a base that nothing was tuned on."""

from __future__ import annotations

from pathlib import Path

import click

from benchmarks.hamlet import WEIGHTS
from recare_patch import cli
from recare_patch.core import unknown_name


@click.group()
def hamlet() -> None:
    """Train and measure Hamlet: natural captions, an ordinary vocabulary, scenes that Atelier has not."""


@hamlet.command()
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("hamlet-weights"), show_default=True, help="The base."
)
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    default=Path("hamlet-work"),
    show_default=True,
    help="Scenes and checkpoints; an interrupted training goes on from here.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--stage", "stages", multiple=True, metavar="NAME", help="Only this stage; repeatable.")
@click.option("--device", default="cpu", show_default=True)
def train(out: Path, work: Path, seed: int, stages: tuple[str, ...], device: str) -> None:
    """Train Hamlet: scenes, tokenizer, judge, CLIP, denoiser; the autoencoder is Atelier's. Resumable."""
    from benchmarks.hamlet import training

    for stage in stages:
        if stage not in training.STAGES:
            raise unknown_name("stage", stage, training.STAGES)
    with cli.shown_progress() as progress:
        seconds = training.train(
            out,
            work,
            training.HamletTraining(seed=seed),
            stages=stages or training.STAGES,
            device=device,
            progress=lambda stage, done, total, loss: progress.update(stage, done, total, f"loss {loss:.4f}"),
        )
    for stage, spent in seconds.items():
        click.echo(f"{stage}: {spent:.0f} s")
    click.echo(f"Hamlet: {out}")


@hamlet.command()
@click.option("--weights", type=click.Path(path_type=Path), default=WEIGHTS, help="[default: those of the checkout]")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("hamlet-report"),
    show_default=True,
    help="Folder for hamlet.md and its sheets.",
)
@click.option("--count", type=click.IntRange(1, 100_000), default=300, show_default=True, help="Captions drawn.")
@cli.device_option
def report(weights: Path, out: Path, count: int, device: str) -> None:
    """Measure the base by its judge, on captions it never saw, and draw sheets."""
    from benchmarks.hamlet.report import load_judge, write_report
    from recare_patch.models import load_base

    cli.quiet_libraries()
    with cli.shown_progress() as progress:
        base = load_base(str(weights / "pipeline"), device=device)
        rates = write_report(base, load_judge(weights), out, count=count, progress=progress)
    for name in ("style", "object", "sky", "ground", "time"):
        if name in rates:
            click.echo(f"{name}: {rates[name].value:.1%} of {rates[name].pictures}")
    click.echo(f"Report: {out / 'hamlet.md'}")


if __name__ == "__main__":
    hamlet()
