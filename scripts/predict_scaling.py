"""What an update costs on 1 to 4096 GPUs: measured on a CPU, then computed.

python scripts/predict_scaling.py

Measures on one CPU core what the update costs for each parameter and direction
(dense signs, rank one) and for each parameter (Adam, SGD), at sizes that show
whether the costs are linear. From the rates of an H200 and of three links, as
zorn_jax.plan has them, computes what the replicated and the sharded update take
for 10^7, 10^9 and 10^11 parameters. Writes benchmarks/results/scaling.json,
docs/scaling.md and docs/scaling.png. About two minutes on one core.
"""

import json
import os
import pathlib
import platform
import statistics
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib import figure

import zorn_jax
from zorn_jax.plan import DEVICES, LINKS, Transfer, seconds

ROOT = pathlib.Path(__file__).parent.parent
ROUNDS = 9
# Rows and columns of the parameters, and directions.
SHAPES = ((1024, 1024), (2048, 2048), (4096, 4096))
COUNTS = {"signs": (8, 32, 64), "rank one": (96, 192, 384)}

H200 = DEVICES["H200"]
FORWARD = 790e12  # FLOP/s of large products in bfloat16.
PROBES = 12  # Of a GPU, where their number grows with the GPUs.
TOKENS = 1024  # Of a probe.
NODE = 8  # GPUs that NVLink joins.
GPUS = (1, 8, 64, 512, 4096)
# Parameters, GPUs that share a model, bytes that pass through memory for each
# parameter: Adam in float32, and plain SGD in bfloat16 where Adam has no room.
MODELS = {"10M": (1e7, 1, 32), "1B": (1e9, 1, 32), "100B": (1e11, 8, 8)}
# Seconds for each parameter and direction. At best a kernel adds many
# directions up before it writes: 90 ms for 512 of 10^9 parameters.
KINDS = {
  "dense, as summed now": H200.sign,
  "dense, at best": 90e-3 / 512e9,
  "rank one": 2 / H200.flops,
}


def measure():
  """Seconds of the core for every cost and size: median, least, most.

  Of the core, so that another program on it does not count.
  """
  calls = {}
  for shape in SHAPES:
    params = jax.random.normal(jax.random.key(0), shape)
    for kind, counts in COUNTS.items():
      for count in counts:
        calls[kind, shape, count] = combining(kind, params, count)
    for kind, optimizer in (("Adam", optax.adam(0.1)), ("SGD", optax.sgd(0.1))):
      calls[kind, shape, 1] = updating(optimizer, params)
  times = {key: [] for key in calls}
  for call in calls.values():
    jax.block_until_ready(call())
  for _ in range(ROUNDS):
    for key, call in calls.items():
      start = time.process_time()
      jax.block_until_ready(call())
      times[key].append(time.process_time() - start)
  return [
    {
      "cost": kind,
      "parameters": shape[0] * shape[1],
      "directions": count,
      "seconds": statistics.median(taken),
      "spread": [min(taken), max(taken)],
    }
    for (kind, shape, count), taken in times.items()
  ]


def units(measured):
  """Seconds for each parameter and direction, or for each parameter.

  For directions by a line through the medians, whose start is the fixed cost of
  a parameter.

  Returns:
    (cost, parameters) -> (seconds, how far from the line at most, relative to
    the time; for optimisers the largest deviation of a round).
  """
  groups = {}
  for row in measured:
    groups.setdefault((row["cost"], row["parameters"]), []).append(row)
  found = {}
  for (cost, size), rows in groups.items():
    times = np.array([row["seconds"] for row in rows])
    if len(rows) == 1:
      off = np.abs(np.array(rows[0]["spread"]) / times - 1).max()
      found[cost, size] = float(times[0] / size), float(off)
      continue
    counts = [row["directions"] for row in rows]
    line = np.polyfit(counts, times, 1)
    off = np.abs(np.polyval(line, counts) / times - 1).max()
    found[cost, size] = float(line[0] / size), float(off)
  return found


def combining(kind, params, count):
  """The sum of directions, as the update has it."""
  made = {"signs": zorn_jax.rademacher, "rank one": zorn_jax.low_rank}[kind]()
  keys = jax.random.split(jax.random.key(1), count)
  weights = jax.random.normal(jax.random.key(2), count)
  combine = jax.jit(made.combine)
  return lambda: combine(keys, weights, params)


def updating(optimizer, params):
  """A step of an optimiser, in place."""

  def step(params, state):
    updates, state = optimizer.update(params, state, params)
    return optax.apply_updates(params, updates), state

  step = jax.jit(step, donate_argnums=(0, 1))
  held = [jnp.copy(params), optimizer.init(params)]

  def call():
    held[:] = step(*held)
    return held

  return call


def forward(model, gpus, probes, tokens=TOKENS):
  """Seconds of the forward passes, two for each probe."""
  return 4 * MODELS[model][0] * tokens * probes / gpus / FORWARD


def arithmetic(model, kind, probes):
  """Seconds of the update on one GPU of each model."""
  size, group, traffic = MODELS[model]
  return size / group * (probes * KINDS[kind] + traffic / H200.rate)


def moving(name, size, model, gpus, link):
  """Seconds of a collective over all GPUs, or those with the same heads."""
  group = MODELS[model][1]
  transfer = Transfer(name, size, gpus // group)
  return seconds(transfer, LINKS[link], NODE // group)


def replicated(model, kind, gpus, probes):
  del gpus  # It takes the same on any number of them.
  return arithmetic(model, kind, probes)


def sharded(model, kind, gpus, probes, link):
  size, group, _ = MODELS[model]
  gather = moving("all_gather", 4 * size, model, gpus, link)
  return arithmetic(model, kind, probes) / (gpus // group) + gather


def links_of(gpus):
  """What can join so many GPUs, with NVLink within nodes."""
  return ("NVLink",) if gpus <= NODE else ("InfiniBand", "Ethernet")


def break_even(kind, tokens):
  """GPUs at which the replicated update takes as long as the passes."""
  return 4 * tokens / FORWARD / KINDS[kind]


def worth_moving(kind, link):
  """Probes from which on a sharded update is faster, on many GPUs."""
  saved = MODELS["1B"][2] / H200.rate
  return max(1.0, (4 / LINKS[link].rate - saved) / KINDS[kind])


def compute():
  """Seconds of everything at every size, probes growing with the GPUs."""
  rows = []
  for model, (size, group, _) in MODELS.items():
    for gpus in GPUS:
      if gpus < group:
        continue
      probes = PROBES * gpus
      links = links_of(gpus)
      rows.append(
        {
          "model": model,
          "gpus": gpus,
          "probes": probes,
          "forward": forward(model, gpus, probes),
          "replicated": {
            kind: replicated(model, kind, gpus, probes) for kind in KINDS
          },
          "sharded": {
            kind: {x: sharded(model, kind, gpus, probes, x) for x in links}
            for kind in KINDS
          },
          "losses": {
            x: moving("all_gather", 8 * probes, model, gpus, x) for x in links
          },
          "bptt": {x: moving("psum", 4 * size, model, gpus, x) for x in links},
        }
      )
  return rows


def main():
  os.sched_setaffinity(0, {0})  # Before JAX starts its threads.
  record = {
    "command": "python scripts/predict_scaling.py",
    "machine": f"{platform.processor() or platform.machine()}, CPU, one core "
    "beside other programs",
    "versions": {"python": platform.python_version(), "jax": jax.__version__},
    "measured": measure(),
    "computed": compute(),
  }
  path = ROOT / "benchmarks" / "results" / "scaling.json"
  path.write_text(json.dumps(record) + "\n")
  write(record)


def write(record):
  (ROOT / "docs" / "scaling.md").write_text(page(record))
  draw(ROOT / "docs" / "scaling.png")


def page(record):
  versions = record["versions"]
  lines = [
    "# The update on 1 to 4096 GPUs",
    "",
    f"Made by `{record['command']}`, Python {versions['python']}, jax "
    f"{versions['jax']}. **Measured** is only the first table, on "
    f"{record['machine']}; no GPU was there. **Computed** is all the rest.",
    "",
    *costs(record["measured"]),
    "",
    *assumptions(),
    "",
    "## More GPUs, more probes",
    "",
    f"{PROBES} probes a GPU, {TOKENS:,} tokens a probe; computed, time of a "
    "step's parts. Replicated: nothing but losses moves, and every GPU sums "
    "all directions. Sharded: each sums a slice, and the slices are gathered, "
    "over NVLink up to 8 GPUs, then over InfiniBand / Ethernet.",
    "",
    *weak(record["computed"]),
    "",
    "![The update against the forward passes](scaling.png)",
    "",
    *strong(),
    "",
    *breaks(),
    "",
    *choices(),
  ]
  return "\n".join(lines) + "\n"


def costs(measured):
  found = units(measured)
  sizes = [rows * columns for rows, columns in SHAPES]
  about = {
    "signs": "dense signs, ns a parameter and direction",
    "rank one": "rank one, ns a parameter and direction",
    "Adam": "Adam, ns a parameter",
    "SGD": "SGD, ns a parameter",
  }
  lines = [
    "## What was measured",
    "",
    f"Time of the core, medians of {ROUNDS} rounds in turns; the slope over "
    "three numbers of directions, in brackets how far the medians are from the "
    "line (of optimisers, the rounds from the median).",
    "",
    "| | "
    + " | ".join(f"{size / 1e6:.0f}M parameters" for size in sizes)
    + " |",
    "|---" * (len(sizes) + 1) + "|",
  ]
  for cost, text in about.items():
    cells = [found[cost, size] for size in sizes]
    texts = (f"{1e9 * unit:.2g} (±{100 * off:.0f} %)" for unit, off in cells)
    lines.append(f"| {text} | " + " | ".join(texts) + " |")
  first, last = (found["signs", size][0] for size in (sizes[0], sizes[-1]))
  return [
    *lines,
    "",
    "All costs are linear in the directions. In the parameters only dense "
    f"signs are not: beyond the cache they cost {last / first:.1f} times as "
    "much, as the sum passes through memory once more for every direction.",
  ]


def assumptions():
  kinds = [f"{name} {1e12 * unit:.2g}" for name, unit in KINDS.items()]
  links = [f"{name} {link.rate / 1e9:g}" for name, link in LINKS.items()]
  return [
    "## What is assumed",
    "",
    f"* Forward passes: two a probe, 2 FLOP a parameter and token, at "
    f"{FORWARD / 1e12:.0f} TFLOP/s (an H200 on large products in bfloat16). "
    "Real passes are slower, so that updates weigh less than here.",
    f"* Update, picoseconds a parameter and direction on an H200: "
    f"{'; '.join(kinds)}. As summed now, a float32 sum is read and written for "
    f"every direction, at {H200.rate / 1e12:g} TB/s. At best, a kernel that is "
    "not written yet holds the sum in registers: 5 to 6 operations on packed "
    f"bits. Rank one is a product at {H200.flops / 1e12:.0f} TFLOP/s. Added "
    "are 32 bytes of memory traffic a parameter for Adam, or 8 for plain SGD "
    "in bfloat16 (100B).",
    f"* Links, GB/s in one direction: {', '.join(links)}; nodes of {NODE} GPUs "
    "on NVLink, one port a node (with eight ports gathers of parameters are "
    "eight times faster). Rings, with NCCL's latencies; the hop of "
    f"Ethernet, {1e6 * LINKS['Ethernet'].hop:.0f} µs, is a guess.",
    "* 100B parameters: the heads are spread over the 8 GPUs of a node. Sums "
    f"of logits (50,000 symbols) add {short(logits())} a step to the passes.",
  ]


def logits():
  """Seconds of the sums of logits within a node, for its probes."""
  queries = 2 * PROBES * NODE
  transfer = Transfer("psum", 4 * 50_000 * TOKENS, NODE, queries)
  return seconds(transfer, LINKS["NVLink"])


def weak(rows):
  lines = [
    "| parameters | GPUs | probes | passes | replicated: dense now | at best | "
    "rank one | sharded: dense now | rank one | losses | BPTT's all-reduce |",
    "|---" * 11 + "|",
  ]
  for row in rows:
    now, best, low = (row["replicated"][kind] for kind in KINDS)
    dense, _, rank = (row["sharded"][kind] for kind in KINDS)
    cells = [row["model"], f"{row['gpus']:,}", f"{row['probes']:,}"]
    cells += map(short, (row["forward"], now, best, low))
    cells += map(either, (dense, rank, row["losses"], row["bptt"]))
    lines.append("| " + " | ".join(cells) + " |")
  return [
    *lines,
    "",
    "BPTT's all-reduce is that of a float32 gradient; it says nothing of "
    "progress, which is far greater for each pass.",
  ]


def short(value):
  """A time in the unit in which it is not below 1."""
  if not value:
    return "0"
  fits = (pair for pair in _UNITS if value >= pair[1])
  unit, size = next(fits, _UNITS[-1])
  scaled = value / size
  return f"{scaled:.0f} {unit}" if scaled >= 10 else f"{scaled:.2g} {unit}"


_UNITS = (("s", 1), ("ms", 1e-3), ("µs", 1e-6))


def either(by_link):
  return " / ".join(map(short, by_link.values()))


def strong():
  """Whole steps at fixed numbers of probes."""
  heads = " | ".join(map(gpus_text, GPUS))
  lines = [
    "## More GPUs, the same probes",
    "",
    f"1B parameters, {TOKENS:,} tokens a probe; computed, time of a whole "
    "step, sharded over NVLink or InfiniBand. More GPUs than probes share the "
    "rows of a batch.",
    "",
    f"| probes | update | {heads} |",
    "|---" * (len(GPUS) + 2) + "|",
  ]
  for probes in (96, 512, 4096):
    for kind in ("dense, as summed now", "rank one"):
      for name in ("replicated", "sharded"):
        cells = [short(step(kind, name, gpus, probes)) for gpus in GPUS]
        label = f"{name}, {kind.split(',')[0]}"
        lines.append(f"| {probes:,} | {label} | " + " | ".join(cells) + " |")
  return lines


def gpus_text(count):
  return f"{count:,} GPU{'s' if count > 1 else ''}"


def step(kind, name, gpus, probes):
  link = links_of(gpus)[0]
  total = forward("1B", gpus, probes)
  total += moving("all_gather", 8 * probes, "1B", gpus, link)
  if name == "replicated":
    return total + replicated("1B", kind, gpus, probes)
  return total + sharded("1B", kind, gpus, probes, link)


def breaks():
  tokens = (64, 1024, 11264)
  heads = " | ".join(f"{count:,} tokens a probe" for count in tokens)
  lines = [
    "## Where each breaks",
    "",
    "**Replicated**: it takes as long as the forward passes at 4 · tokens a "
    "probe / (rate of the passes · seconds a parameter and direction) GPUs, "
    "whatever the model and the number of probes (without the optimiser, which "
    "counts the less the more probes a GPU has). Computed, GPUs:",
    "",
    f"| | {heads} |",
    "|---" * (len(tokens) + 1) + "|",
  ]
  for kind in KINDS:
    cells = (f"{float(f'{break_even(kind, x):.2g}'):,g}" for x in tokens)
    lines.append(f"| {kind} | " + " | ".join(cells) + " |")
  probes = ", ".join(
    f"{name} {FORWARD / link.rate / TOKENS:.2g}" for name, link in LINKS.items()
  )
  small = next(
    row
    for row in compute()
    if row["model"] == "10M" and row["gpus"] == GPUS[-1]
  )
  lines += [
    "",
    "**Sharded**: the gather does not shrink with the GPUs. It takes as long "
    f"as the passes of so many probes a GPU, of {TOKENS:,} tokens: {probes}. "
    "Only axes that the devices divide can be cut; `zorn-plan` prints the "
    "bytes (of the paper's large and xlarge models 8 devices cut nothing).",
    "",
    "**Both**: the ring that gathers the losses takes "
    f"{short(small['losses']['InfiniBand'])} on {GPUS[-1]:,} GPUs over "
    f"InfiniBand and {short(small['losses']['Ethernet'])} over Ethernet, more "
    f"than the passes of the 10M model, {short(small['forward'])}: such models "
    "need more probes a GPU, not more GPUs.",
  ]
  return lines


def choices():
  lines = [
    "## What to choose",
    "",
    "A sharded update is the faster one, on many GPUs, from so many probes a "
    "step on (computed, for Adam):",
    "",
    "| | " + " | ".join(LINKS) + " |",
    "|---" * (len(LINKS) + 1) + "|",
  ]
  for kind in KINDS:
    cells = (f"{worth_moving(kind, link):,.0f}" for link in LINKS)
    lines.append(f"| {kind} | " + " | ".join(cells) + " |")
  lines += [
    "",
    f"For 1B parameters, {PROBES} probes a GPU and {TOKENS:,} tokens a probe, "
    "the faster update and its time as a share of the passes (computed):",
    "",
    "| directions | link | " + " | ".join(map(gpus_text, GPUS)) + " |",
    "|---" * (len(GPUS) + 2) + "|",
  ]
  for kind in ("dense, as summed now", "rank one"):
    for link in LINKS:
      cells = [
        choice(kind, gpus, link)
        if link in links_of(gpus) or gpus <= NODE
        else "-"
        for gpus in GPUS
      ]
      lines.append(f"| {kind} | {link} | " + " | ".join(cells) + " |")
  return [*lines, "", *_REMARK]


_REMARK = """
* One GPU, or rank one on any link: `replicated`, with a thousand tokens a probe
  up to several hundred GPUs. Nothing but losses moves.
* Dense directions within a node on NVLink: `sharded`, from two GPUs on.
* Dense directions over several nodes: rank one instead. Sharded they wait for
  the gather, replicated they sum for longer than they measure.
* Near the break-even of rank one: more tokens a probe, which moves it out in
  proportion; `sharded` only from the number of probes on that the table has for
  the link, which over Ethernet is out of reach.
""".strip().splitlines()


def choice(kind, gpus, link):
  probes = PROBES * gpus
  times = {
    "replicated": replicated("1B", kind, gpus, probes),
    "sharded": sharded("1B", kind, gpus, probes, link),
  }
  name = min(times, key=times.get)
  share = times[name] / forward("1B", gpus, probes)
  return f"{name}, {100 * share:.0f} %"


def draw(path):
  """The update's time over that of the passes, for 1B parameters."""
  canvas = figure.Figure(figsize=(9, 4.2), layout="constrained")
  panels = canvas.subplots(1, 2, sharey=True)
  for axes, kind in zip(
    panels, ("dense, as summed now", "rank one"), strict=True
  ):
    draw_panel(axes, kind)
  panels[0].set(ylabel="update / forward passes (computed)")
  panels[0].legend(fontsize="small")
  canvas.savefig(path, dpi=150)


def draw_panel(axes, kind):
  gpus = [2**power for power in range(13)]
  passes = forward("1B", 1, PROBES)

  def line(counts, update, style, **options):
    times = [update(count) / passes for count in counts]
    axes.plot(counts, times, style, markersize=3, **options)

  alone = lambda kind: lambda x: replicated("1B", kind, x, PROBES * x)
  line(gpus, alone(kind), "k-", label="replicated")
  if kind != "rank one":
    line(gpus, alone("dense, at best"), "k--", label="replicated, at best")
  for link, colour in zip(LINKS, ("C2", "C0", "C1"), strict=True):
    counts = [x for x in gpus if x > 1 and link in links_of(x)]
    update = partial(sharded_on, kind, link)
    line(counts, update, "o-", color=colour, label=f"sharded, {link}")
  reduce = lambda x: moving("psum", 4e9, "1B", x, "InfiniBand")
  counts = [x for x in gpus if x > NODE]
  line(counts, reduce, "C0:", label="BPTT's all-reduce, InfiniBand")
  axes.axhline(1, color="grey", linewidth=0.8)
  axes.set_xscale("log", base=2)
  axes.set_xticks(GPUS, [f"{x:,}" for x in GPUS])
  axes.set(yscale="log", xlabel="GPUs", title=kind)
  axes.grid(alpha=0.3)


def sharded_on(kind, link, gpus):
  return sharded("1B", kind, gpus, PROBES * gpus, link)


if __name__ == "__main__":
  main()
