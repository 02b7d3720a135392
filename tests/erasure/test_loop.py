"""The loop, its states and names that it fits: the same draws, and a resume that ends with the same bits."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from recare_patch.core import NonFiniteError, NullProgress, RecipeError, ResumeError, UnknownNameError
from recare_patch.erasure import EraseResult, step_generator
from recare_patch.erasure.inversion import HELD_OUT, invert, most_evaluations
from recare_patch.erasure.loop import STATES, Average, Checkpoint, EarlyStop, Fitted, Loop, fit, learning_rate_at
from recare_patch.models import SCHEDULERS, BaseModel, load_base, scheduled
from recare_patch.recipe import STATES as NAMES
from recare_patch.recipe import Recipe

ONE_STEP = Loop("t", 1, 1e-3, 0, optimizer="adamw")


def _run(
    optimizer: str,
    total: int,
    checkpoint: Checkpoint | None = None,
    stopped: int | None = None,
    dtype: torch.dtype = torch.float32,
    average: float = 0.0,
) -> Any:
    """Parameters and losses of a small problem; the loop is left in the middle where it is ``stopped``."""
    generator = torch.Generator().manual_seed(3)
    # 8-bit states begin at 4096 elements: one tensor above, one below.
    large = nn.Parameter(torch.randn(64, 80, generator=generator))
    small = nn.Parameter(torch.randn(8, generator=generator))
    goal = torch.randn(64, 80, generator=generator)

    def loss_at(step: int, generator: torch.Generator) -> Tensor:
        if step == stopped:
            raise KeyboardInterrupt
        noise = 0.1 * torch.randn(goal.shape, generator=generator)
        # In half precision its gradient overflows until the scale has fallen.
        missed = (large.to(dtype) - (goal - noise).to(dtype)).float()
        return missed.pow(2).mean() * (5e4 if dtype is torch.float16 else 1) + small.pow(2).mean()

    loop = Loop("t", total, 1e-2, 0, optimizer, dtype=dtype, checkpoint=checkpoint, save_every=4, average=average)
    fitted = Fitted()
    with contextlib.suppress(KeyboardInterrupt):
        fitted = fit([large, small], loss_at, loop)
    return [large, small], fitted.losses


@pytest.mark.parametrize(
    ("optimizer", "dtype"), [("adamw", torch.float32), ("adamw8bit", torch.float32), ("adamw", torch.float16)]
)
@pytest.mark.parametrize("stopped", [3, 6, 11])
def test_resume_is_bit_exact(tmp_path: Path, optimizer: str, stopped: int, dtype: torch.dtype) -> None:
    whole, losses = _run(optimizer, 12, dtype=dtype)
    # Steps that overflow are left out, and are steps all the same.
    assert (losses[0] == pytest.approx(losses[1], rel=1e-2)) == (dtype is torch.float16)
    assert len(losses) == 12 and losses[-1] < losses[0]
    checkpoint = Checkpoint(tmp_path / "c.safetensors")
    _run(optimizer, 12, checkpoint, stopped, dtype)
    resumed, again = _run(optimizer, 12, checkpoint, dtype=dtype)
    assert again == losses
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))


@pytest.mark.parametrize("stopped", [3, 6, 11])
def test_a_resumed_loop_ends_with_the_same_mean(tmp_path: Path, stopped: int) -> None:
    whole, _ = _run("adamw", 12, average=0.9)
    last, _ = _run("adamw", 12)
    assert not torch.equal(whole[0], last[0])
    checkpoint = Checkpoint(tmp_path / "c.safetensors")
    _run("adamw", 12, checkpoint, stopped, average=0.9)
    resumed, _ = _run("adamw", 12, checkpoint, average=0.9)
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))


def test_a_mean_weighs_its_steps() -> None:
    weight = nn.Parameter(torch.zeros(1))
    average, expected = Average([weight], 0.5), 0.0
    for taken, value in enumerate([3.0, -1.0, *[float(k) for k in range(20)]]):
        with torch.no_grad():
            weight.fill_(value)
        average.take()
        before = min(0.5, taken / (taken + 9))
        expected = before * expected + (1 - before) * value
    average.settle()
    assert weight.item() == pytest.approx(expected)


def test_a_damaged_checkpoint_is_passed_over_and_a_foreign_one_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole, losses = _run("adamw", 8)
    file = tmp_path / "c.safetensors"
    _run("adamw", 8, Checkpoint(file), 6)
    data = bytearray(file.read_bytes())
    data[-9] ^= 4  # One bit of a parameter.
    for damaged in (b"not a checkpoint", bytes(data)):
        file.write_bytes(damaged)
        again, told = _run("adamw", 8, Checkpoint(file))
        assert told == losses and all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
        assert "c.safetensors of this run is damaged" in caplog.text
        caplog.clear()
    other = Checkpoint(tmp_path / "other.safetensors")
    parameter = nn.Parameter(torch.zeros(3))
    fit([parameter], lambda step, generator: parameter.sum(), replace(ONE_STEP, checkpoint=other))
    with pytest.raises(ResumeError, match="another adapter"):
        _run("adamw", 2, other)


def test_unknown_optimizers_and_losses_that_are_no_number() -> None:
    with pytest.raises(UnknownNameError, match="adamw8bit"):
        _run("adamw8bits", 1)
    parameter = nn.Parameter(torch.ones(2))
    with pytest.raises(NonFiniteError, match=r"^t, step 1: the loss is infinite: try a lower learning rate"):
        fit([parameter], lambda step, generator: parameter.sum() / 0, ONE_STEP)


def test_step_generators_differ_by_seed_stage_and_step() -> None:
    keys = [(seed, stage, step) for seed in (0, 1) for stage in ("erase", "search") for step in (0, 1, 2)]
    assert len({torch.rand(1, generator=step_generator(*key)).item() for key in keys}) == 12


def test_cosine_runs_from_the_peak_to_a_tenth() -> None:
    rates = [learning_rate_at(step, 11, 1.0, "cosine") for step in (0, 5, 10)]
    assert rates == pytest.approx([1.0, 0.55, 0.1])
    assert learning_rate_at(10, 11, 1.0, "constant") == 1.0


def test_an_early_stop_keeps_the_best() -> None:
    parameter, losses = nn.Parameter(torch.zeros(1)), iter([3.0, 1.0, 2.0, 1.0, 0.0])
    seen: list[float] = []

    def held_out() -> float:
        seen.append(parameter.item())
        return next(losses)

    stop = EarlyStop([parameter], held_out, patience=2, every=3)
    loop = replace(ONE_STEP, steps=100, learning_rate=1e-2)
    fitted = fit([parameter], lambda step, generator: (parameter - 5).square().sum(), loop, stop=stop)
    assert len(fitted.losses) == 12
    assert parameter.item() == seen[1] != seen[-1]


def _source(base: BaseModel, name: str) -> Any:
    latents = torch.randn((3, *base.latent_shape), generator=torch.Generator().manual_seed(0))
    return STATES.get(name)(base, latents, base.encode_prompts(["Van Gogh", "stars"]), base.encode_prompts([""]))


@pytest.mark.parametrize("name", NAMES)
def test_every_source_gives_repeatable_states(base: BaseModel, name: str) -> None:
    latents, timesteps = _source(base, name).draw(0, torch.tensor([0, 1]), torch.Generator().manual_seed(1))
    again = _source(base, name).draw(0, torch.tensor([0, 1]), torch.Generator().manual_seed(1))
    assert latents.shape == (2, *base.latent_shape) and timesteps.shape == (2,)
    assert torch.isfinite(latents).all()
    assert int(timesteps.min()) >= 0 and int(timesteps.max()) < base.num_train_timesteps
    assert torch.equal(latents, again[0]) and torch.equal(timesteps, again[1])


SAMPLERS = (None, *SCHEDULERS.names(), "EulerAncestralDiscreteScheduler")


@pytest.mark.parametrize(("folder", "scheduler"), [*product(("tiny_sd", "tiny_sdxl"), SAMPLERS), ("tiny_sd3", None)])
def test_rollouts_hand_over_what_the_denoiser_sees(
    folder: str, scheduler: str | None, request: pytest.FixtureRequest
) -> None:
    """Schedulers over σ keep latents four times as large."""
    base = load_base(request.getfixturevalue(folder), device="cpu")
    if scheduler is not None and scheduler not in SCHEDULERS.names():
        base.pipeline.scheduler = getattr(diffusers, scheduler).from_config(base.pipeline.scheduler.config)
        scheduler = None
    seen: list[Tensor] = []
    with scheduled(base.pipeline, scheduler):
        source, which = _source(base, "rollout"), torch.tensor([0, 1])
        source.steps = 8
        found, again = (source.roll(which, torch.Generator().manual_seed(0), [0, 1, 4]) for _ in range(2))
        name = "hidden_states" if folder == "tiny_sd3" else "sample"
        look = lambda module, args, more: seen.append(more.get(name, args[0] if args else None))  # noqa: E731
        base.denoiser.register_forward_pre_hook(look, with_kwargs=True)
        source.roll(which, torch.Generator().manual_seed(0), [0, 1, 5])
    assert float(found[0][0].std()) == pytest.approx(1, abs=0.15)
    for (states, times), (others, _), number in zip(found, again, (0, 1, 4), strict=True):
        assert torch.equal(states, seen[number][:2]) and torch.equal(states, others)
        assert times.shape == (2,)


def test_target_images_cost_no_evaluation_and_a_shared_rollout_is_cheaper(base: BaseModel) -> None:
    cost = {}
    assert sorted(NAMES) == sorted(STATES.names())
    for name in NAMES:
        source, before = _source(base, name), base.counter.total
        for step in range(20):
            source.draw(step, torch.tensor([0, 1]), torch.Generator().manual_seed(step))
        cost[name] = base.counter.total - before
    # 19 steps, both halves, two rows, once in 20 training steps.
    assert cost["target-images"] == 0 and cost["shared-rollout"] == 19 * 2 * 2
    assert cost["rollout"] > 5 * cost["shared-rollout"]


class _Killed(NullProgress):
    def update(self, stage: str, done: int, total: int, note: str = "") -> None:
        if done == 63:
            raise KeyboardInterrupt


def _invert(base: BaseModel, *, steps: int = 40, rate: float = 1.0, **options: Any) -> tuple[Tensor, Fitted]:
    latents = torch.randn((10, *base.latent_shape), generator=torch.Generator().manual_seed(0))
    start, prompts = base.word_vector("art")[None], ["a painting of <*>", "<*>"]
    kept = {name: options.pop(name) for name in ("checkpoint", "progress") if name in options}
    loop = Loop("inversion", steps, rate, 1, **kept)
    return invert(base, latents, prompts, start, loop, batch_size=2, **options)


def test_inversion_lowers_the_loss_and_touches_nothing_else(base: BaseModel) -> None:
    own = {key: value.clone() for key, value in base.denoiser.state_dict().items()}
    # The same draws twice: with steps too small to matter, and with real ones.
    (start, still), (vectors, fitted) = _invert(base, rate=1e-20), _invert(base, rate=0.5)
    assert vectors.shape == start.shape and not torch.equal(vectors, start)
    assert sum(fitted.losses[-20:]) < sum(still.losses[-20:])
    assert all(torch.equal(own[key], value) for key, value in base.denoiser.state_dict().items())


def test_an_inversion_ends_when_nothing_gets_better(base: BaseModel) -> None:
    # Steps as short as these leave the vectors where they are: the first look stays the best.
    vectors, fitted = _invert(base, patience=2, rate=1e-20)
    assert len(fitted.losses) == 30 and torch.equal(vectors, base.word_vector("art")[None])
    assert base.counter.total == 30 * 2 * 3 + 3 * HELD_OUT < most_evaluations(40, 2, 2)
    before = base.counter.total
    assert len(_invert(base, patience=100, steps=12, rate=1e-4)[1].losses) == 12
    assert base.counter.total - before == most_evaluations(12, 2, 100) == 12 * 2 * 3 + 2 * HELD_OUT


def test_a_resumed_inversion_ends_with_the_same_bits(base: BaseModel, tmp_path: Path) -> None:
    options: dict[str, Any] = {"patience": 6, "rate": 0.3, "steps": 120}
    vectors, fitted = _invert(base, **options)
    assert len(fitted.losses) > 63
    checkpoint = Checkpoint(tmp_path / "inversion.safetensors")
    with contextlib.suppress(KeyboardInterrupt):
        _invert(base, checkpoint=checkpoint, progress=_Killed(), **options)
    assert checkpoint.path.exists()
    for _ in range(2):
        # The second time there is nothing left to do.
        again, refitted = _invert(base, checkpoint=checkpoint, **options)
        assert torch.equal(again, vectors) and refitted.losses == fitted.losses


def test_an_inversion_on_low_noise_alone(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    denoise = base.denoise

    def look(latents: Tensor, timesteps: Tensor, embeds: Any) -> Tensor:
        seen.extend(timesteps.tolist())
        return denoise(latents, timesteps, embeds)

    monkeypatch.setattr(base, "denoise", look)
    _invert(base, steps=12, noise_up_to=0.3, patience=5)
    assert max(seen) < 300 and min(seen) < 30
    seen.clear()
    _invert(base, steps=12)
    assert max(seen) > 700


@pytest.mark.parametrize("warm", [False, True])
def test_a_round_starts_from_the_name_before(
    small: Callable[..., Recipe], run: Callable[..., EraseResult], monkeypatch: pytest.MonkeyPatch, warm: bool
) -> None:
    found: list[Tensor] = []

    def keep(base: BaseModel, latents: Tensor, prompts: Any, start: Tensor, loop: Loop, **options: Any) -> Any:
        vectors, fitted = invert(base, latents, prompts, start, loop, **options)
        found.extend([start.clone(), vectors.clone()])
        return vectors, fitted

    monkeypatch.setattr("recare_patch.erasure.stages.invert", keep)
    # A random model's names explain nothing, and only names that count are gone on from.
    monkeypatch.setattr("recare_patch.erasure.methods.recare.NAME_RECOVERY", -1e9)
    run(small(**{"search.rounds": 2, "search.warm_start": warm, "erase.steps": 1}))
    first, made, second, _ = found
    assert torch.equal(second, made if warm else first)


def test_nothing_to_hold_out(small: Callable[..., Recipe]) -> None:
    with pytest.raises(RecipeError, match="count must be at least 2"):
        small(**{"search.patience": 1, "target_images.count": 1})
