from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from recare_patch.core.errors import CareSetError
from recare_patch.recipe.concept import Concept
from recare_patch.recipe.recipe import Recipe
from tests.cli.conftest import Stage


@dataclass(frozen=True)
class FakeSet:
    """The part of a CARE-set that the commands use."""

    words: tuple[str, ...] = ("stars", "night")
    images: int = 48

    @property
    def concept(self) -> Concept:
        return Concept(text="Van Gogh", kind="style")

    @property
    def tokens(self) -> tuple[Any, ...]:
        kept = [
            SimpleNamespace(text=word, count=9, cluster=1, residual=0.5, kept=True, reason="")
            for word in self.words
        ]
        dropped = SimpleNamespace(
            text="gogh", count=48, cluster=None, residual=0.1, kept=False, reason="names the concept"
        )
        return (*kept, dropped)

    def save(self, path: Path) -> None:
        path.write_text(",".join(self.words))

    @classmethod
    def load(cls, path: Path) -> FakeSet:
        return cls(words=tuple(path.read_text().split(",")))

    def with_added(self, words: Any) -> FakeSet:
        return replace(self, words=(*self.words, *words))

    def with_removed(self, words: Any) -> FakeSet:
        if not set(words) <= set(self.words):
            raise CareSetError("no such word")
        return replace(self, words=tuple(word for word in self.words if word not in words))


@pytest.fixture
def models(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> Stage:
    """Stand-ins for base model, CLIP and mining; what they were asked is in ``stage.calls``."""

    def generate(prompts: list[str], seeds: list[int], **options: Any) -> list[str]:
        stage.calls.append(("generate", {"prompts": prompts, "seeds": seeds, **options}))
        return ["picture"] * len(prompts)

    def build(concept: Concept, images: list[str], clip: Any, options: Any, **more: Any) -> FakeSet:
        stage.calls.append(("build", {"concept": concept, "images": images, "options": options, **more}))
        return FakeSet()

    def resolve_recipe(concept: str, **options: Any) -> Recipe:
        stage.calls.append(("resolve", {"concept": concept, **options}))
        return Recipe(concept=Concept(text=concept, kind=options["kind"] or "style")).with_overrides(
            options["overrides"]
        )

    def plot(care_set: FakeSet, path: Path, clip: Any) -> None:
        path.write_bytes(b"png")

    fakes: dict[str, dict[str, Any]] = {
        "base_models": {
            "load_base": lambda source, **_: SimpleNamespace(id=source, generate=generate, pipeline=None)
        },
        "careset": {"CareSet": FakeSet, "build_care_set": build, "plot_care_set": plot},
        "clip": {"Clip": SimpleNamespace(load=lambda source: source), "default_clip": lambda base: base},
    }
    for name, parts in fakes.items():
        fake = ModuleType(f"recare_patch.{name}")
        vars(fake).update(parts)
        monkeypatch.setitem(sys.modules, f"recare_patch.{name}", fake)
    erasing: Any = sys.modules["recare_patch.erasure.run"]
    erasing.resolve_recipe = resolve_recipe
    erasing.target_seeds = lambda recipe: list(range(recipe.target_images.count))
    return stage


def test_build(models: Stage) -> None:
    result = models.run(
        "careset",
        "build",
        "--concept",
        "Van Gogh",
        "--seed",
        3,
        "--set",
        "target_images.count=5",
        "--set",
        "care_set.clusters=2",
    )
    assert result.exit_code == 0, result.output
    calls = dict(models.calls)
    assert calls["generate"]["prompts"] == ["A painting in the style of Van Gogh"] * 5
    assert len(set(calls["generate"]["seeds"])) == 5
    assert calls["build"]["images"] == ["picture"] * 5
    assert (calls["build"]["options"].clusters, calls["build"]["seed"]) == (2, 3)
    assert Path("van-gogh-care-set.json").read_text() == "stars,night"
    assert "2 CARE-concepts of Van Gogh: stars, night" in result.stdout


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "no concept given"),
        (["--concept", " "], "a concept needs"),
        (["--concept", "x", "--kind", "stile"], "did you mean 'style'?"),
        (["--concept", "x", "--set", "care_set.cluster=2"], "did you mean 'care_set.clusters'?"),
    ],
)
def test_build_refuses_before_loading_a_model(models: Stage, words: list[str], sentence: str) -> None:
    result = models.run("careset", "build", *words)
    assert result.exit_code == 2 and sentence in result.stderr
    assert not models.calls


def test_show_a_file_or_a_patch(models: Stage) -> None:
    Path("patch").mkdir()
    FakeSet().save(Path("patch/care_set.json"))
    short = models.run("careset", "show", "patch").stdout
    assert "Van Gogh (style): 2 kept of 3 tokens mined from 48 pictures" in short
    assert "gogh " not in short and "add --all" in short
    long = models.run("careset", "show", "patch/care_set.json", "--all").stdout
    assert "names the concept" in long and "add --all" not in long


def test_plot(models: Stage) -> None:
    FakeSet().save(Path("set.json"))
    assert models.run("careset", "plot", "set.json").exit_code == 0
    assert Path("set.png").is_file()
    assert models.run("careset", "plot", "set.json", "--out", "map.png").exit_code == 0
    assert Path("map.png").is_file()


def test_edit_in_place_and_to_another_file(models: Stage) -> None:
    FakeSet().save(Path("set.json"))
    result = models.run(
        "careset", "edit", "set.json", "--add", "moon", "--remove", "stars", "--out", "new.json"
    )
    assert result.exit_code == 0, result.output
    assert Path("new.json").read_text() == "night,moon"
    assert Path("set.json").read_text() == "stars,night"
    assert models.run("careset", "edit", "set.json", "--add", "moon").exit_code == 0
    assert Path("set.json").read_text() == "stars,night,moon"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["edit", "set.json"], "nothing to edit"),
        (["edit", "set.json", "--remove", "x"], "no such word"),
        (["edit", "none.json", "--add", "x"], "there is no CARE-set at none.json"),
        (["show", "none"], "there is no CARE-set at none"),
    ],
)
def test_refusals_change_nothing(models: Stage, words: list[str], sentence: str) -> None:
    FakeSet().save(Path("set.json"))
    result = models.run("careset", *words)
    assert result.exit_code == 2 and sentence in result.stderr
    assert Path("set.json").read_text() == "stars,night"
