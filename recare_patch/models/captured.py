"""A base made of any diffusers pipeline, by the calls that the pipeline itself makes of its denoiser.

The pipeline is the specification: :mod:`recare_patch.models.calls` learns from a few runs of it how its denoiser is
called, prompts are encoded by running it up to its first call, pictures are drawn by running it whole, and latents are
decoded by letting it end on them. So no family's packing, shift, schedule or text templates are written again.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import logging
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from recare_patch.core import BaseModelError, noted
from recare_patch.models import calls, lora
from recare_patch.models.encoding import parts_of, tokenizer_of
from recare_patch.models.inputs import PLACEHOLDER, PromptEmbeds
from recare_patch.models.latent_diffusion import LatentDiffusion
from recare_patch.models.precision import check_finite, in_double

if TYPE_CHECKING:
    from PIL.Image import Image

    from recare_patch.models.layout import Layout

logger = logging.getLogger(__name__)

_SHORT, _LONG = "cat", "a photo of a cat and a dog under a tree at night"
"""Two prompts that a call's arguments are told apart by."""

_AT_ONCE = 8
"""Prompts that are encoded together, where the pipeline pads them all to one length."""


@dataclass(frozen=True)
class Said:
    """One prompt: what the denoiser is told of it, and where that came from.

    Attributes:
        told: the text's arguments, of one row.
        text: the prompt.
        vectors: what stands for its placeholders, ``[vectors, token_width]``.
    """

    told: dict[calls.Path, Any]
    text: str | None
    vectors: Tensor | None = None


class CapturedPrompts(PromptEmbeds):
    """Encoded prompts as a captured call holds them, one :class:`Said` a row."""

    rows: tuple[Said, ...]
    main: calls.Path

    def __init__(self, rows: Sequence[Said], main: calls.Path) -> None:
        object.__setattr__(self, "rows", tuple(rows))
        object.__setattr__(self, "main", main)

    @property
    def prompt_embeds(self) -> Tensor:  # type: ignore[override]
        """What the text encoder made of the tokens, ``[batch, tokens, width]``; short prompts end in zeros."""
        found = [_matrix(one.told[self.main]) for one in self.rows]
        room = max(len(one) for one in found)
        return torch.stack([torch.cat([one, one.new_zeros(room - len(one), one.shape[1])]) for one in found])

    @property
    def pooled_prompt_embeds(self) -> Tensor | None:  # type: ignore[override]
        """None: all else that is told of a prompt is in its row."""
        return None

    def _map(self, change: Any) -> PromptEmbeds:
        raise NotImplementedError

    def _with(self, change: Callable[[Tensor], Tensor]) -> CapturedPrompts:
        def changed(value: Any) -> Any:
            if isinstance(value, Tensor):
                return change(value)
            return type(value)(map(changed, value)) if isinstance(value, list | tuple) else value

        rows = [replace(one, told={path: changed(value) for path, value in one.told.items()}) for one in self.rows]
        return CapturedPrompts(rows, self.main)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Tensor | slice | int | Sequence[int]) -> PromptEmbeds:
        if isinstance(index, int):
            if not -len(self) <= index < len(self):
                raise IndexError(f"row {index} of {len(self)}")
            index = [index]
        chosen = self.rows[index] if isinstance(index, slice) else [self.rows[int(k)] for k in index]
        return CapturedPrompts(chosen, self.main)

    def repeat(self, count: int) -> PromptEmbeds:
        return CapturedPrompts(self.rows * count, self.main)

    def detach(self) -> PromptEmbeds:
        return self._with(Tensor.detach)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> PromptEmbeds:
        # The pipeline has chosen the dtypes; some of what it tells are masks and numbers.
        return self if device is None else self._with(lambda value: value.to(device))

    @classmethod
    def _joined(cls, parts: Sequence[PromptEmbeds]) -> PromptEmbeds:
        rows = [one for part in parts if isinstance(part, CapturedPrompts) for one in part.rows]
        assert isinstance(parts[0], CapturedPrompts)
        return CapturedPrompts(rows, parts[0].main)


def _matrix(value: Any) -> Tensor:
    """A text argument of one row as ``[tokens, width]``."""
    while not isinstance(value, Tensor):
        value = value[0]
    return value.reshape(-1, value.shape[-1])


class Captured(LatentDiffusion):
    """A base around any text-to-image pipeline of diffusers; :meth:`of` makes the class for one of them."""

    pipeline_parts: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def of(cls, layout: Layout) -> type[Captured]:
        """The class for a layout, or one sentence why there is none."""
        import diffusers

        name = str(layout.index.get("_class_name"))
        kind = getattr(diffusers, name, None)
        refused = f"base {layout.name} is a {name}"
        if not isinstance(kind, type) or not issubclass(kind, diffusers.DiffusionPipeline):
            raise BaseModelError(f"{refused}, which is no pipeline of the installed diffusers {diffusers.__version__}")
        asked = inspect.signature(kind.__call__).parameters
        if "prompt" not in asked:
            raise BaseModelError(f"{refused}, which reads no prompt: a text-to-image pipeline is needed")
        if videos := {"num_frames", "video", "frames"} & set(asked) or "video" in name.casefold():
            raise BaseModelError(f"{refused}, which draws videos: a text-to-image pipeline is needed")
        if "mask_image" in asked:
            raise BaseModelError(f"{refused}, which fills holes in pictures: a text-to-image pipeline is needed")
        if any(asked[one].default is inspect.Parameter.empty for one in ("image", "control_image") if one in asked):
            raise BaseModelError(f"{refused}, which starts from a picture: a text-to-image pipeline is needed")
        del videos
        parts = inspect.signature(kind.__init__).parameters
        denoiser = next((part for part in lora.DENOISERS if part in layout.listed), None)
        if denoiser is None:
            missing = next((part for part in lora.DENOISERS if part in parts), None)
            if missing is not None:
                raise BaseModelError(f"base {layout.name} lacks its component '{missing}'")
            raise BaseModelError(f"{refused}, whose denoiser is not called 'unet' or 'transformer'")
        encoders = tuple(part for part in layout.listed if part.startswith("text_encoder"))
        optional = [part for part in ("safety_checker", "feature_extractor", "image_encoder") if part in parts]
        facts = {
            "family": _family(name),
            "pipeline_class": name,
            "denoiser_name": denoiser,
            "encoder_names": encoders,
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
            except (ValueError, RuntimeError) as fault:
                reason = (str(fault).strip() or type(fault).__name__).splitlines()[0]
                raise BaseModelError(f"base {self.id} cannot draw {width}x{height} pixels: {reason}") from fault
            if self.denoiser not in lora.TEXT_SIDES:
                lora.TEXT_SIDES[self.denoiser] = self._text_side(width, height)

    def _draw_at(self, width: int, height: int) -> None:
        self._size = {"height": height, "width": width}
        if hasattr(self.pipeline, "default_sample_size"):
            # Some take their size from here, whatever is asked for.
            self.pipeline.default_sample_size = max(width, height) // int(self.pipeline.vae_scale_factor)

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
        one, other = seen
        # One row is what a whole prompt or a timestep has, and not a token.
        stream = [
            name for name, read in one.items() if name in other and len(read) > 1 and len(other[name]) == len(read)
        ]
        entry = [name for name in stream if one[name].shape == one[stream[0]].shape and one[name].equal(one[stream[0]])]
        return lora.TextSide(frozenset(stream), tuple(entry))

    def _rows_read(self, call: Any = None, *, only: str | None = None) -> dict[str, Tensor]:
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
                self._record([_LONG], most=1)
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
            "use_resolution_binning": False,
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

    @functools.cached_property
    def _longest(self) -> int | None:
        """Tokens of a prompt: the pipeline's own number, or what all its tokenizers read where that is less."""
        parameter = inspect.signature(type(self.pipeline).__call__).parameters.get("max_sequence_length")
        most = max((int(one.model_max_length) for one in self._tokenizers), default=0)
        return None if parameter is None else min(int(parameter.default), most)

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
        if scale is None or (scale <= 1 and not self.distilled):
            return {"guidance_scale": self._none}
        return {"guidance_scale": scale}

    def _record(self, prompts: Sequence[str], *, most: int, steps: int = 4) -> calls.Record:
        """The first calls of a run without guidance."""
        with calls.recorded(self.denoiser, self.pipeline.scheduler, most=most) as found:
            self._run(prompts, seeds=[0] * len(prompts), guidance_scale=None, num_inference_steps=steps)
        return found

    def _learn(self) -> calls.Form:
        with self._on_device(self._encoders, self.memory.encoders_off_device):
            for self._none in (1.0, 0.0):
                trail = self._record([_SHORT], most=3)
                if len(trail.outputs) == len(trail.steps) and calls.one_row(trail):
                    break
            other = self._record([_LONG], most=0).calls[0]
            two = self._record([_SHORT, _SHORT], most=0).calls[0]
        self._padded = calls.alike(trail.calls[0], other)
        discrete = self.alphas_cumprod is not None
        form = calls.learn(self.id, trail, other, two, scaled=discrete)
        self.latent_shape = tuple(trail.steps[0][2].shape[1:])
        self._returned = trail.outputs[0]
        self._prove(form, trail, other)
        return form

    def _prove(self, form: calls.Form, trail: calls.Record, other: Any) -> None:
        """Hold the form against the pipeline's own calls, and a batch against its rows; else rows go one by one."""
        self.form, self._batches_rows = form, True
        first, second = (calls.states_of(form, trail, k) for k in (0, 1))
        said = [Said(form.texts(one, 1)[0], None) for one in (trail.calls[0], other)]
        prompts = [CapturedPrompts([one], form.text[0]) for one in said]
        at = torch.tensor([float(one[1]) for one in trail.steps])
        wanted = form.output(trail.outputs[1])
        found = self._predict(second, at[1:2], prompts[0])
        if not _near(found, wanted):
            raise BaseModelError(
                f"base {self.id} draws another thing than its denoiser's calls, put together again, say"
            )
        apart = torch.cat([self._predict(first, at[:1], prompts[0]), self._predict(second, at[1:2], prompts[1])])
        try:
            together = self._predict(torch.cat([first, second]), at[:2], PromptEmbeds.cat(prompts))
            self._batches_rows = _near(together, apart)
        except (RuntimeError, ValueError, IndexError, TypeError):
            self._batches_rows = False
        if not self._batches_rows:
            logger.info("base %s predicts one state at a time: in a batch it predicts otherwise", self.id)

    def _predict(self, latents: Tensor, timesteps: Tensor, embeds: PromptEmbeds) -> Tensor:
        assert isinstance(embeds, CapturedPrompts)
        form, rows = self.form, len(latents)
        timesteps = timesteps.expand(rows) if timesteps.ndim == 0 else timesteps
        groups: dict[Any, list[int]] = {}
        for k, one in enumerate(embeds.rows):
            key: Any = k if not self._batches_rows else tuple(map(calls.likeness, one.told.values()))
            groups.setdefault((key, float(timesteps[k])) if form.one_time else key, []).append(k)
        found: list[Tensor | None] = [None] * rows
        for chosen in groups.values():
            call = form.call(latents[chosen], timesteps[chosen], [embeds.rows[k].told for k in chosen])
            made = form.output(calls.first_of(self.denoiser(**call)))
            for k, one in zip(chosen, made.unbind(0), strict=True):
                found[k] = one
        return torch.stack([one for one in found if one is not None])

    # ---- text

    @contextmanager
    def _told(self, sources: Sequence[tuple[str, Tensor | None]]) -> Iterator[list[str]]:
        """Prompts as the pipeline can be given them: inside, words of our own stand for vectors.

        Each placeholder becomes as many new words as it has vectors; tokenizers know them, and the encoders put the
        vectors where they stand, differentiably.
        """
        offsets: dict[int, int] = {}
        vectors: list[Tensor] = []
        texts = []
        for text, own in sources:
            if own is not None:
                start = offsets.setdefault(id(own), len(vectors))
                if start == len(vectors):
                    vectors += own.unbind(0)
                text = text.replace(PLACEHOLDER, "".join(map(_word, range(start, start + len(own)))))
            texts.append(text)
        if not vectors:
            yield texts
            return
        columns = torch.stack(vectors).to(self.device).split(self._token_widths, 1)
        with ExitStack() as stack:
            for name, encoder, part in zip(self.encoder_names, self._encoders, columns, strict=True):
                stack.enter_context(self._words_of(name, encoder, part))
            yield texts

    @contextmanager
    def _words_of(self, name: str, encoder: Any, vectors: Tensor) -> Iterator[None]:
        held, part = vars(self.pipeline), tokenizer_of(name)
        own = held[part]
        known = copy.deepcopy(own)
        inner = getattr(known, "tokenizer", known)
        inner.add_tokens([_word(k) for k in range(len(vectors))])
        ids = inner.convert_tokens_to_ids([_word(k) for k in range(len(vectors))])
        stand_in = self._ids_of(name, "a")[0]
        places: list[tuple[Tensor, Tensor]] = []

        def enter(module: nn.Module, args: Any, kwargs: Any) -> Any:
            given = kwargs.get("input_ids", args[0] if args else None)
            if given is None:
                return None
            which = torch.full_like(given, -1)
            for k, one in enumerate(ids):
                which[given == one] = k
            places[:] = [(which >= 0, which)]
            plain = torch.where(which >= 0, torch.full_like(given, stand_in), given)
            if "input_ids" in kwargs:
                return args, {**kwargs, "input_ids": plain}
            return (plain, *args[1:]), kwargs

        def insert(module: nn.Module, args: Any, embedded: Tensor) -> Tensor:
            where, which = places[0]
            if not where.any():
                return embedded
            return embedded.index_put((where,), vectors.to(embedded)[which[where]])

        table = encoder.get_input_embeddings().weight
        # T5 has its table twice, and looks words up in the other one.
        tables = [one for one in encoder.modules() if isinstance(one, nn.Embedding) and one.weight is table]
        hooks = [one.register_forward_hook(insert) for one in tables]
        hooks.append(encoder.register_forward_pre_hook(enter, with_kwargs=True))
        held[part] = known
        try:
            yield
        finally:
            held[part] = own
            for hook in hooks:
                hook.remove()

    def _encode(self, sources: Sequence[tuple[str, Tensor | None]]) -> CapturedPrompts:
        rows: list[Said] = []
        grad = torch.is_grad_enabled() and any(own is not None and own.requires_grad for _, own in sources)
        for part in parts_of(len(sources), _AT_ONCE if self._padded else 1):
            some = sources[part]
            with ExitStack() as stack:
                stack.enter_context(self._on_device(self._encoders, self.memory.encoders_off_device, keep=grad))
                texts = stack.enter_context(self._told(some))
                stack.enter_context(_with_gradients(self.pipeline) if grad else torch.no_grad())
                found = self._record(texts, most=0).calls[0]
            for (text, vectors), told in zip(some, self.form.texts(found, len(some)), strict=True):
                rows.append(Said(told, text, vectors))
        made = CapturedPrompts(rows, self.form.text[0])
        check_finite(made.prompt_embeds.detach(), f"the prompt embeddings that base {self.id} makes", self.dtype)
        return made

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> PromptEmbeds:
        """Encode prompts, without gradient, by the pipeline's own call."""
        with noted("encoding prompts"):
            return self._encode([(prompt, None) for prompt in prompts])

    def encode_with_vectors(self, prompts: Sequence[str], vectors: Tensor) -> PromptEmbeds:
        self._check_vectors(vectors)
        for prompt in prompts:
            if PLACEHOLDER not in prompt:
                raise BaseModelError(f"the prompt '{prompt}' has no {PLACEHOLDER} for the token vectors")
        return self._encode([(prompt, vectors) for prompt in prompts])

    def encode_token_vectors(self, rows: Sequence[Tensor]) -> PromptEmbeds:
        if not rows:
            raise BaseModelError("there are no token vectors to encode")
        for row in rows:
            self._check_vectors(row)
        return self._encode([(PLACEHOLDER, row) if len(row) else ("", None) for row in rows])

    @torch.no_grad()
    def prompt_states(self, prompts: Sequence[str]) -> Tensor:
        """What the first layers that a prompt passes read of it, ``[prompts, tokens, width]``, fp64; short ones padded."""
        rows = self._entered([(prompt, None) for prompt in prompts])
        room = max(len(one) for one in rows)
        return torch.stack([torch.cat([one, one[-1:].expand(room - len(one), -1)]) for one in rows])

    @torch.no_grad()
    def word_states(self, words: Sequence[str]) -> Tensor:
        """What they read at the last token of each text by itself, ``[words, width]``, fp64."""
        if not words:
            return self.prompt_states([""])[0, :0]
        encoder, shift = self._reader
        places: list[int] = []

        def look(module: nn.Module, args: Any, kwargs: Any) -> None:
            given = kwargs.get("input_ids", args[0] if args else None)
            for row in given:
                last = self._ids_of(self.encoder_names[encoder], texts[len(places)])[-1:]
                there = (row == last[0]).nonzero() if last else row[:0].nonzero()
                places.append(int(there[-1]) if len(there) else 0)

        texts = list(words)
        hook = self._encoders[encoder].register_forward_pre_hook(look, with_kwargs=True)
        try:
            rows = self._entered([(word, None) for word in words])
        finally:
            hook.remove()
        return torch.stack([row[min(max(at + shift, 0), len(row) - 1)] for row, at in zip(rows, places, strict=True)])

    def _entered(self, sources: Sequence[tuple[str, Tensor | None]]) -> list[Tensor]:
        """What the text's first layer reads of each prompt, ``[tokens, width]``, fp64."""
        entry = lora.TEXT_SIDES[self.denoiser].entry
        if not entry:
            raise BaseModelError(f"base {self.id} has no layer that reads the text encoder's states alone")
        found = []
        at = torch.full((1,), float(self.num_train_timesteps // 2))
        state = torch.zeros((1, *self.latent_shape), device=self.device)
        with self.counter.stage(None):
            for one in self._encode(sources).rows:
                call = self.form.call(state, at, [one.told])
                found.append(in_double(self._rows_read(call, only=entry[0])[entry[0]]))
        return found

    @functools.cached_property
    def _reader(self) -> tuple[int, int]:
        """The first text encoder that the text's first layer reads, and how far its tokens are moved there.

        Templates are cut off at the front by some pipelines: a token's vector is changed, and where the change is first
        seen is its place. An encoder that looks both ways shows it from the first row on, and nothing is cut off then.
        """
        with torch.no_grad():
            own = self.word_vector(_SHORT)[None]
            for encoder, parts in enumerate(own.split(self._token_widths, 1)):
                changed = list(own.split(self._token_widths, 1))
                changed[encoder] = -parts
                places: list[int] = []

                def look(module: nn.Module, args: Any, kwargs: Any, places: list[int] = places) -> None:
                    given = kwargs.get("input_ids", args[0] if args else None)
                    last = self._ids_of(self.encoder_names[encoder], "a")[-1]
                    places.append(int((given[0] == last).nonzero()[-1]))

                # Behind what puts the stand-in's id there.
                with self._told([(PLACEHOLDER, own)]):
                    hook = self._encoders[encoder].register_forward_pre_hook(look, with_kwargs=True)
                    try:
                        self._record([_word(0)], most=0)
                    finally:
                        hook.remove()
                before, after = self._entered([(PLACEHOLDER, own), (PLACEHOLDER, torch.cat(changed, 1))])
                moved = (before - after).abs().amax(1).nonzero().flatten().tolist()
                if moved:
                    return encoder, moved[0] - places[0] if moved[0] else 0
        raise BaseModelError(f"base {self.id} has no text encoder whose tokens the denoiser reads")

    @property
    def _tokenizers(self) -> list[Any]:
        # Some pipelines have a processor of texts and pictures in its place.
        return [getattr(one, "tokenizer", one) for one in super()._tokenizers]

    def _ids_of(self, encoder: str, text: str) -> list[int]:
        tokenizer = self._tokenizers[self.encoder_names.index(encoder)]
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    @torch.no_grad()
    def _embedded(self, encoder: int, texts: Sequence[str], device: torch.device) -> Tensor:
        """The mean of what an encoder's first layer makes of each text's tokens, ``[texts, width]``."""
        name, table = self.encoder_names[encoder], self._encoders[encoder].get_input_embeddings()
        rows = []
        for text in texts:
            ids = self._ids_of(name, text) or self._ids_of(name, "a")
            rows.append(table(torch.tensor(ids, device=table.weight.device)).mean(0))
        return torch.stack(rows).to(device)

    def token_vectors(self, ids: Tensor) -> Tensor:
        """What each encoder makes of tokens of the first one's vocabulary, ``[ids, token_width]``, fp32."""
        first = self._encoders[0].get_input_embeddings()
        with torch.no_grad():
            made = [first(ids.to(first.weight.device)).to(self.device)]
        texts = [self.token_text([int(k)]) for k in ids] if len(self._encoders) > 1 else []
        made += [self._embedded(k, texts, self.device) for k in range(1, len(self._encoders))]
        return torch.cat([one.float() for one in made], 1)

    @torch.no_grad()
    def word_vector(self, word: str) -> Tensor:
        """The token vector of a word, ``[token_width]``, fp32; the mean where it has several tokens."""
        if not self.token_ids(word):
            raise BaseModelError(f"the word '{word}' has no token in base {self.id}")
        parts = [self._embedded(k, [word], self.device)[0] for k in range(len(self._encoders))]
        return torch.cat([one.float() for one in parts])

    # ---- pictures

    def _guided_from(self, rows: int) -> None:
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
        parked, hidden = self.memory.encoders_off_device, self.memory.vae_off_device
        with torch.no_grad(), self._on_device(self._encoders, parked), self._told(sources) as texts:
            with self._without_vae() if hidden else contextlib.nullcontext():
                with calls.recorded(self.denoiser, self.pipeline.scheduler) as found:
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
        return images

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


def _word(number: int) -> str:
    """A word that no tokenizer has."""
    return f"zqxv{number}qz"


def _family(name: str) -> str:
    """What records call a pipeline's family: ``StableDiffusion3Pipeline`` is ``stable-diffusion-3``."""
    import re

    plain = name.removesuffix("Pipeline")
    return re.sub(r"(?<=[a-z])(?=[A-Z0-9])|(?<=[0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "-", plain).lower()


def _near(one: Tensor, other: Tensor) -> bool:
    """Whether predictions are the same up to the rounding of their dtype."""
    bound = 1e-4 if one.dtype is torch.float32 and other.dtype is torch.float32 else 3e-2
    return float((one.float() - other.float()).abs().max()) <= bound * max(1e-6, float(other.float().abs().max()))


@contextmanager
def _with_gradients(pipeline: Any) -> Iterator[None]:
    """Inside, the pipeline's own call and its encoding let gradients through, which they are decorated not to."""
    held, kind = vars(pipeline), type(pipeline)
    names = [name for name in dir(kind) if "encode" in name or "embeds" in name]
    names = [name for name in names if hasattr(getattr(kind, name), "__wrapped__")]
    for name in names:
        held[name] = types.MethodType(getattr(kind, name).__wrapped__, pipeline)
    try:
        yield
    finally:
        for name in names:
            del held[name]
