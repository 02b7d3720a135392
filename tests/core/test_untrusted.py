"""What others wrote is read within limits, and nothing of the package reads past them."""

from __future__ import annotations

import ast
import io
import json
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

import recare_patch
from recare_patch.core import PatchError, Settings, SettingsError, printable, untrusted
from recare_patch.core.files import read_safetensors_header, read_tensors
from recare_patch.models import read_layout
from recare_patch.recipe import Recipe

PACKAGE = Path(recare_patch.__file__).parent

ALLOWED = {
    "core/untrusted.py": "it is the module",
    "core/files.py": "a lock's own note, what was just written, and tensors once their header is checked",
    "combine/merging.py": "writes into weights that were just copied",
    "erasure/loop.py": "checkpoints of this very run, in the folder that it owns",
    "erasure/run.py": "records of this very run, in the folder that it owns",
    "careset/lexicon.py": "lists that come with the package",
    "measure/report.py": "a style sheet that comes with the package",
    "measure/attacks/run.py": "its own options through JSON and back",
    "share/pushing.py": "writes the copy that is checked and sent",
}
"""Files that may read without the module → why."""

READERS = {
    "open", "read_text", "read_bytes", "json.load", "json.loads", "yaml.load", "yaml.safe_load", "yaml.unsafe_load",
    "yaml.full_load", "yaml.load_all", "yaml.safe_load_all", "Image.open", "safe_open", "load_file", "torch.load",
    "pickle.load", "pickle.loads", "np.load", "numpy.load", "safetensors.torch.load_file", "model_validate_json",
}  # fmt: skip
OURS = {"read_text", "read_bytes"}  # Functions of the module, as plain names; methods of those names are Path's.


def readers_in(text: str) -> set[str]:
    """The readers that a source file calls, or hands on."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Name) and node.id in READERS - OURS:
            found.add(node.id)
        if isinstance(node, ast.Attribute):
            owner = node.value.id if isinstance(node.value, ast.Name) else ""
            found |= {node.attr, f"{owner}.{node.attr}"} & READERS - ({"open"} if owner in ("Image", "os") else set())
    return found


def test_every_reader_goes_through_the_module() -> None:
    found = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        name = file.relative_to(PACKAGE).as_posix()
        if called := readers_in(file.read_text(encoding="utf-8")):
            found[name] = called
    # What pydantic reads out of JSON was parsed within the limits before.
    found = {name: called - {"model_validate_json"} for name, called in found.items()}
    assert {name: called for name, called in found.items() if called and name not in ALLOWED} == {}
    assert set(ALLOWED) <= set(found), "what no longer reads needs no leave"


def test_a_reader_would_be_seen() -> None:
    text = "x = json.loads(Path('a').read_text())\nwith open('b') as f: pass\nmap(load_file, [])\nread_text('c')"
    assert readers_in(text) == {"json.loads", "read_text", "open", "load_file"}
    assert readers_in("from recare_patch.core import read_text\nread_text('c')\n") == set()


Make = Callable[[Path], object]


def _bomb(file: Path, side: int = 8_000) -> None:
    """A PNG of a few hundred bytes with thousands of pixels a side."""
    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(b"\0" * 1000)), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def _truncated(file: Path) -> None:
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(buffer, "PNG")
    file.write_bytes(buffer.getvalue()[:2000])


def _bad_chunk(file: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, "PNG")
    file.write_bytes(buffer.getvalue().replace(b"IDAT", b"ID\0T"))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda file: os.mkfifo(file), "no plain file"),
        (lambda file: file.mkdir(), "is a directory|no plain file"),
        (lambda file: file.symlink_to("/etc/hostname"), "leads out of its folder"),
        (lambda file: file.symlink_to(file), "leads out of its folder|link"),
        (lambda file: file.symlink_to("/dev/zero"), "leads out of its folder"),
        (lambda file: file.write_bytes(b" " * 16_000_001), "at most 16,000,000"),
        (lambda file: file.write_bytes(b"\xff\xfe"), "not UTF-8"),
        (lambda file: None, "no such file"),
    ],
)
def test_plain_files_alone_are_read(make: Make, words: str, tmp_path: Path) -> None:
    make(tmp_path / "x")
    with pytest.raises(PatchError, match=words):
        untrusted.read_text(tmp_path / "x", "the file", PatchError, within=tmp_path)


def test_links_that_stay_are_followed(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "a").write_text("text")
    # As the Hub's cache has it: models--x/snapshots/COMMIT/file leads to models--x/blobs/….
    folder = tmp_path / "snapshots" / "1"
    folder.mkdir(parents=True)
    (folder / "file").symlink_to("../../blobs/a")
    assert untrusted.read_text(folder / "file", "it", PatchError, within=folder) == "text"
    assert not untrusted.inside(tmp_path / "blobs" / "a", folder.parent)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"a": 1, "a": 2}', "the key 'a' is there twice"),
        ('{"a": {"b": 1, "b": 1}}', "twice"),
        ("[" * 100 + "]" * 100, "too deeply"),
        ("[" * 100_000, "too deeply"),
        ("[NaN]", "not finite"),
        ("[1e999]", "not finite"),
        (f"[{10**30}]", "larger than"),
        ("[" + "9" * 5000 + "]", "."),
        (r'["\ud800"]', "half a character"),
        ("[" + "[]," * 2_100_000 + "1]", "too many values"),
        ('"' + "x" * 16_000_001 + '"', "longer"),
    ],
    ids=str,
)  # fmt: skip
def test_json_has_limits(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        untrusted.load_json(text)
    assert untrusted.load_json('{"a": [1, 2.5, "é\\ud83d\\ude00", null, true]}') == {"a": [1, 2.5, "é😀", None, True]}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\na: 2", "twice"),
        ("1: 2", "no text"),
        ("a: &x 1\nb: *x", "aliases"),
        ("[" * 100 + "]" * 100, "too deeply"),
        ("- a\n" * 50_001, "more than 50,000"),
        ("a: " + "x" * 2_000_001, "longer than"),
        (r'"a\x1b[2J"', "control character"),
    ],
    ids=["double", "number", "alias", "deep", "nodes", "long", "control"],
)
def test_yaml_has_limits(text: str, words: str) -> None:
    with pytest.raises(yaml.YAMLError, match=words):
        untrusted.load_yaml(text)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (_bomb, "8000x8000 pixels"),
        (lambda file: _bomb(file, 60_000), "decompression bomb"),
        (_truncated, "no picture"),
        (_bad_chunk, "no picture"),
        (lambda file: file.write_bytes(b"GIF89a" + b"\0" * 99), "no picture"),
        (lambda file: file.write_bytes(b""), "no picture"),
        (lambda file: file.symlink_to("/dev/zero"), "no plain file"),
    ],
)
def test_pictures_have_limits(make: Make, words: str, tmp_path: Path) -> None:
    make(tmp_path / "x.png")
    with pytest.raises(PatchError, match=words):
        untrusted.read_picture(tmp_path / "x.png", "the picture", PatchError)


def test_a_tensor_of_too_many_axes(tmp_path: Path) -> None:
    header = json.dumps({"x": {"dtype": "F16", "shape": [1] * 70, "data_offsets": [0, 2]}}).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0\0")
    for read in (read_safetensors_header, read_tensors):
        with pytest.raises(PatchError, match="header is malformed"):
            read(tmp_path / "x.safetensors")


@pytest.mark.parametrize("name", ["../x", "a/b", "..", "", "a\\b", "/etc", "a\nb"])
def test_a_base_cannot_list_a_path(name: str, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({name: ["diffusers", "UNet2DConditionModel"]}))
    with pytest.raises(recare_patch.core.BaseModelError, match="must be a plain name"):
        read_layout(tmp_path, "'x'")


class _Inner(Settings):
    x: int = 0


class _Outer(Settings):
    inner: _Inner = _Inner()
    more: tuple[_Inner, ...] = ()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"self": 1}, "self is not a key"),
        ({"inner": {"self": 1}}, "inner.self is not a key"),
        ({"inner": {1: 2}}, "every key must be text"),
        ({"more": [{"x": "a"}] * 20_000}, "and 19,900 more faults"),
    ],
)
def test_settings_of_any_keys(data: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingsError) as caught:
        _Outer(**data)
    assert words in " ".join(caught.value.faults)
    with pytest.raises(SettingsError):
        Recipe(**data)


@pytest.mark.parametrize("sign", ["\n", "\x1b", "\x9b", "\u2028", "\u202e", "\u2066", "\ufeff", "\ud800", "\U000e0041"])
def test_what_is_no_sign_is_an_escape(sign: str) -> None:
    shown = printable(f"a{sign}b")
    assert sign not in shown and shown.startswith("a\\") and shown.encode()
    assert printable("葛飾北斎 👩‍🎨 é – ‰") == "葛飾北斎 👩‍🎨 é – ‰"
