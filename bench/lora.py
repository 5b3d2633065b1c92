"""python -m bench.lora: a LoRA adapter trained on a packed model, perplexity before and after (peft, on the packed weights)."""
from __future__ import annotations

import sys
import time

import torch

from gptvq.calibration import calibration_tokens, read_tokens, tokens_sha256
from gptvq.errors import BackendUnavailable
from gptvq.evaluate import perplexity
from gptvq.hf import open_model
from gptvq.linear import VQLinear

from . import runner

EXAMPLE = """examples:
  python -m bench.lora --packed my-model-2.25 --train calibration.txt --text test.txt --json bench/results/lora.json

The packed weights stay as they are; only the adapter learns, to predict the next token of the training text.  Part of what it gains is
that text's style, which the dense model could learn as well: the dense perplexity is not the least there is."""


def main(argv: list[str] | None = None) -> None:
    print(show(measure(parser().parse_args(argv), argv)))


def parser():
    p = runner.parser("lora", "A LoRA adapter on a packed model.", EXAMPLE)
    p.add_argument("--packed", required=True, metavar="FOLDER", help="a packed checkpoint")
    p.add_argument("--train", required=True, metavar="FILE", help="text to train on")
    p.add_argument("--text", required=True, metavar="FILE", help="text to measure the perplexity on; never trained on")
    p.add_argument("--rank", type=runner.positive, default=16, metavar="N", help="default %(default)s")
    p.add_argument("--rate", type=float, default=3e-4, metavar="R", help="learning rate, default %(default)s")
    p.add_argument("--steps", type=runner.positive, default=100, metavar="N", help="default %(default)s")
    p.add_argument("--batch", type=runner.positive, default=4, metavar="N", help="sequences per step, default %(default)s")
    p.add_argument("--sequence-length", type=runner.positive, default=256, metavar="N", help="default %(default)s")
    p.add_argument("--window", type=runner.positive, default=2048, metavar="N", help="of the perplexity, default %(default)s")
    p.add_argument("--max-windows", type=runner.positive, default=10, metavar="N", help="default %(default)s")
    p.add_argument("--seed", type=int, default=0, metavar="N", help="default %(default)s")
    return p


def measure(args, argv: list[str] | None) -> list[dict]:
    try:
        import peft

        from gptvq.peft import packed_linears
    except ImportError as error:
        raise BackendUnavailable("bench.lora needs peft: pip install peft") from error
    model, tokenizer = open_model(args.packed)
    text = read_tokens(args.text, tokenizer, "--text")
    batches = calibration_tokens(args.train, tokenizer, args.steps * args.batch, args.sequence_length, args.seed).split(args.batch)
    results = runner.Results("lora", argv, args.json, {
        name: getattr(args, name) for name in ("rank", "rate", "steps", "batch", "sequence_length", "window", "max_windows", "seed")})
    first = next(layer.spec for layer in model.modules() if isinstance(layer, VQLinear))
    bits = [(layer.packed.nbytes, layer.in_features * layer.out_features) for layer in model.modules() if isinstance(layer, VQLinear)]

    def row(steps: int, **more) -> dict:
        value = perplexity(model, text, args.window, args.max_windows)
        runner.log(f"after {steps} steps: perplexity {value:.3f}")
        return {"operation": "lora", "method": "gptvq + LoRA" if steps else "gptvq", "preset": None,
                "format": f"{first.dim}D K{first.codewords}", "steps": steps, "bits_per_value": 8 * sum(n for n, _ in bits) / sum(w for _, w in bits),
                "perplexity": value, "text_sha256": tokens_sha256(text), "device": str(next(model.parameters()).device),
                "threads": torch.get_num_threads(), **more}

    results.add([row(0)])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.seed)
        model = peft.get_peft_model(model, peft.LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules=packed_linears(model)))
    learnt = [p for p in model.parameters() if p.requires_grad]
    losses, seconds = train(model, learnt, batches, args.rate)
    results.add([row(len(batches), parameters=sum(p.numel() for p in learnt), losses=losses, train_seconds=seconds)])
    return results.rows


def train(model, learnt, batches, rate: float) -> tuple[list[float], float]:
    """(the loss of every step, seconds): AdamW, the rate falling linearly to 0 after a tenth of warm-up."""
    optimizer = torch.optim.AdamW(learnt, lr=rate)
    warm = max(1, len(batches) // 10)
    plan = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min((i + 1) / warm, (len(batches) - i) / len(batches)))
    losses, began = [], time.perf_counter()
    model.train()
    for i, ids in enumerate(batches):
        ids = ids.to(next(model.parameters()).device)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learnt, 1.0)
        optimizer.step()
        plan.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        runner.log(f"step {i + 1} of {len(batches)}: loss {losses[-1]:.3f}, {(time.perf_counter() - began) / (i + 1):.1f} s a step")
    model.eval()
    return losses, time.perf_counter() - began


def show(rows: list[dict]) -> str:
    return runner.table(rows, {
        "steps": lambda r: r["steps"], "bits per weight": lambda r: f"{r['bits_per_value']:.3f}",
        "adapter": lambda r: f"{r['parameters'] / 1e6:.2f} M", "perplexity": lambda r: f"{r['perplexity']:.2f}",
        "training": lambda r: f"{r['train_seconds']:.0f} s"})


if __name__ == "__main__":
    sys.exit(runner.run(main))
