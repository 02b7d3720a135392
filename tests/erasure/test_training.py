"""The loop: deterministic steps, and a resume that ends with the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from recare_patch.core.errors import ResumeError, UnknownNameError
from recare_patch.erasure.loop import Checkpoint, EarlyStop, fit, learning_rate_at, step_generator


def _problem() -> tuple[list[nn.Parameter], torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    # 8-bit states begin at 4096 elements: one tensor above, one below.
    large = nn.Parameter(torch.randn(64, 80, generator=generator))
    small = nn.Parameter(torch.randn(8, generator=generator))
    return [large, small], torch.randn(64, 80, generator=generator)


def _run(
    optimizer: str, steps: int, total: int, checkpoint: Checkpoint | None
) -> tuple[list[nn.Parameter], list[float]]:
    parameters, goal = _problem()

    def loss_at(step: int, generator: torch.Generator) -> torch.Tensor:
        if step >= steps:
            raise KeyboardInterrupt
        noise = 0.1 * torch.randn(goal.shape, generator=generator)
        return (parameters[0] - goal + noise).pow(2).mean() + parameters[1].pow(2).mean()

    losses: list[float] = []
    try:
        fitted = fit(
            parameters,
            loss_at,
            stage="t",
            steps=total,
            learning_rate=1e-2,
            seed=5,
            optimizer=optimizer,
            checkpoint=checkpoint,
            save_every=4,
        )
        losses = fitted.losses
    except KeyboardInterrupt:
        pass
    return parameters, losses


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
@pytest.mark.parametrize("stopped", [3, 6, 11])
def test_resume_is_bit_exact(tmp_path: Path, optimizer: str, stopped: int) -> None:
    whole, losses = _run(optimizer, 12, 12, None)
    checkpoint = Checkpoint(tmp_path / "c.safetensors")
    _run(optimizer, stopped, 12, checkpoint)
    resumed, again = _run(optimizer, 12, 12, checkpoint)
    assert again == losses
    for a, b in zip(whole, resumed, strict=True):
        assert torch.equal(a, b)


def test_every_loss_is_kept_and_falls() -> None:
    _, losses = _run("adamw", 40, 40, None)
    assert len(losses) == 40
    assert losses[-1] < 0.9 * losses[0]


def test_damaged_and_foreign_checkpoints_are_one_sentence(tmp_path: Path) -> None:
    file = tmp_path / "c.safetensors"
    file.write_bytes(b"not a checkpoint")
    with pytest.raises(ResumeError, match="damaged"):
        _run("adamw", 2, 2, Checkpoint(file))
    other = Checkpoint(tmp_path / "other.safetensors")
    parameter = nn.Parameter(torch.zeros(3))
    fit(
        [parameter],
        lambda s, g: parameter.sum(),
        stage="t",
        steps=1,
        learning_rate=1e-3,
        seed=0,
        optimizer="adamw",
        checkpoint=other,
    )
    with pytest.raises(ResumeError, match="another adapter"):
        _run("adamw", 2, 2, other)


def test_unknown_optimizer_names_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="adamw8bit"):
        _run("adamw8bits", 1, 1, None)


def test_non_finite_loss_stops() -> None:
    parameter = nn.Parameter(torch.ones(2))
    with pytest.raises(FloatingPointError, match="step 0"):
        fit(
            [parameter],
            lambda s, g: parameter.sum() / 0,
            stage="t",
            steps=1,
            learning_rate=1e-3,
            seed=0,
            optimizer="adamw",
        )


def test_step_generators_differ_by_seed_stage_and_step() -> None:
    draws = {
        torch.rand(1, generator=step_generator(seed, stage, step)).item()
        for seed in (0, 1)
        for stage in ("erase", "search")
        for step in (0, 1, 2)
    }
    assert len(draws) == 12


def test_cosine_runs_from_the_peak_to_a_tenth() -> None:
    assert learning_rate_at(0, 11, 1.0, "cosine") == pytest.approx(1.0)
    assert learning_rate_at(5, 11, 1.0, "cosine") == pytest.approx(0.55)
    assert learning_rate_at(10, 11, 1.0, "cosine") == pytest.approx(0.1)
    assert learning_rate_at(10, 11, 1.0, "constant") == 1.0


def test_an_early_stop_keeps_the_best() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    seen: list[float] = []
    losses = iter([3.0, 1.0, 2.0, 1.0, 0.0])

    def held_out() -> float:
        seen.append(parameter.item())
        return next(losses)

    fitted = fit(
        [parameter],
        lambda s, g: (parameter - 5).square().sum(),
        stage="t",
        steps=100,
        learning_rate=1e-2,
        seed=0,
        optimizer="adamw",
        stop=EarlyStop([parameter], held_out, patience=2, every=3),
    )
    assert len(fitted.losses) == 12
    assert parameter.item() == seen[1] != seen[-1]
