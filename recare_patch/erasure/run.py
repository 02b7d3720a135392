"""One erasing run from a recipe to a patch: target images, CARE-set, search, erase, patch.

Every stage leaves what it made in a hidden folder beside the result, so a run that was stopped at any moment goes
on from there; the patch itself appears only when it is whole.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recare_patch.careset import CareSet, Clip, default_clip, guess_kind
from recare_patch.core import (
    NullProgress,
    OutputError,
    PatchError,
    Progress,
    ResumeError,
    claim_folder,
    file_sha256,
    launched_together,
    save_sheet,
    write_json,
    write_text,
)
from recare_patch.erasure import prepare
from recare_patch.erasure.methods import Method
from recare_patch.erasure.planning import ends_early
from recare_patch.erasure.preflight import check_files, check_names
from recare_patch.erasure.preview import Preview, draw_preview
from recare_patch.erasure.stages import ADAPTER, Run, Stages, continued, earlier_patch, quick_sampler
from recare_patch.models import (
    BaseModel,
    defaults_for,
    device_memory,
    device_name,
    load_base,
    lora,
    scheduled,
    versions,
)
from recare_patch.patch import (
    FORMATS,
    Erased,
    Patch,
    PatchMetadata,
    card_text,
    check_formats,
    has_kohya_names,
    write_kohya,
)
from recare_patch.recipe import METHODS, MemoryOptions, Recipe, recipe_for

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from recare_patch.core import Crew

logger = logging.getLogger(__name__)

RUN_FOLDER = ".run"
EARLIER = "begun_in"
"""Beside a resumed run's recipe: the precision of its first steps, where it is another one."""
PACKAGES = ("torch", "diffusers", "peft", "transformers", "safetensors", "bitsandbytes")
"""Whose versions a patch names."""


@dataclass(frozen=True)
class EraseResult:
    """What an erasing run made.

    Attributes:
        patch: the patch, loaded.
        folder: where it lies.
        care_set: the CARE-set it was guarded by; ``None`` for methods without one.
        cost: seconds, denoiser evaluations and peak memory by stage, and the loss curves.
        warnings: what the user should know, one sentence each.
    """

    patch: Patch
    folder: Path
    care_set: CareSet | None
    cost: dict[str, Any]
    warnings: tuple[str, ...] = ()


def erase_concept(
    concept: str,
    *,
    out: Path | str | None = None,
    vram: float | None = None,
    device: str = "auto",
    resume: bool = False,
    progress: Progress | None = None,
    care_set: CareSet | None = None,
    save_target_images: bool = False,
    file_formats: Sequence[str] = FORMATS,
    **words: Any,
) -> EraseResult:
    """Erase a concept by its name: the recipe is looked up, or made from defaults.

    Args:
        concept: what to erase, in any case; may be empty where ``recipe`` names one.
        out: folder for the patch; ``<concept>-patch`` by default.
        vram: GB of a card for which memory levers are chosen; see :func:`choose`. None: that of the device, where a
            base computes in half precision on a device with memory of its own and no lever is set.
        device, resume, progress, care_set, save_target_images, file_formats: as :func:`erase` takes them.
        words: what :func:`recipe_for` takes: also, subject, kind, recipe, preset, base, clip, overrides.
    """
    recipe = resolve_recipe(concept, device=device, vram=vram, fit=True, **words)
    return erase(
        recipe,
        Path(out) if out is not None else Path(f"{recipe.slug}-patch"),
        resume=resume,
        progress=progress,
        device=device,
        care_set=care_set,
        save_target_images=save_target_images,
        file_formats=file_formats,
    )


def levers_for(recipe: Recipe, device: str) -> float | None:
    """GB of the device for which memory levers are to be chosen, where a recipe for half precision sets none."""
    plain = MemoryOptions(resolution=recipe.memory.resolution)
    if recipe.precision == "fp32" or recipe.memory != plain or (size := device_memory(device)) is None:
        return None
    return size


def resolve_recipe(
    concept: str,
    *,
    device: str = "auto",
    vram: float | None = None,
    fit: bool = False,
    only: Sequence[str] = (),
    **words: Any,
) -> Recipe:
    """The recipe that a call of :func:`erase_concept` would run, its levers chosen for a card of ``vram`` GB.

    A kind that nothing tells is seen in pictures, which are drawn as the run draws: at its precision, under its levers.

    Args:
        concept, device, vram, words: as there.
        fit: choose levers for the device itself where no card is named; see :func:`levers_for`.
        only: stages that must fit; none said: all.
    """
    words["beneath"] = lambda source: defaults_for(source, device)
    drawing: list[tuple[Recipe, BaseModel]] = []

    def guess(text: str, source: str, clip: str | None) -> str:
        if not drawing:
            # Of all kinds a style has most prompts; what the kind really is changes little else.
            asked = recipe_for(concept, guess_kind=lambda *_: "style", **(words | {"kind": "style"}))
            asked = _fitted(asked, vram or levers_for(asked, device), only, guessed=True)
            how: dict[str, Any] = {"precision": asked.precision, "memory": asked.memory, "device": device}
            drawing.append((asked, load_base(source, **how)))
        base = drawing[0][1]
        return _seen_kind(text, base, load_clip(clip or default_clip(source), base.device, base.memory))

    made = recipe_for(concept, guess_kind=guess, **words)
    size = vram or (levers_for(made, device) if fit else None)
    if size is not None and drawing:
        fitted = drawing[0][0]
        return made.with_overrides({"precision": fitted.precision, "memory": fitted.memory.model_dump()})
    return _fitted(made, size, only)


def load_clip(source: str, device: str | torch.device, memory: MemoryOptions) -> Clip:
    """A CLIP on a base's device, or waiting off it as the base's own text encoders do."""
    clip = Clip.load(source, device=device)
    if memory.encoders_off_device:
        clip.park()
    return clip


def _fitted(recipe: Recipe, vram: float | None, only: Sequence[str], *, guessed: bool = False) -> Recipe:
    """A recipe with levers for a card, where one is named."""
    if vram is None:
        return recipe
    from recare_patch.erasure.planning import choose

    recipe, _ = choose(recipe, vram, guessed=guessed, only=only)
    logger.info("for %g GB: %s, %s", vram, recipe.precision, recipe.memory.in_words())
    return recipe


def _seen_kind(text: str, base: BaseModel, clip: Clip) -> str:
    from recare_patch.erasure.planning import KIND, KIND_BATCH, KIND_PICTURES, KIND_STEPS

    def generate(prompts: Sequence[str], seeds: Sequence[int]) -> list[Image]:
        few: dict[str, Any] = {"steps": KIND_STEPS, "batch_size": KIND_BATCH, "stage": KIND}
        with scheduled(base.pipeline, quick_sampler(base)):
            return base.generate(prompts, seeds, guidance_scale=5.0, **few)

    return guess_kind(text, generate, clip, count=KIND_PICTURES)


# Long for its arguments; the way of a run should be read in one piece.
def erase(
    recipe: Recipe,
    out: Path | str,
    *,
    resume: bool = False,
    progress: Progress | None = None,
    device: str = "auto",
    care_set: CareSet | None = None,
    save_target_images: bool = False,
    file_formats: Sequence[str] = FORMATS,
    preview: bool = True,
    base: BaseModel | None = None,
    clip: Clip | None = None,
) -> EraseResult:
    """Erase a concept and write the patch.

    Args:
        recipe: all of what to do.
        out: folder for the patch; it must not hold anything yet.
        resume: go on with a run that was stopped; the result is the same to the bit on one machine.
        progress: told of every stage's steps.
        device: ``auto``, ``cpu``, ``cuda`` …
        care_set: guard these words instead of mining them.
        save_target_images: keep the target images beside the patch.
        file_formats: "diffusers", the patch itself, must be among them; "kohya" adds a file for A1111 and ComfyUI.
        preview: draw the sheet of pictures before and after, which is no part of what a run counts.
        base, clip: already loaded models to use instead of the recipe's.

    Raises:
        RecarePatchError: one sentence on what was wrong; nothing half-made is left as a patch.
    """
    out, chosen, method = Path(out).expanduser(), check_formats(file_formats), METHODS.get(recipe.method)
    # Faulty files, a layer set without a module and an unfit earlier patch fail before anything is drawn.
    check_files(recipe)
    crew, device = _crew(device)
    base = base or load_base(recipe.base, precision=recipe.precision, device=device, memory=recipe.memory)
    check_names(recipe, base.tokenizer, base.id)
    # What the record says is what was computed in: a card may have no bf16.
    if base.precision != recipe.precision:
        recipe = recipe.with_overrides({"precision": base.precision})
    for network in lora.adapted(base, recipe.adapter.layers).values():
        lora.target_modules(network, recipe.adapter.layers)
    earlier = earlier_patch(recipe, base)
    clip = clip or load_clip(recipe.clip or default_clip(recipe.base), base.device, base.memory)
    if crew is not None and not crew.main:
        # Its share of the predictions, and nothing of the files.
        with _together(base, crew):
            run = Run(recipe, out / RUN_FOLDER, base, clip, NullProgress(), False)
            run.wait()
            patch, found, _ = _train(run, method, care_set, earlier)
        crew.wait()
        cost = json.loads((out / "training.json").read_text(encoding="utf-8"))
        return EraseResult(patch, out, found, cost)
    with claim_folder(out, resume=resume):
        work = _work_folder(out, recipe)
        with _together(base, crew):
            run = Run(recipe, work, base, clip, progress or NullProgress(), save_target_images)
            if (work / EARLIER).exists():
                begun = (work / EARLIER).read_text(encoding="utf-8")
                run.warn(f"it was begun in {begun}, and gone on with in {recipe.precision}")
            run.wait()
            patch, found, targets = _train(run, method, care_set, earlier)
        _tell_measured(run)
        drawn = draw_preview(run, targets, patch) if preview else None
        cost = _finish(run, out, patch, found, chosen, drawn)
        if crew is not None:
            crew.wait()
        # One rename ends the run: a kill while the files go leaves a finished patch, not half a run.
        shutil.rmtree(work.rename(out / f"{RUN_FOLDER}.done"))
    return EraseResult(patch, out, found, cost, tuple(run.warnings))


def _crew(device: str) -> tuple[Crew | None, str]:
    """The processes that this one was launched with, and its device; None where it is alone."""
    if not launched_together():
        return None, device
    from recare_patch.core import Crew, process_device

    return Crew.found(), process_device(device)


@contextlib.contextmanager
def _together(base: BaseModel, crew: Crew | None) -> Iterator[None]:
    """Inside, processes share every prediction of the base's."""
    if crew is not None:
        # The folder is claimed, and what an earlier run left in it is what all go on from.
        crew.wait()
    base.crew = crew
    try:
        yield
    finally:
        base.crew = None


def _work_folder(out: Path, recipe: Recipe) -> Path:
    """Where the stages leave what they made; that of a stopped run must be of the same recipe.

    Its precision may differ: a run that met a NaN in fp16 goes on in another one, and says so.
    """
    work = out / RUN_FOLDER
    stored = work / "recipe.yaml"
    # Of a run that was killed while it cleared up.
    shutil.rmtree(out / f"{RUN_FOLDER}.done", ignore_errors=True)
    if (out / "pytorch_lora_weights.safetensors").exists() and not work.exists():
        raise OutputError(f"{out} already holds a finished patch; choose another --out")
    before = stored.read_text(encoding="utf-8") if stored.exists() else recipe.to_yaml()
    if _but_precision(before) != _but_precision(recipe.to_yaml()):
        raise ResumeError(f"{out} holds a run of another recipe: resume with its own options, or choose another --out")
    work.mkdir(parents=True, exist_ok=True)
    if before != recipe.to_yaml() and not (work / EARLIER).exists():
        write_text(work / EARLIER, Recipe.from_yaml(before).precision)
    write_text(stored, recipe.to_yaml())
    return work


def _but_precision(recipe: str) -> list[str]:
    return [line for line in recipe.splitlines() if not line.startswith("precision:")]


def _train(
    run: Run, method: type[Method], given: CareSet | None, earlier: Patch | None
) -> tuple[Patch, CareSet | None, list[prepare.Target]]:
    """The stages themselves: prepare each concept, let the method search, erase them all, take the adapter out."""
    recipe, made = run.recipe, []
    with continued(run, earlier):
        targets = prepare.targets_of(run)
        for target in targets:
            images = prepare.draw_target(target) if method.needs.target_images else []
            has_set = given is not None or recipe.care_set.file is not None
            if method.needs.care_set or (method.needs.words and has_set):
                prepare.find_companions(target, images, given)
            made.append(method(prepare.prepare(target, method)))
            made[-1].search(Stages(run, number=target.number))
        care_set = _all_companions(targets)
        if method.needs.care_set and ends_early(recipe):
            run.still_seen = prepare.looker(targets)
        with Stages(run).adapter(recipe.seed) as stages:
            method.erase(made, stages)
            metadata = PatchMetadata.describe(recipe, run.base, care_set, versions(PACKAGES))
            metadata = metadata.model_copy(update={"names": run.named})
            patch = Patch.from_adapter(run.base, ADAPTER, recipe.adapter.rank, recipe.adapter.alpha, metadata)
    if earlier is not None or recipe.also:
        told = metadata.with_concepts(Erased.by(recipe, [one.care_words for one in targets]), earlier)
        patch = Patch(patch.tensors, told, patch.source)
    return patch, care_set, targets


def _all_companions(targets: Sequence[prepare.Target]) -> CareSet | None:
    """The CARE-sets of all concepts in one, that of the first concept for a start."""
    found = [target.care_set for target in targets if target.care_set is not None]
    if not found:
        return None
    tokens = {token.text.casefold(): token for one in reversed(found) for token in one.tokens}
    for token in (token for one in found for token in one.tokens if token.kept):
        tokens[token.text.casefold()] = token
    order = dict.fromkeys(token.text.casefold() for one in found for token in one.tokens)
    return found[0].model_copy(update={"tokens": tuple(tokens[name] for name in order)})


def _tell_measured(run: Run) -> None:
    """Say loudly where a run missed its own bars; its patch is written all the same."""
    governor = run.governor
    if governor is None or governor.reached:
        return
    last, bars = governor.last, governor.bars
    if not governor.early:
        run.warn(
            f"retained prompts drifted by {last.drift:.2f} (bar {bars.drift:g}): look at preview.png, and hold more "
            "with --set erase.retain_weight=…"
        )
        return
    gone = max(bars.gone, governor.asked)
    seen = f", CLIP saw it in {governor.seen:.0%} of the pictures that it was shown last" if governor.seen else ""
    run.warn(
        f"the run ended at its last step short of its bars: {last.gone:.2f} of the concept gone (bar {gone:g})"
        f"{seen}, retained prompts drifted by {last.drift:.2f} (bar {bars.drift:g}); look at preview.png, and give it "
        "more --steps"
    )


def _finish(
    run: Run, out: Path, patch: Patch, care_set: CareSet | None, file_formats: Sequence[str], preview: Preview | None
) -> dict[str, Any]:
    """Write the patch and what belongs to it; the weights come last: a folder that has them is a whole patch."""
    stages = run.ledger.stages
    # Written apart and moved at the end, since its hash goes into a file that comes before it.
    weights = patch.save(run.work)
    cost: dict[str, Any] = {
        "patch_sha256": file_sha256(weights),
        "seconds": round(sum(s["seconds"] for s in stages.values()), 2),
        "denoiser_evaluations": int(sum(s["evaluations"] for s in stages.values())),
        "unit": "one sample through the denoiser; a training sample counts as 3",
        "peak_memory_bytes": run.ledger.peak,
        "precision": run.recipe.precision,
        "memory": run.recipe.memory.model_dump(exclude_defaults=True),
        "device": device_name(run.base.device),
        "stages": stages,
        "losses": run.losses,
        **({"measured": run.governor.told()} if run.governor is not None else {}),
        **({"seen": [asdict(one) for one in preview.seen]} if preview is not None else {}),
        **run.notes,
        "warnings": run.warnings,
    }
    write_text(out / "recipe.yaml", run.recipe.to_yaml())
    if care_set is not None:
        care_set.save(out / "care_set.json")
    write_json(out / "training.json", cost)
    if preview is not None:
        save_sheet(preview.sheet, out / "preview.png")
    previews = ["preview.png"] if preview is not None else []
    write_text(out / "README.md", card_text(patch.metadata, cost, previews=previews))
    if "kohya" in file_formats and has_kohya_names(patch):
        try:
            write_kohya(patch, out)
        except PatchError as fault:
            # A denoiser of an unusual shape has no original names; the patch itself is whole.
            run.warn(f"no file for other tools is written: {fault}")
    weights.replace(out / weights.name)
    return cost
