"""Files that are either whole or absent.

Everything is written under a temporary name in the same folder, flushed to the disk and renamed:
a reader, or a run that resumes after a power cut, never meets half a file. Faults of the system
(disk full, no permission) become one :class:`OutputError`.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recare_patch.core.errors import OutputError, PatchError

if TYPE_CHECKING:
    from torch import Tensor

LOCK_NAME = ".recare-patch.lock"
"""The lock file inside a claimed folder; it holds the process id of its owner."""

_MAX_HEADER = 16_000_000
"""Bytes, checked before anything is read. The format allows six times as many, which read as JSON can
take gigabytes; the headers of the largest models, and of LoRAs with all their tags, have a few millions."""

_PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")

_TEMPORARY = re.compile(r"\..+\.\d+\.part")

_REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EACCES: "permission is denied",
    errno.EPERM: "permission is denied",
    errno.EROFS: "the file system is read-only",
    errno.ENOTDIR: "a part of the path is a file, not a folder",
    errno.EEXIST: "a part of the path is a file, not a folder",
    errno.EISDIR: "it is a folder",
    errno.ENAMETOOLONG: "the name is too long",
}


def output_error(path: str | os.PathLike[str], fault: OSError) -> OutputError:
    """The one-sentence form of a system fault met while writing ``path``."""
    reason = _REASONS.get(fault.errno or 0) or (fault.strerror or str(fault)).lower()
    return OutputError(f"cannot write {os.fspath(path)}: {reason}")


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file whole, or not at all.

    Args:
        path: where to; missing parent folders are made.
        data: the content.

    Raises:
        OutputError: the disk is full, or the place cannot be written to.
    """
    _write(Path(path), [data])


def _write(target: Path, blocks: Iterable[bytes | memoryview]) -> None:
    # The process id keeps two processes that write the same file from sharing a temporary one.
    temporary = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as handle:
                for block in blocks:
                    handle.write(block)
                handle.flush()
                os.fsync(handle.fileno())
            os.replace(temporary, target)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        _sync_folder(target.parent)
    except OSError as fault:
        raise output_error(target, fault) from fault


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut; not every file system can, and none needs to fail for it."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write UTF-8 text whole, or not at all; see :func:`write_bytes`."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: str | os.PathLike[str], obj: Any) -> None:
    """Write an object as readable JSON whole, or not at all; see :func:`write_bytes`.

    NaN and infinity are refused: they are not JSON, and other programs fail on them.

    Raises:
        ValueError: the object holds a number that is not finite.
        OutputError: the place cannot be written to.
    """
    write_text(path, json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors as a safetensors file whole, or not at all; equal content gives equal bytes.

    Args:
        path: where to.
        tensors: name → tensor of any shape and device; stored contiguous, as they are typed.
        metadata: header entries, strings to strings.

    Raises:
        OutputError: the place cannot be written to.
    """
    from safetensors.torch import save

    # A clone breaks storage shared between tensors, which safetensors refuses to write.
    owned = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    data = save(owned, dict(metadata or {}))
    start = 8 + struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:start])
    # The format's own writer leaves the order of the metadata to chance.
    entries = {"__metadata__": dict(sorted(header.pop("__metadata__", {}).items()))} | header
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    _write(Path(path), [struct.pack("<Q", len(text)) + text, memoryview(data)[start:]])


def file_sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's bytes, in hexadecimal: the one change of a byte changes it.

    Raises:
        PatchError: the file cannot be read.
    """
    try:
        with open(path, "rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError as fault:
        raise PatchError(
            f"cannot read {os.fspath(path)}: {(fault.strerror or str(fault)).lower()}"
        ) from fault


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a safetensors file, as its header describes it.

    Attributes:
        dtype: the format's name of it, such as "F16".
        shape: its sizes.
        bytes: its length in the file.
    """

    dtype: str
    shape: tuple[int, ...]
    bytes: int


@dataclass(frozen=True)
class StreamedTensor:
    """A tensor that is read only when its turn comes.

    Attributes:
        name: in the file.
        info: what the header says of it.
        data: gives its bytes, in the order of its elements.
    """

    name: str
    info: TensorInfo
    data: Callable[[], bytes | memoryview]


def write_streamed(
    path: str | os.PathLike[str], tensors: Sequence[StreamedTensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file with one tensor in memory at a time, whole or not at all.

    Args:
        path: where to.
        tensors: what it holds; names are distinct.
        metadata: header entries, strings to strings.

    Raises:
        OutputError: the place cannot be written to.
    """
    # Wide elements first, as the format's own writer has it: each tensor then starts at a multiple of
    # its element's size.
    ordered = sorted(
        tensors, key=lambda one: (-(one.info.bytes // max(1, math.prod(one.info.shape))), one.name)
    )
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for one in ordered:
        start, end = end, end + one.info.bytes
        entries[one.name] = {
            "dtype": one.info.dtype,
            "shape": list(one.info.shape),
            "data_offsets": [start, end],
        }
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    header += b" " * (-len(header) % 8)

    def blocks() -> Iterator[bytes | memoryview]:
        yield struct.pack("<Q", len(header)) + header
        for one in ordered:
            yield one.data()

    _write(Path(path), blocks())


@dataclass(frozen=True)
class SafetensorsHeader:
    """What a safetensors file says about itself.

    Attributes:
        metadata: its header entries.
        tensors: name → description, in the order of the file.
    """

    metadata: dict[str, str]
    tensors: dict[str, TensorInfo]


def read_safetensors_header(path: str | os.PathLike[str]) -> SafetensorsHeader:
    """Read a safetensors header: no torch, no tensor, a few kilobytes.

    Raises:
        PatchError: the file cannot be read or is not safetensors; a pickle is named as such.
    """
    name = os.fspath(path)
    try:
        with open(path, "rb") as handle:
            start = handle.read(8)
            # The length of a header that is allowed ends in zeros: one of 640 bytes starts as pickles do.
            if start.startswith(_PICKLE_STARTS) and any(start[3:]):
                raise PatchError(
                    f"{name} is a pickle, which can run code when it is opened: only safetensors is read"
                )
            size = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            left = os.fstat(handle.fileno()).st_size - 8
            if not 2 <= size <= min(left, _MAX_HEADER):
                raise PatchError(f"{name} is not a safetensors file, or its end is missing")
            header = json.loads(handle.read(size))
        metadata = header.pop("__metadata__", {})
        tensors = {
            key: _tensor_info(one)
            for key, one in sorted(header.items(), key=lambda item: item[1]["data_offsets"])
        }
        sound = all(isinstance(text, str) for pair in metadata.items() for text in pair)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise PatchError(f"{name} is not a safetensors file: its header is malformed") from None
    except OSError as fault:
        raise PatchError(f"cannot read {name}: {(fault.strerror or str(fault)).lower()}") from fault
    if not sound:
        raise PatchError(f"{name} is not a safetensors file: its header entries are not text")
    if sum(one.bytes for one in tensors.values()) != left - size:
        raise PatchError(f"{name} is damaged: it ends before its tensors do, or goes on after them")
    return SafetensorsHeader(metadata, tensors)


def _tensor_info(entry: Mapping[str, Any]) -> TensorInfo:
    start, end = entry["data_offsets"]
    numbers = [*entry["shape"], start, end]
    if not isinstance(entry["dtype"], str) or not all(type(one) is int and one >= 0 for one in numbers):
        raise ValueError("no tensor is described like that")
    return TensorInfo(entry["dtype"], tuple(entry["shape"]), end - start)


def load_tensors(
    path: str | os.PathLike[str], header: SafetensorsHeader, name: str | None = None
) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file whose header was read and checked before.

    Args:
        path: the file.
        header: what :func:`read_safetensors_header` returned.
        name: what messages call the file; its path by default.

    Returns:
        Name → tensor on the CPU, in the order of the file.

    Raises:
        PatchError: it cannot be read, or is not the file any more whose header was checked.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    told = name or os.fspath(path)
    try:
        stored = load_file(path)
    except (SafetensorError, OSError) as fault:
        raise PatchError(f"cannot read {told}: {str(fault).splitlines()[0]}") from fault
    # What was checked is the header; a file that was put in its place meanwhile has not been.
    if stored.keys() != header.tensors.keys() or read_safetensors_header(path) != header:
        raise PatchError(f"{told} has changed while it was read")
    return {key: stored[key] for key in header.tensors}


@contextlib.contextmanager
def claim_folder(
    path: str | os.PathLike[str], *, resume: bool = False, resumable: bool = True
) -> Iterator[None]:
    """Own an output folder for the length of a run.

    The claim is an advisory lock on a file inside the folder. The system gives it back when the
    owner ends, however it ends, so a killed run never leaves a folder that cannot be resumed.

    Args:
        path: the folder; made when it does not exist.
        resume: accept a folder that already holds files.
        resumable: whether the run can go on in such a folder, for the message that refuses it.

    Raises:
        OutputError: another process owns the folder, it holds files and ``resume`` is off, it is a
            file, or it cannot be written to.
    """
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"cannot write into {folder}: it is a file, not a folder")
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = _take_lock(folder)
    except OSError as fault:
        raise output_error(folder, fault) from fault
    try:
        if resume:
            _sweep(folder)
        others = sorted(entry.name for entry in folder.iterdir() if entry.name != LOCK_NAME)
        if others and not resume:
            _drop_lock(folder)
            way = "add --resume to go on with its run or " if resumable else ""
            raise OutputError(f"{folder} already holds files ({others[0]}, …); {way}choose another --out")
        try:
            _write_owner(held, folder)
            yield
        finally:
            _drop_lock(folder)
            if made:
                # A run that failed before its first file leaves no trace; a folder with files stays.
                with contextlib.suppress(OSError):
                    folder.rmdir()
    finally:
        os.close(held)


def _take_lock(folder: Path) -> int:
    """Lock the folder's lock file and return its open descriptor."""
    import fcntl

    while True:
        held = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as fault:
            owner = os.pread(held, 32, 0).decode("ascii", "replace").strip() or "unknown"
            os.close(held)
            raise OutputError(
                f"{folder} is in use by process {owner}; wait for it to end or choose another --out"
            ) from fault
        except BaseException:
            os.close(held)
            raise
        # An owner that just left has removed the file that was opened: that lock would guard nothing.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(held), (folder / LOCK_NAME).stat()):
                return held
        os.close(held)


def _write_owner(held: int, folder: Path) -> None:
    try:
        os.ftruncate(held, 0)
        os.pwrite(held, str(os.getpid()).encode("ascii"), 0)
    except OSError as fault:
        raise output_error(folder, fault) from fault


def _sweep(folder: Path) -> None:
    """Remove the half-written files of a killed owner; the caller holds the lock."""
    for entry in sorted(folder.rglob(".*.part")):
        if _TEMPORARY.fullmatch(entry.name):
            with contextlib.suppress(OSError):
                entry.unlink()


def _drop_lock(folder: Path) -> None:
    with contextlib.suppress(OSError):
        (folder / LOCK_NAME).unlink()
