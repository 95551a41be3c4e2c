#!/usr/bin/env bash
# Runs everything that needs an NVIDIA GPU, in one call, in under nine minutes, without a network:
#
#     bench/gpu.sh [PYTHON [STEP...]]
#
# PYTHON needs a CUDA build of torch >= 2.11 and the requirements of bdprune and its tests (default: python3). STEP is one
# of build, tests, training, memcheck, racecheck, speed, page (default: all, with a new report; named steps append to it).
#
#     build                 compiles the ops for this GPU
#     tests, training       run every test that uses the GPU
#     memcheck, racecheck   run each op under compute-sanitizer
#     speed, page           run the speed benchmarks and write docs/evaluation/speed.md
#
# The report with hardware and commit goes to bench/results/gpu.txt, the figures to bench/results/speed-cuda.json, and the
# output of each step to build/gpu. The script reads the settings of the GPU and never changes them.
# PATIENCE=N multiplies every time limit by N, for a busy machine.
# Exit codes: 0: every step passed; 1: a step failed (the others still ran); 2: this machine cannot run the steps.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3}
steps=" ${*:2} "
[ $# -gt 1 ] || steps=" build tests training memcheck racecheck speed page "
results=bench/results
report=$results/gpu.txt
logs=build/gpu
failures=0

cannot() {
  echo "bench/gpu.sh: $1" >&2
  exit 2
}

# step SECONDS NAME COMMAND...: runs a chosen step with a time limit and reports its result.
step() {
  local limit=$(($1 * ${PATIENCE:-1})) name=$2 start=$SECONDS code=0
  shift 2
  [[ $steps == *" $name "* ]] || return 0
  echo "== $name"
  timeout --signal=INT --kill-after=10 "$limit" "$@" >"$logs/$name.txt" 2>&1 || code=$? # pytest still prints its summary
  tail -n 40 "$logs/$name.txt"
  [ "$code" -eq 0 ] || failures=$((failures + 1))
  tail -n 1 "$logs/$name.txt" >>"$report" # the counts of pytest and the sanitizers
  echo "$name: $([ "$code" -eq 0 ] && echo passed || echo "FAILED with $code"), $((SECONDS - start)) s" | tee -a "$report"
}

command -v nvidia-smi >/dev/null || cannot "nvidia-smi was not found: this machine has no NVIDIA GPU or no driver."
nvidia-smi -L >/dev/null || cannot "nvidia-smi found no GPU: check the driver."
command -v "$python" >/dev/null || cannot "$python was not found: give a Python with a CUDA build of torch."
"$python" -c 'import pytest, hypothesis, ninja' ||
  cannot "install pytest, hypothesis and ninja for $python first."
"$python" -c 'import click, jinja2, msgspec, numpy, PIL, pyarrow, rich, safetensors' ||
  cannot "install the requirements of bdprune for $python first: pyproject.toml lists them."
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
  cannot "torch of $python finds no GPU: install a CUDA build of torch that fits the driver."
# Ask nvcc for its toolkit: the nvcc on PATH may be a script elsewhere, and torch would search next to it.
if [ -z "${CUDA_HOME:-}" ] && command -v nvcc >/dev/null; then
  top=$(nvcc --dryrun -x cu /dev/null 2>&1 | sed -n 's/^#\$ TOP=//p') && [ -d "$top/include" ] &&
    CUDA_HOME=$(cd "$top" && pwd) && export CUDA_HOME
fi
nvcc=$("$python" -c 'from torch.utils.cpp_extension import CUDA_HOME; print(CUDA_HOME or "")' 2>/dev/null)/bin/nvcc
[ -x "$nvcc" ] || cannot "nvcc was not found: put a CUDA toolkit on PATH or in CUDA_HOME."
sanitizer=$(command -v compute-sanitizer || echo "$(dirname "$nvcc")/compute-sanitizer")

export FORCE_CUDA=1 BDPRUNE_BACKEND=native PYTHONUNBUFFERED=1 PYTEST_DISABLE_PLUGIN_AUTOLOAD=1
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
TORCH_CUDA_ARCH_LIST=$("$python" -c 'import torch; print("{}.{}".format(*torch.cuda.get_device_capability()))')
export TORCH_CUDA_ARCH_LIST
mkdir -p "$results" "$logs"
{
  echo "commit $(git rev-parse HEAD 2>/dev/null || echo unknown)$(git diff --quiet HEAD 2>/dev/null || echo ', with changes')"
  date -u +'%Y-%m-%d %H:%M UTC'
  nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm,clocks.max.mem,power.limit --format=csv
  "$python" -c 'import torch; print("torch", torch.__version__, "CUDA", torch.version.cuda)'
  "$nvcc" --version | tail -n 2
} >"$report.head"
[ $# -gt 1 ] || rm -f "$report"
cat "$report.head" >>"$report" && rm "$report.head"

# An illegal memory access breaks its whole process, so xdist (if installed) runs the files in several.
tests=("$python" -m pytest -v --tb=short --durations=10 -p no:cacheprovider -o faulthandler_timeout=30)
"$python" -c 'import xdist' 2>/dev/null && tests+=(-p xdist.plugin -n 6 --dist loadfile)

step 100 "build" "$python" setup.py build_ext --inplace
step 90 "tests" "${tests[@]}" tests/ops tests/cuda -k 'cuda and not emulated and not cuda_check'
loops=(tests/loops tests/runtime tests/model tests/fleet/executors/test_stack.py tests/zoo/test_measuring.py)
step 60 "training" "${tests[@]}" "${loops[@]}" -k cuda
for tool in memcheck racecheck; do
  step 50 "$tool" "$sanitizer" --tool "$tool" --kernel-regex kns=bdprune --error-exitcode 3 "$python" -m bench.gpu_ops
done
step 175 "speed" "$python" -m bench.speed --device cuda --threads 1 --minutes 2.2 --out "$results/speed-cuda.json"
step 15 "page" "$python" -m bench.speed.report

echo "$failures steps failed, $SECONDS s in all" | tee -a "$report"
[ "$failures" -eq 0 ]
