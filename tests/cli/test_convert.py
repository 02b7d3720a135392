from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file

from recare_patch.recipe.recipe import WEIGHTS_NAME
from tests.patch.test_patch import trained

Invoke = Callable[..., Result]


@pytest.fixture
def patch_folder(invoke: Invoke, tiny_sd: Path) -> Path:
    trained(tiny_sd)[1].save("patch")
    return Path("patch")


def test_there_and_back(invoke: Invoke, patch_folder: Path, tiny_sd: Path) -> None:
    made = invoke("convert", patch_folder, "--to", "kohya", "--out", "other")
    assert made.exit_code == 0, made.output
    file = Path("other/erase-van-gogh.safetensors")
    assert file.is_file() and str(file) in made.stdout and "kohya from diffusers" in made.stdout

    facts = json.loads(invoke("inspect", file, "--json").stdout)
    assert (facts["format"], facts["made_by"], facts["erases"]) == ("kohya", "recare-patch", "Van Gogh")
    assert facts["made_for"] == "stable-diffusion-v1/lora" and facts["checked"]

    back = invoke("convert", file, "--to", "diffusers", "--out", "back", "--base", tiny_sd)
    assert back.exit_code == 0, back.output
    first, second = load_file(patch_folder / WEIGHTS_NAME), load_file(f"back/{WEIGHTS_NAME}")
    assert first.keys() == second.keys()
    assert all(tensor.equal(second[name]) for name, tensor in first.items())
    assert invoke("inspect", "back").exit_code == 0


def test_file_and_precision(invoke: Invoke, patch_folder: Path) -> None:
    words = ("convert", patch_folder, "--to", "kohya", "--out", "x.safetensors", "--precision", "fp32")
    assert invoke(*words).exit_code == 0
    assert {tensor.dtype for tensor in load_file("x.safetensors").values()} == {torch.float32}
    again = invoke(*words)
    assert again.exit_code == 2 and "is there already" in again.stderr
    assert invoke(*words, "--force").exit_code == 0


def test_no_pickle_is_written(invoke: Invoke, patch_folder: Path) -> None:
    result = invoke("convert", patch_folder, "--to", "kohya", "--out", "x.pt")
    assert result.exit_code == 2 and "written as .safetensors" in result.stderr


def test_the_source_stays(invoke: Invoke, patch_folder: Path) -> None:
    """A source is never written over by its own conversion unless that is asked for."""
    result = invoke("convert", patch_folder, "--to", "diffusers", "--out", patch_folder)
    assert result.exit_code == 2 and "is there already" in result.stderr


def _bad_files() -> dict[str, Callable[[Path], object]]:
    half = {"unet.conv_in.lora_A.weight": torch.ones(2, 4)}
    whole = half | {"unet.conv_in.lora_B.weight": torch.full((4, 2), torch.nan)}
    return {
        "truncated": lambda path: path.write_bytes(b"\x10\0\0\0\0\0\0\0{"),
        "pickle": lambda path: path.write_bytes(pickle.dumps({})),
        "half a pair": lambda path: save_file(half, path),
        "NaN": lambda path: save_file(whole, path),
        "odd key": lambda path: save_file({"x": torch.ones(1)}, path),
        "LoHa": lambda path: save_file({"lora_unet_conv_in.hada_w1_a": torch.ones(1)}, path),
        "missing": lambda path: None,
    }


@pytest.mark.parametrize("case", _bad_files())
def test_bad_file(invoke: Invoke, case: str) -> None:
    _bad_files()[case](Path("bad.safetensors"))
    result = invoke("convert", "bad.safetensors", "--to", "kohya", "--out", "out")
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1
    assert not Path("out").exists()


def test_another_base(invoke: Invoke, patch_folder: Path, tiny_sd_v: Path) -> None:
    result = invoke("convert", patch_folder, "--to", "kohya", "--out", "out", "--base", tiny_sd_v)
    assert result.exit_code == 2 and "does not fit" in result.stderr
    assert not Path("out").exists()
