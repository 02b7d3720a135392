"""The patch: what is written is what diffusers reads, and bad files are refused in one sentence."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file

from recare_patch.combine import merging
from recare_patch.core import IncompatiblePatchError, OutputError, PatchError, files
from recare_patch.models import load_base
from recare_patch.models import lora as adapters
from recare_patch.patch import Patch
from recare_patch.patch import patch as patch_module
from recare_patch.patch.kohya import to_kohya
from recare_patch.recipe import WEIGHTS_NAME, load_recipe
from tests.patch.making import PROMPTS, SEEDS, difference, draw, factors, file_of, plain, same, trained
from tests.tiny import make_tiny_sd

__all__ = ["trained"]


@pytest.fixture
def folder(patch: Patch, tmp_path: Path) -> Path:
    patch.save(tmp_path / "patch")
    return tmp_path / "patch"


class TestSameEverywhere:
    """Plain diffusers, ``Patch.apply`` and the adapter that was trained draw the same pictures."""

    @pytest.mark.parametrize(
        ("base_name", "layers"),
        [
            *(("tiny_sd", "outside-cross-attention"), ("tiny_sd", "text-encoder")),
            *(("tiny_sd_v", layers) for layers in ("cross-attention", "all", "text-encoder")),
        ],
    )
    def test_pictures(self, base_name: str, layers: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
        source = request.getfixturevalue(base_name)
        base, made = trained(source, layers=layers)
        live = base.generate(PROMPTS, SEEDS, steps=3)
        exact = Patch.from_adapter(base, "recare", 2, 6.0, dtype=torch.float32)
        for network in base.components.values():
            adapters.detach(network)
        with exact.apply(base.pipeline):
            assert difference(base.generate(PROMPTS, SEEDS, steps=3), live) <= 1
        untouched = base.generate(PROMPTS, SEEDS, steps=3)
        made.save(tmp_path)
        with Patch.load(tmp_path).apply(base.pipeline):
            ours = base.generate(PROMPTS, SEEDS, steps=3)
        assert difference(base.generate(PROMPTS, SEEDS, steps=3), untouched) == 0
        pipeline = plain(source)
        pipeline.load_lora_weights(str(tmp_path))
        theirs = draw(pipeline)
        assert difference(ours, theirs) <= 1 and difference(untouched, theirs) > 20

    def test_both_encoders_of_sdxl(self, tiny_sdxl: Path, tmp_path: Path) -> None:
        base, made = trained(tiny_sdxl, layers="text-encoder")
        assert made.components == ("text_encoder", "text_encoder_2")
        made.save(tmp_path)
        ours = base.encode_prompts(PROMPTS)
        pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl)
        pipeline.load_lora_weights(str(tmp_path))
        with torch.no_grad():
            states, _, pooled, _ = pipeline.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
        torch.testing.assert_close(states, ours.prompt_embeds, atol=2e-2, rtol=2e-2)
        torch.testing.assert_close(pooled, ours.pooled_prompt_embeds, atol=2e-2, rtol=2e-2)

    def test_a_half_precision_pipeline(self, patch: Patch, tiny_sd: Path) -> None:
        base = load_base(tiny_sd, precision="bf16", device="cpu")
        before = base.generate(PROMPTS, SEEDS, steps=2)
        with patch.apply(base.pipeline):
            assert difference(base.generate(PROMPTS, SEEDS, steps=2), before) > 20


class TestRoundTrip:
    def test_tensors_and_metadata(self, patch: Patch, folder: Path) -> None:
        for path in (folder, folder / WEIGHTS_NAME, str(folder)):
            found = Patch.load(path)
            same(found.tensors, patch.tensors)
            assert found.metadata == patch.metadata
        assert patch.metadata is not None and patch.metadata.care_words == ("stars",)
        assert found.ranks == dict.fromkeys(patch.modules, 2) and found.dtype is torch.float16
        assert found.sha256() == files.file_sha256(folder / WEIGHTS_NAME) != patch.sha256()
        header = files.read_safetensors_header(folder / WEIGHTS_NAME).metadata
        assert "recare_patch.recipe" in header
        assert {key for key in header if not key.startswith("recare_patch.")} == {"format"}
        assert load_recipe(str(folder)) == patch.metadata.parsed_recipe

    def test_a_lora_of_other_make(self, text_patch: Patch, patch: Patch, tmp_path: Path) -> None:
        for made, part in ((patch, "unet"), (text_patch, "text_encoder")):
            notes = [json.dumps({f"{part}.r": 2, f"{part}.lora_alpha": alpha}) for alpha in (2, 1)]
            sound, scaled = ({"lora_adapter_metadata": note} for note in notes)
            # And as it is called in a compiled network.
            named = {key.replace(f"{part}.", f"{part}._orig_mod."): one for key, one in made.tensors.items()}
            found = Patch.load(file_of(tmp_path, named, sound))
            assert found.metadata is None and set(found.modules) == set(made.modules)
            for header in (scaled, {f"{part}.r": "2", f"{part}.lora_alpha": "1"}):
                with pytest.raises(PatchError, match=r"scale of its own.*`recare-patch convert .* makes one of it"):
                    Patch.load(file_of(tmp_path, made.tensors, header))

    @pytest.mark.parametrize("shape", ["kohya", "peft"])
    def test_other_tools_files_are_told_how_to_become_one(self, patch: Patch, tmp_path: Path, shape: str) -> None:
        tensors = to_kohya(patch)[0]
        if shape == "peft":
            tensors = {key.replace("unet.", "base_model.model."): one for key, one in patch.tensors.items()}
        file = file_of(tmp_path / "of-another.safetensors", tensors)
        with pytest.raises(PatchError, match=rf"is a {shape} file.*`recare-patch convert {file} --to diffusers"):
            Patch.load(file)
        with pytest.raises(PatchError, match=rf"is not in it; `recare-patch convert {file}"):
            Patch.load(tmp_path)

    def test_nothing_half_written(self, patch: Patch, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(OutputError):
            patch.save(tmp_path / "file")
        big = Patch({key: tensor.float() + 1e6 for key, tensor in patch.tensors.items()})
        with pytest.raises(PatchError, match="float16 has infinite"):
            big.save(tmp_path / "patch")
        assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
        big.save(tmp_path / "patch", dtype=torch.float32)
        assert Patch.load(tmp_path / "patch").dtype is torch.float32

    def test_no_such_adapter_and_a_diverged_one(self, tiny_sd: Path) -> None:
        base, made = trained(tiny_sd, rank=2, alpha=6.0)
        with pytest.raises(PatchError, match="no adapter named 'nobody'"):
            Patch.from_adapter(base, "nobody", 2, 2.0)
        # The scale is baked in.
        for name, tensor in adapters.adapter_state(base.denoiser).items():
            factor = 3.0 if ".lora_B." in name else 1.0
            torch.testing.assert_close(made.tensors[f"unet.{name}"], (tensor * factor).half())
        with torch.no_grad():
            next(p for p in base.denoiser.parameters() if p.requires_grad).fill_(torch.nan)
        with pytest.raises(PatchError, match="NaN"):
            Patch.from_adapter(base, "recare", 2, 2.0)


# Deeper than a parser goes.
DEEP = "[" * 100_000
Edit = Callable[[dict[str, torch.Tensor], str], object]


class TestBadFiles:
    @pytest.mark.parametrize(
        ("edit", "match"),
        [
            (lambda t, k: t.pop(k), "lacks the lower factor"),
            (lambda t, k: t.update({"unet.conv_in.alpha": torch.ones(1)}), "does not belong"),
            (lambda t, k: t.update({"text_encoder.x.lora_A.weight": t[k].clone()}), "lacks the upper factor"),
            (lambda t, k: t.update({"lora_unet_x.lora_down.weight": t[k].clone()}), "mixes the shapes"),
            (lambda t, k: t.update({k.replace("unet.", "unet._orig_mod."): t[k].clone()}), "a layer twice"),
            (lambda t, k: t.update({k: t[k][:1].contiguous()}), "misshapen"),
            (lambda t, k: t.update({k: t[k].reshape(-1)}), "misshapen"),
            (lambda t, k: t.update({k: t[k][:0]}), "misshapen"),
            (lambda t, k: t[k].fill_(torch.nan), "NaN"),
            (lambda t, k: t[k].view(-1)[:1].fill_(torch.inf), "infinite"),
            (lambda t, k: t.update({k: t[k].to(torch.int8)}), "type I8"),
            (lambda t, k: t.clear(), "no tensors"),
        ],
    )
    def test_tensors(self, folder: Path, edit: Edit, match: str) -> None:
        tensors = load_file(folder / WEIGHTS_NAME)
        edit(tensors, next(key for key in tensors if "lora_A" in key))
        save_file(tensors, folder / WEIGHTS_NAME)
        with pytest.raises(PatchError, match=match) as caught:
            Patch.load(folder)
        assert "\n" not in str(caught.value) and str(folder) in str(caught.value)

    def test_pickles_and_absent_files(self, tmp_path: Path) -> None:
        ran, disguised = tmp_path / "ran", tmp_path / WEIGHTS_NAME

        class Bomb:
            def __reduce__(self) -> tuple[object, tuple[object, ...]]:
                return (Path.touch, (ran,))

        def refused(place: Path, told: str = "pickle") -> None:
            with pytest.raises(PatchError, match=told):
                Patch.load(place)

        refused(tmp_path / "nowhere", "no patch at")
        refused(tmp_path, "is not in it")
        disguised.write_bytes(pickle.dumps(Bomb()))
        refused(disguised)
        torch.save({"a": torch.ones(1)}, disguised)
        refused(tmp_path)
        disguised.rename(tmp_path / "pytorch_lora_weights.bin")
        refused(tmp_path)
        assert not ran.exists()

    def test_damaged_files(self, folder: Path) -> None:
        whole = (folder / WEIGHTS_NAME).read_bytes()
        for damaged in (b"", whole[:8], whole[:100], whole[:-7], whole + b"x", b"\xff" * 64):
            (folder / WEIGHTS_NAME).write_bytes(damaged)
            with pytest.raises(PatchError):
                Patch.load(folder)

    @pytest.mark.parametrize("change", ["other keys", "another header", "gone"])
    def test_a_file_that_changes_between_check_and_load(
        self, folder: Path, change: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        file = folder / WEIGHTS_NAME
        tensors = factors("unet.x") if change == "other keys" else load_file(file)

        def swapped(path: Path) -> files.SafetensorsHeader:
            header = files.read_safetensors_header(path)
            file.unlink()
            if change != "gone":
                file_of(file, tensors, {"recare_patch.concept": "something else"})
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
            ("recipe", None, "a patch has a recipe"),
            *((key, DEEP, "malformed header entry") for key in ("versions", "rank", "care_set")),
            ("care_set", "[]", "malformed header entry"),
            ("care_set", '{"tokens": [{"kept": true}]}', "malformed header entry"),
            ("care_set", '{"tokens": [{"kept": true, "text": 3}]}', "malformed header entry"),
            ("lora_adapter_metadata", DEEP, "malformed header entry"),
        ],
    )
    def test_header_entries(self, folder: Path, key: str, value: str | None, match: str) -> None:
        file = folder / WEIGHTS_NAME
        ours = key != "lora_adapter_metadata"
        header = files.read_safetensors_header(file).metadata if ours else {}
        changed = {**header, f"recare_patch.{key}" if ours else key: value}
        file_of(file, load_file(file), {name: text for name, text in changed.items() if text is not None})
        with pytest.raises(PatchError, match=match):
            Patch.load(folder)


class TestCheckBase:
    def test_its_own_and_another(
        self, patch: Patch, both: Patch, tiny_sd: Path, tiny_sd_v: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        base = load_base(tiny_sd, device="cpu")
        assert patch.check_base(base, strict=True)
        assert both.components == ("unet", "text_encoder") and both.check_base(base, strict=True)
        with both.apply(base.pipeline):
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

    def test_a_patch_of_the_text_encoder_works_on_every_base_with_it(
        self, text_patch: Patch, tiny_sd: Path, tmp_path: Path
    ) -> None:
        sibling = make_tiny_sd(tmp_path / "tiny-sibling", seed=7)
        shutil.copytree(tiny_sd / "text_encoder", sibling / "text_encoder", dirs_exist_ok=True)
        base = load_base(sibling, device="cpu")
        assert text_patch.check_base(base, strict=True)
        with text_patch.apply(base.pipeline):
            assert text_patch.check_base(base, strict=True)
            ours = base.generate(PROMPTS, SEEDS, steps=3)
        pipeline = plain(sibling)
        pipeline.load_lora_weights(dict(text_patch.tensors))
        assert difference(ours, draw(pipeline)) <= 1
        with torch.no_grad():
            next(base.components["text_encoder"].parameters()).mul_(2)
        with pytest.raises(IncompatiblePatchError, match="the text encoder of base 'tiny-sibling'"):
            text_patch.check_base(base, strict=True)

    def test_one_hash_for_all_ways_of_naming(self, text_patch: Patch, tiny_sd: Path, tmp_path: Path) -> None:
        """Transformers 5 leaves ``text_model.`` out of names, and old files store positions."""
        older = tmp_path / "older"
        shutil.copytree(tiny_sd, older)
        (file,) = (older / "text_encoder").glob("*.safetensors")
        weights = {f"text_model.{name}": tensor for name, tensor in load_file(file).items()}
        weights["text_model.embeddings.position_ids"] = torch.arange(77)[None]
        save_file(weights, file, {"format": "pt"})
        hashes = {
            load_base(folder, device="cpu", precision=precision).component_hash("text_encoder")
            for folder in (tiny_sd, older)
            for precision in ("fp32", "bf16")
        }
        record = merging.merge([(text_patch, 1.0)], older, tmp_path / "merged")
        assert hashes == {record.base_hashes["text_encoder"]}
