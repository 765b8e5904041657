#!/usr/bin/env bash
# One command for a GPU that is there for minutes: build, test, compare, measure. `make gpu-check` runs it.
#
#   bash tools/gpu_check.sh                    from anywhere; offline; PY (python3) has a CUDA build of torch
#   BUDGET=520 STEPS="build smoke layers-7b"   seconds in all; only these steps
#   DEVICE=cpu TINY=1                          tries the command itself where there is no GPU
#
# Every step has a limit of its own, and what it found is in OUT (gpu-out) before the next one starts: a hang or a kill
# costs that step alone. OUT has summary.txt, steps.jsonl, results.jsonl, junit.xml, logs.tgz and trace.json.gz;
# `python tools/gpu_results.py OUT` makes docs/gpu-results.md of it. Without a GPU one line is printed. Exit code: 0 no
# GPU, or all steps ran and no answer failed; 1 something failed or was cut off; 2 it could not start.
# unirank is installed as a link to this tree in the environment of PY: `python -m` finds the source first.
set -u
START=$(date +%s)
ROOT=$(cd "$(dirname "$0")/.." && pwd)
DEVICE=${DEVICE:-cuda}
TINY=${TINY:-}
PY=${PY:-python3}
# On a CPU a step is as slow as the machine is busy, and nobody pays for minutes.
FACTOR=1
[[ $DEVICE == cpu ]] && FACTOR=5
BUDGET=${BUDGET:-$((540 * FACTOR))}
cd "$ROOT" || exit 2
if [[ $DEVICE == cuda ]]; then
  [[ -e /dev/nvidiactl || -e /dev/dxg ]] || nvidia-smi >/dev/null 2>&1 || { echo "gpu-check: no GPU on this machine, nothing to check."; exit 0; }
fi
if ! said=$($PY tools/gpu_present.py "$DEVICE" 2>&1); then
  echo "gpu-check: $said"
  exit 2
fi
OUT=$(mkdir -p "${OUT:-gpu-out}" && cd "${OUT:-gpu-out}" && pwd) || exit 2
WORK=$(mktemp -d "${TMPDIR:-/tmp}/unirank-gpu.XXXX") || exit 2
mkdir -p "$WORK/logs"
rm -f "$OUT"/{summary.txt,steps.jsonl,results.jsonl,junit.xml,logs.tgz,trace.json.gz}
touch "$OUT/results.jsonl" "$OUT/steps.jsonl"
export RESULTS=$OUT/results.jsonl PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INDEX=1 TMPDIR=$WORK PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
export PY ROOT WORK OUT DEVICE

ALL="about build env smoke parity layers-7b solvers tests kernels nan sanitize profile whole-1b ncu compositions whole-7b"
[[ $DEVICE == cpu ]] && ALL="about build env smoke parity layers-7b solvers tests kernels nan profile whole-1b"
STEPS=${STEPS:-$ALL}

left() { echo $((BUDGET - ($(date +%s) - START))); }
wanted() { [[ " $STEPS " == *" $1 "* ]]; }
keep() {  # what is known so far, where it is looked for
  tar -C "$WORK" -czf "$OUT/.logs.tgz" logs 2>/dev/null && mv -f "$OUT/.logs.tgz" "$OUT/logs.tgz"
  $PY tools/gpu_results.py --summary "$OUT" >"$OUT/.summary.txt" && mv -f "$OUT/.summary.txt" "$OUT/summary.txt"
}
# step NAME LIMIT COMMAND...: never longer than its limit or what is left; 124 and 137 are the time limit, -1 no time.
step() {
  local name=$1 limit=$(($2 * FACTOR)) begun code
  shift 2
  wanted "$name" || return 0
  local room=$(($(left) - 8))
  if ((room < 10)); then
    echo "{\"step\": \"$name\", \"code\": -1, \"seconds\": 0, \"limit\": $limit}" >>"$OUT/steps.jsonl"
    return 1
  fi
  ((limit > room)) && limit=$room
  begun=$(date +%s)
  echo "== $name (at most $limit s, $(left) s left)"
  timeout -k 5 -s TERM "$limit" "$@" >"$WORK/logs/$name.log" 2>&1
  code=$?
  tail -n 3 "$WORK/logs/$name.log" | cut -c1-200
  echo "{\"step\": \"$name\", \"code\": $code, \"seconds\": $(($(date +%s) - begun)), \"limit\": $limit}" >>"$OUT/steps.jsonl"
  keep
  return $code
}
probe() {  # probe NAME LIMIT STEP ARGUMENTS...
  local name=$1 limit=$2
  shift 2
  step "$name" "$limit" $PY -m tools.gpu_probe "$@" --device "$DEVICE" --work "$WORK" ${TINY:+--tiny}
}

about() {
  date -u; uname -a; nproc; free -g; df -h "$WORK"
  nvidia-smi; nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem,power.limit --format=csv
  command -v nvcc g++ cmake ninja compute-sanitizer ncu
  nvcc --version; g++ --version | head -1; cmake --version | head -1
  $PY -m pip list 2>/dev/null
  git log -1 --oneline 2>/dev/null
  lscpu | grep -E 'Model name|Flags' | cut -c1-200
}

build() {
  set -e
  if [[ $DEVICE == cuda ]]; then
    export UNIRANK_CUDA=ON UNIRANK_LINEINFO=ON
    # This device's architecture alone takes a seventh of the time.
    export CUDAARCHS=${CUDAARCHS:-$($PY -c 'import torch; print("%d%d-real" % torch.cuda.get_device_capability())')}
  else
    export UNIRANK_CUDA=OFF
  fi
  PATH="$(dirname "$(command -v "$PY")"):$PATH" CMAKE_BUILD_PARALLEL_LEVEL=$(nproc) \
    $PY -m pip install --no-build-isolation --no-deps --no-index -v -e .
  [[ $DEVICE == cpu ]] || $PY tools/gpu_installed.py
}

sanitized() {
  command -v compute-sanitizer >/dev/null || { echo "There is no compute-sanitizer here."; exit 0; }
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1  # else an index behind a tensor's end lies in the allocator's block
  local tool code=0
  for tool in memcheck racecheck; do
    echo "=== $tool"
    timeout -k 5 48 compute-sanitizer --tool $tool --error-exitcode 9 --print-limit 20 --kernel-regex kns=unirank \
      $PY -m tools.gpu_probe sanitize --work "$WORK" || code=$?
  done
  exit $code
}

counters() {
  command -v ncu >/dev/null || { echo "There is no ncu here."; exit 0; }
  local percent=avg.pct_of_peak_sustained_elapsed
  ncu --clock-control none --target-processes all --kernel-name 'regex:unirank' --launch-count 24 --csv \
    --metrics gpu__time_duration.sum,dram__throughput.$percent,sm__throughput.$percent,dram__bytes.sum \
    $PY -m tools.gpu_probe kernels --work "$WORK"
}
export -f about build sanitized counters

trap 'keep; rm -rf "$WORK"' EXIT
step about 15 bash -c about
step build 200 bash -c build || { [[ $DEVICE == cuda ]] && echo "The build failed; what follows says what the compositions do."; }
probe env 40 env
probe smoke 60 smoke
OMP_NUM_THREADS=4 probe parity 120 parity  # tiny matrices: many threads only get into each other's way
probe layers-7b 130 layers --shape 7b
probe solvers 90 solvers
# Parity ran the checks of the whole path already.
TESTS="tests/gpu"
[[ $DEVICE == cpu ]] && TESTS="tests/ops/test_libraries.py"
step tests 110 env UNIRANK_REQUIRE_CUDA=1 $PY -m pytest $TESTS -q -W default -W error::unirank.errors.UnirankWarning \
  -p no:cacheprovider -k 'not as_on_the_cpu' --junitxml "$OUT/junit.xml" --tb=short --maxfail=60
probe kernels 50 kernels
probe nan 40 nan
step sanitize 100 bash -c sanitized
probe profile 45 profile --shape 7b --trace "$OUT/trace.json.gz"
probe whole-1b 80 whole --shape 1b --windows 64
step ncu 60 bash -c counters
probe compositions 40 compositions
probe whole-7b 600 whole --shape 7b
[[ -f $OUT/trace.json.gz && $(stat -c %s "$OUT/trace.json.gz") -gt 15000000 ]] && rm -f "$OUT/trace.json.gz"
keep
cat "$OUT/summary.txt"
$PY tools/gpu_results.py --failed "$OUT"
