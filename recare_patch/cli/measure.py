"""``recare-patch evaluate``, ``attack`` and ``verify``: what a patch removed, and what it kept."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from click import Context, FloatRange, IntRange, argument, command, echo, pass_context

from recare_patch import cli
from recare_patch.cli import flag, option
from recare_patch.core import EvaluationError, PatchError, RecipeError, nearest, unknown_name
from recare_patch.recipe import slug_of

if TYPE_CHECKING:
    from recare_patch.measure import AttackOptions, AttackResult, Evidence
    from recare_patch.measure.integrity import Findings

_FOLDER = cli.FilePath(path_type=Path, file_okay=False)

_MOST_CLAIMS = 8

label_option = option("--label TEXT", "What the detector calls the concept.  [default: as the suite]")


@command()
@option("--patch DIR", "The patch to evaluate.", required=True)
@cli.base_option
@option(
    "--on FOLDER|FILE|HUB-ID",
    "In place of its base: fine-tunes, distilled variants, single files; repeatable, in one table.",
    multiple=True,
)
@option(
    "--suite NAME|FILE",
    "Prompts and seeds: a suite, or a table of prompts (.csv).  [default: the concept's own, else the recipe's]",
)
@option(
    "--column OURS=THEIRS",
    "What a table calls prompt, evaluation_seed, evaluation_guidance, case_number, concept or without; repeatable.",
    into="columns",
    multiple=True,
)
@option(
    "--rows ROLE",
    "erased | retained: what all rows of a table are.  [default: by their column concept, else by naming it]",
)
@option("--without FILE", "A table's prompts without the concept, of the same cases: for the in-prompt CLIP score.")
@option(
    "--metric NAME",
    "{names}; repeatable.  [default: all that need no training]",
    into="metrics",
    cls=cli.NamesOption,
    table="METRICS",
)
@option("--pictures", "Of each figure.  [default: 200, or each row of a table]", IntRange(1, 1000000))
@option(
    "--out", "Where evidence.json and report.html go.  [default: the patch's folder; with --on PATCH-transfer]", _FOLDER
)
@option(
    "--cache FOLDER",
    "Where pictures are kept, those of the erased concept too.  [default: the user's cache folder]",
    _FOLDER,
)
@flag("--no-cache", "Keep no pictures: a run that is stopped starts again.")
@option(
    "--prompts FILE",
    "One prompt a line, or a CSV table with a column prompt, in place of the suite's retained prompts.",
    cli.FilePath(path_type=Path, dir_okay=False),
)
@option(
    "--attacks FOLDER",
    "Saved attacks to tell of; repeatable.  [default: PATCH-attacks, where it is there]",
    _FOLDER,
    multiple=True,
)
@option(
    "--check NAME",
    "Away from its own setting: {names}; repeatable.",
    into="checks",
    cls=cli.NamesOption,
    table="CHECKS",
    extra=("all",),
)
@option("--check-pictures", "Behind each value of a check.", IntRange(1, 100000), 24)
@option(
    "--calibrate",
    "Pictures by the base with the concept, and as many without: rates are told corrected for the detector's errors.",
    IntRange(1, 1000000),
)
@cli.concept_option
@flag("--card", "Write the figures into the patch's card as well.")
@option(
    "--detector NAME[:FOLDER]", "Who judges the pictures, with its weights where it takes any.  [default: as the suite]"
)
@label_option
@cli.clip_option
@option("--seed", "First seed.  [default: the suite's]", cli.SEED)
@option("--batch-size", "Pictures drawn together.  [default: by the base]", IntRange(1, 1024))
@cli.device_option
@cli.drawing_options
def evaluate(
    patch: str,
    metrics: tuple[str, ...],
    cache: Path | None,
    no_cache: bool,
    prompts: Path | None,
    attacks: tuple[Path, ...],
    concept: str | None,
    on: tuple[str, ...],
    columns: tuple[str, ...],
    rows: str | None,
    without: str | None,
    **options: Any,
) -> None:
    """Score a patch beside its base on the same seeds, and write evidence.json and report.html.

    \b
    recare-patch evaluate --patch van-gogh-patch --card
    recare-patch evaluate --patch van-gogh-patch --metric clip-score --metric fid --prompts coco.txt
    recare-patch evaluate --patch van-gogh-patch --on my-fine-tune --on some/turbo-model
    recare-patch evaluate --patch van-gogh-patch --suite vangogh.csv
    accelerate launch --multi_gpu --num_processes 8 -m recare_patch evaluate --patch van-gogh-patch

    Pictures are drawn once: a run that was stopped goes on where it was, and a second one draws
    nothing.
    """
    if no_cache and cache is not None:
        raise EvaluationError("--no-cache and --cache exclude each other")
    if bad := next((one for one in columns if not all(one.partition("="))), None):
        raise EvaluationError(f"--column takes OURS=THEIRS, such as prompt=caption, got '{bad}'")
    if rows not in (None, "erased", "retained"):
        raise unknown_name("role of rows", rows, ("erased", "retained"))
    from recare_patch import measure
    from recare_patch.core import Crew, launched_together

    role: Any = rows
    reading = measure.Reading(dict(one.split("=", 1) for one in columns), role, without)
    if on:
        _transferred(patch, on, concept, attacks, options, {"metrics": metrics or None, "prompts_file": prompts,
                     "cache": False if no_cache else cache, "reading": reading})  # fmt: skip
        return
    crew = Crew.found() if launched_together() else None
    first = crew is None or crew.main
    folder = options["out"] or (Path(patch) if Path(patch).is_dir() else Path(patch).parent)
    several = cli.several_concepts(patch)
    # A suite that is named is for one of several concepts, and says itself for which.
    for one in several if several and concept is None and options["suite"] is None else (concept,):
        # Of several processes one speaks; all draw.
        with cli.shown_progress() if first else contextlib.nullcontext() as progress:
            evidence = measure.evaluate(
                patch,
                concept=one,
                metrics=metrics or None,
                cache=False if no_cache else cache,
                prompts_file=prompts,
                reading=reading,
                attacks=attacks or None,
                progress=progress,
                memory=cli.given_memory(),
                **options,
            )
        if first:
            if several:
                echo(f"{evidence.concept}:")
            _tell_evidence(evidence, folder / slug_of(evidence.concept) if several else folder)
            if options["card"]:
                echo("The figures are in the patch's card.")


def _beside(patch: str, what: str) -> Path:
    """The folder of a patch's name and what is in it; "." and ".." have no name to write another beside."""
    source = Path(patch) if Path(patch).name not in ("", "..") else Path(patch).resolve()
    return source.with_name(f"{source.name}-{what}")


def _transferred(
    patch: str,
    on: Sequence[str],
    concept: str | None,
    attacks: Sequence[Path],
    options: dict[str, Any],
    how: dict[str, Any],
) -> None:
    """The patch on each of several models."""
    from recare_patch.measure import transfer as transferring

    for name in ("base", "card"):
        if options.pop(name):
            raise EvaluationError(f"--on names the models in place of the patch's own: leave --{name} out")
    if attacks:
        raise EvaluationError("saved attacks were run on the patch's own base: leave --attacks out, or --on")
    out = options.pop("out") or _beside(patch, "transfer")
    with cli.shown_progress() as progress:
        shared = {"progress": progress, "memory": cli.given_memory(), "concept": concept}
        found = transferring.transfer(patch, on, out=out, **how, **options, **shared)
    for title, fault in found.faults.items():
        echo(f"{title}: does not fit ({fault})")
    cli.echo_table(transferring.table(found))
    echo(f"Transfer: {out / transferring.TRANSFER_NAME}")
    echo(f"Page: {out / transferring.PAGE_NAME}")


def _tell_evidence(evidence: Evidence, folder: Path) -> None:
    cli.echo_table(
        [("figure", "base", "patched", "95 % interval", "pictures")]
        + [
            (
                one.name,
                one.show(one.base),
                one.show(one.patched),
                one.show_interval(one.interval) or "–",
                f"{one.pictures:,}",
            )
            for one in evidence.figures
        ]
    )
    for one in evidence.attacks:
        echo(f"{one.attack}: {one.successes} of {one.trials} ({one.show_interval()})")
    drawn, found = evidence.cost.get("pictures_drawn"), evidence.cost.get("pictures_from_cache")
    echo(f"Pictures: {drawn:,} drawn, {found:,} from the cache, {evidence.cost['seconds']:,.0f} s")
    echo(f"Evidence: {folder / 'evidence.json'}")
    echo(f"Report: {folder / 'report.html'}")


@command()
@option("--patch DIR", "The patch to attack.", required=True)
@option("--attack NAME", "{names}; repeatable.", into="attacks", cls=cli.NamesOption, table="ATTACKS")
@option("--budget NAME", "small (minutes on a CPU) or published (as in each attack's paper).", None, "small")
@option("--vectors", "Word vectors that concept-inversion learns.  [default: 1]", int)
@option("--steps", "Steps of concept-inversion or p4d.", int)
@option("--pictures", "Trials: pictures that are judged, or prompts that are attacked.", int)
@cli.set_option("any option of the chosen attacks, such as learning_rate=0.01")
@option("--detector NAME", "Who judges the pictures.  [default: as the concept's suite]")
@label_option
@option("--replay DIR", "Try what this saved attack found, on another patch.")
@option("--seed", "", cli.SEED, 0)
@option("--out", "A folder of its own in it for each attack.  [default: PATCH-attacks, beside it]", cli.FOLDER)
@flag("--resume", "Go on with the run in --out that was interrupted.")
@option("--base FOLDER|HUB-ID", "The base model.  [default: the patch's]")
@cli.concept_option
@cli.device_option
@cli.drawing_options
def attack(
    patch: str,
    attacks: tuple[str, ...],
    vectors: int | None,
    steps: int | None,
    pictures: int | None,
    assignments: tuple[str, ...],
    replay: str | None,
    out: Path | None,
    concept: str | None,
    **shared: Any,
) -> None:
    """Attack a patch: how often does the erased concept come back?

    \b
    recare-patch attack --patch van-gogh-patch --attack concept-inversion
    recare-patch attack --patch van-gogh-patch --attack concept-inversion --vectors 4 --steps 3000
    recare-patch attack --patch b-patch --replay a-patch-attacks/unlearn-diff-atk
    """
    named = {"vectors": vectors, "steps": steps, "pictures": pictures}
    overrides = cli.overrides_from(assignments, named)
    if replay is not None and (len(attacks) > 1 or overrides):
        raise RecipeError("a replay takes its attack and options from the saved one: leave those out")
    if not Path(patch).exists():
        raise PatchError(f"there is no patch at {patch}")
    from recare_patch import measure

    if not attacks and replay is None:
        names = ", ".join(measure.ATTACKS.names())
        raise RecipeError(f"no attack was named: give --attack NAME ({names}) or --replay DIR")
    options = attack_options_of(attacks, shared["budget"], overrides)
    # Beside the patch, where `evaluate` and `verify` look for them.
    folder = out if out is not None else _beside(patch, "attacks")
    several = cli.several_concepts(patch)
    if several and replay is not None and concept is None:
        concept = measure.replayed_concept(replay)
    found: list[tuple[str, AttackResult, Path]] = []
    shared["memory"] = cli.given_memory()
    with cli.shown_progress() as progress:
        shared["progress"] = progress
        for chosen in several if several and concept is None else (concept,):
            place = folder / slug_of(chosen) if several and chosen is not None else folder
            title = f"{chosen}, " if several else ""
            if replay is not None:
                place /= "replay"
                given = attacks[0] if attacks else None
                result = measure.attack_patch(patch, given, replay=replay, concept=chosen, out=place, **shared)
                found.append((title + result.attack, result, place))
                continue
            made = measure.run_attacks(patch, options, concept=chosen, out=place, **shared)
            found += [(title + name, result, place / name) for name, result in made]
    for name, result, place in found:
        low, high = result.interval
        echo(
            f"{name}: the concept came back in {result.successes} of {result.trials} ({result.rate:.0%}, "
            f"95 % interval {low:.0%} to {high:.0%}), without the attack in {result.without}; "
            f"{result.evaluations:,} denoiser evaluations, {result.seconds:.0f} s"
        )
        if result.note:
            echo(result.note)
        echo(f"Saved: {place}")


def attack_options_of(attacks: Sequence[str], budget: str, overrides: Mapping[str, Any]) -> dict[str, AttackOptions]:
    """The options of each attack; a key goes to those that have it, and one at least must."""
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
        name: attack_options(name, budget, {k: v for k, v in overrides.items() if k in known[name]}) for name in plain
    }


@command()
@argument("patch", metavar="PATCH", type=cli.FOLDER)
@cli.base_option
@cli.concept_option
@option(
    "--figures all|none|NAME",
    "Figures to measure again, by name; repeatable. none: integrity alone.  [default: all]",
    multiple=True,
)
@option("--pictures", "Pictures a figure.  [default: as many as were recorded]", IntRange(1, 1000000))
@option("--tolerance", "Share by which a figure without an interval may differ.", FloatRange(0, 1), 0.05)
@cli.clip_option
@option(
    "--cache FOLDER",
    "Keep drawn pictures here, and use those that are there already.  [default: draw all anew]",
    _FOLDER,
)
@cli.device_option
@cli.drawing_options
@cli.json_option
@pass_context
def verify(
    ctx: Context, /, patch: Path, base: str | None, figures: tuple[str, ...], as_json: bool, **options: Any
) -> None:
    """Check a patch, its records and its card, then measure its figures again.

    \b
    recare-patch verify van-gogh-patch
    recare-patch verify van-gogh-patch --figures none
    recare-patch verify van-gogh-patch --figures "concept, plain prompts" --pictures 50

    The exit code is 0 where everything holds, 1 where something does not, 2 on bad input.
    """
    from recare_patch.measure.verified import remember
    from recare_patch.measure.verify import verify as verified

    with cli.shown_progress() as progress:
        options |= {"memory": cli.given_memory(), "progress": progress}
        found = verified(patch, base, figures=figures or ("all",), **options)
    remember(patch, found)
    ctx.exit(tell_findings(found, str(patch), as_json))


def tell_findings(found: Findings, source: str, as_json: bool) -> int:
    """Print what was looked at and whether it holds; gives the exit code."""
    if as_json:
        findings = [{"about": one.about, "holds": one.holds, "told": one.told} for one in found.findings]
        told = {"holds": found.holds, "not_measured_again": found.unmeasured, "findings": findings}
        echo(json.dumps(told, indent=2, ensure_ascii=False))
    else:
        words = {True: "ok", False: "FAIL", None: "-"}
        for one in found.findings:
            echo(f"{words[one.holds]:<6}{one.about}: {one.told}")
        checked = sum(one.holds is not None for one in found.findings)
        echo(f"{source} {_verdict(found, checked)}.")
    return 0 if found.holds else 1


def _verdict(found: Findings, checked: int) -> str:
    """What a verification comes to: what was checked, and what nobody measured again."""
    told, left = f"holds: {checked} checked", found.unmeasured
    if not found.holds:
        return f"does not hold: {len(found.failed)} of {checked} failed"
    if not left:
        return told
    more = f" and {len(left) - _MOST_CLAIMS} more" if len(left) > _MOST_CLAIMS else ""
    one = "1 claim" if len(left) == 1 else f"{len(left)} claims"
    return f"{told}; {one} not measured again: {', '.join(left[:_MOST_CLAIMS])}{more}"
