"""One attack on a patch from end to end: target pictures, attack, judgement, files.

The patch says what it erases and from which base model. The untouched base draws pictures of that
concept, from seeds that no erasing run has seen; those that a detector finds to show it are what the
attack works with. Then the patch goes in, and stays in until the attack is over.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from safetensors.torch import load_file
from torch import Tensor

from recare_patch.careset import default_clip
from recare_patch.core import (
    NullProgress,
    PatchError,
    Progress,
    ResumeError,
    claim_folder,
    file_sha256,
    sheets,
    unknown_name,
    write_json,
    write_tensors,
)
from recare_patch.measure.attacks import (
    ATTACKS,
    Attack,
    AttackError,
    AttackOptions,
    AttackResult,
    AttackTarget,
    load_about,
    load_attack,
    load_attack_type,
    save_attack,
)
from recare_patch.measure.attacks.protocol import candidate_seeds, read_json
from recare_patch.measure.attacks.saved import JSON_NAME
from recare_patch.measure.judges import Detector, can_tell, load_detector
from recare_patch.measure.suites import Subject, find_suite_for, subject_of
from recare_patch.measure.unwritten import default_suite
from recare_patch.models import BaseModel, load_base
from recare_patch.models import lora as adapters
from recare_patch.patch import Patch, concepts_of
from recare_patch.recipe import WEIGHTS_NAME, Recipe, same_concept, scheduled

logger = logging.getLogger(__name__)

RUN_FOLDER = ".run"
SHEET_NAME = "attack.png"

_TRIES = 4
"""Candidates drawn for each target picture wanted, before giving up on a base that draws too few."""


@dataclass(frozen=True)
class _Setting:
    """What does not change between the attacks on one patch."""

    patch: Patch
    sha256: str
    subject: Subject
    base: BaseModel
    detector: Detector
    label: str
    seed: int
    steps: int
    scheduler: str | None
    guidance_scale: float

    @property
    def recipe(self) -> Recipe:
        return self.subject.recipe

    def shows(self, images: Sequence[Image]) -> list[bool]:
        return [bool(hit) for hit in self.detector.rate(images, self.label)]

    def about(self, preset: str) -> dict[str, Any]:
        """What a saved attack says of itself, and what must agree for a run to be resumed."""
        return {
            "patch_sha256": self.sha256,
            "base": self.base.id,
            "base_denoiser_sha256": self.base.denoiser_hash(),
            "concept": self.recipe.concept.text,
            "kind": self.recipe.concept.kind,
            "method": self.subject.method,
            "detector": self.detector.name,
            "label": self.label,
            "preset": preset,
            "seed": self.seed,
            "steps": self.steps,
            "scheduler": self.scheduler,
            "guidance_scale": self.guidance_scale,
        }

    @property
    def words(self) -> tuple[str, ...]:
        return self.subject.care_words

    def target(self, found: _Targets | None) -> AttackTarget:
        return AttackTarget(
            base=self.base,
            concept=self.recipe.concept,
            shows=self.shows,
            images=found.images if found else [],
            latents=found.latents if found else torch.empty((0, *self.base.latent_shape)),
            original=lambda: adapters.off(*self.base.components.values()),
            prompts=found.prompts if found else (),
            seeds=found.seeds if found else (),
            steps=self.steps,
            guidance_scale=self.guidance_scale,
            words=self.words,
        )


@dataclass(frozen=True)
class _Targets:
    """Pictures by the untouched base that show the concept, and the share of those drawn that do."""

    images: list[Image]
    latents: Tensor
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    rate: float


# ------------------------------------------------------------------------ what is attacked, and with what


def attack_options(
    attack: str, budget: str = "small", overrides: Mapping[str, Any] | None = None
) -> AttackOptions:
    """The options of an attack: a preset, some values set otherwise.

    Args:
        attack: a name of :data:`ATTACKS`.
        budget: ``small`` (for a CPU) or ``published``.
        overrides: key → value.

    Raises:
        UnknownNameError: no such attack or budget.
        AttackError: unknown keys or bad values.
    """
    return load_attack_type(attack).options_type.preset(budget, overrides)


def _load_patch(patch: Patch | Path | str) -> tuple[Patch, str]:
    """The patch and the SHA-256 of its weights file, or of its tensors where it has no file."""
    loaded = patch if isinstance(patch, Patch) else Patch.load(patch)
    source = Path(loaded.source)
    file = source / WEIGHTS_NAME if source.is_dir() else source
    if not isinstance(patch, Patch) or file.is_file():
        return loaded, file_sha256(file)
    digest = hashlib.sha256()
    for key, tensor in sorted(loaded.tensors.items()):
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return loaded, digest.hexdigest()


def _setting(
    loaded: Patch,
    sha256: str,
    concept: str | None,
    base: BaseModel | str | None,
    detector: Detector | str | None,
    label: str | None,
    seed: int,
    steps: int | None,
    scheduler: str | None,
    guidance_scale: float | None,
    device: str,
) -> _Setting:
    if loaded.metadata is None:
        raise PatchError(
            f"{loaded.source} was not made by recare-patch: it does not say what it erases, so that nothing "
            "can be attacked"
        )
    subject = subject_of(loaded, concept)
    recipe = subject.recipe
    judge, name = _detector(recipe, subject.care_words, detector, label)
    if not isinstance(base, str | None):
        model = base
    else:
        model = load_base(base or recipe.base, precision=recipe.precision, device=device)
    loaded.check_base(model)
    options = recipe.target_images
    return _Setting(
        loaded,
        sha256,
        subject,
        model,
        judge,
        name,
        seed,
        options.steps if steps is None else steps,
        scheduler or options.scheduler,
        options.guidance_scale if guidance_scale is None else guidance_scale,
    )


def _detector(
    recipe: Recipe, words: Sequence[str], detector: Detector | str | None, label: str | None
) -> tuple[Detector, str]:
    """Who judges, and what it calls the concept; the concept's suite knows what was not given.

    Raises:
        UnknownNameError: no such detector, or it does not know the label.
    """
    suite = find_suite_for(recipe.concept, recipe.base) or default_suite(recipe, words)
    if detector is None:
        detector = suite.detector
    if isinstance(detector, str):
        name, _, source = detector.partition(":")
        options: dict[str, Any] = dict(suite.detector_options) if name == suite.detector else {}
        if source:
            options["clip" if name == "clip" else "source"] = source
        if name == "clip":
            # The one that `evaluate` reads its figures with, so that both judge alike.
            options.setdefault("clip", recipe.clip or default_clip(recipe.base))
        judge = load_detector(name, **options)
    else:
        judge = detector
    wanted = (
        (suite.label if can_tell(judge, suite.label) else recipe.concept.text) if label is None else label
    )
    if not can_tell(judge, wanted):
        raise unknown_name(f"label of the detector {judge.name}", wanted, judge.labels())
    return judge, wanted


def _targets(
    setting: _Setting, attack: Attack[Any], options: AttackOptions, progress: Progress, work: Path | None
) -> _Targets:
    """Pictures of the concept by the untouched base, drawn until there are as many as the attack wants."""
    base, concept = setting.base, setting.recipe.concept
    wanted = attack.images_wanted(options)
    candidates = attack.candidates(concept, setting.words)
    most = max(_TRIES * wanted, 2 * len(candidates))
    prompts = [candidates[k % len(candidates)] for k in range(most)]
    seeds = candidate_seeds(setting.seed, most)
    file = work / "targets.safetensors" if work else None
    note = work / "targets.json" if work else None
    if file and note and file.exists() and note.exists():
        chosen, drawn = read_json(note)["rows"], read_json(note)["drawn"]
        latents = load_file(file)["latents"].to(base.device)
    else:
        found, chosen, drawn = [], [], 0
        while drawn < most and len(chosen) < wanted:
            rows = range(drawn, min(drawn + options.batch_size, most))
            batch = base.sample_latents(
                base.encode_prompts([prompts[row] for row in rows]),
                [seeds[row] for row in rows],
                steps=setting.steps,
                guidance_scale=setting.guidance_scale,
                batch_size=len(rows),
            )
            hits = setting.shows(base.decode_latents(batch))
            chosen += [row for row, hit in zip(rows, hits, strict=True) if hit]
            found.append(batch[torch.tensor(hits)])
            drawn = rows[-1] + 1
            progress.update("target images", min(len(chosen), wanted), wanted, f"of {drawn} drawn")
        latents = torch.cat(found)
        # Latents decode to pictures: those of unsafe concepts stay in memory.
        if file and note and concept.kind != "nsfw":
            write_tensors(file, {"latents": latents.cpu()}, {})
            write_json(note, {"rows": chosen, "drawn": drawn})
    if not chosen:
        raise AttackError(
            f"there is nothing to attack: none of {drawn} pictures of '{concept.text}' by the untouched base "
            f"shows '{setting.label}' to the detector {setting.detector.name}"
        )
    if len(chosen) < wanted:
        logger.warning(
            "the untouched base shows '%s' in %d of %d pictures: the attack goes on with those, and %d "
            "were asked for",
            concept.text,
            len(chosen),
            drawn,
            wanted,
        )
    kept, rate = chosen[:wanted], len(chosen) / drawn
    latents = latents[:wanted]
    return _Targets(
        base.decode_latents(latents),
        latents,
        tuple(prompts[row] for row in kept),
        tuple(seeds[row] for row in kept),
        rate,
    )


# ------------------------------------------------------------------------ running


def attack_patch(
    patch: Patch | Path | str,
    attack: str | None = None,
    *,
    concept: str | None = None,
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
) -> AttackResult:
    """Attack a patch, or try on it what was found on another one.

    Args:
        patch: a patch or where it lies.
        attack: a name of :data:`ATTACKS`; with ``replay`` it may be left
            out.
        concept: which of several that the patch erases; a replay knows its own.
        base: the model, or where to find it; else the recipe's.
        options: of the attack; else the budget's.
        budget: ``small`` or ``published``.
        detector: who says whether a picture shows the concept: a detector, a name, or "name:source" such
            as "image-classifier:FOLDER"; else that of the concept's suite.
        label: what the detector calls the concept; else as the suite says.
        replay: folder of a saved attack; nothing is learnt.
        seed: every random draw follows from it.
        steps, scheduler, guidance_scale: of the target pictures and the judged ones; else as the recipe's
            target images have them.
        out: folder for the result; ``None`` keeps nothing.
        resume: go on with a run in ``out`` that was stopped; a finished one is read.
        progress: told of every stage's steps.
        device: ``auto``, ``cpu``, ``cuda`` …

    Returns:
        The result; of a finished run that was read, without its pictures.

    Raises:
        RecarePatchError: one sentence on what was wrong.

    Example:
        >>> attack_patch("van-gogh-patch", "concept-inversion").rate  # doctest: +SKIP
        0.06
    """
    saved = load_attack(replay) if replay is not None else None
    name = _attack_name(attack, saved, replay)
    kind = load_attack_type(name)
    if saved is not None:
        options = kind.options_type(**saved.budget)
    elif options is None:
        options = kind.options_type.preset(budget)
    elif not isinstance(options, kind.options_type):
        raise AttackError(f"{type(options).__name__} are not the options of the attack {name}")
    loaded, sha256 = _load_patch(patch)
    if replay is not None and concept is None and len(concepts_of(loaded)) > 1:
        concept = replayed_concept(replay)
    setting = _setting(
        loaded, sha256, concept, base, detector, label, seed, steps, scheduler, guidance_scale, device
    )
    if replay is not None:
        _check_concept(setting, replay)
    about = {"attack": name, **setting.about("replay" if saved else budget)}
    if replay is not None:
        about["replay"] = load_about(replay)
    progress = progress or NullProgress()
    if out is None:
        return _run(setting, kind, options, saved, progress, None)[0]
    return _kept(Path(out), resume, about, setting, kind, options, saved, progress)


def _attack_name(attack: str | None, saved: AttackResult | None, replay: Path | str | None) -> str:
    if attack is not None:
        ATTACKS.get(attack)
    if saved is None:
        if attack is None:
            raise AttackError(f"no attack was named: there are {', '.join(ATTACKS.names())}")
        return attack
    if attack not in (None, saved.attack):
        raise AttackError(f"{replay} holds a saved {saved.attack}, not a {attack}")
    if saved.attack not in ATTACKS:
        raise AttackError(f"{replay} holds an attack '{saved.attack}' that this version does not know")
    return saved.attack


def replayed_concept(replay: Path | str) -> str | None:
    """What a saved attack was after, where it says so.

    Raises:
        AttackError: the folder holds no saved attack, or a damaged one.
    """
    found = load_about(replay).get("concept")
    return found if isinstance(found, str) else None


def _check_concept(setting: _Setting, replay: Path | str) -> None:
    other = replayed_concept(replay)
    if other is not None and not same_concept(other, setting.recipe.concept):
        raise AttackError(
            f"the saved attack in {replay} is after '{other}', and the patch erases "
            f"'{setting.recipe.concept.text}'"
        )


def _run(
    setting: _Setting,
    attack: Attack[Any],
    options: AttackOptions,
    saved: AttackResult | None,
    progress: Progress,
    work: Path | None,
) -> tuple[AttackResult, list[Image]]:
    """The result, and pictures by the untouched base to look at beside its own."""
    pipeline = setting.base.pipeline
    with scheduled(pipeline, setting.scheduler):
        if saved is not None:
            with setting.patch.apply(pipeline):
                return attack.replay(setting.target(None), saved, progress=progress), []
        found = _targets(setting, attack, options, progress, work)
        with setting.patch.apply(pipeline):
            result = attack.run(
                setting.target(found), options, seed=setting.seed, progress=progress, work=work
            )
    return replace(result, base=round(found.rate, 6)), found.images


def _kept(
    out: Path,
    resume: bool,
    about: Mapping[str, Any],
    setting: _Setting,
    attack: Attack[Any],
    options: AttackOptions,
    saved: AttackResult | None,
    progress: Progress,
) -> AttackResult:
    with claim_folder(out, resume=resume):
        work = out / RUN_FOLDER
        run = {"about": dict(about), "options": options.model_dump()}
        if (out / JSON_NAME).exists() and not work.exists():
            done = load_attack(out)
            _check_same(out, run, {"about": load_about(out), "options": done.budget})
            return done
        stored = work / "run.json"
        if stored.exists():
            _check_same(out, run, read_json(stored))
        work.mkdir(parents=True, exist_ok=True)
        write_json(stored, run)
        result, before = _run(setting, attack, options, saved, progress, work)
        _save_sheet(out / SHEET_NAME, setting, result, before)
        save_attack(result, out, about)
        # One rename ends the run: a kill while the files go leaves a finished attack, not half a run.
        shutil.rmtree(work.rename(out / f"{RUN_FOLDER}.done"))
    return result


def _check_same(out: Path, run: Mapping[str, Any], stored: Mapping[str, Any]) -> None:
    """Refuse to go on with a run of other options; JSON knows no tuples, so both go through it."""
    if json.loads(json.dumps(run)) == stored:
        return
    differ = [
        key
        for part in ("about", "options")
        for key in {**run[part], **dict(stored.get(part, {}))}
        if json.loads(json.dumps(run[part].get(key))) != dict(stored.get(part, {})).get(key)
    ]
    raise ResumeError(
        f"{out} holds another run (it differs in {', '.join(differ[:3])}): resume with its own options, or "
        "choose another --out"
    )


def _save_sheet(file: Path, setting: _Setting, result: AttackResult, before: Sequence[Image]) -> None:
    count = max(len(result.pictures), 1)
    rows = [sheets.SheetRow("untouched base", list(before[:count]))] if before else []
    rows.append(sheets.SheetRow("under attack", result.pictures))
    title = f"{setting.recipe.concept.text} · {result.attack}: {result.successes} of {result.trials}"
    sheets.save_sheet(sheets.sheet(rows, title=title, blur=setting.recipe.concept.kind == "nsfw"), file)


def run_attacks(
    patch: Patch | Path | str,
    attacks: Mapping[str, AttackOptions],
    *,
    concept: str | None = None,
    base: BaseModel | str | None = None,
    budget: str = "small",
    out: Path | str | None = None,
    device: str = "auto",
    **common: Any,
) -> Iterator[tuple[str, AttackResult]]:
    """Several attacks on one patch, the base model loaded once; each result comes when it is there.

    Args:
        patch: a patch or where it lies.
        attacks: name → options; see :func:`attack_options`.
        concept, base, budget, device: see :func:`attack_patch`.
        out: each attack gets a folder of its name in it.
        common: other arguments of :func:`attack_patch`, the same for all.

    Yields:
        Name and result.
    """
    loaded = patch if isinstance(patch, Patch) else Patch.load(patch)
    if isinstance(base, str | None) and loaded.metadata is not None:
        recipe = subject_of(loaded, concept).recipe
        base = load_base(base or recipe.base, precision=recipe.precision, device=device)
    for name, options in attacks.items():
        folder = Path(out) / name if out is not None else None
        result = attack_patch(
            loaded,
            name,
            concept=concept,
            base=base,
            options=options,
            budget=budget,
            out=folder,
            device=device,
            **common,
        )
        yield name, result
