"""A base made of any diffusers pipeline, by the calls that the pipeline itself makes of its denoiser.

The pipeline is the specification: :mod:`recare_patch.models.calls` learns from a few runs of it how its denoiser is
called, prompts are encoded by running it up to its first call, pictures are drawn by running it whole, and latents are
decoded by letting it end on them. So no family's packing, shift, schedule or text templates are written again.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from recare_patch.core import BaseModelError, noted
from recare_patch.models import calls, lora
from recare_patch.models.captured_prompts import CapturedPrompts, Said
from recare_patch.models.captured_text import LONG, SHORT, CapturedText
from recare_patch.models.encoding import parts_of, tokenizer_of
from recare_patch.models.inputs import PromptEmbeds
from recare_patch.models.latent_diffusion import LatentDiffusion
from recare_patch.models.precision import check_finite

if TYPE_CHECKING:
    from PIL.Image import Image

    from recare_patch.models.layout import Layout

logger = logging.getLogger(__name__)


_PLAIN = {"use_resolution_binning": False, "use_kv_cache": False, "enable_prompt_rewrite": False}
"""What pipelines are asked not to do where they offer it: other sizes, kept keys and values, other prompts."""


class Captured(CapturedText, LatentDiffusion):
    """A base around any text-to-image pipeline of diffusers; :meth:`of` makes the class for one of them."""

    large_encoders = True
    _draws_batches: bool  # whether pictures drawn together are what they are alone

    @classmethod
    def of(cls, layout: Layout) -> type[Captured]:
        """The class for a layout, or one sentence why there is none."""
        import diffusers

        name = str(layout.index.get("_class_name"))
        kind = getattr(diffusers, name, None)
        refused = f"base {layout.name} is a {name}"
        if not isinstance(kind, type) or not issubclass(kind, diffusers.DiffusionPipeline):
            raise BaseModelError(f"{refused}, which is no pipeline of the installed diffusers {diffusers.__version__}")
        asked, parts = inspect.signature(kind.__call__).parameters, inspect.signature(kind).parameters
        if "prompt" not in asked:
            raise BaseModelError(f"{refused}, which reads no prompt: a text-to-image pipeline is needed")
        if {"num_frames", "video", "frames"} & set(asked) or "video" in name.casefold():
            raise BaseModelError(f"{refused}, which draws videos: a text-to-image pipeline is needed")
        if "mask_image" in asked:
            raise BaseModelError(f"{refused}, which fills holes in pictures: a text-to-image pipeline is needed")
        if any(asked[one].default is inspect.Parameter.empty for one in ("image", "control_image") if one in asked):
            raise BaseModelError(f"{refused}, which starts from a picture: a text-to-image pipeline is needed")
        denoiser = next((part for part in lora.DENOISERS if part in layout.listed and part in parts), None)
        if denoiser is None:
            missing = next((part for part in lora.DENOISERS if part in parts), None)
            if missing is not None:
                raise BaseModelError(f"base {layout.name} lacks its component '{missing}'")
            raise BaseModelError(f"{refused}, whose denoiser is not called 'unet' or 'transformer'")
        if apart := sorted({"prior", "movq", "controlnet"} & set(parts)) or sorted({"vae"} - set(parts)):
            told = "draws in pixels" if apart == ["vae"] else f"has a part '{apart[0]}'"
            raise BaseModelError(f"{refused}, which {told}: a pipeline with one denoiser and one autoencoder is needed")
        encoders = tuple(part for part in layout.listed if part.startswith("text_encoder"))
        # Some have a processor of texts and pictures in its place.
        named = {one: one.replace("text_encoder", "processor") for one in encoders if tokenizer_of(one) not in parts}
        absent = {key for key, value in layout.index.items() if isinstance(value, list) and value[:1] == [None]}
        absent |= {"safety_checker", "feature_extractor", "image_encoder"}
        optional = [part for part in parts if part in absent]
        facts = {
            "family": _family(name),
            "pipeline_class": name,
            "denoiser_name": denoiser,
            "encoder_names": encoders,
            "tokenizer_names": {one: name for one, name in named.items() if name in parts},
            "left_out": tuple(optional),
        }
        return type(cls.__name__, (cls,), facts)

    @classmethod
    def check(cls, layout: Layout, *, weights: bool = True) -> None:
        """Refuse a folder that lacks a component, and one whose denoiser cannot be trained."""
        if not cls.encoder_names:
            raise BaseModelError(f"base {layout.name} lacks its component 'text_encoder'")
        super().check(layout, weights=weights)
        told = layout.configs[cls.denoiser_name].get("quantization_config")
        if told is not None:
            how = told.get("quant_method", "an unknown method") if isinstance(told, dict) else told
            raise BaseModelError(
                f"base {layout.name} has a {cls.denoiser_name} that was quantized by {how}: give the plain weights, "
                "which --set memory.weights=nf4 quantizes as they load"
            )

    @classmethod
    def networks_read(cls, layout: Layout) -> list[str]:
        """All that the pipeline lists and that has weights: some have a second denoiser."""
        return [part for part in layout.listed if part not in cls.left_out and layout.weight_sets(part)]

    @classmethod
    def native_pixels(cls, layout: Layout) -> int:
        """The side of its pictures: the denoiser's, the autoencoder's, or what the pipeline draws unasked."""
        import diffusers

        vae = layout.configs.get("vae", {})
        found = super().native_pixels(layout) if "block_out_channels" in vae else 0
        default = inspect.signature(getattr(diffusers, cls.pipeline_class).__call__).parameters.get("height")
        last = default.default if default is not None else None
        return found or vae.get("sample_size") or (last if isinstance(last, int) else 1024)

    @classmethod
    def usual_guidance(cls, layout: Layout) -> float:
        """The pipeline's own, under whichever name it is asked for."""
        import diffusers

        asked = inspect.signature(getattr(diffusers, cls.pipeline_class).__call__).parameters
        distilled = bool(layout.configs[cls.denoiser_name].get("guidance_embeds"))
        name = "true_cfg_scale" if "true_cfg_scale" in asked and not distilled else "guidance_scale"
        default = asked[name].default if name in asked else None
        return float(default) if isinstance(default, int | float) else 1.0

    def _read_size(self) -> None:
        for part in self.pipeline.components.values():
            if isinstance(part, nn.Module) and all(part is not one for one in self._networks):
                nn.Module.to(part.requires_grad_(False).eval(), self.device, self.dtype)
        scale = int(getattr(self.pipeline, "vae_scale_factor", 8))
        vae, own = getattr(getattr(self.pipeline, "vae", None), "config", {}), self._config.get("sample_size")
        default = inspect.signature(type(self.pipeline).__call__).parameters.get("height")
        pixels = own * scale if isinstance(own, int) else vae.get("sample_size", default and default.default)
        if not isinstance(pixels, int):
            pixels = int(getattr(self.pipeline, "default_sample_size", 1024 // scale)) * scale
        width = height = pixels
        if self.memory.resolution is not None:
            width, height = map(int, self.memory.resolution.split("x"))
        self._none = 1.0
        self._draw_at(width, height)
        with self.counter.stage("learning the call"), torch.no_grad():
            try:
                self.form = self._learn()
            except BaseModelError:
                raise
            except Exception as fault:
                # Whatever a pipeline raises where it does not fit together.
                reason = (str(fault).strip() or type(fault).__name__).splitlines()[0]
                raise BaseModelError(f"base {self.id} cannot draw {width}x{height} pixels: {reason}") from fault
            if self.denoiser not in lora.TEXT_SIDES:
                lora.TEXT_SIDES[self.denoiser] = self._text_side(width, height)

    def _draw_at(self, width: int, height: int) -> None:
        self._size = {"height": height, "width": width}
        if hasattr(self.pipeline, "default_sample_size"):
            # Some take their size from here, whatever is asked for.
            self.pipeline.default_sample_size = max(width, height) // int(self.pipeline.vae_scale_factor)
        if hasattr(self.pipeline, "resolutions"):
            self.pipeline.resolutions = [(width, height)]

    def _text_side(self, width: int, height: int) -> lora.TextSide:
        """Which linear layers only the prompt passes: they read as many rows at another size of the picture."""
        seen = [self._rows_read()]
        for share in (0.5, 2):
            try:
                self._draw_at(int(width * share), int(height * share))
                seen.append(self._rows_read())
                break
            except (ValueError, RuntimeError, BaseModelError):
                continue
            finally:
                self._draw_at(width, height)
        if len(seen) < 2:
            logger.warning("base %s draws in one size only: which of its layers are the text's is not known", self.id)
            return lora.TextSide(frozenset(), ())
        (one, other), plain = seen, self._rows_read(prompt=SHORT)
        # One row is what a whole prompt or a timestep has, and not a token; what no prompt changes is not the text's.
        stream = [
            name
            for name, read in one.items()
            if len(read) > 1 and len(other.get(name, ())) == len(read) and not calls.same(read, plain.get(name))
        ]
        entry = [name for name in stream if one[name].shape == one[stream[0]].shape and one[name].equal(one[stream[0]])]
        return lora.TextSide(frozenset(stream), tuple(entry))

    def _rows_read(self, call: Any = None, *, only: str | None = None, prompt: str = LONG) -> dict[str, Tensor]:
        """What each linear layer reads in one call, ``[rows, width]``, in the order in which they compute."""
        found: dict[str, Tensor] = {}

        def look(name: str) -> Any:
            def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
                found.setdefault(name, args[0].detach().reshape(-1, args[0].shape[-1]))
                if name == only:
                    raise calls.Enough

            return hook

        layers = [(name, one) for name, one in lora.base_layers(self.denoiser) if isinstance(one, nn.Linear)]
        hooks = [one.register_forward_pre_hook(look(name)) for name, one in layers if only in (None, name)]
        try:
            if call is not None:
                self.denoiser(**call)
            else:
                self._record([prompt], most=1)
        except calls.Enough:
            pass
        finally:
            for hook in hooks:
                hook.remove()
        return found

    def _run(self, prompts: Sequence[str], *, seeds: Sequence[int], guidance_scale: float | None, **more: Any) -> Any:
        """The pipeline's own call; at a guidance of None there is none."""
        asked = self._asked
        given: dict[str, Any] = {"prompt": list(prompts), "output_type": "latent", **self._size, **more}
        given |= {
            **_PLAIN,
            # Kontext brings every size to this one.
            "max_area": self._size["width"] * self._size["height"],
            "max_sequence_length": self._longest,
            **self._guided(guidance_scale, len(prompts)),
        }
        given["generator"] = [torch.Generator().manual_seed(seed) for seed in seeds]
        given = {name: value for name, value in given.items() if name in asked}
        kind = type(self.pipeline)
        # It is decorated to compute without gradients.
        call = inspect.unwrap(kind.__call__) if torch.is_grad_enabled() else kind.__call__
        return call(self.pipeline, **given, return_dict=False)[0]

    @functools.cached_property
    def _asked(self) -> frozenset[str]:
        return frozenset(inspect.signature(type(self.pipeline).__call__).parameters)

    @property
    def distilled(self) -> bool:
        """Whether the denoiser reads its guidance."""
        return bool(getattr(self._config, "guidance_embeds", False))

    def _guided(self, scale: float | None, rows: int) -> dict[str, Any]:
        """How the pipeline is told of guidance."""
        if "true_cfg_scale" in self._asked and not self.distilled:
            if scale is None or scale <= 1:
                return {"true_cfg_scale": 1.0}
            return {"true_cfg_scale": scale, "negative_prompt": [""] * rows}
        plain = scale is None or (scale <= 1 and not self.distilled)
        return {"guidance_scale": self._none if plain else scale, "guidance_schedule": None}

    def _record(self, prompts: Sequence[str], *, most: int, steps: int = 4) -> calls.Record:
        """The first calls of a run without guidance."""
        with calls.recorded(self.denoiser, self.pipeline.scheduler, most=most) as found:
            self._run(prompts, seeds=[0] * len(prompts), guidance_scale=None, num_inference_steps=steps)
        return found

    def _learn(self) -> calls.Form:
        with self._on_device(self._encoders, self.memory.encoders_off_device):
            for self._none in (1.0, 0.0):
                trail = self._record([SHORT], most=3)
                if len(trail.outputs) == len(trail.steps) and calls.one_row(trail):
                    break
            other = self._record([LONG], most=0).calls[0]
            two = self._record([SHORT, SHORT], most=0).calls[0]
            self._draws_batches = self._pads_unseen(trail)
            self._padded = self._draws_batches and calls.alike(trail.calls[0], other)
        discrete = self.alphas_cumprod is not None
        form = calls.learn(self.id, trail, other, two, scaled=discrete)
        self.latent_shape = tuple(trail.steps[0][2].shape[1:])
        self._returned = trail.outputs[0]
        return self._prove(form, trail, other)

    def _pads_unseen(self, trail: calls.Record) -> bool:
        """Whether a prompt beside a longer one draws as it does alone: what it is padded with goes unread."""
        beside = self._record([SHORT, LONG], most=1)
        alone, both = (one.steps[0][0] for one in (trail, beside))
        return len(both) == 2 and _near(both[:1], alone)

    def _prove(self, form: calls.Form, trail: calls.Record, other: Any) -> calls.Form:
        """Hold the form against the pipeline's own calls, and a batch against its rows; else rows go one by one.

        Returns:
            The form, with its timesteps in a batch where the denoiser takes them so.
        """
        self.form, self._batches_rows = form, True
        first, second = (calls.states_of(form, trail, k) for k in (0, 1))
        said = [Said(form.texts(one, 1)[0], None) for one in (trail.calls[0], other)]
        prompts = [CapturedPrompts([one], form.text[0]) for one in said]
        at = torch.tensor([float(one[1]) for one in trail.steps])
        both = torch.cat([form.output(one) for one in trail.outputs[:2]])
        wanted = both[1:]
        found = self._predict(second, at[1:2], prompts[0])
        if not _near(found, wanted):
            raise BaseModelError(
                f"base {self.id} draws another thing than its denoiser's calls, put together again, say"
            )
        if form.one_time:
            # A timestep without a batch axis may be given one.
            timed = replace(form, axes={**form.axes, **dict.fromkeys(form.times, 0)})
            self.form = timed
            try:
                if _near(self._predict(torch.cat([first, second]), at[:2], PromptEmbeds.cat([prompts[0]] * 2)), both):
                    form = timed
            except (RuntimeError, ValueError, IndexError, TypeError):
                pass
            self.form = form
        apart = torch.cat([self._predict(first, at[:1], prompts[0]), self._predict(second, at[1:2], prompts[1])])
        try:
            together = self._predict(torch.cat([first, second]), at[:2], PromptEmbeds.cat(prompts))
            self._batches_rows = _near(together, apart)
        except (RuntimeError, ValueError, IndexError, TypeError):
            self._batches_rows = False
        if not self._batches_rows:
            logger.info("base %s predicts one state at a time: in a batch it predicts otherwise", self.id)
        return form

    def _predict(self, latents: Tensor, timesteps: Tensor, embeds: PromptEmbeds) -> Tensor:
        assert isinstance(embeds, CapturedPrompts)
        form, rows = self.form, len(latents)
        timesteps = timesteps.expand(rows) if timesteps.ndim == 0 else timesteps
        groups: dict[Any, list[int]] = {}
        for k, one in enumerate(embeds.rows):
            key: Any = form.kind(one.told) if self._batches_rows else k
            groups.setdefault((key, float(timesteps[k])) if form.one_time else key, []).append(k)
        found: list[Tensor | None] = [None] * rows
        for chosen in groups.values():
            call = form.call(latents[chosen], timesteps[chosen], [embeds.rows[k].told for k in chosen])
            made = form.output(calls.first_of(self.denoiser(**call)))
            for k, row in zip(chosen, made.unbind(0), strict=True):
                found[k] = row
        return torch.stack([one for one in found if one is not None])

    def _guided_from(self, rows: int, away: str) -> None:
        """Nothing: the pipeline encodes it itself."""

    def _drawn(self, rows: Any, seeds: Sequence[int], steps: int, guidance_scale: float, empty: Any) -> Tensor:
        if isinstance(rows, CapturedPrompts):
            if any(one.text is None for one in rows.rows):
                raise BaseModelError(
                    f"base {self.id} draws from prompts and token vectors, and not from changed embeddings"
                )
            sources = [(str(one.text), one.vectors) for one in rows.rows]
        else:
            sources = [(str(one), None) for one in rows]
        if self._draws_batches or len(sources) == 1:
            try:
                return self._sampled(sources, seeds, steps, guidance_scale)
            except (RuntimeError, ValueError) as fault:
                if len(sources) == 1 or isinstance(fault, torch.OutOfMemoryError):
                    raise
                logger.info("base %s draws one picture at a time: %s", self.id, fault)
                self._draws_batches = False
        each = zip(sources, seeds, strict=True)
        return torch.cat([self._sampled([one], [seed], steps, guidance_scale) for one, seed in each])

    def _sampled(
        self, sources: Sequence[tuple[str, Tensor | None]], seeds: Sequence[int], steps: int, guidance_scale: float
    ) -> Tensor:
        """Clean latents of one call of the pipeline."""
        parked, hidden = self.memory.encoders_off_device, self.memory.vae_off_device
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(self._on_device(self._encoders, parked))
            if hidden:
                stack.enter_context(self._without_vae())
            texts = stack.enter_context(self._told(sources))
            found = stack.enter_context(calls.recorded(self.denoiser, self.pipeline.scheduler))
            self._run(texts, seeds=seeds, guidance_scale=guidance_scale, num_inference_steps=steps)
        assert found.last is not None
        return found.last

    @contextmanager
    def _without_vae(self) -> Iterator[None]:
        """The pipeline takes its device from the first network it has."""
        held = vars(self.pipeline)
        own = held["vae"]
        held["vae"] = None
        try:
            yield
        finally:
            held["vae"] = own

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> list[Image]:
        """Pictures of latents, :attr:`decoded_at_once` at a time: the pipeline's own end, which is let go on them."""
        images: list[Image] = []
        with noted("decoding pictures"), ExitStack() as stack:
            for one, parked in (
                (self._vaes, self.memory.vae_off_device),
                (self._encoders, self.memory.encoders_off_device),
            ):
                stack.enter_context(self._on_device(one, parked))
            for rows in parts_of(len(latents), self.decoded_at_once):
                check_finite(latents[rows], f"the latents that base {self.id} draws", self.dtype)
                images += self._ended(latents[rows].to(self.device))
        return images

    def _ended(self, latents: Tensor) -> list[Image]:
        count, scheduler, empty = len(latents), self.pipeline.scheduler, self._returned

        def returned(*args: Any, **kwargs: Any) -> Any:
            if isinstance(empty, Tensor):
                return calls.Stepped((empty.new_zeros(count * len(empty), *empty.shape[1:]),))
            return calls.Stepped((type(empty)(torch.zeros_like(empty[0]) for _ in range(count)),))

        scheduler.step = lambda *args, **kwargs: calls.Stepped((latents, latents))
        vars(self.denoiser)["forward"] = returned
        try:
            with self.counter.stage(None):
                images: list[Image] = self._run(
                    [""] * count, seeds=[0] * count, guidance_scale=None, num_inference_steps=1, output_type="pil"
                )
        finally:
            del scheduler.step
            del vars(self.denoiser)["forward"]
        return [_opaque(one) for one in images]

    @property
    def _vaes(self) -> list[nn.Module]:
        vae = getattr(self.pipeline, "vae", None)
        return [] if vae is None else [vae]

    @property
    def _networks(self) -> list[nn.Module]:
        return [self.denoiser, *self._vaes, *self._encoders]

    @property
    def decoded_at_once(self) -> int:
        """Pictures that go through the autoencoder together."""
        return super().decoded_at_once if self._size else 1

    def encode_images(self, images: Sequence[Image]) -> Tensor:
        """Not known of a pipeline that only draws."""
        if not images:
            raise BaseModelError("there are no pictures to encode")
        raise BaseModelError(f"base {self.id} ({self.pipeline_class}) reads no pictures: its pipeline draws only")


def _family(name: str) -> str:
    """What records call a pipeline's family: ``StableDiffusion3Pipeline`` is ``stable-diffusion-3``."""
    import re

    plain = name.removesuffix("Pipeline")
    return re.sub(r"(?<=[a-z])(?=[A-Z0-9])|(?<=[0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "-", plain).lower()


def _opaque(image: Image) -> Image:
    """A picture without transparency, on white."""
    if image.mode == "RGB":
        return image
    image = image.convert("RGBA")
    white = image.copy()
    white.paste("white", (0, 0, *image.size))
    white.alpha_composite(image)
    return white.convert("RGB")


def _near(one: Tensor, other: Tensor) -> bool:
    """Whether predictions are the same up to the rounding of their dtype."""
    bound = 1e-4 if one.dtype is torch.float32 and other.dtype is torch.float32 else 3e-2
    return float((one.float() - other.float()).abs().max()) <= bound * max(1e-6, float(other.float().abs().max()))
