"""What a run costs, stage by stage, carried across a resume and summed over its processes."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recare_patch.core import write_json
from recare_patch.models import forget_peak_memory, peak_memory

if TYPE_CHECKING:
    from recare_patch.models import BaseModel


class Ledger:
    """Seconds, denoiser evaluations and peak memory of every stage, in a JSON file.

    Attributes:
        stages: stage → its figures; of several processes evaluations are summed, and the peak is the
            highest.
    """

    def __init__(self, path: Path, base: BaseModel) -> None:
        """A ledger that goes on from ``path``, where there is one.

        Args:
            path: of the JSON file.
            base: whose evaluations are counted; its ``crew`` says who else works.
        """
        self.path, self.base = path, base
        self.stages: dict[str, dict[str, float]] = json.loads(path.read_text()) if path.exists() else {}
        self._began, self._evaluations, self._peak = 0.0, 0, 0
        self._loading = peak_memory(base.device)

    @property
    def peak(self) -> int:
        """The highest figure of all stages, and of what came before the first."""
        return max(self._loading, *(int(one.get("peak_memory_bytes", 0)) for one in self.stages.values()))

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Book what happens inside on a stage; one that was done before a resume is not booked again."""
        if name in self.stages:
            # What little is repeated to restore it is not counted twice.
            yield
            return
        self._began, self._evaluations, self._peak = time.perf_counter(), self.base.counter.total, 0
        forget_peak_memory(self.base.device)
        yield
        self.stages[name] = self.so_far()
        if self.base.crew is None or self.base.crew.main:
            write_json(self.path, self.stages)

    def so_far(self) -> dict[str, float]:
        """The figures of the stage under way; where processes share the work, all of them must ask."""
        evaluations = self.base.counter.total - self._evaluations
        peak = max(self._peak, peak_memory(self.base.device))
        if (crew := self.base.crew) is not None:
            evaluations = int(crew.sum(evaluations, self.base.device))
            peak = int(crew.most(peak, self.base.device))
        return {
            "seconds": round(time.perf_counter() - self._began, 3),
            "evaluations": evaluations,
            "peak_memory_bytes": peak,
        }

    def restore(self, kept: Mapping[str, Any]) -> None:
        """Go on with a stage of which :meth:`so_far` told ``kept``."""
        self._began = time.perf_counter() - float(kept["seconds"])
        self._peak = int(kept.get("peak_memory_bytes", 0))
        if self.base.crew is None or self.base.crew.main:
            # One process brings along what all of them did before.
            self._evaluations = self.base.counter.total - int(kept["evaluations"])
