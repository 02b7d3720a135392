"""S-GRACE: an attack that stays in its box, and an edit that is its four terms."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from recare_patch.core import RecipeError
from recare_patch.erasure.methods.s_grace import read_words
from recare_patch.models import BaseModel, load_base, named_tuner_layers, off, sample_timesteps
from tests.erasure.making import disturb

PROMPT = "A painting in the style of Van Gogh"
Make = Callable[..., Any]


@pytest.fixture
def make(method: Make) -> Make:
    """The method with five sequences, and some of its own options."""

    def make(own: dict[str, Any] | None = None, **changes: Any) -> Any:
        options = {f"s_grace.{key}": value for key, value in (own or {}).items()}
        return method("s-grace", **{"erase.batch_size": 5, **options, **changes})

    return make


def _attack(method: Any, seed: int = 3) -> list[Tensor]:
    found = method.attack(torch.Generator().manual_seed(seed))
    return [found[f"vectors.{k}"] for k in range(len(found) - 1)]


def test_the_projection_projects(base: BaseModel, make: Make) -> None:
    """Ten steps would leave a box of four; every component stays in it, and many reach its faces."""
    # Without an attack: what the sequences are at first.
    start = _attack(make({"attack_steps": 0}))
    moved = _attack(make({"attack_steps": 10, "attack_rate": 0.01, "attack_box": 4}))
    assert len(moved) == 5 and len(moved[0]) == len(base.token_ids(PROMPT))
    furthest = [(a - b).abs().max().item() for a, b in zip(moved, start, strict=True)]
    assert all(0.039 < one <= 0.04 + 1e-6 for one in furthest)


def test_an_attack_predicts_the_concept_better(base: BaseModel, make: Make) -> None:
    """Against the noise-prediction term alone, at the very states that the attack drew."""
    method = make({"attack_similarity": 0, "attack_steps": 10, "attack_rate": 0.02})
    moved, generator = _attack(method), torch.Generator().manual_seed(3)
    start = method._start(generator)
    clean = method.latents[torch.randint(0, len(method.latents), (5,), generator=generator)]
    times = sample_timesteps(5, 750, 950, generator)
    noise = torch.randn(clean.shape, generator=generator)
    states = base.add_noise(clean, noise, times)
    with torch.no_grad():
        before, after = (
            F.mse_loss(base.denoise(states, times, base.encode_token_vectors(rows)), noise).item()
            for rows in (start, moved)
        )
    assert after < before


def test_the_edit_is_its_four_terms(base: BaseModel, make: Make) -> None:
    method, generator = make({"attack_steps": 1}, **{"erase.retain_weight": 3.0}), torch.Generator()
    found, held = method.attack(generator.manual_seed(0)), method.context.retained
    disturb(base)
    loss = method.edit(found, generator.manual_seed(1))

    generator.manual_seed(1)
    picks = torch.randint(0, len(held.prompts), (2,), generator=generator)
    guarded = torch.randint(0, held.guarded, (2,), generator=generator)
    picks = torch.where(torch.rand(2, generator=generator) < 0.5, guarded, picks)
    texts, rows = [held.prompts[k] for k in picks.tolist()], [found[f"vectors.{k}"] for k in range(5)]
    with torch.no_grad():
        read = [base.encode_token_vectors([row]).prompt_embeds[0] for row in rows]
        features = torch.stack([F.normalize(one[len(row) + 1], dim=0) for one, row in zip(read, rows, strict=True)])
        with off(*base.components.values()):
            named, kept = (base.encode_prompts(one).prompt_embeds for one in ([PROMPT], texts))
        concept = F.normalize(named[0, len(base.token_ids(PROMPT)) + 1], dim=0)
        size = 0.0
        for _, layer in named_tuner_layers(base.components):
            update = layer.lora_B["recare"].weight @ layer.lora_A["recare"].weight
            size += (layer.scaling["recare"] * update).abs().mean().item()
        expected = (
            1
            + (features @ concept).mean()
            + 0.2 * (1 - (features * found["features"]).sum(1).mean())
            + 0.2 * size
            + 3.0 * F.mse_loss(base.encode_prompts(texts).prompt_embeds, kept)
        )
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    loss.backward()
    assert all(p.grad is not None for p in base.components["text_encoder"].parameters() if p.requires_grad)
    assert all(p.grad is None for p in base.denoiser.parameters())


def test_a_replacement_is_read_in_all_places(base: BaseModel, make: Make) -> None:
    method = make(replace_with="Monet")
    with off(*base.components.values()):
        wanted = base.encode_prompts(["A painting in the style of Monet", "A painting by Monet"])
    torch.testing.assert_close(method.wanted.prompt_embeds[:2], wanted.prompt_embeds, atol=1e-5, rtol=1e-4)
    found = method.attack(torch.Generator().manual_seed(0))
    assert torch.isfinite(method.edit(found, torch.Generator().manual_seed(1)))


def test_an_attack_seeks_the_concept_whatever_replaces_it(make: Make) -> None:
    own = {"attack_similarity": 100.0, "attack_steps": 3}
    found = [_attack(make(own, replace_with=other)) for other in (None, "Monet")]
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def test_the_pooled_text_is_turned_away_too(tiny_sdxl: Path, make: Make) -> None:
    """SDXL's denoiser reads it beside the prompt, from a layer that the prompt's states do not pass."""
    base = load_base(tiny_sdxl, device="cpu")
    method = make({"parameter_weight": 0}, on=base, **{"erase.retain_weight": 0})
    found = method.attack(torch.Generator().manual_seed(0))
    torch.testing.assert_close(found["features"].norm(dim=1), torch.ones(5))
    method.edit(found, torch.Generator().manual_seed(1)).backward()
    weights = base.components["text_encoder_2"].named_parameters()
    last = [p.grad for name, p in weights if "layers.1." in name and "lora_B" in name]
    assert last and all(grad is not None and grad.abs().sum() > 0 for grad in last)


def test_no_more_words_than_published(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recare_patch.erasure.prepare.RELATED_WORDS", 1)
    related = make().context.related
    assert related[0] == "Van Gogh" and len(related) <= 2


def test_a_word_list_of_ones_own(base: BaseModel, make: Make, tmp_path: Path) -> None:
    file = tmp_path / "words.yaml"
    file.write_text("related: [night]\nunrelated: [boat, cat]\n")
    method = make({"words": str(file), "attack_steps": 0})
    assert method.context.related == ("night",)
    forms = ("A painting of", "A", "A photo of")
    assert set(method.context.retained.prompts) == {f"{form} {word}" for form in forms for word in ("boat", "cat")}
    # Every sequence names the concept.
    table, ids, longest = base.token_table(), base.token_ids("Van Gogh"), _attack(method, 0)[-1]
    assert torch.equal(longest[: len(ids)], table[ids])
    assert all(torch.equal(row, table[base.token_ids("night")[0]]) for row in longest[len(ids) :])


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "cannot read the word list"),
        ("related: [a]", "needs a list of words under 'unrelated'"),
        ("related: []\nunrelated: [b]", "under 'related'"),
        ("related: [a]\nunrelated: [1]", "under 'unrelated'"),
        ("related: [a]\nunrelated: [b]\nother: [c]", "has a key 'other'"),
        ("- a", "must be a mapping"),
    ],
)
def test_a_word_list_that_is_none(tmp_path: Path, text: str | None, sentence: str) -> None:
    file = tmp_path / "words.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(RecipeError, match=sentence):
        read_words(str(file))
