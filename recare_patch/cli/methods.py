"""``recare-patch methods``: what there is to erase with, and what each is good for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import click

from recare_patch.core import unknown_name
from recare_patch.recipe import METHODS, MethodInfo, measured, method_info


@click.command()
@click.argument("name", required=False, metavar="[NAME]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def methods(name: str | None, as_json: bool) -> None:
    """List the erasing methods: what they touch, cost, and are good and bad at.

    Figures are of the bundled base, where they were measured.
    """
    if name is not None and name.casefold() not in METHODS:
        raise unknown_name("method", name, METHODS)
    chosen = {key: method_info(key) for key in (METHODS if name is None else [name.casefold()])}
    figures = measured()
    if as_json:
        facts = {key: {**info.as_data(key), "measured": figures.get(key, {})} for key, info in chosen.items()}
        click.echo(json.dumps(facts, indent=2, ensure_ascii=False))
        return
    for number, (key, info) in enumerate(chosen.items()):
        if number:
            click.echo()
        _tell(key, info, figures.get(key, {}))


def _tell(name: str, info: MethodInfo, figures: Mapping[str, Mapping[str, Any]]) -> None:
    click.echo(f"{name}  ({info.title}; {info.paper.short})")
    click.echo(f"  {info.what}")
    rows = [
        ("touches", info.touches),
        ("reads", info.reads),
        ("strength", info.strength),
        ("weakness", info.weakness),
        ("--replace-with", info.replaces or "no"),
        ("--from", info.separates or "no"),
        ("--continue-from", "yes" if info.continues else "no"),
    ]
    rows += [(f"on {concept}", _measured(one)) for concept, one in figures.items()]
    width = max(len(label) for label, _ in rows)
    for label, text in rows:
        click.echo(f"  {label.ljust(width)}  {text}")


def _measured(figures: Mapping[str, Any]) -> str:
    """One concept's figures in a line."""
    forms = (
        ("shown", "{:.0%} still shown"),
        ("care", "companions kept {:.0%}"),
        ("kept", "styles and objects kept {:.0%}"),
        ("recovered", "concept inversion brings back {:.0%}"),
        ("UnlearnDiffAtk", "UnlearnDiffAtk {:.0%}"),
        ("seconds", "{:.0f} s"),
        ("evaluations", "{:,} evaluations"),
    )
    told = [form.format(figures[key]) for key, form in forms if figures.get(key) is not None]
    if figures.get("bytes") is not None:
        told.append(f"{figures['bytes'] / 1e3:.0f} kB")
    return ", ".join(told)
