"""Fifty thousand unsound files: no traceback, no hang, no half gigabyte, nothing written beside, no accepted lie.

Run with ``python -m pytest -m fuzz``; ``RECARE_FUZZ=0.05`` in the environment runs a twentieth of it.
"""

from __future__ import annotations

import json
import random
import shutil
import struct
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.mutating import (
    ODD_VALUES,
    as_json,
    as_yaml,
    deeper,
    doubled_key,
    mutated_bytes,
    mutated_document,
    mutated_safetensors,
)
from tests.fuzz.readers import FOLDER_FILES, Reader, a_folder, read_folder, readers
from tests.fuzz.watching import INVENTED, LEAST, MEMORY, MUTATIONS, OF_A_FOLDER, Watch

pytestmark = [
    pytest.mark.fuzz,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is limited as Linux does it"),
]


READERS = {reader.name: reader for reader in readers()}


@pytest.fixture
def beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with weights for the settings that are read beside them."""
    # Whatever a file names is looked for here, and nothing may be left here.
    monkeypatch.chdir(tmp_path.parent)
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
    if number % 2 or kind in ("text", "bytes"):
        return mutated_bytes(rng, seed, others)
    if number % 8 == 0 and kind in ("json", "yaml"):
        return doubled_key(rng, seed) if kind == "yaml" or rng.random() < 0.5 else deeper(rng, seed)
    return mutated_safetensors(rng, seed) if kind == "safetensors" else mutated_document(rng, seed, kind)


@pytest.mark.parametrize("name", READERS)
def test_mutated_files(name: str, watch: Watch, beside: Path) -> None:
    reader, rng = READERS[name], random.Random(name)
    file = beside / reader.place
    everything = [seed for other in READERS.values() for seed in other.seeds]
    for number in range(round(MUTATIONS * reader.share)):
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
    return ["model-index", "tags"] if reader.kind in ("text", "bytes") else sorted(yaml.safe_load(seed))


@pytest.mark.parametrize("name", READERS)
def test_invented_files(name: str, watch: Watch, beside: Path) -> None:
    reader = READERS[name]
    file = beside / reader.place
    documents = st.dictionaries(st.sampled_from(_keys(reader)), JSON)
    options = {"deadline": None, "derandomize": True, "database": None}

    @settings(max_examples=max(1, round(INVENTED * reader.share)), suppress_health_check=list(HealthCheck), **options)
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
