"""Progress in a log and a terminal; sheets: every picture in its place, and unsafe ones unrecognisable."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from recare_patch.core import NullProgress, OutputError, Progress, RichProgress, SheetRow, blurred, save_sheet, sheet


def test_a_log_gets_one_line_a_stage_and_a_terminal_bars() -> None:
    log, terminal = io.StringIO(), io.StringIO()
    for console in (Console(file=log), Console(file=terminal, force_terminal=True, width=120)):
        with RichProgress(console) as progress:
            assert isinstance(progress, Progress) and isinstance(NullProgress(), Progress)
            for done in range(4):
                progress.update("erase", done, 3, f"loss {done}")
            progress.update("erase", 3, 3)
            progress.update("preview", 1, 2)
            progress.update("again", 0, 0)
    assert log.getvalue() == "erase: 3/3 loss 3\nagain: 0/0\n"
    assert all(word in terminal.getvalue() for word in ("erase", "preview", "1/2", "left"))


def _flat(colour: str, size: tuple[int, int] = (64, 64)) -> Image.Image:
    return Image.new("RGB", size, colour)


def _has(image: Image.Image, colour: tuple[int, int, int], at_least: int) -> bool:
    return int((np.asarray(image) == colour).all(-1).sum()) >= at_least


def _ink(image: Image.Image, below: int) -> int:
    return int((np.asarray(image.convert("L")) < below).sum())


def test_all_pictures_are_on_it() -> None:
    rows = [
        SheetRow("erased: a painting in the style of Van Gogh", [_flat("red"), _flat("lime")]),
        SheetRow("kept: stars", [_flat("blue"), _flat("yellow")]),
    ]
    found = sheet(rows, ["before", "after"], "Van Gogh")
    for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)):
        # Each was enlarged to twice its side.
        assert _has(found, colour, 128 * 128)
    assert found.height > 2 * 128 and found.width > 2 * 128 + 150


def test_small_pictures_stay_sharp_and_large_ones_are_reduced() -> None:
    checks = Image.fromarray((np.indices((16, 16)).sum(0) % 2 * 255).astype(np.uint8)).convert("RGB")
    found = sheet([SheetRow("", [checks])])
    assert {tuple(colour) for colour in np.asarray(found).reshape(-1, 3)} == {(0, 0, 0), (255, 255, 255)}
    found = sheet([SheetRow("", [_flat("red", (2000, 1000))])])
    assert found.width < 600 and _has(found, (255, 0, 0), 500 * 250)


@pytest.mark.parametrize("label", ["", "one", "a very long label " * 12, "x" * 300, "zwei\nZeilen", "雪 ☃ 🎨"])
def test_any_label_fits(label: str) -> None:
    found = sheet([SheetRow(label, [_flat("red")]), SheetRow(label, [_flat("blue")])], [label], label)
    assert _has(found, (255, 0, 0), 128 * 128) and _has(found, (0, 0, 255), 128 * 128)


def test_labels_are_legible_and_equal_neighbouring_columns_share_one() -> None:
    empty, labelled = (sheet([SheetRow(text, [_flat("white")])]) for text in (" ", "stars"))
    assert _ink(empty, 128) == 0 and _ink(labelled, 128) > 60
    row = [SheetRow("", [_flat("white")] * 4)]
    joined, apart = sheet(row, ["before"] * 2 + ["after"] * 2), sheet(row, ["before", "after"] * 2)
    assert _ink(apart, 160) > 1.6 * _ink(joined, 160)


def test_ragged_and_empty_rows() -> None:
    found = sheet([SheetRow("a", [_flat("red"), None]), SheetRow("b"), SheetRow("c", [_flat("blue")])])
    assert _has(found, (0, 0, 255), 128 * 128) and _has(found, (236, 236, 240), 128 * 128)
    assert sheet([]).size[0] > 0


def test_blurred_pictures_cannot_be_told_apart() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8))
    rows = [SheetRow("", [noise])]
    pictures = [sheet(rows), sheet(rows, blur=True), blurred(noise)]
    sharp, *soft = (np.abs(np.diff(np.asarray(one, float)[20:120, 20:120], axis=1)).mean() for one in pictures)
    assert max(soft) < sharp / 50


def test_saving(tmp_path: Path) -> None:
    image = sheet([SheetRow("", [_flat("red")])])
    for name in ("a.png", "b.jpg", "c/d.webp"):
        with Image.open(save_sheet(image, tmp_path / name)) as found:
            assert found.size == image.size
    with pytest.raises(OutputError, match="must end in"):
        save_sheet(image, tmp_path / "a.txt")
    assert not list(tmp_path.rglob("*.part"))


def test_what_users_wrote_is_no_markup() -> None:
    for terminal in (True, False):
        text = io.StringIO()
        console = Console(file=text, force_terminal=terminal, width=120, color_system=None)
        with RichProgress(console) as progress:
            progress.update("erase [red]", 1, 1, "[/]")
        assert "erase [red]" in text.getvalue() and "[/]" in text.getvalue()
