"""Adversaries in the loop: they learn, are erased with the concept, and a resumed run meets the same ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from recare_patch.erasure import EraseResult
from recare_patch.erasure.methods.adversaries import Adversaries
from recare_patch.models import BaseModel
from recare_patch.recipe import AdversaryOptions, Concept, Recipe
from recare_patch.recipe.options import ADVERSARY_SPACES
from tests.erasure.making import TENCH, Killed, Killer, attach

pytestmark = pytest.mark.parametrize("space", ADVERSARY_SPACES)


def _adversaries(base: BaseModel, space: str, **options: Any) -> Adversaries:
    latents = torch.randn((4, *base.latent_shape), generator=torch.Generator().manual_seed(5))
    chosen = {"count": 2, "vectors": 3, "batch_size": 2, "steps": 1, "space": space, **options}
    return Adversaries(base, latents, Concept(text="Van Gogh", kind="style"), AdversaryOptions(**chosen))


def _improve(adversaries: Adversaries, steps: range) -> None:
    for step in steps:
        adversaries.improve(torch.Generator().manual_seed(step))


def test_they_take_turns_and_one_too_old_starts_anew(base: BaseModel, space: str) -> None:
    adversaries, ages = _adversaries(base, space, life=2), []
    for step in range(8):
        _improve(adversaries, range(step, step + 1))
        state = adversaries.state()
        ages.append([int(state[f"{k}.age"]) for k in range(2) if f"{k}.age" in state])
    assert ages == [[1], [1, 1], [2, 1], [2, 2], [1, 2], [1, 1], [2, 1], [2, 2]]
    # Word vectors of one or several words, or the embeddings of a whole prompt.
    assert {len(state[f"{k}.vectors"]) for k in range(2)} <= {1, 3}
    said, plain = adversaries.names(2, torch.Generator().manual_seed(0)), base.encode_prompts(["a cat"])
    assert said.prompt_embeds.shape == (2, *plain.prompt_embeds.shape[1:])
    assert not said.prompt_embeds.requires_grad


def test_they_learn_what_the_model_makes_of_the_pictures(base: BaseModel, space: str) -> None:
    """Against one fixed picture, the noise is predicted better with a name that was sought for long."""
    adversaries = _adversaries(base, space, count=1, life=1000, batch_size=4, learning_rate=5e-2)
    adversaries.latents = adversaries.latents[:1]
    generator = torch.Generator().manual_seed(77)
    noise = torch.randn((16, *base.latent_shape), generator=generator)
    timesteps = torch.randint(0, 1000, (16,), generator=generator)
    states = base.add_noise(adversaries.latents.repeat(16, 1, 1, 1), noise, timesteps)

    def error() -> float:
        names = adversaries.names(1, torch.Generator().manual_seed(0)).repeat(16)
        with torch.no_grad():
            return float((base.denoise(states, timesteps, names) - noise).square().mean())

    _improve(adversaries, range(1))
    before = error()
    _improve(adversaries, range(1, 60))
    assert error() < before


def test_state_goes_on_where_it_stopped(base: BaseModel, space: str) -> None:
    whole, first, second = (_adversaries(base, space, life=3) for _ in range(3))
    _improve(whole, range(9))
    _improve(first, range(5))
    second.load_state(first.state())
    _improve(second, range(5, 9))
    expected, found = whole.state(), second.state()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_seeking_leaves_the_adapter_without_gradient(base: BaseModel, small: Callable[..., Recipe], space: str) -> None:
    parameters = attach(base, small())
    _improve(_adversaries(base, space), range(2))
    assert all(parameter.grad is None and parameter.requires_grad for parameter in parameters)


@pytest.mark.parametrize("also", [[], [TENCH]])
def test_a_resumed_run_meets_the_same_ones(
    small: Callable[..., Recipe], run: Callable[..., EraseResult], space: str, also: list[Any]
) -> None:
    changes = {"count": 2, "vectors": 3, "batch_size": 2, "steps": 1, "life": 9, "space": space}
    recipe = small(also=also, adversary=changes, **{"search.rounds": 0})
    counting = Killer(float("inf"))
    whole = run(recipe, "whole", progress=counting)
    with pytest.raises(Killed):
        run(recipe, progress=Killer(counting.seen - 1))
    resumed = run(recipe, resume=True)
    assert all(torch.equal(one, resumed.patch.tensors[key]) for key, one in whole.patch.tensors.items())
    assert resumed.cost["losses"] == whole.cost["losses"]
