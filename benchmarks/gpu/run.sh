#!/usr/bin/env bash
# Run the kit on a card: correctness (A), the headline and speed (B), several rates (C), and, where
# there is time, profiles and tests (D).
#
#   python3 benchmarks/gpu/pack.py         # before, on any CPU: makes benchmarks/gpu/load/
#   OUT=out bash benchmarks/gpu/run.sh A   # then B, then C; or several in one call
#
# Every stage is a process of its own with a time limit. None stops the others. The status is 1 if
# one failed or had no time. GPU_REHEARSAL=1 runs everything small on the CPU. README.md names the
# other variables.
set -u
cd "$(dirname "$0")/../.."
refuse() {
  echo "$1" >&2
  exit 2
}
[ $# -gt 0 ] || refuse "no part: give A, B, C or D"
for letter in "$@"; do
  [[ "$letter" =~ ^[ABCD]$ ]] || refuse "unknown part $letter: give A, B, C or D"
done
LOAD="${GPU_LOAD:-benchmarks/gpu/load}"
[ -f "$LOAD/site.tar.xz" ] || refuse "no load in $LOAD: run pack.py first"
default=out
[ "${GPU_REHEARSAL:-}" = 1 ] && default=out-rehearsal
export OUT="${OUT:-$default}" PYTHONUNBUFFERED=1 TQDM_DISABLE=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
mkdir -p "$OUT"
exec > >(tee -a "$OUT/log.txt") 2>&1
PYTHON="${PYTHON:-python3}"
SITE="$("$PYTHON" benchmarks/gpu/unpack.py "${GPU_SITE:-${TMPDIR:-/tmp}/saesub-gpu-site}")" ||
  refuse "the load cannot be unpacked: copy it again"
export PYTHONPATH="$SITE:$PWD:$PWD/benchmarks/contenders${PYTHONPATH:+:$PYTHONPATH}"

budget=0 # seconds that are left to the letter at hand
failed=0
stage() { # seconds, script, arguments
  local limit=$(($1 < budget ? $1 : budget)) start=$SECONDS status
  shift
  if ((limit < 10)); then
    echo "=== left out, no time: $*"
    failed=1
    return
  fi
  echo "=== $* (at most $limit s)"
  GPU_SECONDS=$limit timeout -k 5 "$limit" "$PYTHON" "benchmarks/gpu/$1" "${@:2}"
  status=$?
  ((status == 0)) || failed=1
  budget=$((budget - SECONDS + start))
  echo "=== $* ended with $status after $((SECONDS - start)) s"
}

for letter in "$@"; do
  case "$letter" in
    A)
      budget=210
      stage 90 check.py kernels
      stage 60 check.py steps
      stage 60 api.py
      ;;
    B)
      budget=450
      stage 70 harvest.py
      stage 290 headline.py
      stage 70 speed.py ours
      stage 60 speed.py sparsify
      ;;
    C)
      budget=${GPU_BUDGET_C:-170}
      stage "$budget" headline.py rates
      ;;
    D)
      budget=300
      stage 60 check.py profiles
      stage 240 check.py tests
      ;;
  esac
  if command -v nvidia-smi >/dev/null; then
    nvidia-smi --query-gpu=name,driver_version,memory.used,clocks.sm,temperature.gpu --format=csv,noheader
  fi
done
exit "$failed"
