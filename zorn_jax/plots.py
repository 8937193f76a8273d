"""Curves of a run."""

import pathlib

from zorn_jax import loggers


def plot_losses(workdir: pathlib.Path) -> pathlib.Path | None:
  """Draws `loss.png` from the metrics of a run.

  Returns:
    The file, or None where matplotlib is not installed or nothing was logged.
  """
  try:
    from matplotlib import figure
  except ImportError:
    return None
  records = loggers.read_jsonl(workdir / loggers.JSONL_NAME)
  curves = {
    "training (mean of the probes)": ("loss", "C0-"),
    "validation": ("valid_loss", "C1o-"),
  }
  canvas = figure.Figure(figsize=(6.4, 4), layout="constrained")
  axes = canvas.subplots()
  for label, (name, style) in curves.items():
    points = [(r["step"], r[name]) for r in records if name in r]
    if points:
      axes.plot(*zip(*points, strict=True), style, markersize=3, label=label)
  if not axes.lines:
    return None
  axes.set(xlabel="step", ylabel="loss (nats per token)")
  axes.legend()
  axes.grid(alpha=0.3)
  path = workdir / "loss.png"
  canvas.savefig(path, dpi=150)
  return path
