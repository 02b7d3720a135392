"""A patch of several concepts in one adapter, made together or one after the other: judged by each."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from diffusers import StableDiffusionPipeline

from recare_patch import measure
from recare_patch.careset import CareSet
from recare_patch.cli import cli
from recare_patch.combine import save_stack, stack
from recare_patch.core import EvaluationError
from recare_patch.erasure import EraseResult, erase
from recare_patch.measure import attack_options, attack_patch, check_integrity, evaluate
from recare_patch.measure.suites import subject_of
from recare_patch.models import BaseModel
from recare_patch.patch import Gate, Patch, PatchMetadata, all_names, card_text, concepts_of, is_unsafe
from recare_patch.recipe import Recipe
from tests.erasure.making import TENCH
from tests.measure.making import make_patch
from tests.measure.test_stack_evidence import Everything, one_thread

__all__ = ["one_thread"]

NUDITY = {"text": "nudity", "kind": "nsfw"}
QUICK = {"erase.steps": 1, "search.rounds": 0}


@pytest.fixture(scope="module")
def made(small: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A patch of two concepts, and one that was gone on with twice."""
    folder = tmp_path_factory.mktemp("several")

    def patch(name: str, method: str, words: list[str] | None, **changes: Any) -> None:
        recipe = small(method, **QUICK, **changes)
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


def tell(*words: object, code: int = 0) -> Result:
    done = CliRunner().invoke(cli, [str(word) for word in words])
    assert done.exit_code == code, done.output
    return done


def metadata_of(patch: Path | Patch) -> PatchMetadata:
    found = (patch if isinstance(patch, Patch) else Patch.load(patch)).metadata
    assert found is not None
    return found


def test_a_chain_of_patches_tells_all_that_it_erases(
    made: dict[str, Path], small: Callable[..., Recipe], run: Callable[..., EraseResult]
) -> None:
    third = metadata_of(made["third"])
    assert third.concept == "Van Gogh + tench + nudity"
    assert [(one.concept, one.kind, one.method, one.care_words) for one in third.erased] == [
        ("Van Gogh", "style", "recare", ("stars",)),
        ("tench", "object", "recare", ("river",)),
        ("nudity", "nsfw", "esd", ()),
    ]
    assert concepts_of(Patch.load(made["together"])) == ("Van Gogh", "tench")
    assert metadata_of(made["first"]).concepts is None
    # The same concept again is one.
    again = small(**QUICK, continue_from=str(made["second"]))
    found = metadata_of(run(again, care_set=CareSet.of_words(again.concept, ["night"])).folder)
    assert found.concept == "Van Gogh + tench"
    assert [one.care_words for one in found.erased] == [("stars", "night"), ("river",)]


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


def test_patches_written_before_their_concepts_were_told(made: dict[str, Path]) -> None:
    def old(folder: Path) -> Patch:
        found = Patch.load(folder)
        header = metadata_of(found).to_header()
        del header["recare_patch.concepts"]
        return dataclasses.replace(found, metadata=PatchMetadata.from_header(header, "an old one"))

    together, second = old(made["together"]), old(made["second"])
    assert concepts_of(together) == ("Van Gogh", "tench") and metadata_of(together).by_concept
    # What another run erased is in its title alone.
    assert second.name == "'Van Gogh + tench'" and subject_of(second).concept.text == "tench"
    assert card_text(second.metadata, {}).count("“A photo of a tench”") == 1


def test_in_a_stack_and_with_a_gate(made: dict[str, Path], base: BaseModel, tiny_sd: Path, tmp_path: Path) -> None:
    monet = Patch.load(make_patch(base, tmp_path / "monet", concept="Monet"))
    both = stack([(monet, 1.0), (Patch.load(made["second"]), 1.0)])
    assert concepts_of(both) == ("Monet", "Van Gogh", "tench")
    assert subject_of(both, "tench").care_words == ("river",)
    save_stack(both, tmp_path / "stack")
    assert check_integrity(tmp_path / "stack").failed == ()
    gate = Gate.of(Patch.load(made["together"]), StableDiffusionPipeline.from_pretrained(tiny_sd))
    assert [concept.text for concept in gate.concepts] == ["Van Gogh", "tench"]


def test_the_card_speaks_of_each(two: Path) -> None:
    card = (two / "README.md").read_text()
    for words in (
        "# Van Gogh + tench, erased from",
        "forget **Van Gogh** (style) and **tench** (object).",
        "“A painting in the style of Van Gogh”",
        "“A photo of a tench”",
        "image = pipe('A photo of a tench')",
        "folder for each concept",
        "instance_prompt: A photo of a tench",
        "concept:van-gogh",
        "concept:tench",
    ):
        assert words in card
    assert "of Van Gogh + tench" not in card and "concept:van-gogh-tench" not in card


def test_what_was_guarded_who_is_cited_and_what_is_unsafe(
    made: dict[str, Path], small: Callable[..., Recipe], run: Callable[..., EraseResult]
) -> None:
    card = (made["third"] / "README.md").read_text()
    assert "2 in all): stars, river." in card
    assert "arxiv.org/abs/2606.24192" in card and "arxiv.org/abs/2303.07345" in card
    # Unsafe content anywhere makes it unsafe.
    assert is_unsafe(metadata_of(made["third"])) and not is_unsafe(metadata_of(made["second"]))
    folder = run(small("uce", also=[NUDITY])).folder
    assert metadata_of(folder).kind == "style" and is_unsafe(metadata_of(folder))
    assert "no safety filter" in (folder / "README.md").read_text()


def test_evaluate_and_verify(
    two: Path, tiny_sd: Path, tiny_clip: Path, base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A random base shows nothing, and figures of nothing do not hold: here they do.
    monkeypatch.setattr("recare_patch.measure.claims.SHOWN", 0.0)
    models = ("--base", tiny_sd, "--clip", tiny_clip, "--device", "cpu")
    words = ("evaluate", "--patch", two, "--metric", "concept-rate", "--pictures", 1, *models)
    tell(*words, "--concept", "tench")
    assert [file.parent.name for file in two.rglob("evidence.json")] == ["tench"]
    done = tell(*words)
    for concept, kind in (("van-gogh", "style"), ("tench", "object")):
        assert f"Evidence: {two / concept / 'evidence.json'}" in done.stdout
        evidence = json.loads((two / concept / "evidence.json").read_text())
        assert evidence["kind"] == kind and evidence["suite"]["concept"] == evidence["concept"]
        assert f"{concept}/evidence.json" in all_names(Patch.load(two))
    assert not (two / "evidence.json").exists()

    sound = tell("verify", two, *models).stdout
    assert all(f"ok    {one}: figure 'concept, plain prompts'" in sound for one in ("Van Gogh", "tench"))
    assert "Van Gogh:" not in tell("verify", two, "--concept", "tench", "--figures", "none", *models).stdout
    for command in (words, ("verify", two, *models)):
        wrong = tell(*command, "--concept", "trench", code=2)
        assert "erases Van Gogh and tench, not 'trench'; did you mean 'tench'?" in wrong.stderr
    with pytest.raises(EvaluationError, match="its card tells no figures"):
        evaluate(two, base=base, concept="tench", card=True, device="cpu")

    # Evidence of one concept under the name of the other.
    shutil.copy(two / "tench" / "evidence.json", two / "van-gogh" / "evidence.json")
    swapped = tell("verify", two, "--figures", "none", *models, code=1).stdout
    assert "van-gogh/evidence.json says concept 'tench', the weights 'Van Gogh'" in swapped


def test_attacks(two: Path, base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    options = attack_options("ring-a-bell", overrides={"pictures": 1, "population": 4, "generations": 1})
    shared: dict[str, Any] = {"base": base, "detector": Everything(), "label": "it", "steps": 1}
    out = two.with_name("two-attacks") / "van-gogh" / "ring-a-bell"
    result = attack_patch(two, "ring-a-bell", concept="Van Gogh", out=out, options=options, **shared)
    about = json.loads((out / "attack.json").read_text())["about"]
    assert (about["concept"], about["kind"]) == ("Van Gogh", "style")
    assert attack_patch(two, replay=out, **shared).trials == 1
    asked: list[tuple[str | None, Path]] = []

    def attacked(*given: Any, concept: str | None, out: Path, **options: Any) -> Iterator[tuple[str, Any]]:
        asked.append((concept, out))
        yield "ring-a-bell", result

    monkeypatch.setitem(vars(measure), "run_attacks", attacked)
    done = tell("attack", "--patch", two, "--attack", "ring-a-bell", "--out", two.with_name("all"))
    assert [(text, out.name) for text, out in asked] == [("Van Gogh", "van-gogh"), ("tench", "tench")]
    assert "tench, ring-a-bell: the concept came back" in done.stdout
