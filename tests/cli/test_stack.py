"""``recare-patch stack``, ``merge`` and ``unmerge``, for real on the tiny base."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import Result
from diffusers import StableDiffusionPipeline

from recare_patch.models.loading import load_base
from recare_patch.patch.patch import Patch
from tests.measure.test_attacks import make_patch

Invoke = Callable[..., Result]


@pytest.fixture(scope="module")
def parts(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("parts")
    base = load_base(str(tiny_sd), device="cpu")
    return make_patch(base, folder / "a", seed=1), make_patch(base, folder / "b-patch", seed=2)


def _plain(folder: Path) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _predicted(pipe: StableDiffusionPipeline) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    channels, side = pipe.unet.config.in_channels, pipe.unet.config.sample_size
    latents = torch.randn((2, channels, side, side), generator=generator)
    text = torch.randn((2, 77, pipe.unet.config.cross_attention_dim), generator=generator)
    with torch.no_grad():
        found: torch.Tensor = pipe.unet(latents, torch.tensor([10, 700]), text).sample
    return found


def _picture(pipe: StableDiffusionPipeline) -> np.ndarray:
    drawn = pipe("a cat", num_inference_steps=2, generator=torch.Generator().manual_seed(3)).images[0]
    return np.asarray(drawn, dtype=int)


def test_a_stack_is_what_set_adapters_makes_of_its_parts(
    invoke: Invoke, tiny_sd: Path, parts: tuple[Path, Path]
) -> None:
    one, other = parts
    result = invoke("stack", one, f"{other}:-0.5", "--out", "both", "--precision", "fp32")
    assert result.exit_code == 0, result.output
    assert "2 patches" in result.stdout
    pipe = _plain(tiny_sd)
    pipe.load_lora_weights(one, adapter_name="one")
    pipe.load_lora_weights(other, adapter_name="other")
    pipe.set_adapters(["one", "other"], [1.0, -0.5])
    together = _predicted(pipe)
    stacked = _plain(tiny_sd)
    untouched = _predicted(stacked)
    stacked.load_lora_weights("both")
    found = _predicted(stacked)
    assert (found - together).abs().max() < 1e-5
    assert (found - untouched).abs().max() > 1e-3
    shown = invoke("inspect", "both")
    assert shown.exit_code == 0, shown.output
    assert "-0.5" in shown.stdout


@pytest.mark.parametrize("method", ["ties", "dare", "svd"])
def test_the_other_ways_tell_their_error(invoke: Invoke, parts: tuple[Path, Path], method: str) -> None:
    result = invoke("stack", *parts, "--out", method, "--method", method, "--rank", 2)
    assert result.exit_code == 0, result.output
    assert "Differs from the sum of its parts" in result.stdout
    metadata = Patch.load(method).metadata
    assert metadata is not None and metadata.stacking is not None
    assert 0 < metadata.stacking.relative_error < 3


def test_a_merged_folder_draws_what_the_patch_does(
    invoke: Invoke, tiny_sd: Path, parts: tuple[Path, Path]
) -> None:
    result = invoke("merge", "--patch", parts[0], "--base", tiny_sd, "--out", "merged", "--verify")
    assert result.exit_code == 0, result.output
    with_patch = _plain(tiny_sd)
    before = _picture(with_patch)
    with_patch.load_lora_weights(parts[0])
    merged = _picture(_plain(Path("merged")))
    assert np.abs(_picture(with_patch) - merged).max() <= 2
    assert np.abs(before - merged).max() > 2
    back = invoke("unmerge", "merged", "--patch", parts[0], "--base", tiny_sd, "--out", "again")
    assert back.exit_code == 0, back.output
    assert np.abs(_picture(_plain(Path("again"))) - before).max() <= 1


def test_how_parts_meet_is_told_before_and_a_taken_folder_is_refused(
    invoke: Invoke, parts: tuple[Path, Path]
) -> None:
    told = invoke("stack", parts[0], f"{parts[0]}:-0.5", "--out", "odd")
    assert "(cosine -1.00)" in told.stderr
    assert "cosines of -1.00 to -1.00" in told.stdout and "by up to 1.00, what they write" in told.stdout
    again = invoke("stack", *parts, "--out", "odd")
    assert again.exit_code == 2
    assert "already holds files" in again.stderr and "--resume" not in again.stderr


def test_bad_input_is_one_sentence_and_leaves_nothing(
    invoke: Invoke, tiny_sd: Path, tiny_sd_v: Path, parts: tuple[Path, Path], tmp_path: Path
) -> None:
    foreign = make_patch(load_base(str(tiny_sd_v), device="cpu"), tmp_path / "foreign")
    for words in (
        ("stack", parts[0], foreign, "--out", "bad"),
        ("stack", parts[0], "nowhere", "--out", "bad"),
        ("stack", *parts, "--out", "bad", "--method", "tis"),
        ("stack", f"{parts[0]}:nan", "--out", "bad"),
        ("merge", "--patch", foreign, "--base", tiny_sd, "--out", "bad"),
        ("merge", "--patch", parts[0], "--base", "nowhere/at-all", "--out", "bad"),
        ("unmerge", tiny_sd, "--patch", parts[0], "--out", "bad"),
    ):
        result = invoke(*words)
        assert result.exit_code == 2, (words, result.output)
        assert len(result.stderr.strip().splitlines()) <= 3, result.stderr
        assert not Path("bad").exists(), words


def test_regmean_draws_with_the_base_and_says_what_it_took(
    invoke: Invoke, tiny_sd: Path, tiny_clip: Path, parts: tuple[Path, Path]
) -> None:
    words = ("stack", *parts, "--base", tiny_sd, "--clip", tiny_clip, "--device", "cpu")
    result = invoke(*words, "--out", "both", "--method", "regmean", "--kept-weight", "2")
    assert result.exit_code == 0, result.output
    assert "denoiser evaluations" in result.stdout
    made = Patch.load("both").metadata
    assert made is not None and made.stacking is not None
    assert (made.stacking.method, made.stacking.kept_weight) == ("regmean", 2.0)
    assert "RegMean" in (Path("both") / "README.md").read_text()
    shown = invoke("inspect", "both")
    assert "regmean" in shown.stdout
    again = invoke(*words, "--out", "both", "--method", "regmean")
    assert again.exit_code == 2 and "already holds files" in again.stderr


def test_what_regmean_cannot_do_is_one_sentence(
    invoke: Invoke, tiny_sd_v: Path, tiny_clip: Path, parts: tuple[Path, Path]
) -> None:
    for words, told in (
        (("--kept-weight", "2"), "--kept-weight is for --method regmean"),
        (("--method", "regmin"), "regmean"),
        (("--method", "regmean", "--base", tiny_sd_v, "--clip", tiny_clip), "was made for"),
        (("--method", "regmean", "--kept-weight", "0"), "kept-weight"),
        (("--method", "regmean", "--density", "0.5"), "a density is"),
        (("--method", "regmean", "--rank", "1"), "must be at least 4, got 1"),
    ):
        result = invoke("stack", *parts, "--out", "bad", "--device", "cpu", *words)
        assert result.exit_code == 2, (words, result.output)
        assert told in result.stderr, result.stderr
        assert not Path("bad").exists(), words
