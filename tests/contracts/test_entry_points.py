"""A method of another installed package: all commands know it, and its runs go on where they stopped."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from recare_patch.erasure.gauge import LOOK_EVERY, STATES
from tests.contracts import throwaway

SHORT = {"target_images.count": 4, "target_images.steps": 2, "erase.batch_size": 2, "adapter.rank": 2}


@pytest.fixture(scope="module")
def command(
    tiny_sd: Path, tiny_clip: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., subprocess.Popen[str]]:
    """The command line where a package with the method is installed; a run's first word is its command."""
    site = tmp_path_factory.mktemp("site")
    shutil.copy(throwaway.__file__, site / "throwaway.py")
    about = site / "throwaway-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: throwaway\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[recare_patch.methods]\nthrow-away = throwaway:ThrowAway\n")
    paths = [str(site), str(Path(__file__).parents[2])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    run = ["--concept", "Van Gogh", "--base", tiny_sd, "--set", "method=throw-away"]
    run += [part for key, value in (*SHORT.items(), ("clip", tiny_clip)) for part in ("--set", f"{key}={value}")]

    def start(*words: object) -> subprocess.Popen[str]:
        line = [words[0], *(run if words[0] in ("plan", "erase") else ()), *words[1:]]
        return subprocess.Popen(
            [sys.executable, "-m", "recare_patch", *map(str, line)],
            env=environment,
            cwd=site,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


@pytest.fixture(scope="module")
def tell(command: Callable[..., subprocess.Popen[str]]) -> Callable[..., str]:
    """What a command prints."""

    def tell(*words: object, code: int = 0) -> str:
        process = command(*words)
        out, err = process.communicate(timeout=300)
        assert process.returncode == code, out + err
        return out if code == 0 else err

    return tell


def test_it_is_listed_and_its_options_are_checked(tell: Callable[..., str]) -> None:
    assert "throw-away  (Throw-Away; Doe et al., 2026, arXiv 2601.00001)" in tell("methods")
    facts = json.loads(tell("methods", "throw-away", "--json"))["throw-away"]
    assert facts["options"] == "throw_away" and facts["defaults"] == {"erase.steps": 60}
    wrong = ("--set", "throw_away.strenght=2")
    assert "did you mean 'throw_away.strength'?" in tell("erase", *wrong, "--out", "wrong", code=2)


def test_its_runs_are_planned_killed_and_resumed(
    tell: Callable[..., str], command: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    strong = ("--set", "throw_away.strength=2")
    options = ("--kind", "style", *strong)
    tell("erase", *options, "--out", tmp_path / "whole")
    process = command("erase", *options, "--out", tmp_path / "killed")
    deadline = time.monotonic() + 180
    while not (tmp_path / "killed" / ".run" / "erase.checkpoint.safetensors").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "killed" / "pytorch_lora_weights.safetensors").exists()
    tell("erase", *options, "--out", tmp_path / "killed", "--resume")
    whole, resumed = (load_file(tmp_path / one / "pytorch_lora_weights.safetensors") for one in ("whole", "killed"))
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[key], resumed[key]) for key in whole)

    cost = json.loads((tmp_path / "whole" / "training.json").read_text())
    # Nothing is retained: a look is at the erased prompts alone, and the first one takes two more.
    steps, looks = len(cost["losses"]["erase"]), len(cost["measured"]["looks"])
    counted = cost["stages"]["erase"]["evaluations"]
    assert counted == steps * 2 * 4 + (2 + looks) * STATES and looks == -(-steps // LOOK_EVERY)
    table = [line.split() for line in tell("plan", *strong, "--tflops", 1).splitlines()]
    (planned,) = [int(words[1]) for words in table if words and words[0] == "erase"]
    assert counted <= planned <= 60 * 2 * 4 + (4 + 2 * 6) * STATES
    recipe, card = ((tmp_path / "whole" / name).read_text() for name in ("recipe.yaml", "README.md"))
    assert "throw_away:\n  strength: 2.0\n" in recipe
    assert "Throw-Away: guards nothing at all." in card and "2601.00001" in card
