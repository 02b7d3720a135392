"""What the demo's tests share: the page's code, a tiny base, and two patches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from recare_patch.cli.demo import page
from recare_patch.models import load_base
from recare_patch.patch import Patch
from tests.patch.making import as_another, trained

demo: Any = page()


@pytest.fixture(scope="session")
def made(tiny_sd: Path) -> Patch:
    return trained(tiny_sd)[1]


@pytest.fixture(scope="session")
def both(made: Patch) -> dict[str, Patch]:
    return {"Van Gogh": made, "nudity": as_another(made, "nudity", "nsfw")}


@pytest.fixture
def base(tiny_sd: Path) -> Any:
    return load_base(tiny_sd, device="cpu")
