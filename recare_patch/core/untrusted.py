"""What is read of files that others wrote: plain files of bounded size, and bounded data in them.

Everything that comes from a patch, a repository, a base's index, a suite or a record is read through this module,
which owns the limits; ``tests/core/test_untrusted.py`` walks the package for readers that are not. Every limit is far
above what honest files have, and far below what a machine cannot bear.
"""

from __future__ import annotations

import errno
import io
import json
import math
import os
import re
import stat
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import yaml

from recare_patch.core.errors import OutputError, RecarePatchError, printable, reason

if TYPE_CHECKING:
    from PIL.Image import Image

AnyPath = str | os.PathLike[str]

MOST_TEXT = 16_000_000
"""Bytes of a text, of JSON, and of the header of a safetensors file. The headers of the largest models, and of LoRAs
with all their tags, have a few millions."""

MOST_YAML = 2_000_000
"""Bytes of YAML: a recipe has fifteen hundred, a suite of thirty thousand prompts a million and a half."""

MOST_PICTURE = 100_000_000
"""Bytes of a picture's file."""

MOST_WEIGHTS = 8_000_000_000
"""Bytes of a patch's weights where they are sent or fetched."""

MOST_PIXELS = 40_000_000
"""Of a picture: the sheets of this package have a quarter of that."""

MOST_VALUES = 1_000_000
"""Commas, colons and brackets in JSON, in texts too: what a parser makes of each takes a hundred bytes, and what reads
it after that some microseconds. Fifty thousand tensors, or tags of six megabytes, have so many."""

MOST_NODES = 50_000
"""Values and keys of YAML, whose parser takes 60 µs for each."""

DEEPEST = 64
"""Mappings and lists within each other, in JSON and YAML."""

MOST_DIMENSIONS = 16
"""Axes of a tensor; torch has room for 64."""

LARGEST_NUMBER = 2**64
"""Of whole numbers: seeds have 63 bits. Of others, what a float holds."""

_HALF = re.compile("[\ud800-\udfff]")
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


def _told(fault: OSError) -> str:
    return "it is not there" if fault.errno == errno.ENOENT else reason(fault)


def inside(path: Path, root: Path) -> bool:
    """Whether a path leads nowhere out of a folder, links followed.

    A folder of the Hub's cache consists of links to the ``blobs`` beside it, which count as inside.
    """
    roots = [root.resolve()]
    if roots[0].parent.name == "snapshots":
        roots.append(roots[0].parents[1] / "blobs")
    try:
        target = path.resolve()
    except (OSError, RuntimeError):  # A loop of links.
        return False
    return any(target.is_relative_to(one) for one in roots)


def open_plain(
    path: AnyPath, what: str, error: type[RecarePatchError], *, most: int | None = None, within: AnyPath | None = None
) -> io.BufferedReader:
    """A plain file, open to be read.

    Args:
        path: the file.
        what: what messages call it.
        error: what is raised where it cannot be opened, is a pipe, a device or a folder, or too large.
        most: bytes that it may have.
        within: the folder that no link may lead out of; None for a file that the user named.

    Raises:
        FileNotFoundError: it is not there; the caller knows what that means.
    """
    if within is not None and not inside(Path(path), Path(within)):
        raise error(f"cannot read {what}: it is a link that leads out of its folder")
    try:
        # Without waiting: a pipe that nobody writes into would never open.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError:
        raise
    except OSError as fault:
        raise error(f"cannot read {what}: {_told(fault)}") from fault
    except ValueError as fault:  # A name with a null character.
        raise error(f"cannot read {what}: {str(fault).lower()}") from None
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or (most is not None and found.st_size > most):
        os.close(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise error(f"cannot read {what}: it is no plain file")
        raise error(f"cannot read {what}: it has {found.st_size:,} bytes, and at most {most:,} are read")
    return io.BufferedReader(io.FileIO(descriptor))


def read_bytes(
    path: AnyPath, what: str, error: type[RecarePatchError], *, most: int = MOST_TEXT, within: AnyPath | None = None
) -> bytes:
    """The bytes of a plain file; arguments and faults are those of :func:`open_plain`."""
    with open_plain(path, what, error, most=most, within=within) as handle:
        try:
            # One more than is allowed: it may grow meanwhile.
            data = handle.read(most + 1)
        except OSError as fault:
            raise error(f"cannot read {what}: {_told(fault)}") from fault
    if len(data) > most:
        raise error(f"cannot read {what}: at most {most:,} bytes are read")
    return data


def read_text(
    path: AnyPath, what: str, error: type[RecarePatchError], *, most: int = MOST_TEXT, within: AnyPath | None = None
) -> str:
    """The text of a plain UTF-8 file, without the mark that some editors put at its start.

    Args:
        path, what, error, most, within: see :func:`open_plain`; ``error`` also where it is no such text or not there.
    """
    try:
        return read_bytes(path, what, error, most=most, within=within).decode("utf-8-sig")
    except FileNotFoundError as fault:
        raise error(f"cannot read {what}: {reason(fault)}") from fault
    except UnicodeDecodeError:
        raise error(f"cannot read {what}: it is not UTF-8 text") from None


def load_json(text: str | bytes) -> Any:
    """What JSON from anywhere says.

    Raises:
        ValueError: it is no UTF-8 or no JSON, is too large or too deep, has a key twice, half a character, or a
            number that is not finite; the message is a phrase.
    """
    if len(text) > MOST_TEXT:
        raise ValueError(f"it is longer than {MOST_TEXT:,} bytes")
    if isinstance(text, bytes):
        text = text.decode("utf-8-sig")
    if sum(map(text.count, ",:[{")) > MOST_VALUES:
        raise ValueError("it holds too many values")
    try:
        found = json.loads(text, object_pairs_hook=_each_once, parse_constant=_no_number)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    _check_data(found)
    return found


def read_json(
    path: AnyPath, what: str, error: type[RecarePatchError], *, most: int = MOST_TEXT, within: AnyPath | None = None
) -> Any:
    """What a plain file of JSON says; arguments are those of :func:`read_text`, limits those of :func:`load_json`."""
    text = read_text(path, what, error, most=most, within=within)
    try:
        return load_json(text)
    except ValueError as fault:
        raise error(f"{what} is not readable as JSON: {fault}") from None


def _each_once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON in which a key written twice is a fault: silently, the last one would win."""
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key '{twice[:60]}' is there twice")
    return found


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"the number {text} is not finite")


def _check_data(found: Any, *, texts: bool = False) -> None:
    """Refuse what nothing can be done with; where ``texts`` is set, control characters too."""
    level, depth = [found], 0
    while level:
        if depth > DEEPEST:
            raise ValueError("it is nested too deeply")
        below: list[Any] = []
        for one in level:
            if isinstance(one, dict):
                below += one
                below += one.values()
            elif isinstance(one, list):
                below += one
            elif isinstance(one, float):
                # Of YAML, whoever asks for a number tells that with all other faults.
                if not texts and not math.isfinite(one):
                    raise ValueError("it holds a number that is not finite")
            elif isinstance(one, int):
                if abs(one) > LARGEST_NUMBER:
                    raise ValueError(f"it holds a number larger than {LARGEST_NUMBER}")
            elif isinstance(one, str):
                if not one.isascii() and _HALF.search(one):
                    raise ValueError("it holds half a character")
                if texts and _CONTROL.search(one):
                    raise ValueError("it holds a control character")
        level, depth = below, depth + 1


def yaml_mapping(text: str, *, source: str, noun: str, error: type[RecarePatchError]) -> dict[str, Any]:
    """Read YAML of plain data, never objects: a mapping of names to values.

    Args:
        text: the YAML.
        source: where it came from, for messages.
        noun: what it should be, for messages.
        error: what is raised for what :func:`load_yaml` refuses, or is no mapping.
    """
    try:
        data = load_yaml(text)
    except yaml.YAMLError as fault:
        what = " ".join(str(getattr(fault, "problem", None) or fault).split())
        mark = getattr(fault, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark is not None else ""
        raise error(f"{source} is not readable YAML: {what}{where}") from None
    if not isinstance(data, dict):
        raise error(f"{source} is not a {noun}: it must be a mapping of keys to values")
    return data


def load_yaml(text: str) -> Any:
    """Read YAML of plain data from anywhere.

    Raises:
        yaml.YAMLError: it is not readable, too long, too deep or of too many values, has a key twice or one that is
            no text, an alias, or a number that is not finite.
    """
    if len(text) > MOST_YAML:
        raise yaml.YAMLError(f"it is longer than {MOST_YAML:,} characters")
    try:
        found = yaml.load(text, Loader=_PlainLoader)
        _check_data(found, texts=True)
    # What PyYAML's own conversions raise on a tag that does not fit its value ("!!int x", "2020-02-30").
    except (ValueError, LookupError, AttributeError, TypeError, RecursionError) as fault:
        raise yaml.YAMLError(" ".join(str(fault).split())[:200] or type(fault).__name__) from None
    return found


class _PlainLoader(yaml.SafeLoader):
    """YAML with limits, and in which three things are faults.

    A key written twice: silently, the last one would win. A key that is no text: nothing here is called 1 or true.
    And an alias: a few lines of them, each twice the one before, stand for more data than any memory holds.
    """

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._nodes = self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        self._nodes += 1
        told = None
        if isinstance(event, yaml.AliasEvent):
            told = "aliases (*name) are not read"
        elif self._nodes > MOST_NODES:
            told = f"more than {MOST_NODES:,} values are not read"
        elif self._depth > DEEPEST:
            told = "it is nested too deeply"
        if told:
            raise yaml.composer.ComposerError(None, None, told, event.start_mark)
        self._depth += 1
        node: yaml.Node | None = super().compose_node(parent, index)  # type: ignore[no-untyped-call]
        self._depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)  # type: ignore[no-untyped-call]
            told = f"the key {key!r} is there twice" if key in seen else None
            if not isinstance(key, str):
                told = f"the key {key!r} is no text: put it into quotes"
            if told:
                raise yaml.constructor.ConstructorError(None, None, told, key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_picture(
    path: AnyPath,
    what: str,
    error: type[RecarePatchError] = OutputError,
    *,
    formats: tuple[str, ...] = ("PNG", "JPEG", "WEBP"),
    within: AnyPath | None = None,
) -> Image:
    """A picture in RGB, whole and of bounded size, from a plain file in one of the formats.

    Args:
        path, what, error, within: see :func:`open_plain`; ``error`` also where it is no such picture or not there.
        formats: as Pillow calls them.
    """
    from PIL import Image

    try:
        data = read_bytes(path, what, error, most=MOST_PICTURE, within=within)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # The limit here is a lower one.
            _check_png(data)
            with Image.open(io.BytesIO(data), formats=formats) as found:
                width, height = found.size
                if width * height > MOST_PIXELS:
                    raise error(f"cannot read {what}: it has {width}x{height} pixels, and {MOST_PIXELS:,} are read")
                return found.convert("RGB")
    except FileNotFoundError as fault:
        raise error(f"cannot read {what}: {reason(fault)}") from fault
    except RecarePatchError:
        raise
    # Pillow raises SyntaxError, struct.error, zlib.error, EOFError, … on what is damaged.
    except Exception as fault:
        told = (str(fault).splitlines() or [type(fault).__name__])[0]
        raise error(f"cannot read {what}: it is no picture ({told})") from None


def _check_png(data: bytes) -> None:
    """Hold the chunks of a PNG against their CRCs: Pillow passes over those of the picture itself."""
    start = 8
    while data.startswith(b"\x89PNG") and start + 12 <= len(data):
        end = start + 8 + int.from_bytes(data[start : start + 4], "big")
        if zlib.crc32(data[start + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            raise ValueError("damaged PNG")
        start = end + 4


def check_part(name: str, what: str, error: type[RecarePatchError]) -> str:
    """A name that becomes a part of a path, and nothing else: no folder above, none below, nothing unprintable."""
    if name in ("", ".", "..") or set(name) & {"/", "\\", ":"} or printable(name) != name or len(name) > 255:
        raise error(f"{what} is '{name[:100]}', and must be a plain name")
    return name
