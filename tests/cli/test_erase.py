from __future__ import annotations

from pathlib import Path

import pytest

from recare_patch.core.errors import OutputError
from recare_patch.recipe.recipe import load_recipe
from tests.cli.conftest import Stage


def test_the_shortest_command(stage: Stage) -> None:
    result = stage.run("erase", "--concept", "Van Gogh")
    assert result.exit_code == 0, result.output
    ((name, options),) = stage.calls
    assert name == "erase_concept"
    assert options["concept"] == "Van Gogh"
    assert options["out"] == Path("van-gogh-patch")
    assert options["overrides"] == {}
    assert options["kind"] is options["recipe"] is options["base"] is options["clip"] is None
    assert (options["resume"], options["save_target_images"], options["device"]) == (False, False, "auto")
    assert options["file_formats"] == ("diffusers", "kohya")
    assert "bundled" in result.stderr and "--base" in result.stderr
    assert result.stdout.splitlines() == [
        "CARE-set: stars, night",
        "Erased Van Gogh: 12 s, 10,000 denoiser evaluations.",
        "Patch: van-gogh-patch",
        "Before and after: van-gogh-patch/preview.png",
        'Load it in diffusers: pipe.load_lora_weights("van-gogh-patch")',
    ]


def test_every_option_arrives(stage: Stage) -> None:
    words = (
        "erase --concept tench --kind object --method ESD --base some/base --clip some/clip --seed 3 "
        "--out here --resume "
        "--rank 4 --alpha 2 --layers all --steps 9 --states rollout --optimizer adamw --precision bf16 "
        "--care-set set.json --device cuda:1 --save-target-images --formats diffusers "
        "--set erase.guidance_minus=2 --set search.rounds=0"
    )
    result = stage.run(*words.split())
    assert result.exit_code == 0, result.output
    options = stage.calls[0][1]
    assert options["overrides"] == {
        "method": "ESD",
        "seed": 3,
        "precision": "bf16",
        "adapter.rank": 4,
        "adapter.alpha": 2.0,
        "adapter.layers": "all",
        "erase.steps": 9,
        "erase.states": "rollout",
        "erase.optimizer": "adamw",
        "care_set.file": "set.json",
        "erase.guidance_minus": 2,
        "search.rounds": 0,
    }
    assert (options["kind"], options["base"], options["clip"]) == ("object", "some/base", "some/clip")
    assert (options["resume"], options["save_target_images"], options["device"]) == (True, True, "cuda:1")
    assert options["out"] == Path("here")
    assert options["file_formats"] == ("diffusers",)
    assert "bundled" not in result.stderr


def test_a_rank_alone_brings_its_alpha(stage: Stage) -> None:
    stage.run("erase", "--concept", "tench", "--rank", 4)
    overrides = stage.calls[0][1]["overrides"]
    assert (overrides["adapter.rank"], overrides["adapter.alpha"]) == (4, 4.0)


def test_a_recipe_names_the_concept_and_the_base(stage: Stage) -> None:
    result = stage.run("erase", "--recipe", "tench-sd-1.5")
    assert result.exit_code == 0, result.output
    options = stage.calls[0][1]
    assert (options["concept"], options["recipe"], options["out"]) == (
        "tench",
        "tench-sd-1.5",
        Path("tench-patch"),
    )
    assert "bundled" not in result.stderr


def test_an_interrupted_run_goes_on_by_its_folder_alone(stage: Stage) -> None:
    run = Path("somewhere/.run")
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text(load_recipe("nudity").with_overrides({"seed": 5}).to_yaml())
    stage.fault = OutputError("stop here")
    stage.run("erase", "--resume", "--out", "somewhere")
    options = stage.calls[0][1]
    assert (options["concept"], options["recipe"]) == ("nudity", str(run / "recipe.yaml"))
    assert options["resume"] and options["overrides"] == {}


def test_warnings_are_shown(stage: Stage) -> None:
    stage.warnings = ("the base may not draw it",)
    assert "Warning: the base may not draw it" in stage.run("erase", "--concept", "tench").stderr


def test_an_error_of_the_run_is_one_sentence(stage: Stage) -> None:
    stage.fault = OutputError("tench-patch is in use by process 7")
    result = stage.run("erase", "--concept", "tench")
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == "Error: tench-patch is in use by process 7"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "nothing to erase"),
        (["--concept", ""], "a concept needs at least one letter or digit"),
        (["--concept", "tench", "--kind", "objct"], "did you mean 'object'?"),
        (["--concept", "tench", "--method", "recar"], "did you mean 'recare'?"),
        (["--concept", "tench", "--layers", "cross"], "unknown layer set 'cross'"),
        (["--concept", "tench", "--optimizer", "adam8bit"], "did you mean 'adamw8bit'?"),
        (["--concept", "tench", "--states", "rolout"], "did you mean 'rollout'?"),
        (["--concept", "tench", "--rank", "0"], "adapter.rank must be at least 1, got 0"),
        (["--concept", "tench", "--steps", "0"], "erase.steps must be at least 1"),
        (["--concept", "tench", "--seed", "-1"], "seed must be at least 0"),
        (["--concept", "tench", "--precision", "fp8"], "unknown precision 'fp8'"),
        (["--concept", "tench", "--set", "erase.stps=3"], "did you mean 'erase.steps'?"),
        (["--concept", "tench", "--set", "erase.steps"], "is not an assignment"),
        (["--concept", "tench", "--steps", "3", "--set", "erase.steps=4"], "is set twice"),
        (["--concept", "tench", "--base", ""], "base"),
        (["--recipe", "tensh"], "did you mean 'tench'?"),
        (["--concept", "tench", "--formats", "diffusers,koya"], "did you mean 'kohya'?"),
        (["--concept", "tench", "--formats", "kohya"], "always has the diffusers file"),
        (["--resume", "--out", "nowhere"], "there is no interrupted run in nowhere"),
    ],
)
def test_bad_input_is_one_sentence_before_any_model_is_loaded(
    stage: Stage, words: list[str], sentence: str
) -> None:
    result = stage.run("erase", *words)
    assert result.exit_code == 2
    assert not stage.calls
    (line,) = result.stderr.splitlines()
    assert line.startswith("Error: ") and sentence in line
    assert list(Path().iterdir()) == []


def test_a_number_that_is_none_is_refused(stage: Stage) -> None:
    result = stage.run("erase", "--concept", "tench", "--rank", "four")
    assert result.exit_code == 2 and "'four' is not a valid integer" in result.stderr
