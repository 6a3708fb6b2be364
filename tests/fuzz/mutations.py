"""Seeded changes of bytes, of JSON, of safetensors headers and of files as such."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from tests.fuzz.examine import SENTINEL

_WORDS = ("", " ", "\n", "\0", "text", "../x", "/etc/passwd", "%s%n", "𝄞", "\ud800", "a" * 5000)
_NUMBERS = (0, -1, 1, 2, 7, 255, 2**31, 2**63, -(2**63), 10**30, 0.5, -1e300, 1e308, float("nan"))
_NAMES = ("float32", "int8", "__class__", "none", "llama", "gptq", "..", "Tensor", "load", "r4")
_TOKENS = (
    *(b"{", b"}", b"[", b"]", b'"', b":", b",", b"\\u0000", b"\xff\xfe", b"\xef\xbb\xbf", b"\0"),
    *(b"NaN", b"-Infinity", b"1e999", b"null", b"true", b"9" * 5000, b"[" * 3000, b"\r\n", b"\x1a"),
    *(b"!!python/object/apply:os.system ['mkdir " + SENTINEL.encode() + b"']", b"&a [*a]", b"<<: "),
    *(b"? ", b"- ", b"|", b"2001-99-99", b"!!binary x", b"%YAML 9.9\n", b"---\n", b"\xf0\x9f"),
)


def strange(rng: Random) -> Any:
    """A JSON value that hardly any reader asks for."""
    match rng.randrange(8):
        case 0:
            return rng.choice(_WORDS)
        case 1:
            return rng.choice(_NUMBERS)
        case 2:
            return rng.choice((None, True, False))
        case 3:
            return [strange(rng) for _ in range(rng.randrange(4))]
        case 4:
            return {str(rng.choice(_NAMES)): strange(rng) for _ in range(rng.randrange(3))}
        case 5:
            return rng.choice(_NAMES)
        case 6:
            return nested(rng.choice((5, 60, 900)))
    return 10 ** rng.choice((3, 9, 19, 400))


def nested(depth: int) -> Any:
    """A list in a list, and so on."""
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


def mutate_bytes(data: bytes, rng: Random) -> bytes:
    """``data`` with a few bytes flipped, cut, repeated or put in."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 5, 30))):
        at = rng.randrange(len(changed) + 1)
        match rng.randrange(7):
            case 0 | 1 if at < len(changed):
                changed[at] ^= 1 << rng.randrange(8)
            case 2:
                changed[at : at + rng.choice((1, 2, 8, 64, 4096))] = b""
            case 3:
                changed[at:at] = rng.choice(_TOKENS)
            case 4:
                changed[at:at] = rng.randbytes(rng.choice((1, 4, 16)))
            case 5:
                start = rng.randrange(len(changed) + 1)
                changed[at:at] = changed[start : start + rng.choice((1, 8, 200))]
            case 6 if rng.random() < 0.2:
                del changed[at:]
    return bytes(changed)


def mutate_value(value: Any, rng: Random) -> Any:
    """``value`` with one or more of its places changed: removed, renamed, replaced or repeated."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        holder, key = _place(value, rng)
        if holder is None:
            return strange(rng)
        match rng.randrange(7):
            case 0:
                del holder[key]
            case 1 if isinstance(holder, dict):
                holder[str(rng.choice((*_NAMES, *_WORDS)))] = holder.pop(key)
            case 2 if isinstance(holder, dict):
                holder[key] = holder[rng.choice(list(holder))]
            case 3:
                holder[key] = [holder[key]]
            case 4 if isinstance(holder[key], int | float) and not isinstance(holder[key], bool):
                holder[key] = rng.choice((-holder[key], holder[key] + 1, holder[key] * 2, 0))
            case 5 if isinstance(holder[key], int | str):
                holder[key] = {int: str, str: len}.get(type(holder[key]), str)(holder[key])
            case _:
                holder[key] = strange(rng)
    return value


def _place(value: Any, rng: Random) -> tuple[Any, Any]:
    """A container somewhere in ``value``, and a key or index in it; ``None`` where it has none."""
    found = None, None
    while isinstance(value, dict | list) and value:
        key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
        found = value, key
        if rng.random() < 0.25:
            break
        value = value[key]
    return found


def mutate_json(data: bytes, rng: Random) -> bytes:
    """A JSON text, changed as bytes or as what it says."""
    if rng.random() < 0.3:
        return mutate_bytes(data, rng)
    try:
        value = json.loads(data)
    except ValueError:
        return mutate_bytes(data, rng)
    return dump(mutate_value(value, rng))


def dump(value: Any) -> bytes:
    """``value`` as JSON, lone surrogates and infinities as well."""
    return json.dumps(value).encode("utf-8", "surrogatepass")


def mutate_lines(data: bytes, rng: Random) -> bytes:
    """Text of one JSON value a line."""
    if rng.random() < 0.3:
        return mutate_bytes(data, rng)
    lines = data.split(b"\n")
    for _ in range(rng.choice((1, 2))):
        at = rng.randrange(len(lines))
        lines[at] = mutate_json(lines[at] or b"{}", rng)
    return b"\n".join(lines)


_DTYPES = ("F32", "F16", "BF16", "I8", "U8", "F8_E4M3", "F8_E8M0", "I64", "BOOL", "F4", "C64", "X")


def mutate_safetensors(data: bytes, rng: Random) -> bytes:
    """A safetensors file, changed as bytes, in its header, or in what the header says."""
    (length,) = struct.unpack("<Q", data[:8])
    header, body = data[8 : 8 + length], data[8 + length :]
    match rng.randrange(8):
        case 0:
            return mutate_bytes(data, rng)
        case 1:
            size = rng.choice((0, 1, length - 1, length + 1, 2**62, 10**8, len(data)))
            return struct.pack("<Q", max(size, 0)) + header + body
        case 2:
            header = mutate_bytes(header, rng)
        case 3:
            body = mutate_bytes(body, rng)
        case 4:
            header = dump(mutate_value(json.loads(header), rng))
        case _:
            header = dump(_edited_entries(json.loads(header), rng))
    return struct.pack("<Q", len(header)) + header + body


def _edited_entries(entries: dict[str, Any], rng: Random) -> dict[str, Any]:
    """Valid headers of other tensors: dtypes, shapes and names that nobody asked for."""
    names = [name for name in entries if name != "__metadata__"]
    if not names:
        return entries
    for _ in range(rng.choice((1, 1, 3))):
        entry = entries[rng.choice(names)]
        match rng.randrange(4):
            case 0:
                entry["shape"] = rng.choice(
                    ([], [0], [*entry["shape"], 1], entry["shape"][::-1], [1, *entry["shape"]])
                )
            case 1:
                small = entry["dtype"] in ("F32", "I32")
                entry["dtype"] = rng.choice(("I32", "F32") if small else ("I16", "F16", "BF16"))
            case 2:
                entry["dtype"] = rng.choice(_DTYPES)
            case 3:
                one, other = rng.choice(names), rng.choice(names)
                entries[one], entries[other] = entries[other], entries[one]
    return entries


_WHOLE = ("", ".py", ".txt", ".jsonl")
"""Suffixes of text, which is read whole however long it is."""


def mutate_file(path: Path, rng: Random) -> bool:
    """Sometimes, instead of its content, what lies at ``path``; whether it was done."""
    if rng.random() > 0.03:
        return False
    ways: tuple[Callable[[], object], ...] = (
        lambda: None,
        path.mkdir,
        lambda: os.mkfifo(path),
        lambda: path.symlink_to(path.name),
        lambda: path.symlink_to("nowhere"),
        lambda: path.symlink_to("/dev/zero"),
        lambda: path.write_bytes(b""),
        lambda: _sparse(path),
    )
    if path.suffix in _WHOLE:
        ways = ways[:-1]
    path.unlink()
    rng.choice(ways)()
    return True


def _sparse(path: Path) -> None:
    """Far larger than anything that is read, on a disk that hardly notices."""
    with path.open("wb") as file:
        file.truncate(2**29)
