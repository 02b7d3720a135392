"""One watch for all that the fuzzing tries."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.fuzz.watching import Watch, little_memory


@pytest.fixture(scope="session")
def watch() -> Iterator[Watch]:
    made = Watch()
    with little_memory():
        yield made
