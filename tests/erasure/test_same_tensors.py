"""Small runs end with the very tensors that they ended with before.

``same_tensors.json`` holds each run's command line and the SHA-256 of its files' tensors. Those of esd and
forget-me-not are from before the package was rebuilt, and ask for the pictures of that time. Those of recare, s-grace
and uce are still to be recorded: companions, what is held and how often have changed on purpose.

Floating-point sums depend on the machine, so elsewhere these tests say why they are skipped. Who changes a
result on purpose records anew, and says so in the change log: ``python -m tests.erasure.test_same_tensors NAME …``.
"""

from __future__ import annotations

import hashlib
import json
import platform
import shlex
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from recare_patch.cli import cli

FILE = Path(__file__).with_name("same_tensors.json")
RECORDED = json.loads(FILE.read_text(encoding="utf-8"))


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


def _make(name: str, folder: Path) -> Path:
    """The folder of a run, which is made with those that a stack is made of where it is not there."""
    if (folder / name).exists():
        return folder / name
    arguments = shlex.split(RECORDED["runs"][name]["arguments"])
    for part in arguments:
        if part.startswith("{folder}/"):
            _make(part.removeprefix("{folder}/"), folder)
    line = [part.replace("{folder}", str(folder)) for part in arguments]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        done = CliRunner().invoke(cli, [*line, "--out", str(folder / name)])
    finally:
        torch.set_num_threads(threads)
    assert done.exit_code == 0, done.output
    return folder / name


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for all of them."""
    return tmp_path_factory.mktemp("same")


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    for key, tensor in sorted(load_file(file).items()):
        digest.update(f"{key}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _digests(folder: Path) -> dict[str, str]:
    return {file.name: _digest(file) for file in sorted(folder.glob("*.safetensors"))}


RUNS = [pytest.param(name, marks=pytest.mark.slow if run.get("slow") else ()) for name, run in RECORDED["runs"].items()]


@pytest.mark.parametrize("name", RUNS)
def test_the_same_tensors(name: str, made: Path) -> None:
    recorded = RECORDED["runs"][name]["sha256"]
    if recorded is None:
        pytest.skip(f"to be recorded: python -m tests.erasure.test_same_tensors {name}")
    assert _digests(_make(name, made)) == recorded


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        for one in sys.argv[1:]:
            RECORDED["runs"][one]["sha256"] = _digests(_make(one, Path(place)))
            FILE.write_text(json.dumps({**RECORDED, "machine": _machine()}, indent=1) + "\n", encoding="utf-8")
