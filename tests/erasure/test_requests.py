"""More than one plain concept: several at once, one after the other, something in its place, an attribute."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from recare_patch.careset import CareSet
from recare_patch.core.errors import (
    CareSetError,
    IncompatiblePatchError,
    PatchError,
    RecarePatchError,
    RecipeError,
)
from recare_patch.erasure.methods import ErasingContext, LossMethod, load_method
from recare_patch.erasure.prepare import prepare
from recare_patch.erasure.run import _continued, erase, resolve_recipe
from recare_patch.erasure.stages import Run
from recare_patch.models import BaseModel, named_tuner_layers
from recare_patch.models import lora as adapters
from recare_patch.models.loading import load_base
from recare_patch.patch.patch import Patch
from recare_patch.recipe.recipe import METHODS, Recipe
from tests.contracts.test_methods import small_recipe
from tests.erasure.methods.making import contexts_of, make_recipe

TENCH = {"text": "tench", "kind": "object"}
STARS_FROM_VAN_GOGH = {
    "concept": {"text": "stars", "kind": "object"},
    "subject": {"text": "Van Gogh", "kind": "style"},
}


@pytest.fixture
def base(tiny_sd: Path) -> BaseModel:
    return load_base(tiny_sd, device="cpu")


def _predicted(base: BaseModel, prompts: list[str]) -> torch.Tensor:
    latents = torch.randn((len(prompts), *base.latent_shape), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return base.denoise(latents, torch.full((len(prompts),), 500), base.encode_prompts(prompts))


# ------------------------------------------------------------------------ several in one patch


class TestTogether:
    @pytest.mark.parametrize("name", METHODS)
    def test_one_patch_for_all(self, name: str, tiny_sd: Path, tiny_clip: Path, tmp_path: Path) -> None:
        recipe = small_recipe(name, tiny_sd, tiny_clip, also=[TENCH], **{"erase.steps": 2})
        result = erase(recipe, tmp_path / "p", device="cpu", preview=False)
        metadata = Patch.load(tmp_path / "p").metadata
        assert metadata is not None and metadata.concept == "Van Gogh + tench"
        stages = json.loads((tmp_path / "p" / "training.json").read_text())["stages"]
        if load_method(name).needs.target_images:
            assert {"target images", "target images 2"} <= set(stages)
        # As many steps for each as it would have alone.
        assert all(
            len(losses) == 4 for stage, losses in result.cost["losses"].items() if "search" not in stage
        )

    def test_no_concept_of_a_run_guards_another(
        self, base: BaseModel, tiny_clip: Path, tmp_path: Path
    ) -> None:
        recipe = make_recipe("recare", also=[TENCH, {"text": "boat", "kind": "object"}])
        recipe = recipe.with_overrides({"erase.retained_vocabulary": 1000, "search.rounds": 0})
        contexts = contexts_of(recipe, base, tiny_clip, tmp_path)
        assert [context.concept.text for context in contexts if context.concept] == [
            "Van Gogh",
            "tench",
            "boat",
        ]
        for context in contexts:
            words = {word.lower() for prompt in context.retained_prompts for word in prompt.split()}
            assert words.isdisjoint({"gogh", "tench", "boat"}) and "river" in words

    def test_they_take_turns(self, base: BaseModel, tiny_clip: Path, tmp_path: Path) -> None:
        contexts = contexts_of(make_recipe("esd", also=[TENCH]), base, tiny_clip, tmp_path)
        kind = load_method("esd")
        assert issubclass(kind, LossMethod)
        seen: list[torch.Tensor] = []

        class Once:
            def fit(self, stage: str, loss_at: object, steps: int, **options: object) -> None:
                assert steps == 2 * contexts[0].options.steps
                seen.extend(
                    loss_at(step, torch.Generator().manual_seed(1))  # type: ignore[operator]
                    for step in range(4)
                )

        methods = [kind(context) for context in contexts]
        kind.erase(methods, Once())  # type: ignore[arg-type]
        assert torch.equal(seen[0], seen[2]) and torch.equal(seen[1], seen[3])
        assert not torch.equal(seen[0], seen[1])

    def test_a_concept_twice_or_with_another_wish(self) -> None:
        with pytest.raises(RecipeError, match="the concept 'van gogh' is there twice"):
            make_recipe("recare", also=[{"text": "van gogh", "kind": "style"}])
        with pytest.raises(RecipeError, match="write a recipe for each concept"):
            make_recipe("recare", also=[TENCH], replace_with="Monet")

    def test_a_care_set_of_nothing_but_the_other_concept(
        self, tiny_sd: Path, tiny_clip: Path, tmp_path: Path
    ) -> None:
        recipe = small_recipe("recare", tiny_sd, tiny_clip, also=[TENCH])
        own = CareSet.of_words(recipe.concept, ["tench"])
        with pytest.raises(CareSetError, match="no word of the CARE-set for 'Van Gogh' was kept"):
            erase(recipe, tmp_path / "p", device="cpu", care_set=own)


# ------------------------------------------------------------------------ one after the other


class TestContinued:
    @pytest.fixture(scope="class")
    def first(self, tiny_sd: Path, tiny_clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
        folder = tmp_path_factory.mktemp("continued") / "first"
        erase(small_recipe("esd", tiny_sd, tiny_clip), folder, device="cpu", preview=False)
        return folder

    @pytest.mark.parametrize("name", [name for name in METHODS if name != "uce"])
    def test_it_starts_where_the_other_ended(
        self, name: str, tiny_sd: Path, tiny_clip: Path, tmp_path: Path
    ) -> None:
        """With a learning rate of almost nothing, what comes out is what went in."""
        still = {"erase.learning_rate": 1.0e-12, "erase.steps": 1, "erase.optimizer": "adamw"}
        earlier = small_recipe(name, tiny_sd, tiny_clip, **{"erase.steps": 4})
        erase(earlier, tmp_path / "a", device="cpu", preview=False)
        later = small_recipe(
            name, tiny_sd, tiny_clip, continue_from=str(tmp_path / "a"), concept=TENCH, **still
        )
        result = erase(later, tmp_path / "b", device="cpu", preview=False)
        before = Patch.load(tmp_path / "a").tensors
        assert before.keys() == result.patch.tensors.keys()
        for key, tensor in result.patch.tensors.items():
            torch.testing.assert_close(tensor, before[key], atol=1e-5, rtol=1e-3)
        assert result.patch.metadata is not None and result.patch.metadata.concept == "Van Gogh + tench"

    def test_the_earlier_model_is_the_teacher(
        self, base: BaseModel, first: Path, tiny_sd: Path, tiny_clip: Path, tmp_path: Path
    ) -> None:
        prompts = ["A painting in the style of Van Gogh", "a cat"]
        plain = _predicted(base, prompts)
        with Patch.load(first).apply(base.pipeline):
            patched = _predicted(base, prompts)
        from recare_patch.careset.clip import Clip
        from recare_patch.core import NullProgress

        recipe = small_recipe("esd", tiny_sd, tiny_clip, continue_from=str(first), concept=TENCH)
        run = Run(recipe, tmp_path, base, Clip.load(str(tiny_clip)), NullProgress(), False)
        with _continued(run):
            torch.testing.assert_close(_predicted(base, prompts), patched, atol=1e-4, rtol=1e-3)
            parameters = adapters.attach(
                base.denoiser,
                layers="cross-attention",
                rank=2,
                alpha=1.0,
                generator=torch.Generator().manual_seed(0),
            )
            adapters.switch_to(base.denoiser, "recare")
            with torch.no_grad():
                for parameter in parameters:
                    parameter.add_(0.5)
            student = _predicted(base, prompts)
            with adapters.off(*base.components.values()):
                torch.testing.assert_close(_predicted(base, prompts), patched, atol=1e-4, rtol=1e-3)
            assert torch.equal(_predicted(base, prompts), student)
            assert all(parameter.requires_grad for parameter in parameters)
            adapters.detach(base.denoiser)
        assert torch.equal(_predicted(base, prompts), plain)
        assert not list(named_tuner_layers(base.components))

    def test_another_shape_is_refused(
        self, first: Path, tiny_sd: Path, tiny_clip: Path, tmp_path: Path
    ) -> None:
        for number, changes in enumerate(({"adapter.rank": 3}, {"adapter.layers": "attention"})):
            out = tmp_path / str(number)
            recipe = small_recipe(
                "esd", tiny_sd, tiny_clip, continue_from=str(first), concept=TENCH, **changes
            )
            with pytest.raises(IncompatiblePatchError, match="cannot be gone on with"):
                erase(recipe, out, device="cpu")
            assert not out.exists()

    def test_a_run_takes_the_shape_of_the_patch(self, first: Path, tiny_sd: Path) -> None:
        recipe = resolve_recipe("tench", kind="object", overrides={"continue_from": str(first)})
        assert (recipe.method, recipe.adapter.rank, recipe.adapter.layers) == ("esd", 2, "cross-attention")
        assert recipe.base == str(tiny_sd)
        # A bundled recipe of that name is no patch.
        with pytest.raises(PatchError, match="there is no patch at van-gogh"):
            resolve_recipe("tench", kind="object", overrides={"continue_from": "van-gogh"})
        with pytest.raises(RecipeError, match="method 'uce' cannot go on from an earlier patch"):
            recipe.with_overrides({"method": "uce"})


# ------------------------------------------------------------------------ something in its place


def _loss(context: ErasingContext, name: str) -> tuple[float, torch.Tensor, torch.Tensor]:
    """The loss of one row, its state and its time."""
    method = load_method(name)(context)
    assert isinstance(method, LossMethod)
    state = torch.randn((1, *context.base.latent_shape), generator=torch.Generator().manual_seed(2))
    time = torch.tensor([400])
    loss = method.loss(state, time, torch.tensor([0]), torch.Generator().manual_seed(0))
    return loss.item(), state, time


class TestReplacement:
    @pytest.mark.parametrize("name", ["esd", "recare"])
    def test_the_target_is_the_prediction_under_the_replacement(
        self, name: str, base: BaseModel, tiny_clip: Path, tmp_path: Path
    ) -> None:
        changes = {"search.rounds": 0, "erase.composed": False, "replace_with": "Monet"}
        (context,) = contexts_of(make_recipe(name, **changes), base, tiny_clip, tmp_path)
        loss, state, time = _loss(context, name)
        with torch.no_grad(), adapters.off(*base.components.values()):
            named, other = (
                base.denoise(state, time, base.encode_prompts([f"A painting in the style of {who}"]))
                for who in ("Van Gogh", "Monet")
            )
        # A fresh adapter changes nothing: the retained part of ReCARE's loss is zero.
        assert loss == pytest.approx(F.mse_loss(named, other).item(), rel=1e-4)

    def test_every_erased_prompt_has_its_own(self, base: BaseModel, tiny_clip: Path, tmp_path: Path) -> None:
        recipe = make_recipe("recare", replace_with="Monet", **{"search.rounds": 0})
        (context,) = contexts_of(recipe, base, tiny_clip, tmp_path)
        assert context.instead is not None and context.composed is not None and context.aliases is not None
        method = load_method("recare")(context)
        assert len(context.instead.prompts) == len(method.named)  # type: ignore[attr-defined]
        row = 1 + len(context.composed)
        torch.testing.assert_close(
            context.instead.prompts[row].prompt_embeds,
            base.encode_prompts(["A painting by Monet"]).prompt_embeds,
        )
        word = context.prompts[4].removeprefix("A painting of ").removesuffix(" in the style of Van Gogh")
        torch.testing.assert_close(
            context.instead.prompts[1].prompt_embeds,
            base.encode_prompts([f"A painting of {word} in the style of Monet"]).prompt_embeds,
        )

    def test_unsafe_content_becomes_an_ordinary_thing(
        self, base: BaseModel, tiny_clip: Path, tmp_path: Path
    ) -> None:
        recipe = make_recipe("esd", text="nudity", kind="nsfw", replace_with="dressed person")
        (context,) = contexts_of(recipe, base, tiny_clip, tmp_path)
        assert context.became == (
            "A photo of a dressed person",
            "A photo of dressed person",
            "dressed person",
            "A photo of a dressed person",
        )


# ------------------------------------------------------------------------ an attribute taken out of a subject


class TestAttribute:
    @pytest.mark.parametrize("name", ["esd", "recare"])
    def test_the_target_takes_away_what_the_attribute_adds(
        self, name: str, base: BaseModel, tiny_clip: Path, tmp_path: Path
    ) -> None:
        changes = {"erase.composed": False, "erase.eta": 0.7, "erase.guidance_minus": 0.7}
        recipe = make_recipe(name, **changes).with_overrides(STARS_FROM_VAN_GOGH)
        (context,) = contexts_of(recipe, base, tiny_clip, tmp_path)
        loss, state, time = _loss(context, name)
        plain_text = "A painting in the style of Van Gogh"
        joined_text = "A painting of stars in the style of Van Gogh"
        with torch.no_grad(), adapters.off(*base.components.values()):
            plain, joined = (
                base.denoise(state, time, base.encode_prompts([text])) for text in (plain_text, joined_text)
            )
        expected = F.mse_loss(plain, plain - 0.7 * (joined - plain))
        assert loss == pytest.approx(expected.item(), rel=1e-3)

    def test_the_attribute_by_itself_is_guarded(
        self, base: BaseModel, tiny_clip: Path, tmp_path: Path
    ) -> None:
        recipe = make_recipe("recare").with_overrides(STARS_FROM_VAN_GOGH)
        work = tmp_path
        (context,) = contexts_of(recipe, base, tiny_clip, work)
        assert {"A painting of stars", "A photo of stars"} <= set(context.retained_prompts[: context.guarded])
        assert not any("gogh" in prompt.lower() for prompt in context.retained_prompts)
        assert len(context.erased) == 2
        assert recipe.title == "stars from Van Gogh" and recipe.slug == "stars-from-van-gogh"

    def test_the_run_draws_both(self, tiny_sd: Path, tiny_clip: Path, tmp_path: Path) -> None:
        recipe = small_recipe("esd", tiny_sd, tiny_clip, **STARS_FROM_VAN_GOGH, **{"erase.steps": 1})
        result = erase(recipe, tmp_path / "p", device="cpu")
        assert result.patch.metadata is not None
        assert result.patch.metadata.concept == "stars from Van Gogh"
        assert (tmp_path / "p" / "preview.png").exists()

    @pytest.mark.parametrize("name", ["s-grace", "forget-me-not", "uce"])
    def test_methods_that_cannot_say_so(self, name: str) -> None:
        with pytest.raises(RecipeError, match=f"method '{name}' cannot take an attribute out of a subject"):
            make_recipe(name).with_overrides(STARS_FROM_VAN_GOGH)


def test_a_recipe_speaks_of_one_wish() -> None:
    with pytest.raises(RecipeError, match="do not go together"):
        make_recipe("recare", replace_with="Monet").with_overrides(STARS_FROM_VAN_GOGH)
    with pytest.raises(RecarePatchError, match="at least 1"):
        make_recipe("recare", replace_with="")


@pytest.mark.parametrize(
    ("method", "key", "sentence"),
    [
        ("s-grace", "s_grace.words", "cannot read the word list"),
        ("recare", "care_set.file", "nowhere"),
    ],
)
def test_files_are_read_before_anything_is_drawn(
    method: str, key: str, sentence: str, tiny_sd: Path, tiny_clip: Path, tmp_path: Path
) -> None:
    recipe = small_recipe(method, tiny_sd, tiny_clip, **{key: str(tmp_path / "nowhere")})
    with pytest.raises(RecarePatchError, match=sentence):
        erase(recipe, tmp_path / "p", device="cpu")
    assert not (tmp_path / "p").exists()


def test_prepared_contexts_are_complete(base: BaseModel, tiny_clip: Path, tmp_path: Path) -> None:
    """What a method does not need is not made."""
    from recare_patch.careset.clip import Clip
    from recare_patch.core import NullProgress

    recipe: Recipe = make_recipe("uce")
    run = Run(recipe, tmp_path, base, Clip.load(str(tiny_clip)), NullProgress(), False)
    context = prepare(run, run.targets[0], load_method("uce").needs)
    assert context.states is None and context.latents is None and context.retained is not None
    assert base.counter.total == 0
