"""Files that survive a crash: written under a temporary name, synced, renamed, the folder synced; tensors one after the other."""
from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import ConfigError
from .tensorfile import DTYPES

if TYPE_CHECKING:
    from torch import Tensor

PARTIAL = ".partial"
#: Bytes.  A cache line: packed indices that are used where the file is mapped are read a line at a time.
ALIGNMENT = 64
_NAMES = {name: code for code, (name, _) in DTYPES.items()}


@contextlib.contextmanager
def writing(path: Path):
    """Turns what the system says into a ConfigError about `path`."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror or error}); what was finished before is kept. Free some space or "
                          "make the folder writable, and run the same command again (without --fresh, which starts over)") from error


@contextlib.contextmanager
def temporary_folder(disk: str | os.PathLike | None) -> Iterator[Path]:
    """A folder in that one, by default in the system's place for them, gone afterwards; raises ConfigError where there can be none."""
    try:
        with tempfile.TemporaryDirectory(prefix=".gptvq-plan-", dir=disk) as place:
            yield Path(place)
    except OSError as error:
        raise ConfigError(f"{disk or tempfile.gettempdir()}: cannot be written ({error.strerror or error}); name a writable folder on the "
                          "disk that the run will write to (disk=, --disk)") from error


class DurableFile:
    """Bytes that appear under `path` all at once, when they are on the disk: `write` any number of times, then `seal`."""

    def __init__(self, path: Path):
        self.path, self.partial, self.size = path, path.with_name(path.name + PARTIAL), 0
        self._sha256, self.fd = hashlib.sha256(), -1
        with writing(path):
            self.fd = os.open(self.partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)

    def write(self, data: bytes | memoryview) -> None:
        rest = memoryview(data)
        self._sha256.update(rest)
        self.size += len(rest)
        with writing(self.path):
            while len(rest):
                rest = rest[os.write(self.fd, rest):]

    @property
    def sha256(self) -> str:
        """Of what is written so far."""
        return self._sha256.hexdigest()

    def sync(self) -> None:
        with writing(self.path):
            os.fsync(self.fd)

    def seal(self) -> dict:
        """Gives the file its name -> {"sha256", "bytes"}; the name itself is safe after `sync_folder`."""
        self.sync()
        with writing(self.path):
            os.replace(self.partial, self.path)
        self.close()
        return {"sha256": self.sha256, "bytes": self.size}

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        """Whatever was not sealed is gone."""
        if self.fd >= 0:
            self.close()
            with contextlib.suppress(OSError):
                os.unlink(self.partial)


class TensorFile(DurableFile):
    """A safetensors file of the tensors in `layout`, {name: (torch dtype, shape)}, which are then appended in that order."""

    def __init__(self, path: Path, layout: dict[str, tuple], metadata: dict[str, str] | None = None):
        super().__init__(path)
        header, end = {"__metadata__": metadata} if metadata else {}, 0
        for name, (dtype, shape) in layout.items():
            begin, end = end, end + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": _NAMES[str(dtype)[6:]], "shape": list(shape), "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % ALIGNMENT)
        self.write(len(text).to_bytes(8, "little") + text)

    def append(self, tensor: Tensor) -> None:
        self.write(_bytes(tensor))


class TensorList:
    """A list of `count` equal tensors kept in a file instead of memory: appended one after the other, read one at a time.

    `scratch` files lose their name at once, and vanish with the list or the process.
    """

    def __init__(self, path: Path, count: int, scratch: bool = False):
        self.path, self.count, self.scratch = path, count, scratch
        self.file: TensorFile | None = None
        self._fd, self._length, self._first = -1, 0, 0

    @classmethod
    def open(cls, path: Path) -> TensorList:
        """Of a finished file."""
        from safetensors import safe_open

        with safe_open(path, framework="pt") as stored:
            names = list(stored.keys())
            self = cls(path, len(names))
            example = stored.get_tensor("0")
            self._dtype, self._shape = example.dtype, tuple(example.shape)
        self._fd = os.open(path, os.O_RDONLY)
        self._length, self._first = self.count, 8 + int.from_bytes(os.pread(self._fd, 8, 0), "little")
        return self

    def append(self, tensor: Tensor) -> None:
        if self.file is None:
            self._dtype, self._shape = tensor.dtype, tuple(tensor.shape)
            self.file = TensorFile(self.path, {str(i): (self._dtype, self._shape) for i in range(self.count)})
            self._first = self.file.size
            self._fd = os.dup(self.file.fd)                 # outlives the file's sealing
            if self.scratch:
                unlink([self.file.partial])                 # unless the journal's writer has just swept it away
        self.file.append(tensor)
        self._length += 1

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Tensor:
        import torch

        if not 0 <= index < self._length:
            raise IndexError(index)
        tensor = torch.empty(self._shape, dtype=self._dtype)
        room, at = memoryview(tensor.view(-1).view(torch.uint8).numpy()), 0
        begin = self._first + index * len(room)
        while at < len(room):
            at += os.preadv(self._fd, [room[at:]], begin + at)
        return tensor

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(self._length))

    def __del__(self):
        if self._fd >= 0:
            os.close(self._fd)
        if self.scratch and self.file is not None:
            self.file.close()


def by_alignment(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """In the order in which a file's tensors are aligned: those of whole lines (packed indices always are) first, then wide dtypes."""
    return dict(sorted(tensors.items(), key=lambda item: (item[1].nbytes % ALIGNMENT > 0, -item[1].element_size(), item[0])))


def layout_of(tensors: dict[str, Tensor]) -> dict[str, tuple]:
    """{name: (dtype, shape)}."""
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def write_text(path: Path, text: str) -> dict:
    """All or nothing -> {"sha256", "bytes"}."""
    with DurableFile(path) as file:
        file.write(text.encode())
        return file.seal()


def digest(tensor: Tensor) -> str:
    """SHA-256 of dtype, shape and bytes."""
    found = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    found.update(_bytes(tensor))
    return found.hexdigest()


def digest_of(tensors: Iterable[Tensor]) -> str:
    """SHA-256 of the bytes of all of them."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(_bytes(tensor))
    return found.hexdigest()


def sync_folder(folder: Path) -> None:
    """Puts the names in a folder on the disk."""
    if os.name == "posix":
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def unlink(paths: Iterable[Path]) -> None:
    """Removes files, those that are there."""
    for path in paths:
        path.unlink(missing_ok=True)


def _bytes(tensor: Tensor) -> memoryview:
    import torch

    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
