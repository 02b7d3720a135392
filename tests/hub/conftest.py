"""What the demo's tests share: the page's code, a tiny base, and two patches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from recare_patch.cli.demo import page
from recare_patch.models import load_base
from recare_patch.patch import Patch
from tests.patch.test_patch import trained

demo: Any = page()


def of_kind(patch: Patch, kind: str, concept: str) -> Patch:
    assert patch.metadata is not None
    return Patch(patch.tensors, patch.metadata.model_copy(update={"kind": kind, "concept": concept}), concept)


@pytest.fixture(scope="session")
def made(tiny_sd: Path) -> Patch:
    return trained(tiny_sd)[1]


@pytest.fixture(scope="session")
def both(made: Patch) -> dict[str, Patch]:
    return {"Van Gogh": made, "nudity": of_kind(made, "nsfw", "nudity")}


@pytest.fixture
def base(tiny_sd: Path) -> Any:
    return load_base(tiny_sd, device="cpu")
