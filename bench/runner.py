"""What every bench shares: its command line, result files, tables and paired timing."""
from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import importlib.metadata
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

import gptvq
from gptvq.backends import native
from gptvq.config import Recipe
from gptvq.errors import ConfigError, GptvqError
from gptvq.report import environment, finite

ROOT = Path(__file__).resolve().parent.parent
FIELDS = ("command", "settings", "machine", "commit", "versions", "date", "rows")


# ---- command line
def parser(name: str, text: str, examples: str) -> argparse.ArgumentParser:
    """A parser with the options that every bench has."""
    p = argparse.ArgumentParser(prog=f"python -m bench.{name}", description=text, epilog=examples,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--json", metavar="FILE", help="write the result file here; it is rewritten after every row")
    return p


def run(main: Callable[[list[str] | None], None], argv: list[str] | None = None) -> int:
    """Exit code of one bench: 0 done, 1 a named error, 130 interrupted."""
    try:
        main(argv)
        sys.stdout.flush()
        return 0
    except GptvqError as error:
        print(f"bench: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except BrokenPipeError:                             # `... --table FILES | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("\nbench: interrupted; the rows measured so far are in the result file, if one was asked for", file=sys.stderr)
        return 130


def names(text: str) -> list[str]:
    """"a,b" -> ["a", "b"]; an argparse type."""
    found = [part.strip() for part in text.split(",") if part.strip()]
    if not found:
        raise argparse.ArgumentTypeError(f"got {text!r}, need names with commas between them")
    return found


def positive(text: str) -> int:
    """A whole number of at least 1; an argparse type."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, need a whole number of at least 1")
    return int(text)


def numbers(text: str) -> list[int]:
    """"1,2" -> [1, 2]; an argparse type."""
    return [positive(part) for part in names(text)]


def shapes(text: str) -> list[tuple[int, int]]:
    """"576x1536,576x576" -> [(576, 1536), (576, 576)]; an argparse type."""
    found = [part.split("x") for part in names(text)]
    if any(len(shape) != 2 for shape in found):
        raise argparse.ArgumentTypeError(f"got {text!r}, need ROWSxCOLS with commas between them")
    return [(positive(rows), positive(cols)) for rows, cols in found]


def check_names(option: str, given: list[str], known: Sequence[str]) -> None:
    """ConfigError on a name that is none of `known`."""
    if wrong := [name for name in given if name not in known]:
        raise ConfigError(f"{option}: got {', '.join(wrong)}, need some of {', '.join(known)}")


def log(text: str) -> None:
    """Progress, kept out of the table on standard output."""
    print(text, file=sys.stderr, flush=True)


# ---- result files
class Results:
    """The rows of one run.  With a path the whole file is replaced after every `add`: a broken-off run keeps its rows.

    `settings` is what must be equal for rows of two files to be comparable.  resume: of a file that runs are added to, whether the rows
    that it holds are kept; there every row says the command, commit and processor of its run, and the settings of the recipe that
    `recipe` gives for it.  ConfigError where rows were measured with other settings, or another recipe than `recipe` gives now.
    """

    def __init__(self, name: str, argv: list[str] | None, path: str | None, settings: dict, resume: bool | None = None,
                 recipe: Callable[[dict], Recipe | None] = lambda row: None):
        self.path, self.recipe = Path(path) if path else None, recipe
        kept: list[dict] = []
        if resume and self.path is not None and self.path.exists():
            before = load(path)
            found = [(before["settings"], settings), *((row["recipe_settings"], self._recipe_settings(row) or row["recipe_settings"])
                                                       for row in before["rows"] if "recipe_settings" in row)]
            if differing := dict.fromkeys(key for pair in found for key in different(*pair)):
                raise ConfigError(f"{path}: its rows were measured with other settings ({', '.join(differing)} differ); give another --json, "
                                  "or --fresh to measure them anew")
            kept = before["rows"]
        self.values = {"command": command(name, sys.argv[1:] if argv is None else argv), "settings": settings,
                       "machine": machine(), "commit": commit(), "versions": versions(),
                       "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), "rows": kept}
        made = {key: self.values["machine"][key] for key in ("cpu", "cpu_family", "cpu_model", "kernels")}
        self.run = {} if resume is None else {"command": self.values["command"], "commit": self.values["commit"]["hash"], **made}
        self._write()

    def _recipe_settings(self, row: dict) -> dict | None:
        recipe = self.recipe(row)
        return recipe and dataclasses.asdict(recipe)

    @property
    def settings(self) -> dict:
        return self.values["settings"]

    @property
    def rows(self) -> list[dict]:
        return self.values["rows"]

    def add(self, rows: Iterable[dict]) -> None:
        for row in rows:
            known = {"recipe_settings": self._recipe_settings(row)} if self.recipe(row) else {}
            self.rows.append({**row, **known, **self.run})
        self._write()

    def _write(self) -> None:
        if self.path is None:
            return
        partial = self.path.with_name(self.path.name + ".partial")
        try:
            partial.write_text(json.dumps(finite(self.values), indent=1, allow_nan=False) + "\n", encoding="utf-8")
            os.replace(partial, self.path)
        except OSError as error:
            raise ConfigError(f"--json {self.path}: cannot be written ({error.strerror}); give another path") from error


def load(path: str) -> dict:
    """A result file; ConfigError where it is none."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not a readable result file ({error}); need one that a bench wrote with --json") from error
    missing = [field for field in FIELDS if field not in values] if isinstance(values, dict) else list(FIELDS)
    if missing:
        raise ConfigError(f"{path}: not a result file, it has no {', '.join(missing)}; need one that a bench wrote with --json")
    return values


def different(settings: dict, other: dict) -> list[str]:
    """Names of the settings in which two result files differ."""
    return [key for key in {**settings, **other} if settings.get(key) != other.get(key)]


def command(name: str, argv: list[str]) -> str:
    """The command line; of paths outside the project only the file's name, which is all that others can use."""
    def public(arg: str) -> str:
        if not (os.path.isabs(arg) or arg.startswith("..")):
            return arg
        path = Path(arg).resolve()
        return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name

    flags = [arg.partition("=") if arg.startswith("--") else ("", "", arg) for arg in argv]
    return shlex.join(["python", "-m", f"bench.{name}", *(f"{flag}{equals}{public(value)}" for flag, equals, value in flags)])


def machine() -> dict:
    """Processor, with the numbers that tell apart those of one name, our kernels that run, cores, bytes of memory and the GPU, if any."""
    found = environment()
    kernels = (os.environ.get("GPTVQ_CPU") or native.instruction_sets()[0]) if native.serves(torch.device("cpu")) else None
    return {"cpu": found["processor"], **processor_numbers(), "architecture": found["machine"], "kernels": kernels, "cores": found["cores"],
            "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "gpu": found["gpu"] or None}


def processor_numbers(path: str = "/proc/cpuinfo") -> dict:
    """{"cpu_family", "cpu_model"}: two integers (of Arm, implementer and part), or None where Linux does not say them."""
    lines = Path(path).read_text(errors="replace").splitlines() if os.path.exists(path) else []
    said = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    found = [said.get("cpu family", said.get("CPU implementer")), said.get("model", said.get("CPU part"))]
    return dict(zip(("cpu_family", "cpu_model"), [int(value, 0) if value else None for value in found]))


def versions() -> dict:
    found = environment()
    return {"python": found["python"], "torch": torch.__version__, "transformers": found.get("transformers"),
            "gptvq": gptvq.__version__, "numpy": importlib.metadata.version("numpy")}


def commit() -> dict:
    """{"hash", "dirty"} of the source tree, results aside; in a copy without .git the variable GPTVQ_COMMIT says the hash."""
    def git(*args: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(ROOT), *args], capture_output=True, text=True)
        except FileNotFoundError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    head = git("rev-parse", "--verify", "HEAD")
    if head is None:
        return {"hash": os.environ.get("GPTVQ_COMMIT"), "dirty": None}
    return {"hash": head, "dirty": bool(git("status", "--porcelain", "--", ".", ":!bench/results"))}


# ---- tables
def table(rows: list[dict], columns: dict[str, Callable[[dict], object]]) -> str:
    """Markdown; a column's function that meets a missing value (KeyError, None) leaves its cell at "-"."""
    def cell(show: Callable[[dict], object], row: dict) -> str:
        try:
            return str(show(row))
        except (KeyError, TypeError):
            return "-"

    lines = [list(columns), *([cell(show, row) for show in columns.values()] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    text = [f"| {' | '.join(value.ljust(width) for value, width in zip(line, widths))} |" for line in lines]
    return "\n".join([text[0], f"|{'|'.join('-' * (width + 2) for width in widths)}|", *text[1:]])


def speedups(rows: list[dict]) -> dict[str, Callable[[dict], object]]:
    """A column per baseline that some row is compared with."""
    names = dict.fromkeys(name for row in rows for name in row["speedup"])
    return {f"x {name}": lambda row, name=name: f"{row['speedup'][name]:.2f}" for name in names}


# ---- timing
def turns(functions: dict[str, Callable[[], float]], repeats: int, settle: float = 0.0) -> dict[str, list[float]]:
    """What each function returned in each of `repeats` rounds.

    They take turns, their order reversed every other round, so that a machine that slows down slows all.  `settle`: seconds
    of rest before each, for the threads of the one before to fall asleep.
    """
    found: dict[str, list[float]] = {name: [] for name in functions}
    for i in range(repeats):
        for name in reversed(functions) if i % 2 else functions:
            time.sleep(settle)
            found[name].append(functions[name]())
    return found


def paired(functions: dict[str, Callable[[], object]], repeats: int = 11, least: float = 0.01,
           synchronize: Callable[[], None] = lambda: None, settle: float = 0.0) -> dict[str, list[float]]:
    """Seconds per call of each function in turns, each sample of about `least` seconds or one call."""
    def sample(function: Callable[[], object], loops: int) -> float:
        synchronize()
        began = time.perf_counter()
        for _ in range(loops):
            function()
        synchronize()
        return (time.perf_counter() - began) / loops

    loops = {}
    for name, function in functions.items():
        function()                                      # the first call also allocates and loads
        loops[name] = max(1, math.ceil(least / sample(function, 1)))
    return turns({name: functools.partial(sample, function, loops[name]) for name, function in functions.items()}, repeats, settle)


def ratio(times: dict[str, list[float]], name: str, baseline: str) -> float:
    """How many times faster `name` is than `baseline`: the median of the ratios of samples taken in the same round."""
    return statistics.median(slow / fast for fast, slow in zip(times[name], times[baseline]))
