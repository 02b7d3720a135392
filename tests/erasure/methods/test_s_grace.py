"""S-GRACE: an attack that stays in its box, and an edit that is its four terms."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from recare_patch.core.errors import RecipeError
from recare_patch.erasure.methods.s_grace import SGrace
from recare_patch.erasure.prepare import read_words
from recare_patch.models import BaseModel, named_tuner_layers
from recare_patch.models import lora as adapters
from recare_patch.models.loading import load_base
from tests.erasure.methods.making import contexts_of, disturb, make_recipe


@pytest.fixture
def base(tiny_sd: Path) -> BaseModel:
    return load_base(tiny_sd, device="cpu")


def _method(base: BaseModel, clip: Path, work: Path, **changes: object) -> SGrace:
    recipe = make_recipe("s-grace", **{"erase.batch_size": 5, **changes})
    (context,) = contexts_of(recipe, base, clip, work)
    return SGrace(context)


def _sequences(found: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    return [found[f"vectors.{k}"] for k in range(len(found) - 1)]


def test_the_projection_projects(base: BaseModel, tiny_clip: Path, tmp_path: Path) -> None:
    """Ten steps would leave a box of four; every component stays in it, and many reach its faces."""
    method = _method(
        base,
        tiny_clip,
        tmp_path,
        **{"s_grace.attack_steps": 10, "s_grace.attack_rate": 0.01, "s_grace.attack_box": 4},
    )
    start = _sequences(_still(base, tiny_clip, tmp_path / "still").attack(torch.Generator().manual_seed(3)))
    moved = _sequences(method.attack(torch.Generator().manual_seed(3)))
    assert len(moved) == 5 and len(moved[0]) == len(base.token_ids("A painting in the style of Van Gogh"))
    furthest = [(a - b).abs().max().item() for a, b in zip(moved, start, strict=True)]
    assert all(0.039 < one <= 0.04 + 1e-6 for one in furthest)


def _still(base: BaseModel, clip: Path, work: Path) -> SGrace:
    """The same without an attack: what the sequences are at first."""
    adapters.detach(base.components["text_encoder"])
    return _method(base, clip, work, **{"s_grace.attack_steps": 0})


def test_an_attack_predicts_the_concept_better(base: BaseModel, tiny_clip: Path, tmp_path: Path) -> None:
    """Against the noise-prediction term alone, at the very states that the attack drew."""
    from recare_patch.models import sample_timesteps

    changes = {"s_grace.attack_similarity": 0, "s_grace.attack_steps": 10, "s_grace.attack_rate": 0.02}
    method = _method(base, tiny_clip, tmp_path, **changes)
    moved = _sequences(method.attack(torch.Generator().manual_seed(3)))
    generator = torch.Generator().manual_seed(3)
    start = method._start(generator)
    picks = torch.randint(0, len(method.latents), (5,), generator=generator)
    times = sample_timesteps(5, 750, 950, generator)
    noise = torch.randn(method.latents[picks].shape, generator=generator)
    states = base.add_noise(method.latents[picks], noise, times)
    with torch.no_grad():
        before, after = (
            F.mse_loss(base.denoise(states, times, base.encode_token_vectors(rows)), noise).item()
            for rows in (start, moved)
        )
    assert after < before


def test_the_edit_is_its_four_terms(base: BaseModel, tiny_clip: Path, tmp_path: Path) -> None:
    method = _method(base, tiny_clip, tmp_path, **{"erase.retain_weight": 3.0, "s_grace.attack_steps": 1})
    found = method.attack(torch.Generator().manual_seed(0))
    disturb(base)
    loss = method.edit(found, torch.Generator().manual_seed(1))

    generator = torch.Generator().manual_seed(1)
    rows = 2
    picks = torch.randint(0, len(method.retained), (rows,), generator=generator)
    guarded = torch.randint(0, method.context.guarded, (rows,), generator=generator)
    picks = torch.where(torch.rand(rows, generator=generator) < 0.5, guarded, picks)
    with torch.no_grad():
        encoder = base.components["text_encoder"]
        read = [base.encode_token_vectors([row]).prompt_embeds[0] for row in _sequences(found)]
        features = torch.stack(
            [F.normalize(one[len(row) + 1], dim=0) for one, row in zip(read, _sequences(found), strict=True)]
        )
        with adapters.off(encoder):
            named = base.encode_prompts(["A painting in the style of Van Gogh"]).prompt_embeds[0]
            kept = base.encode_prompts([method.context.retained_prompts[k] for k in picks.tolist()])
        end = len(base.token_ids("A painting in the style of Van Gogh")) + 1
        concept = F.normalize(named[end], dim=0)
        now = base.encode_prompts([method.context.retained_prompts[k] for k in picks.tolist()])
        size = sum(
            float((layer.scaling["recare"] * layer.lora_B["recare"].weight @ layer.lora_A["recare"].weight)
                  .abs().mean())
            for _, layer in named_tuner_layers({"text_encoder": encoder})
        )  # fmt: skip
        expected = (
            1
            + (features @ concept).mean()
            + 0.2 * (1 - (features * found["features"]).sum(1).mean())
            + 0.2 * size
            + 3.0 * F.mse_loss(now.prompt_embeds, kept.prompt_embeds)
        )
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    loss.backward()
    assert all(p.grad is not None for p in encoder.parameters() if p.requires_grad)
    assert all(p.grad is None for p in base.denoiser.parameters())


def test_a_replacement_is_read_in_all_places(base: BaseModel, tiny_clip: Path, tmp_path: Path) -> None:
    method = _method(base, tiny_clip, tmp_path, replace_with="Monet")
    with adapters.off(*base.components.values()):
        wanted = base.encode_prompts(["A painting in the style of Monet", "A painting by Monet"])
    torch.testing.assert_close(method.wanted.prompt_embeds[:2], wanted.prompt_embeds, atol=1e-5, rtol=1e-4)
    found = method.attack(torch.Generator().manual_seed(0))
    assert torch.isfinite(method.edit(found, torch.Generator().manual_seed(1)))


def test_an_attack_seeks_the_concept_whatever_replaces_it(
    base: BaseModel, tiny_clip: Path, tmp_path: Path
) -> None:
    found = []
    for other in (None, "Monet"):
        changes = {"s_grace.attack_similarity": 100.0, "s_grace.attack_steps": 3, "replace_with": other}
        method = _method(base, tiny_clip, tmp_path / str(other), **changes)
        found.append(_sequences(method.attack(torch.Generator().manual_seed(3))))
        adapters.detach(base.components["text_encoder"])
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def test_the_pooled_text_is_turned_away_too(tiny_sdxl: Path, tiny_clip: Path, tmp_path: Path) -> None:
    """SDXL's denoiser reads it beside the prompt, from a layer that the prompt's states do not pass."""
    base = load_base(tiny_sdxl, device="cpu")
    method = _method(base, tiny_clip, tmp_path, **{"erase.retain_weight": 0, "s_grace.parameter_weight": 0})
    found = method.attack(torch.Generator().manual_seed(0))
    torch.testing.assert_close(found["features"].norm(dim=1), torch.ones(5))
    method.edit(found, torch.Generator().manual_seed(1)).backward()
    last = [
        p.grad
        for name, p in base.components["text_encoder_2"].named_parameters()
        if "layers.1." in name and "lora_B" in name
    ]
    assert last and all(grad is not None and grad.abs().sum() > 0 for grad in last)


def test_no_more_words_than_published(
    base: BaseModel, tiny_clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recare_patch.erasure.prepare.RELATED_WORDS", 1)
    related = _method(base, tiny_clip, tmp_path).context.related
    assert related[0] == "Van Gogh" and len(related) <= 2


def test_every_sequence_names_the_concept(base: BaseModel, tiny_clip: Path, tmp_path: Path) -> None:
    words = tmp_path / "words.yaml"
    words.write_text("related: [night]\nunrelated: [boat]\n")
    method = _method(base, tiny_clip, tmp_path, **{"s_grace.words": str(words), "s_grace.attack_steps": 0})
    table, ids = base.token_table(), base.token_ids("Van Gogh")
    longest = _sequences(method.attack(torch.Generator().manual_seed(0)))[-1]
    assert torch.equal(longest[: len(ids)], table[ids])
    assert all(torch.equal(row, table[base.token_ids("night")[0]]) for row in longest[len(ids) :])


def test_a_word_list_of_ones_own(base: BaseModel, tiny_clip: Path, tmp_path: Path) -> None:
    words = tmp_path / "words.yaml"
    words.write_text("related: [van gogh, vincent]\nunrelated: [boat, cat]\n")
    method = _method(base, tiny_clip, tmp_path, **{"s_grace.words": str(words)})
    assert method.context.related == ("van gogh", "vincent")
    assert set(method.context.retained_prompts) == {
        f"{form} {word}" for form in ("A painting of", "A", "A photo of") for word in ("boat", "cat")
    }


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
