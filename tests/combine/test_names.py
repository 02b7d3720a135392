"""Closed forms solved together, and single names of a patch scaled."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from recare_patch.combine import closed_forms, save_stack, scale_names, solve, stack
from recare_patch.core import PatchError, UnknownNameError
from recare_patch.erasure import erase
from recare_patch.models import load_base
from recare_patch.patch import Named, Patch
from recare_patch.recipe import Recipe
from tests.measure.making import make_patch

Make = Callable[..., Patch]


@pytest.fixture(scope="module")
def made(tiny_sd: Path, tiny_clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A closed form of some names."""
    folder, known = tmp_path_factory.mktemp("closed"), dict[tuple[str, ...], Patch]()

    def make(*names: str) -> Patch:
        if names not in known:
            concepts = [{"text": name, "kind": "style" if name[0].isupper() else "object"} for name in names]
            data: dict[str, Any] = {"concept": concepts[0], "also": concepts[1:], "method": "closed"}
            recipe = Recipe(**data, base=str(tiny_sd), clip=str(tiny_clip))
            known[names] = erase(recipe, folder / "-".join(names), device="cpu", preview=False).patch
        return known[names]

    return make


@pytest.fixture(scope="module")
def trained(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Patch:
    """One that is no closed form, and changes other layers too."""
    return Patch.load(make_patch(load_base(tiny_sd, device="cpu"), tmp_path_factory.mktemp("trained") / "p", seed=1))


def _names(patch: Patch) -> tuple[Named, ...]:
    assert patch.metadata is not None and patch.metadata.names is not None
    return patch.metadata.names


def test_closed_forms_are_solved_together(made: Make, trained: Patch, tiny_sd: Path, tiny_clip: Path) -> None:
    """As one run of all concepts would, with what is trained added, and each name at its own scale."""
    first, second, both = made("Monet", "tench"), made("boat"), made("Monet", "tench", "boat")
    alone, others = closed_forms([(first, 1.0), (trained, 0.5), (second, 1.0)])
    assert [len(alone), len(others)] == [2, 1]
    found = solve([(first, 1.0), (trained, 0.5), (second, 0.5)], base=str(tiny_sd), clip=str(tiny_clip), device="cpu")
    assert [(one.name, one.scale) for one in _names(found)] == [("Monet", 1.0), ("tench", 1.0), ("boat", 0.5)]
    told = found.metadata
    assert told is not None and told.stacking is not None and told.stacking.method == "solved"
    assert [part.scale for part in told.parts or ()] == [1.0, 0.5, 0.5]
    expected = stack([(scale_names(both, {"boat": 0.5}), 1.0), (trained, 0.5)])
    for module in found.modules:
        torch.testing.assert_close(found.update(module), expected.update(module), atol=1e-4, rtol=1e-3)
    # What was solved is no sum, and can be solved again with more.
    assert told.stacking.relative_error > 1e-3
    again, _ = closed_forms([(found, 1.0), (scale_names(both, {"boat": 0}), 1.0)])
    assert len(again) == 1, "a stack that has something trained in it is none"
    with pytest.raises(PatchError, match="they are: 'boat'"):
        solve([(second, 1.0), (trained, 1.0)])


def test_names_are_scaled_and_the_others_stay_to_the_bit(made: Make, tmp_path: Path) -> None:
    both = made("Monet", "tench", "boat")
    less = scale_names(both, {"monet": 0.5, "tench": 0})
    assert [(one.name, one.scale) for one in _names(less)] == [("Monet", 0.5), ("boat", 1.0)]
    for module in both.modules:
        (a, b), (down, up) = both.factors(module), less.factors(module)
        assert torch.equal(down, a[[0, 2]]) and torch.equal(up[:, 1], b[:, 2]) and torch.equal(up[:, 0], b[:, 0] / 2)
    save_stack(less, tmp_path / "less", file_formats=["diffusers"])
    read = Patch.load(tmp_path / "less")
    assert read.metadata is not None and read.metadata.concept == "Monet + boat"
    assert [(part.name, part.scale) for part in read.metadata.parts or ()] == [("Monet", 0.5), ("boat", 1.0)]
    again = scale_names(read, {"Monet": 2})
    assert [one.scale for one in _names(again)] == [1.0, 1.0]


def test_stacks_keep_their_names_rows(made: Make, trained: Patch) -> None:
    """First of all in every layer, also behind a patch that changes others."""
    first, second = made("Monet", "tench"), made("boat")
    whole = stack([(trained, 1.0), (first, 0.5), (second, 1.0)])
    assert [(one.name, one.scale) for one in _names(whole)] == [("Monet", 0.5), ("tench", 0.5), ("boat", 1.0)]
    less = scale_names(whole, {"boat": 0, "Monet": 2})
    expected = stack([(trained, 1.0), (scale_names(first, {"Monet": 2}), 0.5)])
    for module in whole.modules:
        torch.testing.assert_close(less.update(module), expected.update(module))
    told = less.metadata
    assert told is not None and [part.name for part in told.parts or ()] == [trained.metadata.concept, "Monet", "tench"]


def test_what_cannot_be_scaled_is_told(made: Make, trained: Patch) -> None:
    with pytest.raises(UnknownNameError, match=r"boats.*boat"):
        scale_names(made("boat"), {"boats": 0.5})
    with pytest.raises(PatchError, match="would be left"):
        scale_names(made("boat"), {"boat": 0})
    with pytest.raises(PatchError, match="only closed forms"):
        scale_names(trained, {"boat": 0})
