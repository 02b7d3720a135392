"""Adapters: which layers they take, how they start, and that they leave without a trace."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from recare_patch.core import NoMatchingModuleError, PatchError, UnknownNameError
from recare_patch.models import BaseModel, load_base
from recare_patch.models import lora as adapters


@pytest.fixture
def base(tiny_sd: Path) -> BaseModel:
    return load_base(tiny_sd, device="cpu")


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _attach(base: BaseModel, **changes: object) -> list[nn.Parameter]:
    options: dict[str, object] = {"layers": "cross-attention", "rank": 2, "alpha": 4.0}
    return adapters.attach(base.denoiser, generator=_generator(), **(options | changes))  # type: ignore[arg-type]


def _predict(base: BaseModel) -> Tensor:
    latents = torch.randn((2, *base.latent_shape), generator=_generator(9))
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
        only = adapters.target_modules(base.denoiser, "cross-attention-kv")
        assert only == [name for name in found if name.endswith(("to_k", "to_v"))]
        # As wide as a prompt.
        assert [base.denoiser.get_submodule(name).in_features for name in only] == [32] * 8

    def test_names_mean_nothing(self, base: BaseModel) -> None:
        """An ``attn2`` that attends to the picture itself, as in SD3.5-medium, is self-attention."""
        for block in [m for m in base.denoiser.modules() if hasattr(m, "attn2")]:
            block.attn1, block.attn2 = block.attn2, block.attn1
        for layers, name in (("cross-attention", ".attn1."), ("self-attention", ".attn2.")):
            assert all(name in one for one in adapters.target_modules(base.denoiser, layers))

    def test_the_sets_partition_the_network(self, base: BaseModel) -> None:
        names = ("cross-attention", "self-attention", "attention", "outside-cross-attention", "all")
        cross, own, attention, outside, everything = (adapters.target_modules(base.denoiser, name) for name in names)
        assert sorted(cross + own) == sorted(attention)
        assert sorted(cross + outside) == sorted(everything)
        assert "conv_in" in outside
        blocks = set(adapters.target_modules(base.denoiser, "transformer-blocks"))
        assert set(attention) < blocks < set(everything) and not any("resnets" in name for name in blocks)
        assert {name.rpartition(".")[2] for name in blocks} >= {"proj_in", "proj_out"}
        assert len(everything) == sum(isinstance(m, nn.Linear | nn.Conv2d) for m in base.denoiser.modules())
        # An adapter does not change the answer.
        _attach(base)
        assert adapters.target_modules(base.denoiser, "all") == everything

    @pytest.mark.parametrize("layers", ["text", "transformer-blocks", "outside-cross-attention"])
    def test_a_pooled_prompt_is_a_prompt_too(self, layers: str, tiny_sdxl: Path, tiny_sd: Path) -> None:
        pooled = ["add_embedding.linear_1", "add_embedding.linear_2"]
        for source, expected in ((tiny_sdxl, pooled), (tiny_sd, [])):
            found = adapters.target_modules(load_base(str(source)).denoiser, layers)
            assert [name for name in found if name.startswith("add_embedding")] == expected
        assert not set(pooled) & set(adapters.target_modules(load_base(str(tiny_sdxl)).denoiser, "cross-attention"))

    def test_added_projections_of_shared_blocks(self) -> None:
        """Where prompt and picture share a block, only the added projections read the prompt."""
        from diffusers.models.attention_processor import Attention

        block = nn.ModuleDict({"attn": Attention(query_dim=8, heads=2, dim_head=4, added_kv_proj_dim=6)})
        found = adapters.target_modules(block, "cross-attention-kv")
        assert found == ["attn.add_k_proj", "attn.add_v_proj"]
        assert adapters.prompt_attention(block) == [block["attn"]]

    def test_a_text_encoders_layers_are_those_of_its_blocks(self, base: BaseModel) -> None:
        found = adapters.target_modules(base.pipeline.text_encoder, "text-encoder")
        assert len(found) == 2 * 6 and all(".layers." in name for name in found)
        assert list(adapters.adapted(base, "text-encoder")) == ["text_encoder"]
        assert list(adapters.adapted(base, "all")) == ["unet"]

    @pytest.mark.parametrize(
        ("layers", "error", "message"),
        [
            ("crossattention", UnknownNameError, "did you mean 'cross-attention'"),
            ("cross-attention", NoMatchingModuleError, "1 linear and convolution layers and 0 attention"),
            ("text-encoder", NoMatchingModuleError, r"no linear layer is under 'encoder\.layers\.'"),
        ],
    )
    def test_no_such_layers(self, layers: str, error: type[Exception], message: str, base: BaseModel) -> None:
        with pytest.raises(error, match=message):
            adapters.target_modules(nn.Sequential(nn.Linear(2, 2)), layers)
        if error is UnknownNameError:
            with pytest.raises(error, match=message):
                adapters.adapted(base, layers)

    def test_a_denoisers_set_in_a_text_encoder(self, base: BaseModel) -> None:
        with pytest.raises(NoMatchingModuleError, match="a CLIPTextModel is a text encoder"):
            adapters.target_modules(base.pipeline.text_encoder, "all")


class TestAttach:
    @pytest.mark.parametrize("layers", ["cross-attention", "outside-cross-attention", "all"])
    def test_starts_as_the_base_and_is_all_that_is_trained(self, base: BaseModel, layers: str) -> None:
        before = _predict(base)
        parameters = _attach(base, layers=layers)
        assert len(parameters) == 2 * len(adapters.target_modules(base.denoiser, layers))
        assert torch.equal(_predict(base), before)
        trained = {id(p) for p in base.denoiser.parameters() if p.requires_grad}
        assert trained == {id(p) for p in parameters}
        assert not any(module.training for module in base.denoiser.modules())
        _disturb(parameters)
        _predict(base).square().mean().backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in parameters)

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

    def test_fp32_on_a_half_precision_base_and_once_a_name(self, tiny_sd: Path) -> None:
        half = load_base(tiny_sd, precision="bf16", device="cpu")
        assert {p.dtype for p in _attach(half)} == {torch.float32}
        assert _predict(half).isfinite().all()
        with pytest.raises(ValueError, match="already holds"):
            _attach(half)


class TestOff:
    def test_is_the_teacher_and_comes_back(self, base: BaseModel) -> None:
        teacher = _predict(base)
        parameters = _attach(base)
        _disturb(parameters)
        student = _predict(base)
        assert not torch.allclose(student, teacher)
        with pytest.raises(RuntimeError, match="inside"), adapters.off(base.denoiser):
            with adapters.off(base.denoiser):
                pass
            assert torch.equal(_predict(base), teacher)
            raise RuntimeError("inside")
        assert torch.equal(_predict(base), student)
        # The gradient of a student computed before is kept.
        with torch.no_grad(), adapters.off(base.denoiser):
            teacher = _predict(base)
        (student - teacher).square().mean().backward()
        assert all(p.grad is not None for p in parameters)

    def test_a_teachers_own_adapter_stays_on(self, base: BaseModel) -> None:
        _disturb(_attach(base, name=adapters.TEACHER_NAME))
        teacher = _predict(base)
        _disturb(_attach(base, rank=3))
        adapters.switch_to(base.denoiser, adapters.ADAPTER_NAME)
        student = _predict(base)
        with adapters.off(base.denoiser):
            assert torch.equal(_predict(base), teacher)
        assert torch.equal(_predict(base), student)
        assert not torch.allclose(student, teacher)

    def test_frozen_keeps_it_on(self, base: BaseModel) -> None:
        before = _predict(base)
        with adapters.off(base.denoiser), adapters.frozen(base.denoiser):
            assert torch.equal(_predict(base), before)
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
        # What does not fit changes nothing.
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
