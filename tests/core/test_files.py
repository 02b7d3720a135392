from __future__ import annotations

import ast
import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from recare_patch.core import ConceptError, OutputError, PatchError, files, untrusted


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_writes_into_folders_that_are_not_there_yet(tmp_path: Path) -> None:
    files.write_text(tmp_path / "a" / "b" / "poem.txt", "Füße\n")
    assert (tmp_path / "a" / "b" / "poem.txt").read_text(encoding="utf-8") == "Füße\n"
    assert names(tmp_path / "a" / "b") == ["poem.txt"]
    # JSON is readable, and has no NaN.
    files.write_json(tmp_path / "x.json", {"größe": [1, 2.5]})
    assert json.loads((tmp_path / "x.json").read_text()) == {"größe": [1, 2.5]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(tmp_path / "y.json", {"loss": float("nan")})
    assert names(tmp_path) == ["a", "x.json"]


@pytest.mark.parametrize(
    ("number", "words"),
    [(errno.ENOSPC, "the disk is full"), (errno.EACCES, "permission is denied"), (errno.EIO, "input/output error")],
)
def test_a_fault_of_the_system_is_one_sentence_and_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, words: str
) -> None:
    target = tmp_path / "kept.txt"
    target.write_text("old")

    def fail(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(OutputError, match=f"cannot write .*kept.txt: {words}"):
        files.write_text(target, "new")
    assert target.read_text() == "old"
    assert names(tmp_path) == ["kept.txt"]
    with pytest.raises(OutputError, match="a part of the path is a file"):
        files.write_text(target / "x", "")


def test_tensors_round_trip_with_shared_and_strided_storage(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    square = torch.arange(6.0).reshape(2, 3)
    tensors: dict[str, Any] = {"a": square, "b": square, "c": square.T, "d": square.half()}
    files.write_tensors(tmp_path / "t.safetensors", tensors, {"key": "value"})
    read = load_file(tmp_path / "t.safetensors")
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
    header = files.read_safetensors_header(tmp_path / "t.safetensors")
    assert header.metadata == {"key": "value"}
    assert header.tensors["c"] == files.TensorInfo("F32", (3, 2), 24)
    assert names(tmp_path) == ["t.safetensors"]


def header_bytes(header: object) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not a safetensors file"),
        (b"abc", "not a safetensors file"),
        (b"\xff" * 64, "not a safetensors file"),
        (b"\x80\x04\x95rest of a pickle", "is a pickle"),
        (b"PK\x03\x04 zip of a pickle", "is a pickle"),
        (header_bytes([1, 2]), "header is malformed"),
        (header_bytes({"a": {"dtype": "F32"}}), "header is malformed"),
        (header_bytes({"a": 3}), "header is malformed"),
        (header_bytes({"__metadata__": {"a": 1}}), "not text"),
        ((9).to_bytes(8, "little") + b"{notjson}", "header is malformed"),
        (header_bytes({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}) + b"1234", "damaged"),
    ],
)
def test_what_is_no_safetensors_file(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(PatchError, match=words):
        files.read_safetensors_header(path)


def test_what_cannot_be_read_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(PatchError, match="no such file"):
        files.read_safetensors_header(tmp_path / "none.safetensors")
    for name, words in (("none", "cannot read the list: no such file"), ("odd", "it is not UTF-8 text")):
        (tmp_path / "odd").write_bytes(b"\xff\xfe")
        with pytest.raises(ConceptError, match=words):
            untrusted.read_text(tmp_path / name, "the list", ConceptError)
    (tmp_path / "marked").write_bytes(b"\xef\xbb\xbfone")
    assert untrusted.read_text(tmp_path / "marked", "the list", ConceptError) == "one"


def test_a_claim_makes_the_folder_and_leaves_no_lock(tmp_path: Path) -> None:
    with files.claim_folder(tmp_path / "new"):
        assert (tmp_path / "new" / files.LOCK_NAME).read_text() == str(os.getpid())
        (tmp_path / "new" / "x").write_text("")
    assert names(tmp_path / "new") == ["x"]
    # One that made nothing leaves nothing.
    with pytest.raises(ZeroDivisionError), files.claim_folder(tmp_path / "other"):
        _ = 1 / 0
    assert names(tmp_path) == ["new"]


def refused(folder: Path, words: str, **options: bool) -> None:
    with pytest.raises(OutputError, match=words), files.claim_folder(folder, **options):
        pass


def test_a_folder_with_files_needs_resume_and_a_file_is_none(tmp_path: Path) -> None:
    (tmp_path / "old.txt").write_text("")
    refused(tmp_path, r"already holds files \(old.txt.*--resume.*another --out")
    refused(tmp_path / "old.txt", "it is a file, not a folder")
    assert names(tmp_path) == ["old.txt"]
    with files.claim_folder(tmp_path, resume=True):
        pass
    assert names(tmp_path) == ["old.txt"]


def test_a_claimed_folder_is_refused_to_others(tmp_path: Path) -> None:
    # Locks belong to open files: a second opening in one process stands for another process.
    with files.claim_folder(tmp_path / "new"):
        refused(tmp_path / "new", f"is in use by process {os.getpid()}", resume=True)
        (tmp_path / "new" / files.LOCK_NAME).write_text("")
        refused(tmp_path / "new", "is in use by another process", resume=True)


def test_a_killed_owner_leaves_a_folder_that_can_be_resumed(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    script = textwrap.dedent(
        """
        import sys, time
        from pathlib import Path
        from recare_patch.core import claim_folder
        with claim_folder(sys.argv[1]):
            (Path(sys.argv[1]) / "whole.txt").write_text("")
            (Path(sys.argv[1]) / ".half.txt.123.part").write_text("")
            print("ready", flush=True)
            time.sleep(60)
        """
    )
    with subprocess.Popen([sys.executable, "-c", script, str(folder)], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None and owner.stdout.readline() == "ready\n"
        refused(folder, f"in use by process {owner.pid}", resume=True)
        owner.send_signal(signal.SIGKILL)
    refused(folder, "already holds files")
    with files.claim_folder(folder, resume=True):
        assert names(folder) == [files.LOCK_NAME, "whole.txt"]
    assert names(folder) == ["whole.txt"]


def test_what_a_killed_writer_left_goes_with_the_next(tmp_path: Path) -> None:
    """Of the same file or folder, and of nobody who may still write."""
    script = textwrap.dedent(
        """
        import sys
        from pathlib import Path
        from recare_patch.core import temporary_name
        temporary_name(Path(sys.argv[1])).write_text("half")
        temporary_name(Path(sys.argv[2])).mkdir()
        """
    )
    file, folder = tmp_path / "a[1].txt", tmp_path / "made"
    subprocess.run([sys.executable, "-c", script, str(file), str(folder)], check=True)
    own = files.temporary_name(tmp_path / "other.txt")
    own.write_text("half")
    (tmp_path / f".a[1].txt.{2**70}.part").write_text("of another machine, or an earlier version")
    assert len(names(tmp_path)) == 4
    files.write_text(file, "whole")
    files.write_text(tmp_path / "made.txt", "another name")
    left = [own.name, f".a[1].txt.{2**70}.part", "a[1].txt", "made.txt"]
    assert set(left) < set(names(tmp_path)) and len(names(tmp_path)) == 5
    files.temporary_name(folder)
    assert names(tmp_path) == sorted(left)


def test_every_text_names_its_encoding() -> None:
    """What is written as UTF-8 would be read back in the locale's encoding."""
    found = []
    for file in Path(files.__file__).parents[1].rglob("*.py"):
        for call in (one for one in ast.walk(ast.parse(file.read_bytes())) if isinstance(one, ast.Call)):
            name = getattr(call.func, "attr", getattr(call.func, "id", None))
            given = [one.value for one in call.args if isinstance(one, ast.Constant)]
            # Our own write_text is called by its name alone.
            most = {"read_text": 0, "write_text": 1}.get(name, -1) if isinstance(call.func, ast.Attribute) else -1
            plain = len(call.args) <= most or (name == "open" and any(one in ("r", "w", "a", "x") for one in given))
            if plain and not call.keywords:
                found.append(f"{file.name}:{call.lineno}")
    assert found == []


@pytest.mark.parametrize("size", [640, 896, 1152, 1408, 65536 + 1152])
def test_a_header_whose_length_reads_like_a_pickle(tmp_path: Path, size: int) -> None:
    header = json.dumps({"x": {"dtype": "F16", "shape": [4], "data_offsets": [0, 8]}}).encode().ljust(size)
    data = size.to_bytes(8, "little") + header + bytes(8)
    assert data[:2] in {b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"}
    file = tmp_path / "x.safetensors"
    file.write_bytes(data)
    assert list(files.read_safetensors_header(file).tensors) == ["x"]
    file.write_bytes(data[:3] + b"\x95" + data[4:])
    with pytest.raises(PatchError, match="is a pickle"):
        files.read_safetensors_header(file)
