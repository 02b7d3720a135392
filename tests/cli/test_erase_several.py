"""``erase`` with more than one concept, a replacement, an attribute, or an earlier patch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from recare_patch.patch.patch import Patch
from tests.cli.conftest import Stage
from tests.erasure.making import SMALL

Invoke = Callable[..., Result]


def test_one_patch_a_concept(stage: Stage) -> None:
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
    Path("people.txt").write_text("# two who are in nobody's way\nMira Vale\n\n  Otto Bly \n")
    result = stage.run("erase", "--concepts", "people.txt", "--kind", "identity", "--out", "there")
    assert result.exit_code == 0, result.output
    assert [(one["concept"], one["kind"], one["out"]) for _, one in stage.calls] == [
        ("Mira Vale", "identity", Path("there/mira-vale-patch")),
        ("Otto Bly", "identity", Path("there/otto-bly-patch")),
    ]


def test_together(stage: Stage) -> None:
    result = stage.run("erase", "--concept", "tench", "--concept", "cat", "--kind", "object", "--together")
    assert result.exit_code == 0, result.output
    ((_, options),) = stage.calls
    assert (options["concept"], options["also"]) == ("tench", ["cat"])
    assert options["out"] == Path("tench-cat-patch")


def test_finished_ones_are_not_made_again(stage: Stage) -> None:
    done = Path("there/tench-patch")
    done.mkdir(parents=True)
    (done / "pytorch_lora_weights.safetensors").write_bytes(b"")
    stopped = Path("there/cat-patch/.run")
    stopped.mkdir(parents=True)
    words = ("erase", "--concept", "tench", "--concept", "cat", "--concept", "boat", "--kind", "object")
    stage.fault = KeyboardInterrupt()
    result = stage.run(*words, "--out", "there", "--resume")
    assert result.exit_code == 130
    assert "tench: finished before" in result.stderr
    ((_, options),) = stage.calls
    assert (options["concept"], options["resume"]) == ("cat", True)


def test_a_replacement_and_an_attribute_arrive(stage: Stage) -> None:
    stage.run("erase", "--concept", "tench", "--replace-with", "cat")
    assert stage.calls[-1][1]["overrides"] == {"replace_with": "cat"}
    result = stage.run("erase", "--concept", "stars", "--from", "Van Gogh")
    assert result.exit_code == 0, result.output
    options = stage.calls[-1][1]
    assert (options["concept"], options["subject"]) == ("stars", "Van Gogh")
    assert options["out"] == Path("stars-from-van-gogh-patch")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--concept", "tench", "--together"], "--together is for several concepts, and there is 1"),
        (["--concept", "a", "--concept", "A"], "the concept 'A' is there twice"),
        (["--concept", "a", "--concept", "A", "--together"], "the concept 'A' is there twice"),
        (["--concept", "a", "--concept", "b", "--recipe", "tench"], "--recipe is for one concept"),
        (["--concept", "a", "--concept", "b", "--continue-from", "x"], "--continue-from is for one patch"),
        (["--concept", "a", "--concept", "b", "--care-set", "x"], "--care-set is for one patch"),
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
        (["--concept", "a", "--method", "sgrace"], "did you mean 's-grace'?"),
    ],
)
def test_bad_wishes_are_one_sentence(stage: Stage, words: list[str], sentence: str) -> None:
    result = stage.run("erase", *words)
    assert result.exit_code == 2
    assert not stage.calls
    (line,) = result.stderr.splitlines()
    assert line.startswith("Error: ") and sentence in line


def test_the_stack_has_a_free_folder_before_anything_is_erased(stage: Stage) -> None:
    words = ("erase", "--concept", "tench", "--concept", "cat", "--kind", "object")
    Path("full").mkdir()
    Path("full/file").touch()
    for more, sentence in (
        (("--stack", "full"), "full already holds files"),
        (("--stack", "full/file"), "it is a file, not a folder"),
        (("--out", "all", "--stack", "all"), "the stack cannot lie in all"),
        (("--stack", "cat-patch"), "the stack cannot lie in cat-patch"),
    ):
        result = stage.run(*words, *more)
        assert result.exit_code == 2 and sentence in result.stderr
    Path("cat-patch").mkdir()
    Path("cat-patch/file").touch()
    result = stage.run(*words)
    assert result.exit_code == 2 and "cat-patch already holds files" in result.stderr
    assert not stage.calls


def test_a_short_name_goes_on_from_a_patch(stage: Stage) -> None:
    Path("boat-patch").mkdir()
    stage.run("erase", "--concept", "cat", "--kind", "object", "--continue-from", "boat")
    assert stage.calls[-1][1]["overrides"] == {"continue_from": "boat-patch"}
    result = stage.run("erase", "--concept", "tench", "--continue-from", "boat:0.5")
    assert result.exit_code == 2 and "has a scale" in result.stderr


def test_a_list_with_a_mark_or_in_another_encoding(stage: Stage) -> None:
    Path("marked.txt").write_bytes(b"\xef\xbb\xbftench\n")
    stage.run("erase", "--concepts", "marked.txt", "--kind", "object")
    assert stage.calls[-1][1]["concept"] == "tench"
    Path("odd.txt").write_bytes(b"\xff\xfe")
    result = stage.run("erase", "--concepts", "odd.txt")
    assert result.exit_code == 2 and "it is not UTF-8 text" in result.stderr


def test_an_empty_list(stage: Stage) -> None:
    Path("none.txt").write_text("# nobody\n")
    result = stage.run("erase", "--concepts", "none.txt")
    assert result.exit_code == 2 and "none.txt names no concept" in result.stderr


def test_two_patches_and_their_stack(invoke: Invoke, tiny_sd: Path, tiny_clip: Path, tmp_path: Path) -> None:
    """For real: two patches by the quickest method, stacked into one file."""
    small = [f"{key}={value}" for key, value in SMALL.items() if not key.startswith(("search", "adapter"))]
    words = ["erase", "--concept", "tench", "--concept", "boat", "--kind", "object", "--method", "uce"]
    words += ["--base", str(tiny_sd), "--clip", str(tiny_clip), "--out", "all", "--stack", "both"]
    result = invoke(*words, *(word for pair in small for word in ("--set", pair)), "--device", "cpu")
    assert result.exit_code == 0, result.output
    parts = [Patch.load(Path("all") / f"{name}-patch") for name in ("tench", "boat")]
    both = Patch.load("both")
    assert both.metadata is not None and both.metadata.parts is not None
    assert [part.name for part in both.metadata.parts] == ["tench", "boat"]
    assert set(both.modules) == set(parts[0].modules)
    assert "Stack of 2 patches: both" in result.stdout
