"""What every base model must do; a base joins with a subclass that names its folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from recare_patch.core import BaseModelError, UnknownNameError
from recare_patch.models import BaseModel, EvaluationCounter, PromptEmbeds, base_folder, load_base, sample_timesteps
from recare_patch.models import lora as adapters


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _difference(first: list[Image.Image], second: list[Image.Image]) -> int:
    pairs = zip(first, second, strict=True)
    return max(int(np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max()) for a, b in pairs)


def _same(found: PromptEmbeds, wanted: PromptEmbeds) -> None:
    torch.testing.assert_close(vars(found), vars(wanted), rtol=1e-4, atol=1e-5)


class BaseModelContract:
    """The contract; subclasses give ``folder`` and the facts that must be read from it."""

    source: ClassVar[str]
    prediction_type: str
    latent_shape: tuple[int, int, int]
    token_width: int
    prompt_shape: tuple[int, int]
    pooled_width: int | None = None
    left_out: ClassVar[dict[str, None]] = {}

    @pytest.fixture(scope="class")
    def folder(self, request: pytest.FixtureRequest) -> Path:
        return Path(request.getfixturevalue(self.source))

    @pytest.fixture(scope="class")
    def base(self, folder: Path) -> BaseModel:
        return load_base(folder, device="cpu")

    @pytest.fixture
    def noised(self, base: BaseModel) -> tuple[Tensor, Tensor]:
        return torch.randn((2, 5, *base.latent_shape), generator=_generator()).unbind()

    def _loss(self, base: BaseModel, embeds: PromptEmbeds) -> Tensor:
        latents = torch.randn((1, *base.latent_shape), generator=_generator())
        return base.denoise(latents, torch.tensor([500]), embeds).square().mean()

    def test_facts(self, base: BaseModel, folder: Path) -> None:
        assert base.prediction_type == self.prediction_type
        assert base.latent_shape == self.latent_shape
        assert base.token_width == self.token_width
        assert base.id == folder.name
        assert base.num_train_timesteps == 1000
        assert base.denoiser is getattr(base.pipeline, base.denoiser_name)
        assert not any(p.requires_grad for p in base.denoiser.parameters())

    def test_prompts_become_rows(self, base: BaseModel) -> None:
        embeds = base.encode_prompts(["a cat", "a dog at night", ""])
        assert embeds.prompt_embeds.shape == (3, *self.prompt_shape)
        pooled = embeds.pooled_prompt_embeds
        assert (None if pooled is None else pooled.shape) == (self.pooled_width and (3, self.pooled_width))
        assert not embeds.prompt_embeds.requires_grad
        _same(embeds[1], base.encode_prompts(["a dog at night"]))

    def test_vectors_of_a_word_stand_for_the_word(self, base: BaseModel) -> None:
        vectors = torch.stack([base.word_vector("van"), base.word_vector("night")])
        found = base.encode_with_vectors(["a painting of <*> with stars", "<*>"], vectors)
        prompts = ["a painting of van night with stars", "van night"]
        wanted = base.encode_prompts(prompts)
        _same(found, wanted)
        # The hook is gone again.
        assert torch.equal(base.encode_prompts(prompts).prompt_embeds, wanted.prompt_embeds)

    def test_a_prompts_token_vectors_stand_for_the_prompt(self, base: BaseModel) -> None:
        prompts = ["a painting of van gogh with stars", "a cat", ""]
        table = base.token_table()
        rows = [table[base.token_ids(prompt)] for prompt in prompts]
        _same(base.encode_token_vectors(rows), base.encode_prompts(prompts))
        _same(base.encode_token_vectors(rows[2:]), base.encode_prompts([""]))
        # What is too long loses its end, as a prompt does.
        _same(base.encode_token_vectors([rows[1].repeat(60, 1)]), base.encode_prompts(["a cat " * 60]))

    def test_many_prompts_are_encoded_as_few(self, base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
        prompts = ["a cat", "", "a painting of van gogh", "stars", "a boat"]
        vectors, masked = base.word_vector("cat")[None], [f"{prompt} <*>" for prompt in prompts]
        with torch.no_grad():
            wanted = base.encode_prompts(prompts), base.encode_with_vectors(masked, vectors)
            monkeypatch.setattr("recare_patch.models.encoding.ENCODED_AT_ONCE", 2)
            found = base.encode_prompts(prompts), base.encode_with_vectors(masked, vectors)
        for one, other in zip(found, wanted, strict=True):
            _same(one, other)

    def test_vectors_get_a_gradient_through_text_and_denoiser(self, base: BaseModel) -> None:
        vectors = base.token_table()[base.token_ids("a cat")].requires_grad_()
        for embeds in (base.encode_with_vectors(["a photo of <*>"], vectors), base.encode_token_vectors([vectors])):
            vectors.grad = None
            self._loss(base, embeds).backward()
            assert vectors.grad is not None
            assert (vectors.grad.abs().amax(1) > 0).all()

    def test_bad_vectors_and_prompts(self, base: BaseModel) -> None:
        vectors = base.word_vector("person")[None]
        wide = torch.zeros(2, self.token_width + 1)
        for match, call in {
            r"has no <\*>": lambda: base.encode_with_vectors(["a photo"], vectors),
            "do not fit": lambda: base.encode_with_vectors(["<*>"], wide),
            "do not fit base": lambda: base.encode_token_vectors([wide]),
            "77 tokens": lambda: base.encode_with_vectors(["<*>"], vectors.repeat(80, 1)),
            "no token vectors": lambda: base.encode_token_vectors([]),
            "no token in": lambda: base.word_vector(" "),
            "2 prompts were given with 1 seeds": lambda: base.generate(["a", "b"], [0]),
            "either prompts or": lambda: base.generate(None, [0]),
            "no prompt": lambda: base.generate([], []),
            "no pictures": lambda: base.encode_images([]),
        }.items():
            with pytest.raises(BaseModelError, match=match):
                call()

    def test_tokens_to_text_and_back(self, base: BaseModel) -> None:
        ids = base.token_ids("a painting of van gogh")
        assert base.token_text(ids) == "a painting of van gogh"
        specials = base.special_token_ids
        assert base.token_text([*specials, *ids, *specials]) == "a painting of van gogh"
        assert base.token_table().shape == (len(base.pipeline.tokenizer), self.token_width)
        torch.testing.assert_close(base.token_table()[base.token_ids("cat")[0]], base.word_vector("cat"))

    def test_denoising_a_batch_is_denoising_its_rows(self, base: BaseModel) -> None:
        latents = torch.randn((3, *base.latent_shape), generator=_generator())
        at, embeds = torch.tensor([1, 400, 999]), base.encode_prompts(["a cat", "", "a star"])
        with torch.no_grad():
            together = base.denoise(latents, at, embeds)
            apart = torch.cat([base.denoise(latents[k : k + 1], at[k], embeds[k]) for k in range(3)])
        torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)

    def test_pictures_are_a_plain_pipelines(self, base: BaseModel, folder: Path) -> None:
        from diffusers import DiffusionPipeline

        plain = DiffusionPipeline.from_pretrained(folder, **self.left_out)
        plain.set_progress_bar_config(disable=True)
        prompts, seeds = ["a cat", "stars in the night sky", "a boat"], [3, 4, 2**40]
        wanted = plain(
            prompts, num_inference_steps=3, guidance_scale=5.0, generator=[_generator(s) for s in seeds]
        ).images
        found = base.generate(prompts, seeds, steps=3, guidance_scale=5.0)
        assert _difference(found, wanted) == 0
        one_by_one = base.generate(prompts, seeds, steps=3, guidance_scale=5.0, batch_size=1)
        assert _difference(one_by_one, wanted) <= 1

    def test_embeddings_draw_what_their_prompts_draw(self, base: BaseModel) -> None:
        prompts, seeds = ["a cat", "a wheat field"], [0, 1]
        embeds = base.encode_prompts(prompts)
        wanted = base.generate(prompts, seeds, steps=2)
        assert _difference(base.generate(None, seeds, steps=2, prompt_embeds=embeds), wanted) == 0
        latents = base.sample_latents(embeds, seeds, steps=2)
        assert latents.shape == (2, *base.latent_shape)
        assert _difference(base.decode_latents(latents), wanted) <= 1

    def test_pictures_to_latents_and_back(self, base: BaseModel) -> None:
        pictures = base.generate(["a cat"] * 3, [0, 1, 2], steps=1)
        latents = base.encode_images(pictures)
        assert (latents.shape, latents.dtype) == ((3, *base.latent_shape), torch.float32)
        # A picture of another size is brought to the base's.
        other = base.encode_images([pictures[0].resize((50, 41))])
        assert other.shape == (1, *base.latent_shape)
        assert base.decode_latents(latents)[0].size == pictures[0].size
        pixels = base.pipeline.image_processor.preprocess(pictures[0])
        with torch.no_grad():
            mean = base.pipeline.vae.encode(pixels).latent_dist.mean
        vae = base.pipeline.vae.config
        scaled = (mean - (vae.shift_factor or 0)) * vae.scaling_factor
        torch.testing.assert_close(latents[:1], scaled, rtol=1e-4, atol=1e-5)

    def test_every_evaluation_is_counted(self, folder: Path) -> None:
        base = load_base(folder, device="cpu")
        embeds = base.encode_prompts(["a cat", "a dog"])
        with base.counter.stage("pictures"):
            base.sample_latents(embeds, [0, 1], steps=3, guidance_scale=5.0)
        assert base.counter.by_stage == {"pictures": 2 * 2 * 3}
        with base.counter.stage("unguided"):
            base.sample_latents(embeds, [0, 1], steps=3, guidance_scale=1.0)
        assert base.counter.by_stage["unguided"] == 2 * 3
        adapters.attach(base.denoiser, layers="cross-attention", rank=1, alpha=1.0, generator=_generator())
        latents, at = torch.zeros((2, *base.latent_shape)), torch.tensor([1, 2])
        with base.counter.stage("erase"):
            base.denoise(latents, at, embeds)
            with torch.no_grad(), adapters.off(base.denoiser):
                base.denoise(latents, at, embeds)
        assert base.counter.by_stage["erase"] == 2 * 3 + 2
        vectors = base.word_vector("cat")[None].requires_grad_()
        adapters.detach(base.denoiser)
        with base.counter.stage("invert"):
            base.denoise(latents[:1], at[:1], base.encode_with_vectors(["<*>"], vectors))
        assert base.counter.by_stage["invert"] == 3
        assert base.counter.total == 12 + 6 + 8 + 3

    def test_hash_is_of_the_weights(self, base: BaseModel, folder: Path) -> None:
        own = base.denoiser_hash()
        assert own == load_base(folder, device="cpu", precision="fp16").denoiser_hash()
        assert own == load_base(folder, device="cpu", precision="bf16").denoiser_hash()
        changed = load_base(folder, device="cpu")
        with torch.no_grad():
            next(iter(changed.denoiser.parameters())).view(-1)[0] += 0.5
        assert changed.denoiser_hash() != own


class Discrete(BaseModelContract):
    """Bases with a discrete noise schedule."""

    def test_noise_and_its_target_are_the_schedulers(self, base: BaseModel, noised: tuple[Tensor, Tensor]) -> None:
        clean, noise = noised
        at, scheduler = torch.tensor([0, 1, 500, 731, 999]), base.pipeline.scheduler
        noisy = base.add_noise(clean, noise, at)
        torch.testing.assert_close(noisy, scheduler.add_noise(clean, noise, at))
        perfect = base.training_target(clean, noise, at)
        if self.prediction_type == "v_prediction":
            torch.testing.assert_close(perfect, scheduler.get_velocity(clean, noise, at))
        # A perfect prediction leads back to the picture, as far as there is something left of it.
        scheduler.set_timesteps(1000)
        for row in range(4):
            back = scheduler.step(perfect[row], int(at[row]), noisy[row]).pred_original_sample
            torch.testing.assert_close(back, clean[row], rtol=1e-3, atol=1e-3)

    def test_an_error_counts_as_it_does_in_the_schedulers_picture(
        self, base: BaseModel, noised: tuple[Tensor, Tensor]
    ) -> None:
        clean, noise = noised
        at, scheduler = torch.tensor([1, 250, 500, 731]), base.pipeline.scheduler
        scheduler.set_timesteps(1000)
        noisy, perfect = base.add_noise(clean[:4], noise[:4], at), base.training_target(clean[:4], noise[:4], at)
        wrong = [
            scheduler.step(perfect[row] + 0.1, int(at[row]), noisy[row]).pred_original_sample - clean[row]
            for row in range(4)
        ]
        expected = torch.stack(wrong).flatten(1).square().mean(1)
        found = base.picture_weights(at, most=1e9)
        torch.testing.assert_close(found / found[2], expected / expected[2], rtol=1e-2, atol=1e-3)
        whole = base.picture_weights(torch.arange(base.num_train_timesteps), most=20.0)
        torch.testing.assert_close(whole.mean(), torch.tensor(1.0))
        assert (whole.diff() >= 0).all()
        if self.prediction_type == "epsilon":
            assert (whole == whole.max()).sum() > 1  # bounded, where hardly a picture is left


class TestEpsilon(Discrete):
    source = "tiny_sd"
    prediction_type, latent_shape, token_width = "epsilon", (4, 8, 8), 32
    prompt_shape = (77, 32)

    def test_other_predictions_have_no_target(
        self, base: BaseModel, noised: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(base, "prediction_type", "sample")
        with pytest.raises(UnknownNameError, match="v_prediction"):
            base.training_target(*noised, torch.arange(5))


class TestVPredictionAndOtherSizes(Discrete):
    source = "tiny_sd_v"
    prediction_type, latent_shape, token_width = "v_prediction", (4, 12, 12), 48
    prompt_shape = (77, 48)


class TestTwoEncodersAndPooledText(Discrete):
    source = "tiny_sdxl"
    prediction_type, latent_shape, token_width = "epsilon", (4, 16, 16), 80
    prompt_shape, pooled_width = (77, 80), 48

    def test_an_empty_prompt_is_what_guidance_starts_from(self, base: BaseModel) -> None:
        embeds = base.encode_prompts(["", "a cat"])
        assert not embeds[0].prompt_embeds.any() and embeds[1].prompt_embeds.any()
        assert embeds.pooled_prompt_embeds is not None and not embeds.pooled_prompt_embeds[0].any()

    def test_sizes_beside_the_prompt_are_the_pictures(self, base: BaseModel) -> None:
        seen: list[torch.Tensor] = []

        def look(module: object, args: object, kwargs: dict[str, dict[str, torch.Tensor]]) -> None:
            seen.append(kwargs["added_cond_kwargs"]["time_ids"])

        hook = base.denoiser.register_forward_pre_hook(look, with_kwargs=True)
        embeds = base.encode_prompts(["a cat", "a dog"])
        base.denoise(torch.zeros((2, *base.latent_shape)), torch.tensor([5, 6]), embeds)
        base.sample_latents(embeds, [0, 1], steps=1, guidance_scale=1.0)
        hook.remove()
        assert [ids.tolist() for ids in seen] == [[[64, 64, 0, 0, 64, 64]] * 2] * 2


class TestFlowMatchingAndJointAttention(BaseModelContract):
    """There is room for architectures that share nothing with the UNets."""

    source = "tiny_sd3"
    prediction_type, latent_shape, token_width = "flow", (4, 8, 8), 80
    prompt_shape, pooled_width = (77 + 256, 96), 80
    left_out: ClassVar[dict[str, None]] = {"text_encoder_3": None, "tokenizer_3": None}

    def test_noise_and_its_target_are_the_schedulers(self, base: BaseModel, noised: tuple[Tensor, Tensor]) -> None:
        clean, noise = noised
        scheduler = base.pipeline.scheduler
        scheduler.set_timesteps(10)
        at = scheduler.timesteps[1::2]
        torch.testing.assert_close(base.add_noise(clean, noise, at), scheduler.scale_noise(clean, at, noise))
        # A perfect prediction leads back to the picture in one step.
        scheduler.set_timesteps(1)
        at = scheduler.timesteps
        perfect = base.training_target(clean, noise, at)
        found = scheduler.step(perfect, at[0], base.add_noise(clean, noise, at)).prev_sample
        torch.testing.assert_close(found, clean, rtol=1e-4, atol=1e-4)
        # Wrong by δ, it leads to a picture that is wrong by σ δ.
        weights = base.picture_weights(torch.tensor([250.0, 500.0, 1000.0]), most=20.0)
        torch.testing.assert_close(weights / weights[2], torch.tensor([0.25, 0.5, 1.0]).square())


class TestRefusals:
    """Folders that are no base, each refused in one sentence."""

    @pytest.fixture
    def copy(self, tiny_sd: Path, tmp_path: Path) -> Path:
        return Path(shutil.copytree(tiny_sd, tmp_path / "copy"))

    def _refused(self, source: Path | str, match: str) -> None:
        with pytest.raises(BaseModelError, match=match) as caught:
            load_base(str(source), device="cpu")
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
    def test_a_component_is_missing(self, copy: Path, part: str) -> None:
        shutil.rmtree(copy / part)
        self._refused(copy, f"lacks its component '{part}'")

    def test_weights_are_damaged_pickled_or_missing(self, copy: Path) -> None:
        weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:5000])
        self._refused(copy, "cannot be loaded")
        weights.rename(weights.with_suffix(".bin"))
        self._refused(copy, "pickle")
        weights.with_suffix(".bin").unlink()
        self._refused(copy, "no weights for its component 'unet'")

    def test_no_pipeline(self, tmp_path: Path, copy: Path) -> None:
        self._refused(tmp_path, "no model_index.json")
        (tmp_path / "model.safetensors").write_bytes(b"")
        self._refused(tmp_path / "model.safetensors", "is a file")
        with pytest.raises(BaseModelError, match="is a file, and a pipeline folder"):
            base_folder(tmp_path / "model.safetensors")
        self._refused(tmp_path / "nowhere", "was not found")
        self._refused("atelie", "did you mean 'atelier'")
        self._refused("somebody/some-model", "not in the hub.s cache, and HF_HUB_OFFLINE forbids")
        for unreadable in ("{", "[]"):
            (copy / "model_index.json").write_text(unreadable)
            self._refused(copy, "unreadable")

    @pytest.mark.parametrize(
        ("source", "part", "changes", "match"),
        [
            ("tiny_sd", "unet", {"addition_embed_type": "text_time"}, "cannot be loaded|cannot draw"),
            ("tiny_sd", "unet", {"in_channels": 9}, "an inpainting model: .* 9 channels"),
            ("tiny_sd", "vae", {"latent_channels": 16}, "AutoencoderKL with 16 latent channels"),
            ("tiny_sd", "text_encoder", {"hidden_size": 64}, "32 wide.* 64 wide"),
            ("tiny_sd", "scheduler", {"prediction_type": "sample"}, "predicts 'sample'"),
            ("tiny_sdxl", "text_encoder_2", {"vocab_size": 7}, "different vocabularies"),
            ("tiny_sd3", "", {"scheduler": ["diffusers", "DDIMScheduler"]}, "has a DDIMScheduler"),
        ],
    )
    def test_other_architectures(
        self, source: str, part: str, changes: dict[str, object], match: str, tmp_path: Path, request: Any
    ) -> None:
        copy = shutil.copytree(request.getfixturevalue(source), tmp_path / "other")
        names = {"": "model_index.json", "scheduler": "scheduler_config.json"}
        self._edit(copy / part / names.get(part, "config.json"), changes)
        self._refused(copy, match)

    def _edit(self, file: Path, changes: dict[str, Any]) -> None:
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    def test_a_t5_encoder_is_left_out_and_told(
        self, tiny_sd3: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        copy = shutil.copytree(tiny_sd3, tmp_path / "t5")
        self._edit(copy / "model_index.json", {"text_encoder_3": ["transformers", "T5EncoderModel"]})
        load_base(copy)
        assert "is used without its T5 encoder" in caplog.text

    def test_options(self, copy: Path) -> None:
        with pytest.raises(UnknownNameError, match="fp16"):
            load_base(copy, precision="half")
        with pytest.raises(BaseModelError, match="no device"):
            load_base(copy, device="gpu0")

    def test_only_the_half_precision_variant_is_there(self, copy: Path, tiny_sd: Path) -> None:
        for part in ("unet", "vae", "text_encoder"):
            for file in (copy / part).glob("*.safetensors"):
                file.rename(file.with_suffix(".fp16.safetensors"))
        assert load_base(copy).denoiser_hash() == load_base(tiny_sd).denoiser_hash()


class TestPromptEmbeds:
    def test_rows(self) -> None:
        rows = PromptEmbeds(torch.arange(6.0).view(3, 1, 2), torch.arange(3.0)[:, None])
        assert len(rows) == 3
        assert rows[torch.tensor([2, 0])].pooled_prompt_embeds.tolist() == [[2], [0]]  # type: ignore[union-attr]
        assert rows[-1].prompt_embeds.tolist() == [[[4, 5]]]
        assert len(rows[1:]) == 2
        assert len(list(rows)) == 3
        assert rows[:2].repeat(2).pooled_prompt_embeds.tolist() == [[0], [1], [0], [1]]  # type: ignore[union-attr]
        joined = PromptEmbeds.cat([rows, rows[:1]])
        assert len(joined) == 4
        assert rows.to(dtype=torch.float16).prompt_embeds.dtype is torch.float16
        with pytest.raises(IndexError):
            rows[3]
        with pytest.raises(ValueError, match="1 of 2"):
            PromptEmbeds.cat([rows, PromptEmbeds(rows.prompt_embeds)])
        with pytest.raises(ValueError, match="no prompt"):
            PromptEmbeds.cat([])


def test_counter_stages_nest() -> None:
    counter = EvaluationCounter()
    with counter.stage("outer"):
        with counter.stage("inner"):
            counter._count(torch.nn.Identity(), (torch.zeros(2, 1),), {})
        counter._count(torch.nn.Identity(), (), {"sample": torch.zeros(5, 1)})
    assert counter.by_stage == {"inner": 2, "outer": 5}
    assert counter.total == 7


def test_sampled_timesteps_follow_the_generator_and_the_range() -> None:
    first, again = (sample_timesteps(200, 10, 20, _generator(3)).tolist() for _ in range(2))
    assert first == again and set(first) == set(range(10, 20))
    with pytest.raises(ValueError, match="empty"):
        sample_timesteps(1, 5, 5, _generator())
