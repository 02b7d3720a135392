"""The table of attacks on patches of the bundled base.

    python -m benchmarks.attacks run --concept "van gogh" --row recare
    python -m benchmarks.attacks run --concept "van gogh" --row no-search --set search.rounds=0
    python -m benchmarks.attacks run --concept "van gogh" --row esd --set method=esd
    python -m benchmarks.attacks run --concept "van gogh" --row robust --preset robust
    python -m benchmarks.attacks table

A row erases, or takes the patch that ``benchmarks.erasure`` left in ``--work`` under its name, and then
attacks it with each of :data:`TRIALS`. Finished attacks are read, stopped ones go on.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from benchmarks.erasure import NAMES, assignments
from benchmarks.scoring import TRIALS
from benchmarks.suites import CONCEPTS

RESULTS = Path(__file__).parent / "results" / "attacks"


def _run(arguments: argparse.Namespace) -> None:
    from recare_patch.erasure import erase, resolve_recipe
    from recare_patch.measure import attack_options, attack_patch
    from recare_patch.recipe import preset_overrides

    name = f"{arguments.concept.replace(' ', '-')}-{arguments.row}"
    out = Path(arguments.work) / name
    if not (out / "pytorch_lora_weights.safetensors").exists():
        overrides = {**preset_overrides(arguments.preset), **assignments(arguments.set)}
        recipe = resolve_recipe(NAMES[arguments.concept], overrides=overrides)
        erase(recipe, out, device=arguments.device, resume=out.exists())
    file = RESULTS / f"{arguments.concept.replace(' ', '-')}.{arguments.row}.json"
    found = json.loads(file.read_text())["attacks"] if file.exists() else {}
    for trial in arguments.trial or list(TRIALS)[:3]:
        attack, changes = TRIALS[trial]
        result = attack_patch(
            out,
            attack,
            options=attack_options(attack, overrides=changes),
            out=Path(arguments.work) / f"{name}-attacks" / trial.replace(",", "").replace(" ", "-"),
            resume=True,
            device=arguments.device,
        )
        found[trial] = {
            "successes": result.successes,
            "trials": result.trials,
            "interval": result.interval,
            "without": result.without,
            "evaluations": result.evaluations,
            "seconds": round(result.seconds, 1),
            "budget": result.budget,
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


def table() -> str:
    """All results as Markdown, one table a concept: success rate and its 95 % interval."""
    lines: list[str] = []
    for concept in CONCEPTS:
        files = sorted(RESULTS.glob(f"{concept.replace(' ', '-')}.*.json"))
        data = [json.loads(file.read_text()) for file in files]
        columns = [trial for trial in TRIALS if any(trial in one["attacks"] for one in data)]
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
                cells.append(f"{rate:.2f} ({low:.2f}–{high:.2f}) of {entry['trials']}")
            lines.append(f"| {one['row']} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["run", "table"])
    parser.add_argument("--concept", choices=CONCEPTS, default="van gogh")
    parser.add_argument("--row", default="recare")
    parser.add_argument("--trial", action="append", choices=list(TRIALS), help="by default the first three")
    parser.add_argument("--preset", help="of recare-patch erase")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--work", default="benchmark-runs")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    if arguments.action == "table":
        print(table())
        return
    _run(arguments)


if __name__ == "__main__":
    main()
