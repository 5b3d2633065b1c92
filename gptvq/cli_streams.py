"""Standard streams that are closed, full or short of characters, and what the system says of files."""
from __future__ import annotations

import contextlib
import errno
import os
import sys


def repair() -> None:
    """Gives the null device for standard streams that are closed, and has output show a mark for what its encoding lacks."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")


def drop_output() -> None:
    """What standard output still holds goes nowhere, lest Python fail with it at exit."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def said(error: OSError) -> str:
    """What the system refused, in a sentence."""
    full = error.filename is None and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
    try:
        sys.stdout.flush()
    except OSError:
        full = True
        drop_output()
    if full:
        return f"the output cannot be written ({error.strerror or error}); free some space or send it elsewhere"
    if error.filename is None:
        return " ".join(str(error).split())
    name = os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes, os.PathLike)) else error.filename
    return f"{name}: cannot be read or written ({error.strerror or error}); check the path and who may use it"
