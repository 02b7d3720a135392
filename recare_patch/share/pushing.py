"""Sending a patch to the Hub: checked as a copy, sent as one commit, private unless asked otherwise."""

from __future__ import annotations

import datetime
import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recare_patch import __version__
from recare_patch.core import (
    MOST_PICTURE,
    MOST_WEIGHTS,
    HubError,
    NullProgress,
    PatchError,
    Progress,
    RecarePatchError,
    open_plain,
    read_bytes,
    read_json,
    read_safetensors_header,
    read_text,
    write_text,
)
from recare_patch.measure import Integrity, check_integrity, with_evidence, write_report
from recare_patch.patch import (
    CARD_NAME,
    PLACE,
    TRAINING_NAME,
    Identity,
    Patch,
    SharedFile,
    all_names,
    card_text,
    identity_in,
    is_unsafe,
    join_card,
    kohya_name,
    output_name,
    previews_of,
    report_names,
    split_card,
    write_kohya,
)
from recare_patch.recipe import WEIGHTS_NAME, fitted_stem
from recare_patch.share.hub import (
    LOGIN,
    PREFIX,
    check_commit,
    check_repo,
    client,
    is_listed,
    listed_files,
    one_line,
    talking,
)

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import ModelInfo


@dataclass(frozen=True)
class Pushed:
    """What was sent, or would be."""

    repo: str  # OWNER/NAME; in a dry run without a name, OWNER is not known.
    files: tuple[SharedFile, ...]
    front_matter: Mapping[str, Any]  # The card's header.
    left_out: tuple[str, ...]  # What lies in the folder and is not sent.
    notes: tuple[str, ...]  # What the sender should know.
    private: bool = True
    commit: str | None = None  # None after a dry run, as is the page.
    url: str | None = None
    sent: tuple[str, ...] = ()  # The files that were not there yet.
    removed: tuple[str, ...] = ()  # Those that were taken out, since the patch no longer has them.

    @property
    def unchanged(self) -> tuple[str, ...]:
        """Names of the files that were there already."""
        return tuple(one.name for one in self.files if one.name not in self.sent)


# Long: what is sent is decided, checked and sent in one place, so that nothing goes unchecked.
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

    The files are copied first, and the copy is what is checked and sent; a file for A1111 and ComfyUI is
    made if it is missing. A call that was killed is finished by the next: whatever the Hub has already is
    not sent again.

    Args:
        folder: of the patch; it stays as it is.
        repo: OWNER/NAME, or NAME alone for the login's own; by default made from what is erased.
        public: let everybody see it; a repo that is public already is refused without this.
        license_id: as the Hub calls it; by default that of the base, as far as it is known.
        new_card: write the card anew in place of the one in the folder.
        overwrite: take a repo that holds something else.
        dry_run: send nothing and ask nobody.
        progress: told of the files.

    Raises:
        PatchError: there is no patch, or its files do not hold.
        HubError: not logged in, no right, no connection, or the name is taken by something else.
        OutputError: the disk is full.
    """
    folder = Path(folder).expanduser()
    if license_id is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]{1,49}", license_id):
        raise HubError(
            f"{license_id!r} is no licence as the Hub calls them: write it like apache-2.0 or creativeml-openrail-m"
        )
    if not (folder / WEIGHTS_NAME).is_file():
        # It says what is missing, or that there is a pickle.
        Patch.load(folder)
        raise PatchError(f"{folder} is a file: give the folder of the patch, whose other files go along")
    with tempfile.TemporaryDirectory(prefix="recare-patch-") as temporary:
        place = Path(temporary)
        try:
            patch, left = _pack(folder, place, license_id, new_card)
        except RecarePatchError as fault:
            # The reader knows the folder, not its copy.
            raise type(fault)(str(fault).replace(str(place), str(folder))) from None
        except OSError as fault:
            told = (fault.strerror or str(fault)).lower()
            raise PatchError(f"cannot copy {fault.filename or folder} to send it: {told}") from fault
        api, owner = client(), "OWNER"
        if not dry_run:
            with talking("this login"):
                owner = _login(api)
        name = repo or _repo_name(output_name(patch))
        repo = check_repo(name if "/" in name else f"{owner}/{name}")
        # Only now it is known where the patch will be.
        card = read_text(place / CARD_NAME, CARD_NAME, PatchError)
        card = card.replace(f"--patch {PLACE}", f"--patch {PREFIX}{repo}").replace(PLACE, repo)
        write_text(place / CARD_NAME, card)
        names = [name for name in all_names(patch) if (place / name).is_file()]
        parcel = Pushed(
            repo=repo,
            files=tuple(SharedFile.of(place, name) for name in names),
            front_matter=split_card(card)[0],
            left_out=left,
            notes=_notes(place, names, card),
            private=not public,
        )
        return parcel if dry_run else _send(api, place, patch, parcel, overwrite, progress or NullProgress())


def _repo_name(stem: str) -> str:
    """A repo's name for a file's: the Hub takes ASCII alone, and 96 characters with the owner's."""
    plain = stem.encode("ascii", "ignore").decode()
    return fitted_stem(re.sub("-+", "-", plain).strip("-."), stem, 50, lost=plain != stem)


def _pack(folder: Path, place: Path, license_id: str | None, new_card: bool) -> tuple[Patch, tuple[str, ...]]:
    """Copy what is shared of a patch, complete and check the copy; gives the patch, and what was left.

    What is checked is what is sent: a file that changes meanwhile changes nothing. A link that leads out of the folder
    is refused: the folder may be somebody else's, and the link lead to what is the sender's alone.
    """
    _copy(folder, WEIGHTS_NAME, place)
    taken = [name for name in all_names(Patch.load(place / WEIGHTS_NAME)) if (folder / name).exists()]
    for name in taken:
        if name != WEIGHTS_NAME and not (new_card and name == CARD_NAME):
            _copy(folder, name, place)
    sound = check_integrity(place)
    if sound.failed:
        told = "; ".join(f"{one.about}: {one.told}" for one in sound.failed)
        raise PatchError(f"{folder} does not hold, so nothing is sent: {told}")
    patch = sound.patch
    assert patch is not None and patch.metadata is not None
    training = place / TRAINING_NAME
    record = dict(read_json(training, TRAINING_NAME, PatchError)) if training.is_file() else {}
    kohya = place / kohya_name(patch)
    if not kohya.is_file():
        # Dated by the weights, so that the same patch makes the same file and is not sent twice.
        made = datetime.datetime.fromtimestamp((place / WEIGHTS_NAME).stat().st_mtime, datetime.UTC)
        write_kohya(patch, kohya, dtype=patch.dtype, date=made.date())
    if is_unsafe(patch.metadata):
        # A report of unsafe pictures holds them sharp behind a box to tick: these have the preview alone.
        for name in report_names(patch):
            (place / name).unlink(missing_ok=True)
        for one in sound.records:
            if one.evidence is not None:
                write_report(one.evidence, one.folder, previews_of(place), record)
    tops = {name.split("/")[0] for name in taken}
    left = tuple(sorted(one.name for one in folder.iterdir() if one.name not in tops))
    write_text(place / CARD_NAME, _card(place, sound, record, license_id))
    return patch, left


def _copy(folder: Path, name: str, place: Path) -> None:
    """Copy a plain file of the folder, with its time."""
    most = MOST_WEIGHTS if name.endswith(".safetensors") else MOST_PICTURE
    told = f"{folder / name} to send it"
    (place / name).parent.mkdir(exist_ok=True)
    with open_plain(folder / name, told, PatchError, most=most, within=folder) as source:
        with open(place / name, "wb") as target:
            shutil.copyfileobj(source, target)
        found = os.fstat(source.fileno())
        os.utime(place / name, ns=(found.st_atime_ns, found.st_mtime_ns))


def _card(place: Path, sound: Integrity, training: Mapping[str, Any], license_id: str | None) -> str:
    """The card that is there but for its header, in which what the Hub needs is filled up."""
    assert sound.patch is not None
    file = place / CARD_NAME
    previews = tuple(path.name for path in previews_of(place).values())
    fresh = card_text(sound.patch.metadata, training, previews=previews)
    front, body = split_card(read_text(file, CARD_NAME, PatchError) if file.is_file() else fresh)
    made, _ = split_card(fresh)
    if license_id is not None:
        front = {**_unlicensed(front), "license": license_id}
    if "license" in front:
        made = _unlicensed(made)
    own = front.get("tags")
    tags = [*(tag for tag in (own if isinstance(own, list) else ()) if isinstance(tag, str)), *made["tags"]]
    card = join_card({**made, **front, "tags": list(dict.fromkeys(tags))}, body)
    return card if sound.evidence is None else with_evidence(card, sound.evidence)


def _unlicensed(front: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in front.items() if not key.startswith("license")}


def _notes(place: Path, names: Sequence[str], card: str) -> tuple[str, ...]:
    """Whether a licence is missing, or a file tells where things lie on this machine."""
    notes = []
    if split_card(card)[0].get("license") == "other":
        notes.append("the licence of the base is not known here: look it up and name it with --license")
    home = os.path.expanduser("~")  # noqa: PTH111 - Path's own raises where there is none

    def told(file: Path) -> bool:
        if file.suffix == ".safetensors":
            return any(home in text for text in read_safetensors_header(file).metadata.values())
        return file.suffix != ".png" and home.encode() in read_bytes(file, file.name, PatchError, most=MOST_PICTURE)

    if len(home) >= 4 and (found := [name for name in names if told(place / name)]):
        notes.append(f"your home folder is named in {', '.join(found)}, for whoever may see the repo to read")
    return tuple(notes)


def _login(api: HfApi) -> str:
    """The name of the login, which may write."""
    told = api.whoami()
    token = (told.get("auth") or {}).get("accessToken") or {}
    name = str(told["name"])
    if token.get("role") == "read":
        raise HubError(
            f"the token of {one_line(name)} may only read: make one that may write at "
            f"{api.endpoint}/settings/tokens, then {LOGIN}"
        )
    return name


def _send(api: HfApi, place: Path, patch: Patch, parcel: Pushed, overwrite: bool, progress: Progress) -> Pushed:
    from huggingface_hub import ModelCard
    from huggingface_hub.errors import RepositoryNotFoundError

    assert patch.metadata is not None
    repo, notes, public = parcel.repo, parcel.notes, not parcel.private
    with talking(repo):
        try:
            info = api.model_info(repo, timeout=60)
        except RepositoryNotFoundError:
            try:
                # The Hub reads the card before there is a repo, so that a bad one leaves none behind.
                ModelCard.load(place / CARD_NAME, ignore_metadata_errors=True).validate()
            except ValueError as fault:
                raise HubError(f"the Hub refuses the card's front matter: {one_line(fault)}") from None
            api.create_repo(repo, private=parcel.private)
            info = api.model_info(repo, timeout=60)
    commit = check_commit(info.sha)
    there = listed_files(api, repo, commit)
    if not info.private and not public:
        raise HubError(f"{repo} can be seen by everybody: add --public to send to it, or name another repo")
    # An empty one is what a call leaves that was killed before its commit.
    if not overwrite and set(there) - {".gitattributes"}:
        _check_taken(info, repo, Identity.of(patch.metadata))
    if public and info.private:
        notes = (*notes, f"{repo} was private already and stays so: its settings page changes that")
    kept = [one.name for one in parcel.files]
    sent = [name for name in kept if name not in there or not is_listed(there[name], place / name)]
    # Of an older version; what else its owner has put there is left alone.
    removed = [name for name in sorted(there) if name in all_names(patch) and name not in kept]
    if sent or removed:
        progress.update("send", 0, len(sent), ", ".join(sent))
        with talking(repo):
            made = api.upload_folder(
                repo_id=repo,
                folder_path=place,
                allow_patterns=sent,
                delete_patterns=removed or None,
                commit_message=f"{patch.metadata.concept}, erased from {patch.metadata.base}"[:200],
                commit_description=f"Sent by recare-patch {__version__}.",
                parent_commit=commit,
            )
        commit = check_commit(made.oid)
        progress.update("send", len(sent), len(sent))
    return replace(
        parcel,
        notes=notes,
        private=bool(info.private),
        commit=commit,
        url=f"{api.endpoint}/{repo}",
        sent=tuple(sent),
        removed=tuple(removed),
    )


def _check_taken(info: ModelInfo, repo: str, mine: Identity) -> None:
    """Refuse a repo that is not this patch's."""
    front = info.card_data.to_dict() if info.card_data is not None else {}
    theirs = identity_in({**front, "tags": info.tags or front.get("tags")}, mine)
    if theirs is None:
        raise HubError(
            f"the name {repo} is taken by something that is no patch of recare-patch: name another repo, or "
            "add --overwrite to put the patch into it"
        )
    if theirs != mine:
        held = ", ".join([*sorted(map(one_line, theirs.concepts)), one_line(theirs.base)])
        raise HubError(
            f"the name {repo} is taken by another patch ({held}): name another repo, or add --overwrite to replace it"
        )
