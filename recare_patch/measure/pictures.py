"""Pictures that are drawn once: a cache by content, and the studio that fills it.

A picture is named by everything that decides it: weights, patches and their scales, scheduler, prompt, seed,
steps and guidance. What has that name in the cache is never drawn again. The pictures of one batch are drawn
together, and the batches of a request are the same whatever the cache holds and however many processes share
the work. Every picture's noise comes from a generator of its own, on the CPU.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from recare_patch.core import (
    EvaluationError,
    NullProgress,
    launched_together,
    read_picture,
    tensors_hash,
    told_at,
    user_cache,
    write_bytes,
)
from recare_patch.models import SCHEDULERS, TEXT_ENCODERS, deciding, named_tuner_layers, scheduled, weights_hash

if TYPE_CHECKING:
    from recare_patch.core import Progress
    from recare_patch.measure.erasers import Eraser
    from recare_patch.models import BaseModel

logger = logging.getLogger(__name__)

CACHE_VERSION = 1
"""Part of every key: raised when pictures of the same key would come out differently."""


def default_cache() -> Path:
    """The cache that commands use: ``recare-patch/pictures`` below the user's cache folder."""
    return user_cache("pictures")


class PictureCache:
    """Pictures as PNG files under a folder, written whole or not at all by any number of processes."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()

    def key(self, fields: Mapping[str, Any]) -> str:
        """SHA-256 of the fields as canonical JSON, in hexadecimal."""
        text = json.dumps(dict(fields), sort_keys=True, ensure_ascii=True, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def path(self, key: str, suffix: str = ".png") -> Path:
        """Where what has this key lies, or would: its first letters keep folders from growing too long."""
        return self.folder / key[:2] / f"{key}{suffix}"

    def get(self, key: str) -> Image.Image | None:
        """The picture, or None where there is none that can be read."""
        try:
            return read_picture(self.path(key), "the picture", EvaluationError, formats=("PNG",))
        except EvaluationError:
            return None

    def put(self, key: str, image: Image.Image) -> None:
        """Keep a picture."""
        buffer = io.BytesIO()
        # Fast and a little larger: what is drawn in a second should not be packed for another.
        image.convert("RGB").save(buffer, "PNG", compress_level=3)
        write_bytes(self.path(key), buffer.getvalue())


class Request(NamedTuple):
    """The pictures that one call asks of a studio."""

    prompts: Sequence[str]
    seeds: Sequence[int]  # one a picture, of its starting noise
    patches: Sequence[tuple[Eraser, float]] = ()  # what is put into the base, each at its scale
    steps: int = 20
    guidance_scale: float | Sequence[float] = 5.0  # or one a picture; at 1 or less there is no guidance
    scheduler: str | None = None  # a name of SCHEDULERS; None: the base's own
    stage: str = "pictures"  # how progress and the base's counter call it
    vectors: Tensor | None = None  # [vectors, token_width], for prompts that hold PLACEHOLDER
    negative_prompt: str = ""  # what guidance leads away from


def launched() -> Any | None:
    """What accelerate knows of this process, where it was launched as one of several; else None."""
    if not launched_together():
        return None
    from recare_patch.core import processes

    return processes()


class Studio:
    """Draws pictures of a base model under patches, once each.

    Launched by accelerate (or torchrun, or MPI) as one of several processes, it draws every n-th batch
    and takes the others' from the cache that they share: every process gets all pictures, the same to
    the bit as one process draws with as many threads.

    Attributes:
        base: what draws; nothing may change its weights while the studio is in use.
        process, processes: the number of this process, from 0, and how many share the work.
        drawn, from_cache: pictures drawn by this process so far, and found in the cache.
    """

    def __init__(
        self,
        base: BaseModel,
        *,
        cache: PictureCache | None = None,
        batch_size: int = 16,
        progress: Progress | None = None,
        shard: tuple[int, int] | None = None,
    ) -> None:
        """``shard`` is the number of this process and of all of them; None: as they were launched."""
        if batch_size < 1:
            raise EvaluationError(f"a batch must have at least 1 picture, got {batch_size}")
        self._launched = launched() if shard is None else None
        if self._launched is not None:
            shard = (self._launched.process_index, self._launched.num_processes)
        self.process, self.processes = shard or (0, 1)
        if not 0 <= self.process < self.processes:
            told = f"there is no process {self.process} of {self.processes}: they are counted from 0"
            raise EvaluationError(told)
        if self.processes > 1 and cache is None:
            told = "processes need a cache to share their pictures in: name a folder with --cache"
            raise EvaluationError(f"{self.processes} {told}")
        self.base, self.cache, self.batch_size = base, cache, batch_size
        self._progress = progress or NullProgress()
        self.drawn, self.from_cache = 0, 0
        self._check_plain()
        self._model = {
            "version": CACHE_VERSION,
            "base": base.id,
            "denoiser": base.denoiser_hash(),
            "text_encoder": weights_hash(base.pipeline.text_encoder),
            **{part: base.component_hash(part) for part in TEXT_ENCODERS[1:] if part in base.components},
            "vae": weights_hash(base.pipeline.vae),
            "precision": str(base.dtype).removeprefix("torch."),
            **deciding(base.memory),
        }
        self._hashes: dict[int, tuple[Eraser, str]] = {}

    def draw(self, *asked: Any, **options: Any) -> list[Image.Image]:
        """All pictures of :meth:`stream`, in their order."""
        found = dict(self.stream(*asked, **options))
        return [found[row] for row in sorted(found)]

    def fill(self, *asked: Any, **options: Any) -> None:
        """Draw what the cache lacks of :meth:`stream`, and hand nothing out."""
        if self.cache is None:
            raise EvaluationError("there is no cache to draw into")
        # Asking for the first picture is what draws them all.
        next(self.stream(*asked, **options), None)

    def stream(self, prompts: Sequence[str], seeds: Sequence[int], **options: Any) -> Iterator[tuple[int, Image.Image]]:
        """Numbers and pictures of a :class:`Request` one by one, so that memory does not grow with them.

        With a cache, everything missing is drawn before the first picture comes. A batch of which any
        picture is missing is drawn as a whole, so that no picture depends on what else was there. A batch has one
        guidance: pictures of equal guidance come one after the other.

        Raises:
            RecarePatchError: as soon as it is called, for prompts without seeds, an unknown scheduler or a
                LoRA that is switched on in the base; later for a patch that does not fit it.
        """
        request = Request(prompts, seeds, **options)
        if (count := len(prompts)) != len(seeds):
            told = f"{count} prompts were given with {len(seeds)} seeds: one seed a picture is needed"
            raise EvaluationError(told)
        if not isinstance(own := request.guidance_scale, int | float) and len(own) != count:
            raise EvaluationError(f"{count} prompts were given with {len(own)} guidances: one, or one each, is needed")
        if request.scheduler is not None:
            SCHEDULERS.get(request.scheduler)
        self._check_plain()
        return self._drawn(request) if self.cache is None else self._through(self.cache, request)

    def _batches(self, request: Request) -> list[Sequence[int]]:
        alike: dict[float, list[int]] = {}
        for row in range(len(request.prompts)):
            alike.setdefault(_guidance(request, row), []).append(row)
        size = self.batch_size
        return [rows[start : start + size] for rows in alike.values() for start in range(0, len(rows), size)]

    def key(self, patches: Sequence[tuple[Eraser, float]], fields: Mapping[str, Any]) -> str:
        """The key of something made with the base under patches; ``fields`` are all else that decides it."""
        if self.cache is None:
            raise EvaluationError("there is no cache to name anything in")
        for patch, _ in patches:
            if id(patch) not in self._hashes:
                # The patch is kept beside its hash, so that no other can come to have its id.
                self._hashes[id(patch)] = patch, patch.fingerprint()
        hashed = [[self._hashes[id(patch)][1], float(scale)] for patch, scale in patches]
        return self.cache.key({**self._model, "patches": hashed, **fields})

    def _keys(self, request: Request) -> list[str]:
        own = self.base.pipeline.scheduler
        config = {key: value for key, value in dict(own.config).items() if not key.startswith("_")}
        fields: dict[str, Any] = {
            "scheduler": [request.scheduler or type(own).__name__, repr(sorted(config.items()))],
            "steps": request.steps,
        }
        if request.vectors is not None:
            fields["vectors"] = tensors_hash({"vectors": request.vectors})
        if request.negative_prompt:
            fields["negative_prompt"] = request.negative_prompt
        return [
            self.key(
                request.patches, {**fields, "guidance_scale": _guidance(request, row), "prompt": prompt, "seed": seed}
            )
            for row, (prompt, seed) in enumerate(zip(request.prompts, request.seeds, strict=True))
        ]

    def _check_plain(self) -> None:
        for _, layer in named_tuner_layers(self.base.components):
            if layer.active_adapters and not layer.disable_adapters:
                raise EvaluationError(
                    f"a LoRA ({layer.active_adapters[0]}) is switched on in base '{self.base.id}': take it "
                    "out, and name it with the patches to draw under"
                )

    def _drawn(self, request: Request) -> Iterator[tuple[int, Image.Image]]:
        done = 0
        for rows in self._batches(request):
            # The base is plain again before a picture is handed out: the caller may draw others between.
            with self._set_up(request):
                images = self._generate(request, rows)
            done += len(rows)
            self._progress.update(request.stage, done, len(request.prompts))
            yield from zip(rows, images, strict=True)

    def _through(self, cache: PictureCache, request: Request) -> Iterator[tuple[int, Image.Image]]:
        keys, batches = self._keys(request), self._batches(request)
        number = {row: place for place, rows in enumerate(batches) for row in rows}

        def draw(rows: Sequence[int]) -> dict[int, Image.Image]:
            images = dict(zip(rows, self._generate(request, rows), strict=True))
            for row, image in images.items():
                cache.put(keys[row], image)
            return images

        # All look before any draws, and none draws the next request while others read this one.
        self._wait()
        missing = self._missing(cache, keys, batches)
        self._wait()
        done = len(keys) - sum(map(len, missing))
        self.from_cache += done
        own = [rows for rows in missing if number[rows[0]] % self.processes == self.process]
        with self._set_up(request) if own else contextlib.nullcontext():
            for rows in own:
                draw(rows)
                # The others keep pace, more or less: their batches are as many.
                done = min(done + self.processes * len(rows), len(keys))
                self._progress.update(request.stage, done, len(keys))
        self._wait()
        self._progress.update(request.stage, len(keys), len(keys))
        mended: dict[int, Image.Image] = {}
        # In the order in which they come without a cache: figures may depend on it.
        for row in (row for rows in batches for row in rows):
            image = mended.pop(row, None) or cache.get(keys[row])
            if image is None:
                # A file that was there and cannot be read, or was taken away in the meantime.
                with self._set_up(request):
                    mended = draw(batches[number[row]])
                image = mended.pop(row)
            yield row, image

    @staticmethod
    def _missing(cache: PictureCache, keys: Sequence[str], batches: Sequence[Sequence[int]]) -> list[Sequence[int]]:
        """The batches of which a picture is not there; each is drawn as a whole."""
        return [rows for rows in batches if not all(cache.path(keys[row]).is_file() for row in rows)]

    def announce(self, asked: Sequence[Mapping[str, Any]]) -> None:
        """Say how many pictures these requests take, and about how long, as a step of one batch is timed."""
        missing, seconds, requests = 0, 0.0, [Request(**one) for one in asked]
        times: dict[tuple[int, bool], tuple[float, float]] = {}
        for request in requests:
            batches = self._batches(request)
            if self.cache is not None:
                batches = self._missing(self.cache, self._keys(request), batches)
            rows = sum(map(len, batches))
            if rows:
                how = len(batches[0]), _guidance(request, batches[0][0]) > 1
                step, decoding = times[how] = times.get(how) or self._timed(*how)
                seconds += rows * (request.steps * step + decoding)
            missing += rows
        if missing:
            found = sum(len(request.prompts) for request in requests) - missing
            beside = f" ({found:,} more are in the cache)" if found else ""
            logger.info("%s pictures to draw%s: about %s", f"{missing:,}", beside, _in_words(seconds))

    @torch.no_grad()
    def _timed(self, pictures: int, guided: bool) -> tuple[float, float]:
        """Seconds a picture of so many drawn together: of one denoising step, and of decoding."""
        base, rows = self.base, pictures * (2 if guided else 1)
        latents = torch.zeros((rows, *base.latent_shape), device=base.device)
        at, embeds = torch.tensor([base.num_train_timesteps // 2]).expand(rows), base.encode_prompts([""]).repeat(rows)

        def seconds(work: Callable[[], Any]) -> float:
            work()  # warms the device up
            began = time.perf_counter()
            work()
            return time.perf_counter() - began

        with base.counter.stage(None):
            step = seconds(lambda: base.denoise(latents, at, embeds).sum().item())
            return step / pictures, seconds(lambda: base.decode_latents(latents[:1]))

    def _wait(self) -> None:
        if self._launched is not None:
            self._launched.wait_for_everyone()

    @contextlib.contextmanager
    def _set_up(self, request: Request) -> Iterator[None]:
        with scheduled(self.base.pipeline, request.scheduler), contextlib.ExitStack() as stack:
            for patch, scale in request.patches:
                stack.enter_context(patch.apply(self.base.pipeline, scale=scale))
            yield

    def _generate(self, request: Request, rows: Sequence[int]) -> list[Image.Image]:
        prompts = [request.prompts[row] for row in rows]
        words: dict[str, Any] = {"prompts": prompts}
        if request.vectors is not None:
            with torch.no_grad():
                embeds = self.base.encode_with_vectors(prompts, request.vectors.to(self.base.device))
            words = {"prompts": None, "prompt_embeds": embeds}
        with told_at(request.stage), self.base.counter.stage(request.stage):
            images = self.base.generate(
                **words,
                seeds=[request.seeds[row] for row in rows],
                steps=request.steps,
                guidance_scale=_guidance(request, rows[0]),
                batch_size=len(rows),
                negative_prompt=request.negative_prompt,
            )
        self.drawn += len(images)
        return images


def _guidance(request: Request, row: int) -> float:
    own = request.guidance_scale
    return float(own if isinstance(own, int | float) else own[row])


def _in_words(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
