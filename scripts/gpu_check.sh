#!/usr/bin/env bash
# All that needs a GPU, in one command of nine minutes and without a network: builds the package for the GPU that is
# here, tests it, records what the GPU makes of the primitives, measures. What comes out is a folder to commit.
#
#   scripts/gpu_check.sh [--dry] [--seconds N] [--only STEP,STEP] [--output FOLDER] [WHEELS]
#   scripts/gpu_check.sh --collect WHEELS [PYTHON]
#
# torch with CUDA, triton, numpy, cmake, nvcc and g++ are expected to be here. Of the other packages (gpu_packages.py
# has them) those may be missing that are in WHEELS, or the folder that the variable of that name says. It is filled by
# --collect on a machine with a network, for the Python of this one: 3.12, say. --dry goes through all steps without a
# GPU, on the package that is installed and, where FWP_CUDA_PLUGIN names a plugin of the emulator, on that; no figures.
#
# A step that fails or outlasts its share of the seconds is reported, and the next one runs. Exit status: 0 if none did.
set -uo pipefail

# A path that is the caller's, seen from the project's root too; for a program's name that is one on the path.
CALLER=$PWD
absolute() {
  case $1 in
    "" | /*) echo "$1" ;;
    *) echo "$CALLER/$1" ;;
  esac
}
program() {
  case $1 in
    */*) absolute "$1" ;;
    *) echo "$1" ;;
  esac
}

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
SCRIPT=$PWD/scripts/gpu_check.sh
SKIPPED=77
PYTHON=$(program "${PYTHON:-python3}")
HEADERS=(-std=c++17 -Icuda -Icpp/include)

usage() {
  sed -n 's/^#   scripts/usage: scripts/p' "$SCRIPT" >&2
  exit 2
}

skip() {
  echo "skipped: $*"
  exit "$SKIPPED"
}

# ---- the steps, each in a process of its own; their seconds are shares of SECONDS_IN_ALL ----

machine() {
  uname -srm
  nproc
  nvcc --version | tail -n 2
  "$PYTHON" --version
  "$PYTHON" - <<'END'
import importlib.metadata as metadata

for name in ("numpy", "torch", "triton", "jax", "cupy-cuda13x"):
    try:
        print(name, metadata.version(name))
    except metadata.PackageNotFoundError:
        print(name, "is not here")
END
  [ -n "$DRY" ] || nvidia-smi
}

packages() {
  if compgen -G "$WHEELS/*.whl" >/dev/null; then
    "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target "$SITE" "$WHEELS"/*.whl || return
  fi
  "$PYTHON" scripts/gpu_packages.py check ${DRY:+triton}
}

# The package, for this GPU only and without the level of the widest vectors: it compiles longest.
build() {
  [ -z "$DRY" ] || { "$PYTHON" -m fwp_core info; return; }
  CMAKE_BUILD_PARALLEL_LEVEL=$(nproc) CUDAFLAGS=-lineinfo "$PYTHON" -m pip install --quiet --no-index --no-deps \
    --no-build-isolation --upgrade --target "$SITE" -C build-dir="$SCRATCH/build" -C cmake.define.FWP_CUDA=ON \
    -C cmake.define.CMAKE_CUDA_ARCHITECTURES="$ARCHITECTURE" -C "cmake.define.FWP_ISA_LEVELS=base;v3" . || return
  (cd "$SCRATCH" && "$PYTHON" -c "
import fwp_core as fwp
fwp.show_config()
assert fwp.has_cuda()")
}

goldens() {
  if [ -z "$DRY" ]; then
    nvcc "${HEADERS[@]}" -arch="sm_$ARCHITECTURE" tests/cuda/record_goldens.cu -o "$SCRATCH/record_goldens" || return
    mkdir -p tests/cuda/goldens
    "$SCRATCH/record_goldens" "tests/cuda/goldens/$GPU.txt" || return
    cp "tests/cuda/goldens/$GPU.txt" "$REPORT/goldens.txt"
  fi
  mkdir -p "$SCRATCH/include/doctest"
  cp "$WHEELS/doctest.h" "$SCRATCH/include/doctest" 2>/dev/null || [ -e /usr/include/doctest/doctest.h ] ||
    skip "no doctest.h to replay them with; the C++ tests of other machines do"
  g++ -O1 "${HEADERS[@]}" -I"$SCRATCH/include" -DFWP_GOLDENS='"tests/cuda/goldens"' \
    -DDOCTEST_CONFIG_IMPLEMENT_WITH_MAIN tests/cuda/test_goldens.cpp cuda/simt/*.cpp -o "$SCRATCH/test_goldens" &&
    "$SCRATCH/test_goldens"
}

# The C interface. Builds the program that the sanitizers run, too.
cases() {
  local folder compiler words=()
  folder=$(cd "$SCRATCH" && "$PYTHON" -c "
import pathlib, fwp_core
print(next(pathlib.Path(fwp_core._core.__file__).parent.rglob('libfwp_core.so')).parent)") || return
  compiler=(nvcc -x cu -lineinfo -arch="sm_$ARCHITECTURE" -Xlinker)
  if [ -n "$DRY" ]; then
    compiler=(g++ -O1 -Xlinker) words=(T3 scalar)
  fi
  "${compiler[@]}" "-rpath=$folder" "${HEADERS[@]}" tests/cuda/device_cases.cpp -o "$SCRATCH/device_cases" \
    -L"$folder" -lfwp_core || return
  [ -z "$DRY" ] || [ -n "${FWP_CUDA_PLUGIN:-}" ] || skip "FWP_CUDA_PLUGIN names no emulated back end"
  "$SCRATCH/device_cases" "${words[@]}"
}

tests() {
  local chosen=(tests/test_{gpu,cuda_torch,cuda_jax,cuda_cupy}.py -k "not cpu") log=$SCRATCH/tests.log
  [ -z "$DRY" ] || chosen=(tests/test_gpu.py -k "cpu and (layouts or beside)")
  [ -n "$DRY" ] || export FWP_GPU=required XLA_PYTHON_CLIENT_PREALLOCATE=false
  "$PYTHON" -c "import xdist" 2>/dev/null && chosen+=(-n 4)
  "$PYTHON" -m pytest -q -p no:cacheprovider "${chosen[@]}" | tee "$log" || return
  ! grep "^SKIPPED.*no GPU" "$log"  # by modules that do not know of FWP_GPU
}

# Each tool has an equal part of the seconds that are left when it starts; the summary says what came of each. What did
# not end has shown nothing, so that it counts as a failure.
sanitizers() {
  local tools=("memcheck --leak-check full" initcheck synccheck racecheck) i tool log seconds said
  local begin=$SECONDS results=() bad=0 shown=0
  command -v compute-sanitizer >/dev/null || skip "no compute-sanitizer here"
  for i in "${!tools[@]}"; do
    tool=${tools[i]%% *}
    log=$SCRATCH/$tool.log
    seconds=$(((LIMIT - 3 - (SECONDS - begin)) / (${#tools[@]} - i)))
    [ "$seconds" -ge 1 ] || seconds=1
    # shellcheck disable=SC2086  # a tool's name and its options are words
    timeout --kill-after=1 "$seconds" compute-sanitizer --tool ${tools[i]} --error-exitcode 9 \
      "$SCRATCH/device_cases" delta scalar >"$log" 2>&1
    case $? in
      0) said=ok ;;
      124 | 137) said="timed out after $seconds s" ;;
      *) said=failed ;;
    esac
    ! grep -q "Device not supported" "$log" || said="not supported"
    case $said in
      ok) shown=1 ;;
      "not supported") ;;
      *) bad=1 ;;
    esac
    echo "-- $tool: $said"
    tail -n 40 "$log"
    results+=("$tool $said")
    (IFS=, && echo "${results[*]}") | sed 's/,/, /g' >"$SCRATCH/said"
  done
  [ $((bad + shown)) -gt 0 ] || skip "compute-sanitizer does not support this device"
  return "$bad"
}

benchmark() {
  local options=()
  [ -z "$DRY" ] || options=(--dry --repeats 1)
  "$PYTHON" benchmarks/gpu.py --seconds $((LIMIT - 8)) --date "$DATE" --output "$REPORT" "${options[@]}"
}

# ---- one after the other ----

STEPS="machine:10 packages:30 build:140 goldens:40 cases:30 tests:90 sanitizers:70 benchmark:"

# Runs a step; its limit is its share, or all that is left. Adds a line to the summary, with the words that the step left
# in $SCRATCH/said. Fails if the step did.
step() {
  local name=$1 share=$2 start=$SECONDS left=$((END - SECONDS)) status=0 said
  LIMIT=${share:+$((share * SECONDS_IN_ALL / 530))}
  LIMIT=${LIMIT:-$left}
  [ "$LIMIT" -le "$left" ] || LIMIT=$left
  export LIMIT
  rm -f "$SCRATCH/said"
  echo "== $name" | tee -a "$REPORT/log.txt"
  if [ "$LIMIT" -le 0 ]; then
    said="NOT RUN: no time left" status=1
  else
    timeout --kill-after=5 "$LIMIT" bash "$SCRIPT" "step:$name" 2>&1 | tee -a "$REPORT/log.txt"
    status=${PIPESTATUS[0]}
    case $status in
      0) said=ok ;;
      "$SKIPPED") said="skipped: $(sed -n 's/^skipped: //p' "$REPORT/log.txt" | tail -n 1)" ;;
      124 | 137) said="STOPPED after $LIMIT s" ;;
      *) said="FAILED with status $status" ;;
    esac
    [ "$status" -eq "$SKIPPED" ] || [ ! -s "$SCRATCH/said" ] || said+=": $(cat "$SCRATCH/said")"
  fi
  printf '%-11s %4d s  %s\n' "$name" $((SECONDS - start)) "$said" >>"$REPORT/summary.txt"
  [ "$status" -eq 0 ] || [ "$status" -eq "$SKIPPED" ]
}

if [[ ${1:-} == step:* ]]; then
  "${1#step:}"
  exit
fi
if [ "${1:-}" = --collect ]; then
  [ $# -gt 1 ] || usage
  "$PYTHON" scripts/gpu_packages.py collect "$(absolute "$2")" "${@:3}"
  exit
fi

DRY="" SECONDS_IN_ALL=530 ONLY="" REPORT="" WHEELS=${WHEELS:-}
while [ $# -gt 0 ]; do
  case $1 in
    --dry) DRY=1 ;;
    --seconds) SECONDS_IN_ALL=$2 && shift ;;
    --only) ONLY=,$2, && shift ;;
    --output) REPORT=$2 && shift ;;
    -*) usage ;;
    *) WHEELS=$1 ;;
  esac
  shift
done
WHEELS=$(absolute "$WHEELS") REPORT=$(absolute "$REPORT")
[ -z "$WHEELS" ] || [ -d "$WHEELS" ] || { echo "no folder $WHEELS" >&2 && exit 2; }
[ -z "${FWP_CUDA_PLUGIN:-}" ] || FWP_CUDA_PLUGIN=$(absolute "$FWP_CUDA_PLUGIN")

END=$((SECONDS + SECONDS_IN_ALL))
DATE=$(date +%F)
SCRATCH=$(mktemp -d)
trap 'rm -rf "$SCRATCH"' EXIT
SITE=$SCRATCH/site
GPU=none ARCHITECTURE=0
if [ -z "$DRY" ]; then
  export PYTHONPATH="$SITE${PYTHONPATH:+:$PYTHONPATH}"
  GPU=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1 | tr '[:upper:]' '[:lower:]' | tr -cs 'a-z0-9\n' -)
  ARCHITECTURE=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d .)
  [ -n "$ARCHITECTURE" ] || { echo "no GPU here" >&2 && exit 1; }
fi
REPORT=${REPORT:-$PWD/benchmarks/results/$DATE-$([ -n "$DRY" ] && echo dry || echo "$GPU")-check}
mkdir -p "$REPORT"
rm -f "$REPORT/log.txt" "$REPORT/summary.txt"
export DRY SECONDS_IN_ALL WHEELS DATE SCRATCH SITE GPU ARCHITECTURE REPORT PYTHON
export PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1

good=0
for entry in $STEPS; do
  name=${entry%:*}
  [ -z "$ONLY" ] || [[ $ONLY == *,$name,* ]] || continue
  step "$name" "${entry#*:}" || good=1
done
echo "== summary"
cat "$REPORT/summary.txt"
exit $good
