"""Tiny random parts of pipelines: encoders, tokenizers, autoencoders, schedulers."""

from __future__ import annotations

from typing import Any

import torch

from tests.tiny import WORDS, _text_config, _tiny_vae, make_tiny_tokenizer

_CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }} "
    "{{ m['content'] if m['content'] is string else m['content'][-1]['text'] }}<|im_end|>{% endfor %}"
)


def word_tokenizer(length: int = 64) -> Any:
    """A tokenizer with a token for each of :data:`tests.tiny.WORDS`, padded on the right, with a chat template."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "</s>", "<unk>", "<bos>"]
    words = [*special, *dict.fromkeys(WORDS)]
    inner = Tokenizer(models.WordLevel({word: k for k, word in enumerate(words)}, unk_token="<unk>"))
    inner.normalizer, inner.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 3)])
    names = dict(zip(("pad_token", "eos_token", "unk_token", "bos_token"), special, strict=True))
    made = PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=length, padding_side="right", **names)
    made.chat_template = _CHAT
    return made


VOCABULARY = 4 + len(dict.fromkeys(WORDS))


_LANGUAGE = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 16,
    "num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 3,
}  # fmt: skip


def _clip(width: int = 32, *, projection: bool = False) -> tuple[Any, Any]:
    import transformers

    tokenizer = make_tiny_tokenizer()
    kind = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    return kind(transformers.CLIPTextConfig(**_text_config(tokenizer, width))), tokenizer


def _t5(kind: str = "T5") -> tuple[Any, Any]:
    import transformers

    sizes = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 4}
    config = getattr(transformers, f"{kind}Config")(**sizes, feed_forward_proj="gated-gelu")
    return getattr(transformers, f"{kind}EncoderModel")(config), word_tokenizer()


def _language(kind: str, model: str = "Model", **changes: Any) -> tuple[Any, Any]:
    import transformers

    config = getattr(transformers, f"{kind}Config")(**{**_LANGUAGE, **changes})
    return getattr(transformers, f"{kind}{model}")(config), word_tokenizer()


def _encoders(*pairs: tuple[Any, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for k, (encoder, tokenizer) in enumerate(pairs):
        ending = f"_{k + 1}" if k else ""
        found |= {f"text_encoder{ending}": encoder, f"tokenizer{ending}": tokenizer}
    return found


def _flow(**options: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**options)


def _vae(**changes: Any) -> Any:
    return _tiny_vae(8, 2, **{"shift_factor": 0.1, "scaling_factor": 0.5, **changes})


def _network(kind: str, **sizes: Any) -> Any:
    import diffusers

    return getattr(diffusers, kind)(**sizes)


def _t5_wide(width: int) -> tuple[Any, Any]:
    import transformers

    config = transformers.T5Config(vocab_size=VOCABULARY, d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return transformers.T5EncoderModel(config), word_tokenizer()


def _qwen25_vl() -> tuple[Any, Any]:
    import transformers

    text = {**_LANGUAGE, "rope_scaling": {"type": "mrope", "mrope_section": [2, 2, 4], "rope_type": "default"}}
    text.pop("head_dim")
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    config = transformers.Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, image_token_id=5, video_token_id=6, vision_start_token_id=7
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config), word_tokenizer()


def _video_vae() -> Any:
    return _network(
        "AutoencoderKLQwenImage", base_dim=8, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip


def _flux2_vae() -> Any:
    return _network(
        "AutoencoderKLFlux2", block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, sample_size=32,
        up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1, latent_channels=4, norm_num_groups=4,
        mid_block_add_attention=False,
    )  # fmt: skip


_THIN = {"hidden_size": 16, "intermediate_size": 16, "head_dim": 8}


def _mistral(model: str, layers: int) -> tuple[Any, Any]:
    import transformers

    text = {**_LANGUAGE, **_THIN, "num_hidden_layers": layers}
    text = transformers.MistralConfig(**text)
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = transformers.PixtralVisionConfig(**vision, image_size=32, patch_size=16)
    config = transformers.Mistral3Config(text_config=text, vision_config=vision, image_token_index=5)
    return getattr(transformers, model)(config), word_tokenizer()


def _qwen3_vl(model: str = "Qwen3VLModel", **changes: Any) -> tuple[Any, Any]:
    import transformers

    text = {
        **_LANGUAGE,
        **changes,
        "rope_scaling": {"rope_type": "default", "mrope_section": [2, 2, 4], "mrope_interleaved": True},
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2}
    vision["out_hidden_size"] = text["hidden_size"]
    config = transformers.Qwen3VLConfig(
        text_config=text, vision_config={**vision, "deepstack_visual_indexes": [0], "num_position_embeddings": 4}
    )
    return getattr(transformers, model)(config), word_tokenizer()


def _spread(network: torch.nn.Module) -> None:
    """Give weights that are zero or small the usual size: otherwise some families hardly read their prompts."""
    for parameter in network.parameters():
        usual = (parameter[0].numel() if parameter.ndim > 1 else 1) ** -0.5
        if parameter.ndim > 1 and parameter.std() < 0.9 * usual:
            torch.nn.init.normal_(parameter, std=usual)
