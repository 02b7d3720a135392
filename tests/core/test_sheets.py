"""Sheets: every picture in its place, readable, and unsafe ones unrecognisable."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from recare_patch.core import SheetRow, save_sheet, sheet
from recare_patch.core.errors import OutputError


def _flat(colour: str, size: tuple[int, int] = (64, 64)) -> Image.Image:
    return Image.new("RGB", size, colour)


def _has(image: Image.Image, colour: tuple[int, int, int], at_least: int) -> bool:
    return int((np.asarray(image) == colour).all(-1).sum()) >= at_least


def test_all_pictures_are_on_it() -> None:
    rows = [
        SheetRow("erased: a painting in the style of Van Gogh", [_flat("red"), _flat("lime")]),
        SheetRow("kept: stars", [_flat("blue"), _flat("yellow")]),
    ]
    found = sheet(rows, ["before", "after"], "Van Gogh")
    for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)):
        # Each was enlarged to twice its side.
        assert _has(found, colour, 128 * 128)
    assert found.height > 2 * 128
    assert found.width > 2 * 128 + 150


def test_small_pictures_stay_sharp() -> None:
    checks = Image.fromarray((np.indices((16, 16)).sum(0) % 2 * 255).astype(np.uint8)).convert("RGB")
    found = sheet([SheetRow("", [checks])])
    colours = {tuple(colour) for colour in np.asarray(found).reshape(-1, 3)}
    assert colours == {(0, 0, 0), (255, 255, 255)}


def test_large_pictures_are_reduced() -> None:
    found = sheet([SheetRow("", [_flat("red", (2000, 1000))])])
    assert found.width < 600
    assert _has(found, (255, 0, 0), 500 * 250)


@pytest.mark.parametrize(
    "label", ["", "one", "a very long label " * 12, "x" * 300, "zwei\nZeilen", "雪 ☃ 🎨"]
)
def test_any_label_fits(label: str) -> None:
    found = sheet([SheetRow(label, [_flat("red")]), SheetRow(label, [_flat("blue")])], [label], label)
    assert _has(found, (255, 0, 0), 128 * 128)
    assert _has(found, (0, 0, 255), 128 * 128)


def test_labels_are_drawn_and_legible() -> None:
    empty, labelled = (sheet([SheetRow(text, [_flat("white")])]) for text in (" ", "stars"))
    dark = [int((np.asarray(image.convert("L")) < 128).sum()) for image in (empty, labelled)]
    assert dark[0] == 0
    assert dark[1] > 60


def test_equal_neighbouring_columns_share_a_heading() -> None:
    row = [SheetRow("", [_flat("white")] * 4)]
    joined = sheet(row, ["before"] * 2 + ["after"] * 2)
    apart = sheet(row, ["before", "after", "before", "after"])
    ink = [int((np.asarray(image.convert("L")) < 160).sum()) for image in (joined, apart)]
    assert ink[1] > 1.6 * ink[0]


def test_ragged_and_empty_rows() -> None:
    found = sheet([SheetRow("a", [_flat("red"), None]), SheetRow("b"), SheetRow("c", [_flat("blue")])])
    assert _has(found, (0, 0, 255), 128 * 128)
    assert _has(found, (236, 236, 240), 128 * 128)
    assert sheet([]).size[0] > 0


def test_blurred_pictures_cannot_be_told_apart() -> None:
    generator = np.random.default_rng(0)
    noise = Image.fromarray(generator.integers(0, 256, (128, 128, 3), dtype=np.uint8))
    sharp, blurred = sheet([SheetRow("", [noise])]), sheet([SheetRow("", [noise])], blur=True)
    edges = [
        np.abs(np.diff(np.asarray(image, dtype=float)[20:120, 20:120], axis=1)).mean()
        for image in (sharp, blurred)
    ]
    assert edges[1] < edges[0] / 50


def test_saving(tmp_path: Path) -> None:
    image = sheet([SheetRow("", [_flat("red")])])
    for name in ("a.png", "b.jpg", "c/d.webp"):
        with Image.open(save_sheet(image, tmp_path / name)) as found:
            assert found.size == image.size
    with pytest.raises(OutputError, match="must end in"):
        save_sheet(image, tmp_path / "a.txt")
    assert not list(tmp_path.rglob("*.part"))
