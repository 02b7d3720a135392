"""Other tools' LoRA files: what is written comes back, and every shape is read or refused in one sentence.

What A1111 and ComfyUI find under the names that are written is in ``test_loaders.py``. The hashes are those
of ``precalculate_safetensors_hashes`` and ``addnet_hash_legacy`` in kohya-ss/sd-scripts, the versions those
of ``NetworkOnDisk.detect_version`` in A1111.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import pickle
import re
import struct
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from recare_patch.core import IncompatiblePatchError, OutputError, PatchError, read_safetensors_header
from recare_patch.patch import Patch, has_kohya_names, write_kohya
from recare_patch.patch.kohya import MODULES_KEY, RANKS_KEY, to_kohya
from recare_patch.patch.reading import from_any
from tests.patch.making import difference, draw, factors, file_of, pair, plain, same, trained

DAY = datetime.date(2026, 1, 2)
PROJ_IN = "unet.mid_block.attentions.0.proj_in"
Tensors = dict[str, torch.Tensor]


def kohya(name: str = "lora_unet_mid_block_attentions_0_proj_in", rank: int = 2, **changes: object) -> Tensors:
    down, up = pair(rank)
    return {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up} | {
        f"{name}.{part.replace('__', '.')}": torch.as_tensor(value) for part, value in changes.items()
    }


class TestWhatIsWritten:
    def test_keys_ranks_alphas_and_header(self, patch: Patch) -> None:
        tensors, header = to_kohya(patch, date=DAY)
        names = {key.split(".")[0] for key in tensors}
        assert names == {"lora_" + module.replace(".", "_") for module in patch.modules}
        assert len(tensors) == 3 * len(names)
        for name in names:
            alpha, down = tensors[f"{name}.alpha"], tensors[f"{name}.lora_down.weight"]
            assert alpha.shape == () and alpha.is_floating_point() and down.dtype == torch.float16
            assert alpha.item() == down.shape[0] == tensors[f"{name}.lora_up.weight"].shape[1] == 2
        expected = {
            "ss_network_dim": "2", "ss_network_alpha": "2.0", "ss_network_module": "networks.lora",
            "ss_base_model_version": "sd_v1", "ss_output_name": "erase-van-gogh",
            "modelspec.sai_model_spec": "1.0.1", "modelspec.implementation": "diffusers",
            "modelspec.title": "Erase Van Gogh", "modelspec.date": "2026-01-02",
            "modelspec.prediction_type": "epsilon",
        }  # fmt: skip
        assert expected.items() <= header.items()
        assert patch.metadata is not None and patch.metadata.to_header().items() <= header.items()
        part = patch.as_part(1.0)
        about = patch.metadata.model_copy(update={"kind": "several", "recipe": None, "parts": (part, part)})
        header = to_kohya(Patch(patch.tensors, about))[1]
        assert header["ss_training_comment"].startswith("Erases the concepts 'Van Gogh' from ")
        assert header["modelspec.tags"] == "concept-erasure, concepts"

    @pytest.mark.parametrize(
        ("width", "prediction", "told"),
        [
            (768, "epsilon", ("sd_v1", "False", "stable-diffusion-v1/lora", "512x512")),
            (1024, "epsilon", ("sd_v2", "True", "stable-diffusion-v2-512/lora", "512x512")),
            (1024, "v_prediction", ("sd_v2_v", "True", "stable-diffusion-v2-768-v/lora", "768x768")),
            (2048, "epsilon", ("sdxl_base_v1-0", "False", "stable-diffusion-xl-v1-base/lora", "1024x1024")),
        ],
    )
    def test_generations(self, patch: Patch, width: int, prediction: str, told: tuple[str, ...]) -> None:
        assert patch.metadata is not None
        metadata = patch.metadata.model_copy(update={"prediction_type": prediction})
        name = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
        header = to_kohya(Patch(factors(name, inner=width), metadata))[1]
        keys = ("ss_base_model_version", "ss_v2", "modelspec.architecture", "modelspec.resolution")
        assert tuple(header[key] for key in keys) == told

    @pytest.mark.parametrize(
        ("about", "told"),
        [
            ({"base_prompt_width": 1024}, "stable-diffusion-v2-512/lora"),
            ({"base_prompt_width": 768}, "stable-diffusion-v1/lora"),
            ({"base_prompt_width": 2048}, "stable-diffusion-xl-v1-base/lora"),
            ({"base": "stabilityai/stable-diffusion-2-1-base"}, "stable-diffusion-v2-512/lora"),
            ({"base": "runwayml/stable-diffusion-v1-5"}, "stable-diffusion-v1/lora"),
            ({"prediction_type": "v_prediction"}, "stable-diffusion-v2-768-v/lora"),
            ({"base": "mine"}, None),
        ],
    )
    def test_generations_of_self_attention_alone(
        self, patch: Patch, about: dict[str, object], told: str | None
    ) -> None:
        """Its layers are the same in 1.x and 2.x: the patch says for which it is, or nobody does."""
        assert patch.metadata is not None
        metadata = patch.metadata.model_copy(update={"base_prompt_width": None} | about)
        name = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_k"
        header = to_kohya(Patch(factors(name, inner=1280), metadata))[1]
        assert header.get("modelspec.architecture") == told
        assert ("ss_v2" in header) is (told is not None) and header["ss_network_dim"] == "2"

    def test_hashes(self, patch: Patch, tmp_path: Path) -> None:
        small = write_kohya(patch, tmp_path)
        assert small.name == "erase-van-gogh.safetensors"
        wide = Patch(factors(PROJ_IN, rank=64, inner=9000, outer=900))
        large = write_kohya(wide, tmp_path / "l.safetensors")
        for file in (small, large):
            header = read_safetensors_header(file).metadata
            data = file.read_bytes()
            body = hashlib.sha256(data[8 + struct.unpack("<Q", data[:8])[0] :]).hexdigest()
            assert header["sshs_model_hash"] == body and header["modelspec.hash_sha256"] == f"0x{body}"
            training = {key: text for key, text in header.items() if key.startswith("ss_")}
            alone = file_of(tmp_path / "alone.safetensors", load_file(file), training).read_bytes()
            old = hashlib.sha256(alone[0x100000:0x110000]).hexdigest()[:8]
            assert header.get("sshs_legacy_hash") == (old if file == large else None)

    def test_what_cannot_be_written_leaves_nothing(self, patch: Patch, tmp_path: Path) -> None:
        big = Patch({key: tensor.float() * 1e6 for key, tensor in patch.tensors.items()})
        foreign = Patch(factors("transformer.transformer_blocks.0.attn.to_q"))
        assert not has_kohya_names(foreign)
        for made, message in (
            (big, "as float16 has infinite values in its tensor 'lora_unet"),
            (foreign, "changes a transformer"),
            (Patch(factors("unet.a.b", "unet.a_b")), "kohya's spelling calls 'lora_unet_a_b'"),
        ):
            with pytest.raises(PatchError, match=message):
                write_kohya(made, tmp_path / "x.safetensors")
        (tmp_path / "file").write_text("")
        with pytest.raises(OutputError, match="cannot write"):
            write_kohya(patch, tmp_path / "file" / "x.safetensors")
        assert [one.name for one in tmp_path.iterdir()] == ["file"]


class TestRoundTrip:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
    def test_exact(self, whole_patch: Patch, tiny_sd: Path, tmp_path: Path, dtype: torch.dtype) -> None:
        cast, place = whole_patch.to(dtype), tmp_path / "k.safetensors"
        write_kohya(cast, place, dtype=dtype)
        unet = UNet2DConditionModel.from_pretrained(tiny_sd / "unet")
        for modules in (None, [name for name, _ in unet.named_modules()]):
            back = from_any(place, modules)
            same(cast.tensors, back.tensors)
            assert back.metadata == cast.metadata and back.format == "kohya"
        back.write(tmp_path / "again.safetensors", dtype)
        weights = cast.save(tmp_path / "patch", dtype)
        assert (tmp_path / "again.safetensors").read_bytes() == weights.read_bytes()

    def test_what_another_tool_said_stays(self, tmp_path: Path) -> None:
        said = {"ss_dataset": "cats", "modelspec.author": "me", "ss_network_dim": "9", "other": "x"}
        read = from_any(file_of(tmp_path, kohya(alpha=1.0), said))
        header = to_kohya(read)[1]
        assert {key: header.get(key) for key in said} == said | {"ss_network_dim": "2", "other": None}
        written = read_safetensors_header(read.write(tmp_path / "d.safetensors")).metadata
        assert written == {"format": "pt", "ss_dataset": "cats", "ss_network_dim": "9"}

    def test_different_ranks_and_odd_names(self, tmp_path: Path) -> None:
        odd = "unet.my_odd.block_a"
        made = Patch(factors(PROJ_IN, rank=3) | factors(odd, rank=1) | factors("unet.conv_in", rank=5))
        written, header = to_kohya(made, dtype=torch.float32)
        assert {written[key].item() for key in written if key.endswith(".alpha")} == {5.0}
        assert json.loads(header[MODULES_KEY]) == {"lora_unet_my_odd_block_a": odd}
        same(made.tensors, from_any(file_of(tmp_path, written, header)).tensors)
        # Other tools see the padded factors, which make the same update.
        down, up = (written[f"lora_unet_my_odd_block_a.lora_{side}.weight"] for side in ("down", "up"))
        assert torch.allclose(up @ down, made.update(odd))

    def test_text_encoders(self, tmp_path: Path) -> None:
        names = {
            "text_encoder.encoder.layers.0.mlp.fc2": "te1_text_model_encoder_layers_0_mlp_fc2",
            "text_encoder_2.text_model.encoder.layers.9.mlp.fc1": "te2_text_model_encoder_layers_9_mlp_fc1",
            "text_encoder_2.text_projection": "te2_text_projection",
            PROJ_IN: "unet_mid_block_attentions_0_proj_in",
        }
        read = from_any(file_of(tmp_path, factors(*names)))
        assert read.components == ("unet", "text_encoder", "text_encoder_2")
        written, header = to_kohya(read, dtype=torch.float32)
        assert {key.split(".")[0] for key in written} == {f"lora_{name}" for name in names.values()}
        same(read.tensors, from_any(file_of(tmp_path / "k.safetensors", written, header)).tensors)
        alone = to_kohya(Patch(factors("text_encoder.text_model.encoder.layers.0.mlp.fc2")))[0]
        assert {key.split(".")[0] for key in alone} == {"lora_te_text_model_encoder_layers_0_mlp_fc2"}


class TestSamePictures:
    """diffusers' own converter reads our kohya file and draws what the patch draws."""

    @pytest.mark.parametrize(
        ("base_name", "layers"), [("tiny_sd", "padded, and text"), ("tiny_sd", "all"), ("tiny_sd_v", "all")]
    )
    def test_in_diffusers(
        self, base_name: str, layers: str, both: Patch, tmp_path: Path, request: pytest.FixtureRequest
    ) -> None:
        folder = request.getfixturevalue(base_name)
        pipeline = plain(folder)
        before = draw(pipeline)
        made = (trained(folder, layers=layers)[1] if layers == "all" else both).to(torch.float32)
        if layers != "all":
            keys = [f"{made.modules[0]}.lora_{side}.weight" for side in "AB"]
            less = {key: made.tensors[key].narrow(axis, 0, 1).contiguous() for axis, key in enumerate(keys)}
            made = Patch(dict(made.tensors) | less)
        with made.apply(pipeline):
            patched = draw(pipeline)
        file = write_kohya(made, tmp_path / "k.safetensors", dtype=torch.float32)
        text = any(key.startswith("lora_te_text_model_encoder_layers_0_") for key in load_file(file))
        assert text is (layers != "all")
        same(made.tensors, from_any(file).tensors)
        pipeline.load_lora_weights(str(tmp_path), weight_name=file.name)
        assert difference(draw(pipeline), patched) <= 2 < difference(before, patched)


NAME = "unet.down_blocks.0.attentions.1.transformer_blocks.0.attn2.to_out.0"
TEXT = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
TEXT_2 = TEXT.replace("text_encoder", "text_encoder_2")
PEFT = NAME.removeprefix("unet.")
OLD = PEFT.removesuffix(".to_out.0")


class TestWhatIsRead:
    @pytest.mark.parametrize(
        ("key", "sides", "shape", "name"),
        [
            (f"{NAME}.lora_X.weight", "AB", "diffusers", NAME),
            (f"{NAME}.lora_X.default.weight", "AB", "diffusers", NAME),
            (f"{NAME}.lora.X.weight", "du", "diffusers", NAME),
            (f"unet.{OLD}.processor.to_out_lora.X.weight", "du", "diffusers", NAME),
            (f"{OLD}.processor.to_out_lora.X.weight", "du", "diffusers", NAME),
            (f"base_model.model.{PEFT}.lora_X.weight", "AB", "peft", NAME),
            (f"lora_{NAME.replace('.', '_')}.lora_X.weight", "du", "kohya", NAME),
            (f"{TEXT}.lora_linear_layer.X.weight", "du", "diffusers", TEXT),
            (f"{TEXT.replace('q_proj', 'to_q')}_lora.X.weight", "du", "diffusers", TEXT),
            (f"{TEXT.replace('text_model.', '')}.lora_X.weight", "AB", "diffusers", TEXT),
            # OneTrainer's.
            (f"{TEXT.replace('text_encoder', 'clip_l')}.lora_X.weight", "du", "diffusers", TEXT),
            (f"{TEXT.replace('text_encoder', 'clip_g')}.lora_X.weight", "du", "diffusers", TEXT_2),
            (f"unet.input_blocks.2.1.{OLD.split('.', 4)[4]}.to_out.0.lora_X.weight", "du", "diffusers", NAME),
            # Of compiled networks.
            (f"unet._orig_mod.{PEFT}.lora_X.weight", "AB", "diffusers", NAME),
            (f"base_model.model._orig_mod.{PEFT}.lora_X.weight", "AB", "peft", NAME),
            (f"lora_unet__orig_mod_{PEFT.replace('.', '_')}.lora_X.weight", "du", "kohya", NAME),
            (f"unet.{PEFT.replace('.attn2', '._orig_mod.attn2')}.lora_X.weight", "AB", "diffusers", NAME),
        ],
    )
    def test_shapes(self, tmp_path: Path, key: str, sides: str, shape: str, name: str) -> None:
        words = ("down", "up") if sides == "du" else sides
        tensors = {key.replace("X", word): one for word, one in zip(words, pair(), strict=True)}
        read = from_any(file_of(tmp_path, tensors))
        assert read.format == shape
        same(read.tensors, factors(name))

    def test_alpha_of_each_module(self, tmp_path: Path) -> None:
        conv = "lora_unet_conv_in"
        tensors = kohya(alpha=1.0) | kohya(conv, rank=3, alpha=torch.tensor(2)) | kohya("lora_unet_conv_out")
        tensors |= kohya("lora_unet_mid_block_attentions_0_proj_out", alpha=torch.tensor([4.0]).half())
        read = from_any(file_of(tmp_path, tensors))
        scales = {PROJ_IN: 1 / 2, f"{PROJ_IN[:-2]}out": 2, "unet.conv_in": 2 / 3, "unet.conv_out": 1}
        for module, scale in scales.items():
            # Without an alpha it is the rank, as loaders take it.
            up = tensors[f"lora_{module.replace('.', '_')}.lora_up.weight"]
            assert torch.allclose(read.factors(module)[1], up * scale)
        # Written again, one alpha serves them all and the updates stay.
        written, _ = to_kohya(read, dtype=torch.float32)
        assert {written[key].item() for key in written if key.endswith("alpha")} == {3.0}
        down, up = (written[f"{conv}.lora_{side}.weight"] for side in ("down", "up"))
        assert torch.allclose(up @ down, read.update("unet.conv_in"), atol=1e-6)

    @pytest.mark.parametrize(
        ("config", "scale"),
        [
            ({"r": 2, "lora_alpha": 6}, 3.0),
            ({"r": 2, "lora_alpha": 4, "use_rslora": True}, 4 / 2**0.5),
            ({"lora_alpha": 4, "alpha_pattern": {"attn2.to_out.0": 1, "to_out.0": 9}}, 0.5),
        ],
    )
    def test_peft_settings(self, tmp_path: Path, config: dict[str, object], scale: float) -> None:
        """In PEFT's file beside the weights, and as diffusers keeps them in the header."""
        ours = factors(NAME)
        peft = {key.replace("unet.", "base_model.model."): tensor for key, tensor in ours.items()}
        file_of(tmp_path / "adapter_model.safetensors", peft)
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        note = {"lora_adapter_metadata": json.dumps({f"unet.{key}": value for key, value in config.items()})}
        single = {f"unet.{key}": json.dumps(value) for key, value in config.items()}
        headers = {"d": note, "s": single, "both": note | single}
        for place in (tmp_path, *(file_of(tmp_path / f"{k}.safetensors", ours, one) for k, one in headers.items())):
            assert torch.allclose(from_any(place).factors(NAME)[1], pair()[1] * scale)
        with pytest.raises(PatchError, match="scale of its own"):
            Patch.load(tmp_path / "d.safetensors")
        with pytest.raises(PatchError, match="tells two scales"):
            from_any(file_of(tmp_path / "d.safetensors", ours, note | {"lora_alpha": "99", "alpha_pattern": "{}"}))
        with pytest.raises(PatchError, match=r"malformed header entry 'unet.lora_alpha'"):
            from_any(file_of(tmp_path / "d.safetensors", ours, {"unet.lora_alpha": "much"}))

    def test_not_of_the_base(self, tmp_path: Path) -> None:
        nearest = r"fits no modules.*nearest is 'mid_block.*proj_out'"
        with pytest.raises(IncompatiblePatchError, match=nearest):
            from_any(file_of(tmp_path, kohya()), ["mid_block.attentions.0.proj_out"])


CONV = {f"unet.conv_in.lora_{side}.weight": torch.ones(2, 2) for side in "AB"}
A, B = CONV
BAD = {
    "LoHa": ({"lora_unet_conv_in.hada_w1_a": torch.ones(2, 2)}, "is a LoHa"),
    "LoKr": ({"lora_unet_conv_in.lokr_w1": torch.ones(2, 2)}, "is a LoKr"),
    "DoRA": (kohya(dora_scale=[[1.0]]), "is a DoRA"),
    "DoRA of PEFT": ({"unet.conv_in.lora_magnitude_vector": torch.ones(2)}, "is a DoRA"),
    "LoCon with a middle": (kohya(lora_mid__weight=[[1.0]]), "third, middle factor"),
    "no up": ({"lora_unet_conv_in.lora_down.weight": torch.ones(2, 2)}, "lacks the upper factor"),
    "alpha alone": ({"lora_unet_conv_in.alpha": torch.ones(())}, "lacks the lower factor"),
    "alpha of two numbers": (kohya(alpha=[1.0, 2.0]), "must be one number"),
    "alpha NaN": (kohya(alpha=float("nan")), "NaN values in its tensor"),
    "alpha huge": (kohya(alpha=torch.tensor(1e300, dtype=torch.float64)), "infinite values in its tensor"),
    "NaN": ({A: torch.full((2, 2), torch.nan)}, "NaN values in its tensor"),
    "integers": ({A: torch.ones(2, 2, dtype=torch.int8)}, "of type I8"),
    "odd part": (kohya(color=1.0), "belongs to no LoRA"),
    "odd prefix": ({"lora_prior_unet_x.lora_down.weight": torch.ones(2, 2)}, "belongs to no LoRA"),
    "odd module": (kohya("lora_unet_triple_blocks_0_img_attn_qkv"), "names no layer"),
    "odd text module": (kohya("lora_te_text_model_final_layer_norm"), "names no layer"),
    "long number": (kohya(f"lora_unet_input_blocks_{'9' * 5000}_1_proj_in"), "has a 'lora_unet_input_blocks_9"),
    "trailing underscore": (kohya("lora_unet_conv_in_"), "names no layer"),
    "no LoRA": ({"conv.weight": torch.ones(2)}, "belongs to no LoRA"),
    "no module": ({"unet..lora_A.weight": torch.ones(2, 2)}, "belongs to no LoRA"),
    "mixed": (kohya() | {A: torch.ones(2, 2)}, "mixes the shapes"),
    "twice": (CONV | {"unet.conv_in.lora.down.weight": torch.ones(2, 2)}, "twice, under two names"),
    "misshapen": (CONV | {B: torch.ones(2, 3)}, "do not make an update"),
    "no UNet's layer": ({"clip_h.x.lora_A.weight": torch.ones(2, 2)}, "belongs to no LoRA"),
    "textual inversion within": ({"bundle_emb.cat.string_to_param": torch.ones(2)}, "a textual inversion in it"),
    "third encoder": ({"text_encoder_3.x.lora_A.weight": torch.ones(2, 2)}, "of a 'text_encoder_3'"),
    "empty": ({}, "holds no tensors"),
}


NOTE = '{"lora_unet_mid_block_attentions_0_proj_in": %s}'


class TestBadFiles:
    @pytest.mark.parametrize("case", BAD)
    def test_one_sentence(self, case: str, tmp_path: Path) -> None:
        tensors, message = BAD[case]
        with pytest.raises(PatchError, match=re.escape(message)) as caught:
            from_any(file_of(tmp_path, tensors))
        assert "\n" not in str(caught.value)

    def test_folders(self, tmp_path: Path) -> None:
        def refused(place: Path, told: str) -> None:
            with pytest.raises(PatchError, match=told):
                from_any(place)

        refused(tmp_path / "x", "there is no LoRA file")
        refused(tmp_path, "a safetensors file is not in it")
        (tmp_path / "lora.pt").write_bytes(pickle.dumps({}))
        refused(tmp_path / "lora.pt", "is a pickle")
        refused(tmp_path, "holds a pickle")
        file_of(tmp_path / "a.safetensors", kohya())
        assert from_any(tmp_path).modules == (PROJ_IN,)
        file_of(tmp_path / "b.safetensors", kohya())
        refused(tmp_path, "several LoRA files")

    @pytest.mark.parametrize(
        "header",
        [
            *({RANKS_KEY: text} for text in ("[", NOTE % "9", NOTE % "0", NOTE % "true")),
            *({MODULES_KEY: text} for text in (NOTE % '"unet.other"', NOTE % "3", "[" * 100_000)),
            {"recare_patch.base": "x"},
        ],
    )
    def test_malformed_entries(self, header: dict[str, str], tmp_path: Path) -> None:
        with pytest.raises(PatchError, match="malformed header entry"):
            from_any(file_of(tmp_path, kohya(), header))

    @pytest.mark.parametrize(
        "config",
        [
            *(
                "[",
                "[]",
                '{"lora_alpha": 1%s}' % ("0" * 400),
                '{"lora_alpha": "x"}',
                '{"lora_alpha": NaN}',
                '{"lora_alpha": true}',
            ),
            *('{"alpha_pattern": 3}', '{"alpha_pattern": {"(a+)+$": 1}}', '{"use_dora": true}'),
        ],
    )
    def test_malformed_settings(self, config: str, tmp_path: Path) -> None:
        tensors = {key.replace("unet.", "base_model.model."): tensor for key, tensor in CONV.items()}
        file_of(tmp_path / "adapter_model.safetensors", tensors)
        (tmp_path / "adapter_config.json").write_text(config)
        with pytest.raises(PatchError, match="is a DoRA" if "dora" in config else "malformed adapter"):
            from_any(tmp_path)
