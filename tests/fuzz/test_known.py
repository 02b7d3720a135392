"""What the fuzzing found once, kept: each of these was a traceback, a hang or a broken message."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from recare_patch.core.errors import PatchError, RecarePatchError, nearest
from recare_patch.core.files import read_safetensors_header
from recare_patch.erasure.prepare import read_words
from recare_patch.measure.attacks import AttackError, load_attack
from recare_patch.measure.card import EVIDENCE_START, claimed_figures
from recare_patch.measure.suites import Suite, parse_suite
from recare_patch.patch import formats
from recare_patch.patch.patch import Patch
from recare_patch.recipe.recipe import WEIGHTS_NAME, Recipe, parse_assignment
from tests.fuzz.readers import a_patch, attack_file

DEEP = "[" * 100_000
LAUGHS = "a: &a [x, x]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
"""Nine lines of YAML that stand for thousands of values; every further line stands for thrice as many."""

BAD_YAML = (
    "!!int related",
    "x: 2020-02-30",
    "!!bool x",
    "!!timestamp x",
    "!!float x",
    LAUGHS,
    "x: " + "9" * 5000,
)


def _words(text: str, folder: Path) -> object:
    (folder / "words.yaml").write_text(text)
    return read_words(str(folder / "words.yaml"))


@pytest.mark.parametrize(
    "read",
    [
        lambda text, _: Recipe.from_yaml(text),
        lambda text, _: parse_suite(text),
        lambda text, _: claimed_figures(f"---\n{text}\n---\n")[0] or _no_figures(),
        lambda text, _: parse_assignment(f"x={text}") and _no_figures(),
        _words,
    ],
    ids=["recipe", "suite", "card", "assignment", "words"],
)
@pytest.mark.parametrize("text", BAD_YAML, ids=range(len(BAD_YAML)))
def test_yaml_of_any_kind(read: Callable[[str, Path], object], text: str, tmp_path: Path) -> None:
    with pytest.raises(RecarePatchError) as caught:
        read(text, tmp_path)
    assert "\n" not in str(caught.value)


def _no_figures() -> object:
    # A front matter that is readable and claims nothing is fine as well.
    raise PatchError("read")


class TestMessages:
    @pytest.mark.parametrize("name", ["a\nb", "\x1b[31mred", "\ud800", "a\u2028b", "\x9b"])
    def test_what_a_file_says_is_shown_on_one_line(self, name: str, tmp_path: Path) -> None:
        text = json.dumps({"recare_patch.concept": "x", name: 1})
        with pytest.raises(RecarePatchError) as caught:
            Suite(**json.loads(text))
        told = str(caught.value)
        assert told.isprintable()
        told.encode("utf-8")

    def test_a_message_that_nobody_reads_is_cut(self) -> None:
        with pytest.raises(RecarePatchError) as caught:
            Recipe.from_yaml("".join(f"key{number}: 1\n" for number in range(3000)))
        assert len(str(caught.value)) < 5000
        assert "characters more)" in str(caught.value)
        assert nearest("x" * 1_000_000, ["erase.steps"]) is None


def header_file(folder: Path, header: Any, body: bytes = b"") -> Path:
    text = json.dumps(header).encode()
    file = folder / "x.safetensors"
    file.write_bytes(struct.pack("<Q", len(text)) + text + body)
    return file


class TestHeaders:
    @pytest.mark.parametrize(
        "change",
        [
            {"shape": [2, float("inf")]},
            {"shape": [2.5, 1]},
            {"shape": ["2", 1]},
            {"shape": [-1, -1]},
            {"shape": [True, 1]},
            {"data_offsets": [0.0, 4.0]},
            {"data_offsets": [4, 0, 4]},
            {"data_offsets": [-4, 0]},
            {"dtype": None},
        ],
    )
    def test_numbers_that_are_none(self, change: dict[str, Any], tmp_path: Path) -> None:
        entry = {"dtype": "F16", "shape": [2, 1], "data_offsets": [0, 4]} | change
        file = header_file(tmp_path, {"x": entry}, b"\0" * 4)
        with pytest.raises(PatchError, match="header is malformed"):
            read_safetensors_header(file)

    def test_a_huge_one_is_not_read(self, tmp_path: Path) -> None:
        file = tmp_path / "x.safetensors"
        with open(file, "wb") as handle:
            handle.write(struct.pack("<Q", 90_000_000))
            handle.truncate(90_000_100)
        began = time.process_time()
        with pytest.raises(PatchError, match="not a safetensors file"):
            Patch.load(file)
        assert time.process_time() - began < 1

    @pytest.mark.parametrize(
        ("key", "text"),
        [
            ("versions", DEEP),
            ("rank", DEEP),
            ("care_set", DEEP),
            ("care_set", "[]"),
            ("care_set", '{"tokens": [{"kept": true}]}'),
            ("care_set", '{"tokens": [{"kept": true, "text": 3}]}'),
        ],
    )
    def test_entries_of_a_patch(self, key: str, text: str, tmp_path: Path) -> None:
        patch = a_patch()
        assert patch.metadata is not None
        header = patch.metadata.to_header() | {f"recare_patch.{key}": text}
        save_file(dict(patch.tensors), tmp_path / WEIGHTS_NAME, header)
        with pytest.raises(PatchError, match="malformed header entry"):
            Patch.load(tmp_path)

    def test_settings_of_other_tools(self, tmp_path: Path) -> None:
        save_file(dict(a_patch().tensors), tmp_path / "x.safetensors", {"lora_adapter_metadata": DEEP})
        with pytest.raises(PatchError, match="keeps a scale of its own"):
            Patch.load(tmp_path / "x.safetensors")
        tensors = load_file(tmp_path / "x.safetensors")
        named = {key.replace("unet.", "base_model.model."): tensor for key, tensor in tensors.items()}
        save_file(named, tmp_path / "adapter_model.safetensors")
        (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 10**400}))
        with pytest.raises(PatchError, match="malformed adapter_config"):
            formats.from_any(tmp_path / "adapter_model.safetensors")


@pytest.mark.parametrize(
    "change", [{"interval": [0, 10**400]}, {"interval": [float("nan"), 1]}, {"version": DEEP}, {"base": "x"}]
)
def test_saved_attacks(change: dict[str, Any], tmp_path: Path) -> None:
    note = json.loads(attack_file()) | change
    text = json.dumps(note).replace(f'"{DEEP}"', DEEP)
    (tmp_path / "attack.json").write_text(text)
    with pytest.raises(AttackError, match="is damaged"):
        load_attack(tmp_path)


def test_a_saved_attack_without_the_base_rate(tmp_path: Path) -> None:
    note = json.loads(attack_file())
    del note["base"]
    (tmp_path / "attack.json").write_text(json.dumps(note))
    assert load_attack(tmp_path).base is None


def test_a_card_of_marks_takes_no_time() -> None:
    began = time.process_time()
    with pytest.raises(RecarePatchError, match="must stand once"):
        claimed_figures(EVIDENCE_START * 20_000)
    with pytest.raises(RecarePatchError):
        parse_suite("implicit:\n" + "".join(f"- a{number}\n" for number in range(3000)))
    assert time.process_time() - began < 3
