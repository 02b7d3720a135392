"""``recare-patch methods``, ``recipes``, ``careset`` and ``atelier``."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from recare_patch.core import CareSetError, RecarePatchError
from recare_patch.models import atelier
from recare_patch.recipe import METHODS, Concept, Recipe, bundled, list_recipes, measured
from tests.cli.conftest import Fake, Invoke, Stage, one_sentence


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    file = tmp_path / "figures.json"
    monkeypatch.setattr(bundled, "FIGURES_FILE", file)
    return file


def test_all_methods_are_listed_with_what_is_known(invoke: Invoke, figures: Path) -> None:
    result = invoke("methods")
    assert result.exit_code == 0, result.output
    for name in METHODS:
        info = Recipe(concept=Concept(text="a", kind="object"), method=name).method_info
        assert f"{name}  ({info.title}; " in result.stdout
        for text in (info.touches, info.strength, info.weakness):
            assert text in result.stdout
    assert "still shown" not in result.stdout


def test_figures_are_shown_where_there_are_any(invoke: Invoke, figures: Path) -> None:
    row = {"shown": 0.02, "care": 0.97, "seconds": 12.3, "evaluations": 1234, "bytes": 103_000}
    figures.write_text(json.dumps({"methods": {"uce": {"Van Gogh": row}}}))
    told = invoke("methods UCE").stdout
    assert "on Van Gogh" in told and "recare" not in told
    assert "2% still shown, companions kept 97%, 12 s, 1,234 evaluations, 103 kB" in told
    facts = json.loads(invoke("methods uce --json").stdout)
    assert facts["uce"]["measured"] == {"Van Gogh": row}
    assert facts["uce"]["defaults"]["adapter.layers"] == "cross-attention-kv"
    one_sentence(invoke("methods s-grase"), "did you mean 's-grace'?")
    figures.write_text("[]")
    with pytest.raises(RecarePatchError, match="damaged"):
        measured()


def test_recipes_are_listed_and_shown_whole(invoke: Invoke) -> None:
    lines = invoke("recipes list").stdout.splitlines()
    assert lines[0].split() == ["name", "concept", "kind", "base"]
    assert [line.split()[0] for line in lines[1:]] == [info.name for info in list_recipes()]
    assert Recipe.from_yaml(invoke("recipes show van-gogh").stdout).concept.text == "Van Gogh"
    one_sentence(invoke("recipes show van-goh-atelier"), "did you mean 'van-gogh-atelier'?")


def test_validate_tells_all_files_and_faults(invoke: Invoke) -> None:
    assert invoke("recipes", "validate", *(info.path for info in list_recipes())).exit_code == 0
    Path("good.yaml").write_text("concept: {text: tench, kind: object}")
    Path("bad.yaml").write_text("concept: {text: tench, kind: objct}\nsed: 1")
    result = invoke("recipes validate bad.yaml good.yaml van-gogh no-such")
    assert result.exit_code == 2
    assert result.stdout.splitlines() == [
        "good.yaml: sound (recare erases tench from atelier)",
        "van-gogh: sound (recare erases Van Gogh from atelier)",
    ]
    first, second = result.stderr.splitlines()
    assert first.startswith("Error: bad.yaml: ") and "'object'" in first and "'seed'" in first
    assert "unknown recipe 'no-such'" in second


@dataclass(frozen=True)
class FakeSet:
    """The part of a CARE-set that the commands use."""

    words: tuple[str, ...] = ("stars", "night")
    images: int = 48
    concept = Concept(text="Van Gogh", kind="style")

    @property
    def tokens(self) -> list[Any]:
        kept = {"count": 9, "cluster": 1, "residual": 0.5, "kept": True, "reason": ""}
        dropped = kept | {"cluster": None, "kept": False, "reason": "names the concept"}
        rows = [*((word, kept) for word in self.words), ("gogh", dropped)]
        return [SimpleNamespace(text=text, **told) for text, told in rows]

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
def models(stage: Stage, fake: Fake) -> Stage:
    """Stand-ins for base model, CLIP and mining; what they were asked is in ``stage.calls``."""

    def build(recipe: Recipe, base: Any, clip: Any, progress: Any) -> FakeSet:
        stage.calls.append(("build", {"recipe": recipe, "base": base.id, "clip": clip}))
        return FakeSet()

    def resolve_recipe(concept: str, **options: Any) -> Recipe:
        stage.calls.append(("resolve", {"concept": concept, **options}))
        kind = options["kind"] or "style"
        return Recipe(concept=Concept(text=concept, kind=kind)).with_overrides(options["overrides"])

    fake("models", load_base=lambda source, **_: SimpleNamespace(id=source, device="cpu"))
    fake("erasure", resolve_recipe=resolve_recipe, care_set_of=build, load_clip=lambda source, *_: source)
    fake(
        "careset",
        CareSet=FakeSet,
        plot_care_set=lambda care_set, path, clip: path.write_bytes(b"png"),
        Clip=SimpleNamespace(load=lambda source, device=None: source),
        default_clip=lambda base: base,
    )
    return stage


def test_careset_build(models: Stage) -> None:
    more = ["--seed", 3, "--alias", "Vincent", "--alias", "van gough", "--set", "target_images.count=5"]
    result = models.run("careset", "build", "--concept", "Van Gogh", *more)
    assert result.exit_code == 0, result.output
    asked = dict(models.calls)["build"]
    assert asked["base"] == asked["clip"] == "atelier"
    assert asked["recipe"].concept == Concept(text="Van Gogh", kind="style", aliases=("Vincent", "van gough"))
    assert (asked["recipe"].target_images.count, asked["recipe"].seed) == (5, 3)
    assert Path("van-gogh-care-set.json").read_text() == "stars,night"
    assert "2 CARE-concepts of Van Gogh: stars, night" in result.stdout


def test_careset_show_plot_and_edit(models: Stage) -> None:
    Path("patch").mkdir()
    FakeSet().save(Path("patch/care_set.json"))
    short = models.run("careset show patch").stdout
    assert "Van Gogh (style): 2 kept of 3 tokens mined from 48 pictures" in short
    assert "gogh " not in short and "add --all" in short
    long = models.run("careset show patch/care_set.json --all").stdout
    assert "names the concept" in long and "add --all" not in long
    assert models.run("careset plot patch").exit_code == 0 and Path("patch/care_set.png").is_file()
    assert models.run("careset plot patch --out map.png").exit_code == 0 and Path("map.png").is_file()
    result = models.run("careset edit patch --add moon --remove stars --out new.json")
    assert result.exit_code == 0, result.output
    assert Path("new.json").read_text() == "night,moon"
    assert Path("patch/care_set.json").read_text() == "stars,night"
    assert models.run("careset edit patch --add moon").exit_code == 0
    assert Path("patch/care_set.json").read_text() == "stars,night,moon"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["build"], "no concept given"),
        (["build", "--concept", " "], "a concept needs"),
        (["build", "--concept", "x", "--kind", "stile"], "did you mean 'style'?"),
        (["build", "--concept", "x", "--alias", "…"], "concept.aliases"),
        (["build", "--concept", "x", "--set", "care_set.cluster=2"], "did you mean 'care_set.clusters'?"),
        (["edit", "set.json"], "nothing to edit"),
        (["edit", "set.json", "--remove", "x"], "no such word"),
        (["edit", "none.json", "--add", "x"], "there is no CARE-set at none.json"),
        (["show", "none"], "there is no CARE-set at none"),
    ],
)
def test_careset_refuses_and_changes_nothing(models: Stage, words: list[str], sentence: str) -> None:
    FakeSet().save(Path("set.json"))
    one_sentence(models.run("careset", *words), sentence)
    assert not models.calls and Path("set.json").read_text() == "stars,night"


def test_atelier_info(invoke: Invoke, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sizes, shares, groups = {"pipeline/unet": 7_200_000}, {"van gogh": {"stars": 0.76}}, {"style": ("monet",)}
    facts = atelier.AtelierInfo(Path("folder/pipeline"), 23.5, sizes, shares, groups)
    with monkeypatch.context() as here:
        here.setattr(atelier, "info", lambda: facts)
        told = invoke("atelier info").stdout
    words = ("23.5 MB", "7.20 M parameters", "monet", "stars 0.76", 'from_pretrained("folder/pipeline")')
    assert all(word in told for word in words)
    monkeypatch.setattr(atelier, "WEIGHTS", tmp_path / "none")
    one_sentence(invoke("atelier info"), "benchmarks.atelier train")
