"""What every method must do, on tiny random bases; a new method passes :class:`TestEveryMethod` unchanged."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor
from torch.nn import functional as F

from recare_patch.combine import save_stack, stack
from recare_patch.core import CareSetError, RecarePatchError
from recare_patch.erasure import EraseResult, Loop, erase, fit, found_target, recare_target
from recare_patch.erasure.methods import Context, ErasedPrompts, RetainedPrompts
from recare_patch.erasure.methods.esd import esd_target
from recare_patch.erasure.stages import Stages
from recare_patch.models import BaseModel, classifier_free, load_base, named_tuner_layers
from recare_patch.models import lora as adapters
from recare_patch.patch import Patch
from recare_patch.recipe import METHODS, Recipe, load_recipe
from tests.erasure.making import Killed, Killer, attach, small_recipe

PROMPTS = ("A painting in the style of Van Gogh", "a photo of a cat")
NAMES = ("A painting in the style of Van Gogh", "Van Gogh")


@dataclasses.dataclass
class Made:
    folder: Path
    result: EraseResult
    reports: int


@pytest.fixture(scope="module")
def made(tiny_sd: Path, tiny_clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """One run of each method, made when it is asked for."""
    folder = tmp_path_factory.mktemp("methods")
    runs: dict[str, Made] = {}

    def make(name: str) -> Made:
        if name not in runs:
            counting, recipe = Killer(float("inf")), small_recipe(tiny_sd, tiny_clip, name)
            result = erase(recipe, folder / name, device="cpu", progress=counting)
            runs[name] = Made(folder / name, result, counting.seen)
        return runs[name]

    return make


def _reads(pipeline: StableDiffusionPipeline) -> Tensor:
    """What the denoiser predicts for two prompts as the pipeline reads them."""
    side = pipeline.unet.config.sample_size
    latents = torch.randn((len(PROMPTS), 4, side, side), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        text, _ = pipeline.encode_prompt(list(PROMPTS), "cpu", 1, False)
        found: Tensor = pipeline.unet(latents, torch.tensor([100, 600]), text).sample
    return found


@pytest.mark.parametrize("name", METHODS)
class TestEveryMethod:
    def test_trains_and_loads_in_plain_diffusers(self, name: str, made: Callable[[str], Made], tiny_sd: Path) -> None:
        folder = made(name).folder
        patch, pipeline = Patch.load(folder), StableDiffusionPipeline.from_pretrained(tiny_sd)
        assert all(torch.isfinite(tensor).all() for tensor in patch.tensors.values())
        before = _reads(pipeline)
        with patch.apply(pipeline):
            ours = _reads(pipeline)
        assert (ours - before).abs().max() > 1e-3
        assert torch.equal(_reads(pipeline), before)
        pipeline.load_lora_weights(str(folder), weight_name="pytorch_lora_weights.safetensors")
        torch.testing.assert_close(_reads(pipeline), ours, atol=1e-4, rtol=1e-3)

    def test_a_killed_run_goes_on_to_the_same_bits(
        self, name: str, made: Callable[[str], Made], tiny_sd: Path, tiny_clip: Path, tmp_path: Path
    ) -> None:
        """Near its end, where it has trained and written checkpoints; the whole run is its own repetition."""
        whole, recipe = made(name), small_recipe(tiny_sd, tiny_clip, name)
        with pytest.raises(Killed):
            erase(recipe, tmp_path / "p", device="cpu", progress=Killer(max(1, whole.reports - 1)))
        assert not (tmp_path / "p" / "pytorch_lora_weights.safetensors").exists()
        resumed = erase(recipe, tmp_path / "p", device="cpu", resume=True)
        expected = whole.result.patch.tensors
        assert expected.keys() == resumed.patch.tensors.keys()
        assert all(torch.equal(expected[key], one) for key, one in resumed.patch.tensors.items())
        for key in ("denoiser_evaluations", "losses"):
            assert resumed.cost[key] == whole.result.cost[key]

    def test_records_what_it_was_and_what_it_cost(self, name: str, made: Callable[[str], Made]) -> None:
        folder, needs = made(name).folder, METHODS.get(name).needs
        cost = json.loads((folder / "training.json").read_text())
        assert cost["seconds"] > 0 and cost["peak_memory_bytes"] > 0
        assert cost["denoiser_evaluations"] == sum(one["evaluations"] for one in cost["stages"].values())
        assert ("target images" in cost["stages"]) == needs.target_images
        assert (folder / "care_set.json").exists() == needs.care_set
        metadata, recipe = Patch.load(folder).metadata, load_recipe(str(folder))
        assert metadata is not None and metadata.method == recipe.method == name
        assert recipe == metadata.parsed_recipe == Recipe.from_yaml((folder / "recipe.yaml").read_text())


@pytest.mark.parametrize(("one", "other"), itertools.combinations(METHODS, 2))
def test_stacks_with_every_other_method(
    one: str, other: str, made: Callable[[str], Made], tiny_sd: Path, tmp_path: Path
) -> None:
    patches = [Patch.load(made(name).folder) for name in (one, other)]
    save_stack(stack([(patch, 1.0) for patch in patches]), tmp_path / "both")
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd)
    with patches[0].apply(pipeline), patches[1].apply(pipeline):
        separate = _reads(pipeline)
    pipeline.load_lora_weights(str(tmp_path / "both"))
    torch.testing.assert_close(_reads(pipeline), separate, atol=1e-4, rtol=1e-3)


def _state(base: BaseModel) -> list[object]:
    """Everything about a base that a run could leave changed."""
    modules = [(part, name, m) for part, net in base.components.items() for name, m in net.named_modules()]
    return [
        {part: base.component_hash(part) for part in base.components},
        [(part, name, m.training, len(m._forward_hooks)) for part, name, m in modules],
        [p.requires_grad for network in base.components.values() for p in network.parameters()],
        list(named_tuner_layers(base.components)),
        torch.get_rng_state().tolist(),
    ]


# Runs of the first and last with the larger families are in tests/models/test_architectures.py.
LARGE = itertools.product(("s-grace", "forget-me-not", "uce"), ("tiny_sdxl", "tiny_sd3"))


@pytest.mark.parametrize(("name", "family"), [*((name, "tiny_sd_v") for name in METHODS), *LARGE])
def test_every_family_is_left_untouched(
    name: str, family: str, tiny_clip: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(family)
    base = load_base(folder, device="cpu")
    # transformers leaves hooks of its own in an encoder that was asked for its hidden states once.
    base.encode_token_vectors([base.token_table()[:1]])
    before = _state(base)
    recipe = small_recipe(folder, tiny_clip, name, **{"erase.steps": 2, "erase.retained_images": 1})
    if (name, family) == ("uce", "tiny_sd3"):
        with pytest.raises(RecarePatchError, match="method 'uce' cannot edit base 'tiny-sd3'"):
            erase(recipe, tmp_path / "p", base=base, device="cpu")
    else:
        patch = erase(recipe, tmp_path / "p", base=base, device="cpu").patch
        assert patch.components == tuple(adapters.adapted(base, recipe.adapter.layers))
        with Patch.load(tmp_path / "p").apply(base.pipeline):
            pass
    assert _state(base) == before


class TestTargets:
    """Targets against numbers worked out by hand, and against each other."""

    def test_by_hand(self) -> None:
        zero, one = torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1)
        assert [classifier_free(zero, one, scale).item() for scale in (0.0, 1.0, 5.0)] == [0, 1, 5]
        # ∅ = 1, anchor = 4, names 3 and 7: 1 + 2 (4 − 1) − 0.5 (mean(3, 7) − 1) = 5.
        assert recare_target(one, 4 * one, torch.stack([3 * one, 7 * one]), 2.0, 0.5).item() == 5

    @pytest.mark.parametrize(
        ("found", "wanted"),
        [
            # The concept itself goes where its name goes; half of it half of the way; twice it is taken out twice.
            ((2.0, 0.0), (-3.0, 1.0)),
            ((1.0, 0.0), (-1.5, 0.5)),
            ((4.0, 1.0), (-3.0, 2.0)),
            # What says nothing of it, or the opposite, may say what it says.
            ((0.0, 5.0), (0.0, 5.0)),
            ((-1.0, 1.0), (-1.0, 1.0)),
        ],
    )
    def test_what_was_found_loses_the_concept_alone(
        self, found: tuple[float, float], wanted: tuple[float, float]
    ) -> None:
        empty, concept, target = (torch.tensor([one]) + 7 for one in ((0.0, 0.0), (2.0, 0.0), (-3.0, 1.0)))
        made = found_target(torch.tensor([found]) + 7, empty, concept, target)
        torch.testing.assert_close(made, torch.tensor([wanted]) + 7)

    def test_they_mirror_each_other(self) -> None:
        uncond, cond, name = torch.randn((3, 3, 4, 5, 5), generator=torch.Generator().manual_seed(0))
        pulled, pushed = (recare_target(uncond, cond, name[None], *w) for w in ((3.0, 0.0), (0.0, 1.5)))
        torch.testing.assert_close(pulled, classifier_free(uncond, cond, 3.0))
        torch.testing.assert_close(pushed, esd_target(uncond, name, 1.5))
        torch.testing.assert_close(esd_target(uncond, cond, 2.0), classifier_free(uncond, cond, -2.0))


class TestLosses:
    """Losses against their equations, on every family."""

    @pytest.fixture(params=["tiny_sd", "tiny_sd_v", "tiny_sdxl", "tiny_sd3"])
    def base(self, request: pytest.FixtureRequest) -> BaseModel:
        return load_base(request.getfixturevalue(request.param), device="cpu")

    def make(
        self, name: str, base: BaseModel, retained: RetainedPrompts | None = None, rows: Any = None, **changes: Any
    ) -> Any:
        """A method of two names and two anchors, without a search, and a fresh adapter."""
        none = torch.empty((0, *base.latent_shape))
        prompts = ("A painting of stars", "A painting of night", "A photo of a cat")
        erased = {"joined": (), "anchors": ("A stars", "A night"), "guarded_anchors": 2, **changes}
        keys = {"search.rounds": 0, "erase.retain_batch_size": rows}
        recipe = small_recipe("tiny", "tiny", name, **keys)
        context = Context(
            base=base,
            recipe=recipe,
            concept=recipe.concept,
            number=0,
            latents=none,
            erased=ErasedPrompts(NAMES, aliases=(), instead=None, attribute=None, pairs=(), **erased),
            retained=retained or RetainedPrompts(prompts, 0, none, torch.zeros(0, dtype=torch.long)),
            related=(),
        )
        method = METHODS.get(name)(context)
        method.search(Stages(None))  # type: ignore[arg-type]
        attach(base, recipe)
        return method

    def states(self, base: BaseModel) -> tuple[Tensor, Tensor, Tensor]:
        latents = torch.randn((2, *base.latent_shape), generator=torch.Generator().manual_seed(0))
        return latents, torch.tensor([100, 700]), torch.tensor([0, 1])

    def frozen(self, base: BaseModel, prompts: list[str]) -> Tensor:
        latents, times, _ = self.states(base)
        with torch.no_grad(), adapters.off(*base.components.values()):
            return base.denoise(latents, times, base.encode_prompts(prompts))

    def loss(self, method: Any, base: BaseModel, seed: int = 0) -> float:
        return float(method.loss(*self.states(base), torch.Generator().manual_seed(seed)).item())

    @pytest.mark.parametrize("name", ["recare", "esd"])
    def test_training_lowers_it_and_touches_the_adapter_alone(self, name: str, base: BaseModel) -> None:
        own = {key: value.clone() for key, value in base.denoiser.state_dict().items()}
        method = self.make(name, base)
        assert self.loss(method, base, 9) == self.loss(method, base, 9)

        def mean() -> float:
            """Over many draws: steps differ in their prompts and anchors."""
            return sum(self.loss(method, base, seed) for seed in range(16))

        before, parameters = mean(), attach(base, method.context.recipe)
        loop = Loop("t", 12, 1e-2, 0, optimizer="adamw")
        states = self.states(base)
        fit(parameters, lambda step, generator: method.loss(*states, generator), loop)
        assert mean() < before
        adapters.remove_adapter(base.denoiser, "recare")
        after = base.denoiser.state_dict()
        assert own.keys() == after.keys() and all(torch.equal(own[key], after[key]) for key in own)

    def test_of_esd(self, base: BaseModel) -> None:
        loss = self.loss(self.make("esd", base), base)
        named = self.frozen(base, list(NAMES))
        # A fresh adapter changes nothing, so the student predicts what the teacher does.
        target = esd_target(self.frozen(base, ["", ""]), named, 1.0)
        assert loss == pytest.approx(F.mse_loss(named, target).item(), rel=1e-4)

    def test_of_recare_with_one_anchor(self, base: BaseModel) -> None:
        loss = self.loss(self.make("recare", base, anchors=("A stars",), guarded_anchors=1), base)
        named, empty, anchor = (self.frozen(base, [*one]) for one in (NAMES, ("", ""), ("A stars",) * 2))
        erased = torch.stack([self.frozen(base, [one, one]) for one in NAMES])
        # Each row draws one of the names: over all of them, the target's mean is the published one.
        drawn = [recare_target(empty, anchor, one[None], 1.0, 3.0) for one in erased]
        torch.testing.assert_close(sum(drawn) / 2, recare_target(empty, anchor, erased, 1.0, 3.0))
        errors = [[F.mse_loss(named[row], one[row]).item() for one in drawn] for row in (0, 1)]
        # The retained half is zero as long as the adapter changes nothing.
        assert any(loss == pytest.approx((a + b) / 2, rel=1e-4) for a, b in itertools.product(*errors))

    def test_recare_can_count_what_is_retained_in_pictures(
        self, base: BaseModel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(base, "picture_weights", lambda at, most: torch.full(at.shape, 3.0))
        method = self.make("recare", base)
        for parameter in attach(base, method.context.recipe):
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(3))
        plain = method.context

        def loss(share: float, weight: float = 2.0) -> float:
            keys = {"erase.retain_in_picture": share, "erase.retain_weight": weight}
            method.context = dataclasses.replace(plain, recipe=plain.recipe.with_overrides(keys))
            return self.loss(method, base)

        erased, prediction = loss(0, 0), loss(0)
        assert prediction > erased
        for share in (0.5, 1):
            held = (1 - share) * (prediction - erased) + share * 3 * (prediction - erased)
            assert loss(share) == pytest.approx(erased + held, rel=1e-4)

    @pytest.mark.parametrize("rows", [None, 5])
    def test_recare_counts_every_sample_once(self, base: BaseModel, rows: int | None) -> None:
        method, before = self.make("recare", base, rows=rows), base.counter.total
        self.loss(method, base)
        # Teacher: ∅, anchor, one name, retained; student, counted three times: erased, retained.
        assert base.counter.total - before == 2 * (3 + 3) + (rows or 2) * (1 + 3)

    def test_pictures_of_retained_prompts_and_joined_names_are_used(self, base: BaseModel) -> None:
        latents, times, _ = self.states(base)
        states = latents.repeat(4, 1, 1, 1), times.repeat(4), torch.zeros(8, dtype=torch.long)
        own = torch.randn((4, *base.latent_shape), generator=torch.Generator().manual_seed(1))
        held = RetainedPrompts(("A stars", "A night", "A cat"), 2, own, torch.tensor([0, 1, 2, 0]))
        joined = tuple(f"A painting of {word} in the style of Van Gogh" for word in ("stars", "night"))
        found = []
        for changes in ({}, {"retained": held}, {"joined": joined}):
            method = self.make("recare", base, **changes)  # type: ignore[arg-type]
            found.append(method.loss(*states, torch.Generator().manual_seed(0)).item())
        assert len(set(found)) == 3 and all(map(math.isfinite, found))

    def test_recare_without_a_care_set_says_so(self, base: BaseModel) -> None:
        with pytest.raises(CareSetError, match="needs a CARE-set"):
            self.make("recare", base, anchors=())
