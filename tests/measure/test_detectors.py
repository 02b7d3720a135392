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
    """A random image classifier of three classes."""
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    folder = tmp_path_factory.mktemp("classifier") / "vit"
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    classes = dict(enumerate(("tench, Tinca tinca", "goldfish", "vincent-van-gogh")))
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
        ("nudenet-6", {}, r'nudenet-6 needs .* pip install "recare-patch\[eval\]"'),
    ],
)
def test_what_cannot_be_loaded_says_why(
    monkeypatch: pytest.MonkeyPatch, name: str, options: dict[str, Any], told: str
) -> None:
    assert DETECTORS.names() == ("atelier-judge", "clip", "image-classifier", "nudenet-6", "nudenet-9")
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
    found = {label: detector.rate(images, label) for label in ("tench", "goldfish", "vincent-van-gogh")}
    assert [sum(row) for row in zip(*found.values(), strict=True)] == [1] * 8
    for synonym in ("Tinca tinca", "tench, tinca tinca"):
        assert detector.rate(images, synonym) == found["tench"]
    wide = load_detector("image-classifier", source=str(classifier), top_k=3, batch_size=3)
    assert wide.rate(images, "tench") == [True] * 8
    assert detector.rate([], "tench") == []
    with pytest.raises(UnknownNameError, match="did you mean 'tench'"):
        detector.rate(images, "tensh")


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
