"""The Hub as huggingface_hub reaches it, and its faults in one sentence.

The login is huggingface_hub's own affair: no token passes through this package. What the client or a
server says is cleaned before it goes into a message, since either may quote one.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from recare_patch import __version__
from recare_patch.core import HubError, RecarePatchError, output_error

if TYPE_CHECKING:
    from huggingface_hub import HfApi

logger = logging.getLogger(__name__)

PREFIX = "hub:"
"""What marks a patch on the Hub where a folder could stand: "hub:OWNER/NAME" or "hub:OWNER/NAME@REVISION"."""

LOGIN = "`hf auth login`"

_TOKEN = re.compile(r"\bhf_[A-Za-z0-9_]{4,}")
_LONGEST = 300
_COMMIT = re.compile(r"[0-9a-f]{40}")
_UNREACHABLE = {"TransportError", "ConnectionError", "Timeout", "TimeoutError"}
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


def client() -> HfApi:
    """The Hub's client, for the endpoint and the login that huggingface_hub is set to."""
    from huggingface_hub import HfApi

    return HfApi(library_name="recare-patch", library_version=__version__)


def endpoint() -> str:
    """Where the Hub is: ``HF_ENDPOINT``, or the public one."""
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


def check_reachable() -> None:
    """Fail at once where there is no network: for a listing the client tries again for half a minute."""
    from huggingface_hub.utils import get_session

    get_session().head(endpoint(), timeout=60)


def check_repo(text: str) -> str:
    """A repo's id, checked.

    Raises:
        HubError: it is not OWNER/NAME.
    """
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(text)
        if "/" in text:
            return text
    except HFValidationError:
        pass
    raise HubError(
        f"{one_line(text)!r} is no repo of the Hub: write OWNER/NAME, both of letters, digits and, between "
        "them, single - _ ."
    )


def check_commit(sha: object) -> str:
    """A commit as the Hub told it: nothing else may stand for a revision that is pinned.

    Raises:
        HubError: it is no commit.
    """
    if not isinstance(sha, str) or not _COMMIT.fullmatch(sha):
        raise HubError(f"the server at {endpoint()} names no commit for this repo: it is no Hub")
    return sha


def is_commit(revision: str | None) -> bool:
    """Whether a revision is a whole commit id, which always means the same files."""
    return revision is not None and _COMMIT.fullmatch(revision) is not None


@dataclass(frozen=True)
class Address:
    """A patch on the Hub.

    Attributes:
        repo: OWNER/NAME.
        revision: branch, tag or commit; ``None``: the newest of the main branch.
    """

    repo: str
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> Address:
        """Read "OWNER/NAME" or "OWNER/NAME@REVISION", with or without :data:`PREFIX`.

        Raises:
            HubError: it is neither.
        """
        repo, at, revision = text.removeprefix(PREFIX).partition("@")
        if at and not re.fullmatch(r"[\w./\-]{1,200}", revision):
            raise HubError(
                f"{one_line(revision)!r} is no revision: a branch, a tag or a commit of the repo is one"
            )
        return cls(check_repo(repo), revision or None)

    @property
    def name(self) -> str:
        """The repo's name without its owner."""
        return self.repo.split("/")[1]


# ---------------------------------------------------------------------- faults


def one_line(text: object) -> str:
    """Text from elsewhere, fit to be shown: one line, no control characters, no token, not long."""
    from huggingface_hub import get_token

    line = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    token = None
    with contextlib.suppress(Exception):
        # Where the login is an exchange with another server, this may fail; then there is no token to show.
        token = get_token()
    if token:
        line = line.replace(token, "hf_…")
    line = _TOKEN.sub("hf_…", line)
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 1]}…"


@contextlib.contextmanager
def talking(about: str, place: object = "a file") -> Iterator[None]:
    """Turn whatever goes wrong between here and the Hub into one sentence.

    Args:
        about: the repo, for messages.
        place: where files are written, for messages.

    Raises:
        HubError: the client has failed.
        OutputError: the disk has.
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


def _chain(fault: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    one: BaseException | None = fault
    while one is not None and id(one) not in seen:
        seen.add(id(one))
        yield one
        one = one.__cause__ or one.__context__


def _in_words(fault: Exception, about: str, place: object) -> RecarePatchError:
    chain = list(_chain(fault))
    for one in chain:
        told = _known(one, about)
        if told is not None:
            return HubError(told)
    for one in chain:
        names = {kind.__name__ for kind in type(one).__mro__}
        if names & _UNREACHABLE:
            return HubError(f"cannot reach the Hub at {endpoint()}: {one_line(one) or type(one).__name__}")
        if isinstance(one, OSError) and one.errno in _DISK:
            return output_error(one.filename or str(place), one)
    what = f"{type(fault).__name__}: {one_line(fault)}"
    return HubError(f"the Hub's answer about {about} cannot be read ({what})")


def _known(fault: BaseException, about: str) -> str | None:
    """The sentence for a fault that the client has a class for."""
    from huggingface_hub import errors

    if isinstance(fault, errors.OfflineModeIsEnabled):
        return "huggingface_hub is set to work offline (HF_HUB_OFFLINE), so the Hub is not asked"
    if isinstance(fault, errors.LocalTokenNotFoundError):
        return f"you are not logged in to the Hub: {LOGIN} does it"
    if isinstance(fault, errors.GatedRepoError):
        return f"{about} is gated: ask for access on its page, {endpoint()}/{about}"
    if isinstance(fault, errors.RepositoryNotFoundError):
        return f"there is no repo {about}, or this login may not see it; {LOGIN} changes the login"
    if isinstance(fault, errors.RevisionNotFoundError):
        return f"{about} has no such revision"
    if isinstance(fault, errors.EntryNotFoundError) and isinstance(fault, errors.HfHubHTTPError):
        return f"{about} lists a file and does not have it"
    if isinstance(fault, errors.HfHubHTTPError):
        return _by_status(fault, about)
    if isinstance(fault, ValueError) and "metadata in README.md" in str(fault):
        return f"the Hub refuses the card's front matter: {one_line(str(fault).partition('- ')[2] or fault)}"
    return None


def _by_status(fault: Exception, about: str) -> str:
    status = getattr(getattr(fault, "response", None), "status_code", 0)
    said = one_line(getattr(fault, "server_message", None) or "")
    why = f" ({said})" if said else ""
    if status == 401:
        return f"the Hub does not accept this login{why}; {LOGIN} changes it"
    if status == 403:
        return f"this login has no right to do that with {about}{why}; to send, its token needs write access"
    if status == 404:
        return f"the Hub has no {about}, or this login may not see it{why}"
    if status == 409:
        return f"the name {about} is taken{why}"
    if status == 412:
        return f"{about} was changed by somebody else in the meantime{why}: look at it and try again"
    if status == 429:
        return f"the Hub asks for a pause{why}: try again later"
    if status >= 500:
        return f"the Hub at {endpoint()} is out of order (status {status}{why}): try again later"
    return f"the Hub refuses that for {about}: status {status}{why}"
