"""One evaluation from a patch to its evidence: draw, measure, write.

The untouched base and the patched model draw the same prompts from the same seeds, and every figure
is told for both, with its interval and the number of its pictures. Pictures are drawn once and kept
in a cache, so that a broken run goes on where it stopped, and scores are computed as the pictures
come, so that memory does not grow with their number.
"""

from __future__ import annotations

import datetime
import json
import logging
import os
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from recare_patch.careset import Clip, default_clip
from recare_patch.core import (
    Comparison,
    EvaluationError,
    EvidenceError,
    Progress,
    file_sha256,
    process_device,
    processes,
    unknown_name,
    write_text,
)
from recare_patch.measure.attacks.saved import JSON_NAME, load_about, load_attack
from recare_patch.measure.card import claimed_figures, with_evidence
from recare_patch.measure.checks import PICTURES as CHECK_PICTURES
from recare_patch.measure.checks import CheckContext, check_names, run_checks
from recare_patch.measure.evidence import AttackFigure, Check, Evidence, Figure
from recare_patch.measure.judges import DETECTORS, Detector
from recare_patch.measure.memorization import MEMORIZATION, memorization_figures
from recare_patch.measure.meters import Job, Judges, chunks, make_jobs, short_name
from recare_patch.measure.metrics import KID_LIMIT
from recare_patch.measure.pictures import PictureCache, Studio, default_cache
from recare_patch.measure.report import write_report
from recare_patch.measure.subject import folder_of, subject_of
from recare_patch.measure.suites import (
    MAX_PROMPT,
    Suite,
    default_suite,
    find_suite_for,
    list_suites,
    load_suite,
)
from recare_patch.models import BaseModel, load_base, peak_memory, versions
from recare_patch.patch import CARD_NAME, EVIDENCE_NAME, Patch, card_text, concepts_of
from recare_patch.recipe import WEIGHTS_NAME, same_concept, slug_of

logger = logging.getLogger(__name__)

METRICS = (
    "concept-rate",
    "care-score",
    "neighbours",
    "clip-score",
    "kid",
    "fid",
    "perceptual-change",
    "memorization",
)
"""What can be measured."""

PACKAGES = ("torch", "diffusers", "peft", "transformers", "torchmetrics", "nudenet")
"""Whose versions the evidence names, where they are installed."""

PICTURES = 200
"""Pictures of a figure, where nothing else is asked for."""


def default_metrics(retained_pictures: int) -> tuple[str, ...]:
    """What is measured where nothing is named: all but the memorization score, which has to train.

    KID is the distance of small sets, FID of those from 2,000 pictures on.
    """
    left_out = {"memorization", "fid" if retained_pictures < KID_LIMIT else "kid"}
    return tuple(name for name in METRICS if name not in left_out)


def is_first_process() -> bool:
    """Whether this process is the first of those that accelerate launched, or the only one."""
    state = processes()
    return state is None or bool(state.process_index == 0)


def read_prompts(path: str | Path) -> tuple[str, ...]:
    """The prompts of a file, one a line.

    Raises:
        EvaluationError: it cannot be read, is empty, or has empty or over-long lines; the first
            faulty line is named.
    """
    file = Path(path).expanduser()
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise EvaluationError(f"{path} is no prompt file: it is not UTF-8 text") from None
    except OSError as fault:
        raise EvaluationError(
            f"cannot read the prompt file {path}: {(fault.strerror or str(fault)).lower()}"
        ) from fault
    lines = text.removesuffix("\n").split("\n") if text.strip() else []
    if not lines:
        raise EvaluationError(f"the prompt file {path} is empty: one prompt a line is needed")
    prompts = []
    for number, line in enumerate(lines, 1):
        prompt = " ".join(line.split())
        if not prompt:
            raise EvaluationError(f"line {number} of {path} is empty: one prompt a line is needed")
        if len(prompt) > MAX_PROMPT:
            raise EvaluationError(
                f"line {number} of {path} is over-long: it has {len(prompt)} characters, and may have "
                f"{MAX_PROMPT}"
            )
        prompts.append(prompt)
    return tuple(prompts)


def _check_lengths(base: BaseModel, prompts: Sequence[str], source: str | Path) -> None:
    """Refuse prompts whose end the text encoder would not read: their pictures would show something else."""
    most = int(base.pipeline.tokenizer.model_max_length) - 2
    for number, prompt in enumerate(prompts, 1):
        tokens = len(base.token_ids(prompt))
        if tokens > most:
            raise EvaluationError(
                f"line {number} of {source} is over-long: {tokens} tokens, and base '{base.id}' reads {most}"
            )


# ------------------------------------------------------------------------ measuring


@dataclass(frozen=True)
class Measured:
    """What an evaluation found, not written down yet.

    Attributes:
        evidence: the figures.
        pictures: caption → the base's pictures beside the patched model's, of a few prompts.
    """

    evidence: Evidence
    pictures: dict[str, list[Comparison]] = field(default_factory=dict)


def measure(
    patch: Patch,
    base: BaseModel,
    suite: Suite,
    *,
    metrics: Sequence[str] | None = None,
    pictures: int = PICTURES,
    retained_pictures: int | None = None,
    figures: Sequence[str] | None = None,
    checks: Sequence[str] = (),
    check_pictures: int = CHECK_PICTURES,
    detector: Detector | None = None,
    clip: Clip | str | None = None,
    cache: PictureCache | None = None,
    batch_size: int | None = None,
    device: str = "auto",
    progress: Progress | None = None,
    command: str = "",
) -> Measured | None:
    """Draw and measure, and write nothing but pictures into the cache.

    Args:
        patch: loaded from a file, whose hash the evidence names.
        base: what it is measured on, with no LoRA switched on.
        suite: the prompts.
        metrics: names of :data:`METRICS`; None: :func:`default_metrics`.
        pictures: of each figure.
        retained_pictures: of the figures on retained prompts; None: ``pictures``.
        figures: names of the figures that are wanted; None: all of the metrics'.
        checks: names of :data:`CHECKS`, or "all".
        check_pictures: behind each value of a check.
        detector: instead of the suite's.
        clip: of CARE score, prompt agreement and distances; None: the patch's recipe's.
        cache: where pictures are kept.
        batch_size: pictures drawn together; None: by the size of the base.
        device: where CLIP and classifiers compute; the base is where it is.
        progress: told of every batch.
        command: what to name in the evidence.

    Returns:
        What was found; None on all processes but the first, where there are several.

    Raises:
        RecarePatchError: one sentence on what was wrong; pictures that were drawn stay in the cache.
    """
    began = time.perf_counter()
    if pictures < 1 or (retained_pictures is not None and retained_pictures < 1):
        raise EvaluationError(
            f"a figure needs at least 1 picture, got {min(pictures, retained_pictures or 1)}"
        )
    retained = pictures if retained_pictures is None else retained_pictures
    chosen = tuple(default_metrics(retained) if metrics is None else dict.fromkeys(metrics))
    for name in chosen:
        if name not in METRICS:
            raise unknown_name("metric", name, METRICS)
    checked = check_names(checks)
    patch_sha256 = file_sha256(_weights_file(patch))
    patch.check_base(base)
    judges = Judges(suite, _clip_source(clip, patch, base), _clip_device(device, base), detector)
    jobs = make_jobs(suite, chosen, pictures, retained, judges)
    if figures is not None:
        for job in jobs:
            job.meters = [meter for meter in job.meters if not meter.names or set(figures) & set(meter.names)]
        jobs = [job for job in jobs if any(meter.names for meter in job.meters)]
    inverted = "memorization" in chosen and (figures is None or bool(set(figures) & set(MEMORIZATION)))
    if not jobs and not inverted and not checked:
        raise EvaluationError(
            f"the suite '{suite.name}' has no prompts for {', '.join(chosen) or 'no metric at all'}"
        )
    if batch_size is None:
        batch_size = 20 if max(base.latent_shape[1:]) <= 32 else 16 if base.device.type == "cuda" else 4
    evaluations = base.counter.total
    drawer = Studio(base, cache=cache, batch_size=batch_size, progress=progress)
    studio = drawer
    if drawer.processes > 1:
        for job in jobs:
            for drawing in _drawings(job, patch, suite):
                drawer.fill(**drawing)
        if not drawer.main:
            return None
        # From here on one measures what lies in the cache, with a studio that waits for nobody.
        studio = Studio(base, cache=cache, batch_size=batch_size, shard=(0, 1))
    measured: list[Figure] = []
    shown: dict[str, list[Comparison]] = {}
    for job in jobs:
        streams = [studio.stream(**drawing) for drawing in _drawings(job, patch, suite)]
        pairs = ((row, old, new) for (row, old), (_, new) in zip(*streams, strict=True))
        for rows, old, new in chunks(pairs):
            for meter in job.meters:
                meter.take(rows, old, new)
        for meter in job.meters:
            measured += meter.figures()
        shown.setdefault(job.caption, []).extend(job.samples.comparisons())
    if inverted:
        measured += memorization_figures(studio, patch, suite, judges.detector, pictures, progress)
    found = _checked(checked, check_pictures, studio, patch, suite, judges, progress)
    cost = {
        "seconds": round(time.perf_counter() - began, 2),
        "pictures_drawn": 2 * sum(len(job.drawing.prompts) for job in jobs) - drawer.from_cache,
        "pictures_from_cache": drawer.from_cache,
        "peak_memory_bytes": peak_memory(base.device),
        "device": str(base.device),
        "processes": drawer.processes,
    }
    if studio is drawer:
        # Of several processes, each knows only what itself has drawn.
        cost |= {
            "pictures_drawn": drawer.drawn,
            "denoiser_evaluations": base.counter.total - evaluations,
        }
    options = {
        "metrics": list(chosen),
        "pictures": pictures,
        "retained_pictures": retained,
        "precision": _precision(base),
        "clip": short_name(source.id if isinstance(source := judges.clip_source, Clip) else source),
        "batch_size": batch_size,
    }
    if checked:
        options |= {"checks": list(checked), "check_pictures": check_pictures}
    metadata = patch.metadata
    single = metadata is not None and not metadata.by_concept
    evidence = Evidence(
        patch_sha256=patch_sha256,
        base=base.id,
        base_denoiser_sha256=base.denoiser_hash(),
        # Of several concepts the suite's own was measured.
        concept=metadata.concept if metadata and single else suite.concept,
        kind=metadata.kind if metadata and single else suite.kind,  # type: ignore[arg-type]
        method=metadata.method if metadata else "unknown",
        suite=_published(suite),
        options=options,
        created=datetime.datetime.now(datetime.UTC).date().isoformat(),
        versions=versions(PACKAGES),
        command=command,
        figures=tuple(one for one in measured if figures is None or one.name in figures),
        checks=found,
        cost=cost,
    )
    return Measured(evidence, {caption: some for caption, some in shown.items() if some})


def _checked(
    names: Sequence[str],
    pictures: int,
    studio: Studio,
    patch: Patch,
    suite: Suite,
    judges: Judges,
    progress: Progress | None,
) -> tuple[Check, ...]:
    if not names:
        return ()
    work = None
    if studio.cache is not None:
        # Checks that train leave checkpoints, to go on from.
        work = studio.cache.path(studio.key([(patch, 1.0)], {"what": "checks"}), ".work")
    context = CheckContext(
        studio.base,
        patch,
        suite,
        judges.detector,
        studio,
        pictures=pictures,
        progress=progress,
        work=work,
        clip=lambda: judges.clip,
    )
    return tuple(run_checks(names, context))


def _drawings(job: Job, patch: Patch, suite: Suite) -> list[dict[str, Any]]:
    """What the studio is asked for: the base's pictures, and the patched model's of the same seeds."""
    patches: dict[str, list[tuple[Patch, float]]] = {"base": [], "patched": [(patch, 1.0)]}
    return [
        {
            "prompts": job.drawing.prompts,
            "seeds": job.drawing.seeds,
            "patches": applied,
            "steps": suite.steps,
            "scheduler": suite.scheduler,
            "guidance_scale": suite.guidance_scale,
            "stage": f"{name}, {job.drawing.name}",
        }
        for name, applied in patches.items()
    ]


def _weights_file(patch: Patch) -> Path:
    source = Path(patch.source).expanduser()
    file = source / WEIGHTS_NAME if source.is_dir() else source
    if not file.is_file():
        raise EvaluationError(
            f"evidence names the weights file that was measured, and {patch.source} is none: save the patch "
            "and evaluate its folder"
        )
    return file


def _clip_source(given: Clip | str | None, patch: Patch, base: BaseModel) -> Clip | str:
    if given is not None:
        return given
    made = patch.metadata
    recorded = made.parsed_recipe.clip if made is not None and not made.parts else None
    return recorded or default_clip(base.id)


def _clip_device(device: str, base: BaseModel) -> str:
    return str(base.device) if device == "auto" else device


def _precision(base: BaseModel) -> str:
    return {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}[str(base.dtype).removeprefix("torch.")]


# ------------------------------------------------------------------------ from a patch to its evidence


def resolve_suite(
    patch: Patch,
    suite: Suite | str | Path | None,
    base_id: str,
    *,
    concept: str | None = None,
    first_seed: int | None = None,
) -> Suite:
    """The suite that a patch is judged by.

    Args:
        patch: the patch; what it erases and guards decides where nothing is named.
        suite: a suite, its name or file; None: the bundled one of the concept, else one made from the
            patch's recipe.
        base_id: of the base.
        concept: which of several concepts; None: the only one, or that of ``suite``.
        first_seed: instead of the suite's own.

    Raises:
        UnknownNameError: no such suite.
        EvaluationError: the patch does not say what it erases, erases several concepts and none was
            chosen, or the suite is of another concept.
    """
    known = concepts_of(patch)
    if suite is None and not known:
        raise EvaluationError(
            f"{patch.source} was not made by recare-patch and does not say what it erases: name a suite"
        )
    if concept is None and len(known) > 1 and suite is not None:
        # A suite that is no bench says itself which of them it is for.
        concept = (suite if isinstance(suite, Suite) else load_suite(suite)).concept
    subject = subject_of(patch, concept) if known else None
    if isinstance(suite, Suite):
        found = suite
    elif suite is not None:
        text, kind = (subject.concept.text, subject.concept.kind) if subject else (None, None)
        found = load_suite(suite, concept=text, kind=kind)
    else:
        assert subject is not None
        # The recipe knows a hub id or "atelier" where the base is a folder of any name.
        bundled = find_suite_for(subject.concept, base_id) or find_suite_for(
            subject.concept, subject.recipe.base
        )
        found = bundled or default_suite(subject.recipe, subject.care_words)
    if subject is not None and not same_concept(found.concept, subject.concept):
        raise EvaluationError(
            f"the suite '{found.name}' is for '{found.concept}', and the patch erases "
            f"'{subject.concept.text}'"
        )
    return found if first_seed is None else found.with_changes(first_seed=first_seed)


def evaluate(
    patch: Patch | Path | str,
    *,
    base: BaseModel | str | Path | None = None,
    suite: Suite | Path | str | None = None,
    concept: str | None = None,
    metrics: Sequence[str] | None = None,
    pictures: int = PICTURES,
    out: Path | str | None = None,
    cache: Path | str | Literal[False] | None = None,
    detector: str | Detector | None = None,
    label: str | None = None,
    clip: Clip | str | None = None,
    prompts_file: Path | str | None = None,
    attacks: Sequence[Path | str] | None = None,
    checks: Sequence[str] = (),
    check_pictures: int = CHECK_PICTURES,
    card: bool = False,
    precision: str | None = None,
    batch_size: int | None = None,
    seed: int | None = None,
    device: str = "auto",
    progress: Progress | None = None,
) -> Evidence:
    """Score a patch and write ``evidence.json`` and ``report.html``.

    Args:
        patch: the patch's folder or file, or a patch loaded from one.
        base: the model, or where to find it; None: the one that the patch was made for.
        suite: a suite, its name or file; None: see :func:`resolve_suite`.
        concept: which of several that the patch erases; see :func:`concepts_of`.
        metrics: names of :data:`METRICS`; None: :func:`default_metrics`.
        pictures: of each figure.
        out: where to write; None: beside the weights, where ``verify`` looks for it. Of several concepts
            each has a folder of its own in it, named as the concept's slug.
        cache: folder of pictures; None: :func:`default_cache`; False:
            keep none. It holds pictures of the erased concept, whatever that is.
        detector: instead of the suite's; a name may carry its source, as "image-classifier:FOLDER".
        label: what the detector calls the concept, instead of the suite's label.
        clip: of CARE score, prompt agreement and distances; None: the recipe's.
        prompts_file: one prompt a line, in place of the suite's retained prompts; each is drawn once.
        attacks: folders of saved attacks on this patch to tell of; None: those beside the patch.
        checks: names of :data:`CHECKS`, or "all": how the patch behaves
            at other scales, with other samplers and so on.
        check_pictures: behind each value of a check.
        card: write the figures into the patch's ``README.md`` as well; one that tells figures already
            is always kept in step with the evidence beside it.
        precision: of the base; None: the recipe's.
        batch_size: pictures drawn together.
        seed: instead of the suite's first seed.
        device: ``auto``, ``cpu``, ``cuda`` …
        progress: told of every batch.

    Returns:
        The evidence.

    Raises:
        RecarePatchError: one sentence on what was wrong; what was drawn stays in the cache.

    Example:
        >>> evaluate("van-gogh-patch").figure("concept, plain prompts").patched  # doctest: +SKIP
        0.01
    """
    loaded = patch if isinstance(patch, Patch) else Patch.load(patch)
    weights = _weights_file(loaded)
    metadata = loaded.metadata
    retained = read_prompts(prompts_file) if prompts_file is not None else None
    source = base if isinstance(base, str | Path) else None
    base_id = base.id if base is not None and source is None else str(source or "")  # type: ignore[union-attr]
    if base is None:
        if metadata is None:
            raise EvaluationError(
                f"{loaded.source} does not say what base it was made for: name one with --base"
            )
        source = base_id = metadata.base if metadata.parts else metadata.parsed_recipe.base
    chosen = resolve_suite(loaded, suite, base_id, concept=concept, first_seed=seed)
    given: Detector | None = None
    if isinstance(detector, str):
        chosen = with_detector(chosen, detector, label)
    elif detector is not None or label is not None:
        given = detector
        chosen = chosen.with_changes(label=label or chosen.label)
    if retained is not None:
        chosen = chosen.with_changes(retained=retained)
    count = pictures if retained is None else len(retained)
    for name in metrics or ():
        if name not in METRICS:
            raise unknown_name("metric", name, METRICS)
    check_names(checks)
    several = metadata is not None and metadata.by_concept
    if several and card:
        raise EvaluationError(
            f"patch {loaded.name} is judged by each of its concepts, and its card tells no figures: leave "
            f"them in {EVIDENCE_NAME}"
        )
    folder = folder_of(loaded, Path(out).expanduser() if out is not None else weights.parent, chosen.concept)
    found = _attack_folders(weights, attacks, chosen.concept if several else None)
    told = _attack_figures(weights, found, folder)
    place = process_device(device)
    if source is not None:
        recorded = "fp32" if metadata is None or metadata.parts else metadata.parsed_recipe.precision
        exact = precision or recorded
        base = load_base(source, precision=exact, device=place)
    assert base is not None and not isinstance(base, str | Path)
    if retained is not None:
        _check_lengths(base, retained, prompts_file or "")
    store = None if cache is False else PictureCache(default_cache() if cache is None else cache)
    measured = measure(
        loaded,
        base,
        chosen,
        metrics=metrics,
        pictures=pictures,
        retained_pictures=count,
        checks=checks,
        check_pictures=check_pictures,
        detector=given,
        clip=clip,
        cache=store,
        batch_size=batch_size,
        device=place,
        progress=progress,
        command=_command(
            chosen, metrics, checks, pictures, base.id, detector, label, prompts=retained is not None
        ),
    )
    state = processes()
    if measured is not None:
        evidence = Evidence(**{**measured.evidence.model_dump(), "attacks": told})
        _write(evidence, loaded, measured.pictures, folder, card)
    if state is not None:
        state.wait_for_everyone()
    return Evidence.load(folder)


def with_detector(suite: Suite, detector: str, label: str | None = None) -> Suite:
    """A suite judged by another detector.

    Args:
        suite: the suite.
        detector: a name of :data:`DETECTORS`, with the source of its
            weights behind a colon where it takes one.
        label: what it calls the concept; None: as the suite says.

    Raises:
        UnknownNameError: no such detector.
        EvaluationError: it takes no source.
    """
    name, colon, source = detector.partition(":")
    name = name.strip().casefold()
    if name not in DETECTORS:
        raise unknown_name("detector", name, DETECTORS.names())
    options = dict(suite.detector_options) if name == suite.detector else {}
    if colon:
        key = {"clip": "clip", "image-classifier": "source"}.get(name)
        if key is None or not source.strip():
            raise EvaluationError(
                f"the detector {name} takes no source: only clip:FOLDER and image-classifier:FOLDER do"
                if key is None
                else f"the source of the detector {name} is empty in '{detector}'"
            )
        options[key] = source.strip()
    if label is not None and "labels" in options:
        options["labels"] = list(dict.fromkeys([label, *options["labels"]]))
    return suite.with_changes(detector=name, detector_options=options, label=label or suite.label)


def _published(suite: Suite) -> dict[str, Any]:
    """The suite as evidence tells of it: of folders only their names."""
    found: dict[str, Any] = suite.model_dump(mode="json")
    for key in ("clip", "source"):
        if isinstance(found["detector_options"].get(key), str):
            found["detector_options"][key] = short_name(found["detector_options"][key])
    return found


def _command(
    suite: Suite,
    metrics: Sequence[str] | None,
    checks: Sequence[str],
    pictures: int,
    base_id: str,
    detector: str | Detector | None,
    label: str | None,
    *,
    prompts: bool,
) -> str:
    """The command line that measures the same; folders are left for the reader to name."""
    words = ["recare-patch", "evaluate", "--patch", "FOLDER"]
    if base_id != "atelier":
        words += ["--base", shlex.quote(base_id)]
    if suite.name in [info.name for info in list_suites()]:
        words += ["--suite", suite.name]
    for name in metrics or ():
        words += ["--metric", name]
    for name in checks:
        words += ["--check", name]
    words += ["--pictures", str(pictures)]
    if isinstance(detector, str):
        name, colon, source = detector.partition(":")
        words += ["--detector", shlex.quote(f"{name}{colon}{short_name(source) if source else ''}")]
    if label is not None:
        words += ["--label", shlex.quote(label)]
    return " ".join([*words, "--prompts FILE"] if prompts else words)


# ------------------------------------------------------------------------ saved attacks


def _attack_folders(
    weights: Path, given: Sequence[Path | str] | None, concept: str | None
) -> list[tuple[Path, bool]]:
    """Folders of saved attacks, and whether they were asked for by name.

    Those on a patch of several concepts lie in a folder for each, of which one is told of.
    """
    if given is None:
        beside = [weights.parent / "attacks", weights.parent.with_name(f"{weights.parent.name}-attacks")]
        if concept is not None:
            beside = [place / slug_of(concept) for place in beside]
        return [(file.parent, False) for place in beside for file in sorted(place.glob(f"*/{JSON_NAME}"))]
    found = []
    for place in map(Path, given):
        inner = [place] if (place / JSON_NAME).is_file() else []
        inner = inner or [file.parent for file in sorted(place.glob(f"*/{JSON_NAME}"))]
        # A folder without any is told of by the reader of attacks.
        found += [(one, True) for one in inner or [place]]
    return found


def _attack_figures(weights: Path, folders: Sequence[tuple[Path, bool]], out: Path) -> list[AttackFigure]:
    figures = []
    sha256 = file_sha256(weights)
    for folder, asked in folders:
        about = load_about(folder)
        if about.get("patch_sha256") != sha256:
            told = f"the saved attack in {folder} was run against another patch"
            if asked:
                raise EvidenceError(told)
            logger.warning("%s: it is left out", told)
            continue
        result = load_attack(folder)
        figures.append(
            AttackFigure(
                attack=result.attack,
                preset=str(about.get("preset", "")),
                successes=result.successes,
                trials=result.trials,
                interval=result.interval,
                without=result.without,
                base=result.base,
                evaluations=result.evaluations,
                seconds=result.seconds,
                detector=about.get("detector"),
                budget=result.budget,
                folder=Path(os.path.relpath(folder, out)).as_posix(),
            )
        )
    return figures


# ------------------------------------------------------------------------ writing


def _write(
    evidence: Evidence, patch: Patch, pictures: dict[str, list[Comparison]], folder: Path, card: bool
) -> None:
    patch_folder = _weights_file(patch).parent
    training = _training(patch_folder)
    write_report(evidence, folder, pictures, training)
    file = patch_folder / CARD_NAME
    text = file.read_text(encoding="utf-8") if file.is_file() else None
    beside = folder.resolve() == patch_folder.resolve()
    if text is not None and beside and claimed_figures(text) != (None, None):
        # A card that told figures before must not go on telling the old ones.
        card = True
    if card:
        text = _new_card(patch, training or {}) if text is None else text
        write_text(file, with_evidence(text, evidence))
        # A card's claims are held against the evidence beside it.
        evidence.save(patch_folder / EVIDENCE_NAME)
    evidence.save(folder / EVIDENCE_NAME)


def _new_card(patch: Patch, training: dict[str, Any]) -> str:
    """A card for a patch that has none; without metadata nothing can be said of it."""
    if patch.metadata is None:
        return "\n"
    previews = [name for name in ("preview.png",) if (_weights_file(patch).parent / name).is_file()]
    return card_text(patch.metadata, training, previews=previews)


def _training(patch_folder: Path) -> dict[str, Any] | None:
    try:
        found = json.loads((patch_folder / "training.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


# ------------------------------------------------------------------------ once more


def measure_again(
    evidence: Evidence,
    patch: Patch,
    base: BaseModel,
    *,
    figures: Sequence[str] | None = None,
    pictures: int | None = None,
    clip: Clip | str | None = None,
    cache: Path | str | None = None,
    device: str = "auto",
    progress: Progress | None = None,
) -> Evidence:
    """What evidence tells, measured anew with its own suite, seeds and picture counts.

    Args:
        evidence: the recorded one.
        patch, base: what it speaks of.
        figures: names of the figures to measure; None: all.
        pictures: of each figure; None: as many as recorded.
        clip: None: the recipe's.
        cache: folder of pictures; None keeps none, so that each is drawn anew.
        device, progress: see :func:`measure`.

    Raises:
        EvidenceError: the evidence is of another patch.
        RecarePatchError: it cannot be measured as recorded.
    """
    evidence.check_patch(file_sha256(_weights_file(patch)), str(patch.source))
    suite = Suite(**evidence.suite)
    options = evidence.options
    recorded = int(options.get("pictures", PICTURES))
    retained = int(options.get("retained_pictures", recorded))
    found = measure(
        patch,
        base,
        suite,
        metrics=options.get("metrics"),
        pictures=recorded if pictures is None else pictures,
        retained_pictures=retained if pictures is None else min(pictures, retained),
        figures=figures,
        clip=clip,
        cache=None if cache is None else PictureCache(cache),
        batch_size=options.get("batch_size"),
        device=device,
        progress=progress,
        command=evidence.command,
    )
    assert found is not None, "verification runs in one process"
    return found.evidence
