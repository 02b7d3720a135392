"""Two processes train as one: the same losses and the same patch, up to the order of sums."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from recare_patch.core import Crew
from recare_patch.erasure import erase
from tests.models.test_architectures import small_recipe


def test_shares_are_whole_and_equal() -> None:
    for rows in (0, 1, 2, 5, 12):
        shares = [Crew(k, 3).own(rows) for k in range(3)]
        assert [share.start for share in shares] == [0, shares[0].stop, shares[1].stop]
        assert shares[-1].stop == rows
        sizes = [share.stop - share.start for share in shares]
        assert max(sizes) - min(sizes) <= 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["style", "nsfw"])
def test_two_processes_erase_as_one_does(tiny_sd: Path, tiny_clip: Path, tmp_path: Path, kind: str) -> None:
    # Five rows cannot be halved, and one retained image leaves a process without a batch.
    sizes: dict[str, Any] = {"erase.batch_size": 2, "erase.retain_batch_size": 3, "search.batch_size": 1}
    sizes |= {"erase.retained_images": 1, "erase.optimizer": "adamw", "concept.kind": kind}
    recipe = small_recipe(tiny_sd, tiny_clip, **sizes)
    alone = erase(recipe, tmp_path / "alone", device="cpu")
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    launch = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --main_process_port 0"
    command = [sys.executable, *launch.split(), "-m", "recare_patch", "erase"]
    run = subprocess.run(
        [*command, "--recipe", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "two")],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("Erased Van Gogh") == 1
    told = json.loads((tmp_path / "two" / "training.json").read_text())
    assert told["losses"].keys() == alone.cost["losses"].keys()
    for stage, losses in alone.cost["losses"].items():
        assert told["losses"][stage] == pytest.approx(losses, abs=1e-4), stage
    assert {stage: one["evaluations"] for stage, one in told["stages"].items()} == {
        stage: one["evaluations"] for stage, one in alone.cost["stages"].items()
    }
    found = load_file(tmp_path / "two" / "pytorch_lora_weights.safetensors")
    assert found.keys() == alone.patch.tensors.keys()
    for key, tensor in alone.patch.tensors.items():
        torch.testing.assert_close(found[key].float(), tensor.float(), rtol=1e-2, atol=1e-3)
    assert not (tmp_path / "two" / ".run").exists()
