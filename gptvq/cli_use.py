"""Commands about using a checkpoint: chat, bench, export, completion, the tasks and comparisons of `gptvq eval`, and the HTML report."""
from __future__ import annotations

import argparse
import contextlib
import logging
import sys
import time

from .cli_plan import names, require_writable
from .completion import SHELLS
from .config import ACTIVATIONS, PRESETS
from .errors import ConfigError

CHAT_HELP = "/reset forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer"


def add(commands, command, placement, positive, model_help: str) -> None:
    """Registers the commands of this file with the subparsers; the other arguments are the pieces of cli.py they share."""
    p = command(commands, chat, "talk with a model, the answers streaming",
                "examples:\n  gptvq chat out\n  gptvq chat out --temperature 0.7 --system 'Answer in one sentence.'")
    p.add_argument("model", metavar="MODEL", help=model_help)
    p.add_argument("--system", default="", metavar="TEXT", help="system prompt, default the template's own")
    p.add_argument("--max-new-tokens", type=positive, default=512, metavar="N", help="of each answer, default %(default)s")
    p.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 (default) always takes the likeliest token")
    p.add_argument("--seed", type=int, default=0, help="of the sampling, default %(default)s")
    placement(p, packed=True)

    p = command(commands, bench, "speed of this machine's kernels against torch and a plain read",
                "examples:\n  gptvq bench\n  gptvq bench --shapes 11008x4096,4096x11008 --presets 2d-2.25,2d-3.125 --threads 1")
    p.add_argument("--shapes", default="4096x4096", metavar="RxC,RxC", help="rows x columns of the weights, default %(default)s")
    p.add_argument("--presets", type=names, default="2d-2.25,2d-2.25-s64,2d-3.125,4d-2.25", metavar="A,B",
                   help=f"default %(default)s; of {', '.join(PRESETS)}")
    p.add_argument("--activations", type=names, default="a16,a8", metavar="A,B",
                   help=f"of {', '.join(ACTIVATIONS)}, default %(default)s; CPU only")
    p.add_argument("--threads", type=positive, metavar="N", help="default torch's")
    p.add_argument("--device", default="cpu", metavar="NAME", help="default %(default)s")
    p.add_argument("--json", metavar="FILE", help="write the rows here instead of printing them; - for standard output")

    p = command(commands, tune, "let the codebooks of a packed checkpoint learn from the dense model",
                "example:\n  gptvq tune out out-tuned --dense ./SmolLM2-135M --calibration wiki.txt", "OUT was not written")
    p.add_argument("folder", metavar="FOLDER", help="folder written by `gptvq quantize`")
    p.add_argument("out", metavar="OUT", help="folder for the tuned checkpoint; must be new or empty, or --overwrite")
    p.add_argument("--dense", required=True, metavar="MODEL", help="the dense model that FOLDER was made from")
    p.add_argument("--calibration", required=True, metavar="FILE|DATASET", help="text to learn on")
    p.add_argument("--samples", type=positive, default=256, metavar="N", help="sequences, seen once each, default %(default)s")
    p.add_argument("--sequence-length", type=positive, default=512, metavar="N", help="tokens per sequence, default %(default)s")
    p.add_argument("--batch", type=positive, default=4, metavar="N", help="sequences per step, default %(default)s")
    p.add_argument("--rate", type=float, default=1e-3, metavar="R", help="learning rate, default %(default)s")
    p.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1 ...; default: a GPU if there is one")
    p.add_argument("--overwrite", action="store_true", help="replace what OUT holds")

    p = command(commands, export, "write a packed checkpoint as dense safetensors, for other tools",
                "example:\n  gptvq export out --dense out-dense --dtype float16", "OUT is incomplete: it has no config.json")
    p.add_argument("folder", metavar="FOLDER", help="folder written by `gptvq quantize`")
    p.add_argument("--dense", required=True, metavar="OUT", help="folder for the dense model; must be new or empty, or --overwrite")
    p.add_argument("--dtype", default="auto", choices=("auto", "bfloat16", "float16", "float32"), help="default the checkpoint's own")
    p.add_argument("--overwrite", action="store_true", help="replace what OUT holds")

    p = command(commands, completion, "print the completion script of a shell",
                "examples:\n  gptvq completion bash > ~/.local/share/bash-completion/completions/gptvq\n"
                "  gptvq completion fish > ~/.config/fish/completions/gptvq.fish")
    p.add_argument("shell", choices=SHELLS, help="which shell")


def eval_options(p: argparse.ArgumentParser, positive) -> None:
    """What `gptvq eval` measures beside the perplexity."""
    p.add_argument("--against", metavar="MODEL", help="dense model to compare with on --text: KL divergence, same likeliest token")
    p.add_argument("--tasks", type=names, metavar="A,B", help="lm-eval tasks, for instance arc_easy,piqa (needs the package lm-eval)")
    p.add_argument("--task-folder", metavar="DIR", help="lm-eval YAML files of your own, for instance of local data")
    p.add_argument("--limit", type=positive, metavar="N", help="items of each task, default all")
    p.add_argument("--shots", type=int, metavar="N", help="examples in the prompt, default the task's own")
    p.set_defaults(wrong_usage=p.error)


# ---- commands
def chat(args):
    from .cli import quiet
    quiet()
    from .chat import Chat
    from .hf import open_model
    with contextlib.suppress(ImportError):              # line editing where Python has it
        import readline  # noqa: F401
    model, tokenizer = open_model(args.model, args.device, args.dtype, args.activations)
    talk = Chat(model, tokenizer, system=args.system, temperature=args.temperature, max_new_tokens=args.max_new_tokens, seed=args.seed)
    person = sys.stdin.isatty()
    if person:
        print(CHAT_HELP)
    while True:
        try:
            text = input("\n> " if person else "").strip()
        except EOFError:
            print()
            return
        except UnicodeDecodeError as error:
            raise ConfigError(f"standard input: got bytes that are no {error.encoding} text ({error.reason}), need text in UTF-8; convert "
                              "it") from error
        except KeyboardInterrupt:
            if not person:
                raise
            print(f"\n{CHAT_HELP}")
            continue
        if text in ("/exit", "/quit"):
            return
        if text == "/reset":
            talk.reset()
            print("(forgotten)")
        elif text.startswith("/"):
            print(CHAT_HELP)
        elif text:
            try:
                talk.say(text, lambda piece: print(piece, end="", flush=True))
            except KeyboardInterrupt:
                print(" (stopped)", end="")
            except ConfigError as error:
                print(f"gptvq: {error}", file=sys.stderr)
            print()


def bench(args):
    from .cli import write_json
    shapes = []
    for shape in args.shapes.split(","):
        rows, _, cols = shape.strip().partition("x")
        if not (rows.isdigit() and cols.isdigit() and int(rows) and int(cols)):
            raise ConfigError(f"--shapes: got {shape!r}, need ROWSxCOLUMNS with commas between them, for instance 4096x4096")
        shapes.append((int(rows), int(cols)))
    import torch

    from .hf import pick_device
    from .kernel_speed import measure
    from .report import environment
    device = pick_device(args.device)
    require_writable(args.json)
    if args.threads:
        torch.set_num_threads(args.threads)
    rows = measure(shapes, args.presets, args.activations, device,
                   progress=lambda text: print(f"measuring {text} ...", file=sys.stderr))
    found = environment()
    if args.json:
        write_json(args.json, {"rows": rows, "device": str(device), "environment": found})
        return
    print(f"one token, cold weights, {found['gpu'] if device.type == 'cuda' else found['processor']}, {torch.get_num_threads()} threads")
    print(f"{'contender':<26}{'shape':>14}{'bits':>10}{'us':>11}{'GB/s':>8}{'x bf16':>8}{'of read':>9}")
    for row in rows:
        shape = "x".join(map(str, row["shape"]))
        rest = "" if row["name"] == "read" else f"{row['speedup']:>8.2f}{100 * row['of_read']:>7.0f} %"
        text = f"{row['bits']:>10.3f}{row['microseconds']:>11,.1f}" if "bits" in row else f"{'':>21}"
        print(f"{row['name']:<26}{shape:>14}{text}{row['gb_per_second']:>8.1f}{rest}")


def tune(args):
    from .cli import named_text, quiet
    calibration = named_text(args.calibration, "--calibration")
    quiet()
    from .tune import tune_folder
    losses = tune_folder(args.folder, args.out, args.dense, calibration=calibration, samples=args.samples,
                         sequence_length=args.sequence_length, batch=args.batch, rate=args.rate, device=args.device,
                         overwrite=args.overwrite, progress=Steps())
    if losses.after >= losses.before:
        print("warning: the model came no nearer to the dense one on the text of the first step; try another --rate, or more text",
              file=sys.stderr)
    print(f"KL to the dense model {losses.before:.4f} -> {losses.after:.4f} nats per token on the text of the first step, in "
          f"{len(losses)} steps; written to {args.out}")


class Steps:
    """progress(step, steps, loss) as a line on standard error with the time that is left."""

    def __init__(self):
        self.began = time.perf_counter()

    def __call__(self, step: int, steps: int, loss: float) -> None:
        from .report import clock
        left = (time.perf_counter() - self.began) / step * (steps - step)
        print(f"\rstep {step} of {steps}, KL {loss:.4f}, {clock(left)} left   ", end="\n" * (step == steps), file=sys.stderr, flush=True)


def export(args):
    from .cli import quiet
    quiet()
    from .export import export_dense
    from .report import size
    out = export_dense(args.folder, args.dense, args.dtype, args.overwrite)
    print(f"written to {out}: {size(sum(file.stat().st_size for file in out.glob('*.safetensors')))}, loads without gptvq")


def completion(args):
    from .cli import parser
    from .completion import script
    print(script(parser(), args.shell), end="")


# ---- parts of commands in cli.py
def write_page(folder: str, file: str | None, to=None) -> None:
    """Writes the HTML report and says where, on standard output or `to`."""
    from .page import write_page as write
    print(f"report: {write(folder, file or None)}", file=to)


def on_text(args, text: str, model, tokenizer, progress) -> dict:
    """The perplexity of `gptvq eval` on a text, and with --against the divergence from that model."""
    from .calibration import read_tokens
    from .evaluate import agreement, default_window, perplexity, windows_of
    from .hf import open_model
    from .report import clock
    tokens = read_tokens(text, tokenizer, "--text")
    window = args.window or default_window(model)
    windows = len(windows_of(tokens, window, args.max_windows))
    began, found = time.perf_counter(), {}
    if args.against:
        dense, _ = open_model(args.against, args.device, args.dtype)
        found = agreement(model, dense, tokens, window, args.max_windows, progress)
    else:
        found["perplexity"] = perplexity(model, tokens, window, args.max_windows, progress=progress)
    seconds = time.perf_counter() - began
    if args.json != "-":
        print(f"perplexity {found['perplexity']:.3f}  ({windows} windows of {window} tokens, {str(model.dtype)[6:]}, {clock(seconds)})")
    if args.against and args.json != "-":
        print(f"against {args.against}: KL {found['kl']:.4f} nats per token, same likeliest token {100 * found['top1']:.2f} %, "
              f"its perplexity {found['dense_perplexity']:.3f}")
    return {"text": args.text, "against": args.against, **found, "window": window, "windows": windows, "seconds": seconds}


def on_tasks(args, model, tokenizer) -> dict:
    """The task accuracies of `gptvq eval`."""
    from .tasks import run_tasks
    logging.getLogger("lm_eval").setLevel(logging.ERROR)        # it warns of models that are not named by a string
    found = run_tasks(model, tokenizer, args.tasks, args.task_folder, args.limit, args.shots)
    if args.json != "-":
        for task, values in found.items():
            print(f"{task}: " + ", ".join(f"{metric} {value:.4f}" for metric, value in values.items()))
    return {"tasks": found, "limit": args.limit}
