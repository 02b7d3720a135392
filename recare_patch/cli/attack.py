"""``recare-patch attack``: try to get the erased concept back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from recare_patch.cli import common
from recare_patch.core import PatchError, RecipeError, nearest, unknown_name
from recare_patch.recipe import slug_of

if TYPE_CHECKING:
    from recare_patch.measure import AttackOptions, AttackResult

ATTACKS = ("concept-inversion", "p4d", "ring-a-bell", "unlearn-diff-atk")
"""The registered attacks, repeated here because their registry lies among what needs torch."""

BUDGETS = ("small", "published")


@click.command()
@click.option("--patch", required=True, metavar="DIR", help="The patch to attack.")
@click.option(
    "--attack", "attacks", multiple=True, metavar="NAME", help=f"{' | '.join(ATTACKS)}; repeatable."
)
@click.option(
    "--budget",
    default="small",
    show_default=True,
    metavar="NAME",
    help="small (minutes on a CPU) or published (as in each attack's paper).",
)
@click.option("--vectors", type=int, help="Word vectors that concept-inversion learns.  [default: 1]")
@click.option("--steps", type=int, help="Steps of concept-inversion or p4d.")
@click.option("--pictures", type=int, help="Trials: pictures that are judged, or prompts that are attacked.")
@click.option(
    "--set",
    "assignments",
    multiple=True,
    metavar="KEY=VALUE",
    help="Set any option of the chosen attacks, such as learning_rate=0.01; repeatable.",
)
@click.option(
    "--detector", metavar="NAME", help="Who judges the pictures.  [default: as the concept's suite]"
)
@click.option("--label", metavar="TEXT", help="What the detector calls the concept.  [default: as the suite]")
@click.option("--replay", metavar="DIR", help="Try what this saved attack found, on another patch.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="A folder of its own in it for each attack.  [default: PATCH-attacks, beside it]",
)
@click.option("--resume", is_flag=True, help="Go on with the run in --out that was interrupted.")
@click.option("--base", metavar="FOLDER|HUB-ID", help="The base model.  [default: the patch's]")
@common.concept_option
@common.device_option
def attack(
    patch: str,
    attacks: tuple[str, ...],
    budget: str,
    vectors: int | None,
    steps: int | None,
    pictures: int | None,
    assignments: tuple[str, ...],
    detector: str | None,
    label: str | None,
    replay: str | None,
    seed: int,
    out: Path | None,
    resume: bool,
    base: str | None,
    concept: str | None,
    device: str,
) -> None:
    """Attack a patch: how often does the erased concept come back?

    \b
    recare-patch attack --patch van-gogh-patch --attack concept-inversion
    recare-patch attack --patch van-gogh-patch --attack concept-inversion --vectors 4 --steps 3000
    recare-patch attack --patch b-patch --replay a-patch-attacks/unlearn-diff-atk
    """
    for name in attacks:
        if name not in ATTACKS:
            raise unknown_name("attack", name, ATTACKS)
    if budget not in BUDGETS:
        raise unknown_name("budget", budget, BUDGETS)
    overrides = common.overrides_from(assignments, vectors=vectors, steps=steps, pictures=pictures)
    if not attacks and replay is None:
        raise RecipeError(f"no attack was named: give --attack NAME ({', '.join(ATTACKS)}) or --replay DIR")
    if replay is not None and (len(attacks) > 1 or overrides):
        raise RecipeError("a replay takes its attack and options from the saved one: leave those out")
    if not Path(patch).exists():
        raise PatchError(f"there is no patch at {patch}")
    # "." and ".." have no name to write another beside.
    source = Path(patch) if Path(patch).name not in ("", "..") else Path(patch).resolve()
    # Beside the patch, where `evaluate` and `verify` look for them.
    folder = out if out is not None else source.with_name(f"{source.name}-attacks")
    shared: dict[str, Any] = {
        "base": base,
        "budget": budget,
        "detector": detector,
        "label": label,
        "seed": seed,
        "resume": resume,
        "device": device,
    }
    from recare_patch.measure.attacks import run as attacking

    several = common.several_concepts(patch)
    if several and replay is not None and concept is None:
        concept = attacking.replayed_concept(replay)
    with common.shown_progress() as progress:
        shared["progress"] = progress
        found = []
        for chosen in several if several and concept is None else (concept,):
            place = folder / slug_of(chosen) if several and chosen is not None else folder
            if replay is not None:
                given = attacks[0] if attacks else None
                result = attacking.attack_patch(
                    patch, given, replay=replay, concept=chosen, out=place / "replay", **shared
                )
                found.append((result.attack, chosen, result, place / "replay"))
            else:
                options = _options(attacks, budget, overrides)
                found += [
                    (name, chosen, result, place / name)
                    for name, result in attacking.run_attacks(
                        patch, options, concept=chosen, out=place, **shared
                    )
                ]
    for name, chosen, result, place in found:
        _report(f"{chosen}, {name}" if several else name, result, place)


def _options(attacks: Sequence[str], budget: str, overrides: Mapping[str, Any]) -> dict[str, AttackOptions]:
    """The options of each attack; a key goes to those that have it.

    Raises:
        RecipeError: no chosen attack has a key.
    """
    from recare_patch.measure import attack_options

    plain = {name: attack_options(name, budget) for name in dict.fromkeys(attacks)}
    known = {name: set(type(options).model_fields) for name, options in plain.items()}
    every = sorted(set().union(*known.values()))
    for key in overrides:
        if key not in every:
            guess = nearest(key, every)
            hint = f", did you mean '{guess}'?" if guess else f" (keys are {', '.join(every)})"
            raise RecipeError(f"{key} is not an option of {' or '.join(plain)}{hint}")
    return {
        name: attack_options(name, budget, {k: v for k, v in overrides.items() if k in known[name]})
        for name in plain
    }


def _report(name: str, result: AttackResult, folder: Path) -> None:
    low, high = result.interval
    click.echo(
        f"{name}: the concept came back in {result.successes} of {result.trials} ({result.rate:.0%}, 95 % "
        f"interval {low:.0%} to {high:.0%}), without the attack in {result.without}; "
        f"{result.evaluations:,} denoiser evaluations, {result.seconds:.0f} s"
    )
    click.echo(f"Saved: {folder}")
