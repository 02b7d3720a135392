from __future__ import annotations

from pathlib import Path

import pytest
import torch

from recare_patch.core import OutputError
from recare_patch.patch import Patch
from recare_patch.recipe import load_recipe, recipe_for
from tests.cli.conftest import Invoke, Stage, one_sentence
from tests.cli.test_end_to_end import SMALL


def test_the_shortest_command(stage: Stage) -> None:
    stage.warnings = ("the base may not draw it",)
    result = stage.run("erase", "--concept", "Van Gogh")
    assert result.exit_code == 0, result.output
    ((name, options),) = stage.calls
    assert name == "erase_concept"
    assert (options["concept"], options["out"]) == ("Van Gogh", Path("van-gogh-patch"))
    assert options["overrides"] == {}
    assert options["kind"] is options["recipe"] is options["base"] is options["clip"] is None
    assert (options["resume"], options["save_target_images"], options["device"]) == (False, False, "auto")
    assert options["file_formats"] == ("diffusers", "kohya")
    assert "bundled" in result.stderr and "--base" in result.stderr
    assert "Warning: the base may not draw it" in result.stderr
    assert result.stdout.splitlines() == [
        "CARE-set: stars, night",
        "Erased Van Gogh: 12 s, 10,000 denoiser evaluations.",
        "Patch: van-gogh-patch",
        "Before and after: van-gogh-patch/preview.png",
        'Load it in diffusers: pipe.load_lora_weights("van-gogh-patch")',
    ]


def test_every_option_arrives(stage: Stage) -> None:
    result = stage.run(
        "erase --concept tench --kind object --method ESD --base some/base --clip some/clip --seed 3 "
        "--out here --resume "
        "--rank 4 --alpha 2 --layers all --steps 9 --states rollout --optimizer adamw --precision bf16 "
        "--care-set set.json --device cuda:1 --vram 8 --weights int8 --vae-tiling --micro-batch 2 "
        "--save-target-images --formats diffusers --set erase.guidance_minus=2 --set search.rounds=0"
    )
    assert result.exit_code == 0, result.output
    options = stage.options
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
        "memory.weights": "int8",
        "memory.vae_tiling": True,
        "memory.micro_batch": 2,
    }
    assert (options["kind"], options["base"], options["clip"]) == ("object", "some/base", "some/clip")
    assert (options["resume"], options["save_target_images"], options["device"]) == (True, True, "cuda:1")
    assert (options["out"], options["file_formats"], options["vram"]) == (Path("here"), ("diffusers",), 8)
    assert "bundled" not in result.stderr


def test_a_rank_alone_brings_its_alpha_and_a_preset_goes_before(stage: Stage) -> None:
    stage.run("erase --concept tench --rank 4 --preset quick --steps 5")
    overrides = stage.options["overrides"]
    assert (overrides["adapter.rank"], overrides["adapter.alpha"]) == (4, 4.0)
    assert (stage.options["preset"], overrides["erase.steps"]) == ("quick", 5)


def test_a_recipe_names_the_concept_and_the_base(stage: Stage) -> None:
    result = stage.run("erase --recipe tench-sd-1.5")
    assert result.exit_code == 0, result.output
    told = [stage.options[key] for key in ("concept", "recipe", "out")]
    assert told == ["tench", "tench-sd-1.5", Path("tench-patch")]
    assert "bundled" not in result.stderr


def test_an_interrupted_run_goes_on_by_its_folder_alone(stage: Stage) -> None:
    file = Path("somewhere/.run/recipe.yaml")
    file.parent.mkdir(parents=True)
    file.write_text(load_recipe("nudity").with_overrides({"seed": 5}).to_yaml())
    stage.fault = OutputError("somewhere is in use by process 7")
    result = stage.run("erase --resume --out somewhere")
    assert (stage.options["concept"], stage.options["recipe"]) == ("nudity", str(file))
    assert stage.options["resume"] and stage.options["overrides"] == {}
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == "Error: somewhere is in use by process 7"


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
        (["--concept", "tench", "--preset", "quik"], "did you mean 'quick'?"),
        (["--concept", "tench", "--set", "erase.stps=3"], "did you mean 'erase.steps'?"),
        (["--concept", "tench", "--set", "erase.steps"], "is not an assignment"),
        (["--concept", "tench", "--steps", "3", "--set", "erase.steps=4"], "is set twice"),
        (["--concept", "tench", "--base", ""], "base"),
        (["--concept", "tench", "--offload"], "offload needs checkpointing"),
        (["--recipe", "tensh"], "did you mean 'tench'?"),
        (["--concept", "tench", "--formats", "diffusers,koya"], "did you mean 'kohya'?"),
        (["--concept", "tench", "--formats", "kohya"], "always has the diffusers file"),
        (["--resume", "--out", "nowhere"], "there is no interrupted run in nowhere"),
        (["--concept", "tench", "--together"], "--together is for several concepts, and there is 1"),
        (["--concept", "a", "--concept", "A"], "the concept 'A' is there twice"),
        (["--concept", "a", "--concept", "A", "--together"], "the concept 'A' is there twice"),
        (["--concept", "a", "--concept", "b", "--recipe", "tench"], "--recipe is for one concept"),
        (["--concept", "a", "--concept", "b", "--continue-from", "x"], "--continue-from is for one patch"),
        (["--concept", "a", "--concept", "b", "--care-set", "x"], "--care-set is for one patch"),
        (["--concept", "a", "--concept", "b", "--alias", "x"], "--alias is of one concept, and there are 2"),
        (["--concept", "a", "--concept", "b", "--together", "--alias", "x"], "--alias is of one concept"),
        (["--concept", "a", "--alias", "!!"], "at least one letter or digit"),
        (["--concept", "a", "--stack", "x"], "--stack is for several patches"),
        (["--concepts", "nowhere.txt"], "cannot read the concepts in nowhere.txt"),
        (["--concept", "tench", "--from", "x", "--replace-with", "cat"], "do not go together"),
        (["--concept", "cat", "--replace-with", "Cat"], "the concept 'cat' cannot be replaced with itself"),
        (["--concept", "cat", "--from", "CAT"], "the concept 'cat' cannot be taken out of itself"),
        (["--concept", "cat", "--replace-with", "!!"], "at least one letter or digit"),
        (["--concept", "cat", "--continue-from", "tench"], "there is no patch at tench"),
        (["--concept", "a", "--from", "x", "--method", "uce"], "cannot take an attribute out of a subject"),
        (["--concept", "a", "--continue-from", "x", "--method", "uce"], "cannot go on from an earlier patch"),
        (["--concept", "a", "--method", "uce", "--layers", "all"], "adapter.layers cannot be all"),
        (["--concept", "a", "--set", "s_grace.rounds=2"], "is that of method 's-grace'"),
    ],
)
def test_bad_input_is_one_sentence_before_any_model_is_loaded(stage: Stage, words: list[str], sentence: str) -> None:
    one_sentence(stage.run("erase", *words), sentence)
    assert not stage.calls and list(Path().iterdir()) == []


def test_a_number_that_is_none_is_refused(stage: Stage) -> None:
    result = stage.run("erase --concept tench --rank four")
    assert result.exit_code == 2 and "'four' is not a valid integer" in result.stderr


def test_each_concept_gets_a_patch(stage: Stage) -> None:
    result = stage.run("erase", "--concept", "tench", "--concept", "Van Gogh", "--seed", 2)
    assert result.exit_code == 0, result.output
    calls = [options for _, options in stage.calls]
    assert [(one["concept"], one["out"]) for one in calls] == [
        ("tench", Path("tench-patch")),
        ("Van Gogh", Path("van-gogh-patch")),
    ]
    assert all(one["overrides"] == {"seed": 2} and one["also"] == [] for one in calls)
    assert "Erased tench" in result.stdout and "Erased Van Gogh" in result.stdout


def test_a_list_of_concepts_in_a_folder(stage: Stage) -> None:
    # Some editors mark UTF-8 text by three bytes at its start.
    Path("people.txt").write_bytes(b"\xef\xbb\xbf# two who are in nobody's way\nMira Vale\n\n  Otto Bly \n")
    result = stage.run("erase --concepts people.txt --kind identity --out there")
    assert result.exit_code == 0, result.output
    assert [(one["concept"], one["kind"], one["out"]) for _, one in stage.calls] == [
        ("Mira Vale", "identity", Path("there/mira-vale-patch")),
        ("Otto Bly", "identity", Path("there/otto-bly-patch")),
    ]
    Path("odd.txt").write_bytes(b"\xff\xfe")
    Path("none.txt").write_text("# nobody\n")
    one_sentence(stage.run("erase --concepts odd.txt"), "it is not UTF-8 text")
    one_sentence(stage.run("erase --concepts none.txt"), "none.txt names no concept")


def test_together(stage: Stage) -> None:
    result = stage.run("erase --concept tench --concept cat --kind object --together")
    assert result.exit_code == 0, result.output
    ((_, options),) = stage.calls
    assert [options[key] for key in ("concept", "also", "out")] == ["tench", ["cat"], Path("tench-cat-patch")]


def test_finished_ones_are_not_made_again(stage: Stage) -> None:
    Path("there/tench-patch").mkdir(parents=True)
    Path("there/tench-patch/pytorch_lora_weights.safetensors").touch()
    Path("there/cat-patch/.run").mkdir(parents=True)
    stage.fault = KeyboardInterrupt()
    words = "erase --concept tench --concept cat --concept boat --kind object --out there --resume"
    result = stage.run(words)
    assert result.exit_code == 130
    assert "tench: finished before" in result.stderr
    ((_, options),) = stage.calls
    assert (options["concept"], options["resume"]) == ("cat", True)


def test_a_replacement_an_attribute_and_an_earlier_patch_arrive(stage: Stage) -> None:
    stage.run("erase --concept tench --replace-with cat")
    assert stage.options["overrides"] == {"replace_with": "cat"}
    result = stage.run("erase", "--concept", "stars", "--from", "Van Gogh")
    assert result.exit_code == 0, result.output
    told = [stage.options[key] for key in ("concept", "subject", "out")]
    assert told == ["stars", "Van Gogh", Path("stars-from-van-gogh-patch")]
    Path("boat-patch").mkdir()
    stage.run("erase --concept cat --kind object --continue-from boat")
    assert stage.options["overrides"] == {"continue_from": "boat-patch"}
    one_sentence(stage.run("erase --concept tench --continue-from boat:0.5"), "has a scale")


def test_other_names_arrive(stage: Stage) -> None:
    result = stage.run("erase", "--concept", "Van Gogh", "--alias", "Vincent", "--alias", "the  Dutchman")
    assert result.exit_code == 0, result.output
    assert stage.options["overrides"] == {"concept.aliases": ["Vincent", "the  Dutchman"]}
    made = recipe_for("Van Gogh", guess_kind=lambda *_: "style", overrides=stage.options["overrides"])
    assert made.concept.aliases == ("Vincent", "the Dutchman")
    Path("mine.yaml").write_text(made.to_yaml())
    assert recipe_for("", guess_kind=lambda *_: "style", recipe="mine.yaml").concept == made.concept
    # Of another concept they are no names.
    assert recipe_for("Monet", guess_kind=lambda *_: "style", recipe="mine.yaml").concept.aliases == ()


def test_what_the_run_measured_is_told(stage: Stage) -> None:
    bars = {"gone": 0.5, "drift": 0.15}
    stage.cost = {
        "measured": {"gone": 0.823, "drift": 0.061, "bars": bars, "reached": True},
        "seen": [
            {"what": "tench", "before": 4, "after": 0, "of": 4},
            {"what": "man", "before": 3, "after": 3, "of": 4},
        ],
    }
    told = stage.run("erase --concept tench").stdout.splitlines()
    assert told[2:4] == [
        "The run's own measure: 0.82 of the concept gone (bar 0.5), retained prompts drifted by 0.06 (bar 0.15).",
        "CLIP sees in the preview: tench in 0 of 4, before 4; man in 3 of 4, before 3.",
    ]


def test_the_stack_has_a_free_folder_before_anything_is_erased(stage: Stage) -> None:
    words = "erase --concept tench --concept cat --kind object --base b"
    Path("full").mkdir()
    Path("full/file").touch()
    for more, sentence in (
        ("--stack full", "full already holds files"),
        ("--stack full/file", "it is a file, not a folder"),
        ("--out all --stack all", "the stack cannot lie in all"),
        ("--stack cat-patch", "the stack cannot lie in cat-patch"),
    ):
        one_sentence(stage.run(f"{words} {more}"), sentence)
    Path("cat-patch").mkdir()
    Path("cat-patch/file").touch()
    one_sentence(stage.run(words), "cat-patch already holds files")
    assert not stage.calls


def test_two_patches_and_their_stack(invoke: Invoke, tiny_sd: Path, tiny_clip: Path) -> None:
    """For real: two patches by the quickest method, stacked into one file."""
    small = [f"--set {key}={value}" for key, value in SMALL.items() if not key.startswith("search")]
    result = invoke(
        "erase --concept tench --concept boat --kind object --method uce --out all --stack both --device cpu "
        f"--base {tiny_sd} --clip {tiny_clip} {' '.join(small)}"
    )
    assert result.exit_code == 0, result.output
    both, parts = Patch.load("both"), [Patch.load(f"all/{name}-patch") for name in ("tench", "boat")]
    assert both.metadata is not None and both.metadata.parts is not None
    assert [part.name for part in both.metadata.parts] == ["tench", "boat"]
    assert set(both.modules) == set(parts[0].modules)
    assert "Stack of 2 patches: both" in result.stdout


def test_names_that_are_solved_together_are_one_patch(invoke: Invoke, tiny_sd: Path, tiny_clip: Path) -> None:
    Path("names.txt").write_text("tench\nboat\nred car\n")
    result = invoke(
        "erase --concepts names.txt --kind object --method closed --out all --device cpu "
        f"--base {tiny_sd} --clip {tiny_clip} --set target_images.steps=2"
    )
    assert result.exit_code == 0, result.output
    made = Patch.load("all")
    assert set(made.ranks.values()) == {3} and made.metadata is not None
    assert [one.concept for one in made.metadata.erased] == ["tench", "boat", "red car"]
    assert "erases:" in invoke("inspect all").stdout
    _names_are_added(invoke, made)


def _names_are_added(invoke: Invoke, made: Patch) -> None:
    result = invoke("erase --concept lighthouse --kind object --method closed --add all --out more --device cpu")
    assert result.exit_code == 0, result.output
    assert "4 names, 1 of them new" in result.stdout
    more = Patch.load("more")
    assert more.metadata is not None and more.metadata.names is not None
    assert [one.name for one in more.metadata.names] == ["tench", "boat", "red car", "lighthouse"]
    for module in made.modules:
        for old, new, rows in zip(made.factors(module), more.factors(module), (0, 1), strict=True):
            assert torch.equal(old, new.narrow(rows, 0, 3))
    shown = invoke("inspect more").stdout
    assert "lighthouse" in shown and "moves most" in shown
    for words, told in (
        ("--concept boat --add all --out x", "has the name 'boat' already"),
        ("--concept oak --add all", "say where with --out"),
        ("--concept oak --add all:0.5 --out x", "has a scale"),
        ("--concept oak --add all --out x --resume", "does not go with --resume"),
    ):
        refused = invoke(f"erase --kind object --method closed --device cpu {words}")
        assert refused.exit_code == 2 and told in refused.stderr, refused.output
        assert not Path("x").exists()
    refused = invoke("erase --kind object --method esd --concept oak --add all --out x")
    assert refused.exit_code == 2 and "give --method closed" in refused.stderr
