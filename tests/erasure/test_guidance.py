"""Guidance against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch

from recare_patch.erasure.targets import classifier_free, esd_target, recare_target


@pytest.fixture
def predictions() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    uncond, cond = torch.randn((2, 3, 4, 5, 5), generator=generator)
    return uncond, cond, torch.randn((2, 3, 4, 5, 5), generator=generator)


def test_classifier_free_ends_and_extrapolation() -> None:
    zero, one = torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1)
    assert classifier_free(zero, one, 0.0).item() == 0
    assert classifier_free(zero, one, 1.0).item() == 1
    assert classifier_free(2 * one, 3 * one, 5.0).item() == 7


def test_recare_target_by_hand() -> None:
    # ∅ = 1, anchor = 4, names 3 and 7: 1 + 2 (4 − 1) − 0.5 (mean(3, 7) − 1) = 5.
    shape = (1, 1, 1, 1)
    erased = torch.stack([torch.full(shape, 3.0), torch.full(shape, 7.0)])
    assert recare_target(torch.ones(shape), torch.full(shape, 4.0), erased, 2.0, 0.5).item() == 5


def test_recare_target_without_push_is_guidance(
    predictions: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    uncond, anchor, erased = predictions
    torch.testing.assert_close(
        recare_target(uncond, anchor, erased, 3.0, 0.0), classifier_free(uncond, anchor, 3.0)
    )


def test_recare_target_with_one_name_and_no_anchor_is_esd(
    predictions: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    uncond, anchor, erased = predictions
    torch.testing.assert_close(
        recare_target(uncond, anchor, erased[:1], 0.0, 1.5), esd_target(uncond, erased[0], 1.5)
    )


def test_esd_target_mirrors_guidance(predictions: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    uncond, cond, _ = predictions
    torch.testing.assert_close(esd_target(uncond, cond, 2.0), classifier_free(uncond, cond, -2.0))


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (0, 1, 1, 1, 1)])
def test_recare_target_needs_a_stack_of_names(shape: tuple[int, ...]) -> None:
    one = torch.ones(1, 1, 1, 1)
    with pytest.raises(ValueError, match="at least one name"):
        recare_target(one, one, torch.ones(shape), 1.0, 1.0)
