"""A patch of several concepts in one adapter, made together or one after the other: judged by each."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from diffusers import StableDiffusionPipeline

from recare_patch.careset import CareSet
from recare_patch.combine import stacking as composing
from recare_patch.core.errors import EvaluationError
from recare_patch.erasure.run import erase
from recare_patch.measure import verify as verifying
from recare_patch.measure.attacks import AttackResult, attack_options
from recare_patch.measure.attacks import run as attacking
from recare_patch.measure.attacks.run import attack_patch
from recare_patch.measure.run import evaluate
from recare_patch.measure.suites import subject_of
from recare_patch.models.embeds import BaseModel
from recare_patch.models.loading import load_base
from recare_patch.patch.card import card_text
from recare_patch.patch.folder import all_names
from recare_patch.patch.front_matter import is_unsafe
from recare_patch.patch.gate import Gate
from recare_patch.patch.markdown import split_card
from recare_patch.patch.patch import Patch, PatchMetadata, concepts_of
from tests.cli.conftest import invoke
from tests.contracts.test_methods import small_recipe
from tests.measure.making import make_patch
from tests.measure.test_stack_evidence import Everything

__all__ = ["invoke"]
TENCH = {"text": "tench", "kind": "object"}
NUDITY = {"text": "nudity", "kind": "nsfw"}
QUICK = {"erase.steps": 1, "search.rounds": 0}


@pytest.fixture(scope="module")
def made(tiny_sd: Path, tiny_clip: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A patch of two concepts, and one that was gone on with twice."""
    folder = tmp_path_factory.mktemp("several")

    def patch(name: str, method: str, words: list[str] | None, **changes: Any) -> None:
        recipe = small_recipe(method, tiny_sd, tiny_clip, **QUICK, **changes)
        care_set = CareSet.of_words(recipe.concept, words) if words else None
        erase(recipe, folder / name, device="cpu", preview=False, care_set=care_set)

    patch("together", "esd", None, also=[TENCH])
    patch("first", "recare", ["stars"])
    patch("second", "recare", ["river"], concept=TENCH, continue_from=str(folder / "first"))
    patch("third", "esd", None, concept=NUDITY, continue_from=str(folder / "second"))
    return {name: folder / name for name in ("together", "first", "second", "third")}


@pytest.fixture(params=["together", "second"])
def two(request: pytest.FixtureRequest, made: dict[str, Path], tmp_path: Path) -> Path:
    """Of Van Gogh and tench, made in either way."""
    return Path(shutil.copytree(made[request.param], tmp_path / "two"))


@pytest.fixture(scope="module")
def base(tiny_sd: Path) -> BaseModel:
    return load_base(tiny_sd, device="cpu")


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def metadata_of(patch: Path | Patch) -> PatchMetadata:
    found = (patch if isinstance(patch, Patch) else Patch.load(patch)).metadata
    assert found is not None
    return found


def without_concepts(folder: Path) -> Patch:
    """The patch as it was written before its concepts were told."""
    found = Patch.load(folder)
    header = metadata_of(found).to_header()
    del header["recare_patch.concepts"]
    return dataclasses.replace(found, metadata=PatchMetadata.from_header(header, "an old one"))


# ------------------------------------------------------------------------ what is told


def test_a_chain_of_patches_tells_all_that_it_erases(made: dict[str, Path]) -> None:
    third = metadata_of(made["third"])
    assert third.concept == "Van Gogh + tench + nudity"
    assert [(one.concept, one.kind, one.method, one.care_words) for one in third.erased] == [
        ("Van Gogh", "style", "recare", ("stars",)),
        ("tench", "object", "recare", ("river",)),
        ("nudity", "nsfw", "esd", ()),
    ]
    assert concepts_of(Patch.load(made["together"])) == ("Van Gogh", "tench")
    assert metadata_of(made["first"]).concepts is None


def test_the_same_concept_again_is_one(
    made: dict[str, Path], tiny_sd: Path, tiny_clip: Path, tmp_path: Path
) -> None:
    again = small_recipe("recare", tiny_sd, tiny_clip, **QUICK, continue_from=str(made["second"]))
    words = CareSet.of_words(again.concept, ["night"])
    erase(again, tmp_path / "again", device="cpu", preview=False, care_set=words)
    found = metadata_of(tmp_path / "again")
    assert found.concept == "Van Gogh + tench"
    assert [(one.concept, one.care_words) for one in found.erased] == [
        ("Van Gogh", ("stars", "night")),
        ("tench", ("river",)),
    ]


def test_each_is_judged_by_its_own_words_and_the_patch_s_settings(made: dict[str, Path]) -> None:
    second = Patch.load(made["second"])
    for name, kind, words in (("van gogh", "style", ("stars",)), ("Tench", "object", ("river",))):
        subject = subject_of(second, name)
        assert (subject.concept.kind, subject.care_words, subject.method) == (kind, words, "recare")
        assert subject.recipe.target_images.count == 4 and subject.recipe.title == subject.concept.text
    with pytest.raises(EvaluationError, match="erases several concepts: choose one of Van Gogh, tench"):
        subject_of(second)
    with pytest.raises(EvaluationError, match=r"not 'trench'; did you mean 'tench'\?"):
        subject_of(second, "trench")


def test_patches_from_before(made: dict[str, Path]) -> None:
    together = without_concepts(made["together"])
    assert concepts_of(together) == ("Van Gogh", "tench") and metadata_of(together).by_concept
    # What another run erased is in its title alone.
    second = without_concepts(made["second"])
    assert second.name == "'Van Gogh + tench'" and subject_of(second).concept.text == "tench"
    assert card_text(second.metadata, {}).count("“A photo of a tench”") == 1


def test_in_a_stack(made: dict[str, Path], base: BaseModel, tmp_path: Path) -> None:
    monet = Patch.load(make_patch(base, tmp_path / "monet", concept="Monet"))
    stack = composing.stack([(monet, 1.0), (Patch.load(made["second"]), 1.0)])
    assert concepts_of(stack) == ("Monet", "Van Gogh", "tench")
    assert subject_of(stack, "tench").care_words == ("river",)
    composing.save_stack(stack, tmp_path / "stack")
    assert verifying.check_integrity(tmp_path / "stack").failed == ()


def test_a_gate_opens_for_each(made: dict[str, Path], tiny_sd: Path) -> None:
    gate = Gate.of(Patch.load(made["together"]), StableDiffusionPipeline.from_pretrained(tiny_sd))
    assert [concept.text for concept in gate.concepts] == ["Van Gogh", "tench"]


# ------------------------------------------------------------------------ its card


def test_the_card_speaks_of_each(two: Path) -> None:
    card = (two / "README.md").read_text()
    assert "# Van Gogh + tench, erased from" in card
    assert "forget **Van Gogh** (style) and **tench** (object)." in card
    for prompt in ("“A painting in the style of Van Gogh”", "“A photo of a tench”"):
        assert prompt in card
    assert "image = pipe('A photo of a tench')" in card and "folder for each concept" in card
    front, _ = split_card(card)
    assert front["instance_prompt"] == "A photo of a tench"
    assert {"concept:van-gogh", "concept:tench"} <= set(front["tags"])
    assert "of Van Gogh + tench" not in card and "concept:van-gogh-tench" not in card


def test_what_was_guarded_and_who_is_cited(made: dict[str, Path]) -> None:
    card = (made["third"] / "README.md").read_text()
    assert "2 in all): stars, river." in card
    assert "arxiv.org/abs/2606.24192" in card and "arxiv.org/abs/2303.07345" in card


def test_unsafe_content_anywhere_makes_it_unsafe(
    made: dict[str, Path], tiny_sd: Path, tiny_clip: Path, tmp_path: Path
) -> None:
    assert is_unsafe(metadata_of(made["third"]))
    assert not is_unsafe(metadata_of(made["second"]))
    recipe = small_recipe("uce", tiny_sd, tiny_clip, also=[NUDITY])
    erase(recipe, tmp_path / "p", device="cpu", preview=False)
    assert metadata_of(tmp_path / "p").kind == "style" and is_unsafe(metadata_of(tmp_path / "p"))
    assert "no safety filter" in (tmp_path / "p" / "README.md").read_text()


# ------------------------------------------------------------------------ how it is judged


def test_evaluate_and_verify(
    two: Path, invoke: Callable[..., Result], tiny_sd: Path, tiny_clip: Path, base: BaseModel
) -> None:
    models = ("--base", tiny_sd, "--clip", tiny_clip, "--device", "cpu")
    words = ("evaluate", "--patch", two, "--metric", "concept-rate", "--pictures", 1, *models)
    one = invoke(*words, "--concept", "tench")
    assert one.exit_code == 0, one.output
    assert [file.parent.name for file in two.rglob("evidence.json")] == ["tench"]
    done = invoke(*words)
    assert done.exit_code == 0, done.output
    for concept, kind in (("van-gogh", "style"), ("tench", "object")):
        assert f"Evidence: {two / concept / 'evidence.json'}" in done.stdout
        evidence = json.loads((two / concept / "evidence.json").read_text())
        assert evidence["kind"] == kind and evidence["suite"]["concept"] == evidence["concept"]
        assert f"{concept}/evidence.json" in all_names(Patch.load(two))
    assert not (two / "evidence.json").exists()

    sound = invoke("verify", two, *models)
    assert sound.exit_code == 0, sound.output
    for concept in ("Van Gogh", "tench"):
        assert f"ok    {concept}: figure 'concept, plain prompts'" in sound.stdout
    alone = invoke("verify", two, "--concept", "tench", "--figures", "none", *models)
    assert alone.exit_code == 0 and "Van Gogh:" not in alone.stdout

    for command in (words, ("verify", two, *models)):
        wrong = invoke(*command, "--concept", "trench")
        assert wrong.exit_code == 2
        assert "erases Van Gogh and tench, not 'trench'; did you mean 'tench'?" in wrong.stderr
    with pytest.raises(EvaluationError, match="its card tells no figures"):
        evaluate(two, base=base, concept="tench", card=True, device="cpu")

    # Evidence of one concept under the name of the other.
    shutil.copy(two / "tench" / "evidence.json", two / "van-gogh" / "evidence.json")
    swapped = invoke("verify", two, "--figures", "none", *models)
    assert swapped.exit_code == 1
    assert "van-gogh/evidence.json says concept 'tench', the weights 'Van Gogh'" in swapped.stdout


def test_attacks(
    two: Path, invoke: Callable[..., Result], base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = attack_options("ring-a-bell", overrides={"pictures": 1, "population": 4, "generations": 1})
    shared: dict[str, Any] = {"base": base, "detector": Everything(), "label": "it", "steps": 1}
    out = two.with_name("two-attacks") / "van-gogh" / "ring-a-bell"
    result = attack_patch(two, "ring-a-bell", concept="Van Gogh", out=out, options=small, **shared)
    about = json.loads((out / "attack.json").read_text())["about"]
    assert (about["concept"], about["kind"]) == ("Van Gogh", "style")
    assert attack_patch(two, replay=out, **shared).trials == 1

    asked: list[tuple[str | None, Path]] = []

    def attacked(
        patch: str, attacks: Mapping[str, Any], *, concept: str | None, out: Path, **options: Any
    ) -> Iterator[tuple[str, AttackResult]]:
        asked.append((concept, out))
        yield "ring-a-bell", result

    monkeypatch.setattr(attacking, "run_attacks", attacked)
    done = invoke("attack", "--patch", two, "--attack", "ring-a-bell", "--out", "all")
    assert done.exit_code == 0, done.output
    assert asked == [("Van Gogh", Path("all/van-gogh")), ("tench", Path("all/tench"))]
    assert "tench, ring-a-bell: the concept came back" in done.stdout
