"""A whole model by every method: true size, layer errors, perplexity of two texts and time, in a file that is added to."""
from __future__ import annotations

import collections
import contextlib
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from gptvq.calibration import calibration_tokens, describe, read_tokens, tokens_sha256
from gptvq.cli import encode
from gptvq.config import Recipe, VQConfig
from gptvq.demo import texts
from gptvq.errors import BackendUnavailable
from gptvq.evaluate import decode, perplexity
from gptvq.hf import open_model
from gptvq.linear import VQLinear
from gptvq.model import dense_weight
from gptvq.plan import plan
from gptvq.quantize import quantize
from gptvq.tune import tune

from . import mended, runner
from .decode import PROMPT
from .gptq import gptq_model
from .layers import RECIPES
from .others import gguf_model, hqq_model
from .perplexity import NO_PRESET, LayerLog, found_linears, jobs, round_model, size
from .rotation import rotate, turn
from .speed import Decode, speed
from .whole_tables import show

METHODS = ("dense", "gguf", "rtn", "hqq-64", "gptq-64", "gptq-128", "paper", mended.METHOD, "gptvq", "gptvq+tune", "gptvq+loss", "gptvq+loss+tune",
           "gptvq+distill", "gptvq+distill+tune", "gptvq+mixed", "gptvq+head")
HEAD = "2d-4.125-s64"                                           # of gptvq+head
SEEDLESS = (*NO_PRESET, "rtn", "hqq-64")                        # no calibration text, nothing drawn at random
ROTATED = {"gptvq+heads": partial(rotate, residual=False), "gptvq+rotation": rotate, "gptvq+down_proj": turn}
TRIED = ("gptvq-own", *ROTATED)                                 # measured only where --methods names them
SWITCHED = {**RECIPES, "gptvq-own": Recipe(compensate=0), "gptvq+loss": Recipe(token_weights="loss"),
            "gptvq+distill": Recipe(distill=2), **dict.fromkeys(("gptvq+mixed", "gptvq+head", *ROTATED), Recipe())}
WIKITEXT = "Salesforce/wikitext:wikitext-2-raw-v1:"
TOPICS = "Python's own documentation"
_PROBE = 1024                   # tokens of a sample on which the outputs of layers are compared
_NEW_TOKENS, _ROUNDS = 32, 7    # of the decoding speed


@dataclass
class Texts:
    """Ids of the texts: to calibrate on [samples, n], to tune on [samples, n], to predict [n] each."""

    calibration: Tensor
    tuning: Tensor
    predicted: dict[str, Tensor]

    @classmethod
    def read(cls, args, tokenizer, seed: int) -> Texts:
        source = args.calibration or WIKITEXT + "train"
        return cls(calibration_tokens(source, tokenizer, args.samples, args.sequence_length, seed),
                   calibration_tokens(source, tokenizer, args.tune_samples, args.tune_length, seed + 1),
                   {"text": read_tokens(args.text or WIKITEXT + "test", tokenizer, "--text"),
                    "second": read_tokens(args.second or texts(None, None)[1], tokenizer, "--second")})

    def settings(self, args) -> dict:
        """What identifies them in a result file, read with the seed 0."""
        second = describe(args.second) if args.second else TOPICS
        return {"calibration_sha256": tokens_sha256(self.calibration), "tuning_sha256": tokens_sha256(self.tuning), "second": second,
                **{f"{name}_sha256": tokens_sha256(ids) for name, ids in self.predicted.items()}}

    def probes(self, args) -> dict[str, Tensor]:
        """[probes, up to 1024] ids of either side on which layers are compared."""
        length = min(_PROBE, args.window, self.calibration.shape[1])
        held_out = self.predicted["text"]
        return {"calibration": self.calibration[: args.probes, :length],
                "heldout": held_out[: len(held_out) // length * length].view(-1, length)[: args.probes]}


def run(args, argv: list[str] | None, source: str, methods: list[str], presets: list[str]) -> str:
    """Measures what the result file lacks -> its path; see --help of bench.quality.  Methods whose package is missing are left out."""
    path = args.json or str(runner.ROOT / "bench" / "results" / f"quality-{Path(args.model or 'smollm2').stem}.json")
    _, tokenizer = dense = open_model(source, device=args.device, dtype=args.dtype)
    names = ("dtype", "samples", "sequence_length", "window", "max_windows", "second_windows", "probes", "rate")
    settings = {"mode": "whole", "model": Path(source).name, **{name: getattr(args, name) for name in names},
                **Texts.read(args, tokenizer, 0).settings(args)}
    results = runner.Results("quality", argv, path, settings, resume=not args.fresh,
                             recipe=lambda row: SWITCHED.get(row["method"].removesuffix("+tune")))
    there = {(row["method"], row["preset"], row["seed"]) for row in results.rows}
    with contextlib.ExitStack() as stack:
        folder = Path(args.checkpoints or stack.enter_context(tempfile.TemporaryDirectory()))
        for seed in args.seeds:
            found = Texts.read(args, tokenizer, seed)
            for method, preset in jobs(methods, presets):
                key = method, preset, None if method in SEEDLESS else seed
                if key in there:
                    runner.log(f"{method} {preset or ''}, seed {seed}: in {Path(path).name} already")
                    continue
                try:
                    model, row, own = build(args, source, method, preset, seed, found, dense[0], folder)
                except BackendUnavailable as error:
                    runner.log(f"{method}: left out, {error}")
                    continue
                results.add([{"operation": "whole", "preset": preset, "method": method, "seed": key[2], **row,
                              **measured(model, dense[0], found, args, method), **(decoding(own, dense) if own and seed == args.seeds[0] else {}),
                              "device": str(next(model.parameters()).device), "threads": torch.get_num_threads()}])
                there.add(key)
                runner.log(show(results.rows[-1:]))
                del model, own
    return path


def build(args, source: str, method: str, preset: str | None, seed: int, found: Texts, dense: nn.Module,
          folder: Path) -> tuple[nn.Module, dict, Decode | None]:
    """(the model that a method makes; its format, sizes and seconds; how it decodes what is stored, None where it has no kernel of its own)."""
    if method == "dense":
        return dense, size(dense, found.predicted["text"]), None
    if method == "gguf":
        model, row, opened = gguf_model(source, args.device, args.dtype)
        return model, row, partial(opened.decode, threads=torch.get_num_threads())
    config = VQConfig.preset(preset, seed=seed)
    if method in ("rtn", "hqq-64", "gptq-64", "gptq-128"):
        model, _ = open_model(source, device=args.device, dtype=args.dtype)
        if method == "rtn":
            return model, round_model(model, found.calibration[0], config), None
        began, group = time.perf_counter(), int(method.rpartition("-")[2])
        if method == "hqq-64":
            row = hqq_model(model, found.calibration[0], config.index_bits, group)
            return model, row | {"quantize_seconds": time.perf_counter() - began}, partial(decode, model)
        bits = gptq_model(model, found.calibration, config.index_bits, group)
        return model, {"format": f"int{config.index_bits} group {group}", "bits_per_value": bits,
                       "linear_bytes": round(bits * _weights(model, found) / 8), "quantize_seconds": time.perf_counter() - began}, None
    base = method.removesuffix("+tune")
    config = VQConfig.preset(preset, recipe=SWITCHED[base], seed=seed, head=HEAD if base == "gptvq+head" else "")
    began, given, out, added = time.perf_counter(), source, folder / f"{base}-{preset}-{seed}", 0
    if base in ROTATED:
        given, out = ROTATED[base](open_model(source, device=args.device, dtype="float32")[0]).to(dense.dtype), None
        added = given.lm_head.weight.numel() * dense.lm_head.weight.element_size() if base == "gptvq+rotation" else 0
    if base == "gptvq+mixed":
        config = _mixed(source, config, found, dense, args)
    again = args.fresh and base == method
    began = time.perf_counter() - began
    with mended.solving(method):
        report = quantize(given, out, config, calibration=found.calibration, device=args.device, dtype=args.dtype, check=None,
                          overwrite=again, resume="fresh" if again else "auto", progress=LayerLog())
    model, seconds = report.model, report.seconds + began
    row = {"format": _formats(model), "bits_per_value": report.bits_per_value,
           "linear_bytes": report.packed_bytes, "added_bytes": added, "solver_error": report.mean_error, "stages": report.stages,
           "warnings": report.warnings, **({"head": HEAD} if config.head else {})}
    if base != method:
        began = time.perf_counter()
        losses = tune(model, dense, found.tuning, rate=args.rate, progress=lambda i, n, loss: runner.log(f"step {i} of {n}: {loss:.4f}"))
        tuning = time.perf_counter() - began
        row |= {"losses": losses, "tune_seconds": tuning}
        seconds += tuning
    return model, {**row, "quantize_seconds": seconds}, partial(decode, model)


def _mixed(source: str, config: VQConfig, found: Texts, dense: nn.Module, args) -> VQConfig:
    """What `gptvq plan --target-bpv` makes of the size of one preset."""
    specs = config.resolve({name: tuple(dense_weight(linear).shape) for name, linear in found_linears(dense, found.calibration[0]).items()})
    target = 8 * sum(spec.nbytes for spec in specs.values()) / sum(spec.rows * spec.cols for spec in specs.values())
    return plan(source, config, calibration=found.calibration, device=args.device, dtype=args.dtype, target_bits=target).config


def _formats(model: nn.Module) -> str:
    """Of the packed linears, the one that most weights have first."""
    weights = collections.Counter()
    for module in model.modules():
        if isinstance(module, VQLinear):
            weights[module.spec.form] += module.spec.rows * module.spec.cols
    return " + ".join(name for name, _ in weights.most_common())


def _weights(model: nn.Module, found: Texts) -> int:
    dense = size(model, found.predicted["text"])
    return round(8 * dense["linear_bytes"] / dense["bits_per_value"])


def measured(model: nn.Module, dense: nn.Module, found: Texts, args, method: str) -> dict:
    """Perplexities, and the mean relative error of the layers' outputs on both sides, unless they are rotated."""
    began, row = time.perf_counter(), {}
    for name, ids in found.predicted.items():
        windows = args.max_windows if name == "text" else args.second_windows
        row |= {f"{name}_windows": min(len(ids) // args.window, windows), f"{name}_perplexity": perplexity(model, ids, args.window, windows)}
    for side, ids in found.probes(args).items() if model is not dense and method not in ROTATED else ():
        errors = output_errors(dense, model, ids)
        row[f"error_{side}"] = sum(errors.values()) / len(errors)
    return {**row, "evaluate_seconds": time.perf_counter() - began}


def decoding(own: Decode, dense: tuple) -> dict:
    """Tokens per second, in turns with those of the dense model."""
    found = speed(own, partial(decode, dense[0]), encode(dense[1], PROMPT, chat=False)[0].tolist(), _NEW_TOKENS, _ROUNDS)
    return {name: found[name] for name in ("tokens_per_second", "dense_tokens_per_second", "speedup")}


@torch.no_grad()
def output_errors(dense: nn.Module, model: nn.Module, tokens: Tensor) -> dict[str, float]:
    """{linear: sum |y - y~|^2 / sum |y|^2} over the outputs y, y~ of one linear in two models, each on its own inputs.

    tokens [samples, n].  Unlike the error that a solver sees, this holds what the layers before have spoilt, and is one measure for
    methods that solve for different targets.
    """
    wanted: dict[str, Tensor] = {}
    sums = {name: torch.zeros(2, dtype=torch.float64) for name in found_linears(dense, tokens[0])}

    def compare(name: str, y: Tensor) -> None:
        want = wanted.pop(name).float()
        sums[name] += torch.stack([(y.float() - want).square().sum(), want.square().sum()]).double().cpu()

    for ids in tokens:
        for part, act in ((dense, wanted.__setitem__), (model, compare)):
            handles = [part.get_submodule(name).register_forward_hook(lambda m, args, y, name=name: act(name, y)) for name in sums]
            try:
                part(input_ids=ids[None].to(next(part.parameters()).device), use_cache=False)
            finally:
                for handle in handles:
                    handle.remove()
    return {name: float(error / power) for name, (error, power) in sums.items()}
