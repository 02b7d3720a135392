"""``python -m benchmarks.atelier``: training and sampling, against stand-ins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from benchmarks.atelier import training
from benchmarks.atelier.__main__ import atelier
from recare_patch.core import UnknownNameError
from tests.cli.conftest import Stage, fake, invoke, stage

__all__ = ["fake", "invoke", "stage"]


def run(words: str) -> Result:
    return CliRunner().invoke(atelier, words.split())


def test_train_passes_everything_on_and_shows_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def train(out: Path, work: Path, config: Any, **options: Any) -> dict[str, float]:
        seen.update(out=out, work=work, seed=config.seed, **options)
        options["progress"]("clip", 2, 2, 0.5)
        return {"clip": 61.0}

    monkeypatch.setattr(training, "train", train)
    result = run("train --out o --work w --seed 4 --stage clip --device cuda")
    assert result.exit_code == 0, result.output
    assert (seen["out"], seen["work"], seen["seed"]) == (Path("o"), Path("w"), 4)
    assert (seen["stages"], seen["device"]) == (("clip",), "cuda")
    assert "clip: 2/2 loss 0.5000" in result.stderr and "clip: 61 s" in result.stdout


def test_an_unknown_stage() -> None:
    found = run("train --stage denoise").exception
    assert isinstance(found, UnknownNameError) and "did you mean 'denoiser'?" in str(found)


def test_sample(stage: Stage) -> None:
    result = run("sample --prompt cat --count 2 --out cats.png")
    assert result.exit_code == 0, result.output
    options = stage.options
    assert (options["base"], options["patches"]) == ("atelier", [])
    assert (options["prompts"], options["seeds"]) == (["cat"], [0, 1])
    assert Path("cats.png").is_file()
