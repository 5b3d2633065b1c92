"""`gptvq plan` and `gptvq verify`, and the options that say in which formats a model is stored."""
from __future__ import annotations

import argparse
import json
import os
from decimal import Decimal, InvalidOperation

from .config import DEFAULT_PRESET, METHODS, PRESETS, TOKEN_WEIGHTS, Recipe, VQConfig
from .errors import ConfigError

MODEL_HELP = "model folder, hub id or .gguf file"
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def add(commands, command, placement) -> None:
    """Registers the commands of this file with the subparsers; `command` makes one, `placement` adds options to it."""
    p = command(commands, plan, "what quantizing a model would give and take, from one block tried out",
                """examples:
  gptvq plan ./SmolLM2-135M --preset 2d-3.125
  gptvq plan ./SmolLM2-135M --target-bpv 2.5 --calibration wiki.txt --out mixed.json
  gptvq quantize ./SmolLM2-135M out --config mixed.json --calibration wiki.txt""")
    p.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    formats(p)
    p.add_argument("--calibration", metavar="FILE|DATASET", help="text as for `gptvq quantize`; needed for a target, else random tokens do")
    p.add_argument("--samples", type=positive, default=128, metavar="N", help="calibration sequences of that run, default %(default)s")
    p.add_argument("--sequence-length", type=positive, default=2048, metavar="N", help="tokens per sequence, default %(default)s")
    target = p.add_mutually_exclusive_group()
    target.add_argument("--target-size", type=nbytes, metavar="SIZE", help="choose presets for this size of all tensors, like 90MB")
    target.add_argument("--target-bpv", type=float, metavar="BITS",
                        help="choose presets for so many bits per quantized weight, like 2.5 (--head included)")
    p.add_argument("--presets", type=names, metavar="A,B,..", help="to choose from, default five with block scales, 2D and 4D")
    p.add_argument("--disk", metavar="FOLDER", help="a folder on the disk that the run will write to, to time its journal there; default "
                   "the one for temporary files")
    p.add_argument("--out", metavar="FILE", help="write the configuration here, for `gptvq quantize --config`")
    p.add_argument("--json", metavar="FILE", help="write the plan here instead of printing it; - for standard output")
    placement(p)
    p.set_defaults(wrong_usage=p.error)

    p = command(commands, verify, "prove a packed checkpoint whole, without loading the model",
                "examples:\n  gptvq verify out\n  gptvq verify out --no-hashes --json -")
    p.add_argument("folder", metavar="FOLDER", help="folder written by `gptvq quantize`")
    p.add_argument("--no-hashes", action="store_true", help="check structure and ranges only, without reading all bytes")
    p.add_argument("--json", metavar="FILE", help="write the result here instead of printing it; - for standard output")


def formats(p: argparse.ArgumentParser) -> None:
    """The options that `config_from` reads."""
    p.add_argument("--preset", help=f"storage format, default {DEFAULT_PRESET}; one of: {', '.join(PRESETS)}")
    p.add_argument("--rule", action="append", default=[], type=_rule, metavar="PATTERN=PRESET|keep",
                   help="another preset for layers whose name matches, or keep them as they are; repeatable, the first match counts")
    p.add_argument("--head", metavar="PRESET", help="storage format of the output head (lm_head) and the embedding, like 2d-4.125-s64 (default: as they "
                   "are)")
    p.add_argument("--method", choices=METHODS, help="gptvq: our recipe (default); paper: the published procedure")
    p.add_argument("--token-weights", choices=TOKEN_WEIGHTS[1:], help="loss: tokens count by the gradient of the model's loss; takes the whole "
                   "model in memory (default: all count the same)")
    p.add_argument("--distill", type=positive, metavar="N", help="the codebooks of each block learn N times through the calibration text to give "
                   "the dense block's output (default: they do not)")
    p.add_argument("--seed", type=int, help="picks the calibration sequences, default 0")
    p.add_argument("--config", metavar="FILE", help="all of this from a file that `gptvq plan --out` wrote")


def config_from(args: argparse.Namespace) -> VQConfig:
    """The VQConfig that the options of `gptvq quantize` and `gptvq plan` describe."""
    if args.config is None:
        recipe = (Recipe.paper if args.method == "paper" else Recipe)(token_weights=args.token_weights or "", distill=args.distill or 0)
        return VQConfig.preset(args.preset or DEFAULT_PRESET, rules=tuple(args.rule), recipe=recipe, seed=args.seed or 0, head=args.head or "")
    options = ("preset", "rule", "head", "method", "token_weights", "distill", "seed")
    given = [f"--{name.replace('_', '-')}" for name in options if getattr(args, name) not in (None, [])]
    if given:
        raise ConfigError(f"--config holds what {', '.join(given)} would say; give one or the other")
    try:
        with open(args.config, encoding="utf-8") as file:
            return VQConfig.from_dict(json.load(file))
    except OSError as error:
        raise ConfigError(f"--config {args.config}: cannot be read ({error.strerror})") from error
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"--config {args.config}: not a configuration ({error}); make one with `gptvq plan --out`") from error


def plan(args):
    from .cli import named_text, quiet, write_json
    targeted = args.target_size is not None or args.target_bpv is not None
    if targeted and args.preset is not None:
        args.wrong_usage("--preset: a target chooses the presets of all layers; give those to choose from by --presets")
    if args.presets and not targeted:
        args.wrong_usage("--presets: there is nothing to choose without --target-size or --target-bpv; give one format by --preset")
    config = config_from(args)
    calibration = None if args.calibration is None else named_text(args.calibration, "--calibration")
    require_writable(args.out, "--out")
    require_writable(args.json, "--json")
    quiet()
    from . import mixed
    from .plan import plan as run
    from .report import RichProgress
    with RichProgress() as progress:
        found = run(args.model, config, calibration=calibration, samples=args.samples, sequence_length=args.sequence_length,
                    device=args.device, dtype=args.dtype, target_bytes=args.target_size, target_bits=args.target_bpv,
                    presets=args.presets or mixed.CANDIDATES, progress=None if args.json == "-" else progress, disk=args.disk)
    if not args.json:
        _show(found)
    write_json(args.out, found.config.to_dict(), "--out")
    write_json(args.json, found.to_dict())


def require_writable(path: str | None, option: str = "--json") -> None:
    """Raises ConfigError for a file that cannot be written, and leaves it as it is."""
    if path is None or path == "-" or os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):    # a pipe would end
        return
    new = not os.path.exists(path)
    try:
        open(path, "ab").close()
    except OSError as error:
        raise ConfigError(f"{option} {path}: cannot be written ({error.strerror}); give another path") from error
    if new:
        os.unlink(path)


def _show(found) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from .report import clock, size
    table = Table(title=f"{found.model}: what quantizing it would give", box=SIMPLE_HEAD)
    for name in ("linear", "shape", "format", "group", "bytes", "bits/value", *(["error %, short recipe"] if found.errors else []),
                 *(["adds to loss"] if found.shares else [])):
        table.add_column(name, justify="left" if name == "linear" else "right", no_wrap=True)
    for name, spec in found.specs.items():
        errors = [error for preset, error in found.errors.get(name, {}).items() if VQConfig.preset(preset).spec(spec.rows, spec.cols) == spec]
        measured = [f"{100 * error:.3f}" for error in errors] + [f"{found.shares[name] * error:.5f}" for error in errors if found.shares]
        table.add_row(name, f"{spec.rows} x {spec.cols}", spec.label, f"{spec.group_rows} x {spec.group_cols}", f"{spec.nbytes:,}",
                      f"{spec.bits_per_value:.3f}", *measured)
    console = Console(markup=False)
    console.width = max(console.width, 140)
    console.print(table)
    seconds = ", ".join(f"{stage} {clock(s)}" for stage, s in found.seconds.items())
    memory = f"{size(found.peak_ram)} of memory" + (f" and {size(found.peak_gpu)} on the GPU" if found.peak_gpu else "")
    print(f"{len(found.specs)} linears, {sum(s.rows * s.cols for s in found.specs.values()):,} weights at {found.bits_per_value:.4f} bits "
          f"per value: {size(found.dense_bytes)} -> {size(found.packed_bytes)}; with all other tensors {size(found.disk)} on disk, "
          f"and {size(found.journal_bytes)} more for the journal while it runs.")
    print(f"Predicted from {found.probe['block']} on {found.probe['samples']} of {found.probe['of_samples']} samples: "
          f"{clock(sum(found.seconds.values()))} ({seconds}), at most {memory}.")
    for warning in found.warnings:
        print(f"warning: {warning}")


def verify(args):
    import dataclasses

    from .cli import write_json
    from .report import size
    from .verify import verify as run
    require_writable(args.json)
    found = run(args.folder, hashes=not args.no_hashes)
    if args.json:
        write_json(args.json, dataclasses.asdict(found))
        return
    hashed = f"hashes of {' and '.join(found.hashed)} are right" if found.hashed else "no hashes were compared"
    print(f"{args.folder}: {found.layers} packed layers, {found.tensors} tensors, {size(found.nbytes)} in {found.files} "
          f"file{'s' * (found.files > 1)}: whole; {hashed}")


def positive(text: str) -> int:
    """A whole number of at least 1; an argparse type."""
    value = int(text) if text.isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, need a whole number of at least 1")
    return value


def names(text: str) -> list[str]:
    """"a, b" -> ["a", "b"]; an argparse type."""
    found = [part.strip() for part in text.split(",") if part.strip()]
    if not found:
        raise argparse.ArgumentTypeError(f"got {text!r}, need names with commas between them")
    return found


def nbytes(text: str) -> int:
    """"90MB", "1.5 GiB" or "100000" -> bytes; an argparse type."""
    number = text.strip().rstrip("KMGTiBkmgtb ")
    unit = text.strip()[len(number):].strip().upper()
    try:
        value = Decimal(number) * _UNITS[unit]
        return int(value) if value.is_finite() and value > 0 else _bad_size(text)
    except (InvalidOperation, KeyError):
        return _bad_size(text)


def _bad_size(text: str):
    raise argparse.ArgumentTypeError(f"got {text!r}, need a size like 90MB, 1.5GB or 100000")


def _rule(text: str) -> tuple[str, str | None]:
    pattern, _, change = text.rpartition("=")
    if not pattern or not change:
        raise argparse.ArgumentTypeError(f"got {text!r}, need PATTERN=PRESET or PATTERN=keep, for instance '*.down_proj=2d-3.125'")
    return pattern, None if change == "keep" else change
