"""One attack on a patch from end to end: target pictures, attack, judgement, files.

The patch says what it erases and from which base model. The untouched base draws pictures of that
concept, from seeds that no erasing run has seen; those that a detector finds to show it are what the
attack works with. Then the patch goes in, and stays in until the attack is over.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image

from recare_patch.careset import default_clip
from recare_patch.core import (
    NullProgress,
    Progress,
    ResumeError,
    SheetRow,
    claim_folder,
    keep_json,
    keep_tensors,
    kept_json,
    kept_tensors,
    save_sheet,
    sheet,
)
from recare_patch.measure.attacks import attack_options, load_attack_type
from recare_patch.measure.attacks.protocol import (
    Attack,
    AttackError,
    AttackOptions,
    AttackResult,
    AttackTarget,
    candidate_seeds,
)
from recare_patch.measure.attacks.saved import JSON_NAME, load_about, load_attack, save_attack
from recare_patch.measure.erasers import Eraser
from recare_patch.measure.judges import Detector, can_tell, check_label, suite_detector
from recare_patch.measure.names import ATTACKS
from recare_patch.measure.suites import Subject, find_suite_for, subject_of
from recare_patch.measure.unwritten import default_suite
from recare_patch.models import BaseModel, Load, load_to_draw, scheduled
from recare_patch.patch import Patch, concepts_of
from recare_patch.recipe import MemoryOptions, Recipe, same_concept

logger = logging.getLogger(__name__)

RUN_FOLDER = ".run"
SHEET_NAME = "attack.png"

_TRIES = 4
"""Candidates drawn for each target picture wanted, before giving up on a base that draws too few."""


def attack_patch(
    patch: Eraser | Path | str,
    attack: str | None = None,
    *,
    concept: str | None = None,
    subject: Subject | None = None,
    base: BaseModel | str | None = None,
    options: AttackOptions | None = None,
    budget: str = "small",
    detector: Detector | str | None = None,
    label: str | None = None,
    replay: Path | str | None = None,
    seed: int = 0,
    steps: int | None = None,
    scheduler: str | None = None,
    guidance_scale: float | None = None,
    out: Path | str | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    device: str = "auto",
    precision: str | None = None,
    memory: MemoryOptions | None = None,
    vram: float | None = None,
) -> AttackResult:
    """Attack a patch, or try on it what was found on another one.

    Args:
        attack: a name of :data:`ATTACKS`; with ``replay`` it may be left out.
        concept: which of several that the patch erases; a replay knows its own.
        subject: what was erased, of an eraser that does not say it itself.
        base: the model, or where to find it; else the recipe's.
        options: of the attack; else those of the ``budget``.
        detector: who says whether a picture shows the concept: a detector, a name, or "name:source" such
            as "image-classifier:FOLDER"; else that of the concept's suite.
        label: what the detector calls the concept; else as the suite says.
        replay: folder of a saved attack; nothing is learnt.
        seed: every random draw follows from it.
        steps, scheduler, guidance_scale: of all pictures; else as the recipe's target images have them.
        out: folder for the result; ``None`` keeps nothing.
        resume: go on with a run in ``out`` that was stopped; a finished one is read, without its pictures.
        device, precision, memory, vram: of a base that is not loaded yet; see :func:`load_to_draw`.

    Raises:
        RecarePatchError: one sentence on what was wrong.

    Example:
        >>> attack_patch("van-gogh-patch", "concept-inversion").rate  # doctest: +SKIP
        0.06
    """
    # Long, as every argument is resolved and checked here, once: what follows takes the job as it is.
    saved = load_attack(replay) if replay is not None else None
    kind = _kind(attack, saved, replay)
    if saved or options is None:
        options = kind.options_type(**saved.budget) if saved else attack_options(kind.name, budget)
    if not isinstance(options, kind.options_type):
        raise AttackError(f"{type(options).__name__} are not the options of the attack {kind.name}")
    loaded = Patch.load(patch) if isinstance(patch, Path | str) else patch
    after = replayed_concept(replay) if replay is not None else None
    if subject is None:
        subject = subject_of(loaded, after if concept is None and len(concepts_of(loaded)) > 1 else concept)
    recipe, drawn = subject.recipe, subject.recipe.target_images
    if after is not None and not same_concept(after, recipe.concept):
        raise AttackError(
            f"the saved attack in {replay} is after '{after}', and the patch erases '{recipe.concept.text}'"
        )
    judge, known = _detector(recipe, subject.care_words, detector, label)
    how: dict[str, Any] = {"device": device, "precision": precision, "memory": memory, "vram": vram}
    model = _base(recipe, base, options.batch_size, **how)
    loaded.check_base(model)
    target = AttackTarget(
        base=model,
        concept=recipe.concept,
        shows=lambda images: [bool(hit) for hit in judge.rate(images, known)],
        images=[],
        latents=torch.empty((0, *model.latent_shape)),
        original=contextlib.nullcontext,  # until the patch is in
        prompts=(),
        seeds=(),
        steps=drawn.steps if steps is None else steps,
        guidance_scale=drawn.guidance_scale if guidance_scale is None else guidance_scale,
        words=subject.care_words,
    )
    # What a saved attack says of itself, and what must agree for a run to be resumed.
    about = {
        "attack": kind.name,
        "patch_sha256": loaded.sha256(),
        "base": model.id,
        "base_denoiser_sha256": model.denoiser_hash(),
        "precision": model.precision,
        "concept": recipe.concept.text,
        "kind": recipe.concept.kind,
        "method": subject.method,
        "detector": judge.name,
        "label": known,
        "preset": "replay" if saved else budget,
        "seed": seed,
        "steps": target.steps,
        "scheduler": scheduler or drawn.scheduler,
        "guidance_scale": target.guidance_scale,
        **({} if replay is None else {"replay": load_about(replay)}),
    }
    job = _Job(loaded, kind, options, target, saved, about, progress or NullProgress())
    return job.result(None)[0] if out is None else job.kept(Path(out), resume)


def _kind(name: str | None, saved: AttackResult | None, replay: Path | str | None) -> Attack[Any]:
    if saved is not None:
        if name not in (None, saved.attack):
            raise AttackError(f"{replay} holds a saved {saved.attack}, not a {name}")
        if saved.attack not in ATTACKS:
            raise AttackError(f"{replay} holds an attack '{saved.attack}' that this version does not know")
        name = saved.attack
    if name is None:
        raise AttackError(f"no attack was named: there are {', '.join(ATTACKS.names())}")
    return load_attack_type(name)


def replayed_concept(replay: Path | str) -> str | None:
    """What a saved attack was after, where it says so."""
    found = load_about(replay).get("concept")
    return found if isinstance(found, str) else None


def _base(recipe: Recipe, base: BaseModel | str | None, batch: int, **how: Any) -> BaseModel:
    """The base, loaded so that an attack on so many prompts at once fits the card that is named."""
    if isinstance(base, str | None):
        load = Load(pictures=batch, trained=batch, predicted=batch, reads=batch)
        base = load_to_draw(base or recipe.base, recorded=recipe.precision, load=load, **how)
    return base


def _detector(
    recipe: Recipe, words: Sequence[str], detector: Detector | str | None, label: str | None
) -> tuple[Detector, str]:
    """Who judges, and what it calls the concept; the concept's suite knows what was not given."""
    suite = find_suite_for(recipe.concept, recipe.base) or default_suite(recipe, words)
    if isinstance(detector, str):
        suite = suite.with_detector(detector)
    judge = detector
    if judge is None or isinstance(judge, str):
        # With the CLIP that `evaluate` reads its figures with, so that both judge alike.
        judge = suite_detector(suite, lambda: recipe.clip or default_clip(recipe.base))
    if label is None:
        label = suite.label if can_tell(judge, suite.label) else recipe.concept.text
    check_label(judge, label)
    return judge, label


@dataclass(frozen=True)
class _Job:
    """An attack with all that it needs but the target's pictures."""

    patch: Eraser
    kind: Attack[Any]
    options: AttackOptions
    target: AttackTarget
    saved: AttackResult | None
    about: dict[str, Any]
    progress: Progress

    def result(self, work: Path | None) -> tuple[AttackResult, list[Image]]:
        """The result, and pictures by the untouched base to look at beside its own."""
        pipeline, target, rate = self.target.base.pipeline, self.target, None
        how: dict[str, Any] = {"seed": self.about["seed"], "progress": self.progress, "saved": self.saved}
        with scheduled(pipeline, self.about["scheduler"]):
            if self.saved is None:
                target, rate = self.with_pictures(work)
            with self.patch.apply(pipeline) as applied:
                target = replace(target, original=applied.off)
                # What is only drawn again is done soon: nothing is kept for a resume.
                work = work if self.saved is None else None
                result = self.kind.run(target, self.options, work=work, **how)
        return replace(result, base=rate), target.images

    def with_pictures(self, work: Path | None) -> tuple[AttackTarget, float]:
        """The target with pictures that show the concept, and their share of those that the base drew."""
        target, base, concept = self.target, self.target.base, self.target.concept.text
        wanted = self.kind.images_wanted(self.options)
        candidates = self.kind.candidates(target.concept, target.words)
        most = max(_TRIES * wanted, 2 * len(candidates))
        prompts = [candidates[k % len(candidates)] for k in range(most)]
        seeds = candidate_seeds(self.about["seed"], most)
        # Latents decode to pictures: those of unsafe concepts stay in memory.
        keep = work if target.concept.kind != "nsfw" else None
        kept = kept_tensors(keep / "targets.safetensors") if keep else None
        if kept is not None:
            latents, note = kept[0]["latents"].to(base.device), json.loads(kept[1]["drawn"])
            chosen, drawn = note["rows"], note["drawn"]
        else:
            found, chosen, drawn = [], [], 0
            while drawn < most and len(chosen) < wanted:
                some = slice(drawn, min(drawn + self.options.batch_size, most))
                how = {"guidance_scale": target.guidance_scale, "batch_size": some.stop - drawn}
                embeds = base.encode_prompts(prompts[some])
                batch = base.sample_latents(embeds, seeds[some], steps=target.steps, **how)
                hits = target.shows(base.decode_latents(batch))
                chosen += [drawn + k for k, hit in enumerate(hits) if hit]
                found.append(batch[torch.tensor(hits)])
                drawn, enough = some.stop, min(len(chosen), wanted)
                self.progress.update("target images", enough, wanted, f"of {drawn} drawn")
            latents = torch.cat(found)
            if keep:
                note = json.dumps({"rows": chosen, "drawn": drawn})
                keep_tensors(keep / "targets.safetensors", {"latents": latents.cpu()}, {"drawn": note})
        if not chosen:
            raise AttackError(
                f"there is nothing to attack: none of {drawn} pictures of '{concept}' by the untouched base "
                f"shows '{self.about['label']}' to the detector {self.about['detector']}"
            )
        if len(chosen) < wanted:
            logger.warning(
                f"the untouched base shows '{concept}' in {len(chosen)} of {drawn} pictures: the attack goes "
                f"on with those, and {wanted} were asked for"
            )
        rate, rows, latents = round(len(chosen) / drawn, 6), chosen[:wanted], latents[:wanted]
        images, texts = base.decode_latents(latents), tuple(prompts[k] for k in rows)
        own = tuple(seeds[k] for k in rows)
        return replace(target, images=images, latents=latents, prompts=texts, seeds=own), rate

    def kept(self, out: Path, resume: bool) -> AttackResult:
        """The result in a folder: read where the run is finished, gone on with where it was stopped."""
        with claim_folder(out, resume=resume):
            work = out / RUN_FOLDER
            shutil.rmtree(out / f"{RUN_FOLDER}.done", ignore_errors=True)
            # Both sides through JSON, which knows no tuples.
            run = json.loads(json.dumps({"about": self.about, "options": self.options.model_dump()}))
            if (out / JSON_NAME).exists() and not work.exists():
                done = load_attack(out)
                _check_same(out, run, {"about": load_about(out), "options": done.budget})
                return done
            if (before := kept_json(work / "run.json")) is not None:
                _check_same(out, run, before)
            work.mkdir(parents=True, exist_ok=True)
            keep_json(work / "run.json", run)
            result, before = self.result(work)
            # The first pictures under attack, below those by the untouched base.
            rows = [SheetRow("untouched base", before[: max(len(result.pictures), 1)])] if before else []
            rows.append(SheetRow("under attack", result.pictures))
            concept = self.target.concept
            title = f"{concept.text} · {result.attack}: {result.successes} of {result.trials}"
            save_sheet(sheet(rows, title=title, blur=concept.kind == "nsfw"), out / SHEET_NAME)
            save_attack(result, out, self.about)
            # One rename ends the run: a kill while the files go leaves a finished attack, not half a run.
            shutil.rmtree(work.rename(out / f"{RUN_FOLDER}.done"))
        return result


def _check_same(out: Path, run: dict[str, Any], stored: dict[str, Any]) -> None:
    # Earlier versions did not say the precision.
    unsaid = {"about": {"precision": run["about"].get("precision")}, "options": {}}
    parts = [(run[part], unsaid[part] | dict(stored.get(part, {}))) for part in ("about", "options")]
    differ = [key for one, other in parts for key in {**one, **other} if one.get(key) != other.get(key)]
    if differ:
        raise ResumeError(
            f"{out} holds another run (it differs in {', '.join(differ[:3])}): resume with its own options, "
            "or choose another --out"
        )


def run_attacks(
    patch: Eraser | Path | str,
    attacks: Mapping[str, AttackOptions],
    *,
    concept: str | None = None,
    subject: Subject | None = None,
    base: BaseModel | str | None = None,
    out: Path | str | None = None,
    device: str = "auto",
    precision: str | None = None,
    memory: MemoryOptions | None = None,
    vram: float | None = None,
    **common: Any,
) -> Iterator[tuple[str, AttackResult]]:
    """Several attacks (name → options) on one patch, the base model loaded once, each in a folder of ``out``.

    Each result comes when it is there; ``common`` are other arguments of :func:`attack_patch`.
    """
    loaded = Patch.load(patch) if isinstance(patch, Path | str) else patch
    how: dict[str, Any] = {"device": device, "precision": precision, "memory": memory, "vram": vram}
    batch = max((one.batch_size for one in attacks.values()), default=1)
    told = subject or subject_of(loaded, concept)
    common |= {"concept": concept, "subject": subject, "base": _base(told.recipe, base, batch, **how)}
    for name, options in attacks.items():
        place = Path(out) / name if out is not None else None
        yield name, attack_patch(loaded, name, options=options, out=place, **common)


attack = attack_patch
"""What the package calls it."""
