#!/usr/bin/env bash
# All that needs a GPU, in one command of nine minutes and without a network: builds the package for the GPU that is
# here, tests it, records what the GPU makes of the primitives, measures. What comes out is a folder to commit.
#
#   scripts/gpu_check.sh [--dry] [--seconds N] [--only STEP,STEP] [--output FOLDER] [WHEELS]
#
# WHEELS (or the variable of that name) is a folder with wheels of what this machine lacks of scikit-build-core,
# cython, cython-cmake, pybind11, ninja, hypothesis, pytest, ml_dtypes, fla-core; doctest.h may be there too. torch with
# CUDA, triton, numpy, cmake and nvcc are expected to be here. --dry goes through all steps without a GPU, on the
# package that is installed and, where FWP_CUDA_PLUGIN names a plugin of the emulator, on that; no figures.
#
# A step that fails or outlasts its share of the seconds is reported, and the next one runs. Exit status: 0 if none did.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

SKIPPED=77
PYTHON=${PYTHON:-python3}
HEADERS=(-std=c++17 -Icuda -Icpp/include)

skip() {
  echo "skipped: $*"
  exit $SKIPPED
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
  "$PYTHON" - <<'END'
import importlib.util
import sys

needed = ["numpy", "torch", "pytest", "hypothesis", "ml_dtypes", "scikit_build_core", "pybind11", "Cython", "cython_cmake"]
missing = [name for name in needed if importlib.util.find_spec(name) is None]
print("missing:", *missing or ["nothing"])
sys.exit(bool(missing))
END
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
  local chosen=(tests/test_gpu.py -k cuda)
  [ -z "$DRY" ] || chosen=(tests/test_gpu.py -k "cpu and (autograd or layouts)")
  [ -n "$DRY" ] || export FWP_GPU=required
  "$PYTHON" -m pytest -q -p no:cacheprovider "${chosen[@]}"
}

sanitizers() {
  local tool log bad=0
  command -v compute-sanitizer >/dev/null || skip "no compute-sanitizer here"
  for tool in memcheck racecheck synccheck; do
    log=$SCRATCH/$tool.log
    timeout 30 compute-sanitizer --tool "$tool" --error-exitcode 9 "$SCRATCH/device_cases" delta scalar >"$log" 2>&1
    case $? in
      0) ;;
      124) echo "$tool did not end in 30 s" ;;
      *)
        grep -q "Device not supported" "$log" && skip "compute-sanitizer does not support this device"
        bad=1
        ;;
    esac
    echo "-- $tool"
    tail -n 40 "$log"
  done
  return $bad
}

benchmark() {
  local options=()
  [ -z "$DRY" ] || options=(--dry --repeats 1)
  "$PYTHON" benchmarks/gpu.py --seconds $((LIMIT - 8)) --date "$DATE" --output "$REPORT" "${options[@]}"
}

# ---- one after the other ----

STEPS="machine:10 packages:30 build:150 goldens:25 cases:25 tests:70 sanitizers:60 benchmark:"

# Runs a step; its limit is its share, or all that is left. Adds a line to the summary.
step() {
  local name=$1 share=$2 start=$SECONDS left=$((END - SECONDS)) status said
  LIMIT=${share:+$((share * SECONDS_IN_ALL / 530))}
  LIMIT=${LIMIT:-$left}
  [ "$LIMIT" -le "$left" ] || LIMIT=$left
  export LIMIT
  echo "== $name" | tee -a "$REPORT/log.txt"
  if [ "$LIMIT" -le 0 ]; then
    said="NOT RUN: no time left"
  else
    timeout --kill-after=5 "$LIMIT" bash "$0" "step:$name" 2>&1 | tee -a "$REPORT/log.txt"
    status=${PIPESTATUS[0]}
    case $status in
      0) said=ok ;;
      "$SKIPPED") said="skipped: $(sed -n 's/^skipped: //p' "$REPORT/log.txt" | tail -n 1)" ;;
      124 | 137) said="STOPPED after $LIMIT s" ;;
      *) said="FAILED with status $status" ;;
    esac
  fi
  printf '%-11s %4d s  %s\n' "$name" $((SECONDS - start)) "$said" >>"$REPORT/summary.txt"
  [ "$said" = ok ] || [ "${said%%:*}" = skipped ]
}

if [[ ${1:-} == step:* ]]; then
  "${1#step:}"
  exit
fi

DRY="" SECONDS_IN_ALL=530 ONLY="" REPORT="" WHEELS=${WHEELS:-}
while [ $# -gt 0 ]; do
  case $1 in
    --dry) DRY=1 ;;
    --seconds) SECONDS_IN_ALL=$2 && shift ;;
    --only) ONLY=,$2, && shift ;;
    --output) REPORT=$2 && shift ;;
    -*) sed -n 's/^#   scripts/usage: scripts/p' "$0" >&2 && exit 2 ;;
    *) WHEELS=$1 ;;
  esac
  shift
done

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
REPORT=${REPORT:-benchmarks/results/$DATE-$([ -n "$DRY" ] && echo dry || echo "$GPU")-check}
mkdir -p "$REPORT"
rm -f "$REPORT/log.txt" "$REPORT/summary.txt"
REPORT=$(cd "$REPORT" && pwd)
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
