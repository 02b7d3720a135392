"""``recare-patch atelier``: the bundled base model."""

from __future__ import annotations

import click

from recare_patch.core import BaseModelError


@click.group()
def atelier() -> None:
    """Show what Atelier is, the small base model bundled with this package."""


@atelier.command()
def info() -> None:
    """Show what the bundled base model is, what it can draw, and what co-occurs in it."""
    from recare_patch.models.atelier import info as describe

    facts = describe()
    if not facts.parameters:
        raise BaseModelError(
            "the bundled base model has no weights yet: make them with `python -m benchmarks.atelier train` "
            "in a checkout"
        )
    click.echo(
        "Atelier: Stable Diffusion's anatomy, small: 64-pixel pictures, trained on scenes drawn by code"
    )
    click.echo(f"pipeline: {facts.folder}")
    click.echo(f"size: {facts.megabytes:.1f} MB in all")
    for part, count in facts.parameters.items():
        click.echo(f"  {part:<24}{count / 1e6:7.2f} M parameters")
    click.echo("draws:")
    for group, names in facts.concepts.items():
        click.echo(f"  {group:<10}{', '.join(names)}")
    click.echo("co-occurrence, P(companion | concept):")
    for concept, companions in facts.co_occurrence.items():
        click.echo(f"  {concept:<10}{', '.join(f'{word} {share:.2f}' for word, share in companions.items())}")
    click.echo(f'In diffusers: StableDiffusionPipeline.from_pretrained("{facts.folder}")')
