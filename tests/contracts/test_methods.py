"""What every method must do, on a tiny random base; a new method passes this unchanged."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from recare_patch import adapters
from recare_patch.base_models import BaseModel, load_base
from recare_patch.guidance import esd_target, recare_target
from recare_patch.methods import ErasingContext, Method, load_method, method_names
from recare_patch.recipe import METHODS, EraseOptions
from recare_patch.training import fit


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


def _mean_loss(method: Method, base: BaseModel) -> float:
    states = _states(base)
    with torch.no_grad():
        return sum(method.loss(*states, torch.Generator().manual_seed(k)).item() for k in range(16)) / 16


def test_recipe_names_are_the_registered_methods() -> None:
    assert sorted(METHODS) == sorted(method_names())


@pytest.mark.parametrize("name", method_names())
class TestEveryMethod:
    def test_loss_is_finite_trains_only_the_adapter_and_repeats(self, name: str, base: BaseModel) -> None:
        own = {k: v.clone() for k, v in base.denoiser.state_dict().items()}
        parameters = adapters.attach(
            base.denoiser,
            layers="cross-attention",
            rank=2,
            alpha=2,
            generator=torch.Generator().manual_seed(0),
        )
        method = load_method(name)(_context(base))
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


def test_esd_loss_matches_its_equation(base: BaseModel) -> None:
    adapters.attach(
        base.denoiser, layers="cross-attention", rank=2, alpha=2, generator=torch.Generator().manual_seed(0)
    )
    context = _context(base)
    latents, timesteps, which = _states(base)
    loss = load_method("esd")(context).loss(latents, timesteps, which, torch.Generator().manual_seed(0))
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
    loss = load_method("recare")(context).loss(latents, timesteps, which, torch.Generator().manual_seed(0))
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
    method = load_method("recare")(_context(base))
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
    loss = load_method("recare")(context).loss(*_states(base), torch.Generator().manual_seed(0))
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
    plain = load_method("recare")(_context(base)).loss(
        latents, timesteps, which, torch.Generator().manual_seed(0)
    )
    richer = load_method("recare")(
        _context(
            base, retained_latents=own, pictured=torch.tensor([0, 1, 2, 0]), guarded=2, composed=composed
        )
    ).loss(latents, timesteps, which, torch.Generator().manual_seed(0))
    assert torch.isfinite(richer) and not torch.equal(plain, richer)


def test_recare_without_a_care_set_says_so(base: BaseModel, tmp_path: Path) -> None:
    from recare_patch.errors import CareSetError

    with pytest.raises(CareSetError, match="CARE-set"):
        load_method("recare")(_context(base, anchors=None))
