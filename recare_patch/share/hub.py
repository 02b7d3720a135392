"""The Hub as huggingface_hub reaches it: addresses, faults in one sentence, search, and an index of patches.

The login is huggingface_hub's own affair: no token passes through this package. What the client or a
server says is cleaned before it goes into a message, since either may quote one.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from recare_patch import __version__
from recare_patch.core import HubError, PatchError, RecarePatchError, file_sha256, output_error
from recare_patch.measure import RATE, Evidence, show_value, worst_erased, worst_kept
from recare_patch.patch import EVIDENCE_NAME, TAG, Patch, base_tag, concept_tag, git_hash, plain
from recare_patch.recipe import METHODS, WEIGHTS_NAME, Concept

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import ModelInfo, RepoFile

logger = logging.getLogger(__name__)

PREFIX = "hub:"
"""What marks a patch on the Hub where a folder could stand: "hub:OWNER/NAME" or "hub:OWNER/NAME@REVISION"."""

LOGIN = "`hf auth login`"

_TOKEN = re.compile(r"\bhf_[A-Za-z0-9_]{4,}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_LONGEST, _MOST_FILES = 300, 10_000
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
_PROPERTIES = ["cardData", "downloads", "lastModified", "likes", "model-index", "private", "sha", "tags"]
_OWN_TAGS = {"text-to-image", "diffusers", "lora", "template:sd-lora", "concept-erasure", TAG}

_FAULTS = {
    # By the name of a fault's class.
    "OfflineModeIsEnabled": "huggingface_hub is set to work offline (HF_HUB_OFFLINE): the Hub is not asked",
    "LocalTokenNotFoundError": "you are not logged in to the Hub: {login} does it",
    "GatedRepoError": "{about} is gated: ask for access on its page, {hub}/{about}",
    "RepositoryNotFoundError": "there is no repo {about}, or this login may not see it; {login} changes it",
    "RevisionNotFoundError": "{about} has no such revision",
}
_STATUSES = {
    401: "the Hub does not accept this login{why}; {login} changes it",
    403: "this login has no right to do that with {about}{why}; to send, its token needs write access",
    404: "the Hub has no {about}, or this login may not see it{why}",
    409: "the name {about} is taken{why}",
    412: "{about} was changed by somebody else in the meantime{why}: look at it and try again",
    429: "the Hub asks for a pause{why}: try again later",
    500: "the Hub at {hub} is out of order (status {status}{why}): try again later",
}
_UNREACHABLE = {"TransportError", "ConnectionError", "Timeout", "TimeoutError"}


def client() -> HfApi:
    """The Hub's client, for the endpoint and the login that huggingface_hub is set to."""
    from huggingface_hub import HfApi

    return HfApi(library_name="recare-patch", library_version=__version__)


def endpoint() -> str:
    """Where the Hub is: ``HF_ENDPOINT``, or the public one."""
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


def check_repo(text: str) -> str:
    """A repo's id, checked: :class:`HubError` where it is not OWNER/NAME."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    with contextlib.suppress(HFValidationError):
        validate_repo_id(text)
        if "/" in text:
            return text
    raise HubError(
        f"{one_line(text)!r} is no repo of the Hub: write OWNER/NAME, both of letters, digits and, between "
        "them, single - _ ."
    )


def check_commit(sha: object) -> str:
    """A commit as the Hub told it: nothing else may stand for a revision that is pinned."""
    if not isinstance(sha, str) or not _COMMIT.fullmatch(sha):
        raise HubError(f"the server at {endpoint()} names no commit for this repo: it is no Hub")
    return sha


@dataclass(frozen=True)
class Address:
    """A patch on the Hub; without a revision the newest of the main branch."""

    repo: str
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> Address:
        """Read "OWNER/NAME" or "OWNER/NAME@REVISION", with or without :data:`PREFIX`."""
        repo, at, revision = text.removeprefix(PREFIX).partition("@")
        if at and not re.fullmatch(r"[\w./\-]{1,200}", revision):
            raise HubError(f"{one_line(revision)!r} is no revision: a branch, a tag or a commit of the repo is one")
        return cls(check_repo(repo), revision or None)

    @property
    def commit(self) -> str | None:
        """The revision where it is a whole commit id, which always means the same files."""
        return self.revision if self.revision and _COMMIT.fullmatch(self.revision) else None


def listed_files(api: HfApi, repo: str, commit: str) -> dict[str, RepoFile]:
    """What a repo says it holds, with sizes and hashes; mirrors of the Hub tell these in its tree alone."""
    with talking(repo):
        found = islice(api.list_repo_tree(repo, recursive=True, revision=commit), _MOST_FILES)
        return {one.path: one for one in found if hasattr(one, "blob_id")}


def is_listed(listed: RepoFile, file: Path) -> bool:
    """Whether a file here is what the Hub lists."""
    if listed.lfs is not None:
        return listed.lfs.sha256 == file_sha256(file)
    return listed.blob_id == git_hash(file)


def commit_of(api: HfApi, repo: str, revision: str | None) -> str:
    """The commit that a branch or a tag means now; without one the newest of the main branch."""
    with talking(repo):
        return check_commit(api.model_info(repo, revision=revision, timeout=60).sha)


def one_line(text: object) -> str:
    """Text from elsewhere, fit to be shown: one line, no control characters, no token, not long."""
    from huggingface_hub import get_token

    line = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    # Where the login is an exchange with another server, this may fail; then there is no token to show.
    with contextlib.suppress(Exception):
        if token := get_token():
            line = line.replace(token, "hf_…")
    line = _TOKEN.sub("hf_…", line)
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 1]}…"


@contextlib.contextmanager
def talking(about: str, place: object = "a file") -> Iterator[None]:
    """Turn whatever goes wrong between here and the Hub into one sentence: ``HubError`` or ``OutputError``.

    Messages call the repo ``about``, and what is written ``place``.
    """
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            yield
        except RecarePatchError:
            raise
        # The client lets through whatever a malformed answer makes it stumble over: KeyError, TypeError, …
        except Exception as fault:
            error = _in_words(fault, about, place)
            # Not chained: the client's exceptions hold the request, and with it the token.
            raise error from None
    for one in told:
        if not issubclass(one.category, (DeprecationWarning, FutureWarning)):
            logger.warning("the Hub on %s: %s", about, one_line(one.message))


def _in_words(fault: Exception, about: str, place: object) -> RecarePatchError:
    chain: list[BaseException] = [fault]
    while (one := chain[-1].__cause__ or chain[-1].__context__) is not None and one not in chain:
        chain.append(one)
    for one in chain:
        if (told := _known(one, about)) is not None:
            return HubError(told)
    for one in chain:
        if _UNREACHABLE & {kind.__name__ for kind in type(one).__mro__}:
            return HubError(f"cannot reach the Hub at {endpoint()}: {one_line(one) or type(one).__name__}")
        if isinstance(one, OSError) and one.errno in _DISK:
            return output_error(one.filename or str(place), one)
    what = f"{type(fault).__name__}: {one_line(fault)}"
    return HubError(f"the Hub's answer about {about} cannot be read ({what})")


def _known(fault: BaseException, about: str) -> str | None:
    """The sentence for a fault that the client has a class for."""
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    words = {"about": about, "hub": endpoint(), "login": LOGIN}
    for kind in type(fault).__mro__:
        if kind.__name__ in _FAULTS:
            return _FAULTS[kind.__name__].format(**words)
    if isinstance(fault, HfHubHTTPError):
        if isinstance(fault, EntryNotFoundError):
            return f"{about} lists a file and does not have it"
        said, status = one_line(fault.server_message or ""), getattr(fault.response, "status_code", 0)
        told = _STATUSES.get(min(status, 500), "the Hub refuses that for {about}: status {status}{why}")
        return told.format(**words, status=status, why=f" ({said})" if said else "")
    if isinstance(fault, ValueError) and "metadata in README.md" in str(fault):
        return f"the Hub refuses the card's front matter: {one_line(str(fault).partition('- ')[2] or fault)}"
    return None


@dataclass(frozen=True)
class Metric:
    """A figure as a card claims it, such as "concept-rate", "concept, plain prompts", 0.02."""

    type: str
    name: str
    value: float


@dataclass(frozen=True)
class Found:
    """A patch on the Hub, by its own account: all texts are its owner's, cleaned to be shown."""

    repo: str
    commit: str  # The newest of its main branch.
    concepts: tuple[str, ...]  # As slugs: "van-gogh".
    base: str
    license: str
    tags: tuple[str, ...]  # Those that the other attributes do not tell.
    metrics: tuple[Metric, ...]
    downloads: int
    likes: int
    modified: str  # ISO date of the last commit.
    private: bool

    def rates(self, *types: str) -> tuple[Metric, ...]:
        """Its figures of some types that are shares of pictures."""
        return tuple(one for one in self.metrics if one.type in types and 0 <= one.value <= 1)


def search(
    text: str | None = None,
    *,
    base: str | None = None,
    concept: str | None = None,
    tags: Sequence[str] = (),
    owner: str | None = None,
    limit: int = 20,
) -> tuple[Found, ...]:
    """Patches of this package on the Hub, the most downloaded first.

    Args:
        text: to be found in the repo's name.
        base: id or name of the base model.
        concept: what is erased, as one writes it.
        tags: that the patch must have, all of them.
        owner, limit: of the repo; at most so many.
    """
    from huggingface_hub.utils import get_session

    # Checked as a concept; which kind it is does not matter here.
    slug = [concept_tag(Concept(text=concept, kind="object").text)] if concept is not None else []
    wanted = [TAG, *([base_tag(base)] if base else []), *slug, *tags]
    with talking("the search"):
        # Fails at once where there is no network: for a listing the client tries again for half a minute.
        get_session().head(endpoint(), timeout=60)
        listed = client().list_models(
            filter=wanted, search=text, author=owner, sort="downloads", limit=limit, expand=_PROPERTIES
        )
        return tuple(_found(one) for one in listed)


def _found(info: ModelInfo) -> Found:
    front: dict[str, Any] = info.card_data.to_dict() if info.card_data is not None else {}
    tags = [one_line(tag) for tag in info.tags or ()]
    linked = front.get("base_model")
    linked = linked[0] if isinstance(linked, list) and linked else linked
    # Of bases that are plain tags, only the bundled one's name can be told from other tags.
    unlinked = "atelier" if "atelier" in tags else "unknown"
    base = one_line(linked) if isinstance(linked, str) else unlinked
    known = {*_OWN_TAGS, base}
    return Found(
        repo=one_line(info.id),
        commit=one_line(info.sha or ""),
        concepts=tuple(tag.removeprefix("concept:") for tag in tags if tag.startswith("concept:")),
        base=base,
        license=one_line(front.get("license") or ""),
        tags=tuple(tag for tag in tags if tag not in known and ":" not in tag),
        metrics=_metrics(info.model_index),
        downloads=int(info.downloads or 0),
        likes=int(info.likes or 0),
        modified=info.last_modified.date().isoformat() if info.last_modified else "",
        private=bool(info.private),
    )


def _metrics(index: Any) -> tuple[Metric, ...]:
    """Figures of a ``model-index``, which may be anything; none of one that is not well-formed."""
    from huggingface_hub.repocard_data import model_index_to_eval_results

    try:
        found = model_index_to_eval_results(index or [])[1]
        return tuple(
            Metric(one_line(one.metric_type), one_line(one.metric_name), float(one.metric_value)) for one in found
        )
    except (LookupError, TypeError, ValueError, AttributeError):
        return ()


Row = tuple[str, ...]
"""A patch in an index: what the page's columns say; the patch's name, and where it is."""

_NONE = "–"
_PAGE = """\
# {title}

What still shows is the highest rate that was measured. What suffered is the rate that fell most, or the \
lowest where the base's is not told. – was not measured.

| erased | base | method | size | still shows | suffered | patch |
|---|---|---|---|---:|---:|---|
{rows}
"""


def row_of_folder(folder: str | Path) -> Row:
    """The row of a patch on the disk; figures come from the evidence beside it."""
    place = Path(folder)
    about = Patch.load(place).metadata
    if about is None:
        raise PatchError(f"{place} carries no record of its making: only patches of recare-patch are listed")
    file = place / WEIGHTS_NAME if place.is_dir() else place
    shown = kept = _NONE
    if (file.parent / EVIDENCE_NAME).exists():
        evidence = Evidence.load(file.parent)
        evidence.check_patch(file_sha256(file), str(place))
        if gone := worst_erased(evidence):
            shown = f"{gone.show(gone.patched)} (base {gone.show(gone.base)})"
        if lost := worst_kept(evidence):
            kept = f"{lost.name}: {lost.show(lost.patched)} (base {lost.show(lost.base)})"
    size = f"rank {about.rank}, {file.stat().st_size / 1e3:,.0f} kB"
    return about.concept, about.base, about.method, size, shown, kept, file.parent.name, place.as_posix()


def row_of_found(found: Found, endpoint: str) -> Row:
    """The row of a patch on the Hub at this endpoint; figures are those that its card claims."""
    gone = max((one.value for one in found.rates("concept-rate")), default=None)
    lost = min(found.rates("companion-shown", "neighbour-shown"), key=lambda one: one.value, default=None)
    return (
        ", ".join(found.concepts) or _NONE,
        found.base,
        next((tag for tag in found.tags if tag in METHODS or tag == "stack"), _NONE),
        _NONE,
        show_value(gone, RATE),
        f"{lost.name}: {show_value(lost.value, RATE)}" if lost is not None else _NONE,
        f"{PREFIX}{found.repo}",
        f"{endpoint}/{found.repo}",
    )


def index_text(rows: Sequence[Row], title: str = "Patches") -> str:
    """A page in Markdown that lists patches, in their order."""
    lines = []
    for *cells, patch, target in rows:
        link = quote(target, safe="/:@.-_~%?=&")
        lines.append(f"| {' | '.join(map(plain, cells))} | [{plain(patch)}]({link}) |")
    return _PAGE.format(title=plain(title), rows="\n".join(lines))
