"""The table of methods: what each erases and keeps, what brings it back, and what it costs.

    python -m benchmarks.methods base --concept "van gogh"
    python -m benchmarks.methods run --concept "van gogh" --method s-grace
    python -m benchmarks.methods run --concept "van gogh" --method s-grace --trial "inversion, 4 vectors"
    python -m benchmarks.methods stack --concept "van gogh" --method recare --method s-grace
    python -m benchmarks.methods table
    python -m benchmarks.methods conceptbench
    python -m benchmarks.methods pictures --concept "van gogh"
    python -m benchmarks.methods package

``run`` erases (or takes the patch that is in ``--work``), scores the concept's suite, attacks the patch, and
recovers a token from it (concept inversion of one vector and 200 steps); each part that is in the result
already is left as it is, so a stopped run goes on.
``stack`` does the same with the stack of several methods' patches, which it takes from ``--work``.
``conceptbench`` puts all methods into one table, by the groups of ConceptBench: identity, object, style.
``pictures`` draws a sheet of the base and of the methods' patches that are in ``--work``, at the same seeds.
``package`` writes the figures that ``recare-patch methods`` shows. Settings are chosen by ``--split choose``,
whose results lie apart.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.erasure import assignments, made_before
from benchmarks.scoring import GUIDANCE_SCALE, SCHEDULER, STEPS, score
from benchmarks.suites import ALL_CONCEPTS, SPLITS, suite
from recare_patch.recipe import FIGURES_FILE, METHODS

RESULTS = Path(__file__).parent / "results" / "methods"
NAMES = {"van gogh": "Van Gogh", "tench": "tench", "nude": "nudity", "mira vale": "Mira Vale"}
SUITES = {
    "van gogh": "van-gogh-atelier",
    "tench": "tench-atelier",
    "nude": "nudity-atelier",
    "mira vale": "conceptbench-identity-atelier",
}

ATTACKS: dict[str, tuple[str, dict[str, Any]]] = {
    "UnlearnDiffAtk": ("unlearn-diff-atk", {"pictures": 8}),
    "inversion, 1 vector": ("concept-inversion", {"vectors": 1}),
    "inversion, 4 vectors": ("concept-inversion", {"vectors": 4}),
}
"""Column → attack, and what is changed in its small budget; without ``--trial`` the first is run."""


GROUPS = {"identity": ("mira vale",), "object": ("tench",), "style": ("van gogh",)}
"""The groups of ConceptBench (Zhang et al., arXiv 2303.17591) and the concepts here that stand for them."""


def _slug(text: str) -> str:
    return text.replace(" ", "-")


def _file(arguments: argparse.Namespace, row: str) -> Path:
    folder = RESULTS if arguments.split == "report" else RESULTS / arguments.split
    return folder / f"{_slug(arguments.concept)}.{row}.json"


def _read(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    return found


def _write(file: Path, data: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(data, indent=1))


def _folder(arguments: argparse.Namespace, row: str) -> Path:
    return Path(arguments.work) / f"{_slug(arguments.concept)}-{_slug(row)}"


def _erased(arguments: argparse.Namespace, method: str, row: str) -> Path:
    """The patch of a row, made unless it is there."""
    from recare_patch.erasure import erase, resolve_recipe

    out = _folder(arguments, row)
    overrides = {"method": method, **assignments(arguments.set)}
    kind = "identity" if arguments.concept == "mira vale" else None
    recipe = resolve_recipe(NAMES[arguments.concept], kind=kind, overrides=overrides)
    if not made_before(out, recipe):
        erase(recipe, out, device=arguments.device, resume=out.exists())
    return out


def _scores(arguments: argparse.Namespace, patch: Any) -> list[dict[str, Any]]:
    from recare_patch.models import load_base

    base = load_base("atelier", device=arguments.device)
    rows = score(base, arguments.concept, arguments.split, patch=patch, pictures=arguments.pictures)
    return [asdict(row) | {"rate": row.rate, "interval": row.interval} for row in rows]


def _attacked(arguments: argparse.Namespace, out: Path, name: str, trial: str) -> dict[str, Any]:
    from recare_patch.measure import attack_options, attack_patch

    attack, changes = ATTACKS[trial]
    result = attack_patch(
        out,
        attack,
        options=attack_options(attack, overrides=changes),
        out=Path(arguments.work) / f"{name}-attacks" / _slug(trial.replace(",", "")),
        resume=True,
        device=arguments.device,
        steps=STEPS,
        scheduler=SCHEDULER,
        detector="atelier-judge",
        label=arguments.concept,
    )
    return {
        "successes": result.successes,
        "trials": result.trials,
        "interval": result.interval,
        "without": result.without,
        "evaluations": result.evaluations,
        "seconds": round(result.seconds, 1),
    }


def _memorized(arguments: argparse.Namespace, patch: Any) -> dict[str, float]:
    """The memorization score of the base and of the patched model, and how often the token draws it."""
    from recare_patch.measure import PictureCache, Studio, load_detector, load_suite, memorization_figures
    from recare_patch.models import load_base

    suite = load_suite(SUITES[arguments.concept], concept=NAMES[arguments.concept])
    cache = PictureCache(Path(arguments.work) / "cache")
    studio = Studio(load_base("atelier", device=arguments.device), cache=cache)
    score_, rate = memorization_figures(studio, patch, suite, load_detector("atelier-judge"), arguments.pictures, None)
    return {"base": score_.base, "patched": score_.patched, "rate_base": rate.base, "rate": rate.patched}


def _measure(arguments: argparse.Namespace, out: Path, row: str) -> None:
    from recare_patch.patch import Patch

    file = _file(arguments, row)
    data, patch = _read(file), Patch.load(out)
    size = (out / "pytorch_lora_weights.safetensors").stat().st_size
    data |= {"row": row, "concept": arguments.concept, "overrides": arguments.set, "patch_bytes": size}
    if (out / "training.json").exists():
        data["cost"] = _read(out / "training.json")
        data["cost"].pop("losses", None)
    if "scores" not in data:
        data["scores"] = _scores(arguments, patch)
        _write(file, data)
    for trial in arguments.trial or (list(ATTACKS)[:1] if arguments.split == "report" else []):
        if trial not in data.setdefault("attacks", {}):
            data["attacks"][trial] = _attacked(arguments, out, f"{_slug(arguments.concept)}-{row}", trial)
            _write(file, data)
            one = data["attacks"][trial]
            print(f"{row}: {trial}: {one['successes']} of {one['trials']}", flush=True)
    if "memorization" not in data and arguments.split == "report":
        data["memorization"] = _memorized(arguments, patch)
    _write(file, data)


def _run(arguments: argparse.Namespace) -> None:
    method = arguments.method[0] if arguments.method else "recare"
    row = arguments.row or method
    _measure(arguments, _erased(arguments, method, row), row)


def _stack(arguments: argparse.Namespace) -> None:
    from recare_patch.combine import save_stack, stack
    from recare_patch.patch import Patch

    row = " + ".join(arguments.method)
    out = _folder(arguments, row)
    if not out.exists():
        parts = [Patch.load(_erased(arguments, method, method)) for method in arguments.method]
        save_stack(stack([(part, 1.0) for part in parts]), out)
    _measure(arguments, out, row)


def _base(arguments: argparse.Namespace) -> None:
    _write(_file(arguments, "base"), {"row": "base", "concept": arguments.concept, "scores": _scores(arguments, None)})


def _pictures(arguments: argparse.Namespace) -> None:
    """A row for each figure's first prompt, a column for the base and each method."""
    from recare_patch.core import SheetRow, save_sheet, sheet
    from recare_patch.models import load_base, scheduled
    from recare_patch.patch import Patch

    base = load_base("atelier", device=arguments.device)
    draws = [figure.draws(arguments.split)[0] for figure in suite(arguments.concept, arguments.split)]
    texts, seeds = [prompt for prompt, _, _ in draws], [seed for _, _, seed in draws]
    made = {}
    for name in ("base", *METHODS):
        folder = _folder(arguments, name)
        if name != "base" and not folder.exists():
            continue
        put_in = contextlib.nullcontext() if name == "base" else Patch.load(folder).apply(base.pipeline)
        with put_in, scheduled(base.pipeline, SCHEDULER):
            made[name] = base.generate(texts, seeds, steps=STEPS, guidance_scale=GUIDANCE_SCALE, batch_size=32)
    rows = [SheetRow(text, [one[k] for one in made.values()]) for k, text in enumerate(texts)]
    title = f"{NAMES[arguments.concept]}, erased by each method"
    made_sheet = sheet(rows, list(made), title, blur=arguments.concept == "nude")
    print(save_sheet(made_sheet, Path(arguments.out) / f"methods-{_slug(arguments.concept)}.png"))


# ------------------------------------------------------------------------ reading


def summary(data: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """A row's figures, as numbers: shares are of the base's own rate.

    Returns:
        ``shown`` (the concept's rate), ``care`` and ``kept`` (mean shares of the base's rates, of the
        companions and of styles and objects), attacks' rates by name, ``memorization``, ``evaluations``,
        ``seconds``, ``bytes``; what was not measured is missing.
    """
    own = {entry["figure"]: entry for entry in base["scores"]}
    shares: dict[str, list[float]] = {"care": [], "kept": []}
    found: dict[str, Any] = {}
    for entry in data.get("scores", []):
        if entry["group"] == "concept":
            found |= {"shown": entry["rate"], "interval": entry["interval"]}
        elif own[entry["figure"]]["rate"]:
            group = "care" if entry["group"] == "care" else "kept"
            shares[group].append(entry["rate"] / own[entry["figure"]]["rate"])
    found |= {group: sum(values) / len(values) for group, values in shares.items() if values}
    found |= {trial: one["successes"] / one["trials"] for trial, one in data.get("attacks", {}).items()}
    if "memorization" in data:
        found["memorization"] = data["memorization"]["patched"]
        found["recovered"] = data["memorization"]["rate"]
    if "cost" in data:
        found |= {"evaluations": data["cost"]["denoiser_evaluations"], "seconds": data["cost"]["seconds"]}
    if "patch_bytes" in data:
        found["bytes"] = data["patch_bytes"]
    return found


def results(split: str = "report") -> dict[str, dict[str, dict[str, Any]]]:
    """Concept → row → :func:`summary`, of all that was measured beside a base."""
    folder = RESULTS if split == "report" else RESULTS / split
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for concept in ALL_CONCEPTS:
        files = sorted(folder.glob(f"{_slug(concept)}.*.json"))
        rows = {data["row"]: data for data in map(_read, files)}
        if "base" in rows:
            found[concept] = {row: summary(data, rows["base"]) for row, data in rows.items()}
    return found


_COLUMNS = (
    ("shown", "still shown", "share"),
    ("care", "companions kept", "share"),
    ("kept", "styles, objects kept", "share"),
    ("UnlearnDiffAtk", "UnlearnDiffAtk", "share"),
    ("recovered", "inversion, 200 steps", "share"),
    ("inversion, 1 vector", "inversion, 400 steps", "share"),
    ("inversion, 4 vectors", "4 vectors, 400 steps", "share"),
    ("memorization", "memorization score", "number"),
    ("evaluations", "evaluations", "count"),
    ("seconds", "seconds", "count"),
    ("bytes", "patch", "bytes"),
)


def _cell(value: Any, how: str) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    return {
        "share": lambda: f"{value:.0%}",
        "number": lambda: f"{value:.2f}",
        "count": lambda: f"{value:,.0f}",
        "bytes": lambda: f"{value / 1e3:.0f} kB",
    }[how]()


def table(split: str) -> str:
    """All results as Markdown, one table a concept."""
    lines: list[str] = []
    for concept, rows in results(split).items():
        used = [column for column in _COLUMNS if any(column[0] in row for row in rows.values())]
        lines += [f"### {NAMES[concept]}", "", "| method | " + " | ".join(c[1] for c in used) + " |"]
        lines.append("|---" * (len(used) + 1) + "|")
        order = ["base", *METHODS, *sorted(row for row in rows if row not in (*METHODS, "base"))]
        for row in (name for name in order if name in rows):
            cells = [_cell(rows[row].get(key), how) for key, _, how in used]
            lines.append(f"| {row} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def conceptbench(split: str) -> str:
    """All methods × (identity, object, style) in one Markdown table.

    A cell tells how often the group's concepts are still shown, and what is kept of companions and of other
    styles and objects, as shares of the base's rates; means over the group's concepts.
    """
    found = results(split)
    figures = (("shown", "still shown"), ("care", "companions"), ("kept", "rest"))
    heads = [f"{group}: {told}" for group in GROUPS for _, told in figures]
    lines = [f"| method | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for method in ("base", *METHODS):
        cells = []
        for concepts in GROUPS.values():
            rows = [found[one][method] for one in concepts if method in found.get(one, {})]
            for key, _ in figures:
                values = [row[key] for row in rows if key in row]
                cells.append(_cell(sum(values) / len(values) if values else None, "share"))
        if any(cell != "–" for cell in cells):
            lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _package() -> None:
    """Write what ``recare-patch methods`` shows: the methods' own rows."""
    chosen = {
        method: {NAMES[concept]: rows[method] for concept, rows in results().items() if method in rows}
        for method in METHODS
    }
    told = {method: rows for method, rows in chosen.items() if rows}
    FIGURES_FILE.write_text(json.dumps({"base": "atelier", "methods": told}, indent=1) + "\n")
    print(f"{FIGURES_FILE}: {', '.join(told) or 'nothing was measured'}")


ACTIONS = {"run": _run, "stack": _stack, "base": _base, "pictures": _pictures}


def main(words: Sequence[str] | None = None) -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=[*ACTIONS, "table", "conceptbench", "package"])
    parser.add_argument("--concept", choices=ALL_CONCEPTS, default="van gogh")
    parser.add_argument("--method", action="append", choices=list(METHODS), help="repeatable for stack")
    parser.add_argument("--row", help="name of the row, by default the method's")
    parser.add_argument("--split", choices=SPLITS, default="report")
    parser.add_argument("--pictures", type=int, default=32)
    parser.add_argument("--trial", action="append", choices=list(ATTACKS), help="by default the first; repeatable")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--work", default="benchmark-runs")
    parser.add_argument("--out", default="docs", help="folder of the sheet that pictures writes")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args(words)
    if arguments.action == "table":
        print(table(arguments.split))
    elif arguments.action == "conceptbench":
        print(conceptbench(arguments.split))
    elif arguments.action == "package":
        _package()
    else:
        ACTIONS[arguments.action](arguments)


if __name__ == "__main__":
    main()
