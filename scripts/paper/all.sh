#!/usr/bin/env bash
# The runs of docs/report.md, and the report: many hours on two cores.
#   scripts/paper/all.sh [--size=cpu|full|smoke]     (see common.sh)
. "$(dirname "$0")/common.sh"

run() {
  echo "=== $*"
  "scripts/paper/$1.sh" --size="$size" "${@:2}"
}

run figure1
if [[ $size == cpu ]]; then
  run figure1 --solvers=cd_rge --probes=512 --rates=0.1 --steps=100
  run figure1 --scales=2 --solvers=cd_rge --probes=96 --rates=0.03,0.1
  run figure1 --scales=2 --solvers=cd_rge --probes=512 --rates=0.1 --steps=60
  run figure1 --scales=2 --solvers=cd_rge --probes=8 \
    --rates=0.01,0.03,0.1 --steps=100
  run figure1 --scales=2 --solvers=spsa1_5 --probes=96 --rates=0.1 --steps=150
  run figure1 --scales=4 --solvers=cd_rge --probes=96 \
    --rates=0.03,0.1,0.3 --steps=60
  run figure1 --scales=4 --solvers=cd_rge --probes=512 --rates=0.03 --steps=50
  run figure1 --scales=4 --solvers=cd_rge --probes=8 \
    --rates=0.001,0.003,0.01,0.03 --steps=100
  run figure1 --scales=4 --solvers=spsa1_5 --probes=96 --rates=0.03 --steps=80
fi
for name in dnc_log replication smoke smoothing table1 table2; do
  run "$name"
done

roots=("${work%/*}"/*-"$size")
files=("${work%/*}"/*-"$size"/{steps,memory,smoke_7b}.json)
report "${files[@]}" benchmarks/results/overfit_{smoke_7b,dnc}.json
