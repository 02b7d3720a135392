"""``recare-patch stack``, ``merge`` and ``unmerge``, for real on the tiny base."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from recare_patch.models import load_base
from recare_patch.patch import Patch, Stacking
from tests.cli.conftest import Invoke
from tests.measure.making import make_patch


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
        return pipe.unet(latents, torch.tensor([10, 700]), text).sample


def _picture(pipe: StableDiffusionPipeline) -> np.ndarray:
    drawn = pipe("a cat", num_inference_steps=2, generator=torch.Generator().manual_seed(3)).images[0]
    return np.asarray(drawn, dtype=int)


def _stacking(folder: str) -> Stacking:
    metadata = Patch.load(folder).metadata
    assert metadata is not None and metadata.stacking is not None
    return metadata.stacking


def test_a_stack_is_what_set_adapters_makes_of_its_parts(
    invoke: Invoke, tiny_sd: Path, parts: tuple[Path, Path]
) -> None:
    one, other = parts
    short = str(other).removesuffix("-patch")
    result = invoke(f"stack {one} {short}:-0.5 --out both --precision fp32")
    assert result.exit_code == 0, result.output
    assert "2 patches" in result.stdout
    pipe = _plain(tiny_sd)
    pipe.load_lora_weights(one, adapter_name="one")
    pipe.load_lora_weights(other, adapter_name="other")
    pipe.set_adapters(["one", "other"], [1.0, -0.5])
    stacked = _plain(tiny_sd)
    untouched = _predicted(stacked)
    stacked.load_lora_weights("both")
    found = _predicted(stacked)
    assert (found - _predicted(pipe)).abs().max() < 1e-5
    assert (found - untouched).abs().max() > 1e-3
    shown = invoke("inspect both")
    assert shown.exit_code == 0 and "-0.5" in shown.stdout


@pytest.mark.parametrize("method", ["ties", "dare", "svd"])
def test_the_other_ways_tell_their_error(invoke: Invoke, parts: tuple[Path, Path], method: str) -> None:
    result = invoke("stack", *parts, "--out", method, "--method", method, "--rank", 2)
    assert result.exit_code == 0, result.output
    assert "Differs from the sum of its parts" in result.stdout
    assert 0 < _stacking(method).relative_error < 3


def test_a_merged_folder_draws_what_the_patch_does(invoke: Invoke, tiny_sd: Path, parts: tuple[Path, Path]) -> None:
    result = invoke(f"merge --patch {parts[0]} --base {tiny_sd} --out merged --verify")
    assert result.exit_code == 0, result.output
    with_patch, merged = _plain(tiny_sd), _picture(_plain(Path("merged")))
    before = _picture(with_patch)
    with_patch.load_lora_weights(parts[0])
    assert np.abs(_picture(with_patch) - merged).max() <= 2 < np.abs(before - merged).max()
    back = invoke(f"unmerge merged --patch {parts[0]} --base {tiny_sd} --out again")
    assert back.exit_code == 0, back.output
    assert np.abs(_picture(_plain(Path("again"))) - before).max() <= 1


def test_how_parts_meet_is_told_and_a_taken_folder_is_refused(invoke: Invoke, parts: tuple[Path, Path]) -> None:
    told = invoke(f"stack {parts[0]} {parts[0]}:-0.5 --out odd")
    assert "(cosine -1.00)" in told.stderr
    assert "cosines of -1.00 to -1.00" in told.stdout and "by up to 1.00, what they write" in told.stdout
    again = invoke("stack", *parts, "--out", "odd")
    assert again.exit_code == 2
    assert "already holds files" in again.stderr and "--resume" not in again.stderr


def test_regmean_draws_with_the_base_and_says_what_it_took(
    invoke: Invoke, tiny_sd: Path, tiny_clip: Path, parts: tuple[Path, Path]
) -> None:
    places = f"--base {tiny_sd} --clip {tiny_clip} --device cpu --out both --method regmean"
    result = invoke(f"stack {parts[0]} {parts[1]} {places} --kept-weight 2")
    assert result.exit_code == 0, result.output
    assert "denoiser evaluations" in result.stdout
    assert (_stacking("both").method, _stacking("both").kept_weight) == ("regmean", 2.0)
    assert "RegMean" in Path("both/README.md").read_text()
    assert "regmean" in invoke("inspect both").stdout
    again = invoke(f"stack {parts[0]} {parts[1]} {places}")
    assert again.exit_code == 2 and "already holds files" in again.stderr


def test_bad_input_is_one_sentence_and_leaves_nothing(
    invoke: Invoke, tiny_sd: Path, tiny_sd_v: Path, tiny_clip: Path, parts: tuple[Path, Path], tmp_path: Path
) -> None:
    one = parts[0]
    both = f"stack {one} {parts[1]} --device cpu"
    foreign = make_patch(load_base(str(tiny_sd_v), device="cpu"), tmp_path / "foreign")
    for words, told in (
        (f"stack {one} {foreign}", ""),
        (f"stack {one} nowhere", "there is no patch at nowhere"),
        (f"stack {one}:nan", "must be a number"),
        (f"{both} --method tis", "ties"),
        (f"{both} --method regmin", "regmean"),
        (f"{both} --kept-weight 2", "--kept-weight is for --method regmean"),
        (f"{both} --method regmean --base {tiny_sd_v} --clip {tiny_clip}", "was made for"),
        (f"{both} --method regmean --kept-weight 0", "kept-weight"),
        (f"{both} --method regmean --density 0.5", "a density is"),
        (f"{both} --method regmean --rank 1", "must be at least 4, got 1"),
        (f"merge --patch {foreign} --base {tiny_sd}", ""),
        (f"merge --patch {one} --base nowhere/at-all", "nowhere/at-all"),
        (f"unmerge {tiny_sd} --patch {one}", ""),
    ):
        result = invoke(f"{words} --out bad")
        assert result.exit_code == 2, (words, result.output)
        assert told in result.stderr and len(result.stderr.strip().splitlines()) <= 4, result.stderr
        assert not Path("bad").exists(), words


def test_closed_forms_are_solved_and_scaled(invoke: Invoke, tiny_sd: Path, tiny_clip: Path) -> None:
    for name in ("tench", "boat"):
        made = invoke(
            f"erase --concept {name} --kind object --method closed --out {name}-patch --device cpu --base {tiny_sd} "
            f"--clip {tiny_clip} --set target_images.steps=2"
        )
        assert made.exit_code == 0, made.output
    result = invoke(f"stack tench boat:0.5 --out both --device cpu --clip {tiny_clip}")
    assert result.exit_code == 0, result.output
    assert "2 closed forms are solved anew for all their names (2), not added." in result.stdout
    assert _stacking("both").method == "solved" and _stacking("both").relative_error > 1e-4
    added = invoke("stack tench boat:0.5 --out sum --method concat")
    assert added.exit_code == 0 and _stacking("sum").relative_error < 1e-3
    shown = json.loads(invoke("inspect both --json").stdout)
    assert [(one["name"], one["scale"]) for one in shown["names"]] == [("tench", 1.0), ("boat", 0.5)]
    less = invoke("scale both --concept boat:2 --concept tench --out less")
    assert less.exit_code == 0 and "1 name," in less.stdout, less.output
    both, one = Patch.load("both"), Patch.load("less")
    for module in both.modules:
        a, b = both.factors(module)
        assert torch.equal(one.update(module), (2 * b[:, 1:]).float() @ a[1:].float())
    for words, told in (
        ("scale both --concept boot:1 --out x", "boat"),
        ("scale both --concept boat:no --out x", "a name and a number"),
        ("scale both:0.5 --concept boat --out x", "has a scale"),
        ("stack tench boat --out x --rank 3", "--rank is that of the names"),
    ):
        refused = invoke(words)
        assert refused.exit_code == 2 and told in refused.stderr and not Path("x").exists(), refused.output
