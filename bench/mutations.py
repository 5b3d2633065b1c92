"""python -m bench.mutations: a checkpoint damaged at random, again and again: FormatError or a correct load, and nothing else."""
from __future__ import annotations

import collections
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from gptvq import Recipe, VQConfig, VQWeight, checkpoint, load, quantize, verify
from gptvq.errors import ConfigError, FormatError
from gptvq.linear import VQLinear
from gptvq.report import Report, layer_table
from gptvq.weight import DTYPES

from . import damage, runner

EXAMPLE = """examples:
  python -m bench.mutations --count 20000
  python -m bench.mutations --count 1000000 --json bench/results/mutations.json

Each damaged copy is verified without its hashes and, where that finds nothing wrong, also with them, read by the safetensors library,
and decoded.  Every --load-every-th is also loaded as a model.  Batches run in processes of their own, whose address space may grow by
--spare megabytes beyond what a good load has left them with; --patience seconds for one file are a hang."""
BATCH = 50_000
OUTCOMES = ("refused", "by hash", "read", "loaded", "failed")


class Hang(BaseException):
    """One file took longer than it may."""


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    if args.batch:
        batch(Path(args.batch), *args.range, args)
        return
    results = runner.Results("mutations", argv, args.json, {
        "count": args.count, "seed": args.seed, "load_every": args.load_every, "spare_megabytes": args.spare,
        "patience_seconds": args.patience})
    began, totals = time.perf_counter(), collections.Counter()
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as place:
        sound = Path(place) / "sound"
        results.settings.update(bytes=make(sound))
        for first in range(0, args.count, BATCH):
            found = _in_a_process(Path(place), first, min(first + BATCH, args.count), args)
            totals.update({tuple(key): n for key, n in found["counts"]})
            results.rows[:] = _rows(totals, time.perf_counter() - began, found)
            results.add([])
            runner.log(f"{min(first + BATCH, args.count):,} of {args.count:,}, {time.perf_counter() - began:.0f} s")
            if found["failures"]:
                raise FormatError("; ".join(found["failures"][:10]))
    print(show(results.rows))


def parser():
    p = runner.parser("mutations", "Damaged checkpoints end in FormatError or load right.", EXAMPLE)
    p.add_argument("--count", type=runner.positive, default=20_000, metavar="N", help="damaged copies, default %(default)s")
    p.add_argument("--seed", type=int, default=0, help="of the damage, default %(default)s")
    p.add_argument("--load-every", type=runner.positive, default=100, metavar="N", help="load every Nth as a model, default %(default)s")
    p.add_argument("--spare", type=runner.positive, default=128, metavar="MB", help="address space beyond the start's, default %(default)s")
    p.add_argument("--patience", type=runner.positive, default=20, metavar="S", help="seconds for one file, default %(default)s")
    p.add_argument("--batch", metavar="FOLDER", help="used by the program itself")
    p.add_argument("--range", type=int, nargs=2, metavar=("FIRST", "END"), help="used by the program itself")
    return p


def make(folder: Path) -> int:
    """Writes a sound checkpoint of a few kilobytes in two shards, with every kind of buffer; its tensor files' bytes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                                             vocab_size=32, max_position_embeddings=32, attention_bias=True, bos_token_id=None,
                                             pad_token_id=None, eos_token_id=0, initializer_range=0.1)).eval()
    rules = (("*.q_proj", {"scale_block": 16}), ("*.up_proj", {"dim": 1, "svd_rank": 2}), ("*.down_proj", {}), ("*", None))
    whole, checkpoint.SHARD_BYTES = checkpoint.SHARD_BYTES, 4000
    try:
        quantize(model, folder, VQConfig(rules=rules, recipe=Recipe(em_iterations=2, em_starts=1, passes=1, sweeps=0)),
                 calibration=torch.arange(64).remainder(32).view(2, 32))
    finally:
        checkpoint.SHARD_BYTES = whole
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _in_a_process(place: Path, first: int, end: int, args) -> dict:
    """What `batch` found; a crash is a failure like any other, of the case that it was at."""
    words = [sys.executable, "-m", "bench.mutations", "--batch", str(place), "--range", str(first), str(end), "--seed", str(args.seed),
             "--load-every", str(args.load_every), "--spare", str(args.spare), "--patience", str(args.patience)]
    done = subprocess.run(words, cwd=runner.ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
                          timeout=60 + args.patience * (end - first))
    if done.returncode:
        at = (place / "at").read_text().strip() if (place / "at").exists() else "the start"
        return {"counts": [], "growth": 0, "failures": [f"case {at}: exit code {done.returncode}: {done.stderr[-800:]}"]}
    return json.loads(done.stdout)


def batch(place: Path, first: int, end: int, args) -> None:
    """Runs the cases `first` to `end` and prints {counts, growth, failures} as JSON."""
    import transformers

    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    sound, work = place / "sound", place / "work"
    files = {file.name: file.read_bytes() for file in sound.iterdir()}
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(sound, work)
    if judge(work, True) != "loaded":
        raise FormatError(f"{sound}: the sound checkpoint does not load")
    signal.signal(signal.SIGALRM, _hang)
    before = _address_space()
    resource.setrlimit(resource.RLIMIT_AS, (before + (args.spare << 20), resource.getrlimit(resource.RLIMIT_AS)[1]))
    at = os.open(place / "at", os.O_CREAT | os.O_WRONLY)
    counts, failures, largest = collections.Counter(), [], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for case in range(first, end):
        os.pwrite(at, f"{case:<20}".encode(), 0)
        kind, changed = damage.damage(files, random.Random(f"{args.seed}:{case}"))
        damage.write(work, changed)
        try:
            outcome = _patiently(work, case % args.load_every == 0, args.patience)
        except (Exception, Hang) as error:
            outcome = "failed"
            failures.append(f"case {case}, {kind}: {type(error).__name__}: {str(error)[:300]}")
        counts[kind, outcome] += 1
        damage.restore(work, changed, files)
    growth = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - largest)
    print(json.dumps({"counts": list(counts.items()), "growth": growth, "failures": failures}))


def _patiently(folder: Path, whole: bool, patience: int) -> str:
    """`judge`, which may take so many seconds by the clock, or so many once more: a busy or suspended machine is no hang."""
    def once() -> str:
        signal.setitimer(signal.ITIMER_REAL, patience)
        try:
            return judge(folder, whole)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    try:
        return once()
    except Hang:
        return once()


def judge(folder: Path, whole: bool) -> str:
    """"refused", "by hash" (or report.json), "read" or, as a model, "loaded"; any other error than FormatError is a failure."""
    try:
        verify(folder, hashes=False)
    except FormatError:
        if whole:
            _load_is_refused(folder)
        return "refused"
    weights, outcome = independent(folder), "read"
    try:
        verify(folder)
        layer_table(Report.load(folder))
    except FormatError:
        outcome = "by hash"
    if not whole:
        return outcome
    try:
        model = load(folder, device="cpu")
    except FormatError:
        return "refused"                                # the model's own settings do not fit the tensors
    packed = {name: module for name, module in model.named_modules() if isinstance(module, VQLinear)}
    if set(packed) != set(weights) or not all(torch.equal(packed[name].dequantize(), weights[name]) for name in weights):
        raise RuntimeError("the loaded model has other weights than the files")
    return "loaded"


def independent(folder: Path) -> dict[str, torch.Tensor]:
    """{layer: weight}, finite, of what the safetensors library reads."""
    from safetensors.torch import load_file

    tensors = {}
    for file in checkpoint.tensor_files(folder):
        tensors.update(load_file(file))
    weights, settings = {}, json.loads((folder / "config.json").read_text())["quantization_config"]
    for layer, spec in checkpoint.layer_specs(settings, "config.json").items():
        buffers = {name: tensors[f"{layer}.{name}"] for name in spec.buffer_shapes()}
        if any(tensor.dtype != DTYPES[spec.buffer_shapes()[name][1]] for name, tensor in buffers.items()):
            raise RuntimeError(f"{layer}: a dtype that the format does not have went through")
        weights[layer] = VQWeight(spec, buffers).dequantize()
        if not bool(torch.isfinite(weights[layer]).all()):
            raise RuntimeError(f"{layer}: weights that are not finite went through")
    return weights


def _load_is_refused(folder: Path) -> None:
    try:
        load(folder, device="cpu")
    except (FormatError, ConfigError):                  # ConfigError: by its config.json not one of our checkpoints
        return
    raise RuntimeError("verify refuses the folder, load does not")


def _hang(*_):
    raise Hang


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def _rows(totals: collections.Counter, seconds: float, found: dict) -> list[dict]:
    kinds = sorted({kind for kind, _ in totals})
    rows = [{"damage": kind, **{outcome: totals[kind, outcome] for outcome in OUTCOMES}} for kind in kinds]
    everything = {outcome: sum(row[outcome] for row in rows) for outcome in OUTCOMES}
    return [*rows, {"damage": "all", **everything, "seconds": seconds, "peak_growth_bytes_of_last_batch": found["growth"],
                    "failures": found["failures"]}]


def show(rows: list[dict]) -> str:
    return runner.table(rows, {name: lambda r, name=name: f"{r[name]:,}" if name != "damage" else r[name]
                               for name in ("damage", *OUTCOMES)})


if __name__ == "__main__":
    sys.exit(runner.run(main))
