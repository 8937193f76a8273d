#!/usr/bin/env bash
# Table 2: held-out loss on short strings and on a text, by BPTT and by CD-RGE
# at 96 and, in full, 512 probes. The text is the Penn Treebank's if its folder
# is given, else Shakespeare's.
#   scripts/paper/table2.sh [--size=cpu|full|smoke] [--ptb=FOLDER]
# (see common.sh). At cpu batches are of 64, not 2048, and CD-RGE has the
# authors' learning rate alone; on the text epsilon varies.
takes=ptb
. "$(dirname "$0")/common.sh"
sizes=(tiny) probes=(96) rates=0.1 forward=250 backward=1000 seeds=0,1,2
batch=(--config.batch_size=64) texts=150 tasks=(copy sort reverse add)
adamw=0.001,0.003,0.01 adam=0.01,0.03 epsilons=0.001,0.03
if [[ $size == full ]]; then
  sizes=(tiny small medium) probes=(96 512) rates=0.01,0.03,0.1
  batch=() forward=5000 backward=5000 texts=2500
elif [[ $size == smoke ]]; then
  batch=(--config.batch_size=2) probes=(2) forward=2 backward=2 seeds=0
  texts=15 tasks=(copy add) adamw=0.01 adam=0.01 epsilons=0.001
fi
seeds=--grid=seed=$seeds

for name in "${tasks[@]}"; do
  fields="'name':'$name','max_length':10,'time_chunk':25,'num_evaluation':512"
  if [[ $name == add ]]; then fields+=",'max_num':9"; fi
  task=(--config.task="{$fields}" --config.evaluate_every=25 "${batch[@]}")
  for lstm in "${sizes[@]}"; do
    sweep "$name-$lstm-adamw" "paper/lstm.py:$lstm,adamw" "${task[@]}" \
      --config.steps=$backward --grid=learning_rate=$adamw "$seeds"
    for n in "${probes[@]}"; do
      sweep "$name-$lstm-$n" "paper/lstm.py:$lstm" "${task[@]}" \
        --config.steps=$forward --config.num_probes="$n" \
        --grid=learning_rate=$rates "$seeds"
    done
  done
done
text=(--config.evaluate_every=25 --config.log_every=25)
if [[ ${given[ptb]:-} ]]; then
  text+=(--config.task.source="ptb:$(absolute "${given[ptb]}")")
  text+=(--config.task.errors=strict)
fi
sweep text-adam shakespeare.py:bptt "${text[@]}" \
  --config.steps=$((2 * texts)) --grid=learning_rate=$adam "$seeds"
sweep text-cd_rge shakespeare.py:plain "${text[@]}" \
  --config.steps=$texts --grid=epsilon=$epsilons "$seeds"
report
