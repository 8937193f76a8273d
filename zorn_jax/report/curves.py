"""Pictures of curves, as SVG."""

import io
import math
from collections.abc import Sequence
from typing import NamedTuple

COLORS = (
  "#1f5fa8",
  "#c2410c",
  "#2f7d32",
  "#8a2be2",
  "#8b5e00",
  "#00838f",
  "#b0125b",
  "#555555",
)
_MOST_POINTS = 300  # Of a curve.
_LARGEST_SPAN = 1e5  # Of a logarithmic axis: what is below is 0 to the eye.


class Curve(NamedTuple):
  """One line.

  Attributes:
    label: Of its row; curves of one label have one entry.
    color: Index of the row's colour.
    points: (x, y), finite.
    dashed: Whether its run was interrupted.
  """

  label: str
  color: int
  points: Sequence[tuple[float, float]]
  dashed: bool = False


def available() -> bool:
  """Whether pictures can be made."""
  try:
    import matplotlib  # noqa: F401
  except ImportError:
    return False
  return True


def picture(
  curves: Sequence[Curve], xlabel: str, ylabel: str, line: float | None = None
) -> str:
  """Draws curves; the same curves give the same text.

  An axis is logarithmic where its positive values span more than a factor of
  30, of which five decades are drawn.

  Args:
    curves: At least one, each with a point.
    xlabel: With its unit.
    ylabel: With its unit.
    line: Where a horizontal line is drawn; None for none.
  Returns:
    An SVG document, with its text as outlines.
  """
  import matplotlib
  from matplotlib import figure

  labels = list(dict.fromkeys(curve.label for curve in curves))
  with matplotlib.rc_context(
    {"svg.hashsalt": "zorn", "font.size": 9, "axes.spines.top": False}
    | {"axes.spines.right": False}
  ):
    canvas = figure.Figure(figsize=(4.6, 3.3), layout="constrained")
    axes = canvas.subplots()
    drawn = set()
    for curve in curves:
      axes.plot(
        *zip(*_thinned(curve.points), strict=True),
        color=COLORS[curve.color % len(COLORS)],
        linestyle="--" if curve.dashed else "-",
        linewidth=1.3,
        marker="o" if len(curve.points) == 1 else None,
        alpha=0.85,
        label="_" if curve.label in drawn else curve.label,
      )
      drawn.add(curve.label)
    every = [p for curve in curves for p in curve.points]
    xs, ys = zip(*every, strict=True)
    if _spans(xs):
      axes.set_xscale("log")
    if _spans(ys):
      axes.set_yscale("log")
      axes.set_ylim(bottom=max(axes.get_ylim()[0], max(ys) / _LARGEST_SPAN))
    if line is not None:
      axes.axhline(line, color="#999999", linewidth=0.8, linestyle=":")
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.25)
    if len(labels) > 1:
      axes.legend(fontsize=8, frameon=False, handlelength=1.4)
    text = io.StringIO()
    canvas.savefig(text, format="svg", metadata={"Date": None})
  return text.getvalue()


def _thinned(points):
  """At most so many points that a page stays small; the last one stays."""
  stride = math.ceil(len(points) / _MOST_POINTS)
  kept = list(points[::stride])
  return kept if kept[-1] == points[-1] else [*kept, points[-1]]


def _spans(values):
  positive = [x for x in values if x > 0]
  return bool(positive) and max(positive) > 30 * min(positive)
