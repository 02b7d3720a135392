"""The closed form against its equation, written out, and what its patch does to names and words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from recare_patch.careset import CareSet
from recare_patch.erasure import EraseResult, forecast
from recare_patch.erasure.methods.closed import ClosedOptions, solution
from recare_patch.models import BaseModel, base_layers, in_double
from recare_patch.patch import Patch
from recare_patch.recipe import Concept, Recipe

NAMES = ["Van Gogh", "Monet", "tench"]


def _case(seed: int = 0, width: int = 24, words: int = 30, names: int = 2) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> torch.Tensor:
        return torch.randn(count, width, generator=generator, dtype=torch.float64)

    # Words that lie near a plane of half the width, as words of a language do.
    plane = draw(width // 2)
    retained = torch.randn(words, len(plane), generator=generator, dtype=torch.float64) @ plane / 4
    erased, values = draw(names), draw(10)
    owner = torch.arange(names).repeat(3)
    return {
        "states": erased[owner] + draw(len(owner)) / 10, "owner": owner, "shift": draw(1) - erased,
        "stays": [retained, draw(4) / 4], "fixed": draw(1), "held": draw(0), "gram": values.T @ values,
    }  # fmt: skip


def _written_out(case: dict[str, Any], options: ClosedOptions) -> torch.Tensor:
    """``Y (E + S)⁻¹``, term by term; the weight of each name is 0.1."""
    states, owner, stays, fixed = (case[key] for key in ("states", "owner", "stays", "fixed"))
    width = states.shape[1]
    unit = (width / torch.cat([states, *stays]).square().sum(1).mean()) ** 0.5
    s = unit**2 * fixed.T @ fixed / options.fixed_ridge / len(fixed) + options.ridge * torch.eye(width).double()
    for group in stays:
        s = s + sum(unit**2 * torch.outer(row, row) for row in group) / len(group)
    y = []
    for name in range(len(case["shift"])):
        own = unit * states[owner == name]
        y.append(0.1 * own.mean(0))
        s = s + 0.1 * sum(torch.outer(row, row) for row in own) / len(own)
    return unit * torch.stack(y) @ torch.linalg.inv(s)


@pytest.mark.parametrize("names", [1, 2, 5])
def test_the_solution_is_the_equation(names: int) -> None:
    case, options = _case(names=names), ClosedOptions(ridge=0.5, gone=0.01)
    torch.testing.assert_close(solution(**case, options=options)[0], _written_out(case, options))


def test_names_go_and_what_stays_stays() -> None:
    case = _case()
    reads, went = solution(**case, options=ClosedOptions())
    assert went.min() >= 0.95
    for stays in case["stays"]:
        assert (stays @ reads.T @ case["shift"]).norm() < 0.1 * stays.norm()
    # Of a name's states after other words each goes its way, and that alone.
    told = case["states"] @ reads.T - torch.nn.functional.one_hot(case["owner"]).double()
    assert told.abs().max() < 0.2
    assert (case["fixed"] @ reads.T).norm() < 0.1


def test_names_that_are_held_do_not_move() -> None:
    held = torch.randn(3, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    reads, went = solution(**(_case() | {"held": held}), options=ClosedOptions())
    assert (held @ reads.T).abs().max() < 1e-4 and went.min() > 0.9


def test_words_that_leave_no_room_raise_the_names_weight() -> None:
    """Retained words all over the space: what a name costs is not asked until it goes; a ridge can forbid it."""
    case = _case()
    case["stays"] = [torch.randn(400, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)]
    assert solution(**case, options=ClosedOptions())[1].min() >= 0.9
    reads, went = solution(**case, options=ClosedOptions(ridge=10_000))
    assert went.max() < 0.9 and torch.isfinite(reads).all()


def test_it_is_the_same_in_any_unit() -> None:
    """Another base's states may be a hundred times as large."""
    case = _case()
    large = case | {key: case[key] * 100 for key in ("states", "shift", "fixed", "held")}
    large["stays"] = [one * 100 for one in case["stays"]]
    plain, scaled = (solution(**one, options=ClosedOptions())[0] for one in (case, large))
    torch.testing.assert_close(plain, scaled * 100)


def test_the_patch_is_exact_and_has_a_rank_a_name(
    base: BaseModel, small: Callable[..., Recipe], run: Callable[..., EraseResult]
) -> None:
    also = [{"text": text, "kind": kind} for text, kind in (("Monet", "style"), ("tench", "object"))]
    result = run(small("closed", also=also, **{"adapter.rank": 3, "adapter.alpha": 3.0}))
    # A base of 32 numbers a token leaves three names little room.
    assert result.cost["rank_residual"] == 0 and result.cost["names_went"] > 0.8
    assert result.cost["denoiser_evaluations"] == 0 and result.cost["losses"] == {}
    assert set(result.patch.ranks.values()) == {3} and all(name.endswith("to_v") for name in result.patch.ranks)
    names, plain = base.word_states(NAMES), base.word_states(["art", "art", "object"])
    for name, layer in base_layers(base.denoiser):
        if f"unet.{name}" in result.patch.ranks:
            weight = in_double(layer.weight.detach())
            read = names @ (weight + result.patch.update(f"unet.{name}").double()).T
            missed = (read - plain @ weight.T).norm() / ((names - plain) @ weight.T).norm()
            assert missed < 0.6, name
    moved = result.cost["moved_most"]
    assert 0 < len(moved) <= 20 and list(moved.values()) == sorted(moved.values(), reverse=True)
    assert not {"monet", "tench", "gogh"} & set(moved)


def test_companions_that_are_given_are_retained(
    small: Callable[..., Recipe], run: Callable[..., EraseResult], finished_set: CareSet
) -> None:
    # No list of the lexicon has it.
    result = run(small("closed"), care_set=finished_set)
    assert "zebra crossing" in result.cost["moved_most"] or len(result.cost["moved_most"]) == 20
    assert result.care_set is not None and result.care_set.words == ("zebra crossing",)


@pytest.fixture
def finished_set() -> CareSet:
    return CareSet.of_words(Concept(text="Van Gogh", kind="style"), ["zebra crossing"])


def test_a_lower_rank_says_what_it_leaves_out(small: Callable[..., Recipe], run: Callable[..., EraseResult]) -> None:
    also = [{"text": "tench", "kind": "object"}]
    low = run(small("closed", also=also, **{"adapter.rank": 1, "adapter.alpha": 1.0}), "low")
    assert set(low.patch.ranks.values()) == {1} and 0 < low.cost["rank_residual"] < 1
    high = run(small("closed", also=also, **{"adapter.rank": 5, "adapter.alpha": 5.0}), "high")
    assert high.cost["rank_residual"] == 0


def test_the_rank_follows_the_names() -> None:
    recipe = Recipe(concept={"text": "Van Gogh", "kind": "style"}, method="closed")  # type: ignore[arg-type]
    assert (recipe.adapter.rank, recipe.adapter.alpha, recipe.adapter.layers) == (1, 1.0, "cross-attention-v")
    two = recipe.with_overrides({"also": [{"text": "tench", "kind": "object"}], "concept.aliases": ["Vincent"]})
    assert two.adapter.rank == 3 and two.with_overrides({"seed": 3}).adapter.rank == 3
    said = two.with_overrides({"adapter.rank": 2})
    assert said.adapter.rank == 2 and said.with_overrides({"also": []}).adapter.rank == 2
    assert recipe.with_overrides({"method": "esd"}).adapter.rank == 8
    assert Recipe.from_yaml(two.to_yaml()) == two
    bare = Concept(text="Nudity", kind="nsfw").bare_names
    assert len(bare) == 5 and "Nudity" in bare


@pytest.mark.parametrize("length", [4, 30])
def test_words_alone_are_read_as_in_whole_prompts(base: BaseModel, length: int) -> None:
    words = ["van gogh", "tench", "a " * length + "cat"]
    whole = in_double(base.encode_prompts(words).prompt_embeds)
    places = [len(base.token_ids(word)) for word in words]
    torch.testing.assert_close(base.word_states(words), whole[range(3), places], atol=1e-5, rtol=1e-4)
    assert base.word_states([]).shape == (0, whole.shape[2])
    assert [one.model_max_length for one in base._tokenizers] == [77]


def test_training_may_start_from_it(run: Callable[..., EraseResult], small: Callable[..., Recipe]) -> None:
    """With a rate of almost nothing what comes out is the start: values of names go, other layers stay."""
    still = {"erase.learning_rate": 1e-12, "erase.steps": 1, "erase.optimizer": "adamw", "search.rounds": 0}
    recipe = small(**still, **{"erase.start": "closed", "erase.ends": "steps", "adapter.layers": "transformer-blocks"})
    patch = run(recipe).patch
    sizes = _sizes(patch)
    moved = {name for name, size in sizes.items() if size > 1e-6}
    assert moved and all(name.endswith("attn2.to_v") for name in moved)
    assert len(moved) == sum(name.endswith("attn2.to_v") for name in sizes) < len(sizes)
    assert max(_sizes(run(small(**still, **{"erase.ends": "steps"}), "zero").patch).values()) < 1e-6


def _sizes(patch: Patch) -> dict[str, float]:
    factors = {name: patch.factors(name) for name in patch.modules}
    return {name: float((b.flatten(1) @ a.flatten(1)).norm()) for name, (a, b) in factors.items()}


def test_the_forecast_tells_what_the_closed_form_moves_most(small: Callable[..., Recipe]) -> None:
    found = forecast(small(), most=5)
    shares = list(found.words.values())
    assert len(shares) == 5 and shares == sorted(shares, reverse=True) and 0 < shares[0] < 1
    assert "gogh" not in " ".join(found.words) and found.patch.metadata is not None
    assert found.patch.metadata.method == "closed"
