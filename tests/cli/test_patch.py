"""``recare-patch inspect``, ``convert`` and ``generate``."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from recare_patch.cli import parse_patch
from recare_patch.core import PatchError
from recare_patch.recipe import METADATA_KEY, WEIGHTS_NAME, load_recipe
from tests.cli.conftest import Invoke, Stage, one_sentence
from tests.patch.test_patch import trained

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
FLUX = {
    "lora_unet_double_blocks_0_txt_attn_qkv.lora_down.weight": torch.ones(4, 8),
    "lora_unet_double_blocks_0_txt_attn_qkv.lora_up.weight": torch.ones(24, 4),
    "lora_unet_single_blocks_0_linear2.lora_down.weight": torch.ones(2, 40),
    "lora_unet_single_blocks_0_linear2.lora_up.weight": torch.ones(8, 2),
}
COMFYUI = {
    "diffusion_model.joint_blocks.0.context_block.attn.qkv.lora_A.weight": torch.ones(2, 8),
    "diffusion_model.joint_blocks.0.context_block.attn.qkv.lora_B.weight": torch.ones(24, 2),
}
PEFT = {"base_model.model.q.lora_A.weight": torch.zeros(3, 8), "base_model.model.q.lora_B.weight": torch.zeros(8, 3)}


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        (DIFFUSERS, {"format": "diffusers", "parts": {"unet": 1}, "modules": 1, "ranks": {"4": 1}, "alphas": 0}),
        (KOHYA, {"format": "kohya", "parts": {"unet": 1, "text_encoder": 1}, "ranks": {"2": 2}, "alphas": 1}),
        (FLUX, {"format": "kohya", "parts": {"transformer": 2}, "made_for": "FLUX.1 or FLUX.2"}),
        (COMFYUI, {"format": "comfyui", "parts": {"transformer": 1}, "made_for": "Stable Diffusion 3"}),
        (PEFT, {"format": "peft", "modules": 1, "ranks": {"3": 1}}),
        ({"conv.weight": torch.zeros(1)}, {"format": "not a LoRA", "modules": 0}),
    ],
)
def test_inspect_any_lora_file(invoke: Invoke, tensors: dict[str, torch.Tensor], told: dict[str, object]) -> None:
    Path("folder").mkdir()
    save_file(tensors, "folder/x.safetensors")
    result = invoke("inspect folder --json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert {key: facts[key] for key in told} == told
    assert facts["made_by"] is None
    assert facts["bytes"] == Path("folder/x.safetensors").stat().st_size


def test_a_patch_says_what_it_erases(invoke: Invoke) -> None:
    Path("patch").mkdir()
    save_file(DIFFUSERS, f"patch/{WEIGHTS_NAME}", {METADATA_KEY: load_recipe("tench").to_yaml()})
    result = invoke("inspect patch --no-check")
    assert result.exit_code == 0, result.output
    lines = dict(line.split(":", 1) for line in result.stdout.splitlines())
    told = [lines[name].strip() for name in ("erases", "base", "ranks")]
    assert told == ["tench", "atelier", "4 (1×)"]


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
    one_sentence(invoke("inspect x"), sentence)


@pytest.fixture
def patch_folder(invoke: Invoke, tiny_sd: Path) -> str:
    trained(tiny_sd)[1].save("patch")
    return "patch"


def test_convert_there_and_back(invoke: Invoke, patch_folder: str, tiny_sd: Path) -> None:
    made = invoke("convert patch --to kohya --out other")
    assert made.exit_code == 0, made.output
    file = Path("other/erase-van-gogh.safetensors")
    assert file.is_file() and str(file) in made.stdout and "kohya from diffusers" in made.stdout
    facts = json.loads(invoke("inspect", file, "--json").stdout)
    assert (facts["format"], facts["made_by"], facts["erases"]) == ("kohya", "recare-patch", "Van Gogh")
    assert facts["made_for"] == "stable-diffusion-v1/lora" and facts["checked"]
    back = invoke("convert", file, "--to", "diffusers", "--out", "back", "--base", tiny_sd)
    assert back.exit_code == 0, back.output
    first, second = load_file(f"patch/{WEIGHTS_NAME}"), load_file(f"back/{WEIGHTS_NAME}")
    assert first.keys() == second.keys()
    assert all(tensor.equal(second[name]) for name, tensor in first.items())
    assert invoke("inspect back").exit_code == 0


def test_convert_a_transformer_there_and_back(invoke: Invoke) -> None:
    save_file(FLUX, "flux.safetensors")
    assert invoke("convert flux.safetensors --to diffusers --out patch").exit_code == 0
    facts = json.loads(invoke("inspect patch --json").stdout)
    assert (facts["parts"], facts["made_for"]) == ({"transformer": 4}, "FLUX.1")
    made = invoke("convert patch --to kohya --out again.safetensors --precision fp32")
    assert made.exit_code == 0, made.output
    back = load_file("again.safetensors")
    stem = "lora_unet_double_blocks_0_txt_attn_qkv.lora_{}.weight"
    assert torch.equal(back[stem.format("up")] @ back[stem.format("down")], torch.full((24, 8), 4.0))


def test_convert_to_a_file_and_a_precision(invoke: Invoke, patch_folder: str) -> None:
    words = "convert patch --to kohya --out x.safetensors --precision fp32"
    assert invoke(words).exit_code == 0
    assert {tensor.dtype for tensor in load_file("x.safetensors").values()} == {torch.float32}
    one_sentence(invoke(words), "is there already")
    assert invoke(f"{words} --force").exit_code == 0
    one_sentence(invoke("convert patch --to kohya --out x.pt"), "written as .safetensors")
    one_sentence(invoke("convert patch --to diffusers --out patch"), "is there already")


HALF = {"unet.conv_in.lora_A.weight": torch.ones(2, 4)}
BAD: dict[str, Callable[[Path], object]] = {
    "truncated": lambda path: path.write_bytes(b"\x10\0\0\0\0\0\0\0{"),
    "pickle": lambda path: path.write_bytes(pickle.dumps({})),
    "half a pair": lambda path: save_file(HALF, path),
    "NaN": lambda path: save_file(HALF | {"unet.conv_in.lora_B.weight": torch.full((4, 2), torch.nan)}, path),
    "odd key": lambda path: save_file({"x": torch.ones(1)}, path),
    "LoHa": lambda path: save_file({"lora_unet_conv_in.hada_w1_a": torch.ones(1)}, path),
    "missing": lambda path: None,
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_not_converted(invoke: Invoke, case: str) -> None:
    BAD[case](Path("bad.safetensors"))
    one_sentence(invoke("convert bad.safetensors --to kohya --out out"), "")
    assert not Path("out").exists()


def test_nor_is_one_for_another_base(invoke: Invoke, patch_folder: str, tiny_sd_v: Path) -> None:
    result = invoke(f"convert patch --to kohya --out out --base {tiny_sd_v}")
    assert result.exit_code == 2 and "does not fit" in result.stderr
    assert not Path("out").exists()


def make_patch(name: str, recipe: str = "van-gogh") -> None:
    Path(name).mkdir()
    Path(name, "recipe.yaml").write_text(load_recipe(recipe).to_yaml())


def test_a_sheet_before_and_after(stage: Stage) -> None:
    make_patch("a")
    make_patch("b")
    result = stage.run("generate --patch a --patch b:-0.5 --prompt x --prompt y --count 2 --seed 7 --save-images all")
    assert result.exit_code == 0, result.output
    options = stage.options
    assert options["patches"] == [(Path("a"), 1.0), (Path("b"), -0.5)]
    assert (options["prompts"], options["seeds"]) == (["x", "y"], [7, 8])
    # How often and how strongly is left to the base.
    assert (options["steps"], options["guidance_scale"], options["base"]) == (None, None, "atelier")
    with Image.open("generated.png") as sheet:
        assert sheet.width > 200 and sheet.height > 4 * 100
    assert result.stdout == "Sheet: generated.png\nPictures: 8 in all\n"
    names = [f"{k:02d}-seed{seed}-{word}.png" for k in (0, 1) for seed in (7, 8) for word in ("after", "before")]
    assert sorted(path.name for path in Path("all").iterdir()) == names


def test_without_a_patch_only_the_base(stage: Stage) -> None:
    result = stage.run("generate --prompt x --count 1 --save-images all")
    assert result.exit_code == 0, result.output
    assert [path.name for path in Path("all").iterdir()] == ["00-seed0-before.png"]


def test_the_base_is_the_one_that_the_patch_was_made_for(stage: Stage) -> None:
    make_patch("a", "van-gogh-sd-1.5")
    stage.run("generate --patch a --prompt x")
    stage.run("generate --patch a --prompt x --base mine")
    assert [options["base"] for _, options in stage.calls] == [load_recipe("van-gogh-sd-1.5").base, "mine"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--patch none --prompt x", "there is no patch at none"),
        ("--patch none:0.5 --prompt x", "there is no patch at none"),
        ("--patch a:strong --prompt x", "the scale of a must be a number"),
        ("--patch a:nan --prompt x", "the scale of a must be a number"),
        ("--patch hub:a/b:much --prompt x", "the scale of hub:a/b must be a number"),
        ("--patch a", "Missing option '--prompt'"),
        ("--prompt x --gated", "no --patch is given"),
        ("--prompt x --count 0", "0 is not in the range"),
        ("--prompt x --seed 9223372036854775808", "is not in the range"),
        ("--prompt x --seed 9223372036854775807 --count 2", "9223372036854775807 is the highest"),
        ("--prompt x --out a", "must end in .png"),
        ("--prompt x --out a/recipe.yaml/b.png", "a part of the path is a file"),
        (f"--prompt x --out {'x' * 300}.png", "the name is too long"),
        ("--prompt x --save-images a/recipe.yaml", "a part of the path is a file"),
    ],
)
def test_what_cannot_be_generated(stage: Stage, words: str, sentence: str) -> None:
    make_patch("a")
    result = stage.run(f"generate {words}")
    assert result.exit_code == 2 and sentence in result.stderr and not stage.calls


def test_a_colon_in_a_folder_is_part_of_its_name(tmp_path: Path) -> None:
    (tmp_path / "a:2").mkdir()
    assert parse_patch(str(tmp_path / "a:2")) == (tmp_path / "a:2", 1.0)
    assert parse_patch(f"{tmp_path / 'a:2'}:3") == (tmp_path / "a:2", 3.0)
    with pytest.raises(PatchError):
        parse_patch(str(tmp_path / "b:2"))
