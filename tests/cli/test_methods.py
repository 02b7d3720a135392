"""``recare-patch methods``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from recare_patch.core.errors import RecarePatchError
from recare_patch.recipe import methods as method_table
from recare_patch.recipe.methods import METHODS, measured
from recare_patch.recipe.recipe import KEYS, Recipe

Invoke = Callable[..., Result]


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    file = tmp_path / "figures.json"
    monkeypatch.setattr(method_table, "FIGURES_FILE", file)
    return file


def test_all_are_listed_with_what_is_known(invoke: Invoke, figures: Path) -> None:
    result = invoke("methods")
    assert result.exit_code == 0, result.output
    for name, info in METHODS.items():
        assert f"{name}  ({info.title}; " in result.stdout
        for text in (info.touches, info.strength, info.weakness):
            assert text in result.stdout
    assert "still shown" not in result.stdout


def test_figures_are_shown_where_there_are_any(invoke: Invoke, figures: Path) -> None:
    row = {"shown": 0.02, "care": 0.97, "seconds": 12.3, "evaluations": 1234, "bytes": 103_000}
    figures.write_text(json.dumps({"methods": {"uce": {"Van Gogh": row}}}))
    told = invoke("methods", "UCE").stdout
    assert "on Van Gogh" in told and "recare" not in told
    assert "2% still shown, companions kept 97%, 12 s, 1,234 evaluations, 103 kB" in told
    facts = json.loads(invoke("methods", "uce", "--json").stdout)
    assert facts["uce"]["measured"] == {"Van Gogh": row}
    assert facts["uce"]["defaults"]["adapter.layers"] == "cross-attention-kv"


def test_a_misspelt_name(invoke: Invoke) -> None:
    result = invoke("methods", "s-grase")
    assert result.exit_code == 2 and "did you mean 's-grace'?" in result.stderr


def test_damaged_figures(figures: Path) -> None:
    figures.write_text("[]")
    with pytest.raises(RecarePatchError, match="damaged"):
        measured()


@pytest.mark.parametrize("name", METHODS)
def test_the_table_fits_the_recipe(name: str) -> None:
    info = METHODS[name]
    assert set(info.defaults) <= set(KEYS)
    recipe = Recipe(concept={"text": "a", "kind": "object"}, method=name)  # type: ignore[arg-type]
    for key, value in info.defaults.items():
        section, _, key_name = key.partition(".")
        assert getattr(getattr(recipe, section), key_name) == value
    assert recipe.adapter.layers == info.layers[0]
    assert info.options is None or info.options in Recipe.model_fields
