#!/usr/bin/env bash
# Trains a character-level LSTM on Shakespeare without back-propagation, then
# evaluates it and samples from it.
#   scripts/quickstart.sh [WORKDIR]      (runs/shakespeare)
set -euo pipefail
case ${1:-} in
  "" | /*) workdir=${1:-runs/shakespeare} ;;
  *) workdir=$PWD/$1 ;;
esac
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [[ -z ${PYTHON:-} ]]; then
  PYTHON=python3
  if python3.11 -c "" 2>/dev/null; then PYTHON=python3.11; fi
fi
[[ -x .venv/bin/pip ]] || "$PYTHON" -m venv .venv
.venv/bin/pip install -qq --disable-pip-version-check -e ".[text,plot]"

zorn() {
  local command=$1
  shift
  .venv/bin/python -m "zorn_jax.cli.$command" --workdir="$workdir" "$@"
}
zorn train --config=configs/shakespeare.py
zorn evaluate
echo "The loss curve is $workdir/loss.png. A sample:"
zorn sample --prompt="ROMEO" --length=400 --temperature=0.8 --seed=0
