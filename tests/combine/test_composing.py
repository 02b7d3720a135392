"""Stacks are what their parts are together; merged bases can be undone."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from recare_patch.combine import merging
from recare_patch.combine import stacking as composing
from recare_patch.core.errors import OutputError, PatchError, RecipeError
from recare_patch.patch.patch import Patch
from tests.patch.test_patch import trained


def test_a_stack_that_fails_while_it_is_written_leaves_nothing(tmp_path: Path) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for name in ("unet.a.b_c", "unet.a_b.c"):
        tensors |= {f"{name}.lora_A.weight": torch.ones(1, 2), f"{name}.lora_B.weight": torch.ones(2, 1)}
    made = composing.stack([(Patch(tensors), 1.0)])
    with pytest.raises(PatchError, match="kohya's spelling calls"):
        composing.save_stack(made, tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_stack_merge_and_back(tiny_sd: Path, tmp_path: Path) -> None:
    trained(tiny_sd)[1].save(tmp_path / "p")
    patch = Patch.load(tmp_path / "p")
    composing.save_stack(composing.stack([(patch, 1.0), (patch, -0.5)]), tmp_path / "s")
    found = Patch.load(tmp_path / "s")
    again = composing.stack([(found, 0.5)]).metadata
    assert again is not None and again.parts is not None and again.stacking is not None
    assert [part.scale for part in again.parts] == [0.5, -0.25]
    assert again.stacking.relative_error < 1e-6
    with pytest.raises(RecipeError, match="no recipe of its own"):
        assert again.parsed_recipe
    with pytest.raises(PatchError, match="finite"):
        composing.stack([(patch, math.nan)])
    merging.merge([(patch, 1.0)], tiny_sd, tmp_path / "m")
    back = merging.unmerge(tmp_path / "m", [patch], tmp_path / "u", base=tiny_sd)
    assert back.max_difference is not None and back.max_difference < 1e-6
    with pytest.raises(OutputError, match="already holds files"):
        merging.merge([(patch, 1.0)], tiny_sd, tmp_path / "m")
