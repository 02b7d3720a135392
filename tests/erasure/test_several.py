"""More than one plain concept: several at once, one after the other, something in its place, an attribute."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from recare_patch.careset import CareSet
from recare_patch.core import CareSetError, IncompatiblePatchError, PatchError, RecarePatchError, RecipeError
from recare_patch.erasure import EraseResult, resolve_recipe
from recare_patch.erasure.run import erase
from recare_patch.erasure.stages import Run, Stages, continued, earlier_patch
from recare_patch.models import BaseModel, named_tuner_layers
from recare_patch.models import lora as adapters
from recare_patch.patch import Patch
from recare_patch.recipe import METHODS, Recipe
from tests.erasure.making import STARS_FROM_VAN_GOGH, TENCH, methods_of

Small = Callable[..., Recipe]
Runs = Callable[..., EraseResult]
PLAIN = {"search.rounds": 0, "erase.composed": False}


def _predicted(base: BaseModel, *prompts: str) -> Tensor:
    latents = torch.randn((len(prompts), *base.latent_shape), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return base.denoise(latents, torch.full((len(prompts),), 500), base.encode_prompts(list(prompts)))


class TestTogether:
    @pytest.mark.parametrize("name", METHODS)
    def test_one_patch_for_all(self, name: str, small: Small, run: Runs) -> None:
        result = run(small(name, also=[TENCH], **{"erase.steps": 2}))
        metadata = Patch.load(result.folder).metadata
        assert metadata is not None and metadata.concept == "Van Gogh + tench"
        if METHODS.get(name).needs.target_images:
            stages = json.loads((result.folder / "training.json").read_text())["stages"]
            assert {"target images", "target images 2"} <= set(stages)
        # As many steps for each as it would have alone.
        losses = {stage: found for stage, found in result.cost["losses"].items() if "search" not in stage}
        assert all(len(found) == 4 for found in losses.values())

    def test_no_concept_of_a_run_guards_another(self, base: BaseModel, small: Small, tmp_path: Path) -> None:
        also = [TENCH, {"text": "boat", "kind": "object"}]
        recipe = small(also=also, **{"erase.retained_vocabulary": 1000, "search.rounds": 0})
        contexts = [method.context for method in methods_of(recipe, base, tmp_path / "work")]
        assert [context.concept.text for context in contexts] == ["Van Gogh", "tench", "boat"]
        for context in contexts:
            words = {word.lower() for prompt in context.retained.prompts for word in prompt.split()}
            assert words.isdisjoint({"gogh", "tench", "boat"})
            # What a random model takes for a name of the concept is not retained either.
            assert len(words & {"monet", "moon", "garden", "church", "red", "road", "sun"}) > 2

    def test_they_take_turns(self, base: BaseModel, small: Small, tmp_path: Path) -> None:
        methods, seen = methods_of(small("esd", also=[TENCH]), base, tmp_path / "work"), []

        class Once(Stages):
            def fit(self, stage: str, loss_at: Any, steps: int, **options: Any) -> None:
                assert steps == 2 * 22
                seen.extend(loss_at(step, torch.Generator().manual_seed(1)) for step in range(4))

        recipe = methods[0].context.recipe
        type(methods[0]).erase(methods, Once(Run(recipe, tmp_path, base, None, None, False)))  # type: ignore[arg-type]
        assert torch.equal(seen[0], seen[2]) and torch.equal(seen[1], seen[3])
        assert not torch.equal(seen[0], seen[1])

    def test_a_care_set_of_nothing_but_the_other_concept(self, small: Small, run: Runs) -> None:
        recipe = small(also=[TENCH])
        with pytest.raises(CareSetError, match="no word of the CARE-set for 'Van Gogh' was kept"):
            run(recipe, care_set=CareSet.of_words(recipe.concept, ["tench"]))


class TestContinued:
    @pytest.fixture(scope="class")
    def first(self, small: Small, tmp_path_factory: pytest.TempPathFactory) -> Path:
        folder = tmp_path_factory.mktemp("continued") / "first"
        return erase(small("esd"), folder, device="cpu", preview=False).folder

    @pytest.mark.parametrize("name", [name for name in METHODS if METHODS.get(name).info.continues])
    def test_it_starts_where_the_other_ended(self, name: str, small: Small, run: Runs) -> None:
        """With a learning rate of almost nothing, what comes out is what went in."""
        before = run(small(name, **{"erase.steps": 4}), "first")
        still = {"erase.learning_rate": 1.0e-12, "erase.steps": 1, "erase.optimizer": "adamw"}
        patch = run(small(name, continue_from=str(before.folder), concept=TENCH, **still)).patch
        assert before.patch.tensors.keys() == patch.tensors.keys()
        for key, tensor in patch.tensors.items():
            torch.testing.assert_close(tensor, before.patch.tensors[key], atol=1e-5, rtol=1e-3)
        assert patch.metadata is not None and patch.metadata.concept == "Van Gogh + tench"

    def test_the_earlier_model_is_the_teacher(self, base: BaseModel, first: Path, small: Small, tmp_path: Path) -> None:
        prompts = ("A painting in the style of Van Gogh", "a cat")
        plain = _predicted(base, *prompts)
        with Patch.load(first).apply(base.pipeline):
            patched = _predicted(base, *prompts)
        recipe = small("esd", continue_from=str(first), concept=TENCH)
        run = Run(recipe, tmp_path, base, None, None, False)  # type: ignore[arg-type]
        with continued(run, earlier_patch(recipe, base)):
            torch.testing.assert_close(_predicted(base, *prompts), patched, atol=1e-4, rtol=1e-3)
            with Stages(run).adapter(0) as stages:
                torch.testing.assert_close(_predicted(base, *prompts), patched, atol=1e-4, rtol=1e-3)
                with torch.no_grad():
                    for parameter in stages.parameters:
                        parameter.add_(0.5)
                student = _predicted(base, *prompts)
                with adapters.off(*base.components.values()):
                    torch.testing.assert_close(_predicted(base, *prompts), patched, atol=1e-4, rtol=1e-3)
                assert torch.equal(_predicted(base, *prompts), student) and not torch.equal(student, patched)
                assert all(parameter.requires_grad for parameter in stages.parameters)
        assert torch.equal(_predicted(base, *prompts), plain)
        assert not list(named_tuner_layers(base.components))

    @pytest.mark.parametrize("changes", [{"adapter.rank": 3}, {"adapter.layers": "attention"}])
    def test_another_shape_is_refused(
        self, first: Path, small: Small, run: Runs, tmp_path: Path, changes: dict[str, Any]
    ) -> None:
        with pytest.raises(IncompatiblePatchError, match="cannot be gone on with"):
            run(small("esd", continue_from=str(first), concept=TENCH, **changes))
        assert not (tmp_path / "p").exists()

    def test_a_run_takes_the_shape_of_the_patch(self, first: Path, tiny_sd: Path) -> None:
        recipe = resolve_recipe("tench", kind="object", overrides={"continue_from": str(first)})
        assert (recipe.method, recipe.adapter.rank, recipe.adapter.layers) == ("esd", 2, "cross-attention")
        assert recipe.base == str(tiny_sd)
        # A bundled recipe of that name is no patch.
        with pytest.raises(PatchError, match="there is no patch at van-gogh"):
            resolve_recipe("tench", kind="object", overrides={"continue_from": "van-gogh"})


def _loss(method: Any, on: BaseModel, *prompts: str) -> tuple[float, list[Tensor]]:
    """The loss of one row, and the frozen model's prediction under some prompts at its state and time."""
    state = torch.randn((1, *on.latent_shape), generator=torch.Generator().manual_seed(2))
    time = torch.tensor([400])
    loss = method.loss(state, time, torch.tensor([0]), torch.Generator().manual_seed(0))
    with torch.no_grad(), adapters.off(*on.components.values()):
        return loss.item(), [on.denoise(state, time, on.encode_prompts([one])) for one in prompts]


class TestReplacement:
    @pytest.mark.parametrize("name", ["esd", "recare"])
    def test_the_target_is_the_prediction_under_the_replacement(
        self, name: str, base: BaseModel, method: Callable[..., Any]
    ) -> None:
        prompts = [f"A painting in the style of {who}" for who in ("Van Gogh", "Monet")]
        loss, (named, other) = _loss(method(name, replace_with="Monet", **PLAIN), base, *prompts)
        # A fresh adapter changes nothing: the retained part of ReCARE's loss is zero.
        assert loss == pytest.approx(F.mse_loss(named, other).item(), rel=1e-4)

    def test_every_erased_prompt_has_its_own(self, base: BaseModel, method: Callable[..., Any]) -> None:
        made = method("recare", replace_with="Monet", **{"search.rounds": 0})
        erased = made.context.erased
        assert len(made.instead.prompts) == len(made.named) == 1 + len(erased.joined) + len(erased.aliases)
        wanted = ["A painting by Monet", erased.joined[0].replace("Van Gogh", "Monet")]
        rows = made.instead.prompts[torch.tensor([1 + len(erased.joined), 1])].prompt_embeds
        torch.testing.assert_close(rows, base.encode_prompts(wanted).prompt_embeds)

    def test_unsafe_content_becomes_an_ordinary_thing(self, method: Callable[..., Any]) -> None:
        nudity = {"text": "nudity", "kind": "nsfw"}
        pairs = method("esd", concept=nudity, replace_with="dressed person").context.erased.pairs
        forms = ("A photo of a {}", "A photo of {}", "{}", "A photo of a {}")
        assert [after for _, after in pairs] == [form.format("dressed person") for form in forms]


class TestAttribute:
    @pytest.mark.parametrize("name", ["esd", "recare"])
    def test_the_target_takes_away_what_the_attribute_adds(
        self, name: str, base: BaseModel, method: Callable[..., Any]
    ) -> None:
        weights = {"erase.composed": False, "erase.eta": 0.7, "erase.guidance_minus": 0.7}
        prompts = ("A painting in the style of Van Gogh", "A painting of stars in the style of Van Gogh")
        loss, (plain, joined) = _loss(method(name, **STARS_FROM_VAN_GOGH, **weights), base, *prompts)
        expected = F.mse_loss(plain, plain - 0.7 * (joined - plain))
        assert loss == pytest.approx(expected.item(), rel=1e-3)

    def test_the_attribute_by_itself_is_guarded(self, method: Callable[..., Any]) -> None:
        context = method("recare", **STARS_FROM_VAN_GOGH).context
        prompts, guarded = context.retained.prompts, context.retained.guarded
        assert {"A painting of stars", "A photo of stars"} <= set(prompts[:guarded])
        assert not any("gogh" in prompt.lower() for prompt in prompts)
        assert len(context.erased.names) == 2
        assert (context.recipe.title, context.recipe.slug) == ("stars from Van Gogh", "stars-from-van-gogh")

    def test_the_run_draws_both(self, small: Small, run: Runs) -> None:
        result = run(small("esd", **STARS_FROM_VAN_GOGH, **{"erase.steps": 1}), preview=True)
        assert result.patch.metadata is not None
        assert result.patch.metadata.concept == "stars from Van Gogh"
        assert (result.folder / "preview.png").exists()


class TestOtherNames:
    CALLED = "A painting in the style of vincent"

    @pytest.mark.parametrize("name", ["esd", "recare"])
    def test_they_are_erased_like_the_first(self, name: str, base: BaseModel, method: Callable[..., Any]) -> None:
        made = method(name, **{"concept.aliases": ["vincent"], **PLAIN})
        assert made.context.erased.names == ("A painting in the style of Van Gogh", self.CALLED)
        torch.testing.assert_close(made.names[1:].prompt_embeds, base.encode_prompts([self.CALLED]).prompt_embeds)
        assert not any("vincent" in prompt.lower() for prompt in made.context.retained.prompts)
        # The base may not know the concept by it: the target is pushed away from the concept's own name alone.
        assert made.sure_names == ((0,) if name == "recare" else ())

    def test_methods_that_look_at_their_tokens_find_them(self, method: Callable[..., Any]) -> None:
        made = method("forget-me-not", **{"concept.aliases": ["vincent"]})
        assert made.context.concept.name_prompts[-1] == self.CALLED and len(made.positions[-1]) == 1

    def test_a_replacement_stands_for_all_of_them(self, method: Callable[..., Any]) -> None:
        made = method("esd", **{"concept.aliases": ["vincent"]}, replace_with="Monet")
        assert len(made.instead.prompts) == len(made.names) == 2


@pytest.mark.parametrize(
    ("method", "changes", "sentence"),
    [
        ("recare", {"also": [{"text": "van gogh", "kind": "style"}]}, "'van gogh' is there twice"),
        ("recare", {"also": [TENCH], "replace_with": "Monet"}, "write a recipe for each concept"),
        ("recare", {"replace_with": "Monet", **STARS_FROM_VAN_GOGH}, "do not go together"),
        ("recare", {"replace_with": ""}, "at least 1"),
        ("recare", {"replace_with": "van-gogh"}, "cannot be replaced with itself"),
        ("esd", {"subject": {"text": "Van Gogh", "kind": "style"}}, "cannot be taken out of itself"),
        ("uce", {"continue_from": "p"}, "method 'uce' cannot go on from an earlier patch: recare, .*esd can"),
        *(
            (name, STARS_FROM_VAN_GOGH, f"method '{name}' cannot take an attribute out of a subject")
            for name in ("s-grace", "forget-me-not", "uce")
        ),
    ],
)
def test_wishes_that_do_not_go_together(method: str, changes: dict[str, Any], sentence: str, small: Small) -> None:
    with pytest.raises(RecipeError, match=sentence):
        small(method, **changes)


@pytest.mark.parametrize(
    ("method", "key", "sentence"),
    [("s-grace", "s_grace.words", "cannot read the word list"), ("recare", "care_set.file", "nowhere")],
)
def test_files_are_read_before_anything_is_drawn(
    method: str, key: str, sentence: str, small: Small, run: Runs, tmp_path: Path
) -> None:
    with pytest.raises(RecarePatchError, match=sentence):
        run(small(method, **{key: str(tmp_path / "nowhere")}))
    assert not (tmp_path / "p").exists()


def test_what_a_method_does_not_need_is_not_made(base: BaseModel, method: Callable[..., Any]) -> None:
    context = method("uce").context
    assert not len(context.latents) and context.retained.prompts and not len(context.retained.latents)
    assert base.counter.total == 0
