"""``regmean``: the least squares update, from what layers read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from recare_patch.careset.clip import Clip
from recare_patch.combine import regmean as moments
from recare_patch.combine import stacking as composing
from recare_patch.core.errors import PatchError
from recare_patch.models.embeds import BaseModel
from recare_patch.models.loading import load_base
from recare_patch.patch.patch import Patch
from recare_patch.recipe.concept import Concept
from tests.measure.test_attacks import make_patch


def _layer(name: str, a: torch.Tensor, b: torch.Tensor) -> dict[str, torch.Tensor]:
    return {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}


def test_it_is_the_least_squares_update() -> None:
    """Against the plain regression of each part's outputs on its own inputs, and of nothing on kept ones."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    module, width = "unet.a", 6
    patches = [Patch(_layer(module, draw(2, width), draw(4, 2))) for _ in range(2)]
    inputs = [draw(50, width) for _ in range(3)]
    weights, kept = (1.0, -0.5), 3.0
    grams = [x.T @ x / len(x) for x in inputs]
    found = moments.Moments(
        tuple({module: patch.factors(module)[0] @ g} for patch, g in zip(patches, grams[:2], strict=True)),
        {module: grams[0] + grams[1] + kept * grams[2]},
        kept,
        0,
    )
    made = composing.stack(list(zip(patches, weights, strict=True)), method="regmean", moments=found)
    rows = [inputs[0], inputs[1], kept**0.5 * inputs[2]]
    wanted = [w * x @ patch.update(module).T for w, x, patch in zip(weights, rows[:2], patches, strict=True)]
    wanted.append(torch.zeros(50, 4))
    reference = torch.linalg.lstsq(torch.cat(rows).double(), torch.cat(wanted).double()).solution.T
    difference = made.update(module).double() - reference
    # The ridge is a thousandth.
    assert difference.norm() < 5e-3 * reference.norm()
    assert made.metadata is not None and made.metadata.stacking is not None
    assert made.metadata.stacking.kept_weight == kept
    assert made.metadata.rank == 4


def test_a_part_acts_as_it_does_alone_where_nothing_else_reads_the_same() -> None:
    a, b = torch.zeros(1, 4), torch.ones(3, 1)
    a[0, :2] = 1.0
    one, other = Patch(_layer("unet.a", a, b)), Patch(_layer("unet.a", a.flip(1), b))
    own, others = torch.diag(torch.tensor([1.0, 0, 0, 0])), torch.diag(torch.tensor([0, 0, 0, 1.0]))
    found = moments.Moments(
        ({"unet.a": one.factors("unet.a")[0] @ own}, {"unet.a": other.factors("unet.a")[0] @ others}),
        {"unet.a": own + others},
        1.0,
        0,
    )
    update = composing.stack([(one, 1.0), (other, 1.0)], method="regmean", moments=found).update("unet.a")
    assert update[:, [0, 3]] == pytest.approx(torch.ones(3, 2), abs=1e-2)
    # What no prompt ever reads stays as the base has it.
    assert update[:, [1, 2]].abs().max() == 0


@pytest.fixture(scope="module")
def base(tiny_sd: Path) -> BaseModel:
    return load_base(tiny_sd, device="cpu")


@pytest.fixture(scope="module")
def clip(tiny_clip: Path) -> Clip:
    return Clip.load(str(tiny_clip))


@pytest.fixture(scope="module")
def parts(base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("read")
    return make_patch(base, folder / "a", seed=1), make_patch(base, folder / "b", seed=2)


def test_moments_are_those_of_the_prompts_own_half(
    base: BaseModel, clip: Clip, parts: tuple[Path, Path]
) -> None:
    """A key layer of cross-attention reads the text states alone: their moments can be had directly."""
    patch = Patch.load(parts[0])
    asked: list[list[str]] = []
    encode = base.encode_prompts

    def listening(prompts: list[str]) -> object:
        asked.append(list(prompts))
        return encode(prompts)

    base.encode_prompts = listening  # type: ignore[method-assign,assignment]
    try:
        found = moments.measure_moments([patch], base, clip, kept_weight=2.0)
    finally:
        base.encode_prompts = encode  # type: ignore[method-assign]
    own, kept = (one for one in asked if set(one) != {""})
    assert {"A painting in the style of Van Gogh", "A painting of stars in the style of Van Gogh"} < set(own)
    assert "A photo of stars" in kept and "" in kept
    assert not any("Gogh" in prompt for prompt in kept)

    def gram(prompts: list[str]) -> torch.Tensor:
        states = encode(prompts).prompt_embeds.flatten(0, 1)
        return states.T @ states / len(states)

    module = next(name for name in patch.modules if name.endswith("attn2.to_k"))
    assert found.total[module] == pytest.approx(gram(own) + 2 * gram(kept), abs=1e-4)
    a = patch.factors(module)[0].float()
    assert found.read[0][module] == pytest.approx(a @ gram(own), abs=1e-3)
    assert found.evaluations == 2 * moments.STEPS * (len(own) + len(kept))
    # Nothing listens any more.
    layers = [layer for layer in base.denoiser.modules() if layer is not base.denoiser]
    assert not any(layer._forward_pre_hooks for layer in layers)


def test_a_part_must_say_what_it_erases(base: BaseModel, clip: Clip, parts: tuple[Path, Path]) -> None:
    unsaid = Patch(dict(Patch.load(parts[0]).tensors))
    with pytest.raises(PatchError, match="does not say what that is"):
        moments.measure_moments([unsaid], base, clip)
    with pytest.raises(PatchError, match="what the layers read"):
        composing.stack([(unsaid, 1.0)], method="regmean")


def test_another_word_for_a_concept_is_not_kept() -> None:
    """On the bundled base, whose vocabulary calls a church a chapel too."""
    base, clip = load_base("atelier", device="cpu"), Clip.load("atelier")
    church = Concept(text="church", kind="object")
    asked = moments.Asked([church], clip, seed=0)
    assert "chapel" in asked.words
    asked.look(church, ["meadow", "field"], base.generate(church.name_prompts, [1, 2, 3], steps=8))
    kept = asked.kept([[(church, ["meadow", "field"])]])
    assert not any("chapel" in prompt or "church" in prompt for prompt in kept)
    assert "A photo of meadow" in kept and "A photo of cottage" in kept
