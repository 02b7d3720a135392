"""What a run takes at its worst moments, beside what was planned: the run itself, on a device without values.

    python -m benchmarks.memory --base path/to/stable-diffusion-v1-5 --recipe van-gogh-sd-1.5 --vram 8
    python -m benchmarks.memory --base path/to/stable-diffusion-xl --recipe nudity-sdxl --vram 12 --clip path/to/clip

Configurations and tokenizers are read, no weights. The whole of ``erase`` runs on torch's meta device, a step or two of
every stage, all pictures and prompts of the recipe: tensors have their sizes there and no values, and where a run asks
for one (a loss, a picture) it is told zeros. Each stage's peak is the bytes of all tensors that live on the device at
once. The optimizer is AdamW, as bitsandbytes has no such device.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from recare_patch.careset import PROPOSED, CareSet, CareToken, Clip, known_words
from recare_patch.core import CareSetError
from recare_patch.erasure import ENCODING, choose, erase, plan
from recare_patch.models import BaseModel, Tracker, find_layout, fused_attention, phantom
from recare_patch.models import memory as levers
from recare_patch.models.encoding import ENCODED_AT_ONCE, tokenizer_of
from recare_patch.recipe import Concept, Recipe, names_concept

META = torch.device("meta")
CUT: dict[str, Any] = {
    "erase.optimizer": "adamw",
    "erase.steps": 2,
    "search.erase_steps": 2,
    "search.inversion_steps": 2,
    "target_images.steps": 2,
}
"""Every stage is there, a step or two of it."""


class Device(Tracker):
    """The meta device as one whose tensors can be looked at, all zeros; counts the bytes on it, stage by stage."""

    def __init__(self) -> None:
        super().__init__([])
        self.peaks: dict[str, int] = {}
        self._stage = "loading"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        there = bool(args) and isinstance(args[0], Tensor) and args[0].is_meta
        if there and name == "_local_scalar_dense":
            return 0.5 if args[0].dtype.is_floating_point else int(args[0].dtype is torch.bool)
        if there and name == "nonzero":
            return torch.zeros((1, args[0].ndim), dtype=torch.long, device=META)
        if there and name == "_to_copy" and torch.device(kwargs.get("device") or META).type == "cpu":
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if name == "copy_" and not there and args[1].is_meta:
            return args[0]
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _add(self, storage: Any) -> None:
        if storage.device.type == "meta":
            super()._add(storage)

    def enter(self, stage: str) -> None:
        """What lives from now on is booked on another stage."""
        self.peaks[self._stage] = max(self.peaks.get(self._stage, 0), self.peak)
        self.peak, self._stage = self.now, stage

    @contextlib.contextmanager
    def inside(self, stage: str) -> Iterator[None]:
        """A stage in the middle of another one."""
        outer = self._stage
        self.enter(stage)
        yield
        self.enter(outer)


def make_base(recipe: Recipe) -> BaseModel:
    """A recipe's base on the meta device, with its tokenizers, under the recipe's levers."""
    import transformers

    layout, _ = find_layout(recipe.base, weights=False)
    base = phantom(layout, recipe.precision, recipe.memory)
    for name in base.encoder_names:
        tokenizer = tokenizer_of(name)
        kind = getattr(transformers, layout.index[tokenizer][1])
        setattr(base.pipeline, tokenizer, kind.from_pretrained(layout.folder / tokenizer))
    levers.place(base.pipeline, base.denoiser, base._encoders, recipe.memory, META, base.dtype)
    return base


def measured(recipe: Recipe, clip: Clip) -> dict[str, int]:
    """Run a recipe of few steps on the meta device: the peak of every stage in bytes."""
    with (
        tempfile.TemporaryDirectory() as folder,
        fused_attention(),
        Device() as device,
        contextlib.ExitStack() as stack,
    ):
        base = make_base(recipe)
        for watched in _watched(device, base):
            stack.enter_context(watched)
        erase(recipe, Path(folder) / "patch", base=base, clip=clip)
        device.enter("done")
    return device.peaks


def _watched(device: Device, base: BaseModel) -> Iterator[Any]:
    """Patches that tell the device of a run's stages, of the encoding of prompts, and of the preview."""
    from recare_patch.erasure import gauge, prepare, run, stages

    build = prepare.build_care_set
    ledger, preview, encode, look = stages.Ledger.stage, run.draw_preview, base.encode_prompts, gauge.Governor.look

    def stage(self: Any, name: str) -> Any:
        device.enter(name)
        return ledger(self, name)

    def encoded(prompts: Sequence[str]) -> Any:
        many = len(prompts) > ENCODED_AT_ONCE
        with device.inside(ENCODING) if many else contextlib.nullcontext():
            return encode(prompts)

    def mined(concept: Concept, images: Any, clip: Clip, *asked: Any, **how: Any) -> CareSet:
        with contextlib.suppress(CareSetError):
            return build(concept, images, clip, *asked, **how)
        # Nothing is seen in pictures without content: any words do, as many as there can be.
        words = [word for word in known_words(clip) if not names_concept(word, concept)][:PROPOSED]
        tokens = tuple(CareToken(text=word, count=1, residual=1.0, kept=True) for word in words)
        return CareSet(concept=concept, clip=clip.id, seed=0, images=len(images), tokens=tokens)

    def previewed(*asked: Any) -> Any:
        device.enter("preview")
        return preview(*asked)

    def looked(self: Any) -> None:
        look(self)
        if self._still_seen is not None:
            self._still_seen()

    yield mock.patch.object(stages.Ledger, "stage", stage)
    yield mock.patch.object(run, "draw_preview", previewed)
    yield mock.patch.object(prepare, "build_care_set", mined)
    yield mock.patch.object(base, "encode_prompts", encoded)
    yield mock.patch.object(gauge.Governor, "look", looked)


def rows(recipe: Recipe, vram: float | None, clip: Clip) -> list[tuple[str, int, int]]:
    """Stage, planned and measured bytes, of all stages that both know; the recipe takes few steps."""
    chosen, footprint = choose(recipe, vram) if vram else (recipe, None)
    planned = plan(chosen, speed=1.0, footprint=footprint).stages
    found = measured(chosen, clip)
    return [(one.name, one.peak, found[one.name]) for one in planned if one.name in found]


def main(tell: Callable[[str], None] = print) -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="a pipeline folder; configurations and tokenizers are enough")
    parser.add_argument("--recipe", help="of a concept; van-gogh-sd-1.5 or such")
    parser.add_argument("--concept", help="instead of a recipe, with the base's defaults")
    parser.add_argument("--kind", default="style")
    parser.add_argument("--vram", type=float, help="choose levers for a card of this size")
    parser.add_argument("--clip", default="atelier", help="whose vocabulary retained prompts come from")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()
    from benchmarks.erasure import assignments
    from recare_patch.erasure import resolve_recipe

    changes = CUT | assignments(arguments.set)
    kind = None if arguments.recipe else arguments.kind
    words = {"recipe": arguments.recipe, "kind": kind, "base": arguments.base, "overrides": changes}
    recipe = resolve_recipe(arguments.concept or "", device="cpu", **words)
    tell(f"{'stage':<20}{'planned GB':>12}{'measured GB':>13}{'planned / measured':>20}")
    for name, planned, took in rows(recipe, arguments.vram, Clip.load(arguments.clip)):
        tell(f"{name:<20}{planned / 1e9:>12.2f}{took / 1e9:>13.2f}{planned / took:>20.2f}")


if __name__ == "__main__":
    main()
