"""A rehearsal of an erasure: all that it would load, and one step of every stage at full size.

The very code of a run does it, on a recipe whose counts are cut and whose batches and levers are not, so that memory
and speed are measured where a run needs them. Every check ends in a sentence, and so does whatever fails in one.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recare_patch.core import NullProgress, Progress, RecarePatchError
from recare_patch.recipe import Recipe

if TYPE_CHECKING:
    import torch

    from recare_patch.careset import Clip
    from recare_patch.models import BaseModel

OK, WARNING, FAILED = "ok", "warning", "FAILED"
_WORDS = ("night", "water", "house")
"""What the rehearsal guards: whether a base knows them is no matter for memory and speed."""
_TEXTS = [f"{one} {k}" for one in _WORDS for k in range(16)]
_FREE_SPACE = 500e6
"""Bytes beside the base: a run's pictures, checkpoints and patch."""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at: what it is, how it stands, and a sentence on it."""

    name: str
    state: str
    told: str


@dataclass(frozen=True)
class StageFigures:
    """A stage: what the plan says of the whole run, and what one step of it took here, peaks in bytes."""

    name: str
    evaluations: int
    seconds: float | None  # of the whole run, at the speed measured here
    planned: int
    measured: int | None  # None: the device has no memory of its own that could be told apart


@dataclass
class Diagnosis:
    """What a rehearsal found: its checks in order, figures by stage, and the command that would run it."""

    command: str = ""
    checks: list[Check] = field(default_factory=list)
    stages: list[StageFigures] = field(default_factory=list)
    versions: Mapping[str, str] = field(default_factory=dict)
    recipe: str = ""

    @property
    def ready(self) -> bool:
        """Whether nothing failed."""
        return bool(self.checks) and all(one.state != FAILED for one in self.checks)

    def as_data(self) -> dict[str, Any]:
        """All of it, as plain data."""
        return {"ready": self.ready, **asdict(self)}


class _Stop(Exception):
    """What comes after a failed check cannot be looked at."""


class _Rehearsal:
    def __init__(self, found: Diagnosis, progress: Progress) -> None:
        self.found, self.progress, self.under_way = found, progress, ""

    def update(self, stage: str, done: int, total: int, note: str = "") -> None:
        """As of :class:`Progress`; remembers the stage, which a failure is told with."""
        self.under_way = stage
        self.progress.update(stage, done, total, note)

    def add(self, name: str, told: str, state: str = OK) -> None:
        self.found.checks.append(Check(name, state, told))

    @contextlib.contextmanager
    def check(self, name: str, remedy: str = "") -> Iterator[None]:
        """Whatever fails inside becomes a sentence, with the remedy; nothing after it is looked at."""
        try:
            yield
        except _Stop:
            raise
        except Exception as fault:
            told = str(fault) if isinstance(fault, RecarePatchError) else f"{type(fault).__name__}: {fault}"
            told = " ".join(told.split())[:600]
            if type(fault).__name__ == "OutOfMemoryError":
                told, remedy = "the device's memory is full", "give --vram with less than it has, such as half of it"
            where = f"in {self.under_way}: " if self.under_way else ""
            self.add(name, f"{where}{told}{f'; {remedy}' if remedy else ''}", FAILED)
            raise _Stop from fault


def rehearse(
    concept: str, *, vram: float | None = None, device: str = "auto", progress: Progress | None = None, **words: Any
) -> Diagnosis:
    """Load what an erasure would load, take one step of every stage, and tell how it went; nothing is left behind.

    Args:
        concept, vram, device: as :func:`erase_concept` takes them; a kind that nothing tells is "object".
        progress: told of every stage.
        words: what :func:`recipe_for` takes: kind, recipe, preset, base, clip, overrides.
    """
    from recare_patch.erasure.run import PACKAGES
    from recare_patch.models import versions

    found = Diagnosis(versions=versions((*PACKAGES, "accelerate", "huggingface_hub")))
    watch = _Rehearsal(found, progress or NullProgress())
    with contextlib.suppress(_Stop):
        place = _device(watch, device)
        recipe = _resolved(watch, concept, vram, device, words)
        recipe = _optimizer(watch, recipe, place)
        found.command = _command(concept, recipe, vram, device, words)
        found.recipe = recipe.to_yaml()
        _space(watch, recipe)
        clip = _clip(watch, recipe, place)
        base = _base(watch, recipe, device)
        _steps(watch, recipe, base, clip)
    return found


def _device(watch: _Rehearsal, device: str) -> torch.device:
    import torch

    from recare_patch.models import chosen_device, device_memory, device_name

    with watch.check("device"):
        place = chosen_device(device)
        size = device_memory(place)
        told = device_name(place) + (f", {size:.1f} GiB" if size else f", {os.cpu_count()} cores")
        if place.type == "cpu" and device == "auto":
            hint = "no GPU was found: a base of full size takes hours"
            if torch.version.cuda is None and torch.version.hip is None:
                hint += f"; this torch ({torch.__version__}) is built for CPUs alone"
            watch.add("device", f"{told}; {hint}", WARNING)
        else:
            watch.add("device", told)
    return place


def _resolved(watch: _Rehearsal, concept: str, vram: float | None, device: str, words: Mapping[str, Any]) -> Recipe:
    """The recipe with its levers, and its plan as the figures by stage."""
    from recare_patch.erasure.planning import choose, plan
    from recare_patch.erasure.run import levers_for
    from recare_patch.models import defaults_for
    from recare_patch.recipe import recipe_for

    with watch.check("recipe"):
        recipe = recipe_for(
            concept,
            # What it is changes words, not costs.
            guess_kind=lambda *_: "object",
            beneath=lambda source: defaults_for(source, device),
            **{key: value for key, value in words.items() if value is not None},
        )
        watch.add("recipe", f"{recipe.method} erases '{recipe.title}' from {recipe.base} in {recipe.precision}")
    with watch.check("memory"):
        card = vram if vram is not None else levers_for(recipe, device)
        footprint = None
        if card is not None:
            recipe, footprint = choose(recipe, card)
        planned = plan(recipe, speed=1.0, footprint=footprint)
        # A step is taken of those that ask the denoiser; reading prompts and the preview are only in the peak.
        asking = [one for one in planned.stages if one.evaluations]
        watch.found.stages = [StageFigures(one.name, one.evaluations, None, one.peak, None) for one in asking]
        size = f" of a card of {card:g} GB" if card is not None else ""
        watch.add(
            "memory", f"{planned.peak / 1e9:.1f} GB planned at the worst moment{size}: {recipe.memory.in_words()}"
        )
    return recipe


def _optimizer(watch: _Rehearsal, recipe: Recipe, device: torch.device) -> Recipe:
    """The recipe, with plain AdamW where the 8-bit one does not work here."""
    import torch

    from recare_patch.erasure.loop import OPTIMIZERS

    try:
        weight = torch.nn.Parameter(torch.ones(128, 64, device=device))
        optimizer: torch.optim.Optimizer = OPTIMIZERS.get(recipe.erase.optimizer)([weight], 1e-2)
        weight.sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if not bool((weight < 1).all()):
            raise RuntimeError("its step did not change a weight")
    except Exception as fault:
        if recipe.erase.optimizer == "adamw":
            watch.add("optimizer", f"{type(fault).__name__}: {fault}", FAILED)
            raise _Stop from fault
        told = " ".join(str(fault).split())[:200]
        watch.add("optimizer", f"{recipe.erase.optimizer} does not work here ({told}); --optimizer adamw does", WARNING)
        return _optimizer(watch, recipe.with_overrides({"erase.optimizer": "adamw"}), device)
    watch.add("optimizer", f"{recipe.erase.optimizer} takes a step")
    return recipe


def _space(watch: _Rehearsal, recipe: Recipe) -> None:
    with watch.check("disk"):
        free = shutil.disk_usage(Path.cwd()).free
        enough = free >= _FREE_SPACE
        told = f"{free / 1e9:.1f} GB free here" + ("" if enough else f", and a run takes up to {_FREE_SPACE / 1e9:.1f}")
        watch.add("disk", told, OK if enough else FAILED)
        if not os.access(Path.cwd(), os.W_OK):
            watch.add("disk", f"{Path.cwd()} cannot be written to; choose another --out", WARNING)


def _clip(watch: _Rehearsal, recipe: Recipe, device: torch.device) -> Clip:
    import torch
    from PIL import Image

    from recare_patch.careset import default_clip, known_names, known_words
    from recare_patch.erasure.planning import _confirmed
    from recare_patch.erasure.run import load_clip

    source = recipe.clip or default_clip(recipe.base)
    with watch.check("CLIP", "name another with --clip"):
        clip = load_clip(source, device, recipe.memory)
        began = time.perf_counter()
        text = clip.text_features([f"A photo of {word}" for word in _TEXTS])
        each = (time.perf_counter() - began) / len(_TEXTS)
        lexicon = len(known_words(clip)) + len(known_names(clip)) if _confirmed(recipe) else 0
        seen = clip.image_features([Image.new("RGB", (64, 64), colour) for colour in ("red", "navy")])
        if not bool(torch.isfinite(text).all() and torch.isfinite(seen).all()):
            raise RecarePatchError(f"the CLIP '{source}' answers with numbers that are not finite")
        apart = float((seen[0] - seen[1]).abs().max())
        watch.add(
            "CLIP",
            f"{source} reads texts and pictures"
            + (f"; its lexicon of {lexicon:,} words takes about {_span(each * lexicon)}" if lexicon else "")
            + ("" if apart > 1e-4 else "; it sees no difference between red and navy"),
            OK if apart > 1e-4 else WARNING,
        )
    return clip


def _base(watch: _Rehearsal, recipe: Recipe, device: str) -> BaseModel:
    from recare_patch.models import load_base

    with watch.check("base"):
        began = time.perf_counter()
        base = load_base(recipe.base, precision=recipe.precision, device=device, memory=recipe.memory)
        width, height = base.picture_size
        weights = sum(p.numel() for network in base.components.values() for p in network.parameters())
        watch.add(
            "base",
            f"{base.family}, {weights / 1e6:,.0f} M weights in {base.dtype}, {width}x{height} pixels, "
            f"{base.prediction_type}, loaded in {time.perf_counter() - began:.0f} s",
        )
    return base


def _steps(watch: _Rehearsal, recipe: Recipe, base: BaseModel, clip: Clip) -> None:
    """One step of every stage by the run itself, and what it took."""
    from recare_patch.careset import CareSet
    from recare_patch.erasure.run import erase

    on_cpu = base.device.type == "cpu"
    cut = rehearsal_of(recipe, cpu=on_cpu)
    guarded = CareSet.of_words(cut.concept, [one for one in _WORDS if one not in cut.concept.text.casefold()])
    began = time.perf_counter()
    # What a run says of its pictures is not true of those that two steps make.
    with watch.check("rehearsal"), _silent(), tempfile.TemporaryDirectory() as place:
        result = erase(
            cut, Path(place) / "patch", progress=watch, base=base, clip=clip, care_set=guarded, preview=False
        )
        watch.under_way = ""
    stages: Mapping[str, Mapping[str, Any]] = result.cost["stages"]
    watch.found.stages = [_figures(one, stages, on_cpu) for one in watch.found.stages]
    whole = _span(sum(one.seconds or 0.0 for one in watch.found.stages))
    spent = f"every stage took a step, {time.perf_counter() - began:.0f} s"
    watch.add("rehearsal", f"{spent}; at that speed a run takes about {whole} at the most")
    for one in watch.found.stages:
        if (taken := one.measured or 0) > 1.1 * one.planned:
            told = f"{one.name} took {taken / 1e9:.1f} GB, and {one.planned / 1e9:.1f} were planned"
            watch.add("memory measured", f"{told}: give --vram with less, and tell us", WARNING)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    package = logging.getLogger("recare_patch")
    level = package.level
    package.setLevel(logging.ERROR)
    try:
        yield
    finally:
        package.setLevel(level)


def rehearsal_of(recipe: Recipe, *, cpu: bool = False) -> Recipe:
    """A recipe that takes one step of every stage of another, with its batches and levers.

    On a CPU, where rows are computed one after the other and memory is not what runs out, batches are cut too.
    """
    images, erase = recipe.target_images, recipe.erase
    changes: dict[str, Any] = {
        "target_images.count": min(images.count, images.batch_size),
        # Some schedulers take two evaluations for their first step.
        "target_images.steps": min(images.steps, 2),
        "care_set.file": None,
        "search.rounds": min(recipe.search.rounds, 1),
        "search.erase_steps": 1,
        "search.inversion_steps": 1,
        "search.patience": None,
        "adversary.count": min(recipe.adversary.count, 1),
        "erase.ends": "steps",
        "erase.steps": 1,
        "erase.retained_vocabulary": 0,
        "erase.retained_pairs": 0,
        "erase.retained_images": min(erase.retained_images, 1),
        "continue_from": None,
    }
    if cpu:
        changes |= {
            "target_images.count": 1,
            "search.batch_size": 1,
            "adversary.batch_size": 1,
            "erase.batch_size": 1,
            "erase.retain_batch_size": 1 if erase.retain_batch_size is not None else None,
        }
    return recipe.with_overrides(changes)


def _figures(one: StageFigures, stages: Mapping[str, Mapping[str, Any]], on_cpu: bool) -> StageFigures:
    """A stage with what was measured of it, or else, of its seconds, what the average of all stages makes likely."""
    spent = stages.get(one.name)
    timed = [spent] if spent is not None and spent["evaluations"] else [*stages.values()]
    evaluations = sum(int(some["evaluations"]) for some in timed)
    each = sum(float(some["seconds"]) for some in timed if some["evaluations"]) / max(evaluations, 1)
    measured = None if on_cpu or spent is None else int(spent["peak_memory_bytes"])
    return replace(one, seconds=each * one.evaluations if one.evaluations else None, measured=measured)


def _span(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def _command(concept: str, recipe: Recipe, vram: float | None, device: str, words: Mapping[str, Any]) -> str:
    """The command that runs what was rehearsed."""
    overrides: dict[str, Any] = dict(words.get("overrides") or {})
    if recipe.erase.optimizer == "adamw":
        overrides["erase.optimizer"] = "adamw"
    parts = ["recare-patch", "erase"]
    parts += ["--concept", concept] if concept else []
    for name in ("recipe", "preset", "kind", "base", "clip"):
        if words.get(name):
            parts += [f"--{name}", str(words[name])]
    parts += ["--vram", f"{vram:g}"] if vram is not None else []
    parts += ["--device", device] if device != "auto" else []
    for key, value in overrides.items():
        parts += [
            "--set",
            f"{key}={'null' if value is None else str(value).lower() if isinstance(value, bool) else value}",
        ]
    return shlex.join(parts)
