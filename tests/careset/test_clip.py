from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from recare_patch.careset.clip import FUNCTION_WORDS, MEDIUM_WORDS, Clip, default_clip
from recare_patch.core.errors import ClipError
from tests.tiny import WORDS


@pytest.fixture(scope="module")
def clip(tiny_clip: Path) -> Clip:
    return Clip.load(str(tiny_clip))


def pictures(count: int, seed: int = 0) -> list[Image.Image]:
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 256, (40, 30, 3), dtype=np.uint8)) for _ in range(count)]


def test_features_are_unit_rows_and_batches_do_not_matter(clip: Clip) -> None:
    images = clip.image_features(pictures(5))
    texts = clip.text_features(["stars", "a photo of a tench", "", "x " * 300])
    assert images.shape == (5, clip.width)
    assert texts.shape == (4, clip.width)
    torch.testing.assert_close(images.norm(dim=1), torch.ones(5))
    torch.testing.assert_close(texts.norm(dim=1), torch.ones(4))
    torch.testing.assert_close(clip.image_features(pictures(5), batch_size=2), images)
    one_by_one = clip.text_features(["stars", "a photo of a tench", "", "x " * 300], batch_size=1)
    torch.testing.assert_close(one_by_one, texts, atol=1e-5, rtol=1e-5)
    assert images.dtype == texts.dtype == torch.float32


def test_features_equal_transformers_own(clip: Clip, tiny_clip: Path) -> None:
    from transformers import CLIPModel, CLIPTokenizer

    model = CLIPModel.from_pretrained(tiny_clip).eval()
    tokens = CLIPTokenizer.from_pretrained(tiny_clip)(
        ["a painting of stars", "night"], padding="max_length", max_length=77, return_tensors="pt"
    )
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        out = model(pixel_values=torch.randn(1, 3, 32, 32, generator=rng), input_ids=tokens["input_ids"])
    torch.testing.assert_close(
        clip.text_features(["a painting of stars", "night"]), F.normalize(out.text_embeds, dim=-1)
    )


def test_nothing_gives_nothing(clip: Clip) -> None:
    assert clip.image_features([]).shape == (0, clip.width)
    assert clip.text_features([]).shape == (0, clip.width)


def test_pictures_of_any_mode_are_read(clip: Clip) -> None:
    grey, see_through = Image.new("L", (20, 50), 90), Image.new("RGBA", (64, 64), (9, 9, 9, 0))
    assert torch.isfinite(clip.image_features([grey, see_through])).all()


def test_vocabulary_holds_the_words_and_a_reason_for_all_else(clip: Clip) -> None:
    words, dropped = clip.vocabulary()
    wanted = [w for w in WORDS if len(w) >= 3 and w not in FUNCTION_WORDS and w not in MEDIUM_WORDS]
    assert set(wanted) <= set(words)
    assert len(words) == len(set(words))
    reasons = {d.token: d.reason for d in dropped}
    assert reasons["photo"] == "names a medium, not what a picture shows"
    assert reasons["the"] == "a function word"
    assert reasons["<|endoftext|>"] == "marks the start or end of a text"
    assert all(d.reason for d in dropped)
    assert all(w.isascii() and w.isalpha() for w in words)
    assert clip.vocabulary()[0] == words


def test_tokens_that_no_text_ever_held_are_told_from_words(tiny_clip: Path, tmp_path: Path) -> None:
    """What training moves is a word; an ending that keeps its initial embedding is a piece."""
    from transformers import CLIPModel

    folder = tmp_path / "trained"
    shutil.copytree(tiny_clip, folder)
    model = CLIPModel.from_pretrained(folder)
    table = model.text_model.embeddings.token_embedding.weight
    known = Clip.load(str(tiny_clip))
    vocabulary = known._tokenizer.get_vocab()
    pieces = ("ight", "ower", "ench")
    unmet = [vocabulary[f"{piece}</w>"] for piece in pieces if f"{piece}</w>" in vocabulary]
    words = [vocabulary[f"{word}</w>"] for word in WORDS if f"{word}</w>" in vocabulary]
    with torch.no_grad():
        table[[i for i in words if i not in unmet]] *= 3
    model.save_pretrained(folder)
    met, dropped = Clip.load(str(folder)).vocabulary()
    assert set(met) <= set(WORDS)
    assert "stars" in met
    assert any(d.reason.startswith("a piece of longer words") for d in dropped)


def test_default_clip() -> None:
    assert default_clip("Atelier") == "atelier"
    assert default_clip("runwayml/stable-diffusion-v1-5") == "openai/clip-vit-base-patch32"


def _without(tiny_clip: Path, tmp_path: Path, *names: str) -> Path:
    folder = tmp_path / "clip"
    shutil.copytree(tiny_clip, folder)
    for name in names:
        (folder / name).unlink(missing_ok=True)
    return folder


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("config.json",), "no config.json"),
        (("model.safetensors",), "no weights"),
        (("tokenizer.json", "vocab.json"), "no tokenizer"),
        (("preprocessor_config.json", "processor_config.json"), "no image processor"),
    ],
)
def test_a_missing_part_is_named(
    tiny_clip: Path, tmp_path: Path, names: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ClipError, match=message):
        Clip.load(str(_without(tiny_clip, tmp_path, *names)))


def test_other_models_are_refused(tiny_clip: Path, tiny_sd: Path, tmp_path: Path) -> None:
    with pytest.raises(ClipError, match="diffusers pipeline"):
        Clip.load(str(tiny_sd))
    with pytest.raises(ClipError, match=r"text and vision: its config says 'clip_text_model'"):
        Clip.load(str(tiny_sd / "text_encoder"))
    with pytest.raises(ClipError, match="is a file"):
        Clip.load(str(tiny_clip / "config.json"))
    with pytest.raises(ClipError, match=r"no config\.json"):
        Clip.load(str(tmp_path))


def test_broken_files_are_refused(tiny_clip: Path, tmp_path: Path) -> None:
    folder = _without(tiny_clip, tmp_path)
    weights = folder / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: len(data) // 2])
    with pytest.raises(ClipError, match="cannot load CLIP"):
        Clip.load(str(folder))
    weights.write_bytes(data)
    (folder / "config.json").write_text("{")
    with pytest.raises(ClipError, match="cannot be read"):
        Clip.load(str(folder))
    (folder / "config.json").write_text("[]")
    with pytest.raises(ClipError):
        Clip.load(str(folder))


def test_missing_and_wrong_weights_are_refused(tiny_clip: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = _without(tiny_clip, tmp_path)
    weights = load_file(folder / "model.safetensors")
    fewer = {k: v for k, v in weights.items() if "visual_projection" not in k}
    save_file(fewer, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ClipError, match="lacks 1 of its weights"):
        Clip.load(str(folder))
    bad = {k: torch.full_like(v, float("nan")) if "visual_projection" in k else v for k, v in weights.items()}
    save_file(bad, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ClipError, match="not finite"):
        Clip.load(str(folder))
    odd = {k: v[:, :-1].contiguous() if "visual_projection" in k else v for k, v in weights.items()}
    save_file(odd, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ClipError) as caught:
        Clip.load(str(folder))
    assert "\n" not in str(caught.value)


def test_a_tokenizer_of_another_model_is_refused(tiny_clip: Path, tmp_path: Path) -> None:
    folder = _without(tiny_clip, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    assert config["text_config"]["vocab_size"] > 600
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    key = next(k for k in weights if k.endswith("token_embedding.weight"))
    weights[key] = weights[key][:600].clone()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config["text_config"].update(vocab_size=600, bos_token_id=1, eos_token_id=2, pad_token_id=2)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ClipError, match="knows 600 tokens"):
        Clip.load(str(folder))


@pytest.mark.parametrize("source", ["/nowhere/clip", "./clip", "a/b/c", "", "-x", "two words"])
def test_places_that_are_none(source: str) -> None:
    with pytest.raises(ClipError, match="no CLIP model at"):
        Clip.load(source)


def test_a_hub_id_without_a_network_is_one_sentence() -> None:
    with pytest.raises(ClipError) as caught:
        Clip.load("nobody/no-such-clip")
    assert "nobody/no-such-clip" in str(caught.value)
    assert "\n" not in str(caught.value)
