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
import platform
import re
import shutil
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recare_patch.core.errors import OutputError, PatchError, reason
from recare_patch.core.untrusted import MOST_DIMENSIONS, MOST_TEXT, AnyPath, load_json, open_plain

if TYPE_CHECKING:
    from torch import Tensor

LOCK_NAME = ".recare-patch.lock"
"""The lock file inside a claimed folder; it holds the process id of its owner."""

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


def bundled(folder: str) -> Path:
    """A folder that comes with the package: beside it in a checkout, inside it where it is installed."""
    package = Path(__file__).parents[1]
    inside = package / f"_{folder}"
    return inside if inside.is_dir() else package.parent / folder


def user_cache(folder: str) -> Path:
    """A folder of the package's below the user's cache folder; it need not be there."""
    place = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111 - never raises
    # A user without a home, as in some containers.
    place = tempfile.gettempdir() if place.startswith("~") else place
    return Path(place) / "recare-patch" / folder


def output_error(path: AnyPath, fault: OSError) -> OutputError:
    """The one-sentence form of a system fault met while writing ``path``."""
    return OutputError(f"cannot write {os.fspath(path)}: {_REASONS.get(fault.errno or 0) or reason(fault)}")


def check_writable(path: AnyPath, *, folder: bool = False) -> None:
    """Refuse, before hours of work, a place at which no file, or no folder, could be written.

    Raises:
        OutputError: it is of the other kind, a part of its path is a file, or permission is denied.
    """
    place = Path(path)
    start = (place if folder else place.parent).absolute()
    try:
        if place.exists() and place.is_dir() is not folder:
            raise OSError(errno.EEXIST if folder else errno.EISDIR, "")
        there = next(one for one in (start, *start.parents) if one.exists())
        if not there.is_dir():
            raise OSError(errno.ENOTDIR, "")
        if not os.access(there, os.W_OK | os.X_OK):
            raise OSError(errno.EACCES, "")
    except OSError as fault:
        raise output_error(place, fault) from None


def temporary_name(place: Path) -> Path:
    """Where a file or folder is made before it gets its own name; what killed owners left there is taken away.

    The name holds the machine and the process, so that two that write the same place do not share it.
    """
    machine = zlib.crc32(platform.node().encode()) % 10**9
    pattern = re.compile(rf"\.{re.escape(place.name)}\.{machine:09d}(\d+)\.part")
    with contextlib.suppress(OSError), os.scandir(place.parent) as entries:
        for entry in entries:
            if (found := pattern.fullmatch(entry.name)) and _has_ended(int(found[1])):
                if entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(entry.path, ignore_errors=True)
                else:
                    Path(entry.path).unlink()
    return place.with_name(f".{place.name}.{machine:09d}{os.getpid()}.part")


def _has_ended(process: int) -> bool:
    """Whether there is no such process on this machine."""
    if os.name != "posix":
        return False  # There, asking for a process may end it.
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    return False


def write_bytes(path: AnyPath, data: bytes) -> None:
    """Write a file whole, or not at all (:class:`OutputError`); missing parent folders are made."""
    _write(Path(path), [data])


def _write(target: Path, blocks: Iterable[bytes | memoryview]) -> None:
    temporary = temporary_name(target)
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
    except OSError as fault:
        raise output_error(target, fault) from fault
    # Makes the rename survive a power cut; not every file system can, and none needs to fail for it.
    with contextlib.suppress(OSError):
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_text(path: AnyPath, text: str) -> None:
    """Write UTF-8 text as :func:`write_bytes` does."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: AnyPath, obj: Any) -> None:
    """Write readable JSON, as :func:`write_bytes` does; ``ValueError`` where it holds NaN or infinity."""
    write_text(path, json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as a safetensors header describes it; ``dtype`` is the format's name, such as "F16"."""

    dtype: str
    shape: tuple[int, ...]
    bytes: int


@dataclass(frozen=True)
class StreamedTensor:
    """A tensor whose bytes, in the order of its elements, are read only when its turn comes."""

    name: str
    info: TensorInfo
    data: Callable[[], bytes | memoryview]


@dataclass(frozen=True)
class SafetensorsHeader:
    """What a safetensors file says about itself; tensors are in the order of the file."""

    metadata: dict[str, str]
    tensors: dict[str, TensorInfo]


def _header_bytes(entries: Mapping[str, Any]) -> bytes:
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def write_tensors(path: AnyPath, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, as :func:`write_bytes` does; equal content gives equal bytes."""
    from safetensors.torch import save

    # A clone breaks storage shared between tensors, which safetensors refuses to write.
    owned = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    data = save(owned, dict(metadata or {}))
    start = 8 + struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:start])
    # The format's own writer leaves the order of the metadata to chance.
    entries = {"__metadata__": dict(sorted(header.pop("__metadata__", {}).items()))} | header
    _write(Path(path), [_header_bytes(entries), memoryview(data)[start:]])


def write_streamed(path: AnyPath, tensors: Sequence[StreamedTensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file with one tensor in memory at a time, as :func:`write_bytes` does."""
    # Wide elements first, as the format's own writer has it: each tensor then starts at a multiple of
    # its element's size.
    widths = {one.name: one.info.bytes // max(1, math.prod(one.info.shape)) for one in tensors}
    ordered = sorted(tensors, key=lambda one: (-widths[one.name], one.name))
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for one in ordered:
        start, end = end, end + one.info.bytes
        entries[one.name] = {"dtype": one.info.dtype, "shape": list(one.info.shape), "data_offsets": [start, end]}

    def blocks() -> Iterator[bytes | memoryview]:
        yield _header_bytes(entries)
        for one in ordered:
            yield one.data()

    _write(Path(path), blocks())


def file_sha256(path: AnyPath) -> str:
    """SHA-256 of a file's bytes, in hexadecimal; :class:`PatchError` where it cannot be read."""
    try:
        with open_plain(path, os.fspath(path), PatchError) as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError as fault:
        raise PatchError(f"cannot read {os.fspath(path)}: {reason(fault)}") from fault


def read_safetensors_header(path: AnyPath) -> SafetensorsHeader:
    """Read a safetensors header: no torch, no tensor, a few kilobytes.

    Raises:
        PatchError: the file cannot be read or is not safetensors; a pickle is named as such.
    """
    name = os.fspath(path)
    try:
        with open_plain(path, name, PatchError) as handle:
            start = handle.read(8)
            # The length of a header that is allowed ends in zeros: one of 640 bytes starts as pickles do.
            if start.startswith(_PICKLE_STARTS) and any(start[3:]):
                raise PatchError(f"{name} is a pickle, which can run code when it is opened: only safetensors is read")
            size = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            left = os.fstat(handle.fileno()).st_size - 8
            if not 2 <= size <= min(left, MOST_TEXT):
                raise PatchError(f"{name} is not a safetensors file, or its end is missing")
            header = load_json(handle.read(size))
        metadata = header.pop("__metadata__", {})
        in_order = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
        tensors = {key: _tensor_info(one) for key, one in in_order}
        sound = all(isinstance(text, str) for pair in metadata.items() for text in pair)
    except (ValueError, LookupError, TypeError, AttributeError):
        raise PatchError(f"{name} is not a safetensors file: its header is malformed") from None
    except OSError as fault:
        raise PatchError(f"cannot read {name}: {reason(fault)}") from fault
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
    if len(entry["shape"]) > MOST_DIMENSIONS:
        raise ValueError(f"a tensor has more than {MOST_DIMENSIONS} axes")
    return TensorInfo(entry["dtype"], tuple(entry["shape"]), end - start)


def load_tensors(path: AnyPath, header: SafetensorsHeader, name: str | None = None) -> dict[str, Tensor]:
    """The tensors of a safetensors file whose header was read and checked before, on the CPU.

    Args:
        path: the file.
        header: what :func:`read_safetensors_header` returned.
        name: what messages call the file; its path by default.

    Raises:
        PatchError: it cannot be read, or has another header by now.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    told = name or os.fspath(path)
    try:
        stored = load_file(path)
    # torch refuses shapes of no or too many values in its own ways.
    except (SafetensorError, OSError, RuntimeError, ValueError, TypeError, OverflowError) as fault:
        raise PatchError(f"cannot read {told}: {(str(fault).splitlines() or ['it is damaged'])[0]}") from fault
    # What was checked is the header; a file that was put in its place meanwhile has not been.
    if stored.keys() != header.tensors.keys() or read_safetensors_header(path) != header:
        raise PatchError(f"{told} has changed while it was read")
    return {key: stored[key] for key in header.tensors}


def read_tensors(path: AnyPath) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU; faults are those of reading header and tensors."""
    return load_tensors(path, read_safetensors_header(path))


@contextlib.contextmanager
def open_tensors(path: AnyPath) -> Iterator[Any]:
    """A safetensors file whose tensors are read one at a time: safetensors' own handle, once its header is checked."""
    from safetensors import safe_open

    read_safetensors_header(path)
    with safe_open(path, "pt") as handle:
        yield handle


@contextlib.contextmanager
def claim_folder(path: AnyPath, *, resume: bool = False, resumable: bool = True) -> Iterator[None]:
    """Own an output folder for the length of a run; it is made when it does not exist.

    The claim is a lock of the system on a file inside the folder. It is given back when the owner
    ends, however it ends, so a killed run never leaves a folder that cannot be resumed.

    Args:
        path: the folder.
        resume: accept a folder that already holds files.
        resumable: whether the run can go on in such a folder, for the message that refuses it.

    Raises:
        OutputError: another process owns the folder, it holds files and ``resume`` is off, it is a
            file, or it cannot be written to.
    """
    from filelock import FileLock, Timeout

    folder = Path(path)
    file = folder / LOCK_NAME
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"cannot write into {folder}: it is a file, not a folder")
    made = not folder.exists()
    lock, owner = FileLock(file), ""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Read before trying: versions of filelock before 3.30 empty the file even when they do not get it.
        with contextlib.suppress(FileNotFoundError):
            owner = file.read_bytes()[:32].decode("ascii", "replace").strip()
        lock.acquire(blocking=False)
    except Timeout:
        who = f"process {owner}" if owner else "another process"
        raise OutputError(f"{folder} is in use by {who}; wait for it to end or choose another --out") from None
    except OSError as fault:
        raise output_error(folder, fault) from fault
    try:
        if resume:
            # The half-written files of a killed owner.
            for entry in sorted(folder.rglob(".*.part")):
                if _TEMPORARY.fullmatch(entry.name):
                    with contextlib.suppress(OSError):
                        entry.unlink()
        elif others := sorted(entry.name for entry in folder.iterdir() if entry.name != LOCK_NAME):
            way = "add --resume to go on with its run or " if resumable else ""
            raise OutputError(f"{folder} already holds files ({others[0]}, …); {way}choose another --out")
        try:
            file.write_text(str(os.getpid()), "ascii")
        except OSError as fault:
            raise output_error(folder, fault) from fault
        yield
    finally:
        with contextlib.suppress(OSError):
            file.unlink()
            # A run that failed before its first file leaves no trace; a folder with files stays.
            if made:
                folder.rmdir()
        lock.release()


def launched_together() -> bool:
    """Whether this process is one of several, by what their launcher says in the environment."""
    names = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
    return any(int(os.environ.get(name) or 1) > 1 for name in names)
