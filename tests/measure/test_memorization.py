"""The memorization score: its arithmetic, and that what was recovered once is not recovered again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from recare_patch.core import EvaluationError
from recare_patch.measure.memorization import Recovery, memorization_score, recover, text_feature
from recare_patch.measure.pictures import PictureCache, Studio
from recare_patch.measure.suites import Suite
from recare_patch.models import PLACEHOLDER, BaseModel
from recare_patch.patch import Patch
from recare_patch.recipe import Concept
from tests.measure.making import SUITE, make_patch

CONCEPT = Concept(text="Van Gogh", kind="style")
SMALL = Recovery(images=3, steps=2, batch_size=2, vectors=2, init_word="art")


def test_a_texts_feature_is_the_encoders_pooled_one(base: BaseModel) -> None:
    pipeline = base.pipeline
    for text in ("van gogh", "a painting of stars", "xq"):
        ids = pipeline.tokenizer(
            text, padding="max_length", max_length=pipeline.tokenizer.model_max_length, return_tensors="pt"
        )
        with torch.no_grad():
            pooled = pipeline.text_encoder(ids.input_ids).pooler_output[0]
        assert torch.allclose(text_feature(base, text), pooled / pooled.norm(), atol=1e-5)
    with pytest.raises(EvaluationError, match="is longer than the 77 tokens"):
        text_feature(base, "a " * 100)


def test_the_names_own_tokens_score_one(base: BaseModel) -> None:
    own = base.token_table()[torch.tensor(base.token_ids(CONCEPT.text))]
    assert memorization_score(base, CONCEPT, own) == pytest.approx(1.0, abs=1e-5)
    assert -1 <= memorization_score(base, CONCEPT, base.word_vector("car")[None]) < 0.999
    assert text_feature(base, f"a {PLACEHOLDER} cat", own).shape == text_feature(base, "a cat").shape


def test_a_token_is_recovered_once(base: BaseModel, tmp_path: Path) -> None:
    patch = Patch.load(make_patch(base, tmp_path / "patch"))
    suite, cache = Suite(**{**SUITE, "steps": 1}), PictureCache(tmp_path / "cache")

    def run(patches: list[tuple[Patch, float]]) -> tuple[torch.Tensor, int]:
        before = base.counter.total
        found = recover(Studio(base, cache=cache), suite, patches, SMALL)
        return found, base.counter.total - before

    first, spent = run([(patch, 1.0)])
    assert first.shape == (2, base.token_width) and spent > 0
    again, nothing = run([(patch, 1.0)])
    assert torch.equal(again, first) and nothing == 0
    plain, less = run([])
    assert not torch.equal(plain, first) and 0 < less < spent
    # A damaged file counts as absent.
    for file in cache.folder.rglob("*.safetensors"):
        file.write_bytes(b"damaged")
    assert torch.equal(run([(patch, 1.0)])[0], first)
    # Nothing of the patch stays in the base.
    assert not hasattr(base.denoiser, "peft_config")
