"""Adapters: which layers they take, how they start, and that they leave without a trace."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from recare_patch.core.errors import NoMatchingModuleError, PatchError, UnknownNameError
from recare_patch.models import BaseModel
from recare_patch.models import lora as adapters
from recare_patch.models.loading import load_base


@pytest.fixture
def base(tiny_sd: Path) -> BaseModel:
    return load_base(tiny_sd, device="cpu")


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _attach(base: BaseModel, **changes: object) -> list[nn.Parameter]:
    options: dict[str, object] = {"layers": "cross-attention", "rank": 2, "alpha": 4.0}
    return adapters.attach(base.denoiser, generator=_generator(), **(options | changes))  # type: ignore[arg-type]


def _predict(base: BaseModel) -> torch.Tensor:
    latents = torch.randn((2, *base.latent_shape), generator=_generator(9))
    with torch.no_grad():
        return base.denoise(latents, torch.tensor([10, 700]), base.encode_prompts(["a cat", "night sky"]))


def _disturb(parameters: list[nn.Parameter]) -> None:
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn(parameter.shape, generator=_generator(len(parameters))))


class TestTargetModules:
    def test_cross_attention_is_what_reads_the_prompt(self, base: BaseModel) -> None:
        found = adapters.target_modules(base.denoiser, "cross-attention")
        # One block down, two up, one in the middle; queries, keys, values and output each.
        assert len(found) == 4 * 4
        widths = [
            module.in_features
            for name in found
            if isinstance(module := base.denoiser.get_submodule(name), nn.Linear)
            and name.endswith(("to_k", "to_v"))
        ]
        assert widths == [32] * 8

    def test_names_mean_nothing(self, base: BaseModel) -> None:
        """An ``attn2`` that attends to the picture itself, as in SD3.5-medium, is self-attention."""
        blocks = [m for m in base.denoiser.modules() if hasattr(m, "attn2")]
        for block in blocks:
            block.attn1, block.attn2 = block.attn2, block.attn1
        found = adapters.target_modules(base.denoiser, "cross-attention")
        assert all(".attn1." in name for name in found)
        assert all(".attn2." in name for name in adapters.target_modules(base.denoiser, "self-attention"))

    def test_the_sets_partition_the_network(self, base: BaseModel) -> None:
        sets = {
            name: adapters.target_modules(base.denoiser, name)
            for name in ("cross-attention", "self-attention", "attention", "outside-cross-attention", "all")
        }
        assert sorted(sets["cross-attention"] + sets["self-attention"]) == sorted(sets["attention"])
        assert sorted(sets["cross-attention"] + sets["outside-cross-attention"]) == sorted(sets["all"])
        assert "conv_in" in sets["outside-cross-attention"]
        kinds = [m for m in base.denoiser.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        assert len(sets["all"]) == len(kinds)

    def test_keys_and_values_only(self, base: BaseModel) -> None:
        found = adapters.target_modules(base.denoiser, "cross-attention-kv")
        assert {name.rsplit(".", 1)[-1] for name in found} == {"to_k", "to_v"}
        assert len(found) == 8

    def test_an_adapter_does_not_change_the_answer(self, base: BaseModel) -> None:
        before = adapters.target_modules(base.denoiser, "all")
        _attach(base)
        assert adapters.target_modules(base.denoiser, "all") == before

    def test_added_projections_of_shared_blocks(self) -> None:
        """Where prompt and picture share a block, only the added projections read the prompt."""
        from diffusers.models.attention_processor import Attention

        block = nn.ModuleDict({"attn": Attention(query_dim=8, heads=2, dim_head=4, added_kv_proj_dim=6)})
        found = adapters.target_modules(block, "cross-attention-kv")
        assert found == ["attn.add_k_proj", "attn.add_v_proj"]

    def test_unknown_set_offers_the_nearest(self, base: BaseModel) -> None:
        with pytest.raises(UnknownNameError, match="did you mean 'cross-attention'"):
            adapters.target_modules(base.denoiser, "crossattention")

    def test_a_network_without_such_layers_is_an_error(self) -> None:
        with pytest.raises(NoMatchingModuleError, match="1 linear and convolution layers and 0 attention"):
            adapters.target_modules(nn.Sequential(nn.Linear(2, 2)), "cross-attention")


class TestAttach:
    @pytest.mark.parametrize("layers", ["cross-attention", "outside-cross-attention", "all"])
    def test_starts_as_the_base(self, base: BaseModel, layers: str) -> None:
        before = _predict(base)
        parameters = _attach(base, layers=layers)
        assert len(parameters) == 2 * len(adapters.target_modules(base.denoiser, layers))
        assert torch.equal(_predict(base), before)

    def test_the_start_follows_the_generator_alone(self, tiny_sd: Path) -> None:
        starts = []
        for global_seed in (1, 2):
            fresh = load_base(tiny_sd, device="cpu")
            torch.manual_seed(global_seed)
            state = torch.get_rng_state()
            starts.append(_attach(fresh))
            assert torch.equal(torch.get_rng_state(), state)
        assert all(torch.equal(a, b) for a, b in zip(*starts, strict=True))
        assert any(parameter.abs().max() > 0 for parameter in starts[0])

    def test_only_the_adapter_is_trained(self, base: BaseModel) -> None:
        parameters = _attach(base)
        trained = [p for p in base.denoiser.parameters() if p.requires_grad]
        assert {id(p) for p in trained} == {id(p) for p in parameters}
        assert not any(module.training for module in base.denoiser.modules())

    def test_fp32_on_a_half_precision_base(self, tiny_sd: Path) -> None:
        half = load_base(tiny_sd, precision="bf16", device="cpu")
        parameters = _attach(half)
        assert {p.dtype for p in parameters} == {torch.float32}
        assert _predict(half).isfinite().all()

    def test_a_name_is_taken_once(self, base: BaseModel) -> None:
        _attach(base)
        with pytest.raises(ValueError, match="already holds"):
            _attach(base)

    def test_gradients_reach_the_adapter(self, base: BaseModel) -> None:
        parameters = _attach(base)
        _disturb(parameters)
        latents = torch.randn((1, *base.latent_shape), generator=_generator())
        base.denoise(latents, torch.tensor([500]), base.encode_prompts(["a star"])).square().mean().backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in parameters)


class TestOff:
    def test_is_the_teacher_and_comes_back(self, base: BaseModel) -> None:
        teacher = _predict(base)
        _disturb(_attach(base))
        student = _predict(base)
        assert not torch.allclose(student, teacher)
        with adapters.off(base.denoiser):
            assert torch.equal(_predict(base), teacher)
        assert torch.equal(_predict(base), student)

    def test_survives_an_error_and_nesting(self, base: BaseModel) -> None:
        teacher = _predict(base)
        parameters = _attach(base)
        _disturb(parameters)
        student = _predict(base)
        with pytest.raises(RuntimeError, match="inside"), adapters.off(base.denoiser):
            with adapters.off(base.denoiser):
                pass
            assert torch.equal(_predict(base), teacher)
            raise RuntimeError("inside")
        assert torch.equal(_predict(base), student)
        assert all(p.requires_grad for p in parameters)

    def test_keeps_the_gradient_of_a_student_computed_before(self, base: BaseModel) -> None:
        parameters = _attach(base)
        _disturb(parameters)
        latents = torch.randn((1, *base.latent_shape), generator=_generator())
        embeds = base.encode_prompts(["a star"])
        student = base.denoise(latents, torch.tensor([500]), embeds)
        with torch.no_grad(), adapters.off(base.denoiser):
            teacher = base.denoise(latents, torch.tensor([500]), embeds)
        (student - teacher).square().mean().backward()
        assert all(p.grad is not None for p in parameters)

    def test_without_adapter_does_nothing(self, base: BaseModel) -> None:
        before = _predict(base)
        with adapters.off(base.denoiser), adapters.frozen(base.denoiser):
            assert torch.equal(_predict(base), before)

    def test_frozen_keeps_it_on(self, base: BaseModel) -> None:
        parameters = _attach(base)
        _disturb(parameters)
        student = _predict(base)
        with adapters.frozen(base.denoiser):
            assert torch.equal(_predict(base), student)
            assert not any(p.requires_grad for p in base.denoiser.parameters())
        assert all(p.requires_grad for p in parameters)


class TestDetachAndState:
    def test_detach_leaves_no_trace(self, base: BaseModel) -> None:
        before, names = _predict(base), [name for name, _ in base.denoiser.named_modules()]
        weights = base.denoiser_hash()
        _disturb(_attach(base, layers="all"))
        assert base.denoiser_hash() == weights
        adapters.detach(base.denoiser)
        assert torch.equal(_predict(base), before)
        assert [name for name, _ in base.denoiser.named_modules()] == names
        assert not hasattr(base.denoiser, "peft_config")
        _attach(base)

    def test_detach_leaves_another_adapter_on(self, base: BaseModel) -> None:
        _disturb(_attach(base, name="other"))
        with_other = _predict(base)
        second = _attach(base, name="recare", layers="attention")
        base.pipeline.unet.set_adapters(["other", "recare"])
        _disturb(second)
        adapters.detach(base.denoiser, "recare")
        assert torch.equal(_predict(base), with_other)

    def test_state_round_trip(self, base: BaseModel) -> None:
        parameters = _attach(base)
        _disturb(parameters)
        state, student = adapters.adapter_state(base.denoiser), _predict(base)
        _disturb(parameters)
        assert not torch.equal(_predict(base), student)
        adapters.load_adapter_state(base.denoiser, state)
        assert torch.equal(_predict(base), student)

    def test_state_that_does_not_fit_changes_nothing(self, base: BaseModel) -> None:
        _disturb(_attach(base))
        student, state = _predict(base), adapters.adapter_state(base.denoiser)
        key = next(iter(state))
        for bad in (
            {k: v for k, v in state.items() if k != key},
            state | {"elsewhere.lora_A.weight": state[key]},
            {k: v * 0 for k, v in state.items()} | {key: state[key][:1]},
        ):
            with pytest.raises(PatchError):
                adapters.load_adapter_state(base.denoiser, bad)
        assert torch.equal(_predict(base), student)
        with pytest.raises(PatchError, match="no adapter named 'nobody'"):
            adapters.adapter_state(base.denoiser, "nobody")
