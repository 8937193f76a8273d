#!/usr/bin/env bash
# Checks and measures the kernels on an NVIDIA GPU, in less than 8 minutes:
# tests against the twin, then the kernel and step suites of zorn_jax.cli.bench.
# Writes benchmarks/results/<device>.json and prints a short table last. A bare
# checkout will do, with a python3 that has jax[cuda], flax, optax, chex,
# orbax-checkpoint and pytest.
#   PYTHON  what runs it (python3)
#   OUT     folder of the result (benchmarks/results)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
out=${OUT:-benchmarks/results}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} JAX_PLATFORMS=cuda

status=0
# Warnings of other versions are no failures here.
"$python" -m pytest -q -W default -p no:cacheprovider tests/test_kernels_gpu.py \
  || status=$?
timeout 420 "$python" scripts/gpu_check.py "$out" || status=$?
exit $status
