#!/usr/bin/env bash
# Figure 1: steps until a DNC knows one batch by heart, by scale, probes and
# solver, over one grid of learning rates for all. What counts is the loss without
# a perturbation, after a step.
#   scripts/paper/figure1.sh [--size=cpu|full|smoke] [--scales=1,2] \
#     [--solvers=cd_rge,spsa1_5] [--probes=8,96] [--rates=0.01,0.1] [--steps=150]
# (see common.sh). The last five take the place of the size's own; all but the
# scales are those of forward passes, beside which BPTT has the whole grid.
takes="scales solvers probes rates steps"
. "$(dirname "$0")/common.sh"
scales=(1) solvers=(cd_rge spsa1_5) probes=(8 96) forward=150 backward=200
rates=0.01,0.03,0.1,0.3 seeds=0,1,2
if [[ $size == full ]]; then
  scales=(1 2 4 8) probes=(8 96 512) forward=500 backward=1000
  rates=0.001,0.003,$rates
elif [[ $size == smoke ]]; then
  probes=(2) forward=2 backward=2 rates=0.01 seeds=0
fi
for name in scales solvers probes; do
  if [[ ${given[$name]:-} ]]; then
    IFS=, read -ra "$name" <<<"${given[$name]}"
  fi
done
forward=${given[steps]:-$forward}
some=--grid=learning_rate=${given[rates]:-$rates}
all=--grid=learning_rate=$rates
each=(--config.evaluate_every=1 --grid=seed=$seeds)

for scale in "${scales[@]}"; do
  for solver in sgd adamw; do
    sweep "$solver-$scale" "paper/dnc.py:scale=$scale,solver=$solver" \
      --config.steps=$backward "$all" "${each[@]}"
  done
  for solver in "${solvers[@]}"; do
    for n in "${probes[@]}"; do
      sweep "$solver-$scale-$n" \
        "paper/dnc.py:scale=$scale,solver=$solver,probes=$n" \
        --config.steps=$forward "$some" "${each[@]}"
    done
  done
done
report
