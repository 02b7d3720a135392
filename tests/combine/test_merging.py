"""Merged bases: what is recorded, how close they come back, and the same model as one file.

The original checkpoints' names are facts of CompVis' and Stability's training code. Here diffusers'
own converter (``diffusers/loaders/single_file_utils.py``) is the reference: what it makes of our
file must be the pipeline again, to the bit.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.loaders import single_file_utils
from safetensors.torch import load_file, save_file

from recare_patch.combine import merge, save_stack, stack, unmerge
from recare_patch.combine.merging import RECORD_KEY, RECORD_NAME, MergeRecord
from recare_patch.core import BaseModelError, IncompatiblePatchError, OutputError, TensorInfo, read_safetensors_header
from recare_patch.models import Layout, read_layout
from recare_patch.patch import Patch, has_known_sizes, write_single_file
from recare_patch.patch.original_layout import entries
from tests.patch.making import same, trained
from tests.tiny import make_tiny_sd


@pytest.fixture(scope="module")
def patches(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Patch, Patch]:
    folder = tmp_path_factory.mktemp("patch")
    trained(tiny_sd)[1].save(folder / "first")
    trained(tiny_sd, seed=3, layers="all")[1].save(folder / "second")
    return Patch.load(folder / "first"), Patch.load(folder / "second")


@pytest.fixture(scope="module")
def first(patches: tuple[Patch, Patch]) -> Patch:
    return patches[0]


def as_half(folder: Path, out: Path) -> Path:
    """A pipeline folder with all weights in fp16."""
    StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float16).save_pretrained(out)
    return out


def test_merging_again_keeps_what_was_merged_before(
    patches: tuple[Patch, Patch], tiny_sd: Path, tmp_path: Path
) -> None:
    first, second = patches
    one = merge([(first, 1.0)], tiny_sd, tmp_path / "one")
    with pytest.raises(OutputError, match="already holds files"):
        merge([(first, 1.0)], tiny_sd, tmp_path / "one")
    save_stack(stack([(second, 0.5), (first, -0.25)]), tmp_path / "stack")
    both = Patch.load(tmp_path / "stack")
    two = merge([(both, 2.0)], tmp_path / "one", tmp_path / "two")
    assert MergeRecord.load(tmp_path / "two") == two
    assert (two.base, two.base_denoiser_sha256) == (one.base, one.base_denoiser_sha256)
    hashes = {first.sha256(): "first", second.sha256(): "second", both.sha256(): "both"}
    told = [[(hashes[part.sha256], part.scale) for part in parts] for parts in (two.patches, two.parts)]
    assert told == [[("first", 1.0), ("both", 2.0)], [("first", 1.0), ("second", 1.0), ("first", -0.5)]]
    with pytest.raises(IncompatiblePatchError, match="holds more patches than were given"):
        unmerge(tmp_path / "two", [both], tmp_path / "back")
    back = unmerge(tmp_path / "two", [both, first], tmp_path / "back", base=tiny_sd)
    assert back.max_difference is not None and back.max_difference < 1e-5
    assert not (tmp_path / "back" / RECORD_NAME).exists()


def test_the_patch_that_was_loaded_is_recorded_not_what_lies_there_since(
    first: Patch, tiny_sd: Path, tmp_path: Path
) -> None:
    first.save(tmp_path / "patch")
    patch = Patch.load(tmp_path / "patch")
    told = patch.sha256()
    trained(tiny_sd, seed=5)[1].save(tmp_path / "patch")
    assert patch.sha256() == told != Patch.load(tmp_path / "patch").sha256()
    assert merge([(patch, 1.0)], tiny_sd, tmp_path / "merged").patches[0].sha256 == told
    with pytest.raises(IncompatiblePatchError, match="was not merged into"):
        unmerge(tmp_path / "merged", [Patch.load(tmp_path / "patch")], tmp_path / "out")


def test_a_folder_that_was_changed_since(first: Patch, tiny_sd: Path, tmp_path: Path) -> None:
    merge([(first, 1.0)], tiny_sd, tmp_path / "one")
    (file,) = (tmp_path / "one" / "unet").glob("*.safetensors")
    weights = load_file(file)
    weights["conv_in.bias"] += 1
    save_file(weights, file, {"format": "pt"})
    for again in (
        lambda: merge([(first, 1.0)], tmp_path / "one", tmp_path / "two"),
        lambda: unmerge(tmp_path / "one", [first], tmp_path / "two"),
    ):
        with pytest.raises(BaseModelError, match="was changed after the merge"):
            again()
    assert not (tmp_path / "two").exists()


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "fp16"])
def test_how_close_it_comes_back_is_told(first: Patch, tiny_sd: Path, tmp_path: Path, half: bool) -> None:
    base = as_half(tiny_sd, tmp_path / "half") if half else tiny_sd
    made = merge([(first, 1.0)], base, tmp_path / "merged")
    back = unmerge(tmp_path / "merged", [first], tmp_path / "back")
    assert (back.max_difference, back.expected_difference) == (None, made.rounding)
    measured = unmerge(tmp_path / "merged", [first], tmp_path / "again", base=base)
    assert measured.max_difference == pytest.approx(made.rounding, abs=1e-9)
    # Half a unit in the last place of a weight of a few units, in each format.
    assert made.rounding is not None and made.rounding < (4e-3 if half else 1e-6)
    assert half is (made.rounding > 1e-5)


@pytest.mark.parametrize("width", [768, 1024], ids=["1.5", "2.1"])
def test_real_sizes_there_and_back(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor of the real UNet and autoencoder, made without weights."""
    linear = width == 1024
    heads: Any = (5, 10, 20, 20) if linear else 8
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=width, attention_head_dim=heads, use_linear_projection=linear)
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=4,
        )
    states = {"unet": unet.state_dict(), "vae": vae.state_dict(), "text_encoder": {}}
    configs = {"unet": {**unet.config, "cross_attention_dim": width}, "vae": dict(vae.config)}
    layout = Layout(Path(), "'real'", {}, {**configs, "text_encoder": {}})
    monkeypatch.setattr(Layout, "require", lambda self, component: self.configs[component])
    infos = {
        part: {key: TensorInfo("F32", tuple(one.shape), 4 * one.numel()) for key, one in state.items()}
        for part, state in states.items()
    }
    found = entries(layout, infos)
    checkpoint = {one.name: states[one.component][one.keys[0]][(...,) + (None,) * 2 * one.convolution] for one in found}
    # As many as the published checkpoints hold.
    assert sum(name.startswith("model.diffusion_model.") for name in checkpoint) == 686
    assert sum(name.startswith("first_stage_model.") for name in checkpoint) == 248
    assert checkpoint["first_stage_model.encoder.mid.attn_1.q.weight"].shape == (512, 512, 1, 1)
    back = single_file_utils.convert_ldm_unet_checkpoint(dict(checkpoint), dict(unet.config))
    assert all(back[one.keys[0]] is checkpoint[one.name] for one in found if one.component == "unet")
    decoded = single_file_utils.convert_ldm_vae_checkpoint(dict(checkpoint), dict(vae.config))
    for part, converted in (("unet", back), ("vae", decoded)):
        found, wanted = ({k: v.shape for k, v in state.items()} for state in (converted, states[part]))
        assert found == wanted


@pytest.mark.parametrize("kind", ["like 1.x", "like 2.x", "odd"])
def test_diffusers_reads_the_file_as_the_folder(kind: str, tiny_sd: Path, tmp_path: Path) -> None:
    shape: dict[str, Any] = {
        "like 2.x": {"width": 1024, "linear_projection": True},
        "odd": {"latent_size": 12, "width": 48, "linear_projection": True},
    }.get(kind, {})
    base = make_tiny_sd(tmp_path / "made", **shape) if shape else tiny_sd
    half = as_half(base, tmp_path / "half")
    layout = read_layout(half, "'half'")
    assert not has_known_sizes(layout)
    file = write_single_file(layout, tmp_path / "one.safetensors", {"format": "pt"})
    assert {one.dtype for one in read_safetensors_header(file).tensors.values()} == {"F16"}
    text = "transformer.resblocks" if kind == "like 2.x" else "transformer.text_model.encoder"
    assert any(text in key for key in load_file(file))
    found = StableDiffusionPipeline.from_single_file(
        str(file), config=str(half), dtype=torch.float16, local_files_only=True
    )
    wanted = StableDiffusionPipeline.from_pretrained(half, dtype=torch.float16)
    for part in ("unet", "vae", "text_encoder"):
        same(getattr(found, part).state_dict(), getattr(wanted, part).state_dict())


def test_the_single_file_of_a_merge(
    first: Patch, tiny_sd: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "files" / "merged.safetensors"
    with caplog.at_level(logging.WARNING):
        record = merge([(first, 0.5)], tiny_sd, tmp_path / "merged", single_file=file)
    assert "A1111 and ComfyUI cannot read its single file" in caplog.text
    header = read_safetensors_header(file).metadata
    assert json.loads(header[RECORD_KEY]) == record.model_dump(mode="json", exclude_none=True)
    assert header["modelspec.architecture"] == "stable-diffusion-v1"
    pipe = StableDiffusionPipeline.from_single_file(str(file), config=str(tmp_path / "merged"), local_files_only=True)
    merged = load_file(tmp_path / "merged" / "unet" / "diffusion_pytorch_model.safetensors")
    same(pipe.unet.state_dict(), merged)


def test_shards_and_old_names(first: Patch, tiny_sd: Path, tmp_path: Path) -> None:
    """A sharded UNet, and an autoencoder and a text encoder as older libraries wrote them."""
    plain = StableDiffusionPipeline.from_pretrained(tiny_sd)
    plain.save_pretrained(tmp_path / "base")
    for old in (tmp_path / "base" / "unet").glob("*.safetensors"):
        old.unlink()
    plain.unet.save_pretrained(tmp_path / "base" / "unet", max_shard_size="100KB")
    assert len(list((tmp_path / "base" / "unet").glob("*.safetensors"))) > 1
    text = tmp_path / "base" / "text_encoder" / "model.safetensors"
    states = {f"text_model.{key.removeprefix('text_model.')}": one for key, one in load_file(text).items()}
    save_file(states | {"text_model.embeddings.position_ids": torch.arange(77)[None]}, text, {"format": "pt"})
    for base, name in ((tiny_sd, "a"), (tmp_path / "base", "b")):
        merge([(first, 1.0)], base, tmp_path / name, single_file=tmp_path / f"{name}.safetensors")
    same(load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "b.safetensors"))


def test_what_cannot_be_written(first: Patch, tiny_sd: Path, tmp_path: Path) -> None:
    (tmp_path / "there.safetensors").write_text("")
    StableDiffusionPipeline.from_pretrained(tiny_sd).save_pretrained(tmp_path / "odd")
    (vae,) = (tmp_path / "odd" / "vae").glob("*.safetensors")
    save_file(load_file(vae) | {"shift_net.weight": torch.ones(1)}, vae, {"format": "pt"})
    for error, words, name, base in (
        (OutputError, "is there already", "there.safetensors", tiny_sd),
        (OutputError, "checkpoint in one file", "x.ckpt", tiny_sd),
        (BaseModelError, "no place for 'shift_net.weight' of its vae", "x.safetensors", tmp_path / "odd"),
    ):
        with pytest.raises(error, match=words) as caught:
            merge([(first, 1.0)], base, tmp_path / "out", single_file=tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(OutputError, match="lies in the folder that is read"):
        merge([(first, 1.0)], tmp_path / "odd", tmp_path / "odd" / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "x.safetensors").exists()
