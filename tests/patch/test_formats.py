"""Other tools' LoRA files: what is written is what they read, and what they write is read.

The loaders' key lists below are facts of their sources:

* A1111: ``convert_diffusers_name_to_compvis`` and ``load_network`` in
  ``extensions-builtin/Lora/networks.py``, ``NetworkOnDisk.detect_version`` in ``network.py``
  (AUTOMATIC1111/stable-diffusion-webui).
* ComfyUI: ``model_lora_keys_unet``, ``model_lora_keys_clip`` and ``load_lora`` in ``comfy/lora.py``,
  ``unet_to_diffusers`` in ``comfy/utils.py`` (comfyanonymous/ComfyUI).
* kohya: ``precalculate_safetensors_hashes`` and ``addnet_hash_legacy`` in ``networks/lora.py`` and
  ``library/train_util.py``, ``library/sai_model_spec.py`` (kohya-ss/sd-scripts).
"""

from __future__ import annotations

import datetime
import hashlib
import json
import pickle
import random
import re
import struct
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from recare_patch.core.errors import IncompatiblePatchError, OutputError, PatchError
from recare_patch.core.files import read_safetensors_header
from recare_patch.patch import kohya as formats
from recare_patch.patch.patch import Patch
from recare_patch.recipe.recipe import WEIGHTS_NAME
from tests.patch.test_patch import _difference, _draw, trained

DAY = datetime.date(2026, 1, 2)
Tensors = dict[str, torch.Tensor]

A1111_UNET = (
    r"lora_unet_conv_in(.*)",
    r"lora_unet_conv_out(.*)",
    r"lora_unet_time_embedding_linear_(\d+)(.*)",
    r"lora_unet_down_blocks_(\d+)_(attentions|resnets)_(\d+)_(.+)",
    r"lora_unet_mid_block_(attentions|resnets)_(\d+)_(.+)",
    r"lora_unet_up_blocks_(\d+)_(attentions|resnets)_(\d+)_(.+)",
    r"lora_unet_down_blocks_(\d+)_downsamplers_0_conv",
    r"lora_unet_up_blocks_(\d+)_upsamplers_0_conv",
)
A1111_TEXT = (
    r"lora_te_text_model_encoder_layers_(\d+)_(.+)",
    r"lora_te1_text_model_encoder_layers_(\d+)_(.+)",
    r"lora_te2_text_model_encoder_layers_(\d+)_(.+)",
)
COMFY_CLIP = ("mlp_fc1", "mlp_fc2", *(f"self_attn_{one}_proj" for one in ("k", "q", "v", "out")))
COMFY_ATTENTIONS = ("proj_in", "proj_out")
COMFY_BLOCK = (
    *(f"attn{n}_to_{one}" for n in (1, 2) for one in ("q", "k", "v", "out_0")),
    "ff_net_0_proj",
    "ff_net_2",
)
COMFY_RESNET = ("conv1", "conv2", "time_emb_proj", "conv_shortcut")
COMFY_BASIC = ("conv_in", "conv_out", "time_embedding_linear_1", "time_embedding_linear_2")


def comfy_takes(name: str) -> bool:
    """Whether ``model_lora_keys_unet`` lists a name for a UNet that has the block."""
    place = r"lora_unet_(?:(?:down|up)_blocks_\d+|mid_block)"
    either = "|".join
    return any(
        re.fullmatch(pattern, name)
        for pattern in (
            rf"lora_unet_(?:{either(COMFY_BASIC)})",
            rf"{place}_attentions_\d+_(?:{either(COMFY_ATTENTIONS)})",
            rf"{place}_attentions_\d+_transformer_blocks_\d+_(?:{either(COMFY_BLOCK)})",
            rf"{place}_resnets_\d+_(?:{either(COMFY_RESNET)})",
            r"lora_unet_down_blocks_\d+_downsamplers_0_conv",
            r"lora_unet_up_blocks_\d+_upsamplers_0_conv",
        )
    )


SD_15 = {"cross_attention_dim": 768, "attention_head_dim": 8}
SDXL = {
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "use_linear_projection": True,
}


def _checkpoint_name(name: str) -> str:
    """A diffusers name as the original checkpoints count: three entries a block, after one for conv_in."""
    whole = {
        "conv_in": "input_blocks_0_0",
        "conv_out": "out_2",
        "time_embedding.linear_1": "time_embed_0",
        "time_embedding.linear_2": "time_embed_2",
        "add_embedding.linear_1": "label_emb_0_0",
        "add_embedding.linear_2": "label_emb_0_2",
    }
    inside = {
        "conv1": "in_layers_2",
        "conv2": "out_layers_3",
        "time_emb_proj": "emb_layers_1",
        "conv_shortcut": "skip_connection",
    }
    if name in whole:
        return whole[name]
    side, _, rest = name.partition(".")
    if side == "mid_block":
        kind, number, last = rest.split(".", 2)
        place = 1 if kind == "attentions" else 2 * int(number)
        return f"middle_block_{place}_{inside.get(last, last).replace('.', '_')}"
    block, kind, number, last = rest.split(".", 3)
    if kind == "downsamplers":
        return f"input_blocks_{3 + 3 * int(block)}_0_op"
    if kind == "upsamplers":
        return f"output_blocks_{2 + 3 * int(block)}_2_conv"
    first, word = (1, "input") if side == "down_blocks" else (0, "output")
    place = first + 3 * int(block) + int(number)
    last = inside.get(last, last).replace(".", "_")
    return f"{word}_blocks_{place}_{int(kind == 'attentions')}_{last}"


@pytest.fixture(scope="module")
def patch(tiny_sd: Path) -> Patch:
    return trained(tiny_sd)[1]


@pytest.fixture(scope="module")
def whole_patch(tiny_sd: Path) -> Patch:
    """Every layer of the UNet that takes a LoRA, convolutions too."""
    return trained(tiny_sd, layers="all")[1]


@pytest.fixture
def pipe(tiny_sd: Path) -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _pair(rank: int = 2, inner: int = 6, outer: int = 5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rank, inner, generator=generator), torch.randn(outer, rank, generator=generator)


def _kohya(
    name: str = "lora_unet_mid_block_attentions_0_proj_in", rank: int = 2, **changes: object
) -> Tensors:
    down, up = _pair(rank)
    return {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up} | {
        f"{name}.{part.replace('__', '.')}": torch.as_tensor(value) for part, value in changes.items()
    }


def _same(first: Patch | Patch, second: Patch | Patch) -> None:
    assert first.tensors.keys() == second.tensors.keys()
    for key, tensor in first.tensors.items():
        assert tensor.dtype == second.tensors[key].dtype
        assert torch.equal(tensor, second.tensors[key]), key


def _body(file: Path) -> str:
    data = file.read_bytes()
    return hashlib.sha256(data[8 + struct.unpack("<Q", data[:8])[0] :]).hexdigest()


class TestWhatIsWritten:
    def test_keys_ranks_and_alphas(self, patch: Patch) -> None:
        tensors, _ = formats.to_kohya(patch)
        names = {key.split(".")[0] for key in tensors}
        assert names == {"lora_" + module.replace(".", "_") for module in patch.modules}
        assert len(tensors) == 3 * len(names)
        for name in names:
            alpha, down = tensors[f"{name}.alpha"], tensors[f"{name}.lora_down.weight"]
            assert alpha.shape == () and alpha.is_floating_point()
            assert alpha.item() == down.shape[0] == tensors[f"{name}.lora_up.weight"].shape[1] == 2
            assert down.dtype == torch.float16

    def test_the_loaders_take_every_key(self, whole_patch: Patch) -> None:
        names = {key.split(".")[0] for key in formats.to_kohya(whole_patch)[0]}
        assert len(names) > 60
        for name in names:
            assert any(re.match(pattern, name) for pattern in A1111_UNET), name
            assert comfy_takes(name), name

    def test_header(self, patch: Patch) -> None:
        header = formats.to_kohya(patch, date=DAY)[1]
        expected = {
            "ss_network_dim": "2",
            "ss_network_alpha": "2.0",
            "ss_network_module": "networks.lora",
            "ss_base_model_version": "sd_v1",
            "ss_v2": "False",
            "ss_output_name": "erase-van-gogh",
            "modelspec.sai_model_spec": "1.0.1",
            "modelspec.architecture": "stable-diffusion-v1/lora",
            "modelspec.implementation": "diffusers",
            "modelspec.title": "Erase Van Gogh",
            "modelspec.date": "2026-01-02",
            "modelspec.prediction_type": "epsilon",
        }
        assert {key: header[key] for key in expected} == expected
        assert header["modelspec.hash_sha256"] == "0x" + header["sshs_model_hash"]
        assert "Van Gogh" in header["ss_training_comment"]
        assert patch.metadata is not None
        assert patch.metadata.to_header().items() <= header.items()
        assert all(isinstance(text, str) for text in header.values())

    def test_the_header_of_a_stack(self, patch: Patch) -> None:
        assert patch.metadata is not None
        part = patch.as_part(1.0)
        about = patch.metadata.model_copy(update={"kind": "several", "recipe": None, "parts": (part, part)})
        header = formats.to_kohya(Patch(patch.tensors, about), date=DAY)[1]
        assert header["ss_training_comment"].startswith("Erases the concepts 'Van Gogh' from ")
        assert header["modelspec.tags"] == "concept-erasure, concepts"

    @pytest.mark.parametrize(
        ("width", "prediction", "base", "v2", "architecture", "resolution", "seen_by_a1111"),
        [
            (768, "epsilon", "sd_v1", "False", "stable-diffusion-v1/lora", "512x512", "SD1"),
            (1024, "epsilon", "sd_v2", "True", "stable-diffusion-v2-512/lora", "512x512", "SD2"),
            (1024, "v_prediction", "sd_v2_v", "True", "stable-diffusion-v2-768-v/lora", "768x768", "SD2"),
            (
                2048,
                "epsilon",
                "sdxl_base_v1-0",
                "False",
                "stable-diffusion-xl-v1-base/lora",
                "1024x1024",
                "SDXL",
            ),
        ],
    )
    def test_generations(
        self,
        patch: Patch,
        width: int,
        prediction: str,
        base: str,
        v2: str,
        architecture: str,
        resolution: str,
        seen_by_a1111: str,
    ) -> None:
        a, b = _pair(2, width)
        name = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
        assert patch.metadata is not None
        metadata = patch.metadata.model_copy(update={"prediction_type": prediction})
        made = Patch({f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}, metadata)
        header = formats.to_kohya(made)[1]
        assert (header["ss_base_model_version"], header["ss_v2"]) == (base, v2)
        assert (header["modelspec.architecture"], header["modelspec.resolution"]) == (
            architecture,
            resolution,
        )
        # A1111 hides a LoRA whose version is not the checkpoint's: NetworkOnDisk.detect_version.
        if header["ss_base_model_version"].startswith("sdxl_"):
            found = "SDXL"
        else:
            found = "SD2" if header["ss_v2"] == "True" else "SD1"
        assert found == seen_by_a1111

    def test_hashes(self, patch: Patch, tmp_path: Path) -> None:
        file = formats.write_kohya(patch, tmp_path)
        assert file.name == "erase-van-gogh.safetensors"
        header = read_safetensors_header(file).metadata
        assert header["sshs_model_hash"] == _body(file) == formats.body_hash(file)
        assert header["modelspec.hash_sha256"] == "0x" + _body(file)
        assert "sshs_legacy_hash" not in header

    def test_legacy_hash(self, tmp_path: Path) -> None:
        a, b = _pair(64, 9000, 900)
        name = "unet.mid_block.attentions.0.proj_in"
        big = Patch({f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b})
        file = formats.write_kohya(big, tmp_path / "big.safetensors")
        header = read_safetensors_header(file).metadata
        training = {key: text for key, text in header.items() if key.startswith("ss_")}
        save_file(load_file(file), tmp_path / "plain.safetensors", training)
        data = (tmp_path / "plain.safetensors").read_bytes()[0x100000:0x110000]
        assert header["sshs_legacy_hash"] == hashlib.sha256(data).hexdigest()[:8]

    def test_too_large_for_half(self, patch: Patch, tmp_path: Path) -> None:
        big = Patch({key: tensor.float() * 1e6 for key, tensor in patch.tensors.items()})
        with pytest.raises(PatchError, match="do not fit into float16"):
            formats.write_kohya(big, tmp_path / "x.safetensors")
        assert not list(tmp_path.iterdir())

    def test_no_place(self, patch: Patch, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(OutputError, match="cannot write"):
            formats.write_kohya(patch, tmp_path / "file" / "x.safetensors")


class TestRoundTrip:
    @pytest.mark.parametrize("with_base", [False, True])
    def test_exact(self, whole_patch: Patch, tiny_sd: Path, tmp_path: Path, with_base: bool) -> None:
        unet = UNet2DConditionModel.from_pretrained(tiny_sd / "unet")
        modules = [name for name, _ in unet.named_modules()] if with_base else None
        file = formats.write_kohya(whole_patch, tmp_path / "k.safetensors")
        back = formats.from_any(file, modules)
        _same(whole_patch, back)
        assert back.metadata == whole_patch.metadata

    def test_diffusers_file_is_the_patch_file(self, patch: Patch, tmp_path: Path) -> None:
        patch.save(tmp_path / "patch")
        kohya = formats.write_kohya(Patch.load(tmp_path / "patch"), tmp_path / "k.safetensors")
        again = formats.write_diffusers(formats.from_any(kohya), tmp_path / "again")
        assert again.name == WEIGHTS_NAME
        _same(Patch.load(tmp_path / "again"), Patch.load(tmp_path / "patch"))
        headers = [read_safetensors_header(tmp_path / one / WEIGHTS_NAME) for one in ("again", "patch")]
        assert headers[0] == headers[1]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_other_precision(self, patch: Patch, tmp_path: Path, dtype: torch.dtype) -> None:
        cast = patch.to(dtype)
        _same(cast, formats.from_any(formats.write_kohya(cast, tmp_path / "k.safetensors", dtype=dtype)))

    def test_different_ranks_and_odd_names(self, tmp_path: Path) -> None:
        tensors = {}
        for number, (name, rank) in enumerate(
            [("mid_block.attentions.0.proj_in", 3), ("my_odd.block_a", 1), ("conv_in", 5)]
        ):
            a, b = _pair(rank, seed=number)
            tensors |= {f"unet.{name}.lora_A.weight": a, f"unet.{name}.lora_B.weight": b}
        made = Patch(tensors)
        written, header = formats.to_kohya(made, dtype=torch.float32)
        assert {written[key].item() for key in written if key.endswith(".alpha")} == {5.0}
        assert json.loads(header[formats.MODULES_KEY]) == {"lora_unet_my_odd_block_a": "unet.my_odd.block_a"}
        save_file(written, tmp_path / "k.safetensors", header)
        _same(made, formats.from_any(tmp_path / "k.safetensors"))
        # Other tools see the padded factors, which make the same update.
        down = written["lora_unet_my_odd_block_a.lora_down.weight"]
        up = written["lora_unet_my_odd_block_a.lora_up.weight"]
        a, b = (tensors[f"unet.my_odd.block_a.lora_{side}.weight"] for side in "AB")
        assert torch.allclose(up @ down, b @ a)

    def test_two_modules_of_one_name(self) -> None:
        a, b = _pair()
        keys = [f"unet.{name}.lora_{side}.weight" for name in ("a.b", "a_b") for side in "AB"]
        made = Patch(dict(zip(keys, [a, b, a, b], strict=True)))
        with pytest.raises(PatchError, match="kohya's spelling calls 'lora_unet_a_b'"):
            formats.to_kohya(made)

    def test_text_encoders(self, tmp_path: Path) -> None:
        a, b = _pair()
        tensors: Tensors = {}
        for name in (
            "unet.mid_block.attentions.0.proj_in",
            "text_encoder.encoder.layers.0.self_attn.q_proj",  # as transformers 5 saves it
            "text_encoder.text_model.encoder.layers.11.mlp.fc1",
            "text_encoder_2.text_model.encoder.layers.31.self_attn.out_proj",
            "text_encoder_2.text_projection",
        ):
            tensors |= {f"{name}.lora_A.weight": a.clone(), f"{name}.lora_B.weight": b.clone()}
        save_file(tensors, tmp_path / "d.safetensors")
        read = formats.from_any(tmp_path / "d.safetensors")
        assert read.components == ("text_encoder", "text_encoder_2", "unet")
        written, header = formats.to_kohya(read, dtype=torch.float32)
        text = {key.split(".")[0] for key in written if key.startswith("lora_te")}
        assert text == {
            "lora_te1_text_model_encoder_layers_0_self_attn_q_proj",
            "lora_te1_text_model_encoder_layers_11_mlp_fc1",
            "lora_te2_text_model_encoder_layers_31_self_attn_out_proj",
            "lora_te2_text_projection",
        }
        for name in text - {"lora_te2_text_projection"}:
            assert any(re.match(pattern, name) for pattern in A1111_TEXT)
            assert name.split("_", 7)[-1] in COMFY_CLIP
        save_file(written, tmp_path / "k.safetensors", header)
        back = formats.from_any(tmp_path / "k.safetensors")
        assert {key: t.tolist() for key, t in back.tensors.items()} == {
            key: t.tolist() for key, t in read.tensors.items()
        }
        assert formats.from_any(tmp_path / "k.safetensors").components == (
            "unet",
            "text_encoder",
            "text_encoder_2",
        )

    def test_one_text_encoder(self, tmp_path: Path) -> None:
        a, b = _pair()
        name = "text_encoder.text_model.encoder.layers.0.mlp.fc2"
        save_file({f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}, tmp_path / "d.safetensors")
        written, _ = formats.to_kohya(formats.from_any(tmp_path / "d.safetensors"))
        assert {key.split(".")[0] for key in written} == {"lora_te_text_model_encoder_layers_0_mlp_fc2"}


class TestSamePictures:
    """diffusers' own converter reads our kohya file and draws what the patch draws."""

    @pytest.mark.parametrize("layers", ["cross-attention", "all"])
    @pytest.mark.parametrize("base_name", ["tiny_sd", "tiny_sd_v"])
    def test_in_diffusers(
        self, base_name: str, layers: str, tmp_path: Path, request: pytest.FixtureRequest
    ) -> None:
        folder = request.getfixturevalue(base_name)
        made = trained(folder, layers=layers)[1].to(torch.float32)
        pipeline = StableDiffusionPipeline.from_pretrained(folder)
        pipeline.set_progress_bar_config(disable=True)
        plain = _draw(pipeline)
        with made.apply(pipeline):
            patched = _draw(pipeline)
        file = formats.write_kohya(made, tmp_path / "k.safetensors", dtype=torch.float32)
        pipeline.load_lora_weights(str(tmp_path), weight_name=file.name)
        assert _difference(_draw(pipeline), patched) <= 2
        assert _difference(plain, patched) > 2

    def test_padded(self, pipe: StableDiffusionPipeline, patch: Patch, tmp_path: Path) -> None:
        tensors = dict(patch.to(torch.float32).tensors)
        first = patch.modules[0]
        for side, axis in (("A", 0), ("B", 1)):
            key = f"{first}.lora_{side}.weight"
            tensors[key] = tensors[key].narrow(axis, 0, 1).contiguous()
        made = Patch(tensors)
        with made.apply(pipe):
            patched = _draw(pipe)
        formats.write_kohya(made, tmp_path / "k.safetensors", dtype=torch.float32)
        pipe.load_lora_weights(str(tmp_path), weight_name="k.safetensors")
        assert _difference(_draw(pipe), patched) <= 2


class TestWhatIsRead:
    NAME = "unet.down_blocks.0.attentions.1.transformer_blocks.0.attn2.to_out.0"
    TEXT = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    PEFT = NAME.removeprefix("unet.")
    OLD = PEFT.removesuffix(".to_out.0")

    @pytest.mark.parametrize(
        ("down", "up", "shape", "name"),
        [
            (f"{NAME}.lora_A.weight", f"{NAME}.lora_B.weight", "diffusers", NAME),
            (f"{NAME}.lora_A.default.weight", f"{NAME}.lora_B.default.weight", "diffusers", NAME),
            (f"{NAME}.lora.down.weight", f"{NAME}.lora.up.weight", "diffusers", NAME),
            (
                f"unet.{OLD}.processor.to_out_lora.down.weight",
                f"unet.{OLD}.processor.to_out_lora.up.weight",
                "diffusers",
                NAME,
            ),
            (
                f"{OLD}.processor.to_out_lora.down.weight",
                f"{OLD}.processor.to_out_lora.up.weight",
                "diffusers",
                NAME,
            ),
            (
                f"base_model.model.{PEFT}.lora_A.weight",
                f"base_model.model.{PEFT}.lora_B.weight",
                "peft",
                NAME,
            ),
            (
                "lora_unet_down_blocks_0_attentions_1_transformer_blocks_0_attn2_to_out_0.lora_down.weight",
                "lora_unet_down_blocks_0_attentions_1_transformer_blocks_0_attn2_to_out_0.lora_up.weight",
                "kohya",
                NAME,
            ),
            (
                f"{TEXT}.lora_linear_layer.down.weight",
                f"{TEXT}.lora_linear_layer.up.weight",
                "diffusers",
                TEXT,
            ),
            (
                "text_encoder.text_model.encoder.layers.0.self_attn.to_q_lora.down.weight",
                "text_encoder.text_model.encoder.layers.0.self_attn.to_q_lora.up.weight",
                "diffusers",
                TEXT,
            ),
        ],
    )
    def test_shapes(self, tmp_path: Path, down: str, up: str, shape: str, name: str) -> None:
        a, b = _pair()
        save_file({down: a, up: b}, tmp_path / "x.safetensors")
        read = formats.from_any(tmp_path / "x.safetensors")
        assert read.format == shape
        assert set(read.tensors) == {f"{name}.lora_A.weight", f"{name}.lora_B.weight"}
        assert torch.equal(read.tensors[f"{name}.lora_A.weight"], a)
        assert torch.equal(read.tensors[f"{name}.lora_B.weight"], b)

    def test_alpha_of_each_module(self, tmp_path: Path) -> None:
        first, second = "lora_unet_mid_block_attentions_0_proj_in", "lora_unet_conv_in"
        tensors = _kohya(first, alpha=1.0) | _kohya(second, rank=3, alpha=torch.tensor(2, dtype=torch.int64))
        tensors |= _kohya("lora_unet_conv_out")
        save_file(tensors, tmp_path / "x.safetensors")
        read = formats.from_any(tmp_path / "x.safetensors")
        for module, short, scale in (
            ("mid_block.attentions.0.proj_in", first, 1 / 2),
            ("conv_in", second, 2 / 3),
            ("conv_out", "lora_unet_conv_out", 1),  # no alpha: the rank, as loaders take it
        ):
            found = read.tensors[f"unet.{module}.lora_B.weight"]
            assert torch.allclose(found, tensors[f"{short}.lora_up.weight"] * scale)
        # Written again, one alpha serves them all and the updates stay.
        written, _ = formats.to_kohya(read, dtype=torch.float32)
        assert {written[key].item() for key in written if key.endswith("alpha")} == {3.0}
        up, down = written[f"{second}.lora_up.weight"], written[f"{second}.lora_down.weight"]
        old = tensors[f"{second}.lora_up.weight"] @ tensors[f"{second}.lora_down.weight"] * 2 / 3
        assert torch.allclose(up @ down, old, atol=1e-6)

    @pytest.mark.parametrize(
        ("config", "scale"),
        [
            ({"r": 2, "lora_alpha": 6}, 3.0),
            ({"r": 2, "lora_alpha": 4, "use_rslora": True}, 4 / 2**0.5),
            ({"r": 2, "lora_alpha": 4, "alpha_pattern": {"attn2.to_out.0": 1}}, 0.5),
        ],
    )
    def test_peft_settings(self, tmp_path: Path, config: dict[str, object], scale: float) -> None:
        a, b = _pair()
        keys = [f"base_model.model.{self.PEFT}.lora_{side}.weight" for side in "AB"]
        save_file(dict(zip(keys, (a, b), strict=True)), tmp_path / "adapter_model.safetensors")
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        read = formats.from_any(tmp_path)
        assert torch.allclose(read.tensors[f"{self.NAME}.lora_B.weight"], b * scale)
        # The same settings as diffusers keeps them, in the header.
        metadata = {"lora_adapter_metadata": json.dumps({f"unet.{k}": v for k, v in config.items()})}
        save_file(
            {f"{self.NAME}.lora_A.weight": a, f"{self.NAME}.lora_B.weight": b},
            tmp_path / "d.safetensors",
            metadata,
        )
        read = formats.from_any(tmp_path / "d.safetensors")
        assert torch.allclose(read.tensors[f"{self.NAME}.lora_B.weight"], b * scale)

    @pytest.mark.parametrize(
        ("sgm", "module"),
        [
            ("input_blocks_4_1_transformer_blocks_1_ff_net_2",
             "down_blocks.1.attentions.0.transformer_blocks.1.ff.net.2"),
            ("input_blocks_3_0_op", "down_blocks.0.downsamplers.0.conv"),
            ("input_blocks_7_0_in_layers_2", "down_blocks.2.resnets.0.conv1"),
            ("middle_block_1_proj_in", "mid_block.attentions.0.proj_in"),
            ("middle_block_2_out_layers_3", "mid_block.resnets.1.conv2"),
            ("output_blocks_5_1_proj_out", "up_blocks.1.attentions.2.proj_out"),
            ("output_blocks_2_2_conv", "up_blocks.0.upsamplers.0.conv"),
            ("time_embed_0", "time_embedding.linear_1"),
        ],
    )  # fmt: skip
    def test_sdxl_names_of_kohya(self, tmp_path: Path, sgm: str, module: str) -> None:
        save_file(_kohya(f"lora_unet_{sgm}"), tmp_path / "x.safetensors")
        assert formats.from_any(tmp_path / "x.safetensors").modules == (f"unet.{module}",)

    def test_grammar_knows_every_module(self, tiny_sd: Path) -> None:
        unet = UNet2DConditionModel.from_pretrained(tiny_sd / "unet")
        names = [n for n, m in unet.named_modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)]
        assert [formats.unet_module(name.replace(".", "_")) for name in names] == names

    @pytest.mark.parametrize("config", [SD_15, SDXL], ids=["SD 1.5", "SDXL"])
    def test_every_module_of_the_real_ones(self, config: dict[str, object]) -> None:
        """Names of real UNets, made without weights: there and back, also by the checkpoints' names."""
        with torch.device("meta"):
            unet = UNet2DConditionModel(**config)
        names = [n for n, m in unet.named_modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)]
        assert len(names) > 250
        for name in names:
            short = name.replace(".", "_")
            assert formats.unet_module(short) == name
            assert comfy_takes(f"lora_unet_{short}") or name.startswith("add_embedding")
            assert formats.from_sgm(short) == short
            assert formats.from_sgm(_checkpoint_name(name)) == short, name

    def test_not_of_the_base(self, tmp_path: Path) -> None:
        save_file(_kohya(), tmp_path / "x.safetensors")
        with pytest.raises(
            IncompatiblePatchError, match=r"fits no modules.*nearest is 'mid_block.*proj_out'"
        ):
            formats.from_any(tmp_path / "x.safetensors", ["mid_block.attentions.0.proj_out"])


BAD = {
    "LoHa": ({"lora_unet_conv_in.hada_w1_a": torch.ones(2, 2)}, "is a LoHa"),
    "LoKr": ({"lora_unet_conv_in.lokr_w1": torch.ones(2, 2)}, "is a LoKr"),
    "DoRA": (_kohya(dora_scale=[[1.0]]), "is a DoRA"),
    "DoRA of PEFT": ({"unet.conv_in.lora_magnitude_vector": torch.ones(2)}, "is a DoRA"),
    "LoCon with a middle": (_kohya(lora_mid__weight=[[1.0]]), "third, middle factor"),
    "no up": ({"lora_unet_conv_in.lora_down.weight": torch.ones(2, 2)}, "lacks the upper factor"),
    "alpha alone": ({"lora_unet_conv_in.alpha": torch.ones(())}, "lacks the lower factor"),
    "alpha of two numbers": (_kohya(alpha=[1.0, 2.0]), "must be one number"),
    "alpha NaN": (_kohya(alpha=float("nan")), "NaN values in its tensor"),
    "alpha huge": (_kohya(alpha=torch.tensor(1e300, dtype=torch.float64)), "makes its values infinite"),
    "NaN": ({"unet.conv_in.lora_A.weight": torch.full((2, 2), torch.nan)}, "NaN values in its tensor"),
    "integers": ({"unet.conv_in.lora_A.weight": torch.ones(2, 2, dtype=torch.int8)}, "of type I8"),
    "odd part": (_kohya(color=1.0), "belongs to no LoRA"),
    "odd prefix": ({"lora_prior_unet_x.lora_down.weight": torch.ones(2, 2)}, "belongs to no LoRA"),
    "odd module": (_kohya("lora_unet_double_blocks_0_img_attn_qkv"), "names no module"),
    "long number": (
        _kohya("lora_unet_input_blocks_" + "9" * 5000 + "_1_proj_in"),
        "has a 'lora_unet_input_blocks_9",
    ),
    "trailing underscore": (_kohya("lora_unet_conv_in_"), "names no module"),
    "no LoRA": ({"conv.weight": torch.ones(2)}, "belongs to no LoRA"),
    "mixed": (_kohya() | {"unet.conv_in.lora_A.weight": torch.ones(2, 2)}, "mixes the shapes"),
    "twice": (
        {"unet.conv_in.lora_A.weight": torch.ones(2, 2), "unet.conv_in.lora.down.weight": torch.ones(2, 2)},
        "twice, under two names",
    ),
    "misshapen": (
        {"unet.conv_in.lora_A.weight": torch.ones(2, 2), "unet.conv_in.lora_B.weight": torch.ones(2, 3)},
        "do not make an update",
    ),
    "third encoder": ({"text_encoder_3.x.lora_A.weight": torch.ones(2, 2)}, "of a 'text_encoder_3'"),
    "empty": ({}, "holds no tensors"),
}


class TestBadFiles:
    @pytest.mark.parametrize("case", BAD)
    def test_one_sentence(self, case: str, tmp_path: Path) -> None:
        tensors, message = BAD[case]
        save_file(tensors, tmp_path / "x.safetensors")
        with pytest.raises(PatchError, match=re.escape(message)) as caught:
            formats.from_any(tmp_path / "x.safetensors")
        assert "\n" not in str(caught.value)

    def test_truncated(self, patch: Patch, tmp_path: Path) -> None:
        file = formats.write_kohya(patch, tmp_path / "x.safetensors")
        whole = file.read_bytes()
        for length in (0, 4, 8, 100, len(whole) - 1):
            file.write_bytes(whole[:length])
            with pytest.raises(PatchError):
                formats.from_any(file)

    def test_damaged_anywhere(self, patch: Patch, tmp_path: Path) -> None:
        """One byte or a run of them changed: an error of ours, or a file that is still sound."""
        file = formats.write_kohya(patch, tmp_path / "x.safetensors")
        whole = file.read_bytes()
        header = 8 + struct.unpack("<Q", whole[:8])[0]
        rng = random.Random(0)
        refused = 0
        for _ in range(300):
            damaged = bytearray(whole)
            place = rng.randrange(8 if rng.random() < 0.1 else header)
            for offset in range(rng.choice((1, 1, 4))):
                damaged[place + offset] = rng.randrange(256)
            file.write_bytes(damaged)
            try:
                formats.from_any(file)
            except PatchError as fault:
                refused += 1
                assert "\n" not in str(fault)
        assert refused > 50

    def test_pickles(self, tmp_path: Path) -> None:
        (tmp_path / "lora.pt").write_bytes(pickle.dumps({}))
        with pytest.raises(PatchError, match="is a pickle"):
            formats.from_any(tmp_path / "lora.pt")
        with pytest.raises(PatchError, match="holds a pickle"):
            formats.from_any(tmp_path)

    def test_nothing_there(self, tmp_path: Path) -> None:
        with pytest.raises(PatchError, match="there is no LoRA file"):
            formats.from_any(tmp_path / "x")
        with pytest.raises(PatchError, match="no safetensors file"):
            formats.from_any(tmp_path)
        for name in "ab":
            save_file(_kohya(), tmp_path / f"{name}.safetensors")
        with pytest.raises(PatchError, match="several LoRA files"):
            formats.from_any(tmp_path)

    @pytest.mark.parametrize(
        "header",
        [
            {formats.RANKS_KEY: "["},
            {formats.RANKS_KEY: '{"lora_unet_mid_block_attentions_0_proj_in": 9}'},
            {formats.RANKS_KEY: '{"lora_unet_mid_block_attentions_0_proj_in": 0}'},
            {formats.RANKS_KEY: '{"lora_unet_mid_block_attentions_0_proj_in": true}'},
            {formats.MODULES_KEY: '{"lora_unet_mid_block_attentions_0_proj_in": "unet.other"}'},
            {formats.MODULES_KEY: "[" * 100_000},
            {"recare_patch.base": "x"},
        ],
    )
    def test_malformed_entries(self, header: dict[str, str], tmp_path: Path) -> None:
        save_file(_kohya(), tmp_path / "x.safetensors", header)
        with pytest.raises(PatchError, match="malformed header entry"):
            formats.from_any(tmp_path / "x.safetensors")

    @pytest.mark.parametrize(
        "config",
        [
            "[",
            "[]",
            '{"lora_alpha": "x"}',
            '{"lora_alpha": NaN}',
            '{"alpha_pattern": 3}',
            '{"alpha_pattern": {"(a+)+$": 1}}',
            '{"use_dora": true}',
        ],
    )
    def test_malformed_settings(self, config: str, tmp_path: Path) -> None:
        a, b = _pair()
        keys = [f"base_model.model.conv_in.lora_{side}.weight" for side in "AB"]
        save_file(dict(zip(keys, (a, b), strict=True)), tmp_path / "adapter_model.safetensors")
        (tmp_path / "adapter_config.json").write_text(config)
        with pytest.raises(PatchError):
            formats.from_any(tmp_path)


def test_a_transformer_has_no_kohya_name(tmp_path: Path) -> None:
    keys = [f"transformer.transformer_blocks.0.attn.to_q.lora_{side}.weight" for side in "AB"]
    patch = Patch(dict(zip(keys, _pair(), strict=True)))
    assert not formats.has_kohya_names(patch)
    with pytest.raises(PatchError, match="changes a transformer"):
        formats.write_kohya(patch, tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())
