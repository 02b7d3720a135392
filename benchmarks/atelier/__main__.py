"""``python -m benchmarks.atelier``: train and sample Atelier, the base model bundled with the package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from recare_patch import cli
from recare_patch.core import unknown_name


@click.group()
def atelier() -> None:
    """Train and sample Atelier, the small base model bundled with this package."""


@atelier.command()
@click.option("--xl", "variant", flag_value="xl", help="Atelier XL instead: SDXL's anatomy on the same scenes.")
@click.option("--flow", "variant", flag_value="flow", help="Atelier Flow instead: FLUX's anatomy on the same scenes.")
@click.option(
    "--fine-tune", "fine_tunes", is_flag=True, help="Two variants of the bundled Atelier instead: a style, a subject."
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="[default: atelier-weights; else atelier-xl, atelier-flow or atelier-tuned]",
)
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    default=Path("atelier-work"),
    show_default=True,
    help="Scenes and checkpoints; an interrupted training goes on from here.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--stage", "stages", multiple=True, metavar="NAME", help="Only this stage; repeatable.")
@click.option("--device", default="cpu", show_default=True)
# Long for its arguments and the three worlds' lists.
def train(
    variant: str | None, fine_tunes: bool, out: Path | None, work: Path, seed: int, stages: tuple[str, ...], device: str
) -> None:
    """Train Atelier from nothing: scenes, CLIP, autoencoder, judge, denoiser. Resumable.

    Atelier XL and Atelier Flow take autoencoder, judge and first text encoder from the bundled Atelier, and train
    a second encoder and the denoiser. `recare-patch erase --recipe van-gogh-atelier-xl` erases on the former.
    The variants go on from the bundled denoiser: `recare-patch evaluate --patch van-gogh-patch --on` measures on them.
    """
    from benchmarks.atelier import training, training_flow, training_xl

    if fine_tunes:
        if variant or stages or seed:
            raise click.UsageError(
                "--fine-tune trains from the bundled Atelier alone: leave --xl, --flow, --stage and --seed out"
            )
        _fine_tune(out or Path("atelier-tuned"), work, device)
        return
    trainer, name, config = {
        None: (training, "atelier-weights", training.AtelierTraining(seed=seed)),
        "xl": (training_xl, "atelier-xl", training_xl.XLTraining(seed=seed)),
        "flow": (training_flow, "atelier-flow", training_flow.FlowTraining(seed=seed)),
    }[variant]
    known: tuple[str, ...] = trainer.STAGES
    for stage in stages:
        if stage not in known:
            raise unknown_name("stage", stage, known)
    out = out or Path(name)
    run: Any = trainer.train
    with cli.shown_progress() as progress:
        seconds = run(
            out,
            work,
            config,
            stages=stages or known,
            device=device,
            progress=lambda stage, done, total, loss: progress.update(stage, done, total, f"loss {loss:.4f}"),
        )
    for stage, spent in seconds.items():
        click.echo(f"{stage}: {spent:.0f} s")
    click.echo(f"{name}: {out}")
    if "export" in seconds:
        _report(out / "pipeline", out / "judge" / "judge.safetensors", out / "report", device, 300, variant == "flow")


def _fine_tune(out: Path, work: Path, device: str) -> None:
    """Both variants, each in a folder of its own."""
    from benchmarks.atelier.fine_tuning import FINE_TUNES, fine_tune

    cli.quiet_libraries()
    with cli.shown_progress() as progress:
        for name in FINE_TUNES:

            def tell(stage: str, done: int, total: int, loss: float, name: str = name) -> None:
                progress.update(f"{name}, {stage}", done, total, f"loss {loss:.4f}")

            fine_tune(name, out / name, work / name, device=device, progress=tell)
            click.echo(f"{name}: {out / name}")


@atelier.command()
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("atelier-report"),
    show_default=True,
    help="Folder for atelier.md and its sheets.",
)
@click.option("--count", type=click.IntRange(1, 100_000), default=300, show_default=True, help="Captions drawn.")
@cli.device_option
def report(out: Path, count: int, device: str) -> None:
    """Measure the bundled base by its judge, on captions it never saw, and draw sheets."""
    from recare_patch.models.atelier import JUDGE

    _report("atelier", JUDGE, out, device, count)


def _report(source: str | Path, judge: Path, out: Path, device: str, count: int, flow: bool = False) -> None:
    from benchmarks.atelier.report import write_rates, write_report
    from recare_patch.models import load_base
    from recare_patch.models.atelier.judge import Judge

    cli.quiet_libraries()
    with cli.shown_progress() as progress:
        base = load_base(str(source), device=device)
        rates = (
            write_rates(base, out, guidance_scale=3.5, count=count, progress=progress)
            if flow
            else write_report(base, out, judge=Judge.load(judge), count=count, progress=progress)
        )
    for name in ("style", "object", "sky", "ground", "time"):
        if name in rates:
            click.echo(f"{name}: {rates[name].value:.1%} of {rates[name].pictures}")
    click.echo(f"Report: {out}")


@atelier.command()
@click.option("--prompt", "prompts", multiple=True, metavar="TEXT", help="Repeatable.  [default: a few]")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the first picture.")
@click.option("--count", type=click.IntRange(1, 64), default=6, show_default=True, help="Pictures of each prompt.")
@click.option("--steps", type=click.IntRange(1, 1000), default=20, show_default=True)
@click.option("--guidance-scale", type=click.FloatRange(0, 100), default=5.0, show_default=True)
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("atelier.png"), show_default=True, help="The sheet."
)
@cli.device_option
def sample(
    prompts: tuple[str, ...], seed: int, count: int, steps: int, guidance_scale: float, out: Path, device: str
) -> None:
    """Draw a sheet of pictures with Atelier."""
    from recare_patch.cli.patch import save_pairs
    from recare_patch.patch import generate_pictures

    chosen = list(prompts) or [
        "A painting in the style of Van Gogh",
        "A painting of a house in the style of Monet",
        "A photo of a tench",
        "A photo of a person on a beach",
        "A pencil sketch of a cat",
    ]
    seeds = list(range(seed, seed + count))
    with cli.shown_progress() as progress:
        pairs = generate_pictures(
            "atelier", [], chosen, seeds, steps=steps, guidance_scale=guidance_scale, device=device, progress=progress
        )
    save_pairs(pairs, out, title="Atelier", patched=False)
    click.echo(f"Sheet: {out}")


if __name__ == "__main__":
    atelier()
