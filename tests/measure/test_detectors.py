"""Detectors: each says what it sees behind one interface, and how to get what it lacks."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from recare_patch.careset import Clip
from recare_patch.core import RecarePatchError, UnknownNameError
from recare_patch.measure import DETECTORS, load_detector
from recare_patch.measure.judges import can_tell
from tests.measure.making import noise


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random image classifier of four classes."""
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    folder = tmp_path_factory.mktemp("classifier") / "vit"
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    classes = dict(enumerate(("tench, Tinca tinca", "goldfish", "vincent-van-gogh", "Brad_Pitt")))
    labels = {"id2label": classes, "label2id": {text: index for index, text in classes.items()}}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, **small, **labels))
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("nudnet-6", {}, "did you mean 'nudenet-6'"),
        ("atelier-judge", {"threshold": 1}, "atelier-judge does not take these options"),
        ("clip", {"labels": ["cat"]}, "at least two labels"),
        ("clip", {"clip": "./nowhere"}, "nowhere"),
        ("image-classifier", {}, "needs a source"),
        ("image-classifier", {"source": "./nowhere"}, "cannot load an image classifier from './nowhere'"),
        ("image-classifier", {"source": "x", "top_k": 0}, "top_k must be at least 1"),
        ("image-classifier", {"source": "x", "min_score": 1}, "min_score must be at least 0 and below 1"),
        ("vision-language", {}, "vision-language needs a source: the folder or hub id of a transformers image-text"),
        ("vision-language", {"source": "./nowhere"}, "cannot load an image-text-to-text model from './nowhere'"),
        ("vision-language", {"source": "x", "question": "Is it?"}, "has no {} for what is asked about"),
        ("vision-language", {"source": "x", "threshold": 1}, "threshold must lie between 0 and 1"),
        ("ensemble", {}, "at least two detectors, got 0"),
        ("ensemble", {"members": [{"detector": "clp"}, {"detector": "clip"}]}, "did you mean 'clip'"),
        ("ensemble", {"members": [{}, {}], "vote": "most"}, "unknown vote 'most'"),
        ("nudenet-6", {}, r'nudenet-6 needs .* pip install "recare-patch\[eval\]"'),
    ],
)
def test_what_cannot_be_loaded_says_why(
    monkeypatch: pytest.MonkeyPatch, name: str, options: dict[str, Any], told: str
) -> None:
    known = ("atelier-judge", "clip", "ensemble", "image-classifier", "nudenet-6", "nudenet-9", "vision-language")
    assert DETECTORS.names() == known
    monkeypatch.setitem(sys.modules, "nudenet", None)
    with pytest.raises(RecarePatchError, match=told):
        load_detector(name, **options)


def test_the_judge_names_what_scenes_show() -> None:
    from benchmarks.atelier.scenes import Scene, draw

    detector = load_detector("atelier-judge")
    scenes = [
        Scene("photo", "day", "meadow", ("cat",), ("sun",), 3),
        Scene("van gogh", "night", "wheat field", ("house",), ("stars",), 4),
    ]
    images = [draw(scene) for scene in scenes]
    images = [one if isinstance(one, Image.Image) else Image.fromarray(one) for one in images]
    assert detector.rate(images, "Van Gogh") == [False, True]
    assert detector.rate(images, "cat") == [True, False]
    assert detector.rate(images, "nudity") == detector.rate(images, "nude") == [False, False]
    assert detector.rate([], "cat") == []
    assert can_tell(detector, "STARS") and not can_tell(detector, "giraffe")
    with pytest.raises(UnknownNameError, match=r"detector atelier-judge 'sunflowr'.*'sunflower'"):
        detector.rate(images, "sunflowr")


def test_clip_takes_the_nearest_label(tiny_clip: Path) -> None:
    clip, images = Clip.load(str(tiny_clip)), noise(6)
    open_ended = load_detector("clip", clip=clip)
    assert open_ended.labels() == () and can_tell(open_ended, "anything")
    assert len(open_ended.rate(images, "cat")) == 6
    labels = ["cat", "dog", "van gogh"]
    detector = load_detector("clip", clip=str(tiny_clip), labels=labels)
    found = [detector.rate(images, label) for label in labels]
    # Every picture is nearest to one label, and to one alone.
    assert [sum(row) for row in zip(*found, strict=True)] == [1] * 6
    assert detector.rate(images, " CAT ") == found[0]
    with pytest.raises(UnknownNameError, match="did you mean 'dog'"):
        detector.rate(images, "dogs")


def test_a_classifier_answers_to_each_synonym(classifier: Path) -> None:
    detector, images = load_detector("image-classifier", source=str(classifier)), noise(8)
    found = {label: detector.rate(images, label) for label in ("tench", "goldfish", "vincent-van-gogh", "Brad Pitt")}
    assert [sum(row) for row in zip(*found.values(), strict=True)] == [1] * 8
    for synonym in ("Tinca tinca", "tench, tinca tinca"):
        assert detector.rate(images, synonym) == found["tench"]
    wide = load_detector("image-classifier", source=str(classifier), top_k=4, batch_size=3)
    assert wide.rate(images, "tench") == [True] * 8
    assert detector.rate([], "tench") == []
    with pytest.raises(UnknownNameError, match="did you mean 'tench'"):
        detector.rate(images, "tensh")
    # One of celebrities always names somebody: below a probability, nobody. "Brad_Pitt" answers to "Brad Pitt" too.
    sure = load_detector("image-classifier", source=str(classifier), top_k=4, min_score=0.99)
    assert sure.rate(images, "Tinca tinca") == [False] * 8
    assert can_tell(detector, "brad pitt") and can_tell(detector, "Brad_Pitt")


@pytest.mark.parametrize(
    ("found", "six", "nine"),
    [
        ([], False, False),
        ([("FEMALE_BREAST_EXPOSED", 0.75)], True, True),
        ([("FEMALE_BREAST_EXPOSED", 0.7499)], False, True),
        ([("BELLY_EXPOSED", 0.9)], False, True),
        ([("FEET_EXPOSED", 0.45)], False, False),
        ([("FACE_FEMALE", 0.99), ("FEMALE_BREAST_COVERED", 0.99)], False, False),
    ],
)
def test_the_two_readings_of_nudenet(
    monkeypatch: pytest.MonkeyPatch, found: list[tuple[str, float]], six: bool, nine: bool
) -> None:
    seen: list[np.ndarray] = []

    class NudeDetector:
        def detect(self, array: np.ndarray) -> list[dict[str, Any]]:
            seen.append(array)
            return [{"class": name, "score": score, "box": [0, 0, 1, 1]} for name, score in found]

    fake = ModuleType("nudenet")
    fake.NudeDetector = NudeDetector  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "nudenet", fake)
    image = Image.new("RGB", (4, 4), (1, 2, 3))
    assert load_detector("nudenet-6").rate([image], "nudity") == [six]
    assert load_detector("nudenet-9").rate([image], "nude") == [nine]
    # As OpenCV reads a file: blue first.
    assert seen[0].flags["C_CONTIGUOUS"] and seen[0][0, 0].tolist() == [3, 2, 1]
    with pytest.raises(UnknownNameError, match="nudity"):
        load_detector("nudenet-6").rate([image], "person")


def test_nudenet_itself_finds_nothing_in_noise() -> None:
    pytest.importorskip("nudenet")
    for name in ("nudenet-6", "nudenet-9"):
        assert load_detector(name).rate(noise(2, size=64), "nudity") == [False, False]


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random vision-language model, which knows the words of a question."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    folder = tmp_path_factory.mktemp("asked") / "tiny-llava"
    texts = (
        "<unk>",
        "<pad>",
        "<s>",
        "</s>",
        "<image>",
        *["Does", "this", "picture", "show", "?", ".", "Answer", "yes", "or", "no", "cat", "Yes", "No"],
    )
    words = Tokenizer(models.WordLevel({text: place for place, text in enumerate(texts)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    special = {"unk_token": "<unk>", "pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **special, additional_special_tokens=["<image>"])
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=16, patch_size=8, projection_dim=16, **small),
        text_config=LlamaConfig(vocab_size=len(texts), bos_token_id=2, eos_token_id=3, pad_token_id=1, **small),
        image_token_index=4,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration(config)
    model.save_pretrained(folder)
    pixels = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    LlavaProcessor(
        pixels,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    return folder


def test_a_vision_language_model_answers_yes_or_no(asked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    detector, images = load_detector("vision-language", source=str(asked), batch_size=3), noise(7, size=24)
    assert detector.labels() == () and can_tell(detector, "anything") and "tiny-llava" in detector.name
    found = detector.rate(images, "cat")
    assert len(found) == 7 and detector.rate([], "cat") == []
    # The same alone, or in batches of another size: padding says nothing.
    assert [detector.rate([image], "cat")[0] for image in images] == found
    lenient, strict = (load_detector("vision-language", source=str(asked), threshold=k) for k in (1e-6, 1 - 1e-6))
    assert lenient.rate(images, "cat") == [True] * 7 and strict.rate(images, "cat") == [False] * 7

    class Answers:
        """Known answers, in place of the model's own: yes to bright pictures, in several spellings."""

        device, dtype = torch.device("cpu"), torch.float32

        def generate(self, pixel_values: torch.Tensor, **_: Any) -> Any:
            bright = pixel_values.mean((1, 2, 3)) > 0
            logits = torch.full((len(bright), 20), -9.0)
            ids = {text: detector._tokenizer.convert_tokens_to_ids(text) for text in ("yes", "Yes", "no", "No", "cat")}
            # What is likeliest of all is no answer; yes is spelt two ways, neither of which is likelier than no.
            logits[:, ids["cat"]] = 5.0
            logits[:, ids["no"]] = 1.0
            for text in ("yes", "Yes"):
                logits[bright, ids[text]] = 0.8
            return type("Made", (), {"logits": [logits]})

    monkeypatch.setattr(detector, "_model", Answers())
    grey = [Image.new("RGB", (24, 24), (value,) * 3) for value in (250, 5, 240, 0)]
    assert detector.rate(grey, "cat") == [True, False, True, False]


class Fixed:
    """Says what it was told to."""

    def __init__(self, name: str, answers: list[bool], known: tuple[str, ...] = ()) -> None:
        self.name, self.answers, self.known, self.asked = name, answers, known, list[str]()

    def labels(self) -> tuple[str, ...]:
        return self.known

    def rate(self, images: Any, label: str) -> list[bool]:
        self.asked.append(label)
        return self.answers[: len(images)]


@pytest.mark.parametrize(
    ("vote", "says"),
    [
        ("majority", [True, False, False, True]),
        ("any", [True, True, False, True]),
        ("all", [True, False, False, False]),
    ],
)
def test_an_ensemble_votes_and_says_where_it_agrees(vote: str, says: list[bool]) -> None:
    answers = ([True, True, False, True], [True, False, False, True], [True, False, False, False])
    members = [
        Fixed(name, list(one), known)
        for name, one, known in zip("abc", answers, ((), ("cat", "dog"), ("cat",)), strict=True)
    ]
    detector = load_detector("ensemble", members=members, vote=vote)
    assert detector.labels() == ("cat",) and detector.name == f"ensemble (a, b, c; {vote})"
    assert detector.rate(noise(4), "Cat") == says
    assert detector.unanimous == [True, False, True, False]  # type: ignore[attr-defined]
    with pytest.raises(UnknownNameError, match="label of the detector ensemble"):
        detector.rate(noise(1), "dog")


def test_an_ensemble_of_a_suite_asks_each_by_its_own_name(tiny_clip: Path) -> None:
    from recare_patch.measure.judges import suite_detector, told_options
    from recare_patch.measure.suites import load_suite

    suite = load_suite("van-gogh-atelier").with_detector(f"ensemble:atelier-judge+clip:{tiny_clip}=a van gogh")
    assert suite.detector_options["members"] == [
        {"detector": "atelier-judge"},
        {"clip": str(tiny_clip), "detector": "clip", "label": "a van gogh"},
    ]
    detector = suite_detector(suite, lambda: pytest.fail("a member has a CLIP of its own"))
    assert detector.labels() == (suite.label,) and len(detector.rate(noise(3, size=64), suite.label)) == 3
    assert str(tiny_clip) not in str(told_options(suite.detector_options))
    with pytest.raises(RecarePatchError, match="takes no source"):
        suite.with_detector("ensemble:atelier-judge:x+clip")
