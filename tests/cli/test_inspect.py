from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result
from safetensors.torch import save_file

from recare_patch.recipe.recipe import METADATA_KEY, WEIGHTS_NAME, load_recipe

Invoke = Callable[..., Result]
DIFFUSERS = {
    "unet.mid_block.attentions.0.to_k.lora_A.weight": torch.zeros(4, 8),
    "unet.mid_block.attentions.0.to_k.lora_B.weight": torch.zeros(8, 4),
}
KOHYA = {
    "lora_unet_mid_block_to_k.lora_down.weight": torch.zeros(2, 8),
    "lora_unet_mid_block_to_k.lora_up.weight": torch.zeros(8, 2),
    "lora_unet_mid_block_to_k.alpha": torch.tensor(1.0),
    "lora_te_text_model_q.lora_down.weight": torch.zeros(2, 8, dtype=torch.float16),
    "lora_te_text_model_q.lora_up.weight": torch.zeros(8, 2, dtype=torch.float16),
}
PEFT = {
    "base_model.model.q.lora_A.weight": torch.zeros(3, 8),
    "base_model.model.q.lora_B.weight": torch.zeros(8, 3),
}


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        (
            DIFFUSERS,
            {"format": "diffusers", "parts": {"unet": 1}, "modules": 1, "ranks": {"4": 1}, "alphas": 0},
        ),
        (
            KOHYA,
            {
                "format": "kohya",
                "parts": {"unet": 1, "text_encoder": 1},
                "modules": 2,
                "ranks": {"2": 2},
                "alphas": 1,
            },
        ),
        (PEFT, {"format": "peft", "modules": 1, "ranks": {"3": 1}}),
        ({"conv.weight": torch.zeros(1)}, {"format": "not a LoRA", "modules": 0}),
    ],
)
def test_any_lora_file(invoke: Invoke, tensors: dict[str, torch.Tensor], expected: dict[str, object]) -> None:
    save_file(tensors, "x.safetensors")
    result = invoke("inspect", "x.safetensors", "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert {key: facts[key] for key in expected} == expected
    assert facts["made_by"] is None
    assert facts["bytes"] == Path("x.safetensors").stat().st_size


def test_a_patch_says_what_it_erases(invoke: Invoke) -> None:
    Path("patch").mkdir()
    save_file(DIFFUSERS, f"patch/{WEIGHTS_NAME}", {METADATA_KEY: load_recipe("tench").to_yaml()})
    result = invoke("inspect", "patch", "--no-check")
    assert result.exit_code == 0, result.output
    lines = dict(line.split(":", 1) for line in result.stdout.splitlines())
    assert lines["erases"].strip() == "tench"
    assert lines["base"].strip() == "atelier"
    assert lines["ranks"].strip() == "4 (1×)"


def test_a_folder_with_one_other_lora(invoke: Invoke) -> None:
    Path("folder").mkdir()
    save_file(KOHYA, "folder/some.safetensors")
    assert "kohya" in invoke("inspect", "folder").stdout


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: None, "there is no patch at x"),
        (lambda: Path("x").mkdir(), f"x is no patch: {WEIGHTS_NAME} is not in it"),
        (lambda: torch.save({"a": torch.zeros(1)}, "x"), "x is a pickle"),
        (lambda: Path("x").write_text("hello, this is no tensor"), "not a safetensors file"),
    ],
)
def test_what_cannot_be_inspected(invoke: Invoke, make: Callable[[], object], sentence: str) -> None:
    make()
    result = invoke("inspect", "x")
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert sentence in line
