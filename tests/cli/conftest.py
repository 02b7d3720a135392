"""The commands against stand-ins for the models: what is tested here is the command line alone."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result

from recare_patch.cli import cli


@dataclass
class Stage:
    """A fake ``recare_patch.erasure.run`` and what it was called with."""

    run: Callable[..., Result]
    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    fault: BaseException | None = None
    warnings: tuple[str, ...] = ()

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
            cost={"seconds": 12.3, "denoiser_evaluations": 10_000},
            warnings=self.warnings,
        )

    def generate_pictures(
        self, base: str, patches: Any, prompts: Any, seeds: Any, **options: Any
    ) -> list[Any]:
        from PIL import Image

        self.calls.append(
            (
                "generate_pictures",
                {"base": base, "patches": patches, "prompts": prompts, "seeds": seeds, **options},
            )
        )
        image = Image.new("RGB", (8, 8), "red")
        return [SimpleNamespace(prompt=p, seed=s, before=image, after=image) for p in prompts for s in seeds]


@pytest.fixture
def invoke(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Result]:
    """Run a command line in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return lambda *words: CliRunner().invoke(cli, [str(word) for word in words])


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch, invoke: Callable[..., Result]) -> Stage:
    """The command line with the erasing run replaced."""
    made = Stage(invoke)
    fake = ModuleType("recare_patch.erasure.run")
    fake.erase_concept = made.erase_concept  # type: ignore[attr-defined]
    fake.generate_pictures = made.generate_pictures  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "recare_patch.erasure.run", fake)
    return made
