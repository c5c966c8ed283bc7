#!/usr/bin/env bash
# One call on a GPU machine, most important first, each result written as soon as it is there. No network is needed.
#
#   bench/gpu_check.sh [--minutes M] [--only OP] [--lab]
#
#   --minutes M   end within M minutes (9 by default), skipping what does not fit
#   --only OP     rope3d, attn, norm, pairwise or patchify: only its tests and its benchmark; of attn first, in four minutes,
#                 every kernel against float64 and what bench/decide.py decides by
#   --lab         bench/lab.py right after the smoke test; without it, last
#
# In this order: build, what `auto` serves (tests/test_gpu_smoke.py), the first shapes of each benchmark, the gpu tests, the
# demo, the lab, more shapes, the largest batches. A failing test is named when it fails. JSON goes to $OUT if set, else to
# bench/results/DEVICE/; the log, the tests' outcomes and the lab to $OUT or build/gpu_check/. A tree without git:
# EVAAT_FAST_COMMIT=abc1234 names it.
set -uo pipefail
cd "$(dirname "$0")/.."
minutes=9 only="" lab=""
while [ $# -gt 0 ]; do
  case "$1" in
    --minutes) minutes="${2:?--minutes needs a number}"; shift ;;
    --only) only="${2:?--only needs the name of an op}"; shift ;;
    --lab) lab=1 ;;
    *) sed -n '2,14s/^# \{0,1\}//p' "$0"; exit 2 ;;
  esac
  shift
done
ops=(rope3d attn norm pairwise patchify)
[ -z "$only" ] || ops=("$only")
[ "$(nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,memory.total --format=csv,noheader)" ] || exit 2
limit=$(python3 -c "import sys; print(int(60 * float(sys.argv[1])) - 15)" "$minutes") || exit 2 # 15 s to stop what runs
logs="${OUT:-build/gpu_check}"
mkdir -p "$logs"
rm -f "$logs/tests.tsv"
exec 3>&1 4>&2 > >(exec tee "$logs/gpu_check.log") 2>&1
tee_pid=$!
export PYTHONUNBUFFERED=1
passed=() failed=() skipped=()

# step NAME NEEDS MOST COMMAND...: runs it for at most MOST seconds, unless fewer than NEEDS are left.
step() {
  local name=$1 needs=$2 most=$3 left=$((limit - SECONDS)) began=$SECONDS status
  shift 3
  if ((left < needs)); then
    skipped+=("$name ($left s left of the $needs that it needs)")
    echo "== $SECONDS s: skipped: $name, $left s are left"
    return 0
  fi
  ((most < left)) || most=$left
  echo "== $SECONDS s: $name, at most $most s"
  timeout --signal=INT --kill-after=8 "$most" "$@"
  status=$?
  case $status in
    0) passed+=("$name ($((SECONDS - began)) s)") ;;
    124 | 137) failed+=("$name (stopped after $most s)") ;;
    *) failed+=("$name (status $status after $((SECONDS - began)) s)") ;;
  esac
  return $status
}

# tests NAME MOST ARGUMENTS...: pytest in 12 processes; no test is begun in the last 25 s.
tests() {
  local name=$1 most=$2 left=$((limit - SECONDS))
  shift 2
  ((most < left)) || most=$left
  step "$name" 30 "$most" env OMP_NUM_THREADS=2 PYTHONPATH="$PWD/bench" AT_ONCE_TSV="$logs/tests.tsv" \
    AT_ONCE_UNTIL=$(($(date +%s) + most - 25)) python3 $safe -m pytest -q -rfE --tb=short -p no:cacheprovider -p at_once \
    --timeout 200 "${parallel[@]}" -m "gpu and not slow" "$@"
}

# bench OP SECONDS ARGUMENTS...: begins no case after so many seconds.
bench() {
  local op=$1 seconds=$2
  shift 2
  [ -f "bench/$op.py" ] || return 0
  # Every attention of others three ways, and Inductor's compile times, are for whoever has an hour: python bench/OP.py
  step "bench $op $*" 20 $((seconds + 30)) python3 "bench/$op.py" --device cuda --seconds 0.12 --budget "$seconds" \
    --json "$results/$op.json" "$@" --skip "compile(" "flex_attention" "sdpa math" "sdpa efficient" "eager rope + sdpa " \
    "eager rope + f" "eager rope + x" "eager rope + c" "quack"
}

nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,memory.total --format=csv,noheader
arch=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -1)
[ "$arch" != 9.0 ] || arch=9.0a
step build 30 150 env MAX_JOBS="${MAX_JOBS:-$(nproc)}" EVAAT_FAST_CUDA_ARCHS="${EVAAT_FAST_CUDA_ARCHS:-$arch}" \
  python3 -m pip install -q --no-build-isolation --no-deps -e .
step doctor 10 40 python3 -m evaat_fast doctor
safe=$(python3 -c 'import sys; print("-P" if sys.version_info >= (3, 11) else "")') # the folder kernels/ is not for sys.path
parallel=()
if python3 -c "import xdist"; then parallel=(-n 12 --dist load --maxschedchunk 1); fi # one by one, in order
results="${OUT:-bench/results/$(cd bench && python3 -c 'import harness; print(harness.slug(harness.environment("cuda")))')}"

if [ "$only" = attn ]; then # who serves: in four minutes, the build included
  tests "attention that decides" 110 tests/test_attn_decides.py tests/test_attn_sm90.py
  decision="$logs/attn-decision.json"
  step "bench attn --decide" 20 75 python3 bench/attn.py --decide --device cuda --seconds 0.12 --budget 45 --json "$decision"
  [ ! -f "$decision" ] || step decision 5 15 python3 bench/decide.py "$decision"
fi
tests smoke 90 tests/test_gpu_smoke.py
[ -z "$lab" ] || step lab 30 120 python3 bench/lab.py --budget 90 --json "$logs/lab.json"
for op in "${ops[@]}"; do
  case $op in
    rope3d) bench rope3d 30 --first 2 ;;
    attn) bench attn 60 --first 2 ;;
    norm) bench norm 30 --first 3 ;;
    pairwise) bench pairwise 40 --first 6 ;;
  esac
done
train=(python3 bench/train.py --first 1 --skip compiled --json "$results/train.json")
if [ -z "$only" ]; then # a step of each stack that needs no compiler: 30 s; then they are profiled
  step "bench train" 45 90 "${train[@]}" --seconds 1 --budget 60 --where
fi
if [ -n "$only" ]; then
  tests "tests of $only" 300 tests/test_"$only"*.py
else # only files that have such tests: each of the processes imports them all
  tests tests 250 $(grep -l "mark\.gpu" tests/test_*.py | grep -v test_gpu_smoke)
fi
if [ -z "$only" ]; then
  missing=$(python3 -c '
import importlib.util
wanted = "decord av tokenizers ftfy regex tqdm matplotlib jinja2"
print(*(m for m in wanted.split() if importlib.util.find_spec(m) is None))')
  if [ -z "$missing" ]; then
    step demo 90 150 python3 -m evaat_fast demo --quick --out build/gpu_check/demo
  else
    skipped+=("demo (not installed: $missing)")
  fi
fi
[ -n "$lab" ] || [ -n "$only" ] || step lab 40 90 python3 bench/lab.py --budget 60 --json "$logs/lab.json"
for op in "${ops[@]}"; do bench "$op" $((limit - SECONDS > 90 ? 60 : limit - SECONDS - 30)) --append; done
if [ -z "$only" ]; then # adds to the rows that are there, and begins no batch after the budget
  step "largest batches" 40 100 "${train[@]}" --append --largest --budget $((limit - SECONDS > 100 ? 80 : limit - SECONDS - 20))
fi
[ -n "${OUT:-}" ] || step plots 5 30 python3 bench/plot.py

echo "== $SECONDS s: gpu_check ends"
printf '== passed: %s\n' "${passed[@]}"
[ ${#skipped[@]} = 0 ] || printf '== skipped: %s\n' "${skipped[@]}"
[ ${#failed[@]} = 0 ] || printf '== FAILED: %s\n' "${failed[@]}"
sed -n 's/^  \(.*\) FAIL: /== FAILED check: \1: /p' "$logs/gpu_check.log" | cut -c1-240 | head -30
[ ! -f "$logs/tests.tsv" ] || sed -n 's/^failed/== FAILED test:/p' "$logs/tests.tsv"
exec 1>&3 2>&4
for _ in 1 2 3 4 5; do kill -0 "$tee_pid" 2>/dev/null && sleep 0.2; done # until the log is whole
exit $((${#failed[@]} > 0))
