"""Fixtures that several tests of the evaluation need."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from recare_patch.measure import claims
from recare_patch.models import BaseModel, load_base


@pytest.fixture(scope="module")
def base(tiny_sd: Path) -> BaseModel:
    return load_base(tiny_sd, device="cpu")


@pytest.fixture(autouse=True)
def anything_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A random base shows nothing, and a figure of nothing does not hold: here it does."""
    monkeypatch.setattr(claims, "SHOWN", 0.0)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """The number of threads chooses the last bits of a picture."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
