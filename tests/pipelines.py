"""Tiny random pipelines of every kind that the installed diffusers draws pictures from text with, one table.

Each has the anatomy of its family (streams, refiners, packed latents, text as lists or with masks) in a few thousand
weights, which follow from its name; nothing is fetched. Pictures are 16 pixels wide unless a family needs more.
"""

from __future__ import annotations

import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.parts import (
    _LANGUAGE,
    _THIN,
    _clip,
    _encoders,
    _flow,
    _flux2_vae,
    _language,
    _mistral,
    _network,
    _qwen3_vl,
    _qwen25_vl,
    _spread,
    _t5,
    _t5_wide,
    _vae,
    _video_vae,
    word_tokenizer,
)
from tests.tiny import _saved, _seeded, _tiny_vae, make_tiny_sd, make_tiny_sdxl


def _flux(guided: bool) -> dict[str, Any]:
    sizes = {"patch_size": 1, "in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16}
    sizes |= {"num_attention_heads": 2, "joint_attention_dim": 32, "pooled_projection_dim": 32}
    return {
        "transformer": _network("FluxTransformer2DModel", **sizes, axes_dims_rope=(4, 4, 8), guidance_embeds=guided),
        "scheduler": _flow(use_dynamic_shifting=guided),
        "vae": _vae(),
        **_encoders(_clip(), _t5()),
    }


def _sd3() -> dict[str, Any]:
    sizes = {"sample_size": 8, "patch_size": 2, "in_channels": 4, "num_layers": 2, "attention_head_dim": 8}
    sizes |= {"num_attention_heads": 2, "joint_attention_dim": 64, "caption_projection_dim": 16, "out_channels": 4}
    return {
        "transformer": _network(
            "SD3Transformer2DModel",
            **sizes,
            pooled_projection_dim=64,
            pos_embed_max_size=16,
            dual_attention_layers=(0,),
        ),
        "scheduler": _flow(shift=3.0),
        "vae": _vae(),
        **_encoders(_clip(projection=True), _clip(projection=True), _t5_wide(64)),
    }


def _z_image() -> dict[str, Any]:
    sizes = {"all_patch_size": (2,), "all_f_patch_size": (1,), "in_channels": 4, "dim": 32, "n_layers": 1}
    sizes |= {"n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 32, "axes_dims": (8, 4, 4)}
    return {
        "transformer": _network("ZImageTransformer2DModel", **sizes, axes_lens=(256, 32, 32)),
        "scheduler": _flow(shift=3.0),
        "vae": _vae(),
        **_encoders(_language("Qwen3")),
    }


def _qwen_image() -> dict[str, Any]:
    sizes = {"patch_size": 2, "in_channels": 16, "out_channels": 4, "num_layers": 2, "attention_head_dim": 16}
    sizes |= {"num_attention_heads": 2, "joint_attention_dim": 32, "axes_dims_rope": (4, 4, 8)}
    return {
        "transformer": _network("QwenImageTransformer2DModel", **sizes),
        "scheduler": _flow(use_dynamic_shifting=True),
        "vae": _video_vae(),
        **_encoders(_qwen25_vl()),
    }


def _sana(**changes: Any) -> dict[str, Any]:
    sizes = {"patch_size": 1, "in_channels": 4, "out_channels": 4, "num_layers": 1, "num_attention_heads": 2}
    sizes |= {"attention_head_dim": 8, "num_cross_attention_heads": 2, "cross_attention_head_dim": 8}
    vae = {"latent_channels": 4, "attention_head_dim": 2, "encoder_block_out_channels": (8, 8)}
    blocks = {"encoder_block_types": ("ResBlock", "EfficientViTBlock"), "decoder_block_types": ("ResBlock",) * 2}
    layers = {
        "encoder_layers_per_block": (1, 1),
        "decoder_layers_per_block": (1, 1),
        "decoder_block_out_channels": (8, 8),
    }
    extra = {
        "encoder_qkv_multiscales": ((), (5,)),
        "decoder_qkv_multiscales": ((), ()),
        "downsample_block_type": "conv",
    }
    norms = {"decoder_norm_types": "rms_norm", "decoder_act_fns": "silu", "upsample_block_type": "interpolate"}
    return {
        "transformer": _network(
            "SanaTransformer2DModel", **sizes, cross_attention_dim=16, caption_channels=32, sample_size=16, **changes
        ),
        "scheduler": _flow(shift=3.0),
        "vae": _network("AutoencoderDC", **vae, **blocks, **layers, **extra, **norms, scaling_factor=0.41),
        **_encoders(_language("Gemma2", sliding_window=32, query_pre_attn_scalar=16)),
    }


def _klein() -> dict[str, Any]:
    return _flux2(_language("Qwen3", "ForCausalLM", **_THIN, num_hidden_layers=28), False)


def _flux2(encoder: tuple[Any, Any], guided: bool) -> dict[str, Any]:
    sizes = {"patch_size": 1, "in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16}
    sizes |= {"num_attention_heads": 2, "joint_attention_dim": 48, "timestep_guidance_channels": 16}
    return {
        "transformer": _network(
            "Flux2Transformer2DModel", **sizes, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=guided
        ),
        "scheduler": _flow(use_dynamic_shifting=True),
        "vae": _flux2_vae(),
        **_encoders(encoder),
    }


def _chroma() -> dict[str, Any]:
    sizes = {"patch_size": 1, "in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16}
    sizes |= {"num_attention_heads": 2, "joint_attention_dim": 32, "approximator_num_channels": 8}
    return {
        "transformer": _network(
            "ChromaTransformer2DModel",
            **sizes,
            axes_dims_rope=(4, 4, 8),
            approximator_hidden_dim=16,
            approximator_layers=1,
        ),
        "scheduler": _flow(),
        "vae": _vae(),
        **_encoders(_t5()),
    }


def _lumina2() -> dict[str, Any]:
    # A key for three queries, as its original checkpoints have.
    sizes = {"sample_size": 16, "patch_size": 2, "in_channels": 4, "hidden_size": 48, "num_layers": 1}
    sizes |= {"num_refiner_layers": 1, "num_attention_heads": 3, "num_kv_heads": 1, "multiple_of": 16}
    return {
        "transformer": _network(
            "Lumina2Transformer2DModel", **sizes, axes_dim_rope=(8, 4, 4), axes_lens=(300, 64, 64), cap_feat_dim=32
        ),
        "scheduler": _flow(),
        "vae": _tiny_vae(8, 4, shift_factor=0.1),
        **_encoders(_language("Gemma2", sliding_window=32, query_pre_attn_scalar=16)),
    }


def _aura_flow() -> dict[str, Any]:
    sizes = {"sample_size": 16, "patch_size": 2, "in_channels": 4, "num_mmdit_layers": 1, "num_single_dit_layers": 1}
    sizes |= {"attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 32, "out_channels": 4}
    return {
        "transformer": _network(
            "AuraFlowTransformer2DModel", **sizes, caption_projection_dim=16, pos_embed_max_size=256
        ),
        "scheduler": _flow(),
        "vae": _vae(),
        **_encoders(_t5("UMT5")),
    }


def _cogview4() -> dict[str, Any]:
    sizes = {"patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 1, "attention_head_dim": 16}
    sizes |= {"num_attention_heads": 2, "text_embed_dim": 32, "time_embed_dim": 16, "condition_dim": 8}
    encoder, tokenizer = _language("Glm")
    tokenizer.padding_side = "left"  # as GLM's own
    return {
        "transformer": _network(
            "CogView4Transformer2DModel", **sizes, pos_embed_max_size=32, sample_size=16, rope_axes_dim=(8, 8)
        ),
        "scheduler": _flow(base_shift=0.25, max_shift=0.75, use_dynamic_shifting=True, time_shift_type="linear"),
        "vae": _vae(),
        **_encoders((encoder, tokenizer)),
    }


def _hidream() -> dict[str, Any]:
    sizes = {"patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 1, "num_single_layers": 1}
    sizes |= {"attention_head_dim": 16, "num_attention_heads": 2, "caption_channels": (32, 32), "text_emb_dim": 64}
    experts = {"num_routed_experts": 2, "num_activated_experts": 1, "axes_dims_rope": (4, 4, 8)}
    clips = _clip(projection=True), _clip(projection=True)
    return {
        "transformer": _network(
            "HiDreamImageTransformer2DModel", **sizes, **experts, max_resolution=(16, 16), llama_layers=(0, 1),
            force_inference_output=True,
        ),
        "scheduler": _flow(),
        "vae": _vae(),
        **_encoders(*clips, _t5(), _language("Llama", "ForCausalLM", attn_implementation="eager")),
    }  # fmt: skip


def _krea2() -> dict[str, Any]:
    sizes = {"in_channels": 16, "num_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "intermediate_size": 32, "timestep_embed_dim": 16, "text_hidden_dim": 32}
    text = {"num_text_layers": 2, "text_num_attention_heads": 2, "text_num_key_value_heads": 2}
    return {
        "transformer": _network(
            "Krea2Transformer2DModel", **sizes, **text, text_intermediate_size=32, num_layerwise_text_blocks=1,
            num_refiner_text_blocks=1, axes_dims_rope=(4, 4, 8),
        ),
        "scheduler": _flow(use_dynamic_shifting=True),
        "vae": _video_vae(),
        **_encoders(_qwen3_vl()),
        "text_encoder_select_layers": (1, 2),
    }  # fmt: skip


def _fibo() -> dict[str, Any]:
    sizes = {"patch_size": 1, "in_channels": 4, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16}
    sizes |= {
        "num_attention_heads": 2,
        "joint_attention_dim": 64,
        "text_encoder_dim": 32,
        "pooled_projection_dim": None,
    }
    # It names the token of the empty prompt by its number.
    vae = {"base_dim": 8, "decoder_base_dim": 8, "z_dim": 4, "dim_mult": [1, 1], "num_res_blocks": 1}
    return {
        "transformer": _network("BriaFiboTransformer2DModel", **sizes, axes_dims_rope=[4, 4, 8]),
        "scheduler": _flow(use_dynamic_shifting=True),
        "vae": _network(
            "AutoencoderKLWan", **vae, temperal_downsample=[False], latents_mean=[0.0] * 4, latents_std=[1.0] * 4
        ),
        **_encoders(_language("SmolLM3", "ForCausalLM", vocab_size=128_001)),
    }


def _ernie() -> dict[str, Any]:
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_layers": 1, "ffn_hidden_size": 32, "in_channels": 16}
    return {
        "transformer": _network(
            "ErnieImageTransformer2DModel", **sizes, out_channels=16, text_in_dim=16, rope_axes_dim=(4, 4, 8)
        ),
        "scheduler": _flow(),
        "vae": _flux2_vae(),
        **_encoders(_mistral("Mistral3Model", 2)),
        "pe": None,
        "pe_tokenizer": None,
    }


def _ideogram() -> dict[str, Any]:
    sizes = {"in_channels": 16, "num_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2, "adaln_dim": 16}
    sizes |= {"intermediate_size": 32, "llm_features_dim": 13 * 16, "mrope_section": (2, 2, 2)}
    return {
        "transformer": _network("Ideogram4Transformer2DModel", **sizes),
        "unconditional_transformer": _network("Ideogram4Transformer2DModel", **sizes),
        "scheduler": _flow(),
        "vae": _flux2_vae(),
        **_encoders(_qwen3_vl(hidden_size=16, num_hidden_layers=36)),
        "prompt_enhancer_head": None,
    }


def _kandinsky5() -> dict[str, Any]:
    sizes = {"in_visual_dim": 4, "in_text_dim": 32, "in_text_dim2": 32, "time_dim": 16, "out_visual_dim": 4}
    sizes |= {"model_dim": 32, "ff_dim": 32, "num_text_blocks": 1, "num_visual_blocks": 1, "axes_dims": (8, 4, 4)}
    return {
        "transformer": _network("Kandinsky5Transformer3DModel", **sizes),
        "scheduler": _flow(),
        "vae": _tiny_vae(8, 4),
        **_encoders(_qwen25_vl(), _clip()),
    }


def _prx() -> dict[str, Any]:
    import transformers
    from transformers.models.t5gemma.modeling_t5gemma import T5GemmaEncoder

    sizes = {"in_channels": 4, "patch_size": 2, "context_in_dim": 32, "hidden_size": 32, "num_heads": 2, "depth": 1}
    text = transformers.T5GemmaModuleConfig(
        **{**_LANGUAGE, "query_pre_attn_scalar": 16, "sliding_window": 32, "dropout_rate": 0.0}
    )
    encoder = T5GemmaEncoder(text)
    encoder.config = transformers.T5GemmaConfig(encoder=text, decoder=text)
    return {
        "transformer": _network("PRXTransformer2DModel", **sizes, axes_dim=[8, 8]),
        "scheduler": _flow(),
        "vae": _vae(),
        **_encoders((encoder, word_tokenizer())),
        "default_sample_size": 32,
    }


def _sana_sprint() -> dict[str, Any]:
    from diffusers import SCMScheduler

    return {**_sana(guidance_embeds=True), "scheduler": SCMScheduler(prediction_type="trigflow", sigma_data=0.5)}


def _pixart() -> dict[str, Any]:
    from diffusers import DPMSolverMultistepScheduler

    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 8, "num_layers": 1}
    return {
        "transformer": _network(
            "PixArtTransformer2DModel", **sizes, cross_attention_dim=16, sample_size=16, caption_channels=32,
            use_additional_conditions=False,
        ),
        "scheduler": DPMSolverMultistepScheduler(),
        "vae": _vae(shift_factor=None),
        **_encoders(_t5()),
    }  # fmt: skip


def _ovis() -> dict[str, Any]:
    sizes = {"patch_size": 1, "in_channels": 16, "out_channels": 16, "num_layers": 1, "num_single_layers": 1}
    sizes |= {"attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 32}
    return {
        "transformer": _network("OvisImageTransformer2DModel", **sizes, axes_dims_rope=(4, 4, 8)),
        "scheduler": _flow(use_dynamic_shifting=True),
        "vae": _vae(),
        **_encoders(_language("Qwen3")),
    }


def _qwen_image21() -> dict[str, Any]:
    sizes = {"in_channels": 4, "out_channels": 4, "num_layers": 1, "attention_head_dim": 16}
    return {
        "transformer": _network(
            "QwenImage21Transformer2DModel", **sizes, num_attention_heads=2, context_in_dim=32, axes_dims_rope=(4, 4, 8)
        ),
        "scheduler": _flow(use_dynamic_shifting=True),
        "vae": _network(
            "AutoencoderKLQwenImage21", base_dim=8, decoder_base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1, 1], patch_size=1,
            num_res_blocks=1, temperal_downsample=[False] * 4, latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
        ),
        **_with_processor(*_qwen3_vl(model="Qwen3VLForConditionalGeneration")),
    }  # fmt: skip


def _with_processor(encoder: Any, tokenizer: Any) -> dict[str, Any]:
    import transformers

    # In its place: Qwen's own needs torchvision, and is called in the same way where there is no picture.
    template = {"patch_size": 16, "image_token": "</s>", "chat_template": tokenizer.chat_template}
    pictures = transformers.CLIPImageProcessorPil()
    return {"text_encoder": encoder, "processor": transformers.LlavaProcessor(pictures, tokenizer, **template)}


def _fibo2() -> dict[str, Any]:
    sizes = {"in_channels": 4, "patch_size": 2, "dim": 32, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2}
    sizes |= {
        "injection_layer_ids": (0,),
        "perceiver_num_layers": 1,
        "min_num_gist_tokens": 4,
        "max_num_gist_tokens": 4,
    }
    return {
        "transformer": _network(
            "BriaFibo2Transformer2DModel", **sizes, cap_feat_dim=48, gist_step=4, gist_min_text_len=4,
            gist_max_text_len=64, axes_dims=(4, 4, 8), axes_lens=(512, 64, 64),
        ),
        "scheduler": _flow(use_dynamic_shifting=True),
        "vae": _flux2_vae(),
        **_with_processor(*_qwen3_vl(model="Qwen3VLForConditionalGeneration", hidden_size=16, num_hidden_layers=36)),
    }  # fmt: skip


def _bria() -> dict[str, Any]:
    sizes = {"in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16}
    return {
        "transformer": _network(
            "BriaTransformer2DModel", **sizes, num_attention_heads=2, joint_attention_dim=32, axes_dims_rope=[4, 4, 8]
        ),
        "scheduler": _flow(),
        "vae": _vae(),
        **_encoders(_t5()),
    }


def _longcat() -> dict[str, Any]:
    sizes = {"in_channels": 64, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16}
    sizes |= {"num_attention_heads": 2, "joint_attention_dim": 32, "pooled_projection_dim": 32}
    return {
        "transformer": _network("LongCatImageTransformer2DModel", **sizes, axes_dims_rope=[4, 4, 8]),
        "scheduler": _flow(use_dynamic_shifting=True),
        "vae": _vae(latent_channels=16),
        **_encoders(_qwen25_vl()),
        "text_processor": word_tokenizer(),
    }


def _parts_of(make: Callable[[Path], Path], kind: str, **changes: Any) -> dict[str, Any]:
    """The parts of a pipeline that tests.tiny makes."""
    import diffusers

    with tempfile.TemporaryDirectory() as folder:
        return {**getattr(diffusers, kind).from_pretrained(make(Path(folder))).components, **changes}


def _lcm() -> dict[str, Any]:
    from diffusers import LCMScheduler, UNet2DConditionModel

    parts = _parts_of(make_tiny_sd, "StableDiffusionPipeline", scheduler=LCMScheduler())
    return {**parts, "unet": UNet2DConditionModel.from_config({**parts["unet"].config, "time_cond_proj_dim": 16})}


PIPELINES: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
    "SD 1, 2": ("StableDiffusionPipeline", lambda: _parts_of(make_tiny_sd, "StableDiffusionPipeline")),
    "SD XL": ("StableDiffusionXLPipeline", lambda: _parts_of(make_tiny_sdxl, "StableDiffusionXLPipeline")),
    "LCM": ("LatentConsistencyModelPipeline", _lcm),
    "SD 3.5": ("StableDiffusion3Pipeline", _sd3),
    "FLUX.1 dev": ("FluxPipeline", lambda: _flux(True)),
    "FLUX.1 schnell": ("FluxPipeline", lambda: _flux(False)),
    "FLUX.1 Kontext": ("FluxKontextPipeline", lambda: _flux(True)),
    "FLUX.2": ("Flux2Pipeline", lambda: _flux2(_mistral("Mistral3ForConditionalGeneration", 31), True)),
    "FLUX.2 Klein": ("Flux2KleinPipeline", _klein),
    "FLUX.2 Klein KV": ("Flux2KleinKVPipeline", _klein),
    "Chroma": ("ChromaPipeline", _chroma),
    "Z-Image": ("ZImagePipeline", _z_image),
    "Z-Image Omni": ("ZImageOmniPipeline", lambda: {**_z_image(), "siglip": None, "siglip_processor": None}),
    "Qwen-Image": ("QwenImagePipeline", _qwen_image),
    "Qwen-Image 2.1": ("QwenImage21Pipeline", _qwen_image21),
    "Krea 2": ("Krea2Pipeline", _krea2),
    "Sana": ("SanaPipeline", _sana),
    "Sana Sprint": ("SanaSprintPipeline", _sana_sprint),
    "Lumina 2": ("Lumina2Pipeline", _lumina2),
    "AuraFlow": ("AuraFlowPipeline", _aura_flow),
    "CogView 4": ("CogView4Pipeline", _cogview4),
    "HiDream": ("HiDreamImagePipeline", _hidream),
    "Bria Fibo": ("BriaFiboPipeline", _fibo),
    "Bria Fibo 2": ("BriaFibo2Pipeline", _fibo2),
    "ERNIE-Image": ("ErnieImagePipeline", _ernie),
    "Ideogram 4": ("Ideogram4Pipeline", _ideogram),
    "Kandinsky 5": ("Kandinsky5T2IPipeline", _kandinsky5),
    "PRX": ("PRXPipeline", _prx),
    "PixArt Sigma": ("PixArtSigmaPipeline", _pixart),
    "Ovis-Image": ("OvisImagePipeline", _ovis),
    "Bria 3.2": ("BriaPipeline", _bria),
    "LongCat-Image": ("LongCatImagePipeline", _longcat),
}
"""What people call it → the pipeline's class, and its parts."""


def make_pipeline(name: str, folder: Path) -> Path:
    """Write a tiny random pipeline of the table and return its folder."""
    import diffusers

    kind, parts = PIPELINES[name]
    with _seeded(zlib.crc32(name.encode())):
        made = parts()
        for part in made.values():
            if isinstance(part, torch.nn.Module):
                _spread(part)
    return _saved(folder, getattr(diffusers, kind)(**made))
