# Sourced by the scripts beside it: their arguments, and what they share. A script
# sets `takes` to the names of those that are its own, given as --NAME=VALUE.
#   --size=cpu     half an hour on two quiet cores, an hour of dnc_log and table2,
#                  many of all; without a GPU the default
#   --size=full    for a GPU; the default where there is one
#   --size=smoke   a minute or two: whether all runs, not what it finds
#   PYTHON         one that has zorn_jax[plot,text] (python)
#   ZORN_RUNS      folder in which NAME-SIZE is made (runs/paper)
# A script that was interrupted goes on where it was when it is started again, and
# ends with report.html there.
set -euo pipefail
trap 'exit 130' INT TERM
from=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

fail() {
  echo "error: $1" >&2
  exit 1
}

size=
declare -A given=()
for arg; do
  name=${arg%%=*}
  case $arg in
    --size=*)
      size=${arg#*=}
      [[ $size =~ ^(cpu|full|smoke)$ ]] ||
        fail "unknown argument $arg. Write --size=cpu, full or smoke."
      ;;
    --?*=?*)
      [[ " ${takes:-} " == *" ${name#--} "* ]] ||
        fail "unknown argument $name. This script takes --size ${takes:-}."
      given[${name#--}]=${arg#*=}
      ;;
    *) fail "unknown argument $arg. Arguments are --NAME=VALUE." ;;
  esac
done
if [[ -z $size ]]; then
  size=cpu
  if nvidia-smi -L >/dev/null 2>&1; then size=full; fi
fi
at_once=()  # One run per GPU.
if [[ $size == cpu ]]; then at_once=(--at_once=2); fi
# PATH: as it was meant where the script was called.
absolute() {
  if [[ $1 == /* ]]; then echo "$1"; else echo "$from/$1"; fi
}

if [[ ${ZORN_RUNS:-} ]]; then ZORN_RUNS=$(absolute "$ZORN_RUNS"); fi
if [[ ${PYTHON:-} == */* ]]; then PYTHON=$(absolute "$PYTHON"); fi
work=${ZORN_RUNS:-runs/paper}/$(basename "$0" .sh)-$size
python=${PYTHON:-python}
mkdir -p "$work"
# Runs that differ in the seed alone share what is compiled.
: "${JAX_COMPILATION_CACHE_DIR:=$(realpath "$work")/cache}"
export JAX_COMPILATION_CACHE_DIR

# Hidden size and heads of the LSTMs.
declare -A shape=([tiny]="240 12" [small]="1600 32" [medium]="9600 64"
  [large]="66000 220" [xlarge]="297500 350" [xxlarge]="1000000 1000")

zorn() {
  "$python" -m "zorn_jax.cli.$1" "${@:2}"
}

# NAME CONFIG ARGUMENT...: a grid of runs. One that fails is said and passed by.
sweep() {
  echo "== $1"
  zorn sweep --workdir="$work/$1" --config="configs/$2" "${at_once[@]}" \
    "${@:3}" || echo "$1: not all runs are complete" >&2
}

# CASE PROGRAM CONFIG ARGUMENT...: time and memory of a step. One that fails is
# said and passed by.
measure() {
  "$python" scripts/paper/measure.py --output="$work/steps.json" \
    --case="$1" --program="$2" --config="configs/$3" "${@:4}" ||
    echo "$1, $2: not measured" >&2
}

# The arguments that name an LSTM of `shape`.
lstm() {
  local hidden heads
  read -r hidden heads <<<"${shape[$1]}"
  echo "--config.model.hidden_size=$hidden --config.model.num_heads=$heads"
}

# FILE...: the page of all sweeps in `roots` that have begun, and of these
# benchmarks.
roots=("$work")
report() {
  local arguments=() root path
  for root in "${roots[@]}"; do
    for path in "$root"/*/; do
      if compgen -G "$path*/metrics.jsonl" >/dev/null; then
        arguments+=(--workdir="${path%/}")
      fi
    done
  done
  for path; do
    if [[ -e $path ]]; then arguments+=(--bench="$path"); fi
  done
  zorn report "${arguments[@]}" --output="$work/report.html"
}
