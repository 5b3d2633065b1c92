"""From a dense model to a packed one that is measured, used and exported: quantize_and_use.py MODEL CALIBRATION TEXT OUT."""
import argparse
from pathlib import Path

import gptvq
from gptvq.hf import open_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="folder, hub id or .gguf file")
    parser.add_argument("calibration", help="text that the error is minimised on")
    parser.add_argument("text", help="other text, to measure on")
    parser.add_argument("out", type=Path, help="folder for what is made")
    parser.add_argument("--preset", default="2d-3.125")
    parser.add_argument("--finer", default="*.v_proj", metavar="PATTERN",
                        help="linears that get 4 bits, default %(default)s; of GPT-2, for instance, '*.attn.c_attn'")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--sequence-length", type=int, default=1024)
    args = parser.parse_args()

    # 1. Quantize.  Some linears, by default the value projections, get more bits; a model may call its linears otherwise (--finer).
    packed = args.out / "packed"
    config = gptvq.VQConfig.preset(args.preset, rules=((args.finer, "2d-4.125"),))
    report = gptvq.quantize(args.model, packed, config, calibration=args.calibration, samples=args.samples,
                             sequence_length=args.sequence_length)
    print(f"{report.bits_per_value:.3f} bits per weight, {report.dense_bytes / report.packed_bytes:.1f} times smaller, mean layer error "
          f"{100 * report.mean_error:.2f} %; see {gptvq.write_page(packed)}")

    # 2. Read it back and compare it with the dense model.
    model, tokenizer = open_model(packed)
    dense, _ = open_model(args.model)
    tokens = tokenizer(Path(args.text).read_text(), return_tensors="pt").input_ids[0]
    found = gptvq.agreement(model, dense, tokens, window=min(args.sequence_length, len(tokens)), max_windows=8)
    print(f"perplexity {found['dense_perplexity']:.2f} before, {found['perplexity']:.2f} now; KL {found['kl']:.4f} nats per token, the "
          f"same likeliest token {100 * found['top1']:.1f} %")

    # 3. Use it like any model of transformers.
    prompt = tokenizer("The tower stands", return_tensors="pt").input_ids.to(model.device)
    print(tokenizer.decode(model.generate(prompt, max_new_tokens=20, do_sample=False)[0], skip_special_tokens=True))

    # 4. For tools that know nothing of gptvq.
    print(f"dense again, with the quantized values: {gptvq.export_dense(packed, args.out / 'dense')}")


if __name__ == "__main__":
    main()
