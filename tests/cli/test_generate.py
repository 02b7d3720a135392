from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from recare_patch.cli.common import parse_patch
from recare_patch.core.errors import PatchError
from recare_patch.recipe.recipe import load_recipe
from tests.cli.conftest import Stage


def make_patch(name: str, recipe: str = "van-gogh") -> Path:
    folder = Path(name)
    folder.mkdir()
    (folder / "recipe.yaml").write_text(load_recipe(recipe).to_yaml())
    return folder


def test_a_sheet_before_and_after(stage: Stage) -> None:
    make_patch("a")
    make_patch("b")
    result = stage.run(
        "generate",
        "--patch",
        "a",
        "--patch",
        "b:-0.5",
        "--prompt",
        "x",
        "--prompt",
        "y",
        "--count",
        2,
        "--seed",
        7,
    )
    assert result.exit_code == 0, result.output
    options = stage.calls[0][1]
    assert options["patches"] == [(Path("a"), 1.0), (Path("b"), -0.5)]
    assert (options["prompts"], options["seeds"]) == (["x", "y"], [7, 8])
    assert (options["steps"], options["guidance_scale"], options["base"]) == (20, 5.0, "atelier")
    with Image.open("generated.png") as sheet:
        assert sheet.width > 200 and sheet.height > 4 * 100
    assert result.stdout == "Sheet: generated.png\n"


def test_each_picture_can_be_saved(stage: Stage) -> None:
    make_patch("a")
    result = stage.run(
        "generate", "--patch", "a", "--prompt", "x", "--count", 1, "--out", "s.png", "--save-images", "all"
    )
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in Path("all").iterdir()) == [
        "00-seed0-after.png",
        "00-seed0-before.png",
    ]


def test_without_a_patch_only_the_base(stage: Stage) -> None:
    result = stage.run("generate", "--prompt", "x", "--count", 1, "--save-images", "all")
    assert result.exit_code == 0, result.output
    assert [path.name for path in Path("all").iterdir()] == ["00-seed0-before.png"]


def test_the_base_is_the_one_that_the_patch_was_made_for(stage: Stage) -> None:
    make_patch("a", "van-gogh-sd-1.5")
    stage.run("generate", "--patch", "a", "--prompt", "x")
    stage.run("generate", "--patch", "a", "--prompt", "x", "--base", "mine")
    assert [options["base"] for _, options in stage.calls] == [load_recipe("van-gogh-sd-1.5").base, "mine"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--patch", "none", "--prompt", "x"], "there is no patch at none"),
        (["--patch", "none:0.5", "--prompt", "x"], "there is no patch at none"),
        (["--patch", "a:strong", "--prompt", "x"], "the scale of a must be a number"),
        (["--patch", "a:nan", "--prompt", "x"], "the scale of a must be a number"),
        (["--patch", "a"], "Missing option '--prompt'"),
        (["--prompt", "x", "--count", "0"], "0 is not in the range"),
    ],
)
def test_bad_input(stage: Stage, words: list[str], sentence: str) -> None:
    make_patch("a")
    result = stage.run("generate", *words)
    assert result.exit_code == 2
    assert sentence in result.stderr and not stage.calls


def test_a_colon_in_a_folder_is_part_of_its_name(tmp_path: Path) -> None:
    (tmp_path / "a:2").mkdir()
    assert parse_patch(str(tmp_path / "a:2")) == (tmp_path / "a:2", 1.0)
    assert parse_patch(f"{tmp_path / 'a:2'}:3") == (tmp_path / "a:2", 3.0)
    with pytest.raises(PatchError):
        parse_patch(str(tmp_path / "b:2"))
