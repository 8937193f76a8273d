"""How many probes run at once: padding, the memory model, and its failures."""

import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from jax.sharding import Mesh

from zorn_jax import build, memory, plan, probe_batch, probe_map, train
from zorn_jax.step import programs
from zorn_jax.train_state import digest

pytestmark = pytest.mark.optimized

LSTM = small.ROOT / "configs" / "paper" / "lstm.py"
LOW_RANK = {"name": "low_rank", "rank": 1, "base": "rademacher"}


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("size", [None, 1, 2, 4, 5, 7, 9])
@pytest.mark.parametrize("name", ["map", "keep"])
def test_no_probe_is_dropped(devices, size, name):
  n = 7 * devices
  keys = jax.random.split(jax.random.key(0), n)
  vectors = jax.random.normal(jax.random.key(1), (n, 3))
  weight = jax.random.normal(jax.random.key(2), (4, 3))
  mesh = Mesh(np.array(jax.devices()[:devices]), ("probe",))
  policy = probe_map.sharded(mesh, size)
  bodies = []

  def fn(x, weight):
    bodies.append(None)
    key, vector = x
    return {"a": jnp.tanh(weight @ vector), "b": jax.random.normal(key)}

  run = jax.jit(lambda *args: getattr(policy, name)(fn, args[:2], args[2]))
  found = run(keys, vectors, weight)
  # One by one, in NumPy where it is arithmetic.
  a = np.tanh(np.asarray(vectors) @ np.asarray(weight).T)
  b = [jax.random.normal(key) for key in keys]
  np.testing.assert_allclose(found["a"], a, rtol=1e-5)
  np.testing.assert_array_equal(found["b"], b)
  assert len(bodies) == 1  # One body, whatever is left over.


def test_batches_are_equal():
  """Of 7 probes 3 at once: 9 evaluations, all of them three at a time."""
  program = jax.make_jaxpr(
    lambda xs: probe_map.sequential(3).map(lambda x: jnp.sin(x), xs)
  )(jnp.ones(7))
  sines = [line for line in str(program).splitlines() if "= sin " in line]
  assert len(sines) == 1 and "f32[3]" in sines[0]


def modelled(monkeypatch, one, each, held=1000, update=0, most=96, wanted=0):
  """A batching whose queries need one, one + each, … bytes."""
  monkeypatch.setattr(plan, "memory", lambda _: plan.Memory(held, one, update))
  monkeypatch.setattr(plan, "query_bytes", lambda k: one + (k - 1) * each)
  return probe_batch.Batching(wanted, most, 1, lambda k: k)


@pytest.mark.parametrize("most", [1, 7, 96])
@pytest.mark.parametrize("available", [1, 2000, 4000, 10**4, 10**5])
def test_the_most_that_fit_in_equal_batches(monkeypatch, most, available):
  batching = modelled(monkeypatch, 300, 100, most=most)
  choice = probe_batch.choose(batching, available)
  need = lambda k: 1000 + 300 + (k - 1) * 100
  fit = [k for k in range(1, most + 1) if need(k) <= 0.8 * available] or [1]
  assert choice.fitting == fit[-1]
  assert choice.size <= choice.fitting
  # As few batches as with the most that fit, and no smaller ones would do.
  batches = math.ceil(most / choice.fitting)
  assert math.ceil(most / choice.size) == batches
  assert choice.size == 1 or math.ceil(most / (choice.size - 1)) > batches
  assert choice.peak_bytes(choice.size) == need(choice.size)
  assert choice.least_bytes == need(1)


def test_what_the_choice_goes_by(monkeypatch):
  def size(*args, each=10**6, **kwargs):
    batching = modelled(monkeypatch, 300, each, **kwargs)
    return probe_batch.choose(batching, *args).size

  assert size(None) == 96
  assert size(10**6) == 1
  # A core's caches hold a few of them, but not below four if those fit.
  assert size(None, 4) == 16
  assert size(None, 1) == size(None, 4, each=10**8) == 4
  assert size(2 * 10**6, 4) == 2
  # What was asked for, or had before, is taken.
  assert size(10**6, 4, wanted=40) == 40
  assert size(10**6, 4, 12, wanted=40) == 12
  # The update needs what it needs.
  batching = modelled(monkeypatch, 300, 100, update=5000)
  choice = probe_batch.choose(batching, 7500)
  assert choice.peak_bytes(1) == choice.peak_bytes(40) == 6000
  assert choice.size == choice.fitting == 48


def test_what_cannot_fit_is_refused(monkeypatch):
  batching = modelled(monkeypatch, 300, 100)
  probe_batch.check(probe_batch.choose(batching, None))
  probe_batch.check(probe_batch.choose(batching, 1300))
  with pytest.raises(ValueError, match=r"about 1,300 bytes .* 1,299 are"):
    probe_batch.check(probe_batch.choose(batching, 1299))


DENSE = {"name": "rademacher"}
MODELS = [
  ("tiny", 64, LOW_RANK, 8),
  ("small", 16, DENSE, 1),
  *[
    pytest.param(*row, marks=pytest.mark.slow)
    for row in (
      ("tiny", 8, LOW_RANK, 1),
      ("tiny", 8, DENSE, 2),
      ("tiny", 512, DENSE, 16),
      ("small", 16, LOW_RANK, 4),
    )
  ],
]


@pytest.mark.parametrize(("size", "rows", "direction", "at_once"), MODELS)
def test_the_model_is_within_twice_of_the_compilers(
  size, rows, direction, at_once
):
  config = small.config(
    LSTM,
    size,
    batch_size=rows,
    num_probes=16,
    estimator__direction=direction,
    estimator__probe_batch=at_once,
  )
  experiment = build.experiment(config)
  choice = probe_batch.choose(build.batching(config, experiment))
  parts = programs(experiment)
  data = jax.eval_shape(lambda: experiment.task.data)
  query = parts.query.lower(parts.template, data).compile()
  actual = query.memory_analysis()
  total = actual.temp_size_in_bytes + actual.argument_size_in_bytes
  expected = choice.one.held + plan.query_bytes(experiment)
  assert total / 2 < expected < 2 * total
  # The chord is not below what the walk finds between its ends.
  estimate = choice._replace(one=choice.one._replace(update=0))
  assert 0.999 * expected < estimate.peak_bytes(at_once) < 1.3 * expected


def files(root, contents):
  for name, text in contents.items():
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text)


KERNEL = {"proc/meminfo": "MemTotal: 900 kB\nMemAvailable:   800 kB\n"}
VERSION_1 = {
  "proc/self/cgroup": "9:cpu:/a\n4:memory,misc:/a/b\n",
  "sys/fs/cgroup/memory/a/b/memory.limit_in_bytes": f"{2**63 - 4096}\n",
  "sys/fs/cgroup/memory/a/b/memory.usage_in_bytes": "100\n",
  "sys/fs/cgroup/memory/a/memory.limit_in_bytes": "5000\n",
  "sys/fs/cgroup/memory/a/memory.usage_in_bytes": "3000\n",
  "sys/fs/cgroup/memory/a/memory.stat": (
    "inactive_file 1\ntotal_inactive_file 700\n"
  ),
}
VERSION_2 = {
  "proc/self/cgroup": "0::/a\n",
  "sys/fs/cgroup/a/memory.max": "max\n",
  "sys/fs/cgroup/a/memory.current": "100\n",
  "sys/fs/cgroup/memory.max": "6000\n",
  "sys/fs/cgroup/memory.current": "1000\n",
}


@pytest.mark.parametrize(
  ("contents", "expected"),
  [
    ({}, None),
    (KERNEL, 800 * 1024),
    (KERNEL | VERSION_1, 5000 - 3000 + 700),
    (KERNEL | VERSION_2, 6000 - 1000),
    (VERSION_2, 5000),
  ],
)
def test_what_the_host_has_left(tmp_path, contents, expected):
  files(tmp_path, contents)
  assert memory.host(tmp_path) == expected


def test_devices_of_a_cpu_share_the_host(monkeypatch):
  monkeypatch.setattr(memory, "host", lambda: 1000)
  assert memory.available(4) == 250
  monkeypatch.setattr(memory, "host", lambda: None)
  assert memory.available(4) is None


def prepared(**overrides):
  sizes = {"steps": 6, "num_probes": 4, "evaluate_every": 6}
  config = small.config(optimizer__warmup_steps=0, **sizes, **overrides)
  experiment = build.experiment(config)
  return config, experiment, build.batching(config, experiment)


def trained(workdir, monkeypatch, most=math.inf, first=0, **overrides):
  """The state's digest; queries fail above `most` from call `first` on."""
  config, experiment, batching = prepared(**overrides)
  sizes, calls = {}, []

  def rebuild(size):
    result = batching.rebuild(size)
    sizes[id(result.method)] = size, result
    return result

  def fallible(experiment):
    size, _ = sizes[id(experiment.method)]
    parts = programs(experiment)

    def query(*args):
      calls.append(size)
      if size > most and len(calls) > first:
        raise jax.errors.JaxRuntimeError(
          "RESOURCE_EXHAUSTED: Out of memory allocating 1234 bytes."
        )
      return parts.query(*args)

    return parts._replace(query=query)

  monkeypatch.setattr(train, "programs", fallible)
  train.train(
    experiment,
    workdir,
    config.to_dict(),
    (),
    batching._replace(rebuild=rebuild),
  )
  monkeypatch.undo()
  params, step = train.restore_params(experiment, workdir)
  return digest(params), step, calls


def test_out_of_memory_halves_and_goes_on(tmp_path, monkeypatch, caplog):
  run = lambda name, *args, **overrides: trained(
    tmp_path / name, monkeypatch, *args, **overrides
  )
  # Beside six steps a look at whether the next one explodes.
  params, step, calls = run("plain", estimator__probe_batch=1)
  assert (step, calls) == (6, [1] * 7)
  assert probe_batch.read(tmp_path / "plain") == 0
  found = run("failing", 1, estimator__probe_batch=4)
  assert found == (params, 6, [4, 2, *[1] * 7])
  assert probe_batch.read(tmp_path / "failing") == 1
  assert "out of memory with probe_batch=4 (RESOURCE_EXHAUSTED" in caplog.text
  # In the middle of a run: no step is lost, and none is taken twice.
  _, step, calls = run("late", 1, 4, estimator__probe_batch=4)
  assert (step, calls) == (6, [4, 4, 4, 4, 4, 2, 1, 1, 1])
  # A resumed run begins with what was noted.
  _, _, batching = prepared(estimator__probe_batch=4)
  noted = probe_batch.read(tmp_path / "late")
  assert probe_batch.choose_here(batching, noted).size == 1


def test_other_errors_are_not_caught(monkeypatch):
  def fail(*args):
    raise jax.errors.JaxRuntimeError("INTERNAL: something else")

  choice = probe_batch.choose(modelled(monkeypatch, 1, 1))
  query = probe_batch.Query(fail, choice, lambda k: fail, lambda k: None)
  with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
    query(None, None)


def test_one_probe_too_many_says_the_bytes(tmp_path, monkeypatch):
  monkeypatch.setattr(memory, "host", lambda: 10**9)
  with pytest.raises(ValueError, match=r"allocating 1234 bytes.* 1,000,000,0"):
    trained(tmp_path, monkeypatch, 0, estimator__probe_batch=4)


def test_a_process_among_several_notes_half_and_ends(tmp_path, monkeypatch):
  monkeypatch.setattr(probe_batch.processes, "count", lambda: 2)
  noted = []

  def fail(*args):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: of memory")

  choice = probe_batch.choose(modelled(monkeypatch, 1, 1, wanted=8))
  query = probe_batch.Query(fail, choice, lambda k: fail, noted.append)
  with pytest.raises(ValueError, match="noted 4: start all processes again"):
    query(None, None)
  assert noted == [4]


def test_nothing_is_claimed_where_nothing_fits(tmp_path, monkeypatch):
  monkeypatch.setattr(memory, "host", lambda: 100)
  config, experiment, batching = prepared(estimator__probe_batch=0)
  workdir = tmp_path / "run"
  with pytest.raises(ValueError, match=r"needs about [\d,]+ bytes .* but 100 "):
    train.train(experiment, workdir, config.to_dict(), (), batching)
  assert not workdir.exists()


def test_a_chosen_number_stays_with_its_run(tmp_path, monkeypatch):
  """Chosen for little memory first, with plenty of it later."""
  config, experiment, batching = prepared(estimator__probe_batch=0)
  need = probe_batch.choose(batching)
  room = need.peak_bytes(2) / 0.8 + 1
  monkeypatch.setattr(memory, "host", lambda: int(room))
  run = lambda: train.train(
    experiment, tmp_path, config.to_dict(), (), batching
  )
  assert run()
  assert probe_batch.read(tmp_path) == 2
  monkeypatch.undo()
  assert probe_batch.choose_here(batching).size == 4
  assert run()
  assert probe_batch.read(tmp_path) == 2


@pytest.mark.parametrize("text", ["", "0", "-2", "many"])
def test_a_note_that_is_none_is_refused(tmp_path, text):
  (tmp_path / probe_batch.NAME).write_text(text)
  with pytest.raises(ValueError, match="must hold how many probes"):
    probe_batch.read(tmp_path)


def test_back_propagation_has_no_probes():
  path = small.ROOT / "configs" / "shakespeare.py"
  config = small.config(path, "bptt")
  assert build.batching(config, build.experiment(config)) is None


def test_tuning_leaves_out_what_does_not_fit(monkeypatch):
  _, _, batching = prepared(estimator__probe_batch=0)
  choice = probe_batch.choose(batching)._replace(fitting=3, size=3)
  assert list(probe_batch.tune(batching, choice, 1)) == [1, 2, 3]


_LIMITED = """
import resource, sys
sys.path.insert(0, "tests")
import jax, pathlib, small
from zorn_jax import build, probe_batch, train
config = small.config(
  batch_size=256, num_probes=512, steps=2, evaluate_every=2,
  model__hidden_size=64, optimizer__warmup_steps=0, estimator__probe_batch=512
)
experiment = build.experiment(config)
jax.devices()
held = int(open("/proc/self/statm").read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (held + 1_500_000_000,) * 2)
workdir = pathlib.Path(sys.argv[1])
batching = build.batching(config, experiment)
assert train.train(experiment, workdir, config.to_dict(), (), batching)
print(probe_batch.read(workdir), batching.wanted)
"""


@pytest.mark.slow
@pytest.mark.skipif(
  not os.path.exists("/proc/self/statm"), reason="only Linux limits it so"
)
def test_memory_that_runs_out_in_earnest(tmp_path):
  done = subprocess.run(
    [sys.executable, "-c", _LIMITED, str(tmp_path)],
    cwd=small.ROOT,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  found, wanted = map(int, done.stdout.splitlines()[-1].split())
  assert 1 <= found < wanted
  assert "out of memory with probe_batch=512" in done.stderr


def test_command_prints_and_tunes():
  overrides = [f"--config.{name}={x}" for name, x in small.OVERRIDES.items()]
  command = small.command("plan", f"--config={small.COPY}", *overrides)
  done = small.run(*command, "--tune", "--config.mesh.probe=1")
  assert done.returncode == 0, done.stderr
  lines = {
    line.split()[0]: line.split()[-1]
    for line in done.stdout.splitlines()
    if line
  }
  assert lines["probe_batch"] and {"1", "2", "4"} < set(lines)
  assert int(lines["peak_bytes_estimate"].replace(",", "")) >= int(
    lines["peak_bytes_with_one_probe"].replace(",", "")
  )
  assert done.stdout.splitlines()[-1].startswith("The fastest: ")
  done = small.run(*command, "--tune", "--devices=2")
  assert done.returncode == 1
  assert "Leave out --devices" in done.stderr
