from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from recare_patch.models import atelier
from tests.cli.conftest import Stage


def test_info_needs_weights(stage: Stage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(atelier, "WEIGHTS", tmp_path / "none")
    result = stage.run("atelier", "info")
    assert result.exit_code == 2
    assert "atelier train" in result.stderr


def test_info(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = atelier.AtelierInfo(
        Path("folder/pipeline"),
        23.5,
        {"pipeline/unet": 7_200_000},
        {"van gogh": {"stars": 0.76}},
        {"style": ("monet",)},
    )
    monkeypatch.setattr(atelier, "info", lambda: facts)
    output = stage.run("atelier", "info").stdout
    for words in (
        "23.5 MB",
        "7.20 M parameters",
        "monet",
        "stars 0.76",
        'from_pretrained("folder/pipeline")',
    ):
        assert words in output


def test_train_passes_everything_on_and_shows_progress(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.atelier import training

    seen: dict[str, Any] = {}

    def train(out: Path, work: Path, config: Any, **options: Any) -> dict[str, float]:
        seen.update(out=out, work=work, seed=config.seed, **options)
        options["progress"]("clip", 2, 2, 0.5)
        return {"clip": 61.0}

    monkeypatch.setattr(training, "train", train)
    result = stage.run(
        "atelier", "train", "--out", "o", "--work", "w", "--seed", 4, "--stage", "clip", "--device", "cuda"
    )
    assert result.exit_code == 0, result.output
    assert (seen["out"], seen["work"], seen["seed"]) == (Path("o"), Path("w"), 4)
    assert (seen["stages"], seen["device"]) == (("clip",), "cuda")
    assert "clip: 2/2 loss 0.5000" in result.stderr
    assert "clip: 61 s" in result.stdout


def test_an_unknown_stage(stage: Stage) -> None:
    result = stage.run("atelier", "train", "--stage", "denoise")
    assert result.exit_code == 2 and "did you mean 'denoiser'?" in result.stderr


def test_sample(stage: Stage) -> None:
    result = stage.run("atelier", "sample", "--prompt", "a cat", "--count", 2, "--out", "cats.png")
    assert result.exit_code == 0, result.output
    options = stage.calls[0][1]
    assert (options["base"], options["patches"]) == ("atelier", [])
    assert (options["prompts"], options["seeds"]) == (["a cat"], [0, 1])
    assert Path("cats.png").is_file()
