#!/usr/bin/env bash
# Builds on a GPU machine, runs the gpu tests and the benchmarks with their peers, and leaves JSON. No network is needed.
#
#   bench/gpu_check.sh                everything, one shard after the other
#   bench/gpu_check.sh --only rope3d  one shard: build, its gpu tests, its benchmark (under 8 minutes on one H200)
#
# Results go to $OUT if set, else to bench/results/DEVICE/. What a first run has to confirm stands in bench/README.md.
set -uo pipefail
cd "$(dirname "$0")/.."
only=""
[ "${1:-}" = "--only" ] && only="${2:?--only needs the name of an op}"
out="${OUT:-}"
status=0
step() { echo "== $*"; "$@" || { echo "== FAILED ($?): $*"; status=1; }; }

nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,memory.total --format=csv,noheader || exit 2
step env MAX_JOBS="${MAX_JOBS:-8}" EVAAT_FAST_CUDA_ARCHS="${EVAAT_FAST_CUDA_ARCHS:-$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -1)}" \
  python3 -m pip install -q --no-build-isolation --no-deps -e .
step python3 -m evaat_fast doctor

for op in rope3d attn pairwise patchify; do
  [ -n "$only" ] && [ "$only" != "$op" ] && continue
  step python3 -m pytest -q -p no:cacheprovider -m gpu tests/test_"$op"*.py ${out:+--junitxml="$out/$op.xml"}
  # Every attention of others three ways at every shape takes most of an hour, for whoever has one: python bench/attn.py
  brief=()
  [ "$op" = attn ] && brief=(--seconds 0.1 --skip "compile(" "eager rope + sdpa " "eager rope + f" "eager rope + x")
  [ -f "bench/$op.py" ] && step python3 "bench/$op.py" --device cuda "${brief[@]}" $([ -n "$out" ] && echo --json "$out/$op.json" || echo --record)
done
echo "== gpu_check ends with status $status"
exit $status
