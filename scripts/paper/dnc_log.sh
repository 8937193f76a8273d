#!/usr/bin/env bash
# The authors' logs of a DNC of scale 8, 6,553,893 parameters: four steps of
# CD-RGE with 512 probes, and of BPTT by SGD at a rate of 0.001; and CD-RGE from
# two starts as low as theirs (scripts/measure_starts.py).
#   scripts/paper/dnc_log.sh [--size=cpu|full|smoke]     (see common.sh)
. "$(dirname "$0")/common.sh"
at_once=(--at_once=1)  # A model has the whole machine.
scale=8 probes=512 steps=4 seeds=0,1,2
if [[ $size == smoke ]]; then scale=1 probes=2 steps=2 seeds=0; fi

sweep sgd paper/dnc.py:scale=$scale,solver=sgd \
  --config.learning_rate=0.001 --config.steps=$steps --grid=seed=$seeds
sweep cd_rge paper/dnc.py:scale=$scale,probes=$probes \
  --config.steps=$steps --grid=seed=$seeds
if [[ $size != smoke ]]; then
  sweep cd_rge_low paper/dnc.py:scale=$scale,probes=$probes \
    --config.steps=$steps --config.evaluate_every=1 --grid=seed=29,37
fi
report
