"""One erasing run from a recipe to a patch: target images, CARE-set, search, erase, patch.

Every stage leaves what it made in a hidden folder beside the result, so a run that was stopped at
any moment goes on from there; the patch itself appears only when it is whole.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from recare_patch.careset import CareSet, Clip, default_clip, guess_kind
from recare_patch.core import (
    Crew,
    IncompatiblePatchError,
    NullProgress,
    OutputError,
    PatchError,
    Progress,
    ResumeError,
    claim_folder,
    device_name,
    file_sha256,
    process_device,
    sheets,
    versions,
    write_json,
    write_tensors,
    write_text,
)
from recare_patch.erasure.inversion import invert
from recare_patch.erasure.loop import Carried, fit, step_generator
from recare_patch.erasure.methods import load_method
from recare_patch.erasure.planning import choose
from recare_patch.erasure.prepare import check_files, draw_target, find_companions, neighbour_prompts, prepare
from recare_patch.erasure.stages import Run, Target, first_seed
from recare_patch.erasure.states import TargetImageStates, noised
from recare_patch.models import PLACEHOLDER, BaseModel, PromptEmbeds, full_name, load_base
from recare_patch.models import lora as adapters
from recare_patch.patch import (
    FORMATS,
    Erased,
    Patch,
    PatchMetadata,
    card_text,
    check_formats,
    check_together,
    has_kohya_names,
    write_kohya,
)
from recare_patch.patch import gate as gating
from recare_patch.recipe import Concept, Recipe, find_recipe_for, load_recipe, preset_overrides, scheduled

if TYPE_CHECKING:
    from recare_patch.erasure.methods import Method
    from recare_patch.erasure.methods.protocol import LossAt

logger = logging.getLogger(__name__)

ADAPTER = "recare"
RUN_FOLDER = ".run"
PACKAGES = ("torch", "diffusers", "peft", "transformers", "safetensors", "bitsandbytes")
"""Whose versions a patch names."""
NAME_RECOVERY = 0.5
"""What share of the concept an adversarial name must explain to count as one; see :func:`_recovery`."""


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


@dataclass
class GeneratedPair:
    """The same prompt and seed before and after a patch.

    Attributes:
        prompt: what was asked for.
        seed: of the starting noise.
        before: the base model's picture.
        after: the patched model's picture; the base's own where no patch was given.
    """

    prompt: str
    seed: int
    before: Image.Image
    after: Image.Image


def target_seeds(recipe: Recipe) -> list[int]:
    """The seeds of a recipe's target images, one each: `careset build` mines what `erase` would."""
    first = first_seed(recipe, 1)
    return [first + k for k in range(recipe.target_images.count)]


def _attach(run: Run, seed: int) -> list[torch.nn.Parameter]:
    """Put the recipe's adapter into the base; its first values follow from ``seed``."""
    options, generator = run.recipe.adapter, torch.Generator().manual_seed(seed)
    parameters: list[torch.nn.Parameter] = []
    for part, network in adapters.adapted(run.base, options.layers).items():
        parameters += adapters.attach(
            network,
            layers=options.layers,
            rank=options.rank,
            alpha=options.alpha,
            generator=generator,
            name=ADAPTER,
        )
        if part in run.ground:
            adapters.load_adapter_state(network, run.ground[part], ADAPTER)
            adapters.switch_to(network, ADAPTER)
    return parameters


def _detach(run: Run) -> None:
    for part, network in run.base.components.items():
        adapters.detach(network, ADAPTER)
        if part in run.ground:
            adapters.switch_to(network, adapters.TEACHER_NAME)


def _earlier(recipe: Recipe, base: BaseModel) -> Patch | None:
    """The patch that a recipe goes on from.

    Raises:
        IncompatiblePatchError: it has other layers or another rank than the recipe's adapter.
    """
    if recipe.continue_from is None:
        return None
    options, earlier = recipe.adapter, Patch.load(recipe.continue_from)
    earlier.check_base(base)
    networks = adapters.adapted(base, options.layers)
    wanted = [
        full_name(part, name)
        for part, network in networks.items()
        for name in adapters.target_modules(network, options.layers)
    ]
    if sorted(earlier.modules) != sorted(wanted) or set(earlier.ranks.values()) != {options.rank}:
        ranks = " and ".join(map(str, sorted(set(earlier.ranks.values()))))
        raise IncompatiblePatchError(
            f"patch {earlier.name} cannot be gone on with: it changes {len(earlier.modules)} layers at rank "
            f"{ranks}, and this run would train {len(wanted)} at rank {options.rank}"
        )
    return earlier


@contextlib.contextmanager
def _continued(run: Run) -> Iterator[Patch | None]:
    """Inside, the model that an earlier patch left is the teacher; a new adapter starts as the patch's."""
    recipe, options, earlier = run.recipe, run.recipe.adapter, _earlier(run.recipe, run.base)
    if earlier is None:
        yield None
        return
    networks = adapters.adapted(run.base, options.layers)
    try:
        for part, network in networks.items():
            adapters.attach(
                network,
                layers=options.layers,
                rank=options.rank,
                alpha=options.alpha,
                generator=torch.Generator().manual_seed(recipe.seed),
                name=adapters.TEACHER_NAME,
            )
            state = adapters.adapter_state(network, adapters.TEACHER_NAME)
            for key in state:
                module, _, side = key.rpartition(".lora_")
                a, b = earlier.factors(full_name(part, module))
                state[key] = a.float() if side == "A.weight" else b.float() * (options.rank / options.alpha)
            adapters.load_adapter_state(network, state, adapters.TEACHER_NAME)
            network.requires_grad_(False)
            run.ground[part] = state
        yield earlier
    finally:
        run.ground = {}
        for network in networks.values():
            adapters.detach(network, adapters.TEACHER_NAME)


class _Stages:
    """See :class:`Stages`."""

    def __init__(self, run: Run, parameters: Sequence[torch.nn.Parameter]) -> None:
        self.run, self.parameters = run, parameters

    def fit(
        self,
        stage: str,
        loss_at: LossAt,
        steps: int,
        *,
        every: int = 20,
        carried: Carried | None = None,
    ) -> None:
        run, options = self.run, self.run.recipe.erase
        with run.ledger.stage(stage):
            fitted = fit(
                self.parameters,
                loss_at,
                stage=stage,
                steps=steps,
                learning_rate=options.learning_rate,
                seed=run.recipe.seed,
                optimizer=options.optimizer,
                schedule=options.schedule,
                checkpoint=run.checkpoint(stage),
                save_every=every,
                extra=run.ledger.so_far,
                restore_extra=run.ledger.restore,
                progress=run.progress,
                crew=run.base.crew,
                carried=carried,
            )
        run.losses[stage] = fitted.losses

    def once(self, stage: str, make: Callable[[torch.Generator], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        run = self.run
        file = run.work / f"{stage.replace(' ', '-')}.safetensors"
        here = file.exists()
        run.wait()
        with run.ledger.stage(stage):
            made = load_file(file) if here else make(step_generator(run.recipe.seed, stage, 0))
            if run.main and not here:
                write_tensors(file, {key: one.detach().cpu() for key, one in made.items()}, {})
        run.progress.update(stage, 1, 1)
        return {key: one.detach().to(run.base.device) for key, one in made.items()}

    def invert(self, stage: str, latents: Tensor, prompt: str, start: Tensor, steps: int) -> Tensor:
        run, options = self.run, self.run.recipe.search
        with run.ledger.stage(stage):
            vectors, fitted = invert(
                run.base,
                latents,
                [prompt],
                start,
                steps=steps,
                batch_size=options.batch_size,
                learning_rate=options.learning_rate,
                seed=run.recipe.seed,
                stage=stage,
                patience=options.patience,
                noise_up_to=options.noise_up_to,
                checkpoint=run.checkpoint(stage),
                extra=run.ledger.so_far,
                restore_extra=run.ledger.restore,
                progress=run.progress,
            )
        run.losses[stage] = fitted.losses
        return vectors

    def set_adapter(self, factors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        options = self.run.recipe.adapter
        for part, network in adapters.adapted(self.run.base, options.layers).items():
            state = adapters.adapter_state(network, ADAPTER)
            for key in state:
                module, _, side = key.rpartition(".lora_")
                a, b = factors[full_name(part, module)]
                # The adapter multiplies by alpha / rank.
                state[key] = a if side == "A.weight" else b * (options.rank / options.alpha)
            adapters.load_adapter_state(network, state, ADAPTER)

    def note(self, key: str, value: float) -> None:
        self.run.notes[key] = value


def _search(run: Run, target: Target) -> list[PromptEmbeds]:
    """Stage 1 of ReCARE: erase the current name, invert the erased model for the next one, repeat."""
    recipe, base, options = run.recipe, run.base, run.recipe.search
    found: list[PromptEmbeds] = []
    if not options.rounds or target.attribute is not None:
        return found
    assert target.latents is not None
    latents, empty = target.latents, base.encode_prompts([""])
    concept = base.encode_prompts([target.concept.target_prompt])
    template = target.concept.target_prompt_for(PLACEHOLDER)
    stages = _Stages(run, _attach(run, recipe.seed + 1))
    current = concept
    start = base.word_vector(options.init_word or target.concept.class_word).repeat(options.vectors, 1)
    try:
        source = TargetImageStates(base, latents, current, empty)
        for number in range(1, options.rounds + 1):

            def loss_at(step: int, generator: torch.Generator, name: PromptEmbeds = current) -> Tensor:
                rows = recipe.erase.batch_size
                which = torch.randint(0, 1, (rows,), generator=generator)
                states, timesteps = source.draw(step, which, generator)
                with torch.no_grad(), adapters.off(*base.components.values()):
                    wanted = base.denoise(states, timesteps, empty.repeat(rows)).float()
                return F.mse_loss(base.denoise(states, timesteps, name.repeat(rows)).float(), wanted)

            stages.fit(target.stage(f"search {number} erase"), loss_at, options.erase_steps)
            stage = target.stage(f"search {number} inversion")
            vectors = stages.invert(stage, latents, template, start, options.inversion_steps)
            name = base.encode_with_vectors([template], vectors).detach()
            off = adapters.off(*base.components.values())
            with run.ledger.stage(target.stage(f"search {number} check")), off:
                recovered = _recovery(run, latents, name, concept, empty)
            logger.info("adversarial name %d explains %.0f %% of the concept", number, 100 * recovered)
            if recovered >= NAME_RECOVERY:
                # Otherwise it is no name of the concept in the base: erasing it would cost something else,
                # and the next round goes on with the name before.
                current = name
                found.append(name)
                start = vectors if options.warm_start else start
    finally:
        _detach(run)
    return found


@torch.no_grad()
def _recovery(
    run: Run, latents: Tensor, name: PromptEmbeds, concept: PromptEmbeds, empty: PromptEmbeds
) -> float:
    """How much of the concept a name explains: ``(L(∅) − L(name)) / (L(∅) − L(concept))``.

    ``L`` is the base's noise-prediction error on the target images, at the same noise for all three.
    """
    base, rows = run.base, min(len(latents), 32)
    generator = torch.Generator().manual_seed(run.recipe.seed)
    states, timesteps, noise = noised(base, latents[:rows], generator)
    target = base.training_target(latents[:rows], noise, timesteps)
    errors = [
        F.mse_loss(base.denoise(states, timesteps, one.repeat(rows)).float(), target.float()).item()
        for one in (empty, name, concept)
    ]
    nothing, named, itself = errors
    # A base that does not draw the concept gives no scale to measure by.
    return (nothing - named) / (nothing - itself) if nothing > itself else 0.0


def _preview(run: Run, patch: Patch) -> Image.Image:
    base = run.base
    prompts = []
    for target in run.targets:
        concept = target.concept
        asked = concept.target_prompt if target.attribute is None else target.joined_prompt
        prompts.append(("replaced" if run.recipe.replace_with else "erased", asked))
        words = target.care_set.words if target.care_set else ()
        prompts += [("kept", concept.retain_prompt(word)) for word in words[:3]]
        prompts += [("neighbour", prompt) for prompt in neighbour_prompts(run, target)]
    seeds = [first_seed(run.recipe, 7) + k for k in range(3)]
    flat = [(prompt, seed) for _, prompt in prompts for seed in seeds]
    texts, numbers = [p for p, _ in flat], [s for _, s in flat]
    options = run.recipe.target_images

    def draw() -> list[Image.Image]:
        scale = options.guidance_scale
        with scheduled(base.pipeline, options.scheduler):
            return base.generate(
                texts, numbers, steps=options.steps, guidance_scale=scale, batch_size=options.batch_size
            )

    run.progress.update("preview", 0, 2)
    before = draw()
    run.progress.update("preview", 1, 2)
    with patch.apply(base.pipeline):
        after = draw()
    run.progress.update("preview", 2, 2)
    rows = [
        sheets.SheetRow(f"{role}: {prompt}", [*before[3 * i : 3 * i + 3], *after[3 * i : 3 * i + 3]])
        for i, (role, prompt) in enumerate(prompts)
    ]
    return sheets.sheet(
        rows,
        ["before"] * 3 + ["after"] * 3,
        f"{run.recipe.title} · {run.recipe.method}",
        blur=run.unsafe,
    )


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
        file_formats: names of :data:`FORMATS`; "diffusers", the patch itself, must be
            among them, "kohya" adds a file for A1111 and ComfyUI.
        preview: draw the sheet of pictures before and after, which is no part of what a run counts.
        base, clip: already loaded models to use instead of the recipe's.

    Raises:
        RecarePatchError: one sentence on what was wrong; nothing half-made is left as a patch.
    """
    out = Path(out)
    progress = progress or NullProgress()
    chosen = check_formats(file_formats)
    method = load_method(recipe.method)
    check_files(recipe, method.needs, care_set)
    crew = Crew.found()
    base = base or load_base(
        recipe.base, precision=recipe.precision, device=process_device(device), memory=recipe.memory
    )
    # A target that matches no module must fail before anything is drawn.
    for network in adapters.adapted(base, recipe.adapter.layers).values():
        adapters.target_modules(network, recipe.adapter.layers)
    _earlier(recipe, base)
    clip = clip or Clip.load(recipe.clip or default_clip(recipe.base))
    if crew is not None and not crew.main:
        return _help(recipe, out, base, clip, crew, method, care_set)
    with claim_folder(out, resume=resume):
        work = out / RUN_FOLDER
        stored = work / "recipe.yaml"
        if (out / "pytorch_lora_weights.safetensors").exists() and not work.exists():
            raise OutputError(f"{out} already holds a finished patch; choose another --out")
        if stored.exists() and stored.read_text() != recipe.to_yaml():
            raise ResumeError(
                f"{out} holds a run of another recipe: resume with its own options, or choose another --out"
            )
        work.mkdir(parents=True, exist_ok=True)
        write_text(stored, recipe.to_yaml())
        with _together(base, crew):
            run = Run(recipe, work, base, clip, progress, save_target_images)
            run.wait()
            patch, found = _erase(run, method, care_set)
        sheet = _preview(run, patch) if preview else None
        cost = _finish(run, out, patch, found, chosen, sheet)
        if crew is not None:
            crew.wait()
        # One rename ends the run: a kill while the files go leaves a finished patch, not half a run.
        shutil.rmtree(work.rename(out / f"{RUN_FOLDER}.done"))
    return EraseResult(patch, out, found, cost, tuple(run.warnings))


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


def _help(
    recipe: Recipe,
    out: Path,
    base: BaseModel,
    clip: Clip,
    crew: Crew,
    method: type[Method],
    care_set: CareSet | None,
) -> EraseResult:
    """What every process but the first does: its share of the predictions, and nothing of the files."""
    with _together(base, crew):
        run = Run(recipe, out / RUN_FOLDER, base, clip, NullProgress(), False)
        run.wait()
        patch, found = _erase(run, method, care_set)
    crew.wait()
    cost = json.loads((out / "training.json").read_text(encoding="utf-8"))
    return EraseResult(patch, out, found, cost)


def _erase(run: Run, method: type[Method], given: CareSet | None) -> tuple[Patch, CareSet | None]:
    with _continued(run) as earlier:
        patch, care_set = _train(run, method, given)
    if patch.metadata is not None and (earlier is not None or run.recipe.also):
        words = [target.care_set.words if target.care_set else () for target in run.targets]
        told = patch.metadata.with_concepts(Erased.by(run.recipe, words), earlier)
        patch = Patch(patch.tensors, told, patch.source)
    return patch, care_set


def _train(run: Run, method: type[Method], given: CareSet | None) -> tuple[Patch, CareSet | None]:
    recipe, base, needs = run.recipe, run.base, method.needs
    contexts = []
    for target in run.targets:
        images = draw_target(run, target) if needs.target_images else []
        if needs.care_set:
            find_companions(run, target, images, given)
        names = _search(run, target) if needs.search else []
        contexts.append(prepare(run, target, needs, names))
    parameters = _attach(run, recipe.seed)
    try:
        method.erase([method(context) for context in contexts], _Stages(run, parameters))
        care_set = _all_companions(run)
        metadata = PatchMetadata.describe(recipe, base, care_set, versions(PACKAGES))
        patch = Patch.from_adapter(base, ADAPTER, recipe.adapter.rank, recipe.adapter.alpha, metadata)
    finally:
        _detach(run)
    return patch, care_set


def _all_companions(run: Run) -> CareSet | None:
    """The CARE-sets of all concepts in one, that of the first concept for a start."""
    found = [target.care_set for target in run.targets if target.care_set is not None]
    if not found:
        return None
    tokens = {token.text.casefold(): token for one in reversed(found) for token in one.tokens}
    for token in (token for one in found for token in one.tokens if token.kept):
        tokens[token.text.casefold()] = token
    order = dict.fromkeys(token.text.casefold() for one in found for token in one.tokens)
    return found[0].model_copy(update={"tokens": tuple(tokens[name] for name in order)})


def _finish(
    run: Run,
    out: Path,
    patch: Patch,
    care_set: CareSet | None,
    file_formats: Sequence[str],
    preview: Image.Image | None,
) -> dict[str, Any]:
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
        **run.notes,
        "warnings": run.warnings,
    }
    # The weights come last: a folder that has them is a whole patch.
    write_text(out / "recipe.yaml", run.recipe.to_yaml())
    if care_set is not None:
        care_set.save(out / "care_set.json")
    write_json(out / "training.json", cost)
    if preview is not None:
        sheets.save_sheet(preview, out / "preview.png")
    previews = ["preview.png"] if preview is not None else []
    write_text(out / "README.md", card_text(patch.metadata, cost, previews=previews))
    if "kohya" in file_formats and has_kohya_names(patch):
        write_kohya(patch, out)
    weights.replace(out / weights.name)
    return cost


def erase_concept(
    concept: str,
    *,
    also: Sequence[str] = (),
    subject: str | None = None,
    kind: str | None = None,
    recipe: str | None = None,
    preset: str | None = None,
    base: str | None = None,
    clip: str | None = None,
    out: Path | str | None = None,
    resume: bool = False,
    overrides: Mapping[str, Any] | None = None,
    vram: float | None = None,
    progress: Progress | None = None,
    device: str = "auto",
    care_set: CareSet | None = None,
    save_target_images: bool = False,
    file_formats: Sequence[str] = FORMATS,
) -> EraseResult:
    """Erase a concept by its name: the recipe is looked up, or made from defaults.

    Args:
        concept: what to erase, in any case; may be empty where ``recipe`` names one.
        also: more concepts that the same patch erases.
        subject: take the concept out of this alone, as an attribute of it: "stars" from "Van Gogh".
        kind: ``style``, ``object``, ``identity`` or ``nsfw``, of all concepts, and of the subject where
            there is one; else from a recipe of that concept, else guessed from what the base draws.
        recipe: name of a bundled recipe, a YAML file or a patch to take the recipe from.
        preset: a name of :data:`PRESETS`; ``overrides`` go before it.
        base, clip: where to find the models; else the recipe's, else the bundled ones.
        out: folder for the patch; ``<concept>-patch`` by default.
        overrides: dotted recipe keys and their values, for example ``{"erase.steps": 50}``.
        vram: GB of a card for which memory levers are chosen; see :func:`choose`.
        resume, progress, device, care_set, save_target_images, file_formats: see :func:`erase`.
    """
    made = resolve_recipe(
        concept,
        also=also,
        subject=subject,
        kind=kind,
        recipe=recipe,
        base=base,
        clip=clip,
        overrides={**preset_overrides(preset), **(overrides or {})},
        device=device,
    )
    if vram is not None:
        made, _ = choose(made, vram)
        logger.info("for %g GB: %s", vram, made.memory.in_words())
    folder = Path(out) if out is not None else Path(f"{made.slug}-patch")
    return erase(
        made,
        folder,
        resume=resume,
        progress=progress,
        device=device,
        care_set=care_set,
        save_target_images=save_target_images,
        file_formats=file_formats,
    )


def resolve_recipe(
    concept: str,
    *,
    also: Sequence[str] = (),
    subject: str | None = None,
    kind: str | None = None,
    recipe: str | None = None,
    base: str | None = None,
    clip: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    device: str = "auto",
) -> Recipe:
    """The recipe that a call of :func:`erase_concept` would run."""
    changes: dict[str, Any] = {}
    earlier = _earlier_adapter((overrides or {}).get("continue_from"))
    source = base or earlier.get("base") or "atelier"
    if recipe:
        made = load_recipe(recipe)
    elif subject is not None:
        # An attribute needs no kind of its own: it is a word beside the subject's name.
        made = Recipe(concept=Concept(text=concept, kind="object"), base=source, clip=clip)
    elif (found := find_recipe_for(concept, source)) is not None:
        logger.info("kind of '%s' taken from its recipe: %s", concept, found.concept.kind)
        made = found
    else:
        made = Recipe(concept=_concept(concept, kind, source, clip, device), base=source, clip=clip)
    if concept and concept.strip().lower() != made.concept.text.lower():
        changes["concept.text"] = concept
    if kind is not None and subject is None:
        changes["concept.kind"] = kind
    for key, value in (("base", base), ("clip", clip)):
        if value is not None:
            changes[key] = value
    if also:
        changes["also"] = [_concept(one, kind, source, clip, device).model_dump() for one in also]
    if subject is not None:
        changes["subject"] = _concept(subject, kind, source, clip, device).model_dump()
    changes = {**earlier, **changes, **(overrides or {})}
    return made.with_overrides(changes) if changes else made


def _earlier_adapter(patch: str | None) -> dict[str, Any]:
    """What a run must share with the patch that it goes on from."""
    if patch is None:
        return {}
    if not Path(patch).exists():
        raise PatchError(f"there is no patch at {patch}")
    # A name of a recipe would go before a folder of that name; a whole path is none.
    found = load_recipe(str(Path(patch).absolute()))
    keys = ("layers", "rank", "alpha")
    shared = {f"adapter.{key}": getattr(found.adapter, key) for key in keys}
    return {"base": found.base, "method": found.method, **shared}


def _concept(text: str, kind: str | None, source: str, clip: str | None, device: str) -> Concept:
    """A concept by its name; a kind that is not given is that of its recipe, or guessed."""
    if kind is None and (found := find_recipe_for(text, source)) is not None:
        kind = found.concept.kind
        logger.info("kind of '%s' taken from its recipe: %s", text, kind)
    elif kind is None:
        kind = _guess_kind(text, source, clip, device)
        logger.info("kind of '%s' guessed from what the base draws: %s (--kind to choose)", text, kind)
    return Concept(text=text, kind=kind)


def _guess_kind(concept: str, source: str, clip: str | None, device: str) -> str:
    base = load_base(source, device=device)

    def generate(prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        return base.generate(prompts, seeds, steps=10, guidance_scale=5.0)

    return guess_kind(concept, generate, Clip.load(clip or default_clip(source)))


def generate_pictures(
    base: str,
    patches: Sequence[tuple[Path, float]],
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int = 20,
    guidance_scale: float = 5.0,
    gated: bool = False,
    device: str = "auto",
    progress: Progress | None = None,
) -> list[GeneratedPair]:
    """Every prompt at every seed, before and after the patches.

    Args:
        base: folder or id of the base model, or ``atelier``.
        patches: patch folders with their scales.
        prompts, seeds: each prompt is drawn at each seed.
        steps, guidance_scale: of the sampler.
        gated: let each patch's scale follow the prompt; see :mod:`gate`.
    """
    loaded = [(Patch.load(path), scale) for path, scale in patches]
    if loaded:
        check_together(loaded)
    model = load_base(base, device=device)
    texts = [prompt for prompt in prompts for _ in seeds]
    numbers = [seed for _ in prompts for seed in seeds]
    before = model.generate(texts, numbers, steps=steps, guidance_scale=guidance_scale, progress=progress)
    after = before
    if loaded:
        put_in = gating.gated if gated else Patch.apply
        with contextlib.ExitStack() as stack:
            for patch, scale in loaded:
                stack.enter_context(put_in(patch, model.pipeline, scale))
            after = model.generate(
                texts, numbers, steps=steps, guidance_scale=guidance_scale, progress=progress
            )
    return [GeneratedPair(*row) for row in zip(texts, numbers, before, after, strict=True)]
