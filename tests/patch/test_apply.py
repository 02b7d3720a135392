"""A patch in a pipeline: as strong as asked beside what is on, and taken out without a trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor

from recare_patch.combine.stacking import stack
from recare_patch.core import IncompatiblePatchError, PatchError, RecarePatchError
from recare_patch.patch import Patch
from recare_patch.patch.apply import apply_all
from recare_patch.patch.gate import gated
from tests.patch.making import difference, draw, plain, state, trained
from tests.tiny import make_tiny_sd


@pytest.mark.parametrize("kind", ["patch", "text_patch", "both"])
def test_it_leaves_no_trace(kind: str, pipe: Any, request: pytest.FixtureRequest) -> None:
    patch = request.getfixturevalue(kind)
    pipe.text_encoder.train()
    flags = {name: p.requires_grad for name, p in pipe.unet.named_parameters()}
    before, pictures = state(pipe), draw(pipe)
    with patch.apply(pipe) as applied:
        assert applied.active and difference(draw(pipe), pictures) > 20
        found = {n.replace(".base_layer", ""): p.requires_grad for n, p in pipe.unet.named_parameters()}
        assert {name: flag for name, flag in found.items() if ".lora_" not in name} == flags
        assert not any(flag for name, flag in found.items() if ".lora_" in name)
        applied.set_scale(0.0)
        assert difference(draw(pipe), pictures) == 0
    assert not applied.active and state(pipe) == before
    assert difference(draw(pipe), pictures) == 0
    applied.remove()
    with pytest.raises(RuntimeError, match="inside"), patch.apply(pipe):
        raise RuntimeError("inside")
    assert state(pipe) == before and difference(draw(pipe), pictures) == 0


def test_scale(patch: Patch, pipe: Any) -> None:
    with patch.apply(pipe, scale=0.0) as applied:
        applied.set_scale(0.4)
        ours = draw(pipe)
        for bad in (float("nan"), float("inf"), "0.4", None, True, 10**400):
            for refuse in (applied.set_scale, lambda scale: patch.apply(pipe, scale=scale)):
                with pytest.raises(PatchError, match="finite"):
                    refuse(bad)  # type: ignore[arg-type]
    pipe.load_lora_weights(dict(patch.tensors), adapter_name="x")
    pipe.set_adapters(["x"], [0.4])
    assert difference(ours, draw(pipe)) <= 1


class TestBesideOthers:
    def test_loaded_adapters_stay_on_at_their_weights(self, both: Patch, pipe: Any, tiny_sd: Path) -> None:
        _, first = trained(tiny_sd, layers="attention", rank=4, alpha=1.0, seed=1)
        _, second = trained(tiny_sd, layers="cross-attention-kv", rank=1, alpha=1.0, seed=2)
        _, of_text = trained(tiny_sd, layers="text-encoder", seed=4)
        first = stack([(first, 1.0), (of_text, 1.0)])
        pipe.load_lora_weights(dict(first.tensors), adapter_name="first")
        pipe.load_lora_weights(dict(second.tensors), adapter_name="second")
        pipe.set_adapters(["first"], [0.7])
        before, pictures = state(pipe), draw(pipe)
        with both.apply(pipe, scale=0.5) as applied:
            ours = draw(pipe)
            assert sorted(pipe.get_active_adapters()) == [applied.adapter_name, "first"]
        assert state(pipe) == before and difference(draw(pipe), pictures) == 0
        pipe.load_lora_weights(dict(both.tensors), adapter_name="patch")
        pipe.set_adapters(["first", "patch"], [0.7, 0.5])
        assert difference(ours, draw(pipe)) <= 1 and difference(ours, pictures) > 20

    def test_those_that_were_switched_off_stay_silent(self, patch: Patch, pipe: Any, tiny_sd: Path) -> None:
        with patch.apply(pipe):
            alone = draw(pipe)
        _, other = trained(tiny_sd, layers="attention", seed=1)
        pipe.load_lora_weights(dict(other.tensors), adapter_name="other")
        with_other = draw(pipe)
        pipe.disable_lora()
        before, pictures = state(pipe), draw(pipe)
        with patch.apply(pipe):
            assert difference(draw(pipe), alone) <= 1
        assert state(pipe) == before and difference(draw(pipe), pictures) == 0
        pipe.enable_lora()
        assert difference(draw(pipe), with_other) == 0

    def test_two_patches_leave_in_any_order(self, patch: Patch, pipe: Any, tiny_sd: Path) -> None:
        _, other = trained(tiny_sd, layers="self-attention", seed=3)
        before = state(pipe)
        with other.apply(pipe):
            only_other = draw(pipe)
        first, second = patch.apply(pipe), other.apply(pipe)
        assert (first.adapter_name, second.adapter_name) == ("erase-van-gogh", "erase-van-gogh-2")
        first.remove()
        assert difference(draw(pipe), only_other) <= 1
        second.remove()
        assert state(pipe) == before

    def test_several_at_once(self, patch: Patch, text_patch: Patch, pipe: Any, tiny_sd: Path, tiny_sd_v: Path) -> None:
        _, mine = trained(tiny_sd, layers="attention", rank=4, alpha=1.0, seed=1)
        pipe.load_lora_weights(dict(mine.tensors), adapter_name="mine")
        before = state(pipe)
        with patch.apply(pipe, 0.5), text_patch.apply(pipe, -1.0):
            one_by_one = draw(pipe)
        with stack([(patch, 0.5), (text_patch, -1.0)]).apply(pipe):
            assert difference(draw(pipe), one_by_one) <= 1
        with apply_all(pipe, [(patch, 0.5), (text_patch, -1.0)]) as applied:
            assert [one.scale for one in applied] == [0.5, -1.0]
            assert difference(draw(pipe), one_by_one) == 0
        assert state(pipe) == before
        foreign = trained(tiny_sd_v)[1]
        for wrong, told in ((foreign, 1.0), "one base only"), ((patch, float("nan")), "finite"):
            with pytest.raises(RecarePatchError, match=told), apply_all(pipe, [(patch, 1.0), wrong]):
                raise AssertionError("nothing is applied")
            assert state(pipe) == before

    def test_only_what_both_change_must_be_of_one_base(
        self, text_patch: Patch, tiny_sd_v: Path, tmp_path: Path
    ) -> None:
        _, other = trained(make_tiny_sd(tmp_path / "tiny-other", seed=7))
        together = stack([(text_patch, 1.0), (other, 1.0)]).metadata
        assert together is not None and other.metadata is not None
        for key in ("base", "base_denoiser_sha256"):
            assert getattr(together, key) == getattr(other.metadata, key)
        with pytest.raises(IncompatiblePatchError, match="of one base only"):
            stack([(text_patch, 1.0), (trained(tiny_sd_v, layers="text-encoder")[1], 1.0)])


def test_names(patch: Patch, pipe: Any) -> None:
    with patch.apply(pipe, adapter_name="mine"):
        with pytest.raises(PatchError, match="already holds an adapter named 'mine'"):
            patch.apply(pipe, adapter_name="mine")
        for unusable in ("a.b", "", 3):
            with pytest.raises(PatchError, match="without dots"):
                patch.apply(pipe, adapter_name=unusable)  # type: ignore[arg-type]
    with Patch(patch.tensors, source="a/other.safetensors").apply(pipe) as applied:
        assert applied.adapter_name == "erase-other"
    # Concepts whose names PyTorch's module dictionaries reserve.
    assert patch.metadata is not None
    for text in ("type", "keys", "東京"):
        odd = Patch(patch.tensors, patch.metadata.model_copy(update={"concept": text}))
        with odd.apply(pipe):
            pass


@pytest.mark.parametrize("other", ["tiny_sd_v", "wider"])
def test_another_base_is_refused_untouched(
    other: str, patch: Patch, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    wider = other == "wider"
    foreign = plain(make_tiny_sd(tmp_path / "w", width=64) if wider else request.getfixturevalue(other))
    renamed = {key.replace("mid_block.", "middle."): tensor for key, tensor in patch.tensors.items()}
    before = state(foreign)
    for made, told in (
        (patch, r"made for base 'tiny-sd'.*maps 32 to"),
        (Patch(renamed, patch.metadata), r"4 of its 16 modules are not in it, first 'unet.middle"),
    ):
        with pytest.raises(IncompatiblePatchError, match=told) as caught:
            made.apply(foreign)
        assert "\n" not in str(caught.value) and state(foreign) == before
    with pytest.raises(IncompatiblePatchError, match="a str"):
        patch.apply("pipe")


@pytest.mark.parametrize("fails", ["unet", "text_encoder"])
def test_a_failure_while_loading_is_undone(fails: str, both: Patch, pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("a fault\nof many lines")

    before, pictures = state(pipe), draw(pipe)
    if fails == "unet":
        monkeypatch.setattr(peft, "set_peft_model_state_dict", fail)
    else:
        monkeypatch.setattr(type(pipe.text_encoder), "load_adapter", fail)
    with pytest.raises(IncompatiblePatchError, match="a fault") as caught:
        both.apply(pipe)
    assert "\n" not in str(caught.value)
    assert state(pipe) == before and difference(draw(pipe), pictures) == 0


class TestLivingPipelines:
    def test_fused_projections_are_refused_before_and_after(self, patch: Patch, pipe: Any) -> None:
        pictures = draw(pipe)
        pipe.fuse_qkv_projections()
        with pytest.raises(IncompatiblePatchError, match=r"no effect where attention layers are fused.*unfuse_qkv"):
            patch.apply(pipe)
        pipe.unfuse_qkv_projections()
        with patch.apply(pipe):
            whole = draw(pipe)
            pipe.fuse_qkv_projections()
            with pytest.raises(IncompatiblePatchError, match="attention layers are fused"):
                draw(pipe)
            pipe.unfuse_qkv_projections()
            assert difference(draw(pipe), whole) == 0
        assert difference(draw(pipe), pictures) == 0

    def test_layers_that_nobody_calls_are_told(self, patch: Patch, pipe: Any) -> None:
        class Silent(AttnProcessor):
            def __call__(self, attn: Any, hidden_states: Any, *_: Any, **__: Any) -> Any:
                return hidden_states

        pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.set_processor(Silent())
        with patch.apply(pipe):
            for _ in range(2):
                with pytest.raises(IncompatiblePatchError, match=r"does not call 4 of its 16 layers, first 'unet.mid"):
                    draw(pipe)
        draw(pipe)

    def test_fused_into_the_weights_it_still_obeys(self, both: Patch, pipe: Any, tiny_sd: Path) -> None:
        _, other = trained(tiny_sd, layers="attention", rank=4, alpha=1.0, seed=1)
        pipe.load_lora_weights(dict(other.tensors), adapter_name="other")
        before, with_other = state(pipe), draw(pipe)
        with both.apply(pipe, 0.3):
            weak = draw(pipe)
        applied = both.apply(pipe)
        strong = draw(pipe)
        pipe.fuse_lora()
        assert applied.fused and difference(draw(pipe), strong) <= 1
        with pytest.raises(IncompatiblePatchError, match=r"LoRAs are fused into the weights .*erase-.*, other"):
            both.apply(pipe)
        applied.set_scale(0.3)
        assert difference(draw(pipe), weak) <= 1
        applied.remove()
        assert difference(draw(pipe), with_other) <= 1 and pipe.num_fused_loras == 1
        pipe.unfuse_lora()
        assert difference(draw(pipe), with_other) <= 1
        assert {**state(pipe)["unet"], "weights": 0} == {**before["unet"], "weights": 0}

    def test_what_was_unloaded_is_not_promised(self, patch: Patch, pipe: Any) -> None:
        applied = patch.apply(pipe)
        pipe.fuse_lora()
        pipe.unload_lora_weights()
        with pytest.raises(PatchError, match="no longer in the pipeline"):
            applied.set_scale(0.5)
        with pytest.raises(PatchError, match="fused into the weights and then unloaded"):
            applied.remove()
        applied.remove()

    def test_a_call_at_scale_0_leaves_the_patchs_scale(self, both: Patch, pipe: Any) -> None:
        pictures = draw(pipe)
        with both.apply(pipe, 0.5) as applied:
            half = draw(pipe)
            assert difference(draw(pipe, cross_attention_kwargs={"scale": 0.0}), pictures) == 0
            assert applied.scale == 0.5 and difference(draw(pipe), half) == 0
        assert max(float(one.abs().max()) for one in both.tensors.values()) > 0 and difference(half, pictures) > 20

    @pytest.mark.parametrize("way", ["whole", "in place", "a block"])
    def test_compiled_networks(self, way: str, patch: Patch, pipe: Any) -> None:
        pictures = draw(pipe)
        with patch.apply(pipe):
            patched = draw(pipe)
        if way == "whole":
            pipe.unet = torch.compile(pipe.unet, backend="eager")
        elif way == "in place":
            pipe.unet.compile(backend="eager")
        else:
            pipe.unet.mid_block = torch.compile(pipe.unet.mid_block, backend="eager")
        with patch.apply(pipe) as applied:
            assert difference(draw(pipe), patched) <= 1
            applied.set_scale(0.0)
            assert difference(draw(pipe), pictures) == 0
        with pytest.raises(IncompatiblePatchError, match="cannot be gated where networks are compiled"):
            gated(patch, pipe, gate=lambda texts: torch.zeros(len(texts)))
        assert difference(draw(pipe), pictures) == 0

    def test_a_lora_that_stays_in_a_compiled_network_is_told(
        self, patch: Patch, pipe: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        pipe.unet = torch.compile(pipe.unet, backend="eager")
        with patch.apply(pipe):
            assert "switched on" not in caplog.text
        pipe.load_lora_weights(dict(patch.tensors), adapter_name="plain")
        # diffusers passes over compiled networks here.
        pipe.unload_lora_weights()
        with patch.apply(pipe):
            assert "the compiled UNet has a LoRA switched on (plain)" in caplog.text

    def test_weights_that_are_stored_in_8_bits(self, patch: Patch, pipe: Any) -> None:
        with patch.apply(pipe):
            wanted = draw(pipe)
        pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
        pictures = draw(pipe)
        with patch.apply(pipe):
            assert difference(draw(pipe), pictures) > 20
            layer = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k
            assert layer.lora_B["erase-van-gogh"].weight.dtype == torch.float32
        assert difference(draw(pipe), pictures) == 0 and wanted

    def test_no_gate_reaches_what_is_fused(self, patch: Patch, pipe: Any) -> None:
        with gated(patch, pipe, gate=lambda texts: torch.zeros(len(texts))):
            pipe.fuse_lora()
            with pytest.raises(PatchError, match="where no gate reaches it"):
                draw(pipe)
