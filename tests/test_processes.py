"""Processes find each other, agree, stop together, and never wait in vain."""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import types

import jax
import pytest
import small

from zorn_jax import processes

pytestmark = pytest.mark.optimized

SLOW = pytest.mark.slow
MODULE = pathlib.Path(processes.__file__)
# Only the first of several processes writes compiled programs to a cache: later
# it would wait for those that compile, which Gloo allows for 30 seconds.
ENVIRON = {
  "JAX_PLATFORMS": "cpu",
  "XLA_FLAGS": "",
  "JAX_ENABLE_COMPILATION_CACHE": "false",
}

# The module alone: importing the package takes longer than most tests.
PROGRAM = """
import importlib.util, os, signal, sys, time
import numpy as np
from jax.experimental import multihost_utils
spec = importlib.util.spec_from_file_location("processes", sys.argv[1])
processes = importlib.util.module_from_spec(spec)
spec.loader.exec_module(processes)
address, number, index = sys.argv[2], int(sys.argv[3]), int(sys.argv[4])

def steps(wait=0.005):
  step = 0
  while not processes.stopping(step):
    multihost_utils.process_allgather(np.float32(index))
    step += 1
    if step == 3:
      print("stepping", flush=True)
    time.sleep(wait)
  return step

try:
  exec(sys.argv[5])
  with processes.started(address, number, index):
    exec(sys.argv[6])
except ValueError as error:
  sys.exit(f"error: {error}")
"""


def free_port():
  with socket.create_server(("", 0)) as server:
    return server.getsockname()[1]


class Run:
  """Processes of one run, each of which executes the same statements."""

  def __init__(self, body, number=2, before=""):
    self.address = f"127.0.0.1:{free_port()}"
    self.processes = [
      subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(MODULE), self.address]
        + [str(number), str(index), before, body],
        env=os.environ | ENVIRON,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
      )
      for index in range(number)
    ]

  def __enter__(self):
    return self

  def __exit__(self, *error):
    for process in self.processes:
      process.kill()  # SIGTERM would be caught.
      process.communicate()

  def until_stepping(self):
    for process in self.processes:
      while (line := process.stdout.readline()) != "stepping\n":
        assert line, process.stderr.read()

  def results(self, timeout=30):
    """Status, what was printed, and the last line of errors, of each."""
    end = time.monotonic() + timeout
    found = []
    for process in self.processes:
      out, err = process.communicate(timeout=end - time.monotonic())
      lines = [line for line in out.splitlines() if "Gloo" not in line]
      found.append((process.returncode, lines, (err.splitlines() or [""])[-1]))
    return found


def test_first_value_is_shared_and_a_barrier_waits():
  body = """
assert processes.count() == 2 and processes.is_first() == (index == 0)
print(processes.share(7 + index), processes.share(f"from {index}"))
processes.agree({"same": "1"})
if index == 0:
  time.sleep(0.5)
  before = time.time()
processes.barrier("here")
after = time.time()
print(processes.share(before if index == 0 else None) < after)
"""
  with Run(body) as run:
    expected = (0, ["7 from 0", "True"], "")
    assert run.results() == [expected, expected]


def test_differences_are_named_in_every_process():
  body = """
facts = {"same": "1", "rate": "0.1" if index else "0.2"}
if index == 2:
  facts["extra"] = "x"
processes.agree(facts)
print("not here")
"""
  with Run(body, number=3) as run:
    message = (
      "error: the processes differ: in process 1 rate is 0.1, but 0.2 in "
      "process 0; in process 2 extra is x, but missing in process 0; in "
      "process 2 rate is 0.1, but 0.2 in process 0. Start all of them with the "
      "same command, config and versions."
    )
    assert run.results() == [(1, [], message)] * 3


def test_another_version_of_jax_is_refused_before_jax_meets_it():
  before = """
processes.metadata.version = lambda name: f"{name} {index}"
processes.jax.distributed.initialize = None
"""
  with Run("print('not here')", before=before) as run:
    message = (
      "error: the processes differ: in process 1 jax is jax 1, but jax 0 in "
      "process 0; in process 1 jaxlib is jaxlib 1, but jaxlib 0 in process 0. "
      "Start all of them with the same command, config and versions."
    )
    assert run.results() == [(1, [], message)] * 2


@pytest.mark.parametrize("victim, number", [(0, 2), (1, 3)])
def test_a_killed_process_ends_the_others(victim, number):
  with Run("steps()", number) as run:
    run.until_stepping()
    start = time.monotonic()
    run.processes[victim].kill()
    results = run.results(timeout=20)
    assert time.monotonic() - start < 10
    for index, (status, _, message) in enumerate(results):
      if index == victim:
        assert status == -signal.SIGKILL
        continue
      assert status == 1
      assert message == (
        f"error: process {victim} of {number} ended before the run did, so "
        f"process {index} ends too. See its output, and resume with the same "
        "command."
      )


@pytest.mark.parametrize("victim, number", [(0, 2), (1, 3)])
def test_an_error_in_one_process_ends_the_others_with_its_reason(
  victim, number
):
  """Although these wait for it in a collective, without an end."""
  body = f"""
if index == {victim}:
  step = 0
  while step < 5:
    multihost_utils.process_allgather(np.float32(index))
    step += 1
  raise ValueError("the disk is full")
steps()
"""
  with Run(body, number) as run:
    for index, (status, _, message) in enumerate(run.results()):
      assert status == 1
      assert message == (
        "error: the disk is full"
        if index == victim
        else f"error: process {victim} of {number} failed (the disk is full), "
        f"so process {index} ends too. See its output, and resume with the "
        "same command."
      )


def test_an_error_that_all_find_is_each_ones_own():
  body = "time.sleep(2 * index); raise ValueError('no such loss')"
  with Run(body) as run:
    assert run.results() == [(1, [], "error: no such loss")] * 2


def test_a_process_that_leaves_while_the_others_are_busy_ends_them():
  """No collective tells them: they compute on, or sleep, on their own."""
  with Run("if index == 0: time.sleep(60)\nos._exit(0)") as run:
    (status, _, message), _ = run.results()
    assert status == 1
    assert message.startswith("error: process 1 of 2 ended before the run did")


@pytest.mark.parametrize("victim", (pytest.param(0, marks=SLOW), 1))
def test_a_frozen_process_ends_the_others(victim):
  with Run("steps()", before="processes._SILENCE = 3") as run:
    run.until_stepping()
    run.processes[victim].send_signal(signal.SIGSTOP)
    other = run.processes[1 - victim]
    _, err = other.communicate(timeout=20)
    assert other.returncode
    assert "another task died" in err  # JAX's words.


@pytest.mark.parametrize(
  "name", ("SIGTERM", pytest.param("SIGINT", marks=SLOW))
)
def test_a_signal_to_one_stops_all_after_the_same_step(name):
  with Run("print(steps())") as run:
    run.until_stepping()
    run.processes[1].send_signal(getattr(signal, name))
    first, second = run.results()
    assert first[:2] == second[:2]
    assert first[0] == 0 and int(first[1][0]) > 3


def test_the_last_process_may_take_its_time_at_the_end():
  """The first writes files when the others are done."""
  body = "if index == 0: time.sleep(2); print('written')"
  with Run(body, before="processes._GRACE = processes._NOTICE = 0") as run:
    assert run.results() == [(0, ["written"], ""), (0, [], "")]


def meet(*places):
  """What each place gets: its links, or the error."""
  results = [None] * len(places)

  def run(index):
    try:
      results[index] = processes._meet(places[index])
      for link in results[index].values():
        link.close()
    except ValueError as error:
      results[index] = str(error)

  threads = [
    threading.Thread(target=run, args=(index,)) for index in range(len(places))
  ]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(30)
  return results


def places(number, *indices, host="127.0.0.1"):
  address = f"{host}:{free_port()}"
  return [processes._Place(address, number, index) for index in indices]


@pytest.mark.parametrize("host", ("127.0.0.1", "localhost", "[::1]"))
def test_processes_meet_in_any_order(host):
  if host == "[::1]" and not socket.has_dualstack_ipv6():
    pytest.skip("no IPv6 here")
  found = meet(*places(4, 3, 1, 0, 2, host=host))
  assert [sorted(links) for links in found] == [[0], [0], [1, 2, 3], [0]]


@pytest.mark.parametrize("host", ("127.0.0.1", "no.such.host.invalid"))
def test_a_coordinator_that_does_not_answer_is_named(monkeypatch, host):
  monkeypatch.setattr(processes, "_PATIENCE", 2)
  (place,) = places(2, 1, host=host)
  start = time.monotonic()
  (message,) = meet(place)
  assert 1 < time.monotonic() - start < 10
  assert message.startswith(
    f"the coordinator at {place.address} did not answer within 2 s ("
  )
  assert message.endswith("Start process 0 there, or correct the address.")


def test_processes_that_do_not_come_are_named_by_all_that_did(monkeypatch):
  monkeypatch.setattr(processes, "_PATIENCE", 2)
  given = places(4, 0, 2)
  message = (
    f"process 1, 3 of 4 did not come to {given[0].address} within 2 s. Start "
    "all of them, where they can reach that address."
  )
  assert meet(*given) == [message] * 2


def test_two_processes_with_one_number_are_refused():
  message = "two processes have the process_id 1. Number them from 0 to 2."
  assert meet(*places(3, 0, 1, 1)) == [message] * 3


def test_different_numbers_of_processes_are_refused():
  first, other = places(2, 0, 1)
  message = (
    "num_processes is 3 in process 1, but 2 in process 0. Give all of them the "
    "same."
  )
  assert meet(first, other._replace(count=3)) == [message] * 2


def test_strangers_and_a_process_that_starts_again_do_no_harm():
  first, *others = places(3, 0, 1, 2)
  host, port = first.address.split(":")

  def disturb():
    # The last one says hello as process 1, and dies.
    for words in (b"GET / HTTP/1.1\r\n", b"[1]\n", b"7\n", b"", b"[1, 3]\n"):
      while True:
        with contextlib.suppress(ConnectionRefusedError):
          with socket.create_connection((host, int(port)), 5) as stranger:
            stranger.sendall(words)
          break
        time.sleep(0.01)
    found.extend(meet(*others))

  found = []
  thread = threading.Thread(target=disturb)
  thread.start()
  (links,) = meet(first)
  thread.join(30)
  assert sorted(links) == [1, 2]
  assert [sorted(links) for links in found] == [[0], [0]]


def test_a_taken_port_is_said(monkeypatch):
  with socket.create_server(("", 0)) as server:
    port = server.getsockname()[1]
    with pytest.raises(ValueError) as info:
      with processes.started(f"localhost:{port}", 2, 0):
        pass
    assert str(info.value) == (
      f"process 0 cannot listen on port {port} of localhost:{port}: Address "
      "already in use. Choose another port."
    )
    # To the others it is something that listens, but does not answer.
    monkeypatch.setattr(processes, "_PATIENCE", -9.5)
    with pytest.raises(ValueError, match="is not process 0 of this run"):
      processes._call(
        processes._Place(f"localhost:{port}", 2, 1),
        "localhost",
        port,
        time.monotonic() + 5,
      )


@pytest.mark.parametrize(
  "arguments, message",
  [
    ((None, 2, None), "coordinator and process_id must be given too"),
    (("a:1", None, 0), "num_processes must be given too"),
    (("a:1", 2, None), "process_id must be given too"),
    (("a:1", 1, None), "process_id must be given too"),
    (("a:1", 2, 2), "process_id must be from 0 to 1 .* got 2"),
    (("a:1", 2, -1), "process_id must be from 0 to 1 .* got -1"),
    (("a:1", 0, 0), "num_processes must be at least 1, got 0"),
    ((None, 0, None), "num_processes must be at least 1, got 0"),
    (("a", 2, 0), "coordinator must be HOST:PORT, got 'a'"),
    (("a:", 2, 0), "coordinator must be HOST:PORT"),
    ((":1", 2, 0), "coordinator must be HOST:PORT"),
    (("a:b", 2, 0), "coordinator must be HOST:PORT"),
    (("a:0", 2, 0), "coordinator must be HOST:PORT"),
    (("a:65536", 2, 0), "coordinator must be HOST:PORT"),
  ],
)
def test_wrong_arguments_are_refused(arguments, message):
  with pytest.raises(ValueError, match=message):
    with processes.started(*arguments):
      pass


SLURM = {
  "SLURM_JOB_ID": "4103",
  "SLURM_STEP_NODELIST": "node[07-08]",
  "SLURM_STEP_NUM_TASKS": "2",
  "SLURM_NTASKS": "2",
  "SLURM_PROCID": "1",
  "SLURM_LOCALID": "0",
}
# As in a batch script of several tasks, before any `srun`.
BATCH = {**SLURM, "SLURM_PROCID": "0"}
del BATCH["SLURM_STEP_NODELIST"], BATCH["SLURM_STEP_NUM_TASKS"]
OPEN_MPI = {
  "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
  "OMPI_COMM_WORLD_SIZE": "4",
  "OMPI_COMM_WORLD_RANK": "2",
  "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}
POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"}


@pytest.fixture
def cluster(monkeypatch):
  """Sets an environment; returns what JAX is started with."""
  for name in list(os.environ):
    if name.startswith(("SLURM_", "OMPI_", "JAX_COORD", "KUBER", "JOB_COMP")):
      monkeypatch.delenv(name)
  calls = []
  monkeypatch.setattr(
    jax.distributed, "initialize", lambda *given, **rest: calls.append(given)
  )
  monkeypatch.setattr(jax.distributed, "shutdown", lambda: None)
  monkeypatch.setattr(processes, "_meet", lambda place: {})
  monkeypatch.setattr(processes, "agree", lambda facts: None)
  monkeypatch.setattr(processes._Group, "exchange", lambda *given: None)

  def start(environ, *arguments):
    for name, value in environ.items():
      monkeypatch.setenv(name, value)
    calls.clear()
    with processes.started(*arguments):
      pass
    return calls

  return start


def test_one_process_starts_nothing(cluster):
  assert cluster({}) == []
  assert cluster({}, None, 1) == []
  assert cluster({}, "a:1", 1, 0) == []


def test_arguments_win_over_a_cluster(cluster):
  assert cluster(SLURM, "a:1", 3, 2) == [("a:1", 3, 2, None)]
  assert cluster(SLURM, None, 1) == []


@pytest.mark.parametrize(
  "environ, expected",
  [
    (SLURM, ("node07:61447", 2, 1, [0])),
    ({**SLURM, "SLURM_NTASKS": "8"}, ("node07:61447", 2, 1, [0])),
    ({**SLURM, "SLURM_STEP_NUM_TASKS": "1"}, None),
    (BATCH, None),
    (OPEN_MPI, ("10.96.0.1:62624", 4, 2, [1])),
    ({**OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "1"}, None),
    # `mpirun` in a job of SLURM, whose step holds its daemons.
    ({**SLURM, **OPEN_MPI}, ("10.96.0.1:62624", 4, 2, [1])),
    ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),
  ],
)
def test_clusters_are_detected(cluster, environ, expected):
  assert cluster(environ) == ([expected] if expected else [])


@pytest.mark.parametrize("parallelism", (1, 3))
def test_kubernetes_is_detected(cluster, monkeypatch, parallelism):
  from jax._src.clusters import K8sCluster

  monkeypatch.setattr(processes.importlib.util, "find_spec", lambda name: True)
  job = types.SimpleNamespace(
    spec=types.SimpleNamespace(parallelism=parallelism)
  )
  for name, value in {
    "is_env_present": lambda: True,
    "_job": lambda: job,
    "get_coordinator_address": lambda **_: "train-0.train:55527",
  }.items():
    monkeypatch.setattr(K8sCluster, name, value)
  expected = ("train-0.train:55527", 3, 1, None)
  assert cluster(POD) == ([expected] if parallelism > 1 else [])


@pytest.mark.parametrize(
  "environ, package",
  [
    (POD, "kubernetes"),
    ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}, "mpi4py"),
  ],
)
def test_a_package_that_a_cluster_needs_is_named(
  cluster, monkeypatch, environ, package
):
  monkeypatch.setattr(processes.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ValueError, match=f"the package {package}, .* missing"):
    cluster(environ)
  assert cluster(environ, None, 1) == []


def test_an_unreadable_cluster_is_a_sentence(cluster):
  with pytest.raises(ValueError, match="from slurm: .*SLURM_JOB_ID.* Give"):
    cluster({name: x for name, x in SLURM.items() if name != "SLURM_JOB_ID"})


def test_the_command_compares_configs(tmp_path):
  given = [f"--coordinator=127.0.0.1:{free_port()}", "--num_processes=2"]
  started = [
    subprocess.Popen(
      small.train_command(
        tmp_path / "run",
        *given,
        f"--process_id={index}",
        f"--config.learning_rate={0.01 * (1 + index)}",
      ),
      cwd=small.ROOT,
      env=os.environ | ENVIRON,
      stderr=subprocess.PIPE,
      text=True,
    )
    for index in (0, 1)
  ]
  for process in started:
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err == (
      "error: the processes differ: in process 1 config.learning_rate is 0.02, "
      "but 0.01 in process 0. Start all of them with the same command, config "
      "and versions.\n"
    )
  assert not (tmp_path / "run").exists()


def train_together(workdir, number):
  """The journal of a run that some processes train."""
  place = []
  if number > 1:
    place = [f"--coordinator=127.0.0.1:{free_port()}"]
    place += [f"--num_processes={number}"]
  overrides = ["--config.num_probes=8", "--config.steps=40"]
  overrides += ["--config.estimator.probe_batch=2"]
  # What a search finds is saved by all of them.
  overrides += ["--config.search.enabled=True", "--config.search.depth=1"]
  overrides += ["--config.optimizer.warmup_steps=0"]
  started = [
    subprocess.Popen(
      small.train_command(workdir, *overrides, *place)
      + ([f"--process_id={index}"] if place else []),
      cwd=small.ROOT,
      env=os.environ | ENVIRON,
      stderr=subprocess.PIPE,
      text=True,
    )
    for index in range(number)
  ]
  errors = [process.communicate(timeout=300)[1] for process in started]
  assert [process.returncode for process in started] == [0] * number, errors
  return (workdir / "journal").read_bytes()


def last_digest(workdir):
  """Of the state after the last step."""
  summary = workdir / "checkpoints" / "40" / "summary" / "metadata"
  return json.loads(summary.read_text())["summary"]["digest"]


@pytest.mark.parametrize("number", (2, pytest.param(4, marks=SLOW)))
def test_every_loss_is_the_same_in_several_processes(number, tmp_path):
  one, many = tmp_path / "one", tmp_path / "many"
  journal = train_together(one, 1)
  assert train_together(many, number) == journal
  digest = last_digest(one)
  assert last_digest(many) == digest
  # Cut short in step 34 by one process, and resumed by several.
  shutil.rmtree(one / "checkpoints" / "40")
  record = 16 + 4 * 8 * 2
  os.truncate(one / "journal", 52 + 33 * record + 7)
  assert train_together(one, number) == journal
  assert last_digest(one) == digest
