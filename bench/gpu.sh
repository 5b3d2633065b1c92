#!/usr/bin/env bash
# One call on a machine with a GPU, without network: build, the tests that need one, the GPU benches, compute-sanitizer over the tests of
# the kernels, all other tests, every other bench; a summary at the end.  "bench/gpu.sh gpu" ends after what needs a GPU.
# The results go to $OUT, by default bench/results; those of a GPU are called by its name.  Each step has its own time limit (SCALE: times
# so many), and a bench rewrites its file after every row, so a step that fails or takes too long leaves what it has measured.
# PYTHON: the interpreter, with torch and the build tools installed.
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

step() { # NAME [SECONDS] COMMAND...: runs it for at most so long (half an hour), keeps its output in NAME.log
    local name="$1" limit=1800 began=$SECONDS verdict=ok code
    shift
    [[ ! $1 =~ ^[0-9]+$ ]] || { limit=$1 && shift; }
    limit=$((limit * ${SCALE:-1}))
    echo "== $name: $*"
    timeout -k 10 "$limit" "$@" 2>&1 | tee "$out/$name.log"
    code=${PIPESTATUS[0]}
    if [ "$code" -eq 124 ] || [ "$code" -eq 137 ]; then
        verdict="STOPPED after $limit s"
        failed=1
    elif [ "$code" -ne 0 ]; then
        verdict="FAILED (exit code $code)"
        failed=1
    fi
    summary+=("$(printf '%-20s %-24s %5d s' "$name" "$verdict" "$((SECONDS - began))")")
}

skip() { # NAME REASON
    summary+=("$(printf '%-20s skipped: %s' "$1" "$2")")
}

finish() {
    echo
    echo "== summary"
    if [ -n "$gpu" ]; then echo "GPU: $gpu"; else echo "NO CUDA DEVICE: nothing above ran on a GPU"; fi
    printf '%s\n' "${summary[@]}"
    exit "$failed"
}

gpu="$("$python" -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "")' 2>/dev/null | tail -n 1)"
step build 900 "$python" -m pip install -q --no-build-isolation --no-deps -e .
if [ -z "$gpu" ]; then
    skip gpu "no CUDA device"
    skip sanitizer "no CUDA device"
else
    named="$out/$(echo "$gpu" | tr 'A-Z' 'a-z' | tr -cs 'a-z0-9\n' '-' | sed 's/-*$//')"
    step gpu-tests 900 "$python" -m pytest -q -rs -m gpu
    step gpu-gemv 600 "$python" -m bench.gemv --device cuda --dtype float16 --activations a16 --json "$named-gemv.json"
    step gpu-gemv-m 600 "$python" -m bench.gemv --device cuda --dtype float16 --activations a16 --presets 2d-2.25,2d-3.125,4d-2.25 \
        --m 2,8,16,64,2048 --repeats 5 --json "$named-gemv-m.json"
    step gpu-layer-70b 300 "$python" -m bench.quantize --device cuda --shape llama2-70b-layer --samples 128 --json "$named-layer-70b.json"
    step gpu-layer-7b 300 "$python" -m bench.quantize --device cuda --shape llama2-7b --samples 128 --json "$named-layer-7b.json"
    for mode in eager graph compile; do         # a process each: what goes wrong in one may end the device's context
        step "gpu-decode-$mode" 600 "$python" -m bench.decode --device cuda --shape llama2-7b --modes "$mode" --repeats 5 \
            --json "$named-decode-$mode.json"
    done
    if ! command -v compute-sanitizer >/dev/null; then
        skip sanitizer "compute-sanitizer is not installed"
    else
        # Without torch's caching of memory the end of a tensor is the end of an allocation; initcheck has to see all that writes.
        for tool in memcheck racecheck synccheck initcheck; do
            only=(--kernel-name kernel_substring=gptvq)
            [ "$tool" != initcheck ] || only=()
            step "$tool" 900 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --target-processes all \
                --error-exitcode 9 "${only[@]}" "$python" -m pytest -q -m gpu tests/cuda_emu --deselect tests/cuda_emu/test_pipeline.py
        done
    fi
fi
model=()
[ -z "${MODEL:-}" ] || model=(--model "$MODEL")
[ "${1:-}" != gpu ] || finish
step tests 3600 "$python" -m pytest -q -rs
step dequantize 600 "$python" -m bench.dequantize --json "$out/dequantize.json"
step quantize 900 "$python" -m bench.quantize --json "$out/quantize.json"
step gemv 1800 "$python" -m bench.gemv --json "$out/gemv-cpu.json"
step gemv-m 1800 "$python" -m bench.gemv --shapes 4096x4096,576x1536 --m 2,4,8,16,32,64,128 --cache cold --json "$out/gemv-cpu-m.json"
step decode 1800 "$python" -m bench.decode "${model[@]}" --json "$out/decode-cpu.json"
if [ -n "${CALIBRATION:-}" ] && [ -n "${TEXT:-}" ]; then
    step quality-layers 7200 "$python" -m bench.quality --layers "${model[@]}" --calibration "$CALIBRATION" --heldout "$TEXT" \
        --json "$out/quality-layers.json"
    step quality-perplexity 14400 "$python" -m bench.quality --perplexity "${model[@]}" --calibration "$CALIBRATION" --text "$TEXT" \
        --json "$out/quality-perplexity.json"
else
    skip quality "CALIBRATION and TEXT name no files"
fi
finish
