#!/usr/bin/env bash
# A replication's workload: LSTM of hidden size 512 with 8 heads, copy task of
# up to 32 letters, batch 16; memory of BPTT and of CD-RGE, and loss per step.
#   scripts/paper/replication.sh [--size=cpu|full|smoke]     (see common.sh)
. "$(dirname "$0")/common.sh"
probes=96 forward=150 backward=300 seeds=0,1,2
if [[ $size == full ]]; then
  forward=2000 backward=2000
elif [[ $size == smoke ]]; then
  probes=2 forward=2 backward=2 seeds=0
fi
work_load=(--config.model.hidden_size=512 --config.model.num_heads=8
  --config.batch_size=16 --config.task.max_length=32 --config.task.time_chunk=65)
forward_load=("${work_load[@]}" --config.num_probes=$probes)

measure replication BPTT paper/lstm.py:tiny,sgd "${work_load[@]}"
measure replication "BPTT, checkpointed" paper/lstm.py:tiny,sgd "${work_load[@]}" \
  --config.task.time_chunk=8 --config.estimator.checkpoint=True
measure replication CD-RGE paper/lstm.py:tiny "${forward_load[@]}"
sweep adamw paper/lstm.py:tiny,adamw "${work_load[@]}" \
  --config.steps=$backward --grid=learning_rate=0.003,0.01 --grid=seed=$seeds
sweep cd_rge paper/lstm.py:tiny "${forward_load[@]}" \
  --config.steps=$forward --grid=learning_rate=0.03,0.1 --grid=seed=$seeds
report "$work/steps.json"
