"""Fetching a patch from the Hub: a pinned commit, known files only, whole or not at all."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recare_patch.core import (
    HubError,
    NullProgress,
    OutputError,
    PatchError,
    Progress,
    claim_folder,
    file_sha256,
    output_error,
    write_json,
)
from recare_patch.measure import check_integrity, default_cache, write_report
from recare_patch.patch import (
    PREVIEW_NAME,
    RECORD_NAME,
    Patch,
    SharedFile,
    all_names,
    git_hash,
    previews_of,
    report_names,
    text_names,
)
from recare_patch.recipe import WEIGHTS_NAME
from recare_patch.share.hub import Address, check_commit, client, endpoint, is_commit, one_line, talking

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile, RepoFolder

_MOST_FILES = 10_000
_MOST_TEXT, _MOST_PICTURE, _MOST_WEIGHTS = 64_000_000, 100_000_000, 8_000_000_000
"""Bytes; whatever is larger is no patch."""

_MOST_PIXELS = 50_000_000
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class Pulled:
    """A patch that was fetched.

    Attributes:
        folder: where it is now.
        repo: OWNER/NAME.
        commit: that it was taken from.
        files: as they were taken.
        left: names in the repo that were not taken.
        fresh: whether it was fetched now; otherwise it was here already, unchanged.
        same_base: whether the base at hand has the very weights that it was made for; ``None`` where no
            base was held against it.
    """

    folder: Path
    repo: str
    commit: str
    files: tuple[SharedFile, ...]
    left: tuple[str, ...] = ()
    fresh: bool = True
    same_base: bool | None = None


def pull(
    repo: str,
    out: str | Path | None = None,
    *,
    revision: str | None = None,
    base: str | Path | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Pulled:
    """Fetch a patch from the Hub into a folder that is whole or absent.

    The revision is resolved to a commit, and everything is taken from that. Only files that a patch
    has are taken, by their known names: weights, kohya file, card, recipe, CARE-set, records, evidence and
    preview; no pickle, no code, no page. Each is held against the hash that the Hub lists, then the files
    against each other; a report is made here from the evidence. ``hub.json`` tells where it came from.

    A call that was interrupted is finished by the next: files that are there already are not fetched again.

    Args:
        repo: OWNER/NAME, or OWNER/NAME@REVISION.
        out: the folder, absent or empty; by default the repo's name, here.
        revision: branch, tag or commit; by default the newest of the main branch.
        base: a base model that the patch must fit.
        device: for the base.
        progress: told of the files.

    Raises:
        HubError: no connection, no such repo or revision, no right to see it, or no patch in it.
        PatchError: its files do not hold.
        IncompatiblePatchError: it does not fit the base.
        OutputError: the folder is there already, or cannot be written.
    """
    address = Address.parse(repo)
    if revision is not None and address.revision is not None:
        raise HubError(f"two revisions were given, {address.revision!r} and {revision!r}: give one")
    wanted = revision or address.revision
    folder = Path(out).expanduser() if out is not None else Path(address.name)
    api = client()
    commit = _commit(api, address.repo, wanted)
    there = _found(folder, address.repo, commit)
    if there is not None:
        return _held_against(there, base, device)
    _check_free(folder)
    listed = _listed(api, address.repo, commit)
    # The lock lies beside the files, so that it does not move with them.
    beside = folder.resolve()
    work = beside.with_name(f".{beside.name}.pull")
    try:
        with claim_folder(work, resume=True), _kept_for_resuming(work / "files") as place:
            names, left = _fetch(api, address.repo, commit, place, listed, progress or NullProgress())
            try:
                files = _checked(place, address.repo, commit, names)
                told = Pulled(folder, address.repo, commit, files, left)
                told = _held_against(told, base, device, place)
                _record(place, told, wanted)
            except BaseException:
                shutil.rmtree(place, ignore_errors=True)
                raise
            _move(place, folder)
    finally:
        with contextlib.suppress(OSError):
            work.rmdir()
    return told


def fetched(text: str, progress: Progress | None = None) -> Path:
    """The folder of a patch on the Hub, fetched into the user's cache if it is not there.

    Args:
        text: "hub:OWNER/NAME" or "hub:OWNER/NAME@REVISION". A whole commit that was fetched before is not
            asked for again.
        progress: told of the files.

    Raises:
        HubError, PatchError, OutputError: see :func:`pull`.
    """
    address = Address.parse(text)
    shelf = default_cache().parent / "hub" / address.repo.replace("/", "--")
    commit = (
        address.revision if is_commit(address.revision) else _commit(client(), address.repo, address.revision)
    )
    assert commit is not None
    folder = shelf / commit
    if _found(folder, address.repo, commit) is None:
        # What no longer is what was fetched is no use, and it is only a copy.
        shutil.rmtree(folder, ignore_errors=True)
        pull(address.repo, folder, revision=commit, progress=progress)
    return folder


# ---------------------------------------------------------------------- places


@contextlib.contextmanager
def _kept_for_resuming(place: Path) -> Iterator[Path]:
    """A folder that outlives an interruption as long as there is a file in it."""
    try:
        if place.is_symlink():
            place.unlink()
        place.mkdir(exist_ok=True)
    except OSError as fault:
        raise output_error(place, fault) from fault
    try:
        yield place
    finally:
        if place.is_dir() and not any(one.is_file() for one in place.iterdir()):
            shutil.rmtree(place, ignore_errors=True)


def _found(folder: Path, repo: str, commit: str) -> Pulled | None:
    """What is in the folder already, if it is this very commit and unchanged."""
    try:
        told = json.loads((folder / RECORD_NAME).read_text(encoding="utf-8"))
        files = tuple(SharedFile(name, one["bytes"], one["sha256"]) for name, one in told["files"].items())
        same = (told["repo"], told["commit"]) == (repo, commit)
        same = same and all(SharedFile.of(folder, one.name) == one for one in files)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, PatchError):
        return None
    return Pulled(folder, repo, commit, files, fresh=False) if same else None


def _check_free(folder: Path) -> None:
    """Refuse a place where something lies already.

    Raises:
        OutputError: it does.
    """
    if folder.is_dir():
        if any(folder.iterdir()):
            raise OutputError(f"{folder} holds other files: choose another --out, or remove it")
    elif os.path.lexists(folder):
        raise OutputError(f"cannot write {folder}: there is a file or a link of that name")


def _move(place: Path, folder: Path) -> None:
    try:
        if folder.is_dir():
            # An empty one; anything that came into it meanwhile keeps it.
            folder.rmdir()
        place.rename(folder)
    except OSError as fault:
        raise output_error(folder, fault) from fault


def _record(place: Path, told: Pulled, revision: str | None) -> None:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    files = {one.name: {"bytes": one.bytes, "sha256": one.sha256} for one in told.files}
    record: dict[str, Any] = {
        "repo": told.repo,
        "commit": told.commit,
        "revision": revision or "main",
        "endpoint": endpoint(),
        "fetched": now,
        "files": files,
    }
    write_json(place / RECORD_NAME, record)


# ---------------------------------------------------------------------- fetching


def _commit(api: HfApi, repo: str, revision: str | None) -> str:
    with talking(repo):
        return check_commit(api.model_info(repo, revision=revision, timeout=60).sha)


def _listed(api: HfApi, repo: str, commit: str) -> dict[str, RepoFile | RepoFolder]:
    """What lies in a repo; refused where a patch cannot be taken from it.

    Raises:
        HubError: there is none, or a name leads out of it.
    """
    with talking(repo):
        listed = {
            one.path: one
            for one in islice(api.list_repo_tree(repo, recursive=True, revision=commit), _MOST_FILES)
        }
    _check_names(listed, repo)
    files = _files(listed)
    if WEIGHTS_NAME not in files:
        pickled = sorted(name for name in files if name.endswith(_PICKLES))
        raise HubError(
            f"{repo} holds no patch: {WEIGHTS_NAME} is not in it"
            + (f", and its pickle {pickled[0]} is never opened" if pickled else "")
        )
    return listed


def _files(listed: Mapping[str, RepoFile | RepoFolder]) -> dict[str, RepoFile]:
    return {name: one for name, one in listed.items() if hasattr(one, "blob_id")}


def _fetch(
    api: HfApi,
    repo: str,
    commit: str,
    place: Path,
    listed: Mapping[str, RepoFile | RepoFolder],
    progress: Progress,
) -> tuple[dict[str, RepoFile], tuple[str, ...]]:
    """Fetch what belongs to a patch; returns it by name, and the names that were left."""
    files = _files(listed)
    # The weights say which other files there may be.
    _check_size(files[WEIGHTS_NAME], repo, _MOST_WEIGHTS)
    _take(api, repo, commit, place, files[WEIGHTS_NAME])
    patch = _weights(place / WEIGHTS_NAME, repo)
    pages, texts = report_names(patch), text_names(patch)
    taken = [name for name in all_names(patch) if name in files and name not in pages]
    for name in taken:
        weights = name.endswith(".safetensors")
        most = _MOST_TEXT if name in texts else _MOST_WEIGHTS if weights else _MOST_PICTURE
        _check_size(files[name], repo, most)
    for number, name in enumerate(taken):
        progress.update("fetch", number, len(taken), name)
        if number:
            _take(api, repo, commit, place, files[name])
    progress.update("fetch", len(taken), len(taken))
    left = sorted(one_line(name) for name in files if name not in (*taken, ".gitattributes"))
    return {name: files[name] for name in taken}, tuple(left)


def _check_names(names: Iterable[str], repo: str) -> None:
    """Refuse a repo whose names lead out of it: such a listing was made to harm.

    Raises:
        HubError: one does.
    """
    for name in names:
        parts = name.replace("\\", "/").split("/")
        if not name.isprintable() or {"", ".", ".."} & set(parts) or re.match("[A-Za-z]:", name):
            raise HubError(
                f"{repo} lists a file {one_line(ascii(name))}, which leads out of its folder: not fetched"
            )


def _check_size(one: RepoFile, repo: str, most: int) -> None:
    if not isinstance(one.size, int) or not 0 <= one.size <= most:
        raise HubError(f"{repo} has a {one.path} of {one.size} bytes, and at most {most} are fetched")


def _take(api: HfApi, repo: str, commit: str, place: Path, listed: RepoFile) -> None:
    """Fetch a file and hold it against the Hub's listing.

    Raises:
        HubError: it is not what was listed; it is removed, so that the next call fetches it anew.
    """
    file = place / listed.path
    with talking(repo, file):
        api.hf_hub_download(repo, listed.path, revision=commit, local_dir=place)
    if file.is_symlink() or not file.is_file():
        file.unlink(missing_ok=True)
        raise HubError(f"{file} has become a link while it was fetched")
    if listed.lfs is not None:
        told, found = listed.lfs.sha256, file_sha256(file)
    else:
        told, found = listed.blob_id, git_hash(file)
    if told != found:
        file.unlink()
        raise HubError(
            f"what came as {listed.path} is not what {repo} lists: its hash is {found[:12]}…, not "
            f"{one_line(told)[:12]}…; call again to fetch it anew"
        )


def _weights(file: Path, repo: str) -> Patch:
    try:
        return Patch.load(file)
    except PatchError as fault:
        file.unlink(missing_ok=True)
        raise PatchError(f"{repo} holds no sound patch: {fault}".replace(f"{file.parent}/", "")) from None


# ---------------------------------------------------------------------- checking


def _checked(place: Path, repo: str, commit: str, names: Mapping[str, RepoFile]) -> tuple[SharedFile, ...]:
    """Hold the files against each other; leaves nothing in the folder but them and reports.

    Raises:
        PatchError: they do not agree.
    """
    _clear(place, names)
    sound = check_integrity(place)
    if sound.failed:
        told = "; ".join(f"{one.about}: {one.told}" for one in sound.failed)
        raise PatchError(
            f"{repo} at {commit[:12]} does not hold, so it is not kept: {told}".replace(f"{place}/", "")
        )
    if PREVIEW_NAME in names:
        _check_picture(place / PREVIEW_NAME, repo)
    found = tuple(SharedFile.of(place, name) for name in names)
    for record in sound.records:
        if record.evidence is not None:
            # A stranger's page could run scripts in the reader's browser: this one is ours.
            write_report(record.evidence, record.folder, previews_of(place))
    return found


def _clear(place: Path, names: Mapping[str, RepoFile]) -> None:
    """Remove the client's own notes, and what an interrupted call took of another commit."""
    tops = {name.split("/")[0] for name in names}
    for entry in [*place.iterdir(), *place.glob("*/*")]:
        name = entry.relative_to(place).as_posix()
        if name not in names and name not in tops:
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink(
                missing_ok=True
            )


def _check_picture(file: Path, repo: str) -> None:
    """Refuse a preview that is no picture, or one that swells beyond measure when it is opened."""
    from PIL import Image

    try:
        with Image.open(file, formats=("PNG",)) as picture:
            width, height = picture.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise PatchError(f"{repo} has a {file.name} that is no PNG picture") from None
    if width * height > _MOST_PIXELS:
        raise PatchError(f"{repo} has a {file.name} of {width}x{height} pixels, too large to be a preview")


def _held_against(told: Pulled, base: str | Path | None, device: str, place: Path | None = None) -> Pulled:
    """Hold the patch against a base, if one is given.

    Raises:
        IncompatiblePatchError: it does not fit.
    """
    if base is None:
        return told
    from recare_patch.models import load_base

    same = Patch.load(place or told.folder).check_base(load_base(str(base), device=device))
    return replace(told, same_base=same)
