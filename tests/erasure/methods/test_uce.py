"""UCE against its closed form, written out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from recare_patch.erasure.methods.uce import UCE
from recare_patch.erasure.run import erase
from recare_patch.models import BaseModel, base_layers
from recare_patch.models.loading import load_base
from tests.contracts.test_methods import small_recipe
from tests.erasure.methods.making import contexts_of, make_recipe


@pytest.fixture
def base(tiny_sd: Path) -> BaseModel:
    return load_base(tiny_sd, device="cpu")


def _closed_form(method: UCE, weight: torch.Tensor) -> torch.Tensor:
    """Equation 7, summed embedding by embedding."""
    options = method.options
    c, d, r = method.concept, method.instead, method.retained
    w = weight.double()
    left, right = options.ridge * w, options.ridge * torch.eye(w.shape[1]).double()
    for one, other in zip(c, d, strict=True):
        left = left + options.erase_weight / len(c) * torch.outer(w @ other, one)
        right = right + options.erase_weight / len(c) * torch.outer(one, one)
    for one in r:
        left = left + options.retain_weight / len(r) * torch.outer(w @ one, one)
        right = right + options.retain_weight / len(r) * torch.outer(one, one)
    return left @ torch.linalg.inv(right)


def test_the_patch_is_the_closed_form(
    base: BaseModel, tiny_sd: Path, tiny_clip: Path, tmp_path: Path
) -> None:
    """At full rank nothing is left out; below, what is left out is what the run says."""
    (context,) = contexts_of(make_recipe("uce"), base, tiny_clip, tmp_path / "context")
    method = UCE(context)
    layers = dict(base_layers(base.denoiser))
    for rank in (32, 3):
        recipe = small_recipe(
            "uce", tiny_sd, tiny_clip, **{"adapter.rank": rank, "adapter.alpha": 2.0 * rank}
        )
        result = erase(recipe, tmp_path / str(rank), device="cpu")
        missed = total = 0.0
        for name in method.modules:
            weight = layers[name].weight
            assert isinstance(weight, torch.Tensor)
            wanted = (_closed_form(method, weight) - weight.double()).float()
            found = result.patch.update(f"unet.{name}")
            missed += (found - wanted).square().sum().item()
            total += wanted.square().sum().item()
            if rank == 32:
                torch.testing.assert_close(found, wanted, atol=2e-3 * wanted.abs().max().item(), rtol=0.02)
        # Factors are stored in half precision.
        assert (missed / total) ** 0.5 == pytest.approx(result.cost["rank_residual"], abs=2e-3)
        assert (result.cost["rank_residual"] < 1e-6) == (rank == 32)


def test_no_picture_is_drawn_and_no_step_trained(tiny_sd: Path, tiny_clip: Path, tmp_path: Path) -> None:
    result = erase(small_recipe("uce", tiny_sd, tiny_clip), tmp_path / "p", device="cpu")
    assert result.cost["denoiser_evaluations"] == 0
    assert list(result.cost["stages"]) == ["solve"] and result.cost["losses"] == {}


def test_prompts_are_laid_end_to_end(base: BaseModel, tiny_clip: Path, tmp_path: Path) -> None:
    (context,) = contexts_of(make_recipe("uce"), base, tiny_clip, tmp_path)
    one, two = UCE(context)._aligned("a painting of van gogh", "a painting")
    whole = base.encode_prompts(["a painting of van gogh", "a painting"]).prompt_embeds.double()
    # Tokens 1 to 5 and end-of-text at 6, against 1, 2 and end-of-text at 3.
    torch.testing.assert_close(one[:4], whole[0, [4, 5, 6, 7]])
    torch.testing.assert_close(two[:4], whole[1, [1, 2, 3, 4]])
    assert len(one) == len(two) == 77 - 4


def test_a_replacement_takes_the_names_place(base: BaseModel, tiny_clip: Path, tmp_path: Path) -> None:
    (context,) = contexts_of(make_recipe("uce", replace_with="Monet"), base, tiny_clip, tmp_path)
    assert dict(zip(context.prompts, context.became, strict=True))["A painting by Van Gogh"] == (
        "A painting by Monet"
    )
    assert all(
        prompt.replace("Van Gogh", "Monet") == other
        for prompt, other in zip(context.prompts, context.became, strict=True)
    )
