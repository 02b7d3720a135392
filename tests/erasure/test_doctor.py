"""A rehearsal tells whether an erasure will work here, and why not where it will not."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from recare_patch.careset import Clip
from recare_patch.cli import cli
from recare_patch.erasure import Diagnosis, rehearse
from recare_patch.erasure.doctor import FAILED, rehearsal_of
from recare_patch.recipe import Recipe


@pytest.fixture
def words(tiny_sd: Path, tiny_clip: Path) -> dict[str, Any]:
    """What a user would say of a tiny base."""
    return {"kind": "style", "base": str(tiny_sd), "clip": str(tiny_clip), "device": "cpu"}


def _told(found: Diagnosis, name: str) -> tuple[str, str]:
    [one] = [one for one in found.checks if one.name == name]
    return one.state, one.told


@pytest.mark.parametrize(("more", "stage"), [({}, "CARE-set"), ({"preset": "measured"}, "search 1 inversion")])
def test_every_stage_of_the_plan_takes_a_step(
    words: dict[str, Any], more: dict[str, str], stage: str, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    found = rehearse("van gogh", **words, **more)
    assert found.ready, found.checks
    names = {one.name for one in found.stages}
    assert {"target images", stage, "erase"} <= names
    assert all(one.planned and (one.seconds is not None or not one.evaluations) for one in found.stages)
    preset = " --preset measured" if more else ""
    assert found.command.startswith(f"recare-patch erase --concept 'van gogh'{preset} --kind style --base")
    assert Recipe.from_yaml(found.recipe).target_images.count == 24
    assert not list(tmp_path.iterdir())


def test_batches_and_levers_stay_and_a_cpu_cuts_batches_too(words: dict[str, Any]) -> None:
    recipe = Recipe(concept={"text": "cat", "kind": "object"}).with_overrides({"memory.micro_batch": 2})
    whole, cut = rehearsal_of(recipe), rehearsal_of(recipe, cpu=True)
    assert (whole.erase.batch_size, whole.memory, whole.search.batch_size) == (3, recipe.memory, 8)
    assert (cut.erase.batch_size, cut.memory, whole.erase.steps) == (1, recipe.memory, 1)


def test_a_missing_bitsandbytes_is_gone_round(words: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    found = rehearse("van gogh", **words)
    first, second = (one for one in found.checks if one.name == "optimizer")
    assert found.ready and "erase.optimizer=adamw" in found.command
    assert first.state == "warning" and "--optimizer adamw" in first.told and second.state == "ok"


@pytest.mark.parametrize("what", ["card", "CLIP", "base", "weights", "full"])
def test_what_is_wrong_is_said_once_and_ends_it(
    words: dict[str, Any], what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if what == "card":
        name, sentence, words["vram"] = "memory", "nothing makes base", 1e-6
    elif what == "CLIP":
        shutil.copytree(words["clip"], tmp_path / "clip")
        (tmp_path / "clip" / "model.safetensors").unlink()
        name, sentence, words["clip"] = "CLIP", "--clip", str(tmp_path / "clip")
    elif what == "base":
        name, sentence, words["base"] = "recipe", "was not found", "nowhere"
    elif what == "weights":
        shutil.copytree(words["base"], tmp_path / "base")
        next((tmp_path / "base" / "unet").glob("*.safetensors")).write_bytes(b"x" * 20)
        name, sentence, words["base"] = "base", "cannot be loaded", str(tmp_path / "base")
    else:
        from recare_patch.erasure import run

        def full(*_: Any, progress: Any, **__: Any) -> None:
            progress.update("search 1 erase", 0, 1)
            raise type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory")

        monkeypatch.setattr(run, "erase", full)
        name, sentence = "rehearsal", "in search 1 erase: the device's memory is full; give --vram"
    found = rehearse("van gogh", **words)
    assert not found.ready and [one.name for one in found.checks if one.state == FAILED] == [name]
    assert sentence in _told(found, name)[1]
    assert found.checks[-1].name == name


def test_the_command_prints_a_report(words: dict[str, Any], tmp_path: Path) -> None:
    report = tmp_path / "doctor.md"
    options = ["--base", words["base"], "--clip", words["clip"], "--kind", "style", "--report", str(report)]
    result = CliRunner().invoke(cli, ["doctor", *options, "--vram", "0.000001"])
    assert result.exit_code == 1 and "Not ready" in result.output
    text = report.read_text()
    assert "FAILED  memory" in text and "torch 2" in text
    again = CliRunner().invoke(cli, ["doctor", *options])
    assert again.exit_code == 2 and "is there already" in again.output


def test_clip_waits_off_the_device_as_in_a_run(words: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    parked: list[Clip] = []
    monkeypatch.setattr(Clip, "park", lambda clip: parked.append(clip))
    monkeypatch.setattr("recare_patch.erasure.doctor._steps", lambda *_: None)
    for off in (True, False):
        assert rehearse("van gogh", **words, overrides={"memory.encoders_off_device": off}).ready
    assert len(parked) == 1
