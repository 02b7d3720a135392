"""What the fuzzing found once, kept: each of these was a traceback, a hang or a broken message."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from recare_patch.cli.patch import described
from recare_patch.core import PatchError, RecarePatchError, nearest, read_safetensors_header
from recare_patch.erasure.methods.s_grace import read_words
from recare_patch.measure.attacks import AttackError, load_attack
from recare_patch.measure.card import EVIDENCE_START, claimed_figures
from recare_patch.measure.suites import Suite, parse_suite
from recare_patch.patch import Patch
from recare_patch.recipe import Recipe, parse_assignment
from tests.fuzz.readers import a_stack, attack_file
from tests.patch.making import file_of

DEEP = "[" * 100_000
# Nine lines of YAML that stand for thousands of values; every further line stands for thrice as many.
LAUGHS = "a: &a [x, x]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
ODD = ("!!int related", "x: 2020-02-30", "!!bool x", "!!timestamp x", "!!float x", LAUGHS, "x: " + "9" * 5000)


def _words(text: str, folder: Path) -> object:
    (folder / "words.yaml").write_text(text)
    return read_words(str(folder / "words.yaml"))


def _no_figures() -> object:
    # A front matter that is readable and claims nothing is fine as well.
    raise PatchError("read")


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
@pytest.mark.parametrize("text", ODD, ids=range(len(ODD)))
def test_yaml_of_any_kind(read: Callable[[str, Path], object], text: str, tmp_path: Path) -> None:
    with pytest.raises(RecarePatchError) as caught:
        read(text, tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a\nb", "\x1b[31mred", "\ud800", "a\u2028b", "\x9b"])
def test_what_a_file_says_is_shown_on_one_line(name: str) -> None:
    with pytest.raises(RecarePatchError) as caught:
        Suite(**{"recare_patch.concept": "x", name: 1})
    assert str(caught.value).isprintable() and str(caught.value).encode("utf-8")


def test_a_message_that_nobody_reads_is_cut() -> None:
    with pytest.raises(RecarePatchError, match=r"characters more\)") as caught:
        Recipe.from_yaml("".join(f"key{number}: 1\n" for number in range(3000)))
    assert len(str(caught.value)) < 5000
    assert nearest("x" * 1_000_000, ["erase.steps"]) is None


ENTRY = {"dtype": "F16", "shape": [2, 1], "data_offsets": [0, 4]}


class TestHeaders:
    @pytest.mark.parametrize(
        "change",
        [
            *({"shape": shape} for shape in ([2, float("inf")], [2.5, 1], ["2", 1], [-1, -1], [True, 1])),
            *({"data_offsets": offsets} for offsets in ([0.0, 4.0], [4, 0, 4], [-4, 0])),
            {"dtype": None},
        ],
    )
    def test_numbers_that_are_none(self, change: dict[str, Any], tmp_path: Path) -> None:
        text = json.dumps({"x": ENTRY | change}).encode()
        (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 4)
        with pytest.raises(PatchError, match="header is malformed"):
            read_safetensors_header(tmp_path / "x.safetensors")

    def test_a_huge_one_is_not_read(self, tmp_path: Path) -> None:
        with open(tmp_path / "x.safetensors", "wb") as handle:
            handle.write(struct.pack("<Q", 90_000_000))
            handle.truncate(90_000_100)
        with pytest.raises(PatchError, match="not a safetensors file"):
            Patch.load(tmp_path / "x.safetensors")

    def test_one_whose_length_starts_as_pickles_do(self, tmp_path: Path) -> None:
        lacking = 640 - len(json.dumps({"__metadata__": {"a": ""}, "x": ENTRY}))
        text = json.dumps({"__metadata__": {"a": "b" * lacking}, "x": ENTRY}).encode()
        (tmp_path / "x.safetensors").write_bytes(b"\x80\x02\0\0\0\0\0\0" + text + b"\0" * 4)
        assert set(read_safetensors_header(tmp_path / "x.safetensors").tensors) == {"x"}

    def test_a_stack_whose_error_is_no_number(self, tmp_path: Path) -> None:
        made = a_stack()
        assert made.metadata is not None
        odd = {"recare_patch.stacking": json.dumps({"relative_error": [{"a": {}}]})}
        file = file_of(tmp_path, made.tensors, made.metadata.to_header() | odd)
        with pytest.raises(PatchError, match="malformed header entry"):
            described(file, read_safetensors_header(file))


@pytest.mark.parametrize(
    "change", [{"interval": [0, 10**400]}, {"interval": [float("nan"), 1]}, {"version": DEEP}, {"base": "x"}, None]
)
def test_saved_attacks(change: dict[str, Any] | None, tmp_path: Path) -> None:
    note = json.loads(attack_file()) | (change or {})
    if change is None:
        del note["base"]
    (tmp_path / "attack.json").write_text(json.dumps(note).replace(f'"{DEEP}"', DEEP))
    if change is None:
        assert load_attack(tmp_path).base is None
        return
    with pytest.raises(AttackError, match="is damaged"):
        load_attack(tmp_path)


def test_a_card_of_marks() -> None:
    with pytest.raises(RecarePatchError, match="must stand once"):
        claimed_figures(EVIDENCE_START * 20_000)
    with pytest.raises(RecarePatchError):
        parse_suite("implicit:\n" + "".join(f"- a{number}\n" for number in range(3000)))
