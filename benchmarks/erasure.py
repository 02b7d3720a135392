"""The table of methods and concepts on the bundled base.

    python -m benchmarks.erasure run --concept "van gogh" --method recare     # erase, then score
    python -m benchmarks.erasure base --concept "van gogh"                    # the untouched base
    python -m benchmarks.erasure paper --concept "van gogh"                   # the published procedure
    python -m benchmarks.erasure compare --preset quick --row quick --attack  # run and paper, one process
    python -m benchmarks.erasure table                                        # all results as Markdown

Each call leaves one JSON file in ``benchmarks/results``; ``table`` reads them all. ``--split choose``
uses the prompts and seeds on which settings are chosen; the default is the reporting set. Pictures are drawn
in eight steps of DPM-Solver++, with ``--ddim`` in twenty of DDIM; the results of both lie apart.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.scoring import SCHEDULER, STEPS, TWENTY, Score, save_scores, score
from benchmarks.suites import ALL_CONCEPTS, CONCEPTS, SPLITS
from recare_patch.core import write_json

RESULTS = Path(__file__).parent / "results"
NAMES = {"van gogh": "Van Gogh", "tench": "tench", "nude": "nudity", "mira vale": "Mira Vale"}
KINDS = {"mira vale": "identity"}
"""Of concepts that no recipe is written for."""


def assignments(pairs: Sequence[str]) -> dict[str, Any]:
    """Overrides of a recipe from ``key=value`` texts."""
    from recare_patch.recipe import parse_assignment

    return dict(parse_assignment(pair) for pair in pairs)


def _folder(arguments: argparse.Namespace) -> Path:
    return RESULTS / (arguments.split if arguments.ddim else f"{arguments.split}-8")


def _scored(arguments: argparse.Namespace, base: Any, patch: Any = None) -> list[Score]:
    return score(
        base,
        arguments.concept,
        arguments.split,
        patch=patch,
        pictures=arguments.pictures,
        figures=arguments.figure,
        sampler=TWENTY if arguments.ddim else (STEPS, SCHEDULER),
        changes=arguments.changes,
    )


def _file(arguments: argparse.Namespace, row: str) -> Path:
    return _folder(arguments) / f"{arguments.concept.replace(' ', '-')}.{row}.json"


def _recipe(concept: str, overrides: dict[str, Any] | None = None) -> Any:
    """The recipe of a concept, by the judge's name for it."""
    from recare_patch.erasure import resolve_recipe

    return resolve_recipe(NAMES[concept], kind=KINDS.get(concept), overrides=overrides or {})


def _goals(arguments: argparse.Namespace, base: Any) -> Any:
    """What attacks are after, drawn by the untouched base; None where none was asked for."""
    if not arguments.attack:
        return None
    from benchmarks.in_place import draw_goals

    return draw_goals(base, _recipe(arguments.concept).concept, arguments.concept)


def _attacked(goals: Any) -> dict[str, Any]:
    """Attacks on the model as it stands."""
    if goals is None:
        return {}
    from benchmarks.in_place import attack_in_place

    return {"attacks": attack_in_place(goals)}


def made_before(out: Path, recipe: Any) -> bool:
    """Whether the finished patch of a recipe lies in its folder; what another recipe made there is refused."""
    from recare_patch.recipe import WEIGHTS_NAME, load_recipe

    if not (out / WEIGHTS_NAME).exists():
        return False
    if load_recipe(str(out)) != recipe:
        sys.exit(f"{out} holds a patch of another recipe: remove it, or give another --row or --work")
    return True


def _run(arguments: argparse.Namespace) -> None:
    from recare_patch.erasure import erase
    from recare_patch.models import load_base
    from recare_patch.patch import Patch
    from recare_patch.recipe import preset_overrides

    row = arguments.row or arguments.method
    out = Path(arguments.work) / f"{arguments.concept.replace(' ', '-')}-{row}"
    overrides = {"method": arguments.method, **preset_overrides(arguments.preset)}
    overrides |= assignments(arguments.set)
    recipe = _recipe(arguments.concept, overrides)
    if made_before(out, recipe):
        patch, cost = Patch.load(out), json.loads((out / "training.json").read_text())
    else:
        result = erase(recipe, out, device=arguments.device, resume=out.exists())
        patch, cost = result.patch, result.cost
    print(row, {k: v["evaluations"] for k, v in cost["stages"].items()}, f"{cost['seconds']} s", flush=True)
    base = load_base("atelier", device=arguments.device)
    rows = _scored(arguments, base, patch)
    goals = _goals(arguments, base)
    with patch.apply(base.pipeline):
        attacked = _attacked(goals)
    size = (out / "pytorch_lora_weights.safetensors").stat().st_size
    note = {"row": row, "concept": arguments.concept, "overrides": overrides, "cost": cost, "patch_bytes": size}
    save_scores(_file(arguments, row), rows, **note, **attacked)


def _base(arguments: argparse.Namespace) -> None:
    from recare_patch.models import load_base

    base = load_base("atelier", device=arguments.device)
    rows = _scored(arguments, base)
    save_scores(_file(arguments, "base"), rows, row="base", concept=arguments.concept)


def _paper(arguments: argparse.Namespace) -> None:
    from safetensors.torch import load_file, save_file

    from benchmarks.paper_procedure import PaperSettings, run
    from recare_patch.careset import Clip
    from recare_patch.models import load_base

    base = load_base("atelier", device=arguments.device)
    goals = _goals(arguments, base)
    row = arguments.row or "paper"
    # Named after what decides its weights: the same row at another rate must not find these.
    out = Path(arguments.work) / f"{arguments.concept.replace(' ', '-')}-paper-times-{arguments.times:g}"
    weights, bill = out / "denoiser.safetensors", out / "cost.json"
    if bill.exists():
        # Erased before, with what it cost then.
        base.denoiser.load_state_dict(load_file(weights))
        cost = json.loads(bill.read_text(encoding="utf-8"))
    else:
        released = PaperSettings()
        settings = PaperSettings(
            search_rate=released.search_rate * arguments.times, final_rate=released.final_rate * arguments.times
        )
        began = time.perf_counter()
        made = run(
            base, _recipe(arguments.concept).concept, Clip.load("atelier"), settings, lambda t: print(t, flush=True)
        )
        stages = {k: {"seconds": round(made.seconds[k], 1), "evaluations": made.evaluations[k]} for k in made.seconds}
        cost = {
            "seconds": round(time.perf_counter() - began, 1),
            "denoiser_evaluations": sum(made.evaluations.values()),
            "stages": stages,
        }
        out.mkdir(parents=True, exist_ok=True)
        save_file(base.denoiser.state_dict(), weights)
        write_json(bill, cost)
    rows = _scored(arguments, base)
    note = {"row": row, "concept": arguments.concept, "cost": cost, "times": arguments.times}
    save_scores(_file(arguments, row), rows, **note, **_attacked(goals))


def _compare(arguments: argparse.Namespace) -> None:
    """Both procedures in one process, one after the other: their seconds can be compared."""
    _run(arguments)
    arguments.row = "paper"
    _paper(arguments)


def _cells(data: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {entry["figure"]: entry for entry in data["scores"]}


def table(folder: Path) -> str:
    """All results in a folder as Markdown, one table a concept: rate, interval, share of the base."""
    lines: list[str] = []
    for concept in CONCEPTS:
        files = sorted(folder.glob(f"{concept.replace(' ', '-')}.*.json"))
        data = {found["row"]: found for found in (json.loads(f.read_text()) for f in files)}
        if "base" not in data:
            continue
        base = _cells(data["base"])
        figures = list(base)
        tried = list(dict.fromkeys(trial for row in data.values() for trial in row.get("attacks", {})))
        lines += [
            f"### {NAMES[concept]}",
            "",
            "| row | " + " | ".join([*figures, *tried]) + " | evaluations | seconds | patch |",
        ]
        lines.append("|---" * (len(figures) + len(tried) + 4) + "|")
        order = sorted(data, key=lambda r: (r != "base", r != "recare", r))
        for row in order:
            cells = []
            for figure in figures:
                entry = _cells(data[row]).get(figure)
                if entry is None:
                    cells.append("–")
                    continue
                low, high = entry["interval"]
                text = f"{entry['rate']:.2f} ({low:.2f}–{high:.2f})"
                if row != "base" and figure != "concept" and base[figure]["rate"]:
                    text += f" = {entry['rate'] / base[figure]['rate']:.0%}"
                cells.append(text)
            for trial in tried:
                one = data[row].get("attacks", {}).get(trial)
                low, high = one["interval"] if one else (0, 0)
                cells.append(f"{one['rate']:.2f} ({low:.2f}–{high:.2f})" if one else "–")
            cost = data[row].get("cost", {})
            size = data[row].get("patch_bytes")
            cells.append(f"{cost['denoiser_evaluations']:,}" if cost else "–")
            cells.append(f"{cost['seconds']:.0f}" if cost else "–")
            cells.append(f"{size / 1e3:.0f} kB" if size else "–")
            lines.append(f"| {row} | " + " | ".join(cells) + " |")
        pictures = sorted({entry["pictures"] for entry in base.values()})
        lines += ["", f"Pictures a figure: {', '.join(map(str, pictures))}.", ""]
    return "\n".join(lines)


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["run", "base", "paper", "compare", "table"])
    parser.add_argument("--concept", choices=ALL_CONCEPTS, default="van gogh")
    parser.add_argument("--method", default="recare")
    parser.add_argument("--preset", help="of recare-patch erase")
    parser.add_argument("--row", help="name of the row, by default the method's")
    parser.add_argument("--split", choices=SPLITS, default="report")
    parser.add_argument("--pictures", type=int, default=100)
    parser.add_argument("--figure", action="append", default=[], help="score this figure alone; repeatable")
    parser.add_argument("--times", type=float, default=1, help="multiple of the published procedure's learning rates")
    parser.add_argument("--ddim", action="store_true", help="draw in twenty steps of the base's own sampler")
    parser.add_argument("--changes", action="store_true", help="measure perceptual change at equal seeds, too")
    parser.add_argument("--attack", action="store_true", help="attack what is left, too")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--work", default="benchmark-runs")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    if arguments.action == "table":
        print(table(_folder(arguments)))
        return
    {"run": _run, "base": _base, "paper": _paper, "compare": _compare}[arguments.action](arguments)


if __name__ == "__main__":
    main()
