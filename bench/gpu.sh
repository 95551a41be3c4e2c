#!/usr/bin/env bash
# All that a machine with an NVIDIA GPU is needed for, in one call, in under nine minutes, without a network:
#
#     bench/gpu.sh [PYTHON]      # PYTHON: one with a CUDA build of torch >= 2.11, and what bdprune and its tests need
#
# builds the ops for this card, runs every test that uses it, runs each op under compute-sanitizer (memcheck and
# racecheck), and climbs the ladders. What happened goes to bench/results/gpu.txt with the hardware and the commit, the
# figures to bench/results/ladders-cuda.json, and all that each step printed to build/gpu. The card's settings are read,
# never changed. Exit code 0: all of it passed; 1: something failed (the rest still ran); 2: this machine cannot do it.
#
# STEP is one of build, tests, training, memcheck, racecheck, ladders, tables; all of them by default. Named ones add to
# the report. PATIENCE=N gives every step N times as long, for a machine that has other work.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3}
steps=" ${*:2} "
[ $# -gt 1 ] || steps=" build tests training memcheck racecheck ladders tables "
results=bench/results
report=$results/gpu.txt
logs=build/gpu
failures=0

cannot() {
  echo "bench/gpu.sh: $1" >&2
  exit 2
}

# step SECONDS NAME COMMAND...: runs it where it is asked for, at most that long, and notes how it went.
step() {
  local limit=$(($1 * ${PATIENCE:-1})) name=$2 start=$SECONDS code=0
  shift 2
  [[ $steps == *" $name "* ]] || return 0
  echo "== $name"
  timeout --signal=INT --kill-after=10 "$limit" "$@" >"$logs/$name.txt" 2>&1 || code=$?  # pytest then sums up
  tail -n 40 "$logs/$name.txt"
  [ "$code" -eq 0 ] || failures=$((failures + 1))
  tail -n 1 "$logs/$name.txt" >>"$report" # what pytest and the sanitizers counted
  echo "$name: $([ "$code" -eq 0 ] && echo passed || echo "FAILED with $code"), $((SECONDS - start)) s" | tee -a "$report"
}

command -v nvidia-smi >/dev/null || cannot "nvidia-smi was not found: there is no NVIDIA GPU here, or no driver."
nvidia-smi -L >/dev/null || cannot "nvidia-smi sees no GPU: check the driver."
command -v "$python" >/dev/null || cannot "$python was not found: give a Python with a CUDA build of torch."
"$python" -c 'import pytest, hypothesis, ninja, pybind11' ||
  cannot "install pytest, hypothesis, ninja and pybind11 for $python first."
"$python" -c 'import click, jinja2, msgspec, numpy, PIL, pyarrow, rich, safetensors' ||
  cannot "install what bdprune needs for $python first: the lists are in pyproject.toml."
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
  cannot "torch of $python does not see the GPU: install a CUDA build of torch that fits the driver."
# The toolkit that nvcc says it is: what lies on PATH may be a script elsewhere, and torch would look beside that.
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

# A kernel that reads where it must not spoils its whole process: where xdist is there, files go to several of them.
tests=("$python" -m pytest -v --tb=short --durations=10 -p no:cacheprovider -o faulthandler_timeout=30)
"$python" -c 'import xdist' 2>/dev/null && tests+=(-p xdist.plugin -n 6 --dist loadfile)

step 100 "build" "$python" setup.py build_ext --inplace
step 90 "tests" "${tests[@]}" tests/ops tests/cuda tests/scoring -k 'cuda and not emulated and not cuda_check'
step 60 "training" "${tests[@]}" tests/training tests/model tests/scan/test_stacks.py -k cuda
for tool in memcheck racecheck; do
  step 50 "$tool" "$sanitizer" --tool "$tool" --kernel-regex kns=bdprune --error-exitcode 3 "$python" -m bench.gpu_ops
done
step 175 "ladders" "$python" -m bench.ladders --device cuda --threads 1 --minutes 2.2 --out "$results/ladders-cuda.json"
step 15 "tables" "$python" -m bench.ladders.report "$results"/ladders-*.json --precision "$results"/precision-*.json

echo "$failures steps failed, $SECONDS s in all" | tee -a "$report"
[ "$failures" -eq 0 ]
