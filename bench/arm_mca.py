"""python -m bench.arm_mca: cycles per weight of the NEON loops of arm_loops.cpp, counted by llvm-mca for several Arm cores."""
from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from gptvq.errors import BackendUnavailable

from . import runner

SOURCE = Path(__file__).with_name("arm_loops.cpp")
# The last two keep GCC from spilling and copying registers, which it does for some of the loops: what counts is their own work.
FLAGS = ["-O3", "-std=c++17", "-march=armv8.2-a+dotprod", "-fno-schedule-insns", "-fno-tree-coalesce-vars"]
CORES = ["neoverse-n1", "neoverse-n2", "neoverse-v2", "apple-m1"]
VERSION = 19                        # earlier ones take an old core's model for some of CORES, without a word
ITERATIONS = 1000
WEIGHTS = 16 * 32                   # per iteration
LOOPS = {"vq_2d_k16": ("2D K16", 2.0), "vq_2d_k64": ("2D K64", 3.0), "int4": ("INT4, q - 8", 4.0),
         "int4_folded": ("INT4, offset folded", 4.0)}     # what a row calls it, bits of a weight's index
EXAMPLE = """example:
  python -m bench.arm_mca --json bench/results/arm-mca.json

Counted, not measured: the model of each core in LLVM, all data in the first-level cache, one tile of 16 rows at a time.  x: how many
times as many weights per cycle as that loop."""


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    assembler, tool = compiler(), analyser()
    results = runner.Results("arm_mca", argv, args.json, {"compiler": _first_line([assembler, "--version"]), "flags": FLAGS,
                                                          "llvm-mca": version(tool), "iterations": ITERATIONS})
    assembly = assemble(assembler)
    for core in args.cores:
        results.add(count(tool, assembly, core))
    print(show(results.rows))


def parser():
    p = runner.parser("arm_mca", "Cycles of NEON loops on Arm cores.", EXAMPLE)
    p.add_argument("--cores", type=runner.names, default=CORES, metavar="A,B", help=f"default {','.join(CORES)}")
    return p


def compiler() -> str:
    """A C++ compiler for aarch64; BackendUnavailable where there is none."""
    name = os.environ.get("CXX") or "c++" if platform.machine() in ("aarch64", "arm64") else "aarch64-linux-gnu-g++"
    path = shutil.which(name)
    if path is None:
        raise BackendUnavailable(f"{name} is not installed; on Debian: apt-get install g++-aarch64-linux-gnu")
    return path


def analyser() -> str:
    """llvm-mca of VERSION or later; BackendUnavailable where there is none."""
    names = [*(f"llvm-mca-{n}" for n in range(VERSION + 10, VERSION - 1, -1)), "llvm-mca"]
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None or version(found) < VERSION:
        have = f"{found} is version {version(found)}" if found else "llvm-mca is not installed"
        raise BackendUnavailable(f"{have}, need {VERSION} or later; on Debian: apt-get install llvm-{VERSION}")
    return found


def version(tool: str) -> int:
    found = re.search(r"version (\d+)", _output([tool, "--version"], ""))
    return int(found[1]) if found else 0


def assemble(assembler: str) -> str:
    """The loops as assembly, with their marks."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "loops.s"
        _output([assembler, *FLAGS, "-S", str(SOURCE), "-o", str(out)], "")
        return out.read_text(encoding="utf-8")


def count(tool: str, assembly: str, core: str) -> list[dict]:
    """One row per loop of LOOPS."""
    text = _output([tool, "-mtriple=aarch64-linux-gnu", f"-mcpu={core}", f"-iterations={ITERATIONS}", "-json", "-"], assembly)
    summaries = {region["Name"]: region["SummaryView"] for region in json.loads(text)["CodeRegions"]}
    cycles = {name: summaries[name]["TotalCycles"] / ITERATIONS / WEIGHTS for name in LOOPS}
    return [{"operation": "neon loop", "method": "llvm-mca", "preset": None, "format": label, "device": core, "threads": 1,
             "bits_per_value": bits, "cycles_per_weight": cycles[name],
             "instructions_per_weight": summaries[name]["Instructions"] / ITERATIONS / WEIGHTS,
             "speedup": {LOOPS[other][0]: cycles[other] / cycles[name] for other in ("int4", "int4_folded") if other != name}}
            for name, (label, bits) in LOOPS.items()]


def _output(command: list[str], text: str) -> str:
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    if done.returncode or "not a recognized processor" in done.stderr:
        raise BackendUnavailable(f"{Path(command[0]).name} failed: {done.stderr.strip()[:500] or done.returncode}")
    return done.stdout


def _first_line(command: list[str]) -> str:
    return _output(command, "").splitlines()[0]


def show(rows: list[dict]) -> str:
    return runner.table(rows, {
        "core": lambda r: r["device"], "loop": lambda r: r["format"], "bits per index": lambda r: f"{r['bits_per_value']:.0f}",
        "cycles per 16 weights": lambda r: f"{16 * r['cycles_per_weight']:.2f}",
        "instructions per 16 weights": lambda r: f"{16 * r['instructions_per_weight']:.2f}", **runner.speedups(rows)})


if __name__ == "__main__":
    sys.exit(runner.run(main))
