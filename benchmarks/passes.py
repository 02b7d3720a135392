"""Which files of the package one command passes: those of which a function runs, imports aside.

    python -m benchmarks.passes                                  # one erase, one evaluate, one stack, on Atelier
    python -m benchmarks.passes -- erase --concept tench --out x # any command line

A run that reads in few files is one that a newcomer can follow. What a file does while it is imported (tables,
decorators) is not counted, nor is what only defines data.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

PACKAGE = Path(__file__).parents[1] / "recare_patch"
CUT = ("target_images.count=6", "target_images.steps=4", "erase.steps=4", "erase.retained_images=4")
SEARCH = ("search.rounds=1", "search.erase_steps=2", "search.inversion_steps=2")


def passed(words: Sequence[str]) -> dict[str, int]:
    """Run a command line in this process: file of the package → how many of its functions ran."""
    seen: dict[str, set[str]] = {}
    root = f"{PACKAGE}/"

    def importing(frame: FrameType | None) -> bool:
        while frame is not None:
            if frame.f_code.co_name == "<module>" and frame.f_code.co_filename.startswith(root):
                return True
            frame = frame.f_back
        return False

    def watch(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(root):
            functions = seen.setdefault(code.co_filename[len(root) :], set())
            if code.co_qualname not in functions and not importing(frame):
                functions.add(code.co_qualname)

    from recare_patch.cli import cli

    sys.setprofile(watch)
    threading.setprofile(watch)
    try:
        cli.main(args=list(words), standalone_mode=False)
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
    return {file: len(functions) for file, functions in sorted(seen.items()) if functions}


def _tell(title: str, files: dict[str, int]) -> None:
    print(f"{title}: {len(files)} files")
    for file, count in files.items():
        print(f"  {count:4d}  {file}")


def main() -> None:
    """Trace three commands in processes of their own, or the one that is given."""
    if len(sys.argv) > 1 and sys.argv[1] == "--":
        _tell(" ".join(sys.argv[2:4]), passed(sys.argv[2:]))
        return
    with tempfile.TemporaryDirectory() as folder:
        one, two = f"{folder}/one", f"{folder}/two"
        cut = [word for key in CUT for word in ("--set", key)]
        search = [word for key in SEARCH for word in ("--set", key)]
        for words in (
            ["erase", "--concept", "Van Gogh", "--out", one, *cut, *search],
            ["erase", "--concept", "tench", "--out", two, *cut, *search],
            ["evaluate", "--patch", one, "--pictures", "4", "--out", f"{folder}/measured"],
            ["stack", one, two, "--out", f"{folder}/both"],
        ):
            command = [sys.executable, "-m", "benchmarks.passes", "--", *words]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(done.stderr)
            if two not in words[:4] or words[0] == "stack":
                print(done.stdout[done.stdout.rindex(f"{words[0]} ") :])


if __name__ == "__main__":
    main()
