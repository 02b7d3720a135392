from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from click.testing import Result

from recare_patch.recipe.recipe import Recipe, list_recipes

Invoke = Callable[..., Result]


def test_list(invoke: Invoke) -> None:
    lines = invoke("recipes", "list").stdout.splitlines()
    assert lines[0].split() == ["name", "concept", "kind", "base"]
    assert [line.split()[0] for line in lines[1:]] == [info.name for info in list_recipes()]


def test_show_is_a_whole_recipe(invoke: Invoke) -> None:
    shown = Recipe.from_yaml(invoke("recipes", "show", "van-gogh").stdout)
    assert shown.concept.text == "Van Gogh"


def test_validate_tells_all_files_and_faults(invoke: Invoke) -> None:
    Path("good.yaml").write_text("concept: {text: tench, kind: object}")
    Path("bad.yaml").write_text("concept: {text: tench, kind: objct}\nsed: 1")
    result = invoke("recipes", "validate", "bad.yaml", "good.yaml", "van-gogh", "no-such")
    assert result.exit_code == 2
    assert result.stdout.splitlines() == [
        "good.yaml: sound (recare erases tench from atelier)",
        "van-gogh: sound (recare erases Van Gogh from atelier)",
    ]
    first, second = result.stderr.splitlines()
    assert first.startswith("Error: bad.yaml: ") and "'object'" in first and "'seed'" in first
    assert "unknown recipe 'no-such'" in second


def test_validate_sound_files(invoke: Invoke) -> None:
    assert invoke("recipes", "validate", *(info.path for info in list_recipes())).exit_code == 0


def test_show_of_nothing_known(invoke: Invoke) -> None:
    result = invoke("recipes", "show", "van-goh-atelier")
    assert result.exit_code == 2 and "did you mean 'van-gogh-atelier'?" in result.stderr
