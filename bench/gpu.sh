#!/usr/bin/env bash
# One call on a machine with a GPU: build, all tests, compute-sanitizer over the GPU tests, every bench; a summary at the end.
# The results go to $OUT, by default bench/results.  PYTHON: the interpreter, with torch and the build tools installed.
# MODEL, CALIBRATION and TEXT (a model and two texts) are for bench.quality, which is skipped without the texts; MODEL also for
# bench.decode.  Both take the demo's model where it is not set.
# It ends with 1 if something failed; what cannot run here, for want of a GPU or a file, is skipped and said so.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
python="${PYTHON:-python3}"
out="${OUT:-bench/results}"
failed=0
summary=()
mkdir -p "$out" || exit 1

step() { # NAME COMMAND...: runs it, keeps its output in NAME.log
    local name="$1" began=$SECONDS verdict=ok code
    shift
    echo "== $name: $*"
    "$@" 2>&1 | tee "$out/$name.log"
    code=${PIPESTATUS[0]}
    if [ "$code" -ne 0 ]; then
        verdict="FAILED (exit code $code)"
        failed=1
    fi
    summary+=("$(printf '%-20s %-24s %5d s' "$name" "$verdict" "$((SECONDS - began))")")
}

skip() { # NAME REASON
    summary+=("$(printf '%-20s skipped: %s' "$1" "$2")")
}

gpu="$("$python" -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "")' 2>/dev/null | tail -n 1)"
step build "$python" -m pip install -q --no-build-isolation --no-deps -e .
step tests "$python" -m pytest -q -rs
if [ -z "$gpu" ]; then
    skip sanitizer "no CUDA device"
elif ! command -v compute-sanitizer >/dev/null; then
    skip sanitizer "compute-sanitizer is not installed"
elif ! "$python" -m pytest -q --collect-only -m gpu 2>/dev/null | grep '::' >/dev/null; then # not -q: it would break the pipe
    skip sanitizer "there are no GPU tests"
else
    for tool in memcheck racecheck synccheck initcheck; do
        step "$tool" compute-sanitizer --tool "$tool" --target-processes all --error-exitcode 9 "$python" -m pytest -q -m gpu
    done
fi
model=()
[ -z "${MODEL:-}" ] || model=(--model "$MODEL")
step dequantize "$python" -m bench.dequantize --json "$out/dequantize.json"
step quantize "$python" -m bench.quantize --json "$out/quantize.json"
step gemv "$python" -m bench.gemv --json "$out/gemv-cpu.json"
step gemv-m "$python" -m bench.gemv --shapes 4096x4096,576x1536 --m 2,4,8,16,32,64,128 --cache cold --json "$out/gemv-cpu-m.json"
step decode "$python" -m bench.decode "${model[@]}" --json "$out/decode-cpu.json"
step triton-resources "$python" -m bench.triton_resources --json "$out/triton-resources.json"
if [ -n "$gpu" ]; then
    step triton "$python" -m bench.triton --device cuda --json "$out/triton.json"
else
    skip triton "no CUDA device"
fi
if [ -n "${CALIBRATION:-}" ] && [ -n "${TEXT:-}" ]; then
    step quality-layers "$python" -m bench.quality --layers "${model[@]}" --calibration "$CALIBRATION" --heldout "$TEXT" \
        --json "$out/quality-layers.json"
    step quality-perplexity "$python" -m bench.quality --perplexity "${model[@]}" --calibration "$CALIBRATION" --text "$TEXT" \
        --json "$out/quality-perplexity.json"
else
    skip quality "CALIBRATION and TEXT name no files"
fi

echo
echo "== summary"
if [ -n "$gpu" ]; then echo "GPU: $gpu"; else echo "NO CUDA DEVICE: nothing above ran on a GPU"; fi
printf '%s\n' "${summary[@]}"
exit "$failed"
