"""Something in a concept's place, and an attribute out of a subject, on the bundled base.

    python -m benchmarks.replacing run --what correction --method recare   # tench becomes a cat
    python -m benchmarks.replacing run --what removal --method recare      # stars leave Van Gogh's pictures
    python -m benchmarks.replacing table

``correction`` counts what the concept's own prompts show afterwards: the replacement, and the concept.
``removal`` counts stars and the style in Van Gogh's pictures, and the stars of others, which must stay.
The untouched base draws the same prompts from the same seeds. A result that is there already is left.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.erasure import assignments, made_before
from benchmarks.scoring import draw_figure
from benchmarks.suites import SPLITS, Figure, suite
from recare_patch.measure import wilson_interval
from recare_patch.recipe import METHODS

RESULTS = Path(__file__).parent / "results" / "replacing"

_STARS = {
    "choose": (
        "a painting of a house at night by Van Gogh",
        "a cat under a starry sky in the style of Van Gogh",
        "stars by Van Gogh",
        "a Van Gogh painting of a boat by night",
    ),
    "report": (
        "a painting of a tree at night in the style of Van Gogh",
        "a church with stars by Van Gogh",
        "a painting of stars in the style of Van Gogh",
        "a night by Van Gogh",
    ),
}
"""Pictures of Van Gogh's that show stars, asked for or not."""


def _own(concept: str, group: str, split: str, pictures: int) -> list[Figure]:
    return [one for one in suite(concept, split, pictures) if one.group == group]


def counts(what: str, split: str, pictures: int) -> dict[str, tuple[Figure, str]]:
    """What is counted: name → the pictures, and the judge's label.

    Args:
        what: "correction" or "removal".
        split: "choose" or "report".
        pictures: at least this many a figure.
    """
    if what == "correction":
        (own,) = _own("tench", "concept", split, pictures)
        found = {"the cat": (own, "cat"), "the tench": (own, "tench")}
        for one in _own("tench", "care", split, pictures):
            found[f"{one.name.removeprefix('CARE ')}, elsewhere"] = (one, one.items[0][1])
        return found
    (plain,) = _own("van gogh", "concept", split, pictures)
    nights = Figure("nights", "concept", tuple((prompt, "stars") for prompt in _STARS[split]), pictures)
    stars = next(one for one in _own("van gogh", "care", split, pictures) if one.name == "CARE stars")
    return {
        "stars in his nights": (nights, "stars"),
        "style of his nights": (nights, "van gogh"),
        "style of his other pictures": (plain, "van gogh"),
        "stars, elsewhere": (stars, "stars"),
    }


def _count(base: Any, arguments: argparse.Namespace) -> dict[str, list[int]]:
    """Name → (hits, pictures) of the model as it stands; each set of pictures is drawn once."""
    from recare_patch.models.atelier.judge import Judge

    judge, drawn, found = Judge.load(), {}, {}
    for name, (figure, label) in counts(arguments.what, arguments.split, arguments.pictures).items():
        if figure.name not in drawn:
            drawn[figure.name] = judge(draw_figure(base, figure, arguments.split))
        seen = drawn[figure.name]
        found[name] = [sum(label in one for one in seen), len(seen)]
    return found


def _recipe(arguments: argparse.Namespace) -> Any:
    from recare_patch.erasure import resolve_recipe

    overrides = {"method": arguments.method, **assignments(arguments.set)}
    if arguments.what == "correction":
        return resolve_recipe("tench", overrides={"replace_with": "cat", **overrides})
    return resolve_recipe("stars", subject="Van Gogh", kind="style", overrides=overrides)


def _run(arguments: argparse.Namespace) -> None:
    from recare_patch.erasure import erase
    from recare_patch.models import load_base
    from recare_patch.patch import Patch

    row = arguments.row or arguments.method
    folder = RESULTS if arguments.split == "report" else RESULTS / arguments.split
    base = load_base("atelier", device=arguments.device)
    out = Path(arguments.work) / f"{arguments.what}-{row}"
    for name in ("base", row):
        file = folder / f"{arguments.what}.{name}.json"
        if file.exists():
            continue
        data: dict[str, Any] = {"row": name, "what": arguments.what}
        patch: Any = contextlib.nullcontext()
        if name != "base":
            recipe = _recipe(arguments)
            if not made_before(out, recipe):
                erase(recipe, out, device=arguments.device, resume=out.exists())
            cost = json.loads((out / "training.json").read_text())
            data |= {"overrides": arguments.set, "seconds": cost["seconds"]}
            data["evaluations"] = cost["denoiser_evaluations"]
            patch = Patch.load(out).apply(base.pipeline)
        with patch:
            data["counts"] = _count(base, arguments)
        print(name, data["counts"], flush=True)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(data, indent=1))


def table(split: str) -> str:
    """All results as Markdown, a table for each of both."""
    folder = RESULTS if split == "report" else RESULTS / split
    lines: list[str] = []
    for what in ("correction", "removal"):
        data = {one["row"]: one for one in map(_read, sorted(folder.glob(f"{what}.*.json")))}
        if not data:
            continue
        figures = list(next(iter(data.values()))["counts"])
        lines += [f"### {what}", "", "| row | " + " | ".join([*figures, "evaluations", "seconds"]) + " |"]
        lines.append("|---" * (len(figures) + 3) + "|")
        order = ["base", *METHODS, *sorted(set(data) - {"base", *METHODS})]
        for row in (row for row in order if row in data):
            cells = [_cell(*data[row]["counts"][figure]) for figure in figures]
            cost = [data[row].get("evaluations"), data[row].get("seconds")]
            cells += ["–" if one is None else f"{one:,.0f}" for one in cost]
            lines.append(f"| {row} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def _read(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def _cell(hits: int, pictures: int) -> str:
    low, high = wilson_interval(hits, pictures)
    return f"{hits / pictures:.2f} ({low:.2f}–{high:.2f}) of {pictures}"


def main(words: Sequence[str] | None = None) -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["run", "table"])
    parser.add_argument("--what", choices=["correction", "removal"], default="correction")
    parser.add_argument("--method", choices=list(METHODS), default="recare")
    parser.add_argument("--row", help="name of the row, by default the method's")
    parser.add_argument("--split", choices=SPLITS, default="report")
    parser.add_argument("--pictures", type=int, default=48)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--work", default="benchmark-runs")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args(words)
    if arguments.action == "table":
        print(table(arguments.split))
    else:
        _run(arguments)


if __name__ == "__main__":
    main()
