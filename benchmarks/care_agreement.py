"""How well the CARE score agrees with the judge that knows the bundled base's world.

    recare-patch evaluate --patch van-gogh-patch --pictures 200    # and patches that cost companions
    python -m benchmarks.care_agreement van-gogh-patch tench-patch esd-patch …

Each companion's pictures have two figures in ``evidence.json``: the CARE score, which asks CLIP, and the
rate at which the judge sees the companion. Both models' prompts are paired, and Pearson's correlation is
computed over the pairs.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

CARE, SEEN = "CARE score, ", "shown, "


def pairs(evidence: dict[str, object]) -> dict[tuple[str, str, str], tuple[float, float, int]]:
    """(companion, prompt, model) → (CARE score, the judge's rate, pictures) of one evidence file."""
    figures = {str(one["name"]): one for one in evidence["figures"]}  # type: ignore[attr-defined]
    found = {}
    for name, care in figures.items():
        seen = figures.get(SEEN + name.removeprefix(CARE)) if name.startswith(CARE) else None
        if seen is None:
            continue
        rates = {part["label"]: part for part in seen["by"]}
        for part in care["by"]:
            for model in ("base", "patched"):
                other = rates[part["label"]]
                key = name.removeprefix(CARE), part["label"], model
                found[key] = part[model], other[model], part["pictures"]
    return found


def pearson(points: Iterable[tuple[float, float]]) -> float:
    """Pearson's correlation; nan where one side does not vary."""
    care, seen = np.array(list(points)).T
    return float(np.corrcoef(care, seen)[0, 1])


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("patches", nargs="+", type=Path, help="patch folders that were evaluated")
    arguments = parser.parse_args()
    points: list[tuple[str, float, float]] = []
    for folder in arguments.patches:
        evidence = json.loads((folder / "evidence.json").read_text())
        for (companion, _, _), (care, seen, _) in pairs(evidence).items():
            points.append((companion, care, seen))
    print("| companion | prompts × models | CARE score | judge | Pearson |\n|---|---|---|---|---|")
    for companion in [*dict.fromkeys(one for one, _, _ in points), "all"]:
        own = [(care, seen) for one, care, seen in points if companion in (one, "all")]
        care, seen = np.array(own).T
        value = f"{pearson(own):.2f}" if care.std() and seen.std() else "–"
        print(f"| {companion} | {len(own)} | {care.mean():.2f} | {seen.mean():.2f} | {value} |")


if __name__ == "__main__":
    main()
