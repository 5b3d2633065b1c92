"""python -m bench.learn: a packed model that learns on, its perplexity before and after: a LoRA adapter beside it, or its own codebooks."""
from __future__ import annotations

import sys
import time

import torch

from gptvq.calibration import calibration_tokens, read_tokens, tokens_sha256
from gptvq.errors import BackendUnavailable, ConfigError
from gptvq.evaluate import perplexity
from gptvq.hf import open_model
from gptvq.linear import VQLinear
from gptvq.tune import tune

from . import runner

EXAMPLE = """examples:
  python -m bench.learn lora --packed my-model-2.25 --train calibration.txt --text test.txt --json bench/results/learn-lora.json
  python -m bench.learn tune --packed my-model-2.25 --dense my-model --train calibration.txt --text test.txt

lora: the packed weights stay, an adapter learns to predict the next token of the training text.  Part of what it gains is that text's
style, which the dense model could learn as well: the dense perplexity is not the least there is.
tune: codebooks, scales, norms and biases learn the dense model's predictions on the training text; size and format stay."""


def main(argv: list[str] | None = None) -> None:
    print(show(measure(parser().parse_args(argv), argv)))


def parser():
    p = runner.parser("learn", "What a packed model gains by learning on.", EXAMPLE)
    p.add_argument("how", choices=("lora", "tune"))
    p.add_argument("--packed", required=True, metavar="FOLDER", help="a packed checkpoint")
    p.add_argument("--dense", metavar="MODEL", help="tune: the dense model it was made from")
    p.add_argument("--train", required=True, metavar="FILE", help="text to train on")
    p.add_argument("--text", required=True, metavar="FILE", help="text to measure the perplexity on; never trained on")
    p.add_argument("--rank", type=runner.positive, default=16, metavar="N", help="lora: default %(default)s")
    p.add_argument("--rate", type=float, metavar="R", help="learning rate, default 3e-4 (lora) or 1e-3 (tune)")
    p.add_argument("--steps", type=runner.positive, default=100, metavar="N", help="default %(default)s")
    p.add_argument("--batch", type=runner.positive, default=4, metavar="N", help="sequences per step, default %(default)s")
    p.add_argument("--sequence-length", type=runner.positive, default=256, metavar="N", help="default %(default)s")
    p.add_argument("--window", type=runner.positive, default=2048, metavar="N", help="of the perplexity, default %(default)s")
    p.add_argument("--max-windows", type=runner.positive, default=10, metavar="N", help="default %(default)s")
    p.add_argument("--seed", type=int, default=0, metavar="N", help="default %(default)s")
    return p


def measure(args, argv: list[str] | None) -> list[dict]:
    if args.how == "tune" and not args.dense:
        raise ConfigError("tune: --dense must name the dense model to learn from")
    model, tokenizer = open_model(args.packed)
    text = read_tokens(args.text, tokenizer, "--text")
    tokens = calibration_tokens(args.train, tokenizer, args.steps * args.batch, args.sequence_length, args.seed)
    rate = args.rate or {"lora": 3e-4, "tune": 1e-3}[args.how]
    results = runner.Results("learn", argv, args.json, {"rate": rate, "train_sha256": tokens_sha256(tokens), **{
        name: getattr(args, name) for name in ("how", "rank", "steps", "batch", "sequence_length", "window", "max_windows", "seed")}})
    packed = [layer for layer in model.modules() if isinstance(layer, VQLinear)]
    bits = 8 * sum(layer.packed.nbytes for layer in packed) / sum(layer.in_features * layer.out_features for layer in packed)

    def row(method: str, measured, **more) -> dict:
        value = perplexity(measured, text, args.window, args.max_windows)
        runner.log(f"{method}: perplexity {value:.3f}")
        return {"operation": "learn", "method": method, "preset": None, "format": packed[0].spec.form,
                "bits_per_value": 16.0 if method == "dense" else bits, "perplexity": value, "text_sha256": tokens_sha256(text),
                "device": str(next(measured.parameters()).device), "threads": torch.get_num_threads(), **more}

    dense = open_model(args.dense)[0] if args.dense else None
    if dense is not None:
        results.add([row("dense", dense)])
    results.add([row("gptvq", model)])
    began = time.perf_counter()

    def progress(step: int, steps: int, loss: float) -> None:
        runner.log(f"step {step} of {steps}: loss {loss:.3f}, {(time.perf_counter() - began) / step:.1f} s a step")

    if args.how == "tune":
        losses, method = tune(model, dense, tokens, batch=args.batch, rate=rate, progress=progress), "gptvq, tuned"
        learnt = 0
    else:
        model, losses = with_adapter(model, tokens, args, rate, progress)
        learnt, method = sum(p.numel() for p in model.parameters() if p.requires_grad), "gptvq + LoRA"
    seconds = time.perf_counter() - began
    results.add([row(method, model, adapter_parameters=learnt, losses=losses, train_seconds=seconds)])
    return results.rows


def with_adapter(model, tokens, args, rate: float, progress) -> tuple[torch.nn.Module, list[float]]:
    """(the model with a trained LoRA adapter on every packed linear, the loss of every step)."""
    try:
        import peft

        from gptvq.peft import packed_linears
    except ImportError as error:
        raise BackendUnavailable("bench.learn lora needs peft: pip install peft") from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.seed)
        model = peft.get_peft_model(model, peft.LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules=packed_linears(model)))
    return model, train(model, [p for p in model.parameters() if p.requires_grad], tokens.split(args.batch), rate, progress)


def train(model, learnt, batches, rate: float, progress) -> list[float]:
    """The loss of every step: AdamW, the rate falling linearly to 0 after a tenth of warm-up."""
    optimizer = torch.optim.AdamW(learnt, lr=rate)
    warm = max(1, len(batches) // 10)
    plan = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min((i + 1) / warm, (len(batches) - i) / len(batches)))
    losses = []
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
        progress(i + 1, len(batches), losses[-1])
    model.eval()
    return losses


def show(rows: list[dict]) -> str:
    return runner.table(rows, {
        "method": lambda r: r["method"], "bits per weight": lambda r: f"{r['bits_per_value']:.3f}",
        "perplexity": lambda r: f"{r['perplexity']:.2f}", "adapter": lambda r: f"{r['adapter_parameters'] / 1e6:.2f} M",
        "training": lambda r: f"{len(r['losses'])} steps, {r['train_seconds']:.0f} s"})


if __name__ == "__main__":
    sys.exit(runner.run(main))
