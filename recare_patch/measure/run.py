"""One evaluation from a patch to its evidence: resolve what is asked, draw, score, write.

The untouched base and the patched model draw the same prompts from the same seeds, and every figure is told
for both, with its interval and the number of its pictures. Scores are computed as the pictures come, so that
memory does not grow with their number.
"""

from __future__ import annotations

import contextlib
import datetime
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from recare_patch.careset import Clip, clip_bytes, default_clip
from recare_patch.core import (
    Comparison,
    EvaluationError,
    PatchError,
    Progress,
    file_sha256,
    read_json,
    read_text,
    unknown_name,
    write_text,
)
from recare_patch.measure.attacks.saved import attack_figures
from recare_patch.measure.calibration import CORRECTED, Calibration, corrected_figures
from recare_patch.measure.calibration import calibrate as calibrated
from recare_patch.measure.card import EVIDENCE_START, claimed_figures, with_evidence
from recare_patch.measure.checks import PICTURES as CHECK_PICTURES
from recare_patch.measure.checks import CheckContext, check_names, run_checks
from recare_patch.measure.claims import written_command
from recare_patch.measure.erasers import Eraser
from recare_patch.measure.evidence import Check, Evidence, Figure
from recare_patch.measure.judges import Detector, Judges, short_name, told_options
from recare_patch.measure.memorization import MEMORIZATION, memorization_figures
from recare_patch.measure.meters import Job, chunks, default_metrics, make_jobs
from recare_patch.measure.names import METRICS
from recare_patch.measure.pictures import PictureCache, Studio, default_cache, launched
from recare_patch.measure.prompts import Rows, check_lengths, read_prompt_file, tell_lengths
from recare_patch.measure.report import write_report
from recare_patch.measure.suites import Suite, folder_of, own_recipe, resolve_suite, suited
from recare_patch.measure.tables import AS_IT_IS, Reading, with_retained, with_table
from recare_patch.models import BaseModel, Load, deciding, load_to_draw, peak_memory, versions
from recare_patch.patch import CARD_NAME, EVIDENCE_NAME, PREVIEW_NAME, TRAINING_NAME, Patch, card_text
from recare_patch.recipe import WEIGHTS_NAME, MemoryOptions

PACKAGES = ("torch", "diffusers", "peft", "transformers", "torchmetrics", "nudenet")
"""Whose versions the evidence names, where they are installed."""

PICTURES_AT_ONCE = 16
"""Pictures of 512² pixels that a GPU draws together, where nothing else is asked for."""

PICTURES = 200
"""Pictures of a figure, where nothing else is asked for."""


@dataclass(frozen=True)
class Options:
    """How a patch is measured, whichever it is; :func:`evaluate` says more of most."""

    metrics: Sequence[str] | None = None
    pictures: int = PICTURES
    retained_pictures: int | None = None  # of the figures on retained prompts; None: as many
    figures: Sequence[str] | None = None  # names of those that are wanted; None: all of the metrics'
    checks: Sequence[str] = ()
    check_pictures: int = CHECK_PICTURES
    calibrate: int | None = None  # pictures with the concept, and as many without, to read the detector's errors from
    detector: Detector | None = None  # instead of the suite's
    clip: Clip | str | None = None
    cache: PictureCache | None = None
    batch_size: int | None = None
    device: str = "auto"  # where CLIP and classifiers compute; the base is where it is
    progress: Progress | None = None

    def __post_init__(self) -> None:
        fewest = min(self.pictures, self.retained)
        if fewest < 1:
            raise EvaluationError(f"a figure needs at least 1 picture, got {fewest}")
        for name in self.metrics or ():
            if name not in METRICS:
                raise unknown_name("metric", name, METRICS)
        if self.checks:
            check_names(self.checks)

    @property
    def retained(self) -> int:
        """Pictures of the figures on retained prompts."""
        return self.pictures if self.retained_pictures is None else self.retained_pictures

    @property
    def chosen(self) -> tuple[str, ...]:
        """The metrics, each once."""
        return default_metrics(self.retained) if self.metrics is None else tuple(dict.fromkeys(self.metrics))


# Long by its arguments, which are the command's options, and by what is said of them.
def evaluate(
    patch: Patch | Path | str,
    *,
    base: BaseModel | str | Path | None = None,
    suite: Suite | Path | str | None = None,
    reading: Reading = AS_IT_IS,
    concept: str | None = None,
    metrics: Sequence[str] | None = None,
    pictures: int | None = None,
    out: Path | str | None = None,
    cache: Path | str | Literal[False] | None = None,
    detector: str | Detector | None = None,
    label: str | None = None,
    clip: Clip | str | None = None,
    prompts_file: Path | str | None = None,
    attacks: Sequence[Path | str] | None = None,
    checks: Sequence[str] = (),
    check_pictures: int = CHECK_PICTURES,
    calibrate: int | None = None,
    card: bool = False,
    precision: str | None = None,
    memory: MemoryOptions | None = None,
    vram: float | None = None,
    batch_size: int | None = None,
    seed: int | None = None,
    device: str = "auto",
    progress: Progress | None = None,
) -> Evidence:
    """Score a patch and write ``evidence.json`` and ``report.html``.

    Args:
        patch: the patch's folder or file, or a patch loaded from one.
        base: the model, or where to find it; None: the one that the patch was made for.
        suite: a suite, its name or file, or a table of prompts; None: see :func:`resolve_suite`.
        reading: of a table.
        concept: which of several that the patch erases.
        metrics: names of :data:`METRICS`; None: :func:`default_metrics`.
        pictures, check_pictures: of each figure (None: a table's rows, or :data:`PICTURES`), and behind each value of a
            check.
        out: where to write; None: beside the weights, where ``verify`` looks for it. Of several concepts
            each has a folder of its own in it, named as the concept's slug.
        cache: folder of pictures, those of the erased concept too; None: :func:`default_cache`; False: none.
        detector: instead of the suite's; a name may carry its source, as "image-classifier:FOLDER".
        label: what the detector calls the concept, instead of the suite's label.
        clip: of CARE score, prompt agreement and distances; None: the recipe's.
        prompts_file: one prompt a line, or a table, each drawn once in place of the suite's retained prompts.
        attacks: folders of saved attacks on this patch to tell of; None: those beside the patch.
        checks: names of :data:`CHECKS`, or "all".
        calibrate: pictures by the base with the concept, and as many without, that the detector's error rates are read
            from: rates are told corrected too, with intervals that carry them.
        card: write the figures into the patch's ``README.md`` as well; one that tells figures already
            is always kept in step with the evidence beside it.
        precision, memory, vram: of a base that is not loaded yet; see :func:`load_to_draw`.
        seed: the first one; None: the suite's.
        batch_size: pictures drawn together; None: by the size of the base.
        progress: told of every batch.

    Raises:
        RecarePatchError: one sentence on what was wrong; what was drawn stays in the cache.
    """
    loaded, crew = patch if isinstance(patch, Patch) else Patch.load(patch), launched()
    weights, metadata = _weights_file(loaded), loaded.metadata
    recipe = own_recipe(loaded)
    table = reading.table(suite)
    retained = None if prompts_file is None else read_prompt_file(prompts_file, {} if table else reading.columns)
    if base is None:
        if metadata is None:
            told = "does not say what base it was made for: name one with --base"
            raise EvaluationError(f"{loaded.source} {told}")
        base = recipe.base if recipe else metadata.base
    base_id = str(base) if isinstance(base, str | Path) else base.id
    chosen = resolve_suite(loaded, None if table else suite, base_id, concept=concept, first_seed=seed)
    if table:
        chosen = with_table(chosen, table, reading)
    most = max((len(one.prompts) for one in chosen.tables.values()), default=PICTURES)
    named, given = (detector, None) if isinstance(detector, str) else (None, detector)
    if named is not None:
        chosen = chosen.with_detector(named, label)
    elif label is not None:
        chosen = chosen.with_changes(label=label)
    if isinstance(retained, Rows):
        chosen = with_retained(chosen, retained)
    elif retained is not None:
        chosen = chosen.with_changes(retained=retained, retained_seeds=())
    options = Options(
        metrics=metrics,
        pictures=most if pictures is None else pictures,
        retained_pictures=len(retained.prompts if isinstance(retained, Rows) else retained) if retained else None,
        checks=checks,
        check_pictures=check_pictures,
        calibrate=calibrate,
        detector=given,
        clip=clip,
        cache=None if cache is False else PictureCache(default_cache() if cache is None else cache),
        batch_size=batch_size,
        # Under several processes, the device that accelerate gave this one.
        device=str(crew.device) if crew is not None and device == "auto" else device,
        progress=progress,
    )
    several = metadata is not None and metadata.by_concept
    if several and card:
        told = "is judged by each of its concepts, and its card tells no figures: leave them in"
        raise EvaluationError(f"patch {loaded.name} {told} {EVIDENCE_NAME}")
    folder = folder_of(loaded, Path(out).expanduser() if out is not None else weights.parent, chosen.concept)
    found = attack_figures(weights, attacks, folder, chosen.concept if several else None)
    # Before anything is drawn: the figures go into it afterwards.
    _card_of(weights)
    if isinstance(base, str | Path):
        how: dict[str, Any] = {"precision": precision, "memory": memory, "vram": vram, "device": options.device}
        eyes = clip.id if isinstance(clip, Clip) else clip or (recipe and recipe.clip) or default_clip(str(base))
        load = Load(pictures=batch_size or PICTURES_AT_ONCE, held=clip_bytes(eyes))
        base = load_to_draw(base, recorded=recipe.precision if recipe else None, load=load, **how)
    chosen = suited(chosen, base)
    if isinstance(retained, tuple):
        check_lengths(base, retained, prompts_file or "")
    for some in chosen.tables.values():
        tell_lengths(base, some)
    scores = score(loaded, base, chosen, options)
    if scores is not None:
        words = ["--label", label] if label is not None else []
        words += ["--prompts", "FILE"] if retained is not None else []
        words += ["--calibrate", str(calibrate)] if calibrate is not None else []
        words += ["--suite", chosen.name, *reading.words] if table else []
        written = {"attacks": found, "command": written_command(chosen, options, base.id, named, words)}
        evidence = scores.evidence.model_copy(update=written)
        _write(evidence, weights, loaded, scores.pictures, folder, card)
    if crew is not None:
        crew.wait_for_everyone()
    return evidence if scores is not None else Evidence.load(folder)


def _hash_of(patch: Eraser) -> str:
    """Of the file as it lies there, where it is a patch."""
    return file_sha256(_weights_file(patch)) if isinstance(patch, Patch) else patch.sha256()


def _weights_file(patch: Patch) -> Path:
    source = Path(patch.source).expanduser()
    file = source / WEIGHTS_NAME if source.is_dir() else source
    if not file.is_file():
        told = f"evidence names the weights file that was measured, and {patch.source} is none"
        raise EvaluationError(f"{told}: save the patch and evaluate its folder")
    return file


Comparisons = dict[str, list[Comparison]]
"""Pictures for the report, by their caption."""


@dataclass(frozen=True)
class Scores:
    """What an evaluation found, not written down yet."""

    evidence: Evidence
    pictures: Comparisons


def score(patch: Eraser, base: BaseModel, suite: Suite, options: Options) -> Scores | None:
    """Draw and measure, and write nothing but pictures into the cache.

    The evidence names the patch by the hash of its file; no LoRA is switched on in the base.

    Returns:
        What was found; None on all processes but the first, where there are several.
    """
    began, evaluations, metrics = time.perf_counter(), base.counter.total, options.chosen
    sha256 = _hash_of(patch)
    patch.check_base(base)
    if options.batch_size is None:
        options = replace(options, batch_size=usual_batch(base))
    judges = _judges(patch, base, suite, options)
    wanted = None if options.figures is None else set(options.figures)
    raw = None if wanted is None else {name.removesuffix(CORRECTED) for name in wanted}
    jobs = make_jobs(judges, metrics, options.pictures, options.retained, raw)
    inverted = "memorization" in metrics and (wanted is None or not wanted.isdisjoint(MEMORIZATION))
    if not (jobs or inverted or options.checks):
        raise EvaluationError(f"the suite '{suite.name}' has no prompts for {', '.join(metrics) or 'no metric at all'}")
    studios = _studios(patch, base, suite, options, jobs)
    if studios is None:
        return None
    drawer, studio = studios
    if drawer.processes == 1:
        studio.announce([drawing for job in jobs for drawing in _drawings(job, patch, suite)])
    figures: list[Figure] = []
    pictures: Comparisons = {}
    for job in jobs:
        before, after = (studio.stream(**drawing) for drawing in _drawings(job, patch, suite))
        for chunk in chunks((row, old, new) for (row, old), (_, new) in zip(before, after, strict=True)):
            job.take(*chunk)
        figures += [figure for meter in job.meters for figure in meter.figures()]
        pictures.setdefault(job.caption, []).extend(job.comparisons())
    if inverted:
        count, progress = options.pictures, options.progress
        figures += memorization_figures(studio, patch, suite, judges.detector, count, progress)
    told = _setting(patch, base, judges, options)
    if options.calibrate is not None:
        calibration = calibrated(studio, suite, judges.detector, options.calibrate)
        figures += corrected_figures(figures, calibration, judges.detector.name)
        told["options"]["calibration"] = calibration.as_data()
    checks = _checks(options, studio, patch, judges) if options.checks else ()
    cost = {
        "seconds": round(time.perf_counter() - began, 2),
        "pictures_drawn": drawer.drawn,
        "pictures_from_cache": drawer.from_cache,
        "peak_memory_bytes": peak_memory(base.device),
        "device": str(base.device),
        "processes": drawer.processes,
    }
    if drawer.processes == 1:
        cost["denoiser_evaluations"] = base.counter.total - evaluations
    else:
        # Each knows only what itself has drawn.
        cost["pictures_drawn"] = 2 * sum(len(job.drawing.prompts) for job in jobs) - drawer.from_cache
    figures = [one for one in figures if wanted is None or one.name in wanted]
    told |= {"patch_sha256": sha256, "cost": cost}
    return Scores(Evidence(figures=tuple(figures), checks=checks, **told), pictures)


def usual_batch(base: BaseModel) -> int:
    """Pictures to draw together: fewer where they are larger, which fill a device sooner."""
    area = math.prod(base.picture_size) // 64
    if area <= 32**2:
        return 20
    return max(1, PICTURES_AT_ONCE * 64**2 // area) if base.device.type == "cuda" else 4


def _studios(
    patch: Eraser, base: BaseModel, suite: Suite, options: Options, jobs: Sequence[Job]
) -> tuple[Studio, Studio] | None:
    """Who draws, and who hands the pictures to the first process; None for the other processes."""
    how: dict[str, Any] = {"cache": options.cache, "batch_size": options.batch_size or 1}
    drawer = Studio(base, progress=options.progress, **how)
    if drawer.processes == 1:
        return drawer, drawer
    for job in jobs:
        for drawing in _drawings(job, patch, suite):
            drawer.fill(**drawing)
    # From here on one measures what lies in the cache, with a studio that waits for nobody.
    return None if drawer.process > 0 else (drawer, Studio(base, shard=(0, 1), **how))


def _judges(patch: Eraser, base: BaseModel, suite: Suite, options: Options) -> Judges:
    recipe = own_recipe(patch)
    clip = options.clip if options.clip is not None else (recipe and recipe.clip) or default_clip(base.id)
    device = str(base.device) if options.device == "auto" else options.device
    return Judges(suite, clip, device, options.detector)


def _drawings(job: Job, patch: Eraser, suite: Suite) -> list[dict[str, Any]]:
    """What the studio is asked for: the base's pictures, and the patched model's of the same seeds."""
    asked = {"prompts": job.drawing.prompts, "seeds": job.drawing.seeds, **suite.sampler}
    if job.drawing.guidance:
        asked["guidance_scale"] = job.drawing.guidance
    return [
        {**asked, "patches": patches, "stage": f"{name}, {job.drawing.name}"}
        for name, patches in (("base", []), ("patched", [(patch, 1.0)]))
    ]


def _checks(options: Options, studio: Studio, patch: Eraser, judges: Judges) -> tuple[Check, ...]:
    how: dict[str, Any] = {"pictures": options.check_pictures, "progress": options.progress}
    if studio.cache is not None:
        # Checks that train leave checkpoints, to go on from.
        how["work"] = studio.cache.path(studio.key([(patch, 1.0)], {"what": "checks"}), ".work")
    asked = (studio.base, patch, judges.suite, judges.detector, studio)
    return tuple(run_checks(options.checks, CheckContext(*asked, clip=lambda: judges.clip, **how)))


def _setting(patch: Eraser, base: BaseModel, judges: Judges, options: Options) -> dict[str, Any]:
    """What evidence says of the patch, and of how it was measured."""
    suite, metadata = judges.suite, patch.metadata
    # Of several concepts the suite's own was measured.
    subject = metadata if metadata is not None and not metadata.by_concept else suite
    told: dict[str, Any] = suite.model_dump(mode="json")
    told["detector_options"] = told_options(told["detector_options"])
    clip = judges.clip_source
    depends = {
        "metrics": list(options.chosen),
        "pictures": options.pictures,
        "retained_pictures": options.retained,
        "precision": base.precision,
        "clip": short_name(clip.id if isinstance(clip, Clip) else clip),
        "batch_size": options.batch_size,
    }
    if levers := deciding(base.memory):
        depends["memory"] = levers
    if options.checks:
        depends |= {"checks": list(check_names(options.checks)), "check_pictures": options.check_pictures}
    return {
        "base": base.id,
        "base_denoiser_sha256": base.denoiser_hash(),
        "concept": subject.concept,
        "kind": subject.kind,
        "method": metadata.method if metadata else "unknown",
        "suite": told,
        "options": depends,
        "created": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": versions(PACKAGES),
    }


def _card_of(weights: Path) -> str | None:
    """The text of the patch's card, where there is one; an error where figures could not be written into it."""
    file = weights.parent / CARD_NAME
    if not file.exists():
        return None
    text = read_text(file, str(file), EvaluationError, within=weights.parent)
    claimed_figures(text)
    return text


def _write(evidence: Evidence, weights: Path, patch: Patch, pictures: Comparisons, folder: Path, card: bool) -> None:
    """Evidence and report into the folder, and the figures into the patch's card."""
    training = None
    with contextlib.suppress(FileNotFoundError, PatchError):
        training = read_json(weights.parent / TRAINING_NAME, TRAINING_NAME, PatchError, within=weights.parent)
    training = training if isinstance(training, dict) else None
    write_report(evidence, folder, pictures, training)
    file, text = weights.parent / CARD_NAME, _card_of(weights)
    # A card that told figures before must not go on telling the old ones.
    if text is not None and folder.resolve() == weights.parent.resolve():
        tells = EVIDENCE_START in text or "model-index" in text
        card = card or (tells and claimed_figures(text) != (None, None))
    if card:
        if text is None and patch.metadata is None:
            text = "\n"
        elif text is None:
            previews = [PREVIEW_NAME] if (weights.parent / PREVIEW_NAME).is_file() else []
            text = card_text(patch.metadata, training or {}, previews=previews)
        write_text(file, with_evidence(text, evidence))
        # A card's claims are held against the evidence beside it.
        evidence.save(weights.parent / EVIDENCE_NAME)
    evidence.save(folder / EVIDENCE_NAME)


def measure_again(
    evidence: Evidence,
    patch: Eraser,
    base: BaseModel,
    *,
    pictures: int | None = None,
    cache: Path | str | None = None,
    **how: Any,
) -> Evidence:
    """What evidence tells, measured anew with its own suite, seeds and picture counts.

    Args:
        evidence: the recorded one; an EvidenceError where it is of another patch.
        patch, base: what it speaks of.
        pictures: of each figure; None: as many as recorded.
        cache: folder of pictures; None keeps none, so that each is drawn anew.
        how: ``figures``, ``clip``, ``device`` and ``progress`` of :class:`Options`.
    """
    evidence.check_patch(_hash_of(patch), str(patch.source))
    recorded = int(evidence.options.get("pictures", PICTURES))
    retained = int(evidence.options.get("retained_pictures", recorded))
    options = Options(
        metrics=evidence.options.get("metrics"),
        pictures=recorded if pictures is None else pictures,
        retained_pictures=retained if pictures is None else min(pictures, retained),
        batch_size=evidence.options.get("batch_size"),
        calibrate=Calibration.of_data(known).pictures if (known := evidence.options.get("calibration")) else None,
        cache=None if cache is None else PictureCache(cache),
        **how,
    )
    found = score(patch, base, Suite(**evidence.suite), options)
    assert found is not None, "verification runs in one process"
    return found.evidence
