"""A table of as many rows as COCO-30k through ``evaluate``: what it takes beside the base, stopped and gone on with.

    python -m benchmarks.prompt_files --rows 30000

The base is a tiny random one, whose pictures of 32² pixels are drawn in one step without guidance, so that what is
measured is the evaluation itself: reading, drawing in batches, keeping, scoring and writing. The run is stopped when a
third of the pictures is drawn, and goes on in the same process.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "prompt-files"
MEGABYTE = 1_000_000


class _Stopped(Exception):
    """The first run's end."""


class _Until:
    """Stops a run at so many pictures of the base."""

    def __init__(self, most: int) -> None:
        self.most = most

    def update(self, stage: str, done: int, total: int, note: str = "") -> None:
        if stage.startswith("base") and done >= self.most:
            raise _Stopped


def peak() -> float:
    """The most memory that this process has held so far, in megabytes."""
    # In units of 1024 bytes, on Linux.
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MEGABYTE, 1)


def measure(rows: int, folder: Path) -> dict[str, float | int]:
    """Draw and score such a table, and say what it took."""
    from recare_patch.measure import evaluate
    from recare_patch.models import load_base
    from tests.measure.making import make_patch
    from tests.tiny import WORDS, make_tiny_clip, make_tiny_sd

    base = load_base(make_tiny_sd(folder / "base"), device="cpu")
    patch = make_patch(base, folder / "patch", make_tiny_clip(folder / "clip"))
    table = folder / "coco.csv"
    with table.open("w") as file:
        file.write("case_number,prompt,evaluation_seed,evaluation_guidance\n")
        for row in range(rows):
            words = [WORDS[(row * k + k) % len(WORDS)] for k in (1, 7, 13)]
            file.write(f'{row},"a photo of {words[0]}, {words[1]} and {words[2]}",{row},1.0\n')
    how: dict[str, Any] = {"suite": table, "base": base, "cache": folder / "cache", "device": "cpu", "batch_size": 32}
    metrics = ["clip-score", "fid"]
    small = _with_one_step(evaluate, metrics, how)
    few = folder / "few.csv"
    few.write_text("".join(table.read_text().splitlines(keepends=True)[:65]))
    small(patch, suite=few)
    before, began = peak(), time.perf_counter()
    try:
        small(patch, progress=_Until(rows // 3))
    except _Stopped:
        stopped = time.perf_counter() - began
    evidence = small(patch)
    return {
        "rows": rows,
        "pictures": max(one.pictures for one in evidence.figures),
        "seconds_until_stopped": round(stopped, 1),
        "seconds_of_the_rest": round(time.perf_counter() - began - stopped, 1),
        "drawn_after_the_stop": evidence.cost["pictures_drawn"],
        "from_the_cache": evidence.cost["pictures_from_cache"],
        "megabytes_with_64_rows": before,
        "megabytes": peak(),
        "megabytes_of_evidence": round((folder / "patch" / "evidence.json").stat().st_size / MEGABYTE, 2),
    }


def _with_one_step(evaluate: Any, metrics: list[str], how: dict[str, Any]) -> Any:
    """An evaluation whose suite draws in one step."""
    import recare_patch.measure.run as running

    resolve = running.resolve_suite
    running.resolve_suite = lambda *given, **options: resolve(*given, **options).with_changes(steps=1)
    return lambda patch, **more: evaluate(patch, metrics=metrics, **{**how, **more})


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=30_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(arguments.rows, Path(folder))
    print(json.dumps(found, indent=1))
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{arguments.rows}.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
