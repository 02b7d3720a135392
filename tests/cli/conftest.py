"""The commands against stand-ins for the models: what is tested here is the command line alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result
from PIL import Image

from recare_patch.cli import cli

Invoke = Callable[..., Result]
Fake = Callable[..., None]


@dataclass
class Stage:
    """Stand-ins for what erases and draws, and what they were called with."""

    run: Invoke
    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    fault: BaseException | None = None
    warnings: tuple[str, ...] = ()
    cost: dict[str, Any] = field(default_factory=dict)

    @property
    def options(self) -> dict[str, Any]:
        """Of the last call."""
        return self.calls[-1][1]

    def erase_concept(self, concept: str, **options: Any) -> Any:
        self.calls.append(("erase_concept", {"concept": concept, **options}))
        options["progress"].update("erase", 1, 1)
        if self.fault is not None:
            raise self.fault
        folder = Path(options["out"])
        folder.mkdir(parents=True)
        (folder / "preview.png").write_bytes(b"")
        return SimpleNamespace(
            folder=folder,
            care_set=SimpleNamespace(words=("stars", "night")),
            cost={"seconds": 12.3, "denoiser_evaluations": 10_000, **self.cost},
            warnings=self.warnings,
        )

    def generate_pictures(self, base: str, patches: Any, prompts: Any, seeds: Any, **options: Any) -> Any:
        told = {"base": base, "patches": patches, "prompts": prompts, "seeds": seeds, **options}
        self.calls.append(("generate_pictures", told))
        if self.fault is not None:
            raise self.fault
        image = Image.new("RGB", (8, 8), "red")
        return [SimpleNamespace(prompt=p, seed=s, before=image, after=image) for p in prompts for s in seeds]


@pytest.fixture
def invoke(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Invoke:
    """Run a command line, in words or as one string, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*words: object) -> Result:
        flat = words[0].split() if len(words) == 1 and isinstance(words[0], str) else map(str, words)
        return CliRunner().invoke(cli, [*flat])

    return run


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Put stand-ins into the face of a room, without loading what they stand for."""

    def put(room: str, **parts: Any) -> None:
        for name, part in parts.items():
            monkeypatch.setitem(vars(import_module(f"recare_patch.{room}")), name, part)

    return put


@pytest.fixture
def stage(fake: Fake, invoke: Invoke) -> Stage:
    """The command line with the erasing run replaced."""
    made = Stage(invoke)
    fake("erasure", erase_concept=made.erase_concept)
    fake("patch", generate_pictures=made.generate_pictures)
    return made


def one_sentence(result: Result, sentence: str) -> None:
    """Bad input is told in one line, with exit code 2."""
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("Error: ") and sentence in line
