"""Fixtures shared by all tests: the tiny random models, written once a session."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

# Tests never reach for a network, whatever the machine's configuration says.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

from collections.abc import Iterator
from typing import Any

import pytest

from tests.share.hub_stand_in import TOKEN, HubStandIn, point_to
from tests.tiny import make_tiny_clip, make_tiny_sd, make_tiny_sd3, make_tiny_sdxl


@pytest.fixture(scope="session")
def tiny_sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SD-1.5-shaped pipeline folder: epsilon, 8x8 latents, 32-wide prompts."""
    return make_tiny_sd(tmp_path_factory.mktemp("tiny") / "tiny-sd")


@pytest.fixture(scope="session")
def tiny_sd_v(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SD-2-shaped one: v-prediction, OpenCLIP's kind of encoder, another latent size and width."""
    return make_tiny_sd(
        tmp_path_factory.mktemp("tiny") / "tiny-sd-v",
        seed=1,
        prediction_type="v_prediction",
        latent_size=12,
        width=48,
        linear_projection=True,
        open_clip=True,
    )


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SDXL-shaped pipeline folder: two encoders, 32 and 48 wide, pooled text and sizes."""
    return make_tiny_sdxl(tmp_path_factory.mktemp("tiny") / "tiny-sdxl")


@pytest.fixture(scope="session")
def tiny_sd3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SD3-shaped pipeline folder: a transformer with joint attention, trained by flow matching."""
    return make_tiny_sd3(tmp_path_factory.mktemp("tiny") / "tiny-sd3")


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIPModel folder whose vocabulary is ``tests.tiny.WORDS``."""
    return make_tiny_clip(tmp_path_factory.mktemp("tiny") / "tiny-clip")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubStandIn]:
    """A stand-in of the Hub that huggingface_hub takes for the Hub, logged in to as "me"."""
    from huggingface_hub import constants
    from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

    # As on the command line, which says so before the client is imported.
    disable_progress_bars()
    places = {"HF_HUB_CACHE": str(tmp_path / "hf-cache"), "HF_TOKEN_PATH": str(tmp_path / "no-token")}
    for name, value in {"HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True, **places}.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with HubStandIn().running() as found:
        point_to(found.endpoint, monkeypatch)
        yield found
    enable_progress_bars()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A Chromium without a window; skips where there is none."""
    sync_api = pytest.importorskip("playwright.sync_api")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync_api.sync_playwright() as playwright:
        try:
            # A container's root has no sandbox to run it in; it opens pages of these tests alone.
            opened = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        except sync_api.Error as fault:
            pytest.skip(f"no Chromium here: {str(fault).splitlines()[0]}")
        yield opened
        opened.close()
