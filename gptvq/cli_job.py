"""What `gptvq quantize` has to say about long jobs: options, what is left after an interrupt, and the verdict on the result."""
from __future__ import annotations

import argparse
import contextlib
import math
from pathlib import Path

from .errors import ConfigError


def options(p: argparse.ArgumentParser) -> None:
    """Adds the options; importing nothing heavy."""
    p.add_argument("--fresh", action="store_true",
                   help="start over, whatever an earlier run left in OUT, also where the command is given again; default: the same "
                        "command goes on behind its last finished block")
    p.add_argument("--no-journal", action="store_true", help="keep no journal: an interrupted run is lost")
    p.add_argument("--redo", action="append", default=[], metavar="PATTERN",
                   help="compute these layers of the finished checkpoint in OUT again, and all blocks behind the first of them, for "
                        "instance 'layers.3.*'; 'weak': those whose error is over twice the median of their kind; repeatable")
    p.add_argument("--check", default="auto", metavar="FILE|DATASET|none",
                   help="text on which the saved model is compared with the dense one; default: unused calibration text")
    p.add_argument("--max-kl", type=_limit, metavar="NATS", help="exit code 2 where the two diverge by more than this per token")
    p.add_argument("--strict", action="store_true", help="an error instead of every warning and repair that the report would show")


def arguments(args: argparse.Namespace) -> dict:
    """The arguments of gptvq.quantize that the options stand for."""
    from .cli import named_text

    if args.fresh and args.no_journal:
        raise ConfigError("--fresh and --no-journal: give one of them; with --overwrite, --no-journal starts over as well")
    if args.max_kl is not None and args.check == "none":
        raise ConfigError("--max-kl needs something to measure: leave --check none away")
    check = {"auto": "auto", "none": None}.get(args.check, args.check)
    return {"resume": "never" if args.no_journal else "fresh" if args.fresh else "auto", "redo": args.redo, "strict": args.strict,
            "check": check if check in ("auto", None) else named_text(check, "--check")}


@contextlib.contextmanager
def processes(device: str | None):
    """Joins the processes of torchrun, where it started this one -> (device, whether this is the one that writes)."""
    from . import ranks

    with ranks.torchrun(device) as device:
        yield device, ranks.rank() == 0


def verdict(report, args: argparse.Namespace) -> tuple[int, str]:
    """(exit code, a sentence): 2 where the result is further from the dense model than --max-kl allows, or was not measured."""
    if not report.check:
        return (0, "not compared with the dense model") if args.max_kl is None else (
            2, "--max-kl: there was no text to compare the result with the dense model on; give --check FILE")
    text = (f"KL to the dense model {report.check['kl']:.4f} nats per token on {report.check['tokens']} tokens, the same likeliest token "
            f"on {100 * report.check['same_token']:.1f} %")
    if args.max_kl is not None and report.check["kl"] > args.max_kl:
        return 2, f"{text}: over the limit of {args.max_kl:g} (--max-kl)"
    return 0, text


def left(args: argparse.Namespace) -> str:
    """What an interrupted run leaves behind, and how to go on."""
    from .checkpoint import CONFIG
    from .journal import blocks_done

    folder, over = Path(args.out), [option for option, given in (("--fresh", args.fresh), ("--no-journal", args.no_journal)) if given]
    if not (done := blocks_done(folder)):
        return "nothing half-written was left behind" + f"; the checkpoint in {folder} is complete" * (folder / CONFIG).is_file()
    return (f"{done} {'block is' if done == 1 else 'blocks are'} done: the same command{' without ' * bool(over)}{' and '.join(over)} "
            f"goes on behind {'it' if done == 1 else 'them'}")


def _limit(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"got {text!r}, need a number of nats, 0 or more")
    return value
