"""Sheets of pictures with readable labels: rows of a prompt, columns of seeds or states."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, ImageDraw, ImageFilter, ImageFont

from recare_patch.core.errors import OutputError
from recare_patch.core.files import write_bytes

_CELL = 128
"""Smallest side of a picture on a sheet, pixels."""

_LARGEST = 512
"""Largest side of a picture on a sheet, pixels: sheets are looked at, not printed."""

_GAP = 6
_MARGIN = 14
_LABEL_WIDTH = 190
_FONT_SIZE = 14
_TITLE_SIZE = 20
_INK, _MUTED, _PAPER, _EMPTY = "#1b1b1f", "#5c5c66", "#ffffff", "#ececf0"


@dataclass(frozen=True)
class SheetRow:
    """One row of a sheet.

    Attributes:
        label: what the row shows; long ones are wrapped.
        images: its pictures, left to right; ``None`` leaves a place empty.
    """

    label: str
    images: Sequence[Image.Image | None] = field(default_factory=tuple)


@dataclass(frozen=True)
class Comparison:
    """Pictures of one prompt before and after, at the same seeds.

    Attributes:
        label: the prompt.
        before, after: as many of each.
    """

    label: str
    before: Sequence[Image.Image]
    after: Sequence[Image.Image]


def _font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size=size)


def _wrap(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Lines of at most ``width`` pixels; a word longer than that is cut into pieces."""
    lines: list[str] = []
    for paragraph in text.splitlines() or [""]:
        line = ""
        for word in paragraph.split():
            while font.getlength(word) > width:
                fits = next((n for n in range(len(word) - 1, 0, -1) if font.getlength(word[:n]) <= width), 1)
                if line:
                    lines.append(line)
                    line = ""
                lines.append(word[:fits])
                word = word[fits:]
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
    if side < _CELL:
        times = -(-_CELL // side)
        size = (image.width * times, image.height * times)
        # Pictures of a few dozen pixels are read pixel by pixel; larger ones look better smoothed.
        return image.resize(size, Image.Resampling.NEAREST if side < 48 else Image.Resampling.LANCZOS)
    if side > _LARGEST:
        ratio = _LARGEST / side
        size = (max(1, round(image.width * ratio)), max(1, round(image.height * ratio)))
        return image.resize(size, Image.Resampling.LANCZOS)
    return image


def sheet(
    rows: Sequence[SheetRow], columns: Sequence[str] = (), title: str = "", *, blur: bool = False
) -> Image.Image:
    """Lay pictures out in rows with labels.

    Args:
        rows: each with its label and pictures; rows may differ in length.
        columns: labels over the pictures; equal neighbours are joined into one heading.
        title: heading of the sheet.
        blur: make the pictures unrecognisable, for unsafe concepts.

    Returns:
        An RGB picture; pictures under 128 pixels are enlarged, over 512 reduced.
    """
    fitted = [[None if i is None else _fitted(i, blur) for i in row.images] for row in rows]
    flat = [image for row in fitted for image in row if image is not None]
    width = max((image.width for image in flat), default=_CELL)
    height = max((image.height for image in flat), default=_CELL)
    count = max([len(columns), *(len(row) for row in fitted)], default=0)

    font, title_font = _font(_FONT_SIZE), _font(_TITLE_SIZE)
    line = _FONT_SIZE + 5
    labels = [_wrap(row.label, font, _LABEL_WIDTH) for row in rows]
    left = _MARGIN + (_LABEL_WIDTH + 2 * _GAP if any(row.label for row in rows) else 0)
    page = max(left + count * (width + _GAP) - _GAP + _MARGIN, left + _MARGIN)
    heading = _wrap(title, title_font, max(page, 480) - 2 * _MARGIN) if title else []
    page = max(page, *(int(title_font.getlength(text)) + 2 * _MARGIN for text in heading), 0)

    # Headings: one for each run of equal column labels, wrapped to the run's width.
    spans: list[tuple[int, int, list[str]]] = []
    for index, label in enumerate(columns):
        if spans and columns[index - 1] == label:
            start, _, _ = spans.pop()
        else:
            start = index
        run = (index - start + 1) * (width + _GAP) - _GAP
        spans.append((start, index, _wrap(label, font, run)))

    top = _MARGIN + len(heading) * (_TITLE_SIZE + 6) + (_GAP if heading else 0)
    pictures_top = top + max((len(text) for _, _, text in spans), default=0) * line + (_GAP if spans else 0)
    heights = [
        max(height if row else 0, len(label) * line) for row, label in zip(fitted, labels, strict=True)
    ]
    total = pictures_top + sum(h + _GAP for h in heights) + _MARGIN
    canvas = Image.new("RGB", (page, total), _PAPER)
    draw = ImageDraw.Draw(canvas)
    for number, text in enumerate(heading):
        draw.text((_MARGIN, _MARGIN + number * (_TITLE_SIZE + 6)), text, _INK, title_font)
    for start, end, wrapped in spans:
        run = (end - start + 1) * (width + _GAP) - _GAP
        x = left + start * (width + _GAP)
        for number, text in enumerate(wrapped):
            draw.text((x + (run - font.getlength(text)) / 2, top + number * line), text, _MUTED, font)
    y = pictures_top
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


def save_sheet(image: Image.Image, path: str | Path) -> Path:
    """Write a sheet whole, or not at all.

    Args:
        image: what :func:`sheet` returned.
        path: PNG, JPEG or WebP, by its ending.

    Raises:
        OutputError: the ending is another, or the place cannot be written to.
    """
    file = Path(path)
    formats = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
    kind = formats.get(file.suffix.lower())
    if kind is None:
        raise OutputError(f"cannot write {file}: a sheet's name must end in {', '.join(formats)}")
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"quality": 92} if kind == "JPEG" else {}))
    write_bytes(file, buffer.getvalue())
    return file
