#!/usr/bin/env bash
# Whether the smoothed loss regularises: a passage of Shakespeare that is short
# enough to be learned by heart, by BPTT and by CD-RGE with several epsilons, and
# the loss on a passage of another play where both have the same training loss.
#   scripts/paper/smoothing.sh [--size=cpu|full|smoke]     (see common.sh)
. "$(dirname "$0")/common.sh"
probes=96 forward=1000 backward=600 seeds=0,1,2
epsilons=0.01,0.1,0.2 rates=0.02 adam=0.003,0.01
if [[ $size == full ]]; then
  forward=4000 backward=1000 epsilons=0.001,0.01,0.03,0.1,0.2,0.3
  rates=0.01,0.02,0.05 adam=0.001,0.003,0.01
elif [[ $size == smoke ]]; then
  probes=2 forward=30 backward=30 seeds=0 epsilons=0.1 adam=0.01
fi

# 16 windows to learn: in letters that all of these texts have.
"$python" - "$work/passage" <<'END'
import pathlib
import re
import sys

from zorn_jax.tasks import corpora

folder = pathlib.Path(sys.argv[1])
folder.mkdir(exist_ok=True)
plays = corpora.shakespeare()
texts = {
  name: re.sub("[^a-z]+", " ", plays[0].lower())[10_000:]
  for name, plays in plays._asdict().items()
}
train = texts.pop("train")[: 16 * 64 + 1]
(folder / "train.txt").write_text(train)
for name, text in texts.items():
  known = "".join(letter for letter in text if letter in train)
  (folder / f"{name}.txt").write_text(known[:2048])
END
load=(--config.task.source="$work/passage" --config.batch_size=8
  --config.task.evaluation_rows=16 --config.evaluate_every=10 --grid=seed=$seeds)
sweep adam shakespeare.py:bptt "${load[@]}" \
  --config.steps=$backward --grid=learning_rate=$adam
sweep cd_rge shakespeare.py:pure "${load[@]}" --config.steps=$forward \
  --config.num_probes=$probes --config.estimator.batch_per_probe=False \
  --grid=learning_rate=$rates --grid=epsilon=$epsilons
report
