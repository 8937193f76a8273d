#!/usr/bin/env bash
# The smoke test: an LSTM learns ten random tokens by heart, medium and large;
# in full also the one of 6.9 billion parameters, which needs 15 GB.
#   scripts/paper/smoke.sh [--size=cpu|full|smoke]     (see common.sh)
. "$(dirname "$0")/common.sh"
at_once=(--at_once=1)  # A model has the whole machine.
sizes=(medium large) steps=6 seeds=0,1,2
if [[ $size == smoke ]]; then sizes=(tiny) steps=2 seeds=0; fi

for name in "${sizes[@]}"; do
  read -ra options <<<"$(lstm "$name") --config.steps=$steps"
  sweep "$name" paper/lstm.py:smoke_large "${options[@]}" --grid=seed=$seeds
done
if [[ $size == full ]]; then
  result=$work/smoke_7b.json
  if [[ ! -e $result ]]; then
    "$python" scripts/overfit_large.py --size=smoke_7b --steps=7 \
      --output="$work/smoke_7b.tmp"
    mv "$work/smoke_7b.tmp" "$result"
  fi
  report "$result"
else
  report
fi
