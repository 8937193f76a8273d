"""Plans: the paper's sizes, and costs against independent counts."""

import json
import math
import resource

import jax
import jax.numpy as jnp
import pytest
import small

from zorn_jax import build
from zorn_jax.plan import cost, plan

DNC = small.ROOT / "configs" / "paper" / "dnc.py"
LSTM = small.ROOT / "configs" / "paper" / "lstm.py"
# reference: arXiv:2505.17852, and the printed counts of its authors' runs.
COUNTS = {
  "tiny": 150740,
  "small": 1139700,
  "medium": 10627700,
  "large": 112606100,
  "xlarge": 1162045100,
  "xxlarge": 4506010100,
  "smoke_7b": 6914405668,
}


@pytest.mark.parametrize("size", COUNTS)
def test_paper_sizes_without_allocating(size):
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  result = plan(build.experiment(small.config(LSTM, size)))
  grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
  assert result["parameters"] == COUNTS[size]
  assert result["forward_passes_per_step"] == 192
  expected = math.sqrt(96 / (96 + COUNTS[size]))
  assert math.isclose(result["expected_cosine"], expected)
  # Parameters, directions or a gradient would show: 400 MB from "large" on.
  assert grown < 300_000  # KiB


def test_forward_flops_are_those_of_the_matrix_products():
  config = small.config(
    LSTM, "tiny", batch_size=3, num_probes=2, task__time_chunk=21
  )
  result = plan(build.experiment(config))
  heads, head, embed, vocab, tokens = 12, 20, 100, 100, 3 * 21
  hidden = heads * head
  # Fewer than MAX_TABLE_ROWS tokens: embedding and projection are one table.
  table = vocab * embed * 4 * hidden
  per_token = 4 * heads * head * head + hidden * vocab
  expected = 2 * 4 * (table + tokens * per_token)
  assert result["forward_flops_per_step"] == expected


def test_low_rank_probes_share_the_table():
  """2n copies of the shared product would cost 2n times as much."""
  config = lambda n: small.config(
    num_probes=n, estimator__batch_per_probe=False
  )
  flops = [
    plan(build.experiment(config(n)))["forward_flops_per_step"] for n in (4, 8)
  ]
  assert flops[1] < 2 * flops[0]


def test_cost_of_a_loop():
  a, b = jnp.ones((4, 8)), jnp.ones((8, 8))

  def looped(a):
    return jax.lax.scan(lambda x, _: (x @ b, None), a, length=10)[0]

  assert cost(jax.make_jaxpr(looped)(a).jaxpr).flops == 10 * 2 * 4 * 8 * 8


def test_peak_estimate_is_of_the_compilers_order():
  """Within a factor of three of what XLA allocates for the recipe's step."""
  from test_step import compiled_step

  experiment = build.experiment(
    small.config(batch_size=8, num_probes=64, model__hidden_size=64)
  )
  memory = compiled_step(experiment).memory_analysis()
  actual = memory.temp_size_in_bytes + memory.argument_size_in_bytes
  estimate = plan(experiment)["peak_bytes_estimate"]
  assert actual / 3 < estimate < 3 * actual


def test_command_prints_json():
  command = small.command("plan", f"--config={LSTM}:large", "--json")
  done = small.run(*command)
  assert done.returncode == 0, done.stderr
  assert json.loads(done.stdout)["parameters"] == COUNTS["large"]


# With the 22 symbols of the sums, by the formula for the same models.
ADD_COUNTS = {
  "tiny": 124142,
  "small": 1007022,
  "medium": 9871022,
  "large": 107450222,
  "xlarge": 1138832222,
  "xxlarge": 4428002222,
}
DNC_COUNTS = {
  "scale=1": 134053,
  "scale=8": 6553893,
  "scale=2,controller=lstm": 880677,
  "scale=16,controller=lstm,input=scale": 67782757,
}
BY_PLAN = ("tiny", "medium", "scale=1", "scale=8")


@pytest.mark.parametrize("arg", [*ADD_COUNTS, *DNC_COUNTS])
def test_counts_of_sums_and_of_the_dnc(arg):
  if arg in ADD_COUNTS:
    config = small.config(LSTM, arg, task__name="add")
  else:
    config = small.config(DNC, arg, num_probes=8)
  experiment = build.experiment(config)
  if arg in BY_PLAN:
    count = plan(experiment)["parameters"]
  else:
    params = jax.eval_shape(experiment.model.init, jax.random.key(0))
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
  assert count == (ADD_COUNTS | DNC_COUNTS)[arg]
