"""The weights of the next decoder block, read from the files on a thread while a GPU works on the block before."""
from __future__ import annotations

import threading
from pathlib import Path

import torch
from torch import Tensor

from .checkpoint import read_headers, tensor_files
from .errors import FormatError
from .storage import digest

_PAGE = 1 << 9                      # torch rounds page-locked memory up to a power of two, and keeps it for the next block


class ReadAhead:
    """Reads one block ahead: from the files into page-locked memory, and on a stream of its own to the card.

    Tensors are read under the names and in the types that the block has, and only taken for what they are if they hash to what the
    first reading of the model gave; a block whose tensors the files hold under other names, or in another form, is not read ahead.
    On a CPU `device` memory is not locked and nothing is copied.
    """

    def __init__(self, folder: Path, hashes: dict[str, str], device: torch.device):
        self._entries, self._hashes, self._device = read_headers(tensor_files(folder)), hashes, device
        self._gpu = device.type == "cuda"
        self._side = torch.cuda.Stream(device) if self._gpu else None
        self._name, self._thread = "", None
        self._stop = threading.Event()
        self._forget()

    def readable(self, wanted: dict[str, Tensor]) -> bool:
        """Whether the files hold tensors of these names and shapes."""
        return all(name in self._hashes and name in self._entries and self._entries[name].shape == tuple(tensor.shape)
                   for name, tensor in wanted.items())

    def start(self, name: str, wanted: dict[str, Tensor], to_device: bool) -> None:
        """Begins with block `name`, whose tensors `wanted` are on meta; to_device: there is room for them beside the block at hand."""
        self.close()
        self._stop.clear()
        self._name = name
        self._thread = threading.Thread(target=self._run, args=(wanted, to_device and self._gpu), name=f"gptvq reads {name}", daemon=True)
        self._thread.start()

    def take(self, name: str) -> dict[str, Tensor] | None:
        """{tensor: values} of block `name`, waiting for them; None unless they were read ahead.  Raises what the reading raised."""
        if self._thread is None or self._name != name:
            return None
        self._thread.join()
        found, error, copied = self._found, self._error, self._copied
        self._thread = None
        self._forget()
        if error is not None:
            raise error
        if found is None:
            self._entries = {}                          # nor will the other blocks be what the files say
        if copied is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(copied)
            for tensor in found.values():
                tensor.record_stream(current)           # its memory was handed out for the other stream
        return found

    def close(self) -> None:
        """Ends the thread after the tensor it is at, and lets go of what it has read."""
        if self._thread is not None:
            self._stop.set()
            self._thread.join()
            self._thread = None
        self._forget()

    def _forget(self) -> None:
        self._found: dict[str, Tensor] | None = None
        self._error: BaseException | None = None
        self._copied = None

    def _run(self, wanted: dict[str, Tensor], to_device: bool) -> None:
        at = ""
        try:
            found: dict[str, Tensor] = {}
            for at, meta in wanted.items():
                if self._stop.is_set():
                    return
                found[at] = self._read(at, meta)
                if digest(found[at]) != self._hashes[at]:       # transformers makes something else of it
                    return
                if to_device:
                    with torch.cuda.stream(self._side):
                        found[at] = found[at].to(self._device, non_blocking=True)
            if to_device:
                self._copied = self._side.record_event()
            self._found = found
        except OSError as error:
            self._error = FormatError(f"{self._entries[at].file}: {at} cannot be read ({error.strerror or error}); copy it again")
        except BaseException as error:                          # raised where the block is taken
            self._error = error

    def _read(self, name: str, meta: Tensor) -> Tensor:
        from safetensors import safe_open

        with safe_open(self._entries[name].file, framework="pt") as stored:
            values = stored.get_tensor(name)
        return torch.empty(meta.shape, dtype=meta.dtype, pin_memory=self._gpu).copy_(values)


def locked_bytes(tensors: dict[str, Tensor]) -> int:
    """Page-locked memory that reading these tensors ahead takes."""
    return sum(max(_PAGE, 1 << (t.numel() * t.element_size() - 1).bit_length()) for t in tensors.values() if t.numel())
