"""Patches that change the text encoder: everywhere a patch of the denoiser goes, they go as well."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file

from recare_patch.cli import cli
from recare_patch.combine import merging
from recare_patch.combine import stacking as composing
from recare_patch.core.errors import IncompatiblePatchError, NoMatchingModuleError
from recare_patch.measure.checks.fine_tuning import changed, merge_into
from recare_patch.models import lora as adapters
from recare_patch.models.embeds import BaseModel
from recare_patch.models.loading import load_base
from recare_patch.patch import formats
from recare_patch.patch.patch import Patch, PatchMetadata
from recare_patch.recipe.recipe import WEIGHTS_NAME, Recipe
from tests.patch.test_patch import PROMPTS, SEEDS, _assert_same_state, _difference, _draw, _state, trained
from tests.tiny import make_tiny_sd


def text_trained(folder: Path, *, seed: int = 0, size: float = 0.3) -> tuple[BaseModel, Patch]:
    """A base whose text encoder holds a strong random adapter, and its patch."""
    base = load_base(folder, device="cpu")
    generator = torch.Generator().manual_seed(seed)
    encoder = base.components["text_encoder"]
    parameters = adapters.attach(encoder, layers="text-encoder", rank=2, alpha=6.0, generator=generator)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    recipe = Recipe(
        concept={"text": "Monet", "kind": "style"},  # type: ignore[arg-type]
        method="s-grace",
        adapter={"layers": "text-encoder", "rank": 2, "alpha": 6.0},  # type: ignore[arg-type]
    )
    metadata = PatchMetadata.describe(recipe, base, None, {})
    return base, Patch.from_adapter(base, "recare", 2, 6.0, metadata)


@pytest.fixture(scope="module")
def text_patch(tiny_sd: Path) -> Patch:
    return text_trained(tiny_sd)[1]


@pytest.fixture(scope="module")
def unet_patch(tiny_sd: Path) -> Patch:
    return trained(tiny_sd)[1]


@pytest.fixture(scope="module")
def sibling(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another denoiser behind the same text encoder."""
    folder = make_tiny_sd(tmp_path_factory.mktemp("sibling") / "tiny-sibling", seed=7)
    shutil.rmtree(folder / "text_encoder")
    shutil.copytree(tiny_sd / "text_encoder", folder / "text_encoder")
    return folder


def _plain(folder: Path) -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _text_state(pipeline: StableDiffusionPipeline) -> dict[str, object]:
    encoder = pipeline.text_encoder
    return {
        "modules": [(name, type(module), module.training) for name, module in encoder.named_modules()],
        "weights": {name: tensor.clone() for name, tensor in encoder.state_dict().items()},
        "gradients": [(name, p.requires_grad) for name, p in encoder.named_parameters()],
        "configs": sorted(getattr(encoder, "peft_config", {})),
        "loaded": bool(encoder._hf_peft_config_loaded),
        "random": torch.get_rng_state().tolist(),
    }


class TestAdapter:
    def test_it_goes_into_the_blocks_of_a_text_encoder_alone(self, tiny_sd: Path) -> None:
        base = load_base(tiny_sd, device="cpu")
        encoder = base.components["text_encoder"]
        found = adapters.target_modules(encoder, "text-encoder")
        assert len(found) == 2 * 6 and all(".layers." in name for name in found)
        assert set(adapters.adapted(base, "text-encoder")) == {"text_encoder"}
        assert set(adapters.adapted(base, "attention")) == {"unet"}
        with pytest.raises(NoMatchingModuleError, match="it has text-encoder"):
            adapters.target_modules(encoder, "all")
        with pytest.raises(NoMatchingModuleError, match="no linear layer"):
            adapters.target_modules(base.denoiser, "text-encoder")

    def test_off_is_the_teacher(self, tiny_sd: Path) -> None:
        plain = load_base(tiny_sd, device="cpu").encode_prompts(PROMPTS).prompt_embeds
        base, _ = text_trained(tiny_sd)
        networks = tuple(base.components.values())
        changed_embeds = base.encode_prompts(PROMPTS).prompt_embeds
        assert (changed_embeds - plain).abs().max() > 0.1
        with adapters.off(*networks):
            assert torch.equal(base.encode_prompts(PROMPTS).prompt_embeds, plain)
        assert torch.equal(base.encode_prompts(PROMPTS).prompt_embeds, changed_embeds)
        with adapters.frozen(*networks):
            assert not any(p.requires_grad for network in networks for p in network.parameters())
        adapters.detach(base.components["text_encoder"])
        assert torch.equal(base.encode_prompts(PROMPTS).prompt_embeds, plain)


class TestSameEverywhere:
    @pytest.mark.parametrize("base_name", ["tiny_sd", "tiny_sd_v"])
    def test_pictures(self, base_name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
        source = request.getfixturevalue(base_name)
        base, made = text_trained(source)
        live = base.generate(PROMPTS, SEEDS, steps=3)
        exact = Patch.from_adapter(base, "recare", 2, 6.0, dtype=torch.float32)
        adapters.detach(base.components["text_encoder"])
        with exact.apply(base.pipeline):
            assert _difference(base.generate(PROMPTS, SEEDS, steps=3), live) <= 1
        made.save(tmp_path)
        assert all(key.startswith("text_encoder.text_model.encoder.") for key in Patch.load(tmp_path).tensors)
        with Patch.load(tmp_path).apply(base.pipeline):
            ours = base.generate(PROMPTS, SEEDS, steps=3)
        plain = _plain(source)
        untouched = _draw(plain)
        plain.load_lora_weights(str(tmp_path))
        assert _difference(ours, _draw(plain)) <= 1
        assert _difference(untouched, ours) > 20

    def test_it_works_on_every_base_with_this_encoder(
        self, text_patch: Patch, sibling: Path, tiny_sd_v: Path, tmp_path: Path
    ) -> None:
        base = load_base(sibling, device="cpu")
        assert text_patch.check_base(base, strict=True)
        before = base.generate(PROMPTS, SEEDS, steps=2)
        with text_patch.apply(base.pipeline):
            assert _difference(base.generate(PROMPTS, SEEDS, steps=2), before) > 20
            assert text_patch.check_base(base, strict=True)
            ours = base.generate(PROMPTS, SEEDS, steps=3)
        plain = _plain(sibling)
        plain.load_lora_weights(dict(text_patch.tensors))
        assert _difference(ours, _draw(plain)) <= 1
        with torch.no_grad():
            next(base.components["text_encoder"].parameters()).mul_(2)
        with pytest.raises(IncompatiblePatchError, match="the text encoder of base 'tiny-sibling'"):
            text_patch.check_base(base, strict=True)
        with pytest.raises(IncompatiblePatchError, match="does not fit"):
            text_patch.check_base(load_base(tiny_sd_v, device="cpu"))

    def test_both_encoders_in_plain_diffusers(self, tiny_sdxl: Path, tmp_path: Path) -> None:
        base, generator = load_base(tiny_sdxl, device="cpu"), torch.Generator().manual_seed(0)
        for encoder in adapters.adapted(base, "text-encoder").values():
            for p in adapters.attach(encoder, layers="text-encoder", rank=2, alpha=6.0, generator=generator):
                p.data.add_(0.3 * torch.randn(p.shape, generator=generator))
        made = Patch.from_adapter(base, "recare", 2, 6.0)
        assert made.components == ("text_encoder", "text_encoder_2")
        made.save(tmp_path)
        ours = base.encode_prompts(PROMPTS)
        plain = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl)
        plain.load_lora_weights(str(tmp_path))
        with torch.no_grad():
            states, _, pooled, _ = plain.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
        torch.testing.assert_close(states, ours.prompt_embeds, atol=2e-2, rtol=2e-2)
        torch.testing.assert_close(pooled, ours.pooled_prompt_embeds, atol=2e-2, rtol=2e-2)

    def test_one_hash_for_all_ways_of_naming(self, tiny_sd: Path, tmp_path: Path) -> None:
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
        assert len(hashes) == 1
        stored = merging._hashes(older, "older", ["text_encoder"])
        assert set(stored.values()) == hashes


class TestApply:
    @pytest.mark.parametrize("both", [False, True])
    def test_leaves_no_trace(self, both: bool, text_patch: Patch, unet_patch: Patch, tiny_sd: Path) -> None:
        patch = composing.stack([(text_patch, 1.0), (unet_patch, 1.0)]) if both else text_patch
        pipe = _plain(tiny_sd)
        pipe.text_encoder.train()
        before, text, pictures = _state(pipe), _text_state(pipe), _draw(pipe)
        with patch.apply(pipe) as applied:
            assert applied.active
            assert _difference(_draw(pipe), pictures) > 20
            applied.set_scale(0.0)
            assert _difference(_draw(pipe), pictures) == 0
        assert not applied.active
        _assert_same_state(_state(pipe), before)
        _assert_same_state(_text_state(pipe), text)
        assert _difference(_draw(pipe), pictures) == 0

    def test_beside_another_lora(self, text_patch: Patch, tiny_sd: Path) -> None:
        _, other = text_trained(tiny_sd, seed=4)
        pipe = _plain(tiny_sd)
        pipe.load_lora_weights(dict(other.tensors), adapter_name="other")
        before, pictures = _text_state(pipe), _draw(pipe)
        with text_patch.apply(pipe):
            ours = _draw(pipe)
        _assert_same_state(_text_state(pipe), before)
        assert _difference(_draw(pipe), pictures) == 0
        pipe.load_lora_weights(dict(text_patch.tensors), adapter_name="patch")
        pipe.set_adapters(["other", "patch"])
        assert _difference(ours, _draw(pipe)) <= 1

    def test_a_failure_while_loading_is_undone(
        self, text_patch: Patch, unet_patch: Patch, tiny_sd: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pipe = _plain(tiny_sd)
        before, text = _state(pipe), _text_state(pipe)

        def fail(*args: object, **kwargs: object) -> None:
            raise RuntimeError("a fault\nof many lines")

        monkeypatch.setattr(type(pipe.text_encoder), "load_adapter", fail)
        with pytest.raises(IncompatiblePatchError, match="a fault"):
            composing.stack([(unet_patch, 1.0), (text_patch, 1.0)]).apply(pipe)
        _assert_same_state(_state(pipe), before)
        _assert_same_state(_text_state(pipe), text)


class TestTogether:
    def test_a_stack_is_both(
        self, text_patch: Patch, unet_patch: Patch, tiny_sd: Path, tmp_path: Path
    ) -> None:
        composing.save_stack(composing.stack([(unet_patch, 0.5), (text_patch, 1.0)]), tmp_path / "both")
        both = Patch.load(tmp_path / "both")
        assert both.components == ("unet", "text_encoder")
        assert both.check_base(load_base(tiny_sd, device="cpu"), strict=True)
        pipe = _plain(tiny_sd)
        with unet_patch.apply(pipe, scale=0.5), text_patch.apply(pipe):
            separate = _draw(pipe)
        pipe.load_lora_weights(str(tmp_path / "both"))
        assert _difference(separate, _draw(pipe)) <= 1

    def test_only_what_both_change_must_be_of_one_base(
        self, text_patch: Patch, sibling: Path, tiny_sd_v: Path
    ) -> None:
        _, other = trained(sibling)
        together = composing.stack([(text_patch, 1.0), (other, 1.0)]).metadata
        assert together is not None and other.metadata is not None
        assert together.base_denoiser_sha256 == other.metadata.base_denoiser_sha256
        assert together.base == other.metadata.base
        _, foreign = text_trained(tiny_sd_v)
        with pytest.raises(IncompatiblePatchError, match="of one base only"):
            composing.stack([(text_patch, 1.0), (foreign, 1.0)])

    def test_merged_and_taken_out_again(
        self, text_patch: Patch, unet_patch: Patch, tiny_sd: Path, sibling: Path, tmp_path: Path
    ) -> None:
        patches = [(text_patch, 1.0), (unet_patch, 0.5)]
        record = merging.merge(patches, tiny_sd, tmp_path / "m")
        assert record.base_text_encoders_sha256 != record.merged_text_encoders_sha256
        assert merging.compare(patches, tiny_sd, tmp_path / "m", steps=2) <= 1
        assert merging.MergeRecord.load(tmp_path / "m") == record
        back = merging.unmerge(tmp_path / "m", [text_patch, unet_patch], tmp_path / "u", base=tiny_sd)
        assert back.max_difference is not None and back.max_difference < 1e-6
        merging.merge([(text_patch, 1.0)], sibling, tmp_path / "s")
        with pytest.raises(
            IncompatiblePatchError, match=r"'Van Gogh' .* the denoiser of base 'tiny-sibling'"
        ):
            merging.merge(patches, sibling, tmp_path / "t")

    def test_merged_in_memory(self, text_patch: Patch, tiny_sd: Path) -> None:
        base = load_base(tiny_sd, device="cpu")
        plain = base.encode_prompts(PROMPTS).prompt_embeds
        with text_patch.apply(base.pipeline, scale=0.5):
            applied = base.encode_prompts(PROMPTS).prompt_embeds
        with changed(base.components["text_encoder"]):
            merge_into(base.components, text_patch, 0.5)
            torch.testing.assert_close(base.encode_prompts(PROMPTS).prompt_embeds, applied)
        assert torch.equal(base.encode_prompts(PROMPTS).prompt_embeds, plain)


class TestOtherTools:
    def test_kohya_and_back(
        self, text_patch: Patch, unet_patch: Patch, tiny_sd: Path, tmp_path: Path
    ) -> None:
        for name, made in (
            ("text", text_patch),
            ("both", composing.stack([(text_patch, 1.0), (unet_patch, 1.0)], dtype=torch.float16)),
        ):
            file = formats.write_kohya(made, tmp_path / f"{name}.safetensors")
            keys = {key.split(".")[0] for key in load_file(file)}
            assert any(key.startswith("lora_te_text_model_encoder_layers_0_") for key in keys)
            back = formats.from_any(file)
            assert back.metadata == made.metadata
            assert back.tensors.keys() == made.tensors.keys()
            assert all(torch.equal(tensor, back.tensors[key]) for key, tensor in made.tensors.items())
            pipe = _plain(tiny_sd)
            with made.apply(pipe):
                ours = _draw(pipe)
            pipe.load_lora_weights(str(tmp_path), weight_name=file.name)
            assert _difference(ours, _draw(pipe)) <= 2

    def test_the_names_of_either_transformers_are_read(self, text_patch: Patch, tmp_path: Path) -> None:
        flat = {key.replace("text_model.", ""): tensor for key, tensor in text_patch.tensors.items()}
        save_file(flat, tmp_path / "flat.safetensors")
        assert formats.from_any(tmp_path / "flat.safetensors").tensors.keys() == text_patch.tensors.keys()

    def test_a_scale_in_the_header_is_refused(self, text_patch: Patch, tmp_path: Path) -> None:
        file = tmp_path / WEIGHTS_NAME
        note = {"text_encoder.r": 2, "text_encoder.lora_alpha": 2}
        save_file(dict(text_patch.tensors), file, {"lora_adapter_metadata": json.dumps(note)})
        Patch.load(file)
        note["text_encoder.lora_alpha"] = 1
        save_file(dict(text_patch.tensors), file, {"lora_adapter_metadata": json.dumps(note)})
        with pytest.raises(Exception, match="scale of its own"):
            Patch.load(file)

    def test_inspect(self, text_patch: Patch, tmp_path: Path) -> None:
        text_patch.save(tmp_path / "p")
        result = CliRunner().invoke(cli, ["inspect", str(tmp_path / "p"), "--json"])
        assert result.exit_code == 0, result.output
        facts = json.loads(result.stdout)
        assert facts["parts"] == {"text_encoder": 12} and facts["layers"] == "text-encoder"


def test_pictures_of_a_patched_encoder_are_told_from_the_base(text_patch: Patch, tiny_sd: Path) -> None:
    from recare_patch.core.errors import EvaluationError
    from recare_patch.measure.pictures import Studio

    base = load_base(tiny_sd, device="cpu")
    with text_patch.apply(base.pipeline), pytest.raises(EvaluationError, match="is switched on"):
        Studio(base)
    studio = Studio(base)
    plain, patched = (studio.draw(PROMPTS, SEEDS, steps=2, patches=p) for p in ([], [(text_patch, 1.0)]))
    assert np.abs(np.asarray(plain[0], dtype=int) - np.asarray(patched[0], dtype=int)).max() > 20
