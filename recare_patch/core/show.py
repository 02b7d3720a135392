"""What a person sees of a run: how far it is, and sheets of its pictures.

Library code takes ``progress: Progress | None`` and calls ``update``; what becomes of it, a bar, a
log line or nothing, is the caller's choice.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from PIL import Image, ImageDraw, ImageFilter, ImageFont

from recare_patch.core.errors import OutputError
from recare_patch.core.files import check_writable, write_bytes

_CELL, _LARGEST = 128, 512
"""Smallest and largest side of a picture on a sheet, pixels: sheets are looked at, not printed."""

_GAP, _MARGIN, _LABEL_WIDTH = 6, 14, 190
_FONT_SIZE, _TITLE_SIZE = 14, 20
_INK, _MUTED, _PAPER, _EMPTY = "#1b1b1f", "#5c5c66", "#ffffff", "#ececf0"

_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}

Font = ImageFont.ImageFont | ImageFont.FreeTypeFont


@runtime_checkable
class Progress(Protocol):
    """Receives the state of a run."""

    def update(self, stage: str, done: int, total: int, note: str = "") -> None:
        """Report that ``done`` of ``total`` parts of a stage are finished, with a few words or figures."""
        ...


class NullProgress:
    """Reports nothing."""

    def update(self, stage: str, done: int, total: int, note: str = "") -> None:
        """Ignore the report."""


class RichProgress:
    """Shows one bar a stage with the time left, on standard error or another ``rich.console.Console``.

    Where that is no terminal, each stage is one line when it ends, so that logs stay readable.

    Example:
        >>> with RichProgress() as progress:  # doctest: +SKIP
        ...     progress.update("erase", 10, 100, "loss 0.012")
    """

    def __init__(self, console: Any | None = None) -> None:
        from rich import progress
        from rich.console import Console

        self._console = console if console is not None else Console(stderr=True)
        self._bars = progress.Progress(
            progress.TextColumn("{task.description:<22}", markup=False),
            progress.BarColumn(bar_width=28),
            progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(),
            progress.TextColumn("left"),
            progress.TimeRemainingColumn(),
            progress.TextColumn("{task.fields[note]}", markup=False),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._tasks: dict[str, Any] = {}
        self._finished: set[str] = set()

    def __enter__(self) -> RichProgress:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def update(self, stage: str, done: int, total: int, note: str = "") -> None:
        """Move the bar of ``stage``; a stage seen for the first time gets a bar of its own."""
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(stage, total=max(total, 1), note=note)
        self._bars.update(self._tasks[stage], completed=done, total=max(total, 1), note=note)
        if done < total:
            self._finished.discard(stage)
        elif stage not in self._finished:
            self._finished.add(stage)
            if not self._console.is_terminal:
                # Highlighting off: a log has no use for colour codes.
                self._console.print(f"{stage}: {done}/{total} {note}".rstrip(), highlight=False, markup=False)


@dataclass(frozen=True)
class SheetRow:
    """One row of a sheet: its label, and pictures; ``None`` leaves a place empty."""

    label: str
    images: Sequence[Image.Image | None] = field(default_factory=tuple)


@dataclass(frozen=True)
class Comparison:
    """Pictures of one prompt, the label, before and after at the same seeds."""

    label: str
    before: Sequence[Image.Image]
    after: Sequence[Image.Image]


def _wrap(text: str, font: Font, width: int) -> list[str]:
    """Lines of at most ``width`` pixels; a word longer than that is cut into pieces."""
    lines: list[str] = []
    for paragraph in text.splitlines() or [""]:
        line = ""
        for word in paragraph.split():
            while font.getlength(word) > width:
                fits = next((n for n in range(len(word) - 1, 0, -1) if font.getlength(word[:n]) <= width), 1)
                lines += [line, word[:fits]] if line else [word[:fits]]
                line, word = "", word[fits:]
            longer = f"{line} {word}".strip()
            if line and font.getlength(longer) > width:
                lines.append(line)
                longer = word
            line = longer
        lines.append(line)
    return lines


def blurred(image: Image.Image) -> Image.Image:
    """A picture too coarse to recognise a body in, fine enough to see colours and composition."""
    small = image.resize((8, 8), Image.Resampling.BOX)
    big = small.resize(image.size, Image.Resampling.BICUBIC)
    return big.filter(ImageFilter.GaussianBlur(max(image.size) / 24))


def _fitted(image: Image.Image, blur: bool) -> Image.Image:
    """A picture at sheet size: whole-number enlargement keeps small pixels sharp, reduction is smooth."""
    image = image.convert("RGB")
    if blur:
        image = blurred(image)
    side = max(image.size)
    if _CELL <= side <= _LARGEST:
        return image
    ratio = -(-_CELL // side) if side < _CELL else _LARGEST / side
    size = (max(1, round(image.width * ratio)), max(1, round(image.height * ratio)))
    # Pictures of a few dozen pixels are read pixel by pixel; larger ones look better smoothed.
    return image.resize(size, Image.Resampling.NEAREST if side < 48 else Image.Resampling.LANCZOS)


def sheet(rows: Sequence[SheetRow], columns: Sequence[str] = (), title: str = "", *, blur: bool = False) -> Image.Image:
    """Lay pictures out in rows with labels; those under 128 pixels are enlarged, over 512 reduced.

    Args:
        rows: each with its label and pictures; rows may differ in length.
        columns: labels over the pictures; equal neighbours are joined into one heading.
        title: heading of the sheet.
        blur: make the pictures unrecognisable, for unsafe concepts.
    """
    fitted = [[None if i is None else _fitted(i, blur) for i in row.images] for row in rows]
    flat = [image for row in fitted for image in row if image is not None]
    width = max((image.width for image in flat), default=_CELL)
    height = max((image.height for image in flat), default=_CELL)
    count = max([len(columns), *(len(row) for row in fitted)], default=0)

    font, title_font = ImageFont.load_default(_FONT_SIZE), ImageFont.load_default(_TITLE_SIZE)
    line, title_line = _FONT_SIZE + 5, _TITLE_SIZE + 6
    labels = [_wrap(row.label, font, _LABEL_WIDTH) for row in rows]
    left = _MARGIN + (_LABEL_WIDTH + 2 * _GAP if any(row.label for row in rows) else 0)
    page = max(left + count * (width + _GAP) - _GAP + _MARGIN, left + _MARGIN)
    heading = _wrap(title, title_font, max(page, 480) - 2 * _MARGIN) if title else []
    page = max(page, *(int(title_font.getlength(text)) + 2 * _MARGIN for text in heading), 0)

    # One heading for each run of equal column labels: its left edge, width and lines.
    spans: list[tuple[int, int, list[str]]] = []
    for label, run in groupby(range(len(columns)), key=columns.__getitem__):
        places = list(run)
        across = len(places) * (width + _GAP) - _GAP
        spans.append((left + places[0] * (width + _GAP), across, _wrap(label, font, across)))

    top = _MARGIN + len(heading) * title_line + (_GAP if heading else 0)
    y = top + max((len(text) for *_, text in spans), default=0) * line + (_GAP if spans else 0)
    heights = [max(height if row else 0, len(text) * line) for row, text in zip(fitted, labels, strict=True)]
    canvas = Image.new("RGB", (page, y + sum(h + _GAP for h in heights) + _MARGIN), _PAPER)
    draw = ImageDraw.Draw(canvas)
    for number, text in enumerate(heading):
        draw.text((_MARGIN, _MARGIN + number * title_line), text, _INK, title_font)
    for x, across, wrapped in spans:
        for number, text in enumerate(wrapped):
            draw.text((x + (across - font.getlength(text)) / 2, top + number * line), text, _MUTED, font)
    for row, lines, row_height in zip(fitted, labels, heights, strict=True):
        for number, text in enumerate(lines):
            offset = max(0, (row_height - len(lines) * line) // 2)
            draw.text((_MARGIN, y + offset + number * line), text, _INK, font)
        for index, image in enumerate(row):
            x = left + index * (width + _GAP)
            if image is None:
                draw.rectangle((x, y, x + width - 1, y + height - 1), fill=_EMPTY)
            else:
                canvas.paste(image, (x + (width - image.width) // 2, y + (height - image.height) // 2))
        y += row_height + _GAP
    return canvas


def check_sheet(path: str | Path) -> str:
    """Pillow's name for the kind of picture that a sheet is written as, by its name's ending; asked before drawing.

    Raises:
        OutputError: the ending is another than .png, .jpg, .jpeg or .webp, or there can be no file.
    """
    file = Path(path)
    kind = _FORMATS.get(file.suffix.lower())
    if kind is None:
        raise OutputError(f"cannot write {file}: a sheet's name must end in {', '.join(_FORMATS)}")
    check_writable(file)
    return kind


def save_sheet(image: Image.Image, path: str | Path) -> Path:
    """Write a sheet whole, or not at all; see :func:`check_sheet`."""
    file, kind = Path(path), check_sheet(path)
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"quality": 92} if kind == "JPEG" else {}))
    write_bytes(file, buffer.getvalue())
    return file
