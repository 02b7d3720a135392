"""Weights under the names that libraries give them: variants, shards in both spellings, mixtures."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from recare_patch.core import BaseModelError
from recare_patch.models import load_base, read_layout


def as_variant(source: Path, folder: Path, variant: str, dtype: torch.dtype, *parts: str) -> Path:
    """A copy of a pipeline that has some parts, by default all, as a variant alone."""
    shutil.copytree(source, folder)
    for file in sorted(folder.glob("*/*.safetensors")):
        if not parts or file.parent.name in parts:
            tensors = {name: tensor.to(dtype) for name, tensor in load_file(file).items()}
            save_file(tensors, file.with_name(f"{file.stem}.{variant}.safetensors"), {"format": "pt"})
            file.unlink()
    return folder


def sharded(source: Path, folder: Path, variant: str, *, late: bool, index: str = "") -> Path:
    """A copy whose weights are a variant in two shards, numbered before the variant or ``late``, behind it."""
    shutil.copytree(source, folder)
    for file in sorted(folder.glob("*/*.safetensors")):
        tensors = {name: tensor.half() for name, tensor in load_file(file).items()}
        names, stem, where = sorted(tensors), file.stem, {}
        for k in range(2):
            number = f"-0000{k + 1}-of-00002"
            shard = f"{stem}.{variant}{number}" if late else f"{stem}{number}.{variant}"
            own = {name: tensors[name] for name in names[k::2]}
            save_file(own, file.with_name(f"{shard}.safetensors"), {"format": "pt"})
            where |= dict.fromkeys(own, f"{shard}.safetensors")
        form = index or ("{}.{}.safetensors.index.json" if late else "{}.safetensors.index.{}.json")
        text = json.dumps({"metadata": {"total_size": 1}, "weight_map": where})
        file.with_name(form.format(stem, variant)).write_text(text)
        file.unlink()
    return folder


def _halves(folder: Path) -> None:
    """Rounded as the variants are, and the same as one of them to the bit."""
    for file in folder.glob("*/*.safetensors"):
        save_file({name: t.half() for name, t in load_file(file).items()}, file, {"format": "pt"})


@pytest.mark.parametrize(
    "make",
    [
        lambda source, to: as_variant(source, to, "fp16", torch.float16),
        lambda source, to: as_variant(source, to, "fp16", torch.float16, "unet"),
        lambda source, to: as_variant(source, to, "fp16", torch.float16, "text_encoder", "vae"),
        lambda source, to: as_variant(source, to, "non_ema", torch.float16, "unet"),
        lambda source, to: sharded(source, to, "fp16", late=False),
        lambda source, to: sharded(source, to, "fp16", late=True),
        lambda source, to: sharded(source, to, "fp16", late=True, index="{}.safetensors.index.{}.json"),
    ],
    ids=["fp16", "fp16 unet", "fp16 but the unet", "non_ema", "shards", "shards, late", "shards, mixed spelling"],
)
def test_a_variant_is_the_model(make: Callable[[Path, Path], Path], tiny_sd: Path, tmp_path: Path) -> None:
    plain = shutil.copytree(tiny_sd, tmp_path / "plain")
    _halves(plain)
    folder, wanted = make(plain, tmp_path / "made"), load_base(plain)
    # In bf16 the hash is taken from the files, in fp32 from what was loaded.
    found, rounded = load_base(folder), load_base(folder, precision="bf16")
    for part in ("unet", "text_encoder"):
        assert found.component_hash(part) == rounded.component_hash(part) == wanted.component_hash(part)
    one, other = (base.generate(["a cat"], [3], steps=2)[0] for base in (found, wanted))
    assert np.array_equal(np.asarray(one), np.asarray(other))


def test_the_hash_is_that_of_the_files_that_were_loaded(tiny_sd: Path, tmp_path: Path) -> None:
    """Of bf16 weights alone: in memory they say the same as the files do."""
    folder = as_variant(tiny_sd, tmp_path / "bf16", "bf16", torch.bfloat16, "unet", "vae")
    assert load_base(folder).denoiser_hash() == load_base(folder, precision="bf16").denoiser_hash()
    assert load_base(folder).denoiser_hash() != load_base(tiny_sd).denoiser_hash()
    # Plain weights come first, whatever lies beside them.
    shutil.copy(tiny_sd / "unet" / "diffusion_pytorch_model.safetensors", folder / "unet")
    for precision in ("fp32", "bf16"):
        assert load_base(folder, precision=precision).denoiser_hash() == load_base(tiny_sd).denoiser_hash()


def test_a_shard_is_missing(tiny_sd: Path, tmp_path: Path) -> None:
    folder = sharded(tiny_sd, tmp_path / "x", "fp16", late=True)
    (folder / "unet" / "diffusion_pytorch_model.fp16-00002-of-00002.safetensors").unlink()
    with pytest.raises(BaseModelError, match="only some of the shards of its component 'unet'"):
        load_base(folder)
    assert list(read_layout(folder, "x").weight_sets("vae")) == ["fp16 in 2 shards"]
