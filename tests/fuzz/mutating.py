"""Sound files made unsound: by bytes, and by what stands in them."""

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Callable
from typing import Any

import yaml

ODD_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, -(2**70), 10**400),
    *(0.0, -0.0, 1e308, 5e-324, float("inf"), float("nan")),
    *("", " ", "\x00", "\x1b[31m", "a\nb", "\ud800", "é", "東京", "'", "{}", "%s", "../../x", "~", "on"),
    *("1e-4", "NaN", "0x10", "9" * 5000, "x" * 3000),
    *([], {}, [[]], [None], {"": None}, {"a": {"a": {}}}, [1] * 300),
)
"""What stands where something else was expected."""

ODD_BYTES = (
    *(b"", b"\x00", b"\xff", b"\xef\xbb\xbf", b"\r\n", b"\t"),
    *(b"{", b"}", b"[", b"]", b'"', b"'", b":", b"- ", b"? ", b"&a ", b"*a", b"<<: ", b"|", b">", b"#", b"-"),
    *(b"!!python/object:os.system ", b"!!int ", b"!!float ", b"!!bool ", b"!!timestamp ", b"!!binary "),
    *(b"!!set ", b"!!omap ", b"%YAML 9.9\n", b"---\n", b"...\n"),
    *(b"2020-02-30", b"12:34:56", b"1_0", b"0b2", b"0o9", b".inf", b".nan", b"NaN", b"Infinity", b"e999"),
    *(b"\\u0000", b"\\ud800", b"9" * 5000, b"[" * 2000, b"{" * 2000),
    *(b"<!-- recare-patch: evidence, from evidence.json -->\n", b"<!-- recare-patch: end of evidence -->\n"),
    *(b"model-index:", b"__metadata__"),
)
"""What means something to one of the readers' parsers."""


def mutated_bytes(rng: random.Random, data: bytes, others: list[bytes]) -> bytes:
    """One to eight small accidents: changed, lost, doubled and foreign bytes."""
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        place, length = rng.randrange(len(data) + 1), rng.choice((1, 1, 2, 4, 16, 200))
        before, hit, after = data[:place], data[place : place + length], data[place + length :]
        odd, other = rng.choice(ODD_BYTES), rng.choice(others)
        data = rng.choice(
            (
                before + bytes(one ^ (1 << rng.randrange(8)) for one in hit[:1]) + hit[1:] + after,
                before + after,
                before + odd + hit + after,
                before + odd + after,
                before + hit * rng.choice((2, 3, 21)) + after,
                before,
                before + other[rng.randrange(len(other) + 1) :],
                before + rng.randbytes(length) + after,
            )
        )
    return data


def mutated_value(rng: random.Random, value: Any) -> Any:
    """One to four values replaced, removed, doubled, renamed or wrapped, anywhere in a tree."""
    found = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 2, 4))):
        places = _places(found)
        holder, key = rng.choice(places) if places else (None, None)
        odd = copy.deepcopy(rng.choice(ODD_VALUES))
        if holder is None:
            found = odd
            continue
        kind = rng.randrange(6)
        if kind <= 2:
            holder[key] = odd
        elif kind == 3:
            del holder[key]
        elif kind == 4 and isinstance(holder, dict):
            name = odd if isinstance(odd, str) else rng.choice(("", "version", "recipe", f"{key}x"))
            holder[name] = holder.pop(key)
        else:
            holder[key] = [holder[key]] * rng.choice((1, 2, 50))
    return found


def _places(value: Any) -> list[tuple[Any, Any]]:
    found: list[tuple[Any, Any]] = []
    left = [value]
    while left and len(found) < 5000:
        one = left.pop()
        keys: Any = list(one) if isinstance(one, dict) else range(len(one)) if isinstance(one, list) else ()
        for key in keys:
            found.append((one, key))
            left.append(one[key])
    return found


def as_json(value: Any) -> bytes:
    """JSON as other programs may write it: NaN and lone surrogates are not refused."""
    return json.dumps(value).encode()


def as_yaml(value: Any) -> bytes:
    """The same as YAML."""
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True).encode("utf-8", "replace")


def mutated_document(rng: random.Random, data: bytes, kind: str) -> bytes:
    """A JSON or YAML document with another content, sound as text."""
    read, write = (json.loads, as_json) if kind == "json" else (yaml.safe_load, as_yaml)
    return write(mutated_value(rng, read(data)))


def doubled_key(rng: random.Random, data: bytes) -> bytes:
    """JSON or YAML in which one key stands twice, the second time with another value."""
    lines = data.split(b"\n")
    places = [k for k, line in enumerate(lines) if b":" in line]
    if not places:
        return data + data
    place = rng.choice(places)
    key, _, value = lines[place].partition(b":")
    other = rng.choice((b" 0", b' "x"', b" []", b" null", value.rstrip(b",") + b"0"))
    lines.insert(place, key + b":" + other + (b"," if value.rstrip().endswith(b",") else b""))
    return b"\n".join(lines)


def deeper(rng: random.Random, data: bytes) -> bytes:
    """One value of a JSON text inside of thousands of lists, or mappings."""
    depth, place = rng.choice((10, 63, 64, 65, 900, 5000)), data.find(b": ", rng.randrange(max(1, len(data))))
    opened, closed = rng.choice(((b"[", b"]"), (b'{"a":', b"}")))
    return data[: place + 2] + opened * depth + b"1" + closed * depth + data[place + 2 :].lstrip(b"0123456789.")


def forged(rng: random.Random, evidence: dict[str, Any], wilson: Callable[[int, int], Any]) -> dict[str, Any]:
    """Evidence with other figures, as a liar would write them: often with intervals, parts and counts that agree."""
    found = copy.deepcopy(evidence)
    for _ in range(rng.choice((1, 1, 2, 3))):
        kind = rng.randrange(8)
        one = rng.choice(found["figures"])
        pictures = rng.choice((one["pictures"], one["pictures"], 4, 50, 1000, 100_000))
        hits = rng.choice((0, 0, pictures, rng.randrange(pictures + 1)))
        if kind <= 3:
            side, band = rng.choice((("patched", "interval"), ("base", "base_interval")))
            one[side] = round(hits / pictures, 6) if one["unit"] == "rate" else rng.choice((0.0, 0.0001, 1e3))
            one["pictures"], one["by"] = pictures, rng.choice(([], one["by"]))
            one[band] = rng.choice((list(wilson(hits, pictures)), [0.0, 1.0], [0, 1e9], None, one[band]))
        elif kind == 4:
            one[rng.choice(("metric", "detector", "group", "better", "unit", "name"))] = rng.choice(
                ("care", "lower", "x", "rate")
            )
        elif kind == 5:
            attack = rng.choice(found["attacks"] or [{}])
            attack |= {"successes": 0, "trials": pictures, "without": 0, "interval": list(wilson(0, pictures))}
        elif kind == 6:
            found[rng.choice(("concept", "kind", "method", "base", "patch_sha256", "created"))] = rng.choice(
                ("Monet", "object", "uce", "0" * 64, "2999-01-01", "stabilityai/sdxl")
            )
        else:
            found["options"]["pictures"] = pictures
    return found


def mutated_safetensors(rng: random.Random, data: bytes) -> bytes:
    """A safetensors file with another header, its length put right, sometimes on a body that fits."""
    size = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    ours = header.get("__metadata__", {})
    if ours and rng.random() < 0.5:
        # Entries that are JSON or YAML themselves are changed inside.
        key = rng.choice(list(ours))
        try:
            ours[key] = as_json(mutated_value(rng, json.loads(ours[key]))).decode()
        except ValueError:
            text = ours[key].encode()
            ours[key] = mutated_bytes(rng, text, [text]).decode("utf-8", "replace")
    elif rng.random() < 0.3:
        place = rng.randrange(max(1, len(body) - 8))
        odd = rng.choice((b"\x00\x7c", b"\xff\xff\xff\xff", b"\x00\x00\xc0\x7f"))
        body = body[:place] + odd + body[place + 4 :]
    else:
        header = mutated_value(rng, header)
    text = as_json(header)
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", rng.choice((len(text),) * 9 + (2**40,))) + text + body
