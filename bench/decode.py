"""python -m bench.decode: a whole model token by token, packed against dense and llama.cpp; and its linears alone."""
from __future__ import annotations

import copy
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from gptvq.checkpoint import is_packed
from gptvq.cli import encode
from gptvq.config import PRESETS, VQConfig
from gptvq.demo import bundled_model
from gptvq.dense import quicken
from gptvq.errors import BackendUnavailable, ConfigError
from gptvq.evaluate import decode
from gptvq.head import find_head, install
from gptvq.hf import open_model
from gptvq.large_pages import settle, why_not
from gptvq.linear import VQLinear
from gptvq.model import dense_weight
from gptvq.stream import BlockStream
from gptvq.weight import VQWeight

from . import decode_gpu, llamacpp, runner
from .contenders import ACTIVATIONS, BASELINES, RING_BYTES, label, random_weight, with_ggml
from .decode_linears import blocks_linears, calls, compare_linears, ratios

PARTS = ("tokens", "linears")
PROMPT = "The tower stands on the hill above the river, and"
EXAMPLE = """examples:
  python -m bench.decode --json bench/results/decode-cpu.json
  python -m bench.decode --packed my-model-2.25 --tokens 128
  python -m bench.decode --parts tokens --modes eager,compile --activations a16
  python -m bench.decode --table bench/results/decode-cpu.json
  python -m bench.decode --device cuda --shape llama2-7b --modes eager,graph --json decode-gpu.json

tokens per second: greedy, batch 1, with a cache, the prompt not timed.  Without --packed the packed weights are random, with the
standard deviation of those they replace: what such a model says is noise, but it says it as fast.  The dense weights of the head and
the embedding are bfloat16 here and Q8_0 in llama.cpp. All models but llama.cpp's lie in large pages, as packed ones do once they are
loaded. linears: every linear of the decoder blocks once, in ms; weights are random, in large pages too, and in as many copies as make at
least 192 MB, so that no cache holds them: all of one shape after another, each on its own, and, packed ones, "as in the model": block by
block, those that share an input one after another on it. --modes compile: through torch.compile, with a key and value cache of fixed
size, which has room for the prompt and the tokens; compiling is not timed.  --shape: a model of those sizes with random weights on any device, its steps
called one by one, as one CUDA graph, or through torch.compile; the key and value cache has a fixed size."""


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    how = decode_gpu.measure if args.shape else measure
    print(show([row for path in args.table for row in runner.load(path)["rows"]] if args.table else how(args, argv)))


def parser():
    p = runner.parser("decode", "Decoding speed of a whole model.", EXAMPLE)
    p.add_argument("--model", metavar="PATH", help="the dense model, a folder or a .gguf file; default the demo's SmolLM2-135M")
    p.add_argument("--shape", choices=tuple(decode_gpu.MODELS), help="no model: random weights of these sizes")
    p.add_argument("--device", default="cpu", metavar="NAME", help="with --shape: cpu, cuda or cuda:N, default %(default)s")
    p.add_argument("--modes", type=runner.names, default=["eager"], metavar="A,B",
                   help=f"how models are called: of {','.join(decode_gpu.MODES)}, graph with --shape alone; default eager")
    p.add_argument("--no-dense", dest="dense", action="store_false", help="with --shape: without the dense model beside the packed ones")
    p.add_argument("--packed", metavar="FOLDER", help="a packed checkpoint of it, in the place of random packed weights")
    p.add_argument("--presets", type=runner.names, default=["2d-2.25-s64", "2d-3.125-s64"], metavar="A,B",
                   help="default 2d-2.25-s64,2d-3.125-s64; not used for the whole model with --packed")
    p.add_argument("--head", metavar="PRESET", help="measure the packed models with their output head in this format too; default not")
    p.add_argument("--activations", type=runner.names, default=list(ACTIVATIONS[:2]), metavar="A,B",
                   help=f"of {','.join(ACTIVATIONS)}; default a16,a8")
    p.add_argument("--parts", type=runner.names, default=list(PARTS), metavar="A,B", help="of tokens,linears; default both")
    p.add_argument("--alone", action="store_true", help="of the linears: also our kernels by themselves, not through VQLinear")
    p.add_argument("--tokens", type=runner.positive, default=64, metavar="N", help="new tokens, default %(default)s")
    p.add_argument("--threads", type=runner.numbers, default=[1, 2], metavar="N,M", help="default 1,2")
    p.add_argument("--repeats", type=runner.positive, default=11, metavar="N", help="rounds, default %(default)s")
    p.add_argument("--table", nargs="+", metavar="FILE", help="measure nothing, print these result files")
    return p


def measure(args, argv: list[str] | None) -> list[dict]:
    runner.check_names("--presets", args.presets, PRESETS)
    runner.check_names("--head", [args.head] if args.head else [], PRESETS)
    runner.check_names("--activations", args.activations, ACTIVATIONS)
    runner.check_names("--parts", args.parts, PARTS)
    runner.check_names("--modes", args.modes, [mode for mode in decode_gpu.MODES if mode != "graph"])
    if args.tokens < 2:
        raise ConfigError("--tokens: got 1, need at least 2: the first one is the prompt's")
    if args.packed and not is_packed(Path(args.packed)):
        raise ConfigError(f"--packed {args.packed}: not a gptvq checkpoint; quantize the model into a folder first")
    source, before = args.model or bundled_model(), torch.get_num_threads()
    baselines, libraries = with_ggml(list(BASELINES))
    dense, tokenizer = open_model(source, device="cpu", dtype="bfloat16")
    results = runner.Results("decode", argv, args.json, {"model": Path(source).name, "tokens": args.tokens, "repeats": args.repeats,
                                                         "ring_bytes": RING_BYTES, "pages": why_not() or "large", "ggml": libraries})
    prompt = encode(tokenizer, PROMPT, chat=False)[0]
    found = blocks_linears(dense, prompt)
    try:
        for threads in args.threads if "linears" in args.parts else []:
            torch.set_num_threads(threads)
            results.add(compare_linears(calls(dense, prompt, found), args, baselines, threads))
            runner.log(f"linears, {threads} threads: {len(results.rows)} rows")
        if "tokens" in args.parts:
            with tempfile.TemporaryDirectory() as folder:
                models = open_models(args, Path(source), dense, prompt, Path(folder))
            for threads in args.threads:
                torch.set_num_threads(threads)
                results.add(compare_models(models, args, threads))
                runner.log(f"tokens, {threads} threads: {len(results.rows)} rows")
    finally:
        torch.set_num_threads(before)
    return results.rows


# ---- the whole model
def open_models(args, source: Path, dense: nn.Module, prompt: Tensor, folder: Path) -> dict[str, tuple[dict, Callable[[int], float]]]:
    """{name: (what a row says of it, threads -> tokens per second)}; llama.cpp's files are written into `folder`."""
    found = {}

    def add(name: str, row: dict, model: nn.Module) -> None:
        if "eager" in args.modes:
            found[name] = row, lambda threads: decode(model, prompt, args.tokens)[1]
        if "compile" in args.modes:
            found[f"{name}, compile"] = {**row, "operation": "decode, compile"}, compiled(model, prompt, args.tokens)

    packed = [(None, open_model(args.packed, device="cpu", dtype="bfloat16")[0])] if args.packed else [
        (preset, with_random_weights(dense, prompt, VQConfig.preset(preset, head=head)))
        for preset in args.presets for head in ("", args.head) if head is not None]
    for preset, model in packed:
        head = getattr(model.get_output_embeddings(), "spec", None)
        for kind in args.activations:
            model = copied(model, kind)
            layers = [module for module in model.modules() if isinstance(module, VQLinear)]
            kinds = layers[0].spec.form + (f", head {head.form}" if head else "")
            row = {"method": "gptvq", "preset": preset, "format": kinds, "activations": kind,
                   "bits_per_value": 8 * sum(layer.packed.nbytes for layer in layers) / sum(
                       layer.in_features * layer.out_features for layer in layers)}
            add(f"gptvq {preset or 'packed'} {'with head ' * bool(head)}{kind}", row, model)
    for name, dtype in (("torch bf16", torch.bfloat16), ("torch fp32", torch.float32)):
        row = {"method": "torch", "preset": None, "format": name.split()[1], "bits_per_value": 8.0 * dtype.itemsize}
        add(name, row, settle(dense if dtype == torch.bfloat16 else copy.deepcopy(dense).float()))
    if source.suffix == ".gguf":
        try:
            found.update(llama_models(source, prompt.tolist(), args.tokens, folder))
        except BackendUnavailable as error:
            runner.log(f"no rows of llama.cpp: {error}")
    else:
        runner.log("no rows of llama.cpp: it opens .gguf files alone")
    return found


def compiled(model: nn.Module, prompt: Tensor, new_tokens: int) -> Callable[[int], float]:
    """threads -> tokens per second of the steps after the first, as `evaluate.decode` counts them."""
    with torch.no_grad():
        steps = decode_gpu.Steps(model, "compile", torch.device("cpu"), len(prompt) + new_tokens)

    @torch.no_grad()
    def speed(threads: int) -> float:
        steps.restart(prompt)
        return 1 / decode_gpu.on.seconds(steps.run, new_tokens - 1, torch.device("cpu"))

    return speed


def llama_models(source: Path, prompt: list[int], new_tokens: int, folder: Path) -> dict:
    llamacpp.load()
    requantized = folder / "q4_0.gguf"
    llamacpp.requantize(source, requantized, "Q4_0")
    opened = {"llama.cpp Q4_0": llamacpp.LlamaModel(requantized), "llama.cpp as it is": llamacpp.LlamaModel(source)}
    return {name: ({"method": "llama.cpp", "preset": None, "format": name.removeprefix("llama.cpp ").replace("as it is", source.stem),
                    "activations": "a8", "bits_per_value": None},
                   lambda threads, model=model: model.decode(prompt, new_tokens, threads)[1]) for name, model in opened.items()}


@torch.no_grad()
def with_random_weights(dense: nn.Module, prompt: Tensor, config: VQConfig) -> nn.Module:
    """A copy of `dense` with random packed weights, as large on the average as those they replace."""
    def packed(name: str, linear: nn.Module, config: VQConfig) -> VQLinear:
        weight = dense_weight(linear)
        vq = random_weight(config, *weight.shape)
        gain = float(weight.float().std() / vq.dequantize().std())
        return VQLinear.from_weight(VQWeight(vq.spec, {**vq.buffers, "gs": vq.buffers["gs"] * gain}), linear.bias, name)

    model = copy.deepcopy(dense)
    for name, linear in blocks_linears(model, prompt).items():
        model.set_submodule(name, packed(name, linear, config))
    if config.head:
        head = find_head(BlockStream(model, None, ""))
        install(head, packed(head.name, head.module, VQConfig.preset(config.head)).packed)
    return settle(quicken(model))           # as a loaded one


def copied(model: nn.Module, activations: str) -> nn.Module:
    """The same model with shared tensors and its own VQLinears, for another kind of activations."""
    twin = copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
    for module in twin.modules():
        if isinstance(module, VQLinear):
            module.activations = activations
    return twin


def compare_models(models: dict, args, threads: int) -> list[dict]:
    for _, speed in models.values():
        speed(threads)                                  # the first run also allocates
    speeds = runner.turns({name: lambda speed=speed: speed(threads) for name, (_, speed) in models.items()}, args.repeats, 0.05)
    seconds = {name: [1 / value for value in found] for name, found in speeds.items()}
    baselines = [name for name in models if not name.startswith("gptvq")]
    return [{"operation": "decode", **row, "device": "cpu", "threads": threads, "tokens": args.tokens,
             "tokens_per_second": statistics.median(speeds[name]), "median_seconds": statistics.median(seconds[name]),
             "speedup": ratios(seconds, name, baselines)} for name, (row, _) in models.items()]


def show(rows: list[dict]) -> str:
    columns = {
        "operation": lambda r: r["operation"], "format": lambda r: label(r) + "".join(r["format"].partition(", head")[1:]), "bits per weight": lambda r: f"{r['bits_per_value']:.3f}",
        "threads": lambda r: r["threads"], "ms per token": lambda r: f"{r['median_seconds'] * 1e3:.2f}",
        "tokens/s": lambda r: f"{r['tokens_per_second']:.1f}", "GB/s": lambda r: f"{r['gb_per_second']:.1f}"}
    columns.update(runner.speedups(rows))
    columns["of read"] = lambda r: f"{100 * r['of_read']:.0f} %"
    return runner.table(rows, columns)


if __name__ == "__main__":
    sys.exit(runner.run(main))
