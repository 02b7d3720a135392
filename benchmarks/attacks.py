"""The table of attacks on patches of the bundled base.

    python -m benchmarks.attacks run --concept "van gogh" --row recare
    python -m benchmarks.attacks run --concept "van gogh" --row no-search --set search.rounds=0
    python -m benchmarks.attacks run --concept "van gogh" --row esd --set method=esd
    python -m benchmarks.attacks run --concept "van gogh" --row robust --preset robust
    python -m benchmarks.attacks run --concept "van gogh" --row esd --set method=esd --probes
    python -m benchmarks.attacks table
    python -m benchmarks.attacks table --probes

A row erases, or takes the patch that ``benchmarks.erasure`` left in ``--work`` under its name, and then
attacks it with each of :data:`TRIALS`, or with ``--probes`` with each of :data:`PROBES`, and then looks at what the
concept does in a negative prompt. Finished attacks are read, stopped ones go on.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from benchmarks.erasure import NAMES, assignments, made_before
from benchmarks.scoring import PROBES, SCHEDULER, STEPS, TRIALS
from benchmarks.suites import CONCEPTS

RESULTS = Path(__file__).parent / "results" / "attacks"
CHECK_PICTURES = 16


def _run(arguments: argparse.Namespace) -> None:
    from recare_patch.erasure import erase, resolve_recipe
    from recare_patch.measure import attack_options, attack_patch, evaluate
    from recare_patch.recipe import preset_overrides

    name = f"{arguments.concept.replace(' ', '-')}-{arguments.row}"
    out = Path(arguments.work) / name
    overrides = {**preset_overrides(arguments.preset), **assignments(arguments.set)}
    recipe = resolve_recipe(NAMES[arguments.concept], overrides=overrides)
    if not made_before(out, recipe):
        erase(recipe, out, device=arguments.device, resume=out.exists())
    file = _folder(arguments) / f"{arguments.concept.replace(' ', '-')}.{arguments.row}.json"
    found = json.loads(file.read_text())["attacks"] if file.exists() else {}
    known = {**TRIALS, **PROBES}
    for trial in arguments.trial or list(PROBES if arguments.probes else TRIALS)[: None if arguments.probes else 3]:
        attack, changes = known[trial]
        result = attack_patch(
            out,
            attack,
            options=attack_options(attack, overrides=changes),
            out=Path(arguments.work) / f"{name}-attacks" / trial.replace(",", "").replace(" ", "-"),
            resume=True,
            device=arguments.device,
            # As recipes have it; probes are drawn alike whatever the recipe, in the steps of the suites.
            **({"steps": STEPS, "scheduler": SCHEDULER} if arguments.probes else {}),
        )
        found[trial] = {
            "successes": result.successes,
            "trials": result.trials,
            "interval": result.interval,
            "without": result.without,
            "note": result.note,
            "evaluations": result.evaluations,
            "seconds": round(result.seconds, 1),
            "budget": result.budget,
            **({"given": sum(one["given"] for one in result.details)} if "given" in result.details[0] else {}),
        }
        print(f"{name}: {trial}: {result.successes} of {result.trials}", flush=True)
        file.parent.mkdir(parents=True, exist_ok=True)
        note = {
            "row": arguments.row,
            "concept": arguments.concept,
            "preset": arguments.preset,
            "overrides": arguments.set,
        }
        file.write_text(json.dumps({**note, "attacks": found}, indent=1))
    if arguments.probes and not arguments.trial:
        how = {"metrics": ["concept-rate"], "pictures": 24, "attacks": [], "device": arguments.device}
        place = Path(arguments.work) / f"{name}-check"
        seen = evaluate(out, checks=["negative-prompt"], check_pictures=CHECK_PICTURES, out=place, **how)
        check = seen.checks[0].model_dump(mode="json")
        file.write_text(json.dumps({**note, "attacks": found, "check": check}, indent=1))


def _folder(arguments: argparse.Namespace) -> Path:
    return RESULTS.with_name("probes") if arguments.probes else RESULTS


def negative_prompts(files: list[Path]) -> str:
    """What the concept's name in the negative prompt does, as Markdown: one row a patch."""
    lines = []
    for file in files:
        data = json.loads(file.read_text())
        for point in data.get("check", {}).get("points", ()):
            lines = lines or ["| row | negative prompt | " + " | ".join(point["values"]) + " |"]
            if len(lines) == 1:
                lines.append("|---" * (2 + len(point["values"])) + "|")
            cells = [f"{value:.3f}" for value in point["values"].values()]
            lines.append(f"| {data['row']} | {point['x']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def table(folder: Path = RESULTS) -> str:
    """All results as Markdown, one table a concept: success rate and its 95 % interval.

    Behind it, what the untouched base shows from the same start without the name, where that was looked at.
    """
    lines: list[str] = []
    for concept in CONCEPTS:
        files = sorted(folder.glob(f"{concept.replace(' ', '-')}.*.json"))
        data = [json.loads(file.read_text()) for file in files]
        columns = [trial for trial in {**TRIALS, **PROBES} if any(trial in one["attacks"] for one in data)]
        if not columns:
            continue
        lines += [f"### {NAMES[concept]}", "", "| row | " + " | ".join(columns) + " |"]
        lines.append("|---" * (len(columns) + 1) + "|")
        for one in data:
            cells = []
            for trial in columns:
                entry = one["attacks"].get(trial)
                if entry is None:
                    cells.append("–")
                    continue
                low, high = entry["interval"]
                rate = entry["successes"] / entry["trials"]
                given = f"; {entry['given'] / entry['trials']:.2f}" if "given" in entry else ""
                cells.append(f"{rate:.2f} ({low:.2f}–{high:.2f}) of {entry['trials']}{given}")
            lines.append(f"| {one['row']} | " + " | ".join(cells) + " |")
        lines += ["", negative_prompts(files)]
    return "\n".join(lines)


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["run", "table"])
    parser.add_argument("--concept", choices=CONCEPTS, default="van gogh")
    parser.add_argument("--row", default="recare")
    parser.add_argument("--trial", action="append", choices=[*TRIALS, *PROBES], help="by default the first three")
    parser.add_argument("--probes", action="store_true", help="the probes, and the check negative-prompt")
    parser.add_argument("--preset", help="of recare-patch erase")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--work", default="benchmark-runs")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    if arguments.action == "table":
        print(table(_folder(arguments)))
        return
    _run(arguments)


if __name__ == "__main__":
    main()
