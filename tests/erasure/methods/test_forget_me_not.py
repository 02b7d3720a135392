"""Forget-Me-Not: the maps are diffusers' own, the tokens the name's, and nothing is left behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from recare_patch.core import ConceptError
from recare_patch.erasure.methods.forget_me_not import Attention, name_positions
from recare_patch.models import BaseModel, load_base, prompt_attention

PROMPT = "A painting in the style of Van Gogh"


class _Reference:
    """diffusers' plain attention, which keeps its weights."""

    def __init__(self, seen: list[Tensor]) -> None:
        self.seen = seen

    def __call__(self, attn: Any, states: Tensor, encoder_hidden_states: Tensor, **_: Any) -> Tensor:
        text = encoder_hidden_states
        made = (attn.to_q(states), attn.to_k(text), attn.to_v(text))
        query, key, value = map(attn.head_to_batch_dim, made)
        weights = attn.get_attention_scores(query, key)
        self.seen.append(weights.unflatten(0, (-1, attn.heads)))
        out: Tensor = attn.to_out[0](attn.batch_to_head_dim(weights @ value))
        return out


def _predict(base: BaseModel) -> Tensor:
    latents = torch.randn((2, *base.latent_shape), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return base.denoise(latents, torch.tensor([200, 700]), base.encode_prompts([PROMPT, "a cat"]))


@pytest.mark.parametrize("family", ["tiny_sd", "tiny_sd_v"])
def test_maps_are_those_of_diffusers(family: str, request: pytest.FixtureRequest) -> None:
    base = load_base(request.getfixturevalue(family), device="cpu")
    attention, places = Attention(base.denoiser), (0, 5, 7, 76)
    with attention.watched():
        _predict(base)
    ours, outputs = list(attention.maps(places)), attention.outputs()
    # Block by block: the network does not hold them in the order in which they compute.
    blocks: list[Any] = prompt_attention(base.denoiser)
    seen: list[list[Tensor]] = [[] for _ in blocks]
    again: list[list[Tensor]] = [[] for _ in blocks]
    for block, weights, made in zip(blocks, seen, again, strict=True):
        block.set_processor(_Reference(weights))
        block.register_forward_hook(lambda module, given, out, made=made: made.append(out))
    _predict(base)
    assert len(ours) == len(blocks)
    for found, expected, output, reference in zip(ours, seen, outputs, again, strict=True):
        torch.testing.assert_close(found, expected[0][..., list(places)], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(output, reference[0], atol=1e-5, rtol=1e-4)


def test_watching_changes_nothing_and_leaves_nothing(base: BaseModel) -> None:
    plain, processors = _predict(base), dict(base.denoiser.attn_processors)  # type: ignore[arg-type]
    attention = Attention(base.denoiser)
    with attention.watched():
        assert torch.equal(_predict(base), plain)
    with pytest.raises(RuntimeError, match="inside"), attention.watched():
        raise RuntimeError("inside")
    assert dict(base.denoiser.attn_processors) == processors  # type: ignore[arg-type]
    assert not any(module._forward_hooks for module in base.denoiser.modules())
    assert torch.equal(_predict(base), plain)


def test_a_joint_block_looks_at_picture_and_prompt(tiny_sd3: Path) -> None:
    """All of the prompt's columns together are less than one: the rest is the picture's."""
    base = load_base(tiny_sd3, device="cpu")
    attention = Attention(base.denoiser)
    with attention.watched():
        _predict(base)
    for found in attention.maps(range(base.encode_prompts([PROMPT]).prompt_embeds.shape[1])):
        total = found.sum(-1)
        assert (total > 0).all() and (total < 1).all()


def test_padding_is_never_among_the_concepts_tokens(base: BaseModel) -> None:
    """SD 1.x pads with the end-of-text token: all places from the text's end on hold it."""
    ids = base.token_ids(PROMPT)
    found = name_positions(base, PROMPT, ("van", "gogh"))
    assert [base.token_text([ids[place - 1]]) for place in found] == ["van", "gogh"]
    assert max(found) == len(ids)
    assert name_positions(base, "A photo of a nude person", ("nudity", "nude", "naked")) == (5,)
    assert name_positions(base, "a cat", ("van", "gogh")) == ()


def test_a_names_small_words_are_not_taken_from_the_rest(base: BaseModel, method: Callable[..., Any]) -> None:
    positions = method("forget-me-not", concept={"text": "the night", "kind": "style"}).positions[0]
    end = len(base.token_ids("A painting in the style of the night")) + 1
    assert positions == tuple(range(end - len(base.token_ids("the night")), end))


def test_a_name_that_is_cut_off(method: Callable[..., Any]) -> None:
    cut = {"text": "q" * 100, "kind": "style"}
    with pytest.raises(ConceptError, match="among the tokens of its own prompts"):
        method("forget-me-not", concept=cut)
    # Tokens that are sought in the pictures need no name.
    fitted = {"forget_me_not.inversion_steps": 1, "forget_me_not.vectors": 2}
    assert [len(one) for one in method("forget-me-not", concept=cut, **fitted).positions] == [2]


def _loss(method: Any) -> tuple[Tensor, str, Callable[[str], Attention]]:
    """The loss of a step, the prompt that it drew, and the attention under any prompt at its states."""
    base, names = method.context.base, method.context.concept.name_prompts
    loss = method.loss(0, torch.Generator().manual_seed(4))
    generator = torch.Generator().manual_seed(4)
    prompt = names[int(torch.randint(0, len(names), (1,), generator=generator))]
    latents, times = method.states.draw(0, torch.zeros(2, dtype=torch.long), generator)

    def look(text: str) -> Attention:
        attention = Attention(base.denoiser)
        with torch.no_grad(), attention.watched():
            base.denoise(latents, times, base.encode_prompts([text]).repeat(2))
        return attention

    return loss, prompt, look


def test_the_loss_is_the_attention_to_the_name(base: BaseModel, method: Callable[..., Any]) -> None:
    loss, prompt, look = _loss(method("forget-me-not"))
    maps = look(prompt).maps(name_positions(base, prompt, ("van", "gogh")))
    expected = torch.stack([one.square().sum(-1).mean() for one in maps]).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    keys = [p.grad for name, p in base.denoiser.named_parameters() if "to_k.lora_B" in name]
    assert keys and all(grad is not None and grad.abs().sum() > 0 for grad in keys)


def test_a_replacement_steers_to_what_its_prompt_gave(method: Callable[..., Any]) -> None:
    loss, prompt, look = _loss(method("forget-me-not", replace_with="Monet"))
    outputs = look(prompt).outputs(), look(prompt.replace("Van Gogh", "Monet")).outputs()
    errors = [F.mse_loss(a, b) / b.square().mean() for a, b in zip(*outputs, strict=True)]
    assert loss.item() == pytest.approx(torch.stack(errors).mean().item(), rel=1e-4)


def test_micro_batches_see_the_same(tiny_sd: Path, small: Any, method: Callable[..., Any]) -> None:
    """A lever that cuts batches up and computes chunks again changes no loss and no gradient."""
    found = []
    for micro in (None, 1):
        recipe = small("forget-me-not", **{"memory.micro_batch": micro})
        base = load_base(tiny_sd, device="cpu", memory=recipe.memory)
        loss = method(recipe, on=base).loss(0, torch.Generator().manual_seed(4))
        loss.backward()
        grads = [p.grad for name, p in base.denoiser.named_parameters() if "to_k.lora_B" in name]
        found.append((loss.item(), torch.cat([grad.flatten() for grad in grads if grad is not None])))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4)
    torch.testing.assert_close(found[0][1], found[1][1], atol=1e-6, rtol=1e-3)
