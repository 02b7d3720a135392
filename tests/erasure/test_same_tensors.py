"""Small runs end with the very tensors that they ended with before the package was rebuilt.

``same_tensors.json`` holds each run's command line and the SHA-256 of its files' tensors, recorded before.
Floating-point sums depend on the machine, so elsewhere these tests say why they are skipped. Who changes a
result on purpose records anew, and says so in the change log.
"""

from __future__ import annotations

import functools
import hashlib
import json
import platform
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from recare_patch.cli import cli

RECORDED = json.loads(Path(__file__).with_name("same_tensors.json").read_text(encoding="utf-8"))


def _machine() -> dict[str, str]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    capability = torch.backends.cpu.get_cpu_capability()
    processor = models[0] if models else platform.processor()
    return {"torch": torch.__version__, "processor": processor, "instructions": capability}


pytestmark = pytest.mark.skipif(
    _machine() != RECORDED["machine"], reason=f"recorded on {RECORDED['machine']}, this is {_machine()}"
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a run, and of those that a stack is made of, when it is asked for."""
    folder = tmp_path_factory.mktemp("same")

    @functools.cache
    def make(name: str) -> Path:
        arguments = shlex.split(RECORDED["runs"][name]["arguments"])
        for part in arguments:
            if part.startswith("{folder}/"):
                make(part.removeprefix("{folder}/"))
        line = [part.replace("{folder}", str(folder)) for part in arguments]
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            done = CliRunner().invoke(cli, [*line, "--out", str(folder / name)])
        finally:
            torch.set_num_threads(threads)
        assert done.exit_code == 0, done.output
        return folder / name

    return make


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    for key, tensor in sorted(load_file(file).items()):
        digest.update(f"{key}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


RUNS = [pytest.param(name, marks=pytest.mark.slow if run.get("slow") else ()) for name, run in RECORDED["runs"].items()]


@pytest.mark.parametrize("name", RUNS)
def test_the_same_tensors(name: str, made: Callable[[str], Path]) -> None:
    found = {file.name: _digest(file) for file in made(name).glob("*.safetensors")}
    assert found == RECORDED["runs"][name]["sha256"]
