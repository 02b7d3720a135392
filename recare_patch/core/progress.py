"""How long work tells how far it is.

Library code takes ``progress: Progress | None`` and calls ``update``; what becomes of it, a bar, a
log line or nothing, is the caller's choice.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Progress(Protocol):
    """Receives the state of a run."""

    def update(self, stage: str, done: int, total: int, note: str = "") -> None:
        """Report that ``done`` of ``total`` parts of ``stage`` are finished.

        Args:
            stage: the name of the stage, as shown to the user.
            done: finished parts, from 0 to ``total``.
            total: all parts of the stage.
            note: a few words or figures, such as the loss.
        """
        ...


class NullProgress:
    """Reports nothing."""

    def update(self, stage: str, done: int, total: int, note: str = "") -> None:
        """Ignore the report."""


class RichProgress:
    """Shows one bar a stage with the time left, on standard error.

    Where standard error is no terminal, each stage is one line when it ends, so that logs stay
    readable.

    Example:
        >>> with RichProgress() as progress:  # doctest: +SKIP
        ...     progress.update("erase", 10, 100, "loss 0.012")
    """

    def __init__(self, console: Any | None = None) -> None:
        """A display that is not shown yet.

        Args:
            console: a ``rich.console.Console``; standard error by default.
        """
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.progress import Progress as Bars

        self._console = console if console is not None else Console(stderr=True)
        self._live = bool(self._console.is_terminal)
        self._bars = Bars(
            TextColumn("{task.description:<22}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=self._console,
            disable=not self._live,
        )
        self._tasks: dict[str, Any] = {}
        self._finished: dict[str, bool] = {}

    def __enter__(self) -> RichProgress:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def update(self, stage: str, done: int, total: int, note: str = "") -> None:
        """Move the bar of ``stage``; a stage seen for the first time gets a bar of its own."""
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(stage, total=max(total, 1), note=note)
        self._bars.update(self._tasks[stage], completed=done, total=max(total, 1), note=note)
        ended = done >= total
        if ended and not self._finished.get(stage, False) and not self._live:
            # Highlighting off: a log has no use for colour codes.
            self._console.print(f"{stage}: {done}/{total} {note}".rstrip(), highlight=False, markup=False)
        self._finished[stage] = ended
