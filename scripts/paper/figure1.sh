#!/usr/bin/env bash
# Figure 1: steps until a DNC knows one batch by heart, by scale, probes and
# solver, over one grid of learning rates for all; in full also the four logged
# steps at scale 8. What counts is the loss without a perturbation, after a step.
#   scripts/paper/figure1.sh [--size=cpu|full|smoke] [--scales=1,2] \
#     [--probes=8,96] [--rates=0.01,0.1]
# (see common.sh). The last three take the place of the size's own.
takes="scales probes rates"
. "$(dirname "$0")/common.sh"
scales=(1) probes=(8 96) forward=150 backward=200
rates=0.01,0.03,0.1,0.3 seeds=0,1,2
if [[ $size == full ]]; then
  scales=(1 2 4 8) probes=(8 96 512) forward=500 backward=1000
  rates=0.001,0.003,$rates
elif [[ $size == smoke ]]; then
  probes=(2) forward=2 backward=2 rates=0.01 seeds=0
fi
if [[ ${given[scales]:-} ]]; then IFS=, read -ra scales <<<"${given[scales]}"; fi
if [[ ${given[probes]:-} ]]; then IFS=, read -ra probes <<<"${given[probes]}"; fi
rates=${given[rates]:-$rates}
grid=(--config.evaluate_every=1
  --grid=learning_rate=$rates --grid=seed=$seeds)

for scale in "${scales[@]}"; do
  for solver in sgd adamw; do
    sweep "$solver-$scale" "paper/dnc.py:scale=$scale,solver=$solver" \
      --config.steps=$backward "${grid[@]}"
  done
  for solver in cd_rge spsa1_5; do
    for n in "${probes[@]}"; do
      sweep "$solver-$scale-$n" \
        "paper/dnc.py:scale=$scale,solver=$solver,probes=$n" \
        --config.steps=$forward "${grid[@]}"
    done
  done
done
if [[ $size == full ]]; then
  sweep log paper/dnc.py --config.steps=4 --grid=seed=$seeds
  sweep log-sgd paper/dnc.py:solver=sgd --config.steps=4 \
    --config.learning_rate=0.001 --grid=seed=$seeds
fi
report
