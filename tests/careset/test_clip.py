"""CLIP's features and words, and folders that are no CLIP, each refused in one sentence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from recare_patch.careset.clip import FUNCTION_WORDS, MEDIUM_WORDS, Clip, default_clip
from recare_patch.core import ClipError
from tests.tiny import WORDS


@pytest.fixture(scope="module")
def clip(tiny_clip: Path) -> Clip:
    return Clip.load(str(tiny_clip))


@pytest.fixture
def copy(tiny_clip: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_clip, tmp_path / "clip"))


def test_features_are_unit_rows_and_batches_do_not_matter(clip: Clip) -> None:
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (40, 30, 3), dtype=np.uint8)) for _ in range(3)]
    # Pictures of any mode are read.
    pictures += [Image.new("L", (20, 50), 90), Image.new("RGBA", (64, 64), (9, 9, 9, 0))]
    words = ["stars", "a photo of a tench", "", "x " * 300]
    images, texts = clip.image_features(pictures), clip.text_features(words)
    assert (images.shape, texts.shape) == ((5, clip.width), (4, clip.width))
    assert images.dtype == texts.dtype == torch.float32
    torch.testing.assert_close(torch.cat([images, texts]).norm(dim=1), torch.ones(9))
    torch.testing.assert_close(clip.image_features(pictures, batch_size=2), images)
    torch.testing.assert_close(clip.text_features(words, batch_size=1), texts, atol=1e-5, rtol=1e-5)
    assert clip.image_features([]).shape == clip.text_features([]).shape == (0, clip.width)


def test_features_equal_transformers_own(clip: Clip, tiny_clip: Path) -> None:
    from transformers import CLIPModel, CLIPTokenizer

    model, texts = CLIPModel.from_pretrained(tiny_clip).eval(), ["a painting of stars", "night"]
    tokens = CLIPTokenizer.from_pretrained(tiny_clip)(texts, padding="max_length", max_length=77, return_tensors="pt")
    with torch.no_grad():
        out = model(pixel_values=torch.zeros(1, 3, 32, 32), input_ids=tokens["input_ids"])
    torch.testing.assert_close(clip.text_features(texts), F.normalize(out.text_embeds, dim=-1))


def test_vocabulary_holds_the_words_and_a_reason_for_all_else(clip: Clip) -> None:
    words, dropped = clip.vocabulary()
    wanted = [w for w in WORDS if len(w) >= 3 and w not in FUNCTION_WORDS and w not in MEDIUM_WORDS]
    assert set(wanted) <= set(words)
    assert len(words) == len(set(words))
    reasons = dict(dropped)
    assert reasons["photo"] == "names a medium, not what a picture shows"
    assert reasons["the"] == "a function word"
    assert reasons["<|endoftext|>"] == "marks the start or end of a text"
    assert all(reasons.values())
    assert all(w.isascii() and w.isalpha() for w in words)
    assert clip.vocabulary()[0] == words


def test_tokens_that_no_text_ever_held_are_told_from_words(clip: Clip, copy: Path) -> None:
    """What training moves is a word; an ending that keeps its initial embedding is a piece."""
    from transformers import CLIPModel, CLIPTokenizer

    model = CLIPModel.from_pretrained(copy)
    vocabulary = CLIPTokenizer.from_pretrained(copy).get_vocab()
    unmet = {vocabulary.get(f"{piece}</w>") for piece in ("ight", "ower", "ench")}
    words = {vocabulary[f"{word}</w>"] for word in WORDS if f"{word}</w>" in vocabulary}
    with torch.no_grad():
        model.text_model.embeddings.token_embedding.weight[sorted(words - unmet)] *= 3
    model.save_pretrained(copy)
    met, dropped = Clip.load(str(copy)).vocabulary()
    assert "stars" in met and set(met) <= set(WORDS)
    assert any(reason.startswith("a piece of longer words") for _, reason in dropped)


def test_default_clip() -> None:
    assert default_clip("Atelier") == "atelier"
    assert default_clip("runwayml/stable-diffusion-v1-5") == "openai/clip-vit-base-patch32"


def _refused(source: Path | str, match: str) -> None:
    with pytest.raises(ClipError, match=match) as caught:
        Clip.load(str(source))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("config.json",), r"config\.json is missing"),
        (("model.safetensors",), "no weights"),
        (("tokenizer.json", "vocab.json"), "no tokenizer"),
        (("preprocessor_config.json", "processor_config.json"), "no image processor"),
    ],
)
def test_a_missing_part_is_named(copy: Path, names: tuple[str, ...], message: str) -> None:
    for name in names:
        (copy / name).unlink(missing_ok=True)
    _refused(copy, message)


def test_other_models_are_refused(tiny_clip: Path, tiny_sd: Path, copy: Path) -> None:
    _refused(tiny_sd, "diffusers pipeline")
    _refused(tiny_clip / "config.json", "is a file")
    _refused(copy.parent, "no configuration")
    shutil.copy(tiny_sd / "text_encoder" / "config.json", copy)
    _refused(copy, "text and vision: its config says 'clip_text_model'")
    for broken in ("{", "[]"):
        (copy / "config.json").write_text(broken)
        _refused(copy, "cannot load CLIP")


def test_broken_weights_are_refused(copy: Path) -> None:
    file = copy / "model.safetensors"
    # Copies: what is loaded lies in the file, which is about to change.
    data, weights = file.read_bytes(), {k: v.clone() for k, v in load_file(file).items()}
    file.write_bytes(data[: len(data) // 2])
    _refused(copy, "cannot load CLIP")

    def change(value: torch.Tensor | None, match: str) -> None:
        changed = weights | {"visual_projection.weight": value}
        save_file({k: v for k, v in changed.items() if v is not None}, file, {"format": "pt"})
        _refused(copy, match)

    projection = weights["visual_projection.weight"]
    change(None, "lacks 1 of its weights")
    change(torch.full_like(projection, float("nan")), "not finite")
    change(projection[:, :-1].contiguous(), "cannot load CLIP")


def test_a_tokenizer_of_another_model_is_refused(copy: Path) -> None:
    config, weights = json.loads((copy / "config.json").read_text()), load_file(copy / "model.safetensors")
    key = next(k for k in weights if k.endswith("token_embedding.weight"))
    assert len(weights[key]) > 600
    weights = {k: v.clone() for k, v in weights.items()}
    save_file(weights | {key: weights[key][:600].clone()}, copy / "model.safetensors", {"format": "pt"})
    config["text_config"].update(vocab_size=600, bos_token_id=1, eos_token_id=2, pad_token_id=2)
    (copy / "config.json").write_text(json.dumps(config))
    _refused(copy, "knows 600 tokens")


@pytest.mark.parametrize("source", ["/nowhere/clip", "./clip", "a/b/c", "", "-x", "two words"])
def test_places_that_are_none(source: str) -> None:
    _refused(source, "no CLIP model at")


def test_a_hub_id_without_a_network_is_one_sentence() -> None:
    _refused("nobody/no-such-clip", "nobody/no-such-clip")
