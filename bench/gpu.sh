#!/usr/bin/env bash
# bench/gpu.sh [PART..]: what a machine with a GPU is wanted for, without network.  It builds, then does the parts in this order:
#   tests      those that need a GPU or, of the Triton kernels, can use one
#   bench      the benches of a GPU; their result files are called by its name
#   sanitizer  compute-sanitizer over the tests of the kernels, its four tools beside each other
#   rest       all tests, and every other bench
# "gpu" are the first three; without a PART it does all.  A step that fails or takes too long ends nothing but itself.
# OUT: the folder of the results and of each step's output, by default bench/results; summary.txt there says how each step ended.
# BUDGET: seconds for all of it, for a machine that is lent for so long: a step gets at most half of what is left.  In two calls of ten
# minutes: BUDGET=580 bench/gpu.sh tests bench, and BUDGET=580 bench/gpu.sh sanitizer.
# SCALE: the steps' own limits of time, times so many.
# ARCHIVE: a .tar.gz file of all that is in OUT, made anew after each step, for where few files are brought back.
# PYTHON: the interpreter, with torch and the build tools installed.  GPTVQ_COMMIT: the commit of a copy without .git.
# MODEL, CALIBRATION and TEXT (a model and two texts) are for bench.quality, which is skipped without the texts; MODEL also for
# bench.decode.  Both take the demo's model where it is not set.
# It ends with 1 if something failed; what cannot run here, for want of a GPU, a file or time, is skipped and said so.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
python="${PYTHON:-python3}"
out="${OUT:-bench/results}"
mkdir -p "$out" || exit 1
summary="$out/summary.txt"
: >"$summary" || exit 1
share=2                                         # of the time that is left, what a step gets is one in so many
[ $# -gt 0 ] || set -- tests bench sanitizer rest
for part in "$@"; do
    case "$part" in
        gpu | tests | bench | sanitizer | rest) ;;
        *) echo "bench/gpu.sh: got the part $part, need some of tests, bench, sanitizer, rest, or gpu" >&2 && exit 2 ;;
    esac
done

wants() { # PART: whether it was asked for
    [[ " ${parts[*]} " == *" $1 "* || ("$1" != rest && " ${parts[*]} " == *" gpu "*) ]]
}

step() { # NAME [SECONDS] COMMAND...: runs it for at most so long (half an hour), keeps its output in NAME.log
    local name="$1" limit=1800 began=$SECONDS verdict=ok code left
    shift
    [[ ! $1 =~ ^[0-9]+$ ]] || { limit=$1 && shift; }
    limit=$((limit * ${SCALE:-1}))
    if [ -n "${BUDGET:-}" ]; then
        left=$(((BUDGET - SECONDS - 10) / share))
        [ "$left" -ge "$limit" ] || limit=$left
        [ "$limit" -ge 10 ] || { skip "$name" "no time left" && return; }
    fi
    echo "== $name: $*"
    timeout -k 10 "$limit" "$@" 2>&1 | tee "$out/$name.log"
    code=${PIPESTATUS[0]}
    if [ "$code" -eq 124 ] || [ "$code" -eq 137 ]; then
        verdict="STOPPED after $limit s"
    elif [ "$code" -ne 0 ]; then
        verdict="FAILED (exit code $code)"
    fi
    printf '%-20s %-24s %5d s\n' "$name" "$verdict" "$((SECONDS - began))" >>"$summary"
    archive
}

skip() { # NAME REASON
    printf '%-20s skipped: %s\n' "$1" "$2" >>"$summary"
}

archive() {
    [ -n "${ARCHIVE:-}" ] || return 0
    # Steps beside each other: a file may grow meanwhile, and the archive that is there last counts.
    local new="$ARCHIVE.$BASHPID"
    tar -czf "$new" --warning=no-file-changed --exclude="${ARCHIVE##*/}*" -C "$out" . || [ $? -eq 1 ] && mv "$new" "$ARCHIVE"
}

finish() {
    if [ -n "$gpu" ]; then echo "GPU: $gpu"; else echo "NO CUDA DEVICE: nothing above ran on a GPU"; fi >>"$summary"
    archive
    echo
    echo "== summary"
    cat "$summary"
    ! grep -qE '^[^ ]+ +(FAILED|STOPPED)' "$summary"
    exit
}

parts=("$@")
gpu="$("$python" -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "")' 2>/dev/null | tail -n 1)"
named="$out/$(echo "$gpu" | tr 'A-Z' 'a-z' | tr -cs 'a-z0-9\n' '-' | sed 's/-*$//')"
step build 900 "$python" -m pip install -q --no-build-isolation --no-deps -e .
for part in tests bench sanitizer; do
    [ -n "$gpu" ] || ! wants "$part" || skip "${part/tests/gpu-tests}" "no CUDA device"
done
if [ -n "$gpu" ] && wants tests; then
    step gpu-tests 900 "$python" -m pytest -q -rs --continue-on-collection-errors -m gpu
fi
if [ -n "$gpu" ] && wants bench; then
    step gpu-gemv 600 "$python" -m bench.gemv --device cuda --dtype float16 --activations a16 --json "$named-gemv.json"
    step gpu-layer-70b 300 "$python" -m bench.quantize --device cuda --shape llama2-70b-layer --samples 128 --json "$named-layer-70b.json"
    step gpu-layer-7b 300 "$python" -m bench.quantize --device cuda --shape llama2-7b --samples 128 --json "$named-layer-7b.json"
    for mode in graph eager compile; do         # a process each: what goes wrong in one may end the device's context
        step "gpu-decode-$mode" 600 "$python" -m bench.decode --device cuda --shape llama2-7b --modes "$mode" --repeats 5 \
            --json "$named-decode-$mode.json"
    done
    step gpu-gemv-m 600 "$python" -m bench.gemv --device cuda --dtype float16 --activations a16 --presets 2d-2.25,2d-3.125,4d-2.25 \
        --m 2,8,16,64,2048 --repeats 5 --json "$named-gemv-m.json"
    step gpu-triton 600 "$python" -m bench.triton --device cuda --json "$named-triton.json"
fi
if [ -n "$gpu" ] && wants tests; then           # last: it compiles every kernel first
    step gpu-triton-tests 900 "$python" -m pytest -q -rs tests/triton_interpreter
fi
if [ -n "$gpu" ] && wants sanitizer; then
    if ! command -v compute-sanitizer >/dev/null; then
        skip sanitizer "compute-sanitizer is not installed"
    else
        share=1
        # Without torch's caching of memory the end of a tensor is the end of an allocation, but no CUDA graph can be captured;
        # initcheck has to see all that writes.
        for tool in memcheck racecheck synccheck initcheck; do
            only=(--kernel-name kernel_substring=gptvq)
            [ "$tool" != initcheck ] || only=()
            step "$tool" 900 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --target-processes all \
                --error-exitcode 9 "${only[@]}" "$python" -m pytest -v -m gpu tests/cuda_emu --deselect tests/cuda_emu/test_pipeline.py \
                --deselect tests/cuda_emu/test_linear_cuda.py::test_cuda_graph_and_streams >/dev/null &
        done
        wait
        for tool in memcheck racecheck synccheck initcheck; do
            [ ! -f "$out/$tool.log" ] || { echo "== $tool" && tail -n 3 "$out/$tool.log"; }
        done
        share=2
    fi
fi
wants rest || finish
model=()
[ -z "${MODEL:-}" ] || model=(--model "$MODEL")
step tests 3600 "$python" -m pytest -q -rs --continue-on-collection-errors
step triton-resources 600 "$python" -m bench.triton_resources --json "$out/triton-resources.json"
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
