"""python -m bench.ranks: what each stage of one job takes on one process and on several, one thread each."""
from __future__ import annotations

import contextlib
import functools
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch

from gptvq import drift, hessian, job, ops, ranks
from gptvq.config import Recipe, VQConfig
from gptvq.errors import GptvqError
from gptvq.quantize import quantize
from gptvq.tensorfile import sha256

from . import runner

EXAMPLE = """example:
  python -m bench.ranks --rounds 3 --json bench/results/ranks.json

A random Llama is quantized by 1 and by 2 processes in turns.  A row per number of processes and stage: seconds by the clock and of the
processor, medians over the rounds of the slowest process; their ratio to one process.  "passes" are forward passes, those of which Hessians
are made included; "sums" Hessians and drift; "whole" is what every process does for the whole layer: factorizations and targets; "rows" the
rest of solving; "exchange" what ranks tell each other, with waiting for the slowest.  All files must be the same bytes.  The processor's
seconds hardly change with what else the machine does; the clock's do."""
STAGES = {"forward": "passes", "hessians": "passes", "embed": "passes", "solve": "rows"}


class Clock:
    """Seconds [clock, processor of this thread] of nested regions, each without those inside it."""

    def __init__(self):
        self.seconds: dict[str, torch.Tensor] = {}
        self._inside, self._last = ["other"], self._now()

    @contextlib.contextmanager
    def inside(self, name: str) -> Iterator[None]:
        self._count()
        self._inside.append(name)
        try:
            yield
        finally:
            self._count()
            self._inside.pop()

    def wrap(self, module, function: str, name: str) -> None:
        call = getattr(module, function)

        @functools.wraps(call)
        def timed(*args, **kwargs):
            with self.inside(name):
                return call(*args, **kwargs)
        setattr(module, function, timed)

    def stages(self) -> dict[str, list[float]]:
        self._count()
        return {name: both.tolist() for name, both in self.seconds.items()}

    def _now(self) -> torch.Tensor:
        return torch.tensor([time.perf_counter(), time.thread_time()], dtype=torch.float64)

    def _count(self) -> None:
        now, name = self._now(), self._inside[-1]
        self.seconds[name] = self.seconds.get(name, 0) + now - self._last
        self._last = now


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    if args.worker:
        return work(args)
    if args.table:
        return print(show(runner.load(args.table)["rows"]))
    settings = {name: getattr(args, name) for name in ("hidden", "layers", "samples", "sequence_length", "rounds", "preset", "note")}
    results = runner.Results("ranks", argv, args.json, {**settings, "threads": 1, "load": os.getloadavg()[0]})
    with tempfile.TemporaryDirectory() as place:
        model(args).save_pretrained(f"{place}/model")
        found, files = runner.turns({str(n): lambda n=n: run(args, place, n) for n in (1, *args.ranks)}, args.rounds), set()
    for rounds in found.values():
        files |= {one["sha256"] for one in rounds}
    if len(files) > 1:
        raise GptvqError(f"{args.ranks} processes wrote other bytes than one: {sorted(files)}")
    stages, alone = list(dict.fromkeys(stage for rounds in found.values() for one in rounds for stage in one["stages"])), {}
    for n, rounds in found.items():
        for stage in [*stages, "all"]:
            wall, cpu = (statistics.median(one["stages"].get(stage, (0, 0))[i] if stage != "all" else sum(
                both[i] for both in one["stages"].values()) for one in rounds) for i in (0, 1))
            row, one = {"ranks": int(n), "stage": stage, "seconds": wall, "cpu_seconds": cpu}, alone.setdefault(stage, (wall, cpu))
            results.add([row | ({"ratio": {"seconds": wall / one[0], "cpu_seconds": cpu / one[1]}} if all(one) else {})])
        results.add([{"ranks": int(n), "stage": "sent, bytes of one process", "bytes": rounds[0]["sent"]}])
    print(show(results.rows))


def parser():
    p = runner.parser("ranks", "One job on one process and on several.", EXAMPLE)
    p.add_argument("--ranks", type=runner.numbers, default=[2], metavar="N,..", help="numbers of processes beside 1, default 2")
    p.add_argument("--rounds", type=runner.positive, default=3, metavar="N", help="how often each, default %(default)s")
    p.add_argument("--hidden", type=runner.positive, default=512, metavar="N", help="width of the model, default %(default)s")
    p.add_argument("--layers", type=runner.positive, default=2, metavar="N", help="its decoder blocks, default %(default)s")
    p.add_argument("--samples", type=runner.positive, default=32, metavar="N", help="calibration sequences, default %(default)s")
    p.add_argument("--sequence-length", type=runner.positive, default=512, metavar="N", help="tokens per sequence, default %(default)s")
    p.add_argument("--preset", default="2d-2.25", metavar="NAME", help="default %(default)s")
    p.add_argument("--quick", action="store_true", help="a short recipe, for a look whether this works")
    p.add_argument("--note", default="", metavar="TEXT", help="about the machine during the run, kept in the result file")
    p.add_argument("--table", metavar="FILE", help="measure nothing, print this result file")
    p.add_argument("--worker", metavar="FOLDER", help="(what each process is started with)")
    return p


def model(args) -> torch.nn.Module:
    import transformers

    torch.manual_seed(0)
    shape = transformers.LlamaConfig(hidden_size=args.hidden, intermediate_size=args.hidden * 11 // 4, num_hidden_layers=args.layers,
                                     num_attention_heads=8, num_key_value_heads=4, vocab_size=1024, initializer_range=0.05,
                                     max_position_embeddings=args.sequence_length)
    return transformers.AutoModelForCausalLM.from_config(shape).eval()


def run(args, place: str, n: int) -> dict:
    """The slowest process's seconds per stage, what it sent, and the hash of the checkpoint."""
    out = tempfile.mkdtemp(dir=place)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["--worker", out, *(word for name in ("samples", "sequence_length", "preset")
                                for word in (f"--{name.replace('_', '-')}", str(getattr(args, name)))), *(["--quick"] if args.quick else [])]
    children = [subprocess.Popen([sys.executable, "-m", "bench.ranks", *words], cwd=runner.ROOT, stdout=subprocess.PIPE, text=True, env={
        **os.environ, "RANK": str(rank), "WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1"}) for rank in range(n)]
    answers = [child.communicate()[0] for child in children]
    if any(child.returncode for child in children):
        raise GptvqError(f"{n} processes: exit codes {[child.returncode for child in children]}")
    found = [json.loads(answer.splitlines()[-1]) for answer in answers]
    stages = {stage: [max(one["stages"].get(stage, (0, 0))[i] for one in found) for i in (0, 1)] for one in found for stage in one["stages"]}
    runner.log(f"{n} processes: " + ", ".join(f"{stage} {wall:.1f} ({cpu:.1f})" for stage, (wall, cpu) in stages.items()))
    return {"stages": stages, "sent": max(one["sent"] for one in found), "sha256": sha256(Path(out) / "out" / "model.safetensors")}


def work(args) -> None:
    """What one process does: the job, with clocks inside it."""
    clock, sent = Clock(), Counter()
    for module, function, name in ((ops, "gram", "sums"), (ops, "cross", "sums"), (hessian, "factorize", "whole"), (drift, "target_weight", "whole")):
        clock.wrap(module, function, name)
    together, timed, gather, deal = ranks._together, job.Run.timed, ranks.gather, ranks.deal

    @contextlib.contextmanager
    def exchange():
        with clock.inside("exchange"), together():
            yield

    @contextlib.contextmanager
    def stage(self, name):
        with clock.inside(STAGES.get(name, name)), timed(self, name):
            yield

    def counted(name, call):
        def wrapper(x, *rest):
            sent[name] += x.numel() * x.element_size() * (ranks.size() - 1) // (ranks.size() if name == "deal" else 1)
            return call(x, *rest)
        return wrapper

    ranks._together, job.Run.timed = exchange, stage
    ranks.gather, ranks.deal = counted("gather", gather), counted("deal", deal)
    config = VQConfig.preset(args.preset, recipe=Recipe(em_iterations=5, passes=1, sweeps=1) if args.quick else Recipe())
    ids = torch.randint(0, 1024, (args.samples, args.sequence_length), generator=torch.Generator().manual_seed(1))
    folder = Path(args.worker)
    with ranks.torchrun("cpu") as device:
        quantize(folder.parent / "model", folder / "out", config, calibration=ids, check=None, device=device)
    print(json.dumps({"stages": clock.stages(), "sent": sum(sent.values())}))


def show(rows: list[dict]) -> str:
    """A row per stage, the numbers of processes side by side."""
    found = {(row["stage"], row["ranks"]): row for row in rows if "seconds" in row}
    columns = {"stage": lambda stage: stage}
    for n in dict.fromkeys(n for _, n in found):
        columns |= {f"{n}: seconds": lambda stage, n=n: f"{found[stage, n]['seconds']:.2f}",
                    f"{n}: processor": lambda stage, n=n: f"{found[stage, n]['cpu_seconds']:.2f}"}
        if n > 1:
            columns[f"{n}: processor, x 1"] = lambda stage, n=n: f"{found[stage, n]['ratio']['cpu_seconds']:.2f}"
    return runner.table(list(dict.fromkeys(stage for stage, _ in found)), columns)


if __name__ == "__main__":
    sys.exit(runner.run(main))
