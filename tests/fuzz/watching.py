"""What every unsound input is held to, and how many there are."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import time
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from recare_patch.core import RecarePatchError

# Of computing for one input; sound ones take milliseconds. A busy machine does not count.
SECONDS = 10.0
# Bytes that all of it together may take, and that it may ask for.
MEMORY, ADDRESSES = 2**29, 2**30

# Inputs for each reader from sound files, and made up by hypothesis; for each file of a patch's folder,
# which ``verify`` reads together; and in all.
SHARE = float(os.environ.get("RECARE_FUZZ", "1"))
MUTATIONS, INVENTED, OF_A_FOLDER, LIES, LEAST = (round(SHARE * n) for n in (2300, 250, 500, 2500, 50_000))


class Hang(BaseException):
    """A reader that did not answer in time; no ``except Exception`` may swallow it."""


@dataclass
class Watch:
    """How many inputs were tried, how many ended in one sentence, and the slowest, in seconds by a reader."""

    inputs: int = 0
    refused: int = 0
    slowest: tuple[float, str] = (0.0, "")
    began: float = field(default_factory=time.process_time)
    _start: int = field(default_factory=lambda: _peak())

    @property
    def peak(self) -> int:
        """Bytes by which the process's largest size grew."""
        return _peak() - self._start

    def attempt(self, name: str, data: bytes, read: Callable[[], object]) -> None:
        """Let a reader read; every fault but our own escapes, with the input that shows it."""
        self.inputs += 1
        begun = time.process_time()
        try:
            with _deadline():
                read()
        except RecarePatchError as fault:
            self.refused += 1
            _check_sentence(str(fault), name, data)
        except BaseException as fault:
            raise AssertionError(f"{name}: {type(fault).__name__}: {fault!s:.300}\n{data[:3000]!r}") from fault
        took = time.process_time() - begun
        if took > self.slowest[0]:
            self.slowest = (took, name)


def _check_sentence(text: str, name: str, data: bytes) -> None:
    odd = [one for one in text if unicodedata.category(one) in ("Cc", "Cs", "Zl", "Zp")]
    assert text and not odd, f"{name} said {text[:500]!r} of {data[:2000]!r}"
    assert len(text) < 20_000, f"{name} said {len(text)} characters of {data[:2000]!r}"
    text.encode("utf-8")


@contextlib.contextmanager
def _deadline() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise Hang(f"no answer in {SECONDS:g} s")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@contextlib.contextmanager
def little_memory() -> Iterator[None]:
    """Refuse the process more than :data:`ADDRESSES` beyond what it has: a MemoryError is a failure."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + ADDRESSES
    limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
