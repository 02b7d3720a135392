"""What a run keeps to go on from: read back as it was, or not at all, whichever bit flipped."""

from __future__ import annotations

import contextlib
import random
from pathlib import Path

import pytest
import torch
from PIL import Image

from recare_patch.core import (
    EvaluationError,
    ResumeError,
    keep_json,
    keep_tensors,
    kept_json,
    kept_tensors,
    read_picture,
)

FOUND = {"rows": [1, 2, 3], "text": "Édouard", "rate": 0.25, "none": None, "deep": {"b": [True], "a": {}}}


def test_what_is_kept_comes_back(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 4), "b": torch.arange(5), "c": torch.tensor(float("inf")).half()}
    keep_tensors(tmp_path / "t", tensors, {"note": "é", "x": ""})
    again = kept_tensors(tmp_path / "t")
    assert again is not None and again[1] == {"note": "é", "x": ""}
    assert again[0].keys() == tensors.keys() and all(torch.equal(again[0][key], tensors[key]) for key in tensors)
    keep_json(tmp_path / "j", FOUND)
    assert kept_json(tmp_path / "j") == FOUND
    assert kept_tensors(tmp_path / "no") is None and kept_json(tmp_path / "no") is None


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def test_no_flipped_bit_changes_what_is_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tensors, picture, rng = {"a": torch.randn(2, 4)}, tmp_path / "p.png", random.Random(0)
    keep_tensors(tmp_path / "t", tensors, {"step": "3"})
    keep_json(tmp_path / "j", FOUND)
    Image.effect_noise((16, 16), 60).convert("RGB").save(picture)
    seen = Image.open(picture).tobytes()
    for name in ("t", "j", "p.png"):
        data = (tmp_path / name).read_bytes()
        for bit in range(8 * len(data)) if name != "p.png" else rng.sample(range(8 * len(data)), 2000):
            (tmp_path / name).write_bytes(flipped(data, bit))
            if name == "t":
                found = kept_tensors(tmp_path / name)
                # Spaces at a header's end say nothing.
                assert found is None or (torch.equal(found[0]["a"], tensors["a"]) and found[1] == {"step": "3"})
            elif name == "j":
                assert kept_json(tmp_path / name, remade=True) in (None, FOUND)
            else:
                with contextlib.suppress(EvaluationError):
                    assert read_picture(picture, "it", EvaluationError).tobytes() == seen
    assert "is made anew" in caplog.text


def test_what_cannot_be_made_anew_is_refused(tmp_path: Path) -> None:
    keep_json(tmp_path / "j", FOUND)
    (tmp_path / "j").write_bytes((tmp_path / "j").read_bytes().replace(b"0.25", b"0.24"))
    with pytest.raises(ResumeError, match="j of this run is damaged"):
        kept_json(tmp_path / "j")
    keep_tensors(tmp_path / "t", {"a": torch.ones(1)})
    (tmp_path / "t").write_bytes(flipped((tmp_path / "t").read_bytes(), 8 * ((tmp_path / "t").stat().st_size - 1)))
    with pytest.raises(ResumeError, match="damaged"):
        kept_tensors(tmp_path / "t", remade=False)
