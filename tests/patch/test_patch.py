"""The patch: what is written is what diffusers reads, and bad files touch nothing."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from recare_patch.core import files
from recare_patch.core.errors import IncompatiblePatchError, OutputError, PatchError
from recare_patch.models import lora as adapters
from recare_patch.models.embeds import BaseModel
from recare_patch.models.loading import load_base
from recare_patch.patch import patch as patch_module
from recare_patch.patch.apply import apply_all
from recare_patch.patch.patch import Patch, PatchMetadata
from recare_patch.recipe.recipe import WEIGHTS_NAME, Recipe, load_recipe

PROMPTS, SEEDS = ["a painting in the style of van gogh", "a photo of a cat"], [5, 6]


class _CareSet:
    def to_json(self) -> str:
        return json.dumps({"tokens": [{"text": "stars", "kept": True}, {"text": "gogh", "kept": False}]})


def _recipe(**changes: object) -> Recipe:
    return Recipe(concept={"text": "Van Gogh", "kind": "style"}, **changes)  # type: ignore[arg-type]


def trained(
    folder: Path, *, layers: str = "cross-attention", rank: int = 2, alpha: float = 6.0, seed: int = 0
) -> tuple[BaseModel, Patch]:
    """A base that holds a strong random adapter, and its patch."""
    base = load_base(folder, device="cpu")
    generator = torch.Generator().manual_seed(seed)
    parameters = adapters.attach(base.denoiser, layers=layers, rank=rank, alpha=alpha, generator=generator)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    metadata = PatchMetadata.describe(
        _recipe(adapter={"layers": layers, "rank": rank, "alpha": alpha}), base, _CareSet(), {"torch": "2"}
    )
    return base, Patch.from_adapter(base, "recare", rank, alpha, metadata)


@pytest.fixture(scope="session")
def patch(tiny_sd: Path) -> Patch:
    return trained(tiny_sd)[1]


@pytest.fixture
def folder(patch: Patch, tmp_path: Path) -> Path:
    patch.save(tmp_path / "patch")
    return tmp_path / "patch"


@pytest.fixture
def pipe(tiny_sd: Path) -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _draw(pipeline: StableDiffusionPipeline) -> list[Image.Image]:
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    images: list[Image.Image] = pipeline(
        PROMPTS, num_inference_steps=3, guidance_scale=5.0, generator=generators
    ).images
    return images


def _difference(first: list[Image.Image], second: list[Image.Image]) -> int:
    pairs = zip(first, second, strict=True)
    return max(int(np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max()) for a, b in pairs)


def _state(pipeline: StableDiffusionPipeline) -> dict[str, object]:
    """Everything about a UNet that a patch could leave changed."""
    unet = pipeline.unet
    return {
        "modules": [(name, type(module), module.training) for name, module in unet.named_modules()],
        "weights": {name: tensor.clone() for name, tensor in unet.state_dict().items()},
        "gradients": [(name, p.requires_grad) for name, p in unet.named_parameters()],
        "adapters": pipeline.get_list_adapters(),
        "active": pipeline.get_active_adapters() if pipeline.get_list_adapters() else [],
        "configs": sorted(getattr(unet, "peft_config", {})),
        "loaded": bool(unet._hf_peft_config_loaded),
    }


def _assert_same_state(found: dict[str, object], wanted: dict[str, object]) -> None:
    weights, expected = found.pop("weights"), wanted.pop("weights")
    for key, value in wanted.items():
        assert found[key] == value, key
    assert isinstance(weights, dict)
    assert isinstance(expected, dict)
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in weights)


class TestSameEverywhere:
    """Plain diffusers, ``Patch.apply`` and the adapter that was trained draw the same pictures."""

    @pytest.mark.parametrize("layers", ["cross-attention", "outside-cross-attention", "all"])
    @pytest.mark.parametrize("base_name", ["tiny_sd", "tiny_sd_v"])
    def test_pictures(
        self, base_name: str, layers: str, tmp_path: Path, request: pytest.FixtureRequest
    ) -> None:
        source = request.getfixturevalue(base_name)
        base, made = trained(source, layers=layers)
        live = base.generate(PROMPTS, SEEDS, steps=3)
        exact = Patch.from_adapter(base, "recare", 2, 6.0, dtype=torch.float32)
        adapters.detach(base.denoiser)
        with exact.apply(base.pipeline):
            assert _difference(base.generate(PROMPTS, SEEDS, steps=3), live) <= 1
        untouched = base.generate(PROMPTS, SEEDS, steps=3)
        made.save(tmp_path)
        with Patch.load(tmp_path).apply(base.pipeline):
            ours = base.generate(PROMPTS, SEEDS, steps=3)
        assert _difference(base.generate(PROMPTS, SEEDS, steps=3), untouched) == 0

        plain = StableDiffusionPipeline.from_pretrained(source)
        plain.set_progress_bar_config(disable=True)
        plain.load_lora_weights(str(tmp_path))
        theirs = _draw(plain)
        assert _difference(ours, theirs) <= 1
        assert _difference(untouched, theirs) > 20

    def test_the_scale_is_baked_in(self, tiny_sd: Path) -> None:
        base, made = trained(tiny_sd, rank=2, alpha=6.0)
        for name, tensor in adapters.adapter_state(base.denoiser).items():
            factor = 3.0 if ".lora_B." in name else 1.0
            torch.testing.assert_close(made.tensors[f"unet.{name}"], (tensor * factor).half())

    def test_a_half_precision_pipeline(self, patch: Patch, tiny_sd: Path) -> None:
        base = load_base(tiny_sd, precision="bf16", device="cpu")
        before = base.generate(PROMPTS, SEEDS, steps=2)
        with patch.apply(base.pipeline):
            assert _difference(base.generate(PROMPTS, SEEDS, steps=2), before) > 20


class TestRoundTrip:
    def test_tensors_and_metadata(self, patch: Patch, folder: Path) -> None:
        for path in (folder, folder / WEIGHTS_NAME, str(folder)):
            found = Patch.load(path)
            assert found.tensors.keys() == patch.tensors.keys()
            assert all(torch.equal(found.tensors[key], patch.tensors[key]) for key in patch.tensors)
            assert found.metadata == patch.metadata
        assert patch.metadata is not None
        assert patch.metadata.care_words == ("stars",)
        assert found.ranks == dict.fromkeys(patch.modules, 2)
        assert found.dtype is torch.float16

    def test_the_header_holds_the_recipe(self, folder: Path, patch: Patch) -> None:
        with safe_open(folder / WEIGHTS_NAME, "pt") as handle:
            header = handle.metadata()
        ours = {key for key in header if key.startswith("recare_patch.")}
        assert "recare_patch.recipe" in ours
        assert ours == set(header) - {"format"}
        assert patch.metadata is not None
        assert load_recipe(str(folder)) == patch.metadata.parsed_recipe

    def test_a_lora_of_other_make(self, patch: Patch, pipe: StableDiffusionPipeline, tmp_path: Path) -> None:
        file = tmp_path / "other.safetensors"
        save_file(dict(patch.tensors), file)
        foreign = Patch.load(file)
        assert foreign.metadata is None
        with foreign.apply(pipe) as applied:
            assert applied.adapter_name == "erase-other"
        save_file(
            dict(patch.tensors),
            file,
            {"lora_adapter_metadata": json.dumps({"unet.r": 2, "unet.lora_alpha": 2})},
        )
        Patch.load(file)
        save_file(
            dict(patch.tensors),
            file,
            {"lora_adapter_metadata": json.dumps({"unet.r": 2, "unet.lora_alpha": 1})},
        )
        with pytest.raises(PatchError, match="scale of its own"):
            Patch.load(file)

    def test_nothing_half_written(self, patch: Patch, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(OutputError):
            patch.save(tmp_path / "file")
        assert [entry.name for entry in tmp_path.iterdir()] == ["file"]

    def test_what_does_not_fit_into_fp16(self, patch: Patch, tmp_path: Path) -> None:
        big = Patch({key: tensor.float() + 1e6 for key, tensor in patch.tensors.items()})
        with pytest.raises(PatchError, match="float16 has infinite"):
            big.save(tmp_path / "patch")
        assert not (tmp_path / "patch").exists()
        big.save(tmp_path / "patch", dtype=torch.float32)
        assert Patch.load(tmp_path / "patch").dtype is torch.float32

    def test_no_such_adapter_and_a_diverged_one(self, tiny_sd: Path) -> None:
        base, _ = trained(tiny_sd)
        with pytest.raises(PatchError, match="no adapter named 'nobody'"):
            Patch.from_adapter(base, "nobody", 2, 2.0)
        with torch.no_grad():
            next(p for p in base.denoiser.parameters() if p.requires_grad).fill_(torch.nan)
        with pytest.raises(PatchError, match="NaN"):
            Patch.from_adapter(base, "recare", 2, 2.0)


Edit = Callable[[dict[str, torch.Tensor], str], object]


class TestBadFiles:
    @pytest.mark.parametrize(
        ("edit", "match"),
        [
            (lambda t, k: t.pop(k), "lacks the tensor"),
            (lambda t, k: t.update({"unet.conv_in.alpha": torch.ones(1)}), "does not belong"),
            (lambda t, k: t.update({"text_encoder.x.lora_A.weight": t[k].clone()}), "lacks the tensor"),
            (lambda t, k: t.update({"lora_unet_x.lora_down.weight": t[k].clone()}), "does not belong"),
            (lambda t, k: t.update({k: t[k][:1].contiguous()}), "misshapen"),
            (lambda t, k: t.update({k: t[k].reshape(-1)}), "misshapen"),
            (lambda t, k: t.update({k: t[k][:0]}), "misshapen"),
            (lambda t, k: t[k].fill_(torch.nan), "NaN"),
            (lambda t, k: t[k].view(-1)[:1].fill_(torch.inf), "infinite"),
            (lambda t, k: t.update({k: t[k].to(torch.int8)}), "type I8"),
            (lambda t, k: t.clear(), "no tensors"),
        ],
    )
    def test_tensors(self, folder: Path, pipe: StableDiffusionPipeline, edit: Edit, match: str) -> None:
        file = folder / WEIGHTS_NAME
        tensors = load_file(file)
        edit(tensors, next(key for key in tensors if "lora_A" in key))
        save_file(tensors, file)
        with pytest.raises(PatchError, match=match) as caught:
            Patch.load(folder)
        assert "\n" not in str(caught.value)
        assert str(folder) in str(caught.value)

    def test_pickles(self, tmp_path: Path) -> None:
        ran = tmp_path / "ran"

        class Bomb:
            def __reduce__(self) -> tuple[object, tuple[object, ...]]:
                return (Path.touch, (ran,))

        disguised = tmp_path / WEIGHTS_NAME
        disguised.write_bytes(pickle.dumps(Bomb()))
        with pytest.raises(PatchError, match="pickle"):
            Patch.load(disguised)
        torch.save({"a": torch.ones(1)}, disguised)
        with pytest.raises(PatchError, match="pickle"):
            Patch.load(tmp_path)
        disguised.rename(tmp_path / "pytorch_lora_weights.bin")
        with pytest.raises(PatchError, match="pickle"):
            Patch.load(tmp_path)
        assert not ran.exists()

    def test_absent_and_damaged_files(self, folder: Path, tmp_path: Path) -> None:
        with pytest.raises(PatchError, match="no patch at"):
            Patch.load(tmp_path / "nowhere")
        (tmp_path / "empty").mkdir()
        with pytest.raises(PatchError, match="is not in it"):
            Patch.load(tmp_path / "empty")
        file = folder / WEIGHTS_NAME
        whole = file.read_bytes()
        for damaged in (b"", whole[:100], whole[:-7], whole + b"x", b"\xff" * 64):
            file.write_bytes(damaged)
            with pytest.raises(PatchError):
                Patch.load(folder)

    @pytest.mark.parametrize("change", ["other keys", "other values of another header", "gone"])
    def test_a_file_that_changes_between_check_and_load(
        self, folder: Path, change: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        file = folder / WEIGHTS_NAME
        read = files.read_safetensors_header
        tensors = load_file(file)

        def swapped(path: Path) -> files.SafetensorsHeader:
            header = read(path)
            monkeypatch.setattr(patch_module, "read_safetensors_header", read)
            if change == "gone":
                file.unlink()
            elif change == "other keys":
                save_file({"unet.x.lora_A.weight": torch.ones(1, 1)}, file)
            else:
                save_file(tensors, file, {"recare_patch.concept": "something else"})
            return header

        monkeypatch.setattr(patch_module, "read_safetensors_header", swapped)
        with pytest.raises(PatchError, match=r"has changed while it was read|cannot read") as caught:
            Patch.load(folder)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("key", "value", "match"),
        [
            ("format_version", "99", "newer"),
            ("rank", "many", "malformed"),
            ("rank", '"many"', "recare_patch.rank"),
            ("versions", "[]", "recare_patch.versions"),
        ],
    )
    def test_header_entries(self, folder: Path, key: str, value: str, match: str) -> None:
        file = folder / WEIGHTS_NAME
        with safe_open(file, "pt") as handle:
            header = handle.metadata()
        save_file(load_file(file), file, header | {f"recare_patch.{key}": value})
        with pytest.raises(PatchError, match=match):
            Patch.load(folder)

    def test_a_patch_without_its_recipe(self, folder: Path) -> None:
        file = folder / WEIGHTS_NAME
        save_file(load_file(file), file, {"recare_patch.concept": "Van Gogh"})
        with pytest.raises(PatchError, match="malformed header entry"):
            Patch.load(folder)


class TestApply:
    def test_leaves_no_trace(self, patch: Patch, pipe: StableDiffusionPipeline) -> None:
        before, pictures = _state(pipe), _draw(pipe)
        applied = patch.apply(pipe)
        assert applied.active
        assert pipe.get_active_adapters() == ["erase-van-gogh"]
        assert _difference(_draw(pipe), pictures) > 20
        applied.remove()
        _assert_same_state(_state(pipe), before)
        assert _difference(_draw(pipe), pictures) == 0
        assert not applied.active
        applied.remove()
        with patch.apply(pipe):
            pass
        assert _difference(_draw(pipe), pictures) == 0

    def test_an_error_inside_removes_it_too(self, patch: Patch, pipe: StableDiffusionPipeline) -> None:
        before = _state(pipe)
        with pytest.raises(RuntimeError, match="inside"), patch.apply(pipe):
            raise RuntimeError("inside")
        _assert_same_state(_state(pipe), before)

    def test_the_pipeline_stays_trainable(self, patch: Patch, pipe: StableDiffusionPipeline) -> None:
        flags = [(name, p.requires_grad) for name, p in pipe.unet.named_parameters()]
        assert any(flag for _, flag in flags)
        with patch.apply(pipe):
            found = {
                name.replace(".base_layer", ""): p.requires_grad
                for name, p in pipe.unet.named_parameters()
                if ".lora_" not in name
            }
            assert found == dict(flags)
            assert not any(p.requires_grad for name, p in pipe.unet.named_parameters() if ".lora_" in name)
        assert [(name, p.requires_grad) for name, p in pipe.unet.named_parameters()] == flags

    def test_scale(self, patch: Patch, pipe: StableDiffusionPipeline, tiny_sd: Path) -> None:
        base = _draw(pipe)
        with patch.apply(pipe, scale=0.0) as applied:
            assert _difference(_draw(pipe), base) == 0
            applied.set_scale(0.4)
            ours = _draw(pipe)
            for bad in (float("nan"), float("inf"), "0.4", None, True, 10**400):
                with pytest.raises(PatchError, match="finite"):
                    applied.set_scale(bad)  # type: ignore[arg-type]
                with pytest.raises(PatchError, match="finite"):
                    patch.apply(pipe, scale=bad)  # type: ignore[arg-type]
        plain = StableDiffusionPipeline.from_pretrained(tiny_sd)
        plain.set_progress_bar_config(disable=True)
        plain.load_lora_weights(dict(patch.tensors), adapter_name="x")
        plain.set_adapters(["x"], [0.4])
        assert _difference(ours, _draw(plain)) <= 1

    def test_loaded_adapters_stay_on_at_their_weights(
        self, patch: Patch, pipe: StableDiffusionPipeline, tiny_sd: Path
    ) -> None:
        _, first = trained(tiny_sd, layers="attention", rank=4, alpha=1.0, seed=1)
        _, second = trained(tiny_sd, layers="cross-attention-kv", rank=1, alpha=1.0, seed=2)
        pipe.load_lora_weights(dict(first.tensors), adapter_name="first")
        pipe.load_lora_weights(dict(second.tensors), adapter_name="second")
        pipe.set_adapters(["first"], [0.7])
        before, pictures = _state(pipe), _draw(pipe)
        with patch.apply(pipe, scale=0.5):
            ours = _draw(pipe)
            assert sorted(pipe.get_active_adapters()) == ["erase-van-gogh", "first"]
        _assert_same_state(_state(pipe), before)
        assert _difference(_draw(pipe), pictures) == 0
        pipe.load_lora_weights(dict(patch.tensors), adapter_name="patch")
        pipe.set_adapters(["first", "patch"], [0.7, 0.5])
        assert _difference(ours, _draw(pipe)) <= 1
        assert _difference(ours, pictures) > 20

    def test_adapters_that_were_switched_off_stay_silent(
        self, patch: Patch, pipe: StableDiffusionPipeline, tiny_sd: Path
    ) -> None:
        with patch.apply(pipe):
            alone = _draw(pipe)
        _, other = trained(tiny_sd, layers="attention", seed=1)
        pipe.load_lora_weights(dict(other.tensors), adapter_name="other")
        with_other = _draw(pipe)
        pipe.disable_lora()
        before, pictures = _state(pipe), _draw(pipe)
        with patch.apply(pipe):
            assert _difference(_draw(pipe), alone) <= 1
        _assert_same_state(_state(pipe), before)
        assert _difference(_draw(pipe), pictures) == 0
        pipe.enable_lora()
        assert _difference(_draw(pipe), with_other) == 0

    def test_two_patches_leave_in_any_order(
        self, patch: Patch, pipe: StableDiffusionPipeline, tiny_sd: Path
    ) -> None:
        _, other = trained(tiny_sd, layers="self-attention", seed=3)
        before = _state(pipe)
        with other.apply(pipe):
            only_other = _draw(pipe)
        first, second = patch.apply(pipe), other.apply(pipe)
        assert (first.adapter_name, second.adapter_name) == ("erase-van-gogh", "erase-van-gogh-2")
        first.remove()
        assert _difference(_draw(pipe), only_other) <= 1
        second.remove()
        _assert_same_state(_state(pipe), before)

    def test_several_at_once(
        self, patch: Patch, pipe: StableDiffusionPipeline, tiny_sd: Path, tiny_sd_v: Path
    ) -> None:
        _, mine = trained(tiny_sd, layers="attention", rank=4, alpha=1.0, seed=1)
        _, other = trained(tiny_sd, layers="self-attention", seed=3)
        pipe.load_lora_weights(dict(mine.tensors), adapter_name="mine")
        before = _state(pipe)
        with patch.apply(pipe, 0.5), other.apply(pipe, -1.0):
            one_by_one = _draw(pipe)
        with apply_all(pipe, [(patch, 0.5), (other, -1.0)]) as applied:
            assert [one.scale for one in applied] == [0.5, -1.0]
            assert _difference(_draw(pipe), one_by_one) == 0
        _assert_same_state(_state(pipe), dict(before))
        foreign = trained(tiny_sd_v)[1]
        for wrong, told in ((foreign, 1.0), "one base only"), ((patch, float("nan")), "finite"):
            with (
                pytest.raises((PatchError, IncompatiblePatchError), match=told),
                apply_all(pipe, [(other, 1.0), wrong]),
            ):
                raise AssertionError("nothing is applied")
            _assert_same_state(_state(pipe), dict(before))

    def test_names(self, patch: Patch, pipe: StableDiffusionPipeline) -> None:
        with patch.apply(pipe, adapter_name="mine"):
            with pytest.raises(PatchError, match="already holds an adapter named 'mine'"):
                patch.apply(pipe, adapter_name="mine")
            for unusable in ("a.b", "", 3):
                with pytest.raises(PatchError, match="without dots"):
                    patch.apply(pipe, adapter_name=unusable)  # type: ignore[arg-type]
        # Concepts whose names PyTorch's module dictionaries reserve.
        assert patch.metadata is not None
        for text in ("type", "keys", "東京"):
            odd = Patch(patch.tensors, patch.metadata.model_copy(update={"concept": text}))
            with odd.apply(pipe):
                pass

    @pytest.mark.parametrize("other", ["tiny_sd_v", "wider"])
    def test_another_base_is_refused_untouched(
        self, other: str, patch: Patch, tmp_path: Path, request: pytest.FixtureRequest
    ) -> None:
        from tests.tiny import make_tiny_sd

        source = (
            make_tiny_sd(tmp_path / "wider", width=64) if other == "wider" else request.getfixturevalue(other)
        )
        foreign = StableDiffusionPipeline.from_pretrained(source)
        before = _state(foreign)
        with pytest.raises(IncompatiblePatchError, match=r"made for base 'tiny-sd'.*maps 32 to") as caught:
            patch.apply(foreign)
        assert "\n" not in str(caught.value)
        _assert_same_state(_state(foreign), before)

    def test_modules_that_are_not_there(self, patch: Patch, pipe: StableDiffusionPipeline) -> None:
        renamed = {key.replace("mid_block.", "middle."): tensor for key, tensor in patch.tensors.items()}
        before = _state(pipe)
        with pytest.raises(
            IncompatiblePatchError, match=r"4 of its 16 modules are not in it, first 'unet.middle"
        ):
            Patch(renamed, patch.metadata).apply(pipe)
        _assert_same_state(_state(pipe), before)

    def test_no_pipeline(self, patch: Patch) -> None:
        with pytest.raises(IncompatiblePatchError, match="a str"):
            patch.apply("pipe")

    def test_a_failure_while_loading_is_undone(
        self, patch: Patch, pipe: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import peft

        before, pictures = _state(pipe), _draw(pipe)

        def fail(*args: object, **kwargs: object) -> None:
            raise RuntimeError("a fault\nof many lines")

        monkeypatch.setattr(peft, "set_peft_model_state_dict", fail)
        with pytest.raises(IncompatiblePatchError, match="a fault") as caught:
            patch.apply(pipe)
        assert "\n" not in str(caught.value)
        _assert_same_state(_state(pipe), before)
        assert _difference(_draw(pipe), pictures) == 0


class TestCheckBase:
    def test_its_own_and_another(
        self, patch: Patch, tiny_sd: Path, tiny_sd_v: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        base = load_base(tiny_sd, device="cpu")
        assert patch.check_base(base, strict=True)
        with patch.apply(base.pipeline):
            assert patch.check_base(base, strict=True)
        with torch.no_grad():
            base.denoiser.get_submodule("conv_in").weight.mul_(2)  # type: ignore[operator, union-attr]
        with caplog.at_level("WARNING", logger="recare_patch.patch"):
            assert not patch.check_base(base)
        assert "other weights" in caplog.text
        with pytest.raises(IncompatiblePatchError, match="other weights"):
            patch.check_base(base, strict=True)
        with pytest.raises(IncompatiblePatchError, match="does not fit base 'tiny-sd-v'"):
            patch.check_base(load_base(tiny_sd_v, device="cpu"))
