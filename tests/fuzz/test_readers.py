"""Twenty thousand unsound files: no traceback, no hang, no gigabyte; run with ``-m fuzz``."""

from __future__ import annotations

import contextlib
import json
import random
import resource
import shutil
import signal
import struct
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recare_patch.core import RecarePatchError
from tests.fuzz.mutating import ODD_VALUES, as_json, as_yaml, mutated_bytes, mutated_document, mutated_safetensors
from tests.fuzz.readers import FOLDER_FILES, Reader, a_folder, read_folder, readers

pytestmark = [
    pytest.mark.fuzz,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is limited as Linux does it"),
]

# Of computing for one input; sound ones take milliseconds. A busy machine does not count.
SECONDS = 20.0
# Bytes that all of it together may take.
MEMORY = 2**30


class Hang(BaseException):
    """A reader that did not answer in time; no ``except Exception`` may swallow it."""


@dataclass
class Watch:
    """How many inputs were tried, how many ended in one sentence, and the slowest, in seconds by a reader."""

    inputs: int = 0
    refused: int = 0
    slowest: tuple[float, str] = (0.0, "")
    began: float = field(default_factory=time.process_time)
    _start: int = field(default_factory=lambda: _peak())

    @property
    def peak(self) -> int:
        """Bytes by which the process's largest size grew."""
        return _peak() - self._start

    def attempt(self, name: str, data: bytes, read: Callable[[], object]) -> None:
        """Let a reader read; every fault but our own escapes, with the input that shows it."""
        self.inputs += 1
        begun = time.process_time()
        try:
            with _deadline():
                read()
        except RecarePatchError as fault:
            self.refused += 1
            _check_sentence(str(fault), name, data)
        except BaseException as fault:
            raise AssertionError(f"{name}: {type(fault).__name__}: {fault!s:.300}\n{data[:3000]!r}") from fault
        took = time.process_time() - begun
        if took > self.slowest[0]:
            self.slowest = (took, name)


def _check_sentence(text: str, name: str, data: bytes) -> None:
    odd = [one for one in text if unicodedata.category(one) in ("Cc", "Cs", "Zl", "Zp")]
    assert text and not odd, f"{name} said {text[:500]!r} of {data[:2000]!r}"
    assert len(text) < 20_000, f"{name} said {len(text)} characters of {data[:2000]!r}"
    text.encode("utf-8")


@contextlib.contextmanager
def _deadline() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise Hang(f"no answer in {SECONDS:g} s")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@contextlib.contextmanager
def little_memory() -> Iterator[None]:
    """Refuse the process more than :data:`MEMORY` beyond what it has: a MemoryError is a failure."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# Inputs for each reader from sound files, and made up by hypothesis; for each file of a patch's folder,
# which ``verify`` reads together; and in all.
MUTATIONS, INVENTED, OF_A_FOLDER, LEAST = 1200, 250, 150, 20_000

READERS = {reader.name: reader for reader in readers()}


@pytest.fixture(scope="module")
def watch() -> Iterator[Watch]:
    made = Watch()
    with little_memory():
        yield made


@pytest.fixture
def beside(tmp_path: Path) -> Path:
    """A folder with weights for the settings that are read beside them."""
    (tmp_path / "adapter_model.safetensors").write_bytes(READERS["lora"].seeds[2])
    return tmp_path


@pytest.mark.parametrize("name", READERS)
def test_sound_files_are_read(name: str, watch: Watch, beside: Path) -> None:
    """Otherwise the others would prove nothing."""
    reader, refused = READERS[name], watch.refused
    for seed in reader.seeds:
        (beside / reader.place).write_bytes(seed)
        watch.attempt(name, seed, lambda: reader.read(beside / reader.place))
    allowed = {"patch": 3, "lora": 6, "inspect": 2, "peft settings": 1, "assignment": 1}.get(name, 0)
    assert watch.refused - refused <= allowed


def _mutated(rng: random.Random, seed: bytes, kind: str, number: int, others: list[bytes]) -> bytes:
    if number % 2 or kind == "text":
        return mutated_bytes(rng, seed, others)
    return mutated_safetensors(rng, seed) if kind == "safetensors" else mutated_document(rng, seed, kind)


@pytest.mark.parametrize("name", READERS)
def test_mutated_files(name: str, watch: Watch, beside: Path) -> None:
    reader, rng = READERS[name], random.Random(name)
    file = beside / reader.place
    everything = [seed for other in READERS.values() for seed in other.seeds]
    for number in range(MUTATIONS):
        seed = rng.choice(reader.seeds)
        others = everything if number % 5 == 0 else list(reader.seeds)
        data = _mutated(rng, seed, reader.kind, number, others)
        file.write_bytes(data)
        watch.attempt(name, data, lambda: reader.read(file))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(ODD_VALUES),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=20), inner, max_size=4),
    max_leaves=12,
)


def _keys(reader: Reader) -> list[str]:
    """The names that a reader knows at the top of its files."""
    seed = reader.seeds[0]
    if reader.kind == "safetensors":
        header = json.loads(seed[8 : 8 + struct.unpack("<Q", seed[:8])[0]])
        return sorted(header.get("__metadata__", {})) or ["format"]
    return ["model-index", "tags", "license"] if reader.kind == "text" else sorted(yaml.safe_load(seed))


@pytest.mark.parametrize("name", READERS)
def test_invented_files(name: str, watch: Watch, beside: Path) -> None:
    reader = READERS[name]
    file = beside / reader.place
    documents = st.dictionaries(st.sampled_from(_keys(reader)), JSON)
    options = {"deadline": None, "derandomize": True, "database": None}

    @settings(max_examples=INVENTED, suppress_health_check=list(HealthCheck), **options)
    @given(st.one_of(st.binary(max_size=300), st.text(max_size=300), documents))
    def run(found: Any) -> None:
        if isinstance(found, bytes | str):
            data = found.encode("utf-8", "replace") if isinstance(found, str) else found
        elif reader.kind == "safetensors":
            text = as_json({"__metadata__": {key: json.dumps(value) for key, value in found.items()}})
            data = struct.pack("<Q", len(text)) + text
        else:
            data = as_json(found) if reader.kind == "json" else as_yaml(found)
        file.write_bytes(data)
        watch.attempt(name, data, lambda: reader.read(file))

    run()


@pytest.mark.parametrize("changed", FOLDER_FILES)
def test_a_folder_with_one_bad_file(changed: str, watch: Watch, tmp_path: Path) -> None:
    sound = a_folder(tmp_path / "sound")
    place = shutil.copytree(sound, tmp_path / "place")
    watch.attempt("folder", b"", lambda: read_folder(place))
    rng = random.Random(changed)
    seed, kind = (sound / changed).read_bytes(), FOLDER_FILES[changed]
    for number in range(OF_A_FOLDER):
        data = _mutated(rng, seed, kind, number, [seed])
        (place / changed).write_bytes(data)
        watch.attempt(f"folder, {changed}", data, lambda: read_folder(place))


def _write_large(file: Path, inner: bytes, length: int) -> None:
    """A header of many entries, written in pieces: made whole, it would take the memory that is watched."""
    count, piece = length // (len(inner) + 12), 10_000
    with open(file, "wb") as handle:
        handle.write(struct.pack("<Q", count * (len(inner) + 12) + 1))
        for start in range(0, count, piece):
            entries = (b'"%08d":%s' % (k, inner) for k in range(start, min(start + piece, count)))
            handle.write((b"," if start else b"{") + b",".join(entries))
        handle.write(b"}")


@pytest.mark.parametrize("name", ["patch", "lora", "inspect"])
def test_a_large_header(name: str, watch: Watch, tmp_path: Path) -> None:
    """As large as it may be and larger, and made to take the most memory for its length."""
    file = tmp_path / "x.safetensors"
    entry = b'{"dtype":"F16","shape":[],"data_offsets":[0,0]}'
    most = 15_900_000
    for inner, length in ((b"{}", most), (b"[[]]", most), (entry, most), (b"{}", 99_000_000)):
        _write_large(file, inner, length)
        watch.attempt(name, inner, lambda: READERS[name].read(file))
    empty = {"dtype": "F16", "shape": [0, 0], "data_offsets": [0, 0]}
    many = {f"unet.m{k}.lora_{side}.weight": empty for k in range(20_000) for side in "AB"}
    header = as_json(many)
    file.write_bytes(struct.pack("<Q", len(header)) + header)
    watch.attempt(name, b"many tensors", lambda: READERS[name].read(file))


def test_how_it_went(watch: Watch, capsys: pytest.CaptureFixture[str]) -> None:
    """The last: enough was tried, in little memory."""
    seconds = time.process_time() - watch.began
    with capsys.disabled():
        print(
            f"\nfuzz: {watch.inputs:,} inputs, {watch.refused:,} refused, {seconds:.0f} s of computing, "
            f"slowest {watch.slowest[0]:.2f} s ({watch.slowest[1]}), grew by {watch.peak / 2**20:.0f} MiB"
        )
    assert watch.inputs >= LEAST, "run all of this file at once"
    assert watch.peak < MEMORY
