"""The plumbing of the comparison with real clients, on stand-ins of their sources: the real ones are not at hand."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.real_clients import ClientError, compare, function_of
from recare_patch.models import load_base
from recare_patch.patch import Patch
from tests.patch.making import trained

COMFY_LORA = """
LORA_CLIP_MAP = {"self_attn.q_proj": "self_attn_q_proj"}
def load_lora(lora, to_load):
    parts = ("lora_up.weight", "lora_down.weight", "alpha")
    named = [name for name in to_load if f"{name}.alpha" in lora]
    return {to_load[name]: ("lora", [lora[f"{name}.{part}"] for part in parts]) for name in named}
"""
COMFY_UTILS = """
def unet_to_diffusers(config):
    assert len(config["transformer_depth_output"]) == 2 * len(config["transformer_depth"]) == 4
    return {MODULE + ".weight": PLACE + ".weight"}
"""
A1111 = """
import nowhere
re_digits = re.compile(r"\\d+")
broken = nowhere.x
def convert_diffusers_name_to_compvis(key: nowhere.T, is_sd2) -> nowhere.T:
    return key.removeprefix("lora_unet_")
"""
SD_SCRIPTS = """
from types import SimpleNamespace
import nowhere_either
"""


@pytest.fixture
def roots(tmp_path: Path) -> Iterator[dict[str, Path]]:
    before = set(sys.modules)
    yield {name: tmp_path / name for name in ("ComfyUI", "A1111", "sd-scripts")}
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("comfy", "networks"):
            del sys.modules[name]


def write(root: Path, name: str, text: str) -> None:
    file = root / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def test_the_table_and_what_is_missing(tiny_sd: Path, roots: dict[str, Path]) -> None:
    _, patch = trained(tiny_sd)
    module = "mid_block.attentions.0.transformer_blocks.0.attn2.to_q"
    one = Patch({key: part for key, part in patch.tensors.items() if f"{module}." in key}, patch.metadata)
    pipe: Any = load_base(tiny_sd, device="cpu").pipeline
    rows = compare(one, pipe, roots)
    assert [row[0] for row in rows] == [*roots] and all("does not hold" in row[1] for row in rows)
    place = "middle_block.1.transformer_blocks.0.attn2.to_q"
    write(roots["ComfyUI"], "comfy/lora.py", COMFY_LORA)
    write(roots["ComfyUI"], "comfy/utils.py", f"MODULE, PLACE = {module!r}, {place!r}" + COMFY_UTILS)
    write(roots["A1111"], "extensions-builtin/Lora/networks.py", A1111)
    write(roots["sd-scripts"], "networks/lora.py", SD_SCRIPTS)
    comfy, a1111, scripts = compare(one, pipe, roots)
    assert comfy == ("ComfyUI", "1 of 1", "0", comfy[3]) and float(comfy[3]) < 1e-12
    assert a1111[:3] == ("A1111", "1 of 1", "0") and float(a1111[3]) < 1e-12
    assert "needs nowhere_either: install the client's requirements" in scripts[1]
    with pytest.raises(ClientError, match="has no rename"):
        function_of(roots["A1111"] / "extensions-builtin/Lora/networks.py", "rename")
    assert compare(one, pipe, {}) == []
