"""Bases on the model hub: their configurations first, then those weights that a run reads, or one true sentence.

What is in the hub's cache is used where the hub does not answer, refuses, or has lost the repository.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from recare_patch.core import BaseModelError, read_json, read_text
from recare_patch.models.layout import MOVED, SMALL, Layout, family_of, read_layout

if TYPE_CHECKING:
    from recare_patch.models.latent_diffusion import LatentDiffusion

logger = logging.getLogger(__name__)

PATIENCE = 5.0
"""Seconds that the hub is waited for, where ``HF_HUB_ETAG_TIMEOUT`` sets no other time."""

_NOT_FETCHED = ("safety_checker", "feature_extractor", "image_encoder")
"""Components that neither a run nor a merged base reads."""


def published(hub_id: str) -> Layout | None:
    """The layout of a well-known base from its published configurations, which lie beside this module."""
    names = [hub_id, MOVED.get(hub_id, hub_id)]
    found = next((_published()["bases"][name] for name in names if name in _published()["bases"]), None)
    if found is None:
        return None
    kinds, configs = _published()["configs"], found["configs"]
    index = {"_class_name": found["class"], **found.get("index", {})}
    read: dict[str, dict[str, Any]] = {}
    for component, (library, kind, config) in configs.items():
        index[component] = [library, kind]
        read[component] = dict(kinds[config])
    # The folder is never there: nothing but the configurations is known.
    return Layout(Path(__file__).parent / "published" / hub_id, f"'{hub_id}'", index, read, listing=())


@cache
def _published() -> dict[str, Any]:
    file = Path(__file__).with_name("published.json")
    found: dict[str, Any] = read_json(file, f"the package's {file.name}", BaseModelError)
    return found


def _names(hub_id: str) -> list[str]:
    """A repository's name, and the others that it has or had."""
    new = MOVED.get(hub_id, hub_id)
    return list(dict.fromkeys([hub_id, new, *(old for old, now in MOVED.items() if now == new)]))


def snapshots(hub_id: str, *, first: str = "main") -> list[Path]:
    """The states of a repository in the hub's cache, first that of a revision, then the newest."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / f"models--{hub_id.replace('/', '--')}"
    ref = folder / "refs" / first
    commit = read_text(ref, f"the cache's {ref}", BaseModelError).strip() if ref.is_file() else first
    there = [one for one in (folder / "snapshots").glob("*") if one.is_dir()]
    return sorted(there, key=lambda one: (one.name != commit, -one.stat().st_mtime))


def cached_folders(hub_id: str) -> list[Path]:
    """The states of a pipeline in the hub's cache, under all names that its repository had."""
    found = [one for name in _names(hub_id) for one in snapshots(name)]
    return [one for one in found if (one / "model_index.json").is_file()]


def _complete(layout: Layout, weights: bool) -> BaseModelError | None:
    """What is wrong with a layout in the cache, or lacking."""
    try:
        family_of(layout).check(layout, weights=weights)
    except BaseModelError as fault:
        return fault
    return None


def cached_layout(hub_id: str) -> Layout | None:
    """The layout of a pipeline in the hub's cache, where the configurations of all that is read are there."""
    layouts = (read_layout(folder, f"'{hub_id}'") for folder in cached_folders(hub_id))
    return next((layout for layout in layouts if _complete(layout, weights=False) is None), None)


def fetch(hub_id: str, *, weights: bool = True, whole: bool = False) -> Path:
    """Bring a pipeline into the hub's cache and return its folder there.

    Args:
        hub_id: ``owner/name``.
        weights: fetch those too, after the configurations have shown that the base can be patched.
        whole: with the components that the pipeline lists and a patch does not need, such as T5.

    Raises:
        BaseModelError: it is of no supported family, has no safetensors, or cannot be fetched.
    """
    if len(_names(hub_id)) > 1:
        # Those that moved do not change any more, and need not be fetched again from their new place.
        for folder in cached_folders(hub_id):
            if _complete(read_layout(folder, f"'{hub_id}'"), weights) is None:
                return folder
    try:
        sha, files = ask_hub(hub_id)
    except Exception as fault:
        return _from_cache(hub_id, fault, weights)
    if "model_index.json" not in files:
        raise BaseModelError(_no_pipeline(hub_id, files))
    try:
        small = [name for name in files if name.endswith(SMALL) and _is_of_component(name)]
        folder = _bring(hub_id, sha, files, small)
        layout = read_layout(folder, f"'{hub_id}'", listing=files)
        if not weights:
            return folder
        family = family_of(layout)
        family.check(layout)
        _bring(hub_id, sha, files, _wanted(layout, family, whole))
    except BaseModelError:
        raise
    except Exception as fault:
        return _from_cache(hub_id, fault, weights)
    return folder


def _is_of_component(name: str) -> bool:
    """Whether a file is the pipeline's index, or lies directly in a component's folder and is no shards' index."""
    return name == "model_index.json" or (name.count("/") == 1 and ".index." not in name)


class HubFile(NamedTuple):
    """A file of a repository."""

    size: int  # bytes; 0 where unknown
    blob: str | None  # its name among the cache's blobs


def ask_hub(hub_id: str, revision: str | None = None) -> tuple[str, dict[str, HubFile]]:
    """The commit of a repository's revision, by default main, and its files by their paths.

    Whatever the hub's client raises comes through; :func:`told` says what it means.
    """
    from huggingface_hub import HfApi, constants

    waited = float(constants.HF_HUB_ETAG_TIMEOUT) if "HF_HUB_ETAG_TIMEOUT" in os.environ else PATIENCE
    found = HfApi().model_info(hub_id, revision=revision, timeout=waited, files_metadata=True)
    files = found.siblings or []
    return str(found.sha), {
        one.rfilename: HubFile(one.size or 0, one.lfs["sha256"] if one.lfs else one.blob_id) for one in files
    }


def _wanted(layout: Layout, family: type[LatentDiffusion], whole: bool) -> list[str]:
    """The names of the files with weights that are read: of each component the first variant, or one that is here."""
    parts = family.networks_read(layout)
    if whole:
        parts = [part for part in layout.listed if part not in _NOT_FETCHED]
    wanted: list[Path] = []
    for part in parts:
        sets = layout.weight_sets(part)
        here = [name for name, files in sets.items() if all(file.is_file() for file in files)]
        chosen = next(iter(here or sets), None)
        if chosen is None:
            continue
        if here and chosen != next(iter(sets)):
            logger.info(
                "base %s: the %s weights of its %s are taken, which are here already", layout.name, chosen, part
            )
        wanted += sets[chosen]
        # Without the index of its shards, other libraries do not find them.
        wanted += [one for one in layout.files(part) if ".index." in one.name and one.name.endswith(".json")]
    return [file.relative_to(layout.folder).as_posix() for file in wanted]


def _bring(hub_id: str, sha: str, files: Mapping[str, HubFile], names: Sequence[str]) -> Path:
    """Fetch files of a commit that are not in the cache; its folder there."""
    from huggingface_hub import constants, snapshot_download

    place = Path(constants.HF_HUB_CACHE)
    repository = place / f"models--{hub_id.replace('/', '--')}"
    missing = [name for name in names if not (repository / "snapshots" / sha / name).is_file()]
    if not missing:
        return repository / "snapshots" / sha
    there = next(one for one in (place, *place.parents) if one.is_dir())
    free, needed = shutil.disk_usage(there).free, sum(_left(repository / "blobs", files[name]) for name in missing)
    if needed > free:
        raise BaseModelError(
            f"base {hub_id} takes {needed / 1e9:.1f} GB more in the hub's cache, and {free / 1e9:.1f} GB are free at "
            f"{there}: make room, or name another place in HF_HUB_CACHE"
        )
    # Brackets in names would be read as patterns.
    return Path(snapshot_download(hub_id, allow_patterns=[name.replace("[", "[[]") for name in missing]))


def _left(blobs: Path, file: HubFile) -> int:
    """Bytes of a file that another commit, or a fetch that broke off, has not brought already."""
    there = blobs.glob(f"{file.blob}*") if file.blob else ()
    return max(0, file.size - max((one.stat().st_size for one in there), default=0))


def _no_pipeline(hub_id: str, names: Iterable[str]) -> str:
    single = next((name for name in names if name.endswith(".safetensors") and "/" not in name), None)
    hint = "" if single is None else f"; fetch a checkpoint of it, `hf download {hub_id} {single}`, and name that file"
    return f"base {hub_id} is no diffusers pipeline: its repository has no model_index.json{hint}"


def _from_cache(hub_id: str, fault: Exception, weights: bool) -> Path:
    """The folder in the cache where it is complete; else the fault as a BaseModelError."""
    reason, lacking = told(fault, hub_id), None
    for folder in cached_folders(hub_id):
        missing = _complete(read_layout(folder, f"'{hub_id}'"), weights)
        if missing is None:
            logger.info("base %s is taken from the hub's cache: %s", hub_id, reason)
            return folder
        lacking = lacking or missing
    if lacking is None:
        raise BaseModelError(f"base {hub_id} is not in the hub's cache, and {reason}") from fault
    raise BaseModelError(f"{lacking} in the hub's cache, and {reason}") from fault


def told(fault: BaseException, hub_id: str) -> str:
    """What a fault of the hub's client means, as a clause with the remedy."""
    from huggingface_hub import constants, errors

    chain: list[BaseException] = []
    step: BaseException | None = fault
    while step is not None and step not in chain:
        chain.append(step)
        step = step.__cause__ or step.__context__
    gone = "the hub has no such repository, or it is private and needs `hf auth login`"
    if hub_id in MOVED:
        gone = f"it is gone from the hub: its files are now at {MOVED[hub_id]}, which can be named instead"
    known = (
        (
            errors.GatedRepoError,
            f"it is gated: accept its licence at {constants.ENDPOINT}/{hub_id}, then log in here with `hf auth login`",
        ),
        (errors.RepositoryNotFoundError, gone),
        (errors.RevisionNotFoundError, "its repository on the hub has no such revision, or is empty"),
        (errors.DisabledRepoError, "the hub has disabled access to it"),
        (errors.OfflineModeIsEnabled, "HF_HUB_OFFLINE forbids to ask the hub"),
    )
    for kind, clause in known:
        if any(isinstance(one, kind) for one in chain):
            return clause
    if any(isinstance(one, PermissionError) and one.filename for one in chain):
        return f"the hub's cache at {constants.HF_HUB_CACHE} cannot be written to"
    if any(isinstance(one, OSError) and one.errno == errno.ENOSPC for one in chain):
        return f"there is no room left at {constants.HF_HUB_CACHE}: make room, or name another place in HF_HUB_CACHE"
    status = next((one.response.status_code for one in chain if isinstance(one, errors.HfHubHTTPError)), None)
    if status == 401:
        return "the hub does not accept your token: log in anew with `hf auth login`"
    if status == 403:
        return f"your token may not read it: see {constants.ENDPOINT}/{hub_id}"
    if status is not None:
        return f"the hub at {constants.ENDPOINT} answers with error {status}: try again later"
    said = next((one.strerror for one in chain if isinstance(one, OSError) and one.strerror), None)
    lines = (said or str(fault)).strip().splitlines() or [type(fault).__name__]
    return f"the hub at {constants.ENDPOINT} cannot be reached or broke off ({lines[0].rstrip('.')})"
