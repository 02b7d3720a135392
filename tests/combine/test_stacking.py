"""Stacks are what their parts are together, or the least squares update from what layers read."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from recare_patch.careset import Clip
from recare_patch.combine import Moments, measure_moments, regmean, save_stack, stack
from recare_patch.core import OutputError, PatchError, RecipeError
from recare_patch.models import BaseModel, load_base
from recare_patch.patch import Patch
from recare_patch.recipe import Concept
from tests.measure.making import make_patch

Layer = dict[str, torch.Tensor]


def layer(name: str, a: torch.Tensor, b: torch.Tensor) -> Layer:
    return {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}


@pytest.fixture(scope="module")
def base(tiny_sd: Path) -> BaseModel:
    return load_base(tiny_sd, device="cpu")


@pytest.fixture(scope="module")
def clip(tiny_clip: Path) -> Clip:
    return Clip.load(str(tiny_clip))


@pytest.fixture(scope="module")
def patch(base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Patch:
    return Patch.load(make_patch(base, tmp_path_factory.mktemp("read") / "a", seed=1))


def test_a_stack_of_a_stack(patch: Patch, tmp_path: Path) -> None:
    save_stack(stack([(patch, 1.0), (patch, -0.5)]), tmp_path / "s")
    again = stack([(Patch.load(tmp_path / "s"), 0.5)]).metadata
    assert again is not None and again.parts is not None and again.stacking is not None
    assert [part.scale for part in again.parts] == [0.5, -0.25]
    assert again.stacking.relative_error < 1e-6
    with pytest.raises(RecipeError, match="no recipe of its own"):
        assert again.parsed_recipe
    with pytest.raises(PatchError, match="finite"):
        stack([(patch, math.nan)])
    with pytest.raises(PatchError, match="is no stack"):
        save_stack(patch, tmp_path / "t")
    with pytest.raises(OutputError, match="already holds files"):
        save_stack(stack([(patch, 1.0)]), tmp_path / "s")
    # One that fails while it is written leaves nothing.
    tensors = layer("unet.a.b_c", torch.ones(1, 2), torch.ones(2, 1))
    tensors |= layer("unet.a_b.c", torch.ones(1, 2), torch.ones(2, 1))
    with pytest.raises(PatchError, match="kohya's spelling calls"):
        save_stack(stack([(Patch(tensors), 1.0)]), tmp_path / "t")
    assert [one.name for one in tmp_path.iterdir()] == ["s"]


def test_ties_and_dare_by_hand() -> None:
    """TIES keeps the largest values of each, and averages those of the majority's sign; DARE rescales."""
    one = Patch(layer("unet.a", torch.eye(3), torch.diag(torch.tensor([4.0, -3.0, 0.1]))))
    other = Patch(layer("unet.a", torch.eye(3), torch.diag(torch.tensor([2.0, 5.0, -0.2]))))
    both = [(one, 1.0), (other, 1.0)]
    # Two of nine values of each, and none of the third places.
    made = stack(both, method="ties", density=0.2).update("unet.a")
    assert made == pytest.approx(torch.diag(torch.tensor([3.0, 5.0, 0.0])), abs=1e-5)
    made = stack(both, method="dare", density=0.5, seed=3).update("unet.a").diagonal()
    wanted = [{0.0, 8.0, 4.0, 12.0}, {0.0, -6.0, 10.0, 4.0}, {0.0, 0.2, -0.4, -0.2}]
    assert all(min(abs(v - w) for w in ways) < 1e-5 for v, ways in zip(made.tolist(), wanted, strict=True))


def test_regmean_is_the_least_squares_update() -> None:
    """Of each part, against the plain regression of its outputs on its own inputs and of nothing on all others."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    module, width, weights, kept = "unet.a", 6, (1.0, -0.5, 0.7), 3.0
    patches = [Patch(layer(module, draw(2, width), draw(4, 2))) for _ in weights]
    inputs = [draw(50, width) for _ in range(4)]
    grams = [{module: x.T @ x / len(x)} for x in inputs]
    found = Moments(tuple(grams[:3]), grams[3], kept, 0)
    made = stack(list(zip(patches, weights, strict=True)), method="regmean", moments=found)
    reference = torch.zeros(4, width).double()
    for k, (weight, patch) in enumerate(zip(weights, patches, strict=True)):
        count = [1.0 if j == k else 0.5 for j in range(3)]
        rows = torch.cat([(c**0.5) * x for c, x in zip([*count, kept], inputs, strict=True)]).double()
        wanted = torch.zeros(len(rows), 4).double()
        wanted[50 * k : 50 * k + 50] = weight * inputs[k].double() @ patch.update(module).T.double()
        reference += torch.linalg.lstsq(rows, wanted).solution.T
    # The ridge is a thousandth.
    assert (made.update(module).double() - reference).norm() < 5e-3 * reference.norm()
    assert made.metadata is not None and made.metadata.stacking is not None
    assert (made.metadata.stacking.kept_weight, made.metadata.rank) == (kept, 6)


def test_moments_are_those_of_the_prompts_own_half(
    base: BaseModel, clip: Clip, patch: Patch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key layer of cross-attention reads the text states alone: their moments can be had directly."""
    asked: list[list[str]] = []
    encode = base.encode_prompts
    monkeypatch.setattr(base, "encode_prompts", lambda prompts: [asked.append(list(prompts)), encode(prompts)][1])
    found = measure_moments([patch], base, clip, kept_weight=2.0)
    own, kept = (one for one in asked if set(one) != {""})
    assert {"A painting in the style of Van Gogh", "A painting of stars in the style of Van Gogh"} < set(own)
    assert "A photo of stars" in kept and "" in kept
    assert not any("Gogh" in prompt for prompt in kept)

    def gram(prompts: list[str]) -> torch.Tensor:
        states = encode(prompts).prompt_embeds.flatten(0, 1)
        return states.T @ states / len(states)

    module = next(name for name in patch.modules if name.endswith("attn2.to_k"))
    assert found.kept[module] == pytest.approx(gram(kept), abs=1e-4) and found.kept_weight == 2
    assert found.own[0][module] == pytest.approx(gram(own), abs=1e-4)
    assert found.evaluations == 2 * regmean.STEPS * (len(own) + len(kept))
    # Nothing listens any more.
    assert not any(one._forward_pre_hooks for one in base.denoiser.modules() if one is not base.denoiser)
    unsaid = Patch(dict(patch.tensors))
    with pytest.raises(PatchError, match="does not say what that is"):
        measure_moments([unsaid], base, clip)
    with pytest.raises(PatchError, match="what the layers read"):
        stack([(unsaid, 1.0)], method="regmean")


def test_another_word_for_a_concept_is_not_kept() -> None:
    """On the bundled base, whose vocabulary calls a church a chapel too."""
    base, clip = load_base("atelier", device="cpu"), Clip.load("atelier")
    church = Concept(text="church", kind="object")
    asked = regmean.Asked([church], clip, seed=0)
    assert "chapel" in asked.words
    asked.look(church, ["meadow", "field"], base.generate(church.name_prompts, [1, 2, 3], steps=8))
    kept = asked.kept([[(church, ["meadow", "field"])]])
    assert not any("chapel" in prompt or "church" in prompt for prompt in kept)
    assert "A photo of meadow" in kept and "A photo of cottage" in kept
