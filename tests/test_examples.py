"""Every example runs, as its own first lines say."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from recare_patch.models import load_base
from recare_patch.recipe import MemoryOptions
from tests.measure.making import make_patch
from tests.pipelines import make_pipeline

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name: str, *words: object, cwd: Path) -> str:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(EXAMPLES.parent)}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *map(str, words)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_no_example_is_forgotten() -> None:
    assert sorted(path.name for path in EXAMPLES.glob("*.py")) == [
        "apply_in_python.py",
        "defence.py",
        "erase_van_gogh.py",
        "plain_diffusers.py",
    ]


def test_the_plain_example_does_without_this_package() -> None:
    assert "recare" not in (EXAMPLES / "plain_diffusers.py").read_text().replace("van-gogh-patch", "")


@pytest.fixture(scope="module")
def patch(tiny_sd: Path, tiny_clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("examples")
    run("erase_van_gogh.py", "--steps-small", "--base", tiny_sd, "--clip", tiny_clip, "--out", "patch", cwd=folder)
    return folder / "patch"


def test_erase_van_gogh(patch: Path) -> None:
    assert (patch / "pytorch_lora_weights.safetensors").is_file()


def test_plain_diffusers(patch: Path, tiny_sd: Path, tmp_path: Path) -> None:
    run("plain_diffusers.py", tiny_sd, patch, "--steps", 2, cwd=tmp_path)
    assert (tmp_path / "patched.png").is_file()


def test_plain_diffusers_on_flux(tiny_clip: Path, tmp_path: Path) -> None:
    folder = make_pipeline("FLUX.1 dev", tmp_path / "flux")
    base = load_base(folder, device="cpu", memory=MemoryOptions(resolution="32x32"))
    patch = make_patch(base, tmp_path / "flux-patch", tiny_clip)
    run("plain_diffusers.py", folder, patch, "--steps", 1, "--guidance-scale", 3.5, cwd=tmp_path)
    assert (tmp_path / "patched.png").is_file()


def test_apply_in_python(patch: Path, tiny_sd: Path, tmp_path: Path) -> None:
    run("apply_in_python.py", patch, "--base", tiny_sd, "--steps", 2, cwd=tmp_path)
    assert (tmp_path / "scales.png").is_file()


def test_defence(tiny_sd: Path, tmp_path: Path) -> None:
    run("defence.py", "--base", tiny_sd, "--steps", 2, cwd=tmp_path)
    assert (tmp_path / "defended.png").is_file()
