"""The journal of a job: what is done survives kill -9 at any instant, and the same job goes on behind it.

In the folder `journal` beside the checkpoint to be: `journal.jsonl` with the job in its first line and one line per finished
block; the files that a line names with their hashes; a lock.  A block's files are written under other names, synced and
renamed, the folder is synced, and only then is the line appended and synced.  A file that no line names does not exist.
"""
from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from . import tensorfile
from .errors import ConfigError, FormatError, ResumeMismatch
from .storage import (
    TensorFile,
    TensorList,
    by_alignment,
    layout_of,
    sync_folder,
    unlink,
    write_text,
    writing,
)

if TYPE_CHECKING:
    from torch import Tensor

FOLDER, LINES, LOCK = "journal", "journal.jsonl", "lock"
_FIELDS = {"block", "files", "layers", "warnings", "seconds", "stages"}     # of a block's line


class Journal:
    """Opens or begins the journal of `job` (plain JSON values) below `folder`, as its only writer.

    `blocks` are the lines of the finished blocks.  Raises ResumeMismatch where another job is in it, FormatError where its
    files are damaged, ConfigError where another process writes it or the folder cannot be written.
    """

    def __init__(self, folder: Path, job: dict, fresh: bool = False):
        self.folder, job = folder / FOLDER, json.loads(json.dumps(job))
        self.blocks: list[dict] = []
        with writing(folder):
            self.folder.mkdir(exist_ok=True)
            self._lock = _locked(self.folder / LOCK)
        try:
            with writing(folder):
                stored = None if fresh else self._read()
                if stored is None:
                    unlink([self.folder / LINES])           # first: without it the other files do not exist
                    unlink(self._files())
                    self.job = job
                    write_text(self.folder / LINES, _line({"job": job}))
                    sync_folder(self.folder)
                    sync_folder(folder)
            if stored is not None:
                require_same(folder, stored, job)
                self.job = stored
                self._verify()
                with writing(folder):
                    self._sweep()
        except BaseException:
            self.close()
            raise

    def path(self, kind: str, block: int) -> Path:
        """Where a file of a block belongs."""
        return self.folder / f"{kind}-{block:05}.safetensors"

    def commit(self, line: dict, tensors: dict[str, Tensor], streams: dict[str, list[Tensor] | TensorList]) -> None:
        """Makes a block part of the job: its tensors and the hidden states behind it, then its line.

        Removes the files that no later step needs.
        """
        with contextlib.ExitStack() as opened:
            files = []
            for kind, contents in {"block": tensors, **streams}.items():
                if isinstance(contents, TensorList):
                    files.append(opened.enter_context(contents.file))
                    continue
                named = contents if isinstance(contents, dict) else {str(i): state for i, state in enumerate(contents)}
                named = by_alignment(named) if kind == "block" else named
                files.append(opened.enter_context(TensorFile(self.path(kind, line["block"]), layout_of(named))))
                for tensor in named.values():
                    files[-1].append(tensor)
            line = {**line, "files": {file.path.name: file.seal() for file in files}}
        with writing(self.folder):
            sync_folder(self.folder)
            fd = os.open(self.folder / LINES, os.O_WRONLY | os.O_APPEND)
            try:
                data = memoryview(_line(line).encode())
                while len(data):
                    data = data[os.write(fd, data):]
                os.fsync(fd)
            finally:
                os.close(fd)
            self.blocks.append(line)
            self._sweep()

    def remove(self) -> None:
        """Ends the journal, its checkpoint being complete."""
        with writing(self.folder):
            unlink([self.folder / LINES])                   # first, again
            unlink([*self._files(), self.folder / LOCK])
            self.close()
            self.folder.rmdir()

    def close(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _files(self) -> list[Path]:
        return [path for path in self.folder.iterdir() if path.name != LOCK]

    def _wanted(self) -> set[str]:
        """Names of the blocks' files, but the activations of the last block only."""
        names = {name for line in self.blocks for name in line["files"] if name.startswith("block-")}
        return names | set(self.blocks[-1]["files"] if self.blocks else ())

    def _sweep(self) -> None:
        unlink(path for path in self._files() if path.name not in self._wanted() | {LINES})

    def _read(self) -> dict | None:
        """The stored job, None where there is none yet; fills `blocks`, and cuts off a last line that was torn."""
        path = self.folder / LINES
        if not path.exists():
            return None
        data = path.read_bytes()
        whole = data.splitlines(keepends=True)
        if whole and not _is_whole(whole[-1]):
            del whole[-1]
            with open(path, "rb+") as file:
                file.truncate(sum(map(len, whole)))
                os.fsync(file.fileno())
        lines = [_parsed(text, path, number) for number, text in enumerate(whole, 1)]
        if not lines or not isinstance(lines[0].get("job"), dict):
            raise FormatError(f"{path}: the first line names no job; the file is damaged, start over (--fresh, resume=\"fresh\")")
        self.blocks = lines[1:]
        if any(line.get("block") != index or not _FIELDS <= line.keys() for index, line in enumerate(self.blocks)):
            raise FormatError(f"{path}: its lines are not one per block in order; the file is damaged, start over (--fresh, "
                              "resume=\"fresh\")")
        return lines[0]["job"]

    def _verify(self) -> None:
        wanted = self._wanted()
        for line in self.blocks:
            for name, about in line["files"].items():
                path = self.folder / name
                if name in wanted and (not path.is_file() or path.stat().st_size != about["bytes"] or tensorfile.sha256(path) != about["sha256"]):
                    raise FormatError(f"{path}: missing or not what was written (block {line['block']}); copy the folder again, or start "
                                      "over (--fresh, resume=\"fresh\")")


class Follower(Journal):
    """The journal as the other processes of a job see it, which read it once and leave the writing to rank 0."""

    def __init__(self, folder: Path):
        self.folder, self.blocks, self._lock = folder / FOLDER, [], -1
        self.job = self._read() or {}

    def commit(self, line: dict, tensors: dict[str, Tensor], streams: dict[str, list[Tensor] | TensorList]) -> None:
        self.blocks.append(line)

    def remove(self) -> None:
        pass


def stored_job(folder: Path) -> dict | None:
    """The job of an unfinished run in `folder`, None where there is none; takes no lock and changes nothing."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        with open(folder / FOLDER / LINES, encoding="utf-8") as file:
            return json.loads(file.readline())["job"]
    return None


def blocks_done(folder: Path) -> int | None:
    """Number of finished blocks of an unfinished run in `folder`, None where there is none."""
    try:
        return max((folder / FOLDER / LINES).read_bytes().count(b"\n") - 1, 0)
    except OSError:
        return None


def discard(folder: Path) -> None:
    """Removes a journal, of whatever job."""
    Journal(folder, {}, fresh=True).remove()


def require_same(folder: Path, stored: dict, job: dict) -> None:
    """Raises ResumeMismatch naming every field of `job` that is another one in the `stored` job."""
    differing = list(_differences(stored, job))
    if differing:
        raise ResumeMismatch(f"{folder}: holds the run of another job: {'; '.join(differing)}. Give the arguments of that job to go on "
                             "with it, name another folder, or start over (--fresh, resume=\"fresh\")")


def _differences(stored, job, where: str = ""):
    if isinstance(stored, dict) and isinstance(job, dict):
        for key in dict.fromkeys([*stored, *job]):
            yield from _differences(stored.get(key), job.get(key), f"{where}.{key}" if where else key)
    elif stored != job:
        yield f"{where} was {json.dumps(stored)}, is {json.dumps(job)}"


def _line(values: dict) -> str:
    return json.dumps(values, separators=(",", ":")) + "\n"


def _is_whole(line: bytes) -> bool:
    """Whether a last line was written to its end."""
    try:
        return line.endswith(b"\n") and isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _parsed(text: bytes, path: Path, number: int) -> dict:
    try:
        values = json.loads(text)
    except ValueError as error:
        raise FormatError(f"{path}: line {number} is not valid JSON ({error}); the file is damaged, start over (--fresh, "
                          "resume=\"fresh\")") from error
    if not isinstance(values, dict):
        raise FormatError(f"{path}: line {number}: got a {type(values).__name__}, need an object; the file is damaged, start over "
                          "(--fresh, resume=\"fresh\")")
    return values


def _locked(path: Path) -> int:
    """A descriptor whose lock the system gives up with the process that holds it, however that ends."""
    import fcntl

    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(fd), path.stat()):       # else its last holder has just removed it
                os.truncate(fd, 0)
                os.write(fd, f"{os.getpid()}\n".encode())
                return fd
        except BlockingIOError as error:
            holder = os.pread(fd, 20, 0).decode(errors="replace").strip()
            os.close(fd)
            raise ConfigError(f"{path.parent.parent}: process {holder or '?'} is writing this job; wait for it, stop it, or name another "
                              "folder") from error
        except OSError:
            os.close(fd)
            raise
        os.close(fd)
