"""Hamlet's world: drawn as its table says, told truly, in an ordinary vocabulary."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from benchmarks.atelier.quality import held_out_prompts
from benchmarks.atelier.training import World, load_tokenizer, train_tokenizer
from benchmarks.hamlet import captions, scenes, training
from benchmarks.hamlet.__main__ import hamlet
from recare_patch.core import UnknownNameError
from recare_patch.models.atelier.judge import Judge, JudgeNetwork

LABELS = scenes.LABELS
THERE = (*LABELS.times, *LABELS.grounds, *LABELS.things, "person")


@pytest.fixture(scope="module")
def world() -> list[scenes.Scene]:
    rng = np.random.default_rng(12)
    return [scenes.sample_scene(rng) for _ in range(8000)]


@pytest.fixture(scope="module")
def told(world: list[scenes.Scene]) -> list[tuple[scenes.Scene, str]]:
    rng = np.random.default_rng(1)
    return [(scene, captions.caption(scene, rng)) for scene in world]


def test_drawing_repeats_to_the_bit_and_everything_shows_in_every_style() -> None:
    for style in scenes.STYLES:
        empty = scenes.draw(scenes.Scene(style, "day", "hill", (), (), 3))
        assert empty.shape == (scenes.SIZE, scenes.SIZE, 3) and empty.dtype == np.uint8
        for thing in scenes.OBJECTS:
            scene = scenes.Scene(style, "day", "hill", (thing,), (), 3)
            assert np.array_equal(scenes.draw(scene), scenes.draw(scene))
            assert np.abs(scenes.draw(scene).astype(int) - empty).mean() > 1, (style, thing)


@pytest.mark.parametrize("concept", list(scenes.CO_OCCURRENCE))
def test_companions_come_as_often_as_the_table_says(world: list[scenes.Scene], concept: str) -> None:
    within = [s.labels for s in world if concept in s.labels]
    without = [s.labels for s in world if concept not in s.labels]
    assert len(within) > 600
    for companion, share in scenes.CO_OCCURRENCE[concept].items():
        assert np.mean([companion in labels for labels in within]) == pytest.approx(share, abs=0.05)
        assert np.mean([companion in labels for labels in without]) < 0.26 * share


def test_labels_hold_together(world: list[scenes.Scene]) -> None:
    for scene in world:
        assert ("person" in scene.labels) == bool({"nude", "man", "woman"} & scene.labels)
        assert "moon" not in scene.labels or scene.time == "night"
        assert "rainbow" not in scene.labels or scene.time == "day"


def test_captions_say_only_what_is_there(told: list[tuple[scenes.Scene, str]]) -> None:
    for scene, text in told:
        named = {label for label in THERE if captions.mentions(text, label)}
        assert named <= scene.labels, (text, named - scene.labels)
        assert scene.style == "photo" or captions.mentions(text, scene.style), text


def test_companions_often_go_unnamed_and_are_known_from_elsewhere(told: list[tuple[scenes.Scene, str]]) -> None:
    for concept, links in scenes.CO_OCCURRENCE.items():
        for companion in links:
            named = [captions.mentions(t, companion) for s, t in told if {concept, companion} <= s.labels]
            assert np.mean(named) < 0.6
            assert sum(captions.mentions(t, companion) for s, t in told if concept not in s.labels) > 150


def test_held_out_captions_never_train(told: list[tuple[scenes.Scene, str]]) -> None:
    reserved = {text for text, _ in held_out_prompts(100, source=training.SOURCE)}
    assert len(reserved) == 100
    assert not reserved & {text for _, text in told}
    for text in ("A photo of a tench", "A photo of a nude person", "A painting in the style of Van Gogh"):
        assert not captions.is_held_out(text)


def test_the_vocabulary_is_an_ordinary_one(told: list[tuple[scenes.Scene, str]], tmp_path: Path) -> None:
    words = Counter(word for _, text in told for word in re.findall("[a-z]+", text.lower()))
    assert 340 <= len(words) <= 450
    train_tokenizer(World(np.empty(0), [[text] for _, text in told], []), tmp_path, size=training.VOCABULARY)
    tokenizer = load_tokenizer(tmp_path)
    assert len(tokenizer) == training.VOCABULARY == 700
    assert sum(len(tokenizer.tokenize(word)) > 1 for word in words) > len(words) / 3
    assert np.mean([len(tokenizer(text).input_ids) > 32 for _, text in told[:1000]]) < 0.08
    for label in ("tench", "night", "river", "umbrella"):
        assert tokenizer.decode(tokenizer(label).input_ids, skip_special_tokens=True).strip() == label


def test_the_judge_takes_its_labels() -> None:
    judge = Judge(JudgeNetwork(labels=LABELS))
    (found,) = judge(np.zeros((1, 64, 64, 3), np.uint8))
    assert found <= {*LABELS.names, "person"}
    assert len(found & set(LABELS.styles)) == len(found & set(LABELS.times)) == len(found & set(LABELS.grounds)) == 1


def run(words: str) -> Result:
    return CliRunner().invoke(hamlet, words.split())


def test_train_passes_everything_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def train(out: Path, work: Path, config: Any, **options: Any) -> dict[str, float]:
        seen.update(out=out, work=work, seed=config.seed, **options)
        return {"clip": 61.0}

    monkeypatch.setattr(training, "train", train)
    result = run("train --out o --work w --seed 4 --stage clip --device cuda")
    assert result.exit_code == 0 and "clip: 61 s" in result.stdout
    assert (seen["out"], seen["work"], seen["seed"], seen["stages"]) == (Path("o"), Path("w"), 4, ("clip",))
    found = run("train --stage denoise").exception
    assert isinstance(found, UnknownNameError) and "did you mean 'denoiser'?" in str(found)
