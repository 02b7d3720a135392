"""Whole models in one safetensors file: read through a folder of configurations, or refused in a sentence."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from recare_patch.core import BaseModelError
from recare_patch.models import load_base, read_layout
from recare_patch.patch import write_single_file


@pytest.fixture
def checkpoint(tiny_sd: Path, tmp_path: Path) -> Path:
    """The tiny SD 1 as one file, with its configurations, and no weights, beside it."""
    shutil.copytree(tiny_sd, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    return write_single_file(read_layout(tiny_sd, "tiny"), tmp_path / "model.safetensors", {})


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_file_is_the_model_it_was_made_of(checkpoint: Path, tiny_sd: Path, precision: str) -> None:
    one, folder = load_base(checkpoint, precision=precision), load_base(tiny_sd, precision=precision)
    assert one.id == "model" and one.family == folder.family
    assert one.denoiser_hash() == folder.denoiser_hash() == load_base(tiny_sd).denoiser_hash()
    assert one.component_hash("text_encoder") == folder.component_hash("text_encoder")
    found, wanted = (base.generate(["a cat"], [3], steps=2)[0] for base in (one, folder))
    assert np.array_equal(np.asarray(found), np.asarray(wanted))


def _refused(file: Path, match: str) -> None:
    with pytest.raises(BaseModelError, match=match) as caught:
        load_base(file)
    assert "\n" not in str(caught.value)


def test_configurations_are_not_here_or_in_the_cache(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, cache = "stable-diffusion-v1-5/stable-diffusion-v1-5", tmp_path / "cache"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    configurations = tmp_path / "model"
    cached = cache / f"models--{name.replace('/', '--')}"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    shutil.move(configurations, cached / "snapshots" / ("0" * 40))
    assert load_base(checkpoint).id == "model"
    shutil.rmtree(cache)
    _refused(checkpoint, f"{name} are not on this machine")


def test_what_is_no_whole_model(tmp_path: Path, checkpoint: Path) -> None:
    lora = tmp_path / "lora.safetensors"
    save_file({"unet.mid.lora_A.weight": torch.zeros(2, 2)}, lora)
    _refused(lora, "no whole model")
    (tmp_path / "model.ckpt").write_bytes(b"pickle")
    _refused(tmp_path / "model.ckpt", "can run code")
    (tmp_path / "empty.safetensors").write_bytes(b"")
    _refused(tmp_path / "empty.safetensors", "is a file, but no safetensors checkpoint")
    checkpoint.write_bytes(checkpoint.read_bytes()[:-4000])
    _refused(checkpoint, "model.safetensors|'model' cannot be loaded")
