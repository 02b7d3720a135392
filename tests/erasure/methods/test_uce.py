"""UCE against its closed form, written out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from recare_patch.erasure import EraseResult
from recare_patch.models import BaseModel, base_layers
from recare_patch.recipe import Recipe


def _closed_form(method: Any, weight: torch.Tensor) -> torch.Tensor:
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
    base: BaseModel, method: Callable[..., Any], small: Callable[..., Recipe], run: Callable[..., EraseResult]
) -> None:
    """At full rank nothing is left out; below, what is left out is what the run says. Nothing is trained."""
    uce = method("uce")
    layers: dict[str, Any] = dict(base_layers(base.denoiser))
    for rank in (32, 3):
        result = run(small("uce", **{"adapter.rank": rank, "adapter.alpha": 2.0 * rank}), str(rank))
        missed = total = 0.0
        for name in uce.modules:
            wanted = (_closed_form(uce, layers[name].weight) - layers[name].weight.double()).float()
            found = result.patch.update(f"unet.{name}")
            missed += (found - wanted).square().sum().item()
            total += wanted.square().sum().item()
            if rank == 32:
                torch.testing.assert_close(found, wanted, atol=2e-3 * wanted.abs().max().item(), rtol=0.02)
        # Factors are stored in half precision.
        assert (missed / total) ** 0.5 == pytest.approx(result.cost["rank_residual"], abs=2e-3)
        assert (result.cost["rank_residual"] < 1e-6) == (rank == 32)
    assert result.cost["denoiser_evaluations"] == 0 and result.cost["losses"] == {}
    assert list(result.cost["stages"]) == ["solve"]


def test_prompts_are_laid_end_to_end(base: BaseModel, method: Callable[..., Any]) -> None:
    one, two = method("uce")._aligned("a painting of van gogh", "a painting")
    whole = base.encode_prompts(["a painting of van gogh", "a painting"]).prompt_embeds.double()
    # Tokens 1 to 5 and end-of-text at 6, against 1, 2 and end-of-text at 3.
    torch.testing.assert_close(one[:4], whole[0, [4, 5, 6, 7]])
    torch.testing.assert_close(two[:4], whole[1, [1, 2, 3, 4]])
    assert len(one) == len(two) == 77 - 4


def test_a_replacement_takes_the_names_place(method: Callable[..., Any]) -> None:
    pairs = method("uce", replace_with="Monet").context.erased.pairs
    assert ("A painting by Van Gogh", "A painting by Monet") in pairs
    assert all(prompt.replace("Van Gogh", "Monet") == after for prompt, after in pairs)
