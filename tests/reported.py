"""What is reported: runs and benchmark files made by hand, and their page."""

import json

from zorn_jax.report import benches, claims, document, readings, runs

CONFIG = {
  "seed": 0,
  "steps": 30,
  "batch_size": 2,
  "num_probes": 8,
  "learning_rate": 0.02,
  "epsilon": 0.01,
  "mesh": {"probe": 1},
  "loggers": [],
  "task": {"name": "copy", "max_length": 3, "time_chunk": 7},
  "model": {"name": "lstm", "hidden_size": 4},
  "estimator": {"name": "central_difference", "shaping": "std"},
  "optimizer": {"name": "adam", "b1": 0.9},
}
LOSSES = (4.0, 1.0, 0.05)
BPTT = {"estimator": {"name": "bptt"}, "num_probes": 0}
BY_HEART = {"task": {"name": "random_tokens", "seq_length": 10}}
MACHINE = {"device": "a CPU", "jax": "0.10.2"}


def make_run(path, losses=LOSSES, valid=None, pace=1.0, **fields):
  """A run directory that logged every tenth step."""
  path.mkdir(parents=True)
  config = CONFIG | fields
  (path / "config.json").write_text(json.dumps(config))
  (path / "text.sha256").write_text("")
  every = fields.pop("log_every", 10)
  with (path / "metrics.jsonl").open("w") as file:
    for i, loss in enumerate(losses):
      step = (i + 1) * every
      record = {"step": step, "loss": loss, "forward_tokens": 100 * step}
      record["seconds"] = pace * step + 5
      if valid:
        record |= {"valid_loss": valid[i], "train_loss": loss}
        record["signal_to_noise"] = 1.0 + i
      file.write(json.dumps(record) + "\n")
  return path


def rows_of(*paths):
  (comparison,) = runs.compare(runs.find(paths)[0])
  return comparison.rows


def write(path, content):
  path.write_text(json.dumps(content))
  return path


def memory_file(tmp_path, zero=(100, 101), bptt=(100, 800), quick=False):
  rows = [
    {"case": "LSTM tiny", "length": 128, "zero_order_mb": 50, "bptt_mb": 20},
    {"case": "LSTM tiny", "length": 1024},
    {"case": "LSTM tiny", "length": 8192},
  ]
  for row, a, b in zip(rows[1:], zero, bptt, strict=True):
    row |= {"zero_order_mb": a, "bptt_mb": b}
  tables = {"context length": rows}
  content = {"suite": "memory", "machine": MACHINE, "tables": tables}
  content["quick"] = quick
  return write(tmp_path / "memory.json", content)


def learning(tmp_path, ours, theirs, seeds=3, rates=(0.01, 0.02, 0.03)):
  """600 steps, below 0.1 after so many tens of steps, and BPTT's."""
  paths = []
  for name, count, fields in (("f", ours, {}), ("b", theirs, BPTT)):
    for i, rate in enumerate(rates):
      for seed in range(seeds):
        # The first rate is the best one.
        losses = [1.0] * (count + i - 1)
        losses += [0.05] * (60 - len(losses))
        path = tmp_path / f"{name}{rate}{seed}"
        options = {"steps": 600, "learning_rate": rate}
        options |= {"seed": seed, **fields, **BY_HEART}
        paths.append(make_run(path, losses, **options))
  return paths


def page_of(paths, files=(), made_by="Made by hand."):
  found, idle = runs.find(paths)
  comparisons = runs.compare(found)
  measured = [benches.read(x) for x in files]
  verdicts = claims.judge_all(readings.Evidence(comparisons, measured))
  return document.write(comparisons, measured, verdicts, made_by, idle)
