"""Pictures that are drawn once: a cache by content, and the studio that fills it.

A picture is named by everything that decides it: the weights that draw it, the patches in them and
their scales, the scheduler, the prompt, the seed, the steps and the guidance. What has that name in
the cache is never drawn again, so that a broken run goes on where it stopped and a second one draws
nothing.

The pictures of one batch are drawn together, and the batches of a request are the same whatever the
cache holds and however many processes share the work. Every picture's noise comes from a generator
of its own, on the CPU.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from recare_patch.core import EvaluationError, processes, write_bytes
from recare_patch.models import SCHEDULERS, TEXT_ENCODERS, named_tuner_layers, scheduled, weights_hash

if TYPE_CHECKING:
    from recare_patch.core import Progress
    from recare_patch.models import BaseModel
    from recare_patch.patch import Patch

CACHE_VERSION = 1
"""Part of every key: raised when pictures of the same key would come out differently."""


def default_cache() -> Path:
    """The cache that commands use: ``recare-patch/pictures`` below the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "recare-patch" / "pictures"


# ------------------------------------------------------------------------ the cache


class PictureCache:
    """Pictures as PNG files under a folder, named by what decides them.

    A key's first two letters are a folder of their own, so that no folder grows too long. Files are
    written whole or not at all, by any number of processes.
    """

    def __init__(self, folder: str | Path) -> None:
        """A cache in ``folder``, which is made when the first picture comes."""
        self.folder = Path(folder).expanduser()

    def key(self, fields: Mapping[str, Any]) -> str:
        """SHA-256 of the fields as canonical JSON, in hexadecimal."""
        text = json.dumps(dict(fields), sort_keys=True, ensure_ascii=True, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def path(self, key: str, suffix: str = ".png") -> Path:
        """Where what has this key lies, or would lie."""
        return self.folder / key[:2] / f"{key}{suffix}"

    def has(self, key: str) -> bool:
        """Whether there is a file for the key; it may still turn out to be unreadable."""
        return self.path(key).is_file()

    def get(self, key: str) -> Image.Image | None:
        """The picture, or None where there is none that can be read."""
        try:
            with Image.open(self.path(key), formats=("PNG",)) as found:
                return found.convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            return None

    def put(self, key: str, image: Image.Image) -> None:
        """Keep a picture.

        Raises:
            OutputError: the disk is full, or the folder cannot be written to.
        """
        buffer = io.BytesIO()
        # Fast and a little larger: what is drawn in a second should not be packed for another.
        image.convert("RGB").save(buffer, "PNG", compress_level=3)
        write_bytes(self.path(key), buffer.getvalue())


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the names, types, shapes and values of tensors, in the order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


# ------------------------------------------------------------------------ drawing


class Studio:
    """Draws pictures of a base model under patches, once each.

    Launched by accelerate (or torchrun, or MPI) as one of several processes, it draws every n-th batch
    and takes the others' from the cache that they share: every process gets all pictures, the same to
    the bit as one process draws with as many threads.

    Attributes:
        base: what draws; nothing may change its weights while the studio is in use.
        cache: where pictures are kept; None keeps nothing.
        drawn: pictures drawn so far, by this process.
        from_cache: pictures handed out that were in the cache already.

    Example:
        >>> studio = Studio(load_base("atelier"), cache=PictureCache("pictures"))  # doctest: +SKIP
        >>> before = studio.draw(["a house by Van Gogh"], [7])  # doctest: +SKIP
        >>> after = studio.draw(["a house by Van Gogh"], [7], patches=[(patch, 1.0)])  # doctest: +SKIP
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
        """A studio that has drawn nothing yet.

        Args:
            base: what draws.
            cache: where pictures are kept.
            batch_size: pictures drawn together; memory and speed.
            progress: told after every batch.
            shard: the number of this process and of all of them; found by itself where accelerate,
                torchrun or MPI launched them.

        Raises:
            EvaluationError: there are several processes and no cache for them to share, or a LoRA is
                switched on in the base.
        """
        if batch_size < 1:
            raise EvaluationError(f"a batch must have at least 1 picture, got {batch_size}")
        self._wait: Callable[[], Any] = lambda: None
        if shard is None:
            state = processes()
            shard = (0, 1) if state is None else (state.process_index, state.num_processes)
            if state is not None:
                self._wait = state.wait_for_everyone
        if not 0 <= shard[0] < shard[1]:
            raise EvaluationError(f"there is no process {shard[0]} of {shard[1]}: they are counted from 0")
        if shard[1] > 1 and cache is None:
            raise EvaluationError(
                f"{shard[1]} processes need a cache to share their pictures in: name a folder with --cache"
            )
        self.base, self.cache, self.batch_size = base, cache, batch_size
        self._progress, self._shard = progress, shard
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
        }
        self._patches: dict[int, tuple[Patch, str]] = {}

    @property
    def main(self) -> bool:
        """Whether this process is the first, or the only one."""
        return self._shard[0] == 0

    @property
    def processes(self) -> int:
        """How many processes share the work."""
        return self._shard[1]

    def wait(self) -> None:
        """Wait until all processes have come this far; at once where there is only one."""
        self._wait()

    def _check_plain(self) -> None:
        for _, layer in named_tuner_layers(self.base.components):
            if layer.active_adapters and not layer.disable_adapters:
                raise EvaluationError(
                    f"a LoRA ({layer.active_adapters[0]}) is switched on in base '{self.base.id}': take it "
                    "out, and name it with the patches to draw under"
                )

    # ------------------------------------------------------------------ what is asked for

    def _patch_hash(self, patch: Patch) -> str:
        # The patch is kept beside its hash, so that no other can come to have its id.
        known = self._patches.get(id(patch))
        if known is None:
            known = self._patches[id(patch)] = (patch, tensors_hash(patch.tensors))
        return known[1]

    def key(self, patches: Sequence[tuple[Patch, float]], fields: Mapping[str, Any]) -> str:
        """The key of something made with the base under patches.

        Args:
            patches: each with its scale.
            fields: everything else that decides it, JSON values.

        Raises:
            EvaluationError: there is no cache.
        """
        if self.cache is None:
            raise EvaluationError("there is no cache to name anything in")
        hashed = [[self._patch_hash(patch), float(scale)] for patch, scale in patches]
        return self.cache.key({**self._model, "patches": hashed, **fields})

    def _keys(self, request: _Request) -> list[str]:
        """The key of each picture; texts that are equal share one."""
        own = self.base.pipeline.scheduler
        config = {key: value for key, value in dict(own.config).items() if not key.startswith("_")}
        fields: dict[str, Any] = {
            "scheduler": [request.scheduler or type(own).__name__, repr(sorted(config.items()))],
            "steps": request.steps,
            "guidance_scale": float(request.guidance_scale),
        }
        if request.vectors is not None:
            fields["vectors"] = tensors_hash({"vectors": request.vectors})
        return [
            self.key(request.patches, {**fields, "prompt": prompt, "seed": seed})
            for prompt, seed in zip(request.prompts, request.seeds, strict=True)
        ]

    def draw(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        patches: Sequence[tuple[Patch, float]] = (),
        steps: int = 20,
        guidance_scale: float = 5.0,
        scheduler: str | None = None,
        stage: str = "pictures",
        vectors: Tensor | None = None,
    ) -> list[Image.Image]:
        """Pictures of prompts, in their order; see :meth:`stream`."""
        found = self.stream(
            prompts,
            seeds,
            patches=patches,
            steps=steps,
            guidance_scale=guidance_scale,
            scheduler=scheduler,
            stage=stage,
            vectors=vectors,
        )
        return [image for _, image in found]

    def stream(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        patches: Sequence[tuple[Patch, float]] = (),
        steps: int = 20,
        guidance_scale: float = 5.0,
        scheduler: str | None = None,
        stage: str = "pictures",
        vectors: Tensor | None = None,
    ) -> Iterator[tuple[int, Image.Image]]:
        """Pictures of prompts one by one, so that memory does not grow with their number.

        With a cache, everything missing is drawn before the first picture comes. A batch of which any
        picture is missing is drawn as a whole, so that no picture depends on what else was there.

        Args:
            prompts: one a picture.
            seeds: one a picture, of its starting noise.
            patches: what is put into the base, each at its scale.
            steps: of the scheduler.
            guidance_scale: at 1 or less there is no guidance.
            scheduler: a name of :data:`SCHEDULERS`; None: the base's own.
            stage: how progress and the base's counter call it.
            vectors: token vectors ``[vectors, token_width]`` for prompts that hold
                :data:`PLACEHOLDER`.

        Yields:
            The number of the picture and the picture.

        Raises:
            EvaluationError: prompts and seeds differ in number, or a LoRA is switched on in the base.
            UnknownNameError: no such scheduler.
            IncompatiblePatchError: a patch does not fit the base.
        """
        if len(prompts) != len(seeds):
            raise EvaluationError(
                f"{len(prompts)} prompts were given with {len(seeds)} seeds: one seed a picture is needed"
            )
        if scheduler is not None:
            SCHEDULERS.get(scheduler)
        self._check_plain()
        request = _Request(
            tuple(prompts), tuple(seeds), tuple(patches), steps, guidance_scale, scheduler, stage, vectors
        )
        if self.cache is None:
            return self._drawn(request)
        return self._through_cache(request, self._keys(request))

    def fill(self, prompts: Sequence[str], seeds: Sequence[int], **options: Any) -> None:
        """Draw what the cache lacks and hand nothing out; arguments as in :meth:`stream`.

        Raises:
            EvaluationError: there is no cache to fill.
        """
        if self.cache is None:
            raise EvaluationError("there is no cache to draw into")
        # Asking for the first picture is what draws them all.
        next(self.stream(prompts, seeds, **options), None)

    # ------------------------------------------------------------------ drawing

    def _batches(self, request: _Request) -> list[range]:
        count = len(request.prompts)
        return [
            range(start, min(start + self.batch_size, count)) for start in range(0, count, self.batch_size)
        ]

    def _generate(self, request: _Request, rows: range) -> list[Image.Image]:
        base, prompts = self.base, [request.prompts[row] for row in rows]
        text: dict[str, Any] = {"prompts": prompts}
        if request.vectors is not None:
            with torch.no_grad():
                embeds = base.encode_with_vectors(prompts, request.vectors.to(base.device))
            text = {"prompts": None, "prompt_embeds": embeds}
        with base.counter.stage(request.stage):
            images = base.generate(
                **text,
                seeds=[request.seeds[row] for row in rows],
                steps=request.steps,
                guidance_scale=request.guidance_scale,
                batch_size=len(rows),
            )
        self.drawn += len(images)
        return images

    @contextlib.contextmanager
    def _set_up(self, request: _Request) -> Iterator[None]:
        with scheduled(self.base.pipeline, request.scheduler), contextlib.ExitStack() as stack:
            for patch, scale in request.patches:
                stack.enter_context(patch.apply(self.base.pipeline, scale=scale))
            yield

    def _tell(self, request: _Request, done: int, total: int) -> None:
        if self._progress is not None:
            self._progress.update(request.stage, done, total)

    def _drawn(self, request: _Request) -> Iterator[tuple[int, Image.Image]]:
        total = len(request.prompts)
        for rows in self._batches(request):
            # The base is plain again before a picture is handed out: the caller may draw others between.
            with self._set_up(request):
                images = self._generate(request, rows)
            self._tell(request, rows.stop, total)
            yield from zip(rows, images, strict=True)

    def _through_cache(self, request: _Request, keys: list[str]) -> Iterator[tuple[int, Image.Image]]:
        cache = self.cache
        assert cache is not None
        self._fill(request, keys, cache)
        mended: dict[int, Image.Image] = {}
        for row, key in enumerate(keys):
            image = mended.pop(row, None) or cache.get(key)
            if image is None:
                # A file that was there and cannot be read, or was taken away in the meantime.
                rows = self._batches(request)[row // self.batch_size]
                with self._set_up(request):
                    images = self._draw_into(request, rows, keys, cache)
                mended = {later: drawn for later, drawn in zip(rows, images, strict=True) if later > row}
                image = images[row - rows.start]
            yield row, image

    def _fill(self, request: _Request, keys: list[str], cache: PictureCache) -> None:
        number, count = self._shard
        # All look before any draws, and none draws the next request while others read this one.
        self.wait()
        batches = self._batches(request)
        missing = [rows for rows in batches if not all(cache.has(keys[row]) for row in rows)]
        self.wait()
        self.from_cache += len(keys) - sum(map(len, missing))
        own = [rows for rows in missing if rows.start // self.batch_size % count == number]
        if own:
            done = len(keys) - sum(map(len, missing))
            with self._set_up(request):
                for rows in own:
                    self._draw_into(request, rows, keys, cache)
                    # The others keep pace, more or less: their batches are as many.
                    done = min(done + count * len(rows), len(keys))
                    self._tell(request, done, len(keys))
        self.wait()
        self._tell(request, len(keys), len(keys))

    def _draw_into(
        self, request: _Request, rows: range, keys: list[str], cache: PictureCache
    ) -> list[Image.Image]:
        images = self._generate(request, rows)
        for row, image in zip(rows, images, strict=True):
            cache.put(keys[row], image)
        return images


@dataclass(frozen=True, eq=False)
class _Request:
    """The pictures that one call asks for."""

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    patches: tuple[tuple[Patch, float], ...]
    steps: int
    guidance_scale: float
    scheduler: str | None
    stage: str
    vectors: Tensor | None
