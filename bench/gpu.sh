#!/usr/bin/env bash
# Everything there is to do on an NVIDIA GPU, in one call and without network: build, tests, compute-sanitizer, benches.
#
#   bench/gpu.sh [STEP ...]      all steps, or those named: build tests ptx memcheck racecheck synccheck initcheck
#                                gemv gemv-8 gemm triton-resources triton quantize-70b quantize-7b decode-eager decode-graph decode-compile
#
# Each step has its own time limit and its own result file, bench/results/<gpu>-<step>.json, which a bench rewrites after every row: what
# was measured stays when a later step fails.  What the steps print goes to build/gpu/<step>.log.  PYTHON names the interpreter.
# Needs nvcc, cmake, ninja, pybind11, torch with CUDA, transformers and pytest; nothing is downloaded.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3}
gpu_name() {
  "$PYTHON" -c 'import re, torch; print(re.sub("[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-"))' || echo no-gpu
}
NAME=${NAME:-$(gpu_name)}
RESULTS=${RESULTS:-bench/results}
LOGS=build/gpu
mkdir -p "$RESULTS" "$LOGS"
export PYTHONPATH=. HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
WANTED=" ${*:-${GPTVQ_GPU_STEPS:-all}} "
FAILED=()

# step NAME SECONDS COMMAND...: runs it within the limit, says how it ended, and goes on.
step() {
  local name=$1 limit=$2
  shift 2
  [[ ${GPTVQ_GPU_STEPS:-} != none && $WANTED != " all " && $WANTED != *" $name "* ]] && return
  echo "== $name"
  local began=$SECONDS code=0
  timeout -k 10 "$limit" "$@" > "$LOGS/$name.log" 2>&1 || code=$?
  tail -n 25 "$LOGS/$name.log" | sed 's/^/   /'
  if ((code == 124 || code == 137)); then
    echo "   $name: took longer than $limit s"
  elif ((code)); then
    echo "   $name: exit code $code"
  else
    echo "   $name: done in $((SECONDS - began)) s"
  fi
  ((code)) && FAILED+=("$name")
  return 0
}

finish() {
  ((${#FAILED[@]})) || { echo "all steps done; results: $RESULTS/$NAME-*.json"; return 0; }
  echo "failed: ${FAILED[*]}; their output is in $LOGS"
  return 1
}

bench() { echo "$PYTHON -m bench.$1 --json $RESULTS/$NAME-$2.json"; }

# Without torch's caching of memory, so that the end of a tensor is the end of an allocation; initcheck needs to see all that writes.
sanitizer() {
  local only="--kernel-name kernel_substring=gptvq"
  [[ $1 == initcheck ]] && only=""
  step "$1" 900 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --target-processes all --error-exitcode 9 $only \
    "$PYTHON" -m pytest -q -x -m gpu -p no:cacheprovider tests/cuda_emu --deselect tests/cuda_emu/test_pipeline.py
}

if [[ ${GPTVQ_GPU_STEPS:-} != none ]]; then
  nvidia-smi || true
  step build 900 env GPTVQ_CUDA=ON "$PYTHON" setup.py -q build_ext --inplace
  step doctor 60 "$PYTHON" -c 'from gptvq.doctor import diagnose; [print(f"{topic}: {text}") for topic, text in diagnose().items()]'
  step ptx 300 "$PYTHON" -m pytest -q -m gpu -p no:cacheprovider tests/cuda_emu/test_ptx.py
  step tests 1200 "$PYTHON" -m pytest -q -m gpu -p no:cacheprovider
  step gemv 600 $(bench gemv gemv) --device cuda --dtype float16 --activations a16
  step gemv-8 600 $(bench gemv gemv-8) --device cuda --dtype float16 --activations a16 --m 2,8 --repeats 7
  step quantize-70b 600 $(bench quantize quantize-70b) --device cuda --shape llama2-70b-layer --samples 128
  step quantize-7b 600 $(bench quantize quantize-7b) --device cuda --shape llama2-7b --samples 128
  step decode-eager 600 $(bench decode decode-eager) --device cuda --shape llama2-7b --modes eager
  step decode-graph 600 $(bench decode decode-graph) --device cuda --shape llama2-7b --modes graph
  step decode-compile 900 $(bench decode decode-compile) --device cuda --shape llama2-7b --modes compile --repeats 5
  step triton-resources 300 $(bench triton_resources triton-resources)
  step triton 600 $(bench triton triton) --device cuda
  step gemm 600 $(bench gemv gemm) --device cuda --dtype float16 --activations a16 --m 16,64,256,2048 --repeats 5
  for tool in memcheck racecheck synccheck initcheck; do sanitizer "$tool"; done
  finish
fi
