"""The harness of the benchmark: its arithmetic, on what takes no time."""

import json
import math
import platform
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from zorn_jax.bench import cases, machine, memory, peers, report, step, timing

FEW, B, T = 2, 3, 21
HIDDEN, HEADS, V, E = 240, 12, 100, 100
D = HIDDEN // HEADS


class Clock:
  """Seconds that pass only where a program says so."""

  def __init__(self, monkeypatch):
    self.now = 0.0
    monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)

  def program(self, *costs):
    """One that takes these seconds in turn, the last for ever."""
    costs = list(costs)

    class Result:
      def block_until_ready(_):  # noqa: N805 (self is the clock)
        self.now += costs.pop(0) if len(costs) > 1 else costs[0]
        return _

    return Result


def test_programs_take_turns_and_are_awaited(monkeypatch):
  clock, order = Clock(monkeypatch), []

  def logged(name, program):
    return lambda: order.append(name) or program()

  runs = {
    "a": logged("a", clock.program(100, 3, 5, 4)),
    "b": logged("b", clock.program(50, 1)),
  }
  seconds = timing.measure(runs, 3)
  assert order == ["a", "b"] + 3 * ["a", "b"]  # The first of each unmeasured.
  np.testing.assert_array_equal(seconds["a"], [3, 5, 4])
  np.testing.assert_array_equal(seconds["b"], [1, 1, 1])


def test_the_fastest_is_taken(monkeypatch):
  clock = Clock(monkeypatch)
  runs = {1: clock.program(0, 2), 4: clock.program(9, 0.5), 8: clock.program(1)}
  best, tried = timing.fastest(runs, 2)
  assert best == 4 and tried == {1: 2000, 4: 500, 8: 1000}


def test_median_and_quartiles():
  samples = np.random.default_rng(0).lognormal(size=11)
  found = timing.spread("ms", samples)
  low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
  assert found["ms"] == pytest.approx(middle)
  assert found["ms_quartiles"] == pytest.approx([low, high])


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_exponent_of_a_power_law(power):
  sizes = [3, 10, 40, 70]
  samples = [7 * size**power * np.array([0.9, 1.0, 1.5]) for size in sizes]
  assert timing.exponent(sizes, samples) == pytest.approx(power)


def test_peak_is_of_the_best_size(monkeypatch):
  monkeypatch.setattr(
    timing,
    "measure",
    lambda runs, *_, **__: {
      n: np.array([1.0, 2.0, 4.0]) * {8: 1, 16: 4}[n] for n in runs
    },
  )
  peak = timing.gemm_peak((8, 16), jnp.float32, 3)
  assert peak["size"] == 16
  assert peak["flops_per_second"] == 2 * 16**3 / 8
  assert peak["tried"]["8"] == 2 * 8**3 / 2


class Idle:
  """A step that does nothing."""

  def __init__(self, experiment, state=None):
    del experiment
    self.state = state
    self.query = self.update = self.step = lambda: None


@pytest.fixture
def idle(monkeypatch):
  """The suite of steps without their programs: each takes a known time."""
  monkeypatch.setattr(cases, "Step", Idle)
  monkeypatch.setattr(machine, "installed", lambda peer: False)
  monkeypatch.setattr(peers, "vmapped", lambda case, size: None)
  monkeypatch.setattr(timing, "fastest", lambda runs, repeats: (min(runs), {}))
  took = {"rank one query": [4, 1, 8], "rank one update": [1, 1, 2]}
  took |= {"dense query": [6, 6, 6], "torch loop": [10, 20, 30]}
  took |= {"rank one draw": [0.5, 0.5, 0.5]}

  def measure(runs, repeats):
    del repeats
    return {name: 1.0 * np.array(took.get(name, [0, 4, 2])) for name in runs}

  monkeypatch.setattr(timing, "measure", measure)


PEAK = {"flops_per_second": 1e9}
PEAKS = {"float32": PEAK}


def test_ratios_are_of_the_same_round(idle):
  rows = {row["program"]: row for row in step.run(PEAKS, quick=True)["steps"]}
  assert list(rows) == ["rank one", "dense"]
  assert rows["rank one"]["ms"] == 5000  # Of 5, 2 and 10 seconds.
  assert rows["rank one"]["ratio"] == 1
  # 6, 10 and 8 seconds: the ratio of medians would be 1.6.
  assert rows["dense"]["ms"] == 8000 and rows["dense"]["ratio"] == 1.2
  gflop = rows["rank one"]["query_gflop"]
  assert rows["rank one"]["share_of_peak"] == pytest.approx(gflop / 4)


def test_share_of_the_directions_and_the_update(idle):
  shares = step.run(PEAKS, quick=True)["noise and update"]
  assert shares[0]["program"] == "rank one"
  assert shares[0]["share"] == statistics.median([1.5 / 2, 1.5 / 5, 2.5 / 10])


def test_a_peer_that_is_missing_is_skipped_by_name(idle, monkeypatch):
  peak = PEAK | {"dtype": "float32"}
  monkeypatch.setattr(timing, "gemm_peak", lambda *_, **__: peak)
  result = report.measure("step", peers=True, quick=True)
  assert result["skipped"] == ["torch", "evosax"]
  text = report.as_text(result)
  assert "skipped: torch is not installed" in text
  programs = {row["program"] for row in result["tables"]["steps"]}
  assert not any("torch" in x or "evosax" in x for x in programs)
  assert {"JAX BPTT", "JAX BPTT, checkpointed"} < programs


def test_the_loop_of_torch_is_scaled_to_all_probes(idle, monkeypatch):
  loops = ["torch loop", "torch loop, one thread"]
  monkeypatch.setattr(machine, "installed", lambda peer: peer == "torch")
  monkeypatch.setattr(
    peers, "in_torch", lambda case, n: dict.fromkeys(["torch BPTT", *loops])
  )
  rows = {row["program"]: row for row in step.run(PEAKS, True, True)["steps"]}
  for name, seconds in zip(loops, (20, 2), strict=True):
    assert rows[name]["probes"] == 2
    assert rows[name]["probes_measured"] == 1
    assert rows[name]["ms"] == 2 * 1000 * seconds
  assert rows["torch BPTT"]["ms"] == 2000
  assert "evosax Open_ES" not in rows


def test_flops_of_dense_probes_have_a_closed_form():
  case = cases.lstm("tiny", B, FEW)
  assert case.num_probes == FEW
  # The vocabulary is larger than a batch: embedding times input is one table.
  table = V * E * 4 * HIDDEN
  token = 4 * HIDDEN * D + HIDDEN * V
  found = cases.query_flops(cases.zero_order(case, "dense"))
  assert found == 2 * (2 * FEW) * (table + B * T * token)


def test_flops_of_rank_one_probes_share_the_table():
  case = cases.lstm("tiny", B, FEW)
  table = V * E * 4 * HIDDEN
  token = 4 * HIDDEN * D + HIDDEN * V
  # Beside it, with E + a bᵀ and W + c dᵀ: bᵀ W of a probe, E c of a query, and
  # the outer products of the two initial states.
  factors = FEW * (E * 4 * HIDDEN + 2 * HIDDEN) + 2 * FEW * V * E
  found = cases.query_flops(cases.zero_order(case))
  assert found == 2 * (table + 2 * FEW * B * T * token + factors)


@pytest.mark.parametrize(
  ("make", "count", "shape"),
  [
    (lambda: cases.lstm("tiny", B, FEW), 150740, (B, T)),
    (lambda: cases.lstm("small", 1, FEW, 12, 4), 1139700, (1, 12)),
    (lambda: cases.lstm("medium", 1, FEW), 10627700, (1, T)),
    (lambda: cases.lstm("large", 1, FEW), 112606100, (1, T)),
    # Two chunks of 100, of which the last 100 predictions count.
    (lambda: cases.dnc(128, FEW), 134053, (1, 200)),
    (lambda: cases.dnc(1024, FEW), 6553893, (1, 200)),
    (lambda: cases.dnc(128, FEW, "random"), 245413, (1, 200)),
  ],
)
def test_cases_are_of_the_papers_sizes(make, count, shape):
  case = make()
  inputs, targets, weights = cases.sequences(case)
  assert inputs.shape == targets.shape == weights.shape == shape
  np.testing.assert_array_equal(inputs[:, 1:], targets[:, :-1])
  assert cases.num_parameters(case) == count
  if "DNC" in case.name:
    assert weights.sum() == 100


def test_all_read_the_same_loss():
  case = cases.lstm("tiny", B, FEW)
  inputs, targets, weights = cases.sequences(case)
  loss_fn, batch = cases.loss(case)

  def chances(params):
    carry = case.model.initial_carry(params, B)
    _, logits = case.model.apply(params, carry, jnp.asarray(inputs))
    return jax.nn.log_softmax(logits)

  params = jax.jit(case.model.init)(jax.random.key(0))
  found = np.asarray(jax.jit(chances)(params))
  losses = -np.take_along_axis(found, targets[..., None], axis=2)[..., 0]
  expected = np.sum(losses * weights) / np.sum(weights)
  lean = lambda params, batch: loss_fn(memory._with_no_factors(params), batch)
  for loss in (loss_fn, lean):
    found = float(jax.jit(loss)(params, batch))
    assert found == pytest.approx(expected, rel=1e-5)


def test_peak_counts_what_is_given_once():
  state = {"x": jax.ShapeDtypeStruct((1000,), jnp.float32)}
  unread = jax.ShapeDtypeStruct((500,), jnp.float32)
  step = lambda state, unread: {"x": state["x"] + 1}
  given = (state, unread)
  peak = lambda **options: memory._peak(jax.jit(step, **options), given)
  # And some bytes that point to the results.
  assert 10_000 <= peak() < 10_100
  assert 6_000 <= peak(donate_argnums=0) < 6_100


def test_memory_of_a_tiny_step():
  case = cases.lstm("tiny", FEW, num_probes=8)
  params = 4 * cases.num_parameters(case)
  plain, lean = (
    memory.forward_bytes(cases.lstm("tiny", 2 * FEW, 0), lean)
    for lean in (False, True)
  )
  query = memory.query_bytes(cases.zero_order(case, probe_batch=1))
  # Parameters, and the logits of twice as many rows.
  least = params + 4 * 2 * FEW * T * V
  assert least < min(plain, lean) < 3 * least
  assert least < query < 1.25 * max(plain, lean)


def test_memory_ratios(monkeypatch):
  monkeypatch.setattr(
    memory, "forward_bytes", lambda case, lean: 10**6 * (1 if lean else 2)
  )
  monkeypatch.setattr(memory, "query_bytes", lambda experiment: 1_200_000)
  monkeypatch.setattr(memory, "update_bytes", lambda experiment: 1_300_000)
  sgd, adam = memory._steps("tiny", 2, (1,), "rank one")
  assert sgd["ratio_to_forward"] == 0.65 and sgd["ratio_to_lean"] == 1.3
  assert sgd["target"] == 1.1 and not sgd["met"]
  # Two moments and a counter; the query holds them as well.
  moments = 2 * 4 * 150740 + 4
  assert adam["moments_mb"] == moments / 1e6
  assert adam["query_mb"] == (1_200_000 + moments) / 1e6
  assert adam["ratio_to_lean"] == pytest.approx(1.2) and not adam["met"]


def test_the_command_writes_what_it_prints(tmp_path):
  path = tmp_path / "kernels.json"
  options = ("--suite=kernels", "--quick", "--json", f"--output={path}")
  done = small.run(*small.command("bench", *options))
  assert done.returncode == 0, done.stderr
  printed = json.loads(done.stdout)
  assert printed == json.loads(path.read_text())
  assert printed["suite"] == "kernels" and printed["quick"]
  assert printed["machine"]["jax"] == jax.__version__
  assert printed["machine"]["command"].endswith(" ".join(options))
  assert platform.node() not in done.stdout
  titles = "signs", "updates", "LSTM layer", "LSTM kernel"
  assert list(printed["tables"]) == [*titles, "LSTM kernel, population"]
  for rows in printed["tables"].values():
    numbers = [x for row in rows for x in row.values() if isinstance(x, float)]
    assert numbers and all(math.isfinite(x) and x > 0 for x in numbers)


def test_an_output_that_cannot_be_written_is_refused_first(tmp_path):
  path = tmp_path / "none" / "a.json"
  done = small.run(*small.command("bench", "--suite=step", f"--output={path}"))
  assert done.returncode == 1 and not done.stdout
  assert f"cannot write to the output '{path}'" in done.stderr


def test_results_survive_json(idle, monkeypatch):
  monkeypatch.setattr(
    timing, "fastest", lambda runs, repeats: (1, dict.fromkeys(runs, 0.5))
  )
  result = step.run(PEAKS, with_peers=True, quick=True)
  assert result["steps"][0]["tried_ms"] == {"1": 0.5, "2": 0.5}
  assert json.loads(json.dumps(result)) == result


def test_tables_are_aligned():
  rows = [
    {"program": "a", "ms": 1234.5678, "ms_quartiles": [1.0, 2.5], "met": True},
    {"program": "longer", "sizes": [1, 2], "tried_ms": {"1": 2.0}},
  ]
  result = {"machine": {"cores": 2}, "tables": {"some": rows}}
  assert report.as_text(result).splitlines() == [
    "cores          2",
    "",
    "some",
    "program  ms             met   sizes",
    "a        1235 [1, 2.5]  True  -",
    "longer   -              -     1, 2",
  ]


def test_only_steps_have_peers():
  with pytest.raises(ValueError, match="suite memory has no peers"):
    report.measure("memory", peers=True)
