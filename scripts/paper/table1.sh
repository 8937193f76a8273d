#!/usr/bin/env bash
# Table 1: seconds and memory of a step of BPTT and of CD-RGE at 96 and 512
# probes, on one device and on all; and memory by length of the context.
#   scripts/paper/table1.sh [--size=cpu|full|smoke]     (see common.sh)
# Ten random tokens as in the authors' runs, of a batch of 1024 in full, of 64
# at cpu, which measures no time from large on.
. "$(dirname "$0")/common.sh"
timed=(tiny small medium) compiled=(large) probes=(96 512) batch=64 steps=1
if [[ $size == full ]]; then
  timed=(tiny small medium large xlarge xxlarge) compiled=() batch=1024 steps=5
elif [[ $size == smoke ]]; then
  timed=(tiny) compiled=() probes=(2) batch=2 steps=1
fi

of_size() {
  local options
  read -ra options <<<"$(lstm "$1") --config.batch_size=$batch --steps=$2"
  measure "LSTM $1" BPTT paper/lstm.py:smoke_large,sgd "${options[@]}"
  measure "LSTM $1" "BPTT, checkpointed" paper/lstm.py:smoke_large,sgd \
    "${options[@]}" --config.task.time_chunk=4 --config.estimator.checkpoint=True
  for n in "${probes[@]}"; do
    for devices in 1 0; do
      measure "LSTM $1" CD-RGE paper/lstm.py:smoke_large "${options[@]}" \
        --config.num_probes="$n" --config.mesh.probe=$devices
    done
  done
}
for name in "${timed[@]}"; do of_size "$name" $steps; done
for name in "${compiled[@]}"; do of_size "$name" 0; done

if [[ ! -e $work/memory.json ]]; then
  quick=()
  if [[ $size == smoke ]]; then quick=(--quick); fi
  zorn bench --suite=memory "${quick[@]}" --output="$work/memory.tmp"
  mv "$work/memory.tmp" "$work/memory.json"
fi
report "$work/steps.json" "$work/memory.json"
