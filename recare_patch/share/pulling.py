"""Fetching a patch from the Hub: a pinned commit, known files only, whole or not at all."""

from __future__ import annotations

import datetime
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from recare_patch.combine.stacking import new_folder
from recare_patch.core import (
    MOST_PICTURE,
    MOST_TEXT,
    MOST_WEIGHTS,
    HubError,
    NullProgress,
    OutputError,
    PatchError,
    Progress,
    inside,
    read_json,
    read_picture,
    write_json,
)
from recare_patch.measure import check_integrity, default_cache, write_report
from recare_patch.models import load_base
from recare_patch.patch import (
    PREVIEW_NAME,
    RECORD_NAME,
    Patch,
    SharedFile,
    all_names,
    previews_of,
    report_names,
    text_names,
)
from recare_patch.recipe import WEIGHTS_NAME
from recare_patch.share.hub import Address, client, commit_of, endpoint, is_listed, listed_files, one_line, talking

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class Pulled:
    """A patch that was fetched."""

    folder: Path
    repo: str
    commit: str
    files: tuple[SharedFile, ...]  # As they were taken.
    left: tuple[str, ...] = ()  # Names in the repo that were not taken.
    fresh: bool = True  # Otherwise it was here already, unchanged.
    same_base: bool | None = None  # Whether the base at hand has the very weights that it was made for.


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

    The revision is resolved to a commit. Only files that a patch has are taken, by their known names: no
    pickle, no code, no page. Each is held against the hash that the Hub lists, then the files against each
    other; a report is made here from the evidence. ``hub.json`` tells where it came from. A call that was
    interrupted is finished by the next, from huggingface_hub's cache.

    Args:
        repo: OWNER/NAME, or OWNER/NAME@REVISION.
        out: the folder, absent or empty; by default the repo's name, here.
        revision: branch, tag or commit; by default the newest of the main branch.
        base, device: a base model that the patch must fit, and where it is held against it.
        progress: told of the files.

    Raises:
        HubError: no connection, no such repo or revision, no right to see it, or no patch in it.
        PatchError: its files do not hold, or do not fit the base.
        OutputError: the folder is there already, or cannot be written.
    """
    address = Address.parse(repo)
    if revision is not None and address.revision is not None:
        raise HubError(f"two revisions were given, {address.revision!r} and {revision!r}: give one")
    repo, wanted = address.repo, revision or address.revision
    folder = Path(out).expanduser() if out is not None else Path(repo.split("/")[1])
    api = client()
    commit = commit_of(api, repo, wanted)
    if (there := _there(folder, repo, commit)) is not None:
        return replace(there, same_base=_fits(folder, base, device))
    if folder.is_symlink():
        raise OutputError(f"cannot write {folder}: there is a link of that name")
    with new_folder(folder) as place:
        try:
            names, left = _fetch(api, repo, commit, place, progress or NullProgress())
            _check(place)
            files = tuple(SharedFile.of(place, name) for name in names)
        except PatchError as fault:
            # The reader knows the repo, not where its copy lay.
            told = str(fault).replace(f"{place}/", "")
            raise PatchError(f"{repo} at {commit[:12]} holds no sound patch: {told}") from None
        same_base = _fits(place, base, device)
        record = {
            "repo": repo,
            "commit": commit,
            "revision": wanted or "main",
            "endpoint": endpoint(),
            "fetched": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "files": {one.name: {"bytes": one.bytes, "sha256": one.sha256} for one in files},
        }
        write_json(place / RECORD_NAME, record)
    return Pulled(folder, repo, commit, files, left, same_base=same_base)


def fetched(text: str, progress: Progress | None = None) -> Path:
    """The folder of "hub:OWNER/NAME" or "hub:OWNER/NAME@REVISION" in the user's cache; see :func:`pull`.

    A whole commit that was fetched before is not asked for again.
    """
    address = Address.parse(text)
    commit = address.commit or commit_of(client(), address.repo, address.revision)
    folder = default_cache().parent / "hub" / address.repo.replace("/", "--") / commit
    if _there(folder, address.repo, commit) is None:
        # What no longer is what was fetched is no use, and it is only a copy.
        shutil.rmtree(folder, ignore_errors=True)
        pull(address.repo, folder, revision=commit, progress=progress)
    return folder


def _there(folder: Path, repo: str, commit: str) -> Pulled | None:
    """What is in the folder already, if it is this very commit and unchanged."""
    try:
        told = read_json(folder / RECORD_NAME, RECORD_NAME, PatchError, within=folder)
        files = tuple(SharedFile(name, one["bytes"], one["sha256"]) for name, one in told["files"].items())
        same = (told["repo"], told["commit"]) == (repo, commit) and all(
            inside(folder / one.name, folder) for one in files
        )
        same = same and all(SharedFile.of(folder, one.name) == one for one in files)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, PatchError):
        return None
    return Pulled(folder, repo, commit, files, fresh=False) if same else None


def _fits(folder: Path, base: str | Path | None, device: str) -> bool | None:
    return None if base is None else Patch.load(folder).check_base(load_base(str(base), device=device))


def _fetch(api: HfApi, repo: str, commit: str, place: Path, progress: Progress) -> tuple[list[str], tuple[str, ...]]:
    """Fetch what belongs to a patch; gives its names, and those that were left."""
    files = listed_files(api, repo, commit)
    _check_names(files, repo)
    if WEIGHTS_NAME not in files:
        pickled = sorted(name for name in files if name.endswith(_PICKLES))
        raise HubError(
            f"{repo} holds no patch: {WEIGHTS_NAME} is not in it"
            + (f", and its pickle {pickled[0]} is never opened" if pickled else "")
        )
    # The weights say which other files there may be.
    _take(api, repo, commit, place, files[WEIGHTS_NAME], MOST_WEIGHTS)
    patch = Patch.load(place / WEIGHTS_NAME)
    names = [name for name in all_names(patch) if name in files and name not in report_names(patch)]
    for number, name in enumerate(names):
        progress.update("fetch", number, len(names), name)
        weights = name.endswith(".safetensors")
        most = MOST_TEXT if name in text_names(patch) else MOST_WEIGHTS if weights else MOST_PICTURE
        if number:
            _take(api, repo, commit, place, files[name], most)
    progress.update("fetch", len(names), len(names))
    left = sorted(one_line(name) for name in files if name not in (*names, ".gitattributes"))
    return names, tuple(left)


def _check_names(names: Iterable[str], repo: str) -> None:
    """Refuse a repo whose names lead out of it: such a listing was made to harm."""
    for name in names:
        parts = name.replace("\\", "/").split("/")
        if not name.isprintable() or {"", ".", ".."} & set(parts) or re.match("[A-Za-z]:", name):
            raise HubError(f"{repo} lists a file {one_line(ascii(name))}, which leads out of its folder: not fetched")


def _take(api: HfApi, repo: str, commit: str, place: Path, listed: RepoFile, most: int) -> None:
    """Fetch a file and hold it against the Hub's listing."""
    name = listed.path
    if not isinstance(listed.size, int) or not 0 <= listed.size <= most:
        raise HubError(f"{repo} has a {name} of {listed.size} bytes, and at most {most} are fetched")
    with talking(repo, name):
        cached = Path(api.hf_hub_download(repo, name, revision=commit))
    (place / name).parent.mkdir(exist_ok=True)
    shutil.copyfile(cached, place / name)
    if not is_listed(listed, place / name):
        cached.resolve().unlink(missing_ok=True)
        raise HubError(f"what came as {name} is not what {repo} lists; call again to fetch it anew")


def _check(place: Path) -> None:
    """Hold the files against each other, and write reports."""
    sound = check_integrity(place)
    if sound.failed:
        raise PatchError("; ".join(f"{one.about}: {one.told}" for one in sound.failed))
    if (place / PREVIEW_NAME).is_file():
        # One that swells beyond measure when it is opened is refused.
        read_picture(place / PREVIEW_NAME, f"its {PREVIEW_NAME}", PatchError, formats=("PNG",))
    for record in sound.records:
        if record.evidence is not None:
            # A stranger's page could run scripts in the reader's browser: this one is ours.
            write_report(record.evidence, record.folder, previews_of(place))
