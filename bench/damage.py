"""Random damage to the files of a checkpoint: bytes, headers, JSON, values, names, whole files."""
from __future__ import annotations

import copy
import json
import os
import shutil
import struct
from pathlib import Path
from random import Random

INDEX = "model.safetensors.index.json"
ODD = (0, 1, -1, 2, 3, 7, 15, 255, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 10**30, 10**400, -2**63, 0.5, 1e308,
       float("nan"), float("inf"), True, False, None, "", "4", "U8", "I8", "F16", "BF16", "F32", "F64", "I64", "bogus", "\ud800", "\0",
       "../x", "/etc/passwd", [], {}, [[]], [0], [1, 1], [2**62, 2**62], [[[[[[]]]]]])
NAMES = ("../model-00001-of-00002.safetensors", "/dev/zero", "", ".", "..", "a/b.safetensors", "absent.safetensors",
         "x" * 5000 + ".safetensors", "\0.safetensors", ".safetensors", "config.json", "C:\\x.safetensors",
         "-.safetensors", "\ud800.safetensors")
BUFFERS = tuple(f"proj.{name}" for name in ("idx", "cb", "cb_u", "cb_v", "gs", "sc", "sz"))
#: Instead of the bytes of a file: it is not there, or something else is.
ABSENT, FOLDER, PIPE, ENDLESS = object(), object(), object(), object()


def damage(files: dict[str, bytes], random: Random) -> tuple[str, dict[str, object]]:
    """(kind, {file: its new bytes or one of ABSENT, FOLDER, PIPE, ENDLESS}) of one random damage, sometimes of two."""
    kind = random.choice(list(KINDS))
    changed = KINDS[kind](files, random)
    if random.random() < 0.1:
        again = _bytes({**files, **{k: v for k, v in changed.items() if isinstance(v, bytes)}}, random)
        changed = {**changed, **{name: data for name, data in again.items() if isinstance(changed.get(name, b""), bytes)}}
    return kind, changed


def write(folder: Path, changed: dict[str, object]) -> None:
    """Puts the damage into the folder."""
    for name, data in changed.items():
        path = folder / name
        if isinstance(data, bytes):
            path.write_bytes(data)
            continue
        path.unlink()
        if data is FOLDER:
            path.mkdir()
        elif data is PIPE:
            os.mkfifo(path)
        elif data is ENDLESS:
            path.symlink_to("/dev/zero")


def restore(folder: Path, changed: dict[str, object], files: dict[str, bytes]) -> None:
    """Takes the damage back."""
    for name, data in changed.items():
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        elif not isinstance(data, bytes):
            path.unlink(missing_ok=True)
        path.write_bytes(files[name])


def shards(files: dict[str, bytes]) -> list[str]:
    return sorted(name for name in files if name.endswith(".safetensors"))


def split(data: bytes) -> tuple[dict, bytes]:
    """(header, tensors' bytes) of a sound safetensors file."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8: 8 + length]), data[8 + length:]


def join(header, rest: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + rest


def _bytes(files: dict[str, bytes], random: Random) -> dict:
    name = random.choice([*files, *shards(files)])
    data = bytearray(files[name])
    # Most bytes of a tensor file are codes, any of which is right: half of the damage goes where there is more to break.
    front = 8 + int.from_bytes(data[:2], "little") if name in shards(files) else 4096
    reach = len(data) if random.random() < 0.5 else min(len(data), front)
    for _ in range(random.choice((1, 1, 1, 2, 8))):
        if not data:
            break
        at = random.randrange(min(reach, len(data)))
        length = random.choice((1, 1, 2, 8, 100))
        how = random.randrange(8)
        if how == 0:
            data[at] ^= 1 << random.randrange(8)
        elif how == 1:
            data[at] = random.choice((0, 255, 0x7F, 0x80, *b'{}[]",:-0919.e', random.randrange(256)))
        elif how == 2:
            data[at:at] = random.randbytes(length)
        elif how == 3:
            del data[at: at + length]
        elif how == 4:
            del data[at:]
        elif how == 5:
            data += random.randbytes(length)
        elif how == 6:
            data[at: at + length] = bytes(len(data[at: at + length]))
        else:
            data[at: at + length] = data[random.randrange(len(data)):][:length]
    return {name: bytes(data)}


def _length(files: dict[str, bytes], random: Random) -> dict:
    """The first 8 bytes of a tensor file."""
    name = random.choice(shards(files))
    length = int.from_bytes(files[name][:8], "little")
    odd = random.choice((0, 1, 7, length - 1, length + 1, length + 8, len(files[name]), len(files[name]) - 8, 2**31, 2**32, 2**40, 2**63,
                         2**64 - 1, random.getrandbits(64)))
    return {name: struct.pack("<Q", odd) + files[name][8:]}


def _header(files: dict[str, bytes], random: Random) -> dict:
    """dtype, shape, offsets, names and keys of tensors."""
    name = random.choice(shards(files))
    header, rest = split(files[name])
    tensors = [key for key in header if key != "__metadata__"]
    tensor = random.choice(tensors)
    entry, other = header[tensor], header[random.choice(tensors)]
    how = random.randrange(12)
    if how == 0:
        entry["dtype"] = random.choice(ODD)
    elif how == 1:
        entry["shape"] = random.choice((random.choice(ODD), [random.choice(ODD), *entry["shape"][1:]], entry["shape"][::-1],
                                        [1, *entry["shape"]], [*entry["shape"], 1], [0, *entry["shape"]], [1] * 70))
    elif how == 2:
        entry["data_offsets"] = random.choice((random.choice(ODD), entry["data_offsets"][::-1], other["data_offsets"], [0, len(rest)],
                                               [random.choice(ODD), entry["data_offsets"][1]],
                                               [entry["data_offsets"][0], random.choice(ODD)]))
    elif how == 3:
        del header[tensor]
    elif how == 4:
        header[random.choice((tensor + "x", "", "__metadata__", "../" + tensor, "\0", "\ud800", other["dtype"]))] = header.pop(tensor)
    elif how == 5:
        empty = {"dtype": "U8", "shape": [0], "data_offsets": [len(rest), len(rest)]}
        header["stranger"] = random.choice((entry, empty, random.choice(ODD)))
    elif how == 6:
        entry[random.choice(("dtype", "shape", "data_offsets", "extra", "Dtype"))] = random.choice(ODD)
    elif how == 7:
        del entry[random.choice(("dtype", "shape", "data_offsets"))]
    elif how == 8:
        header["__metadata__"] = random.choice((*ODD, {"format": random.choice(ODD)}))
    elif how == 9:                                      # a key twice
        text = json.dumps(header)
        twice = random.choice((f'"{tensor}": {json.dumps(other)}, ', '"__metadata__": {}, '))
        return {name: join(("{" + twice + text[1:]).encode(), rest)}
    elif how == 10:
        shift = random.choice((-8, -1, 1, 8, 2**40))
        for key in tensors[tensors.index(tensor):]:
            header[key]["data_offsets"] = [offset + shift for offset in header[key]["data_offsets"]]
    else:
        text = json.dumps(header).encode()
        return {name: join(random.choice((b" " + text, text + b" " * 9, text[:-1], b"[" * 5000, text.replace(b"[", b"[" * 900), b"{}",
                                          b"null", text.replace(b"0", b"-0", 1), text + b"\0", b"\xef\xbb\xbf" + text)), rest)}
    return {name: join(header, rest)}


def _json(files: dict[str, bytes], random: Random) -> dict:
    """One place of config.json, the index or report.json."""
    name = random.choice(("config.json", "config.json", INDEX, "report.json", "generation_config.json"))
    values = json.loads(files[name])
    places = []

    def walk(value):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            places.append((value, key))
            if isinstance(inner, (dict, list)):
                walk(inner)

    walk(values)
    holder, key = random.choice(places)
    how = random.randrange(5)
    if how == 0:
        del holder[key]
    elif how == 1 and isinstance(holder, dict):
        holder[random.choice(("stranger", "", "auto_map", "layers", str(key) + "x"))] = copy.deepcopy(holder.pop(key))
    elif how == 2 and isinstance(holder, dict):         # a key twice
        text, mark = json.dumps(values), json.dumps(key) + ": "
        return {name: text.replace(mark, mark + random.choice(("1, ", "{}, ", '"x", ')) + mark, 1).encode()}
    else:
        holder[key] = random.choice(NAMES if name == INDEX and random.random() < 0.5 else ODD)
    return {name: json.dumps(values).encode()}


def _values(files: dict[str, bytes], random: Random) -> dict:
    """Other values in a buffer: random ones, or some that are not finite."""
    name, tensor = random.choice([(name, key) for name in shards(files) for key in split(files[name])[0] if key.endswith(BUFFERS)])
    header, rest = split(files[name])
    first, end = header[tensor]["data_offsets"]
    data = bytearray(rest)
    if random.random() < 0.3:
        data[first:end] = random.randbytes(end - first)
    else:
        bits = random.choice((0x7C00, 0xFC00, 0x7E00, 0x7F80, 0xFF80, 0x7FC0, 0x7FFF, 0x7BFF, 0x7F7F, 0x5BFF, 0x0001, 0x8000))
        at = random.randrange(first, max(end - 1, first + 1)) & ~1
        data[at: at + 2] = struct.pack("<H", bits)
    return {name: join(header, bytes(data[: len(rest)]))}


def _files(files: dict[str, bytes], random: Random) -> dict:
    """Whole files: gone, empty, exchanged, or no files at all."""
    name = random.choice([*files, *shards(files)])
    other = random.choice(list(files))
    return {name: random.choice((ABSENT, b"", FOLDER, PIPE, ENDLESS, files[other], files[name] * 2, b"\0" * len(files[name]), b"{}", b"[]",
                                 b"[" * 100_000, b'{"a":' * 3000))}


KINDS = {"bytes": _bytes, "length": _length, "header": _header, "json": _json, "values": _values, "files": _files}
