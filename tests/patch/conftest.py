"""Patches and a pipeline for every test of this room."""

from __future__ import annotations

from pathlib import Path

import pytest
from diffusers import StableDiffusionPipeline

from recare_patch.combine.stacking import stack
from recare_patch.patch import Patch
from tests.patch.making import plain, trained


@pytest.fixture(scope="session")
def patch(tiny_sd: Path) -> Patch:
    return trained(tiny_sd)[1]


@pytest.fixture(scope="session")
def whole_patch(tiny_sd: Path) -> Patch:
    """Of every layer of the UNet that takes a LoRA, convolutions too."""
    return trained(tiny_sd, layers="all")[1]


@pytest.fixture(scope="session")
def text_patch(tiny_sd: Path) -> Patch:
    return trained(tiny_sd, layers="text-encoder", concept="Monet")[1]


@pytest.fixture(scope="session")
def both(patch: Patch, text_patch: Patch) -> Patch:
    return stack([(patch, 1.0), (text_patch, 1.0)])


@pytest.fixture
def pipe(tiny_sd: Path) -> StableDiffusionPipeline:
    return plain(tiny_sd)
