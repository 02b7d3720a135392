"""What every method must do, on tiny random bases; a new method passes :class:`TestEveryMethod` unchanged."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from recare_patch.combine import stacking as composing
from recare_patch.core.errors import RecarePatchError
from recare_patch.erasure.loop import fit
from recare_patch.erasure.methods import ErasingContext, LossMethod, load_method, method_names
from recare_patch.erasure.run import EraseResult, erase
from recare_patch.erasure.targets import esd_target, recare_target
from recare_patch.models import BaseModel, named_tuner_layers
from recare_patch.models import lora as adapters
from recare_patch.models.loading import load_base
from recare_patch.patch.patch import Patch
from recare_patch.recipe.concept import Concept
from recare_patch.recipe.recipe import METHODS, EraseOptions, Recipe, load_recipe

SMALL = {
    "target_images.count": 4,
    "target_images.steps": 2,
    "target_images.batch_size": 2,
    "care_set.clustering": False,
    "care_set.refinement": False,
    "search.rounds": 1,
    "search.erase_steps": 3,
    "search.inversion_steps": 3,
    "search.batch_size": 2,
    "erase.steps": 22,
    "erase.batch_size": 2,
    "erase.retain_batch_size": 2,
    "erase.retained_pairs": 1,
    "erase.retained_images": 3,
    "erase.retained_vocabulary": 4,
    "adapter.rank": 2,
    "adapter.alpha": 1.0,
}
"""What makes a run short, whatever the method."""

ITS_OWN = {"s-grace": {"s_grace.rounds": 2, "s_grace.attack_steps": 2}}
"""What makes a method's run short besides."""

PROMPTS = ("A painting in the style of Van Gogh", "a photo of a cat")


def small_recipe(method: str, base: Path, clip: Path, **changes: object) -> Recipe:
    plain = Recipe(concept=Concept(text="Van Gogh", kind="style"), base=str(base), clip=str(clip))
    return plain.with_overrides({"method": method, **SMALL, **ITS_OWN.get(method, {}), **changes})


class Killed(BaseException):
    """A run that ends in the middle."""


class Killer:
    """Ends a run at the n-th report of its progress."""

    def __init__(self, at: float) -> None:
        self.left, self.seen = at, 0

    def update(self, stage: str, done: int, total: int, note: str = "") -> None:
        if stage == "preview":
            return
        self.seen += 1
        if self.seen == self.left:
            raise Killed


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
            counting = Killer(float("inf"))
            result = erase(
                small_recipe(name, tiny_sd, tiny_clip), folder / name, device="cpu", progress=counting
            )
            runs[name] = Made(folder / name, result, counting.seen)
        return runs[name]

    return make


def _reads(pipeline: StableDiffusionPipeline) -> torch.Tensor:
    """What the denoiser predicts for two prompts as the pipeline reads them."""
    generator = torch.Generator().manual_seed(0)
    channels, side = pipeline.unet.config.in_channels, pipeline.unet.config.sample_size
    latents = torch.randn((len(PROMPTS), channels, side, side), generator=generator)
    with torch.no_grad():
        text, _ = pipeline.encode_prompt(list(PROMPTS), "cpu", 1, False)
        found: torch.Tensor = pipeline.unet(latents, torch.tensor([100, 600]), text).sample
    return found


@pytest.mark.parametrize("name", METHODS)
class TestEveryMethod:
    def test_trains_and_loads_in_plain_diffusers(
        self, name: str, made: Callable[[str], Made], tiny_sd: Path
    ) -> None:
        folder = made(name).folder
        patch = Patch.load(folder)
        assert all(torch.isfinite(tensor).all() for tensor in patch.tensors.values())
        pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd)
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
        whole, recipe = made(name), small_recipe(name, tiny_sd, tiny_clip)
        with pytest.raises(Killed):
            killer = Killer(max(1, whole.reports - 1))
            erase(recipe, tmp_path / "p", device="cpu", progress=killer)
        assert not (tmp_path / "p" / "pytorch_lora_weights.safetensors").exists()
        resumed = erase(recipe, tmp_path / "p", device="cpu", resume=True)
        expected = whole.result.patch.tensors
        assert expected.keys() == resumed.patch.tensors.keys()
        assert all(torch.equal(expected[key], one) for key, one in resumed.patch.tensors.items())
        for key in ("denoiser_evaluations", "losses"):
            assert resumed.cost[key] == whole.result.cost[key]

    def test_records_what_it_was_and_what_it_cost(self, name: str, made: Callable[[str], Made]) -> None:
        run = made(name)
        cost = json.loads((run.folder / "training.json").read_text())
        assert cost["seconds"] > 0 and cost["peak_memory_bytes"] > 0
        assert cost["denoiser_evaluations"] == sum(one["evaluations"] for one in cost["stages"].values())
        method = load_method(name)
        assert ("target images" in cost["stages"]) == method.needs.target_images
        assert (run.folder / "care_set.json").exists() == method.needs.care_set
        metadata = Patch.load(run.folder).metadata
        assert metadata is not None and metadata.method == name
        recipe = load_recipe(str(run.folder))
        assert recipe == metadata.parsed_recipe and recipe.method == name
        assert recipe.hash == Recipe.from_yaml((run.folder / "recipe.yaml").read_text()).hash


@pytest.mark.parametrize(("one", "other"), itertools.combinations(METHODS, 2))
def test_stacks_with_every_other_method(
    one: str, other: str, made: Callable[[str], Made], tiny_sd: Path, tmp_path: Path
) -> None:
    patches = [Patch.load(made(name).folder) for name in (one, other)]
    composing.save_stack(composing.stack([(patch, 1.0) for patch in patches]), tmp_path / "both")
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


FAMILIES = [
    *((name, "tiny_sd_v") for name in METHODS),
    *(
        (name, family)
        for name in METHODS
        for family in ("tiny_sdxl", "tiny_sd3")
        # Their runs with these are in tests/test_architectures.py.
        if name not in ("recare", "esd")
    ),
]


@pytest.mark.parametrize(("name", "family"), FAMILIES)
def test_every_family_is_left_untouched(
    name: str, family: str, tiny_clip: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(family)
    base = load_base(folder, device="cpu")
    # transformers leaves hooks of its own in an encoder that was asked for its hidden states once.
    base.encode_token_vectors([base.token_table()[:1]])
    before = _state(base)
    recipe = small_recipe(name, folder, tiny_clip, **{"erase.steps": 2, "erase.retained_images": 1})
    if (name, family) == ("uce", "tiny_sd3"):
        with pytest.raises(RecarePatchError, match="method 'uce' cannot edit base 'tiny-sd3'"):
            erase(recipe, tmp_path / "p", base=base, device="cpu")
    else:
        patch = erase(recipe, tmp_path / "p", base=base, device="cpu").patch
        assert patch.components == tuple(adapters.adapted(base, recipe.adapter.layers))
        with Patch.load(tmp_path / "p").apply(base.pipeline):
            pass
    assert _state(base) == before


# ------------------------------------------------------------------------ losses against their equations


@pytest.fixture(params=["tiny_sd", "tiny_sd_v", "tiny_sdxl", "tiny_sd3"])
def base(request: pytest.FixtureRequest) -> BaseModel:
    return load_base(str(request.getfixturevalue(request.param)), device="cpu")


def _context(base: BaseModel, **changes: object) -> ErasingContext:
    parts = {
        "erased": base.encode_prompts(["A painting in the style of Van Gogh", "Van Gogh"]),
        "empty": base.encode_prompts([""]),
        "anchors": base.encode_prompts(["A stars", "A night"]),
        "retained": base.encode_prompts(["A painting of stars", "A painting of night", "A photo of a cat"]),
    }
    return ErasingContext(
        base, EraseOptions(batch_size=2, retain_batch_size=None, guidance_minus=3.0), **{**parts, **changes}
    )  # type: ignore[arg-type]


def _states(base: BaseModel) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn((2, *base.latent_shape), generator=generator),
        torch.tensor([100, 700]),
        torch.tensor([0, 1]),
    )


def _mean_loss(method: LossMethod, base: BaseModel) -> float:
    states = _states(base)
    with torch.no_grad():
        return sum(method.loss(*states, torch.Generator().manual_seed(k)).item() for k in range(16)) / 16


def test_recipe_names_are_the_registered_methods() -> None:
    assert sorted(METHODS) == sorted(method_names())


@pytest.mark.parametrize("name", ["recare", "esd"])
def test_a_loss_is_finite_trains_only_the_adapter_and_repeats(name: str, base: BaseModel) -> None:
    own = {k: v.clone() for k, v in base.denoiser.state_dict().items()}
    parameters = adapters.attach(
        base.denoiser,
        layers="cross-attention",
        rank=2,
        alpha=2,
        generator=torch.Generator().manual_seed(0),
    )
    method = _loss_method(name, _context(base))
    latents, timesteps, which = _states(base)

    def loss_at(step: int, generator: torch.Generator) -> torch.Tensor:
        return method.loss(latents, timesteps, which, generator)

    first = loss_at(0, torch.Generator().manual_seed(9))
    assert first.ndim == 0 and torch.isfinite(first)
    assert torch.equal(first, loss_at(0, torch.Generator().manual_seed(9)))
    before = _mean_loss(method, base)
    fit(parameters, loss_at, stage="t", steps=12, learning_rate=1e-2, seed=0, optimizer="adamw")
    # The mean over many draws: steps differ in their prompts and anchors.
    assert _mean_loss(method, base) < before
    adapters.detach(base.denoiser)
    after = base.denoiser.state_dict()
    assert own.keys() == after.keys()
    assert all(torch.equal(own[k], after[k]) for k in own)


def _loss_method(name: str, context: ErasingContext) -> LossMethod:
    made = load_method(name)(context)
    assert isinstance(made, LossMethod)
    return made


def test_esd_loss_matches_its_equation(base: BaseModel) -> None:
    adapters.attach(
        base.denoiser, layers="cross-attention", rank=2, alpha=2, generator=torch.Generator().manual_seed(0)
    )
    context = _context(base)
    latents, timesteps, which = _states(base)
    loss = _loss_method("esd", context).loss(latents, timesteps, which, torch.Generator().manual_seed(0))
    with torch.no_grad(), adapters.off(base.denoiser):
        empty = base.denoise(latents, timesteps, context.empty.repeat(2))
        named = base.denoise(latents, timesteps, context.erased[which])
    # A fresh adapter changes nothing, so the student predicts what the teacher does.
    assert loss.item() == pytest.approx(
        (named - esd_target(empty, named, 1.0)).pow(2).mean().item(), rel=1e-4
    )


def test_recare_loss_matches_its_equation_with_one_anchor(base: BaseModel) -> None:
    adapters.attach(
        base.denoiser, layers="cross-attention", rank=2, alpha=2, generator=torch.Generator().manual_seed(0)
    )
    context = _context(base, anchors=base.encode_prompts(["A stars"]))
    latents, timesteps, which = _states(base)
    loss = _loss_method("recare", context).loss(latents, timesteps, which, torch.Generator().manual_seed(0))
    with torch.no_grad(), adapters.off(base.denoiser):
        empty = base.denoise(latents, timesteps, context.empty.repeat(2))
        anchor = base.denoise(latents, timesteps, base.encode_prompts(["A stars"]).repeat(2))
        erased = torch.stack(
            [base.denoise(latents, timesteps, context.erased[k].repeat(2)) for k in range(2)]
        )
        named = base.denoise(latents, timesteps, context.erased[which])
    # Each row draws one of the names: over all of them, the target's mean is the published one.
    drawn = [
        [recare_target(empty, anchor, erased[k : k + 1], 1.0, 3.0)[row] for k in range(2)] for row in (0, 1)
    ]
    torch.testing.assert_close(
        torch.stack([(one + other) / 2 for one, other in drawn]),
        recare_target(empty, anchor, erased, 1.0, 3.0),
    )
    possible = [
        ((named[0] - drawn[0][i]).pow(2).mean() + (named[1] - drawn[1][j]).pow(2).mean()).item() / 2
        for i in range(2)
        for j in range(2)
    ]
    # The retained half is zero as long as the adapter changes nothing.
    assert any(loss.item() == pytest.approx(value, rel=1e-4) for value in possible)


def test_recare_counts_every_sample_once(base: BaseModel) -> None:
    adapters.attach(
        base.denoiser, layers="cross-attention", rank=2, alpha=2, generator=torch.Generator().manual_seed(0)
    )
    method = _loss_method("recare", _context(base))
    latents, timesteps, which = _states(base)
    before = base.counter.total
    method.loss(latents, timesteps, which, torch.Generator().manual_seed(0))
    # Teacher: ∅, anchor, one name, retained; student, counted three times: erased, retained.
    assert base.counter.total - before == 2 * (4 + 3 * 2)


def test_more_retained_than_erased_rows(base: BaseModel) -> None:
    adapters.attach(
        base.denoiser, layers="cross-attention", rank=2, alpha=2, generator=torch.Generator().manual_seed(0)
    )
    options = EraseOptions(batch_size=2, retain_batch_size=5)
    context = dataclasses.replace(_context(base), options=options)
    before = base.counter.total
    loss = _loss_method("recare", context).loss(*_states(base), torch.Generator().manual_seed(0))
    assert torch.isfinite(loss)
    assert base.counter.total - before == 2 * (3 + 3) + 5 * (1 + 3)


def test_retained_latents_and_composed_prompts_are_used(base: BaseModel) -> None:
    adapters.attach(
        base.denoiser, layers="cross-attention", rank=2, alpha=2, generator=torch.Generator().manual_seed(0)
    )
    latents, timesteps, _ = _states(base)
    latents, timesteps, which = (
        latents.repeat(4, 1, 1, 1),
        timesteps.repeat(4),
        torch.zeros(8, dtype=torch.long),
    )
    own = torch.randn((4, *base.latent_shape), generator=torch.Generator().manual_seed(1))
    composed = base.encode_prompts(
        ["A painting of stars in the style of Van Gogh", "A painting of night in the style of Van Gogh"]
    )
    plain = _loss_method("recare", _context(base)).loss(
        latents, timesteps, which, torch.Generator().manual_seed(0)
    )
    richer = _loss_method(
        "recare",
        _context(
            base, retained_latents=own, pictured=torch.tensor([0, 1, 2, 0]), guarded=2, composed=composed
        ),
    ).loss(latents, timesteps, which, torch.Generator().manual_seed(0))
    assert torch.isfinite(richer) and not torch.equal(plain, richer)


def test_recare_without_a_care_set_says_so(base: BaseModel, tmp_path: Path) -> None:
    from recare_patch.core.errors import CareSetError

    with pytest.raises(CareSetError, match="CARE-set"):
        load_method("recare")(_context(base, anchors=None))
