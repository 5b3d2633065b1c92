"""JSON and safetensors files as untrusted input: read strictly, and whatever is wrong with them is a FormatError naming the file.

The safetensors format: 8 bytes with the header's length, the header (JSON), the tensors' bytes without gaps.  It is checked here
before the safetensors library opens the file; memory stays below twice the file's size whatever the file says.
"""
from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import stat
from pathlib import Path

from .errors import FormatError

#: safetensors' name -> (torch's name, bits per element)
DTYPES = {"BOOL": ("bool", 8), "U8": ("uint8", 8), "I8": ("int8", 8), "I16": ("int16", 16), "U16": ("uint16", 16), "I32": ("int32", 32),
          "U32": ("uint32", 32), "I64": ("int64", 64), "U64": ("uint64", 64), "F8_E4M3": ("float8_e4m3fn", 8),
          "F8_E5M2": ("float8_e5m2", 8), "F16": ("float16", 16), "BF16": ("bfloat16", 16), "F32": ("float32", 32), "F64": ("float64", 64),
          "C64": ("complex64", 64)}
FLOATS = ("float16", "bfloat16", "float32", "float64")
# Parsed JSON takes up to 27 times its bytes: that many must fit into the file that it describes.
LEAST_JSON, JSON_SHARE = 2 << 20, 50
_MOST_DIMS, _LARGEST = 16, 1 << 62
_CHUNK = 1 << 20                # bytes read at once


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where a tensor is stored, and as what; `begin` counts from the start of the file."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    begin: int = 0
    nbytes: int = 0

    def read(self) -> bytes:
        """The tensor's bytes."""
        try:
            with open(self.file, "rb") as file:
                file.seek(self.begin)
                data = file.read(self.nbytes)
        except OSError as error:
            raise FormatError(f"{self.file}: cannot be read ({error.strerror or error}); copy it again") from error
        if len(data) != self.nbytes:
            raise FormatError(f"{self.file}: ends inside a tensor; it changed while it was read")
        return data


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while data := file.read(_CHUNK):
                digest.update(data)
    except OSError as error:
        raise FormatError(f"{path}: cannot be read ({error.strerror or error}); copy it again") from error
    return digest.hexdigest()


def file_size(path: Path) -> int:
    """Bytes of a regular file (or of one that a link leads to); FormatError for anything else, which might never end."""
    try:
        found = os.stat(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise FormatError(f"{path}: cannot be read ({reason}); the checkpoint is incomplete, quantize or copy it again") from error
    if not stat.S_ISREG(found.st_mode):
        raise FormatError(f"{path}: not a regular file; copy the checkpoint again")
    return found.st_size


def read_json(path: Path, largest: int = LEAST_JSON) -> dict:
    """A JSON object of at most `largest` bytes without repeated keys; raises FormatError naming the file."""
    size = file_size(path)
    if size > largest:
        raise FormatError(f"{path}: got {size} bytes, need at most {largest} beside tensor files of this size; the file is damaged, "
                          "copy it again")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise FormatError(f"{path}: cannot be read ({error.strerror or error}); copy it again") from error
    return _object(data, str(path))


def read_metadata(path: Path) -> dict[str, str]:
    """What a safetensors file says about itself; raises FormatError where its header cannot be read."""
    return _header(path)[1]


def read_header(path: Path) -> dict[str, Entry]:
    """{tensor: entry} of one safetensors file, in the order of its bytes; raises FormatError unless everything about it fits."""
    values, _, end, size = _header(path)
    entries = {name: _entry(path, name, value, size - end, end) for name, value in values.items()}
    entries = dict(sorted(entries.items(), key=lambda item: (item[1].begin, item[1].nbytes)))
    for name, entry in entries.items():
        if entry.begin != end:
            raise FormatError(f"{path}: tensor {shorten(name, 200)} starts at byte {entry.begin}, the one before ends at {end}; "
                              "they may neither overlap nor leave a hole. Copy the file again")
        end += entry.nbytes
    if end != size:
        raise FormatError(f"{path}: not a readable safetensors file: its tensors end at byte {end}, the file at {size}; copy it again")
    return entries


def _header(path: Path) -> tuple[dict, dict[str, str], int, int]:
    """(tensors as the header has them, its metadata, where the header ends, bytes of the file)."""
    where, size = f"{path}: not a readable safetensors file", file_size(path)
    if size < 8:
        raise FormatError(f"{where}: got {size} bytes, need 8 for the header's length; copy it again")
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            most = max(LEAST_JSON, size // JSON_SHARE)
            if length > min(size - 8, most):
                raise FormatError(f"{where}: its header claims {length} bytes, at most {min(size - 8, most)} are possible in a file of "
                                  f"{size}; copy it again")
            data = file.read(length)
    except OSError as error:
        raise FormatError(f"{where} ({error.strerror or error}); copy it again") from error
    if data[:1] != b"{":
        raise FormatError(f"{where}: its header starts with {data[:1]!r}, need a '{{'; copy it again")
    values = _object(data, where, parse_int=_whole)
    metadata = values.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise FormatError(f"{where}: __metadata__ must be an object of strings; copy it again")
    return values, metadata, 8 + length, size


def _entry(path: Path, name: str, value, room: int, start: int) -> Entry:
    def refuse(what: str):
        raise FormatError(f"{path}: tensor {shorten(name, 200)}: {what}; the file is damaged, copy it again")

    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        refuse("need dtype, shape and data_offsets, and nothing else")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        refuse(f"dtype: got {shorten(dtype)}, need one of {', '.join(DTYPES)}")
    if not _sizes(shape) or len(shape) > _MOST_DIMS:
        refuse(f"shape: got {shorten(shape)}, need a list of at most {_MOST_DIMS} sizes")
    if not _sizes(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1] <= room:
        refuse(f"data_offsets: got {shorten(offsets)}, need two increasing numbers up to {room}")
    if math.prod(max(size, 1) for size in shape) >= _LARGEST:
        refuse(f"shape: got {shorten(shape)}, more elements than there can be")
    nbytes = math.prod(shape) * DTYPES[dtype][1] // 8
    if nbytes != offsets[1] - offsets[0]:
        refuse(f"{dtype} {shorten(shape)} takes {nbytes} bytes, its data_offsets span {offsets[1] - offsets[0]}")
    return Entry(path, tuple(shape), DTYPES[dtype][0], start + offsets[0], nbytes)


def _sizes(value) -> bool:
    return isinstance(value, list) and all(type(v) is int and 0 <= v < _LARGEST for v in value)


def _object(data: bytes, where: str, **how) -> dict:
    try:
        values = json.loads(data.decode("utf-8"), object_pairs_hook=_distinct, **how)
        if b"\\ud" in data.lower():
            json.dumps(values, ensure_ascii=False).encode()         # half a surrogate pair is no text
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where}: not valid JSON ({shorten(error, 120)}); the file is damaged, copy it again") from error
    if not isinstance(values, dict):
        raise FormatError(f"{where}: got a JSON {type(values).__name__}, need an object; the file is damaged, copy it again")
    return values


def _distinct(pairs: list[tuple]) -> dict:
    values = {}
    for name, value in pairs:
        if name in values:
            raise ValueError(f"the key {shorten(name)} is there twice")
        values[name] = value
    return values


def _whole(text: str) -> int:
    if text == "-0":                                    # a number for Python, none for the safetensors library
        raise ValueError("got -0, need a size")
    return int(text)


def shorten(value, most: int = 60) -> str:
    """How a value from a file is shown in a message: an exception's text, the repr of anything else, cut off."""
    try:
        text = str(value) if isinstance(value, Exception) else repr(value)
    except RecursionError:
        text = f"a nested {type(value).__name__}"
    return text if len(text) <= most else text[: most - 3] + "..."


def check_kinds(record) -> None:
    """TypeError unless the fields of a dataclass read from a file hold what their annotations say; a whole number is a float, too."""
    for field_ in dataclasses.fields(record):
        name, value = field_.type.partition("[")[0], getattr(record, field_.name)
        kinds = {"str": str, "int": int, "float": (int, float), "dict": dict, "list": list}.get(name, object)
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise TypeError(f"{field_.name}: got {type(value).__name__}, need {name}")
        if name in ("int", "float"):
            float(value)                                # whatever shows it may take it for a float
