"""Sending a patch to the Hub: checked as a copy, sent as one commit, private unless asked otherwise."""

from __future__ import annotations

import contextlib
import datetime
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recare_patch import __version__
from recare_patch.core import (
    HubError,
    NullProgress,
    PatchError,
    Progress,
    RecarePatchError,
    read_safetensors_header,
    write_text,
)
from recare_patch.measure import Integrity, check_integrity, with_evidence, write_report
from recare_patch.patch import (
    CARD_NAME,
    PLACE,
    TRAINING_NAME,
    Identity,
    Patch,
    PatchMetadata,
    SharedFile,
    all_names,
    card_text,
    git_hash,
    identity_in,
    is_unsafe,
    join_card,
    kohya_name,
    output_name,
    previews_of,
    report_names,
    split_card,
    text_names,
    write_kohya,
)
from recare_patch.recipe import WEIGHTS_NAME
from recare_patch.share.hub import LOGIN, PREFIX, check_commit, check_repo, client, one_line, talking

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import ModelInfo, RepoFile

_HUB_OWN = (".gitattributes",)
_MOST_FILES = 1000
_LICENSE = r"[a-z0-9][a-z0-9.+-]{1,49}"


@dataclass(frozen=True)
class Pushed:
    """What was sent, or would be.

    Attributes:
        repo: OWNER/NAME; in a dry run without a name, OWNER is not known.
        files: all files of the patch.
        front_matter: the card's header.
        left_out: what lies in the folder and is not sent.
        notes: what the sender should know.
        private: whether others cannot see it.
        commit: the commit that holds it; ``None`` after a dry run.
        url: its page; ``None`` after a dry run.
        sent: names of the files that were not there yet.
        removed: names of those that were taken out, since the patch no longer has them.
    """

    repo: str
    files: tuple[SharedFile, ...]
    front_matter: Mapping[str, Any]
    left_out: tuple[str, ...]
    notes: tuple[str, ...]
    private: bool = True
    commit: str | None = None
    url: str | None = None
    sent: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()

    @property
    def unchanged(self) -> tuple[str, ...]:
        """Names of the files that were there already."""
        return tuple(one.name for one in self.files if one.name not in self.sent)


def push(
    folder: str | Path,
    repo: str | None = None,
    *,
    public: bool = False,
    license_id: str | None = None,
    new_card: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Pushed:
    """Send a patch to the Hub as one commit.

    The files are copied first, and the copy is what is checked and sent: weights in diffusers' and in
    kohya's shape (made if it is missing), card, recipe, CARE-set, evidence, report, records and preview.
    The folder itself stays as it is. A call that was killed is finished by the next: whatever the Hub
    has already is not sent again.

    Args:
        folder: of the patch.
        repo: OWNER/NAME, or NAME alone for the login's own; by default made from what is erased.
        public: let everybody see it; a repo that is public already is refused without this.
        license_id: of the patch, as the Hub calls it; by default that of the base, as far as it is known.
        new_card: write the card anew in place of the one in the folder.
        overwrite: take a repo that holds something else.
        dry_run: send nothing and ask nobody.
        progress: told of the files.

    Raises:
        PatchError: there is no patch, or its files do not hold.
        HubError: not logged in, no right, no connection, or the name is taken by something else.
        OutputError: the disk is full.
    """
    progress = progress or NullProgress()
    if license_id is not None:
        _check_license(license_id)
    with _packed(Path(folder).expanduser(), license_id, new_card) as parcel:
        if dry_run:
            name = repo or parcel.default_name
            parcel.address(check_repo(name if "/" in name else f"OWNER/{name}"))
            return parcel.told(private=not public)
        api = client()
        with talking("this login"):
            login = _login(api)
        name = repo or parcel.default_name
        parcel.address(check_repo(name if "/" in name else f"{login}/{name}"))
        return _send(api, parcel, public=public, overwrite=overwrite, progress=progress)


# ---------------------------------------------------------------------- packing


@dataclass
class _Parcel:
    """A copy of a patch's files, ready to be sent.

    Attributes:
        place: the folder of the copy.
        patch: what it is.
        left_out, notes: see :class:`Pushed`.
        repo: where it goes.
    """

    place: Path
    patch: Patch
    left_out: tuple[str, ...]
    notes: tuple[str, ...]
    repo: str = ""

    @property
    def default_name(self) -> str:
        """What a repo of this patch is called if nobody says otherwise."""
        return output_name(self.patch)

    @property
    def metadata(self) -> PatchMetadata:
        """What the patch says of itself; patches of other make are not sent."""
        assert self.patch.metadata is not None
        return self.patch.metadata

    @property
    def card(self) -> str:
        return (self.place / CARD_NAME).read_text(encoding="utf-8")

    def address(self, repo: str) -> None:
        """Say in the card where the patch will be."""
        self.repo = repo
        card = self.card.replace(f"--patch {PLACE}", f"--patch {PREFIX}{repo}").replace(PLACE, repo)
        write_text(self.place / CARD_NAME, card)

    def files(self) -> tuple[SharedFile, ...]:
        """The weights first."""
        there = [name for name in all_names(self.patch) if (self.place / name).is_file()]
        return tuple(SharedFile.of(self.place, name) for name in there)

    def told(self, **changes: Any) -> Pushed:
        front, _ = split_card(self.card)
        return Pushed(self.repo, self.files(), front, self.left_out, self.notes, **changes)


@contextlib.contextmanager
def _packed(folder: Path, license_id: str | None, new_card: bool) -> Iterator[_Parcel]:
    """Copy what is shared of a patch, complete it, and check the copy.

    What is checked is what is sent: a file that changes meanwhile changes nothing.
    """
    if not (folder / WEIGHTS_NAME).is_file():
        # It says what is missing, or that there is a pickle.
        Patch.load(folder)
        raise PatchError(f"{folder} is a file: give the folder of the patch, whose other files go along")
    with tempfile.TemporaryDirectory(prefix="recare-patch-") as temporary:
        place = Path(temporary)
        try:
            taken = _copied(folder, place, new_card)
            sound = check_integrity(place)
            if sound.failed:
                told = "; ".join(f"{one.about}: {one.told}" for one in sound.failed)
                raise PatchError(f"{folder} does not hold, so nothing is sent: {told}")
            assert sound.patch is not None
            _complete(sound)
            _write_card(sound, license_id)
        except RecarePatchError as fault:
            # The reader knows the folder, not its copy.
            raise type(fault)(str(fault).replace(str(place), str(folder))) from None
        tops = {name.split("/")[0] for name in taken}
        left = tuple(sorted(one.name for one in folder.iterdir() if one.name not in tops))
        notes = (*_licence_notes(place), *_private_paths(place, sound.patch))
        yield _Parcel(place, sound.patch, left, notes)


def _copied(folder: Path, place: Path, new_card: bool) -> set[str]:
    """Copy what belongs to a patch; links are followed here, since they are the sender's own."""
    taken = {WEIGHTS_NAME}
    _copy(folder, place, WEIGHTS_NAME)
    for name in all_names(Patch.load(place / WEIGHTS_NAME)):
        if name != WEIGHTS_NAME and (folder / name).is_file():
            taken.add(name)
            if name != CARD_NAME or not new_card:
                _copy(folder, place, name)
    return taken


def _copy(folder: Path, place: Path, name: str) -> None:
    try:
        (place / name).parent.mkdir(exist_ok=True)
        shutil.copy2(folder / name, place / name)
    except OSError as fault:
        reason = (fault.strerror or str(fault)).lower()
        raise PatchError(f"cannot copy {folder / name} to send it: {reason}") from fault


def _complete(sound: Integrity) -> None:
    """Make the kohya file where it is missing, and reports that may be shown."""
    place, patch = sound.folder, sound.patch
    assert patch is not None and patch.metadata is not None
    kohya = place / kohya_name(patch)
    if not kohya.is_file():
        # Dated by the weights, so that the same patch makes the same file and is not sent twice.
        made = (place / WEIGHTS_NAME).stat().st_mtime
        date = datetime.datetime.fromtimestamp(made, datetime.UTC).date()
        write_kohya(patch, kohya, dtype=patch.dtype, date=date)
    if not is_unsafe(patch.metadata):
        return
    # A report of unsafe pictures holds them sharp behind a box to tick: these have the preview alone.
    for name in report_names(patch):
        (place / name).unlink(missing_ok=True)
    for record in sound.records:
        if record.evidence is not None:
            write_report(record.evidence, record.folder, previews_of(place), _training(place))


def _training(place: Path) -> dict[str, Any]:
    """The record of the run, whose integrity has been checked; empty where there is none."""
    file = place / TRAINING_NAME
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}


def _write_card(sound: Integrity, license_id: str | None) -> None:
    """Keep the card that is there but for its header, in which what the Hub needs is filled up."""
    assert sound.patch is not None
    place, file = sound.folder, sound.folder / CARD_NAME
    previews = tuple(path.name for path in previews_of(place).values())
    fresh = card_text(sound.patch.metadata, _training(place), previews=previews)
    card = file.read_text(encoding="utf-8") if file.is_file() else fresh
    front, body = split_card(card)
    made, _ = split_card(fresh)
    if license_id is not None:
        front = {**_unlicensed(front), "license": license_id}
    if "license" in front:
        made = _unlicensed(made)
    own = front.get("tags")
    own = [tag for tag in own if isinstance(tag, str)] if isinstance(own, list) else []
    front = {**made, **front, "tags": list(dict.fromkeys([*own, *made["tags"]]))}
    card = join_card(front, body)
    write_text(file, card if sound.evidence is None else with_evidence(card, sound.evidence))


def _unlicensed(front: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in front.items() if not key.startswith("license")}


def _check_license(text: str) -> None:
    if not re.fullmatch(_LICENSE, text):
        raise HubError(
            f"{text!r} is no licence as the Hub calls them: write it like apache-2.0 or creativeml-openrail-m"
        )


def _licence_notes(place: Path) -> tuple[str, ...]:
    front, _ = split_card((place / CARD_NAME).read_text(encoding="utf-8"))
    if front.get("license") != "other":
        return ()
    return ("the licence of the base is not known here: look it up and name it with --license",)


def _private_paths(place: Path, patch: Patch) -> tuple[str, ...]:
    """Whether a file tells where things lie on this machine."""
    home = str(Path.home())
    if len(home) < 4:
        return ()
    found = [
        name
        for name in (*text_names(patch), *report_names(patch))
        if (place / name).is_file() and home in (place / name).read_text(encoding="utf-8", errors="replace")
    ]
    for file in sorted(place.glob("*.safetensors")):
        if any(home in text for text in read_safetensors_header(file).metadata.values()):
            found.append(file.name)
    if not found:
        return ()
    return (f"your home folder is named in {', '.join(found)}, for whoever may see the repo to read",)


# ---------------------------------------------------------------------- sending


def _login(api: HfApi) -> str:
    """The name of the login.

    Raises:
        HubError: it may not write.
    """
    told = api.whoami()
    token = (told.get("auth") or {}).get("accessToken") or {}
    name = str(told["name"])
    if token.get("role") == "read":
        raise HubError(
            f"the token of {one_line(name)} may only read: make one that may write at "
            f"{api.endpoint}/settings/tokens, then {LOGIN}"
        )
    return name


def _send(api: HfApi, parcel: _Parcel, *, public: bool, overwrite: bool, progress: Progress) -> Pushed:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete
    from huggingface_hub.errors import RepositoryNotFoundError

    repo, notes = parcel.repo, list(parcel.notes)
    with talking(repo):
        try:
            info = api.model_info(repo, timeout=60)
        except RepositoryNotFoundError:
            # The Hub reads the card before there is a repo, so that a bad one leaves none behind.
            _validate(parcel.card)
            api.create_repo(repo, private=not public)
            info = api.model_info(repo, timeout=60)
        there = _listed(api, repo, check_commit(info.sha))
    _check_taken(info, there, parcel, public=public, overwrite=overwrite)
    private = bool(info.private)
    if public and private:
        notes.append(f"{repo} was private already and stays so: its settings page changes that")
    files = parcel.files()
    sent = [one for one in files if not _same(there.get(one.name), parcel.place / one.name, one.sha256)]
    kept = {one.name for one in files}
    # Of an older version; what else its owner has put there is left alone.
    removed = sorted(name for name in there if name in all_names(parcel.patch) and name not in kept)
    commit = str(info.sha)
    if sent or removed:
        adding = [CommitOperationAdd(one.name, parcel.place / one.name) for one in sent]
        with talking(repo):
            for number, operation in enumerate(adding):
                progress.update("send", number, len(adding), operation.path_in_repo)
                api.preupload_lfs_files(repo, [operation], free_memory=False)
            made = api.create_commit(
                repo,
                [*adding, *map(CommitOperationDelete, removed)],
                commit_message=f"{parcel.metadata.concept}, erased from {parcel.metadata.base}"[:200],
                commit_description=f"Sent by recare-patch {__version__}.",
                parent_commit=commit,
            )
            commit = check_commit(made.oid)
        progress.update("send", len(adding), len(adding))
    names = tuple(one.name for one in sent)
    told = parcel.told(private=private, commit=commit, sent=names, removed=tuple(removed))
    return replace(told, notes=tuple(notes), url=f"{api.endpoint}/{repo}")


def _validate(card: str) -> None:
    """Let the Hub check a card's header; nothing here knows its rules.

    Raises:
        HubError: it is refused.
    """
    from huggingface_hub import ModelCard

    try:
        ModelCard(card, ignore_metadata_errors=True).validate()
    except ValueError as fault:
        raise HubError(f"the Hub refuses the card's front matter: {one_line(fault)}") from None


def _listed(api: HfApi, repo: str, commit: str) -> dict[str, RepoFile]:
    """The files of a repo."""
    found = islice(api.list_repo_tree(repo, recursive=True, revision=commit), _MOST_FILES)
    return {one.path: one for one in found if hasattr(one, "blob_id")}


def _same(there: RepoFile | None, file: Path, sha256: str) -> bool:
    """Whether the Hub has a file as it is here."""
    if there is None:
        return False
    return there.lfs.sha256 == sha256 if there.lfs is not None else there.blob_id == git_hash(file)


def _check_taken(
    info: ModelInfo, there: Mapping[str, RepoFile], parcel: _Parcel, *, public: bool, overwrite: bool
) -> None:
    """Refuse a repo that is not this patch's.

    Raises:
        HubError: it holds something else, or everybody can see it and nobody said that they may.
    """
    repo = parcel.repo
    if not info.private and not public:
        raise HubError(f"{repo} can be seen by everybody: add --public to send to it, or name another repo")
    # An empty one is what a call leaves that was killed before its commit.
    if overwrite or not set(there) - set(_HUB_OWN):
        return
    front = info.card_data.to_dict() if info.card_data is not None else {}
    mine = Identity.of(parcel.metadata)
    theirs = identity_in({**front, "tags": info.tags or front.get("tags")}, mine)
    if theirs is None:
        raise HubError(
            f"the name {repo} is taken by something that is no patch of recare-patch: name another repo, or "
            "add --overwrite to put the patch into it"
        )
    if theirs != mine:
        held = ", ".join([*sorted(map(one_line, theirs.concepts)), one_line(theirs.base)])
        raise HubError(
            f"the name {repo} is taken by another patch ({held}): name another repo, or add --overwrite to "
            "replace it"
        )
